"""The adapters that lie in a folder; the page names them by label, never by path."""

from __future__ import annotations

from pathlib import Path

from svft_diffusion.errors import UserError
from svft_diffusion.files import read_header
from svft_diffusion.files.training_folder import ADAPTER_FILE


def adapters_in(folder: Path) -> dict[str, Path]:
    """Label -> file of every adapter below ``folder``: its path in the folder, less what all have in common."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        if _is_adapter(file):
            relative = file.relative_to(folder)
            trained_here = relative.name == ADAPTER_FILE and relative.parent != Path()
            found[(relative.parent if trained_here else relative).as_posix()] = file
    return found


def _is_adapter(file: Path) -> bool:
    try:
        read_header(file)
    except UserError:
        return False
    return True
