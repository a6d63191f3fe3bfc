"""The example inputs and scripts in ``samples/sampling``, on the embedded model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_sampling_memory import write_adapters

from svft_diffusion.cli.main import run_command
from svft_diffusion.models.loading import load_pipeline
from svft_diffusion.sampling.png import read_png_settings

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the examples, with an adapter where the demo puts it."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(REPOSITORY / "samples" / "sampling", folder / "samples" / "sampling")
    adapter = folder / "outputs" / "demo" / "adapter.safetensors"
    adapter.parent.mkdir(parents=True)
    write_adapters(load_pipeline("toybox"), folder)[0].rename(adapter)
    return folder


def run_script(folder: Path, program: list[str], script: str) -> list[Path]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": path}
    arguments = [f"samples/sampling/{script}", "outputs/demo/adapter.safetensors", "outputs/out"]
    command = [*program, *arguments]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return sorted((folder / "outputs" / "out").glob("*_seed*.png"))


def test_matrix(folder: Path) -> None:
    flags = ["--num_inference_steps", "2", "--seed", "0", "--device", "cpu", "--output_dir", str(folder / "matrix")]
    assert run_command("sample", ["--matrix", str(folder / "samples" / "sampling" / "matrix.yaml"), *flags]) == 0
    pictures = sorted((folder / "matrix").glob("*_seed*.png"))
    assert len({picture.read_bytes() for picture in pictures}) == 12
    assert {read_png_settings(picture)["prompt"] for picture in pictures} == {
        "a photo of sks robot on the beach",
        "a photo of sks robot in the snow",
    }


def test_csv(folder: Path) -> None:
    flags = ["--num_inference_steps", "1", "--device", "cpu", "--output_dir", str(folder / "csv")]
    flags += ["--adapter", str(folder / "outputs" / "demo" / "adapter.safetensors")]
    assert run_command("sample", ["--prompts", str(folder / "samples" / "sampling" / "prompts.csv"), *flags]) == 0
    names = sorted(file.name for file in (folder / "csv").glob("*_seed*.png"))
    assert names == ["beach_seed0.png", "beach_seed1.png", "snow_seed7.png"]
    assert read_png_settings(folder / "csv" / "snow_seed7.png")["negative_prompt"] == "blue"


@pytest.mark.slow
def test_python_script(folder: Path) -> None:
    assert len(run_script(folder, [sys.executable], "sample.py")) == 4


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_shell_script(folder: Path) -> None:
    shutil.rmtree(folder / "outputs" / "out", ignore_errors=True)
    assert len(run_script(folder, ["sh"], "sample.sh")) == 6
