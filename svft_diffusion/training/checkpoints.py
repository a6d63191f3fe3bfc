"""Checkpoints: a loadable adapter and the training state beside it, written whole or not at all.

``checkpoint-N/`` holds ``adapter.safetensors``, the optimizer's and scheduler's state as safetensors and JSON (nothing
is pickled) and a manifest with the digest of every file. All randomness of training follows from seed and step, so
there is no state of random generators to keep.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from svft_diffusion.errors import UserError
from svft_diffusion.files.training_folder import ADAPTER_FILE

_TENSORS_FILE = "training_state.safetensors"
_STATE_FILE = "training_state.json"
_MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


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


def checkpoint_named(output_dir: Path, name: str) -> Path:
    """The checkpoint called ``name`` in ``output_dir``, or the newest for ``latest``.

    Raises:
        UserError: it is not there; the message lists those that are.
    """
    existing = existing_checkpoints(output_dir)
    if name == "latest" and existing:
        return existing[-1]
    for checkpoint in existing:
        if name == checkpoint.name or Path(name).resolve() == checkpoint.resolve():
            return checkpoint
    if not existing:
        raise UserError(
            f"no checkpoint in {output_dir} to go on from; leave out --resume_from_checkpoint to start a new run"
        )
    raise UserError(f"no checkpoint {name!r} in {output_dir}; there are {', '.join(path.name for path in existing)}")


def save_checkpoint(
    output_dir: Path, step: int, write_adapter: Callable[[Path], object], state: dict[str, Any], limit: int | None
) -> Path:
    """Write ``checkpoint-STEP`` and then remove the oldest ones above ``limit``.

    Args:
        write_adapter: called with the path at which to write the adapter.
        state: nested dicts and lists of tensors and plain values.
    """
    checkpoint = output_dir / f"checkpoint-{step}"
    unfinished = output_dir / f".checkpoint-{step}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    write_adapter(unfinished / ADAPTER_FILE)
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(state, "state", tensors)
    save_file(tensors, unfinished / _TENSORS_FILE)
    (unfinished / _STATE_FILE).write_text(json.dumps(plain), encoding="utf-8")
    digests = {path.name: _digest(path) for path in sorted(unfinished.iterdir())}
    (unfinished / _MANIFEST_FILE).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    for path in (*unfinished.iterdir(), unfinished):
        _flush_to_disk(path)
    shutil.rmtree(checkpoint, ignore_errors=True)
    os.replace(unfinished, checkpoint)
    _flush_to_disk(output_dir)
    # Only now: until here the older ones were all there was.
    if limit is not None:
        # Those of later steps are of a run before this one went back; it will write over them.
        for old in [path for path in existing_checkpoints(output_dir) if step_of(path) <= step][:-limit]:
            shutil.rmtree(old)
    return checkpoint


def load_checkpoint_state(checkpoint: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` was given, after comparing every file of the checkpoint with its digest.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        digests = json.loads((checkpoint / _MANIFEST_FILE).read_text(encoding="utf-8"))
        for name, digest in digests.items():
            if _digest(checkpoint / name) != digest:
                raise UserError(f"{checkpoint / name} is damaged; resume from an earlier checkpoint")
        plain = json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
        tensors = load_file(checkpoint / _TENSORS_FILE)
        state: dict[str, Any] = _with_tensors(plain, tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as problem:
        raise UserError(f"{checkpoint} is incomplete ({problem}); resume from an earlier checkpoint") from problem
    return state


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


def _flush_to_disk(path: Path) -> None:
    """Make sure that a power cut can't take the file, or the names in the folder, away again."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle of a folder to flush
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
