"""``svft-diffusion evaluate`` from end to end: an adapter, a run, a list of subjects; resuming; refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adapter_files import write_models
from PIL import Image

from svft_diffusion import SVFTConfig, save_adapter
from svft_diffusion.adapters import add_training_adapter
from svft_diffusion.cli.main import main
from svft_diffusion.evaluation import painter
from svft_diffusion.evaluation.report import EvaluationReport, read_report
from svft_diffusion.evaluation.toy_subjects import demonstration_subject, held_out_subjects, write_photos
from svft_diffusion.files import AdapterMetadata
from svft_diffusion.models import EMBEDDED_MODEL, load_pipeline
from svft_diffusion.sampling import drawing
from svft_diffusion.sampling.png import read_png_settings

QUICK = ["--num_prompts", "2", "--num_images", "1", "--num_class_images", "2", "--num_inference_steps", "2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of a subject, and a training folder with two adapters for the embedded model in its history."""
    folder = tmp_path_factory.mktemp("world")
    write_photos(demonstration_subject(), folder / "photos")
    pipe = load_pipeline(EMBEDDED_MODEL)
    metadata = AdapterMetadata(base_name=EMBEDDED_MODEL, trigger="sks", class_word="robot")
    trained = add_training_adapter(pipe, SVFTConfig(), "new")
    for step in (10, 20):
        generator = torch.Generator().manual_seed(step)
        for values in trained:
            values.data.copy_(0.02 * step * torch.randn(values.shape, generator=generator))
        save_adapter(pipe, "new", folder / "run" / "history" / f"step-{step}.safetensors", metadata=metadata)
    save_adapter(pipe, "new", folder / "run" / "adapter.safetensors", metadata=metadata)
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump({"instance_data_dir": str(folder / "photos")}))
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts of the pictures that are drawn."""
    prompts: list[str] = []

    def generate_batch(pipeline: Any, prompt: str, **options: Any) -> Any:
        prompts.append(prompt)
        return original(pipeline, prompt, **options)

    original = drawing.generate_batch
    monkeypatch.setattr(painter, "generate_batch", generate_batch)
    return prompts


def evaluated(output_dir: Path, *arguments: object) -> EvaluationReport:
    assert main(["evaluate", *QUICK, "--output_dir", str(output_dir), *map(str, arguments)]) == 0
    return read_report(output_dir)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_adapter_is_drawn_and_scored_and_the_second_run_draws_nothing(
    world: Path, tmp_path: Path, drawn: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    report = evaluated(output, "--adapter", f"{world / 'run'}:0.5")
    of_class = ["a photo of a robot on the beach", "a photo of a robot in the snow"]
    of_subject = ["a photo of sks robot on the beach", "a photo of sks robot in the snow"]
    assert drawn == [*of_class, *of_subject, *of_class]  # the base model's first
    base, adapter = report.rows
    assert (base.label, base.pictures, base.class_pictures) == ("base model", 0, 2)
    assert (adapter.label, adapter.weight, adapter.pictures, adapter.class_pictures) == ("run at 0.5", 0.5, 2, 2)
    assert base.scores["feature_drift:toy-identity"] == base.scores["pixel_drift:pixels"] == 0
    assert adapter.scores["pixel_drift:pixels"] > 0.001  # the adapter acted on the class
    assert adapter.scores["diversity:toy-text"] is None  # one picture for each prompt
    assert 0.3 < adapter.scores["prompt_fidelity:toy-text"] <= 1
    assert report.best == {} and report.summary == []
    assert report.notes == ["no pareto.png: it compares several adapters of one subject"]
    [subject] = report.subjects
    assert (subject.token, subject.class_word, subject.prompts) == ("sks", "robot", of_subject)
    assert subject.photo_scores["subject_fidelity:toy-identity"] > 0.8
    [file] = output.glob("pictures/subject/run_at_0_5/subject/000_*.png")
    assert read_png_settings(file)["adapters"][0]["weight"] == 0.5

    told = capsys.readouterr().err
    assert told.startswith("6 pictures to draw, 2 steps each\n") and "0/6" in told
    before = files_of(output)
    assert str(tmp_path) not in before["report.json"].decode() and str(world) not in before["report.json"].decode()
    drawn.clear()
    evaluated(output, "--adapter", f"{world / 'run'}:0.5")
    assert drawn == [] and files_of(output) == before

    file.write_bytes(file.read_bytes()[:200])  # as a power cut leaves it
    [gone] = output.glob("pictures/subject/base/class/001_*.png")
    gone.unlink()
    evaluated(output, "--adapter", f"{world / 'run'}:0.5")
    assert drawn == [of_class[1], of_subject[0]] and files_of(output) == before
    assert "2 pictures to draw, 2 steps each; 4 more are there\n" in capsys.readouterr().err

    capsys.readouterr()
    assert main(["evaluate", *QUICK, "--output_dir", str(output), "--adapter", f"{world / 'run'}:0.6", "--seed=1"]) == 2
    assert "report.json is of another evaluation" in capsys.readouterr().err
    file.with_name("000_a-photo-of-sks-robot-on-the-beach_seed0.png").write_bytes(
        next(output.glob("pictures/subject/base/class/000_*.png")).read_bytes()
    )
    assert main(["evaluate", *QUICK, "--output_dir", str(output), "--adapter", f"{world / 'run'}:0.5"]) == 2
    assert "is another picture; choose another --output_dir" in capsys.readouterr().err


def test_pictures_that_the_safety_checker_blacked_out_are_told(
    world: Path, tmp_path: Path, drawn: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = vars(painter)["generate_batch"]  # notes what is drawn, see `drawn`
    monkeypatch.setattr(
        painter,
        "generate_batch",
        lambda pipeline, prompt, **options: [
            one._replace(blacked_out="snow" in prompt) for one in plain(pipeline, prompt, **options)
        ],
    )
    options = ["--adapter", world / "run", "--num_class_images", "0"]
    report = evaluated(tmp_path, *options)
    told = "subject: blacked out by the base model's safety checker, and scored as they are: 1 of the pictures; "
    assert len(drawn) == 2 and any(note.startswith(told) for note in report.notes)
    assert f"note: {told}" in capsys.readouterr().out
    drawn.clear()
    monkeypatch.setattr(painter, "generate_batch", plain)
    assert any(note.startswith(told) for note in evaluated(tmp_path, *options).notes) and drawn == []
    notes = evaluated(tmp_path, *options, "--disable_safety_checker").notes
    assert len(drawn) == 1 and not any("safety checker" in note for note in notes)


def test_a_run_is_scored_step_by_step_and_the_best_is_picked(
    world: Path, tmp_path: Path, drawn: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluated(tmp_path, "--run", world / "run", "--with_base")
    assert [(row.label, row.step) for row in report.rows] == [
        ("base model", None), ("step 10", 10), ("step 20", 20)
    ]  # fmt: skip
    assert len(drawn) == 3 * 4 and len({row.sha256 for row in report.rows}) == 3
    assert report.deciding == ("subject_fidelity:toy-identity", "prompt_fidelity:toy-text")
    first, second = ([row.scores[key] or 0 for key in report.deciding] for row in report.rows[1:])
    assert second[0] > first[0] and second[1] > first[1]
    assert report.best == {"subject": "step 20"}
    written = {path.name for path in tmp_path.iterdir()}
    assert {"pareto.png", "strip_all.png", "sheet_base.png", "sheet_step_10.png", "report.md"} <= written
    told = capsys.readouterr().out
    assert f"the best of subject: {report.best['subject']}" in told and "identity(toy-identity)" in told


def test_a_run_that_went_on_is_scored_into_the_same_report_and_other_reports_stay(
    world: Path, tmp_path: Path, drawn: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(world / "run", tmp_path / "run")
    later = (run / "history" / "step-20.safetensors").rename(tmp_path / "later.safetensors")
    few = ["--num_prompts", 1, "--num_class_images", 0]
    output = tmp_path / "out"
    assert [row.step for row in evaluated(output, "--run", run, *few).rows] == [10]
    shutil.copy(later, run / "history" / "step-20.safetensors")
    drawn.clear()
    assert [row.step for row in evaluated(output, "--run", run, *few).rows] == [10, 20] and len(drawn) == 1

    before = files_of(output)
    others = [
        ["--adapter", run, *few],
        ["--run", run, *few, "--num_prompts", 2],
        ["--run", run, *few, "--class_word", "mug"],
        ["--run", run, *few, "--instance_data_dir", output / "pictures" / "subject" / "step_10" / "subject"],
    ]
    for arguments in others:
        capsys.readouterr()
        assert main(["evaluate", *QUICK, "--output_dir", str(output), *map(str, arguments)]) == 2
        assert "report.json is of another evaluation" in capsys.readouterr().err
    assert files_of(output) == before


def test_pictures_of_another_size_are_never_mixed_in(
    world: Path, tmp_path: Path, drawn: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--adapter", world / "run", "--num_prompts", 1, "--num_class_images", 1]
    evaluated(tmp_path, *arguments, "--height", 32, "--width", 32)
    (tmp_path / "report.json").unlink()  # as if it had been ended while it was at work
    (tmp_path / "report.md").unlink()
    next(tmp_path.glob("pictures/subject/run/class/*.png")).unlink()
    capsys.readouterr()
    assert main(["evaluate", *QUICK, "--output_dir", str(tmp_path), *map(str, arguments)]) == 2
    assert "is another picture; choose another --output_dir" in capsys.readouterr().err
    drawn.clear()
    evaluated(tmp_path, *arguments, "--overwrite")
    assert len(drawn) == 3
    assert {Image.open(file).size for file in tmp_path.glob("pictures/**/*.png")} == {(64, 64)}


def test_processes_share_the_drawing_and_the_first_reports(
    world: Path,
    tmp_path: Path,
    drawn: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--adapter", world / "run", "--num_prompts", 2, "--num_class_images", 2]
    evaluated(tmp_path / "one", *arguments)
    expected = files_of(tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    command = ["evaluate", *QUICK, *map(str, arguments), "--json"]
    assert main(command) == 2 and "give --output_dir" in capsys.readouterr().err
    drawn.clear()
    assert main([*command, "--output_dir", str(tmp_path / "all")]) == 0
    assert capsys.readouterr().out == "" and len(drawn) == 2
    assert files_of(tmp_path / "all").items() < expected.items()
    monkeypatch.setenv("RANK", "0")  # the third process never came
    assert main([*command, "--output_dir", str(tmp_path / "all")]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] and len(drawn) == 6
    assert files_of(tmp_path / "all") == expected


def test_folders_of_pictures_differ_in_more_than_case(world: Path, tmp_path: Path) -> None:
    """Else the pictures of an adapter called Base would replace the base model's where file systems ignore case."""
    adapter = shutil.copy(world / "run" / "adapter.safetensors", tmp_path / "Base.safetensors")
    arguments = ["--adapter", adapter, "--instance_data_dir", world / "photos", "--num_prompts", 1]
    report = evaluated(tmp_path / "out", *arguments, "--num_class_images", 1)
    assert [row.label for row in report.rows] == ["base model", "Base"]
    folders = [path.name for path in (tmp_path / "out" / "pictures" / "subject").iterdir()]
    assert len({name.casefold() for name in folders}) == len(folders) == 2


