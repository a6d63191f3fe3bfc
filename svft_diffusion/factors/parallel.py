"""Singular factors of the many weights of a model, over all cores."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from svft_diffusion.errors import UserError
from svft_diffusion.factors.cache import open_cache
from svft_diffusion.factors.entry import entry_key
from svft_diffusion.spectral import SingularFactors

# What all decompositions that run at the same time may take, and what one of them takes for each element of its
# matrix: the matrix and its larger factor in float64, both once more inside of LAPACK, and the results in float32.
_WORKING_MEMORY = 8 * 2**30
_BYTES_PER_ELEMENT = 48

_Result = TypeVar("_Result")
# A thread begins with the number of PyTorch threads that was set last, by whichever thread: one pool at a time sets it.
_one_pool = threading.Lock()


def cached_factors_of(weights: Mapping[str, Tensor], *, progress: bool = True) -> dict[str, SingularFactors]:
    """Factors of many matrices, on the CPU in float32: from the cache where they are known, else decomposed.

    Layers run in parallel with one thread each, as many as `torch.get_num_threads` allows; equal weights are
    decomposed once. A cold and a warm cache give the same bits, and the factors are mapped from its files.

    Args:
        weights: label -> matrix (m, n), of any floating dtype and on any device.
        progress: show a bar on a terminal while something is decomposed.

    Raises:
        UserError: a weight can't be decomposed, with its label; or the size of the cache is given wrongly.
    """
    cache = open_cache()
    # Largest first: what runs at the end is small, and the threads end together.
    labels = sorted(weights, key=lambda label: weights[label].numel(), reverse=True)
    with _single_threads() as pool:
        keys = dict(_results(pool, lambda label: entry_key(weights[label]), labels))
        label_of_key = {keys[label]: label for label in reversed(labels)}
        unique = [label for label in labels if label_of_key[keys[label]] == label]
        stored = dict(_results(pool, lambda label: cache.find(keys[label], _shape(weights[label])), unique))
    factors = {label: found for label, found in stored.items() if found is not None}
    missing = [label for label in unique if label not in factors]
    if missing:
        working_memory = _BYTES_PER_ELEMENT * weights[missing[0]].numel()
        at_most = max(1, _WORKING_MEMORY // max(1, working_memory))
        with _single_threads(at_most) as pool, _progress_bar(weights, missing, progress) as bar:
            for label, computed in _results(pool, lambda label: cache.compute(keys[label], weights[label]), missing):
                factors[label] = computed
                bar.update(_cost(weights[label]))
        cache.evict()
    return {label: factors[label_of_key[keys[label]]] for label in weights}


@contextlib.contextmanager
def _single_threads(at_most: int | None = None) -> Iterator[Executor]:
    """A pool of as many threads as PyTorch may use, none of which starts more; an error cancels what waits in it."""
    with _one_pool:
        before = torch.get_num_threads()
        count = before if at_most is None else min(before, at_most)
        pool = ThreadPoolExecutor(count, "factors", initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)


def _results(
    pool: Executor, function: Callable[[str], _Result], labels: Sequence[str]
) -> Iterator[tuple[str, _Result]]:
    """(label, ``function(label)``) in the order in which they get ready.

    Raises:
        UserError: a layer can't be decomposed.
    """
    labels_of_futures = {pool.submit(function, label): label for label in labels}
    for future in as_completed(labels_of_futures):
        label = labels_of_futures[future]
        try:
            result = future.result()
        except (ValueError, RuntimeError) as problem:  # PyTorch's failures, lack of memory among them
            raise UserError(f"layer {label} can't be decomposed: {problem}") from problem
        yield label, result


def _progress_bar(weights: Mapping[str, Tensor], missing: Sequence[str], shown: bool) -> tqdm:
    """A bar over the work rather than over the layers, which differ by a factor of a thousand."""
    return tqdm(
        total=sum(_cost(weights[label]) for label in missing),
        desc=f"decomposing {len(missing)} layers",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        disable=None if shown else True,  # None: shown on a terminal only
    )


def _cost(weight: Tensor) -> int:
    """What a decomposition costs, up to a factor: m n min(m, n)."""
    return weight.numel() * min(weight.shape)


def _shape(weight: Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    return rows, columns
