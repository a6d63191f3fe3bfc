"""Sums of adapters: one adapter that does what several do together, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import IDS, NAMES, Mixed, randomize
from adapter_cases import METHODS, every_dtype, relative_error
from diffusers import UNet2DConditionModel
from tiny_models import tiny_text_encoder, tiny_unet, tiny_unet_sdxl
from torch import Tensor

from svft_diffusion import SiVAConfig, SVDiffConfig, SVFTConfig, VectorFitConfig, load_adapter, save_adapter
from svft_diffusion.adapters import SpectralConfig, adapter_state, loaded_adapters, set_adapters, unload_adapter
from svft_diffusion.adapters.injection import inject, spectral_layers
from svft_diffusion.algebra.combine import average, combine, interpolate, scale, subtract
from svft_diffusion.algebra.style import geometry_blocks, style_mix
from svft_diffusion.errors import UserError
from svft_diffusion.files import AdapterMetadata, read_header

WEIGHTS = (0.7, -0.4, 1.3, 0.05, 0.5, -1.1, 0.9, 0.25)
# Configurations that are blended, and the layout of their sum: method, pattern, off-diagonals, rank.
MIXTURES: dict[str, tuple[tuple[SpectralConfig, ...], tuple[str, str, int, int | None]]] = {
    "other bands": (
        (SVFTConfig(pattern="banded", off_diagonals=1), SVFTConfig(), SVFTConfig(pattern="banded", off_diagonals=3)),
        ("svft", "banded", 3, None),
    ),
    "other ranks": ((SVFTConfig(rank=3), SVFTConfig(rank=5)), ("svft", "plain", 0, 5)),
    "a rank and none": ((VectorFitConfig(rank=3), VectorFitConfig()), ("vectorfit", "plain", 0, None)),
    "a rank and a band": (
        (SVFTConfig(rank=4, pattern="banded", off_diagonals=2), SVFTConfig(rank=5, pattern="banded", off_diagonals=1)),
        ("svft", "banded", 2, 5),
    ),
    "other shifts": (
        (SVDiffConfig(rank=3), SVDiffConfig(train_bias=True), SVDiffConfig()),
        ("svdiff", "plain", 0, None),
    ),
    "other methods": (
        (VectorFitConfig(), SVFTConfig(pattern="banded", off_diagonals=1), SiVAConfig(fraction=0.4)),
        ("svft", "banded", 1, None),
    ),
    "other fractions": ((SiVAConfig(fraction=0.4), SiVAConfig(fraction=0.6)), ("siva", "plain", 0, None)),
    "other ends": ((SiVAConfig(select="top"), SiVAConfig(select="bottom")), ("siva", "plain", 0, None)),
    "other random triplets": (
        (SiVAConfig(select="random", fraction=0.4, seed=1), SiVAConfig(select="random", fraction=0.4, seed=2)),
        ("siva", "plain", 0, None),
    ),
    "other random entries": (
        (SVFTConfig(pattern="random", off_diagonals=1, seed=1), SVFTConfig(pattern="random", off_diagonals=1, seed=2)),
        ("svft", "listed", 0, None),
    ),
    "listed and banded": (
        (SVFTConfig(pattern="top_k", rank=4), SVFTConfig(pattern="banded", off_diagonals=2), VectorFitConfig()),
        ("svft", "listed", 0, None),
    ),
    "biases alone and values": (
        (SpectralConfig(method="vectorfit", train_values=False, train_bias=True), SVDiffConfig(rank=2)),
        ("svdiff", "plain", 0, 2),
    ),
}  # fmt: skip


def pipeline_with(*configs: SpectralConfig, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Mixed], list[str]]:
    """A model with a layer of every kind and random adapters a0, a1, ... in all its layers."""
    model = Mixed().to(dtype)
    for index, config in enumerate(configs):
        fields = {key: value for key, value in vars(config).items() if key in SpectralConfig.__dataclass_fields__}
        whole = SpectralConfig(**{**fields, "targets": "all", "train_norm": True})
        inject(model, whole, f"a{index}")
        randomize(model, f"a{index}", seed=index)
        for layer in spectral_layers(model).values():
            layer.set_adapter([f"a{index}"], inference_mode=True)
    return {"unet": model}, [f"a{index}" for index in range(len(configs))]


def updates(pipe: dict[str, Mixed], weights: dict[str, float]) -> dict[str, Tensor]:
    """The change of every weight and bias, by the adapters' formulas (SVDiff: Eq. 4), float32."""
    found: dict[str, Tensor] = {}
    for path, layer in spectral_layers(pipe["unet"]).items():
        names = [name for name in weights if layer.has_adapter(name)]
        for name in names:
            layer.set_scale(name, weights[name])
        shifts = [weights[name] * layer.trained_parts(name)["bias"] for name in names
                  if "bias" in layer.trained_parts(name)]  # fmt: skip
        if shifts:
            found[f"{path}.bias"] = torch.stack(shifts).sum(0)
        norms = [name for name in names if layer.options[name].norm_shift == "scalar" and layer.kind == "norm"]
        relus = [name for name in names if layer.options[name].method == "svdiff" and layer.kind != "norm"]
        total = sum((layer.get_delta_weight(name) for name in names if name not in norms + relus), torch.zeros(()))
        if norms:
            w = layer.get_base_layer().weight.detach().float()  # type: ignore[operator]
            shift = sum(weights[name] * layer.trained_parts(name)["norm"] for name in norms)
            total = total + w * (torch.relu(w.norm() + shift) / w.norm() - 1)
        with_values = [name for name in relus if "values" in layer.trained_parts(name)]
        if with_values:
            assert layer.factors is not None
            U, S, Vh = layer.factors
            delta = torch.zeros(len(S))
            for name in with_values:
                values = layer.trained_parts(name)["values"].detach()
                delta[: len(values)] += weights[name] * values
            matrix = (U * (torch.relu(S + delta) - S)) @ Vh
            weight = layer.get_base_layer().weight
            transposed = type(layer.get_base_layer()).__name__ in ("Embedding", "Conv1D")
            total = total + (matrix.T if transposed else matrix).reshape(weight.shape)  # type: ignore[arg-type]
        found[f"{path}.weight"] = total.detach()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, tensor in expected.items():
        if tensor.ndim == 0 or not tensor.any():  # nothing changes the weight
            assert not found[key].any(), key
        else:
            assert relative_error(found[key], tensor) <= 1e-6, key


