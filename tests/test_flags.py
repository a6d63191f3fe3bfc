"""Flags take underscores and hyphens, in every command, and are shown in one spelling."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import svft_diffusion
from svft_diffusion.app.config import AppConfig
from svft_diffusion.cli.arguments import Parser, add_settings
from svft_diffusion.cli.main import COMMANDS, run_command
from svft_diffusion.sampling.config import SamplingConfig
from svft_diffusion.settings import settings_of
from svft_diffusion.training.config import TrainingConfig


def parser_of(config_class: type) -> Parser:
    parser = Parser(prog="program")
    add_settings(parser, config_class)
    return parser


@pytest.mark.parametrize("config_class", [TrainingConfig, SamplingConfig, AppConfig])
def test_every_flag_may_be_typed_with_hyphens(config_class: type) -> None:
    parser = parser_of(config_class)
    for item in settings_of(config_class):
        value = item.choices[0] if item.choices else "3"
        values = [] if item.kind is bool else [value]
        underscores = vars(parser.parse_args([f"--{item.name}", *values]))
        hyphens = vars(parser.parse_args([f"--{item.name.replace('_', '-')}", *values]))
        assert underscores == hyphens and list(hyphens) == [item.name]


@pytest.mark.parametrize("flag", ["--no-cache_latents", "--no-cache-latents", "--no_cache_latents"])
def test_a_switch_may_be_denied_in_every_spelling(flag: str) -> None:
    assert vars(parser_of(TrainingConfig).parse_args([flag])) == {"cache_latents": False}


def test_a_value_keeps_its_spelling() -> None:
    parser = parser_of(SamplingConfig)
    options = parser.parse_args(["--negative-prompt=two-part =num-images", "--prompt", "a num-images", "-1", "num-i"])
    assert options.negative_prompt == "two-part =num-images"
    assert options.prompt == ["a num-images", "-1", "num-i"]


def test_what_follows_two_hyphens_is_no_flag() -> None:
    parser = Parser(prog="program")
    parser.add_argument("--num_images", type=int)
    parser.add_argument("files", nargs="*")
    options = parser.parse_args(["--num-images", "2", "--", "--num-images", "a-b"])
    assert options.num_images == 2 and options.files == ["--num-images", "a-b"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--num_imges", "--num_images"),
        ("--num-imges", "--num_images"),
        ("--num-imges=3", "--num_images"),
        ("--guidance-scal", "--guidance_scale"),
    ],
)
def test_an_unknown_flag_names_the_nearest(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser_of(SamplingConfig).parse_args([typed])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"unknown argument {typed}, did you mean {meant!r}?" in message


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_one_spelling(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(command, ["--help"])
    assert ended.value.code == 0
    flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out)
    assert flags and not [flag for flag in flags if "-" in flag[2:].removeprefix("no-")]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE, and other error numbers for it")
def test_a_reader_that_has_seen_enough_ends_the_command_quietly(tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text("def run(argv):\n    print('line\\n' * 100_000)\n", encoding="utf-8")
    program = (
        "import sys; from svft_diffusion.cli import main; main.COMMANDS['noisy'] = ('noisy', ''); "
        "sys.exit(main.main(['noisy']))"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(svft_diffusion.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_empty_path_is_not_the_current_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:  # as of "$OUT" with no such variable
        run_command("train", ["--instance_data_dir", "photos", "--instance_prompt", "a dog", "--output_dir", ""])
    assert ended.value.code == 2 and "argument --output_dir: invalid path value: ''" in capsys.readouterr().err
