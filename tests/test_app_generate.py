"""The Generate tab without a browser: what its events do, and how settings come back from pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import ModelsOnDisk, write_models
from PIL import Image
from PIL.PngImagePlugin import PngInfo

gradio = pytest.importorskip("gradio")

from svft_diffusion.adapters.weights import AdapterWeight  # noqa: E402
from svft_diffusion.app.components.adapter_cards import Card, adapter_cards, with_card  # noqa: E402
from svft_diffusion.app.components.card_changes import card_changes  # noqa: E402
from svft_diffusion.app.config import AppConfig  # noqa: E402
from svft_diffusion.app.context import AppContext, Shared  # noqa: E402
from svft_diffusion.app.drawing.gallery import PICTURES_PER_PAGE, details_of, history_page  # noqa: E402
from svft_diffusion.app.drawing.recall import Recalled, read_picture, recall  # noqa: E402
from svft_diffusion.app.drawing.studio import Studio  # noqa: E402
from svft_diffusion.app.jobs.training_jobs import TrainingJobs  # noqa: E402
from svft_diffusion.app.offered_bases import OfferedBases  # noqa: E402
from svft_diffusion.app.shelf.library import Library  # noqa: E402
from svft_diffusion.app.tabs.generate_adapters import AdapterEvents  # noqa: E402
from svft_diffusion.app.tabs.generate_model import ModelEvents, model_picker  # noqa: E402
from svft_diffusion.app.tabs.generate_pictures import PictureEvents  # noqa: E402
from svft_diffusion.app.tabs.generate_settings import (  # noqa: E402
    PictureWishes,
    negative_prompt_field,
    prompt_field,
    settings_form,
)
from svft_diffusion.errors import UserError  # noqa: E402
from svft_diffusion.sampling.drawing import open_pipeline  # noqa: E402
from svft_diffusion.sampling.png import save_png  # noqa: E402

STEPS = 2
HOSTILE = "<img src=x onerror=alert(1)> {{value}}"


@dataclasses.dataclass(frozen=True)
class Page:
    """The tab's events on tiny models, with a library of three adapters, one of another base."""

    models: ModelsOnDisk
    context: AppContext
    pictures: PictureEvents

    @property
    def base(self) -> str:
        return str(self.models.base)

    def cards(self, **weights: AdapterWeight) -> list[Card]:
        """As they come from the page: through JSON."""
        cards: list[Card] = []
        for name, weight in weights.items():
            cards = with_card(cards, self.context.library.by_name(name), weight)
        return list(json.loads(json.dumps(cards)))

    def draw(self, cards: list[Card], **fields: Any) -> list[list[Any]]:
        """What the page is shown, update by update."""
        values = dataclasses.astuple(dataclasses.replace(WISHES, **fields))
        return list(self.pictures.draw(self.base, cards, [], *values))

    def picture(self, cards: list[Card], **fields: Any) -> Path:
        """The file of the newest picture."""
        visits = [update[3] for update in self.draw(cards, **fields) if isinstance(update[3], list)]
        return Path(visits[-1][0][0])

    def recalled(self, file: Path) -> Recalled:
        return recall(file.read_bytes(), file.name, self.context.library, [self.base], "float32")


