"""The web app, through its own HTTP interface."""

from __future__ import annotations

import dataclasses
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from adapter_files import ModelsOnDisk, write_models
from PIL import Image

gradio = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")

from svft_diffusion.adapters.fitting import OnMismatch  # noqa: E402
from svft_diffusion.app.cards import EMPTY_SLOTS, MOST_ADAPTERS, Slots, card_updates, replaced, with_adapter  # noqa: E402
from svft_diffusion.app.config import AppConfig  # noqa: E402
from svft_diffusion.app.handlers import Handlers  # noqa: E402
from svft_diffusion.app.launch import build_app, launch  # noqa: E402
from svft_diffusion.app.library import adapters_in  # noqa: E402
from svft_diffusion.app.studio import PictureRequest, Studio  # noqa: E402
from svft_diffusion.cli.main import run_command  # noqa: E402
from svft_diffusion.errors import UserError  # noqa: E402
from svft_diffusion.sampling.adapter_choice import CheckedAdapter, check_adapter  # noqa: E402
from svft_diffusion.sampling.png import read_png_settings  # noqa: E402
from svft_diffusion.sampling.sample import SamplingConfig, open_pipeline, sample  # noqa: E402

STEPS = 2


@dataclass(frozen=True)
class RunningApp:
    address: str
    models: ModelsOnDisk
    config: AppConfig

    def visitor(self) -> Any:
        return gradio_client.Client(self.address, verbose=False)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    folder = tmp_path_factory.mktemp("app")
    models = write_models(folder)
    config = AppConfig(
        pretrained_model_name_or_path=str(models.base),
        adapters_dir=folder / "adapters",
        output_dir=folder / "pictures",
        server_port=_free_port(),
        device="cpu",
    )
    page = build_app(config)
    assert page.analytics_enabled is False
    yield RunningApp(launch(page, config, wait=False), models, config)
    page.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def generate(
    visitor: Any, *weights: float, prompt: str = "a photo of sks dog", seed: int = 5, count: int = 2
) -> list[bytes]:
    """Pixels of the pictures that a visitor gets."""
    sliders = [*weights, *[1.0] * (MOST_ADAPTERS - len(weights))]
    gallery, status = visitor.predict(prompt, "", seed, count, STEPS, 4.0, *sliders, api_name="/generate")
    assert "Saved in" in status
    assert [item["caption"] for item in gallery] == [f"seed {seed + number}" for number in range(count)]
    pictures = []
    for item in gallery:
        with Image.open(item["image"]) as image:
            pictures.append(image.tobytes())
    return pictures


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


def test_pictures_equal_those_of_the_command_line(app: RunningApp, tmp_path: Path) -> None:
    base = from_command_line(app, tmp_path / "base")
    blend = from_command_line(app, tmp_path / "blend", f"{app.models.style}:-0.5", f"{app.models.dog}:0.8")
    assert base != blend

    visitor = app.visitor()
    assert generate(visitor) == base
    visitor.predict("style.safetensors", api_name="/add_adapter")
    visitor.predict([gradio_client.handle_file(app.models.dog)], api_name="/upload_adapters")
    assert generate(visitor, -0.5, 0.8) == blend
    assert generate(visitor, 0.0, 0.0) == base
    assert generate(visitor, 1.0, 2.0) not in (base, blend)
    assert generate(visitor, -0.5, 0.8) == blend


def test_visitors_do_not_share_adapters(app: RunningApp) -> None:
    first, second = app.visitor(), app.visitor()
    base = generate(second)
    first.predict("dog", api_name="/add_adapter")
    with_dog = generate(first, 0.8)
    assert with_dog != base
    assert generate(second) == base

    sliders = [0.8] * MOST_ADAPTERS
    jobs = [
        visitor.submit("a photo of sks dog", "", 5, 2, STEPS, 4.0, *sliders, api_name="/generate")
        for visitor in (first, second, first, second)
    ]
    pictures = [[Image.open(item["image"]).tobytes() for item in job.result()[0]] for job in jobs]
    assert pictures == [with_dog, base, with_dog, base]


