"""Where the cache of singular factors lies and how large it may grow."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from svft_diffusion.errors import UserError

CACHE_VARIABLE = "SVFT_DIFFUSION_CACHE"
CACHE_SIZE_VARIABLE = "SVFT_DIFFUSION_CACHE_SIZE"
DEFAULT_CACHE_SIZE = 20 * 2**30

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B?|B)?", re.IGNORECASE)
_chosen_folder: Path | None = None
_chosen_size: int | None = None


def configure_cache(folder: Path | None, size: str | None) -> None:
    """Set the cache of this process, as command-line flags do; None leaves the choice to environment and platform.

    Args:
        folder: where the entries lie.
        size: how much they may take: ``5GB``, ``500MB``, ``2GiB`` or a number of bytes.

    Raises:
        UserError: ``size`` is not a size; nothing was changed.
    """
    global _chosen_folder, _chosen_size
    chosen_size = None if size is None else parse_size(size, "the cache size")
    _chosen_folder = None if folder is None else folder.expanduser()
    _chosen_size = chosen_size


def use_cache(folder: Path | None, size: str | None) -> None:
    """Take what a command was told of the cache, if anything, before it does any work.

    Raises:
        UserError: the folder is a file, or flag or environment variable hold no size; nothing was changed.
    """
    if folder is not None and folder.expanduser().is_file():
        raise UserError(f"the factor cache {folder} is a file; give a folder")
    if folder is not None or size is not None:
        configure_cache(folder, size)
    cache_size_limit()


def cache_folder() -> Path:
    """The folder given to `configure_cache`, else `default_cache_folder`."""
    return _chosen_folder or default_cache_folder()


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


def cache_size_limit() -> int:
    """Bytes that the cache may take: from `configure_cache`, else ``$SVFT_DIFFUSION_CACHE_SIZE``, else 20 GiB.

    Raises:
        UserError: the environment variable holds no size.
    """
    if _chosen_size is not None:
        return _chosen_size
    chosen = os.environ.get(CACHE_SIZE_VARIABLE)
    return parse_size(chosen, CACHE_SIZE_VARIABLE) if chosen else DEFAULT_CACHE_SIZE


def parse_size(text: str, name: str) -> int:
    """``5GB`` -> 5,000,000,000 bytes; ``name`` is what an error calls it.

    Raises:
        UserError: ``text`` is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{name} {text!r} is not a size: write it like 5GB, 500MB or as a number of bytes")
    number, prefix, binary = match.groups()
    power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)
