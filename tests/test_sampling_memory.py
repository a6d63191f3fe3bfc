"""Hours of sampling: memory stays where it is, and the base model as it was."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from diffusers import DiffusionPipeline

from svft_diffusion import SVDiffConfig, SVFTConfig, load_adapter, save_adapter, set_adapters, unload_adapter
from svft_diffusion.adapters import SpectralConfig, add_training_adapter
from svft_diffusion.files import AdapterMetadata
from svft_diffusion.models.loading import load_pipeline
from svft_diffusion.sampling.png import save_png
from svft_diffusion.sampling.sample import generate


def write_adapters(pipe: DiffusionPipeline, folder: Path) -> list[Path]:
    files = []
    configs: list[SpectralConfig] = [SVDiffConfig(), SVFTConfig(pattern="banded", off_diagonals=2)]
    for number, config in enumerate(configs):
        generator = torch.Generator().manual_seed(number)
        for values in add_training_adapter(pipe, config, "new"):
            values.data.copy_(0.02 * torch.randn(values.shape, generator=generator))
        metadata = AdapterMetadata(base_name="toybox", trigger="sks", class_word="robot")
        files.append(save_adapter(pipe, "new", folder / f"{number}.safetensors", metadata=metadata))
        unload_adapter(pipe, "new")
    return files


def digest(pipe: DiffusionPipeline) -> str:
    total = hashlib.sha256()
    for component in (pipe.unet, pipe.text_encoder, pipe.vae):
        for name, tensor in sorted(component.state_dict().items()):
            total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def slope_of_memory(folder: Path, *, swaps: int, pictures_of_swap: int, warm_up: int) -> float:
    """Megabytes that 100 pictures take, by a line through the memory after each swap but the first ``warm_up``."""
    pipe = load_pipeline("toybox")
    files = write_adapters(pipe, folder)
    before = digest(pipe)
    process = psutil.Process()
    sizes = []
    for swap in range(swaps):
        load_adapter(pipe, files[swap % 2], "subject")
        for picture in range(pictures_of_swap):
            set_adapters(pipe, {"subject": 0.25 * (picture + 1)})
            image = generate(pipe, "a photo of sks robot", seed=swap, num_inference_steps=1)
            save_png(image, folder / "picture.png", {"prompt": "a photo of sks robot", "seed": swap})
        unload_adapter(pipe, "subject")
        sizes.append(process.memory_info().rss / 1e6)
    assert digest(pipe) == before
    slope, _ = np.polyfit(np.arange(swaps - warm_up) * pictures_of_swap, sizes[warm_up:], 1)
    return float(100 * slope)


@pytest.mark.slow
def test_memory_of_500_swaps_and_2000_pictures(tmp_path: Path) -> None:
    assert slope_of_memory(tmp_path, swaps=500, pictures_of_swap=4, warm_up=50) < 1
