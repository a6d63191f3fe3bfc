"""A layer whose decomposition came out with other signs and rotations does the same with an adapter's values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from adapter_cases import METHODS, Holder, add, force_strategy, relative_error
from torch import Tensor, nn

from svft_diffusion.adapters import tuner
from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.factors import cached_factors_of
from svft_diffusion.spectral import SingularFactors

Change = Callable[[SingularFactors], SingularFactors]
TIED = slice(10, 13)  # triplets with equal singular values
SHAPES = {"linear tall": (120, 96), "linear wide": (96, 120), "conv": (96, 120), "embedding": (96, 120)}
every_shape = pytest.mark.parametrize("kind", SHAPES)
on_a_basis = [name for name in METHODS if name != "vectorfit, biases alone"]
with_room_for_ties = [
    name
    for name in on_a_basis
    if not any(few in name for few in ("rank", "listed")) and (name == "siva all" or "siva" not in name)
]


def tied_layer(kind: str) -> nn.Module:
    """A layer with exact ties among its singular values."""
    rows, columns = SHAPES[kind]
    k = min(rows, columns)
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(side, k, generator=generator).double()).Q for side in (rows, columns))
    spectrum = torch.linspace(4, 0.5, k).double()
    spectrum[TIED] = spectrum[TIED.start]
    matrix = ((left * spectrum) @ right.T).float()
    layer: nn.Module
    if kind == "conv":
        layer, weight = nn.Conv2d(30, rows, 2), matrix.reshape(rows, 30, 2, 2)
    elif kind == "embedding":
        layer, weight = nn.Embedding(columns, rows), matrix.T
    else:
        layer, weight = nn.Linear(columns, rows), matrix
    with torch.no_grad():
        layer.weight.copy_(weight)  # type: ignore[operator,union-attr]
        if getattr(layer, "bias", None) is not None:
            layer.bias.zero_()  # type: ignore[operator,union-attr]
    return layer


def flipped(factors: SingularFactors) -> SingularFactors:
    """Every other pair of singular vectors with the other sign."""
    signs = torch.ones(len(factors.S))
    signs[::2] = -1
    return SingularFactors(factors.U * signs, factors.S, factors.Vh * signs[:, None])


def rotated(factors: SingularFactors) -> SingularFactors:
    """The tied triplets rotated among themselves."""
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(4))).Q
    U, Vh = factors.U.clone(), factors.Vh.clone()
    U[:, TIED], Vh[TIED] = U[:, TIED] @ rotation, rotation.T @ Vh[TIED]
    return SingularFactors(U, factors.S, Vh)


def both(factors: SingularFactors) -> SingularFactors:
    return rotated(flipped(factors))


every_change = pytest.mark.parametrize("change", [flipped, rotated, both])


class OtherMachine:
    """Decomposes as `change` says, from when it is switched on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.change: Change | None = None
        monkeypatch.setattr(tuner, "cached_factors_of", self._factors_of)

    def _factors_of(self, weights: Mapping[str, Tensor], **options: bool) -> dict[str, SingularFactors]:
        factors = cached_factors_of(weights, progress=False)
        return {path: self.change(found) if self.change else found for path, found in factors.items()}


@pytest.fixture
def other_machine(monkeypatch: pytest.MonkeyPatch) -> OtherMachine:
    return OtherMachine(monkeypatch)


def copy_parts(source: SpectralLayer, target: SpectralLayer, name: str) -> None:
    with torch.no_grad():
        for part, tensor in source.trained_parts(name).items():
            target.trained_parts(name)[part].copy_(tensor)
        if source.positions(name) is not None:
            target.positions(name).copy_(source.positions(name))  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("method", on_a_basis)
@every_shape
def test_on_the_same_factors_nothing_moves(method: str, kind: str) -> None:
    layer = add(Holder(tied_layer(kind)), method)
    before = layer.get_delta_weight("a")
    factors = layer.factors
    assert layer.align("a", layer.sketch("a")) == 0.0
    assert layer.factors is factors
    assert torch.equal(layer.get_delta_weight("a"), before)


@pytest.mark.parametrize("method", on_a_basis)
@every_shape
def test_signs_follow_the_sketch(method: str, kind: str, other_machine: OtherMachine) -> None:
    check_same_update(method, kind, flipped, other_machine)


@pytest.mark.parametrize("method", with_room_for_ties)
@every_shape
@pytest.mark.parametrize("change", [rotated, both])
def test_rotations_among_ties_follow_the_sketch(
    method: str, kind: str, change: Change, other_machine: OtherMachine
) -> None:
    assert check_same_update(method, kind, change, other_machine) <= 1e-3


def check_same_update(method: str, kind: str, change: Change, other_machine: OtherMachine) -> float:
    """Put an adapter's values on other factors, align them, and return the error that the layer states."""
    source = add(Holder(tied_layer(kind)), method)
    other_machine.change = change
    target = add(Holder(tied_layer(kind)), method, seed=None)
    copy_parts(source, target, "a")
    error = target.align("a", source.sketch("a"))
    assert relative_error(target.get_delta_weight("a"), source.get_delta_weight("a")) <= 1e-4
    # The layer computes on with what it has now.
    source.set_adapter(["a"])
    target.set_adapter(["a"])
    x = layer_input(kind)
    assert relative_error(target(x), source(x)) <= 1e-4
    return error


