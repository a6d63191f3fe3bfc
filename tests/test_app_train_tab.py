"""The Train tab: what the visitor fills in becomes a run, and what is shown of runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch
from PIL import Image
from training_jobs import end_all, endless, has_ended, is_running, photos_of, play_runs, wait
from training_runs import short_run

from svft_diffusion.app.components import training_form
from svft_diffusion.app.components.card_changes import card_changes
from svft_diffusion.app.components.training_form import TrainingWishes, _FormEvents, duration_in_words
from svft_diffusion.app.components.training_view import job_label, status_html
from svft_diffusion.app.config import AppConfig
from svft_diffusion.app.context import AppContext, Shared
from svft_diffusion.app.drawing.studio import Studio
from svft_diffusion.app.jobs import training_estimate
from svft_diffusion.app.jobs.photo_upload import captions_of, gather, look_at, write_captions
from svft_diffusion.app.jobs.training_estimate import Estimates
from svft_diffusion.app.jobs.training_jobs import TrainingJobs
from svft_diffusion.app.shelf.library import Library, id_of
from svft_diffusion.app.tabs import train as train_tab
from svft_diffusion.errors import UserError
from svft_diffusion.files import read_header
from svft_diffusion.sampling.adapter_choice import sha256_of
from svft_diffusion.training.checks import check
from svft_diffusion.training.presets import SPEEDS, SubjectPrompts, preset_settings

SAMPLES = Path(__file__).parent.parent / "samples"
MEASURED = {
    "steps": 300, "seconds_to_start": 2.0, "seconds_per_step": 0.5, "class_images": 2, "seconds_per_class_image": 3.0,
    "seconds_per_sample": 1.0, "peak_memory": 500_000_000, "device": "cpu",
}  # fmt: skip


@pytest.fixture
def context(tmp_path: Path) -> Iterator[AppContext]:
    """An app on empty folders; what a test leaves running is ended."""
    config = AppConfig(adapters_dir=tmp_path, output_dir=tmp_path / "app")
    jobs = TrainingJobs(config.training_dir)
    studio = Studio(
        config.output_dir,
        device=torch.device("cpu"),
        dtype="float32",
        disable_safety_checker=True,
        base_config=None,
        on_mismatch="error",
        embed_adapter=False,
    )
    yield AppContext(config, studio, Library(tmp_path, config.uploads_dir), jobs)
    end_all(jobs)


def wishes(**changes: Any) -> TrainingWishes:
    """The form for the photos that the package comes with."""
    filled_in = {
        "photos": photos_of(SAMPLES), "captions": [], "class_word": "robot", "trigger": "sks", "name": "",
        "speed": "quick",
    }  # fmt: skip
    return TrainingWishes(**(filled_in | changes))


def values(form: TrainingWishes) -> list[Any]:
    """As Gradio hands them over."""
    return [form.photos, form.captions, form.class_word, form.trigger, form.name, form.speed]


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("base", ["toybox", "tiny"])
def test_every_choice_is_a_run_that_can_be(context: AppContext, tmp_path: Path, speed: str, base: str) -> None:
    name = base if base == "toybox" else short_run(tmp_path).pretrained_model_name_or_path
    with wishes(speed=speed).as_config(context, name) as config:
        config = dataclasses.replace(config, output_dir=tmp_path / "out")
        if base == "toybox":
            config = dataclasses.replace(config, class_data_dir=tmp_path / "class")
        [subject] = check(config).subjects
    assert (subject.instance_prompt, subject.class_prompt) == ("a photo of sks robot", "a photo of a robot")
    assert len(subject.pictures) == 5
    assert config.max_train_steps is not None and config.max_train_steps % config.validation_steps == 0
    assert config.history_steps == config.validation_steps and config.validation_prompt == "a photo of sks robot"


def test_a_longer_choice_trains_longer(tmp_path: Path) -> None:
    for base in ("toybox", "some/model"):
        prompts = SubjectPrompts("sks", "robot")
        steps = [preset_settings(base, speed, prompts, tmp_path)["max_train_steps"] for speed in SPEEDS]
        assert steps == sorted(set(steps))
    with pytest.raises(UserError, match="choose quick, balanced or thorough"):
        preset_settings("toybox", "endless", prompts, tmp_path)


def test_prompts_are_made_from_the_words() -> None:
    assert SubjectPrompts("sks", "orange  cat").class_prompt == "a photo of an orange cat"
    assert SubjectPrompts(" sks ", "orange  cat").instance_prompt == "a photo of sks orange cat"
    for trigger, class_word in (
        ("", "dog"),
        ("sks", " "),
        ("a b", "dog"),
        ("dog", "Dog"),
        ("sks", "<dog>"),
        ("s\x1b", "d"),
    ):
        with pytest.raises(UserError):
            SubjectPrompts(trigger, class_word)
    assert "only toys" in str(SubjectPrompts("sks", "dog").note("toybox"))
    assert "trigger words" in str(SubjectPrompts("abc", "robot").note("toybox"))
    assert SubjectPrompts("sks", "robot").note("toybox") is None and SubjectPrompts("abc", "dog").note("sd") is None


def test_photos_of_one_name_are_both_kept_and_large_ones_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for place, size in (("one", (20, 30)), ("two", (30, 20)), ("three", (200, 10))):
        (tmp_path / place).mkdir()
        Image.effect_noise(size, 90).save(tmp_path / place / "a[b].png")
    (tmp_path / "two" / "broken.jpg").write_bytes(b"no picture")
    Image.new("L", (20, 30)).save(tmp_path / "one" / "b.mask.png")  # comes before its photo
    Image.effect_noise((20, 30), 91).save(tmp_path / "one" / "b.png")
    Image.effect_noise((30, 20), 92).save(tmp_path / "two" / "B.png")  # the same name on many systems
    (tmp_path / "one" / "a[b].txt").write_text("on the  grass", encoding="utf-8")
    folder.mkdir()
    files = [str(file) for place in ("one", "two", "three") for file in sorted((tmp_path / place).iterdir())]
    notes = gather(files, folder, most_pixels=1999)
    assert notes == ["skipped a[b].png: 2,000 pixels are too many, 1,999 are allowed"]
    look = look_at(folder, 16)
    assert {path.name for path in folder.glob("[bB]*")} == {"b.mask.png", "b.png", "B-2.png", "broken.jpg"}
    said = {photo: caption for photo, caption in look.captions.items() if caption}
    assert said == {"a[b]-2.png": "on the grass", "a[b].png": "on the grass"}
    assert captions_of([folder / "a[b].png", folder / "b.png"]) == {"a[b].png": "on the grass", "b.png": ""}
    assert "skipped broken.jpg: no readable picture" in look.notes
    assert look.sheet.width > 16

    captions = {"a[b].png": "in the  snow", "a[b]-2.png": "SKS dog at night", "none.png": "x"}
    write_captions(folder, captions, "a photo of sks dog", "sks")
    texts = {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.txt")}
    assert texts == {"a[b].txt": "a photo of sks dog in the snow", "a[b]-2.txt": "SKS dog at night"}
    with pytest.raises(UserError, match="too long"):
        write_captions(folder, {"a[b].png": "x" * 501}, "a photo of sks dog", "sks")


def test_captions_of_the_form_win_and_uploaded_ones_become_prompts(context: AppContext, tmp_path: Path) -> None:
    for number in range(2):
        Image.effect_noise((20, 30), 90 + number).save(tmp_path / f"{number}.png")
    (tmp_path / "0.txt").write_text("on the grass", encoding="utf-8")
    photos = photos_of(tmp_path)
    cases: list[tuple[list[list[Any]] | None, dict[str, str]]] = [
        (None, {"0.txt": "a photo of sks robot on the grass"}),
        ([["0.png", ""], ["1.png", "at night"]], {"1.txt": "a photo of sks robot at night"}),
    ]
    for captions, prompts in cases:
        with wishes(photos=photos, captions=captions).as_config(context, "tiny") as config:
            folder = config.instance_data_dir
            assert folder is not None
            assert {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.txt")} == prompts
    with (
        pytest.raises(UserError, match="no usable photo in the upload") as caught,
        wishes(photos=photos).as_config(context, "tiny") as config,
    ):
        raise UserError(f"no usable photo in {config.instance_data_dir}")
    assert "/" not in str(caught.value)

    (tmp_path / "0.txt").write_text("x" * 501, encoding="utf-8")
    too_long = wishes(photos=photos, captions=None).as_config(context, "tiny")
    with pytest.raises(UserError, match=r"caption of 0\.png is too long"), too_long:
        pass


@pytest.mark.parametrize(
    ("dtype", "device", "precision"),
    [("float16", "cuda", "fp16"), ("bfloat16", "cuda", "bf16"), ("float32", "cuda", None), ("float16", "cpu", None)],
)
def test_large_bases_train_in_the_precision_of_the_app_on_a_gpu(
    context: AppContext, monkeypatch: pytest.MonkeyPatch, dtype: str, device: str, precision: str | None
) -> None:
    monkeypatch.setattr(training_form, "resolve_device", lambda name: torch.device(device))
    context = dataclasses.replace(context, config=dataclasses.replace(context.config, dtype=dtype))
    for base, expected in (("some/base", precision), ("toybox", None)):
        with wishes().as_config(context, base) as config:
            assert config.mixed_precision == expected


def test_captions_that_were_typed_in_stay_when_photos_are_added(
    context: AppContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Studio, "open_base", lambda self, base: 16)
    for number in range(3):
        Image.effect_noise((20, 30), 90 + number).save(tmp_path / f"{number}.png")
    (tmp_path / "1.txt").write_text("on the grass", encoding="utf-8")
    typed = [["0.png", "at night"], ["1.png", ""], ["gone.png", "x"]]
    _, _, captions = _FormEvents(context).look_at_photos(photos_of(tmp_path), typed, "toybox")
    assert captions == [["0.png", "at night"], ["1.png", "on the grass"], ["2.png", ""]]
    *_, again = _FormEvents(context).look_at_photos(photos_of(tmp_path), captions, "toybox")
    assert again == gr.skip()


def test_a_single_file_takes_the_settings_that_were_given_for_files(tmp_path: Path) -> None:
    file, folder = tmp_path / "base.safetensors", tmp_path / "settings"
    file.touch()
    config = AppConfig(base=[str(file)], base_config=folder, adapters_dir=tmp_path)
    context: Any = SimpleNamespace(config=config)
    for base, given in ((str(file), folder), ("toybox", None)):
        with wishes().as_config(context, base) as training:
            assert training.base_config == given


def test_unusable_photos_are_told_without_the_folder(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    folder = tmp_path / "photos"
    folder.mkdir()
    gather([broken], folder, most_pixels=10**6)
    with pytest.raises(UserError, match=r"no usable photo: skipped broken\.jpg") as error:
        look_at(folder, 16)
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(UserError, match="add the photos first"):
        gather([tmp_path / "only.txt"], folder, most_pixels=10**6)
    with pytest.raises(UserError, match="201 photos are too many"):
        gather([broken] * 201, folder, most_pixels=10**6)


def test_the_time_is_measured_once_for_settings(
    context: AppContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def measured(arguments: list[str], *, seconds: float, device: str) -> subprocess.CompletedProcess[str]:
        calls.append(arguments)
        return subprocess.CompletedProcess(arguments, 0, stdout="\n" + json.dumps(MEASURED) + "\n", stderr="")

    monkeypatch.setattr(training_estimate, "run_to_the_end", measured)
    estimates = Estimates(tmp_path / "training")
    with wishes(speed="quick").as_config(context, "toybox") as config:
        assert estimates.known(config) is None
        # 150 steps, two class images, and two samples at the start and at each of five steps.
        assert estimates.measure(config).seconds == 2 + 150 * 0.5 + 2 * 3 + 6 * 2 * 1
    with wishes(speed="balanced", class_word="car").as_config(context, "toybox") as config:
        assert Estimates(tmp_path / "training").measure(config).seconds == 2 + 300 * 0.5 + 2 * 3 + 6 * 2 * 1
        assert len(calls) == 1 and calls[0][-2:] == ["--dry_run", "--json"]
        assert Estimates(tmp_path / "training").known(dataclasses.replace(config, train_batch_size=1)) is None


def test_a_run_that_would_fail_is_told_before(
    context: AppContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(arguments: list[str], *, seconds: float, device: str) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(arguments, 2, stdout="", stderr="error: no room in /home/me/x for it\n")

    monkeypatch.setattr(training_estimate, "run_to_the_end", refused)
    with (
        wishes().as_config(context, "toybox") as config,
        pytest.raises(UserError, match="this training would fail: no room in x for it"),
    ):
        Estimates(tmp_path).measure(config)


def test_durations_are_told_as_people_do() -> None:
    spoken = [duration_in_words(seconds) for seconds in (0.1, 89, 90, 3600, 12_000)]
    assert spoken == ["1 second", "89 seconds", "2 minutes", "60 minutes", "3 h 20 min"]


def test_a_page_is_sent_what_has_changed(context: AppContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play_runs(monkeypatch)
    config = short_run(tmp_path / "short")
    events = train_tab._TrainingEvents(context)
    empty = events.show_all(None)
    assert empty[0].active is False and empty[3]["visible"] is False

    id = context.jobs.start(endless(config), "<b>dog</b>")
    wait(context.jobs, id, is_running)
    timer, seen, choice, panel, status, stop, losses, *_ = events.refresh(None, empty[1])
    assert timer.active is True and panel["visible"] is True
    assert choice["value"] == id and choice["choices"] == [("<b>dog</b> (b-dog-b-1): running", id)]
    assert "<b>dog" not in status and "&lt;b&gt;dog" in status and "step 1 of 9, about 8 seconds left" in status
    assert stop["visible"] is True and losses.to_dict("records") == [{"step": 1, "loss": 0.5}]
    again = events.refresh(id, seen)
    assert [update for number, update in enumerate(again) if number != 1] == [gr.skip()] * (len(again) - 1)

    second = context.jobs.start(endless(config), "next")
    assert events.refresh(second, seen)[2]["value"] == second
    assert "number 1 in the queue" in events.refresh(second, seen)[4]
    context.jobs.stop(second)
    events.stop(id, seen)
    wait(context.jobs, id, has_ended)
    timer, seen, choice, panel, status, stop, *_ = events.refresh(second, seen)  # which is gone
    assert timer.active is False and choice["value"] == id and "Stopped after step 1" in status
    assert stop["visible"] is False
    assert "stopped" in job_label(context.jobs.get(id))

    assert events.refresh(id, {})[-2:] == [gr.update(visible=True), gr.update(visible=False)]
    with pytest.raises(gr.Error, match="choose a training"):  # not the one that the page shows
        events.delete(id, {**seen, "delete": ("other-1", False, 0.0)})
    with pytest.raises(gr.Error, match="another one has its name"):  # given again since the page has looked
        events.delete(id, {**seen, "delete": (id, False, 0.0)})
    gone = context.jobs.get(id).folder.path
    removed = context.config.adapters_dir / ".trash" / ("0" * 32) / gone.relative_to(context.config.adapters_dir)
    removed.mkdir(parents=True)  # as the library leaves it
    (removed / "adapter.safetensors").touch()
    _, seen, _, panel, *_ = events.delete(id, seen)
    assert panel["visible"] is False and context.jobs.jobs() == [] and not gone.exists() and not removed.exists()


def test_a_failure_is_told_on_the_page(context: AppContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play_runs(monkeypatch)
    id = context.jobs.start(endless(short_run(tmp_path / "short"), "a photo of refused dog"), "dog")
    text = status_html(wait(context.jobs, id, has_ended))
    assert 'role="alert"' in text and "Failed after step 0: can&#x27;t read photo.png: no picture.<" in text


def test_what_is_missing_is_told_and_nothing_starts(context: AppContext) -> None:
    events = train_tab._TrainingEvents(context)
    for changes, message in (
        ({"photos": None}, "add the photos first"),
        ({"photos": None, "class_word": ""}, "add the photos first"),
        ({"class_word": ""}, "kind of thing is missing"),
        ({"trigger": "a b"}, "must be a single one"),
        ({"name": "x" * 61}, "name of at most"),
    ):
        with pytest.raises(gr.Error, match=message):
            events.start(*values(wishes(**changes)), "toybox", {})
    with pytest.raises(gr.Error, match="choose a training"):
        events.stop(None, {})
    assert context.jobs.jobs() == []


def test_the_tab_is_built(context: AppContext) -> None:
    with gr.Blocks() as page:
        cards, base = gr.HTML([]), gr.State("toybox")
        with gr.Tabs() as tabs, gr.Tab("Train", id="train") as tab:
            train_tab.build(context, Shared(tabs, base, cards, card_changes(), tab))
    labels = {block.label for block in page.blocks.values() if getattr(block, "label", None)}
    assert {"Kind of thing", "Trigger word: a rare one", "Training", "Loss", "Step"} <= labels
    assert all(fn.api_visibility == "private" for fn in page.fns.values())


@pytest.mark.slow
def test_from_photos_to_an_adapter_on_generate(context: AppContext) -> None:
    events = train_tab._TrainingEvents(context)
    form = wishes(captions=[["01.png", "on the grass"], ["02.png", ""]])
    with form.as_config(context, "toybox") as config:
        short = dataclasses.replace(
            config, max_train_steps=20, validation_steps=10, history_steps=10, num_class_images=2
        )
        estimate = Estimates(context.config.training_dir).measure(short)
        assert 0 < estimate.seconds < 3600
        id = context.jobs.start(short, form.shown_name)
    job = wait(context.jobs, id, has_ended, seconds=600)
    assert job.state == "finished" and [entry.step for entry in job.history] == [10, 20]
    assert all(len(entry.samples) == 2 for entry in job.history)
    text, samples = events.show_step(id, 12)
    assert "After step 10" in text and len(samples["value"]) == 2
    assert events.show_all(id)[11]["value"] == "a photo of sks robot"
    changes, tabs = events.use_step(id, 12, [], "toybox")
    cards = changes["added"]
    assert cards[0]["thumbnail"].startswith("data:image/jpeg;base64,")
    assert tabs.selected == "generate" and cards[0]["id"] == id_of(sha256_of(job.history[0].adapter))
    again, _ = events.use_step(id, 12, cards, "toybox")
    assert again == gr.skip()
    assert read_header(context.library.get(cards[0]["id"]).file).trigger == "sks"
