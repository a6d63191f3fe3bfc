"""The folder of the cache of singular factors: damage, refusals to write, its size, its place, several processes."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from factor_caches import cache_in, entries, entry_of, equal, matrix, odd_matrices, record_decompositions

from svft_diffusion.errors import UserError
from svft_diffusion.factors import cached_factors_of, configure_cache, default_cache_folder
from svft_diffusion.factors import location as location_module
from svft_diffusion.factors.entry import entry_key
from svft_diffusion.factors.location import DEFAULT_CACHE_SIZE, cache_folder, cache_size_limit
from svft_diffusion.spectral import decompose


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return cache_in(tmp_path / "factors", monkeypatch)


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    return record_decompositions(monkeypatch)


@pytest.fixture(autouse=True)
def _default_configuration() -> Iterator[None]:
    yield
    configure_cache(None, None)


# --- damage -------------------------------------------------------------------------------------------------------


def truncate(content: bytes) -> bytes:
    return content[:-20]


def extend(content: bytes) -> bytes:
    return content + bytes(64)


def empty(content: bytes) -> bytes:
    return b""


def replace_all(content: bytes) -> bytes:
    return b"\x3f" * len(content)


def zero_a_page(content: bytes) -> bytes:
    return bytes(256) + content[256:]


@pytest.mark.parametrize("damage", [truncate, extend, empty, replace_all, zero_a_page])
def test_a_damaged_entry_is_noticed_and_mended(
    folder: Path,
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
    decomposed: list[tuple[int, ...]],
) -> None:
    weight = matrix(9, 14)
    cached_factors_of({"layer": weight})
    entry = entry_of(folder, weight)
    entry.write_bytes(damage(entry.read_bytes()))
    for _ in range(2):
        assert equal(cached_factors_of({"layer": weight})["layer"], decompose(weight))
    assert len(decomposed) == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert entry.name in caplog.text


def test_every_flipped_byte_is_noticed(folder: Path, decomposed: list[tuple[int, ...]]) -> None:
    weight = matrix(5, 3)
    cached_factors_of({"layer": weight})
    entry = entry_of(folder, weight)
    content = entry.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        entry.write_bytes(bytes(damaged))
        assert equal(cached_factors_of({"layer": weight})["layer"], decompose(weight))
    assert len(decomposed) == 1 + len(content)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (9, 10)])
def test_the_entry_of_another_weight_is_not_used(folder: Path, shape: tuple[int, int]) -> None:
    weight, other = matrix(9, 14), matrix(*shape, seed=1)
    cached_factors_of({"layer": other})
    entry_of(folder, other).rename(entry_of(folder, weight))
    assert equal(cached_factors_of({"layer": weight})["layer"], decompose(weight))


def test_an_entry_that_is_a_folder(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    weight = matrix(9, 14)
    entry_of(folder, weight).mkdir(parents=True)
    assert equal(cached_factors_of({"layer": weight})["layer"], decompose(weight))
    assert len(caplog.records) == 2  # can't be used, can't be written


# --- folders that can't be written ----------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_costs_no_result_and_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way", encoding="utf-8")
    for folder in (blocked, blocked / "factors", tmp_path / ("too long " * 50)):
        monkeypatch.setenv("SVFT_DIFFUSION_CACHE", str(folder))
        caplog.clear()
        factors = cached_factors_of(odd_matrices())
        assert all(equal(factors[label], decompose(weight)) for label, weight in odd_matrices().items())
        assert "singular factors are not cached" in caplog.text
        assert caplog.text.count("not cached") == 1


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    written = Path.write_bytes

    def half(self: Path, data: memoryview) -> int:
        written(self, memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    factors = cached_factors_of(odd_matrices())
    assert all(equal(factors[label], decompose(weight)) for label, weight in odd_matrices().items())
    assert list(folder.iterdir()) == []
    assert caplog.text.count("No space left on device") == 1


def test_a_writer_that_is_killed_leaves_no_entry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Path.write_bytes

    def half(self: Path, data: memoryview) -> int:
        written(self, memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(Path, "write_bytes", half)
        cached_factors_of({"layer": matrix(9, 14)})
    assert entries(folder) == []
    cached_factors_of({"layer": matrix(9, 14)})
    assert len(entries(folder)) == 1


def test_a_read_only_folder_still_gives_what_it_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, decomposed: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    weights = odd_matrices()
    cached_factors_of(weights)

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for name in ("utime", "replace", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    cached_factors_of(weights)
    assert (len(decomposed), caplog.text) == (len(weights), "")
    cached_factors_of(weights | {"new": matrix(4, 6, seed=9)})
    assert len(decomposed) == len(weights) + 1
    assert "Permission denied" in caplog.text


# --- size ---------------------------------------------------------------------------------------------------------


def use(weight: torch.Tensor, folder: Path, *, at: float) -> Path:
    """Put ``weight`` into the cache, last used at the time ``at``."""
    cached_factors_of({"layer": weight})
    os.utime(entry_of(folder, weight), (at, at))
    return entry_of(folder, weight)


def test_the_entries_used_longest_ago_make_room(folder: Path) -> None:
    weights = [matrix(9, 14, seed=seed) for seed in range(5)]
    paths = [use(weight, folder, at=1000 + index) for index, weight in enumerate(weights[:4])]
    size = paths[0].stat().st_size
    configure_cache(None, str(3 * size))
    cached_factors_of({"read again": weights[0]})  # and so no longer the oldest
    cached_factors_of({"new": weights[4]})
    assert entries(folder) == sorted([paths[0], paths[3], entry_of(folder, weights[4])])


def test_what_a_call_has_read_or_written_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, read, *written = (matrix(9, 14, seed=seed) for seed in range(4))
    use(old, folder, at=3000)
    use(read, folder, at=1000)
    monkeypatch.setenv("SVFT_DIFFUSION_CACHE_SIZE", "1 KB")
    monkeypatch.setattr(os, "utime", lambda *args: None)  # the time of the last use alone would not save it
    factors = cached_factors_of({"read": read, "first": written[0], "second": written[1]})
    assert entries(folder) == sorted(entry_of(folder, weight) for weight in [read, *written])
    assert equal(factors["read"], decompose(read))


def test_only_what_is_the_cache_s_own_is_removed(folder: Path) -> None:
    folder.mkdir()
    key = entry_key(matrix(2, 2))
    foreign = [folder / name for name in ("photo.png", "notes.factors", "old.tmp", f"{key}.safetensors")]
    stale, fresh = (folder / f"{key}.{digit * 32}.tmp" for digit in "ab")
    for file in [*foreign, stale, fresh]:
        file.write_bytes(bytes(10_000))
        os.utime(file, (1000, 1000))
    an_hour_ago = time.time() - 3600
    os.utime(fresh, (an_hour_ago, an_hour_ago))
    configure_cache(None, "0")
    cached_factors_of({"layer": matrix(9, 14)})
    assert sorted(folder.iterdir()) == sorted([*foreign, fresh, entry_of(folder, matrix(9, 14))])


def test_entries_that_vanish_or_cannot_be_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [use(matrix(9, 14, seed=seed), folder, at=1000 + seed) for seed in range(4)]
    unlink = Path.unlink

    def partly(self: Path, missing_ok: bool = False) -> None:
        if self == paths[0]:
            raise PermissionError(errno.EACCES, "somebody has mapped the file")
        if self == paths[1]:
            unlink(self)  # another process is faster
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", partly)
    configure_cache(None, str(2 * paths[0].stat().st_size))
    cached_factors_of({"layer": matrix(9, 14, seed=8)})
    assert entries(folder) == sorted([paths[0], entry_of(folder, matrix(9, 14, seed=8))])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500 mb", 5 * 10**8),
        ("1.5KiB", 1536),
        ("2T", 2 * 10**12),
        ("123", 123),
        ("7B", 7),
        ("0", 0),
    ],
)
def test_sizes(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_size_limit() == DEFAULT_CACHE_SIZE == 20 * 1024**3
    monkeypatch.setenv("SVFT_DIFFUSION_CACHE_SIZE", text)
    assert cache_size_limit() == size
    configure_cache(None, "77")
    assert cache_size_limit() == 77


@pytest.mark.parametrize("text", ["much", "-1", "5 XB", "GB", "1e9", "5GB more"])
def test_a_wrong_size_is_named(
    text: str, folder: Path, monkeypatch: pytest.MonkeyPatch, decomposed: list[tuple[int, ...]]
) -> None:
    with pytest.raises(UserError, match=rf"the cache size '{text}' is not a size: .*500MB"):
        configure_cache(folder / "other", text)
    assert cache_folder() == folder
    monkeypatch.setenv("SVFT_DIFFUSION_CACHE_SIZE", text)
    with pytest.raises(UserError, match=f"SVFT_DIFFUSION_CACHE_SIZE '{text}' is not a size"):
        cached_factors_of({"layer": matrix(3, 4)})
    assert decomposed == []


def test_location(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SVFT_DIFFUSION_CACHE", str(tmp_path / "here"))
    assert cache_folder() == default_cache_folder() == tmp_path / "here"
    configure_cache(tmp_path / "flag", None)
    cached_factors_of({"layer": matrix(3, 4)})
    assert len(entries(tmp_path / "flag")) == 1
    configure_cache(None, None)
    cached_factors_of({"layer": matrix(3, 4)})
    assert len(entries(tmp_path / "here")) == 1
    monkeypatch.delenv("SVFT_DIFFUSION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    for platform, expected in (
        ("linux", tmp_path / "xdg" / "svft_diffusion"),
        ("win32", tmp_path / "local" / "svft_diffusion" / "cache"),
        ("darwin", Path.home() / "Library" / "Caches" / "svft_diffusion"),
    ):
        monkeypatch.setattr(location_module.sys, "platform", platform)
        assert default_cache_folder() == expected


# --- several processes ----------------------------------------------------------------------------------------------

PROCESS = """
import torch
from svft_diffusion.factors import cached_factors_of, configure_cache
from svft_diffusion.spectral import decompose

weights = {str(i): torch.randn(9 + i, 14, generator=torch.Generator().manual_seed(i)) for i in range(8)}
expected = {label: decompose(weight) for label, weight in weights.items()}
for size in ["1GB"] * 2 + ["4KB"] * 20:  # with room for all, and with entries that the others remove all the time
    configure_cache(None, size)
    for some in (list(weights)[:5], list(weights)[3:]):
        for label, factors in cached_factors_of({label: weights[label] for label in some}).items():
            assert all(torch.equal(a, b) for a, b in zip(factors, expected[label], strict=True)), label
"""


def test_processes_share_a_cache(folder: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", PROCESS], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        _, problems = process.communicate(timeout=120)
        assert (process.returncode, problems) == (0, "")
    assert sorted(folder.iterdir()) == entries(folder) != []
