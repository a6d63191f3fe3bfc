"""Stage ``autoencoder``: the VAE, trained on renders, with its latents standardised afterwards."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from svft_diffusion.toybox.pretraining.dataset import PICTURES
from svft_diffusion.toybox.pretraining.latents import to_tensor

logger = logging.getLogger(__name__)

FOLDER = "vae"
HELD_OUT = 512  # the last pictures of the work folder measure, they do not train


@dataclass(frozen=True)
class AutoencoderSettings:
    """Settings of the stage; the defaults are those of the shipped weights."""

    minutes: float = 15.0
    batch_size: int = 32
    learning_rate: float = 2.5e-3
    kl_weight: float = 3e-5
    seed: int = 0


def build_autoencoder() -> AutoencoderKL:
    """64 x 64 pixels to 16 x 16 x 8 latents, 0.7 M weights."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
    )
    with torch.no_grad():
        # Start almost without latent noise: at the default initialisation it buries the signal for hundreds of steps.
        vae.quant_conv.weight[8:] *= 0.1
        vae.quant_conv.bias[8:] = -5.0
    return vae


def autoencoder_loss(vae: AutoencoderKL, pictures: Tensor, kl_weight: float) -> tuple[Tensor, float]:
    """L1 + L2 + half the L1 of the image gradient + KL, and the peak signal-to-noise ratio in dB."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    error = decoded.float() - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    divergence = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    squared = error.pow(2).mean()
    loss = error.abs().mean() + squared + 0.5 * edges + kl_weight * divergence
    return loss, 10 * math.log10(4 / squared.item())


def train_autoencoder(work_dir: Path, settings: AutoencoderSettings) -> AutoencoderKL:
    """Train for ``settings.minutes`` from ``work_dir/vae`` if it is there, standardise the latents, and save."""
    torch.manual_seed(settings.seed)
    folder = work_dir / FOLDER
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32) if folder.exists() else build_autoencoder()
    pictures = np.load(work_dir / PICTURES, mmap_mode="r")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    started, step = time.monotonic(), 0
    vae.train()
    while (done := (time.monotonic() - started) / 60 / settings.minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, step / 100) * 0.5 * (1 + math.cos(math.pi * done))
        picked = np.sort(np.random.randint(0, len(pictures) - HELD_OUT, settings.batch_size))
        loss, ratio = autoencoder_loss(vae, to_tensor(pictures[picked]), settings.kl_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            logger.info("step %d  loss %.4f  %.2f dB  %.0f %%", step, loss.item(), ratio, 100 * done)
    vae.eval()
    standardise_latents(vae, to_tensor(pictures[-HELD_OUT:]))
    vae.save_pretrained(folder)
    return vae


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Fold mean 0 and deviation 1 of each latent channel into the two 1 x 1 convolutions; decoding is unchanged.

    One scaling factor cannot repair channels whose deviations differ by a factor of six; this can, exactly.
    """
    latents = vae.encode(pictures).latent_dist.mean
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    into, out_of = vae.quant_conv, vae.post_quant_conv
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean
    out_of.weight *= deviation[None, :, None, None]
    into.weight[:channels] /= deviation[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / deviation
    into.bias[channels:] -= 2 * deviation.log()
    vae.register_to_config(scaling_factor=1.0)
