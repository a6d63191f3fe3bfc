"""Grids, before and after, and Compare in a browser: from the form to pictures that are looked at closely."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import reload

pytest.importorskip("gradio")
pytest.importorskip("playwright.sync_api")

from svft_diffusion import SVFTConfig, save_adapter
from svft_diffusion.adapters import add_training_adapter
from svft_diffusion.evaluation.report import EvaluationReport, ScoredRow, SubjectFacts, write_report
from svft_diffusion.evaluation.toy_subjects import demonstration_subject, write_photos
from svft_diffusion.files import AdapterMetadata
from svft_diffusion.models import load_pipeline
from svft_diffusion.models.loading import EMBEDDED_MODEL
from svft_diffusion.sampling.adapter_choice import sha256_of
from svft_diffusion.sampling.png import read_png_settings

pytestmark = pytest.mark.browser

HOSTILE = '<img src=x onerror="window.xss=1">${1+1}{{value}}<script>window.xss=1</script>'
LOOKS = "subject_fidelity:toy-identity"


@pytest.fixture(scope="module")
def server(start_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An app with an adapter on a card, a training of two steps, and a hostile report of it."""
    folder = tmp_path_factory.mktemp("app")
    run = folder / "adapters" / "robot"
    pipe = load_pipeline(EMBEDDED_MODEL)
    trained = add_training_adapter(pipe, SVFTConfig(), "new")
    metadata = AdapterMetadata(base_name=EMBEDDED_MODEL, trigger="sks", class_word="robot", title=HOSTILE)
    for step in (10, 20):
        for values in trained:
            values.data.fill_(0.01 * step)
        save_adapter(pipe, "new", run / "history" / f"step-{step}.safetensors", metadata=metadata)
    shutil.copy(run / "history" / "step-20.safetensors", run / "adapter.safetensors")
    write_photos(demonstration_subject(), folder / "photos")
    settings = {"instance_data_dir": str(folder / "photos"), "pretrained_model_name_or_path": EMBEDDED_MODEL}
    (run / "config.yaml").write_text(json.dumps(settings))
    report = folder / "adapters" / "evaluation" / "001"
    report.mkdir(parents=True)
    write_report(_hostile_report(run), report)
    return start_server("--adapter", str(run), folder=folder)


def _hostile_report(run: Path) -> EvaluationReport:
    digest = sha256_of(run / "history" / "step-20.safetensors")
    return EvaluationReport(
        base=HOSTILE,
        base_fingerprint=None,
        settings={"num_inference_steps": 2},
        backbones=[{"name": HOSTILE}],
        titles={LOOKS: HOSTILE},
        subjects=[SubjectFacts(HOSTILE, None, HOSTILE, HOSTILE, HOSTILE, [HOSTILE], {}, {LOOKS: 0.9})],
        rows=[ScoredRow(HOSTILE, HOSTILE, 20, digest, 1.0, 1, 0, {LOOKS: 0.5})],
        summary=[],
        best={HOSTILE: HOSTILE},
        best_rule=HOSTILE,
        deciding=None,
        notes=[HOSTILE],
        libraries={},
        machine={},
    )


@pytest.fixture
def page(page: Any) -> Any:
    page.set_default_timeout(60_000)
    page.wait_for_selector("#adapter-cards .card")
    return page


def choose(page: Any, field: str, option: str | re.Pattern[str]) -> None:
    """An option of a list whose options come from the server when it gets the focus."""
    page.locator(f"{field} input").click()
    page.get_by_role("option", name=option).first.click()


def open_compare(page: Any) -> None:
    """The tab, which a narrow page has in a menu."""
    page.get_by_role("tab", name="Generate").wait_for()
    tab = page.get_by_role("tab", name="Compare")
    if not tab.is_visible():
        page.get_by_label("More tabs").first.click()
        tab = page.locator(".overflow-dropdown button", has_text="Compare").first
    tab.click()


def test_a_grid_is_told_drawn_looked_at_and_recalled(page: Any, server: Any) -> None:
    page.fill("#prompt textarea", "a red robot on the beach")
    page.locator("#steps input").fill("2")
    page.locator("#grid > button").click()
    choose(page, "#grid-across", re.compile("^Weight of"))
    page.wait_for_function(
        "document.querySelector('#grid-across-values textarea, #grid-across-values input').value[0] === '0'"
    )
    choose(page, "#grid-down", "Words of the prompt, replaced")
    page.wait_for_selector("#grid-plan >> text=Not yet: rows")
    page.locator("#grid-down-values textarea").fill("beach, moon")
    page.wait_for_selector("#grid-plan >> text=3 x 2: 6 pictures of at most 36, 12 steps in all.")
    page.click("#grid-draw")
    page.wait_for_selector("#grid-status >> text=Saved 6 pictures")
    assert page.locator("#grid-cells .grid-container img").count() == 6
    page.wait_for_function("document.querySelector('#grid-stop').disabled")
    files = sorted(server.output_dir.glob("*.png"))
    assert [read_png_settings(file)["adapters"][0]["weight"] for file in files] == [0, 0.5, 1] * 2
    assert [file.name for file in (server.output_dir / "grids").iterdir()] == [files[0].name]
    page.locator("#grid-cells .grid-container button").nth(4).click()
    page.wait_for_selector("#grid-details >> text=a red robot on the moon")
    page.click("#grid-recall")
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a red robot on the moon'")
    assert page.locator("#adapter-cards input[type=number]").first.input_value() == "0.5"
    assert page.evaluate("window.xss") is None

    page.locator("#before-after > button").click()
    page.click("#before-after-draw")
    page.wait_for_selector("#before-after-slider img")
    weights = [read_png_settings(file)["adapters"][0]["weight"] for file in sorted(server.output_dir.glob("*.png"))]
    assert weights[6:] == [0, 0.5]


