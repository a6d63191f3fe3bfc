"""Learning rates that work without thinking about them: one table for all methods and patterns."""

from __future__ import annotations

from typing import NamedTuple

from svft_diffusion.models import EMBEDDED_MODEL


class Rates(NamedTuple):
    """Learning rates of AdamW for one method and pattern."""

    embedded: float  # found on the embedded model, whose layers are narrow and whose runs are short
    full_size: float  # for Stable Diffusion; from the papers, not yet tried on real weights


# The SVDiff paper trains shifts at 1e-3 for 500 to 1000 steps. The plain diagonal of SVFT is the same parametrization
# without the clamp. The SVFT paper goes ten times lower from its diagonal to its off-diagonals, on language models.
LEARNING_RATES: dict[tuple[str, str], Rates] = {
    ("svft", "plain"): Rates(embedded=1e-1, full_size=2e-3),
    ("svft", "banded"): Rates(embedded=5e-2, full_size=1e-3),
    ("svdiff", "plain"): Rates(embedded=1e-1, full_size=1e-3),
}


def default_learning_rate(method: str, pattern: str, base_name: str) -> float:
    """The table's learning rate for a base model. Raises KeyError for a combination that no method has."""
    rates = LEARNING_RATES[method, pattern]
    return rates.embedded if base_name == EMBEDDED_MODEL else rates.full_size
