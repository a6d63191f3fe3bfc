"""Pictures of every tab, in every look, for people to look at: they lie in outputs/screenshots after the run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from conftest import LOOKS, TABS, NewPage, Server, draw_with_adapters, open_tab
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.browser

FOLDER = Path(__file__).parent.parent.parent / "outputs" / "screenshots"


@pytest.mark.parametrize("look", LOOKS)
def test_every_tab_can_be_looked_at(new_page: NewPage, furnished: Server, look: str) -> None:
    page = new_page(reduced_motion="reduce", **LOOKS[look])
    page.set_default_timeout(60_000)
    page.goto(furnished.address)
    page.wait_for_selector("#title")
    draw_with_adapters(page, steps=12, pictures=4)
    FOLDER.mkdir(parents=True, exist_ok=True)
    width = LOOKS[look]["viewport"]["width"]
    shots = set()
    for tab in TABS:
        open_tab(page, tab)
        content = page.screenshot(full_page=True)
        shots.add(content)
        (FOLDER / f"{tab.lower()}_{look.replace(' ', '_')}.png").write_bytes(content)
        with Image.open(io.BytesIO(content)) as shot:
            assert shot.width == width and shot.height > 400, tab
            light = shot.convert("L").getpixel((2, shot.height - 3))
            assert isinstance(light, int) and (light < 64 if "dark" in look else light > 192), tab
    assert len(shots) == len(TABS)