def test_stop_ends_a_grid_and_the_next_one_is_drawn(page: Any) -> None:
    page.fill("#prompt textarea", "a red robot")
    page.locator("#steps input").fill("100")
    page.locator("#grid > button").click()
    page.wait_for_selector("#grid-plan >> text=3 pictures")
    page.click("#grid-draw")
    page.wait_for_selector("#grid-drawing >> text=step")
    page.click("#grid-stop")
    page.wait_for_selector("#grid-drawing .drawing", state="hidden")
    page.wait_for_timeout(2000)  # what was on its way when it was stopped
    assert page.locator("#grid-drawing .drawing").is_hidden()
    page.locator("#steps input").fill("1")
    page.click("#grid-draw")
    page.wait_for_selector("#grid-status >> text=Saved 3 pictures")


def test_who_waits_sees_the_place_in_the_queue_and_can_leave(page: Any, new_page: Any, server: Any) -> None:
    page.fill("#prompt textarea", "a red robot")
    page.locator("#width input").first.fill("256")  # so that it outlasts the others' wait
    page.locator("#steps input").fill("900")
    page.click("#generate")
    page.wait_for_selector("#drawing >> text=step")
    other = new_page()
    other.set_default_timeout(60_000)
    other.goto(server.address)
    other.wait_for_selector("#adapter-cards .card")
    other.fill("#prompt textarea", "a red robot")
    other.locator("#before-after > button").click()
    for tab, form in (("Generate", "before-after"), ("Compare", "compare"), ("Blend", "blend")):
        other.get_by_role("tab", name=tab, exact=True).click()
        stop = other.locator(f"#{form}-stop")
        assert stop.is_disabled()
        if tab != "Generate":
            other.fill(f"#{form}-prompt textarea", "a red robot")
        other.click(f"#{form}-draw")
        other.wait_for_selector(f"#{form}-status >> text=queue: 1/1")
        stop.click()
        other.wait_for_function("id => document.getElementById(id).disabled", arg=f"{form}-stop")
        other.wait_for_selector(f"#{form}-status >> text=queue", state="hidden")
    page.click("#stop")
    page.wait_for_selector("#drawing .drawing", state="hidden")


def test_two_sides_are_compared(page: Any, server: Any) -> None:
    open_compare(page)
    choose(page, "#compare-b", HOSTILE)
    page.wait_for_selector("#compare-b-strength")
    page.locator("#compare-b-strength input").fill("0.5")
    page.fill("#compare-prompt textarea", "a red robot on the beach")
    page.locator("#compare-seeds textarea, #compare-seeds input").fill("3, 9007199254740993")
    page.locator("#compare-steps input").fill("2")
    page.click("#compare-draw")
    page.wait_for_selector("#compare-pair >> text=Seed 9007199254740993: A and B differ")
    assert page.locator("#compare-pictures .grid-container img").count() == 4
    page.get_by_label("3", exact=True).check()
    page.wait_for_selector("#compare-pair >> text=Seed 3: A and B differ")
    page.locator("#compare-pictures .grid-container button").nth(2).click()
    page.wait_for_selector("#compare-pair >> text=Seed 9007199254740993: A and B differ")
    assert page.locator("#compare-slider img").count() == 2 and page.locator("#compare-difference img").count() == 1
    settings = [read_png_settings(file) for file in sorted(server.output_dir.glob("*.png"))[-4:]]
    assert [len(one["adapters"]) for one in settings] == [0, 1, 0, 1]
    assert [one["seed"] for one in settings] == [3, 3, 9007199254740993, 9007199254740993]
    choose(page, "#compare-a", HOSTILE)
    page.click("#compare-stop", force=True)
    page.locator("#compare-seeds textarea, #compare-seeds input").fill("x")
    page.click("#compare-draw")
    page.wait_for_selector("text='x' is neither a number nor a range")
    assert page.input_value("#compare-prompt textarea") == "a red robot on the beach"


def test_a_hostile_report_is_text_and_a_new_one_is_made(page: Any, problems: list[str]) -> None:
    open_compare(page)
    page.wait_for_selector("#evaluation-report .scores")
    assert page.locator("#evaluation-report tbody th").first.inner_text() == f"{HOSTILE} (best)"
    assert page.locator("#evaluation-report :is(img, script, iframe)").count() == 0
    page.locator("#evaluation > button").click()
    for field, value in (("class-images", "1"), ("steps", "1"), ("prompts", "1")):
        page.locator(f"#evaluation-{field} input").fill(value)
    page.click("#evaluation-start")
    page.wait_for_selector("#evaluation-status >> text=Evaluating robot")
    reload(page, problems)  # whoever comes later sees it, too
    open_compare(page)
    page.wait_for_selector("#evaluation-status >> text=Evaluating robot")
    page.wait_for_selector("#evaluation-status >> text=The evaluation of robot finished.", timeout=180_000)
    page.wait_for_selector("#evaluation-report >> text=step 20")
    page.wait_for_selector("#evaluation-pictures img")
    assert page.evaluate("window.xss") is None


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("colors", ["light", "dark"])
def test_nothing_is_cut_off(new_page: Any, server: Any, width: int, colors: str) -> None:
    page = new_page(viewport={"width": width, "height": 844}, color_scheme=colors)
    page.goto(server.address)
    page.wait_for_selector("#adapter-cards .card")
    for accordion in ("#grid", "#before-after"):
        page.locator(f"{accordion} > button").click()
    page.wait_for_selector("#grid-plan >> text=3 pictures")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    open_compare(page)
    page.wait_for_selector("#evaluation-report .scores")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
