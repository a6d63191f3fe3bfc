"""Writing a pipeline as one checkpoint in the layout of the original Stable Diffusion code."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from svft_diffusion.errors import UserError
from svft_diffusion.exchange.single_file_names import WRITTEN_COMPONENTS, original_tensors
from svft_diffusion.files.whole_files import allow_as_usual, check_output_file
from svft_diffusion.models.loading import without_loading_bars


def write_single_file(
    pipeline: DiffusionPipeline, file: Path, *, metadata: Mapping[str, str], overwrite: bool = False
) -> Path:
    """Write the U-Net, the VAE and the text encoders of a pipeline into one file, whole or not at all.

    Before the file is put in place, diffusers' own ``from_single_file`` must read exactly the pipeline's weights out
    of it. The tokenizers, the scheduler's settings and a safety checker have no place in such a file.

    Neither step makes a second copy of the pipeline in memory: safetensors (0.8) writes the tensors from where they
    are, and they are compared with the mapped file.

    Raises:
        UserError: there is such a file and ``overwrite`` is off, the pipeline has no such layout, the installed
            diffusers reads something else, or the file can't be written. What was there stays as it was.
    """
    check_output_file(file, overwrite=overwrite)
    tensors = original_tensors(pipeline)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Windows removes no file that is mapped, as it is while an error on its way out holds what was read.
        with tempfile.TemporaryDirectory(
            prefix=f".{file.name}.", dir=file.parent, ignore_cleanup_errors=True
        ) as folder:
            unfinished = Path(folder) / "unfinished.safetensors"  # diffusers goes by the ending
            save_file(tensors, unfinished, {"format": "pt", **metadata})
            del tensors
            _check_read_back(pipeline, unfinished)
            gc.collect()  # nor does it move one
            allow_as_usual([unfinished], Path(folder))
            os.replace(unfinished, file)
    except (OSError, SafetensorError) as problem:
        raise UserError(f"can't write {file}: {getattr(problem, 'strerror', None) or problem}") from problem
    return file


def _check_read_back(pipeline: DiffusionPipeline, file: Path) -> None:
    written = {name: model for name in WRITTEN_COMPONENTS if (model := getattr(pipeline, name, None)) is not None}
    others = {name: part for name, part in pipeline.components.items() if name not in written}
    configs = file.with_name("configs")
    pipeline.save_config(configs)
    for name, model in written.items():
        save = model.save_config if hasattr(model, "save_config") else model.config.save_pretrained
        save(configs / name)
    try:
        with without_loading_bars():
            read = type(pipeline).from_single_file(str(file), config=str(configs), local_files_only=True, **others)
    except Exception as problem:  # whatever its converter stumbles over
        raise _unreadable(str(problem).strip().partition("\n")[0] or type(problem).__name__) from problem
    for name, model in written.items():
        if not _equal(model, getattr(read, name)):
            raise _unreadable(f"other weights in the {name}")


def _equal(model: nn.Module, read: nn.Module) -> bool:
    expected, found = model.state_dict(), read.state_dict()
    return expected.keys() == found.keys() and all(
        found[name].device.type != "meta" and torch.equal(found[name].to(tensor.dtype), tensor)
        for name, tensor in expected.items()
    )


def _unreadable(reason: str) -> UserError:
    return UserError(
        f"diffusers {diffusers.__version__} does not read the single file back as it was written ({reason}); "
        "name a folder as the output"
    )
