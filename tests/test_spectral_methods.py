"""The formulas of the methods against their explicit forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from svft_diffusion.spectral import (
    SingularFactors,
    banded_core,
    banded_positions,
    core_matrix,
    decompose,
    effective_rank,
    gated_values,
    number_of_banded_positions,
    number_of_triplets,
    official_initial_values,
    random_positions,
    rescaled_norm_weight,
    selected_triplets,
    shifted_norm_weight,
    siva_update,
    smoothed_strength,
    sparse_core,
    spectral_shift,
    strongest_vectors,
    svdiff_update,
    svft_update,
    top_k_positions,
    training_strength,
    vectorfit_update,
)

SHAPES = [(7, 12), (12, 7), (9, 9)]


def random_matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact_factors(shape: tuple[int, int]) -> SingularFactors:
    return SingularFactors(*(factor.double() for factor in decompose(random_matrix(*shape))))


# SVFT


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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("off_diagonals", [0, 2])
@pytest.mark.parametrize("rank", [None, 4])
def test_a_banded_update_is_the_sum_over_the_pattern(
    shape: tuple[int, int], off_diagonals: int, rank: int | None
) -> None:
    factors = decompose(random_matrix(*shape))
    kept = rank or min(shape)
    values = random_matrix(number_of_banded_positions(kept, off_diagonals), seed=3)
    expected = torch.zeros(shape)
    for value, i, j in zip(values, *banded_positions(kept, off_diagonals), strict=True):
        expected += value * torch.outer(factors.U[:, i], factors.Vh[j])
    update = svft_update(factors, banded_core(values, kept, off_diagonals))
    torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sparse_update_is_the_sum_over_the_pattern(shape: tuple[int, int]) -> None:
    factors, k = decompose(random_matrix(*shape)), min(shape)
    positions, values = random_positions(k, 9, seed=1), random_matrix(9, seed=3)
    expected = torch.zeros(shape)
    for value, position in zip(values, positions.tolist(), strict=True):
        expected += value * torch.outer(factors.U[:, position // k], factors.Vh[position % k])
    torch.testing.assert_close(svft_update(factors, sparse_core(values, positions, k)), expected, rtol=1e-5, atol=1e-6)


def test_random_positions_never_change() -> None:
    """A seed stands for the same choice on every machine, in every release."""
    assert random_positions(10, 8, seed=0).tolist() == [6, 20, 30, 32, 48, 56, 65, 99]
    assert selected_triplets(20, 0.25, "random", seed=0).tolist() == [6, 7, 10, 17, 18]


@pytest.mark.parametrize(("n", "count"), [(1, 1), (4, 0), (4, 7), (4, 8), (4, 9), (4, 16), (60, 294), (60, 3599)])
def test_random_positions_are_distinct_and_ascending(n: int, count: int) -> None:
    positions = random_positions(n, count, seed=5)
    assert (positions.dtype, positions.shape) == (torch.int32, (count,))
    assert (positions.diff() > 0).all()
    assert count == 0 or (positions.min() >= 0 and positions.max() < n * n)


@pytest.mark.parametrize("count", [5, 11])  # fewer than half of all positions, and more
def test_random_positions_are_uniform(count: int) -> None:
    draws = 1600
    hits = torch.zeros(16)
    for seed in range(draws):
        hits[random_positions(4, count, seed).long()] += 1
    share = count / 16
    deviation = (hits / draws - share) / math.sqrt(share * (1 - share) / draws)
    assert deviation.abs().max() < 4


def test_more_positions_than_entries_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot draw 10 distinct indices out of 9"):
        random_positions(3, 10, seed=0)
    U, _, Vh = decompose(random_matrix(5, 3))
    for count in (0, 10):
        with pytest.raises(ValueError, match="between 1 and 9"):
            top_k_positions(U, Vh, count)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 10, 49])
def test_top_k_positions_are_where_left_and_right_vectors_align_best(shape: tuple[int, int], count: int) -> None:
    U, _, Vh = decompose(random_matrix(*shape))
    size = max(shape)
    left, right = torch.zeros(size, min(shape)), torch.zeros(size, min(shape))
    left[: shape[0]], right[: shape[1]] = U, Vh.T
    alignment = (left.T @ right).abs().flatten().tolist()
    expected = sorted(sorted(range(len(alignment)), key=lambda index: -alignment[index])[:count])
    positions = top_k_positions(U, Vh, count)
    assert positions.dtype == torch.int32
    assert positions.tolist() == expected


def test_equally_aligned_pairs_are_taken_from_the_first() -> None:
    assert top_k_positions(torch.eye(4), torch.eye(4), 2).tolist() == [0, 5]
    assert top_k_positions(torch.eye(4), torch.eye(4), 6).tolist() == [0, 1, 2, 5, 10, 15]


def test_start_of_the_authors_code() -> None:
    values = official_initial_values(20_000, torch.Generator().manual_seed(0))
    assert values.shape == (20_000,)
    assert values.square().sum().item() == pytest.approx(2, rel=0.05)
    assert torch.equal(gated_values(values, torch.zeros(1)), 0.5 * values)


# SVDiff


@pytest.mark.parametrize("shape", SHAPES)
def test_svdiff_update_is_equation_2(shape: tuple[int, int]) -> None:
    weight = random_matrix(*shape, dtype=torch.float64)
    U, S, Vh = decompose(weight)
    delta = 3 * random_matrix(min(shape), seed=4)  # some singular values hit the relu
    shifted = (U * torch.relu(S + 0.7 * delta)) @ Vh
    assert (torch.relu(S + 0.7 * delta) == 0).any()
    for strength in (0.7, torch.tensor(0.7)):
        update = svdiff_update(SingularFactors(U, S, Vh), delta, strength)
        torch.testing.assert_close(weight.float() + update, shifted, rtol=1e-5, atol=1e-5)


def test_a_shift_of_the_leading_singular_values_leaves_the_others() -> None:
    factors, delta = exact_factors((7, 12)), random_matrix(3, dtype=torch.float64)
    padded = torch.cat([delta, torch.zeros(4)])
    torch.testing.assert_close(svdiff_update(factors, delta), svdiff_update(factors, padded))


def test_shifts_of_several_adapters_add_up_inside_the_relu() -> None:
    sigma = torch.tensor([3.0, 2.0, 1.0])
    deltas = [torch.tensor([1.0, -3.0, -0.5]), torch.tensor([0.5, 4.0])]
    expected = torch.relu(sigma + 0.5 * deltas[0] + 2.0 * torch.tensor([0.5, 4.0, 0.0])) - sigma
    torch.testing.assert_close(spectral_shift(sigma, deltas, [0.5, torch.tensor(2.0)]), expected)


def test_zero_shift_is_exactly_zero_and_a_small_one_is_not_rounded_away() -> None:
    sigma = torch.tensor([20.0, 1e-8, 0.0])
    assert torch.equal(spectral_shift(sigma, [torch.zeros(3)], [1.0]), torch.zeros(3))
    small = torch.tensor([1e-8, 1e-8, 1e-8])
    assert torch.equal(spectral_shift(sigma, [small], [1.0]), small)


def test_norm_weights_are_shifted_entry_by_entry() -> None:
    weight, delta = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 0.5, -4.0])
    assert torch.equal(shifted_norm_weight(weight, delta, 2.0), torch.tensor([2.0, -1.0, -8.0]))
    assert torch.equal(shifted_norm_weight(weight, delta, torch.tensor(0.0)), weight)


@pytest.mark.parametrize("shift", [0.0, 0.3, -0.3, -100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_weight_rescaled_is_equation_2_for_a_matrix_of_one_row(shift: float, dtype: torch.dtype) -> None:
    weight, delta = random_matrix(20).to(dtype), torch.tensor([shift])
    U, S, Vh = torch.linalg.svd(weight.float()[None], full_matrices=False)
    expected = ((U * torch.relu(S + 0.5 * delta)) @ Vh).squeeze(0)
    found = rescaled_norm_weight(weight, delta, 0.5)
    torch.testing.assert_close(found, expected)
    if shift == 0:
        assert torch.equal(found, weight.float())


def test_a_zero_norm_weight_stays_zero() -> None:
    assert torch.equal(rescaled_norm_weight(torch.zeros(5), torch.tensor([0.1]), 1.0), torch.zeros(5))


# VectorFit


@pytest.mark.parametrize("shape", SHAPES)
def test_vectorfit_shifts_singular_values_without_a_relu(shape: tuple[int, int]) -> None:
    U, S, Vh = exact_factors(shape)
    delta = -10 * torch.ones(min(shape), dtype=torch.float64)
    weight = (U * S) @ Vh
    expected = (U * (S + 0.5 * delta)) @ Vh
    torch.testing.assert_close(weight + vectorfit_update(SingularFactors(U, S, Vh), delta, 0.5), expected)


def test_strength_is_the_mean_absolute_deviation_and_its_moving_average() -> None:
    vector, initial = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, 1.0, 1.0])
    assert training_strength(vector, initial).item() == pytest.approx(5 / 3)
    assert training_strength(vector).item() == 2.0
    assert smoothed_strength(torch.tensor(1.0), torch.tensor(3.0), 0.75).item() == 1.5


def test_the_strongest_vectors_are_frozen() -> None:
    strengths = torch.tensor([0.1, 0.5, 0.2, 0.5, 0.5])
    assert strongest_vectors(strengths, 2).tolist() == [1, 3]
    assert strongest_vectors(strengths, 4).tolist() == [1, 2, 3, 4]
    assert strongest_vectors(strengths, 0).tolist() == []
    assert strongest_vectors(strengths, 9).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="negative"):
        strongest_vectors(strengths, -1)


# SiVA


@pytest.mark.parametrize(
    ("k", "fraction", "count"), [(30, 0.1, 3), (31, 0.1, 4), (10, 1.0, 10), (10, 0.001, 1), (1280, 0.05, 64)]
)
def test_number_of_triplets_is_rounded_up_but_not_by_floating_point(k: int, fraction: float, count: int) -> None:
    assert number_of_triplets(k, fraction) == count


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan])
def test_a_fraction_outside_of_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        number_of_triplets(10, fraction)


def test_selected_triplets() -> None:
    assert selected_triplets(10, 0.25, "bottom", 0) == slice(7, 10)
    assert selected_triplets(10, 0.25, "top", 0) == slice(0, 3)
    assert selected_triplets(10, 0.25, "all", 0) == slice(0, 10)
    drawn = {tuple(selected_triplets(10, 0.25, "random", seed).tolist()) for seed in range(20)}
    assert len(drawn) > 10
    assert all(len(set(triplets)) == 3 and sorted(triplets) == list(triplets) for triplets in drawn)
    with pytest.raises(ValueError, match=r"'middle'.*bottom, top, all, random"):
        selected_triplets(10, 0.25, "middle", 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("select", ["bottom", "top", "all", "random"])
def test_siva_shifts_the_selected_singular_values_only(shape: tuple[int, int], select: str) -> None:
    U, S, Vh = exact_factors(shape)
    triplets = selected_triplets(min(shape), 0.4, select, 1)
    shifted = S.clone()
    shifted[triplets] += 0.5
    update = siva_update(SingularFactors(U, S, Vh), torch.ones_like(S[triplets]), triplets, 0.5)
    torch.testing.assert_close((U * S) @ Vh + update, (U * shifted) @ Vh)


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    assert effective_rank(3 * torch.ones(7)).item() == pytest.approx(7)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])).item() == pytest.approx(1)
    assert effective_rank(torch.zeros(4)).item() == 0
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(torch.tensor([3.0, 1.0])).item() == pytest.approx(expected)


# Gradients


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["banded", "sparse", "svdiff", "vectorfit", "siva"])
def test_gradient_of_every_update(shape: tuple[int, int], method: str) -> None:
    factors, k = exact_factors(shape), min(shape)
    strength = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    positions = top_k_positions(factors.U, factors.Vh, 11)
    triplets = selected_triplets(k, 0.5, "random", 2)
    count, update = {
        "banded": (number_of_banded_positions(k, 2), lambda v, s: svft_update(factors, banded_core(s * v, k, 2))),
        "sparse": (11, lambda v, s: svft_update(factors, sparse_core(gated_values(v, s[None]), positions, k))),
        "svdiff": (k, lambda v, s: svdiff_update(factors, v, s)),
        "vectorfit": (k, lambda v, s: vectorfit_update(factors, v, s)),
        "siva": (len(triplets), lambda v, s: siva_update(factors, v, triplets, s)),
    }[method]
    values = 3 * random_matrix(count, seed=6, dtype=torch.float64)
    assert torch.autograd.gradcheck(update, (values.requires_grad_(), strength))


def test_gradient_of_both_norm_weights() -> None:
    weight = random_matrix(6, dtype=torch.float64)
    for formula, size in ((shifted_norm_weight, 6), (rescaled_norm_weight, 1)):
        delta = random_matrix(size, seed=1, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda d, formula=formula: formula(weight, d, 0.7), (delta,))


def test_a_sparse_core_holds_nothing_else() -> None:
    matrix = core_matrix(sparse_core(torch.tensor([2.0, -1.0]), torch.tensor([1, 5], dtype=torch.int32), 3))
    assert torch.equal(matrix, torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, -1.0], [0.0, 0.0, 0.0]]))
