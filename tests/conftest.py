"""Settings of every test: one thread, and a cache of singular factors that dies with the session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _factor_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("SVFT_DIFFUSION_CACHE")
    os.environ["SVFT_DIFFUSION_CACHE"] = str(tmp_path_factory.mktemp("factors"))
    yield
    if before is None:
        del os.environ["SVFT_DIFFUSION_CACHE"]
    else:
        os.environ["SVFT_DIFFUSION_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
