"""XY grids and the before-and-after slider: every cell is the picture that its settings give by themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_files import ModelsOnDisk, write_models
from PIL import Image

gradio = pytest.importorskip("gradio")

from svft_diffusion.app.components.adapter_cards import Card, adapter_cards, with_card  # noqa: E402
from svft_diffusion.app.components.card_changes import card_changes  # noqa: E402
from svft_diffusion.app.config import AppConfig  # noqa: E402
from svft_diffusion.app.context import AppContext, Shared  # noqa: E402
from svft_diffusion.app.drawing.studio import Studio  # noqa: E402
from svft_diffusion.app.jobs.training_jobs import TrainingJobs  # noqa: E402
from svft_diffusion.app.shelf.library import Library  # noqa: E402
from svft_diffusion.app.tabs import grid  # noqa: E402
from svft_diffusion.app.tabs.before_after import BeforeAfterEvents  # noqa: E402
from svft_diffusion.app.tabs.generate_settings import (  # noqa: E402
    PictureWishes,
    negative_prompt_field,
    prompt_field,
    settings_form,
)
from svft_diffusion.app.tabs.grid import GridEvents  # noqa: E402
from svft_diffusion.sampling.png import read_png, read_png_settings  # noqa: E402

WISHES = PictureWishes("a photo of sks dog", "", "5", False, 3, 2, 4.0, None, None, None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def context(models: ModelsOnDisk, tmp_path_factory: pytest.TempPathFactory) -> AppContext:
    config = AppConfig(
        str(models.base), adapters_dir=models.style.parent, output_dir=tmp_path_factory.mktemp("pictures")
    )
    studio = Studio(config.output_dir, device=torch.device("cpu"))
    library = Library(config.adapters_dir, config.uploads_dir)
    return AppContext(config, studio, library, TrainingJobs(config.training_dir))


def cards(context: AppContext, **weights: float) -> list[Card]:
    value: list[Card] = []
    for name, weight in weights.items():
        value = with_card(value, context.library.by_name(name), weight)
    return value


def weight_of(context: AppContext, name: str) -> str:
    return f"weight:{context.library.by_name(name).id}"


def drawn(context: AppContext, given: list[Card], *axes: str, **wishes: Any) -> Iterator[list[Any]]:
    values = dataclasses.astuple(dataclasses.replace(WISHES, **wishes))
    return GridEvents(context).draw(context.config.pretrained_model_name_or_path, given, *axes, *values)


def files_of(updates: list[list[Any]]) -> list[Path]:
    """The cells that were shown last."""
    return [Path(file) for file in [one for one in (update[3] for update in updates) if isinstance(one, list)][-1]]


def pixels(file: Path) -> bytes:
    with Image.open(file) as image:
        return image.tobytes()


def alone(context: AppContext, given: list[Card], **wishes: Any) -> bytes:
    """Pixels of the picture that Generate draws."""
    one = dataclasses.replace(WISHES, num_images=1, **wishes)
    request = one.request(str(context.config.pretrained_model_name_or_path), given, context.library, "error")
    return pixels(context.studio.generate_pictures(request)[0].path)


def test_cells_are_the_pictures_of_their_settings_and_the_sheet_is_beside_them(context: AppContext) -> None:
    given = cards(context, dog=0.7, style=-0.5)
    updates = list(drawn(context, given, weight_of(context, "dog"), "0:1:0.5", "seed", "8, 2"))
    files = files_of(updates)
    assert len(files) == 6 and len({pixels(file) for file in files}) == 6
    settings = [read_png_settings(file) for file in files]
    assert [one["seed"] for one in settings] == [8, 8, 8, 2, 2, 2]
    assert [one["adapters"][0]["weight"] for one in settings] == [0, 0.5, 1, 0, 0.5, 1]
    assert {one["adapters"][1]["weight"] for one in settings} == {-0.5}
    assert pixels(files[4]) == alone(context, cards(context, dog=0.5, style=-0.5), seed="2")
    assert pixels(files[3]) == alone(context, cards(context, style=-0.5), seed="2")
    _, status, _, _, sheet = updates[-1]
    assert "6 pictures" in status
    image, named = read_png(sheet["value"])
    assert named["pictures"] == [file.name for file in files]
    assert Path(sheet["value"]).parent == context.studio.output_dir / "grids"
    assert image.width > 3 * 160 and image.height > 2 * 160


@pytest.mark.parametrize(
    ("axes", "setting", "values"),
    [
        (("num_inference_steps", "1, 3", "nothing", ""), "num_inference_steps", [1, 3]),
        (("guidance_scale", "1:4:1.5", "nothing", ""), "guidance_scale", [1, 2.5, 4]),
        (("scheduler", "ddim, Euler A", "nothing", "no matter"), "scheduler_option", ["ddim", "euler_a"]),
        (("prompt", "a cat\na sks dog", "nothing", ""), "prompt", ["a cat", "a sks dog"]),
        (("replace", "dog, cat", "replace", "sks, red"), "prompt",
         ["a photo of sks dog", "a photo of sks cat", "a photo of red dog", "a photo of red cat"]),
    ],
)  # fmt: skip
def test_every_kind_of_axis_is_in_the_pictures(
    context: AppContext, axes: tuple[str, ...], setting: str, values: list[object]
) -> None:
    files = files_of(list(drawn(context, [], *axes)))
    assert [read_png_settings(file)[setting] for file in files] == values


def test_a_random_seed_is_one_for_all_cells(context: AppContext) -> None:
    files = files_of(list(drawn(context, [], "num_inference_steps", "1, 2", "nothing", "", random_seed=True)))
    assert len({read_png_settings(file)["seed"] for file in files}) == 1


def test_stopping_keeps_the_cells_that_are_finished(context: AppContext) -> None:
    before = set(context.studio.output_dir.rglob("*.png"))
    events = drawn(context, [], "seed", "0:5", "nothing", "", num_inference_steps=8)
    for update in events:
        if isinstance(update[3], list) and len(update[3]) == 2:
            break
    events.close()  # type: ignore[attr-defined]
    assert len(set(context.studio.output_dir.rglob("*.png")) - before) == 2


def test_what_cannot_be_drawn_is_told_before_anything_is(context: AppContext) -> None:
    given = cards(context, dog=1.0)
    dog = weight_of(context, "dog")
    before = set(context.studio.output_dir.rglob("*"))
    for axes, wishes, reason in (
        (("seed", "0:36", "nothing", ""), {}, "more than 36 pictures"),
        (("seed", "0:6", "guidance_scale", "1:6"), {}, "more than 36 pictures"),
        (("weight:0000000000000000", "1", "nothing", ""), {}, "columns: this adapter is no longer on the cards"),
        (("seed", "1", dog, "1, 11"), {}, "the weight of dog must be between -10 and 10"),
        (("seed", "a", "nothing", ""), {}, "columns: 'a' is neither"),
        (("seed", "0", "seed", "1"), {}, "both axes are the same"),
        (("replace", "<b>, x", "nothing", ""), {}, "does not hold '&lt;b&gt;'"),
        ((dog, "0, 1", "nothing", ""), {"prompt": "a dog <adapter:dog:0.3>"}, "gives dog a weight of its own"),
        (("num_inference_steps", "5, 0", "nothing", ""), {}, "must be between 1 and 1000"),
        (("seed", "0", "nothing", ""), {"prompt": " "}, "write a prompt first"),
        (("other", "0", "nothing", ""), {}, "choose what the columns are"),
        (("nothing", "", "nothing", ""), {}, "choose what the columns are"),
        (("seed", "0", "nothing", ""), {"num_inference_steps": None}, "number of steps is missing"),
    ):
        with pytest.raises(gradio.Error, match=reason):
            list(drawn(context, given, *axes, **wishes))
    assert set(context.studio.output_dir.rglob("*")) == before


def test_the_plan_is_told_before(context: AppContext) -> None:
    page, values = GridEvents(context), dataclasses.astuple(WISHES)
    assert page.plan([], "seed", "0:3", "guidance_scale", "1, 2, 3", *values) == (
        "4 x 3: 12 pictures of at most 36, 24 steps in all."
    )
    assert page.plan([], "num_inference_steps", "5", "nothing", "", *values) == (
        "1 x 1: 1 picture of at most 36, 5 steps in all."
    )
    assert page.plan([], "replace", "<i>, x", "nothing", "", *values) == (
        r"Not yet: the prompt 'a photo of sks dog' does not hold '\<i\>', which is to be replaced."
    )


def test_others_hear_of_no_folder_and_no_sheet_is_overwritten(context: AppContext, tmp_path: Path) -> None:
    config = dataclasses.replace(context.config, output_dir=tmp_path, allow_public=True)
    public = dataclasses.replace(context, config=config, studio=Studio(tmp_path, device=torch.device("cpu")))
    for count in (1, 2):
        *_, (_, status, _, _, sheet) = drawn(public, [], "seed", "1", "nothing", "")
        assert status == "Saved 1 pictures, and a labelled sheet of them. "
        assert Path(sheet["value"]).is_file() and len(list((tmp_path / "grids").iterdir())) == count
        for picture in tmp_path.glob("*.png"):
            picture.unlink()  # so that its number comes again


def test_axes_follow_the_cards(context: AppContext) -> None:
    page, given = GridEvents(context), cards(context, dog=1.0)
    assert page.columns(given, "seed")["choices"][0] == ("Weight of dog", weight_of(context, "dog"))
    twins = [{"id": name, "title": "sks robot", "name": name} for name in ("my_dog", "sks robot")]
    assert [label for label, _ in page.columns(twins, "seed")["choices"]][:2] == [
        "Weight of sks robot (my_dog)",
        "Weight of sks robot",
    ]
    sides = BeforeAfterEvents(context).adapters(twins, None)["choices"]
    assert [label for label, _ in sides][1:] == ["sks robot (my_dog)", "sks robot"]
    assert page.columns([], weight_of(context, "dog"))["value"] == "seed"
    assert page.rows(given, weight_of(context, "dog"))["value"] == weight_of(context, "dog")
    assert page.rows([{"id": 3}, "x"], None)["value"] == "nothing"
    assert page.examples("prompt", "a dog")["value"] == "a dog\n"
    assert page.examples(weight_of(context, "dog"), "a dog")["value"] == "0, 0.5, 1"


def test_a_cell_tells_its_settings(context: AppContext, tmp_path: Path) -> None:
    page = GridEvents(context)
    files = [str(file) for file in files_of(list(drawn(context, [], "seed", "1, 4", "nothing", "")))]
    _, shown, selected, details = page.choose(files, SimpleNamespace(index=1))  # type: ignore[arg-type]
    assert shown == selected == files[1] and ["Seed", "4"] in details["details"]
    for index in (2, -1, None, [0, 1]):
        assert page.choose(files, SimpleNamespace(index=index))[2] == gradio.skip()  # type: ignore[arg-type]
    _, _, selected, details = page.choose([str(tmp_path / "gone.png")], SimpleNamespace(index=0))  # type: ignore[arg-type]
    assert selected is None and details["notes"] == ["this picture can't be read any more"]


def test_before_and_after_differ_in_a_weight_alone(context: AppContext) -> None:
    base, page = context.config.pretrained_model_name_or_path, BeforeAfterEvents(context)
    given = cards(context, dog=0.8, style=0.5)
    dog = context.library.by_name("dog").id

    def both(adapter: str, before: float, after: float) -> list[bytes]:
        *_, (_, _, slider) = page.draw(base, given, adapter, before, after, *dataclasses.astuple(WISHES))
        return [pixels(Path(file)) for file in slider["value"]]

    as_it_is = alone(context, given)
    assert both("all", 0.0, 1.0) == [alone(context, []), as_it_is]
    assert both(dog, 0.0, 0.8) == [alone(context, cards(context, style=0.5)), as_it_is]
    off = [{**card, "on": False} for card in given]
    for given_cards, adapter, weight, prompt, reason in (
        ([], "all", 1.0, "a dog", "there is no adapter"),
        (off, "all", 1.0, "a dog", "no adapter is on"),
        (given, dog, None, "a dog", "each need a weight"),
        (given, "0" * 16, 1.0, "a dog", "no longer on the cards"),
        (given, "all", 1.0, "a dog <adapter:style>", "gives style a weight of its own"),
        (given, "all", 20.0, "a dog", "must be between -10 and 10"),
    ):
        values = dataclasses.astuple(dataclasses.replace(WISHES, prompt=prompt))
        with pytest.raises(gradio.Error, match=reason):
            list(page.draw(base, given_cards, adapter, weight, 1.0, *values))


def test_no_event_is_offered_to_programs(context: AppContext) -> None:
    with gradio.Blocks() as page, gradio.Tabs() as tabs, gradio.Tab("Generate") as tab:
        value = adapter_cards([])
        form = settings_form(prompt_field(), negative_prompt_field(), 16)
        grid.build(context, Shared(tabs, gradio.State(""), value, card_changes(), tab), form, lambda *_: None)
    assert {one["api_visibility"] for one in page.config["dependencies"]} == {"private"}
