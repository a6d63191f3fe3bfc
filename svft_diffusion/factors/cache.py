"""On-disk cache of singular factors, keyed by the content of each weight.

The key does not know which model, run or adapter asks: equal weights share one entry.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
import uuid
from pathlib import Path

from torch import Tensor

from svft_diffusion.factors.entry import (
    ENTRY_SUFFIX,
    DamagedEntry,
    map_entry,
    pack_factors,
    unpack_factors,
)
from svft_diffusion.factors.location import cache_folder, cache_size_limit
from svft_diffusion.spectral import SingularFactors, decompose

# Only files with names that the cache itself gives are ever removed: the folder may hold others.
_ENTRY_NAME = re.compile(rf"[0-9a-f]{{64}}{re.escape(ENTRY_SUFFIX)}")
_UNFINISHED_NAME = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{32}\.tmp")
_DAY = 24 * 60 * 60  # seconds
_logger = logging.getLogger(__name__)


class FactorCache:
    """Factors in ``folder``, used by one call; threads and processes may share the folder.

    A cache that can't be written costs time, never a result: the reason is logged.
    """

    def __init__(self, folder: Path, size_limit: int) -> None:
        """``size_limit``: bytes that all entries together may take after `evict`."""
        self.folder = folder
        self.size_limit = size_limit
        self._in_use: set[str] = set()
        self._writable = True

    def find(self, key: str, shape: tuple[int, int]) -> SingularFactors | None:
        """Stored factors of the weight (m, n) = ``shape``; None where there are none or where they are damaged."""
        entry = self._entry(key)
        try:
            factors = map_entry(entry, shape, key)
        except FileNotFoundError:
            return None
        except (OSError, DamagedEntry) as problem:
            _logger.warning("cache entry %s can't be used (%s); decomposing again", entry, problem)
            return None
        with contextlib.suppress(OSError):  # a folder that only others may write
            os.utime(entry)  # eviction goes by the time of the last change
        self._in_use.add(entry.name)
        return factors

    def compute(self, key: str, weight: Tensor) -> SingularFactors:
        """Decompose a matrix and store its factors. They lie in memory as if they had been read from the cache.

        Raises:
            ValueError: the weight can't be decomposed (see `svft_diffusion.spectral.decompose`).
        """
        rows, columns = weight.shape
        content = pack_factors(decompose(weight), key)
        entry = self._entry(key)
        if self._writable and self._write(entry, content):
            self._in_use.add(entry.name)
            with contextlib.suppress(OSError, DamagedEntry):  # damaged already, or another process removed it
                return map_entry(entry, (rows, columns), key)
        return unpack_factors(content, (rows, columns))

    def evict(self) -> None:
        """Remove the entries used longest ago until the rest fits, but none that this object has found or computed."""
        entries = []
        with contextlib.suppress(OSError), os.scandir(self.folder) as files:
            for file in files:
                with contextlib.suppress(OSError):  # another process removed it meanwhile
                    status = file.stat()
                    if _ENTRY_NAME.fullmatch(file.name):
                        entries.append((status.st_mtime_ns, file.name, status.st_size))
                    elif _UNFINISHED_NAME.fullmatch(file.name) and status.st_mtime < time.time() - _DAY:
                        os.unlink(file)  # its writer was killed
        total = sum(size for _, _, size in entries)
        for _, name, size in sorted(entries):
            if total <= self.size_limit:
                break
            if name not in self._in_use:
                with contextlib.suppress(OSError):  # Windows keeps files that somebody has mapped
                    (self.folder / name).unlink(missing_ok=True)
                    total -= size

    def _entry(self, key: str) -> Path:
        return self.folder / f"{key}{ENTRY_SUFFIX}"

    def _write(self, entry: Path, content: Tensor) -> bool:
        """Store an entry whole or not at all, and say whether that went well: readers never see half an entry."""
        unfinished = entry.with_name(f"{entry.stem}.{uuid.uuid4().hex}.tmp")
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            # Not flushed to the device: after a loss of power the checksum tells, and the factors are computed again.
            unfinished.write_bytes(content.numpy().data)
            os.replace(unfinished, entry)
        except OSError as problem:
            if self._writable:  # one message, not one for each layer
                self._writable = False
                _logger.warning("singular factors are not cached: %s", problem)
            with contextlib.suppress(OSError):
                unfinished.unlink()
            return False
        return True


def open_cache() -> FactorCache:
    """The cache that flags, environment or platform choose (see `svft_diffusion.factors.location`).

    Raises:
        UserError: its size is given wrongly.
    """
    return FactorCache(cache_folder(), cache_size_limit())
