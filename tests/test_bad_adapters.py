"""Every command and every bad input: one line with the remedy, exit code 2, and all files as they were."""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import ModelsOnDisk, write_models
from foreign_files import LINEAR, lora_factors, svdiff_deltas
from PIL import Image
from safetensors.torch import save_file
from sealed_files import sealed
from tiny_models import tiny_pipeline, tiny_unet

from svft_diffusion.cli.main import run_command
from svft_diffusion.files import read_adapter, write_adapter
from svft_diffusion.files.adapter_file import METADATA_KEY
from svft_diffusion.files.container import read_container
from svft_diffusion.sampling.png import save_png

Command = Callable[[Path, ModelsOnDisk, Path], list[object]]  # adapter, models, folder for outputs -> arguments

READERS: dict[str, Command] = {
    "inspect": lambda file, models, out: [file],
    "verify": lambda file, models, out: [file],
    "verify on a base": lambda file, models, out: [file, *_base(models)],
    "sample": lambda file, models, out: _sample(file, models, out),
    "app": lambda file, models, out: ["--adapter", file, "--pretrained_model_name_or_path", models.base],
    "export": lambda file, models, out: [file, *_base(models), "-o", out / "lora.safetensors"],
    "merge": lambda file, models, out: [file, *_base(models), "-o", out / "model"],
    "blend": lambda file, models, out: [file, models.dog, *_base(models), "-o", out / "blend.safetensors"],
    "shrink": lambda file, models, out: [file, "--keep", "3", *_base(models), "-o", out / "small.safetensors"],
}
WITHOUT_A_BASE = ("inspect", "verify")
WRITERS: dict[str, Callable[[ModelsOnDisk, Path], list[object]]] = {
    "export": lambda models, target: [models.dog, *_base(models), "-o", target],
    "merge": lambda models, target: [models.dog, *_base(models), "-o", target],
    "blend": lambda models, target: [models.dog, models.dog, *_base(models), "-o", target],
    "shrink": lambda models, target: [models.dog, "--keep", "3", *_base(models), "-o", target],
    "import": lambda models, target: [models.base.parent / "lora.safetensors", *_base(models), "-o", target],
}


def _base(models: ModelsOnDisk) -> list[object]:
    return ["--base", models.base]


def _sample(file: Path, models: ModelsOnDisk, out: Path) -> list[object]:
    settings = ["--prompt", "a dog", "--num_inference_steps", 1, "--device", "cpu", "--output_dir", out / "pictures"]
    return ["--adapter", file, "--pretrained_model_name_or_path", models.base, *settings]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    written = write_models(tmp_path_factory.mktemp("models"))
    up, down = lora_factors(tiny_pipeline(0).unet, [LINEAR[0]])[LINEAR[0]]
    lora = {f"unet.{LINEAR[0]}.lora_B.weight": up, f"unet.{LINEAR[0]}.lora_A.weight": down}
    save_file({name: tensor.contiguous() for name, tensor in lora.items()}, written.base.parent / "lora.safetensors")
    return written


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("the app started")

    monkeypatch.setattr("svft_diffusion.app.serving.launch.launch", refuse)


