"""Compare: both sides of a comparison, and evaluations of trainings with their reports."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_files import ModelsOnDisk, write_models
from hostile_names import HOSTILE_TEXTS
from PIL import Image

gradio = pytest.importorskip("gradio")

from svft_diffusion.app.components.adapter_cards import adapter_cards, with_card  # noqa: E402
from svft_diffusion.app.components.card_changes import card_changes  # noqa: E402
from svft_diffusion.app.components.report_view import report_html  # noqa: E402
from svft_diffusion.app.config import AppConfig  # noqa: E402
from svft_diffusion.app.context import AppContext, Shared  # noqa: E402
from svft_diffusion.app.drawing.picture_request import PictureRequest  # noqa: E402
from svft_diffusion.app.drawing.studio import Studio  # noqa: E402
from svft_diffusion.app.jobs import job_process  # noqa: E402
from svft_diffusion.app.jobs.evaluation_jobs import EvaluationJob, EvaluationJobs  # noqa: E402
from svft_diffusion.app.jobs.evaluation_runs import Run, reports_of, runs_below  # noqa: E402
from svft_diffusion.app.jobs.training_jobs import TrainingJobs  # noqa: E402
from svft_diffusion.app.shelf.library import Library  # noqa: E402
from svft_diffusion.app.tabs import compare  # noqa: E402
from svft_diffusion.app.tabs.compare import CompareEvents  # noqa: E402
from svft_diffusion.app.tabs.evaluation import EvaluationEvents, status_html  # noqa: E402
from svft_diffusion.errors import UserError  # noqa: E402
from svft_diffusion.evaluation.config import EvaluationConfig  # noqa: E402
from svft_diffusion.evaluation.report import EvaluationReport, ScoredRow, SubjectFacts, write_report  # noqa: E402
from svft_diffusion.sampling.adapter_choice import check_adapter, sha256_of  # noqa: E402
from svft_diffusion.sampling.png import read_png_settings  # noqa: E402

LOOKS, READS = "subject_fidelity:toy-identity", "prompt_fidelity:toy-text"
# The command as the app sees it, without the libraries that take seconds to load: it ends as its number of steps says.
PLAYED_EVALUATION = """
import shutil, sys, time
from pathlib import Path
options = dict(zip(sys.argv, sys.argv[1:]))
folder, steps = Path(options["--output_dir"]), options["--num_inference_steps"]
print("step 20:  40%|####      | 2/5 [00:01<00:02,  1.00picture/s]", end="\\r", file=sys.stderr, flush=True)
if steps == "1":
    print(f"\\nerror: the photos of the training are not at {folder / 'photos'}", file=sys.stderr)
    sys.exit(2)
while steps == "2":
    time.sleep(0.02)
shutil.copyfile(Path(options["--run"]) / "prepared.json", folder / "report.json")
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def context(models: ModelsOnDisk, tmp_path_factory: pytest.TempPathFactory) -> AppContext:
    return context_of(models, models.style.parent, tmp_path_factory.mktemp("pictures"))


def context_of(models: ModelsOnDisk, folder: Path, pictures: Path, **settings: Any) -> AppContext:
    config = AppConfig(str(models.base), adapters_dir=folder, output_dir=pictures, **settings)
    studio = Studio(config.output_dir, device=torch.device("cpu"))
    return AppContext(config, studio, Library(folder, config.uploads_dir), TrainingJobs(config.training_dir))


def pixels(file: str | Path) -> bytes:
    with Image.open(file) as image:
        return image.tobytes()


def drawn(
    context: AppContext,
    left: tuple[str, float | None],
    right: tuple[str, float | None],
    cards: object = None,
    prompt: str = "a photo of sks dog",
    seeds: str = "5",
) -> list[list[Any]]:
    page, base = CompareEvents(context), context.config.pretrained_model_name_or_path
    return list(page.draw(base, cards, *left, *right, prompt, "", seeds, 2, 4.0))


def pairs_of(updates: list[list[Any]]) -> list[tuple[str, str, str]]:
    return [update[2] for update in updates if isinstance(update[2], list)][-1]


