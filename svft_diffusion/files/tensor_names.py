"""Names of the tensors in an adapter file: ``<layer>.<part>``, ``<text encoder>.tokens``, and ``sketch``."""

from __future__ import annotations

from collections.abc import Iterable

from svft_diffusion.errors import UserError
from svft_diffusion.files.names import split_canonical_name

# What an adapter can train of a layer, in the order in which it is listed.
TRAINED_PARTS = ("values", "bias", "norm", "gate")
# Which entries of the core matrix the values are, where method and pattern alone don't say it.
POSITIONS = "positions"
# One tensor for the whole file: the bases of all layers, see `svft_diffusion.files.basis_records`.
SKETCH = "sketch"
# One tensor for each text encoder that learned tokens: ``text_encoder.tokens``, a row for each.
TOKENS = "tokens"


def tensor_name(layer: str, part: str) -> str:
    """``unet.a.to_q``, ``values`` -> ``unet.a.to_q.values``."""
    return f"{layer}.{part}"


def split_tensor_name(name: str) -> tuple[str, str]:
    """``unet.a.to_q.values`` -> (``unet.a.to_q``, ``values``).

    Raises:
        UserError: the name ends in no known part, or the layer is of no component that can carry an adapter.
    """
    layer, _, part = name.rpartition(".")
    if part not in (*TRAINED_PARTS, POSITIONS):
        known = ", ".join(f".{known}" for known in (*TRAINED_PARTS, POSITIONS))
        raise UserError(f"unexpected tensor {name!r}; names end in {known}")
    split_canonical_name(layer)
    return layer, part


def is_tokens(name: str) -> bool:
    """Whether a tensor holds embeddings of learned tokens: it belongs to a component, and to no layer."""
    return name.rpartition(".")[2] == TOKENS and name.count(".") == 1


def layer_names(tensors: Iterable[str]) -> list[str]:
    """Canonical names of the layers that the tensors named ``tensors`` belong to, sorted.

    Raises:
        UserError: as `split_tensor_name`.
    """
    return sorted({split_tensor_name(name)[0] for name in tensors if name != SKETCH and not is_tokens(name)})
