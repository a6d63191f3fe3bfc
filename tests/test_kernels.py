"""The training paths of one adapted layer against autograd through the explicit formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from svft_diffusion.kernels import (
    Strategy,
    adapted_convolution,
    adapted_linear,
    plan_convolution,
    plan_linear,
    rebuild_weight,
)
from svft_diffusion.spectral import Core, core_matrix, core_update

SHAPES = [(12, 20), (20, 12), (16, 16), (70, 40)]
STRATEGIES: list[Strategy] = ["activation", "factors", "rebuilt"]
BANDS: list[int | None] = [0, 1, 3, None]  # off-diagonals; None is a dense core


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Adapted(NamedTuple):
    """Tensors of one adapted layer; the core and the bias train."""

    weight: Tensor
    bias: Tensor
    U: Tensor
    S: Tensor
    Vh: Tensor
    core: Core

    def explicit_weight(self) -> Tensor:
        update = core_update(self.U, self.core, self.Vh)
        return self.weight + update.view(self.weight.shape)

    def rebuilt(self) -> Tensor:
        return rebuild_weight(self.weight, self.U, self.core, self.Vh)

    @property
    def trained(self) -> tuple[Tensor, Tensor]:
        return self.bias, self.core.entries


def adapted(
    shape: tuple[int, ...], off_diagonals: int | None, *, rank: int | None = None, dtype: torch.dtype = torch.float32
) -> Adapted:
    """A layer whose factors were computed in float64; entries of a band outside the matrix are zero."""
    weight = random(*shape, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    rank = len(S) if rank is None else rank
    if off_diagonals is None:
        core = Core(0.1 * random(rank, rank, seed=1, dtype=dtype), dense=True)
    else:
        entries = 0.1 * random(rank, 2 * off_diagonals + 1, seed=1, dtype=dtype)
        column = torch.arange(rank)[:, None] + torch.arange(-off_diagonals, off_diagonals + 1)
        core = Core(entries.where((column >= 0) & (column < rank), torch.zeros((), dtype=dtype)))
    core.entries.requires_grad_()
    bias = random(shape[0], seed=2, dtype=dtype).requires_grad_()
    U, S, Vh = U[:, :rank].to(dtype).contiguous(), S[:rank].to(dtype), Vh[:rank].to(dtype)
    return Adapted(weight.to(dtype), bias, U, S, Vh, core)


def run_linear(x: Tensor, layer: Adapted, strategy: Strategy, *, compress: bool = False) -> Tensor:
    rebuilt = layer.rebuilt() if strategy == "rebuilt" else None
    weight = layer.weight if strategy == "activation" else None
    return adapted_linear(
        x,
        weight,
        layer.bias,
        layer.U,
        layer.S,
        layer.Vh,
        layer.core,
        strategy=strategy,
        rebuilt=rebuilt,
        compress=compress,
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def assert_same(
    found: Tensor,
    expected: Tensor,
    inputs: tuple[Tensor, ...],
    *,
    tolerance: float,
    gradients: list[float] | None = None,
) -> None:
    """Outputs and the gradients of all inputs agree, for one random gradient of the output."""
    assert found.shape == expected.shape
    assert relative_error(found, expected) <= tolerance
    g = random(*expected.shape, seed=3, dtype=expected.dtype)
    pairs = zip(torch.autograd.grad(found, inputs, g), torch.autograd.grad(expected, inputs, g), inputs, strict=True)
    for place, (one, other, tensor) in enumerate(pairs):
        assert one.shape == other.shape and one.dtype == tensor.dtype
        assert relative_error(one, other) <= (tolerance if gradients is None else gradients[place])


def ranks_for(strategy: Strategy, shape: tuple[int, ...]) -> list[int]:
    full = min(shape[0], torch.Size(shape[1:]).numel())
    return [full] if strategy == "factors" else [full, 5]


def saved_storages(run: Callable[[], Tensor]) -> tuple[Tensor, dict[int, int]]:
    """The output, and the bytes of each storage that is saved for backward."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return run(), saved


# Linear layers


