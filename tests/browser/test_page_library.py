"""The Library tab in a browser: from a visitor's file to a card in Generate, into the trash and back."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import until_quiet
from hostile_names import HOSTILE_TEXTS
from torch import Tensor

from svft_diffusion import SVDiffConfig, save_adapter
from svft_diffusion.adapters import add_training_adapter, unload_adapter
from svft_diffusion.files import AdapterHeader, AdapterMetadata, adapter_bytes, read_adapter
from svft_diffusion.files.container import read_container
from svft_diffusion.models.loading import load_pipeline

pytest.importorskip("gradio")
pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.browser

DAMAGED = "<img src=x onerror=window.xss=1>.safetensors"
Adapter = tuple[AdapterHeader, dict[str, Tensor]]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """An adapter of the embedded model."""
    file = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    pipe = load_pipeline("toybox")
    for values in add_training_adapter(pipe, SVDiffConfig(), "new"):
        values.data.copy_(0.1 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0)))
    save_adapter(pipe, "new", file, metadata=AdapterMetadata(base_name="toybox"))
    unload_adapter(pipe, "new")
    return read_adapter(file)


def write(adapter: Adapter, file: Path, title: str, **said: Any) -> Path:
    """The adapter under another title."""
    file.parent.mkdir(parents=True, exist_ok=True)
    header, tensors = adapter
    file.write_bytes(adapter_bytes(dataclasses.replace(header, title=title, **said), tensors))
    return file


@pytest.fixture(scope="module")
def server(start_server: Any, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An app whose library holds a training, an adapter of another base, hostile texts and a damaged file."""
    folder = tmp_path_factory.mktemp("library")
    adapters = folder / "adapters"
    for step in (1, 2):
        write(adapter, adapters / "runs" / "rex" / "history" / f"step-{step}.safetensors", f"Rex {step}")
    write(adapter, adapters / "runs" / "rex" / "adapter.safetensors", "Rex", trigger="sks")
    header, tensors = adapter
    digests = header.base.digests
    other = digests._replace(**{kind: found and found[::-1] for kind, found in digests._asdict().items()})
    write(
        (header, tensors), adapters / "other.safetensors", "Other", base=dataclasses.replace(header.base, digests=other)
    )
    for number, text in enumerate(HOSTILE_TEXTS):
        hostile = {"description": text, "trigger": text, "class_word": text}
        write(adapter, adapters / f"hostile{number}.safetensors", text, **hostile)
    (adapters / DAMAGED).write_bytes(b"broken")
    return start_server(folder=folder)


def library(page: Any) -> None:
    """The tab, with its list."""
    page.get_by_role("tab", name="Library", exact=True).click()
    page.wait_for_selector("#library-list .card")
    page.wait_for_function("!document.querySelector('#library-list .fit.unknown')")


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def details(page: Any, name: str, beginning: str) -> None:
    """The details of an adapter, whose text begins so."""
    button(page, f"Details of {name}").click()
    page.wait_for_function(
        "text => document.querySelector('#library-details pre')?.textContent.startsWith(text)", arg=beginning
    )


def result(page: Any, text: str) -> str:
    """The field of results once it holds the text."""
    place = "#library-result textarea"
    page.wait_for_function(f"text => document.querySelector('{place}')?.value.includes(text)", arg=text)
    return str(page.locator(place).input_value())


def cards(page: Any) -> str:
    """What stands on the cards of Generate."""
    return str(page.locator("#adapter-cards").inner_text())