def layer_input(kind: str) -> Tensor:
    if kind == "embedding":
        return torch.arange(12).reshape(3, 4)
    return torch.randn(2, 30, 5, 4) if kind == "conv" else torch.randn(2, 5, SHAPES[kind][1])


@pytest.mark.parametrize("method", ["svft banded 1", "svft banded 3", "svft random"])
@every_shape
def test_beside_another_adapter_the_values_change_their_signs(
    method: str, kind: str, other_machine: OtherMachine
) -> None:
    source = add(Holder(tied_layer(kind)), method)
    other_machine.change = flipped
    model = Holder(tied_layer(kind))
    target = add(model, "svft banded 1", "resident")
    of_resident = target.get_delta_weight("resident")
    add(model, method, seed=None)
    factors = target.factors
    copy_parts(source, target, "a")
    assert target.align("a", source.sketch("a")) == 0.0
    assert target.factors is factors
    assert torch.equal(target.get_delta_weight("resident"), of_resident)
    assert relative_error(target.get_delta_weight("a"), source.get_delta_weight("a")) <= 1e-5


@pytest.mark.parametrize("method", ["svft plain", "svdiff", "svft banded 3"])
@every_shape
def test_what_signs_alone_cannot_bring_back_is_said(method: str, kind: str, other_machine: OtherMachine) -> None:
    source = add(Holder(tied_layer(kind)), method)
    other_machine.change = both
    model = Holder(tied_layer(kind))
    target = add(model, "svft banded 1", "resident")
    add(model, method, seed=None)
    copy_parts(source, target, "a")
    found = target.align("a", source.sketch("a"))
    actual = relative_error(target.get_delta_weight("a"), source.get_delta_weight("a"))
    assert actual > 0.01
    assert found > 0.01


@pytest.mark.parametrize("method", with_room_for_ties)
@every_change
def test_a_state_dict_loads_on_other_factors(method: str, change: Change, other_machine: OtherMachine) -> None:
    source = Holder(tied_layer("linear tall"))
    add(source, method)
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    other_machine.change = change
    target = Holder(tied_layer("linear tall"))
    add(target, method, seed=None)
    target.load_state_dict(state)
    x = torch.randn(4, 96)
    assert relative_error(target(x), source(x)) <= 1e-4


def test_a_state_dict_of_another_base_is_said(caplog: pytest.LogCaptureFixture) -> None:
    source, target = Holder(nn.Linear(96, 120)), Holder(nn.Linear(96, 120))
    add(source, "svft plain")
    add(target, "svft plain")
    adapter = {name: tensor for name, tensor in source.state_dict().items() if "spectral" in name}
    target.load_state_dict(adapter, strict=False)
    assert "is this the base model it was trained on?" in caplog.text


@pytest.mark.parametrize("method", ["svft plain", "svft banded 1", "svft random"])
@pytest.mark.parametrize("same_base", [True, False])
def test_a_small_layer_is_measured_too(
    method: str, same_base: bool, other_machine: OtherMachine, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    base = nn.Linear(7, 9)
    source, target = Holder(base), Holder(copy.deepcopy(base) if same_base else nn.Linear(7, 9))
    add(source, method)
    other_machine.change = flipped
    add(target, method)
    adapter = {name: tensor for name, tensor in source.state_dict().items() if "spectral" in name}
    target.load_state_dict(adapter, strict=False)
    assert ("is this the base model it was trained on?" in caplog.text) != same_base


@pytest.mark.parametrize("damage", [lambda sketch: sketch[:2], lambda sketch: sketch[:-5], lambda sketch: sketch + 97])
def test_a_damaged_sketch_is_refused_and_changes_nothing(damage: Callable[[Tensor], Tensor]) -> None:
    layer = add(Holder(tied_layer("linear tall")), "svft banded 1")
    before, own = layer.get_delta_weight("a"), layer.sketch("a")
    with pytest.raises(ValueError, match=r"sketch"):
        layer.align("a", damage(own))
    assert torch.equal(layer.get_delta_weight("a"), before)
    assert torch.equal(layer.sketch("a"), own)


def test_the_training_strategies_agree_after_a_rotation(
    other_machine: OtherMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = add(Holder(tied_layer("linear tall")), "svft plain")
    other_machine.change = both
    target = add(Holder(tied_layer("linear tall")), "svft plain", seed=None)
    copy_parts(source, target, "a")
    target.align("a", source.sketch("a"))
    target.set_adapter(["a"])
    x = torch.randn(4, 96)
    outputs = []
    for strategy in ("activation", "factors", "rebuilt"):
        force_strategy(monkeypatch, strategy)
        outputs.append(target(x))
    for output in outputs[1:]:
        assert relative_error(output, outputs[0]) <= 1e-5
