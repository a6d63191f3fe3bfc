"""Adapters on small models: one of every kind of layer, the configurations to go through, and how to look inside."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from adapter_cases import METHODS
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svft_diffusion.adapters import SpectralConfig
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.files.names import base_module

# One of each way to choose entries of the core matrix, to start, and to treat biases and norms.
NAMES = (
    "svft plain",
    "svft banded 1",
    "svft banded 1, official init",
    "svft random",
    "svft top-k, rank 4",
    "svdiff",
    "svdiff, scalar norms",
    "vectorfit",
    "siva bottom",
    "siva random",
)
CONFIGS: dict[str, Callable[..., SpectralConfig]] = {name: METHODS[name].config for name in NAMES}
every_method = pytest.mark.parametrize("method", NAMES)


class Mixed(nn.Module):
    """A layer of every kind, wide and tall, from ids (B, T) to features (B, T, 6)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(12, 8)
        self.norm = nn.LayerNorm(8)
        self.conv1d = Conv1D(10, 8)
        self.tall = nn.Linear(10, 14)
        self.wide = nn.Linear(14, 8, bias=False)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.group_norm = nn.GroupNorm(2, 6)

    def forward(self, ids: Tensor) -> Tensor:
        features = torch.tanh(self.conv1d(self.norm(self.embedding(ids))))
        features = torch.tanh(self.wide(torch.tanh(self.tall(features)))).mT
        result: Tensor = self.group_norm(self.conv(features)).mT
        return result


IDS = torch.arange(10).reshape(2, 5)


def randomize(model: nn.Module, name: str, seed: int = 2, scale: float = 0.2) -> None:
    """Random numbers in everything that an adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in spectral_layers(model, name).values():
            for part in layer.trained_parts(name).values():
                part.copy_(scale * torch.randn(part.shape, generator=generator))


def trained(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Copies of everything that an adapter trains."""
    return {
        f"{path}.{part}": tensor.detach().clone()
        for path, layer in spectral_layers(model, name).items()
        for part, tensor in layer.trained_parts(name).items()
    }


def digest_of_base(model: nn.Module) -> str:
    """sha256 of the parameters that are no adapter's, whatever wraps their layers."""
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        if base_module(module) is module and "spectral_" not in path and "lora_" not in path:
            for parameter in module.parameters(recurse=False):
                digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def output_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """First tensor of what a model of diffusers or transformers returns, without gradients."""
    with torch.no_grad():
        output: Tensor = model(**inputs)[0]
    return output


def error(found: Tensor, expected: Tensor, base: Tensor) -> float:
    """Largest difference, relative to the largest one that the adapters make."""
    effect = (expected - base).abs().max().item()
    assert effect > 1e-4, "the adapters do nothing"
    return (found - expected).abs().max().item() / effect
