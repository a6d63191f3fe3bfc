"""The command `compare`: a miniature comparison from end to end, going on with one, and inputs that can't work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from svft_diffusion.cli.main import main
from svft_diffusion.comparison import measuring
from svft_diffusion.errors import UserError

SMALL = {
    "num_subjects": 2,
    "num_seeds": 1,
    "max_train_steps": 2,
    "num_class_images": 1,
    "num_inference_steps": 2,
    "search_subjects": 1,
    "lr_extensions": 0,
    "second_best": 0,
}


def command(folder: Path, methods: tuple[str, ...] = ("SVFT plain", "LoRA"), **changes: Any) -> list[str]:
    settings = {**SMALL, "output_dir": folder, **changes}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return ["compare", "--methods", *methods, "--lr_factors", "1", *flags]


def timeless(folder: Path) -> dict[str, Any]:
    """Every row without what the clock says."""
    found = {}
    for file in (folder / "rows").glob("*.json"):
        row = json.loads(file.read_text(encoding="utf-8"))
        del row["result"]["seconds"], row["result"]["ended"]
        row["result"]["numbers"].pop("step_seconds", None)
        found[file.name] = row
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods on two subjects."""
    folder = tmp_path_factory.mktemp("comparison")
    assert main(command(folder)) == 0
    return folder


