"""What an adapter leaves alone: the base it is fused into, the modules it goes around, state that is not its own."""

from __future__ import annotations

import copy
import hashlib
import random
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adapter_cases import (
    Holder,
    adapted_layer,
    add,
    base_layer,
    every_case,
    every_dtype,
    every_layer,
    every_method,
    explicit_output,
    force_strategy,
    layer_input,
    randomize,
    relative_error,
)
from torch import Tensor, nn

from svft_diffusion.adapters.injection import remove, spectral_layers
from svft_diffusion.adapters.layers import SpectralLayer

every_kind = pytest.mark.parametrize(
    "layer_name", ["linear tall", "conv 2-D", "embedding wide", "transformers Conv1D", "group norm"]
)


def digest(layer: SpectralLayer) -> str:
    parameters = [parameter.detach() for parameter in layer.get_base_layer().parameters()]
    return hashlib.sha256(b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in parameters)).hexdigest()


# The base's bits


@every_case
@every_dtype
def test_unmerge_restores_the_base_bit_for_bit(method: str, layer_name: str, dtype: torch.dtype) -> None:
    layer = adapted_layer(method, layer_name, dtype=dtype)
    before = digest(layer)
    for strength in (1.3, -0.2):
        layer.set_scale("a", strength)
        layer.merge()
        assert digest(layer) != before
        layer.set_scale("a", 0.1)  # a change while fused must not leak into the weight
        randomize(layer, "a", seed=8)
        layer.unmerge()
        assert digest(layer) == before


@every_method
def test_a_hundred_times_fused_and_a_thousand_weights_leave_the_base_as_it_was(method: str) -> None:
    layer = adapted_layer(method, "linear tall")
    x = layer_input("linear tall")
    before = digest(layer)
    draw = random.Random(5)
    for _ in range(100):
        layer.set_scale("a", draw.uniform(-2, 2))
        layer.merge(safe_merge=True)
        layer.set_scale("a", draw.uniform(-2, 2))
        layer.unmerge()
    assert digest(layer) == before
    for _ in range(1000):
        layer.set_scale("a", draw.choice([0.0, draw.uniform(-2, 2)]))
    layer(x)
    assert digest(layer) == before


@every_layer
def test_a_second_adapter_joins_what_is_fused(layer_name: str) -> None:
    model = Holder(base_layer(layer_name))
    layer = add(model, "svft plain")
    add(model, "svdiff", "b", seed=6)
    layer.set_adapter(["a", "b"], inference_mode=True)
    before = digest(layer)
    x = layer_input(layer_name)
    both = layer(x)
    layer.merge(adapter_names=["a"])
    layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["a", "b"]
    assert relative_error(layer(x), both) <= 1e-5
    layer.unmerge()
    assert digest(layer) == before
    assert torch.equal(layer(x), both)


def test_what_is_fused_keeps_the_strength_it_was_fused_at() -> None:
    model = Holder(base_layer("linear tall"))
    layer = add(model, "svft plain")
    add(model, "svft random", "b", seed=6)
    layer.set_adapter(["a", "b"], inference_mode=True)
    weight = layer.get_base_layer().weight.detach().clone()  # type: ignore[operator]
    updates = [layer.get_delta_weight(name) for name in "ab"]
    layer.scale_layer(0.5)  # as fuse_lora(lora_scale=0.5, adapter_names=["a"]) does
    layer.merge(adapter_names=["a"])
    layer.set_scale("a", 3.0)
    layer.merge(adapter_names=["b"])
    expected = weight + 0.5 * updates[0] + updates[1]
    torch.testing.assert_close(layer.get_base_layer().weight.detach(), expected, rtol=0, atol=1e-6)  # type: ignore[operator]


@every_kind
@pytest.mark.parametrize("method", ["svft plain", "svft random"])
def test_what_is_taken_out_is_what_was_put_in(layer_name: str, method: str) -> None:
    layer = adapted_layer(method, layer_name)
    before = layer.get_base_layer().weight.detach().clone()  # type: ignore[operator]
    layer.merge()
    randomize(layer, "a", 8)
    if layer.positions("a") is not None:
        layer.positions("a").copy_(torch.arange(len(layer.positions("a"))))  # type: ignore[arg-type,union-attr]
    with torch.no_grad():
        layer.get_base_layer().weight.add_(1)  # type: ignore[operator]
    layer.unmerge()
    torch.testing.assert_close(layer.get_base_layer().weight.detach(), before + 1, rtol=0, atol=2e-6)  # type: ignore[operator]


