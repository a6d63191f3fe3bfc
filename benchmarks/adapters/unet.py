"""The whole UNet of Stable Diffusion 1.5 with random weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers import UNet2DConditionModel

from benchmarks.adapters.config import BenchmarkConfig
from benchmarks.adapters.contenders import (
    BANDED,
    COMMUNITY_SVDIFF,
    LORA,
    LORA_AUTOCAST,
    OFFICIAL_SVFT,
    PLAIN,
    chosen,
    linear_contenders,
)
from benchmarks.adapters.results import Bar, Result
from benchmarks.adapters.steps import measure_steps
from svft_diffusion.adapters.targets import matching_layers

# Against SVDiff's community code and the official SVFT, attention only, by height of the latents.
_AGAINST_PUBLISHED = {64: (0.75, 0.87), 32: (0.36, 0.52)}
_AGAINST_LORA = {64: 1.05, 32: 1.12}


def random_unet(config: BenchmarkConfig) -> UNet2DConditionModel:
    """A UNet of Stable Diffusion 1.5's geometry; the same weights in every run, so that its factors stay cached."""
    torch.manual_seed(0)
    size: dict[str, object] = {"sample_size": 64, "attention_head_dim": 8}
    if config.quick:
        size = {
            "sample_size": 8,
            "attention_head_dim": 2,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
    unet = UNet2DConditionModel(cross_attention_dim=768, **size)
    return unet.to(config.torch_device, config.torch_dtype).requires_grad_(False)


def unet_inputs(config: BenchmarkConfig, side: int, batch: int) -> dict[str, torch.Tensor]:
    """Latents, a time step and 77 tokens of text."""
    generator = torch.Generator().manual_seed(0)
    device, dtype = config.torch_device, config.torch_dtype
    return {
        "sample": torch.randn(batch, 4, side, side, generator=generator).to(device, dtype),
        "timestep": torch.full((batch,), 500, device=device),
        "encoder_hidden_states": torch.randn(batch, 77, 768, generator=generator).to(device, dtype),
    }


def measure(config: BenchmarkConfig) -> list[Result]:
    """Forward and backward for every preset and size of latents that the settings name."""
    base = random_unet(config)
    results: list[Result] = []
    for targets in config.targets:
        paths = matching_layers(base, targets)
        for side in [8] if config.quick else config.latents:
            results += measure_steps(
                "unet",
                f"{targets}, {side}x{side} latents, batch {config.unet_batch_size}, {config.dtype}",
                base,
                paths,
                chosen(linear_contenders(config.dtype), config.contenders),
                unet_inputs(config, side, config.unet_batch_size),
                rounds=config.rounds,
                autocast=config.autocast,
            )
    return results


def bars(results: Iterable[Result]) -> list[Bar]:
    """The bars on a step of the whole UNet: those of a CPU in float32, those of 16 bit at batch 2."""
    found = []
    for case in dict.fromkeys(result.case for result in results):
        targets, latents, batch, dtype = case.split(", ")
        found.append(Bar("unet", case, BANDED, 1.1, PLAIN))
        side = int(latents.partition("x")[0])
        if dtype == "float32" and side in _AGAINST_LORA:
            found.append(Bar("unet", case, PLAIN, _AGAINST_LORA[side], LORA))
            if targets == "attention":
                community, official = _AGAINST_PUBLISHED[side]
                found.append(Bar("unet", case, PLAIN, community, COMMUNITY_SVDIFF))
                found.append(Bar("unet", case, PLAIN, official, OFFICIAL_SVFT))
        elif dtype == "bfloat16" and batch == "batch 2":
            found.append(Bar("unet", case, PLAIN, 0.95 if targets == "attention" else 0.90, LORA))
            found.append(Bar("unet", case, PLAIN, 0.87 if targets == "attention" else 0.78, LORA_AUTOCAST))
    return found