def test_sides_are_what_generate_draws(context: AppContext, models: ModelsOnDisk) -> None:
    dog, style = context.library.by_name("dog"), context.library.by_name("style")
    cards = with_card(with_card([], dog, 0.7), style, -0.5)
    pairs = pairs_of(drawn(context, ("cards", None), (dog.id, 0.5), cards, seeds="5, 3"))
    assert [pair[0] for pair in pairs] == ["5", "3"]
    checked = {name: check_adapter(getattr(models, name), str(models.base), name=name) for name in ("dog", "style")}
    for adapters, side in ((((checked["dog"], 0.7), (checked["style"], -0.5)), 1), (((checked["dog"], 0.5),), 2)):
        request = PictureRequest(
            str(models.base), "a photo of sks dog", adapters, seed=3, num_inference_steps=2, guidance_scale=4.0
        )
        (alone,) = context.studio.generate_pictures(request)
        assert pixels(pairs[1][side]) == pixels(alone.path)
    assert read_png_settings(pairs[0][2])["adapters"][0]["weight"] == 0.5


def test_pictures_come_one_by_one_and_the_last_whole_pair_is_looked_at(context: AppContext) -> None:
    dog = context.library.by_name("dog")
    updates = drawn(context, ("base", None), (dog.id, 1.0), seeds="0:1")
    galleries = [[name for _, name in one[1]["value"]] for one in updates if one[1].get("value")]
    assert galleries[-1] == ["A, seed 0", "B, seed 0", "A, seed 1", "B, seed 1"] and len(galleries) == 4
    looked = [update[3:] for update in updates if isinstance(update[3], dict) and update[3].get("value")]
    assert [one[0]["value"] for one in looked] == ["0", "1"]
    seed, slider, apart, text = looked[-1]
    assert seed["choices"] == ["0", "1"] and len(slider["value"]) == 2
    assert text.startswith("Seed 1: A and B differ by ") and apart["value"].getextrema() != ((0, 0),) * 3
    page, pairs = CompareEvents(context), pairs_of(updates)
    assert page.look_at(pairs, "0")[1]["value"] == pairs[0][1:]
    assert page.choose(pairs, SimpleNamespace(index=3))[0]["value"] == "1"  # type: ignore[arg-type]
    for index in (4, -1, None):
        assert page.choose(pairs, SimpleNamespace(index=index)) == [gradio.skip()] * 4  # type: ignore[arg-type]


def test_equal_sides_are_the_same_to_the_bit(context: AppContext) -> None:
    dog = context.library.by_name("dog")
    updates = drawn(context, ("base", None), (dog.id, 0.0))
    assert "Seed 5: A and B are the same, bit for bit." in [update[6] for update in updates]


def test_what_cannot_be_compared_is_told_before_anything_is_drawn(context: AppContext) -> None:
    dog = context.library.by_name("dog")
    before = set(context.studio.output_dir.iterdir())
    side = (dog.id, 1.0)
    for left, cards, prompt, seeds, reason in (
        (side, [], "a dog", "", "give one to 8 seeds"),
        (side, [], "a dog", "0:8", "give one to 8 seeds"),
        (side, [], "a dog", "-1", "the seed must be between"),
        (side, [], "a dog", "x", "is neither a number"),
        (side, [], " ", "0", "write a prompt first"),
        (side, [], "<adapter:dog> a dog", "0", "choose adapters as sides"),
        ((dog.id, None), [], "a dog", "0", "the strength is missing"),
        ((dog.id, 11.0), [], "a dog", "0", "between -10 and 10"),
        (("../../etc/passwd", 1.0), [], "a dog", "0", "no longer in the library"),
        (("cards", None), "no cards", "a dog", "0", "cards are damaged"),
    ):
        with pytest.raises(gradio.Error, match=reason):
            drawn(context, left, ("base", None), cards, prompt, seeds)
    assert set(context.studio.output_dir.iterdir()) == before


