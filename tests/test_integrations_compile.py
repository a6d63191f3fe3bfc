"""torch.compile: one graph serves every weight and every adapter of equal shape."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from adapted_models import CONFIGS, IDS, Mixed, error, output_of, randomize
from peft import inject_adapter_in_model
from tiny_models import tiny_inputs, tiny_unet_sd1
from torch import Tensor, nn

from svft_diffusion import SiVAConfig, SVDiffConfig, SVFTConfig
from svft_diffusion.adapters import set_adapters
from svft_diffusion.adapters.injection import spectral_layers

# Those whose graphs differ most; the others compile in `make test-slow`.
FAST = ("svft banded 1, official init", "svdiff, scalar norms", "siva random")
some_methods = pytest.mark.parametrize(
    "method", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)


@pytest.fixture(autouse=True)
def no_recompiles() -> Iterator[None]:
    """A graph that has to be made a second time is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def compiled_output(model: nn.Module, inputs: Mapping[str, Any], backend: str = "eager") -> Tensor:
    """What a compiled model answers; the code of the model counts as never compiled afterwards."""
    output = output_of(torch.compile(model, backend=backend), inputs)
    torch._dynamo.reset()
    return output


class CountingBackend:
    """Runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


def adapted(method: str) -> Mixed:
    model: Mixed = inject_adapter_in_model(CONFIGS[method](targets="all"), Mixed(), "a")
    randomize(model, "a")
    return model


def swap_values(model: nn.Module, seed: int) -> None:
    """As swapping an adapter does: other numbers in the same place."""
    randomize(model, "a", seed)


def set_weight(model: nn.Module, weight: float) -> None:
    for layer in spectral_layers(model).values():
        layer.set_scale("a", weight)


@some_methods
@pytest.mark.parametrize("trains", [True, False])
def test_one_graph_serves_100_weights_and_100_swaps(method: str, trains: bool) -> None:
    model, base = adapted(method), compiled_output(Mixed(), {"ids": IDS})
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for layer in spectral_layers(model).values():
        layer.set_adapter(["a"], inference_mode=not trains)
    with torch.set_grad_enabled(trains):
        for step in range(100):
            set_weight(model, 2 * step / 99 - 1)
            swap_values(model, step)
            found = compiled(IDS)
            if step % 20 == 0:
                assert error(found[0], model(IDS)[0], base) < 1e-5
        set_weight(model, 0.0)
        assert torch.equal(compiled(IDS)[0], base), "strength 0"
    assert backend.graphs == 1


@some_methods
def test_training_under_compile_has_the_same_gradients(method: str) -> None:
    model = adapted(method)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    for run in (model, compiled):
        run(IDS).square().sum().backward()
    for path, layer in spectral_layers(model).items():
        twin = spectral_layers(compiled._orig_mod)[path].trained_parts("a")
        for part, tensor in layer.trained_parts("a").items():
            assert tensor.grad is not None
            torch.testing.assert_close(twin[part].grad, tensor.grad, rtol=1e-4, atol=1e-5)


def test_adapters_that_train_different_triplets_are_one_graph() -> None:
    model, base = Mixed(), Mixed()
    configs = (
        SiVAConfig(select="random", fraction=0.5, targets="all"),
        SiVAConfig(select="random", fraction=0.5, seed=7, targets="all"),
        SVFTConfig(rank=3, targets="all"),
        SVDiffConfig(targets="all"),
    )
    for name, config in zip("abcd", configs, strict=True):
        inject_adapter_in_model(config, model, name)
        randomize(model, name)
    for layer in spectral_layers(model).values():
        layer.set_adapter(list("abcd"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for weight in (1.0, 0.5, 0.0, -1.0):
        set_weight(model, weight)
        assert error(compiled(IDS), model(IDS), base(IDS)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models_compile(dtype: torch.dtype) -> None:
    model, base = adapted("siva bottom").to(dtype), Mixed().to(dtype)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for weight in (1.0, 0.5):
        set_weight(model, weight)
        assert error(compiled(IDS), model(IDS), base(IDS)) < 0.2
    set_weight(model, 0.0)
    assert torch.equal(compiled(IDS), base(IDS))


def test_values_that_follow_another_basis_are_seen_by_the_graph() -> None:
    model = adapted("siva bottom")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(IDS)
    for layer in spectral_layers(model).values():
        if layer.factors is not None:  # as a rotated basis: other factors in the same layer
            U, S, Vh = layer.factors
            layer._placed.replace(type(layer.factors)(U.roll(1, 1).contiguous(), S, Vh), exact=False)
    with torch._dynamo.config.patch(error_on_recompile=False):
        assert error(compiled(IDS), model(IDS), Mixed()(IDS)) < 1e-5


def test_a_block_of_a_unet_is_one_graph() -> None:
    unet = tiny_unet_sd1()
    hidden, text = torch.randn(2, 24, 4, 4), tiny_inputs()["encoder_hidden_states"]
    inputs = {"hidden_states": hidden, "encoder_hidden_states": text, "return_dict": False}
    base = output_of(unet.mid_block.attentions[0], inputs)
    unet.add_adapter(SVFTConfig(pattern="banded", off_diagonals=1, targets="all"), "a")
    randomize(unet, "a")
    block = unet.mid_block.attentions[0]
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    for weight in (1.0, 0.3, -0.5):
        set_adapters({"unet": unet}, {"a": weight})
        assert error(output_of(compiled, inputs), output_of(block, inputs), base) < 1e-5


@pytest.mark.slow
def test_a_whole_unet_is_one_graph() -> None:
    unet, inputs = tiny_unet_sd1(), tiny_inputs()
    base = compiled_output(tiny_unet_sd1(), inputs)
    unet.add_adapter(SVFTConfig(pattern="banded", off_diagonals=1, targets="all"), "a")
    unet.add_adapter(SVDiffConfig(targets="all"), "b")
    randomize(unet, "a")
    randomize(unet, "b", 3)
    set_adapters({"unet": unet}, {"a": 1.0, "b": 1.0})
    backend = CountingBackend()
    compiled = torch.compile(unet, backend=backend, fullgraph=True)
    for step in range(10):
        set_adapters({"unet": unet}, {"a": step / 10, "b": 1 - step / 5})
        swap_values(unet, step)
        found = output_of(compiled, inputs)
    assert backend.graphs == 1
    assert error(found, output_of(unet, inputs), base) < 1e-5
    set_adapters({"unet": unet}, {"a": 0.0, "b": 0.0})
    assert torch.equal(output_of(compiled, inputs), base)


@pytest.mark.slow
def test_inductor_computes_the_same() -> None:
    unet, inputs = tiny_unet_sd1(), tiny_inputs()
    base = compiled_output(tiny_unet_sd1(), inputs, "inductor")
    unet.add_adapter(SVFTConfig(pattern="banded", off_diagonals=1, targets="all"), "a")
    randomize(unet, "a")
    set_adapters({"unet": unet}, {"a": 1.0})
    compiled = torch.compile(unet)
    for weight in (1.0, 0.3):
        set_adapters({"unet": unet}, {"a": weight})
        assert error(output_of(compiled, inputs), output_of(unet, inputs), base) < 1e-4
    set_adapters({"unet": unet}, {"a": 0.0})
    torch.testing.assert_close(output_of(compiled, inputs), base, rtol=1e-5, atol=1e-5)
