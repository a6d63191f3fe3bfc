"""A tiny base model on disk with adapters for it, as the sampler and the app find them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_models import tiny_pipeline

from svft_diffusion import SVDiffConfig, SVFTConfig, save_adapter
from svft_diffusion.adapters import SpectralConfig, add_training_adapter, unload_adapter
from svft_diffusion.files import AdapterMetadata


@dataclass(frozen=True)
class ModelsOnDisk:
    """Folders of two base models, and files of adapters: two for the first base, one for the other."""

    base: Path
    other_base: Path
    dog: Path
    style: Path
    foreign: Path


def write_models(folder: Path) -> ModelsOnDisk:
    """Write base models and adapters whose effect is large enough to change every picture."""
    base, other_base = folder / "base", folder / "other-base"
    pipe, other = tiny_pipeline(0), tiny_pipeline(1)
    pipe.save_pretrained(base)
    other.save_pretrained(other_base)
    adapters = folder / "adapters"
    return ModelsOnDisk(
        base,
        other_base,
        _write_adapter(pipe, SVFTConfig(), adapters / "dog" / "adapter.safetensors", trigger="sks"),
        _write_adapter(pipe, SVDiffConfig(), adapters / "style.safetensors"),
        _write_adapter(other, SVFTConfig(pattern="banded", off_diagonals=1), folder / "foreign.safetensors"),
    )


def _write_adapter(pipe: object, config: SpectralConfig, file: Path, trigger: str | None = None) -> Path:
    generator = torch.Generator().manual_seed(len(str(config)))
    for values in add_training_adapter(pipe, config, "new"):
        values.data.copy_(torch.randn(values.shape, generator=generator))
    save_adapter(pipe, "new", file, metadata=AdapterMetadata(base_name="tiny", trigger=trigger))
    unload_adapter(pipe, "new")
    return file