def test_adapters_that_were_trained_on_different_photos_are_not_scored_together(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(world / "run", tmp_path / "other")
    (other / "config.yaml").write_text(yaml.safe_dump({"instance_data_dir": str(tmp_path)}), encoding="utf-8")
    output = tmp_path / "out"
    assert main(["evaluate", "--adapter", str(world / "run"), str(other), "--output_dir", str(output)]) == 2
    told = capsys.readouterr().err
    assert "trained on different photos" in told and "--subjects" in told and told.count("\n") == 1
    assert not output.exists()


def test_subjects_of_a_list_have_means_with_intervals_and_kinds(world: Path, tmp_path: Path) -> None:
    listed: list[dict[str, object]] = []
    for subject, kind in zip(held_out_subjects(3), ("live", "object", "object"), strict=True):
        write_photos(subject, world / subject.name)
        adapter = str(world / "run" / "history" / "step-10.safetensors")
        listed.append({"name": subject.name, "instance_data_dir": subject.name, "adapter": adapter, "kind": kind})
    file = world / "subjects.yaml"
    file.write_text(yaml.safe_dump(listed), encoding="utf-8")
    report = evaluated(tmp_path, "--subjects", file, "--num_class_images", 0, "--backbone", "toy-identity")
    assert [(group.group, group.subjects) for group in report.summary] == [("all", 3), ("live", 1), ("object", 2)]
    key = "subject_fidelity:toy-identity"
    values = [row.scores[key] or 0 for row in report.rows]
    everyone, live, objects = report.summary
    assert everyone.means[key] == pytest.approx(sum(values) / 3, abs=2e-6)
    interval = everyone.intervals[key]
    assert interval is not None and min(values) <= interval[0] <= interval[1] <= max(values)
    assert live.intervals[key] is None and objects.intervals[key] is not None
    assert report.deciding is None and "no backbone reads text" in report.notes[0]
    assert "prior_preservation:toy-identity" not in report.titles


def test_bases_that_do_not_match_are_one_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = write_models(tmp_path / "models")
    toy = world / "run" / "adapter.safetensors"
    output = tmp_path / "out"
    photos = ["--instance_data_dir", str(world / "photos"), "--output_dir", str(output)]
    assert main(["evaluate", *QUICK, *photos, "--adapter", str(toy), str(models.dog)]) == 2
    assert "scores of different bases can't be compared" in capsys.readouterr().err
    arguments = ["--adapter", str(toy), "--pretrained_model_name_or_path", str(models.base), "--backbone=toy-text"]
    assert main(["evaluate", *QUICK, *photos, *arguments, "--prompts=toy"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error:") and told.count("\n") == 1 and "toybox" in told
    assert not output.exists()


def test_json_is_all_that_is_printed_and_the_same_work_gives_the_same_bytes(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--adapter", world / "run", "--num_class_images", 0, "--num_prompts", 1]
    evaluated(tmp_path / "a", *arguments)
    capsys.readouterr()
    evaluated(tmp_path / "b", *arguments, "--json")
    told = capsys.readouterr().out
    assert json.loads(told) == json.loads((tmp_path / "b" / "report.json").read_text("utf-8"))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") and len(files_of(tmp_path / "a")) == 4
