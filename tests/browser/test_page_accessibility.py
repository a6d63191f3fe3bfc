"""The page for everybody: what axe-core finds, what the Tab key reaches, and that nothing leaves a phone's screen."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import LOOKS, PHONE, SAMPLES, TABS, NewPage, Server, draw_with_adapters, open_tab, until_quiet

pytest.importorskip("gradio")
pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

pytestmark = pytest.mark.browser

_MOST_PRESSES = 400

# The controls that can be seen and used. Of radio buttons with one name, the arrow keys reach the others.
_CONTROLS = """(tab) => [...document.querySelectorAll(`#tab-${tab}, [role=tablist], footer`)]
  .flatMap((part) => [...part.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex="0"]')])
  .filter((one) => !one.disabled && one.getAttribute('aria-disabled') !== 'true' && !one.closest('[inert]'))
  .filter((one) => one.checkVisibility({ checkOpacity: false, checkVisibilityCSS: true }))
  .filter((one) => !one.closest('.visually-hidden, [aria-hidden=true]'))"""
_FOLLOW_FOCUS = """() => {
  window.reached = new Set();
  document.addEventListener('focusin', (event) => window.reached.add(event.target));
  document.querySelector('[role=tab]').focus();
}"""
# A text that fades in has little contrast for a moment. Signs of waiting turn for ever.
_NOTHING_FADES = """() => document.getAnimations().every(
  (one) => one.playState !== 'running' || one.effect.getComputedTiming().endTime === Infinity
)"""
_IS_ROUND = "() => document.activeElement === document.querySelector('[role=tab]')"
_LEFT_OUT = f"""(tab) => {{
  const groups = new Set([...window.reached].filter((one) => one.type === 'radio').map((one) => one.name));
  return ({_CONTROLS})(tab)
    .filter((one) => !window.reached.has(one) && !(one.type === 'radio' && groups.has(one.name)))
    .map((one) => one.outerHTML.slice(0, 200));
}}"""


def visit(new_page: NewPage, server: Server, look: str) -> Any:
    """A visitor with adapters, pictures and a training."""
    page = new_page(reduced_motion="reduce", **LOOKS[look])
    page.set_default_timeout(60_000)
    page.goto(server.address)
    page.wait_for_selector("#title")
    draw_with_adapters(page)
    return page


def violations(page: Any) -> list[str]:
    """What axe-core calls serious or critical, by all of its rules."""
    page.wait_for_function(_NOTHING_FADES)
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {node['target']}: {node['failureSummary']}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_nothing_serious_and_nothing_leaves_the_screen(
    new_page: NewPage, furnished: Server, look: str
) -> None:
    page = visit(new_page, furnished, look)
    for tab in TABS:
        open_tab(page, tab)
        if tab == "Train":
            page.set_input_files("#training-photos input[type=file]", sorted(SAMPLES.glob("*.png")))
            page.wait_for_selector("#training-sheet img")
        assert violations(page) == [], tab
        assert page.evaluate("document.documentElement.scrollWidth") == LOOKS[look]["viewport"]["width"], tab


def test_axe_finds_nothing_serious_while_the_page_waits(new_page: NewPage, furnished: Server) -> None:
    page = visit(new_page, furnished, "light")
    held: list[Any] = []
    until_quiet(page)
    page.route("**/queue/join*", lambda route: held.append(route))
    with page.expect_request("**/queue/join*"):
        page.get_by_role("button", name="Generate", exact=True).click()
    page.locator("#picture-status .wrap.translucent").wait_for()
    assert violations(page) == [] and held
    open_tab(page, "Train")
    page.get_by_label("Quick").check()
    page.locator("#training-estimate .wrap.translucent").wait_for(state="attached")
    assert violations(page) == []
    page.unroute_all(behavior="ignoreErrors")


def test_the_tab_key_reaches_every_control(new_page: NewPage, furnished: Server) -> None:
    page = visit(new_page, furnished, "light")
    for tab in TABS:
        open_tab(page, tab)
        until_quiet(page)  # what is drawn anew takes the focus away
        page.evaluate(_FOLLOW_FOCUS)
        for _ in range(_MOST_PRESSES):
            page.keyboard.press("Tab")
            if page.evaluate(_IS_ROUND):
                break
        assert page.evaluate(_LEFT_OUT, tab.lower()) == [], tab


def test_a_phone_shows_every_tab(new_page: NewPage, furnished: Server) -> None:
    page = new_page(viewport=PHONE)
    page.goto(furnished.address)
    page.wait_for_selector("#title")
    tops = set()
    for tab in TABS:
        button = page.get_by_role("tab", name=tab, exact=True)
        box = button.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"], tab
        assert not button.evaluate("one => one.scrollWidth > one.clientWidth"), tab  # cut off
        tops.add(box["y"])
    assert len(tops) == 1