def test_blacked_out_sides_are_not_called_the_same_alone(
    context: AppContext, models: ModelsOnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with context.studio.with_adapters(str(models.base), ()) as pipeline:
        hide = lambda image, *_: (torch.zeros_like(image), [True])  # noqa: E731
        monkeypatch.setattr(pipeline, "run_safety_checker", hide, raising=False)
    updates = drawn(context, ("base", None), (context.library.by_name("dog").id, 1.0))
    (text,) = (update[6] for update in updates if isinstance(update[6], str))
    assert text.endswith("are the same, bit for bit. A and B were blacked out by the safety checker.")


def test_a_picture_that_is_gone_is_named_without_its_folder(context: AppContext) -> None:
    pairs = pairs_of(drawn(context, ("base", None), ("base", None)))
    file = Path(pairs[0][1])
    file.unlink()
    with pytest.raises(gradio.Error, match=file.name) as caught:
        CompareEvents(context).look_at(pairs, "5")
    assert str(file.parent) not in caught.value.message


def test_numbers_out_of_range_are_told_by_their_names(context: AppContext) -> None:
    """Limits of number fields would be told of as those of "the value"."""
    with gradio.Blocks() as page, gradio.Tabs() as tabs, gradio.Tab("Compare") as tab:
        compare.build(context, Shared(tabs, gradio.State(""), adapter_cards([]), card_changes(), tab))
    limited = [
        block.elem_id
        for block in page.blocks.values()
        if isinstance(block, gradio.Number) and not (block.minimum is None and block.maximum is None)
    ]
    assert [name for name in limited if name.startswith("compare-")] == []


def test_sides_to_choose_from(context: AppContext) -> None:
    page, dog = CompareEvents(context), context.library.by_name("dog")
    choices = page.sides(dog.id)
    assert choices["value"] == dog.id and [name for name, _ in choices["choices"]][2:] == ["dog", "style"]
    assert page.sides("gone")["value"] == "base"
    assert page.strength_of(dog.id) == gradio.update(value=1.0, visible=True)
    assert page.strength_of("cards") == gradio.update(visible=False)


def test_no_event_is_offered_to_programs(context: AppContext) -> None:
    with gradio.Blocks() as page, gradio.Tabs() as tabs, gradio.Tab("Compare") as tab:
        compare.build(context, Shared(tabs, gradio.State(""), adapter_cards([]), card_changes(), tab))
    assert {one["api_visibility"] for one in page.config["dependencies"]} == {"private"}


@pytest.fixture
def world(models: ModelsOnDisk, tmp_path: Path) -> Iterator[AppContext]:
    """An app whose folder holds a run with two steps, and their evaluations; what a test leaves running is ended."""
    run = tmp_path / "adapters" / "rex"
    (run / "history").mkdir(parents=True)
    shutil.copy(models.dog, run / "adapter.safetensors")
    shutil.copy(models.style, run / "history" / "step-10.safetensors")
    shutil.copy(models.dog, run / "history" / "step-20.safetensors")
    (run / "config.yaml").write_text(f"pretrained_model_name_or_path: {json.dumps(str(models.base))}\n")
    write_report(report_of(run), tmp_path)
    shutil.move(tmp_path / "report.json", run / "prepared.json")
    context = context_of(models, tmp_path / "adapters", tmp_path / "pictures")
    yield context
    jobs = EvaluationJobs(context.config.evaluation_dir)
    for job in jobs.jobs():
        if job.state == "running":
            jobs.stop(job.id)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_process, "PYTHON", (sys.executable, "-c", PLAYED_EVALUATION))


def report_of(run: Path, text: str = "step 20") -> EvaluationReport:
    """A report of the run; ``text`` stands wherever a report holds any."""
    digests = {step: sha256_of(run / "history" / f"step-{step}.safetensors") for step in (10, 20)}
    rows = [
        ScoredRow("robot", "step 10", 10, digests[10], 1.0, 3, 0, {LOOKS: 0.25, READS: 0.5}),
        ScoredRow("robot", text, 20, digests[20], 1.0, 3, 0, {LOOKS: 0.75, READS: 0.625}),
    ]
    return EvaluationReport(
        base=text,
        base_fingerprint=None,
        settings={"num_images": 1, "num_class_images": 0, "num_inference_steps": 7, "seed": 0},
        backbones=[{"name": text}],
        titles={LOOKS: f"identity {text}", READS: "prompt(toy-text)"},
        subjects=[SubjectFacts("robot", None, "sks", text, "toy", ["a"], {"1.png": "cd" * 32}, {LOOKS: 0.9})],
        rows=rows,
        summary=[],
        best={"robot": text},
        best_rule=text,
        deciding=(LOOKS, READS),
        notes=[text],
        libraries={},
        machine={},
    )