WISHES = PictureWishes(
    prompt="a photo of sks dog",
    negative_prompt="",
    seed="5",
    random_seed=False,
    num_images=1,
    num_inference_steps=STEPS,
    guidance_scale=4.0,
    width=None,
    height=None,
    scheduler="default",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("generate")
    models = write_models(folder)
    shutil.copy(models.foreign, folder / "adapters")
    config = AppConfig(
        pretrained_model_name_or_path=str(models.base),
        base=[str(models.other_base)],
        adapters_dir=folder / "adapters",
        output_dir=folder / "pictures",
        device="cpu",
    )
    context = AppContext(
        config,
        Studio(config.output_dir, device=torch.device("cpu")),
        Library(config.adapters_dir, config.uploads_dir),
        TrainingJobs(config.training_dir),
    )
    with gradio.Blocks(), gradio.Tabs() as tabs, gradio.Tab() as tab:
        shared = Shared(tabs, gradio.State(str(models.base)), adapter_cards([]), card_changes(), tab)
        form = settings_form(prompt_field(), negative_prompt_field(), 64)
        yield Page(models, context, PictureEvents(context, shared, form, model_picker(context, 64)))


def pixels(file: Path) -> bytes:
    with Image.open(file) as image:
        return image.tobytes()


def request(page: Page, prompt: str, cards: list[Card]) -> dict[str, AdapterWeight]:
    wishes = dataclasses.replace(WISHES, prompt=prompt)
    asked = wishes.request(page.base, cards, page.context.library, "error")
    assert asked.prompt == "a dog"
    return {adapter.name: weight for adapter, weight in asked.adapters}


def test_adapters_in_the_prompt_act_as_it_says(page: Page) -> None:
    assert request(page, "a dog", []) == {}
    assert request(page, "a dog <adapter:dog:0.5>", []) == {"dog": 0.5}
    assert request(page, "<adapter:dog:unet=0.5> a dog", []) == {"dog": {"unet": 0.5, "text_encoder": 0.0}}
    cards = page.cards(dog=1.0, style=0.3)
    assert request(page, "a <adapter:dog:-2> dog", cards) == {"dog": -2.0, "style": 0.3}
    off = [{**card, "on": False} for card in cards]
    assert request(page, "a dog <adapter:style>", off) == {"style": 1.0}
    assert list(request(page, "<adapter:style:0.5> a dog", page.cards(dog=1.0))) == ["dog", "style"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "a dog <adapter:dgo:1>"}, "'dgo' that is not in the library, did you mean 'dog'"),
        ({"prompt": "a dog <adapter:dog:1> <adapter:dog:1>"}, "twice"),
        ({"prompt": "a dog <adapter:dog:11>"}, "between -10 and 10"),
        ({"prompt": "a dog <adapter:foreign:1>"}, "was trained on the base"),
        ({"prompt": " "}, "write a prompt first"),
        ({"seed": "many"}, "the seed must be a whole number, got 'many'"),
        ({"seed": None}, "the seed must be a whole number"),
        ({"seed": "-1"}, "the seed must be between"),
        ({"num_inference_steps": None}, "the number of steps is missing"),
        ({"num_inference_steps": 0}, "between 1 and 1000"),
        ({"num_images": 17}, "between 1 and 16"),
        ({"guidance_scale": None}, "the guidance is missing"),
        ({"width": 60}, "the width must be a multiple of 8"),
        ({"scheduler": "dim"}, "did you mean 'ddim'"),
    ],
)
def test_what_cannot_be_drawn_says_why_and_changes_nothing(page: Page, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(gradio.Error) as caught:
        page.draw([], **fields)
    assert reason in caught.value.message and caught.value.print_exception is False


def test_drawing_shows_every_picture_as_it_was_saved(page: Page) -> None:
    updates = page.draw(page.cards(dog=1.0), num_images=2, negative_prompt="a cat")
    assert updates[0][0] == gradio.skip() and updates[0][1]["text"] == "Preparing"
    assert any(update[1]["picture"].startswith("data:image/jpeg") for update in updates if "picture" in update[1] or {})
    last = [update for update in updates if isinstance(update[3], list)][-1]
    captions = [caption for _, caption in last[3]]
    assert captions == ["seed 6", "seed 5"]
    assert last[2]["value"] == last[3] and last[6] == last[3][0][0]
    shown = dict(last[5]["details"])
    assert shown["Seed"] == "6" and shown["Adapters"] == "dog: 1" and shown["Negative prompt"] == "a cat"
    assert all(Path(file).parent == page.context.config.output_dir for file, _ in last[3])


def test_a_random_seed_is_told_before_it_is_used(page: Page) -> None:
    first, second = (page.draw([], random_seed=True) for _ in range(2))
    assert first[0][0] != second[0][0]
    seeds = {dict(update[5]["details"])["Seed"] for update in first if "details" in (update[5] or {})}
    assert seeds == {first[0][0]}


def test_closing_ends_the_drawing_early(page: Page) -> None:
    before = set(page.context.config.output_dir.glob("*"))
    wishes = dataclasses.astuple(dataclasses.replace(WISHES, num_inference_steps=500))
    updates = page.pictures.draw(page.base, [], [], *wishes)
    next(updates)
    next(updates)
    updates.close()
    assert set(page.context.config.output_dir.glob("*")) == before
    assert page.picture([]).is_file()  # and nothing holds the studio


def test_off_is_the_base_and_the_first_setting_comes_back_to_the_bit(page: Page) -> None:
    base = pixels(page.picture([]))
    dog = pixels(page.picture(page.cards(dog=0.8)))
    assert dog != base
    assert pixels(page.picture([{**card, "on": False} for card in page.cards(dog=0.8)])) == base
    assert pixels(page.picture(page.cards(dog=0.0))) == base
    assert pixels(page.picture(page.cards(dog=-1.5, style=2.0))) not in (base, dog)
    assert pixels(page.picture(page.cards(dog=0.8))) == dog


def test_a_thousand_changes_of_the_cards_leave_the_base_alone(page: Page) -> None:
    """The way of the page: cards to a request to the pipeline, and every hundredth of them to a picture."""
    first_cards, chance = page.cards(dog=0.7, style=-0.2), random.Random(0)
    base, first = pixels(page.picture([])), pixels(page.picture(first_cards))
    before = digest_of_base(page)
    for number in range(1000):
        cards = chance.sample(first_cards, chance.randint(0, 2))
        cards = [
            card
            | {
                "weight": chance.choice([chance.uniform(-10, 10), 0.0]),
                "on": chance.random() < 0.8,
                "components": chance.choice([None, {"unet": chance.uniform(-1, 1), "text_encoder": chance.random()}]),
                "blocks": chance.choice([preset for preset, _ in card["presets"]]),
            }
            for card in cards
        ]
        request = WISHES.request(page.base, json.loads(json.dumps(cards)), page.context.library, "error")
        with page.context.studio.with_adapters(page.base, request.adapters):
            pass
        if number % 100 == 0:
            page.picture(cards)
    assert digest_of_base(page) == before
    assert pixels(page.picture([])) == base and pixels(page.picture(first_cards)) == first


def digest_of_base(page: Page) -> str:
    """Of the base's weights in memory, which are those on disk."""
    digest = hashlib.sha256()
    on_disk = open_pipeline(page.base, device=torch.device("cpu"))
    with page.context.studio.with_adapters(page.base, ()) as pipeline:
        for component in ("unet", "text_encoder", "vae"):
            fresh = on_disk.components[component].state_dict()
            held = {
                name.replace("base_layer.", ""): tensor
                for name, tensor in getattr(pipeline, component).state_dict().items()
            }
            for name in fresh:
                assert torch.equal(held[name], fresh[name])
                digest.update(name.encode() + held[name].numpy().tobytes())
    return digest.hexdigest()


def test_a_picture_gives_back_every_field_and_is_drawn_again(page: Page) -> None:
    cards = page.cards(style=-0.35, dog={"unet": {"down_blocks": 0.7}, "text_encoder": 0.25})
    fields: dict[str, Any] = {
        "prompt": 'a "photo": <of>, Negative prompt: a dog\nNegative prompt: äöü 狗',
        "negative_prompt": "blurry,\nSteps: 3",
        "seed": str(2**62 + 1),
        "num_inference_steps": 3,
        "guidance_scale": 2.718281828,
        "width": 64,
        "height": 32,
        "scheduler": "euler_a",
    }
    file = page.picture(cards, **fields)
    recalled = page.recalled(file)
    assert recalled.notes == [] and recalled.base == page.base
    assert recalled.values == fields | {"seed": 2**62 + 1}
    assert recalled.cards is not None and [card["name"] for card in recalled.cards] == ["style", "dog"]
    again = page.picture(json.loads(json.dumps(recalled.cards)), **fields)
    assert again != file and pixels(again) == pixels(file)


def test_the_form_takes_over_what_a_picture_tells(page: Page) -> None:
    file = page.picture(page.cards(dog=0.5), seed=str(2**60 + 1))
    updates = page.pictures.recall_chosen(str(file), page.base)
    values = [update.get("value") for update in updates[:10]]
    assert values[:6] == [WISHES.prompt, "", str(2**60 + 1), False, 1, STEPS]
    assert updates[12] == page.base and updates[13][0]["name"] == "dog" and updates[15] == str(file)
    with pytest.raises(gradio.Error, match="choose a picture first"):
        page.pictures.recall_chosen(None, page.base)


def test_missing_adapters_are_named(page: Page, tmp_path: Path) -> None:
    told: dict[str, Any] = {
        "prompt": "a dog",
        "adapters": [
            {"name": HOSTILE, "weight": 1.0, "sha256": "0" * 64},
            {"name": "dog", "weight": 0.5, "sha256": page.context.library.by_name("dog").sha256},
            {"name": "style", "weight": 0.5, "sha256": page.context.library.by_name("style").sha256[:16] + "0" * 48},
            {"name": "dog", "weight": {"unet": 1.0, "region": [0, 1]}},
        ],
        "base": "another",
        "dtype": "bfloat16",
        "batch_size": 4,
    }
    recalled = page.recalled(save_png(Image.new("RGB", (8, 8)), tmp_path / "told.png", told))
    assert recalled.base is None and recalled.cards is not None
    assert [(card["name"], card["weight"]) for card in recalled.cards] == [("dog", 0.5)]
    notes = "\n".join(recalled.notes)
    for words in (f"{HOSTILE} is not", "adapter style is not", "base model another", "batch_size 4", "bfloat16"):
        assert words in notes
    assert "dog acted in a way that a card can't show" in notes


def test_a_carried_adapter_can_be_fetched_from_the_picture(page: Page, tmp_path: Path) -> None:
    foreign = page.context.library.by_name("foreign")
    told = {"prompt": "a dog", "adapters": [{"name": "f", "weight": 1.0, "sha256": foreign.sha256}]}
    picture = tmp_path / "carrier.png"
    save_png(Image.new("RGB", (8, 8)), picture, told, [foreign.file.read_bytes()])
    empty = Library(tmp_path / "library", tmp_path / "library" / "uploads")
    recalled = recall(picture.read_bytes(), picture.name, empty, [page.base], "float32")
    assert recalled.cards == [] and "the picture carries it" in recalled.notes[-1]
    empty.add(picture, picture.name)
    recalled = recall(picture.read_bytes(), picture.name, empty, [page.base], "float32")
    assert recalled.cards is not None and len(recalled.cards) == 1


def test_pictures_of_other_tools_tell_what_they_tell(page: Page, tmp_path: Path) -> None:
    text = (
        "a dog on the beach, 狗\nNegative prompt: cat\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 77, "
        "Size: 512x768, Model: sd15, Version: v1.10"
    )
    file = tmp_path / "other.png"
    chunks = PngInfo()
    chunks.add_itxt("parameters", text)
    Image.new("RGB", (8, 8)).save(file, pnginfo=chunks)
    recalled = page.recalled(file)
    assert recalled.values == {
        "prompt": "a dog on the beach, 狗",
        "negative_prompt": "cat",
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "seed": 77,
        "width": 512,
        "height": 768,
        "scheduler": "dpm++_2m_karras",
    }
    assert recalled.cards is None and recalled.notes == [
        "it was drawn with the base model sd15, which is not offered here"
    ]
    chunks = PngInfo()
    chunks.add_text("parameters", "a dog\nSteps: 20, Sampler: Restart, Seed: 1, Size: 8x9")
    Image.new("RGB", (8, 8)).save(file, pnginfo=chunks)
    recalled = page.recalled(file)
    assert recalled.values["scheduler"] == "default" and "height" not in recalled.values
    assert "no scheduler Restart" in "\n".join(recalled.notes) and "multiple of 8" in "\n".join(recalled.notes)


@pytest.mark.parametrize("value", [None, True, -1, 10**400, 1e308, "x" * 10**4, [], {"a": 1}, [[[]]], "<b>"])
def test_settings_may_be_anything(page: Page, tmp_path: Path, value: Any) -> None:
    names = ["prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "width", "height"]
    names += ["scheduler_option", "base", "dtype", "batch_size", "adapters", "version"]
    told = dict.fromkeys(names, value)
    file = save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {key: told[key] for key in told if key != "prompt"})
    recalled = page.recalled(file)
    assert recalled.cards in (None, []) and all(len(note) < 500 for note in recalled.notes)
    assert all(isinstance(text, str) for _, text in details_of(recalled.settings))
    told["adapters"] = [value, {"name": value, "weight": value, "sha256": value}, {"weight": {"unet": {"a": value}}}]
    recalled = page.recalled(save_png(Image.new("RGB", (8, 8)), tmp_path / "b.png", {"adapters": told["adapters"]}))
    assert recalled.cards == []
    details_of(recalled.settings)


def test_what_is_no_picture_is_refused(page: Page, tmp_path: Path) -> None:
    plain, other, huge = tmp_path / "plain.png", tmp_path / "other.png", tmp_path / "huge.png"
    Image.new("RGB", (8, 8)).save(plain)
    Image.new("RGB", (8, 8)).save(other, format="JPEG")
    Image.new("1", (20_000, 20_000)).save(huge)
    with pytest.raises(UserError, match="tells no settings"):
        page.recalled(plain)
    limits = {"most_bytes": 10**6, "most_pixels": 10**6}
    with pytest.raises(UserError, match=r"other\.png is no PNG picture"):
        read_picture(other, "other.png", **limits)
    with pytest.raises(UserError, match="20000 x 20000 pixels"):
        read_picture(huge, "huge.png", **limits)
    with pytest.raises(UserError, match="larger than"):
        read_picture(plain, "plain.png", most_bytes=10, most_pixels=10**6)
    with pytest.raises(gradio.Error, match="tells no settings"):
        page.pictures.recall_dropped(str(plain), page.base)


def test_the_history_has_pages_with_the_newest_first(tmp_path: Path) -> None:
    empty = history_page(tmp_path / "nothing", 3)
    assert (empty.files, empty.number, empty.pages) == ([], 1, 1)
    for number in range(PICTURES_PER_PAGE + 2):
        file = tmp_path / f"{number:05d}.png"
        file.write_bytes(b"picture")
        os.utime(file, (number, number))
    (tmp_path / "notes.txt").write_bytes(b"notes")
    (tmp_path / "99999.png").touch()  # is being written
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "00000.png")
    first, last = history_page(tmp_path, 1), history_page(tmp_path, 99)
    assert first.files[0].name == f"{PICTURES_PER_PAGE + 1:05d}.png" and len(first.files) == PICTURES_PER_PAGE
    assert [file.name for file in last.files] == ["00001.png", "00000.png"] and (last.number, last.pages) == (2, 2)


