"""Where adapters lie below a folder: files of their own, and those that trainings keep of their steps."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from svft_diffusion.files.training_folder import ADAPTER_FILE
from svft_diffusion.training.history import HISTORY_FOLDER

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STEP = re.compile(r"step-(\d+)\.safetensors")
_EARLIER = re.compile(r"earlier-\d+")  # what a run set aside of one before it


@dataclass(frozen=True)
class FoundFile:
    """A file that may be an adapter.

    Attributes:
        file: its path, in which no folder is a link.
        run: the output folder of the training that left it, if one did.
        step: of the training, for what is not its result.
    """

    file: Path
    run: Path | None = None
    step: int | None = None

    @property
    def label(self) -> str:
        """What a person would call it: the trainer gives all its files one name."""
        if self.run is not None:
            return self.run.name
        return self.file.parent.name if self.file.name == ADAPTER_FILE else self.file.stem


def files_below(folder: Path) -> list[FoundFile]:
    """Every file that may be an adapter, in the order of the paths; links to folders are not followed."""
    found = sorted(_walk(folder), key=lambda one: one.file.as_posix())
    runs = {one.run for one in found if one.step is not None}
    return [
        FoundFile(one.file, one.file.parent) if one.file.name == ADAPTER_FILE and one.file.parent in runs else one
        for one in found
    ]


def shown(found: list[FoundFile]) -> list[FoundFile]:
    """One file of each training, its result or else its last step, and all files of their own."""
    best: dict[Path, FoundFile] = {}
    for one in found:
        if one.run is not None and (one.run not in best or _progress(one) > _progress(best[one.run])):
            best[one.run] = one
    return [one for one in found if one.run is None or best[one.run] is one]


def parts_of(one: FoundFile) -> list[Path]:
    """What is to be moved to move an adapter: the file, or everything of a training that holds its adapters."""
    if one.run is None:
        return [one.file]
    folders = [path for path in sorted(one.run.iterdir()) if _holds_steps(path)]
    result = one.run / ADAPTER_FILE
    return [*([result] if os.path.lexists(result) else []), *folders]


def _walk(folder: Path) -> Iterator[FoundFile]:
    try:
        inside = sorted(os.scandir(folder), key=lambda one: one.name)
    except OSError:
        return  # gone, or not ours to read
    for one in inside:
        path = folder / one.name
        if one.name.startswith("."):
            continue
        if not one.is_dir(follow_symlinks=False):
            if one.name.lower().endswith(".safetensors") and not path.is_dir():
                yield FoundFile(path)
        elif one.name == HISTORY_FOLDER:
            yield from _steps(path)
        elif match := _CHECKPOINT.fullmatch(one.name):
            if os.path.lexists(path / ADAPTER_FILE):
                yield FoundFile(path / ADAPTER_FILE, folder, int(match[1]))
        elif not _EARLIER.fullmatch(one.name):
            yield from _walk(path)


def _steps(history: Path) -> Iterator[FoundFile]:
    try:
        names = os.listdir(history)
    except OSError:
        return
    for name in names:
        if match := _STEP.fullmatch(name):
            yield FoundFile(history / name, history.parent, int(match[1]))


def _holds_steps(path: Path) -> bool:
    return (path.name == HISTORY_FOLDER or _CHECKPOINT.fullmatch(path.name) is not None) and (
        path.is_dir() and not path.is_symlink()
    )


def _progress(one: FoundFile) -> tuple[bool, int, bool]:
    return one.step is None, one.step or 0, one.file.parent.name == HISTORY_FOLDER