@pytest.mark.parametrize("method", NAMES)
@every_dtype
def test_eight_adapters_are_their_explicit_sum_in_their_own_layout(method: str, dtype: torch.dtype) -> None:
    pipe, names = pipeline_with(*(METHODS[method].config() for _ in WEIGHTS), dtype=dtype)
    weights = dict(zip(names, WEIGHTS, strict=True))
    combine(pipe, weights, "sum")
    model = pipe["unet"]
    before, after = model.peft_config["a0"], model.peft_config["sum"]  # type: ignore[index]
    for field in ("method", "pattern", "off_diagonals", "rank", "fraction", "select", "norm_shift", "train_bias"):
        assert getattr(before, field) == getattr(after, field)  # type: ignore[arg-type]
    gates = {key for key in adapter_state(pipe, "a0") if key.endswith(".gate")}
    assert adapter_state(pipe, "sum").keys() == adapter_state(pipe, "a0").keys() - gates
    assert_same(updates(pipe, {"sum": 1.0}), updates(pipe, weights))


@pytest.mark.parametrize("mixture", MIXTURES)
@every_dtype
def test_adapters_of_other_layouts_meet_in_the_smallest_common_one(mixture: str, dtype: torch.dtype) -> None:
    configs, layout = MIXTURES[mixture]
    pipe, names = pipeline_with(*configs, dtype=dtype)
    weights = dict(zip(names, WEIGHTS, strict=False))
    combine(pipe, weights, "sum")
    config: Any = pipe["unet"].peft_config["sum"]  # type: ignore[index]
    assert (config.method, config.pattern, config.off_diagonals, config.rank) == layout
    assert_same(updates(pipe, {"sum": 1.0}), updates(pipe, weights))


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_sum_acts_as_its_parts_did_before_and_after_a_file(mixture: str, tmp_path: Path) -> None:
    configs, layout = MIXTURES[mixture]
    pipe, names = pipeline_with(*configs)
    weights: dict[str, Any] = dict(zip(names, WEIGHTS, strict=False))
    set_adapters(pipe, weights)
    with torch.no_grad():
        expected = pipe["unet"](IDS)
        combine(pipe, weights, "sum")
        set_adapters(pipe, {"sum": 1.0})
        torch.testing.assert_close(pipe["unet"](IDS), expected, rtol=1e-5, atol=1e-5)
        file = save_adapter(pipe, "sum", tmp_path / "sum.safetensors", metadata=AdapterMetadata(base_name="mixed"))
        assert read_header(file).pattern == layout[1]
        fresh = {"unet": Mixed()}
        load_adapter(fresh, file, "sum")
        torch.testing.assert_close(fresh["unet"](IDS), expected, rtol=1e-5, atol=1e-5)
        again = save_adapter(fresh, "sum", tmp_path / "again.safetensors", metadata=AdapterMetadata(base_name="mixed"))
    assert again.read_bytes() == file.read_bytes()