def test_texts_of_files_stay_texts(new_page: Any, server: Any) -> None:
    page = new_page(color_scheme="dark")
    page.goto(server.address)
    library(page)
    page.set_viewport_size({"width": 390, "height": 844})
    fits = {
        card.locator("h2").inner_text(): card.locator(".fit").inner_text()
        for card in page.locator("#library-list .card").all()
    }
    assert len(fits) == len(HOSTILE_TEXTS) + 2 and HOSTILE_TEXTS[0] in fits
    assert fits["Rex"] == "compatible with toybox" and "was trained on the base" in fits["Other"]
    assert f"{DAMAGED}: {DAMAGED} is no safetensors file" in page.locator("#library-list .damaged").inner_text()
    for number, text in enumerate(HOSTILE_TEXTS[:3]):
        details(page, f"hostile{number}", f"title        {text}")
    assert page.evaluate("window.xss") is None
    assert page.locator("#library-list :is(img, script, iframe, svg), #library-details pre *").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_from_the_list_to_generate(page: Any) -> None:
    library(page)
    page.get_by_label("Search").fill("SKS rex")
    page.wait_for_function("document.querySelectorAll('#library-list .card').length === 1")
    button(page, "Add rex to Generate").click()
    page.get_by_text("rex is on Generate now").wait_for()
    heights = {button(page, name).bounding_box()["height"] for name in ("Add rex to Generate", "Details of rex")}
    assert len(heights) == 1
    button(page, "Add rex to Generate").click()
    page.get_by_text("is there already").first.wait_for()
    page.get_by_label("Search").fill("other")
    button(page, "Details of other").wait_for()
    page.wait_for_selector("#library-list .fit.unfit")
    assert button(page, "Add other to Generate").count() == 0
    page.get_by_label("Search").fill("rex")
    details(page, "rex", "title        Rex")
    button(page, "Add this step to Generate").click()
    page.get_by_text("rex-step-2 is on Generate now").wait_for()
    page.get_by_role("tab", name="Generate", exact=True).click()
    page.locator("#adapter-cards").get_by_text("Rex 2").first.wait_for()
    assert "Other" not in cards(page)


def test_import_verify_export_delete_and_undo(page: Any, server: Any, adapter: Adapter, tmp_path: Path) -> None:
    library(page)
    page.locator("#library-import").get_by_role("button", name="Import").click()
    upload = write(adapter, tmp_path / "My Style.safetensors", "Mine")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(upload.read_bytes()[:-5])
    page.locator("#library-import input[type=file]").set_input_files([str(upload), str(broken)])
    page.locator("#library-import").get_by_text("broken").first.wait_for()
    button(page, "Add to the library").click()
    said = result(page, "in the library as My_Style")
    assert "not taken in: broken.safetensors is cut short" in said and "/" not in said

    details(page, "My_Style", "title        Mine")
    button(page, "Verify on the base model").click()
    assert "finite values" in result(page, "My_Style: whole, unchanged since it was written")

    page.locator("#library-export").get_by_role("button", name="Export").click()
    button(page, "Write the file").click()
    result(page, "My_Style-kohya.safetensors")
    with page.expect_download() as download:
        page.locator("#library-export").get_by_text("Download", exact=True).click()
    assert download.value.suggested_filename == "My_Style-kohya.safetensors"
    assert read_container(Path(download.value.path()).read_bytes(), "export").entries
    assert list(server.output_dir.rglob("*.safetensors")) == []  # where visitors could guess its name

    kept = server.adapters_dir / "uploads" / "My_Style.safetensors"
    content = kept.read_bytes()
    button(page, "Delete").click()
    result(page, "deleted My_Style")
    page.wait_for_function("!document.querySelector('#library-list').innerText.includes('My_Style')")
    assert not kept.exists()
    button(page, "Undo delete").click()
    result(page, "My_Style is back")
    button(page, "Details of My_Style").wait_for()
    assert kept.read_bytes() == content
    shutil.rmtree(kept.parent)
    button(page, "Details of My_Style").click()  # gone behind the page's back
    page.get_by_text("no longer in the library").first.wait_for()


def test_the_list_is_read_when_the_tab_opens_and_not_when_the_page_scrolls(new_page: Any, server: Any) -> None:
    page = new_page(viewport={"width": 390, "height": 250}, reduced_motion="reduce")
    page.goto(server.address)
    page.wait_for_selector("#title")
    library(page)
    until_quiet(page)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for place in ("document.body.scrollHeight", "0", "document.body.scrollHeight"):
        page.evaluate(f"window.scrollTo(0, {place})")
        until_quiet(page)
    assert [url for url in asked if "/gradio_api/" in url] == []


def test_cards_that_say_the_same_stay_when_the_list_is_read_again(page: Any) -> None:
    library(page)
    until_quiet(page)
    before = page.locator("#library-list .card").count()
    page.evaluate("document.querySelectorAll('#library-list .card').forEach((card) => { card.wasThere = true; })")
    button(page, "Details of rex").focus()
    with page.expect_request("**/queue/join*"):
        button(page, "Refresh").dispatch_event("click")
    until_quiet(page)
    cards_now = "[...document.querySelectorAll('#library-list .card')]"
    assert page.evaluate(f"{cards_now}.filter((card) => card.wasThere).length") == before
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Details of rex"
