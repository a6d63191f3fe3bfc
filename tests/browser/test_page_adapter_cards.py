"""The adapter cards in a browser: what a visitor sees, does and sends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from conftest import follow_requests, until_quiet

gradio = pytest.importorskip("gradio")
pytest.importorskip("playwright.sync_api")

from svft_diffusion.app.components.adapter_cards import adapter_cards  # noqa: E402

pytestmark = pytest.mark.browser

HOSTILE = '<img src=x onerror=alert(1)>"${1+1}{{value}}<script>alert(2)</script>'


def card(number: int, **fields: Any) -> dict[str, Any]:
    """A card as `with_card` makes it."""
    value = {
        "id": f"{number:016x}",
        "weight": 1.0,
        "on": True,
        "components": None,
        "blocks": "all",
        "name": f"adapter-{number}",
        "title": f"Adapter {number}",
        "trigger": "",
        "thumbnail": "",
        "lowest": -1.0,
        "highest": 2.0,
        "parts": [["unet", "UNet"], ["text_encoder", "Text encoder"]],
        "presets": [["all", "all blocks"], ["last", "way up"]],
        "warning": "",
    }
    return value | fields


@dataclass
class Visit:
    """A page with three cards, and what happened on it."""

    page: Any
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def sent(self) -> list[dict[str, Any]]:
        """The cards that the server gets with the next request."""
        self.page.get_by_label("received").fill("")
        self.page.get_by_role("button", name="Send", exact=True).click()
        self.page.wait_for_function("document.querySelector('#received textarea').value !== ''")
        cards: list[dict[str, Any]] = json.loads(self.page.get_by_label("received").input_value())
        return cards

    def weight(self, name: str) -> Any:
        return self.page.get_by_role("slider", name=f"Weight of {name}", exact=True)

    def number(self, name: str) -> Any:
        return self.page.get_by_role("spinbutton", name=f"Weight of {name}, as a number")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    first = [
        card(1, trigger="<sks> dog"),
        card(2, name=HOSTILE, title=HOSTILE, trigger=HOSTILE, warning=HOSTILE, thumbnail=HOSTILE, weight=0.83),
        card(3, parts=[], presets=[["all", "all blocks"]], highest=4.0),
    ]
    with gradio.Blocks() as page:
        cards = adapter_cards(first)
        received = gradio.Textbox(label="received", elem_id="received", interactive=True)
        send, add = gradio.Button("Send"), gradio.Button("Add")
        send.click(json.dumps, cards, received)
        add.click(lambda value: [*value, card(len(value) + 1)], cards, cards)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", ssr_mode=False)
    yield address
    page.close()


@pytest.fixture
def visit(address: str, browser: Any) -> Iterator[Visit]:
    visit = Visit(browser.new_page(viewport={"width": 390, "height": 800}))
    follow_requests(visit.page)
    visit.page.on("request", lambda request: visit.requests.append(request.url))
    visit.page.on("dialog", lambda dialog: (visit.dialogs.append(dialog.message), dialog.dismiss()))
    visit.page.goto(address)
    visit.page.wait_for_selector("#adapter-cards .card")
    yield visit
    visit.page.close()


def test_sliders_ask_the_server_nothing(visit: Visit) -> None:
    slider, number = visit.weight("adapter-1"), visit.number("adapter-1")
    until_quiet(visit.page)
    before = len(visit.requests)
    slider.focus()
    for key in ("ArrowLeft", "ArrowLeft", "Control+ArrowUp", "Control+Shift+ArrowDown"):
        slider.press(key)
    assert float(number.input_value()) == 0.94
    assert slider.evaluate("one => one === document.activeElement")
    box = slider.bounding_box()
    visit.page.mouse.move(box["x"] + 5, box["y"] + box["height"] / 2)
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=10)
    visit.page.mouse.up()
    dragged = float(number.input_value())
    assert 0.3 <= dragged <= 0.7 and round(dragged / 0.05) * 0.05 == pytest.approx(dragged)
    visit.page.get_by_role("switch", name="adapter-3 acts").press("Space")
    until_quiet(visit.page)
    assert visit.requests[before:] == []
    sent = visit.sent()
    assert [one["weight"] for one in sent] == [dragged, 0.83, 1.0]
    assert [one["on"] for one in sent] == [True, True, False]


def test_numbers_go_further_than_sliders_and_stay_numbers(visit: Visit) -> None:
    number = visit.number("adapter-1")
    number.fill("-7.25")
    assert visit.sent()[0]["weight"] == -7.25
    for text, kept in (("11", 10.0), ("", 10.0), ("-99", -10.0)):
        number.fill(text)
        assert number.get_attribute("aria-invalid") == "true"
        number.blur()
        assert float(number.input_value()) == kept and number.get_attribute("aria-invalid") == "false"
        assert visit.sent()[0]["weight"] == kept
    number.press("Control+ArrowUp")
    assert visit.sent()[0]["weight"] == -9.95
    assert visit.weight("adapter-3").get_attribute("max") == "4"


def test_data_is_shown_as_text(visit: Visit) -> None:
    titles = visit.page.locator("#adapter-cards .title").all_inner_texts()
    assert titles == ["Adapter 1", HOSTILE, "Adapter 3"]
    assert visit.page.locator("#adapter-cards img").count() == 0
    assert visit.page.locator("#adapter-cards .warning").inner_text() == HOSTILE
    until_quiet(visit.page)
    assert visit.dialogs == []
    assert [one["trigger"] for one in visit.sent()] == ["<sks> dog", HOSTILE, ""]


def test_a_trigger_goes_to_the_prompt(visit: Visit) -> None:
    visit.page.evaluate("window.addEventListener('svft-insert', (event) => { window.inserted = event.detail.text; })")
    visit.page.get_by_role("button", name="Insert <sks> dog into the prompt").click()
    assert visit.page.evaluate("window.inserted") == "<sks> dog"


def test_parts_of_the_model(visit: Visit) -> None:
    first = visit.page.locator("#adapter-cards .card").first
    assert visit.page.locator("#adapter-cards details").count() == 2
    first.get_by_text("Parts of the model").click()
    text_encoder = first.get_by_role("slider", name="Share of the weight in the Text encoder, for adapter-1")
    text_encoder.press("Home")
    first.get_by_role("combobox", name="Blocks in which adapter-1 acts").select_option("last")
    sent = visit.sent()[0]
    assert (sent["components"], sent["blocks"], sent["weight"]) == ({"unet": 1, "text_encoder": 0}, "last", 1.0)
    text_encoder.press("End")
    assert visit.sent()[0]["components"] is None


def test_cards_come_and_go(visit: Visit) -> None:
    visit.number("adapter-1").fill("0.4")
    visit.page.get_by_role("button", name="Add", exact=True).focus()
    for count in range(4, 13):
        visit.page.get_by_role("button", name="Add", exact=True).click()
        visit.page.wait_for_selector(f"#adapter-cards .card:nth-child({count})")
    assert float(visit.number("adapter-1").input_value()) == 0.4
    visit.page.get_by_role("button", name="Remove adapter-12").click()
    visit.page.get_by_role("button", name="Remove adapter-1", exact=True).click()
    assert visit.page.evaluate("document.activeElement.className") == "remove"
    assert [one["id"] for one in visit.sent()] == [f"{number:016x}" for number in range(2, 12)]
    assert visit.page.get_by_role("status").filter(has_text="adapter-1 removed").count() == 1


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("colors", ["light", "dark"])
def test_nothing_is_cut_off(visit: Visit, width: int, colors: str) -> None:
    visit.page.set_viewport_size({"width": width, "height": 800})
    visit.page.evaluate("dark => document.body.classList.toggle('dark', dark)", colors == "dark")
    visit.page.locator("#adapter-cards summary").first.click()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    for control in visit.page.locator("#adapter-cards :is(input, button, select)").all():
        if control.is_visible():
            box = control.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
    text, ground = visit.page.locator("#adapter-cards .card").first.evaluate(
        "one => [getComputedStyle(one.querySelector('.title')).color, getComputedStyle(one).backgroundColor]"
    )
    assert contrast(text, ground) > 4.5


def contrast(*colors: str) -> float:
    """Of two CSS colours, as WCAG defines it."""

    def luminance(color: str) -> float:
        parts = [float(part) / 255 for part in color.strip("rgba()").split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, colors))
    return (high + 0.05) / (low + 0.05)
