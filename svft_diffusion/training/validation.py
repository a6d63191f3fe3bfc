"""Samples while it trains: the same seeds each time, drawn by the very models that train."""

from __future__ import annotations

from pathlib import Path

import torch

from svft_diffusion.sampling.png import save_png
from svft_diffusion.sampling.sample import facts_of, generate
from svft_diffusion.training.setup import Run

SAMPLES_FOLDER = "samples"


def draw_samples(run: Run, step: int) -> list[Path]:
    """Draw ``num_validation_images`` pictures after ``step`` steps; an empty list without a validation prompt.

    The models keep their precision, their training mode and their random state.
    """
    config = run.config
    if config.validation_prompt is None or not run.accelerator.is_main_process:
        return []
    folder = config.output_dir / SAMPLES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    modes = {model: model.training for model in run.models.values()}
    paths = []
    try:
        for model in modes:
            model.eval()
        for number in range(config.num_validation_images):
            settings = {"prompt": config.validation_prompt, "seed": config.seed + number, "training_step": step}
            with torch.no_grad(), run.accelerator.autocast():
                image = generate(
                    run.family.pipeline,
                    config.validation_prompt,
                    seed=config.seed + number,
                    height=config.resolution,
                    width=config.resolution,
                )
            path = folder / f"step-{step:06d}-{number}.png"
            paths.append(save_png(image, path, settings | facts_of(run.family.pipeline, image)))
    finally:
        for model, mode in modes.items():
            model.train(mode)
    return paths