def test_shifts_meet_inside_the_relu() -> None:
    pipe, _ = pipeline_with(SVDiffConfig(), SVDiffConfig())
    layer = spectral_layers(pipe["unet"])["tall"]
    assert layer.factors is not None
    with torch.no_grad():
        layer.spectral_values["a0"].copy_(-3 * layer.factors.S)
        layer.spectral_values["a1"].copy_(2.5 * layer.factors.S)
    combine(pipe, {"a0": 1.0, "a1": 1.0}, "sum")
    # -3 sigma alone ends at zero; together half of every singular value is left.
    assert relative_error(layer.get_delta_weight("sum"), -0.5 * layer.get_base_layer().weight) <= 1e-6  # type: ignore[operator]


def test_layers_of_either_are_in_the_sum_and_layers_of_weight_zero_are_not() -> None:
    model = Mixed()
    inject(model, SVFTConfig(target_modules=["tall", "conv"], pattern="banded", off_diagonals=1), "a")
    inject(model, VectorFitConfig(target_modules=["wide", "conv"]), "b")  # in `wide` the band is zero beside it
    randomize(model, "a")
    randomize(model, "b")
    pipe = {"unet": model}
    combine(pipe, {"a": 1.0, "b": 0.5}, "sum")
    assert set(spectral_layers(model, "sum")) == {"tall", "wide", "conv"}
    assert_same(updates(pipe, {"sum": 1.0}), updates(pipe, {"a": 1.0, "b": 0.5}))
    combine(pipe, {"a": {"unet": {"conv": 0.3}}, "b": {"unet": {"wide": 2.0, "": 0.0}}}, "some")
    assert set(spectral_layers(model, "some")) == {"conv", "wide"}
    found = spectral_layers(model)
    for layer in found.values():
        layer.set_scale("a", 0.3)
        layer.set_scale("b", 2.0)
    assert relative_error(found["conv"].get_delta_weight("some"), found["conv"].get_delta_weight("a")) <= 1e-6
    assert relative_error(found["wide"].get_delta_weight("some"), found["wide"].get_delta_weight("b")) <= 1e-6


def test_components_have_weights_of_their_own() -> None:
    models = {"unet": Mixed(), "text_encoder": Mixed()}
    for model in models.values():
        inject(model, SVFTConfig(target_modules=["tall"]), "a")
        randomize(model, "a")
    combine(models, {"a": {"unet": 0.5, "text_encoder": 0.2}}, "sum")
    for component, weight in {"unet": 0.5, "text_encoder": 0.2}.items():
        layer = spectral_layers(models[component])["tall"]
        assert relative_error(layer.get_delta_weight("sum"), weight * layer.get_delta_weight("a")) <= 1e-6
    combine(models, {"a": {"unet": 0.5}}, "weaker")
    assert "weaker" not in models["text_encoder"].peft_config  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "weights"),
    [
        (lambda pipe: scale(pipe, "a0", -0.3, "sum"), {"a0": -0.3}),
        (lambda pipe: subtract(pipe, "a0", "a1", "sum"), {"a0": 1.0, "a1": -1.0}),
        (lambda pipe: interpolate(pipe, "a0", "a1", 0.2, "sum"), {"a0": 0.8, "a1": 0.2}),
        (lambda pipe: average(pipe, ["a0", "a1", "a2"], "sum"), {"a0": 1 / 3, "a1": 1 / 3, "a2": 1 / 3}),
    ],
)
def test_named_cases(make: Any, weights: dict[str, float]) -> None:
    pipe, _ = pipeline_with(SVDiffConfig(), SVDiffConfig(), SVDiffConfig())
    make(pipe)
    assert_same(updates(pipe, {"sum": 1.0}), updates(pipe, weights))


