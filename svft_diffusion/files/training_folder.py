"""Where a training leaves what: the names in its output folder that other parts of the program know."""

from __future__ import annotations

from pathlib import Path

ADAPTER_FILE = "adapter.safetensors"
"""The name that the trainer gives to every adapter."""

METRICS_FILE = "metrics.jsonl"
"""The numbers of every step, a line each."""

SAMPLES_FOLDER = "samples"
"""Pictures that were drawn while it trained, ``step-NNNNNN-I.png``."""


def adapter_file(path: Path) -> Path:
    """``path``, or the `ADAPTER_FILE` in it where it is a folder with one."""
    inside = path / ADAPTER_FILE
    return inside if inside.is_file() else path
