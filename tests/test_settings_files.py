"""Files of settings and lists: what is wrong in them is told with its place, and nothing is silently left out."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from svft_diffusion.cli.early_checks import check_port_is_free
from svft_diffusion.cli.main import run_command
from svft_diffusion.errors import UserError
from svft_diffusion.settings import nearest_hint
from svft_diffusion.structured_files import read_structured
from svft_diffusion.training.many.listing import read_list


def written(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8", newline="\n")
    return file


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.yaml", "seed: 0\nprompt: a\nseed: 1\n", "line 3: 'seed' is there twice"),
        ("a.yaml", "seed: 0\n'seed': 1\n", "line 2: 'seed' is there twice"),
        ("a.yaml", "- {file: a}\n- file: b\n  name: x\n  file: c\n", "line 4: 'file' is there twice"),
        ("a.yaml", "a: {b: {x: 1}, c: [1], b: 2}\n", "line 1: 'b' is there twice"),
        ("a.yaml", "a: &a {x: 1}\nb: *a\n? [k]\n: 1\nb: 2\n", "line 5: 'b' is there twice"),
        ("a.json", '{"seed": 0,\n "prompt": "a: {\\" ",\n "seed": 1}', "line 3: 'seed' is there twice"),
        ("a.json", '[{"a": {"b": 1}},\n {"b": 1, "\\u0062": 2}]', "line 2: 'b' is there twice"),
        ("a.jsonl", '{"a": 1}\n\n{"a": 1, "a": 2}\n', "line 3: 'a' is there twice"),
        ("a.json", " \n", "a.json is empty"),
    ],
)
def test_a_key_that_is_there_twice(tmp_path: Path, name: str, text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        read_structured(written(tmp_path / name, text), "--matrix")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("a.yaml", "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\n", {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}),
        ("a.yaml", "- {a: a, b: [a, a]}\n- {a: b}\n", [{"a": "a", "b": ["a", "a"]}, {"a": "b"}]),
        ("a.yaml", "text alone", "text alone"),
        ("a.json", '{"a": "a", "b": {"a": ["b\\": ", {}, {"a": 1}]}}', {"a": "a", "b": {"a": ['b": ', {}, {"a": 1}]}}),
    ],
)
def test_the_same_word_in_several_places(tmp_path: Path, name: str, text: str, value: object) -> None:
    assert read_structured(written(tmp_path / name, text), "--matrix") == value


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("promt: a\n", "--config FILE: unknown setting 'promt', did you mean 'instance_prompt'?"),
        ("max_train_step: 3\n", "--config FILE: unknown setting 'max_train_step', did you mean 'max_train_steps'?"),
        ("rank: banana\n", "--config FILE: rank: expected a whole number, got 'banana'"),
        ("seed: 1\nrank: 3\nseed: 2\n", "--config FILE, line 3: 'seed' is there twice; remove one"),
        ("seed: 1\nrank: [1\nseed: 2\n", "--config FILE, line 3: no YAML: did not find expected ',' or ']'"),
        ("seed: 1\x00\n", "--config FILE, line 1: no YAML: control characters are not allowed"),
        ("a: [2020-13-77]\n", "--config FILE, line 1: no YAML: month must be in 1..12"),
        ("[" * 5000, "--config FILE, line 1: no YAML: lists and mappings are more than 100 deep in each other"),
        (BOMB, "--config FILE, line 1: no YAML: aliases make more than 2000000 values of it"),
    ],
)
@pytest.mark.parametrize("command", ["train", "train-many", "edit", "compare"])
def test_wrong_settings_of_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, text: str, problem: str
) -> None:
    if command == "compare":
        text = text.replace("rank", "num_seeds").replace("max_train_step", "num_subject")
        problem = problem.replace("rank", "num_seeds").replace("max_train_step", "num_subject")
        if "promt" in text:
            return  # none of its settings is near to it
    file = written(tmp_path / "settings.yaml", text)
    more = {"train-many": ["list.yaml"], "edit": ["picture.png"]}.get(command, [])
    assert run_command(command, [*more, "--config", str(file)]) == 2
    assert capsys.readouterr().err == f"error: {problem.replace('FILE', str(file))}\n"


def test_list_of_subjects_that_grows_by_aliases(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the list .*list\.yaml, line 1: no YAML: aliases make more than"):
        read_list(written(tmp_path / "list.yaml", BOMB), {}, tmp_path / "out")


def test_setting_of_which_the_last_word_is_near() -> None:
    known = ["instance_prompt", "class_prompt", "seed"]
    assert nearest_hint("promt", known) == ", did you mean 'instance_prompt'?"
    assert nearest_hint("banana", known) == ""


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--prompt", "a", "--width", "1000000000"], "error: --width must be at most 16384; got 1000000000"),
        (["--prompt", " "], "error: a --prompt is empty"),
        (["--prompt", "a", "--num_images", "0"], "error: --num_images must be at least 1, got 0"),
        (
            ["--prompt", "a", "--adapter", "nowhere/x:y.png:0.5"],
            "error: can't read the adapter nowhere/x:y.png:0.5: No such file or directory",
        ),
    ],
)
def test_what_is_wrong_at_once_is_told_before_the_imports(arguments: list[str], problem: str) -> None:
    assert told_before_the_imports("sample", arguments) == f"{problem}\n"


def told_before_the_imports(command: str, arguments: list[str]) -> str:
    """What a command says that ends with code 2 before anything heavy is imported."""
    program = f"""
import sys
from svft_diffusion.cli.main import run_command
code = run_command({command!r}, {arguments})
assert not {{"torch", "gradio", "diffusers"}} & set(sys.modules)
sys.exit(code)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    return ended.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--server_port", "0"], "--server_port must be from 1 to 65535, got 0"),
        (["--adapter", "nowhere/x.safetensors:0.5"], "can't read the adapter nowhere/x.safetensors:0.5: No such file"),
        (["--base", "/no/such/folder"], "no such base model folder: '/no/such/folder'"),
        (["--pretrained_model_name_or_path", "FOLDER"], "FOLDER holds no model_index.json"),
        (["--adapters_dir", "FILE"], "--adapters_dir FILE: FILE is no folder"),
        (["--output_dir", "FILE/pictures"], "--output_dir FILE/pictures: FILE is no folder"),
        (["--server_name", "192.0.2.1", "--allow_public"], "can't listen on 192.0.2.1:"),
    ],
)
def test_a_wrong_start_of_the_app_is_told_before_the_imports(
    tmp_path: Path, arguments: list[str], problem: str
) -> None:
    pytest.importorskip("gradio")
    file = written(tmp_path / "file", "")
    names = {"FOLDER": str(tmp_path), "FILE": str(file)}
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
        problem = problem.replace(name, path)
    told = told_before_the_imports("app", arguments)
    assert told.startswith(f"error: {problem}") and told.count("\n") == 1


def test_a_taken_port_is_told_before_the_imports() -> None:
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        told = told_before_the_imports("app", ["--server_port", str(port)])
    assert told.startswith(f"error: can't listen on 127.0.0.1:{port} (") and "choose another --server_port\n" in told
    check_port_is_free("127.0.0.1", port)
    check_port_is_free("localhost", port)
