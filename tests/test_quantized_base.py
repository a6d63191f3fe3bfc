"""Adapters on a base whose weights are quantized: the update is that of the full base, and so is the file."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_inputs, tiny_pipeline
from torch import Tensor, nn
from torch.nn import functional
from training_runs import PROMPT, arguments, checkpoints, short_run, trained_tensors

from svft_diffusion import load_adapter, save_adapter, set_adapters, unload_adapter
from svft_diffusion.adapters import add_training_adapter
from svft_diffusion.adapters.config import SpectralConfig
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.cli.main import main
from svft_diffusion.errors import UserError
from svft_diffusion.files import AdapterMetadata, read_adapter
from svft_diffusion.files.quantized import is_quantized
from svft_diffusion.models import load_pipeline
from svft_diffusion.training import quantization
from svft_diffusion.training.trainer import train

BACKENDS = {"bnb-4bit": "bitsandbytes", "bnb-8bit": "bitsandbytes", "int8": "torchao"}
METADATA = AdapterMetadata(base_name="tiny", base_family="stable-diffusion")

METHODS: dict[str, dict[str, Any]] = {
    "plain": {"method": "svft"},
    "banded with bias": {"method": "svft", "pattern": "banded", "off_diagonals": 1, "train_bias": True},
    "random": {"method": "svft", "pattern": "random", "off_diagonals": 2},
    "rank": {"method": "svft", "rank": 5},
    "svdiff": {"method": "svdiff"},
    "siva": {"method": "siva", "fraction": 0.3, "select": "bottom"},
}


class EightBits(nn.Linear):
    """What a quantizing library leaves of a linear layer: rows in int8, with a scale for each."""

    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        scale = layer.weight.data.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.data / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.data.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def in_eight_bits(model: nn.Module) -> nn.Module:
    """Quantize the layers of a model's blocks."""
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and "transformer_blocks" in path:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, EightBits(layer))
    return model


