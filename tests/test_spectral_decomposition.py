"""The decomposition: accurate, and the same numbers wherever and however often at once it runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from svft_diffusion.spectral import canonical_signs, decompose

SHAPES = [(7, 12), (12, 7), (9, 9), (1, 5), (5, 1)]


def random_matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_factors_rebuild_the_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_matrix(*shape).to(dtype)
    U, S, Vh = decompose(weight)
    k = min(shape)
    assert (U.shape, S.shape, Vh.shape) == ((shape[0], k), (k,), (k, shape[1]))
    assert U.dtype == S.dtype == Vh.dtype == torch.float32
    torch.testing.assert_close((U * S) @ Vh, weight.float(), rtol=0, atol=5e-6)
    torch.testing.assert_close(U.T @ U, torch.eye(k), rtol=0, atol=1e-6)
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(k), rtol=0, atol=1e-6)
    assert (S.diff() <= 0).all()


def test_factors_do_not_depend_on_the_number_of_threads() -> None:
    weight = random_matrix(96, 160)
    one = decompose(weight)
    torch.set_num_threads(2)
    try:
        two = decompose(weight)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(first, second) for first, second in zip(one, two, strict=True))


def test_largest_entry_of_every_left_vector_is_positive() -> None:
    U = decompose(random_matrix(11, 20)).U
    deciding = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    assert (deciding > 0).all()


def test_canonical_signs_undo_any_flip_and_rounding_does_not_decide_ties() -> None:
    U = decompose(random_matrix(20, 11)).U
    flips = torch.tensor([1.0, -1.0] * 5 + [-1.0])
    assert torch.equal(canonical_signs(U * flips) * flips, canonical_signs(U))
    tie = torch.tensor([[0.1], [-0.7], [0.7]])
    nudged = tie + torch.tensor([[0.0], [0.0], [1e-6]])
    assert canonical_signs(tie).item() == canonical_signs(nudged).item() == -1.0


@pytest.mark.parametrize("bad", [torch.tensor([[1.0, float("nan")]]), torch.tensor([[float("inf")]])])
def test_weights_that_are_not_finite_are_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        decompose(bad)


def test_only_matrices_with_values_are_decomposed() -> None:
    with pytest.raises(ValueError, match="matrix"):
        decompose(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="meta"):
        decompose(torch.zeros(2, 3, device="meta"))


def test_several_threads_decompose_at_once_and_leave_the_number_of_threads_as_it_was() -> None:
    weights = [random_matrix(60, 40 + index, seed=index) for index in range(24)]
    expected = [decompose(weight) for weight in weights]
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(decompose, weights))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def test_every_thread_decomposes_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    both_are_in, numbers = Barrier(2), []
    svd = torch.linalg.svd

    def counted(*arguments: Tensor, **options: bool) -> tuple[Tensor, ...]:
        both_are_in.wait(10)
        numbers.append(torch.get_num_threads())
        return svd(*arguments, **options)

    def own_number_around(weight: Tensor) -> int:
        torch.get_num_threads()  # the first question in a thread would take over another thread's number
        torch.set_num_threads(2)
        decompose(weight)
        return torch.get_num_threads()

    monkeypatch.setattr(torch.linalg, "svd", counted)
    try:
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(own_number_around, [random_matrix(6, 4)] * 2)) == [2, 2]
    finally:
        torch.set_num_threads(1)
    assert numbers == [1, 1]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_steep_and_deficient_spectra_keep_orthogonal_vectors(shape: tuple[int, int]) -> None:
    k = min(shape)
    left, right = (torch.linalg.qr(random_matrix(size, k, seed=size).double())[0] for size in shape)
    for sigma in (torch.arange(1, k + 1).double() ** -4, torch.ones(k).double() * (torch.arange(k) < k // 2)):
        weight = (left * sigma) @ right.T
        U, S, Vh = decompose(weight)
        torch.testing.assert_close((U * S) @ Vh, weight.float(), rtol=0, atol=1e-6)
        torch.testing.assert_close(U.T @ U, torch.eye(k), rtol=0, atol=1e-6)
        torch.testing.assert_close(Vh @ Vh.T, torch.eye(k), rtol=0, atol=1e-6)
        torch.testing.assert_close(S, sigma.float(), rtol=1e-5, atol=1e-7)
