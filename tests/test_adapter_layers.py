"""Every method on every kind of layer: the papers' formulas by each way of computing, and off means the base."""

from __future__ import annotations

import pytest
import torch
from adapter_cases import (
    METHODS,
    adapted_layer,
    base_layer,
    every_case,
    every_dtype,
    explicit_output,
    explicit_parameters,
    force_strategy,
    layer_input,
    relative_error,
)

# Off


@every_case
@every_dtype
def test_off_means_the_base_bit_for_bit(method: str, layer_name: str, dtype: torch.dtype) -> None:
    x = layer_input(layer_name, dtype)
    expected = base_layer(layer_name).to(dtype)(x)
    layer = adapted_layer(method, layer_name, dtype=dtype)
    assert not torch.equal(layer(x), expected)
    layer.set_scale("a", 0.0)
    assert torch.equal(layer(x), expected), "strength 0"
    layer.set_scale("a", 1.0)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected), "disabled"
    layer.enable_adapters(True)
    layer.set_adapter(["a"], inference_mode=True)
    with torch.no_grad():
        for part in layer.trained_parts("a").values():
            part.zero_()
    assert torch.equal(layer(x), expected), "zero values"
    layer.merge()
    assert torch.equal(layer(x), expected), "zero values, merged"


@every_case
def test_a_new_adapter_is_the_base_unless_asked_otherwise(method: str, layer_name: str) -> None:
    layer = adapted_layer(method, layer_name, seed=None)
    x = layer_input(layer_name)
    starts_off_the_base = "init" in method and "norm" not in layer_name.lower()
    assert torch.equal(layer(x), base_layer(layer_name)(x)) != starts_off_the_base


# The formula


@every_case
def test_forward_is_the_explicit_formula_merged_compiled_or_not(
    method: str, layer_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = adapted_layer(method, layer_name)
    x = layer_input(layer_name)
    before = layer.get_base_layer().weight.detach().clone()  # type: ignore[operator]
    for strength in (1.0, 0.3, -1.5):
        layer.set_scale("a", strength)
        expected = explicit_output(layer, x, {"a": (method, strength)})
        update = explicit_parameters(layer, {"a": (method, strength)})["weight"] - before
        assert relative_error(layer(x), expected) <= 1e-5
        torch.testing.assert_close(layer.get_delta_weight("a"), update, rtol=1e-5, atol=2e-6)
        layer.merge(safe_merge=True)
        assert relative_error(layer(x), expected) <= 1e-5
        layer.unmerge()
        with monkeypatch.context() as compiling:
            compiling.setattr(torch.compiler, "is_compiling", lambda: True)
            assert relative_error(layer(x), expected) <= 1e-5
    layer.set_scale("a", 0.0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert relative_error(layer(x), base_layer(layer_name)(x)) <= 1e-6


@every_case
@pytest.mark.parametrize("strategy", ["planned", "activation", "factors", "rebuilt"])
def test_training_is_the_explicit_formula_with_its_gradients(
    method: str, layer_name: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if strategy != "planned":
        force_strategy(monkeypatch, strategy)
    check_training(method, layer_name)


@every_case
def test_compiled_training_is_the_explicit_formula_with_its_gradients(
    method: str, layer_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    check_training(method, layer_name)


def check_training(method: str, layer_name: str) -> None:
    layer = adapted_layer(method, layer_name, trains=True)
    layer.set_scale("a", 0.7)
    x = layer_input(layer_name)
    inputs = [x.clone(), x.clone()]
    if x.is_floating_point():
        inputs = [tensor.requires_grad_() for tensor in inputs]
    parts = {part: tensor.detach().clone().requires_grad_() for part, tensor in layer.trained_parts("a").items()}
    found = layer(inputs[0])
    expected = explicit_output(layer, inputs[1], {"a": (method, 0.7)}, {"a": parts})
    assert relative_error(found, expected) <= 1e-5
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    for output in (found, expected):
        (output * weights).sum().backward()
    assert parts
    for part, tensor in layer.trained_parts("a").items():
        assert tensor.grad is not None and parts[part].grad is not None
        assert tensor.grad.abs().max() > 0
        assert relative_error(tensor.grad, parts[part].grad) <= METHODS[method].gradient_error, part
    if x.is_floating_point():
        assert inputs[0].grad is not None and inputs[1].grad is not None
        assert relative_error(inputs[0].grad, inputs[1].grad) <= 1e-5
    assert all(parameter.grad is None for parameter in layer.get_base_layer().parameters())


# 16 bit


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_computes_nearly_the_same_with_float32_values(
    method: str, layer_name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = adapted_layer(method, layer_name)
    before = {part: tensor.detach().clone() for part, tensor in layer.trained_parts("a").items()}
    layer.to(dtype)
    x = layer_input(layer_name, dtype)
    rounded = explicit_output(layer, x if x.dtype == torch.int64 else x.float(), {"a": (method, 1.0)})
    tolerance = 8 * torch.finfo(dtype).eps
    for trains in (False, True):
        layer.set_adapter(["a"], inference_mode=not trains)
        output = layer(x)
        assert output.dtype == dtype
        assert relative_error(output, rounded) <= tolerance
    output.sum().backward()
    for part, tensor in layer.trained_parts("a").items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[part])
        assert tensor.grad is not None and tensor.grad.dtype == torch.float32 and tensor.grad.isfinite().all()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert relative_error(layer(x), rounded) <= tolerance


# Float64


@pytest.mark.parametrize(
    "layer_name", ["linear tall", "conv 2-D", "embedding tall", "transformers Conv1D", "layer norm"]
)
@pytest.mark.parametrize("trains", [False, True])
def test_a_float64_base_keeps_its_digits(layer_name: str, trains: bool) -> None:
    layer = adapted_layer("vectorfit", layer_name, dtype=torch.float64, trains=trains)
    base, x = layer.get_base_layer(), layer_input(layer_name, torch.float64)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.rand_like(parameter), alpha=1e-9)  # what float32 can't hold
        for part in layer.trained_parts("a").values():
            part.zero_()
    assert relative_error(layer(x), base(x)) <= 1e-14
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 as it is
        assert relative_error(layer(x), base(x)) <= 1e-14
    layer.merge()
    assert torch.equal(layer(x), base(x))
    layer.unmerge()