def test_another_base_drops_adapters_of_the_first(page: Page) -> None:
    events = ModelEvents(page.context)
    cards = [*page.cards(dog=0.5), {**page.cards(style=1.0)[0], "id": "0" * 16, "name": HOSTILE}]
    base, status, kept, width, height = events.load("other-base", cards)
    assert (
        base == str(page.models.other_base)
        and "other-base" in status
        and [*kept["removed"]] == [card["id"] for card in cards]
    )
    assert width == height == page.context.studio.open_base(base)
    base, _, kept, *_ = events.load("base", page.cards(dog=0.5))
    assert base == page.base and kept == gradio.skip()
    with pytest.raises(gradio.Error, match="no such base model folder"):
        events.load(f"{page.base}-nowhere", [])


def test_bases_are_called_by_names_that_tell_no_folder(page: Page) -> None:
    config = dataclasses.replace(page.context.config, base=["/a/base", "/b/base", "toybox"], allow_public=True)
    bases = OfferedBases(config)
    assert bases.labels == ["base", "base (2)", "base (3)", "toybox"]
    assert bases.named("base (3)") == "/b/base" and bases.label("/a/base") == "base (2)"
    for name in ("/etc", str(page.models.other_base), "someone/model"):
        with pytest.raises(UserError, match="not offered"):
            bases.named(name)


