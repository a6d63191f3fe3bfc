"""A training run of four steps on a tiny base model: its settings, its command line, and what it has left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_models import tiny_pipeline

from svft_diffusion import load_adapter
from svft_diffusion.files import read_adapter
from svft_diffusion.files.tensor_names import SKETCH
from svft_diffusion.models import load_pipeline
from svft_diffusion.sampling.sample import generate
from svft_diffusion.training.config import TrainingConfig

PROMPT = "a photo of sks dog"
# Freezes seven vectors in each of two windows, of the steps 2 to 3 and 4 to 5.
FREEZING: dict[str, Any] = {
    "method": "vectorfit",
    "freezing_warmup_steps": 1,
    "freezing_interval": 2,
    "freezing_number": 2,
    "freezing_top_k": 7,
}


def short_run(folder: Path, pipeline: DiffusionPipeline | None = None) -> TrainingConfig:
    """Write a tiny base model and photos into ``folder``; the settings of a run on them, which is not begun.

    Args:
        pipeline: the base model (default: of Stable Diffusion).
    """
    base, photos = folder / "tiny", folder / "photos"
    (pipeline or tiny_pipeline()).save_pretrained(base)
    _write_photos(photos)
    return TrainingConfig(
        pretrained_model_name_or_path=str(base),
        instance_data_dir=photos,
        instance_prompt=PROMPT,
        output_dir=folder / "out",
        train_batch_size=2,
        max_train_steps=4,
        checkpointing_steps=2,
        learning_rate=0.05,
        report_to="none",
    )


def _write_photos(folder: Path) -> None:
    """Five photos of different shapes, and files that are none."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number, size in enumerate([(16, 16), (20, 30), (40, 18), (9, 9), (16, 24)]):
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no photo", encoding="utf-8")
    (folder / ".DS_Store").write_bytes(b"\0")


def arguments(config: TrainingConfig, **changes: Any) -> list[str]:
    """The same run as a command line."""
    values = {
        "pretrained_model_name_or_path": config.pretrained_model_name_or_path,
        "instance_data_dir": config.instance_data_dir,
        "instance_prompt": config.instance_prompt,
        "output_dir": config.output_dir,
        "train_batch_size": config.train_batch_size,
        "max_train_steps": config.max_train_steps,
        "checkpointing_steps": config.checkpointing_steps,
        "learning_rate": config.learning_rate,
        "report_to": "none",
        **changes,
    }
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("checkpoint")}


def trained_tensors(adapter: Path) -> dict[str, torch.Tensor]:
    """What an adapter file holds, without the sketch of its basis."""
    _, tensors = read_adapter(adapter)
    return {name: tensor for name, tensor in tensors.items() if name != SKETCH}


def picture(base: str, adapter: Path | None = None, **options: Any) -> np.ndarray:
    """What the base model in the folder ``base`` draws with the adapter, in numbers that can be subtracted."""
    pipeline = load_pipeline(base)
    if adapter is not None:
        load_adapter(pipeline, adapter)
    return np.asarray(generate(pipeline, PROMPT, seed=1, **options), dtype=int)
