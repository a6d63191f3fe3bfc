"""Memory of a training step: what autograd saves for backward, the peak of a step, what a model holds for good."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that ``forward`` saves for backward, in storages that the model does not hold anyway.

    A storage that several layers save (the common input of queries, keys and values) counts once.
    """
    saved: dict[int, Tensor] = {}

    def remember(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # kept alive: an address is not given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        result = forward()
    # Asked afterwards: a weight that a layer rebuilds at the first forward of a step is held by the model as well.
    owned = {tensor.untyped_storage().data_ptr() for tensor in held_tensors(model)}
    total = sum(tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in owned)
    del result
    return total


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes allocated at one time during ``step`` beyond those allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    allocated = peak = 0
    for event in sorted(_allocations(profiler), key=lambda event: event[0]):
        allocated += event[1]
        peak = max(peak, allocated)
    return peak


def held_bytes(model: nn.Module) -> int:
    """Bytes that the model holds between steps: weights, adapters, singular factors, weights rebuilt from them."""
    storages = (tensor.untyped_storage() for tensor in held_tensors(model))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a module of ``model`` reaches through its attributes, buffers and parameters included."""
    seen: set[int] = set()
    for module in model.modules():
        yield from _tensors_in(vars(module), seen)


def _allocations(profiler: torch.profiler.profile) -> Iterator[tuple[int, int]]:
    """Time and signed size of every allocation on the CPU."""
    assert profiler.profiler is not None
    events: Any = profiler.profiler.kineto_results
    for event in events.events():
        if event.name() == "[memory]":
            yield event.start_ns(), event.nbytes()


def _tensors_in(value: object, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, nn.Module | str | bytes | int | float | type(None)) or id(value) in seen:
        return  # modules come up by themselves
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        parts = list(value)
    elif dataclasses.is_dataclass(value) or type(value).__module__.startswith("svft_diffusion"):
        parts = list(getattr(value, "__dict__", {}).values())
        parts += [getattr(value, slot) for slot in getattr(type(value), "__slots__", ()) if hasattr(value, slot)]
    else:
        return
    for part in parts:
        yield from _tensors_in(part, seen)
