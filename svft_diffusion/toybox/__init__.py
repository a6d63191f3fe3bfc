"""toybox: the embedded text-to-image model, the world it was trained on, and the readers that judge its pictures."""

from __future__ import annotations

from pathlib import Path

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
"""A plain diffusers pipeline folder: ``DiffusionPipeline.from_pretrained(WEIGHTS_FOLDER)`` loads it."""
