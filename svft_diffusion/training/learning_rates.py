"""Learning rates that work without thinking about them: one table for all methods and patterns."""

from __future__ import annotations

# (method, pattern) -> learning rate of AdamW with a constant schedule. Off-diagonal entries turn singular vectors
# and need smaller steps than entries on the diagonal.
LEARNING_RATES: dict[tuple[str, str], float] = {
    ("svft", "plain"): 5e-2,
    ("svft", "banded"): 2e-2,
    ("svdiff", "plain"): 5e-2,
}


def default_learning_rate(method: str, pattern: str) -> float:
    """The table's learning rate. Raises KeyError for a combination that no method has."""
    return LEARNING_RATES[method, pattern]
