"""Checkpoints: a loadable adapter and the training state beside it, written whole or not at all.

``checkpoint-N/`` holds ``adapter.safetensors``, the state of the optimizer and all else that has one as safetensors and
JSON (nothing is pickled), and a manifest with the digest of every file. All randomness of training follows from seed
and step, and so does the place in the data, so there is no state of random generators and samplers to keep.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from svft_diffusion.errors import UserError
from svft_diffusion.files import read_adapter
from svft_diffusion.files.training_folder import ADAPTER_FILE
from svft_diffusion.files.whole_files import flush_to_disk

_TENSORS_FILE = "training_state.safetensors"
_STATE_FILE = "training_state.json"
_MANIFEST_FILE = "manifest.json"
_FILES = {ADAPTER_FILE, _TENSORS_FILE, _STATE_FILE}
_FORMAT_VERSION = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED_NAME = re.compile(r"\.checkpoint-\d+\.tmp")
_REPLACED_NAME = re.compile(r"\.(checkpoint-\d+)\.old")
_FILES_OF_DESKTOPS = {"desktop.ini", "Thumbs.db"}  # and hidden ones; they come without being asked


class Stateful(Protocol):
    """A piece of a run that goes on from its state: nested dicts and lists of tensors and plain values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


def existing_checkpoints(output_dir: Path) -> list[Path]:
    """The folder's checkpoints, oldest step first."""
    if not output_dir.is_dir():
        return []
    found = {path: _NAME.fullmatch(path.name) for path in output_dir.iterdir() if path.is_dir()}
    return sorted((path for path, match in found.items() if match), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Finished optimizer steps at a checkpoint, from its name."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise UserError(f"{checkpoint.name} is no checkpoint's name; they are called checkpoint-STEP")
    return int(match.group(1))


def checkpoint_named(output_dir: Path, name: str) -> tuple[Path, list[str]]:
    """The checkpoint called ``name`` in ``output_dir``, or for ``latest`` the newest that is whole.

    Returns:
        The checkpoint, and what to tell of newer ones that are damaged.

    Raises:
        UserError: it is not there (the message lists those that are), or it is damaged.
    """
    existing = existing_checkpoints(output_dir)
    if not existing:
        raise UserError(
            f"no checkpoint in {output_dir} to go on from; leave out --resume_from_checkpoint to start a new run"
        )
    if name == "latest":
        return _newest_whole(existing)
    for checkpoint in existing:
        if name == checkpoint.name or Path(name).resolve() == checkpoint.resolve():
            try:
                load_checkpoint_state(checkpoint)
            except UserError as problem:
                raise UserError(f"{problem}; resume from an earlier checkpoint, or from latest") from problem
            return checkpoint, []
    raise UserError(f"no checkpoint {name!r} in {output_dir}; there are {', '.join(path.name for path in existing)}")


def last_good_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole, if there is one."""
    try:
        return checkpoint_named(output_dir, "latest")[0]
    except UserError:
        return None


def _newest_whole(existing: list[Path]) -> tuple[Path, list[str]]:
    problems = []
    for checkpoint in reversed(existing):
        try:
            load_checkpoint_state(checkpoint)
        except UserError as problem:
            problems.append(str(problem))
        else:
            notes = [f"{problem}: going on from {checkpoint.name} instead" for problem in problems]
            return checkpoint, notes
    raise UserError(f"no checkpoint is whole: {'; '.join(problems)}; move them away to start a new run")


def save_checkpoint(
    output_dir: Path, step: int, write_adapter: Callable[[Path], object], state: dict[str, Any], limit: int | None
) -> Path:
    """Write ``checkpoint-STEP``, read it again, and then remove the oldest ones above ``limit``.

    Whenever the program is killed in the midst of this, the new checkpoint or those before it are whole.

    Args:
        write_adapter: called with the path at which to write the adapter.
        state: nested dicts and lists of tensors and plain values.

    Raises:
        UserError: it can't be written, or a value is not finite; the checkpoints are as they were then.
    """
    checkpoint = output_dir / f"checkpoint-{step}"
    unfinished = output_dir / f".checkpoint-{step}.tmp"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_adapter(unfinished / ADAPTER_FILE)
        _write_state(unfinished, step, state)
        load_checkpoint_state(unfinished, step)  # what can't be read can't be what others are removed for
        _put_in_place(unfinished, checkpoint)
    except OSError as problem:
        raise UserError(
            f"can't write {checkpoint}: {problem.strerror or problem}; the checkpoints before it are as they were"
        ) from problem
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if limit is not None:
        # Those of later steps are of another course of the run.
        for old in [path for path in existing_checkpoints(output_dir) if step_of(path) <= step][:-limit]:
            _remove(old)
    return checkpoint


def remove_leftovers(output_dir: Path) -> None:
    """Remove what killed writers of checkpoints left; one that was to be replaced, and was not, is put back."""
    if not output_dir.is_dir():
        return
    for path in list(output_dir.iterdir()):
        replaced = _REPLACED_NAME.fullmatch(path.name)
        if replaced and not (output_dir / replaced.group(1)).exists():
            with contextlib.suppress(OSError):
                os.replace(path, output_dir / replaced.group(1))
        elif replaced or _UNFINISHED_NAME.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def load_checkpoint_state(checkpoint: Path, step: int | None = None) -> dict[str, Any]:
    """The state that `save_checkpoint` was given, after comparing every file of the checkpoint with its digest.

    Args:
        step: which it must be of; by default that of the checkpoint's name.

    Raises:
        UserError: a file is missing, damaged, or none of the checkpoint's.
    """
    step = step_of(checkpoint) if step is None else step
    try:
        manifest = json.loads((checkpoint / _MANIFEST_FILE).read_text(encoding="utf-8"))
        if manifest["format_version"] != _FORMAT_VERSION:
            raise UserError(f"{checkpoint} was written by another version of this program")
        _check_files(checkpoint, manifest["files"])
        plain = json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
        tensors = load_file(checkpoint / _TENSORS_FILE)
        state: dict[str, Any] = _with_tensors(plain, tensors)
        read_adapter(checkpoint / ADAPTER_FILE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as problem:
        raise UserError(f"{checkpoint} is incomplete ({' '.join(str(problem).split())})") from problem
    if manifest.get("step") != step:
        raise UserError(f"{checkpoint} holds the state of step {manifest.get('step')}; give it its name back")
    return state


def _check_files(checkpoint: Path, digests: Mapping[str, str]) -> None:
    if digests.keys() != _FILES:
        raise ValueError("its manifest lists other files than a checkpoint has")
    for name, digest in digests.items():
        if _digest(checkpoint / name) != digest:
            raise UserError(f"{checkpoint / name} is damaged")
    present = {path.name for path in checkpoint.iterdir() if not path.name.startswith(".")}
    if foreign := sorted(present - _FILES - _FILES_OF_DESKTOPS - {_MANIFEST_FILE}):
        raise UserError(f"{checkpoint / foreign[0]} does not belong to the checkpoint; move it away")


def _write_state(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Everything but the adapter, which is there already; all of it is on the disk when this returns."""
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(state, "state", tensors)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"step {step} is not saved: {name} is not finite")
    (folder / _TENSORS_FILE).write_bytes(save(tensors))
    (folder / _STATE_FILE).write_text(json.dumps(plain), encoding="utf-8")
    manifest = {
        "format_version": _FORMAT_VERSION,
        "step": step,
        "files": {name: _digest(folder / name) for name in sorted(_FILES)},
    }
    (folder / _MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        flush_to_disk(path)


def _put_in_place(unfinished: Path, checkpoint: Path) -> None:
    """Give a checkpoint its name; an older one of the same step is there under another name until then."""
    replaced = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if checkpoint.exists():
        os.replace(checkpoint, replaced)
    try:
        os.replace(unfinished, checkpoint)
    except OSError:
        if replaced.exists():
            os.replace(replaced, checkpoint)
        raise
    flush_to_disk(checkpoint.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Take the name away first: half a checkpoint must not look like one."""
    unfinished = checkpoint.with_name(f".{checkpoint.name}.tmp")
    try:
        os.replace(checkpoint, unfinished)
    except OSError:
        return  # it can be removed the next time
    shutil.rmtree(unfinished, ignore_errors=True)


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON, with every tensor replaced by its name and put into ``tensors``.

    JSON has text as keys only and optimizers count their parameters, so a dict becomes a list of pairs.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[key, _without_tensors(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _with_tensors(plain: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(plain, list):
        return [_with_tensors(item, tensors) for item in plain]
    if isinstance(plain, dict):
        if "tensor" in plain:
            return tensors[plain["tensor"]]
        return {key: _with_tensors(item, tensors) for key, item in plain["dict"]}
    return plain


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
