"""The cached singular factors: exact, equal in memory, each computed once, in parallel."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from factor_caches import SHAPES, cache_in, entries, entry_of, equal, matrix, odd_matrices, record_decompositions

from svft_diffusion.errors import UserError
from svft_diffusion.factors import cache as cache_module
from svft_diffusion.factors import cached_factors_of
from svft_diffusion.factors import parallel as parallel_module
from svft_diffusion.factors.entry import entry_key
from svft_diffusion.spectral import SingularFactors, decompose


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return cache_in(tmp_path / "factors", monkeypatch)


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    return record_decompositions(monkeypatch)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    yield
    with ThreadPoolExecutor(1) as pool:  # a new thread begins with what was set last
        assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == 2
    torch.set_num_threads(before)


# --- what is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_warm_cache_gives_the_bits_of_the_cold_one(
    folder: Path, dtype: torch.dtype, two_threads: None, decomposed: list[tuple[int, ...]]
) -> None:
    weights = {label: weight.to(dtype) for label, weight in odd_matrices().items()}
    cold = cached_factors_of(weights)
    assert list(cold) == list(weights)
    assert len(decomposed) == len(SHAPES)
    warm = cached_factors_of(weights)
    assert len(decomposed) == len(SHAPES)
    for label, weight in weights.items():
        assert equal(cold[label], warm[label])
        assert equal(cold[label], decompose(weight))
    assert sorted(folder.iterdir()) == entries(folder)  # nothing unfinished is left


def test_factors_lie_in_memory_the_same_way_cold_and_warm(folder: Path) -> None:
    for label, weight in odd_matrices().items():
        runs = [cached_factors_of({label: weight})[label] for _ in range(2)]
        inputs = matrix(5, weight.shape[1], seed=9)
        results = []
        for factors in runs:
            for factor in factors:
                assert factor.data_ptr() % 64 == 0
                assert factor.is_contiguous()
            results.append((inputs @ factors.Vh.T * factors.S) @ factors.U.T)
        assert torch.equal(results[0], results[1])
        torch.testing.assert_close(results[0], inputs @ weight.T)


def test_layout_without_a_writable_cache_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("SVFT_DIFFUSION_CACHE", str(tmp_path / "file" / "factors"))
    for factors in cached_factors_of(odd_matrices()).values():
        assert all(factor.data_ptr() % 64 == 0 and factor.is_contiguous() for factor in factors)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the list of mapped files")
def test_factors_are_mapped_and_changes_in_place_stay_private(folder: Path) -> None:
    weight = matrix(9, 14)
    for _ in range(2):  # cold, warm
        factors = cached_factors_of({"layer": weight})["layer"]
        assert entry_of(folder, weight).name in Path("/proc/self/maps").read_text(encoding="utf-8")
        content = entry_of(folder, weight).read_bytes()
        factors.U.zero_()
        assert entry_of(folder, weight).read_bytes() == content
        assert equal(cached_factors_of({"layer": weight})["layer"], decompose(weight))


def test_largest_first_and_equal_weights_once(folder: Path, decomposed: list[tuple[int, ...]]) -> None:
    small, large = matrix(5, 4), matrix(30, 20)
    weights = {"small": small, "large": large, "copy": large.clone(), "strided": large.T.contiguous().T}
    factors = cached_factors_of(weights)
    assert decomposed == [(30, 20), (5, 4)]
    assert factors["large"] is factors["copy"] is factors["strided"]
    assert cached_factors_of({}) == {}


def test_equal_values_share_an_entry_and_others_do_not() -> None:
    weight = matrix(9, 14)
    same = torch.nn.Parameter(weight.T.contiguous().T)  # other strides, a parameter
    assert entry_key(same) == entry_key(weight)
    assert entry_key(weight.half()) == entry_key(weight.half().float())
    assert entry_key(weight.bfloat16()) == entry_key(weight.bfloat16().float())
    changed = weight.clone()
    changed[3, 4] += 1e-6
    others = [changed, weight.reshape(14, 9), weight.double(), weight.half(), weight.half().view(torch.bfloat16)]
    assert len({entry_key(other) for other in [weight, *others]}) == 6


def test_another_algorithm_has_other_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(3, 4)
    before = entry_key(weight)
    monkeypatch.setattr("svft_diffusion.factors.entry.ALGORITHM_VERSION", -1)
    assert entry_key(weight) != before


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.full((3, 4), torch.nan), "NaN or inf"),
        (torch.zeros(0, 4), r"empty, its shape is \(0, 4\)"),
        (torch.zeros(3), r"expected a matrix, got a tensor of shape \(3,\)"),
        (torch.zeros(3, 4, dtype=torch.uint8), "quantized or not real .*torch.uint8"),
        (torch.zeros(3, 4, device="meta"), "meta device"),
    ],
)
def test_a_weight_that_cannot_be_decomposed(folder: Path, weight: torch.Tensor, reason: str) -> None:
    with pytest.raises(UserError, match=f"layer bad can't be decomposed: .*{reason}"):
        cached_factors_of({"good": matrix(2, 3), "bad": weight})


def test_an_error_cancels_the_other_layers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def refuse(weight: torch.Tensor) -> SingularFactors:
        begun.append(weight)
        time.sleep(0.05)
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(cache_module, "decompose", refuse)
    with pytest.raises(UserError, match=r"layer layer\d+ can't be decomposed: not enough memory"):
        cached_factors_of({f"layer{size}": matrix(size, 3) for size in range(1, 40)})
    assert len(begun) < 5


def test_layers_are_decomposed_in_parallel_on_one_thread_each(
    folder: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(2, timeout=20)

    def meet(weight: torch.Tensor) -> SingularFactors:
        together.wait()  # breaks where nobody else decomposes
        assert torch.get_num_threads() == 1
        return decompose(weight)

    monkeypatch.setattr(cache_module, "decompose", meet)
    cached_factors_of({"one": matrix(5, 4), "two": matrix(4, 5, seed=1)})


def test_large_layers_take_turns(folder: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = 0

    def alone(weight: torch.Tensor) -> SingularFactors:
        nonlocal inside
        inside += 1
        time.sleep(0.02)
        assert inside == 1
        inside -= 1
        return decompose(weight)

    monkeypatch.setattr(cache_module, "decompose", alone)
    monkeypatch.setattr(parallel_module, "_WORKING_MEMORY", 48 * 30 * 20)
    cached_factors_of({str(seed): matrix(30, 20, seed=seed) for seed in range(4)})


def test_calls_from_several_threads(folder: Path, two_threads: None) -> None:
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(cached_factors_of, odd_matrices()) for _ in range(4)]
        for call in calls:
            assert all(equal(call.result()[label], decompose(weight)) for label, weight in odd_matrices().items())


# --- the bar ------------------------------------------------------------------------------------------------------


class Terminal:
    """A stderr that claims to be a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


def test_a_bar_only_while_something_is_decomposed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def shown(weights: dict[str, torch.Tensor], **options: bool) -> str:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        cached_factors_of(weights, **options)
        return terminal.text

    weights = odd_matrices()
    assert shown(weights, progress=False) == ""
    more = weights | {"other": matrix(8, 3, seed=7), "another": matrix(3, 8, seed=8)}
    assert "decomposing 2 layers: 100%" in shown(more)
    assert shown(more) == ""
    monkeypatch.undo()
    monkeypatch.setenv("SVFT_DIFFUSION_CACHE", str(folder / "elsewhere"))
    cached_factors_of(weights)
    assert capfd.readouterr() == ("", "")  # no terminal, no bar
