"""Several adapters on one layer: they add up as their formulas say, for the whole batch or for each sample."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from adapter_cases import (
    Holder,
    add,
    base_layer,
    every_layer,
    explicit_output,
    force_strategy,
    layer_input,
    relative_error,
)
from peft import LoraConfig, inject_adapter_in_model

from svft_diffusion.adapters.injection import remove
from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.errors import UserError

# Methods of the adapters a, b, ... on one layer.
BLENDS = {
    "all alike": ("svft plain", "svft plain", "svft plain"),
    "svdiff inside one relu": ("svdiff", "svdiff, rank 3"),
    "norms by entry and as a whole": ("svdiff", "svdiff, scalar norms", "svdiff, scalar norms"),
    "other ranks": ("svft plain, rank 3", "svft plain", "svdiff, rank 3"),
    "other widths of the band": ("svft banded 1", "svft banded 3", "svft banded 1, rank 4"),
    "other patterns": ("svft banded 1", "svft random", "svft top-k, rank 4", "svft plain"),
    "other selections": ("siva bottom", "siva top", "siva random"),
    "listed beside whole": ("svft listed", "svft listed, rank 3", "svft plain", "svdiff listed", "svdiff"),
    "everything": (
        "svdiff",
        "svft banded 1, official init",
        "vectorfit",
        "siva random",
        "svft random",
        "svdiff, rank 3",
    ),
}
STRENGTHS = (0.7, 1.3, -0.4, 0.9, 0.2, -1.1)
every_blend = pytest.mark.parametrize("blend", BLENDS)


def blended(blend: str, layer_name: str, *, trains: bool = False) -> tuple[SpectralLayer, dict[str, tuple[str, float]]]:
    """A layer with the adapters of a blend, all active, and the method and strength of each."""
    model = Holder(base_layer(layer_name))
    adapters = dict(zip("abcdef", zip(BLENDS[blend], STRENGTHS, strict=False), strict=False))
    for seed, (name, (method, strength)) in enumerate(adapters.items()):
        layer = add(model, method, name, seed=seed)
        layer.set_scale(name, strength)
    layer.set_adapter(list(adapters), inference_mode=not trains)
    return layer, adapters


@every_blend
@every_layer
def test_adapters_add_up_folded_merged_and_compiled(
    blend: str, layer_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, adapters = blended(blend, layer_name)
    x = layer_input(layer_name)
    expected = explicit_output(layer, x, adapters)
    assert relative_error(layer(x), expected) <= 1e-5
    layer.merge()
    assert relative_error(layer(x), expected) <= 1e-5
    layer.unmerge()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert relative_error(layer(x), expected) <= 1e-5


@every_blend
@every_layer
@pytest.mark.parametrize("strategy", ["activation", "factors", "rebuilt"])
def test_adapters_that_train_together_have_the_gradients_of_their_sum(
    blend: str, layer_name: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_strategy(monkeypatch, strategy)
    layer, adapters = blended(blend, layer_name, trains=True)
    x = layer_input(layer_name)
    parts = {
        name: {part: tensor.detach().clone().requires_grad_() for part, tensor in layer.trained_parts(name).items()}
        for name in adapters
    }
    found, expected = layer(x), explicit_output(layer, x, adapters, parts)
    assert relative_error(found, expected) <= 1e-5
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    for output in (found, expected):
        (output * weights).sum().backward()
    for name in adapters:
        for part, tensor in layer.trained_parts(name).items():
            assert tensor.grad is not None
            assert relative_error(tensor.grad, parts[name][part].grad) <= 1e-5, (name, part)  # type: ignore[arg-type]


@every_layer
def test_one_adapter_trains_beside_a_frozen_one(layer_name: str) -> None:
    layer, adapters = blended("svdiff inside one relu", layer_name)
    layer.set_adapter(["a", "b"])
    layer.set_requires_grad("a", False)
    x = layer_input(layer_name)
    output = layer(x)
    assert relative_error(output, explicit_output(layer, x, adapters)) <= 1e-5
    output.sum().backward()
    assert all(part.grad is None for part in layer.trained_parts("a").values())
    assert all(part.grad is not None for part in layer.trained_parts("b").values())


def test_two_svdiff_shifts_meet_before_the_relu() -> None:
    layer, _ = blended("svdiff inside one relu", "linear tall")
    assert layer.factors is not None
    U, S, Vh = layer.factors
    with torch.no_grad():
        layer.spectral_values["a"].copy_(-3 * S)
        layer.spectral_values["b"].copy_(2.5 * S[:3])
    layer.set_scale("a", 1.0)
    layer.set_scale("b", 1.0)
    left = torch.tensor([0.5, 0.5, 0.5, 0, 0, 0]) * S  # relu(S - 3 S + 2.5 S), not relu(S - 3 S) + 2.5 S
    x = layer_input("linear tall")
    base = layer.get_base_layer()
    shift = layer.spectral_bias["b"]
    expected = x @ ((U * left) @ Vh).T + base.bias + shift  # type: ignore[operator]
    assert relative_error(layer(x), expected) <= 1e-5


# Each sample of a batch with its own


SAMPLES: tuple[dict[str, float], ...] = ({"a": 0.7, "b": 1.3}, {}, {"b": -0.4, "elsewhere": 1.0})


@every_blend
@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_sample_has_its_own_adapters(blend: str, layer_name: str, dtype: torch.dtype) -> None:
    layer, adapters = blended(blend, layer_name)
    layer.to(dtype)
    x = layer_input(layer_name, dtype)
    base_output = layer.get_base_layer()(x)
    layer.sample_weights = list(SAMPLES)
    output, doubled = layer(x), layer(torch.cat([x, x]))
    layer.sample_weights = None
    assert torch.equal(output[1], base_output[1]), "a sample without adapters is the base's"
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for index in (0, 2):
        for name in adapters:
            layer.set_scale(name, SAMPLES[index].get(name, 0.0))
        assert relative_error(output[index], layer(x[index : index + 1])[0]) <= tolerance
    assert relative_error(doubled, torch.cat([output, output])) <= tolerance


def test_one_row_of_ids_for_all_samples_is_spread_over_them() -> None:
    layer, _ = blended("all alike", "embedding wide")
    x = layer_input("embedding wide")[:1]
    layer.sample_weights = list(SAMPLES)
    spread = layer(x)
    assert relative_error(spread, layer(torch.cat([x, x, x]))) <= 1e-6
    assert not torch.equal(spread[0], spread[2])


def test_a_batch_that_the_samples_do_not_divide_is_refused() -> None:
    layer, _ = blended("all alike", "linear tall")
    layer.sample_weights = list(SAMPLES)
    with pytest.raises(UserError, match="a batch of 2 can't be shared by 3 samples' adapters"):
        layer(layer_input("linear tall")[:2])
    with pytest.raises(UserError, match=r"a batch of 1 .* give one prompt for each sample"):
        layer(layer_input("linear tall")[:1])


# Beside a LoRA

LAYERS_OF_LORA = [
    "linear tall",
    "linear wide without bias",
    "conv 1-D",
    "conv 2-D, 1 x 1, without bias",
    "conv 3-D",
    "embedding wide",
    "transformers Conv1D",
]


@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.parametrize("layer_name", LAYERS_OF_LORA)
@pytest.mark.parametrize("method", ["svft banded 1", "svdiff, rank 3"])
def test_a_lora_on_the_same_layer(method: str, layer_name: str, lora_first: bool) -> None:
    model = Holder(base_layer(layer_name))
    x = layer_input(layer_name)
    base_output = model(x)
    add_lora = partial(
        inject_adapter_in_model, LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False), model, "lora"
    )
    torch.manual_seed(5)
    if lora_first:
        add_lora()
        of_lora = model(x) - base_output
    layer = add(model, method)
    if not lora_first:
        layer.set_scale("a", 0.0)
        add_lora()
        of_lora = model(x) - base_output
        layer.set_scale("a", 1.0)
    for trains in (True, False):
        layer.set_adapter(["a"], inference_mode=not trains)
        both = model(x)
        assert relative_error(both, of_lora + explicit_output(layer, x, {"a": (method, 1.0)})) <= 1e-5
    for _ in range(2):
        model.apply(lambda module: module.merge() if hasattr(module, "merge") else None)
        assert relative_error(model(x), both) <= 1e-5
        model.apply(lambda module: module.unmerge() if hasattr(module, "unmerge") else None)
        assert relative_error(model(x), both) <= 1e-5
    assert add(model, "svft plain", "b") is layer, "b shares the wrapper"
    remove(model, "b")
    layer.set_adapter(["a"], inference_mode=True)
    assert relative_error(model(x), both) <= 1e-5
