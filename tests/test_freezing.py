"""Adaptive vector freezing: what is frozen does not move at all, in any loop, and a resumed run equals a whole one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_inputs, tiny_unet
from torch import Tensor, nn

from svft_diffusion.adapters import VectorFitConfig, add_training_adapter
from svft_diffusion.adapters.freezing import AdaptiveVectorFreezing, FreezingSettings
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.adapters.training import adapter_parameters
from svft_diffusion.errors import UserError

SETTINGS = FreezingSettings(warmup_steps=3, interval=4, top_k=2, number_of_freezings=2, smoothing=0.5)
# How strongly the loss pulls at each vector: "c" and "a" train most.
PULLS = {"a": 3.0, "b": 0.5, "c": 5.0, "d": 1.0}

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adam": lambda vectors: torch.optim.Adam(vectors, lr=0.1, weight_decay=0.1),
    "adamw": lambda vectors: torch.optim.AdamW(vectors, lr=0.1, weight_decay=0.1),
    "adamw fused": lambda vectors: torch.optim.AdamW(vectors, lr=0.1, weight_decay=0.1, fused=True),
    "sgd with momentum": lambda vectors: torch.optim.SGD(vectors, lr=0.1, momentum=0.9, weight_decay=0.1),
}


def make_vectors() -> dict[str, nn.Parameter]:
    """Vectors of different lengths that start away from zero, so that weight decay would move them."""
    generator = torch.Generator().manual_seed(0)
    lengths = {"a": 3, "b": 5, "c": 1, "d": 4}
    return {name: nn.Parameter(1 + torch.rand(length, generator=generator)) for name, length in lengths.items()}


def loss_of(vectors: dict[str, nn.Parameter], step: int) -> Tensor:
    """Pulls every vector in a direction that changes a little with the step."""
    terms = [pull * (vectors[name].sum() - 0.1 * step) for name, pull in PULLS.items()]
    return torch.stack(terms).sum()


def sgd(vectors: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Plain gradient descent: a vector moves by its pull, so that strengths are known."""
    return torch.optim.SGD(vectors.values(), lr=0.01)