@pytest.mark.parametrize("off_diagonals", BANDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_equals_the_formula(shape: tuple[int, int], strategy: Strategy, off_diagonals: int | None) -> None:
    for rank in ranks_for(strategy, shape):
        layer = adapted(shape, off_diagonals, rank=rank)
        for leading in [(7,), (3, 40), (2, 3, 50)]:  # fewer and more rows than the layer has inputs and outputs
            x = random(*leading, shape[1], seed=4).requires_grad_()
            expected = functional.linear(x, layer.explicit_weight(), layer.bias)
            assert_same(run_linear(x, layer, strategy), expected, (x, *layer.trained), tolerance=1e-5)


@pytest.mark.parametrize("off_diagonals", BANDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_linear_gradcheck(shape: tuple[int, int], strategy: Strategy, off_diagonals: int | None) -> None:
    layer = adapted(shape, off_diagonals, dtype=torch.float64)
    rebuilt = torch.zeros(shape, dtype=torch.float64)

    def run(x: Tensor, bias: Tensor, entries: Tensor) -> Tensor:
        if off_diagonals is not None:  # places outside the matrix have no gradient, whatever gradcheck puts there
            entries = entries * (layer.core.entries != 0)
        layer_now = layer._replace(bias=bias, core=Core(entries, layer.core.dense))
        if strategy == "rebuilt":
            rebuilt.copy_(layer_now.rebuilt())
        return run_linear(x, layer_now, strategy)

    x = random(2, 3, shape[1], seed=4, dtype=torch.float64).requires_grad_()
    assert gradcheck(run, (x, layer.bias, layer.core.entries))


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (80, 80)])
def test_factors_alone_stay_within_a_millionth_of_the_residual_form(shape: tuple[int, int]) -> None:
    layer = adapted(shape, 0)
    x = random(50, shape[1], seed=4)
    assert relative_error(run_linear(x, layer, "factors"), run_linear(x, layer, "activation")) <= 1e-6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_what_needs_a_gradient_gets_one(strategy: Strategy) -> None:
    layer = adapted((12, 20), 1)
    x = random(9, 20, seed=4)
    run_linear(x, layer, strategy).sum().backward()
    expected = torch.autograd.grad(functional.linear(x, layer.explicit_weight(), layer.bias).sum(), layer.trained)
    assert x.grad is None
    assert relative_error(layer.bias.grad, expected[0]) <= 1e-5
    assert relative_error(layer.core.entries.grad, expected[1]) <= 1e-5

    frozen = layer._replace(bias=layer.bias.detach(), core=Core(layer.core.entries.detach()))
    x.requires_grad_()
    run_linear(x, frozen, strategy).sum().backward()
    assert relative_error(x.grad, layer.explicit_weight().sum(dim=0).expand(9, 20)) <= 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_bias_no_tokens_and_strided_input(strategy: Strategy) -> None:
    layer = adapted((12, 20), 1)
    without_bias = layer._replace(bias=None)  # type: ignore[arg-type]
    for x in [torch.zeros(2, 0, 20), random(2, 20, 9, seed=4).mT, random(40, seed=4)[::2], random(1, 20).expand(5, 20)]:
        x = x.requires_grad_()
        expected = functional.linear(x, layer.explicit_weight())
        found = run_linear(x, without_bias, strategy)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        inputs = (x, layer.core.entries)
        pairs = zip(torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [(9,), (2, 5)])
