"""The benchmark's own parts: peers compute their papers' formulas, bytes are counted exactly, the report renders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.adapters.config import BenchmarkConfig
from benchmarks.adapters.contenders import FLOOR, LORA, PLAIN, linear_contenders, modules_over_shared_weights
from benchmarks.adapters.layers import OneLayer
from benchmarks.adapters.memory import held_bytes, peak_bytes, saved_bytes
from benchmarks.adapters.peers import CommunitySVDiffConv2d, CommunitySVDiffLinear, OfficialSVFTLinear, TrainableBias
from benchmarks.adapters.report import write_report
from benchmarks.adapters.results import Bar, Result, verdicts
from benchmarks.adapters.steps import measure_steps
from benchmarks.adapters.timing import interleaved, median_ratio
from svft_diffusion.errors import UserError
from svft_diffusion.spectral import decompose, svdiff_update


@pytest.mark.parametrize(("rows", "columns"), [(12, 7), (7, 12)])
def test_community_svdiff_layer_computes_our_formula(rows: int, columns: int) -> None:
    layer, x = _linear(rows, columns), torch.randn(3, columns)
    factors = decompose(layer.weight)
    peer = CommunitySVDiffLinear(layer, factors)
    delta = torch.linspace(-3, 1, 7)  # some singular values are clipped at zero
    with torch.no_grad():
        peer.delta.copy_(delta)
    expected = functional.linear(x, layer.weight + svdiff_update(factors, delta), layer.bias)
    assert _relative(peer(x), expected) < 1e-5
    assert _relative(layer(x), expected) > 1e-2


def test_community_svdiff_convolution_computes_our_formula() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 4, 3, stride=2, padding=1).requires_grad_(False)
    factors = decompose(layer.weight.flatten(1))
    peer = CommunitySVDiffConv2d(layer, factors)
    delta = torch.linspace(-0.2, 0.4, 4)
    with torch.no_grad():
        peer.delta.copy_(delta)
    x = torch.randn(2, 5, 6, 7)
    weight = layer.weight + svdiff_update(factors, delta).view_as(layer.weight)
    expected = functional.conv2d(x, weight, layer.bias, stride=2, padding=1)
    assert _relative(peer(x), expected) < 1e-5
    assert _relative(layer(x), expected) > 1e-2


@pytest.mark.parametrize(("rows", "columns"), [(12, 7), (7, 12)])
def test_official_svft_layer_computes_our_formula_behind_its_gate(rows: int, columns: int) -> None:
    layer, x = _linear(rows, columns), torch.randn(3, columns)
    factors = decompose(layer.weight)
    peer = OfficialSVFTLinear(layer, factors)
    values = torch.linspace(-1, 1, 7)
    with torch.no_grad():
        peer.values.copy_(values)
    update = factors.U @ torch.diag(0.5 * values) @ factors.Vh  # the gate starts at sigmoid(0)
    assert _relative(peer(x), functional.linear(x, layer.weight + update, layer.bias)) < 1e-5


def test_saved_bytes_counts_storages_that_the_model_does_not_hold() -> None:
    class Twice(nn.Module):
        """Saves ``x`` twice (once through a view) and ``exp(x)``, beside its own weight."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 6))
            self.held = {"scale": torch.full((4, 6), 2.0)}

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + x.view(6, 4).T.reshape(4, 6) + x.exp() + self.weight * self.held["scale"]

    model, x = Twice(), torch.randn(4, 6, requires_grad=True)
    assert saved_bytes(model, lambda: model(x)) == 2 * 4 * 6 * 4
    assert held_bytes(model) == 2 * 4 * 6 * 4


def test_peak_bytes_is_the_most_at_one_time() -> None:
    def step() -> None:
        first = torch.zeros(1000)
        second = first.clone()
        del first
        second.clone()

    assert peak_bytes(step, torch.device("cpu")) == 2 * 4000


def test_copies_share_weights_but_not_modules() -> None:
    base = OneLayer(_linear(4, 3))
    copied = modules_over_shared_weights(base)
    copied.layer = TrainableBias(copied.layer)
    assert isinstance(base.layer, nn.Linear)
    assert copied.layer.weight is base.layer.weight
    assert copied.layer.bias is not base.layer.bias


def test_every_contender_takes_a_step_and_only_adapters_train() -> None:
    base = OneLayer(_linear(12, 8))
    before = base.layer.weight.detach().clone()
    inputs = {"x": torch.randn(2, 5, 8, requires_grad=True)}
    contenders = linear_contenders("float32")
    results = measure_steps("layers", "tiny", base, ["layer"], contenders, inputs, rounds=1, autocast=False)
    assert [result.contender for result in results] == list(contenders)
    assert all(len(result.seconds) == 1 and result.seconds[0] > 0 for result in results)
    assert torch.equal(base.layer.weight, before)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    saved = {result.contender: result.memory["saved"] for result in results}
    assert saved[FLOOR] == 0
    assert saved[LORA] == 4 * (2 * 5 * 8 + 2 * 5 * 4)  # x and A x, float32


def test_rounds_are_interleaved_and_prepared_outside_the_clock() -> None:
    calls: list[str] = []
    ticks = iter(range(1000))

    def watch(call: object) -> float:
        assert callable(call)
        call()
        return float(next(ticks) + 1)

    timed = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = interleaved(timed, 2, watch, before={"a": lambda: calls.append("before a")})
    assert calls == ["before a", "a", "b", "before a", "a", "b", "b", "before a", "a"]
    assert seconds == {"a": [3.0, 6.0], "b": [4.0, 5.0]}
    assert median_ratio([2.0, 9.0, 30.0], [1.0, 3.0, 2.0]) == 3.0


def test_report_puts_bars_beside_what_was_measured(tmp_path: Path) -> None:
    results = [
        Result("block", "case", FLOOR, [0.5, 0.5], {"saved": 100}),
        Result("block", "case", LORA, [1.0, 2.0], {"saved": 300}),
        Result("block", "case", PLAIN, [0.9, 2.2], {"saved": 250}, {"difference": 1e-6}),
    ]
    bars = [
        Bar("block", "case", PLAIN, 1.05, LORA),
        Bar("block", "case", PLAIN, 0.7, LORA, "extra saved"),
        Bar("block", "case", PLAIN, 1e-5, quantity="difference"),
        Bar("block", "another case", PLAIN, 1.0, LORA),
    ]
    found = verdicts(results, bars, FLOOR)
    assert [(round(verdict.measured, 6), verdict.holds) for verdict in found] == [
        (1.0, True),
        (0.75, False),
        (1e-6, True),
    ]
    text = write_report(BenchmarkConfig(output_dir=tmp_path), results, found, {"threads": 1})
    assert f"| block | case | {PLAIN} / {LORA} (extra saved) | ≤ 0.7 | 0.75 | **no** |" in text
    assert "1.000 [0.90, 1.10]" in text
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == text
    assert len(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]) == 3


def test_unknown_section_is_refused() -> None:
    with pytest.raises(UserError, match="unknown section 'layer'; choose from layers"):
        BenchmarkConfig(sections=["layer"])


def _linear(rows: int, columns: int) -> nn.Linear:
    torch.manual_seed(rows)
    return nn.Linear(columns, rows).requires_grad_(False)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.norm())
