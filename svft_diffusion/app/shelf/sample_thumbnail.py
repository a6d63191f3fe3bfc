"""Small pictures of adapters whose files hold none: those of a training's steps, and of one that was stopped."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from svft_diffusion.files.training_folder import ADAPTER_FILE
from svft_diffusion.training.history import HISTORY_FOLDER, sample_files
from svft_diffusion.training.thumbnail import jpeg_thumbnail


def sample_thumbnail(adapter: Path, step: int | None = None) -> bytes | None:
    """The latest sample that a training drew with its adapter, as a small JPEG; None where there is none.

    Args:
        adapter: where a training has put it.
        step: of the training; None: its last.
    """
    if adapter.name == ADAPTER_FILE:
        run = adapter.parent
    elif adapter.parent.name == HISTORY_FOLDER:
        run = adapter.parent.parent
    else:
        return None
    by_step = sample_files(run)
    # At step 0, the base model draws alone.
    drawn = [one for one in by_step if one > 0 and (step is None or one <= step)]
    if not drawn:
        return None
    sample = by_step[max(drawn)][0]
    try:
        return _encoded(sample, sample.stat().st_mtime_ns)
    except OSError:  # gone in this moment, or no picture
        return None


@lru_cache(maxsize=256)
def _encoded(sample: Path, _modified: int) -> bytes:
    return jpeg_thumbnail(sample)
