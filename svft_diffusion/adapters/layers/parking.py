"""Frozen weights that no training step reads are parked: in the CPU's memory, or out of the pages that are in memory.

A layer whose steps go by its singular factors alone reads its weight for samples and files only. Parking changes no
bit of a weight: the parameter stays what it is, and has the same values wherever they lie.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

# What Linux has done with pages since 5.4; Python has no name for it.
_MADV_PAGEOUT = 21


class Parking:
    """Where the frozen weight of one layer is. A new layer's weight is never parked.

    What was woken by a product that reads the weight is not parked again before the next `allow`: the shapes of
    batches take turns, and the weight must not travel with them.
    """

    def __init__(self) -> None:
        self._allowed = False
        self._home: torch.device | None = None  # of a weight that is parked

    @property
    def parked(self) -> bool:
        """Whether the weight is away."""
        return self._home is not None

    def allow(self) -> None:
        """From here on, products that don't read the weight may let it go."""
        self._allowed = True

    def park(self, module: nn.Module) -> None:
        """Let the weight of ``module`` go, where that is allowed."""
        if not self._allowed or self._home is not None:
            return
        weight = module.weight
        assert isinstance(weight, Tensor)
        self._home = weight.device
        if weight.device.type == "cpu":
            page_out(weight.data)
        else:
            weight.data = weight.data.to("cpu")

    def wake(self, module: nn.Module) -> None:
        """Bring the weight back where it was, to stay until it is allowed to go again."""
        self._allowed = False
        if self._home is None:
            return
        weight = module.weight
        assert isinstance(weight, Tensor)
        if weight.device != self._home:
            weight.data = weight.data.to(self._home)
        self._home = None


def page_out(tensor: Tensor) -> None:
    """Ask the system to take a tensor on the CPU out of memory until it is read again.

    Advice, which changes no value: pages of a file are read from it again, written ones go where the system swaps to,
    and those that other processes read, too, stay. It is understood by Linux alone.
    """
    advise = _madvise()
    if advise is None or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if size > 0:
        advise(first, size, _MADV_PAGEOUT)  # an older system refuses, which leaves everything as it is


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's function of that name."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function