def test_the_output_may_be_changed_in_place(strategy: Strategy, rows: tuple[int, ...]) -> None:
    layer = adapted((12, 20), 1)
    x = random(*rows, 20, seed=4)
    gradients = [
        torch.autograd.grad((run_linear(x, layer, strategy) + 1).relu().sum(), layer.trained),
        torch.autograd.grad(run_linear(x, layer, strategy).add_(1).relu_().sum(), layer.trained),
    ]
    for expected, found in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpointing_and_modes_without_gradients(strategy: Strategy) -> None:
    layer = adapted((12, 20), 1)
    x = random(9, 20, seed=4).requires_grad_()
    inputs = (x, *layer.trained)
    y = run_linear(x, layer, strategy)
    expected = torch.autograd.grad(y.sin().sum(), inputs)
    for reentrant in (False, True):
        again = checkpoint(lambda x: run_linear(x, layer, strategy), x, use_reentrant=reentrant)
        if reentrant:  # which knows no torch.autograd.grad
            again.sin().sum().backward()
            found: Any = [tensor.grad for tensor in inputs]
        else:
            found = torch.autograd.grad(again.sin().sum(), inputs)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            z, saved = saved_storages(lambda: run_linear(x, layer, strategy, compress=True))
        assert torch.equal(z, y) and not z.requires_grad and not saved


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("off_diagonals", BANDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_16_bit_models_and_autocast(strategy: Strategy, off_diagonals: int | None, dtype: torch.dtype) -> None:
    """As near to the formula in float64 as one rounding of each product allows; values keep float32 gradients."""
    wide = adapted((40, 64), off_diagonals)
    narrow = wide._replace(weight=wide.weight.to(dtype), U=wide.U.to(dtype), Vh=wide.Vh.to(dtype))
    tolerance = 8 * torch.finfo(dtype).eps
    for layer, x_dtype, autocast in [(narrow, dtype, False), (wide, torch.float32, True), (narrow, dtype, True)]:
        x = random(3, 30, 64, seed=4, dtype=x_dtype).requires_grad_()
        expected = functional.linear(x.float(), wide.explicit_weight(), wide.bias)
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            found = run_linear(x, layer, strategy)
            plain = functional.linear(x, layer.weight, layer.bias.to(layer.weight.dtype))
        assert found.dtype == plain.dtype == dtype
        inputs = (x, *wide.trained)
        assert_same(found.float(), expected, inputs, tolerance=tolerance)
        g = random(3, 30, 40, seed=5, dtype=dtype)
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            again = run_linear(x, layer, strategy)
        outside = torch.autograd.grad(again, inputs, g, retain_graph=True)
        with torch.autocast("cpu", dtype=dtype):  # which may still be on in the backward pass, and changes nothing
            inside = torch.autograd.grad(again, inputs, g)
        assert all(torch.equal(one, other) for one, other in zip(inside, outside, strict=True))


# What is saved


@pytest.mark.parametrize("off_diagonals", BANDS)
def test_activation_and_factors_save_no_input(off_diagonals: int | None) -> None:
    layer = adapted((12, 200), off_diagonals)
    x = random(500, 200, seed=4).requires_grad_()
    own = {tensor.untyped_storage().data_ptr() for tensor in (layer.weight, layer.U, layer.S, layer.Vh, layer.core[0])}
    strategies: list[Strategy] = ["activation", "factors"]
    for strategy in strategies:
        for compress, row in [(False, 12 * 4), (True, 12 + 4)]:
            _, saved = saved_storages(lambda s=strategy, c=compress: run_linear(x, layer, s, compress=c))
            assert x.untyped_storage().data_ptr() not in saved
            assert sum(size for pointer, size in saved.items() if pointer not in own) == 500 * row


def test_rebuilt_saves_the_input_that_its_neighbours_share() -> None:
    layers = [adapted((16, 16), 0) for _ in range(3)]
    x = random(2, 50, 16, seed=4).requires_grad_()
    rebuilt = [layer.rebuilt() for layer in layers]

    def attention() -> Tensor:
        outputs = [
            adapted_linear(x, None, None, o.U, None, o.Vh, o.core, strategy="rebuilt", rebuilt=r)
            for o, r in zip(layers, rebuilt, strict=True)
        ]
        return torch.stack(outputs)

    _, saved = saved_storages(attention)
    own = {t.untyped_storage().data_ptr() for o in layers for t in (o.U, o.Vh, o.core.entries)}
    own |= {weight.untyped_storage().data_ptr() for weight in rebuilt}
    assert {pointer for pointer in saved if pointer not in own} == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("off_diagonals", BANDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compressed_activations_move_the_gradient_of_the_values_by_less_than_a_percent(
    strategy: Strategy, off_diagonals: int | None
) -> None:
    layer = adapted((70, 40), off_diagonals)
    x = random(6, 90, 40, seed=4)
    x[0, 0] = 0  # a row without a largest entry
    x.requires_grad_()
    inputs = (x, *layer.trained)
    g = random(6, 90, 70, seed=5)
    exact = torch.autograd.grad(run_linear(x, layer, strategy), inputs, g)
    y, saved = saved_storages(lambda: run_linear(x, layer, strategy, compress=True))
    assert 540 * 40 in saved.values()  # one byte for each element of `a` (here as wide as `x`)
    compressed = torch.autograd.grad(y, inputs, g)
    assert torch.equal(exact[0], compressed[0]) and torch.equal(exact[1], compressed[1])
    assert 0 < relative_error(compressed[2], exact[2]) <= 0.01


# Convolutions

CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((12, 5, 3), (2, 5, 17), {"padding": 1}),
    ((6, 20, 4), (2, 20, 9), {"padding": "same", "dilation": 3}),
    ((12, 8, 3, 3), (2, 8, 9, 7), {"padding": 1}),
    ((80, 3, 3, 2), (2, 3, 9, 8), {"padding": (1, 0), "stride": (2, 1), "dilation": (1, 2)}),
    ((6, 8, 1, 1), (1, 8, 20, 20), {}),
    ((8, 8, 1, 1), (8, 20, 20), {}),
    ((5, 4, 2, 3), (3, 4, 5, 6), {"padding": "same"}),
    ((5, 4, 3, 3), (1, 4, 5, 6), {"padding": "valid"}),
    ((5, 2, 2, 3, 1), (2, 2, 5, 6, 4), {"stride": 2, "padding": (1, 1, 0)}),
]


def run_convolution(
    x: Tensor, layer: Adapted, strategy: Strategy, options: dict[str, Any], *, compress: bool = False
) -> Tensor:
    return adapted_convolution(
        x,
        layer.weight if strategy == "activation" else None,
        layer.bias,
        layer.U,
        layer.S,
        layer.Vh,
        layer.core,
        kernel_size=layer.weight.shape[2:],
        strategy=strategy,
        rebuilt=layer.rebuilt() if strategy == "rebuilt" else None,
        compress=compress,
        **options,
    )


def plain_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[weight.ndim - 3]
    return function(x, weight, bias, **options)


@pytest.mark.parametrize("off_diagonals", BANDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape, x_shape, options", CONVOLUTIONS)
def test_convolution_equals_the_formula(
    shape: tuple[int, ...],
    x_shape: tuple[int, ...],
    options: dict[str, Any],
    strategy: Strategy,
    off_diagonals: int | None,
) -> None:
    for rank in ranks_for(strategy, shape):
        layer = adapted(shape, off_diagonals, rank=rank)
        x = random(*x_shape, seed=4).requires_grad_()
        expected = plain_convolution(x, layer.explicit_weight(), layer.bias, options)
        found = run_convolution(x, layer, strategy, options)
        assert_same(found, expected, (x, *layer.trained), tolerance=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_convolution_gradcheck(strategy: Strategy) -> None:
    layer = adapted((4, 2, 3, 2), 1, dtype=torch.float64)
    inside = layer.core.entries.detach() != 0

    def run(x: Tensor, bias: Tensor, entries: Tensor) -> Tensor:
        return run_convolution(
            x, layer._replace(bias=bias, core=Core(entries * inside)), strategy, {"stride": 2, "padding": 1}
        )

    x = random(2, 2, 4, 5, seed=4, dtype=torch.float64).requires_grad_()
    assert gradcheck(run, (x, layer.bias, layer.core.entries))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_convolution_in_16_bit_channels_last_compressed_and_without_samples(strategy: Strategy) -> None:
    layer = adapted((12, 8, 3, 3), 1)
    options = {"padding": 1}
    x = random(2, 8, 9, 7, seed=4).to(memory_format=torch.channels_last).requires_grad_()
    inputs = (x, *layer.trained)

    def expected() -> Tensor:
        return plain_convolution(x, layer.explicit_weight(), layer.bias, options)

    assert_same(run_convolution(x, layer, strategy, options), expected(), inputs, tolerance=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_convolution(x, layer, strategy, options)
    assert found.dtype == torch.bfloat16
    assert_same(found.float(), expected(), inputs, tolerance=0.04)
    compressed = run_convolution(x, layer, strategy, options, compress=True)
    assert_same(compressed, expected(), inputs, tolerance=1e-5, gradients=[1e-5, 1e-5, 0.02])
    with torch.no_grad():
        assert torch.equal(run_convolution(x, layer, strategy, options), compressed)
    assert run_convolution(torch.zeros(0, 8, 9, 7), layer, strategy, options).shape == (0, 12, 9, 7)


def test_thin_convolution_saves_the_filtered_input_alone() -> None:
    layer = adapted((4, 16, 3, 3), 0)
    x = random(2, 16, 10, 10, seed=4).requires_grad_()
    strategies: list[Strategy] = ["activation", "factors"]
    own = {tensor.untyped_storage().data_ptr() for tensor in (layer.weight, layer.U, layer.S, layer.Vh, layer.core[0])}
    for strategy in strategies:
        _, saved = saved_storages(lambda s=strategy: run_convolution(x, layer, s, {"padding": 1}))
        assert sum(size for pointer, size in saved.items() if pointer not in own) == 2 * 4 * 100 * 4


# Rebuilding, planning, bad input


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (6, 5, 3, 3)])
def test_rebuilt_weight_is_rounded_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for off_diagonals in BANDS:
        layer = adapted(shape, off_diagonals)
        U, Vh, weight = layer.U.to(dtype), layer.Vh.to(dtype), layer.weight.to(dtype)
        found = rebuild_weight(weight, U, layer.core, Vh)
        exact = U.double() @ core_matrix(layer.core).double() @ Vh.double() + weight.flatten(1).double()
        assert found.shape == shape and found.dtype == dtype and not found.requires_grad
        assert relative_error(found.flatten(1), exact) <= torch.finfo(dtype).eps
        zero = Core(torch.zeros_like(layer.core.entries), layer.core.dense)
        assert torch.equal(rebuild_weight(weight, U, zero, Vh), weight)


def test_plan_for_the_layers_of_a_unet() -> None:
    assert plan_linear(320, 320, 320, 4096, full_rank=True) == "rebuilt"
    assert plan_linear(1280, 1280, 1280, 256, full_rank=True) == "factors"
    assert plan_linear(2560, 320, 320, 4096, full_rank=True, off_diagonals=2) == "factors"
    assert plan_linear(320, 1280, 320, 4096, full_rank=True) == "factors"
    assert plan_linear(320, 768, 320, 77, full_rank=True, gradient_to_input=False) == "factors"
    assert plan_linear(1280, 1280, 16, 256, full_rank=False) == "activation"
    # What a rebuild costs is shared by the forward passes of one optimizer step.
    assert plan_linear(1280, 1280, 1280, 1280, full_rank=True) == "factors"
    assert plan_linear(1280, 1280, 1280, 1280, full_rank=True, micro_batches=16) == "rebuilt"
    # Truncated layers never compute from factors that leave a part of the weight out.
    assert all(plan_linear(320, 320, 64, tokens, full_rank=False) != "factors" for tokens in (1, 77, 1024, 16384))
    assert plan_convolution(320, 2880, 320, 4096, full_rank=True, input_elements=320 * 4096) == "factors"
    assert plan_convolution(320, 320, 320, 4096, full_rank=True) == "rebuilt"


def test_operands_that_do_not_fit_are_refused() -> None:
    o = adapted((12, 20), 0)
    x = random(3, 20)

    def run(strategy: Any, **changes: Any) -> Tensor:
        given = {"x": x, "weight": o.weight, "bias": None, "U": o.U, "S": o.S, "Vh": o.Vh, "core": o.core, **changes}
        return adapted_linear(**given, strategy=strategy)

    with pytest.raises(ValueError, match="all 12 singular triplets"):
        run("factors", U=o.U[:, :5], Vh=o.Vh[:5], core=Core(torch.zeros(5, 1)))
    with pytest.raises(ValueError, match="singular values"):
        run("factors", S=None)
    with pytest.raises(ValueError, match="`rebuilt`"):
        run("rebuilt")
    with pytest.raises(ValueError, match="`weight`"):
        run("activation", weight=None)
    with pytest.raises(ValueError, match="`weight` of shape"):
        run("activation", weight=o.weight.T)
    with pytest.raises(ValueError, match="rank 5"):
        run("activation", core=Core(torch.zeros(5, 1)))
    with pytest.raises(ValueError, match="batch of cores"):
        run("activation", core=Core(torch.zeros(3, 12, 1)))
    with pytest.raises(ValueError, match="unknown strategy"):
        run("fast")
    with pytest.raises(ValueError, match="does not fit Vh"):
        run("activation", x=random(3, 12))
    convolution = adapted((12, 5, 2, 2), 0)
    with pytest.raises(ValueError, match="stride 1"):
        run_convolution(random(1, 5, 4, 4), convolution, "activation", {"padding": "same", "stride": 2})
    with pytest.raises(ValueError, match="unknown padding"):
        run_convolution(random(1, 5, 4, 4), convolution, "activation", {"padding": "reflect"})
    with pytest.raises(ValueError, match="does not fit a kernel"):
        run_convolution(random(1, 6, 4, 4), convolution, "activation", {})