def test_adapters_come_from_the_library_and_as_uploads(page: Page, tmp_path: Path) -> None:
    events = AdapterEvents(page.context)
    choices, names = events.refresh()
    ids = {label: id for label, id in choices["choices"]}
    assert set(ids) == {"dog", "style", "foreign"} == {one["name"] for one in names}
    _, changes = events.add(ids["dog"], [], page.base)
    cards = changes["added"]
    assert changes["removed"] == [] and changes["weights"] == {}
    with pytest.raises(gradio.Error, match="there already"):
        events.add(ids["dog"], cards, page.base)
    with pytest.raises(gradio.Error, match="was trained on the base"):
        events.add(ids["foreign"], cards, page.base)
    with pytest.raises(gradio.Error, match="no longer in the library"):
        events.add("../../etc/passwd", cards, page.base)
    upload = shutil.copy(page.models.style, tmp_path / "uploaded.safetensors")
    changes, *_ = events.add_uploads([str(upload)], cards, page.base)
    assert [card["name"] for card in changes["added"]] == ["style"]  # it was there already, under its own name


def test_an_upload_that_fails_keeps_no_other_from_the_cards(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(gradio, "Warning", told.append)
    events, dog = AdapterEvents(page.context), page.cards(dog=1.0)
    damaged = tmp_path / "damaged<b>.safetensors"
    damaged.write_bytes(b"\x10")
    again = shutil.copy(page.models.dog, tmp_path / "again.safetensors")
    good = shutil.copy(page.models.style, tmp_path / "good.safetensors")
    changes, *_ = events.add_uploads([str(damaged), str(again), str(good)], dog, page.base)
    assert [card["name"] for card in changes["added"]] == ["style"]
    (text,) = told
    assert "damaged" in text and "dog is there already" in text and "<b>" not in text
    with pytest.raises(gradio.Error, match="dog is there already"):
        events.add_uploads([str(again)], dog, page.base)


def test_recalled_cards_say_why_they_cannot_act(page: Page, tmp_path: Path) -> None:
    sha256 = page.context.library.by_name("foreign").sha256
    told = {"prompt": "a dog", "adapters": [{"name": "foreign", "weight": 1.0, "sha256": sha256}], "base": "elsewhere"}
    file = save_png(Image.new("RGB", (8, 8)), tmp_path / "told.png", told)
    (card,) = page.pictures.recall_chosen(str(file), page.base)[13]
    assert card["name"] == "foreign" and "was trained on the base" in card["warning"]


def test_blacked_out_pictures_are_told(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    with page.context.studio.with_adapters(page.base, ()) as pipeline:
        hide = lambda image, *_: (torch.zeros_like(image), [True])  # noqa: E731
        monkeypatch.setattr(pipeline, "run_safety_checker", hide, raising=False)
    last = [update for update in page.draw([], num_images=2) if isinstance(update[3], list)][-1]
    assert "2 of them were blacked out by the base model's safety checker" in last[4]
    assert ["Safety checker", "blacked the picture out"] in last[5]["details"]
    monkeypatch.undo()
    last = [update for update in page.draw([]) if isinstance(update[3], list)][-1]
    assert "blacked" not in last[4] + str(last[5])


def test_interference_is_told_in_words(page: Page) -> None:
    events = AdapterEvents(page.context)
    line, *clipping = events.compare(page.cards(dog=1.0, style=0.5), page.base)
    assert line.startswith("dog and style ") and "cosine" in line and "sha256" not in line
    assert [text.startswith("together they push ") for text in clipping] == [True]
    assert events.compare(page.cards(dog=1.0, style=0.0), page.base) == []
    assert events.compare([{**card, "on": False} for card in page.cards(dog=1.0, style=1.0)], page.base) == []
    foreign = [*page.cards(dog=1.0), *page.cards(foreign=1.0)]
    assert "was trained on the base" in events.compare(foreign, page.base)[0]
