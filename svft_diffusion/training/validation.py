"""Samples while it trains: the same seeds each time, drawn by the very models that train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.tracking import GeneralTracker
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from svft_diffusion.files.training_folder import SAMPLES_FOLDER
from svft_diffusion.sampling.png import save_png
from svft_diffusion.sampling.sample import facts_of, generate
from svft_diffusion.training.run import Run
from svft_diffusion.training.status import SAMPLING


def sample_file(output_dir: Path, step: int, number: int) -> Path:
    """Where a sample lies."""
    return output_dir / SAMPLES_FOLDER / f"step-{step:06d}-{number}.png"


def samples_missing(run: Run, step: int) -> bool:
    """Whether a run that begins at ``step`` has samples of it to draw: at 0, or where it was stopped in the midst."""
    numbers = range(run.config.num_validation_images)
    drawn = all(sample_file(run.config.output_dir, step, number).is_file() for number in numbers)
    missing = step == 0 or (run.draws_samples(step) and step < run.total_steps and not drawn)
    if run.is_sharded:  # all draw together or none, and machines may see a folder's files at different times
        missing = bool(run.accelerator.gather(torch.tensor([int(missing)], device=run.accelerator.device))[0])
    return missing


def draw_samples(run: Run, step: int) -> list[Path]:
    """Draw ``num_validation_images`` pictures after ``step`` steps; an empty list without a validation prompt.

    The models keep their precision, their training mode and their random state.

    Raises:
        Interrupted: the run shall end.
    """
    config = run.config
    saves = run.accelerator.is_main_process
    if config.validation_prompt is None or not (saves or run.is_sharded):
        return []
    prompt = config.with_tokens(config.validation_prompt)
    vae = run.family.pipeline.vae
    run.progress(SAMPLING)
    modes = {model: model.training for model in run.models.values()}
    paths = []
    with run.resting.awake():
        try:
            for model in modes:
                model.eval()
            for number in range(config.num_validation_images):
                settings = {"prompt": prompt, "seed": config.seed + number, "training_step": step}
                with torch.no_grad(), run.accelerator.autocast(), decoding_without_autocast(vae), run.averaged_values():
                    image = generate(
                        run.family.pipeline,
                        prompt,
                        seed=config.seed + number,
                        height=config.resolution,
                        width=config.resolution,
                        max_sequence_length=config.max_sequence_length,
                        on_step=lambda _: run.progress(SAMPLING),
                    )
                if not saves:
                    continue
                path = sample_file(config.output_dir, step, number)
                paths.append(save_png(image, path, settings | facts_of(run.family.pipeline, image)))
        finally:
            for model, mode in modes.items():
                model.train(mode)
    if saves:
        show_samples(run.accelerator.trackers, paths, prompt, step)
    return paths


def show_samples(trackers: Sequence[GeneralTracker], samples: Sequence[Path], prompt: str, step: int) -> None:
    """Send pictures to those of TensorBoard and W&B that are in use."""
    for tracker in trackers:
        if tracker.name == "wandb":
            import wandb

            tracker.log({SAMPLES_FOLDER: [wandb.Image(str(sample), caption=prompt) for sample in samples]}, step=step)
        elif tracker.name == "tensorboard":
            pixels = np.stack([np.asarray(Image.open(sample).convert("RGB")) for sample in samples])
            tracker.log_images({SAMPLES_FOLDER: pixels}, step=step, dataformats="NHWC")


@contextmanager
def decoding_without_autocast(vae: AutoencoderKL) -> Iterator[None]:
    """Decode in the precision of the VAE's weights: those of SDXL and others overflow in 16 bit."""
    decode = vae.decode

    def decode_precisely(latents: Tensor, **options: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.to(vae.dtype), **options)

    vae.decode = decode_precisely
    try:
        yield
    finally:
        del vae.decode
