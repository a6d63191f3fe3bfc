"""Adapters in models of diffusers by its own functions: every method on UNets and transformers, beside a LoRA too."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from adapted_models import CONFIGS, digest_of_base, error, every_method, output_of, randomize
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tiny_models import tiny_inputs, tiny_pipeline, tiny_text_encoder, tiny_tokens, tiny_unet
from tiny_transformers import ARCHITECTURES
from torch import Tensor, nn

from svft_diffusion import SVDiffConfig, SVFTConfig, VectorFitConfig
from svft_diffusion.adapters import SpectralConfig
from svft_diffusion.adapters.injection import inject, remove, spectral_layers
from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.adapters.targets import adaptable_layers

METHOD_OF_DENOISER = {
    "sd1": "svft banded 1",
    "sd2": "vectorfit",
    "sdxl": "siva random",
    "sd3": "svft random",
    "flux": "svdiff",
    "sana": "svft top-k, rank 4",
}


def build(name: str) -> tuple[nn.Module, dict[str, object], Tensor]:
    """A tiny model, its inputs, and its output without adapters."""
    model, inputs = ARCHITECTURES[name].build(), ARCHITECTURES[name].inputs()
    return model, inputs, output_of(model, inputs)


def adapted_pipeline(**configs: SpectralConfig) -> StableDiffusionPipeline:
    """A pipeline with adapters in its UNet and text encoder."""
    pipe = tiny_pipeline()
    for model in (pipe.unet, pipe.text_encoder):
        for seed, (name, config) in enumerate(configs.items()):
            model.add_adapter(config, name)
            randomize(model, name, seed)
    return pipe


def outputs(pipe: StableDiffusionPipeline) -> Tensor:
    """The outputs of both adapted components, as one tensor."""
    parts = output_of(pipe.unet, tiny_inputs()), output_of(pipe.text_encoder, tiny_tokens())
    return torch.cat([part.flatten() for part in parts])


# Every model


@pytest.mark.parametrize(("name", "method"), list(METHOD_OF_DENOISER.items()))
def test_every_layer_of_a_denoiser_carries_an_adapter(name: str, method: str) -> None:
    model, inputs, base = build(name)
    model.add_adapter(CONFIGS[method](targets="all"), "a")
    assert set(spectral_layers(model)) == set(adaptable_layers(model))
    assert torch.equal(output_of(model, inputs), base), "zero values"
    randomize(model, "a", scale=0.1)
    before, expected = digest_of_base(model), output_of(model, inputs)
    model.fuse_lora(safe_fusing=True)
    assert error(output_of(model, inputs), expected, base) < 1e-4
    model.unfuse_lora()
    assert digest_of_base(model) == before
    model.disable_adapters()
    assert torch.equal(output_of(model, inputs), base)
    model.enable_adapters()
    assert torch.equal(output_of(model, inputs), expected)
    model.unload_lora()
    assert torch.equal(output_of(model, inputs), base)
    assert not any(isinstance(module, SpectralLayer) for module in model.modules())


@every_method
@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_every_method_blends_fuses_and_goes(method: str, name: str) -> None:
    model, inputs, base = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.add_adapter(CONFIGS[method](targets="all"), "a")
        model.add_adapter(SVDiffConfig(targets="attention"), "b")
    randomize(model, "a", scale=0.1)
    randomize(model, "b", 3)
    model.set_adapters(["a", "b"], [0.7, 0.3])
    for layer in spectral_layers(model).values():
        assert layer.weights["a"] == 0.7 and layer.weights.get("b", 0.3) == 0.3
    both = output_of(model, inputs)
    model.set_adapters(["a", "b"], [0.0, 0.0])
    assert torch.equal(output_of(model, inputs), base)
    model.set_adapters(["a", "b"], [0.7, 0.3])
    model.fuse_lora()
    assert error(output_of(model, inputs), both, base) < 1e-4
    model.unfuse_lora()
    assert torch.equal(output_of(model, inputs), both)
    model.set_adapters("a", 0.7)
    alone = output_of(model, inputs)
    model.delete_adapters("b")
    assert torch.equal(output_of(model, inputs), alone) and not torch.equal(alone, both)
    model.delete_adapters("a")
    assert torch.equal(output_of(model, inputs), base) and not hasattr(model, "peft_config")
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter(SVFTConfig(), "b")
        model.add_adapter(SVFTConfig(), "b")


def test_a_model_without_adapter_functions_of_its_own() -> None:
    """diffusers has none for PixArt."""
    model, inputs, base = build("pixart")
    assert not hasattr(model, "add_adapter")
    inject(model, SVFTConfig(pattern="random", off_diagonals=1, targets="all"), "a")
    randomize(model, "a")
    expected = output_of(model, inputs)
    for layer in spectral_layers(model).values():
        layer.merge()
    assert error(output_of(model, inputs), expected, base) < 1e-4
    for layer in spectral_layers(model).values():
        layer.unmerge()
    remove(model, "a")
    assert torch.equal(output_of(model, inputs), base)


# Weights


def test_a_weight_scales_every_adapted_layer() -> None:
    """A diagonal method is linear in the weight: half of it is half the change of every weight, bias and norm."""
    unet, _, _ = build("sd1")
    unet.add_adapter(VectorFitConfig(targets="all"), "a")
    randomize(unet, "a")
    kinds = {layer.kind for layer in spectral_layers(unet).values()}
    assert kinds == {"linear", "convolution", "norm"}
    base = {path: layer.get_base_layer().weight.detach().clone() for path, layer in spectral_layers(unet).items()}
    unet.fuse_lora()
    full = {path: layer.get_base_layer().weight - base[path] for path, layer in spectral_layers(unet).items()}
    unet.unfuse_lora()
    unet.set_adapters("a", 0.5)
    unet.fuse_lora()
    for path, layer in spectral_layers(unet).items():
        change = layer.get_base_layer().weight - base[path]
        torch.testing.assert_close(change, 0.5 * full[path], rtol=1e-3, atol=1e-6)
        assert change.abs().max() > 1e-4


def test_weights_by_block() -> None:
    unet, inputs, base = build("sd1")
    unet.add_adapter(SVFTConfig(targets="attention"), "a")
    randomize(unet, "a")
    unet.set_adapters("a", {"mid": 0.5, "down": 0.0, "up": {"block_0": 2.0}})
    expected = {"down_blocks": 0.0, "mid_block": 0.5, "up_blocks": 2.0}
    for path, layer in spectral_layers(unet).items():
        assert layer.weights["a"] == expected[path.partition(".")[0]]
    assert not torch.equal(output_of(unet, inputs), base)


def test_weights_by_component() -> None:
    pipe = adapted_pipeline(a=SVFTConfig(), b=SVFTConfig(pattern="banded", off_diagonals=1))
    pipe.set_adapters(["a", "b"], [{"unet": 0.3, "text_encoder": 0.8}, 0.5])
    for component, weight in ((pipe.unet, 0.3), (pipe.text_encoder, 0.8)):
        assert all(layer.weights == {"a": weight, "b": 0.5} for layer in spectral_layers(component).values())
    assert pipe.get_list_adapters() == {"unet": ["a", "b"], "text_encoder": ["a", "b"]}
    assert pipe.get_active_adapters() == ["a", "b"]


def test_the_scale_of_a_call() -> None:
    unet, inputs, base = build("sd2")
    unet.add_adapter(VectorFitConfig(targets="all"), "a")
    randomize(unet, "a", scale=0.1)
    unet.set_adapters("a", 0.8)
    full = output_of(unet, inputs)
    scaled = output_of(unet, inputs | {"cross_attention_kwargs": {"scale": 0.5}})
    unet.set_adapters("a", 0.4)
    torch.testing.assert_close(output_of(unet, inputs), scaled, rtol=1e-6, atol=1e-7)
    unet.set_adapters("a", 0.8)
    assert torch.equal(output_of(unet, inputs), full)
    assert torch.equal(output_of(unet, inputs | {"cross_attention_kwargs": {"scale": 0.0}}), base)
    assert torch.equal(output_of(unet, inputs), full), "also after a call at scale 0"


# Fusing


def test_fusing_a_pipeline_100_times_leaves_no_trace() -> None:
    shifts = SVDiffConfig(targets="attention", train_norm=True, norm_shift="scalar")
    pipe = adapted_pipeline(a=VectorFitConfig(targets="attention", train_norm=True), b=shifts)
    before = digest_of_base(pipe.unet), digest_of_base(pipe.text_encoder)
    generator = torch.Generator().manual_seed(0)
    for step in range(100):
        pipe.set_adapters(["a", "b"], torch.randn(2, generator=generator).tolist())
        pipe.fuse_lora(lora_scale=0.5 + step / 100, safe_fusing=step % 2 == 0)
        if step % 25 == 0:
            assert digest_of_base(pipe.unet) != before[0] and digest_of_base(pipe.text_encoder) != before[1]
        pipe.unfuse_lora()
    assert (digest_of_base(pipe.unet), digest_of_base(pipe.text_encoder)) == before


def test_fusing_at_a_scale_and_only_one_adapter() -> None:
    pipe = adapted_pipeline(a=VectorFitConfig(targets="all"), b=SVFTConfig(targets="all"))
    base = outputs(tiny_pipeline())
    pipe.set_adapters(["a"], [0.5])
    half_of_one = outputs(pipe)
    pipe.set_adapters(["a", "b"], [1.0, 1.0])
    both = outputs(pipe)
    pipe.fuse_lora(lora_scale=0.5, adapter_names=["a"])
    assert error(outputs(pipe), half_of_one, base) < 1e-5
    pipe.unfuse_lora()
    assert torch.equal(outputs(pipe), both), "the scale of the fusing is gone"
    pipe.disable_lora()
    assert torch.equal(outputs(pipe), base)
    pipe.enable_lora()
    assert torch.equal(outputs(pipe), both)
    pipe.unload_lora_weights()
    assert torch.equal(outputs(pipe), base)


def test_a_model_moved_while_fused_is_restored_where_it_is() -> None:
    unet, inputs, base = build("sd1")
    unet.add_adapter(SVFTConfig(targets="all"), "a")
    randomize(unet, "a")
    unet.fuse_lora()
    unet.to(torch.bfloat16)
    unet.unfuse_lora()
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16, torch.float32}
    assert digest_of_base(unet) == digest_of_base(ARCHITECTURES["sd1"].build().to(torch.bfloat16))
    unet.disable_adapters()
    found = output_of(unet, {key: _to_bfloat16(value) for key, value in inputs.items()})
    torch.testing.assert_close(found.float(), base, rtol=0.1, atol=0.1)


def _to_bfloat16(value: object) -> object:
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


# Beside a LoRA


def add_lora(unet: nn.Module) -> None:
    torch.manual_seed(5)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False), "style")


@pytest.mark.parametrize("lora_first", [True, False])
def test_a_lora_on_the_same_layers(lora_first: bool) -> None:
    unet, inputs, base = build("sd1")
    additions = [lambda: add_lora(unet), lambda: unet.add_adapter(SVFTConfig(targets="all"), "a")]
    for add in additions if lora_first else reversed(additions):
        add()
    randomize(unet, "a", scale=0.1)
    outer = LoraLayer if not lora_first else SpectralLayer
    assert isinstance(unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q, outer)
    only = {}
    for name in ("style", "a"):
        unet.set_adapters(name, 1.0)
        only[name] = output_of(unet, inputs)
    unet.set_adapters(["style", "a"], [0.6, 0.8])
    both = output_of(unet, inputs)
    assert not torch.allclose(both, only["style"]) and not torch.allclose(both, only["a"])
    for _ in range(2):
        unet.fuse_lora()
        assert error(output_of(unet, inputs), both, base) < 1e-4
        unet.unfuse_lora()
        assert error(output_of(unet, inputs), both, base) < 1e-4
    inject(unet, SVFTConfig(targets="all"), "b")
    assert sum(isinstance(module, SpectralLayer) for module in unet.modules()) == len(adaptable_layers(unet))
    remove(unet, "b")
    unet.set_adapters(["style", "a"], [0.6, 0.8])
    assert error(output_of(unet, inputs), both, base) < 1e-4
    unet.delete_adapters("a")
    unet.set_adapters("style", 1.0)
    assert error(output_of(unet, inputs), only["style"], base) < 1e-4


@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.parametrize("fused_first", ["style", "a"])
def test_fusing_one_of_them_and_then_the_other(lora_first: bool, fused_first: str) -> None:
    unet, inputs, base = build("sd1")
    additions = [lambda: add_lora(unet), lambda: unet.add_adapter(SVFTConfig(targets="all"), "a")]
    for add in additions if lora_first else reversed(additions):
        add()
    randomize(unet, "a", scale=0.1)
    unet.set_adapters(["style", "a"], [1.0, 1.0])
    both = output_of(unet, inputs)
    unet.fuse_lora(adapter_names=[fused_first])
    assert error(output_of(unet, inputs), both, base) < 1e-4, "the other one still acts"
    unet.fuse_lora(adapter_names=["a" if fused_first == "style" else "style"])
    assert error(output_of(unet, inputs), both, base) < 1e-4
    unet.unfuse_lora()
    assert error(output_of(unet, inputs), both, base) < 1e-4
    unet.disable_adapters()
    torch.testing.assert_close(output_of(unet, inputs), base, rtol=1e-4, atol=1e-5)


# Where diffusers ends; a test that fails here says that diffusers has moved on


def test_what_diffusers_keeps_for_lora(tmp_path: Path) -> None:
    unet = tiny_unet()
    unet.add_adapter(SVFTConfig(targets="all"), "a")
    with pytest.raises(IndexError):  # a path of fewer than four parts
        unet.set_adapters("a", {"mid": 0.5})
    unet.save_lora_adapter(str(tmp_path), adapter_name="a", weight_name="a.safetensors")
    with pytest.raises(TypeError, match="`LoraConfig` class could not be instantiated"):
        tiny_unet().load_lora_adapter(str(tmp_path), weight_name="a.safetensors", prefix=None)
    unet.save_pretrained(str(tmp_path / "unet"))
    assert "conv_in.base_layer.weight" in load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")


def test_text_encoders_take_adapters_from_transformers() -> None:
    encoder = tiny_text_encoder()
    base = output_of(encoder, tiny_tokens())
    encoder.add_adapter(SVFTConfig(targets="all"), "a")
    randomize(encoder, "a")
    expected = output_of(encoder, tiny_tokens())
    assert {layer.kind for layer in spectral_layers(encoder).values()} == {"linear", "embedding", "norm"}
    encoder.disable_adapters()
    assert torch.equal(output_of(encoder, tiny_tokens()), base)
    encoder.enable_adapters()
    assert torch.equal(output_of(encoder, tiny_tokens()), expected)


def test_pipelines_find_the_sizes_of_adapted_layers() -> None:
    """SDXL's pipelines ask a layer of the UNet for its number of inputs."""
    unet = ARCHITECTURES["sdxl"].build()
    before = unet.add_embedding.linear_1.in_features, unet.conv_in.out_channels
    inject(unet, SVFTConfig(targets="all"), "dog")
    assert isinstance(unet.add_embedding.linear_1, SpectralLayer)
    assert (unet.add_embedding.linear_1.in_features, unet.conv_in.out_channels) == before
    with pytest.raises(AttributeError):
        _ = unet.conv_in.in_features
