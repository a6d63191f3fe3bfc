"""The app's interface for programs."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapter_files import ModelsOnDisk, write_models
from PIL import Image
from training_jobs import play_runs

gradio = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")

from svft_diffusion.app.config import AppConfig  # noqa: E402
from svft_diffusion.app.serving.api import _endpoint  # noqa: E402
from svft_diffusion.app.serving.launch import build_app, launch  # noqa: E402
from svft_diffusion.cli.main import run_command  # noqa: E402
from svft_diffusion.sampling.png import read_png_settings  # noqa: E402
from svft_diffusion.sampling.sample import SamplingConfig, sample  # noqa: E402

ROOT = Path(__file__).parents[1]
STEPS = 2
VISITOR = httpx.Client(timeout=60)  # one for all: each reads the certificates of this machine anew
ENDPOINTS = {
    "/generate",
    "/list_adapters",
    "/list_bases",
    "/set_weights",
    "/start_training",
    "/stop_training",
    "/training_status",
}


@dataclass(frozen=True)
class RunningApp:
    address: str
    models: ModelsOnDisk
    config: AppConfig

    def client(self) -> Any:
        return gradio_client.Client(self.address, verbose=False)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    folder = tmp_path_factory.mktemp("app")
    models = write_models(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    config = AppConfig(
        pretrained_model_name_or_path=str(models.base),
        base=[str(models.other_base)],
        adapter=[f"{models.foreign.parent / 'adapters' / 'style.safetensors'}:0.5"],
        adapters_dir=folder / "adapters",
        output_dir=folder / "pictures",
        server_port=port,
        device="cpu",
    )
    with pytest.MonkeyPatch.context() as patch:
        play_runs(patch)
        page = build_app(config)
        assert page.analytics_enabled is False
        yield RunningApp(launch(page, config, wait=False), models, config)
        page.close()


def generate(client: Any, **options: Any) -> list[bytes]:
    """Pixels of the pictures that a client gets."""
    options = {"prompt": "a photo of sks dog", "seed": 5, "num_images": 2, "num_inference_steps": STEPS} | options
    pictures = client.predict(**options, api_name="/generate")
    assert [picture["seed"] for picture in pictures] == [options["seed"] + n for n in range(options["num_images"])]
    return [Image.open(picture["image"]).tobytes() for picture in pictures]


def from_command_line(app: RunningApp, output_dir: Path, *adapters: str) -> list[bytes]:
    """Pixels of the same pictures from the sampler of the command line."""
    result = sample(
        SamplingConfig(
            pretrained_model_name_or_path=str(app.models.base),
            adapter=list(adapters),
            prompt=["a photo of sks dog"],
            seed=5,
            num_images=2,
            num_inference_steps=STEPS,
            output_dir=output_dir,
            device="cpu",
        )
    )
    return [Image.open(path).tobytes() for path in result.pictures]


def test_these_endpoints_are_public_and_no_others(app: RunningApp) -> None:
    described = app.client().view_api(return_format="dict", print_info=False)
    assert set(described["named_endpoints"]) == ENDPOINTS
    assert described["unnamed_endpoints"] == {}
    for name, endpoint in described["named_endpoints"].items():
        assert endpoint["description"], name
        assert all(parameter["python_type"]["type"] != "Any" for parameter in endpoint["parameters"]), name
    (document,) = (re.findall(r"\| `(/\w+)` \|", (ROOT / "docs" / "app.md").read_text(encoding="utf-8")),)
    assert set(document) == ENDPOINTS


def test_pictures_equal_those_of_the_command_line(app: RunningApp, tmp_path: Path) -> None:
    base = from_command_line(app, tmp_path / "base")
    blend = from_command_line(app, tmp_path / "blend", f"{app.models.style}:-0.5", f"{app.models.dog}:0.8")
    assert base != blend
    client = app.client()
    ids = {one["name"]: one["id"] for one in client.predict("", str(app.models.base), api_name="/list_adapters")}
    assert generate(client) == base
    weights = {"style": -0.5, ids["dog"]: 0.8}  # by name, and by id
    assert client.predict(weights, api_name="/set_weights") == {"style": -0.5, "dog": 0.8}
    assert generate(client) == blend
    assert generate(client, weights={}) == base
    assert generate(client, weights={"style": 0.0, "dog": 0.0}) == base
    assert generate(client, prompt="a photo <adapter:dog:1.3> of sks dog") not in (base, blend)
    assert generate(client, prompt="a photo <adapter:dog:0.8> of sks dog") == blend
    assert generate(client) == blend
    client.predict({}, api_name="/set_weights")
    assert generate(client) == base


def test_clients_do_not_share_weights(app: RunningApp) -> None:
    first, second = app.client(), app.client()
    base = generate(second)
    first.predict({"dog": 0.8}, api_name="/set_weights")
    with_dog = generate(first)
    assert with_dog != base and generate(second) == base
    jobs = [
        client.submit("a photo of sks dog", seed=5, num_images=2, num_inference_steps=STEPS, api_name="/generate")
        for client in (first, second, first, second)
    ]
    pictures = [[Image.open(picture["image"]).tobytes() for picture in job.result()] for job in jobs]
    assert pictures == [with_dog, base, with_dog, base]


def test_pictures_are_kept_with_their_settings(app: RunningApp) -> None:
    client = app.client()
    before = set(app.config.output_dir.iterdir())
    (picture,) = client.predict(
        "a red robot", weights={"dog": -1.0}, num_inference_steps=STEPS, width=32, height=16, api_name="/generate"
    )
    (new,) = set(app.config.output_dir.iterdir()) - before
    assert new.read_bytes() == Path(picture["image"]).read_bytes() and picture["blacked_out"] is False
    settings = read_png_settings(new)
    assert settings["prompt"] == "a red robot" and settings["seed"] == 0
    assert [(adapter["name"], adapter["weight"]) for adapter in settings["adapters"]] == [("dog", -1.0)]
    assert Image.open(new).size == (32, 16)


def test_the_library_says_what_fits(app: RunningApp) -> None:
    client = app.client()
    bases = client.predict(api_name="/list_bases")
    assert bases == [app.models.base.name, app.models.other_base.name]  # and not where they lie
    own = {one["name"]: one for one in client.predict(api_name="/list_adapters")}
    assert set(own) == {"dog", "style"} and all(one["problem"] is None for one in own.values())
    assert own["dog"]["trigger"] == "sks" and own["dog"]["strength_range"] == [0.0, 1.0]
    other = client.predict("sks", bases[1], api_name="/list_adapters")
    assert [one["name"] for one in other] == ["dog"] and "trained on" in other[0]["problem"]
    assert not any(str(app.config.adapters_dir) in str(value) for one in own.values() for value in one.values())
    with pytest.raises(Exception, match="was trained on the base"):
        generate(client, base=bases[1], weights={"dog": 1.0})
    assert generate(client, base=bases[1]) != generate(client)


def test_adapters_of_the_command_line_are_on_the_page(app: RunningApp) -> None:
    config = httpx.get(f"{app.address}config").json()
    (cards,) = [one["props"]["value"] for one in config["components"] if one["props"].get("elem_id") == "adapter-cards"]
    assert [(card["name"], card["weight"], card["on"]) for card in cards] == [("style", 0.5, True)]


def test_errors_name_the_cause_and_leave_the_client_where_it_was(app: RunningApp) -> None:
    client = app.client()
    client.predict({"dog": 0.8}, api_name="/set_weights")
    before = generate(client)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("/generate", {"prompt": " "}, "prompt"),
        ("/generate", {"prompt": "a dog", "seed": -1}, "seed"),
        ("/generate", {"prompt": "a dog", "seed": "five"}, "seed: input should be a valid integer"),
        ("/generate", {"prompt": "a dog", "num_images": 17}, "between 1 and 16"),
        ("/generate", {"prompt": "a dog", "num_inference_steps": 10**9}, "steps"),
        ("/generate", {"prompt": "a dog", "width": 12}, "multiple of"),
        ("/generate", {"prompt": "a dog", "scheduler": "nothing"}, "scheduler"),
        ("/generate", {"prompt": "a dog", "weights": {"dog": "much"}}, "weights: input should be a valid number"),
        ("/generate", {"prompt": "a dog", "weights": {"dog": 11}}, "-10"),
        ("/generate", {"prompt": "a dog <adapter:cat>"}, "cat"),
        ("/generate", {"prompt": "a dog", "base": str(app.models.base) + "-nowhere"}, "no such base model folder"),
        ("/set_weights", {"weights": {"dog": "Infinity"}}, "-10"),
        ("/set_weights", {"weights": {"cat": 1.0}}, "no adapter 'cat'"),
        ("/set_weights", {"weights": {str(app.models.foreign): 1.0}}, "no adapter"),
        ("/set_weights", {"weights": {"../foreign": 1.0}}, "no adapter"),
        ("/training_status", {"id": "../../dog"}, "no longer there"),
        ("/stop_training", {"id": "nothing-1"}, "no longer there"),
        ("/start_training", {"name": "x", "photos": [], "class_word": "dog"}, "photos"),
        ("/start_training", {"name": "x", "photos": ["a"], "class_word": "dog"}, "photos"),
    ]
    for endpoint, options, reason in cases:
        with pytest.raises(Exception, match=reason) as caught:
            client.predict(**options, api_name=endpoint)
        assert "Traceback" not in str(caught.value) and str(app.config.adapters_dir) not in str(caught.value)
    assert generate(client) == before


def test_what_no_endpoint_takes_is_told_by_its_name() -> None:
    def handler(seed: int = 0) -> None:
        raise AssertionError("not reached")

    for arguments, said in ((["x"], "seed: input should be a valid integer"), ([1, 2], "one argument too many: ")):
        with pytest.raises(gradio.Error, match=said):
            _endpoint(handler)(*arguments)


def call(app: RunningApp, endpoint: str, *arguments: Any) -> str:
    """What a program hears that speaks HTTP without the client."""
    address = f"{app.address}gradio_api/call{endpoint}"
    event = VISITOR.post(address, json={"data": list(arguments)}).json()["event_id"]
    return VISITOR.get(f"{address}/{event}").text


def test_files_of_the_server_are_no_photos(app: RunningApp) -> None:
    photo = Path(shutil.copy(ROOT / "samples" / "01.png", app.config.output_dir))
    others = ("dog", "sks", "quick", "")  # of HTTP, all inputs are wanted
    for path in (photo, ROOT / "samples" / "01.png", "/etc/passwd", "../samples/01.png", "http://127.0.0.1:1/a.png"):
        for meta in ({"meta": {"_type": "gradio.FileData"}}, {}):
            answer = call(app, "/start_training", "x", [{"path": str(path)} | meta], *others)
            assert "event: error" in answer and "event: complete" not in answer
    assert "event: error" in call(app, "/start_training", "x", [{"url": "http://127.0.0.1:1/a.png"}], *others)
    for not_uploaded in ("/etc/passwd", str(photo)):
        assert "handle_file(PATH)" in call(app, "/start_training", "x", [not_uploaded], *others)
    assert "photos: input should be a valid list" in call(app, "/start_training", "x", "/etc/passwd", *others)
    assert app.client().predict(api_name="/training_status") == []


def test_files_of_the_server_are_no_uploads_of_any_part_of_the_page(app: RunningApp) -> None:
    config = httpx.get(f"{app.address}config").json()
    types = {one["id"]: one["type"] for one in config["components"]}
    tried = set()
    for event in config["dependencies"]:
        takes_files = [types[one] in ("file", "uploadbutton", "image", "gallery") for one in event["inputs"]]
        if not any(takes_files) or not event["backend_fn"]:
            continue
        tried.add(event["api_name"])
        for path in (str(app.models.style), str(ROOT / "samples" / "01.png"), "/etc/passwd"):
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            for value in (file, [file], [{"image": file, "caption": None}]):
                data = [value if is_file else None for is_file in takes_files]
                answer = call(app, f"/{event['api_name']}", *data)
                assert "event: error" in answer and "event: complete" not in answer, (event["api_name"], path)
    assert len(tried) >= 3, tried


def test_the_example_of_the_documentation_runs(
    app: RunningApp, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "app.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(example.replace("http://127.0.0.1:7860/", app.address), names)
    printed = capsys.readouterr().out
    assert re.search(r"^(running|queued) \d+ of \d+", printed, flags=re.MULTILINE)
    assert "sks fits" in printed and len(names["pictures"]) == 2
    assert names["job"]["name"] == "my robot" and names["job"]["notes"] == []
    assert names["job"]["base"] == app.models.base.name
    settings = (app.config.training_dir / names["job"]["id"] / "config.yaml").read_text(encoding="utf-8")
    assert "a photo of sks robot" in settings
    photos = app.config.training_dir / names["job"]["id"] / "photos"
    stopped = names["stopped"]
    assert (stopped["state"], stopped["stopping"]) in (("running", True), ("stopped", False), ("removed", False))
    assert photos.is_dir() is False or len(list(photos.glob("*.png"))) == 5  # gone if it was stopped in the queue


def test_bad_start_is_one_line(app: RunningApp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--pretrained_model_name_or_path", str(app.models.base), "--output_dir", str(tmp_path / "pictures")]
    with socket.create_server(("127.0.0.1", 0)) as free:
        base += ["--adapters_dir", str(tmp_path / "adapters"), "--server_port", str(free.getsockname()[1])]
    cases = [
        (["--adapter", str(app.models.foreign)], "was trained on the base"),
        (["--adapter", f"{app.models.dog}:50"], "-10"),
        (["--adapter", str(tmp_path / "nothing.safetensors")], "nothing.safetensors"),
        (["--device", "gpu"], "device"),
        (["--server_port", str(app.config.server_port)], "choose another --server_port"),
    ]
    for arguments, reason in cases:
        assert run_command("app", [*base, *arguments]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ") and reason in last
