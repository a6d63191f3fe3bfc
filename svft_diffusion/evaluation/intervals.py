"""How sure a mean over subjects is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def bootstrap_interval(
    values: Sequence[float] | NDArray[np.float64], *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of one value for each subject, resampling subjects.

    Pictures of one subject are no independent observations, so that resampling them would promise too much.
    """
    observed = np.asarray(values, dtype=np.float64)
    picked = np.random.default_rng(seed).integers(0, len(observed), (draws, len(observed)))
    low, high = np.percentile(observed[picked].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
