"""The table that drives the tests of adapter layers: every method, pattern and option, and every kind of layer.

A new method is one row in `METHODS`, with its formula over all ``k`` singular triplets of a layer; a new kind of layer
is one row in `LAYERS`. The formulas are written down here once more, dense and without the product's functions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from svft_diffusion import SiVAConfig, SVDiffConfig, SVFTConfig, VectorFitConfig
from svft_diffusion.adapters import SpectralConfig
from svft_diffusion.adapters.injection import inject, spectral_layers
from svft_diffusion.adapters.layers import SpectralLayer, training
from svft_diffusion.spectral import SingularFactors

Parts = Mapping[str, Tensor]
# (values and gate, positions, k) -> M (k, k) at strength 1, before any relu
CoreFormula = Callable[[Parts, Tensor | None, int], Tensor]


class MethodCase(NamedTuple):
    """One row: how an adapter is asked for, and what it must compute."""

    config: Callable[..., SpectralConfig]
    core: CoreFormula
    relu: bool = False  # shifts of all adapters meet inside one relu (SVDiff)
    scalar_norm: bool = False
    gradient_error: float = 1e-5


class LayerCase(NamedTuple):
    """One row: a layer, and the size or the ids of its input."""

    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    ids_below: int = 0  # the input is ids instead of numbers


class DoublingLinear(nn.Linear):
    """A linear layer that computes more than one."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(torch.tanh(input))


