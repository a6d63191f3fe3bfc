"""docs/file_format.md says enough: a reader made from it alone finds in a file what the library wrote."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import Mixed
from adapter_cases import METHODS, Holder, base_layer
from format_reader import DocumentReader, check_basis_sketch
from hostile_pictures import chunks_of
from PIL import Image
from safetensors.torch import load_file, save
from tiny_models import tiny_pipeline
from token_adapters import LONG_TOKEN, adapter_file
from torch import nn

from svft_diffusion import load_adapter, save_adapter
from svft_diffusion.adapters import SpectralConfig, add_training_adapter
from svft_diffusion.adapters.layers.kinds import matrix_of
from svft_diffusion.adapters.training import adapted_layers
from svft_diffusion.files import AdapterMetadata, read_adapter
from svft_diffusion.files.names import base_module
from svft_diffusion.sampling.png import save_png

Made = tuple[Path, object]  # a file, and what it was saved from


class Tied(nn.Module):
    """A layer whose singular values tie in pairs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        left, right = (torch.linalg.qr(torch.randn(size, 64)).Q for size in (96, 80))
        self.tied = nn.Linear(80, 96)
        self.tied.weight.data = left @ torch.diag(torch.linspace(2, 0.5, 32).repeat_interleave(2)) @ right.T


def saved(models: object, config: SpectralConfig, file: Path, **said: Any) -> Made:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in add_training_adapter(models, config, "a"):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return save_adapter(models, "a", file, metadata=AdapterMetadata("dög", training={"steps": 3}, **said)), models


def of_every_kind_of_layer(method: str, file: Path, dtype: torch.dtype = torch.float32) -> Made:
    model = Mixed().to(dtype)
    with_bias = [name for name, layer in model.named_children() if getattr(layer, "bias", None) is not None]
    targets = with_bias if method == "vectorfit, biases alone" else [name for name, _ in model.named_children()]
    return saved({"unet": model}, METHODS[method].config(target_modules=targets, train_norm=True), file)


def of_listed_values(method: str, file: Path) -> Made:
    model = Holder(base_layer("linear wide without bias"))
    return saved({"unet": model}, METHODS[method].config(target_modules=["layer"]), file)


def of_ties(file: Path) -> Made:
    return saved({"transformer": Tied()}, METHODS["svft banded 1"].config(target_modules=["tied"]), file)


def of_a_pipeline(file: Path) -> Made:
    picture = b"\xff\xd8\xff" + bytes(9)
    return saved(tiny_pipeline(), METHODS["vectorfit"].config(), file, value_dtype="float16", thumbnail=picture)


def of_tokens(file: Path) -> Made:
    pipe = tiny_pipeline()
    load_adapter(pipe, adapter_file(file, names=LONG_TOKEN), "a")
    return file, pipe


FILES: dict[str, Callable[[Path], Made]] = {
    **{method: partial(of_every_kind_of_layer, method) for method in METHODS if "listed" not in method},
    **{method: partial(of_listed_values, method) for method in METHODS if "listed" in method},
    "a base in bfloat16": partial(of_every_kind_of_layer, "svft banded 1", dtype=torch.bfloat16),
    "tied singular values": of_ties,
    "a pipeline, in float16": of_a_pipeline,
    "learned tokens": of_tokens,
}


@pytest.mark.parametrize("kind", FILES)
def test_a_reader_made_from_the_document_finds_what_was_written(kind: str, tmp_path: Path) -> None:
    file, models = FILES[kind](tmp_path / "a.safetensors")
    read, (header, tensors) = DocumentReader(file.read_bytes()), read_adapter(file)
    assert read.metadata["svft_diffusion.digest"] == read.digest()
    assert read.body == DocumentReader(save(load_file(file), read.metadata)).body  # so all tensors are aligned
    assert read.tensors.keys() == tensors.keys()
    assert all(torch.equal(read.tensors[name].to(tensors[name].dtype), tensors[name]) for name in tensors)
    assert {name: len(read.tensors[f"{name}.tokens"]) for name in read.header["tokens"]} == (
        {"text_encoder": 2} if kind == "learned tokens" else {}
    )

    layers = adapted_layers(models, "a")
    assert read.layers == sorted(layers)
    weights = {name: base_module(layer).weight for name, layer in layers.items()}
    assert read.header["base"]["digests"] == read.digests_of_base(weights)

    records, clusters = read.records(), 0
    assert records.keys() == {name for name in layers if f"{name}.values" in tensors}
    for name, (sketch, probes) in records.items():
        layer = layers[name]
        sigma = layer.factors.S
        core, trained = read.core(name, sigma), read.triplets(name, len(sigma))
        update = matrix_of(layer.kind, layer.get_delta_weight("a"))
        tolerance = 1e-5 if header.value_dtype == "float32" else 1e-3  # of values that are about 1
        torch.testing.assert_close(layer.factors.U @ core @ layer.factors.Vh, update, rtol=0, atol=tolerance)
        assert probes == pytest.approx(layer.probes("a").tolist(), rel=100 * tolerance, abs=100 * tolerance)
        signs = header.pattern in ("random", "top_k") or bool((core - core.diagonal().diag()).any())
        clusters += check_basis_sketch(sketch, len(trained), signs)
    if kind == "tied singular values":
        assert clusters > 0


def test_a_picture_carries_the_file_unchanged(tmp_path: Path) -> None:
    file, _ = of_ties(tmp_path / "a.safetensors")
    picture = save_png(Image.new("RGB", (3, 2)), tmp_path / "a.png", {}, [file.read_bytes()])
    assert [body for kind, body in chunks_of(picture.read_bytes()) if kind == b"svFt"] == [file.read_bytes()]
