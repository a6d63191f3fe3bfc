"""The benchmark of whole training runs: everybody trains their own adapter in the same loop, and rows are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import adapted_layer, force_strategy, layer_input
from training_runs import short_run

from benchmarks import training_beside_lora as benchmark
from benchmarks.device_bytes import DeviceBytes
from benchmarks.training_beside_lora import BesideConfig
from benchmarks.training_contenders import Case, as_contender
from benchmarks.training_rows import Results, table
from svft_diffusion.errors import UserError
from svft_diffusion.training import trainer
from svft_diffusion.training.step import optimizer_step

CASE = Case(batch_size=1, precision="no", checkpointing=False, resolution=16)
BOTH = ["LoRA r=4", "SVFT plain"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BesideConfig:
    """Runs of a tiny base model."""
    run = replace(short_run(tmp_path), max_train_steps=50, checkpointing_steps=50, history_steps=0)
    monkeypatch.setattr(
        benchmark, "training", lambda _config, _case, name: replace(run, output_dir=tmp_path / name.replace("=", ""))
    )
    return BesideConfig(output_dir=tmp_path, contenders=BOTH, rounds=2)


def test_everybody_takes_turns_in_the_same_loop(config: BesideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[int, str]] = []

    def step(run: Any, batches: Any, number: int) -> dict[str, float]:
        ours = not any("lora_A" in name for name in run.trained)
        assert ours or all("lora_" in name for name in run.trained)
        assert all(parameter.dtype == torch.float32 for parameter in run.trained.values())
        turns.append((number, BOTH[ours]))
        return optimizer_step(run, batches, number)

    monkeypatch.setattr(trainer, "optimizer_step", step)
    rows = benchmark.times_in_turns(config, CASE)
    lora, ours = BOTH
    assert turns == [(1, lora), (1, ours), (2, lora), (2, ours), (3, ours), (3, lora)]
    assert all(len(rows[name]["seconds"]) == 2 and min(rows[name]["seconds"]) > 0 for name in BOTH)


def test_memory_of_a_run_holds_its_base(config: BesideConfig) -> None:
    row = benchmark.memory_of_run(config, CASE, "LoRA r=4")
    assert 0 < row["base"] <= row["peak"] and 0 <= row["mapped files"] < row["peak"]
    if not torch.cuda.is_available():
        assert 0 < row["tensors before"] < row["tensors"] < row["peak"]


def test_tensors_are_counted_while_they_live() -> None:
    model, x = torch.nn.Linear(1000, 1000, bias=False), torch.randn(500, 1000)
    with DeviceBytes([model]) as counted:
        y = model(x)
        part = y[:10]
        del y  # but not its numbers
        assert (counted.before, counted.peak) == (6_000_000, 2_000_000)
        del part
        model(x).exp()
        assert counted.peak == 4_000_000
        model.weight.detach()[5:].add_(1)
        assert (counted.before, counted.peak) == (6_000_000, 4_000_000)


def test_parked_weights_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    force_strategy(monkeypatch, "factors")
    layer = adapted_layer("svft plain", "linear tall", trains=True)
    weight = layer.get_base_layer().weight
    assert isinstance(weight, torch.Tensor)
    before = []
    for _ in range(2):
        layer(layer_input("linear tall"))
        with DeviceBytes([layer]) as counted:
            layer(layer_input("linear tall")).sum().backward()
        before.append(counted.before)
        layer.zero_grad()
        layer.allow_parking()
    layer(layer_input("linear tall"))
    assert before[0] - before[1] == weight.nbytes


def test_what_went_wrong_in_a_turn_is_told(config: BesideConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> dict[str, float]:
        raise UserError("no memory")

    monkeypatch.setattr(trainer, "optimizer_step", fail)
    with pytest.raises(UserError, match="no memory"):
        benchmark.times_in_turns(config, CASE)


def test_the_trainer_is_its_own_again(config: BesideConfig) -> None:
    before = vars(benchmark.setup).copy()
    with as_contender("LoRA r=4"):
        assert vars(benchmark.setup) != before
    assert vars(benchmark.setup) == before


def test_rows_are_kept_by_what_they_were_measured_under(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    results = Results(file, rounds=2, threads=1)
    for name, seconds, peak in (("LoRA r=4", [2.0, 4.0], 10**9), ("SVFT plain", [3.0, 5.0], 2 * 10**9)):
        results.put("time", CASE, name, {"seconds": seconds})
        results.put("memory", CASE, name, {"base": 5 * 10**8, "peak": peak, "mapped files": 0, "tensors": peak // 4})
    again = Results(file, rounds=2, threads=1)
    assert again.find("time", CASE, "SVFT plain") == {"seconds": [3.0, 5.0]}
    assert again.find("time", replace(CASE, batch_size=4), "SVFT plain") is None
    assert Results(file, rounds=9, threads=1).find("time", CASE, "SVFT plain") is None
    assert Results(file, rounds=9, threads=1).find("memory", CASE, "SVFT plain") is not None
    assert {row["contender"] for row in json.loads(file.read_text("utf-8")).values()} == set(BOTH)
    row = table(again, CASE, BOTH).splitlines()[-1]
    assert row == "| SVFT plain | 4.00 | 1.375 | 2.00 | 2.000 | 1.50 | 3.000 | 2.00 | 2.000 | 0.50 | 2.000 |"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contenders": ["DoRA"]}, "--contenders: unknown 'DoRA'"),
        ({"precisions": ["fp8"]}, "--precisions: unknown 'fp8'"),
        ({"measure": ["speed"]}, "--measure: unknown 'speed'"),
        ({"gradient_checkpointing": ["yes"]}, "--gradient_checkpointing: unknown 'yes'"),
        ({"rounds": 0}, "--rounds must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BesideConfig(**settings)
