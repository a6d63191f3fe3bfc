"""Files that the published package svdiff-pytorch wrote, against what the package itself computes with them.

Both lie in ``data/svdiff_pytorch``, where ``make.py`` says how they came to be.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from foreign_files import relative
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from svft_diffusion import load_adapter, save_adapter, set_adapters
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.exchange.importing import import_adapter
from svft_diffusion.files import AdapterMetadata

FOLDER = Path(__file__).parent / "data" / "svdiff_pytorch"
FILES = [FOLDER / "spectral_shifts.safetensors", FOLDER / "spectral_shifts_te.safetensors"]


def base() -> dict[str, nn.Module]:
    unet = UNet2DConditionModel.from_pretrained(FOLDER / "unet", torch_dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(FOLDER / "text_encoder", dtype=torch.float32)
    return {"unet": unet.eval(), "text_encoder": text_encoder.eval()}


@torch.no_grad()
def outputs(models: dict[str, nn.Module], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    conditions = (inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
    return {
        "unet": models["unet"](*conditions).sample,
        "text_encoder": models["text_encoder"](inputs["input_ids"])[0],
    }


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return load_file(FOLDER / "outputs.safetensors")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    """Models that the adapter was imported to, saved from and loaded again into."""
    first, again = base(), base()
    report = import_adapter(first, FILES)
    assert report.error == 0 and not report.left_out
    assert {layer.layer for layer in report.layers} == {
        f"{component}.{name.removesuffix('.delta')}"
        for component, file in zip(("unet", "text_encoder"), FILES, strict=True)
        for name in load_file(file)
    }
    file = tmp_path_factory.mktemp("imported") / "adapter.safetensors"
    save_adapter(first, report.adapter, file, metadata=AdapterMetadata(base_name="published"))
    load_adapter(again, file, "a")
    return again


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.2])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_outputs_are_those_of_the_published_package(imported, published, component, strength):
    set_adapters(imported, {"a": strength})
    found, expected = outputs(imported, published)[component], published[f"{component} {strength}"]
    assert relative(found, expected) <= 1e-5
    assert strength == 0 or relative(published[f"{component} 0.0"], expected) > 0.05


def test_the_files_reach_every_kind_of_layer_and_the_relu_of_the_package(imported):
    kinds, clipped = set(), {}
    for component, file in zip(("unet", "text_encoder"), FILES, strict=True):
        layers = spectral_layers(imported[component], "a")
        shifts = load_file(file)
        assert len(shifts) == len(layers)
        for layer in layers.values():
            kinds.add(layer.kind)
            if layer.factors is not None:
                shifted = layer.factors.S + layer.trained_parts("a")["values"]
                clipped[component] = clipped.get(component, 0) + int((shifted < -0.01).sum())
    assert kinds == {"linear", "convolution", "embedding", "norm"}
    assert clipped["unet"] > 10 and clipped["text_encoder"] > 3