def rewritten(models: ModelsOnDisk, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """An adapter whose header was changed by somebody who knows how: its digest is right."""
    content = read_container(models.dog.read_bytes(), "dog")
    tensors = read_adapter(models.dog)[1]
    fields = json.loads(content.metadata[METADATA_KEY])
    change(fields)
    target.write_bytes(sealed(tensors, {**content.metadata, METADATA_KEY: json.dumps(fields)}))
    return target


def with_tensors(models: ModelsOnDisk, target: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """An adapter whose first tensor of values was changed, with a digest that is right."""
    content = read_container(models.dog.read_bytes(), "dog")
    tensors = dict(read_adapter(models.dog)[1])
    name = next(name for name in sorted(tensors) if name.endswith(".values"))
    tensors[name] = change(tensors[name])
    target.write_bytes(sealed(tensors, content.metadata))
    return target


def written(target: Path, content: bytes) -> Path:
    target.write_bytes(content)
    return target


def _empty_folder(models: ModelsOnDisk, folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def _folder_of_adapters(models: ModelsOnDisk, folder: Path) -> Path:
    (folder / "adapters").mkdir()
    (folder / "adapters" / "style.safetensors").write_bytes(models.style.read_bytes())
    return folder / "adapters"


def _flipped(models: ModelsOnDisk, folder: Path) -> Path:
    content = bytearray(models.dog.read_bytes())
    content[-40] ^= 16
    return written(folder / "flipped.safetensors", bytes(content))


def _newer(models: ModelsOnDisk, folder: Path) -> Path:
    return rewritten(models, folder / "newer.safetensors", lambda fields: fields.update(format_version=99, news=[1]))


def _larger(models: ModelsOnDisk, folder: Path) -> Path:
    header, tensors = read_adapter(models.dog)
    name = next(name for name in sorted(tensors) if name.endswith(".values"))
    return write_adapter(folder / "larger.safetensors", header, {**tensors, name: torch.ones(len(tensors[name]) + 1)})


def _nan(models: ModelsOnDisk, folder: Path) -> Path:
    return with_tensors(models, folder / "nan.safetensors", lambda values: values * float("nan"))


def _matrix(models: ModelsOnDisk, folder: Path) -> Path:
    return with_tensors(models, folder / "matrix.safetensors", lambda values: values[None])


def _lora(models: ModelsOnDisk, folder: Path) -> Path:
    return written(folder / "lora.safetensors", (models.base.parent / "lora.safetensors").read_bytes())


def _picture(models: ModelsOnDisk, folder: Path, *contents: bytes) -> Path:
    return save_png(Image.new("RGB", (4, 4)), folder / "picture.png", {"prompt": "a dog"}, contents)


BadInput = tuple[Callable[[ModelsOnDisk, Path], Path], str]

BAD_INPUTS: dict[str, BadInput] = {
    "missing": (lambda models, folder: folder / "missing.safetensors", "missing.safetensors.*No such file"),
    "in a missing folder": (lambda models, folder: folder / "no" / "x.safetensors", "x.safetensors.*No such file"),
    "below a file": (lambda models, folder: models.dog / "x.safetensors", "x.safetensors.*[Nn]o"),
    "empty folder": (_empty_folder, "empty is a folder; no adapter is in it"),
    "folder of adapters": (_folder_of_adapters, "adapters is a folder.*style.safetensors"),
    "empty file": (lambda models, folder: written(folder / "empty.safetensors", b""), "is empty"),
    "web page": (
        lambda models, folder: written(folder / "page.safetensors", b"<!DOCTYPE html><html>404</html>"),
        "a web page, not an adapter.*download",
    ),
    "pickle": (
        lambda models, folder: written(folder / "pickle.safetensors", pickle.dumps({"a": 1})),
        "never opened",
    ),
    "text": (lambda models, folder: written(folder / "text.safetensors", b"just some words in a file"), "safetensors"),
    "LoRA": (_lora, "not an svft_diffusion adapter.*svft-diffusion import"),
    "cut short": (
        lambda models, folder: written(folder / "cut.safetensors", models.dog.read_bytes()[:-100]),
        "cut.safetensors",
    ),
    "header alone": (
        lambda models, folder: written(folder / "header.safetensors", models.dog.read_bytes()[:200]),
        "cut short",
    ),
    "huge header": (
        lambda models, folder: written(folder / "huge.safetensors", struct.pack("<Q", 2**30) + b"{" * 99),
        "header of 1073741824 bytes",
    ),
    "a flipped bit": (_flipped, "damaged"),
    "newer version": (_newer, "format version 99.*update svft_diffusion"),
    "NaN": (_nan, "NaN or infinite"),
    "a matrix of values": (_matrix, "must be one row"),
    "picture without adapter": (_picture, "carries no adapter"),
    "picture with two": (
        lambda models, folder: _picture(models, folder, models.dog.read_bytes(), models.style.read_bytes()),
        "carries 2 adapters.*--extract",
    ),
    "picture with something else": (lambda models, folder: _picture(models, folder, b"<html>"), "safetensors|web page"),
}
BAD_ON_A_BASE: dict[str, BadInput] = {
    "other base": (lambda models, folder: models.foreign, "trained on the base tiny.*0 of 52"),
    "wrong shapes": (_larger, "another architecture|made for another"),
}
# What inspect is there to show.
SHOWN = {("inspect", "picture without adapter"), ("inspect", "picture with two")}
CASES = [(command, bad) for command in READERS for bad in BAD_INPUTS if (command, bad) not in SHOWN]
# The app looks at the sizes when it draws, and says so on the page.
SHOWN_LATER = {("app", "wrong shapes")}
CASES += [
    (command, bad)
    for command in READERS
    for bad in BAD_ON_A_BASE
    if command not in WITHOUT_A_BASE and (command, bad) not in SHOWN_LATER
]


def contents_of(*folders: Path) -> dict[Path, bytes | None]:
    return {
        file: file.read_bytes() if file.is_file() else None
        for folder in folders
        for file in [folder, *folder.rglob("*")]
    }


def refused(command: str, arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command ends."""
    capsys.readouterr()
    code = run_command(command.split()[0], [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert len(captured.err) < 700 and "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize(("command", "bad"), CASES, ids=[" - ".join(case) for case in CASES])
def test_a_bad_adapter_is_refused(
    models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, bad: str
) -> None:
    make, reason = (BAD_INPUTS | BAD_ON_A_BASE)[bad]
    file = make(models, tmp_path)
    before = contents_of(tmp_path, models.base.parent)
    message = refused(command, READERS[command](file, models, tmp_path / "out"), capsys)
    assert re.search(reason, message), message
    assert contents_of(tmp_path, models.base.parent) == before


@pytest.mark.parametrize("command", [command for command in READERS if command != "app"])
def test_a_training_folder_is_the_adapter_in_it(
    models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    arguments = READERS[command](models.dog.parent, models, tmp_path / "out")
    assert run_command(command.split()[0], [str(argument) for argument in arguments]) == 0, capsys.readouterr()


FOREIGN: dict[str, BadInput] = {
    **{name: BAD_INPUTS[name] for name in ("missing", "empty file", "web page", "pickle", "text", "huge header")},
    "folder": BAD_INPUTS["folder of adapters"],
    "ours": (lambda models, folder: models.dog, "adapter already"),
    "other base": (
        lambda models, folder: _other_svdiff(folder),
        "another base|no layer|made for",
    ),
}


def _other_svdiff(folder: Path) -> Path:
    save_file(svdiff_deltas(tiny_unet(block_out_channels=(8, 24))), folder / "other.safetensors")
    return folder / "other.safetensors"


@pytest.mark.parametrize("bad", FOREIGN)
def test_a_bad_file_is_not_imported(
    models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    make, reason = FOREIGN[bad]
    file = make(models, tmp_path)
    before = contents_of(tmp_path, models.base.parent)
    message = refused("import", [file, "--base", models.base, "-o", tmp_path / "out" / "x.safetensors"], capsys)
    assert re.search(reason, message), message
    assert contents_of(tmp_path, models.base.parent) == before


# Outputs


@pytest.mark.parametrize("command", WRITERS)
def test_an_output_below_a_file_is_refused(
    models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    before = contents_of(tmp_path, models.base.parent)
    message = refused(command, WRITERS[command](models, tmp_path / "file" / "x.safetensors"), capsys)
    assert "can't write" in message
    assert contents_of(tmp_path, models.base.parent) == before


@pytest.mark.parametrize("command", WRITERS)
def test_an_output_that_is_there_stays(
    models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"mine")
    before = contents_of(tmp_path, models.base.parent)
    message = refused(command, WRITERS[command](models, tmp_path / "x.safetensors"), capsys)
    assert "--overwrite" in message
    assert contents_of(tmp_path, models.base.parent) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("command", WRITERS)
def test_an_input_is_no_output(
    models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, overwrite: bool
) -> None:
    source = models.base.parent / "lora.safetensors" if command == "import" else models.dog
    before = contents_of(models.base.parent)
    refused(command, [*WRITERS[command](models, source), *(["--overwrite"] if overwrite else [])], capsys)
    assert contents_of(models.base.parent) == before


@contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """No file of this process can grow beyond ``largest`` bytes."""
    resource = pytest.importorskip("resource", reason="Windows has no limit on the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("target", ["x.safetensors", "there.safetensors"])
@pytest.mark.parametrize("command", WRITERS)
def test_a_full_disk_leaves_the_target_as_it_was(
    models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, target: str
) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    before = contents_of(tmp_path)
    arguments = [*WRITERS[command](models, tmp_path / target), "--overwrite"]
    if command == "merge":  # a tiny model is in no layout of single files
        arguments[arguments.index("-o") + 1] = tmp_path / "model"
    with full_disk(600):
        message = refused(command, arguments, capsys)
    assert "can't write" in message
    assert contents_of(tmp_path) == before


def test_a_full_disk_leaves_no_part_of_a_picture(
    models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _sample(models.dog, models, tmp_path)
    assert run_command("sample", [str(argument) for argument in arguments]) == 0
    before = contents_of(tmp_path / "pictures")
    with full_disk(600):
        code = run_command("sample", [str(argument) for argument in [*arguments, "--overwrite"]])
    assert code == 2 and "can't write" in capsys.readouterr().err
    assert contents_of(tmp_path / "pictures") == before


def test_a_full_disk_stops_the_extraction(
    models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _picture(models, tmp_path, models.dog.read_bytes())
    with full_disk(600):
        message = refused("inspect", [file, "--extract", tmp_path / "out"], capsys)
    assert "can't write" in message and list((tmp_path / "out").iterdir()) == []


def test_a_file_that_may_not_be_read_is_refused(
    models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "secret.safetensors", models.dog.read_bytes())
    opened = Path.open

    def forbidden(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == file:  # permissions alone would not stop an administrator
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", forbidden)
    message = refused("inspect", [file], capsys)
    assert "secret.safetensors" in message and "Permission denied" in message
