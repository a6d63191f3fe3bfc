"""What a PNG picture tells: how it was made, and the adapters that it carries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svft_diffusion.errors import UserError
from svft_diffusion.files.carrier import adapters_in_png, settings_in_png
from svft_diffusion.files.safe_names import safe_name
from svft_diffusion.files.whole_files import check_output_file, replace_when_whole
from svft_diffusion.inspection.facts import AdapterFacts, facts_of_adapter


@dataclass(frozen=True)
class PictureAdapter:
    """An adapter that a picture carries."""

    name: str  # one that a file can have
    weight: float | None  # at which it acted, where the picture says so
    content: bytes  # of its file
    facts: AdapterFacts


@dataclass(frozen=True)
class PictureFacts:
    """What `facts_of_picture` finds."""

    file: Path
    settings: dict[str, Any] | None  # None: it has none of this product, but carries an adapter
    adapters: list[PictureAdapter]


def facts_of_picture(data: bytes, file: Path) -> PictureFacts:
    """The settings of a picture and the adapters in it, all checked; ``data`` is the content of ``file``.

    Raises:
        UserError: a damaged picture or adapter, or a picture with neither settings nor adapters of this product.
    """
    carried = adapters_in_png(data, str(file))
    settings = settings_in_png(data, str(file)) or None
    if settings is None and not carried:
        raise UserError(f"{file} is a picture with neither settings nor adapters of svft_diffusion")
    names = _file_names(adapter.name or adapter.sha256[:8] for adapter in carried)
    return PictureFacts(
        file,
        settings,
        [
            PictureAdapter(
                name, adapter.weight, adapter.content, facts_of_adapter(adapter.content, f"{name} in {file}")
            )
            for adapter, name in zip(carried, names, strict=True)
        ],
    )


def extract(picture: PictureFacts, folder: Path, *, overwrite: bool) -> Sequence[Path]:
    """Write every adapter of a picture to ``folder`` as ``NAME.safetensors``.

    Raises:
        UserError: there is none, a file is there already, or can't be written.
    """
    if not picture.adapters:
        raise UserError(f"{picture.file} is a picture that carries no adapter")
    targets = [folder / f"{adapter.name}.safetensors" for adapter in picture.adapters]
    for target in targets:
        check_output_file(target, overwrite=overwrite)
    for adapter, target in zip(picture.adapters, targets, strict=True):
        with replace_when_whole(target) as unfinished:
            unfinished.write_bytes(adapter.content)
    return targets


def _file_names(labels: Iterable[str]) -> list[str]:
    """``labels``, which come from a picture, as names of files in one folder on any system."""
    names: list[str] = []
    for label in labels:
        plain = safe_name(label)
        name, number = plain, 2
        while name.casefold() in {other.casefold() for other in names}:
            name, number = f"{plain}-{number}", number + 1
        names.append(name)
    return names
