"""Random numbers that are the same on every machine, device and release of torch: the output of SHAKE-256 (FIPS 202).

torch promises its generators' numbers only within one release and one kind of device. What is drawn here decides
which entries an adapter trains and how its basis is recognised, so it must never change.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_ROWS_AT_ONCE = 1024  # a float64 copy of a whole basis would take more memory than the basis


def random_subset(size: int, count: int, purpose: str) -> Tensor:
    """``count`` distinct indices below ``size``, uniformly without replacement: (count,) int64, ascending.

    Raises:
        ValueError: there are not so many indices.
    """
    if not 0 <= count <= size:
        raise ValueError(f"cannot draw {count} distinct indices out of {size}")
    if count > size // 2:  # drawing what is left out needs fewer draws
        chosen = torch.ones(size, dtype=torch.bool)
        chosen[random_subset(size, size - count, purpose)] = False
        return chosen.nonzero().flatten()
    draws = 2 * count
    while True:
        drawn = _random_words(draws, purpose) % max(size, 1)
        ordered, when = drawn.sort(stable=True)
        is_first = torch.ones(draws, dtype=torch.bool)
        is_first[1:] = ordered.diff() != 0
        first_drawn = when[is_first].sort().values[:count]
        if len(first_drawn) == count:
            return drawn[first_drawn].sort().values
        draws *= 2


def random_signs(rows: int, columns: int, purpose: str) -> Tensor:
    """Matrix (rows, columns) float64 of independent +1 and -1; a row does not depend on how many there are."""
    octets = torch.stack(
        [torch.frombuffer(_stream(columns // 8 + 1, f"{purpose}, row {row}"), dtype=torch.uint8) for row in range(rows)]
    )
    bits = octets[:, :, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and(1)
    return 1 - 2 * bits.flatten(1)[:, :columns].double()


def project_columns(matrix: Tensor, vectors: int, purpose: str) -> Tensor:
    """Projections (vectors, k) float64 of the columns of a ``matrix`` (m, k) on ``vectors`` fixed vectors of +-1.

    For a unit column each is about a standard normal number.
    """
    signs = random_signs(vectors, matrix.shape[0], purpose).to(matrix.device)
    total = signs.new_zeros(vectors, matrix.shape[1])
    for first in range(0, matrix.shape[0], _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        total += signs[:, rows] @ matrix[rows].double()
    return total


def _random_words(count: int, purpose: str) -> Tensor:
    """``count`` uniform integers below 2^63, int64: so large that their remainders are uniform to 1 in 10^12."""
    if count == 0:
        return torch.zeros(0, dtype=torch.int64)
    return torch.frombuffer(_stream(8 * count, purpose), dtype=torch.int64).bitwise_and(2**63 - 1)


def _stream(octets: int, purpose: str) -> bytearray:
    return bytearray(hashlib.shake_256(purpose.encode()).digest(octets))