def test_pictures_are_kept_with_their_settings(app: RunningApp) -> None:
    visitor = app.visitor()
    visitor.predict("dog", api_name="/add_adapter")
    before = set(app.config.output_dir.iterdir())
    generate(visitor, -1.0, prompt="a red robot", count=1)
    (new,) = set(app.config.output_dir.iterdir()) - before
    assert new.name.endswith("_a-red-robot_seed5.png")
    settings = read_png_settings(new)
    assert settings["prompt"] == "a red robot" and settings["seed"] == 5 and settings["base"] == "base"
    assert [(adapter["name"], adapter["weight"]) for adapter in settings["adapters"]] == [("dog", -1.0)]


def test_errors_name_the_cause_and_leave_the_visitor_where_he_was(app: RunningApp) -> None:
    visitor = app.visitor()
    base = generate(visitor)
    foreign = [gradio_client.handle_file(app.models.foreign)]
    picture = [gradio_client.handle_file(next(app.config.output_dir.glob("*.png")))]
    calls: list[tuple[list[Any], str, str]] = [
        ([foreign], "/upload_adapters", "was trained on the base"),
        ([picture], "/upload_adapters", "carries no adapter"),
        ([str(app.models.base) + "-nowhere"], "/load_base", "no such base model folder"),
        ([" ", "", 0, 1, STEPS, 4.0, *[1.0] * MOST_ADAPTERS], "/generate", "prompt"),
        (["a dog", "", -1, 1, STEPS, 4.0, *[1.0] * MOST_ADAPTERS], "/generate", "less than minimum"),
        (["a dog", "", None, 1, STEPS, 4.0, *[1.0] * MOST_ADAPTERS], "/generate", "seed"),
        (["a dog", "", 0, 1, STEPS, 4.0, *[3.0] * MOST_ADAPTERS], "/generate", "greater than maximum"),
    ]
    for label in ("../foreign.safetensors", str(app.models.foreign), "nothing"):
        calls.append(([label], "/add_adapter", "not in the list of choices"))
    for arguments, endpoint, reason in calls:
        with pytest.raises(Exception, match=reason) as caught:
            visitor.predict(*arguments, api_name=endpoint)
        assert "Traceback" not in str(caught.value)
    assert generate(visitor) == base


def test_another_base_drops_adapters_of_the_first(app: RunningApp) -> None:
    visitor = app.visitor()
    base = generate(visitor)
    visitor.predict("dog", api_name="/add_adapter")
    status = visitor.predict(str(app.models.other_base), api_name="/load_base")[0]
    assert "other-base" in status
    other = generate(visitor, 1.0)
    assert other != base
    visitor.predict([gradio_client.handle_file(app.models.foreign)], api_name="/upload_adapters")
    assert generate(visitor, 1.0) != other
    visitor.predict(str(app.models.base), api_name="/load_base")
    assert generate(visitor, 1.0) == base


def test_library_lists_adapters_only(app: RunningApp, tmp_path: Path) -> None:
    (tmp_path / "notes.safetensors").write_text("no adapter", encoding="utf-8")
    (tmp_path / "run" / "checkpoint-10").mkdir(parents=True)
    shutil.copy(app.models.dog, tmp_path / "run" / "checkpoint-10")
    shutil.copy(app.models.dog, tmp_path / "adapter.safetensors")
    assert list(adapters_in(tmp_path)) == ["adapter.safetensors", "run/checkpoint-10"]
    assert adapters_in(tmp_path / "missing") == {}


def test_cards_keep_their_places(app: RunningApp) -> None:
    dog = check_adapter(app.models.dog, str(app.models.base), name="dog", weight=0.5)
    style = check_adapter(app.models.style, str(app.models.base), name="style")
    both = with_adapter(with_adapter(EMPTY_SLOTS, dog), style)
    without_dog = replaced(both, 0, None)
    assert without_dog[:2] == (None, style)
    assert with_adapter(without_dog, dog) == both
    updates = card_updates(both, without_dog)
    assert updates[0]["visible"] is False
    assert all("value" not in update for update in updates)  # no slider moves
    with pytest.raises(UserError, match="loaded already"):
        with_adapter(both, style)
    with pytest.raises(UserError, match="between -1 and 2"):
        with_adapter(EMPTY_SLOTS, CheckedAdapter("dog", dog.file, 3.0, dog.sha256, dog.header))
    with pytest.raises(UserError, match="places are taken"):
        with_adapter((style,) * MOST_ADAPTERS, dog)


