"""`svft-diffusion merge`: what is refused in one line, with nothing lost and nothing left behind."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from adapter_files import ModelsOnDisk, write_models
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from tiny_models import tiny_pipeline

from svft_diffusion.cli.main import main
from svft_diffusion.errors import UserError
from svft_diffusion.exchange import pipeline_folder, single_file, single_file_names
from svft_diffusion.exchange.pipeline_folder import write_pipeline_folder
from svft_diffusion.exchange.single_file import write_single_file

OUTPUTS = ("merged", "merged.safetensors")
either_output = pytest.mark.parametrize("name", OUTPUTS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    return write_models(tmp_path_factory.mktemp("models"))


def contents(folder: Path) -> dict[str, str]:
    """Everything in a folder, hidden files too, by path and content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says when it refuses; in one line, and with exit code 2."""
    assert main(["merge", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert printed.err.rstrip().endswith(lines[-1])
    return lines[-1]


@either_output
def test_what_is_there_is_replaced_only_when_asked(
    name: str, models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / name
    assert main(["merge", str(models.dog), "--base", str(models.base), "-o", str(output)]) == 0
    first = contents(tmp_path)
    capsys.readouterr()
    said = refusal(capsys, models.style, "--base", models.base, "-o", output)
    assert said == f"error: {output} is there already; choose another name, or replace it with --overwrite"
    assert contents(tmp_path) == first
    assert main(["merge", str(models.style), "--base", str(models.base), "-o", str(output), "--overwrite"]) == 0
    second = contents(tmp_path)
    assert second.keys() == first.keys()
    assert second != first


def test_a_folder_that_is_no_pipeline_is_never_replaced(
    models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "dog.jpg").write_bytes(b"dog")
    said = refusal(capsys, models.dog, "--base", models.base, "-o", photos, "--overwrite")
    assert "photos is no diffusers pipeline, so it is not overwritten" in said
    pipeline = tmp_path / "pipeline"
    shutil.copytree(models.base, pipeline)
    (pipeline / "dog.jpg").write_bytes(b"dog")
    before = contents(tmp_path)
    said = refusal(capsys, models.dog, "--base", models.base, "-o", pipeline, "--overwrite")
    assert "also holds dog.jpg, which would be lost" in said
    assert contents(tmp_path) == before


def test_what_is_read_is_not_written_to(
    models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(models.base, base)
    dog = shutil.copy(models.dog, base / "dog.safetensors")
    before = contents(tmp_path)
    assert "is or holds" in refusal(capsys, models.dog, "--base", base, "-o", base, "--overwrite")
    assert "is or holds" in refusal(capsys, dog, "--base", models.base, "-o", base, "--overwrite")
    assert "one of the files to read" in refusal(capsys, dog, "--base", base, "-o", dog, "--overwrite")
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    assert "one of the files to read" in refusal(capsys, models.dog, "--base", base, "-o", weights, "--overwrite")
    assert contents(tmp_path) == before


@either_output
@pytest.mark.usefixtures("no_hub")
def test_adapters_and_outputs_that_do_not_fit(
    name: str, models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / name
    of_base = ("--base", models.base, "-o", output)
    assert "was trained on the base tiny" in refusal(capsys, models.foreign, *of_base)
    assert "gone.safetensors" in refusal(capsys, tmp_path / "gone.safetensors", *of_base)
    assert "is not a number" in refusal(capsys, f"{models.dog}:strong", *of_base)
    assert "no component 'text_encoder_2'" in refusal(capsys, f"{models.dog}:te2=0.5", *of_base)
    assert "say with --base where the base model is" in refusal(capsys, models.dog, "-o", output)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "can't write to" in refusal(capsys, models.dog, "--base", models.base, "-o", blocked / name)
    ckpt = tmp_path / "model.ckpt"
    assert "ends in .safetensors" in refusal(capsys, models.dog, "--base", models.base, "-o", ckpt)
    assert "name a folder" in refusal(capsys, models.dog, "--base", models.base, "-o", blocked, "--overwrite")
    assert contents(tmp_path).keys() == {"file"}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk with no room for larger files."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are a thing of POSIX")
@either_output
def test_a_full_disk_leaves_what_was_there(
    name: str, models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / name
    assert main(["merge", str(models.dog), "--base", str(models.base), "-o", str(output)]) == 0
    before = contents(tmp_path)
    capsys.readouterr()
    with largest_file(100_000):
        said = refusal(capsys, models.style, "--base", models.base, "-o", output, "--overwrite")
    assert said.startswith(f"error: can't write {output}: ")
    assert contents(tmp_path) == before


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "merged"
    write_pipeline_folder(tiny_pipeline(), output, card="old")
    before = contents(tmp_path)
    rename = pipeline_folder.os.rename

    def refuse_unfinished(source: Path, target: Path) -> None:
        if source.suffix == ".tmp":
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(pipeline_folder.os, "rename", refuse_unfinished)
    with pytest.raises(UserError, match=r"can't write .*: Permission denied"):
        write_pipeline_folder(tiny_pipeline(1), output, card="new", overwrite=True)
    assert contents(tmp_path) == before


# Single files

_CHANGES = {
    "two layers exchanged": ("_RESNET", "conv1", "out_layers.3", "conv2", "in_layers.2"),
    "a layer that the reader does not know": ("_RESNET", "conv1", "in_layers.7", None, None),
    "two norms exchanged": ("_OPEN_CLIP_LAYERS", "layer_norm1", "ln_2", "layer_norm2", "ln_1"),
    "a projection lost": ("_VAE_ATTENTION_LAYERS", "to_q", "k", None, None),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_a_file_that_diffusers_reads_otherwise_is_not_put_in_place(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline()
    pipe.text_encoder.config.hidden_act = "gelu"  # OpenCLIP's names
    for parameter in pipe.text_encoder.parameters():  # norms that differ
        torch.nn.init.normal_(parameter)
    output = tmp_path / "merged.safetensors"
    write_single_file(pipe, output, metadata={})
    before = contents(tmp_path)
    table, *changes = _CHANGES[change]
    for name, renamed in zip(changes[::2], changes[1::2], strict=True):
        if name is not None:
            monkeypatch.setitem(getattr(single_file_names, table), name, renamed)
    with pytest.raises(UserError, match="does not read the single file back as it was written"):
        write_single_file(pipe, output, metadata={}, overwrite=True)
    assert contents(tmp_path) == before


def test_one_wrong_number_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = single_file.original_tensors

    def one_wrong(pipeline: object) -> dict[str, torch.Tensor]:
        tensors = original(pipeline)  # type: ignore[arg-type]
        name = "model.diffusion_model.out.2.bias"
        return {**tensors, name: tensors[name] + 1e-6}

    monkeypatch.setattr(single_file, "original_tensors", one_wrong)
    with pytest.raises(UserError, match="other weights in the unet"):
        write_single_file(tiny_pipeline(), tmp_path / "merged.safetensors", metadata={})
    assert contents(tmp_path) == {}


def test_pipelines_that_a_single_file_can_not_hold(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    with_controlnet = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=ControlNetModel.from_unet(pipe.unet), requires_safety_checker=False
    )
    with pytest.raises(UserError, match="a StableDiffusionControlNetPipeline can't be written as a single file"):
        write_single_file(with_controlnet, tmp_path / "a.safetensors", metadata={})
    pipe.unet.register_module("extra", torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"no name for extra\.weight of this UNet2DConditionModel"):
        write_single_file(pipe, tmp_path / "a.safetensors", metadata={})
    assert contents(tmp_path) == {}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
def test_others_may_read_what_the_umask_lets_them(models: ModelsOnDisk, tmp_path: Path, output: str) -> None:
    before = os.umask(0o022)
    try:
        assert main(["merge", str(models.dog), "--base", str(models.base), "-o", str(tmp_path / output)]) == 0
    finally:
        os.umask(before)
    files = [file for file in [tmp_path / output, *tmp_path.rglob("*")] if file.is_file()]
    assert files and {file.stat().st_mode & 0o777 for file in files} == {0o644}
