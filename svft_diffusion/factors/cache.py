"""On-disk cache of singular factors, keyed by the content of each weight.

The key does not know which model, run or adapter asks: equal weights share one entry. An entry is one safetensors
file with the float32 factors ``U``, ``S``, ``Vh`` and, as metadata, a digest of their bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from svft_diffusion.spectral import ALGORITHM_VERSION, SingularFactors, decompose

CACHE_VARIABLE = "SVFT_DIFFUSION_CACHE"
_logger = logging.getLogger(__name__)


class FactorCache:
    """Factors of weights, from ``folder`` where they are known and by decomposition where they are not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def factors(self, weight: Tensor) -> SingularFactors:
        """Factors of a matrix ``W`` (m, n), on the CPU in float32; the same bits from a cold and a warm cache.

        A cache that can't be written costs time, never a result: the reason is logged.

        Raises:
            ValueError: the weight can't be decomposed (see `svft_diffusion.spectral.decompose`).
        """
        if weight.ndim != 2 or weight.is_meta:
            return decompose(weight)
        entry = self.entry_path(weight)
        known = _read_entry(entry, tuple(weight.shape))
        if known is not None:
            return known
        factors = decompose(weight)
        _write_entry(entry, factors)
        return factors

    def entry_path(self, weight: Tensor) -> Path:
        """File that holds, or would hold, the factors of ``weight``."""
        key = hashlib.sha256(f"{ALGORITHM_VERSION}|{weight.dtype}|{tuple(weight.shape)}|".encode())
        key.update(_bytes_of(weight))
        return self.folder / f"{key.hexdigest()}.safetensors"


def default_cache_folder() -> Path:
    """``$SVFT_DIFFUSION_CACHE`` where it is set, else the folder that the platform gives to caches."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "svft_diffusion" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "svft_diffusion"
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "svft_diffusion"


def cached_factors(weight: Tensor) -> SingularFactors:
    """Factors of ``weight`` (m, n) by way of the cache in `default_cache_folder`."""
    return FactorCache(default_cache_folder()).factors(weight)


def _bytes_of(tensor: Tensor) -> bytes:
    """The tensor's values as bytes, whatever its dtype (numpy has no bfloat16)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _digest(factors: SingularFactors) -> str:
    digest = hashlib.sha256()
    for tensor in factors:
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _read_entry(entry: Path, shape: tuple[int, ...]) -> SingularFactors | None:
    """The stored factors, or None where there are none or where the entry is damaged."""
    try:
        with safe_open(entry, framework="pt") as file:
            stored_digest = (file.metadata() or {}).get("digest")
            # Copies, because a tensor in a file begins anywhere and the last bits of a product may depend on that.
            factors = SingularFactors(*(file.get_tensor(name).clone() for name in SingularFactors._fields))
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError) as problem:
        _logger.warning("cache entry %s can't be read (%s); decomposing again", entry.name, problem)
        return None
    rows, columns = shape
    kept = min(shape)
    expected = ((rows, kept), (kept,), (kept, columns))
    if tuple(tuple(tensor.shape) for tensor in factors) != expected or _digest(factors) != stored_digest:
        _logger.warning("cache entry %s is damaged; decomposing again", entry.name)
        return None
    return factors


def _write_entry(entry: Path, factors: SingularFactors) -> None:
    """Store the factors whole or not at all: readers never see a half-written entry."""
    unfinished = entry.with_name(f"{entry.stem}.{uuid.uuid4().hex}.tmp")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        save_file(factors._asdict(), unfinished, metadata={"digest": _digest(factors)})
        os.replace(unfinished, entry)
    except (OSError, SafetensorError) as problem:
        _logger.warning("singular factors are not cached: %s", problem)
        with contextlib.suppress(OSError):
            unfinished.unlink()
