"""Which pictures a run makes, under which names, with which settings: known before any model is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svft_diffusion.adapters.fitting import check_choice
from svft_diffusion.errors import UserError
from svft_diffusion.models.loading import base_display_name
from svft_diffusion.sampling.adapter_choice import CheckedAdapter
from svft_diffusion.sampling.config import SamplingConfig
from svft_diffusion.sampling.png import read_png_settings
from svft_diffusion.version import __version__

GRID_FILE = "grid.png"
_LARGEST_SEED = 2**63 - 1
_SLUG_LENGTH = 40


@dataclass(frozen=True)
class PlannedPicture:
    """One picture of a run."""

    file_name: str
    seed: int
    settings: dict[str, Any]  # what its file will tell; its size and scheduler are known after loading only


@dataclass(frozen=True)
class PlannedRow:
    """The pictures that share everything but the seed."""

    label: str
    prompt: str
    weights: dict[str, float]  # adapter -> weight
    pictures: list[PlannedPicture]


def check_config(config: SamplingConfig) -> None:
    """Refuse settings that can't work.

    Raises:
        UserError: names the setting and what it may be.
    """
    if not config.prompt:
        raise UserError('what should be drawn? Give at least one --prompt "..."')
    if any(not prompt.strip() for prompt in config.prompt):
        raise UserError("a --prompt is empty")
    if config.weights and not config.adapter:
        raise UserError("--weights scales adapters, but there is no --adapter")
    if any(not -1e4 < weight < 1e4 for weight in config.weights):
        raise UserError("--weights must be finite numbers of a sensible size")
    check_choice(config.on_mismatch)
    if config.num_images < 1:
        raise UserError(f"--num_images must be at least 1, got {config.num_images}")
    check_picture_settings(config.seed + config.num_images - 1, config.num_inference_steps, config.guidance_scale)
    check_picture_settings(config.seed, config.num_inference_steps, config.guidance_scale)
    for name, size in (("height", config.height), ("width", config.width)):
        if size is not None and (size < 8 or size % 8):
            raise UserError(f"--{name} must be a multiple of 8, got {size}")


def check_picture_settings(seed: int, num_inference_steps: int, guidance_scale: float) -> None:
    """Refuse numbers with which no picture can be made.

    Raises:
        UserError: names the setting and what it may be.
    """
    if not 0 <= seed <= _LARGEST_SEED:
        raise UserError(f"the seed must be between 0 and {_LARGEST_SEED}, got {seed}")
    if not 1 <= num_inference_steps <= 1000:
        raise UserError(f"num_inference_steps must be between 1 and 1000, got {num_inference_steps}")
    if not 0 <= guidance_scale <= 1000:
        raise UserError(f"guidance_scale must be between 0 and 1000, got {guidance_scale}")


def plan_rows(config: SamplingConfig, adapters: Sequence[CheckedAdapter]) -> list[PlannedRow]:
    """One row for each prompt and strength, in this order; one column for each seed."""
    rows = []
    for prompt_number, prompt in enumerate(config.prompt):
        for strength in config.weights or [1.0]:
            # Adding zero turns a negative zero into zero.
            weights = {adapter.name: adapter.weight * strength + 0.0 for adapter in adapters}
            strength_part = f"_w{strength:g}" if config.weights else ""
            pictures = [
                PlannedPicture(
                    f"{prompt_number:03d}_{slug(prompt)}{strength_part}_seed{seed}.png",
                    seed,
                    picture_settings(
                        base=config.pretrained_model_name_or_path,
                        adapters=[(adapter, weights[adapter.name]) for adapter in adapters],
                        prompt=prompt,
                        negative_prompt=config.negative_prompt,
                        seed=seed,
                        num_inference_steps=config.num_inference_steps,
                        guidance_scale=config.guidance_scale,
                        dtype=config.dtype,
                    ),
                )
                for seed in range(config.seed, config.seed + config.num_images)
            ]
            label = f"{prompt}\nstrength {strength:g}" if config.weights else prompt
            rows.append(PlannedRow(label, prompt, weights, pictures))
    return rows


def picture_settings(
    *,
    base: str,
    adapters: Sequence[tuple[CheckedAdapter, float]],
    prompt: str,
    negative_prompt: str,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
    dtype: str,
) -> dict[str, Any]:
    """What a picture's file tells about its making; adapters come with the weights at which they acted."""
    return {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "base": base_display_name(base),
        "dtype": dtype,
        "adapters": [
            {"name": adapter.name, "weight": weight, "sha256": adapter.sha256} for adapter, weight in adapters
        ],
        "version": f"svft_diffusion {__version__}",
    }


def check_overwriting(output_dir: Path, rows: Sequence[PlannedRow], *, width: int | None, height: int | None) -> None:
    """Refuse to replace pictures that were made with other settings; the same ones may be made again.

    Args:
        width: pixels; None where it is not known yet, like ``height``.

    Raises:
        UserError: names the first such file and the ways out.
    """
    sizes = {name: size for name, size in (("width", width), ("height", height)) if size is not None}
    planned = {picture.file_name: picture.settings | sizes for row in rows for picture in row.pictures}
    if len(planned) < sum(len(row.pictures) for row in rows):
        raise UserError("two of the --weights are too close to get different file names")
    planned[GRID_FILE] = {"pictures": list(planned)}
    for name, settings in planned.items():
        file = output_dir / name
        if file.exists() and not _was_made_with(file, settings):
            raise UserError(f"{file} is another picture; choose another --output_dir, or replace it with --overwrite")


def slug(text: str) -> str:
    """``A red robot, on the beach!`` -> ``a-red-robot-on-the-beach``: letters of every file system, at most 40."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:_SLUG_LENGTH].strip("-") or "picture"


def new_numbered_folder(parent: Path) -> Path:
    """The folder in ``parent`` whose number follows the highest there: ``001``, ``002``, ..."""
    taken = [int(folder.name) for folder in parent.glob("[0-9]*") if folder.name.isdecimal()]
    return parent / f"{max(taken, default=0) + 1:03d}"


def _was_made_with(file: Path, settings: dict[str, Any]) -> bool:
    try:
        found = read_png_settings(file)
    except UserError:
        return False
    return all(found.get(name) == value for name, value in settings.items())
