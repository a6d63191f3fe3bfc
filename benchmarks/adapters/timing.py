"""Stopwatches that other work on the machine does not disturb, and rounds in which all contenders take turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

# Times one call in seconds.
Stopwatch = Callable[[Callable[[], object]], float]

# A contender that is quicker than this is run several times in each round.
_SECONDS_PER_TURN = 0.05
_MOST_REPEATS = 20


def stopwatch(device: torch.device) -> Stopwatch:
    """CUDA events on a GPU; the CPU time of the calling thread elsewhere.

    Thread time counts only what this thread computes, so it holds for work on one thread: forward and backward
    both run on the caller's thread then. Time in which the thread waits for a core is not in it.
    """
    return _cuda_seconds if device.type == "cuda" else _thread_seconds


def wall_seconds(call: Callable[[], object]) -> float:
    """Seconds on the wall clock, for work on several threads and for reading files."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def interleaved(
    timed: Mapping[str, Callable[[], object]],
    rounds: int,
    watch: Stopwatch,
    *,
    before: Mapping[str, Callable[[], object]] | None = None,
    after_round: Callable[[int], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every contender in every round: contenders take turns, each round begins with another one.

    Args:
        timed: what to time, by name of the contender; each runs once beforehand to warm up.
        rounds: how often everybody gets a turn.
        watch: the stopwatch.
        before: by name, what runs before each timed call outside the clock (an optimizer's step, say).
        after_round: called with the number of rounds done, for progress.
    """
    before = before or {}
    names = list(timed)
    repeats = {}
    for name in names:
        for _ in range(2):  # the first call of a quick contender tells more about caches than about itself
            before.get(name, _nothing)()
            took = watch(timed[name])
            if took > _SECONDS_PER_TURN:
                break
        repeats[name] = min(_MOST_REPEATS, max(1, math.ceil(_SECONDS_PER_TURN / max(took, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            total = 0.0
            for _ in range(repeats[name]):
                before.get(name, _nothing)()
                total += watch(timed[name])
            seconds[name].append(total / repeats[name])
        if after_round is not None:
            after_round(turn + 1)
    return seconds


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Ratio of two contenders in each round."""
    return [own / other for own, other in zip(seconds, reference, strict=True)]


def median_ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Median of the ratios of the rounds: what slows a whole round down drops out of it."""
    return statistics.median(ratios(seconds, reference))


def _thread_seconds(call: Callable[[], object]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


def _cuda_seconds(call: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000


def _nothing() -> None:
    """Before contenders that need no preparation."""
