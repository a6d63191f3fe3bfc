"""Adapted pipelines to export, and what their exports should hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
from adapted_models import randomize
from diffusers import DiffusionPipeline
from tiny_models import (
    tiny_pipeline,
)
from torch import Tensor

from svft_diffusion import SiVAConfig, SVDiffConfig, SVFTConfig
from svft_diffusion.adapters import SpectralConfig, add_training_adapter
from svft_diffusion.adapters.methods import combined_core
from svft_diffusion.adapters.training import adapted_layers
from svft_diffusion.exchange.export import ExportedLora
from svft_diffusion.spectral import core_matrix

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


@cache
def shared_pipeline(config: str) -> DiffusionPipeline:
    """`adapted_pipeline`, the same one for all tests that leave it as it is."""
    return adapted_pipeline(config)


def product(exported: ExportedLora, key: str) -> Tensor:
    """``alpha / r B A`` of a layer as a matrix, as readers take it, in float64."""
    tensors = exported.tensors
    down, up = ("lora_A", "lora_B") if f"{key}.lora_A.weight" in tensors else ("lora_down", "lora_up")
    A, B = tensors[f"{key}.{down}.weight"].double(), tensors[f"{key}.{up}.weight"].double()
    scale = tensors.get(f"{key}.alpha", len(A)) / len(A)
    return scale * B.flatten(1) @ A.flatten(1)


def expected_updates(models: object, strength: float = 1.0) -> dict[str, Tensor]:
    updates = {}
    for name, layer in adapted_layers(models, "a").items():
        layer.set_scale("a", strength)
        updates[name] = layer.get_delta_weight("a").detach()
        layer.set_scale("a", 1.0)
    return updates


def exact_update(models: object, name: str) -> Tensor:
    """What an adapter changes in one layer's matrix, in float64."""
    layer = adapted_layers(models, "a")[name]
    U, S, Vh = layer.factors
    core, triplets = combined_core(S, [layer.term("a", on_cpu=True)])
    triplets = triplets.long() if isinstance(triplets, Tensor) else triplets
    return U[:, triplets].double() @ core_matrix(core).double() @ Vh[triplets].double()


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
