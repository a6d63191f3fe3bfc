"""Pictures of the subject's class for prior preservation: given ones, and ones that the base model draws.

Picture ``i`` is drawn with seed ``seed + i`` and prompt ``i`` of the list, taken round and round. A manifest beside
the pictures says what made them: when any of it changes, or a file did, they are drawn again, and an interrupted run
goes on where it stopped. Files that it does not list are somebody's, whatever they are called: they are given pictures,
and none is drawn over them. Runs with the same recipe share a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from svft_diffusion.data.captions import METADATA_FILE, read_captions
from svft_diffusion.data.class_folder import LOCK_FILE, drawing_alone, in_use, is_in_use
from svft_diffusion.data.dataset import Picture, pictures_with_prompts
from svft_diffusion.data.photos import PhotoFolder, scan_photos
from svft_diffusion.errors import UserError
from svft_diffusion.files.whole_files import replace_when_whole
from svft_diffusion.sampling.png import save_png

MANIFEST_FILE = "class_images.json"
_MANIFEST = re.compile(re.escape(MANIFEST_FILE))
_UNFINISHED = ""  # in place of a digest


@dataclass(frozen=True)
class ClassImageRecipe:
    """Everything that a drawn class picture depends on."""

    base_model: str
    base_digest: str  # of all weights that take part
    precision: str  # in which they were drawn
    scheduler: str
    scheduler_settings: dict[str, Any]
    prompts: list[str]
    seed: int
    resolution: int
    num_inference_steps: int
    guidance_scale: float

    def prompt(self, index: int) -> str:
        return self.prompts[index % len(self.prompts)]


@dataclass
class _Manifest:
    """Which pictures are ours, which of them are finished, and by which recipe."""

    recipe: dict[str, Any]
    drawn: dict[str, str]  # number of the picture -> SHA-256 of its file; listed before there is a file
    withheld: list[int]  # numbers of those that the base model's safety checker blanked

    @property
    def files(self) -> set[str]:
        """Their names."""
        return {_file_name(int(index)) for index in self.drawn}

    def is_whole(self, index: int) -> bool:
        return self.drawn.get(str(index), _UNFINISHED) != _UNFINISHED


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


def count_drawn(folder: Path) -> int:
    """How many class pictures a run has drawn there so far, as its list says; those that were blanked count."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return 0
    return sum(digest != _UNFINISHED for digest in manifest.drawn.values()) + len(manifest.withheld)


def given_class_pictures(folder: Path) -> PhotoFolder:
    """The pictures that somebody else put into the class folder; an empty or missing folder is fine."""
    if not folder.is_dir():
        return PhotoFolder([], [])
    names = {path.name for path in folder.iterdir()}
    ours = _names_of_ours(folder, names)  # read later: another run lists what it draws before there is a file
    if names <= ours:
        return PhotoFolder([], [])
    try:
        found = scan_photos(folder)
    except UserError:
        return PhotoFolder([], [])
    own = [photo for photo in found.photos if photo.name in names - ours]
    skipped = [file for file in found.skipped if file.path.name in names - ours - {METADATA_FILE}]
    return PhotoFolder(own, skipped)


def _names_of_ours(folder: Path, names: set[str]) -> set[str]:
    """Those of the files in ``folder`` that a run drew or wrote for its own use."""
    manifest = _read_manifest(folder)
    drawn = set() if manifest is None else manifest.files
    return {name for name in names if name in drawn or _MANIFEST.fullmatch(name) or LOCK_FILE.fullmatch(name)}


def class_pictures(
    pipeline: DiffusionPipeline,
    folder: Path,
    recipe: ClassImageRecipe,
    *,
    count: int,
    batch_size: int,
    caption_source: str = "none",
    subject: int = 0,
    on_progress: Callable[[], None] = lambda: None,
    users: ExitStack | None = None,
) -> list[Picture]:
    """``count`` or more class pictures with their prompts: all given ones, filled up by the base model's drawings.

    Args:
        pipeline: the base model without any adapter, on the device that draws.
        folder: created if it is not there.
        caption_source: see `read_captions`; of the given pictures.
        subject: what the pictures show the class of, see `Picture`.
        on_progress: called after each denoising step, and while another run draws into the folder; what it raises ends
            the drawing, and what is drawn stays.
        users: until it is closed, no other run may take the drawn pictures away.

    Raises:
        UserError: the folder can't be written, another run needs the pictures of another recipe in it, or the safety
            checker blanked every picture.
    """
    found = given_class_pictures(folder)
    captions = read_captions(folder, found, caption_source, required=False)
    given = pictures_with_prompts(found, recipe.prompts[0], captions, subject)
    if len(given) >= count:
        return given
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with drawing_alone(folder, on_progress):
            manifest = _matching_manifest(folder, recipe)
            if users is not None:
                users.enter_context(in_use(folder))
            wanted = _free_numbers(folder, manifest, count - len(given))
            missing = [index for index in wanted if not (manifest.is_whole(index) or index in manifest.withheld)]
            _draw(pipeline, folder, recipe, manifest, missing, batch_size, on_progress)
    except OSError as problem:  # of the folder, or of a file that can't be removed
        raise UserError(f"can't write class images to {folder}: {problem.strerror or problem}") from problem
    drawn = [
        Picture(folder / _file_name(index), recipe.prompt(index), subject)
        for index in wanted
        if manifest.is_whole(index)
    ]
    if not given and not drawn:
        raise UserError("the base model's safety checker blanked every class image; use another --class_prompt")
    return given + drawn


