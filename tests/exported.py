"""Adapted pipelines to export, and what their exports should hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from adapted_models import randomize
from diffusers import DiffusionPipeline
from tiny_models import (
    tiny_pipeline,
)
from torch import Tensor

from svft_diffusion import SiVAConfig, SVDiffConfig, SVFTConfig
from svft_diffusion.adapters import SpectralConfig, add_training_adapter
from svft_diffusion.adapters.training import adapted_layers
from svft_diffusion.exchange.export import ExportedLora

CONFIGS: dict[str, Callable[..., SpectralConfig]] = {
    "svft plain": SVFTConfig,
    "svft banded": partial(SVFTConfig, pattern="banded", off_diagonals=2),
    "svft random": partial(SVFTConfig, pattern="random", off_diagonals=1),
    "svft official": partial(SVFTConfig, pattern="top_k", off_diagonals=1, init="official"),
    "svdiff": partial(SVDiffConfig, train_norm=False),
    "siva": partial(SiVAConfig, fraction=0.5, select="random"),
}
every_config = pytest.mark.parametrize("config", CONFIGS)


def adapted_pipeline(config: str | Callable[..., SpectralConfig], scale: float = 0.5) -> DiffusionPipeline:
    """A tiny pipeline with an adapter in every matrix of the UNet that LoRAs reach, and in the text encoder."""
    pipe = tiny_pipeline()
    make = CONFIGS[config] if isinstance(config, str) else config
    add_training_adapter({"unet": pipe.unet}, make(targets="all", train_norm=False), "a")
    add_training_adapter({"text_encoder": pipe.text_encoder}, make(targets="attention+feed-forward"), "a")
    for model in (pipe.unet, pipe.text_encoder):
        randomize(model, "a", scale=scale)
    return pipe


def product(exported: ExportedLora, key: str) -> Tensor:
    """``B A`` of a layer as a matrix."""
    tensors = exported.tensors
    down, up = ("lora_A", "lora_B") if f"{key}.lora_A.weight" in tensors else ("lora_down", "lora_up")
    return tensors[f"{key}.{up}.weight"].flatten(1) @ tensors[f"{key}.{down}.weight"].flatten(1)


def expected_updates(models: object, strength: float = 1.0) -> dict[str, Tensor]:
    updates = {}
    for name, layer in adapted_layers(models, "a").items():
        layer.set_scale("a", strength)
        updates[name] = layer.get_delta_weight("a").detach()
        layer.set_scale("a", 1.0)
    return updates


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm())


def key_of(name: str, format: str, text_encoder: str = "lora_te") -> str:
    if format == "diffusers":
        return name
    component, _, path = name.partition(".")
    path = path.replace("add_embedding.linear_1", "label_emb_0_0").replace("add_embedding.linear_2", "label_emb_0_2")
    prefix = {"unet": "lora_unet", "text_encoder": text_encoder, "text_encoder_2": "lora_te2"}[component]
    return f"{prefix}_{path.replace('.', '_')}"
