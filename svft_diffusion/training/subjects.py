"""What a run learns, looked at before the base model is loaded: photos, captions and masks of one or more subjects."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svft_diffusion.data.buckets import parse_sizes
from svft_diffusion.data.captions import Captions, likely_caption_source, read_captions
from svft_diffusion.data.class_images import given_class_pictures, read_class_prompts
from svft_diffusion.data.concepts import Concept, read_concepts
from svft_diffusion.data.cutting import read_mask
from svft_diffusion.data.dataset import Picture, mask_file, pictures_with_prompts
from svft_diffusion.data.photos import PhotoFolder, UnusablePhoto, read_photo, scan_photos
from svft_diffusion.errors import UserError
from svft_diffusion.factors.location import parse_size
from svft_diffusion.training.config import TrainingConfig


@dataclass(frozen=True)
class Subject:
    """One subject of a run: its photos, and the class that is not to be forgotten over it."""

    instance_prompt: str
    pictures: list[Picture]
    class_data_dir: Path | None
    class_prompt: str | None
    class_prompts: list[str]  # of the class pictures; empty without prior preservation


def check_data_settings(config: TrainingConfig) -> None:
    """Check the settings about pictures without looking at any.

    Raises:
        UserError: values or combinations that can't work.
    """
    if config.aspect_ratio_buckets is not None:
        parse_sizes(config.aspect_ratio_buckets)
    if not 0.0 <= config.unmasked_weight <= 1.0:  # NaN too
        raise UserError(f"--unmasked_weight must lie in [0, 1], got {config.unmasked_weight:g}")
    if config.unmasked_weight != TrainingConfig().unmasked_weight and not config.masked_loss:
        raise UserError("--unmasked_weight has no effect without --masked_loss; add that")
    if config.encoding_cache is not None and not config.cache_latents:
        raise UserError(
            "--encoding_cache needs --cache_latents: pictures that are cut anew each time are never met again"
        )
    if config.encoding_cache_size is not None:
        if config.encoding_cache is None:
            raise UserError("--encoding_cache_size has no effect without --encoding_cache; give the folder")
        parse_size(config.encoding_cache_size, "--encoding_cache_size")
    if config.encoding_cache is not None and config.encoding_cache.exists() and not config.encoding_cache.is_dir():
        raise UserError(f"--encoding_cache {config.encoding_cache} is no folder")
    if config.concepts_list is not None:
        for name in ("instance_data_dir", "instance_prompt", "class_prompts_file"):
            if getattr(config, name) is not None:
                raise UserError(f"--concepts_list says what --{name} would say; leave the latter out")
    _check_prior(config)


def _check_prior(config: TrainingConfig) -> None:
    if not config.with_prior_preservation:
        for name in ("class_data_dir", "class_prompts_file"):
            if getattr(config, name) is not None:
                raise UserError(f"--{name} has no effect without --with_prior_preservation; add that or leave this out")
        if config.prior_source != "images":
            raise UserError("--prior_source has no effect without --with_prior_preservation; add that")
        return
    if config.prior_source == "base":
        for name in ("class_data_dir", "class_prompts_file"):
            if getattr(config, name) is not None:
                raise UserError(f"--prior_source base trains on no class pictures; leave out --{name}")
    if config.concepts_list is not None:
        return  # each subject says its own
    if not (config.class_prompt or "").strip() and config.class_prompts_file is None:
        alternative = "" if config.prior_source == "base" else " (or --class_prompts_file)"
        raise UserError(f"--with_prior_preservation needs --class_prompt{alternative}")
    if config.prior_source == "images" and config.class_data_dir is None:
        raise UserError("--with_prior_preservation needs --class_data_dir, a folder for the class pictures")


def read_subjects(config: TrainingConfig) -> tuple[list[Subject], list[str]]:
    """The subjects of a run, and notes on their folders.

    Raises:
        UserError: no photos, no prompt, or a file that can't be used; one line with cause and remedy.
    """
    concepts = _concepts(config)
    _check_folders(config, concepts)
    subjects: list[Subject] = []
    notes: list[str] = []
    for number, concept in enumerate(concepts):
        pictures, more = _photos(config, concept, number)
        notes += more
        subjects.append(
            Subject(
                instance_prompt=concept.instance_prompt or "",
                pictures=pictures,
                class_data_dir=concept.class_data_dir,
                class_prompt=concept.class_prompt,
                class_prompts=_class_prompts(config, concept),
            )
        )
    notes += _masks(config, [picture for subject in subjects for picture in subject.pictures])
    for folder in dict.fromkeys(subject.class_data_dir for subject in subjects):
        if folder is not None:
            notes += _class_folder(config, folder)
    return subjects, notes


def _concepts(config: TrainingConfig) -> list[Concept]:
    if config.concepts_list is None:
        if config.instance_data_dir is None:
            raise UserError("no photos: give --instance_data_dir FOLDER")
        if not config.instance_prompt or not config.instance_prompt.strip():
            raise UserError("no prompt: give --instance_prompt, such as 'a photo of sks dog'")
        return [Concept(config.instance_data_dir, config.instance_prompt, config.class_data_dir, config.class_prompt)]
    pictures_of_class = config.with_prior_preservation and config.prior_source == "images"
    concepts = [
        dataclasses.replace(
            concept,
            class_data_dir=(concept.class_data_dir or config.class_data_dir) if pictures_of_class else None,
            class_prompt=concept.class_prompt or config.class_prompt,
        )
        for concept in read_concepts(config.concepts_list)
    ]
    if config.with_prior_preservation:
        _check_classes(config, concepts)
    return concepts


def _check_classes(config: TrainingConfig, concepts: Sequence[Concept]) -> None:
    """Every subject needs a class prompt and, where pictures of it are drawn, a folder for these alone."""
    prompts: dict[Path, str] = {}
    needed = ["class_prompt"] if config.prior_source == "base" else ["class_prompt", "class_data_dir"]
    for number, concept in enumerate(concepts, 1):
        place = f"--concepts_list {config.concepts_list}, subject {number}"
        for name in needed:
            if not str(getattr(concept, name) or "").strip():
                raise UserError(f"{place}: --with_prior_preservation needs {name}")
        if concept.class_data_dir is None or concept.class_prompt is None:
            continue
        if prompts.setdefault(concept.class_data_dir.resolve(), concept.class_prompt) != concept.class_prompt:
            raise UserError(
                f"{place}: its class_data_dir is that of another subject with another class_prompt, so that pictures "
                "would mix; use another folder"
            )


def _check_folders(config: TrainingConfig, concepts: Sequence[Concept]) -> None:
    photos = {concept.instance_data_dir.resolve() for concept in concepts if concept.instance_data_dir is not None}
    classes = {concept.class_data_dir for concept in concepts if concept.class_data_dir is not None}
    for folder in classes:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--class_data_dir {folder} is no folder")
        if folder.resolve() == config.output_dir.resolve():
            raise UserError("--class_data_dir is the folder of --output_dir, so that pictures would mix; use another")
    encodings = [] if config.encoding_cache is None else [config.encoding_cache]
    written = {"class_data_dir": classes, "output_dir": [config.output_dir], "encoding_cache": encodings}
    for name, folders in written.items():
        if any(folder.resolve() in photos for folder in folders):
            raise UserError(f"--{name} is the folder of the photos, which would mix with what is written; use another")


def _photos(config: TrainingConfig, concept: Concept, subject: int) -> tuple[list[Picture], list[str]]:
    folder = concept.instance_data_dir
    assert folder is not None and concept.instance_prompt is not None  # `_concepts`
    found = scan_photos(folder)
    captions = read_captions(folder, found, config.caption_source)
    pictures = pictures_with_prompts(found, concept.instance_prompt, captions, subject)
    return pictures, folder_notes(folder, found, captions)


def folder_notes(folder: Path, found: PhotoFolder, captions: Captions) -> list[str]:
    """What a user should hear about a folder of photos: what is used, what is not, and which captions are missing."""
    notes = [f"photos: {len(found.photos)} in {folder}"]
    if broken := found.unusable_pictures:
        whole = len(found.photos) + len(broken)
        named = ", ".join(f"{file.path.name} ({file.reason})" for file in broken)
        notes.append(f"training sees only {len(found.photos)} of the {whole} pictures in {folder}; not usable: {named}")
    masks = {mask_file(photo) for photo in found.photos}
    known = captions.files | masks | {file.path for file in broken}
    if skipped := [file for file in found.skipped if file.path not in known]:
        notes.append("skipped: " + ", ".join(f"{file.path.name} ({file.reason})" for file in skipped))
    if not captions.files and (source := likely_caption_source(folder, found)):
        notes.append(
            "captions lie beside the photos, but every photo trains with the common prompt; --caption_source "
            f"{source} uses them"
        )
    without = [photo.name for photo in found.photos if photo.name not in captions.by_name]
    if captions.files and without:
        notes.append(f"without a caption, so that they train with the common prompt: {', '.join(without)}")
    return notes


def _masks(config: TrainingConfig, pictures: Sequence[Picture]) -> list[str]:
    """Notes on masks. Raises `UserError` if one is wrong, or none is there where they are asked for."""
    if not config.masked_loss:
        if unused := [mask_file(picture.path).name for picture in pictures if mask_file(picture.path).is_file()]:
            return [f"masks without effect: {', '.join(unused)}; use them with --masked_loss"]
        return []
    without = []
    for picture in pictures:
        try:
            mask = read_mask(picture.path, read_photo(picture.path))
        except UnusablePhoto as problem:
            raise UserError(f"{picture.path} can't be used any more: {problem}") from None
        if mask is None:
            without.append(picture.path.name)
    if len(without) == len(pictures):
        raise UserError(
            "--masked_loss finds no mask: put NAME.mask.png beside each photo, white where the subject is, or use "
            "photos with a transparent background"
        )
    return [f"without a mask, so that all of it is learned: {', '.join(without)}"] if without else []


def _class_folder(config: TrainingConfig, folder: Path) -> list[str]:
    """Notes on what is in a class folder. Raises `UserError` if a caption there is wrong."""
    given = given_class_pictures(folder)
    captions = read_captions(folder, given, config.caption_source, required=False)
    unused = PhotoFolder([], [file for file in given.skipped if file.path not in captions.files])
    notes = []
    if given.photos:
        notes.append(f"class images: {len(given.photos)} of unknown origin found in {folder}")
    if unused.skipped:
        notes.append(f"in the class folder, {unused.report()}")
    return notes


def _class_prompts(config: TrainingConfig, concept: Concept) -> list[str]:
    if not config.with_prior_preservation:
        return []
    if config.class_prompts_file is not None:
        return read_class_prompts(config.class_prompts_file)
    assert concept.class_prompt is not None  # `_check_prior`, `_check_classes`
    return [concept.class_prompt]
