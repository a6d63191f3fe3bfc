"""The on-disk cache of singular factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svft_diffusion.factors import FactorCache, cached_factors, default_cache_folder
from svft_diffusion.factors import cache as cache_module
from svft_diffusion.spectral import SingularFactors, decompose


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(9, 14, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def store(tmp_path: Path) -> FactorCache:
    return FactorCache(tmp_path / "factors")


def equal(first: SingularFactors, second: SingularFactors) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def forbid_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(weight: torch.Tensor) -> SingularFactors:
        raise AssertionError("decomposed although the factors are known")

    monkeypatch.setattr(cache_module, "decompose", refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_warm_cache_gives_the_bits_of_the_cold_one(
    store: FactorCache, weight: torch.Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight.to(dtype)
    cold = store.factors(weight)
    forbid_decomposition(monkeypatch)
    assert equal(store.factors(weight), cold)
    assert equal(cold, decompose(weight))
    assert [file.suffix for file in store.folder.iterdir()] == [".safetensors"]


def test_equal_weights_share_an_entry_and_others_do_not(store: FactorCache, weight: torch.Tensor) -> None:
    same = torch.nn.Parameter(weight.T.contiguous().T)  # other strides, a parameter
    assert store.entry_path(same) == store.entry_path(weight)
    changed = weight.clone()
    changed[3, 4] += 1e-6
    others = [changed, weight.reshape(14, 9), weight.double(), weight.half(), weight.half().view(torch.bfloat16)]
    assert len({store.entry_path(other) for other in [weight, *others]}) == 6


def truncate(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:-20])


def flip_a_bit(entry: Path) -> None:
    content = bytearray(entry.read_bytes())
    content[-5] ^= 1
    entry.write_bytes(bytes(content))


def empty(entry: Path) -> None:
    entry.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_entry_is_noticed_and_mended(
    store: FactorCache, weight: torch.Tensor, damage: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = store.factors(weight)
    damage(store.entry_path(weight))  # type: ignore[operator]
    assert equal(store.factors(weight), factors)
    forbid_decomposition(monkeypatch)
    assert equal(store.factors(weight), factors)


def test_an_entry_of_another_shape_is_not_used(store: FactorCache, weight: torch.Tensor) -> None:
    other = weight[:, :10].contiguous()
    store.factors(other)
    store.entry_path(other).rename(store.entry_path(weight))
    assert equal(store.factors(weight), decompose(weight))


def test_a_cache_that_cannot_be_written_costs_no_result(tmp_path: Path, weight: torch.Tensor) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way", encoding="utf-8")
    for folder in (blocked / "factors", tmp_path / ("too long " * 50)):
        assert equal(FactorCache(folder).factors(weight), decompose(weight))


def test_cached_factors_lie_in_memory_like_computed_ones(store: FactorCache, weight: torch.Tensor) -> None:
    store.factors(weight)
    for stored, computed in zip(store.factors(weight), decompose(weight), strict=True):
        assert stored.data_ptr() % 64 == computed.data_ptr() % 64 == 0


def test_location(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weight: torch.Tensor) -> None:
    monkeypatch.setenv("SVFT_DIFFUSION_CACHE", str(tmp_path / "here"))
    assert default_cache_folder() == tmp_path / "here"
    cached_factors(weight)
    assert len(list((tmp_path / "here").iterdir())) == 1
    monkeypatch.delenv("SVFT_DIFFUSION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    for platform, folder in (
        ("linux", tmp_path / "xdg" / "svft_diffusion"),
        ("win32", tmp_path / "local" / "svft_diffusion" / "cache"),
        ("darwin", Path.home() / "Library" / "Caches" / "svft_diffusion"),
    ):
        monkeypatch.setattr(cache_module.sys, "platform", platform)
        assert default_cache_folder() == folder
