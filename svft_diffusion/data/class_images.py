"""Pictures of the subject's class for prior preservation: given ones, and ones that the base model draws.

Picture ``i`` is drawn with seed ``seed + i`` and prompt ``i`` of the list, taken round and round. A manifest beside
the pictures says what made them: when any of it changes they are drawn again, and an interrupted run goes on where
it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from svft_diffusion.data.dataset import Picture, pictures_with_prompts
from svft_diffusion.data.photos import PhotoFolder, scan_photos
from svft_diffusion.errors import UserError
from svft_diffusion.sampling.png import save_png

MANIFEST_FILE = "class_images.json"
_DRAWN_FILE = re.compile(r"class-\d{5}\.png")


@dataclass(frozen=True)
class ClassImageRecipe:
    """Everything that a drawn class picture depends on."""

    base_model: str
    fingerprint: str
    scheduler: str
    prompts: list[str]
    seed: int
    resolution: int
    num_inference_steps: int
    guidance_scale: float

    def prompt(self, index: int) -> str:
        return self.prompts[index % len(self.prompts)]


@dataclass
class _Manifest:
    """Which pictures are finished, and by which recipe."""

    recipe: dict[str, Any]
    drawn: list[int]
    withheld: list[int]  # blanked by the base model's safety checker


def read_class_prompts(file: Path) -> list[str]:
    """One prompt per line; empty lines don't count.

    Raises:
        UserError: no such file, not UTF-8, or no prompt in it.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"the class prompts file {file} can't be read as UTF-8 text: {problem}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"the class prompts file {file} holds no prompt; write one prompt per line")
    return prompts


def given_class_pictures(folder: Path) -> PhotoFolder:
    """The pictures that somebody else put into the class folder; an empty or missing folder is fine."""
    if not folder.is_dir():
        return PhotoFolder([], [])
    if all(_DRAWN_FILE.fullmatch(path.name) or path.name == MANIFEST_FILE for path in folder.iterdir()):
        return PhotoFolder([], [])
    try:
        found = scan_photos(folder)
    except UserError:
        return PhotoFolder([], [])
    own = [photo for photo in found.photos if not _DRAWN_FILE.fullmatch(photo.name)]
    skipped = [file for file in found.skipped if file.path.name != MANIFEST_FILE]
    return PhotoFolder(own, skipped)


def class_pictures(
    pipeline: DiffusionPipeline,
    folder: Path,
    recipe: ClassImageRecipe,
    *,
    count: int,
    batch_size: int,
    caption_source: str,
) -> list[Picture]:
    """``count`` or more class pictures with their prompts: all given ones, filled up by the base model's drawings.

    Args:
        pipeline: the base model without any adapter, on the device that draws.
        folder: created if it is not there.

    Raises:
        UserError: the folder can't be written, or the safety checker blanked every picture.
    """
    given = pictures_with_prompts(given_class_pictures(folder), recipe.prompts[0], caption_source)
    wanted = list(range(max(0, count - len(given))))
    if not wanted:
        return given
    try:
        folder.mkdir(parents=True, exist_ok=True)
        manifest = _matching_manifest(folder, recipe)
        missing = [index for index in wanted if index not in manifest.drawn and index not in manifest.withheld]
        _draw(pipeline, folder, recipe, manifest, missing, batch_size)
    except OSError as problem:
        raise UserError(f"can't write class images to {folder}: {problem.strerror or problem}") from problem
    drawn = [Picture(folder / _file_name(index), recipe.prompt(index)) for index in wanted if index in manifest.drawn]
    if not given and not drawn:
        raise UserError("the base model's safety checker blanked every class image; use another --class_prompt")
    return given + drawn


def _draw(
    pipeline: DiffusionPipeline,
    folder: Path,
    recipe: ClassImageRecipe,
    manifest: _Manifest,
    missing: Sequence[int],
    batch_size: int,
) -> None:
    pipeline.set_progress_bar_config(disable=True)
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    for indices in tqdm(batches, desc="class images", unit="batch", disable=not batches):
        result = pipeline(
            prompt=[recipe.prompt(index) for index in indices],
            height=recipe.resolution,
            width=recipe.resolution,
            num_inference_steps=recipe.num_inference_steps,
            guidance_scale=recipe.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(recipe.seed + index) for index in indices],
        )
        blanked = getattr(result, "nsfw_content_detected", None) or [False] * len(indices)
        for index, image, withheld in zip(indices, result.images, blanked, strict=True):
            if withheld:
                manifest.withheld.append(index)
                continue
            settings = {"prompt": recipe.prompt(index), "seed": recipe.seed + index, "base_model": recipe.base_model}
            save_png(image, folder / _file_name(index), settings)
            manifest.drawn.append(index)
        _write_manifest(folder, manifest)


def _matching_manifest(folder: Path, recipe: ClassImageRecipe) -> _Manifest:
    """The folder's manifest if this recipe made its pictures; else a new one, the old drawings removed."""
    wanted = dataclasses.asdict(recipe)
    try:
        manifest = _Manifest(**json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        manifest = _Manifest({}, [], [])
    if manifest.recipe != wanted:
        for index in manifest.drawn:
            (folder / _file_name(index)).unlink(missing_ok=True)
        return _Manifest(wanted, [], [])
    manifest.drawn = [index for index in manifest.drawn if (folder / _file_name(index)).is_file()]
    return manifest


def _write_manifest(folder: Path, manifest: _Manifest) -> None:
    unfinished = folder / f".{MANIFEST_FILE}.tmp"
    unfinished.write_text(json.dumps(dataclasses.asdict(manifest), indent=1), encoding="utf-8")
    os.replace(unfinished, folder / MANIFEST_FILE)


def _file_name(index: int) -> str:
    return f"class-{index:05d}.png"
