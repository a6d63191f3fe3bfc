"""The mathematics of adapters in the singular-value space of a frozen weight; needs nothing but torch.

Notation of every module here, for a frozen weight ``W`` of shape (m, n) and ``k = min(m, n)``:
``W = U diag(sigma) V^T`` with ``U`` (m, k), ``sigma`` (k,) descending, ``Vh = V^T`` (k, n).
An adapter never rebuilds ``W`` from its factors: it adds an update ``U M V^T`` to ``W`` itself, with a small
core matrix ``M`` (k, k). So a zero ``M`` gives ``W`` exactly, and what a rank truncation leaves out stays in ``W``.
"""

from svft_diffusion.spectral.core import apply_core, core_matrix, core_update, sum_of_cores
from svft_diffusion.spectral.decomposition import (
    ALGORITHM_VERSION,
    SingularFactors,
    canonical_signs,
    decompose,
)
from svft_diffusion.spectral.patterns import banded_positions, number_of_banded_positions
from svft_diffusion.spectral.svdiff import spectral_shift, svdiff_update
from svft_diffusion.spectral.svft import banded_core, svft_update

__all__ = [
    "ALGORITHM_VERSION",
    "SingularFactors",
    "apply_core",
    "banded_core",
    "banded_positions",
    "canonical_signs",
    "core_matrix",
    "core_update",
    "decompose",
    "number_of_banded_positions",
    "spectral_shift",
    "sum_of_cores",
    "svdiff_update",
    "svft_update",
]
