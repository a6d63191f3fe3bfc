"""Stage ``latents``: the VAE's posterior of every rendered picture, as half-precision numpy files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from svft_diffusion.toybox.pretraining.dataset import PICTURES

MEANS, DEVIATIONS = "latent_means.npy", "latent_deviations.npy"
BATCH = 100


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) -> float in [-1, 1], (N, 3, H, W)."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


@torch.no_grad()
def encode_dataset(work_dir: Path, vae: AutoencoderKL) -> None:
    """Write mean and standard deviation of each picture's latent, scaled as the denoiser sees them."""
    pictures = np.load(work_dir / PICTURES, mmap_mode="r")
    side = pictures.shape[1] // 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (len(pictures), vae.config.latent_channels, side, side)
    means = np.lib.format.open_memmap(work_dir / MEANS, mode="w+", dtype=np.float16, shape=shape)
    deviations = np.lib.format.open_memmap(work_dir / DEVIATIONS, mode="w+", dtype=np.float16, shape=shape)
    for start in range(0, len(pictures), BATCH):
        part = slice(start, start + BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(to_tensor(pictures[part])).latent_dist
        means[part] = (posterior.mean.float() * vae.config.scaling_factor).numpy()
        deviations[part] = (posterior.std.float() * vae.config.scaling_factor).numpy()
    means.flush()
    deviations.flush()