@every_kind
def test_what_somebody_else_adds_while_an_adapter_is_fused_stays(layer_name: str) -> None:
    layer = adapted_layer("svft plain", layer_name)
    weight: Tensor = layer.get_base_layer().weight  # type: ignore[assignment]
    before = weight.detach().clone()
    added = 0.1 * torch.randn(before.shape, generator=torch.Generator().manual_seed(7))
    layer.merge()
    with torch.no_grad():
        weight.add_(added)
    layer.unmerge()
    torch.testing.assert_close(weight.detach(), before + added, rtol=0, atol=1e-6)


@every_kind
@pytest.mark.parametrize("merged_before", [False, True])
def test_merge_refuses_values_that_are_not_finite_when_asked_to(layer_name: str, merged_before: bool) -> None:
    model = Holder(base_layer(layer_name))
    layer = add(model, "svft plain")
    add(model, "vectorfit", "b")
    if merged_before:
        layer.merge(adapter_names=["a"])
    before = digest(layer)
    with torch.no_grad():
        for part in layer.trained_parts("b").values():
            part[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        layer.merge(safe_merge=True, adapter_names=["b"])
    assert digest(layer) == before
    assert layer.merged_adapters == (["a"] if merged_before else [])


# What is kept between calls


class WritingPastVersions(torch.optim.SGD):
    """As some optimizers do: no version counter sees what it writes."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(0.1 * parameter.grad)


@every_kind
def test_changes_in_place_are_noticed(layer_name: str) -> None:
    layer = adapted_layer("svft plain, random init", layer_name)
    x = layer_input(layer_name)
    layer(x)
    for change in (*layer.trained_parts("a").values(), *layer.get_base_layer().parameters()):
        before = layer(x)
        with torch.no_grad():
            change.copy_(change + 0.5 * torch.randn(change.shape, generator=torch.Generator().manual_seed(8)))
        assert not torch.equal(layer(x), before)
        if layer.factors is None or change is not layer.get_base_layer().weight:  # its factors are those from before
            assert relative_error(layer(x), explicit_output(layer, x, {"a": ("svft plain", 1.0)})) <= 1e-5


@every_layer
def test_another_adapter_of_the_same_name_is_not_taken_for_the_first(layer_name: str) -> None:
    model = Holder(base_layer(layer_name))
    layer = add(model, "svft plain", "other", seed=None)
    x = layer_input(layer_name)
    for seed in range(3):
        add(model, "svft plain", "a", seed=seed)
        layer.set_adapter(["a"], inference_mode=True)
        assert relative_error(layer(x), explicit_output(layer, x, {"a": ("svft plain", 1.0)})) <= 1e-5
        remove(model, "a")


@every_layer
@pytest.mark.parametrize("strategy", ["activation", "factors", "rebuilt"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, WritingPastVersions])
def test_an_optimizer_step_is_noticed(
    layer_name: str, strategy: str, optimizer: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    force_strategy(monkeypatch, strategy)
    layer = adapted_layer("svft banded 1", layer_name, trains=True)
    stepper = optimizer(layer.trained_parts("a").values(), lr=0.1)
    x = layer_input(layer_name)
    for _ in range(3):
        output = layer(x)
        assert relative_error(output, explicit_output(layer, x, {"a": ("svft banded 1", 1.0)})) <= 1e-5
        output.sum().backward()
        stepper.step()


@pytest.mark.parametrize("layer_name", ["linear tall", "layer norm"])
def test_threads_may_share_a_layer(layer_name: str) -> None:
    layer = adapted_layer("svft plain", layer_name)
    x = layer_input(layer_name)
    weight, expected = layer.get_base_layer().weight, layer(x)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            outputs = list(pool.map(layer, [x] * 1000))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(output, expected) for output in outputs)
    assert layer.get_base_layer().weight is weight


@pytest.mark.parametrize("layer_name", ["linear tall", "conv 2-D", "layer norm"])
def test_a_layer_that_trains_keeps_no_second_weight(layer_name: str) -> None:
    layer = adapted_layer("siva top", layer_name, trains=True)
    x = layer_input(layer_name)
    with torch.no_grad():
        layer(x)
    folded = layer._folded
    assert folded is not None
    reference = weakref.ref(folded)
    del folded
    layer(x)
    assert reference() is None


def test_a_layer_without_adapters_keeps_no_second_weight() -> None:
    layer = adapted_layer("siva top", "linear tall")
    layer(layer_input("linear tall"))
    folded = weakref.ref(layer._folded)  # type: ignore[arg-type]
    layer.delete_adapter("a")
    assert folded() is None
    assert torch.equal(layer(layer_input("linear tall")), base_layer("linear tall")(layer_input("linear tall")))


@every_case
def test_a_call_in_inference_mode_leaves_the_layer_trainable(method: str, layer_name: str) -> None:
    layer = adapted_layer(method, layer_name, dtype=torch.bfloat16)
    x = layer_input(layer_name, torch.bfloat16)
    for trains in (False, True):
        layer.set_adapter(["a"], inference_mode=not trains)
        with torch.inference_mode():
            inferred = layer(x)
    output = layer(x)
    assert relative_error(output, inferred) <= 0.02
    output.sum().backward()
    for part in layer.trained_parts("a").values():
        assert part.grad is not None and part.grad.isfinite().all()


# Modules, parameters, state


@every_case
def test_only_the_parts_train_and_only_they_are_added_to_the_state(method: str, layer_name: str) -> None:
    model = Holder(base_layer(layer_name))
    layer = add(model, method)
    layer.set_adapter(["a"])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"layer.spectral_{part}.a" for part in layer.trained_parts("a")}
    added = {name.replace("base_layer.", "") for name in model.state_dict()} - set(
        Holder(base_layer(layer_name)).state_dict()
    )
    beside = {"layer.spectral_positions.a"} if layer.positions("a") is not None else set()
    beside |= {"layer.spectral_sketch.a"} if "values" in layer.trained_parts("a") else set()
    assert added == trainable | beside


@every_case
def test_removing_the_adapter_gives_the_original_module_back(method: str, layer_name: str) -> None:
    original = base_layer(layer_name)
    model = Holder(original)
    keys = list(model.state_dict())
    add(model, method)
    add(model, "svft plain", "b")
    remove(model, "a")
    assert list(spectral_layers(model)) == ["layer"] and list(model.peft_config) == ["b"]  # type: ignore[arg-type]
    remove(model, "b")
    assert model.layer is original
    assert list(model.state_dict()) == keys
    assert not hasattr(model, "peft_config")


@every_case
def test_a_deep_copy_is_independent(method: str, layer_name: str) -> None:
    layer = adapted_layer(method, layer_name)
    x = layer_input(layer_name)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    randomize(twin, "a", seed=9)
    twin.set_scale("a", 0.5)
    assert not torch.equal(twin(x), expected)
    assert torch.equal(layer(x), expected)
    twin.merge()
    assert torch.equal(layer(x), expected)


@every_method
def test_factors_are_shared_by_all_adapters_of_a_layer(method: str) -> None:
    model = Holder(base_layer("linear tall"))
    layer = add(model, "svft plain")
    before = layer.factors
    assert add(model, method, "b") is layer
    assert layer.factors is before
    assert type(layer.base_layer) is nn.Linear


def test_the_scale_of_one_call_is_taken_back_exactly() -> None:
    layer = adapted_layer("svft plain", "linear tall")
    layer.set_scale("a", 0.7)
    expected = layer.get_delta_weight("a")
    layer.scale_layer(0.3)
    torch.testing.assert_close(layer.get_delta_weight("a"), 0.3 * expected)
    layer.unscale_layer(0.3)
    assert torch.equal(layer.get_delta_weight("a"), expected)
    layer.scale_layer(0.0)
    assert not layer.get_delta_weight("a").any()
    layer.set_scale("a", 1.0)  # how diffusers ends a call with scale 0
    assert torch.equal(layer.get_delta_weight("a"), expected)
