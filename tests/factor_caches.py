"""Weights for the on-disk cache of singular factors, and what lies in its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svft_diffusion.factors import cache as cache_module
from svft_diffusion.factors.entry import entry_key
from svft_diffusion.spectral import SingularFactors, decompose

SHAPES = [(9, 14), (14, 9), (7, 7), (1, 5), (33, 2), (40, 61)]


def cache_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``folder``, after the cache was moved there; it does not exist yet."""
    monkeypatch.setenv("SVFT_DIFFUSION_CACHE", str(folder))
    return folder


def record_decompositions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A list that gets the shape of every matrix whose decomposition begins."""
    shapes: list[tuple[int, ...]] = []

    def record(weight: torch.Tensor) -> SingularFactors:
        shapes.append(tuple(weight.shape))
        return decompose(weight)

    monkeypatch.setattr(cache_module, "decompose", record)
    return shapes


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def odd_matrices() -> dict[str, torch.Tensor]:
    return {f"layer{index}": matrix(*shape, seed=index) for index, shape in enumerate(SHAPES)}


def equal(first: SingularFactors, second: SingularFactors) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.factors"))


def entry_of(folder: Path, weight: torch.Tensor) -> Path:
    return folder / f"{entry_key(weight)}.factors"