class CenteredRMSNorm(nn.Module):
    """An RMSNorm of a library's own, whose weight is what is added to one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        normalized = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return ((1 + self.weight.float()) * normalized).to(x.dtype)


def band(off_diagonals: int, rank: int | None = None) -> CoreFormula:
    """Values row by row on the diagonal and ``off_diagonals`` on each side."""

    def core(parts: Parts, positions: Tensor | None, k: int) -> Tensor:
        r = rank or k
        places = [(i, j) for i in range(r) for j in range(r) if abs(i - j) <= off_diagonals]
        return _matrix(parts, [i for i, _ in places], [j for _, j in places], k)

    return core


def listed(rank: int | None = None) -> CoreFormula:
    """Values at stored positions of an r x r matrix."""

    def core(parts: Parts, positions: Tensor | None, k: int) -> Tensor:
        assert positions is not None and len(set(positions.tolist())) == len(parts["values"])
        r = rank or k
        flat = positions.tolist()
        return _matrix(parts, [place // r for place in flat], [place % r for place in flat], k)

    return core


def triplets(choose: Callable[[int], range]) -> CoreFormula:
    """Values on the diagonal at chosen triplets."""

    def core(parts: Parts, positions: Tensor | None, k: int) -> Tensor:
        chosen = list(choose(k)) if positions is None else positions.tolist()
        return _matrix(parts, chosen, chosen, k)

    return core


def _matrix(parts: Parts, rows: list[int], columns: list[int], k: int) -> Tensor:
    values = parts["values"]
    assert len(values) == len(rows)
    if "gate" in parts:
        values = values * torch.sigmoid(parts["gate"])
    return torch.zeros(k, k).index_put((torch.tensor(rows), torch.tensor(columns)), values)


FRACTION = 0.4  # of SiVA


def _count(k: int) -> int:
    return math.ceil(FRACTION * k)


def _listed_config(method: str, *, bias: bool = False, **options: Any) -> SpectralConfig:
    """Four values somewhere, as a file with pattern listed may have them."""
    return SpectralConfig(
        method=method,
        pattern="listed",
        numbers_of_values={"layer": 4},
        train_bias=True,
        layers_with_bias=["layer"] if bias else [],
        **options,
    )


METHODS: dict[str, MethodCase] = {
    "svft plain": MethodCase(SVFTConfig, band(0)),
    "svft plain, rank 3": MethodCase(partial(SVFTConfig, rank=3), band(0, 3)),
    "svft plain, random init": MethodCase(partial(SVFTConfig, init="random", train_bias=True), band(0)),
    "svft banded 1": MethodCase(partial(SVFTConfig, pattern="banded", off_diagonals=1), band(1)),
    "svft banded 3": MethodCase(partial(SVFTConfig, pattern="banded", off_diagonals=3), band(3)),
    "svft banded 1, rank 4": MethodCase(partial(SVFTConfig, pattern="banded", off_diagonals=1, rank=4), band(1, 4)),
    "svft banded 1, official init": MethodCase(
        partial(SVFTConfig, pattern="banded", off_diagonals=1, init="official"), band(1)
    ),
    "svft random": MethodCase(partial(SVFTConfig, pattern="random", off_diagonals=1), listed()),
    "svft top-k, rank 4": MethodCase(partial(SVFTConfig, pattern="top_k", off_diagonals=1, rank=4), listed(4)),
    "svft compressed": MethodCase(partial(SVFTConfig, compress_activations=True), band(0), gradient_error=0.05),
    "svdiff": MethodCase(SVDiffConfig, band(0), relu=True),
    "svdiff, rank 3": MethodCase(partial(SVDiffConfig, rank=3, train_bias=True), band(0, 3), relu=True),
    "svdiff, scalar norms": MethodCase(
        partial(SVDiffConfig, norm_shift="scalar"), band(0), relu=True, scalar_norm=True
    ),
    "vectorfit": MethodCase(VectorFitConfig, band(0)),
    "vectorfit, biases alone": MethodCase(partial(VectorFitConfig, train_values=False), band(0)),
    "siva bottom": MethodCase(partial(SiVAConfig, fraction=FRACTION), triplets(lambda k: range(k - _count(k), k))),
    "siva top": MethodCase(partial(SiVAConfig, fraction=FRACTION, select="top"), triplets(lambda k: range(_count(k)))),
    "siva all": MethodCase(partial(SiVAConfig, select="all"), triplets(range)),
    "siva random": MethodCase(partial(SiVAConfig, fraction=FRACTION, select="random"), triplets(range)),
    "svft listed": MethodCase(partial(_listed_config, "svft"), listed()),
    "svft listed, rank 3": MethodCase(partial(_listed_config, "svft", rank=3, bias=True), listed(3)),
    "svdiff listed": MethodCase(partial(_listed_config, "svdiff", bias=True), triplets(range), relu=True),
    "vectorfit listed": MethodCase(partial(_listed_config, "vectorfit"), triplets(range)),
    "siva listed": MethodCase(partial(_listed_config, "siva"), triplets(range)),
}

LAYERS: dict[str, LayerCase] = {
    "linear tall": LayerCase(lambda: nn.Linear(6, 11), (3, 5, 6)),
    "linear wide without bias": LayerCase(lambda: nn.Linear(11, 7, bias=False), (3, 11)),
    "linear square": LayerCase(lambda: nn.Linear(8, 8), (3, 4, 8)),
    "linear with a forward of its own": LayerCase(lambda: DoublingLinear(7, 5), (3, 4, 7)),
    "conv 1-D": LayerCase(lambda: nn.Conv1d(5, 9, 3, stride=2, padding=1), (3, 5, 8)),
    "conv 2-D": LayerCase(lambda: nn.Conv2d(5, 7, 3, stride=2, padding=1, dilation=2), (3, 5, 8, 7)),
    "conv 2-D, 1 x 1, without bias": LayerCase(lambda: nn.Conv2d(5, 9, 1, bias=False), (3, 5, 4, 3)),
    "conv 2-D, same size": LayerCase(lambda: nn.Conv2d(5, 6, 3, padding="same"), (3, 5, 4, 5)),
    "conv 2-D, two groups": LayerCase(lambda: nn.Conv2d(6, 10, 3, padding=1, groups=2), (3, 6, 5, 4)),
    "conv 2-D, reflecting": LayerCase(lambda: nn.Conv2d(5, 6, 3, padding=1, padding_mode="reflect"), (3, 5, 5, 4)),
    "conv 3-D": LayerCase(lambda: nn.Conv3d(2, 6, (1, 2, 3), padding=(0, 1, 1)), (3, 2, 3, 4, 4)),
    "embedding wide": LayerCase(lambda: nn.Embedding(12, 7, padding_idx=0), (3, 8), ids_below=12),
    "embedding tall": LayerCase(lambda: nn.Embedding(5, 9), (3, 8), ids_below=5),
    "transformers Conv1D": LayerCase(lambda: Conv1D(9, 6), (3, 4, 6)),
    "layer norm": LayerCase(lambda: nn.LayerNorm(7), (3, 4, 7)),
    "group norm": LayerCase(lambda: nn.GroupNorm(2, 6), (3, 6, 4, 3)),
    "RMSNorm": LayerCase(lambda: nn.RMSNorm(7), (3, 4, 7)),
    "RMSNorm of a library's own": LayerCase(lambda: CenteredRMSNorm(7), (3, 4, 7)),
}


def _fits(method: str, layer: str) -> bool:
    """Biases alone don't train in a layer that has neither bias nor norm weight."""
    module = LAYERS[layer].make()
    return (
        method != "vectorfit, biases alone"
        or getattr(module, "bias", None) is not None
        or "Norm" in type(module).__name__
    )


CASES = [pair for pair in itertools.product(METHODS, LAYERS) if _fits(*pair)]
every_method = pytest.mark.parametrize("method", METHODS)
every_layer = pytest.mark.parametrize("layer_name", LAYERS)
every_case = pytest.mark.parametrize(("method", "layer_name"), CASES, ids=[" on ".join(case) for case in CASES])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


def base_layer(layer_name: str) -> nn.Module:
    """The layer of a row with weights that depend on nothing but its name."""
    module = LAYERS[layer_name].make()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = 0.4 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise if "Norm" in type(module).__name__ and name == "weight" else noise)
    return module


