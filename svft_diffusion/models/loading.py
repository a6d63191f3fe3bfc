"""Finding and loading a base model: the embedded one, a diffusers folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from svft_diffusion.errors import UserError
from svft_diffusion.toybox import WEIGHTS_FOLDER

EMBEDDED_MODEL = "toybox"
"""The name of the model that lies inside this package."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_base(name: str) -> str:
    """What `DiffusionPipeline.from_pretrained` takes for the base model ``name``.

    ``toybox`` is the embedded model (write ``./toybox`` for a folder of that name), a folder must hold a diffusers
    pipeline, and anything else that can be the name of a Hub repository is one.

    Raises:
        UserError: a folder that is not there or holds no pipeline, a file, or no possible name.
    """
    if name == EMBEDDED_MODEL:
        if not (WEIGHTS_FOLDER / "model_index.json").is_file():
            raise UserError("the embedded model 'toybox' is missing from this installation; install the package again")
        return str(WEIGHTS_FOLDER)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"{name} holds no model_index.json, so it is no diffusers pipeline folder")
        return str(path)
    if path.is_file():
        raise UserError(f"{name} is a file; give the folder of a diffusers pipeline (convert single-file checkpoints)")
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"no such base model folder: {name!r}")
    return name


def load_pipeline(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
) -> DiffusionPipeline:
    """The base model's pipeline on the CPU, every component in ``dtype``, its safety checker kept if it has one.

    Args:
        name: see `resolve_base`.
        revision: branch, tag or commit of a Hub repository.
        variant: file variant, such as ``fp16``.
        local_files_only: never ask the Hub; use what was downloaded before.

    Raises:
        UserError: one line for a model that is missing, gated, incomplete or without safetensors weights.
    """
    source = resolve_base(name)
    try:
        with without_loading_bars():
            return DiffusionPipeline.from_pretrained(
                source,
                # Named for every component: transformers would otherwise keep the precision of the files.
                dtype=dtype,
                revision=revision,
                variant=variant,
                local_files_only=local_files_only,
                use_safetensors=True,
            )
    # The last ones come from an index that is no pipeline's.
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(_why_not_loaded(base_display_name(name), error)) from error


def default_resolution(pipeline: DiffusionPipeline) -> int:
    """Height and width in pixels at which the base model was made to draw."""
    return int(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)


def base_display_name(name: str) -> str:
    """The base model's name for cards and file headers: never the path of a folder on this machine."""
    path = Path(name).expanduser()
    if name == EMBEDDED_MODEL or not (path.is_absolute() or name.startswith((".", "~")) or path.is_dir()):
        return name
    return Path(os.path.abspath(path)).name


def hub_name(name: str) -> str | None:
    """The base model's name on the Hub; None for one that is not there: the embedded one, or a local folder."""
    return None if name == EMBEDDED_MODEL or Path(name).expanduser().is_dir() else name


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """No bar for each component that is read from disk or written to it (downloads keep theirs)."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def truncated_text(pipeline: DiffusionPipeline, prompt: str) -> str:
    """The end of a prompt that is longer than the pipeline's text encoder reads, or nothing."""
    tokenizer = pipeline.tokenizer
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    # Two places belong to the start and end tokens.
    text: str = tokenizer.decode(ids[tokenizer.model_max_length - 2 :]).strip()
    return text


def _why_not_loaded(name: str, error: BaseException) -> str:
    """One line on why loading failed, from the innermost known cause."""
    causes = list(_chain(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{name} is gated: accept its terms on the Hugging Face Hub, then log in with `hf auth login`"
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"{name} has no such revision"
    if any(isinstance(cause, RepositoryNotFoundError | HFValidationError) for cause in causes):
        return f"{name}: no such folder here and no such model on the Hugging Face Hub (or it is private)"
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes) or "not fully cached" in str(error):
        return f"{name}: no such folder, and the Hugging Face Hub can't be reached to download a model of that name"
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if any(isinstance(cause, EntryNotFoundError) for cause in causes):
        return f"{name} lacks a file that a pipeline needs: {first_line}"
    return f"the base model {name} can't be loaded: {first_line}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
