"""Factors from elsewhere, brought back to the basis an adapter was trained in; and the measure of what remains."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from svft_diffusion.spectral import (
    Core,
    SingularFactors,
    align_basis,
    banded_core,
    decompose,
    number_of_banded_positions,
    probe_error,
    probe_update,
    sketch_of_basis,
    svft_update,
)
from svft_diffusion.spectral.portable_random import project_columns, random_signs

SHAPES = [(320, 320), (96, 64), (64, 160)]
TIED = [(10, 12), (20, 23), (30, 32)]  # triplets that nearly tie in `weight_with_ties`


def random_matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(shape: tuple[int, int], sigma: Tensor) -> Tensor:
    left, right = (
        torch.linalg.qr(random_matrix(size, len(sigma), seed=seed).double())[0] for seed, size in enumerate(shape)
    )
    return ((left * sigma) @ right.T).float()


def weight_with_ties(shape: tuple[int, int]) -> Tensor:
    """Two exact ties, and one that the last bits of float32 decide."""
    sigma = torch.linspace(2, 0.05, min(shape), dtype=torch.float64)
    sigma[11] = sigma[10] * (1 - 1e-7)
    sigma[21:23] = sigma[20]
    sigma[31] = sigma[30]
    return weight_of(shape, sigma)


def weight_with_kernel(size: int) -> Tensor:
    """Square, with three singular values of zero, and one next to it."""
    sigma = torch.linspace(2, 0.05, size, dtype=torch.float64)
    sigma[-4:] = torch.tensor([1e-6, 0, 0, 0])
    return weight_of((size, size), sigma)


def flipped(factors: SingularFactors, seed: int = 7) -> SingularFactors:
    signs = random_matrix(len(factors.S), seed=seed).sign()
    return SingularFactors(factors.U * signs, factors.S, factors.Vh * signs[:, None])


def by_numpy(weight: Tensor) -> SingularFactors:
    return SingularFactors(*map(torch.from_numpy, np.linalg.svd(weight.numpy(), full_matrices=False)))


def by_numpy_in_double(weight: Tensor) -> SingularFactors:
    return SingularFactors(*(factor.float() for factor in by_numpy(weight.double())))


def by_torch_in_single(weight: Tensor) -> SingularFactors:
    """The other orientation, in the arithmetic of the weight."""
    right, S, left = torch.linalg.svd(weight.T, full_matrices=False)
    return SingularFactors(left.T, S, right.T)


def by_eigenvectors(weight: Tensor) -> SingularFactors:
    U = torch.linalg.eigh(weight.double() @ weight.double().T).eigenvectors.flip(1)[:, : min(weight.shape)]
    scaled = weight.double().T @ U
    S = scaled.norm(dim=0)
    return SingularFactors(U.float(), S.float(), (scaled / S).T.float())


def by_rotated_ties(weight: Tensor) -> SingularFactors:
    """Any rotation among tied triplets is as good a decomposition."""
    U, S, Vh = (factor.clone() for factor in decompose(weight))
    for seed, (first, last) in enumerate(TIED):
        rotation = torch.linalg.qr(random_matrix(last - first, last - first, seed=seed))[0]
        U[:, first:last] = U[:, first:last] @ rotation
        Vh[first:last] = rotation.T @ Vh[first:last]
    return SingularFactors(U, S, Vh)


DRIVERS = [by_numpy, by_numpy_in_double, by_torch_in_single, by_eigenvectors]


def update_of(factors: SingularFactors, off_diagonals: int) -> Tensor:
    k = len(factors.S)
    values = random_matrix(number_of_banded_positions(k, off_diagonals), seed=2)
    return svft_update(factors, banded_core(values, k, off_diagonals))


def budget(factors: SingularFactors, off_diagonals: int, bytes_per_value: int) -> int:
    return number_of_banded_positions(len(factors.S), off_diagonals) * bytes_per_value // 5


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def assert_aligned(weight: Tensor, elsewhere: SingularFactors, off_diagonals: int, bytes_per_value: int) -> None:
    factors = decompose(weight)
    expected = update_of(factors, off_diagonals)
    allowed = budget(factors, off_diagonals, bytes_per_value)
    sketch = sketch_of_basis(factors, signs=off_diagonals > 0, byte_budget=allowed)
    assert sketch.dtype == torch.uint8
    assert len(sketch) <= allowed
    alignment = align_basis(elsewhere, sketch)
    assert relative_error(update_of(alignment.factors, off_diagonals), expected) < 1e-3
    assert alignment.error < 1e-3
    if off_diagonals:
        assert relative_error(update_of(elsewhere, off_diagonals), expected) > 0.5  # it was needed


@pytest.mark.parametrize("bytes_per_value", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("driver", DRIVERS)
def test_another_driver_gives_the_same_banded_update(driver, shape: tuple[int, int], bytes_per_value: int) -> None:
    weight = random_matrix(*shape)
    assert_aligned(weight, flipped(driver(weight)), 2, bytes_per_value)


@pytest.mark.parametrize("bytes_per_value", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("driver", [*DRIVERS, by_rotated_ties])
def test_tied_singular_values_are_rotated_back(driver, shape: tuple[int, int], bytes_per_value: int) -> None:
    weight = weight_with_ties(shape)
    assert_aligned(weight, flipped(driver(weight)), 2, bytes_per_value)


@pytest.mark.parametrize("driver", [by_torch_in_single, by_rotated_ties])
def test_diagonal_adapters_are_rotated_back_too(driver) -> None:
    weight = weight_with_ties((320, 320))
    elsewhere = flipped(driver(weight))
    assert relative_error(update_of(elsewhere, 0), update_of(decompose(weight), 0)) > 0.02  # it was needed
    assert_aligned(weight, elsewhere, 0, 2)


@pytest.mark.parametrize("off_diagonals", [0, 2])
def test_left_and_right_vectors_of_a_kernel_rotate_independently(off_diagonals: int) -> None:
    weight = weight_with_kernel(96)
    U, S, Vh = (factor.clone() for factor in decompose(weight))
    U[:, -3:] = U[:, -3:] @ torch.linalg.qr(random_matrix(3, 3, seed=4))[0]
    Vh[-3:] = torch.linalg.qr(random_matrix(3, 3, seed=5))[0] @ Vh[-3:]
    assert_aligned(weight, flipped(SingularFactors(U, S, Vh)), off_diagonals, 8)


@pytest.mark.parametrize("off_diagonals", [0, 2])
def test_the_vectors_of_a_single_zero_change_sign_independently(off_diagonals: int) -> None:
    weight = weight_of((64, 64), torch.linspace(2, 0, 64, dtype=torch.float64))
    U, S, Vh = (factor.clone() for factor in decompose(weight))
    U[:, -1] = -U[:, -1]
    assert relative_error(update_of(SingularFactors(U, S, Vh), 0), update_of(decompose(weight), 0)) > 0.02
    assert_aligned(weight, flipped(SingularFactors(U, S, Vh)), off_diagonals, 4)


@pytest.mark.parametrize("off_diagonals", [0, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_the_error_of_a_rounded_weight_is_measured_and_smaller_than_before(
    kind: str, shape: tuple[int, int], off_diagonals: int
) -> None:
    weight = random_matrix(*shape) if kind == "random" else weight_with_ties(shape)
    factors, rounded = decompose(weight), flipped(decompose(weight.half()))
    expected = update_of(factors, off_diagonals)
    sketch = sketch_of_basis(factors, signs=off_diagonals > 0, byte_budget=1000)
    alignment = align_basis(rounded, sketch)
    aligned_error = relative_error(update_of(alignment.factors, off_diagonals), expected)
    assert aligned_error <= relative_error(update_of(rounded, off_diagonals), expected)
    assert aligned_error < 0.02
    assert aligned_error / 4 < alignment.error < 4 * aligned_error


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_basis_of_another_weight_is_seen(shape: tuple[int, int], signs: bool) -> None:
    sketch = sketch_of_basis(decompose(random_matrix(*shape)), signs=signs, byte_budget=200)
    assert align_basis(decompose(random_matrix(*shape, seed=1)), sketch).error > 0.5
    assert align_basis(decompose(random_matrix(*reversed(shape), seed=1)), sketch).error > 0.5


def test_what_cannot_be_aligned_is_seen() -> None:
    """Left vectors of zero singular values lie anywhere in the left null space of a tall weight."""
    factors = decompose(weight_of((96, 64), torch.cat([torch.linspace(2, 1, 48), torch.zeros(16)]).double()))
    U = factors.U.clone()
    U[:, -16:] = torch.linalg.qr(torch.cat([U[:, :-16], random_matrix(96, 16)], dim=1))[0][:, -16:]
    sketch = sketch_of_basis(factors, signs=True, byte_budget=10_000)
    assert align_basis(SingularFactors(U, factors.S, factors.Vh), sketch).error > 0.1


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 5), (5, 1), (2, 2)])
def test_the_same_factors_come_back_bit_for_bit(shape: tuple[int, int], signs: bool) -> None:
    weight = weight_with_ties(shape) if min(shape) > 32 else random_matrix(*shape)
    factors = decompose(weight)
    alignment = align_basis(factors, sketch_of_basis(factors, signs=signs, byte_budget=1000))
    assert all(same is factor for same, factor in zip(alignment.factors, factors, strict=True))
    assert torch.equal(alignment.signs, torch.ones(min(shape)))
    assert (alignment.rotated, alignment.error) == (False, 0.0)


def test_flips_are_undone_exactly_and_told() -> None:
    factors = decompose(random_matrix(40, 24))
    alignment = align_basis(flipped(factors), sketch_of_basis(factors, signs=True, byte_budget=40))
    assert all(torch.equal(same, factor) for same, factor in zip(alignment.factors, factors, strict=True))
    assert torch.equal(alignment.signs, random_matrix(24, seed=7).sign())
    assert (alignment.rotated, alignment.error) == (False, 0.0)


def test_flips_are_nothing_to_a_diagonal_core() -> None:
    factors = decompose(weight_with_ties((96, 64)))
    elsewhere = flipped(factors)
    alignment = align_basis(elsewhere, sketch_of_basis(factors, signs=False, byte_budget=1000))
    assert all(same is factor for same, factor in zip(alignment.factors, elsewhere, strict=True))
    assert (alignment.rotated, alignment.error) == (False, 0.0)


def test_aligned_factors_are_still_orthogonal_and_the_given_ones_are_left_alone() -> None:
    weight = weight_with_ties((96, 64))
    elsewhere = by_rotated_ties(weight)
    before = [factor.clone() for factor in elsewhere]
    sketch = sketch_of_basis(decompose(weight), signs=True, byte_budget=1000)
    alignment = align_basis(elsewhere, sketch)
    assert alignment.rotated
    U, S, Vh = alignment.factors
    torch.testing.assert_close(U.T @ U, torch.eye(64), rtol=0, atol=1e-6)
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(64), rtol=0, atol=1e-6)
    torch.testing.assert_close((U * S) @ Vh, weight, rtol=0, atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(elsewhere, before, strict=True))


def test_sizes() -> None:
    factors = decompose(weight_with_ties((96, 64)))
    assert len(sketch_of_basis(factors, signs=True, byte_budget=0)) == 3 + 32 + 16
    assert len(sketch_of_basis(factors, signs=False, byte_budget=0)) == 3 + 16
    pair, triple = 3 + 2 * 2 * 3, 3 + 2 * 3 * 4
    assert len(sketch_of_basis(factors, signs=False, byte_budget=10_000)) == 19 + 2 * pair + triple
    for allowed in range(51, 130, 7):
        assert len(sketch_of_basis(factors, signs=True, byte_budget=allowed)) <= allowed


def test_the_smallest_sketch_measures_the_error_too() -> None:
    factors, other = decompose(random_matrix(12, 9)), decompose(random_matrix(12, 9, seed=1))
    sketch = sketch_of_basis(factors, signs=True, byte_budget=0)
    alignment = align_basis(flipped(factors), sketch)
    assert all(torch.equal(same, factor) for same, factor in zip(alignment.factors, factors, strict=True))
    assert alignment.error == 0.0
    assert align_basis(other, sketch).error > 0.3


def test_a_zero_weight_has_a_sketch() -> None:
    factors = decompose(torch.zeros(12, 9))
    alignment = align_basis(factors, sketch_of_basis(factors, signs=True, byte_budget=100))
    assert (alignment.rotated, alignment.error) == (False, 0.0)


def test_damaged_sketches_are_refused() -> None:
    factors = decompose(weight_with_ties((96, 64)))
    whole = sketch_of_basis(factors, signs=True, byte_budget=1000)
    clusters = 3 + 32 + 16

    def changed(place: int, value: int) -> Tensor:
        sketch = whole.clone()
        sketch[place] = value
        return sketch

    for sketch, message in [
        (whole[:0], "no sketch"),
        (whole[None], "no sketch"),
        (whole.int(), "no sketch"),
        (changed(0, 2 << 4 | 3), "version 2"),
        (changed(0, 1 << 4 | 15), "version 1"),
        (changed(1, 63), "63 singular triplets, and there are 64"),
        (whole[:20], "ends too early"),
        (whole[:40], "ends too early"),
        (whole[:-1], "ends too early"),
        (torch.cat([whole, whole[:1]]), "ends too early"),
        (torch.cat([whole, whole[clusters:]]), "cluster lies outside"),
        (changed(clusters, 63), "cluster lies outside"),
        (changed(clusters + 2, 0), "cluster lies outside"),
    ]:
        with pytest.raises(ValueError, match=message):
            align_basis(factors, sketch)


def test_a_sketch_holds_no_more_triplets_than_it_can_count() -> None:
    many = SingularFactors(torch.zeros(1, 70_000), torch.zeros(70_000), torch.zeros(70_000, 1))
    with pytest.raises(ValueError, match="at most 65535"):
        sketch_of_basis(many, signs=False, byte_budget=10)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
@pytest.mark.parametrize("dense", [False, True])
def test_probes_are_bilinear_forms_of_the_update(shape: tuple[int, int], dense: bool) -> None:
    factors, k = decompose(random_matrix(*shape)), min(shape)
    core = Core(random_matrix(k, k), dense=True) if dense else banded_core(random_matrix(3 * k - 2), k, 1)
    left, right = random_signs(4, shape[0], "probe, left"), random_signs(4, shape[1], "probe, right")
    expected = (left @ svft_update(factors, core).double() * right).sum(dim=1)
    found = probe_update(factors.U, core, factors.Vh)
    assert (found.shape, found.dtype) == ((4,), torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_probe_error_is_relative_and_defined_everywhere() -> None:
    one, zero = torch.tensor([3.0, -4.0, 0.0, 0.0]), torch.zeros(4)
    assert probe_error(one, one) == probe_error(zero, zero) == 0.0
    assert probe_error(one, zero) == probe_error(zero, one) == pytest.approx(1)
    assert probe_error(one, 1.01 * one) == pytest.approx(0.01, rel=0.02)
    assert probe_error(one, -one) == pytest.approx(2)
    assert probe_error(one, torch.tensor([math.nan, 0, 0, 0])) == math.inf
    assert probe_error(one, torch.tensor([math.inf, 0, 0, 0])) == math.inf


def test_fixed_vectors_never_change() -> None:
    """Every stored sketch and probe rests on them."""
    signs = random_signs(3, 21, "some purpose")
    octets = hashlib.shake_256(b"some purpose, row 2").digest(3)
    bits = [octets[place // 8] >> place % 8 & 1 for place in range(21)]
    assert signs[2].tolist() == [1.0 - 2.0 * bit for bit in bits]
    assert torch.equal(random_signs(1, 9, "some purpose"), signs[:1, :9])
    matrix = random_matrix(2500, 3)
    expected = random_signs(2, 2500, "some purpose") @ matrix.double()
    torch.testing.assert_close(project_columns(matrix, 2, "some purpose"), expected)
