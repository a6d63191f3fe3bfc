"""The Blend tab: the same as `svft-diffusion blend`, on the adapters of the cards."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import ModelsOnDisk, write_models
from hostile_names import HOSTILE_NAMES, HOSTILE_TEXTS
from PIL import Image
from tiny_models import tiny_pipeline

gradio = pytest.importorskip("gradio")

from svft_diffusion import SVFTConfig, save_adapter  # noqa: E402
from svft_diffusion.adapters import add_training_adapter, loaded_adapters, unload_adapter  # noqa: E402
from svft_diffusion.algebra.blending import BlendFacts  # noqa: E402
from svft_diffusion.app.components.adapter_cards import chosen_adapters, with_card  # noqa: E402
from svft_diffusion.app.config import AppConfig  # noqa: E402
from svft_diffusion.app.context import AppContext  # noqa: E402
from svft_diffusion.app.drawing.picture_request import PictureRequest, SavedPicture  # noqa: E402
from svft_diffusion.app.drawing.studio import Studio  # noqa: E402
from svft_diffusion.app.jobs.training_jobs import TrainingJobs  # noqa: E402
from svft_diffusion.app.shelf.blend_actions import export_blend, save_blend  # noqa: E402
from svft_diffusion.app.shelf.library import Library  # noqa: E402
from svft_diffusion.app.tabs.blend import BlendEvents  # noqa: E402
from svft_diffusion.cli.main import run_command  # noqa: E402
from svft_diffusion.errors import UserError  # noqa: E402
from svft_diffusion.files import AdapterMetadata, adapter_bytes, read_adapter  # noqa: E402

Cards = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class World:
    """A page's context on a tiny base, with the adapters `rex` and `cat`, which add up, and `style`, which does not."""

    context: AppContext
    base: str
    folder: Path

    def cards(self, **weights: float) -> Cards:
        cards: Cards = []
        for name, weight in weights.items():
            cards = with_card(cards, self.context.library.by_name(name), weight)
        return cards

    def chosen(self, cards: Cards) -> Any:
        return chosen_adapters(cards, self.context.library, self.base, "error")

    def picture(self, cards: Cards) -> torch.Tensor:
        """Colours from 0 to 1, not rounded as in a file."""
        with self.context.studio.with_adapters(self.base, self.chosen(cards)) as pipeline:
            drawn = pipeline(
                "a sks dog", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)
            )
        return torch.from_numpy(drawn.images)

    def loaded(self) -> list[str]:
        with self.context.studio.with_adapters(self.base, ()) as pipeline:
            return [name for name in loaded_adapters(pipeline) if not name.startswith("sha256-")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    models = write_models(tmp_path_factory.mktemp("models"))
    pipe = tiny_pipeline(0)
    generator = torch.Generator().manual_seed(7)
    for values in add_training_adapter(pipe, SVFTConfig(pattern="banded", off_diagonals=1), "new"):
        values.data.copy_(0.3 * torch.randn(values.shape, generator=generator))
    metadata = AdapterMetadata(base_name="tiny", trigger="sks")
    save_adapter(pipe, "new", models.base.parent / "cat.safetensors", metadata=metadata)
    unload_adapter(pipe, "new")
    return models


@pytest.fixture
def world(models: ModelsOnDisk, tmp_path: Path) -> World:
    folder = tmp_path / "library"
    shutil.copytree(models.dog.parent, folder / "rex")
    shutil.copy(models.style, folder / "style.safetensors")
    shutil.copy(models.base.parent / "cat.safetensors", folder / "cat.safetensors")
    config = AppConfig(str(models.base), adapters_dir=folder, output_dir=tmp_path / "pictures", device="cpu")
    studio = Studio(config.output_dir, device=torch.device("cpu"))
    library = Library(folder, config.uploads_dir)
    return World(AppContext(config, studio, library, TrainingJobs(config.training_dir)), str(models.base), folder)


def report_of(found: tuple[Any, ...]) -> tuple[list[list[Any]], Any, str]:
    """Table, plot and text of what an event returns."""
    table, plot, text = found
    return table.value["data"] if table.value else [], plot, text.value


def test_the_saved_blend_is_that_of_the_command_and_draws_the_same_picture(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = world.cards(rex=0.7, cat=-0.4)
    files = [str(world.folder / "rex") + ":0.7", str(world.folder / "cat.safetensors") + ":-0.4"]
    command = tmp_path / "both.safetensors"
    flags = ["--title", "Both", "--trigger", "sks both", "--base", world.base, "-o", str(command)]
    assert run_command("blend", [*files, *flags]) == 0
    capsys.readouterr()
    before = world.picture(cards)
    facts = BlendFacts("Both", "sks both")
    entry, lines = save_blend(world.context, world.base, world.chosen(cards), "my blend", facts)
    assert entry.file.read_bytes() == command.read_bytes() and entry.name == "my_blend"
    assert (entry.header.title, entry.header.trigger) == ("Both", "sks both")
    assert lines[0].startswith("in the library as my_blend") and lines[1] == "rex 0.7, cat -0.4"
    assert "rex / cat  cosine" in lines[2] and "same trigger 'sks'" in lines[-1]
    assert world.loaded() == []
    after = world.picture(with_card([], entry, 1.0))
    assert (before - after).abs().max() < 1e-4
    assert (before - world.picture([])).abs().max() > 0.1


def test_weights_of_parts_and_blocks_go_into_the_blend(world: World) -> None:
    rex, cat = world.cards(rex=0.5, cat=1.0)
    rex["components"] = {"unet": 1.0, "text_encoder": 0.2}
    cat["blocks"] = "last"
    before = world.picture([rex, cat])
    entry, _ = save_blend(world.context, world.base, world.chosen([rex, cat]), "", BlendFacts())
    assert entry.name == "blend"
    after = world.picture(with_card([], entry, 1.0))
    assert (before - after).abs().max() < 1e-4
    sources = entry.header.training["blend"]["sources"]
    assert sources[0]["weight"] == {"unet": 0.5, "text_encoder": 0.1} and "up_blocks" in json.dumps(sources[1])


def test_nothing_is_ever_overwritten(world: World) -> None:
    before = {file: file.read_bytes() for file in world.folder.rglob("*.safetensors")}
    cards = world.cards(rex=0.7, cat=0.4)
    names = ["rex", "cat", *HOSTILE_NAMES[:: len(HOSTILE_NAMES) // 3]]
    chosen = world.chosen(cards)
    for number, name in enumerate(names):
        entry, _ = save_blend(world.context, world.base, chosen, name, BlendFacts(title=f"number {number}"))
        assert entry.file.parent == world.context.config.uploads_dir and entry.name not in ("rex", "cat")
    assert all(file.read_bytes() == content for file, content in before.items())
    assert len(list(world.context.config.uploads_dir.iterdir())) == len(names)


def test_a_name_that_is_not_used_is_told(world: World) -> None:
    chosen = world.chosen(world.cards(rex=0.7, cat=0.4))

    def said(name: str, title: str = "one") -> str:
        return save_blend(world.context, world.base, chosen, name, BlendFacts(title=title))[1][0].rpartition(",")[0]

    assert said("../../evil") == (
        "in the library as evil, not as '../../evil': names have letters, digits, _ and - alone"
    )
    assert said("other") == "the same adapter is in the library already, as evil; the name 'other' was not used"
    assert said("") == said("evil") == "the same adapter is in the library already, as evil"
    assert said("evil", "two") == "in the library as evil-2, not as 'evil': evil was taken"
    assert said("plain", "three") == "in the library as plain"


def test_what_has_no_blend_says_why_and_leaves_nothing(world: World, tmp_path: Path) -> None:
    both = world.cards(rex=1.0, cat=1.0)
    off = [{**card, "on": False} for card in both]
    cases: list[tuple[Cards, str]] = [
        (world.cards(rex=1.0, style=1.0), "keep both files"),
        (world.cards(rex=0.0), "nothing to blend"),
        ([], "nothing to blend"),
        (off, "nothing to blend"),
        ([{**both[0], "id": "0" * 16}], "no longer in the library"),
        ([{**both[0], "weight": 1e30}], "must be between"),
    ]
    files = sorted(world.folder.rglob("*"))
    for cards, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            save_blend(world.context, world.base, world.chosen(cards), "x", BlendFacts())
        assert str(tmp_path) not in str(caught.value)
    for text in ("x" * 201, "a\nb", ""):
        with pytest.raises(UserError, match="the title must be one line"):
            BlendFacts(title=text)
    for wrong in ({"rank": "0"}, {"format": "../x"}):
        options = {"format": "kohya", "rank": "auto", "half": False} | wrong
        with pytest.raises(UserError):
            export_blend(world.context, world.base, world.chosen(both), "x", **options)  # type: ignore[arg-type]
    assert sorted(world.folder.rglob("*")) == files and not (tmp_path / "pictures").exists()
    assert world.loaded() == []


def test_a_file_that_is_damaged_meanwhile_is_named_without_its_path(world: World, tmp_path: Path) -> None:
    cards = world.cards(rex=1.0, cat=1.0)
    chosen = world.chosen(cards)
    file = world.folder / "cat.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="cat ") as caught:
        save_blend(world.context, world.base, chosen, "x", BlendFacts())
    assert str(tmp_path) not in str(caught.value) and world.loaded() == []


def test_an_export_is_that_of_the_saved_blend(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = world.chosen(world.cards(rex=0.7, cat=-0.4))
    options: dict[str, Any] = {"format": "kohya", "rank": "full", "half": True}
    file, report = export_blend(world.context, world.base, chosen, "both", **options)
    assert file.name == "both-kohya.safetensors" and not file.is_relative_to(world.folder)
    assert "rex 0.7, cat -0.4" in report and str(tmp_path) not in report
    entry, _ = save_blend(world.context, world.base, chosen, "both", BlendFacts())
    command = tmp_path / file.name
    arguments = [str(entry.file), "--base", world.base, "--rank", "full", "--dtype", "float16", "-o", str(command)]
    assert run_command("export", arguments) == 0
    assert command.read_bytes() == file.read_bytes()
    again, _ = export_blend(world.context, world.base, chosen, "both", **options)
    assert again.read_bytes() == file.read_bytes() and world.loaded() == []
    assert world.context.library.entries("both") == [entry]


def test_the_report_is_that_of_the_command(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    files = [str(world.folder / "rex") + ":0.7", str(world.folder / "style.safetensors")]
    assert run_command("blend", [*files, "--base", world.base, "--report"]) == 0
    printed = capsys.readouterr().out
    events = BlendEvents(world.context)
    table, plot, text = report_of(events.compare(world.base, world.cards(rex=0.7, style=1.0)))
    assert all(line in printed.splitlines() for line in text.splitlines())
    assert "layers that share most" in text and "SVDiff: the sum cuts" in text and "equal norms" in text
    for pair, place, cosine, overlap in table:
        assert pair == "rex / style"
        line = next(line for line in printed.splitlines() if line.startswith(f"{place} "))
        assert f"{cosine:+.3f}    {overlap:.3f}" in line
    assert len(table) > 3 and table[0][1] == "all" and plot.visible and plot.value
    table, plot, text = report_of(events.compare(world.base, world.cards(rex=0.7)))
    assert table == [] and not plot.visible and text.startswith("adapter") and world.loaded() == []


def test_without_matplotlib_the_report_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svft_diffusion.algebra.interference_plot.importlib.util.find_spec", lambda name: None)
    table, plot, text = report_of(BlendEvents(world.context).compare(world.base, world.cards(rex=0.7, cat=1.0)))
    assert table and not plot.visible and "plots need matplotlib" in text


def test_balanced_weights_are_those_of_the_command(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    rex, cat = world.cards(rex=0.8, cat=-1.0)
    rex["components"] = {"unet": 1.0, "text_encoder": 0.5}
    files = [f"{world.folder / 'rex'}:unet=0.8,te=0.4", f"{world.folder / 'cat.safetensors'}:-1"]
    assert run_command("blend", [*files, "--base", world.base, "--report", "--balance", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["weights"]
    off = {**world.cards(style=1.0)[0], "on": False}
    changes, *found = BlendEvents(world.context).balance(world.base, [rex, off, cat])
    assert set(changes["weights"]) == {rex["id"], cat["id"]} and changes["added"] == changes["removed"] == []
    weights = {"rex": changes["weights"][rex["id"]], "cat": changes["weights"][cat["id"]]}
    assert weights["rex"] == pytest.approx(expected["rex"]["unet"], abs=1e-4)
    assert weights["cat"] == pytest.approx(expected["cat"], abs=1e-4)
    assert weights["rex"] != 0.8
    assert "rex" in report_of(tuple(found))[2]
    for unfit in (world.cards(rex=1.0), world.cards(rex=1.0, cat=0.0)):
        with pytest.raises(gradio.Error, match="balancing takes two"):
            BlendEvents(world.context).balance(world.base, unfit)
    with pytest.raises(gradio.Error, match="beyond -10 to 10"):
        BlendEvents(world.context).balance(world.base, world.cards(rex=10.0, cat=10.0))


def test_the_blend_takes_the_place_of_its_parts_and_gives_it_back(world: World) -> None:
    events = BlendEvents(world.context)
    cards = world.cards(rex=0.7, cat=0.4)
    saved, replace, result, _ = events.save(world.base, cards, "both", " ", "")
    assert replace.interactive and "in the library as both" in result.value
    assert world.context.library.get(saved).header.trigger == "sks"
    blended, before, bring_back = events.replace_cards(saved, cards, [])
    assert [(card["name"], card["weight"]) for card in blended] == [("both", 1.0)] and bring_back.interactive
    _, before, _ = events.replace_cards(saved, blended, before)  # pressed again
    last, before, bring_back = events.bring_back(before)
    assert last == blended and bring_back.interactive
    first, before, bring_back = events.bring_back(before)
    assert first == cards and not bring_back.interactive
    with pytest.raises(gradio.Error, match="nothing to bring back"):
        events.bring_back(before)
    for gone in (None, "0" * 16, "../x"):
        with pytest.raises(gradio.Error):
            events.replace_cards(gone, cards, [])


def test_one_picture_is_drawn_at_the_weights(world: World) -> None:
    events = BlendEvents(world.context)
    cards = world.cards(rex=0.7, cat=0.4)
    seed = 2**53 + 1  # which no number field of a page holds
    shown = list(events.draw(world.base, cards, "a sks dog", str(seed), 2, 4.0))
    assert shown[0][0]["total"] == 2 and shown[-1][1] == ""
    request = PictureRequest(world.base, "a sks dog", tuple(world.chosen(cards)), seed=seed, num_inference_steps=2)
    (expected,) = (event for event in world.context.studio.draw(request) if isinstance(event, SavedPicture))
    assert Image.open(shown[-1][2]).tobytes() == Image.open(expected.path).tobytes()
    for prompt, seed, steps, message in (
        ("", "0", 2, "write a prompt"),
        ("a <adapter:rex:0.5> dog", "0", 2, "those of the pad"),
        ("a dog", None, 2, "the seed must be a whole number"),
        ("a dog", "nan", 2, "the seed must be a whole number"),
        ("a dog", "-1", 2, "the seed must be between"),
        ("a dog", "0", None, "number of steps is missing"),
        ("a dog", "0", float("nan"), "number of steps is missing"),
        ("a dog", "0", 0, "the number of steps must be between"),
    ):
        with pytest.raises(gradio.Error, match=message):
            list(events.draw(world.base, cards, prompt, seed, steps, 4.0))


@pytest.fixture
def hostile(world: World) -> Iterator[Cards]:
    header, tensors = read_adapter(world.folder / "cat.safetensors")
    cards: Cards = []
    for number, text in enumerate(HOSTILE_TEXTS[:3]):
        titled = dataclasses.replace(header, title=text, trigger=text)
        (world.folder / f"hostile{number}.safetensors").write_bytes(adapter_bytes(titled, tensors))
        cards = with_card(cards, world.context.library.by_name(f"hostile{number}"), 0.5)
    yield cards


def test_hostile_texts_stay_text(world: World, hostile: Cards) -> None:
    """Every place that shows them takes plain text, not markup; errors, which Gradio shows as markup, escape it."""
    text = HOSTILE_TEXTS[0]
    events = BlendEvents(world.context)
    saved, _, result, _ = events.save(world.base, hostile, text, text, text)
    entry = world.context.library.get(saved)
    assert (entry.header.title, entry.header.trigger) == (text, text)
    assert "<" not in entry.name and "<" not in entry.file.name and isinstance(result, gradio.Textbox)
    table, _, report = events.compare(world.base, hostile)
    assert isinstance(report, gradio.Textbox) and all(
        "<" not in f"{cell}" for row in table.value["data"] for cell in row
    )
    with pytest.raises(gradio.Error) as caught:
        events.save(world.base, [{**hostile[0], "id": text, "name": text}], "x", "", "")
    assert "<script" not in str(caught.value.message) and "&lt;script" in str(caught.value.message)
