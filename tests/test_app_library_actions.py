"""What visitors do with adapters of the library: the same as the commands, and no word of where files lie."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from adapter_files import ModelsOnDisk, write_models
from foreign_files import lora_factors, written
from hostile_names import HOSTILE_TEXTS
from PIL import Image
from tiny_models import tiny_unet

gradio = pytest.importorskip("gradio")

from svft_diffusion.app.assets import asset  # noqa: E402
from svft_diffusion.app.components.adapter_cards import adapter_cards  # noqa: E402
from svft_diffusion.app.components.card_changes import card_changes  # noqa: E402
from svft_diffusion.app.config import AppConfig  # noqa: E402
from svft_diffusion.app.context import AppContext, Shared  # noqa: E402
from svft_diffusion.app.drawing.studio import Studio  # noqa: E402
from svft_diffusion.app.jobs.training_jobs import TrainingJobs  # noqa: E402
from svft_diffusion.app.shelf.library import Library  # noqa: E402
from svft_diffusion.app.shelf.library_actions import AS_IT_IS, ForeignOptions, details, export, take_in, verify  # noqa: E402
from svft_diffusion.app.tabs.library import CARDS_AT_ONCE, EXPORT_FORMATS, LibraryHandlers, build  # noqa: E402
from svft_diffusion.cli.main import run_command  # noqa: E402
from svft_diffusion.errors import UserError  # noqa: E402
from svft_diffusion.exchange.lora_keys import FORMATS  # noqa: E402
from svft_diffusion.files import adapter_bytes, read_adapter  # noqa: E402

PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def context(models: ModelsOnDisk, tmp_path: Path) -> AppContext:
    folder = tmp_path / "library"
    shutil.copytree(models.dog.parent, folder / "rex")
    shutil.copy(models.style, folder / "style.safetensors")
    shutil.copy(models.foreign, folder / "stranger.safetensors")
    config = AppConfig(str(models.base), adapters_dir=folder, output_dir=tmp_path / "pictures", device="cpu")
    studio = Studio(config.output_dir, device=torch.device("cpu"))
    library = Library(folder, config.uploads_dir, most_upload_bytes=2**20)
    return AppContext(config, studio, library, TrainingJobs(config.training_dir))


def base(context: AppContext) -> str:
    return context.config.pretrained_model_name_or_path


def lora(folder: Path, name: str, metadata: dict[str, str] | None = None) -> Path:
    (up, down) = lora_factors(tiny_unet(), [PATH])[PATH]
    key = f"lora_unet_{PATH.replace('.', '_')}"
    return written(folder / name, {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}, metadata)


def test_an_export_is_that_of_the_command(
    context: AppContext, models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = context.library.by_name("style")
    command = tmp_path / "style-kohya.safetensors"
    arguments = [str(entry.file), "--base", base(context), "--rank", "full", "--strength", "0.5"]
    assert run_command("export", [*arguments, "--dtype", "float16", "-o", str(command)]) == 0
    printed = capsys.readouterr().out
    options: dict[str, Any] = {"format": "kohya", "rank": "full", "strength": 0.5, "half": True}
    file, report = export(context, entry, base(context), **options)
    assert file.name == "style-kohya.safetensors" and not (tmp_path / "pictures").exists()
    assert file.read_bytes() == command.read_bytes()
    assert report.splitlines()[:-1] == printed.splitlines()[:-1] and str(tmp_path) not in report
    again, _ = export(context, entry, base(context), **options)
    assert again == file  # under its content's hash, which nobody can guess who does not know it
    plain, _ = export(context, entry, base(context), **{**options, "format": "adapter"})
    assert plain.name == "style.safetensors" and plain.read_bytes() == entry.file.read_bytes()
    assert {name for _, name in EXPORT_FORMATS} == {*FORMATS, AS_IT_IS}
    before = sorted(file.parent.parent.iterdir())
    for wrong in ({"rank": "0"}, {"rank": "1; x"}, {"rank": "9" * 400}, {"format": "../x"}, {"strength": 0.0}):
        with pytest.raises(UserError):
            export(context, entry, base(context), **{**options, **wrong})
    with pytest.raises(UserError, match="was trained on the base") as caught:
        export(context, context.library.by_name("stranger"), base(context), **options)
    assert str(tmp_path) not in str(caught.value)
    assert sorted(file.parent.parent.iterdir()) == before


def test_verifying_is_that_of_the_command(
    context: AppContext, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rex", "stranger"):
        entry = context.library.by_name(name)
        code = run_command("verify", [str(entry.file), "--base", base(context), "--json"])
        (result,) = json.loads(capsys.readouterr().out)
        said = verify(context, entry, base(context))
        assert said.startswith(f"{name}: ") and str(tmp_path) not in said
        assert ("failed" in said) == (code == 2) == (name == "stranger")
        assert f"{result['weights']['matched']} of" in said or code == 0
    with context.studio.with_adapters(base(context), ()) as pipeline:  # which is as it was
        assert not hasattr(pipeline.unet, "peft_config")
    entry = context.library.by_name("rex")
    entry.file.write_bytes(entry.file.read_bytes()[:-4])
    said = verify(context, entry, base(context))
    assert said.startswith("rex: failed: ") and "cut short" in said and str(tmp_path) not in said


def test_details_are_those_of_inspect(context: AppContext, capsys: pytest.CaptureFixture[str]) -> None:
    entry = context.library.by_name("rex")
    assert run_command("inspect", [str(entry.file)]) == 0
    assert details(entry).splitlines() == capsys.readouterr().out.splitlines()[1:]


def test_files_of_other_tools_are_imported(
    context: AppContext, models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gradio" / "0123abcd"
    folder.mkdir(parents=True)
    file = lora(folder, "Robot v2.safetensors", {"modelspec.title": "<b>Robot</b>", "modelspec.trigger_phrase": "sks"})
    command = tmp_path / "robot.safetensors"
    assert run_command("import", [str(file), "--base", base(context), "-o", str(command)]) == 0
    printed = capsys.readouterr().out.splitlines()
    (entry,), lines = take_in(context, [file], base(context), ForeignOptions())
    assert entry.name == "Robot_v2" and entry.file.read_bytes() == command.read_bytes()
    assert (entry.header.title, entry.header.trigger) == ("<b>Robot</b>", "sks")
    assert lines == ["Robot v2.safetensors: in the library as Robot_v2", *printed[:-1]]
    assert "0123abcd" not in "".join(lines)
    (banded,), _ = take_in(context, [file], base(context), ForeignOptions("banded", 3))
    assert (banded.header.pattern, banded.header.off_diagonals) == ("banded", 3)


def test_what_cannot_be_taken_in_says_why_and_where_nothing_lies(
    context: AppContext, models: ModelsOnDisk, tmp_path: Path
) -> None:
    folder = tmp_path / "gradio" / "0123abcd"
    folder.mkdir(parents=True)
    good = folder / "good.safetensors"
    good.write_bytes(adapter_bytes(*_titled(models.style, "good")))
    double = written(folder / "double.safetensors", {"a.weight": torch.zeros(2, 2, dtype=torch.float64)})
    foreign = lora(folder, "unfit.safetensors")
    other = written(folder / "other.safetensors", {f"lora_unet_{'x' * 20}.lora_up.weight": torch.zeros(3, 3)})
    cut = folder / "cut.safetensors"
    cut.write_bytes(foreign.read_bytes()[:-3])
    pickle = folder / "pickle.safetensors"
    pickle.write_bytes(b"\x80\x04\x95" + bytes(50))
    large = folder / "large.safetensors"
    large.write_bytes(bytes(2**20 + 1))
    entries, lines = take_in(
        context, [double, other, cut, pickle, large, good], base(context), ForeignOptions("banded", 2)
    )
    assert [entry.header.title for entry in entries] == ["good"]
    refused = [line for line in lines if line.startswith("not taken in: ")]
    for name in ("double", "other", "cut", "pickle", "large"):
        assert [line for line in refused if f"{name}.safetensors" in line], (name, refused)
    assert len(refused) == 5 and "\n" not in "".join(lines)
    assert not [line for line in lines if str(tmp_path) in line or "0123abcd" in line or "gradio" in line]
    together, lines = take_in(context, [foreign, double], base(context), ForeignOptions(together=True))
    assert together == [] and len(lines) == 1 and "0123abcd" not in lines[0]
    with context.studio.with_adapters(base(context), ()) as pipeline:
        assert not hasattr(pipeline.unet, "peft_config")


def test_the_list_holds_text_and_ids_alone(context: AppContext, models: ModelsOnDisk) -> None:
    handlers = LibraryHandlers(context)
    for number, text in enumerate([*HOSTILE_TEXTS, "\x1b[2J\u202e\n"]):
        header, tensors = _titled(models.style, text)
        file = context.config.adapters_dir / f"h{number}.safetensors"
        file.write_bytes(adapter_bytes(dataclasses.replace(header, trigger=text), tensors))
    (context.config.adapters_dir / "<b>x.safetensors").write_bytes(b"damaged")
    first, second = handlers.listed("", base(context), CARDS_AT_ONCE, None)
    assert {card["state"] for card in first["cards"]} == {"unknown"}
    states = {card["name"]: card["state"] for card in second["cards"]}
    assert states["rex"] == "fits" and states["stranger"] == "unfit" and second["more"] == 0
    assert [file["name"] for file in second["damaged"]] == ["<b>x.safetensors"]
    sent = json.dumps(second, ensure_ascii=False)
    assert str(context.config.adapters_dir) not in sent and str(models.base) not in sent
    assert "\\u001b" not in sent and "\u202e" not in sent and r"\\x1b[2J\\u202e\\n" in sent
    (few,) = handlers.listed("", base(context), 3, None)
    assert "unknown" not in {card["state"] for card in few["cards"]}  # compared before, said at once
    assert len(few["cards"]) == 3 and few["more"] == len(second["cards"]) - 3
    (none,) = handlers.listed("nothing has this", base(context), 3, None)
    assert none["cards"] == [] and "no adapter matches" in none["note"]


def test_the_scripts_of_the_page_write_text_alone() -> None:
    scripts = asset("library_list.js") + asset("plain_text.js")
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert way not in scripts


def test_adapters_go_to_generate_by_id(context: AppContext) -> None:
    handlers = LibraryHandlers(context)
    rex = context.library.by_name("rex")
    cards = handlers.added([], base(context), rex.id)["added"]
    assert [card["id"] for card in cards] == [rex.id]
    with pytest.raises(UserError, match="there already"):
        handlers.added(cards, base(context), rex.id)
    with pytest.raises(UserError, match="was trained on the base"):
        handlers.added(cards, base(context), context.library.by_name("stranger").id)
    *_, listed = handlers.listed("", base(context), CARDS_AT_ONCE, None)
    assert {card["name"]: card["addable"] for card in listed["cards"]} == {
        "rex": True,
        "stranger": False,
        "style": True,
    }
    path = str(rex.file)
    for data in ({"id": path}, {"id": 5}, {"id": None}, {"id": ["x"]}, {}, [], None, "x", {"id": "../rex"}):
        with pytest.raises(gradio.Error) as caught:
            handlers.add_card(cards, base(context), gradio.EventData(None, data))
        assert path not in str(caught.value)


def test_a_training_without_a_picture_shows_its_last_sample(context: AppContext, models: ModelsOnDisk) -> None:
    run = context.config.adapters_dir / "run"
    (run / "samples").mkdir(parents=True)
    header, tensors = _titled(models.style, "Run")
    (run / "adapter.safetensors").write_bytes(adapter_bytes(dataclasses.replace(header, thumbnail=None), tensors))

    def shown() -> Any:
        cards = list(LibraryHandlers(context).listed("run", base(context), CARDS_AT_ONCE, None))[-1]["cards"]
        return next(card["thumbnail"] for card in cards if card["title"] == "Run")

    for step, width in ((0, 9), (40, 10), (80, 11)):
        assert (shown() == "") == (step < 80)  # at step 0 the base model draws alone
        Image.new("RGB", (width, 7)).save(run / "samples" / f"step-{step}-0.png")
    with Image.open(io.BytesIO(base64.b64decode(shown().removeprefix("data:image/jpeg;base64,")))) as picture:
        assert picture.size == (11, 7)
    (run / "samples" / "step-90-0.png").write_bytes(b"damaged")
    assert shown() == ""


def test_files_of_the_server_are_no_uploads(context: AppContext, models: ModelsOnDisk, tmp_path: Path) -> None:
    with gradio.Blocks() as page:
        cards, base_name = adapter_cards([]), gradio.State(base(context))
        with gradio.Tabs() as tabs, gradio.Tab("Library") as tab:
            build(context, Shared(tabs, base_name, cards, card_changes(), tab))
    _, address, _ = page.queue().launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        number = next(key for key, event in page.fns.items() if event.name == "import_files")
        assert {event.api_visibility for event in page.fns.values()} == {"private"}

        def answer(path: str) -> str:
            """What the server says to the import of a file that lies there."""
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            event = {"fn_index": number, "session_hash": Path(path).stem}
            data = [[file], None, "default", None, False]
            httpx.post(f"{address}gradio_api/queue/join", json={"data": data, **event}).raise_for_status()
            session = f"{address}gradio_api/queue/data?session_hash={event['session_hash']}"
            return httpx.get(session, timeout=60).text.replace(" ", "")

        before = sorted(context.config.adapters_dir.rglob("*"))
        refused = answer(str(models.foreign))
        assert '"success":false' in refused and "inthelibrary" not in refused
        assert sorted(context.config.adapters_dir.rglob("*")) == before
        upload = {"files": ("dog.safetensors", models.dog.read_bytes())}
        (path,) = httpx.post(f"{address}gradio_api/upload", files=upload).json()
        accepted = answer(path)
        assert '"success":true' in accepted and "inthelibraryasrex" in accepted
        assert httpx.get(f"{address}gradio_api/file={models.foreign}").status_code == 403
    finally:
        page.close()


def test_a_form_that_nobody_touched_imports_a_lora(context: AppContext, tmp_path: Path) -> None:
    file = lora(tmp_path, "theirs.safetensors")  # Gradio sends 0 for a number that was never filled in
    _, report = LibraryHandlers(context).import_files([str(file)], base(context), "default", 0, False)
    assert "theirs.safetensors: in the library as theirs" in report.value


def test_deleting_says_that_the_photos_stay(context: AppContext) -> None:
    handlers, job = LibraryHandlers(context), context.config.training_dir / "rex-1"
    (job / "rex-1").mkdir(parents=True)
    (job / "photos").mkdir()
    for name, said in (("style", ""), ("rex", "the photos of its training stay until you delete that under Train")):
        entry = context.library.by_name(name)
        if said:
            entry.file.rename(job / "rex-1" / "adapter.safetensors")
            entry = next(one for one in context.library.entries() if one.id == entry.id)
        report = handlers.delete(entry.id, [])[3].value
        assert said in report and ("photos" in report) == bool(said)


def _titled(file: Path, title: str) -> Any:
    header, tensors = read_adapter(file)
    return dataclasses.replace(header, title=title), tensors
