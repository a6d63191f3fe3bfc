"""Finding and loading a base model: the embedded one, a diffusers folder, a single file, or a repository of the Hub."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from svft_diffusion.errors import UserError
from svft_diffusion.models.single_file import left_out_components, load_single_file, settings_on_the_hub
from svft_diffusion.models.vae import use_vae
from svft_diffusion.settings import nearest_hint
from svft_diffusion.terminal import printable
from svft_diffusion.toybox import WEIGHTS_FOLDER

EMBEDDED_MODEL = "toybox"
"""The name of the model that lies inside this package."""

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_base(name: str, base_config: str | Path | None = None) -> str:
    """The folder, file or name on the Hub that the base model ``name`` is loaded from.

    ``toybox`` is the embedded model (write ``./toybox`` for a folder of that name), a folder must hold a diffusers
    pipeline, a file must be a checkpoint in safetensors format, and anything else that can be the name of a Hub
    repository is one.

    Args:
        base_config: for a single file: a pipeline folder with the settings and tokenizers that the file lacks.

    Raises:
        UserError: a folder that is not there or holds no pipeline, another file, no possible name, or a
            ``base_config`` that is no such folder or has no use.
    """
    if name != EMBEDDED_MODEL:
        _check_name(name)
    if base_config is not None:
        if not (Path(base_config).expanduser() / "model_index.json").is_file():
            raise UserError(f"--base_config {base_config} is no folder of a diffusers pipeline (with model_index.json)")
        if not is_single_file(name):
            raise UserError(f"--base_config has no effect on {base_display_name(name)}, which is no single file")
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
        if path.suffix.lower() in _PICKLES:
            raise UserError(
                f"{name} is a pickle, which can run any code when it is opened; get the same model as .safetensors"
            )
        if not is_single_file(name):
            raise UserError(f"{name} is no base model: give a diffusers folder or a checkpoint in .safetensors format")
        return str(path)
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"no such base model folder: {name!r}")
    if "/" not in name and (hint := nearest_hint(name.lower(), [EMBEDDED_MODEL])):
        raise UserError(f"no such base model folder: {name!r}{hint}")  # before the Hub is asked for it, again and again
    return name


def _check_name(name: str) -> None:
    """Raise `UserError` for a name that the system can't even look for."""
    try:
        Path(name).expanduser().stat()
    except FileNotFoundError:
        return
    except (OSError, RuntimeError, ValueError) as problem:  # RuntimeError: the home of an unknown user
        if getattr(problem, "errno", None) == errno.ENOTDIR:
            return
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(f"no such base model folder: {printable(name, 80)}: {reason}") from None


def load_pipeline(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    base_config: str | Path | None = None,
    vae: str | None = None,
) -> DiffusionPipeline:
    """The base model's pipeline on the CPU, every component in ``dtype``, its safety checker kept if it has one.

    Args:
        name: see `resolve_base`.
        revision: branch, tag or commit of a Hub repository.
        variant: file variant, such as ``fp16``.
        local_files_only: never ask the Hub; use what was downloaded before.
        base_config: see `resolve_base`; without it, diffusers knows where on the Hub a file's settings are.
        vae: the folder or Hub name of another VAE for it, see `use_vae`.

    Raises:
        UserError: one line for a model that is missing, gated, incomplete or without safetensors weights.
    """
    source = resolve_base(name, base_config)
    try:
        with without_loading_bars():
            if is_single_file(name):
                pipeline = load_single_file(source, base_config, dtype=dtype, local_files_only=local_files_only)
            else:
                pipeline = DiffusionPipeline.from_pretrained(
                    source,
                    # Named for every component: transformers would otherwise keep the precision of the files.
                    dtype=dtype,
                    revision=revision,
                    variant=variant,
                    local_files_only=local_files_only,
                    use_safetensors=True,
                    **left_out_components(_index_folder(source, revision, local_files_only)),
                )
    # What is no Hub error comes from an index or a file that is no pipeline's.
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(_why_not_loaded(base_display_name(name), error)) from error
    if vae is not None:
        try:
            with without_loading_bars():
                use_vae(pipeline, vae, dtype=dtype, local_files_only=local_files_only)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(_why_not_loaded(f"the VAE {base_display_name(vae)}", error)) from error
    return pipeline


def _index_folder(source: str, revision: str | None, local_files_only: bool) -> Path:
    """The local folder with the ``model_index.json`` of a folder or of a repository of the Hub, where there is one."""
    if Path(source).is_dir():
        return Path(source)
    try:
        index = hf_hub_download(source, "model_index.json", revision=revision, local_files_only=local_files_only)
    except LocalEntryNotFoundError:
        raise  # nothing else of it would be found either
    except (OSError, ValueError):
        return Path(source)  # diffusers says what is wrong
    return Path(index).parent


@functools.cache
def stored_pipeline_class(
    name: str, *, base_config: str | Path | None = None, revision: str | None = None
) -> str | None:
    """What diffusers calls the pipeline of a base model, before it is loaded; None where that is not to be had.

    Raises:
        UserError: as `resolve_base`.
    """
    source = resolve_base(name, base_config)
    try:
        if is_single_file(name):
            source = settings_on_the_hub(source) if base_config is None else str(Path(base_config).expanduser())
        index = _index_folder(source, revision, local_files_only=False) / "model_index.json"
        found = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, LookupError, TypeError, SafetensorError):  # loading says what is wrong
        return None
    return found if isinstance(found, str) else None


def default_resolution(pipeline: DiffusionPipeline) -> int:
    """Height and width in pixels at which the base model was made to draw."""
    denoiser = getattr(pipeline, "unet", None)
    # Flux's transformer takes any size; its pipeline has a default, as that of SD 3 has.
    size = denoiser.config.sample_size if denoiser is not None else pipeline.default_sample_size
    return int(size * pipeline.vae_scale_factor)


def is_single_file(name: str) -> bool:
    """Whether the base model ``name`` is a checkpoint in one file, with the weights of all components."""
    path = Path(name).expanduser()
    return name != EMBEDDED_MODEL and path.suffix.lower() == ".safetensors" and path.is_file()


def base_display_name(name: str) -> str:
    """The base model's name for cards and file headers: never a path on this machine."""
    path = Path(name).expanduser()
    if name == EMBEDDED_MODEL or not (path.is_absolute() or name.startswith((".", "~")) or path.exists()):
        return name
    return Path(os.path.abspath(path)).name


def hub_name(name: str) -> str | None:
    """The base model's name on the Hub; None for one that is not there: the embedded one, a local folder or file."""
    return None if name == EMBEDDED_MODEL or Path(name).expanduser().exists() else name


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
