"""The formulas against their explicit, dense forms."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from svft_diffusion.spectral import (
    SingularFactors,
    apply_core,
    banded_core,
    banded_positions,
    canonical_signs,
    core_matrix,
    core_update,
    decompose,
    number_of_banded_positions,
    spectral_shift,
    sum_of_cores,
    svdiff_update,
    svft_update,
)

SHAPES = [(7, 12), (12, 7), (9, 9), (1, 5), (5, 1)]


def random_matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def banded_values(rank: int, off_diagonals: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_matrix(number_of_banded_positions(rank, off_diagonals), seed=3, dtype=dtype)


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


@pytest.mark.parametrize(("n", "off_diagonals"), [(1, 0), (5, 0), (5, 1), (5, 4), (8, 3)])
def test_banded_positions_are_the_band_row_by_row(n: int, off_diagonals: int) -> None:
    expected = [(i, j) for i in range(n) for j in range(n) if abs(i - j) <= off_diagonals]
    rows, columns = banded_positions(n, off_diagonals)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
    assert number_of_banded_positions(n, off_diagonals) == len(expected)


@pytest.mark.parametrize("off_diagonals", [-1, 4, 9])
def test_a_band_wider_than_the_matrix_is_refused(off_diagonals: int) -> None:
    with pytest.raises(ValueError, match="off_diagonals"):
        banded_positions(4, off_diagonals)


@pytest.mark.parametrize("off_diagonals", [0, 1, 3])
def test_core_holds_the_values_at_their_positions(off_diagonals: int) -> None:
    values = banded_values(6, off_diagonals)
    matrix = torch.zeros(6, 6)
    matrix[banded_positions(6, off_diagonals)] = values
    assert torch.equal(core_matrix(banded_core(values, 6, off_diagonals)), matrix)


def test_a_core_made_in_inference_mode_first_can_train_afterwards() -> None:
    with torch.inference_mode():
        banded_core(banded_values(13, 3), 13, 3)
    values = banded_values(13, 3).requires_grad_()
    banded_core(values, 13, 3).sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))


@pytest.mark.parametrize("off_diagonals", [0, 1, 3])
def test_apply_core_is_a_product_with_the_dense_matrix(off_diagonals: int) -> None:
    core = banded_core(banded_values(6, off_diagonals), 6, off_diagonals)
    z = random_matrix(2, 5, 6)
    torch.testing.assert_close(apply_core(z, core), z @ core_matrix(core).T)


def test_apply_core_keeps_small_entries_in_16_bit() -> None:
    core = torch.full((4, 3), 1e-9)
    assert apply_core(torch.ones(1, 4, dtype=torch.float16), core).dtype == torch.float32
    assert (apply_core(torch.ones(1, 4, dtype=torch.float16), core) > 0).all()


def test_sum_of_cores_adds_matrices_of_different_rank_and_width() -> None:
    cores = [banded_core(banded_values(rank, d), rank, d) for rank, d in ((6, 0), (4, 2), (5, 1))]
    expected = torch.zeros(6, 6)
    for core in cores:
        rank = core.shape[0]
        expected[:rank, :rank] += core_matrix(core)
    torch.testing.assert_close(core_matrix(sum_of_cores(cores)), expected)


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("off_diagonals", [0, 2])
@pytest.mark.parametrize("rank", [None, 4])
def test_svft_update_is_the_sum_over_the_pattern(shape: tuple[int, int], off_diagonals: int, rank: int | None) -> None:
    factors = decompose(random_matrix(*shape))
    kept = rank or min(shape)
    values = banded_values(kept, off_diagonals)
    expected = torch.zeros(shape)
    for value, i, j in zip(values, *banded_positions(kept, off_diagonals), strict=True):
        expected += value * torch.outer(factors.U[:, i], factors.Vh[j])
    torch.testing.assert_close(svft_update(factors, values, off_diagonals, rank), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_svdiff_update_is_equation_2(shape: tuple[int, int]) -> None:
    weight = random_matrix(*shape, dtype=torch.float64)
    U, S, Vh = decompose(weight)
    delta = 3 * random_matrix(min(shape), seed=4)  # some singular values hit the relu
    shifted = (U * torch.relu(S + 0.7 * delta)) @ Vh
    assert (torch.relu(S + 0.7 * delta) == 0).any()
    torch.testing.assert_close(
        weight.float() + svdiff_update(SingularFactors(U, S, Vh), delta, 0.7), shifted, rtol=1e-5, atol=1e-5
    )


def test_shifts_of_several_adapters_add_up_inside_the_relu() -> None:
    sigma = torch.tensor([3.0, 2.0, 1.0])
    deltas = [torch.tensor([1.0, -3.0, -0.5]), torch.tensor([0.5, 4.0])]
    expected = torch.relu(sigma + 0.5 * deltas[0] + 2.0 * torch.tensor([0.5, 4.0, 0.0])) - sigma
    torch.testing.assert_close(spectral_shift(sigma, deltas, [0.5, 2.0]), expected)


def test_zero_shift_is_exactly_zero_and_a_small_one_is_not_rounded_away() -> None:
    sigma = torch.tensor([20.0, 1e-8, 0.0])
    assert torch.equal(spectral_shift(sigma, [torch.zeros(3)], [1.0]), torch.zeros(3))
    small = torch.tensor([1e-8, 1e-8, 1e-8])
    assert torch.equal(spectral_shift(sigma, [small], [1.0]), small)


@pytest.mark.parametrize("off_diagonals", [0, 2])
def test_gradient_of_the_banded_path(off_diagonals: int) -> None:
    values = banded_values(5, off_diagonals, torch.float64).requires_grad_()
    z = random_matrix(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, x: apply_core(x, banded_core(v, 5, off_diagonals)), (values, z))
    U, Vh = random_matrix(6, 5, dtype=torch.float64), random_matrix(5, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: core_update(U, banded_core(v, 5, off_diagonals), Vh), (values,))


def test_gradient_of_the_shift() -> None:
    sigma = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    delta = torch.tensor([0.3, -5.0, 0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: spectral_shift(sigma, [d], [0.5]), (delta,))


def test_the_mathematics_needs_nothing_but_torch() -> None:
    program = (
        "import sys, svft_diffusion.spectral;"
        "print([name for name in ('peft', 'diffusers', 'transformers', 'safetensors') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
