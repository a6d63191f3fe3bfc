"""The list of `train-many`: what is read from it, and every problem of it told before anything begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from svft_diffusion.cli.main import run_command
from svft_diffusion.errors import UserError
from svft_diffusion.training.many.listing import Listing, read_list

FLAGS = ["--instance_prompt", "a photo of sks dog", "--max_train_steps", "1"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    from PIL import Image

    for name in ("rex", "luna"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(tmp_path / "photos" / name / "0.png")
    return tmp_path / "photos"


def listing(folder: Path, rows: Any, name: str = "list.yaml", **shared: Any) -> Listing:
    text = "\n".join(map(json.dumps, rows)) if name.endswith("l") and name[-2] == "n" else json.dumps(rows)
    (folder / name).write_text(text if "json" in name else yaml.safe_dump(rows), encoding="utf-8")
    return read_list(folder / name, shared, folder / "out")


@pytest.mark.parametrize("name", ["list.yaml", "list.json", "list.jsonl"])
def test_rows_win_over_shared_settings_and_paths_start_at_the_list(tmp_path: Path, name: str) -> None:
    rows = [{"name": "rex", "instance_data_dir": "photos/rex", "seed": 3}, {"name": "luna"}]
    found = listing(
        tmp_path, rows, name, seed=1, instance_data_dir=Path("p/{name}"), instance_prompt="a {name}", logging_dir="l"
    )
    assert found.problems == []
    rex, luna = (row.config for row in found.rows)
    assert (rex.seed, luna.seed) == (3, 1)
    assert rex.instance_data_dir == tmp_path / "photos" / "rex" and luna.instance_data_dir == Path("p/luna")
    assert (rex.instance_prompt, luna.instance_prompt) == ("a rex", "a luna")
    assert rex.output_dir == tmp_path / "out" / "rex" and rex.logging_dir == Path("l")


def test_a_folder_of_folders(photos: Path, tmp_path: Path) -> None:
    (photos / ".hidden").mkdir()
    (photos / "notes.txt").write_text("none", encoding="utf-8")
    found = read_list(photos, {"instance_prompt": "a photo of sks {name}"}, tmp_path / "out")
    assert [(row.name, row.config.instance_prompt) for row in found.rows] == [
        ("luna", "a photo of sks luna"),
        ("rex", "a photo of sks rex"),
    ]
    assert found.rows[0].config.instance_data_dir == photos / "luna"
    with pytest.raises(UserError, match="lies among the folders of photos"):
        read_list(photos, {}, photos / "out")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"instance_data_dir": "photos/rex"}, "row 2: name is missing"),
        ({"name": 7}, "row 2: name: expected text, got 7; write it in quotes"),
        ({"name": "../rex"}, "row 2 (../rex): name '../rex' can't be a folder everywhere: no dot or space"),
        ({"name": "a/b"}, "row 2 (a/b): name 'a/b' can't be a folder inside --output_dir: leave out /"),
        ({"name": "a\\b"}, "leave out \\"),
        ({"name": "C:"}, "leave out :"),
        ({"name": "a\x1bb"}, "leave out control characters"),
        ({"name": "x "}, "no dot or space at the start or the end"),
        ({"name": "Con"}, "is that of a device on Windows"),
        ({"name": "lpt1.txt"}, "is that of a device on Windows"),
        ({"name": "Status.json"}, "is that of a file that train-many writes"),
        ({"name": "x" * 101}, "longer than 100 bytes"),
        ({"name": "REX"}, "row 2 (REX): row 1 has this name too"),
        (
            {"name": "luna", "instance_promt": "x"},
            "row 2 (luna): unknown setting 'instance_promt', did you mean 'instan",
        ),
        ({"name": "luna", "max_train_steps": "many"}, "max_train_steps: expected a whole number, got 'many'"),
        ({"name": "luna", "mixed_precision": "bf16"}, "all rows share one base model and its precision; give --mixed"),
        ({"name": "luna", "pretrained_model_name_or_path": "x"}, "all rows share one base model"),
        ({"name": "luna", "factor_cache": "x"}, "all rows share one cache"),
        ({"name": "luna", "output_dir": "x"}, "is written into the folder of its name; leave out output_dir"),
        ({"name": "luna", "resume_from_checkpoint": "latest"}, "go on from their checkpoints by themselves"),
        ("luna", "row 2: expected a name and settings, got a str"),
    ],
)
def test_problems_of_rows(tmp_path: Path, row: Any, problem: str) -> None:
    found = listing(tmp_path, [{"name": "rex"}, row])
    assert [good.name for good in found.rows] == ["rex"]
    assert len(found.problems) == 1 and problem in found.problems[0]


@pytest.mark.parametrize("text", ["", "{}", "name: rex", "a: [", "\x00"])
def test_what_is_no_list(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"the list .*list.yaml( must hold a list|, line [12]: no YAML)"):
        read_list(tmp_path / "list.yaml", {}, tmp_path / "out")


def test_all_problems_are_told_at_once_and_nothing_is_begun(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"name": "rex", "instance_data_dir": "photos/rex"},
        {"name": "rex 2", "instance_data_dir": "photos/nowhere"},
        {"name": "rex 3", "instance_data_dir": "photos/rex", "learning_rate": -1},
        {"name": "a:b"},
    ]
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(rows), encoding="utf-8")
    output = tmp_path / "out"
    assert run_command("train-many", [str(tmp_path / "list.yaml"), "--output_dir", str(output), *FLAGS]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[:5] for line in lines] == ["row 4", "row 2", "row 3", "error"]
    assert "3 problems" in lines[-1] and "nothing was begun" in lines[-1]
    assert not output.exists()


def test_class_pictures_that_rows_would_draw_over_each_other(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = {"with_prior_preservation": True, "class_data_dir": "classes", "class_prompt": "a dog"}
    rows: list[dict[str, Any]] = [
        {"name": "rex", "instance_data_dir": "photos/rex", **prior},
        {"name": "luna", "instance_data_dir": "photos/luna", **prior, "seed": 1},
        {"name": "both", "instance_data_dir": "photos/luna", **prior, "class_data_dir": "photos/rex"},
    ]
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(rows), encoding="utf-8")
    command = [str(tmp_path / "list.yaml"), "--output_dir", str(tmp_path / "out"), *FLAGS]
    assert run_command("train-many", command) == 2
    told = capsys.readouterr().err
    assert "row 2 (luna): draws class pictures into" in told and "another seed than row 1 (rex)" in told
    assert "row 3 (both): class_data_dir is the folder of the photos of row 1 (rex)" in told


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "no place for the adapters: give --output_dir"),
        (["--output_dir", "out", "--resume_from_checkpoint", "latest"], "train-many goes on by itself"),
        (["--output_dir", "out", "--ray_workers", "2"], "no effect without --engine ray"),
        (["--output_dir", "out", "--engine", "ray", "--ray_workers", "0"], "--ray_workers must be at least 1"),
        (["--output_dir", "out", "--push_to_hub", "--hub_model_id", "me/all"], "write {name} in it"),
    ],
)
def test_flags(
    photos: Path, tmp_path: Path, flags: list[str], problem: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run_command("train-many", [str(photos), *FLAGS, *flags]) == 2
    assert problem in capsys.readouterr().err


def test_a_folder_that_holds_something_else(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "rex").mkdir(parents=True)
    (tmp_path / "out" / "rex" / "README.md").write_text("precious", encoding="utf-8")
    (tmp_path / "out" / "luna" / "checkpoint-1").mkdir(parents=True)
    assert run_command("train-many", [str(photos), "--output_dir", str(tmp_path / "out"), *FLAGS]) == 2
    told = capsys.readouterr().err
    assert "README.md is there already" in told and "holds checkpoints of another command" in told
