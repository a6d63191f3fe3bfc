"""Adapter files of Stable Diffusion 1.5's geometry keep to their sizes: real layers and names, no decomposition."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.adapter_sizes import METHODS, broken_bars, division, report, usual_metadata, usual_training
from svft_diffusion.adapters.targets import matching_layers
from svft_diffusion.files import SKETCH, AdapterHeader, BaseDigests, BaseModel, LayerBasis, adapter_bytes, pack_bases
from svft_diffusion.files.names import canonical_name
from svft_diffusion.training.checks import adapter_config

# What a layer's basis sketch took on average with random weights, of which many singular values are nearly tied.
SKETCH_BYTES = 60


@pytest.fixture(scope="module")
def layers() -> dict[str, nn.Linear]:
    """The adapted layers by canonical name; their weights have shapes and no values."""
    with torch.device("meta"):
        text_config = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        models = {
            "unet": UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8),
            "text_encoder": CLIPTextModel(text_config),
        }
    return {
        canonical_name(component, model, path): model.get_submodule(path)
        for component, model in models.items()
        for path in matching_layers(model, "attention+feed-forward")
    }


def written(layers: dict[str, nn.Linear], method: str, thumbnail: bytes | None = None) -> bytes:
    """The file of a usual training by ``method`` that stores float16."""
    generator = torch.Generator().manual_seed(0)
    config = adapter_config(usual_training(method))
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}.values"] = 0.05 * torch.randn(min(layer.weight.shape), generator=generator)
        if config.train_bias and layer.bias is not None:
            tensors[f"{name}.bias"] = 0.05 * torch.randn(len(layer.bias), generator=generator)
    basis = LayerBasis(torch.zeros(SKETCH_BYTES, dtype=torch.uint8), torch.zeros(4))
    tensors[SKETCH] = pack_bases(dict.fromkeys(layers, basis))
    digests = tuple(hashlib.sha256(name.encode()).digest()[:6] for name in sorted(layers))
    said = dict(vars(replace(usual_metadata(method), thumbnail=thumbnail)))
    base = BaseModel(
        said.pop("base_name"),
        said.pop("base_family"),
        said.pop("base_architecture"),
        BaseDigests(digests, digests, digests),
    )
    del said["base_digests"]
    header = AdapterHeader(
        method=method, pattern="plain", off_diagonals=0, rank=None, targets="attention+feed-forward",
        components={part: sum(name.startswith(f"{part}.") for name in layers) for part in ("unet", "text_encoder")},
        base=base, train_bias=config.train_bias, libraries=dict.fromkeys(("torch", "diffusers"), "0.42.1"), **said,
    )  # fmt: skip
    return adapter_bytes(header, tensors)


@pytest.mark.parametrize(("method", "values"), [("svft", 173_952), ("vectorfit", 394_176)])
@pytest.mark.parametrize("thumbnail", [None, b"\xff\xd8\xff" + bytes(16 * 1024 - 3)])
def test_sizes_of_stable_diffusion_15(
    layers: dict[str, nn.Linear], method: str, values: int, thumbnail: bytes | None
) -> None:
    data = written(layers, method, thumbnail)
    parts = division(data)
    assert len(layers) == 160 + 72
    assert sum(parts.values()) == len(data) and parts["values"] == 2 * values
    assert parts["digests of the base"] == 3 * 8 * len(layers)  # six bytes are eight characters
    assert parts["sketch"] == (SKETCH_BYTES + 20) * len(layers)
    assert (parts["thumbnail"] > 16 * 1024) == (thumbnail is not None)
    assert len(data) - parts["thumbnail"] <= METHODS[method]
    assert parts["values"] >= 0.7 * len(data)
    assert broken_bars(method, parts) == []


def test_report_names_the_bars_that_break() -> None:
    parts = {"values": 400_000, "table": 100_001, "thumbnail": 0}
    assert broken_bars("svft", parts) == ["larger than 500,000"]
    assert broken_bars("vectorfit, thumbnail", {**parts, "thumbnail": 100_000}) == ["33.3% is no values"]
    table = report({"svft": parts, "vectorfit": parts})
    assert "| values | 400,000 (80.0%) | 400,000 (80.0%) |" in table
    assert "| bars | larger than 500,000 | hold |" in table