def test_a_miniature_comparison_reports_every_row(finished: Path) -> None:
    report = json.loads((finished / "methods" / "report.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (finished / "methods" / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 4 and {row["state"] for row in rows} == {"measured"}
    assert {(row["name"], row["subject"], row["seed"]) for row in rows} == {
        (name, subject, 0) for name in ("SVFT plain", "LoRA") for subject in (0, 1)
    }
    ours, lora = report["entries"]
    assert ours["ours"] and not lora["ours"]
    # All of LoRA's 57,600 values and ours are in the files, with names around them.
    assert 4 * 57_600 < lora["costs"]["file_bytes"] < 1.2 * 4 * 57_600
    assert lora["bytes"] == 4 * 57_600 <= report["budgets"]["main"]
    assert 4 * 9_536 == ours["bytes"] < ours["costs"]["file_bytes"]
    quality = [row["numbers"]["quality"] for row in rows if row["name"] == "LoRA"]
    assert lora["scores"]["quality"]["mean"] == pytest.approx(sum(quality) / 2)
    difference = [row["numbers"]["quality"] for row in rows if row["name"] == "SVFT plain"]
    expected = (sum(difference) - sum(quality)) / 2
    assert ours["against_reference"]["quality"]["mean"] == pytest.approx(expected)
    assert lora["against_reference"] == {} and report["rows"] == {"measured": 4, "missing": 0}
    assert all(row["numbers"]["drift"] > 0 for row in rows)


def test_the_report_shows_a_table_plots_and_pictures(finished: Path) -> None:
    text = (finished / "methods" / "report.md").read_text(encoding="utf-8")
    assert "| **SVFT plain** |" in text and "| LoRA |" in text and "2 subjects" in text
    for name in ("quality_bytes.png", "quality_time.png", "quality_memory.png", "quality_drift.png", "pictures.png"):
        assert (finished / "methods" / name).stat().st_size > 1000 and f"({name})" in text


def test_the_same_command_again_measures_nothing_and_a_damaged_row_alone_anew(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = timeless(finished)
    measured: list[str] = []
    real = measuring.measure

    def counted(method: Any, rate: float, effort: Any, subject: Any, *rest: Any) -> measuring.Measured:
        measured.append(subject.name)
        return real(method, rate, effort, subject, *rest)

    monkeypatch.setattr("svft_diffusion.comparison.work.measure", counted)
    assert main(command(finished)) == 0 and measured == []
    (finished / "rows" / next(iter(before))).write_text("{", encoding="utf-8")
    assert main(command(finished)) == 0 and len(measured) == 1
    assert timeless(finished) == before


def test_a_dry_run_says_how_many_rows_are_left(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(finished), "--dry_run"]) == 0
    assert "all 4 rows are measured" in capsys.readouterr().out
    assert main([*command(finished, num_seeds=3), "--dry_run"]) == 0
    assert "8 of about 12 rows are left" in capsys.readouterr().out


def test_json_and_nothing_else_on_stdout(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["question"] == "methods"


def test_a_row_that_breaks_is_told_and_does_not_end_the_others_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[str] = []

    def measure(method: Any, *rest: Any) -> measuring.Measured:
        begun.append(method.family)
        if method.family == "peft":
            raise RuntimeError("no such kernel")
        return measuring.Measured({"quality": 0.5, "drift": 0.25}, [])

    monkeypatch.setattr("svft_diffusion.comparison.work.measure", measure)
    assert main(command(tmp_path)) == 0
    text = (tmp_path / "methods" / "report.md").read_text(encoding="utf-8")
    assert "LoRA (main): 2 rows failed, such as: RuntimeError: no such kernel" in text
    assert "| **SVFT plain** | 0.500" in text
    begun.clear()
    assert main(command(tmp_path)) == 0 and begun == ["peft", "peft"]


def test_a_full_disk_is_no_failure_of_the_method_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def measure(method: Any, *rest: Any) -> measuring.Measured:
        begun.append(method.family)
        if method.family == "peft":
            raise UserError("this base has no such layer")  # always: that is the method's
        try:
            raise OSError(28, "No space left on device")
        except OSError as problem:
            raise UserError("can't write class images: No space left on device") from problem

    monkeypatch.setattr("svft_diffusion.comparison.work.measure", measure)
    assert main(command(tmp_path)) == 0
    rows = [json.loads(line) for line in (tmp_path / "methods" / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {(row["name"], row["state"]) for row in rows} == {("SVFT plain", "broken"), ("LoRA", "failed")}
    begun.clear()
    assert main(command(tmp_path)) == 0 and begun == ["spectral", "spectral"]


def test_no_row_begins_when_the_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, max_hours=1e-9)) == 0
    output = capsys.readouterr().out
    assert "the time is over; 4 known rows are missing" in output and not timeless(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "LORA"], "nobody is called 'LORA' in the question methods, did you mean 'LoRA'?"),
        (["--methods", "LoRA", "LoRA"], "somebody is named twice"),
        (["--lr_factors", "3", "1"], "must be numbers above 0 that rise, got 3 1"),
        (["--lr_factors", "1"], "there is one; give 0 extensions"),
        (["--num_seeds", "0"], "--num_seeds must be at least 1, got 0"),
        (["--num_subjects", "101"], "there are 100 to compare on"),
        (["--max_hours", "nan"], "--max_hours must be above 0"),
        (["--methods", "LoRA", "--budget", "10"], "nobody can take part: LoRA: its smallest size takes 115,200 of 10"),
    ],
)
def test_wrong_settings_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--output_dir", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1] and not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file_and_an_unknown_question_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    assert main(["compare", "--output_dir", str(file)]) == 2
    assert file.read_text(encoding="utf-8") == "mine"
    settings = tmp_path / "settings.yaml"
    settings.write_text("question: best\n", encoding="utf-8")
    assert main(["compare", "--config", str(settings)]) == 2
    assert "'best' is not one of methods, banded-or-diagonal" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_rows_and_a_killed_one_loses_its_own_alone(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    changes: dict[str, Any] = {"max_train_steps": 30}

    def start(folder: Path) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "svft_diffusion", *command(folder, **changes)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    killed = start(together)
    assert killed.stdout is not None and "quality" in killed.stdout.readline()  # one row is finished, another begun
    killed.kill()
    killed.wait()
    kept = timeless(together)
    assert 1 <= len(kept) < 4
    both = [start(together), start(together)]
    assert [process.wait() for process in both] == [0, 0]
    assert main(command(alone, **changes)) == 0
    assert timeless(together) == timeless(alone) and kept.items() <= timeless(together).items()
