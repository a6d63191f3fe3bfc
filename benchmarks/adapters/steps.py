"""Measuring a training step of several contenders on one model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.adapters.contenders import Contender, Entrant
from benchmarks.adapters.memory import held_bytes, peak_bytes, saved_bytes
from benchmarks.adapters.results import Result
from benchmarks.adapters.timing import interleaved, stopwatch


def measure_steps(
    section: str,
    case: str,
    base: nn.Module,
    paths: Sequence[str],
    contenders: Mapping[str, Contender],
    inputs: Mapping[str, Tensor],
    *,
    rounds: int,
    autocast: bool,
) -> list[Result]:
    """Time of forward and backward, saved bytes, peak and held memory of every contender on its own modules.

    Args:
        section, case: names for the results.
        base: the model; it is frozen, and its weights are shared by everybody.
        paths: layers that carry the adapters.
        contenders: who takes part, by name.
        inputs: arguments of the model, by name.
        rounds: turns of everybody; with 0, memory is measured and time is not.
        autocast: run under autocast to the model's dtype, with everything that trains in float32.
    """
    base.requires_grad_(False)
    device = next(base.parameters()).device
    _say(f"{section}: {case}")
    entrants: dict[str, Entrant] = {}
    for name, contender in contenders.items():
        entrants[name] = Entrant(contender, base, paths, autocast=autocast)
    with torch.no_grad():
        shape = next(iter(entrants.values())).forward(**inputs)
    direction = torch.randn(shape.shape, generator=torch.Generator().manual_seed(1)).to(shape)
    steps = {name: partial(_step, entrant, inputs, direction) for name, entrant in entrants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in entrants}
    if rounds:
        updates = {name: entrant.update for name, entrant in entrants.items()}
        seconds = interleaved(
            steps,
            rounds,
            stopwatch(device),
            before=updates,
            after_round=lambda done: _say(f"  round {done} of {rounds}"),
        )
    results = []
    shared = held_bytes(base)
    for name, entrant in entrants.items():
        entrant.update()
        memory = {"saved": saved_bytes(entrant.model, partial(entrant.forward, **inputs))}
        entrant.update()
        memory["peak"] = peak_bytes(steps[name], device)
        memory["held"] = held_bytes(entrant.model) - shared
        results.append(Result(section, case, name, seconds[name], memory))
        _say(f"  {name}: {_summary(results[-1])}")
    return results


def _say(text: str) -> None:
    """Progress, at once even into a file."""
    print(text, flush=True)


def _summary(result: Result) -> str:
    """One line to watch a run by."""
    time = f"{statistics.median(result.seconds) * 1000:.4g} ms, " if result.seconds else ""
    return time + ", ".join(f"{kind} {number / 1e6:.1f} MB" for kind, number in result.memory.items())


def _step(entrant: Entrant, inputs: Mapping[str, Tensor], direction: Tensor) -> None:
    """Forward, and backward from a fixed gradient of the output."""
    for tensor in inputs.values():
        tensor.grad = None
    entrant.forward(**inputs).backward(direction)
