"""Core matrices against their dense forms."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from svft_diffusion.spectral import (
    Core,
    apply_core,
    banded_core,
    banded_positions,
    core_matrix,
    core_update,
    diagonal_core,
    embed_core,
    fold_into_left,
    fold_into_right,
    number_of_banded_positions,
    scaled_core,
    stack_cores,
    sum_of_cores,
    transposed_core,
)

RANK = 6
KINDS = ["diagonal", "band", "wide band", "dense"]


def random_matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def band(off_diagonals: int, rank: int = RANK, seed: int = 3) -> Core:
    return banded_core(random_matrix(number_of_banded_positions(rank, off_diagonals), seed=seed), rank, off_diagonals)


def core_of(kind: str, seed: int = 3) -> Core:
    if kind == "dense":
        return Core(random_matrix(RANK, RANK, seed=seed), dense=True)
    return band({"diagonal": 0, "band": 2, "wide band": RANK - 1}[kind], seed=seed)


def batch_of(kind: str) -> Core:
    return stack_cores([core_of(kind, seed) for seed in (3, 4, 5)])


@pytest.mark.parametrize("off_diagonals", [0, 1, 3, 5])
def test_core_holds_the_values_at_their_positions(off_diagonals: int) -> None:
    values = random_matrix(number_of_banded_positions(RANK, off_diagonals))
    matrix = torch.zeros(RANK, RANK, dtype=torch.float64)
    matrix[banded_positions(RANK, off_diagonals)] = values
    core = banded_core(values, RANK, off_diagonals)
    assert torch.equal(core_matrix(core), matrix)
    assert (core.rank, core.off_diagonals, core.dense, core.batched) == (RANK, off_diagonals, False, False)


def test_a_diagonal_core_of_a_batch() -> None:
    values = random_matrix(3, RANK)
    core = diagonal_core(values)
    assert core.batched
    assert torch.equal(core_matrix(core), torch.diag_embed(values))


def test_a_dense_core_has_no_number_of_off_diagonals() -> None:
    with pytest.raises(ValueError, match="dense"):
        _ = core_of("dense").off_diagonals


def test_a_core_made_in_inference_mode_first_can_train_afterwards() -> None:
    count = number_of_banded_positions(13, 3)
    with torch.inference_mode():
        banded_core(torch.ones(count), 13, 3)
    values = torch.ones(count, requires_grad=True)
    banded_core(values, 13, 3).entries.sum().backward()
    assert torch.equal(values.grad, torch.ones(count))


@pytest.mark.parametrize("kind", KINDS)
def test_every_function_of_a_core_is_a_product_with_its_dense_matrix(kind: str) -> None:
    core = core_of(kind)
    M = core_matrix(core)
    z = random_matrix(2, 5, RANK)
    torch.testing.assert_close(apply_core(z, core), z @ M.T)
    torch.testing.assert_close(core_matrix(transposed_core(core)), M.T)
    torch.testing.assert_close(core_matrix(scaled_core(core, -0.5)), -0.5 * M)
    for m, n in ((9, 5), (5, 9)):
        U, Vh = random_matrix(m, RANK), random_matrix(RANK, n)
        torch.testing.assert_close(fold_into_left(U, core), U @ M)
        torch.testing.assert_close(fold_into_right(core, Vh), M @ Vh)
        torch.testing.assert_close(core_update(U, core, Vh), U @ M @ Vh)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("middle", [(), (4,), (4, 2)])
def test_a_batch_of_cores_gives_each_sample_its_own(kind: str, middle: tuple[int, ...]) -> None:
    batch = batch_of(kind)
    z, U, Vh = random_matrix(3, *middle, RANK), random_matrix(9, RANK), random_matrix(RANK, 5)
    applied = apply_core(z, batch)
    assert applied.shape == z.shape
    for sample, seed in enumerate((3, 4, 5)):
        M = core_matrix(core_of(kind, seed))
        torch.testing.assert_close(applied[sample], z[sample] @ M.T)
        torch.testing.assert_close(core_matrix(batch)[sample], M)
        torch.testing.assert_close(fold_into_left(U, batch)[sample], U @ M)
        torch.testing.assert_close(fold_into_right(batch, Vh)[sample], M @ Vh)
        torch.testing.assert_close(core_update(U, batch, Vh)[sample], U @ M @ Vh)
        torch.testing.assert_close(core_matrix(transposed_core(batch))[sample], M.T)


def test_a_strength_for_each_sample_makes_a_batch() -> None:
    core, strengths = core_of("band"), torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    assert torch.equal(core_matrix(scaled_core(core, strengths)), strengths[:, None, None] * core_matrix(core))


@pytest.mark.parametrize("kind", ["band", "dense"])
def test_small_entries_survive_16_bit_activations_and_autocast(kind: str) -> None:
    entries = torch.full((4, 3), 1e-9) if kind == "band" else torch.full((4, 4), 1e-9)
    core = Core(entries, dense=kind == "dense")
    z = torch.ones(1, 4, dtype=torch.float16)
    with torch.autocast("cpu", torch.float16):
        for result in (apply_core(z, core), fold_into_left(z, core), core_update(z, core, torch.eye(4).half())):
            assert result.dtype == torch.float32
            assert (result > 0).all()


@pytest.mark.parametrize(("kinds", "dense"), [(["diagonal", "wide band", "band"], False), (["band", "dense"], True)])
def test_sum_of_cores_adds_matrices(kinds: list[str], dense: bool) -> None:
    cores = [core_of(kind, seed) for seed, kind in enumerate(kinds)]
    total = sum_of_cores(cores)
    assert total.dense == dense
    torch.testing.assert_close(core_matrix(total), sum(core_matrix(core) for core in cores))


def test_a_sum_with_a_batch_adds_to_every_sample() -> None:
    batch, one = batch_of("diagonal"), core_of("band")
    torch.testing.assert_close(core_matrix(sum_of_cores([batch, one])), core_matrix(batch) + core_matrix(one))


def test_only_cores_of_one_rank_are_added_or_stacked() -> None:
    for combine in (sum_of_cores, stack_cores):
        with pytest.raises(ValueError, match=r"ranks \[5, 6\]"):
            combine([band(0, rank=6), band(0, rank=5)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("triplets", [slice(0, 6), slice(3, 9), slice(4, None), torch.tensor([0, 2, 3, 4, 8, 9])])
def test_an_embedded_core_is_the_core_at_its_triplets_and_zero_elsewhere(kind: str, triplets: slice | Tensor) -> None:
    places = torch.arange(10)[triplets]
    expected = torch.zeros(3, 10, 10, dtype=torch.float64)
    expected[:, places[:, None], places] = core_matrix(batch_of(kind))
    embedded = embed_core(core_of(kind), triplets, 10)
    assert torch.equal(core_matrix(embedded), expected[0])
    assert torch.equal(core_matrix(embed_core(batch_of(kind), triplets, 10)), expected)
    assert embedded.dense == (kind == "dense" or (isinstance(triplets, Tensor) and kind != "diagonal"))


@pytest.mark.parametrize("triplets", [slice(0, 5), slice(0, 12, 2), slice(7, 20), torch.arange(5)])
def test_a_core_is_embedded_only_where_it_fits(triplets: slice | Tensor) -> None:
    with pytest.raises(ValueError, match="rank 6 does not fit"):
        embed_core(core_of("band"), triplets, 10)


@pytest.mark.parametrize("dense", [False, True])
def test_gradients_of_all_that_a_core_goes_through(dense: bool) -> None:
    entries = random_matrix(4, 4 if dense else 3)
    if not dense:
        entries[0, 0] = entries[-1, -1] = 0
    U, Vh, z = random_matrix(6, 6), random_matrix(6, 5), random_matrix(3, 6)

    def embedded(entries: Tensor) -> Core:
        # What lies outside the matrix is no variable.
        inside = entries if dense else banded_core(entries[banded_mask(4)], 4, 1).entries
        return sum_of_cores([embed_core(Core(inside, dense), slice(1, 5), 6), diagonal_core(entries.new_ones(6))])

    def banded_mask(rank: int) -> Tensor:
        mask = torch.ones(rank, 3, dtype=torch.bool)
        mask[0, 0] = mask[-1, -1] = False
        return mask

    variables = (entries.requires_grad_(), z.requires_grad_())
    assert torch.autograd.gradcheck(lambda e, x: apply_core(x, embedded(e)), variables)
    assert torch.autograd.gradcheck(lambda e: core_update(U, embedded(e), Vh), variables[:1])
    assert torch.autograd.gradcheck(lambda e: core_update(Vh.T, embedded(e), U.T), variables[:1])


def test_a_compiled_core_has_no_graph_breaks() -> None:
    core, dense, z = batch_of("band"), core_of("dense"), random_matrix(3, 4, RANK)

    def formula(z: Tensor, strength: Tensor) -> Tensor:
        total = sum_of_cores([scaled_core(core, strength), scaled_core(dense, strength)])
        return apply_core(z, total) + apply_core(z, scaled_core(core, strength))

    compiled = torch.compile(formula, backend="eager", fullgraph=True)
    for strength in (torch.tensor(0.5, dtype=torch.float64), torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)[0]):
        torch.testing.assert_close(compiled(z, strength), formula(z, strength))


def test_the_mathematics_needs_nothing_but_torch() -> None:
    program = (
        "import sys, svft_diffusion.spectral;"
        "print([name for name in ('peft', 'diffusers', 'transformers', 'safetensors') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
