"""The Blend tab in a browser: the pad sets the cards' weights and asks the server nothing; buttons do."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import ModelsOnDisk, write_models
from conftest import until_quiet
from hostile_names import HOSTILE_TEXTS

gradio = pytest.importorskip("gradio")
pytest.importorskip("playwright.sync_api")

from playwright.sync_api import expect  # noqa: E402

from svft_diffusion.app.components.adapter_cards import adapter_cards, with_card  # noqa: E402
from svft_diffusion.app.components.card_changes import card_changes, wire_card_changes  # noqa: E402
from svft_diffusion.app.config import AppConfig  # noqa: E402
from svft_diffusion.app.context import AppContext, Shared  # noqa: E402
from svft_diffusion.app.drawing.studio import Studio  # noqa: E402
from svft_diffusion.app.jobs.training_jobs import TrainingJobs  # noqa: E402
from svft_diffusion.app.shelf.library import Library  # noqa: E402
from svft_diffusion.app.tabs import blend  # noqa: E402
from svft_diffusion.files import adapter_bytes, read_adapter  # noqa: E402

pytestmark = pytest.mark.browser

HOSTILE = HOSTILE_TEXTS[1]  # an <img> with a script
NAMES = ("dog", "hostile", "cat", "house", "boat")  # as in the library
_SECONDS_TO_SETTLE = 30.0


@dataclass
class Site:
    """A page with five adapters on the cards; the last one is off."""

    address: str
    uploads: Path


@dataclass
class Visit:
    """A visitor on the tab."""

    page: Any
    requests: list[str] = field(default_factory=list)

    @property
    def thumb(self) -> Any:
        return self.page.locator("#weight-pad .thumb")

    @property
    def box(self) -> dict[str, float]:
        found: dict[str, float] = self.page.locator("#weight-pad .pad").bounding_box()
        return found

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a place in the pad."""
        box = self.box
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def drag(self, *places: tuple[float, float]) -> None:
        self.page.locator("#weight-pad .pad").scroll_into_view_if_needed()
        self.page.mouse.move(*self.at(*places[0]))
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*self.at(*place), steps=12)
        self.page.mouse.up()

    def weights(self) -> list[float]:
        """Those that the server gets with the next request."""
        received = self.page.get_by_label("received", exact=True)
        received.fill("")
        self.page.get_by_role("button", name="Send", exact=True).click()
        self.page.wait_for_function("document.querySelector('#received textarea').value !== ''")
        return [card["weight"] for card in json.loads(received.input_value())]

    def weights_become(self, expected: Any) -> None:
        """Wait for them: what the pad sets goes by way of the cards. They stay so when the pad has heard of it."""
        end = time.monotonic() + _SECONDS_TO_SETTLE
        while self.weights() != expected and time.monotonic() < end:
            self.page.wait_for_timeout(100)
        until_quiet(self.page)
        assert self.weights() == expected

    def says(self) -> str:
        return str(self.thumb.get_attribute("aria-valuetext"))

    def comes_to_say(self, text: str) -> None:
        expect(self.thumb).to_have_attribute("aria-valuetext", text, timeout=1000 * _SECONDS_TO_SETTLE)

    def number(self, name: str) -> Any:
        return self.page.locator("#weight-pad").get_by_role("spinbutton", name=f"Weight of {name}", exact=True)

    def select(self, label: str) -> Any:
        return self.page.locator("#weight-pad").get_by_role("combobox", name=label, exact=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def site(models: ModelsOnDisk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    library_folder = folder / "library"
    library_folder.mkdir()
    header, tensors = read_adapter(models.dog)
    for number, name in enumerate(NAMES):
        text = HOSTILE if name == "hostile" else name.capitalize()
        titled = dataclasses.replace(header, title=text, trigger=text if name == "hostile" else None, seed=number)
        (library_folder / f"{name}.safetensors").write_bytes(adapter_bytes(titled, tensors))
    config = AppConfig(str(models.base), adapters_dir=library_folder, output_dir=folder / "pictures")
    library = Library(library_folder, config.uploads_dir)
    context = AppContext(
        config, Studio(config.output_dir, device=torch.device("cpu")), library, TrainingJobs(config.training_dir)
    )
    value: list[dict[str, Any]] = []
    for name in NAMES:
        value = with_card(value, library.by_name(name), 1.0)
    value[-1]["on"] = False
    with gradio.Blocks() as page:
        cards = adapter_cards(value, render=False)
        changes = card_changes()
        base = gradio.State(str(models.base))
        received = gradio.Textbox(label="received", elem_id="received", interactive=True)
        send, forget = gradio.Button("Send"), gradio.Button("Forget")
        send.click(json.dumps, cards, received)
        forget.click(lambda value: value[:1], cards, cards)
        with gradio.Tabs(selected="generate") as tabs:
            with gradio.Tab("Generate", id="generate"):
                cards.render()
            with gradio.Tab("Blend", id="blend") as tab:
                blend.build(context, Shared(tabs, base, cards, changes, tab))
        wire_card_changes(changes, cards)
    _, address, _ = page.launch(
        prevent_thread_lock=True,
        quiet=True,
        server_name="127.0.0.1",
        ssr_mode=False,
        allowed_paths=[str(config.output_dir)],
    )
    yield Site(address, config.uploads_dir)
    page.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def visit(site: Site, new_page: Any) -> Visit:
    page = new_page(viewport={"width": 390, "height": 800}, has_touch=True, accept_downloads=True)
    page.set_default_timeout(30_000)
    visit = Visit(page)
    page.on("request", lambda request: visit.requests.append(request.url))
    page.goto(site.address)
    page.get_by_role("tab", name="Blend").click()
    page.wait_for_selector("#weight-pad .thumb")
    return visit


def test_dragging_sets_both_weights_and_asks_nothing(visit: Visit) -> None:
    until_quiet(visit.page)
    before = len(visit.requests)
    visit.drag((0.1, 0.1), (0.9, 0.8), (0.5, 0.25))
    until_quiet(visit.page)
    assert visit.requests[before:] == []
    visit.comes_to_say(f"Dog 0.5, {HOSTILE} 1.25")
    assert (visit.number("dog").input_value(), visit.number("hostile").input_value()) == ("0.5", "1.25")
    visit.weights_become([0.5, 1.25, 1, 1, 1])
    visit.page.get_by_role("tab", name="Generate").click()
    assert visit.page.get_by_role("spinbutton", name="Weight of hostile, as a number").input_value() == "1.25"
    visit.page.get_by_role("spinbutton", name="Weight of dog, as a number").fill("-0.35")
    visit.page.get_by_role("tab", name="Blend").click()
    visit.page.wait_for_function("document.querySelector('.thumb').getAttribute('aria-valuetext').includes('-0.35')")
    visit.weights_become([-0.35, 1.25, 1, 1, 1])


def test_a_finger_does_the_same(visit: Visit) -> None:
    visit.page.locator("#weight-pad .pad").scroll_into_view_if_needed()
    until_quiet(visit.page)
    before = len(visit.requests)
    visit.page.touchscreen.tap(*visit.at(1 / 3, 2 / 3))
    assert visit.says() == f"Dog 0, {HOSTILE} 0"
    assert visit.page.locator("#weight-pad .pad").evaluate("pad => getComputedStyle(pad).touchAction") == "none"
    until_quiet(visit.page)
    assert visit.requests[before:] == []
    visit.weights_become([0, 0, 1, 1, 1])


def test_keys_do_the_same_and_readers_hear_both(visit: Visit) -> None:
    until_quiet(visit.page)
    before = len(visit.requests)
    visit.thumb.focus()
    for key in ("ArrowLeft", "ArrowLeft", "ArrowUp", "Shift+ArrowUp", "Shift+ArrowRight", "PageDown"):
        visit.page.keyboard.press(key)
    assert visit.says() == f"Dog 0.91, {HOSTILE} 0.81"
    assert visit.thumb.get_attribute("role") == "slider"
    assert visit.thumb.get_attribute("aria-label") == f"Weights of Dog and {HOSTILE}"
    assert [visit.thumb.get_attribute(f"aria-value{end}") for end in ("min", "now", "max")] == ["-1", "0.91", "2"]
    for _ in range(30):  # faster than what goes by way of the cards
        visit.page.keyboard.press("ArrowLeft")
    assert visit.says() == f"Dog -0.59, {HOSTILE} 0.81"
    visit.page.keyboard.press("End")
    visit.page.keyboard.press("ArrowRight")  # the end of the shown range
    until_quiet(visit.page)
    assert visit.requests[before:] == []
    visit.comes_to_say(f"Dog 2, {HOSTILE} 0.81")
    assert visit.thumb.evaluate("thumb => thumb === document.activeElement")
    visit.weights_become([2, 0.81, 1, 1, 1])


def test_fields_go_further_than_the_shown_range(visit: Visit) -> None:
    field = visit.number("dog")
    field.fill("-7.5")
    assert "can't show" in visit.says()
    visit.weights_become([-7.5, 1, 1, 1, 1])
    visit.select("Shown range").select_option("-10 to 10")
    assert "can't show" not in visit.says()
    for text, kept in (("11", "10"), ("", "10")):
        field.fill(text)
        assert field.get_attribute("aria-invalid") == "true"
        field.blur()
        assert field.input_value() == kept and field.get_attribute("aria-invalid") == "false"
    visit.weights_become([10, 1, 1, 1, 1])


def test_other_adapters_can_be_chosen(visit: Visit) -> None:
    visit.select("Left to right").select_option(label="Cat")
    visit.select("Bottom to top").select_option(label="Cat")  # which changes places with the other
    assert visit.select("Left to right").evaluate("one => one.selectedOptions[0].textContent") == HOSTILE
    assert visit.select("Left to right").locator("option").all_inner_texts() == ["Dog", HOSTILE, "Cat", "House"]
    visit.drag((0.5, 0.5), (1, 0.5))
    visit.weights_become([1, 2, 0.5, 1, 1])


def test_four_corners_share_a_strength(visit: Visit) -> None:
    visit.page.get_by_label("Four corners").check()
    assert visit.page.get_by_role("spinbutton", name="Total strength").input_value() == "4"
    visit.page.get_by_role("spinbutton", name="Total strength").fill("1")
    visit.drag((0.1, 0.1), (0.25, 0.4))
    visit.weights_become(pytest.approx([0.45, 0.15, 0.3, 0.1, 1]))
    visit.page.get_by_role("spinbutton", name="Total strength").fill("1.5")
    visit.weights_become(pytest.approx([0.675, 0.225, 0.45, 0.15, 1]))  # 1.5 of them, and the one that is off
    visit.thumb.press("End")
    visit.thumb.press("PageUp")
    visit.weights_become(pytest.approx([0, 1.275, 0, 0.225, 1]))
    visit.comes_to_say(f"Dog 0, {HOSTILE} 1.275, Cat 0, House 0.225")
    visit.select("Top right").select_option("")
    assert visit.page.locator("#weight-pad .corner").nth(1).inner_text() == "nothing"
    visit.thumb.press("ArrowLeft")
    visit.weights_become(pytest.approx([0.06375, 1.275, 0.01125, 0.21375, 1]))


def test_one_adapter_has_no_pad(visit: Visit) -> None:
    visit.page.get_by_role("button", name="Forget").click()
    visit.page.get_by_text("The pad takes two adapters that are on").wait_for()
    assert not visit.thumb.is_visible() and visit.number("dog").is_visible()
    visit.number("dog").fill("0.3")
    visit.weights_become([0.3])


def test_texts_of_files_stay_text(visit: Visit) -> None:
    visit.page.get_by_label("Four corners").check()
    assert visit.page.locator("#weight-pad .weights .title").nth(1).inner_text() == HOSTILE
    assert visit.page.locator("#weight-pad code").inner_text() == HOSTILE
    assert visit.page.locator("#weight-pad img").count() == 0
    visit.page.get_by_text("How the adapters get on").click()
    visit.page.get_by_role("button", name="Compare at these weights").click()
    visit.page.wait_for_function("document.querySelector('#blend-report textarea')?.value.includes('hostile')")
    visit.page.locator("#blend-meetings").get_by_text("dog / hostile").first.wait_for()
    visit.page.locator("#blend-plot img").wait_for()
    assert visit.page.evaluate("window.xss") is None


def test_from_the_pad_to_a_picture_an_adapter_and_a_lora(visit: Visit, site: Site, tmp_path: Path) -> None:
    visit.drag((0.5, 0.5), (0.5, 0.25))
    visit.page.locator("#blend-prompt textarea").fill("a dog")
    visit.page.get_by_label("Steps", exact=True).fill("2")
    visit.page.get_by_role("button", name="Draw", exact=True).click()
    visit.page.wait_for_selector("#blend-picture img")
    assert (
        visit.page.locator("#blend-picture img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 8
    )
    visit.page.get_by_text("Make one adapter of them").click()
    visit.page.get_by_label("Name", exact=True).fill("Both of them")
    visit.page.get_by_label("Title", exact=True).fill(HOSTILE)
    visit.page.get_by_role("button", name="Save into the library").click()
    visit.page.wait_for_function("document.querySelector('#blend-result textarea')?.value.includes('in the library')")
    (file,) = site.uploads.iterdir()
    header, _ = read_adapter(file)
    assert file.name == "Both_of_them.safetensors" and header.title == HOSTILE
    assert [source["weight"] for source in header.training["blend"]["sources"]] == [0.5, 1.25, 1, 1]
    visit.page.get_by_role("button", name="Export", exact=True).click()
    visit.page.wait_for_selector("#blend-download:visible, #blend-download a:visible")
    with visit.page.expect_download() as download:
        visit.page.locator("#blend-download").click()
    assert download.value.suggested_filename == "Both_of_them-kohya.safetensors"
    visit.page.get_by_role("button", name="Put it in place of the cards").click()
    visit.page.get_by_text("The pad takes two adapters that are on").wait_for()
    visit.weights_become([1])
    visit.page.get_by_role("button", name="Bring the cards back").click()
    visit.thumb.wait_for()
    visit.weights_become([0.5, 1.25, 1, 1, 1])


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("colors", ["light", "dark"])
def test_nothing_is_cut_off(visit: Visit, width: int, colors: str) -> None:
    visit.page.set_viewport_size({"width": width, "height": 800})
    visit.page.evaluate("dark => document.body.classList.toggle('dark', dark)", colors == "dark")
    for four in (False, True):
        visit.page.get_by_label("Four corners" if four else "Two adapters").check()
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        parts = visit.page.locator("#weight-pad :is(input, select, .pad, .thumb, .corner, .axis)")
        for part in [one for one in parts.all() if one.is_visible()]:
            box = part.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
