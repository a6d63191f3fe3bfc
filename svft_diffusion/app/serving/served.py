"""Which files visitors can get: pictures of the output folder, and copies that are made for them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from svft_diffusion.app.config import AppConfig


def served_copy(file: Path) -> str:
    """A copy that a visitor can download, under an address that nobody can guess who does not know the content."""
    return str(save_file_to_cache(file, cache_dir=get_upload_folder()))


def uploaded_file(path: str) -> Path | None:
    """The upload at ``path``, as a client names it; None for any other file of this machine."""
    try:
        file = Path(path).resolve(strict=True)
    except (OSError, ValueError):
        return None
    return file if file.is_file() and file.is_relative_to(Path(get_upload_folder()).resolve()) else None


def blocked_paths(config: AppConfig) -> list[str]:
    """What Gradio may never serve, although it lies in the current folder or in that of the adapters.

    Gradio would hand out any file of the current folder whose path an event returns. No event returns a path that a
    visitor names; this holds if one did.
    """
    kept = [folder.absolute() for folder in (config.output_dir, Path(get_upload_folder()), Path(tempfile.gettempdir()))]
    adapters = config.adapters_dir.absolute()
    blocked = {folder.absolute() for folder in (config.uploads_dir, config.training_dir, config.evaluation_dir)}
    for folder in (Path.cwd(), adapters):
        blocked |= _all_but(folder, kept)
    return sorted(str(path) for path in blocked)


def _all_but(folder: Path, kept: list[Path]) -> set[Path]:
    """The paths that cover ``folder`` without those in ``kept``, as it is now."""
    if folder in kept:
        return set()
    if not any(one.is_relative_to(folder) for one in kept):
        return {folder}
    try:
        inside = list(folder.iterdir())
    except OSError:
        return set()
    return {path for one in inside if not _leads_to(one, kept) for path in _all_but(one, kept)}


def _leads_to(path: Path, kept: list[Path]) -> bool:
    """Whether it is a link that is kept, for Gradio would block what it leads to."""
    if not path.is_symlink():
        return False
    target = path.resolve()
    return any(one.is_relative_to(target) or target.is_relative_to(one) for one in (one.resolve() for one in kept))