def run_of(context: AppContext) -> Run:
    (run,) = runs_below(context.config.adapters_dir, {})
    return run


def ended(jobs: EvaluationJobs, until: Callable[[EvaluationJob], bool] | None = None) -> EvaluationJob:
    """The latest job as soon as it has ended, or ``until`` holds."""
    for _ in range(600):
        job = jobs.jobs()[0]
        if until(job) if until else job.state != "running":
            return job
        time.sleep(0.05)
    raise AssertionError(f"still {job}")


@pytest.mark.usefixtures("played")
def test_an_evaluation_runs_by_itself_and_its_report_is_found(world: AppContext) -> None:
    page, run = EvaluationEvents(world), run_of(world)
    assert (run.name, run.base) == ("rex", world.config.pretrained_model_name_or_path)
    chosen = page.refresh(None)[0]
    assert (chosen["choices"], chosen["value"]) == ([("rex", run.id)], run.id)
    assert "press Evaluate" in page.reports(run.id, None)[1]
    timer, _, stop, seen = page.start(run.id, 1, 0, 3, None, True)
    assert timer.active is True and stop["visible"] is True and seen == "001"
    jobs = EvaluationJobs(world.config.evaluation_dir)
    assert ended(jobs).state == "finished"
    timer, status, stop, seen_now, reports, html, _ = page.follow(run.id, seen)
    assert timer.active is False and stop["visible"] is False and seen_now is None
    assert status == "<p>The evaluation of rex finished.</p>"
    assert [label for label, _ in reports["choices"]] == ["001: 2 adapters, 6 pictures, 7 steps each"]
    assert "step 20 is the best, by step 20." in html and "<td>0.750</td><td>0.625</td>" in html
    assert page.follow(run.id, None)[4:] == [gradio.skip()] * 3

    page.start(run.id, 1, 0, 3, None, True)  # the same again goes on where it was
    assert ended(jobs).id == "001" and len(jobs.jobs()) == 1
    page.start(run.id, 2, 0, 3, None, True)
    assert ended(jobs).id == "002"
    assert len(reports_of(run, world.config.evaluation_dir)) == 2


@pytest.mark.usefixtures("played")
def test_one_evaluation_at_a_time_and_stop_ends_it(world: AppContext) -> None:
    page, run = EvaluationEvents(world), run_of(world)
    page.start(run.id, 1, 0, 2, None, False)
    jobs = EvaluationJobs(world.config.evaluation_dir)
    job = ended(jobs, lambda job: job.total > 0)
    assert (job.stage, job.done, job.total) == ("step 20", 2, 5)
    assert "drawing with step 20, 2 of 5." in status_html(job)
    with pytest.raises(gradio.Error, match="an evaluation of rex runs already"):
        EvaluationEvents(world).start(run.id, 1, 0, 3, None, False)
    status = page.stop()[1]
    assert "stopped; what was drawn is kept" in status and jobs.jobs()[0].state == "stopped"
    with pytest.raises(gradio.Error, match="ended already"):
        page.stop()


@pytest.mark.usefixtures("played")
def test_a_failure_says_why_and_names_no_folder(world: AppContext) -> None:
    page = EvaluationEvents(world)
    page.start(run_of(world).id, 1, 0, 1, None, False)
    job = ended(EvaluationJobs(world.config.evaluation_dir))
    assert (job.state, job.reason) == ("failed", "the photos of the training are not at photos")
    assert 'role="alert"' in status_html(job)


