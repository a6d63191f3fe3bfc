"""Which strategy trains an adapted layer with the fewest operations.

Operations of one forward and backward pass of a layer (m, n) over T tokens, with r singular triplets (k = min(m, n) of
them at full rank) and ``e`` forward passes for each optimizer step; the gradient of the input is one of the products
and left out where nothing needs it:

=============================  =========================================================  ==================
strategy                       operations                                                 saved elements
=============================  =========================================================  ==================
activation                     4 T m n + 4 T r (m + n)                                    T r
factors (r = k)                4 T k (m + n)                                              T k
rebuilt, through ``g^T x``     6 T m n + 2 m n r + 2 m n r / e                            T n, often shared
rebuilt, through ``gU . xV``   4 T m n + 2 T r (m + n) + 2 m n r / e                      T n, often shared
frozen layer, to compare       4 T m n                                                    0
=============================  =========================================================  ==================

To these a core adds what it takes to fold it into a factor and to find the gradient of its entries. Strategies whose
operations differ by less than the figures predict times are told apart by what they save for backward.
"""

from __future__ import annotations

from typing import Literal

from svft_diffusion.kernels.core_products import BLOCK

Strategy = Literal["activation", "factors", "rebuilt"]

# Counts of operations predict times to about this much.
_TIE = 1.15


def plan_linear(
    m: int,
    n: int,
    r: int,
    tokens: int,
    *,
    full_rank: bool,
    off_diagonals: int | None = 0,
    gradient_to_input: bool = True,
    micro_batches: int = 1,
) -> Strategy:
    """The cheapest strategy for a linear layer ``W`` (m, n) with ``r`` singular triplets.

    Args:
        m: outputs.
        n: inputs.
        r: singular triplets that the core acts on.
        tokens: rows of one forward pass, the product of the leading dimensions of its input.
        full_rank: the ``r`` triplets are all there are, so that the factors alone give the weight.
        off_diagonals: of the core on each side; None for a dense core.
        gradient_to_input: whether the backward pass needs the gradient of the input.
        micro_batches: forward passes for each optimizer step, which share one rebuilt weight.
    """
    return _plan(m, n, r, tokens, full_rank, off_diagonals, gradient_to_input, micro_batches, tokens * n)


def plan_convolution(
    m: int,
    n: int,
    r: int,
    positions: int,
    *,
    full_rank: bool,
    off_diagonals: int | None = 0,
    gradient_to_input: bool = True,
    micro_batches: int = 1,
    input_elements: int | None = None,
) -> Strategy:
    """The cheapest strategy for a convolution whose weight is an (m, n) matrix, n = input channels x kernel size.

    ``positions`` are the output positions of the whole batch, ``input_elements`` what its input holds (positions x n
    when left out, that of a kernel of size one); the rest is as for `plan_linear`.
    """
    saved = positions * n if input_elements is None else input_elements
    return _plan(m, n, r, positions, full_rank, off_diagonals, gradient_to_input, micro_batches, saved)


def sampling_is_cheaper(m: int, n: int, r: int, tokens: int) -> bool:
    """Whether a core's gradient takes fewer operations row by row, ``gU . xV``, than through ``U^T (g^T x) V``."""
    return _sampled(m, n, r, tokens) < _through_weight(m, n, r, tokens)


def _plan(
    m: int,
    n: int,
    r: int,
    tokens: int,
    full_rank: bool,
    off_diagonals: int | None,
    gradient_to_input: bool,
    micro_batches: int,
    elements_of_input: int,
) -> Strategy:
    passes = 2 if gradient_to_input else 1  # products with the whole weight: the output, the gradient of the input
    frozen = passes * 2 * tokens * m * n
    into_left = 2 * tokens * r * (n + m)  # a = x V, then a U^T
    into_right = 2 * tokens * r * (m + (n if gradient_to_input else 0))  # b = g U, then b V^T
    fold = _fold(m, r, tokens, off_diagonals) + (_fold(n, r, tokens, off_diagonals) if gradient_to_input else 0)
    by_rows = into_left + into_right + fold + _entries(r, tokens, off_diagonals)

    through_weight = _through_weight(m, n, r, tokens) + _entries(r, min(m, n), off_diagonals)
    sampled = _sampled(m, n, r, tokens) + _entries(r, tokens, off_diagonals)
    rebuild = (2 * m * n * r + _fold(min(m, n), r, m + n, off_diagonals)) / micro_batches

    operations: dict[Strategy, float] = {
        "activation": frozen + by_rows,
        "rebuilt": frozen + min(through_weight, sampled) + rebuild,
    }
    saved: dict[Strategy, int] = {"activation": tokens * r, "rebuilt": elements_of_input}
    if full_rank:
        operations["factors"] = by_rows
        saved["factors"] = tokens * r
    fewest = min(operations.values())
    ties = [strategy for strategy, count in operations.items() if count <= _TIE * fewest]
    # Of equal sizes the input is saved at less cost: other layers that read it share it.
    return min(ties, key=lambda strategy: (saved[strategy], strategy != "rebuilt", operations[strategy]))


def _through_weight(m: int, n: int, r: int, tokens: int) -> int:
    """``g^T x``, then one factor against it."""
    return 2 * tokens * m * n + 2 * m * n * r


def _sampled(m: int, n: int, r: int, tokens: int) -> int:
    """``g U`` and ``x V``."""
    return 2 * tokens * r * (m + n)


def _fold(side: int, r: int, tokens: int, off_diagonals: int | None) -> int:
    """The core times a factor (side, r) or the activation (tokens, r), whichever is smaller."""
    per_row = 2 * r * r if off_diagonals is None else 2 * r * (2 * off_diagonals + 1)
    return min(side, tokens) * per_row


def _entries(r: int, rows: int, off_diagonals: int | None) -> int:
    """The entries of ``b^T a`` that train, for ``a`` and ``b`` (rows, r)."""
    if off_diagonals is None:
        return 2 * rows * r * r
    return 2 * rows * r * (1 if off_diagonals == 0 else BLOCK + 2 * off_diagonals)
