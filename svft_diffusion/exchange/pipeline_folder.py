"""Writing a pipeline as a folder that diffusers loads, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from svft_diffusion.errors import UserError
from svft_diffusion.files.whole_files import allow_as_usual, check_writable
from svft_diffusion.models.loading import without_loading_bars

CARD_FILE = "README.md"
_INDEX_FILE = "model_index.json"


def check_output_folder(folder: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output that is there, unless it may be overwritten and is a pipeline's folder and nothing else.

    Args:
        folder: the output.
        overwrite: whether a pipeline may be replaced.
        inputs: files and folders that are read, which the output must neither be nor hold.

    Raises:
        UserError: as said, or the folder can't be written.
    """
    if folder.is_file():
        raise UserError(f"the output {folder} is a file; name a folder, or a file that ends in .safetensors")
    for given in inputs:
        if given.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"the output {folder} is or holds {given}, which is read; write to another folder")
    if folder.is_dir():
        if not overwrite:
            raise UserError(f"{folder} is there already; choose another name, or replace it with --overwrite")
        _check_is_pipeline(folder)
    check_writable(folder.parent)


def write_pipeline_folder(pipeline: DiffusionPipeline, folder: Path, *, card: str, overwrite: bool = False) -> Path:
    """Save a pipeline with its card into a folder beside the target, which takes the target's place when complete.

    Raises:
        UserError: see `check_output_folder`, or the disk is full. An older folder is as it was then.
    """
    check_output_folder(folder, overwrite=overwrite)
    target = folder.resolve()
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    _forget_origin(pipeline)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with without_loading_bars():
            pipeline.save_pretrained(unfinished)
        (unfinished / CARD_FILE).write_text(card, encoding="utf-8")
        allow_as_usual([entry for entry in unfinished.rglob("*") if entry.is_file()], unfinished)
        _replace(target, unfinished)
    except (OSError, SafetensorError) as problem:
        raise UserError(f"can't write {folder}: {getattr(problem, 'strerror', None) or problem}") from problem
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already when all went well
    return folder


def _check_is_pipeline(folder: Path) -> None:
    try:
        index = json.loads((folder / _INDEX_FILE).read_text(encoding="utf-8"))
        components = set(index)
    except (OSError, ValueError, TypeError):
        raise UserError(f"{folder} is no diffusers pipeline, so it is not overwritten; name another folder") from None
    others = sorted({entry.name for entry in folder.iterdir()} - components - {_INDEX_FILE, CARD_FILE})
    if others:
        raise UserError(f"{folder} also holds {others[0]}, which would be lost; move it, or name another folder")


def _replace(target: Path, unfinished: Path) -> None:
    """Two steps, since no system replaces a folder that is not empty in one; the old one waits beside until then."""
    previous = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    replaces = target.exists()
    if replaces:
        os.rename(target, previous)
    try:
        os.rename(unfinished, target)
    except BaseException:
        if replaces:
            os.rename(previous, target)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _forget_origin(pipeline: DiffusionPipeline) -> None:
    """Take out of the settings where the parts were loaded from, a folder of this machine, which they would save."""
    for part in (pipeline, *pipeline.components.values()):
        if hasattr(part, "register_to_config"):
            part.register_to_config(_name_or_path="")
        elif hasattr(getattr(part, "config", None), "_name_or_path"):
            part.config._name_or_path = ""