def layer_input(layer_name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    row = LAYERS[layer_name]
    generator = torch.Generator().manual_seed(1)
    if row.ids_below:
        return torch.randint(0, row.ids_below, row.input_shape, generator=generator)
    return torch.randn(row.input_shape, generator=generator).to(dtype)


def add(model: Holder, method: str, name: str = "a", *, seed: int | None = 2) -> SpectralLayer:
    """Add an adapter to the only layer of a model; ``seed`` None leaves it at its initial values."""
    inject(model, METHODS[method].config(target_modules=["layer"], train_norm=True), name)
    layer = spectral_layers(model)["layer"]  # a LoRA may lie around it
    if seed is not None:
        randomize(layer, name, seed)
        move_listed(layer, name, seed)
    return layer


def adapted_layer(
    method: str, layer_name: str, *, dtype: torch.dtype = torch.float32, seed: int | None = 2, trains: bool = False
) -> SpectralLayer:
    """A layer with one frozen (or training) adapter ``a``."""
    layer = add(Holder(base_layer(layer_name).to(dtype)), method, seed=seed)
    layer.set_adapter(["a"], inference_mode=not trains)
    return layer


def randomize(layer: SpectralLayer, name: str, seed: int = 2, scale: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in layer.trained_parts(name).values():
            part.copy_(scale * torch.randn(part.shape, generator=generator))


def move_listed(layer: SpectralLayer, name: str, seed: int = 2) -> None:
    """Other places for values with pattern listed, as a file says them."""
    positions, options = layer.positions(name), layer.options[name]
    if positions is None or options.pattern != "listed":
        return
    assert layer.factors is not None
    places = len(layer.factors.S) if options.listed_triplets else options.rank**2
    chosen = torch.randperm(places, generator=torch.Generator().manual_seed(seed))[: len(positions)]
    positions.copy_(chosen.sort().values)
    layer.renew_sketch(name)


def force_strategy(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """Let the planner choose this one wherever it can be had."""

    def plan(*sizes: int, full_rank: bool, **options: object) -> str:
        return strategy if full_rank or strategy != "factors" else "activation"

    monkeypatch.setattr(training, "plan_linear", plan)
    monkeypatch.setattr(training, "plan_convolution", plan)


# The formulas


def explicit_parameters(
    layer: SpectralLayer, adapters: Mapping[str, tuple[str, float]], parts_of: Mapping[str, Parts] | None = None
) -> dict[str, Tensor]:
    """Weight and bias of a layer with adapters in them (name -> method and strength), float32, as the papers say."""
    base = layer.get_base_layer()
    weight = base.weight.detach().float()  # type: ignore[operator]
    rows = [
        (METHODS[method], strength, (parts_of or {}).get(name) or layer.trained_parts(name), layer.positions(name))
        for name, (method, strength) in adapters.items()
    ]
    parameters = {"weight": weight}
    if getattr(base, "bias", None) is not None:
        shifts = [strength * parts["bias"] for _, strength, parts, _ in rows if "bias" in parts]
        parameters["bias"] = base.bias.detach().float() + sum(shifts)  # type: ignore[operator]
    if weight.ndim == 1:
        scalar = sum(strength * parts["norm"] for row, strength, parts, _ in rows if row.scalar_norm)
        vector = sum(strength * parts["norm"] for row, strength, parts, _ in rows if not row.scalar_norm)
        length = weight.norm()
        parameters["weight"] = weight * torch.relu(length + scalar) / length + vector
    elif layer.factors is not None:
        update = _explicit_update(layer.factors, rows)
        parameters["weight"] = weight + (update.T if isinstance(base, nn.Embedding | Conv1D) else update).reshape(
            weight.shape
        )
    return parameters


def _explicit_update(
    factors: SingularFactors, rows: Sequence[tuple[MethodCase, float, Parts, Tensor | None]]
) -> Tensor:
    """``U (sum_a s_a M_a + diag(relu(sigma + sum_b s_b delta_b) - sigma)) V^T`` with ``b`` the SVDiff adapters."""
    U, S, Vh = factors
    k = len(S)
    total, inside_relu = torch.zeros(k, k), torch.zeros(k)
    for row, strength, parts, positions in rows:
        if "values" not in parts:
            continue
        core = strength * row.core(parts, positions, k)
        if row.relu:
            inside_relu = inside_relu + core.diagonal()
        else:
            total = total + core
    if any(row.relu for row, *_ in rows):
        total = total + torch.diag(torch.relu(S + inside_relu) - S)
    return U @ total @ Vh


def explicit_output(
    layer: SpectralLayer,
    x: Tensor,
    adapters: Mapping[str, tuple[str, float]],
    parts_of: Mapping[str, Parts] | None = None,
) -> Tensor:
    """Output of the base layer with the explicit weight and bias in the place of its own."""
    base = layer.get_base_layer()
    parameters = explicit_parameters(layer, adapters, parts_of)
    if isinstance(base, nn.Embedding):
        return parameters["weight"][x]
    result: Tensor = functional_call(base, parameters, (x,))
    return result


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to that of ``expected``; where that is zero, of the difference itself."""
    difference = float((found.detach().double() - expected.detach().double()).norm())
    return difference / (float(expected.detach().double().norm()) or 1.0)