def step_once(vectors: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> None:
    loss_of(vectors, step).backward()
    optimizer.step()
    optimizer.zero_grad()


def snapshot(vectors: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Bits of each vector and of everything that the optimizer keeps about it."""
    found = {}
    for name, vector in vectors.items():
        kept = {key: value.clone() for key, value in optimizer.state[vector].items() if isinstance(value, Tensor)}
        found[name] = {"vector": vector.detach().clone(), **kept}
    return found


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_vectors_and_their_moments_stay_bit_for_bit(name: str) -> None:
    vectors = make_vectors()
    optimizer = OPTIMIZERS[name](list(vectors.values()))
    freezing = AdaptiveVectorFreezing(vectors, SETTINGS)
    freezing.attach(optimizer)
    frozen_steps = 0
    for step in range(1, 15):
        frozen = freezing.frozen
        before = snapshot(vectors, optimizer)
        step_once(vectors, optimizer, step)
        after = snapshot(vectors, optimizer)
        still = {vector for vector in vectors if equal(before[vector], after[vector])}
        assert still == set(frozen), f"step {step}"
        frozen_steps += bool(frozen)
    # Windows of four steps after steps 3 and 7; then everything trains again.
    assert frozen_steps == 8 and freezing.frozen == []


def test_strongest_freeze_and_windows_follow_the_schedule() -> None:
    vectors = make_vectors()
    freezing = AdaptiveVectorFreezing(vectors, SETTINGS)
    optimizer = sgd(vectors)
    freezing.attach(optimizer)
    frozen_after = {}
    for step in range(1, 13):
        step_once(vectors, optimizer, step)
        frozen_after[step] = freezing.frozen
    # "c" and "a" rest first. Seven steps take "d" to 0.07, which is still less than the 0.09 at which "a" rests.
    assert frozen_after[2] == [] and all(frozen_after[step] == ["c", "a"] for step in range(3, 7))
    assert all(set(frozen_after[step]) == {"c", "a"} for step in range(7, 11)) and frozen_after[11] == []
    first = freezing.log[0]
    # Plain descent moves a vector by 0.01 x pull a step; half of each step's distance stays in the average.
    expected = sum(0.5 ** (4 - step) * step for step in (1, 2, 3)) * 0.01
    assert first.frozen == {"c": pytest.approx(5 * expected, rel=1e-4), "a": pytest.approx(3 * expected, rel=1e-4)}
    assert [(window.step, window.until) for window in freezing.log] == [(3, 7), (7, 11)]


def test_a_vector_thaws_when_others_have_caught_up() -> None:
    vectors = make_vectors()
    optimizer = sgd(vectors)
    freezing = AdaptiveVectorFreezing(vectors, FreezingSettings(3, 20, 1, 3, 0.0))
    freezing.attach(optimizer)
    for step in range(1, 50):
        step_once(vectors, optimizer, step)
    # c stands at 5 x 3 while a goes on to 3 x 23; then a rests and c goes on to 5 x 23.
    assert [list(window.frozen) for window in freezing.log] == [["c"], ["a"], ["c"]]


def test_accumulated_batches_and_closures_leave_frozen_vectors_alone() -> None:
    for with_closure in (False, True):
        vectors = make_vectors()
        optimizer = torch.optim.AdamW(vectors.values(), lr=0.1)
        freezing = AdaptiveVectorFreezing(vectors, SETTINGS)
        freezing.attach(optimizer)

        def closure(vectors: dict[str, nn.Parameter] = vectors, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad(set_to_none=False)
            loss = loss_of(vectors, 1)
            loss.backward()
            return float(loss.detach())

        for step in range(1, 6):
            before = {name: vector.detach().clone() for name, vector in vectors.items()}
            frozen = freezing.frozen
            if with_closure:
                assert optimizer.step(closure) is not None
            else:
                for _ in range(3):
                    loss_of(vectors, step).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            still = {name for name, vector in vectors.items() if torch.equal(vector, before[name])}
            assert still == set(frozen)
        assert set(freezing.frozen) and freezing.log[0].step == 3


def test_accelerate_counts_optimizer_steps_not_batches() -> None:
    vectors = make_vectors()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(vectors.values(), lr=0.1))
    freezing = AdaptiveVectorFreezing(vectors, SETTINGS)
    freezing.attach(optimizer)
    for batch in range(1, 9):
        frozen = freezing.frozen
        before = {name: vector.detach().clone() for name, vector in vectors.items()}
        with accelerator.accumulate(nn.ParameterList(vectors.values())):
            accelerator.backward(loss_of(vectors, batch))
            optimizer.step()
            optimizer.zero_grad()
        still = {name for name, vector in vectors.items() if torch.equal(vector, before[name])}
        assert still == (set(frozen) if batch % 2 == 0 else set(vectors))
    assert freezing.log[0].step == 3 and len(freezing.frozen) == 2


@pytest.mark.parametrize("stop_after", [2, 3, 6, 7, 11])
def test_resumed_run_equals_uninterrupted(stop_after: int) -> None:
    def run(steps: range, state: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, nn.Parameter]]:
        vectors = make_vectors()
        optimizer = torch.optim.AdamW(vectors.values(), lr=0.1)
        freezing = AdaptiveVectorFreezing(vectors, SETTINGS)
        if state is not None:
            with torch.no_grad():
                for name, vector in vectors.items():
                    vector.copy_(state["vectors"][name])
            # Made after the values were put back: the start must come from the state.
            freezing = AdaptiveVectorFreezing(vectors, SETTINGS)
            optimizer.load_state_dict(state["optimizer"])
            freezing.load_state_dict(state["freezing"])
        freezing.attach(optimizer)
        for step in steps:
            step_once(vectors, optimizer, step)
        kept = {name: vector.detach().clone() for name, vector in vectors.items()}
        return {"vectors": kept, "optimizer": optimizer.state_dict(), "freezing": freezing.state_dict()}, vectors

    whole, _ = run(range(1, 15), None)
    first, _ = run(range(1, stop_after + 1), None)
    second, _ = run(range(stop_after + 1, 15), first)
    assert equal(whole["vectors"], second["vectors"])
    assert torch.equal(whole["freezing"].pop("strengths"), second["freezing"].pop("strengths"))
    assert equal(whole["freezing"].pop("initial"), second["freezing"].pop("initial"))
    assert whole["freezing"] == second["freezing"] and len(whole["freezing"]["log"]) == 2


def test_saved_state_does_not_change_with_training() -> None:
    vectors = make_vectors()
    optimizer = sgd(vectors)
    freezing = AdaptiveVectorFreezing(vectors, SETTINGS)
    freezing.attach(optimizer)
    for step in range(1, 4):
        step_once(vectors, optimizer, step)
    state = freezing.state_dict()
    strengths = state["strengths"].clone()
    for step in range(4, 9):
        step_once(vectors, optimizer, step)
    assert torch.equal(state["strengths"], strengths) and len(state["log"]) == 1


def test_freezing_survives_switching_adapters() -> None:
    unet = tiny_unet()
    models = {"unet": unet}
    add_training_adapter(models, VectorFitConfig(targets="attention"), "subject")
    vectors = adapter_parameters(models, "subject")
    assert {name.rpartition(".")[2] for name in vectors} == {"values", "bias"}
    optimizer = torch.optim.AdamW(vectors.values(), lr=0.01)
    freezing = AdaptiveVectorFreezing(vectors, FreezingSettings(1, 5, None, 1))
    freezing.attach(optimizer)

    def step() -> None:
        unet(**tiny_inputs()).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    resting = {name: vectors[name].detach().clone() for name in freezing.frozen}
    assert len(resting) == -(-len(vectors) // 5)
    for layer in spectral_layers(unet).values():
        layer.enable_adapters(False)
        layer.enable_adapters(True)
        layer.set_adapter(["subject"])
    others = {name: vector.detach().clone() for name, vector in vectors.items() if name not in resting}
    step()
    assert all(torch.equal(vectors[name], before) for name, before in resting.items())
    assert not any(torch.equal(vectors[name], before) for name, before in others.items())


def test_every_freezing_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    vectors = make_vectors()
    optimizer = sgd(vectors)
    freezing = AdaptiveVectorFreezing(vectors, SETTINGS)
    freezing.attach(optimizer)
    with caplog.at_level(logging.INFO, logger="svft_diffusion"):
        for step in range(1, 15):
            step_once(vectors, optimizer, step)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == ["step 3", "step 7", "step 11"]
    assert lines[0].startswith("step 3: 2 of 4 vectors frozen until step 7, the strongest c (0.1")
    assert lines[2] == "step 11: every vector trains again"


def test_a_fifth_freezes_by_default() -> None:
    settings = FreezingSettings()
    assert [settings.number_frozen(count) for count in (2, 5, 6, 160)] == [1, 1, 2, 32]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 0}, "warmup_steps must be at least 1"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"number_of_freezings": -1}, "number_of_freezings must be at least 1"),
        ({"smoothing": 1.0}, "smoothing must be at least 0 and below 1"),
        ({"smoothing": float("nan")}, "smoothing must be at least 0 and below 1"),
        ({"top_k": 4}, "top_k=4 freezes all 4 vectors"),
    ],
)
def test_wrong_numbers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AdaptiveVectorFreezing(make_vectors(), FreezingSettings(**changes))


def test_wrong_optimizers_and_states_are_refused() -> None:
    vectors = make_vectors()
    freezing = AdaptiveVectorFreezing(vectors, SETTINGS)
    with pytest.raises(UserError, match=r"does not train b \(of 3\)"):
        freezing.attach(torch.optim.SGD([vectors["a"]], lr=0.1))
    freezing.attach(sgd(vectors))
    with pytest.raises(UserError, match="attached already"):
        freezing.attach(sgd(vectors))
    state = freezing.state_dict()
    others = AdaptiveVectorFreezing({name: vectors[name] for name in ("a", "b", "c")}, SETTINGS)
    with pytest.raises(UserError, match="of other vectors, such as d"):
        others.load_state_dict(state)