@pytest.mark.parametrize(
    ("configs", "weights", "message"),
    [
        ((SVDiffConfig(), SVFTConfig()), {"a0": 1.0, "a1": 1.0}, "'a0' is svdiff, .* 'a1' is svft: keep both files"),
        ((SVDiffConfig(norm_shift="scalar"), SVDiffConfig()), {"a0": 1.0, "a1": 1.0}, "'a1' shifts each entry"),
        ((SVFTConfig(),), {"a0": 0.0}, "nothing is left"),
        ((SVFTConfig(),), {"a0": 1.0, "b": 1.0}, "there is no adapter 'b'"),
        ((SVFTConfig(),), {"a0": float("nan")}, "finite"),
        ((SVFTConfig(),), {"a0": 1e38}, "too large for float32"),
        ((SVFTConfig(),), {"a0": {"text_encoder": 1.0}}, "no component 'text_encoder'"),
    ],
)
def test_what_has_no_sum_is_refused_and_nothing_is_changed(
    configs: tuple[SpectralConfig, ...], weights: dict[str, Any], message: str
) -> None:
    pipe, names = pipeline_with(*configs)
    with torch.no_grad():
        spectral_layers(pipe["unet"])["tall"].spectral_values["a0"].mul_(100)
    active = [list(layer.active_adapters) for layer in spectral_layers(pipe["unet"]).values()]
    with pytest.raises(UserError, match=message):
        combine(pipe, weights, "sum")
    assert loaded_adapters(pipe) == names
    assert [list(layer.active_adapters) for layer in spectral_layers(pipe["unet"]).values()] == active


def test_names_that_are_taken_or_given_twice() -> None:
    pipe, _ = pipeline_with(SVFTConfig(), SVFTConfig())
    with pytest.raises(UserError, match="already loaded"):
        combine(pipe, {"a0": 1.0}, "a1")
    with pytest.raises(UserError, match="can't have the name"):
        combine(pipe, {"a0": 1.0}, "a.b")
    with pytest.raises(UserError, match="named twice"):
        subtract(pipe, "a0", "a0", "sum")
    unload_adapter(pipe, "a1")
    combine(pipe, {"a0": 1.0}, "a1")


# Style mixing


def test_geometry_of_stable_diffusion_1_are_the_layers_of_the_paper() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel()
    blocks = geometry_blocks(unet)
    assert blocks == [
        "down_blocks.2.resnets.1", "down_blocks.2.attentions.1", "down_blocks.2.downsamplers", "down_blocks.3",
        "mid_block",
    ]  # fmt: skip
    attentions = {path.split(".transformer_blocks")[0] for path, _ in unet.named_modules() if path.endswith(".attn2")}
    assert len(attentions) == 16
    # The sixth and the seventh of XTI's 16 cross-attentions: (16, down, 1) and (8, down, 0).
    assert {path for path in attentions if path.startswith(tuple(blocks))} == {
        "down_blocks.2.attentions.1", "mid_block.attentions.0"
    }  # fmt: skip


@pytest.mark.parametrize("make", [tiny_unet, tiny_unet_sdxl])
def test_geometry_of_other_unets_ends_with_the_mid_block(make: Any) -> None:
    blocks = geometry_blocks(make())
    assert blocks == ["down_blocks.1.resnets.0", "down_blocks.1.attentions.0", "mid_block"]


def test_a_style_mix_has_each_layer_of_one_adapter() -> None:
    models = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}
    for seed, name in enumerate(("shape", "look")):
        for model in models.values():
            inject(model, SVDiffConfig(), name)
            randomize(model, name, seed=seed)
    blocks = style_mix(models, "shape", "look", "mix")
    state, shape, look = (adapter_state(models, name) for name in ("mix", "shape", "look"))
    starts = tuple(f"unet.{block}." for block in blocks)
    of_shape = {key for key in state if key.startswith(starts)}
    assert state.keys() == look.keys() and 0 < len(of_shape) < len(state)
    for key, values in state.items():
        assert torch.equal(values, shape[key] if key in of_shape else look[key]), key
    style_mix(models, "shape", "look", "mix2", blocks=["up_blocks.0"])
    other = adapter_state(models, "mix2")
    assert all(torch.equal(other[key], (shape if "up_blocks.0." in key else look)[key]) for key in other)


def test_style_mixes_that_make_no_sense_are_refused() -> None:
    pipe, _ = pipeline_with(SVFTConfig(), SVFTConfig())
    with pytest.raises(UserError, match="which layers of Mixed draw the geometry is not known"):
        style_mix(pipe, "a0", "a1", "mix")
    with pytest.raises(UserError, match="has no module 'nowhere'"):
        style_mix(pipe, "a0", "a1", "mix", blocks=["nowhere"])
    with pytest.raises(UserError, match="two adapters"):
        style_mix(pipe, "a0", "a0", "mix", blocks=["tall"])
    with pytest.raises(UserError, match="needs the denoiser"):
        style_mix({"text_encoder": pipe["unet"]}, "a0", "a1", "mix", blocks=["tall"])