def test_files_of_the_server_are_no_uploads(app: RunningApp) -> None:
    visitor = app.visitor()
    for file in (app.models.style, app.models.foreign):
        address = f"{app.address}gradio_api/call/upload_adapters"
        data = {"data": [[{"path": str(file), "meta": {"_type": "gradio.FileData"}}]]}
        event = httpx.post(address, json=data).json()["event_id"]
        answer = httpx.get(f"{address}/{event}", timeout=60).text
        assert "event: error" in answer and "event: complete" not in answer
        assert httpx.get(f"{app.address}gradio_api/file={file}").status_code == 403
    uploaded = visitor.predict([gradio_client.handle_file(app.models.style)], api_name="/upload_adapters")
    assert "style" in str(uploaded)


def test_other_machines_are_let_in_on_request_only(capsys: pytest.CaptureFixture[str]) -> None:
    for address in ("0.0.0.0", "192.168.0.2", "::", "", "example.org"):
        assert run_command("app", ["--server_name", address]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and "--allow_public" in message and message.count("\n") == 1
        assert AppConfig(server_name=address, allow_public=True).server_name == address
    for address in ("127.0.0.1", "127.8.0.1", "localhost", "::1"):
        assert AppConfig(server_name=address).server_name == address


def test_a_base_that_is_not_there_leaves_the_loaded_one(
    app: RunningApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def counted(base: str, **options: Any) -> Any:
        opened.append(base)
        return open_pipeline(base, **options)

    monkeypatch.setattr("svft_diffusion.app.studio.open_pipeline", counted)
    studio = Studio(tmp_path, device=torch.device("cpu"))
    studio.open_base(str(app.models.base))
    with pytest.raises(UserError, match="no such base model folder"):
        studio.open_base(str(tmp_path / "nowhere"))
    studio.open_base(str(app.models.base))
    assert opened == [str(app.models.base)]


def test_bad_start_is_one_line(app: RunningApp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--pretrained_model_name_or_path", str(app.models.base), "--output_dir", str(tmp_path)]
    cases = [
        (["--adapter", str(app.models.foreign)], "was trained on the base"),
        (["--adapter", f"{app.models.dog}:5"], "between -1 and 2"),
        (["--device", "gpu"], "device"),
        (["--server_port", str(app.config.server_port)], "choose another --server_port"),
    ]
    for arguments, reason in cases:
        assert run_command("app", [*base, *arguments]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ") and reason in last


@pytest.mark.parametrize("on_mismatch", ["error", "align", "force"])
def test_adapters_of_another_base_come_in_when_told(tmp_path: Path, on_mismatch: OnMismatch) -> None:
    models = write_models(tmp_path)
    studio = Studio(tmp_path / "pictures", device=torch.device("cpu"), on_mismatch=on_mismatch)
    handlers = Handlers(studio, tmp_path)
    if on_mismatch == "error":
        with pytest.raises(UserError, match="was trained on the base"):
            handlers.with_file(EMPTY_SLOTS, models.foreign, str(models.base), "foreign")
        return
    slots = handlers.with_file(EMPTY_SLOTS, models.foreign, str(models.base), "foreign")
    request = PictureRequest(str(models.base), "a dog", ((present(slots), 1.0),), num_inference_steps=1)
    if on_mismatch == "align":  # nothing is left of it on an unrelated base
        with pytest.raises(UserError, match="nothing is left"):
            studio.generate_pictures(request)
        return
    (forced,) = studio.generate_pictures(request)
    (base,) = studio.generate_pictures(dataclasses.replace(request, adapters=()))
    with Image.open(forced.path) as changed, Image.open(base.path) as unchanged:
        assert changed.tobytes() != unchanged.tobytes()


def present(slots: Slots) -> CheckedAdapter:
    """The adapter in the first slot."""
    assert slots[0] is not None
    return slots[0]
