"""The mathematics of adapters in the singular-value space of a frozen weight; needs nothing but torch.

Notation of every module here, for a frozen weight ``W`` of shape (m, n) and ``k = min(m, n)``:
``W = U diag(sigma) V^T`` with ``U`` (m, k), ``sigma`` (k,) descending, ``Vh = V^T`` (k, n).
An adapter never rebuilds ``W`` from its factors: it adds an update ``U M V^T`` to ``W`` itself, with a small
core matrix ``M`` (k, k). So a zero ``M`` gives ``W`` exactly, and what a rank truncation leaves out stays in ``W``.
"""

from svft_diffusion.spectral.basis_sketch import Alignment, align_basis, basis_error, sketch_of_basis
from svft_diffusion.spectral.core import (
    Core,
    apply_core,
    core_matrix,
    core_update,
    diagonal_core,
    embed_core,
    fold_into_left,
    fold_into_right,
    scaled_core,
    stack_cores,
    sum_of_cores,
    transposed_core,
)
from svft_diffusion.spectral.decomposition import ALGORITHM_VERSION, SingularFactors, canonical_signs, decompose
from svft_diffusion.spectral.patterns import (
    banded_positions,
    number_of_banded_positions,
    random_positions,
    top_k_positions,
)
from svft_diffusion.spectral.probes import probe_error, probe_update
from svft_diffusion.spectral.siva import (
    TripletSelection,
    effective_rank,
    number_of_triplets,
    selected_triplets,
    siva_update,
)
from svft_diffusion.spectral.svdiff import rescaled_norm_weight, shifted_norm_weight, spectral_shift, svdiff_update
from svft_diffusion.spectral.svft import banded_core, gated_values, official_initial_values, sparse_core, svft_update
from svft_diffusion.spectral.vectorfit import smoothed_strength, strongest_vectors, training_strength, vectorfit_update

__all__ = [
    "ALGORITHM_VERSION",
    "Alignment",
    "Core",
    "SingularFactors",
    "TripletSelection",
    "align_basis",
    "apply_core",
    "banded_core",
    "banded_positions",
    "basis_error",
    "canonical_signs",
    "core_matrix",
    "core_update",
    "decompose",
    "diagonal_core",
    "effective_rank",
    "embed_core",
    "fold_into_left",
    "fold_into_right",
    "gated_values",
    "number_of_banded_positions",
    "number_of_triplets",
    "official_initial_values",
    "probe_error",
    "probe_update",
    "random_positions",
    "rescaled_norm_weight",
    "scaled_core",
    "selected_triplets",
    "shifted_norm_weight",
    "siva_update",
    "sketch_of_basis",
    "smoothed_strength",
    "sparse_core",
    "spectral_shift",
    "stack_cores",
    "strongest_vectors",
    "sum_of_cores",
    "svdiff_update",
    "svft_update",
    "top_k_positions",
    "training_strength",
    "transposed_core",
    "vectorfit_update",
]
