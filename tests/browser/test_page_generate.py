"""The Generate tab in a browser: drawn, stopped, found again, by mouse and by keys, by two visitors at once."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapter_files import ModelsOnDisk, write_models
from conftest import until_quiet
from PIL import Image

from svft_diffusion.files import read_adapter, write_adapter
from svft_diffusion.sampling.png import read_png_settings, save_png

pytestmark = pytest.mark.browser

HOSTILE = '<img src=x onerror=alert(1)>"${1+1}{{value}}<script>alert(2)</script>'
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}


@dataclasses.dataclass
class Visit:
    """A visitor of the tab."""

    page: Any
    requests: list[str] = dataclasses.field(default_factory=list)

    def fill(self, name: str, value: object) -> None:
        self.page.locator(f"#{name} :is(input, textarea)").first.fill(str(value))

    def value(self, name: str) -> str:
        return str(self.page.locator(f"#{name} :is(input, textarea)").first.input_value())

    def add(self, name: str, shown_as: str | None = None) -> None:
        """Put an adapter of the library onto a card."""
        field = self.page.get_by_label("Add an adapter of the library")
        field.click()
        self.page.get_by_role("option", name=shown_as or name, exact=True).click()
        self.page.get_by_label(f"Weight of {name}", exact=True).wait_for()

    def weigh(self, name: str, weight: float) -> None:
        self.page.get_by_role("spinbutton", name=f"Weight of {name}, as a number").fill(str(weight))

    def generate(self) -> None:
        self.page.get_by_role("button", name="Generate", exact=True).click()

    def shown(self, count: int, seconds: float = 60) -> Path:
        """The newest picture, once so many are there in all."""
        self.page.wait_for_function(
            "count => document.querySelectorAll('#pictures .thumbnail-lg').length === count",
            arg=count,
            timeout=seconds * 1000,
        )
        self.page.wait_for_selector("#drawing .drawing", state="hidden")
        return Path(self.detail("File"))

    def detail(self, name: str) -> str:
        """What the details panel says of the chosen picture."""
        line = self.page.locator("#details dl div").filter(has=self.page.get_by_text(name, exact=True))
        return str(line.locator("dd").text_content())

    def notice(self) -> str:
        toast = self.page.locator(".toast-body").first
        toast.wait_for()
        return str(toast.inner_text())


@dataclasses.dataclass
class App:
    server: Any  # of the fixture
    models: ModelsOnDisk
    new_page: Any  # of the fixture

    def visit(self, size: str = "desktop", **options: Any) -> Visit:
        visit = Visit(self.new_page(viewport=SIZES[size], **options))
        visit.page.set_default_timeout(60_000)
        visit.page.on("request", lambda request: visit.requests.append(request.url))
        visit.page.goto(self.server.address)
        visit.page.get_by_role("button", name="Generate", exact=True).wait_for()
        visit.page.get_by_text("No adapter yet").wait_for()
        until_quiet(visit.page)  # what a page asks when it opens is asked
        visit.fill("prompt", "a photo of sks dog")
        visit.fill("steps", 2)
        return visit

    def pixels(self, file: Path) -> bytes:
        with Image.open(self.server.output_dir / file) as image:
            return image.tobytes()


@pytest.fixture(scope="module")
def started(start_server: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelsOnDisk]:
    folder = tmp_path_factory.mktemp("generate")
    models = write_models(folder)
    header, tensors = read_adapter(models.style)
    hostile = dataclasses.replace(header, title=HOSTILE, trigger=HOSTILE, description=HOSTILE)
    write_adapter(folder / "adapters" / "hostile.safetensors", hostile, tensors)
    server = start_server(
        "--pretrained_model_name_or_path", str(models.base), "--base", str(models.other_base), folder=folder
    )
    return server, models


@pytest.fixture
def app(started: tuple[Any, ModelsOnDisk], new_page: Any) -> Iterator[App]:
    yield App(*started, new_page)


def test_the_first_setting_comes_back_to_the_bit_and_sliders_ask_nothing(app: App) -> None:
    visit = app.visit()
    visit.generate()
    base = app.pixels(visit.shown(1))
    visit.add("dog")
    visit.generate()
    dog = app.pixels(visit.shown(2))
    until_quiet(visit.page)
    before = len(visit.requests)
    box = visit.page.get_by_label("Weight of dog", exact=True).bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] * 2 / 3, box["y"] + box["height"] / 2)
    visit.page.mouse.down()
    for part in (0.9, 0.2, 0.1):
        visit.page.mouse.move(box["x"] + box["width"] * part, box["y"] + box["height"] / 2, steps=10)
    visit.page.mouse.up()
    until_quiet(visit.page)
    assert visit.requests[before:] == []
    visit.generate()
    dragged = app.pixels(visit.shown(3))
    visit.weigh("dog", 1)
    visit.generate()
    again = app.pixels(visit.shown(4))
    visit.page.get_by_role("switch", name="dog acts").click(force=True)
    visit.generate()
    off = app.pixels(visit.shown(5))
    assert dog == again and base == off and len({base, dog, dragged}) == 3


def test_keys_draw_stop_and_weigh(app: App) -> None:
    visit = app.visit()
    visit.add("dog")
    number = visit.page.get_by_role("spinbutton", name="Weight of dog, as a number")
    until_quiet(visit.page)  # the cards are drawn
    number.press("Control+ArrowUp")
    number.press("Control+Shift+ArrowDown")
    assert float(number.input_value()) == 1.04
    visit.page.locator("#prompt textarea").press("Control+Enter")
    visit.shown(1)
    assert visit.detail("Adapters") == "dog: 1.04"
    for side in ("width", "height"):
        visit.fill(side, 64)  # so that it takes its time
    visit.fill("steps", 900)
    visit.page.locator("#steps input").press("Control+Enter")
    visit.page.wait_for_selector("#drawing .drawing", state="visible")
    visit.page.wait_for_function("/step \\d+ of 900/.test(document.querySelector('#drawing p').textContent)")
    visit.page.keyboard.press("Escape")
    visit.page.wait_for_selector("#drawing .drawing", state="hidden")
    visit.page.get_by_text("Stopped.").wait_for()
    assert visit.page.locator("#stop").is_disabled() and visit.value("steps") == "900"
    visit.fill("steps", 2)
    visit.page.locator("#steps input").press("Control+Enter")
    visit.shown(2)
    assert visit.detail("Steps") == "2"
    assert visit.page.locator(".toast-body").count() == 0


def test_a_stop_that_takes_its_time_says_so_until_the_next_picture_can_be_asked_for(app: App) -> None:
    visit = app.visit()
    for side in ("width", "height"):
        visit.fill(side, 64)
    visit.fill("steps", 900)
    visit.generate()
    visit.page.wait_for_function("/step \\d+ of 900/.test(document.querySelector('#drawing p').textContent)")
    held: list[Any] = []
    visit.page.route("**/cancel*", lambda route: held.append(route))
    with visit.page.expect_request("**/cancel*"):
        visit.page.keyboard.press("Escape")
    visit.page.wait_for_timeout(1000)  # in which the drawing goes on
    assert visit.page.locator("#drawing p").inner_text() == "Stopping" and len(held) == 1
    assert visit.page.locator("#stop").is_disabled()
    held[0].continue_()
    visit.page.wait_for_selector("#drawing .drawing", state="hidden")
    visit.fill("steps", 2)
    visit.page.keyboard.press("Control+Enter")
    visit.shown(1)


def test_the_prompt_completes_names_without_asking(app: App) -> None:
    visit = app.visit()
    prompt = visit.page.locator("#prompt textarea")
    before = len(visit.requests)
    prompt.press("End")
    prompt.press_sequentially(" <adapter:o")
    options = visit.page.get_by_role("listbox", name="Adapters of the library").get_by_role("option")
    is_on_top = "one => { const box = one.getBoundingClientRect(); const points = [...Array(40).keys()]; return points"
    is_on_top += (
        ".every((at) => one.contains(document.elementFromPoint(box.x + (at + 0.5) * box.width / 40, box.y + 9))); }"
    )
    assert options.first.evaluate(is_on_top)
    assert options.all_inner_texts() == ["dog", f"hostile ({HOSTILE})"]
    prompt.press("ArrowDown")
    prompt.press("ArrowUp")
    prompt.press("Enter")
    assert prompt.input_value() == "a photo of sks dog <adapter:dog:1>"
    prompt.press("ArrowLeft")
    prompt.press("Control+ArrowDown")
    prompt.press("Control+Shift+ArrowDown")
    assert prompt.input_value() == "a photo of sks dog <adapter:dog:0.94>"
    prompt.press("End")
    prompt.press_sequentially(" <adapter:st")
    prompt.press("Escape")
    assert options.count() == 0 or not options.first.is_visible()
    until_quiet(visit.page)
    assert visit.requests[before:] == []
    visit.fill("prompt", "a photo of sks dog <adapter:dog:0.94>")
    visit.generate()
    visit.shown(1)
    assert visit.detail("Adapters") == "dog: 0.94" and visit.detail("Prompt") == "a photo of sks dog"
    visit.add("dog")
    visit.page.get_by_role("button", name="Insert sks into the prompt").click()
    assert "sks" in prompt.input_value().replace("a photo of sks dog", "")


def test_what_changes_while_an_adapter_is_added_stays_changed(app: App) -> None:
    visit = app.visit()
    visit.add("dog")
    visit.page.get_by_label("Add an adapter of the library").click()
    until_quiet(visit.page)
    held: list[Any] = []
    visit.page.route("**/queue/join*", lambda route: held.append(route))
    with visit.page.expect_request("**/queue/join*"):
        visit.page.get_by_role("option", name="style", exact=True).click()
    visit.weigh("dog", 0.35)
    for route in held:
        route.continue_()
    visit.page.unroute("**/queue/join*")
    visit.page.get_by_label("Weight of style", exact=True).wait_for()
    assert visit.page.get_by_role("spinbutton", name="Weight of dog, as a number").input_value() == "0.35"


def test_an_error_keeps_every_value(app: App, problems: list[str]) -> None:
    visit = app.visit()
    visit.add("style")
    visit.weigh("style", -0.35)
    values = {
        "prompt": "a dog <adapter:dgo:1>",
        "negative-prompt": "cat",
        "seed": "77",
        "steps": "3",
        "guidance": "1.5",
    }
    values |= {"width": "64", "height": "32", "num-images": "2"}
    for name, value in values.items():
        visit.fill(name, value)
    visit.generate()
    assert "did you mean 'dog'" in visit.notice()
    assert not visit.page.locator("#picture-status .error").is_visible()  # nor when a drawing is stopped
    assert {name: visit.value(name) for name in values} == values
    number = visit.page.get_by_role("spinbutton", name="Weight of style, as a number")
    assert float(number.input_value()) == -0.35
    visit.page.wait_for_function("document.querySelector('#stop').disabled")
    visit.fill("prompt", "a dog")
    visit.generate()
    visit.shown(2)
    assert visit.detail("Seed") == "78" and visit.detail("Size") == "64 x 32"
    assert visit.detail("Adapters") == "style: -0.35"
    problems.clear()  # Gradio tells a console of errors that the page shows


def drop(page: Any, file: Path) -> None:
    """Drop a file onto the middle of the page, not onto a field."""
    content = base64.b64encode(file.read_bytes()).decode()
    page.evaluate(
        """([content, name]) => {
          const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
          const data = new DataTransfer();
          data.items.add(new File([bytes], name, { type: "image/png" }));
          const options = { dataTransfer: data, bubbles: true, cancelable: true };
          document.querySelector("#prompt").dispatchEvent(new DragEvent("drop", options));
        }""",
        [content, file.name],
    )


def test_a_dropped_picture_brings_everything_back(app: App, tmp_path: Path) -> None:
    first = app.visit()
    first.add("style")
    first.weigh("style", -0.35)
    first.add("dog")
    first.page.locator("#adapter-cards summary").last.click()
    share = first.page.get_by_role("slider", name="Share of the weight in the Text encoder, for dog")
    share.press("Home")
    values = {"prompt": "a dog, 狗", "negative-prompt": "cat", "seed": str(2**62 + 1), "guidance": "2.71828"}
    values |= {"steps": "3", "width": "64", "height": "32"}
    for name, value in values.items():
        first.fill(name, value)
    first.page.get_by_label("Scheduler").click()
    first.page.get_by_role("option", name="euler_a", exact=True).click()
    first.generate()
    drawn = app.server.output_dir / first.shown(1)
    picture = tmp_path / "elsewhere.png"
    picture.write_bytes(drawn.read_bytes())

    second = app.visit()
    second.page.get_by_label("New each time").check()
    drop(second.page, picture)
    second.page.get_by_label("Weight of dog", exact=True).wait_for()
    assert {name: second.value(name) for name in values} == values
    assert second.value("scheduler") == "euler_a" and second.value("num-images") == "1"
    assert not second.page.get_by_label("New each time").is_checked()
    second.generate()
    again = app.server.output_dir / second.shown(1)
    assert again != drawn and app.pixels(again) == app.pixels(drawn)
    told, retold = read_png_settings(drawn), read_png_settings(again)
    assert told == retold


def test_a_picture_can_be_dropped_after_one_that_tells_nothing(app: App, tmp_path: Path, problems: list[str]) -> None:
    for name in ("plain.png", "empty.png"):
        (tmp_path / name).touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    told = save_png(Image.new("RGB", (8, 8)), tmp_path / "told.png", {"prompt": "a dog, 狗"})
    visit = app.visit()
    for name, said in (("plain.png", "plain.png tells no settings"), ("empty.png", "empty.png is no PNG picture")):
        drop(visit.page, tmp_path / name)
        visit.page.locator(".toast-body").get_by_text(said).wait_for()
        visit.page.wait_for_selector("#recall-picture input[type=file]", state="attached")
        assert visit.page.locator("[data-testid=status-tracker] > .error:visible").count() == 0
        visit.fill("prompt", "")
        drop(visit.page, told)
        visit.page.wait_for_function("document.querySelector('#prompt textarea').value === 'a dog, 狗'")
        visit.page.wait_for_selector("#recall-picture input[type=file]", state="attached")
    visit.page.locator(".toast-body").first.wait_for(state="detached")
    problems.clear()  # Gradio tells a console of errors that the page shows


def test_other_tabs_take_the_prompt_over(app: App) -> None:
    visit = app.visit()

    def shows(tab: str, prompt: str) -> None:
        visit.page.get_by_role("tab", name=tab, exact=True).click()
        field = f"document.querySelector('#{tab.lower()}-prompt textarea')"
        visit.page.wait_for_function(f"prompt => {field}?.value === prompt", arg=prompt)

    def write(prompt: str) -> None:
        visit.page.get_by_role("tab", name="Generate", exact=True).click()
        visit.fill("prompt", prompt)

    write("a photo <adapter:dog:0.5> of sks dog")
    shows("Blend", "a photo of sks dog")
    shows("Compare", "a photo of sks dog")
    visit.fill("compare-prompt", "a cat")
    write("a robot")
    shows("Blend", "a robot")
    shows("Compare", "a cat")


def test_hostile_settings_are_text(app: App, tmp_path: Path) -> None:
    told = {
        "prompt": HOSTILE,
        "negative_prompt": HOSTILE,
        "base": HOSTILE,
        "version": HOSTILE,
        "scheduler_option": HOSTILE,
        "adapters": [{"name": HOSTILE, "weight": 1.0, "sha256": "0" * 64}],
    }
    visit = app.visit()
    visit.add("hostile", shown_as=f"{HOSTILE} (hostile)")
    drop(visit.page, save_png(Image.new("RGB", (8, 8)), tmp_path / "hostile.png", told))
    visit.page.wait_for_function("document.querySelector('#details dd') !== null")
    assert visit.detail("Prompt") == HOSTILE and visit.value("prompt") == HOSTILE
    assert HOSTILE[:50] in visit.page.locator("#details ul").text_content()
    until_quiet(visit.page)  # the fixture fails on any dialog of a script
    assert visit.page.locator("#details img, #adapter-cards img, .toast-body img[src=x]").count() == 0


def test_pictures_are_chosen_from_the_visit_and_the_history(app: App) -> None:
    visit = app.visit()
    for count, seed in enumerate(("11", "12"), 1):
        visit.fill("seed", seed)
        visit.generate()
        visit.shown(count)
    visit.page.locator("#pictures .thumbnail-small").nth(1).click()
    visit.page.wait_for_function("document.querySelector('#details').textContent.includes('seed11')")
    assert visit.detail("Seed") == "11"
    visit.page.get_by_role("button", name="All pictures").click()
    history = visit.page.locator("#history-pictures .thumbnail-item")
    history.first.wait_for()
    history.first.click()
    visit.page.wait_for_function("document.querySelector('#details').textContent.includes('seed12')")
    history.nth(1).click()
    visit.page.wait_for_function("document.querySelector('#details').textContent.includes('seed11')")
    assert visit.value("seed") == "12"
    visit.page.get_by_role("button", name="Recall these settings", exact=True).first.click()
    visit.page.wait_for_function("document.querySelector('#seed :is(input, textarea)').value === '11'")


def test_interference_is_told_when_the_set_changes(app: App) -> None:
    visit = app.visit()
    line = visit.page.locator("#interference li")
    visit.add("dog")
    assert not visit.page.locator("#interference .interference").is_visible()
    visit.add("style")
    line.first.wait_for()
    assert line.first.text_content().startswith("dog and style ")
    visit.page.get_by_role("switch", name="style acts").click(force=True)
    visit.page.locator("#interference .interference").wait_for(state="hidden")


def test_another_base_takes_its_adapters_with_it(app: App) -> None:
    visit = app.visit()
    visit.add("dog")
    field = visit.page.get_by_label("Base model", exact=True).last
    field.click()
    visit.page.get_by_role("option", name="other-base", exact=True).click()
    visit.page.get_by_text("Loaded: other-base").wait_for()
    assert "dog" in visit.notice()
    assert visit.page.locator("#adapter-cards .card").count() == 0
    visit.generate()
    visit.shown(1)
    assert visit.detail("Base model") == "other-base"


def test_two_visitors_wait_for_each_other_and_keep_what_is_theirs(app: App) -> None:
    first, second = app.visit(), app.visit()
    for visit, name, weight in ((first, "dog", 0.5), (second, "style", 1.5)):
        visit.add(name)
        visit.weigh(name, weight)
    first.fill("steps", 900)  # so that it outlasts the other's way into the queue
    second.fill("seed", 9)
    first.generate()
    first.page.wait_for_selector("#drawing .drawing", state="visible")
    second.generate()
    second.page.get_by_text("queue: 1/1").wait_for()
    first.shown(1, seconds=300)
    second.shown(1)
    assert (first.detail("Adapters"), second.detail("Adapters")) == ("dog: 0.5", "style: 1.5")
    assert (first.detail("Seed"), second.detail("Seed")) == ("0", "9")
    assert first.page.locator("#pictures .thumbnail-lg").count() == 1
    second.generate()
    again = second.shown(2)
    settings = read_png_settings(app.server.output_dir / again)
    assert [(one["name"], one["weight"]) for one in settings["adapters"]] == [("style", 1.5)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("colors", ["light", "dark"])
def test_it_fits_the_screen(app: App, size: str, colors: str) -> None:
    visit = app.visit(size, color_scheme=colors)
    visit.add("dog")
    visit.add("style")
    visit.generate()
    visit.shown(1)
    visit.page.locator("#interference li").first.wait_for()
    width = SIZES[size]["width"]
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    for narrower in (width, min(width, 1200)):
        visit.page.set_viewport_size(SIZES[size] | {"width": narrower})
        for button in visit.page.locator("#tab-generate button[id]").all():
            lines = button.evaluate(
                "one => new Set([...one.childNodes].flatMap((part) => { const all = "
                "document.createRange(); all.selectNodeContents(part); return [...all.getClientRects()].map((box) => "
                "Math.round(box.top)); })).size"
            )
            assert lines <= 1, button.inner_text()
    visit.page.set_viewport_size(SIZES[size])
    screenshot = Image.open(io.BytesIO(visit.page.screenshot(full_page=True)))
    assert screenshot.width == width
    for control in visit.page.locator("#tab-generate-panel :is(input, button, textarea), #adapter-cards input").all():
        if control.is_visible():
            box = control.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width, json.dumps(box)