def test_the_command_is_asked_for_what_the_form_says(world: AppContext, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        "svft_diffusion.app.jobs.evaluation_jobs.start_detached",
        lambda arguments, log: asked.extend(arguments) or (_ for _ in ()).throw(OSError(11, "no more")),
    )
    run = run_of(world)
    with pytest.raises(gradio.Error, match="no process can be started: no more"):
        EvaluationEvents(world).start(run.id, 1, 8, 25, 3, True)
    options = dict(pairwise(asked))
    assert asked[0] == "evaluate" and options["--run"] == str(run.folder) and "--num_inference_steps" not in asked
    assert (options["--num_images"], options["--num_class_images"], options["--num_prompts"]) == ("1", "8", "3")
    assert options["--pretrained_model_name_or_path"] == run.base and "--with_base" in asked
    assert ended(EvaluationJobs(world.config.evaluation_dir)).state == "failed"


def test_what_cannot_be_evaluated_is_refused(
    world: AppContext, models: ModelsOnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, run = EvaluationEvents(world), run_of(world)
    for chosen, images, steps, reason in (
        (None, 1, 2, "choose a training first"),
        ("../rex", 1, 2, "choose a training first"),
        (run.id, None, 2, "fill in how many"),
        (run.id, 0, 2, "num_images must be at least 1"),
    ):
        with pytest.raises(gradio.Error, match=reason):
            page.start(chosen, images, 0, steps, None, False)
    # What belongs to a base model that is a single file is no hindrance to others.
    asked: list[EvaluationConfig] = []
    monkeypatch.setattr(EvaluationJobs, "start", lambda self, run, config: asked.append(config))
    config = dataclasses.replace(world.config, base_config=models.other_base)
    EvaluationEvents(dataclasses.replace(world, config=config)).start(run.id, 1, 0, 2, None, False)
    assert [(one.pretrained_model_name_or_path, one.base_config) for one in asked] == [(str(models.base), None)]
    config = dataclasses.replace(
        world.config, pretrained_model_name_or_path=str(models.other_base), allow_public=True, server_name="0.0.0.0"
    )
    public = EvaluationEvents(dataclasses.replace(world, config=config))
    with pytest.raises(gradio.Error, match="a base model that is not offered here"):
        public.start(run.id, 1, 0, 2, None, False)
    assert not world.config.evaluation_dir.exists()
    with pytest.raises(UserError, match="ended already"):
        EvaluationJobs(world.config.evaluation_dir).stop("001")


class _Tags(HTMLParser):
    """What a browser makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_whatever_a_report_says_is_shown_as_text(world: AppContext, text: str) -> None:
    run = run_of(world)
    folder = world.config.evaluation_dir / "007"
    folder.mkdir(parents=True)
    write_report(report_of(run.folder, text), folder)
    Image.new("RGB", (8, 8)).save(folder / "pareto.png")
    (folder / "sheet_a.png").write_text("<script>alert(1)</script>")
    (found,) = reports_of(run, world.config.evaluation_dir)
    seen = _Tags()
    seen.feed(report_html(found))
    assert seen.tags <= {"div", "p", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert seen.attributes <= {"class", "scope", "tabindex", "role", "aria-label"}
    assert "".join(text.split()) in "".join("".join(seen.texts).split())
    assert [file.name for file in found.pictures()] == ["pareto.png"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values.update(best=["x"]),
        lambda values: values.update(rows=[{"subject": 1}]),
        lambda values: values["rows"][0].update(scores={LOOKS: "x"}),
        lambda values: values.update(notes=3),
        lambda values: values.update(format_version=99),
        lambda values: values.clear(),
    ],
)
def test_damaged_reports_and_those_of_others_are_left_out(
    world: AppContext, damage: Callable[[dict[str, Any]], None]
) -> None:
    run = run_of(world)
    other, folder = report_of(run.folder), world.config.evaluation_dir / "001"
    other.rows[:] = [dataclasses.replace(row, sha256="ab" * 32) for row in other.rows]
    (world.config.evaluation_dir / "002").mkdir(parents=True)
    write_report(other, world.config.evaluation_dir / "002")
    folder.mkdir()
    file = write_report(report_of(run.folder), folder)
    assert len(reports_of(run, world.config.evaluation_dir)) == 1
    values = json.loads(file.read_text())
    damage(values)
    file.write_text(json.dumps(values))
    assert reports_of(run, world.config.evaluation_dir) == []