def needed(choice: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(BACKENDS[choice])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model on disk."""
    folder = tmp_path_factory.mktemp("quantized") / "base"
    tiny_pipeline().save_pretrained(folder)
    return folder


def adapter_with_values(folder: Path, file: Path, **options: Any) -> Path:
    """An adapter with random values on the full base."""
    pipe = load_pipeline(str(folder))
    generator = torch.Generator().manual_seed(3)
    models = {"unet": pipe.unet}
    for parameter in add_training_adapter(models, SpectralConfig(targets="attention", **options), "a"):
        with torch.no_grad():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return save_adapter(models, "a", file, metadata=METADATA)


def layer_change(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """What the adapter adds to the output of one layer."""
    layer = spectral_layers(model)[path]
    with torch.no_grad():
        return layer(x) - layer.get_base_layer()(x)


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS.keys())
def test_an_adapter_adds_the_same_to_a_quantized_layer(
    folder: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    file = adapter_with_values(folder, tmp_path / "a.safetensors", **options)
    full, quantized = load_pipeline(str(folder)), load_pipeline(str(folder))
    in_eight_bits(quantized.unet)
    load_adapter(full, file)
    load_adapter(quantized, file)
    for path, layer in spectral_layers(quantized.unet).items():
        if not is_quantized(layer.get_base_layer()):
            continue
        x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
        expected = layer_change(full.unet, path, x)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(layer_change(quantized.unet, path, x), expected, atol=1e-5, rtol=1e-4)
        delta = spectral_layers(full.unet)[path].get_delta_weight("a")
        torch.testing.assert_close(layer.get_delta_weight("a"), delta)


def test_gradients_on_a_quantized_layer_are_those_of_the_formula(folder: Path) -> None:
    pipe = load_pipeline(str(folder))
    in_eight_bits(pipe.unet)
    parameters = add_training_adapter({"unet": pipe.unet}, SpectralConfig(targets="attention", train_bias=True), "a")
    pipe.unet(**tiny_inputs()).sample.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in parameters)
    path, layer = next((p, la) for p, la in spectral_layers(pipe.unet).items() if is_quantized(la.get_base_layer()))
    values = layer.trained_parts("a")["values"]
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    values.grad = None
    layer(x).square().sum().backward()
    assert layer.factors is not None
    U, _, Vh = layer.factors
    # d/dm_i of |W x + U diag(m) V^T x|^2 at m = 0
    expected = 2 * ((layer.get_base_layer()(x) @ U) * (x @ Vh.T)).sum(0)
    torch.testing.assert_close(values.grad, expected, atol=1e-4, rtol=1e-4, msg=path)


def test_without_the_full_weights_nothing_is_loaded(folder: Path, tmp_path: Path) -> None:
    file = adapter_with_values(folder, tmp_path / "a.safetensors")
    pipe = tiny_pipeline()  # in memory alone
    in_eight_bits(pipe.unet)
    for on_mismatch in ("error", "align", "force"):
        with pytest.raises(
            UserError, match=r"is quantized \(torch.int8\).* not to be had: load the base .*Hub's cache"
        ):
            load_adapter(pipe, file, on_mismatch=on_mismatch)
    assert not spectral_layers(pipe.unet)


def test_weights_on_trust_are_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = adapter_with_values(folder, tmp_path / "a.safetensors")
    pipe = load_pipeline(str(folder))
    in_eight_bits(pipe.unet)
    with caplog.at_level(logging.WARNING):
        load_adapter(pipe, file)
    assert [record.message.partition(", which")[0] for record in caplog.records] == [
        "32 of 32 adapted layers are quantized"
    ]


def test_strength_zero_and_unloading_give_the_quantized_base(folder: Path, tmp_path: Path) -> None:
    file = adapter_with_values(folder, tmp_path / "a.safetensors", train_bias=True)
    pipe = load_pipeline(str(folder))
    in_eight_bits(pipe.unet)
    with torch.no_grad():
        base = pipe.unet(**tiny_inputs()).sample
        load_adapter(pipe, file)
        assert not torch.equal(pipe.unet(**tiny_inputs()).sample, base)
        set_adapters(pipe, {"a": 0.0})
        assert torch.equal(pipe.unet(**tiny_inputs()).sample, base)
        unload_adapter(pipe, "a")
        assert torch.equal(pipe.unet(**tiny_inputs()).sample, base)


def test_nothing_is_folded_into_few_bits(folder: Path, tmp_path: Path) -> None:
    file = adapter_with_values(folder, tmp_path / "a.safetensors")
    pipe = load_pipeline(str(folder))
    in_eight_bits(pipe.unet)
    load_adapter(pipe, file)
    with torch.no_grad():
        adapted = pipe.unet(**tiny_inputs()).sample
        with pytest.raises(UserError, match="a quantized base takes no adapter into its weights"):
            pipe.fuse_lora(components=["unet"])
        assert torch.equal(pipe.unet(**tiny_inputs()).sample, adapted)


def test_samples_with_adapters_of_their_own(folder: Path, tmp_path: Path) -> None:
    file = adapter_with_values(folder, tmp_path / "a.safetensors", train_bias=True)
    pipe = load_pipeline(str(folder))
    in_eight_bits(pipe.unet)
    load_adapter(pipe, file)
    layer = next(la for la in spectral_layers(pipe.unet).values() if is_quantized(la.get_base_layer()))
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = layer(x)
        layer.sample_weights = [{"a": 0.0}, {"a": 1.0}]
        mixed = layer(x)
    torch.testing.assert_close(mixed[0], layer.get_base_layer()(x)[0])
    torch.testing.assert_close(mixed[1], whole[1])


def test_a_package_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = short_run(tmp_path)
    for choice, package in BACKENDS.items():
        assert main(["train", *arguments(config, base_quantization=choice)]) == 2
        assert f"--base_quantization {choice} needs the package {package}: pip install" in capsys.readouterr().err


@pytest.mark.parametrize("choice", BACKENDS)
def test_a_run_on_a_quantized_base_gives_an_adapter_of_the_full_one(
    choice: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    needed(choice)
    config = replace(
        short_run(tmp_path), base_quantization=choice, max_train_steps=3, validation_prompt=PROMPT,
        num_validation_images=1, targets="attention",
    )  # fmt: skip
    result = train(config)
    printed = capsys.readouterr().out
    assert "56 linear layers of the denoiser hold 61,440 weights" in printed
    assert "draws the same picture as the trained model" in printed
    full = load_pipeline(config.pretrained_model_name_or_path)
    with caplog.at_level(logging.WARNING):
        load_adapter(full, result.adapter)  # the digests are those of the full weights
    assert not [record for record in caplog.records if record.name.startswith("svft_diffusion")]
    plain = train(replace(config, base_quantization="none", output_dir=tmp_path / "plain"))
    values, without = trained_tensors(result.adapter), trained_tensors(plain.adapter)
    assert values.keys() == without.keys()
    assert any(not torch.equal(values[name], without[name]) for name in values)
    assert read_adapter(result.adapter)[0].training["base_quantization"] == choice
    assert read_adapter(result.adapter)[0].base.digests == read_adapter(plain.adapter)[0].base.digests
    again = replace(config, max_train_steps=3, resume_from_checkpoint="latest", base_quantization="none")
    with pytest.raises(UserError, match=f"was trained with base_quantization={choice}, now it is none"):
        train(again)


@pytest.mark.parametrize("choice", ["bnb-4bit", "int8"])
def test_a_resumed_run_on_a_quantized_base(choice: str, tmp_path: Path) -> None:
    needed(choice)
    config = replace(short_run(tmp_path), base_quantization=choice, checkpointing_steps=2, max_train_steps=4)
    whole = train(replace(config, output_dir=tmp_path / "whole")).adapter
    train(replace(config, max_train_steps=2))
    assert checkpoints(config.output_dir) == {"checkpoint-2"}
    resumed = train(replace(config, resume_from_checkpoint="latest")).adapter
    assert resumed.read_bytes() == whole.read_bytes()


def quantized_by_diffusers(choice: str, folder: Path) -> Any:
    """A pipeline that its user has quantized while it was loaded."""
    from diffusers import BitsAndBytesConfig, DiffusionPipeline, TorchAoConfig
    from diffusers.quantizers import PipelineQuantizationConfig

    if choice != "int8" and not torch.cuda.is_available():  # diffusers asks bitsandbytes for a GPU
        pipe = load_pipeline(str(folder))
        quantization.quantize_denoiser(pipe.unet, choice, torch.device("cpu"), adapted=[])
        return pipe
    mapping: dict[str, Callable[[], object]] = {
        "bnb-4bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "bnb-8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "int8": lambda: TorchAoConfig(_int8()),
    }
    chosen = PipelineQuantizationConfig(quant_mapping={"unet": mapping[choice]()})
    return DiffusionPipeline.from_pretrained(
        folder, quantization_config=chosen, safety_checker=None, torch_dtype=torch.float32
    )


def _int8() -> Any:
    return pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()


@pytest.mark.parametrize("choice", BACKENDS)
def test_a_pipeline_that_its_user_quantized(choice: str, folder: Path, tmp_path: Path) -> None:
    needed(choice)
    file = adapter_with_values(folder, tmp_path / "a.safetensors", train_bias=True)
    full = load_pipeline(str(folder))
    pipe = quantized_by_diffusers(choice, folder)
    with torch.no_grad():
        before = pipe.unet(**tiny_inputs()).sample
        load_adapter(full, file)
        load_adapter(pipe, file)
        assert sum(is_quantized(layer.get_base_layer()) for layer in spectral_layers(pipe.unet).values()) >= 16
        for path, layer in spectral_layers(pipe.unet).items():
            x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(
                layer_change(pipe.unet, path, x), layer_change(full.unet, path, x), atol=1e-5, rtol=1e-4
            )
        unload_adapter(pipe, "a")
        assert torch.equal(pipe.unet(**tiny_inputs()).sample, before)
