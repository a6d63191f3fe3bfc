"""Where a training leaves its adapter."""

from __future__ import annotations

from pathlib import Path

ADAPTER_FILE = "adapter.safetensors"
"""The name that the trainer gives to every adapter."""


def adapter_file(path: Path) -> Path:
    """``path``, or the `ADAPTER_FILE` in it where it is a folder with one."""
    inside = path / ADAPTER_FILE
    return inside if inside.is_file() else path
