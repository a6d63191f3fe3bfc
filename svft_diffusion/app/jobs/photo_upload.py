"""Photos that a visitor has dropped on the page: put into one folder, looked at, and given their captions."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from svft_diffusion.data.contact_sheet import contact_sheet
from svft_diffusion.data.cutting import Cutter
from svft_diffusion.data.photo_check import MOST_PHOTOS, check_folder
from svft_diffusion.data.photos import UnusablePhoto, upright_size
from svft_diffusion.errors import UserError

_CAPTION_SUFFIX = ".txt"
_LONGEST_CAPTION = 500
_LONGEST_STEM = 60


@dataclass(frozen=True)
class PhotoLook:
    """What can be said of photos before training."""

    sheet: Image.Image  # the pixels that training will see
    captions: dict[str, str]  # of every usable photo, empty where there is none
    notes: list[str]


def gather(files: Sequence[str | Path], folder: Path, *, most_pixels: int) -> list[str]:
    """Copy uploaded photos, and captions in text files of the same names, into an empty folder.

    Returns:
        Notes on photos that were left out for their size.

    Raises:
        UserError: too many, or none is left.
    """
    paths = [Path(file) for file in files]
    photos = [path for path in paths if path.suffix.lower() != _CAPTION_SUFFIX]
    if not photos:
        raise UserError("add the photos first: three to six of the subject, in different surroundings")
    if len(photos) > MOST_PHOTOS:
        raise UserError(f"{len(photos)} photos are too many; choose at most {MOST_PHOTOS}")
    captions = {path.stem: path for path in paths if path.suffix.lower() == _CAPTION_SUFFIX}
    notes: list[str] = []
    taken: set[str] = set()  # of a photo and its mask, two names
    for photo in photos:
        if (pixels := _pixels(photo)) > most_pixels:
            notes.append(f"skipped {photo.name}: {pixels:,} pixels are too many, {most_pixels:,} are allowed")
            continue
        # Of two photos with one name, such as IMG_1.jpg of two cameras, both are used.
        stem = next(stem for stem in _stems(photo.stem) if stem.casefold() not in taken)
        taken.add(stem.casefold())
        shutil.copyfile(photo, folder / f"{stem}{photo.suffix}")
        if photo.stem in captions:
            shutil.copyfile(captions[photo.stem], folder / f"{stem}{_CAPTION_SUFFIX}")
    if not taken:
        raise UserError(f"no photo can be used: {'; '.join(notes)}")
    return notes


def look_at(folder: Path, resolution: int) -> PhotoLook:
    """What `svft-diffusion check-photos` says of a folder that `gather` has filled.

    Raises:
        UserError: no photo in it can be used.
    """
    cutter = Cutter(((resolution, resolution),), False, "lanczos", 0, False, False)
    try:
        report = check_folder(folder, cutter)
    except UserError as error:
        raise UserError(str(error).replace(f" in {folder}", "")) from None
    skipped = [f"skipped {file.path.name}: {file.reason}" for file in report.skipped if file.is_picture]
    captions = captions_of(picture.path for picture in report.pictures)
    return PhotoLook(contact_sheet(report.pictures, cutter, all_variants=False), captions, skipped + report.notes)


def captions_of(photos: Iterable[Path]) -> dict[str, str]:
    """By the names of photos, the captions in the text files beside them; empty where there is none."""
    return {photo.name: _caption_of(photo) for photo in photos}


def write_captions(folder: Path, captions: Mapping[str, str], instance_prompt: str, trigger: str) -> None:
    """Put the captions beside the photos in ``folder``, in place of those that came with them.

    A caption with the trigger word is the whole prompt; another one, such as "on the grass", says what else is in the
    photo. Names of no photo are passed over.

    Raises:
        UserError: a caption is too long.
    """
    for photo in list(folder.iterdir()):
        if photo.suffix.lower() == _CAPTION_SUFFIX:
            continue
        text = " ".join(captions.get(photo.name, "").split())
        if len(text) > _LONGEST_CAPTION:
            raise UserError(f"the caption of {photo.name} is too long: {_LONGEST_CAPTION} characters at most")
        sidecar = photo.with_suffix(_CAPTION_SUFFIX)
        sidecar.unlink(missing_ok=True)
        if text:
            whole = trigger.casefold() in text.casefold().split()
            sidecar.write_text(text if whole else f"{instance_prompt} {text}", encoding="utf-8")


def _pixels(photo: Path) -> int:
    """From the header; 0 where it can't be read, which the check of the photos tells of."""
    try:
        height, width = upright_size(photo)
    except UnusablePhoto:
        return 0
    return height * width


def _stems(stem: str) -> list[str]:
    short = stem[:_LONGEST_STEM].strip() or "photo"
    return [short, *(f"{short}-{number}" for number in range(2, MOST_PHOTOS + 2))]


def _caption_of(photo: Path) -> str:
    try:
        text = photo.with_suffix(_CAPTION_SUFFIX).read_text(encoding="utf-8-sig")
        return " ".join(text.split())[: _LONGEST_CAPTION + 1]  # which is refused as too long
    except (OSError, UnicodeDecodeError):
        return ""
