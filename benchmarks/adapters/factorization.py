"""Decomposition: cold against plain LAPACK, and loading a whole UNet's factors from a warm cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.adapters.config import BenchmarkConfig
from benchmarks.adapters.results import Bar, Result
from benchmarks.adapters.timing import interleaved, wall_seconds
from benchmarks.adapters.unet import random_unet
from svft_diffusion.adapters.targets import matching_layers
from svft_diffusion.factors import CACHE_VARIABLE, cached_factors_of

COLD = "ours, empty cache"
LAPACK_POOL = "LAPACK, one matrix for each core"
LAPACK = "LAPACK, one matrix after the other on all cores"
_COLD_CASE = "a sample of the UNet's matrices"
_WARM_CASE = "all attention+feed-forward factors of the UNet, warm cache"
# Rows, columns and how many: a tenth of the UNet's attention and feed-forward layers, of every size.
_SAMPLE = (
    (320, 320, 3),
    (640, 640, 3),
    (1280, 1280, 4),
    (320, 768, 1),
    (640, 768, 1),
    (1280, 768, 1),
    (2560, 320, 1),
    (320, 1280, 1),
    (5120, 640, 1),
    (640, 2560, 1),
    (10240, 1280, 1),
    (1280, 5120, 1),
)
_QUICK_SAMPLE = ((16, 16, 2), (32, 16, 1))


def measure(config: BenchmarkConfig) -> list[Result]:
    """Cold decomposition of a sample, warm load of everything; on the wall clock, with all cores."""
    return [*_cold(config), *_warm(config)]


def bars(results: Iterable[Result]) -> list[Bar]:
    """The bars on both."""
    return [
        Bar("factors", _COLD_CASE, COLD, 1.1, LAPACK_POOL),
        Bar("factors", _COLD_CASE, COLD, 1.1, LAPACK),
        Bar("factors", _WARM_CASE, "ours", 2.0),
    ]


def _cold(config: BenchmarkConfig) -> list[Result]:
    torch.manual_seed(0)
    matrices: dict[str, Tensor] = {}
    for rows, columns, count in _QUICK_SAMPLE if config.quick else _SAMPLE:
        for index in range(count):
            # The spread of values with which linear layers start; a trained spectrum costs LAPACK the same.
            matrices[f"{rows}x{columns}.{index}"] = torch.randn(rows, columns) / columns**0.5
    folder = Path(tempfile.mkdtemp(prefix="svft_diffusion_cold_"))
    try:
        with _cache_at(folder), _threads(os.cpu_count() or 1):
            seconds = interleaved(
                {
                    COLD: partial(cached_factors_of, matrices, progress=False),
                    LAPACK_POOL: partial(_lapack_pool, list(matrices.values())),
                    LAPACK: partial(_lapack, list(matrices.values())),
                },
                min(config.rounds, 3),
                wall_seconds,
                before={COLD: partial(_empty, folder)},
            )
    finally:
        shutil.rmtree(folder)
    return [Result("factors", _COLD_CASE, name, values) for name, values in seconds.items()]


def _warm(config: BenchmarkConfig) -> list[Result]:
    unet = random_unet(config)
    weights: Mapping[str, Tensor] = {
        path: unet.get_parameter(f"{path}.weight").detach() for path in matching_layers(unet, "attention+feed-forward")
    }
    cached_factors_of(weights, progress=True)  # fills the cache where it is not warm yet
    seconds = interleaved({"ours": partial(cached_factors_of, weights, progress=False)}, config.rounds, wall_seconds)
    return [Result("factors", _WARM_CASE, "ours", seconds["ours"])]


def _lapack(matrices: Sequence[Tensor]) -> None:
    for matrix in matrices:
        torch.linalg.svd(_tall(matrix), full_matrices=False)


def _lapack_pool(matrices: Sequence[Tensor]) -> None:
    """The largest first, so that no core is left with a large one at the end."""
    ordered = sorted(matrices, key=Tensor.numel, reverse=True)
    with ThreadPoolExecutor(os.cpu_count(), initializer=partial(torch.set_num_threads, 1)) as pool:
        for _ in pool.map(lambda matrix: torch.linalg.svd(_tall(matrix), full_matrices=False), ordered):
            pass


def _tall(matrix: Tensor) -> Tensor:
    """The orientation in which LAPACK is quicker, up to 2.4 times."""
    return matrix.T if matrix.shape[0] < matrix.shape[1] else matrix


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


@contextmanager
def _cache_at(folder: Path) -> Iterator[None]:
    before = os.environ[CACHE_VARIABLE]
    os.environ[CACHE_VARIABLE] = str(folder)
    try:
        yield
    finally:
        os.environ[CACHE_VARIABLE] = before


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