def _free_numbers(folder: Path, manifest: _Manifest, count: int) -> list[int]:
    """The first numbers of pictures whose files nobody else has put there."""
    ours = manifest.files
    # Some file systems don't tell capitals from others.
    taken = {path.name.casefold() for path in folder.iterdir() if path.name not in ours}
    return list(itertools.islice((index for index in itertools.count() if _file_name(index) not in taken), count))


def _draw(
    pipeline: DiffusionPipeline,
    folder: Path,
    recipe: ClassImageRecipe,
    manifest: _Manifest,
    missing: Sequence[int],
    batch_size: int,
    on_progress: Callable[[], None],
) -> None:
    def report(_pipeline: DiffusionPipeline, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_progress()
        return tensors

    pipeline.set_progress_bar_config(disable=True)
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    for indices in tqdm(batches, desc="class images", unit="batch", disable=not batches):
        manifest.drawn |= dict.fromkeys(map(str, indices), _UNFINISHED)
        _write_manifest(folder, manifest)
        result = pipeline(
            prompt=[recipe.prompt(index) for index in indices],
            height=recipe.resolution,
            width=recipe.resolution,
            num_inference_steps=recipe.num_inference_steps,
            guidance_scale=recipe.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(recipe.seed + index) for index in indices],
            callback_on_step_end=report,
        )
        blanked = getattr(result, "nsfw_content_detected", None) or [False] * len(indices)
        for index, image, withheld in zip(indices, result.images, blanked, strict=True):
            if withheld:
                manifest.withheld.append(index)
                del manifest.drawn[str(index)]
                continue
            settings = {"prompt": recipe.prompt(index), "seed": recipe.seed + index, "base_model": recipe.base_model}
            file = save_png(image, folder / _file_name(index), settings)
            manifest.drawn[str(index)] = _digest(file)
        _write_manifest(folder, manifest)


def _read_manifest(folder: Path) -> _Manifest | None:
    """The folder's manifest; None if there is none, or it is damaged."""
    try:
        manifest = _Manifest(**json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")))
        drawn = {str(int(index)): str(digest) for index, digest in manifest.drawn.items()}
        return _Manifest(manifest.recipe, drawn, [int(index) for index in manifest.withheld])
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _matching_manifest(folder: Path, recipe: ClassImageRecipe) -> _Manifest:
    """The folder's manifest if this recipe made its pictures; else a new one, the old drawings removed."""
    # As it will be read again: JSON knows no tuples.
    wanted = json.loads(json.dumps(dataclasses.asdict(recipe)))
    manifest = _read_manifest(folder)
    if manifest is None:
        return _Manifest(wanted, {}, [])
    if manifest.recipe != wanted:
        if manifest.drawn and is_in_use(folder):
            raise UserError(
                f"another run needs the class images in {folder}, which were drawn with other settings: choose another "
                "--class_data_dir, or wait until it is over"
            )
        for name in manifest.files:
            (folder / name).unlink(missing_ok=True)
        return _Manifest(wanted, {}, [])
    for index, digest in manifest.drawn.items():
        if _digest(folder / _file_name(int(index))) != digest:
            manifest.drawn[index] = _UNFINISHED
    return manifest


def _write_manifest(folder: Path, manifest: _Manifest) -> None:
    with replace_when_whole(folder / MANIFEST_FILE) as unfinished:
        unfinished.write_text(json.dumps(dataclasses.asdict(manifest), indent=1), encoding="utf-8")


def _digest(file: Path) -> str:
    """SHA-256 of a file's content; empty for a file that is gone."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""


def _file_name(index: int) -> str:
    return f"class-{index:05d}.png"
