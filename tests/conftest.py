"""Settings of every test: one thread, and a cache of singular factors that dies with the session."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from svft_diffusion.factors import configure_cache


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


@pytest.fixture(autouse=True)
def _chosen_cache() -> Iterator[None]:
    """A run that was given a cache folder chooses it for its process; the next test has the session's again."""
    yield
    configure_cache(None, None)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No base model is asked for over the network; without one, that takes 20 seconds of trying again."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session", autouse=True)
def _heard_signals() -> None:
    """Who starts the tests in the background, or with nohup, has them ignore what some of them send to themselves."""
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
