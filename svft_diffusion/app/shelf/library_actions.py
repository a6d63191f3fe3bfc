"""What a visitor does with an adapter of the library; the work is that of the commands of the same names."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypedDict

from svft_diffusion.adapters import load_adapter, save_adapter, unload_adapter
from svft_diffusion.app.context import AppContext
from svft_diffusion.app.serving.served import served_copy
from svft_diffusion.app.shelf.library import LibraryEntry
from svft_diffusion.app.shelf.uploads import called, shown_name, without_path
from svft_diffusion.errors import UserError
from svft_diffusion.exchange.export import Dtype, ExportedLora, Rank, check_arguments, export_lora
from svft_diffusion.exchange.importing import import_adapter, recognised
from svft_diffusion.exchange.lora_file import write_lora
from svft_diffusion.exchange.lora_keys import FORMATS, Format
from svft_diffusion.exchange.lora_metadata import described
from svft_diffusion.files import AdapterHeader
from svft_diffusion.files.container import read_bytes
from svft_diffusion.files.safe_names import safe_file_stem, safe_name
from svft_diffusion.inspection.card import adapter_card
from svft_diffusion.inspection.facts import facts_of_adapter
from svft_diffusion.inspection.verification import Verifier
from svft_diffusion.models.loading import base_display_name
from svft_diffusion.terminal import printable

AS_IT_IS = "adapter"
_NAME = "library"


@dataclass(frozen=True)
class ForeignOptions:
    """How adapters of other tools become ours, as `import_adapter` takes it.

    Attributes:
        pattern, off_diagonals: what of a LoRA is kept; None: the default.
        together: the files are one adapter, a file for each component.
    """

    pattern: str | None = None
    off_diagonals: int | None = None
    together: bool = False


def details(entry: LibraryEntry) -> str:
    """What `svft-diffusion inspect` prints.

    Raises:
        UserError: the file is gone or damaged.
    """
    with called(entry.name, entry.file):
        return "\n".join(adapter_card(facts_of_adapter(read_bytes(entry.file), entry.name)))


def verify(context: AppContext, entry: LibraryEntry, base: str) -> str:
    """What `svft-diffusion verify --base` prints, for the base that the app has loaded.

    Raises:
        UserError: the base can't be loaded.
    """
    with context.studio.with_adapters(base, ()) as pipeline:
        result = Verifier(base, pipeline=pipeline).verify(entry.file)
    return without_path(printable(str(replace(result, file=Path(entry.name)))), entry.name, entry.file)


def export(
    context: AppContext, entry: LibraryEntry, base: str, *, format: str, rank: str, strength: float, half: bool
) -> tuple[Path, str]:
    """Write the adapter as a LoRA, as `svft-diffusion export` does, or as it is, where the visitor can get it.

    Args:
        format: a format of the command, or `AS_IT_IS`.
        rank: a number, ``auto`` or ``full``.
        half: store the values in float16.

    Returns:
        The new file, and the report.

    Raises:
        UserError: the adapter, the base or the settings don't fit, or the file can't be written.
    """
    if format == AS_IT_IS:
        file = _to_download(safe_name(entry.name), lambda file: shutil.copyfile(entry.file, file))
        return file, f"{entry.size / 1000:.1f} kB, as it is"
    options = check_export(format, rank, strength, half=half)
    with called(entry.name, entry.file), context.studio.with_adapters(base, ()) as pipeline:
        load_adapter(pipeline, entry.file, _NAME, on_mismatch=context.studio.on_mismatch)
        try:
            exported = export_lora(pipeline, _NAME, strength=strength, **options)
        finally:
            unload_adapter(pipeline, _NAME)
    return write_export(exported, entry.header, safe_name(f"{entry.name}-{format}"), strength)


class ExportOptions(TypedDict):
    """What a visitor chooses of `export_lora`."""

    format: Format
    rank: Rank
    dtype: Dtype


def check_export(format: str, rank: str, strength: float, *, half: bool) -> ExportOptions:
    """A visitor's choice, checked before a base is loaded; see `export`.

    Raises:
        UserError: it is out of range.
    """
    chosen: Format = next((known for known in FORMATS if known == format), FORMATS[0])
    dtype: Dtype = "float16" if half else "float32"
    check_arguments(format, number := _rank(rank), strength, dtype)
    return {"format": chosen, "rank": number, "dtype": dtype}


def write_export(exported: ExportedLora, header: AdapterHeader, stem: str, strength: float) -> tuple[Path, str]:
    """Write a LoRA where the visitor can get it; see `export`.

    Args:
        header: of the adapter that it was.
    """
    file = _to_download(stem, lambda file: write_lora(exported, file, described=described(header, strength)))
    left_out = [
        f"left out: tokens that {component} learned ({', '.join(tokens)}): a LoRA has no place for new tokens"
        for component, tokens in sorted(header.tokens.items())
    ]
    lines = [*str(exported.report).splitlines(), *left_out, f"{file.name}, {file.stat().st_size / 1000:.1f} kB"]
    return file, "\n".join(map(printable, lines))


def _to_download(stem: str, write: Callable[[Path], object]) -> Path:
    """What ``write`` writes, under an address that nobody can guess who does not know the content."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"{stem}.safetensors"
        try:
            with called(file.name, file):
                write(file)
            return Path(served_copy(file))
        except OSError as problem:
            raise UserError(f"the file can't be written: {problem.strerror or problem}") from problem


def take_in(
    context: AppContext, uploads: Sequence[Path], base: str, options: ForeignOptions
) -> tuple[list[LibraryEntry], list[str]]:
    """Take uploaded files into the library: adapters as they are, pictures' adapters, and those of other tools as
    `svft-diffusion import` does, for the base model ``base``.

    Returns:
        What is in the library now, and a line for each file and finding. What can't be taken in has a line that says
        why, and keeps nothing else from being.
    """
    entries: list[LibraryEntry] = []
    lines: list[str] = []
    foreign: list[Path] = []
    for file in uploads:
        label = shown_name(file.name)
        try:
            if context.library.is_foreign(file, file.name):
                foreign.append(file)
                continue
            added = context.library.add_all(file, file.name)
        except UserError as problem:
            lines.append(f"not taken in: {problem}")
        else:
            entries += added
            lines.append(f"{label}: in the library as {', '.join(entry.name for entry in added)}")
    for group in [foreign] if options.together and foreign else [[file] for file in foreign]:
        try:
            entry, report = _convert(context, group, base, options)
        except UserError as problem:
            lines.append(f"not taken in: {problem}")
        else:
            entries.append(entry)
            lines += [f"{shown_name(group[0].name)}: in the library as {entry.name}", *report]
    return entries, [printable(line) for line in lines]


def _convert(
    context: AppContext, files: Sequence[Path], base: str, options: ForeignOptions
) -> tuple[LibraryEntry, list[str]]:
    try:
        recognised(files)  # before the base is loaded, which may take minutes
        with TemporaryDirectory() as folder, context.studio.with_adapters(base, ()) as pipeline:
            report = import_adapter(
                pipeline, files, _NAME, pattern=options.pattern, off_diagonals=options.off_diagonals
            )
            try:
                written = Path(folder) / "imported.safetensors"
                save_adapter(pipeline, _NAME, written, metadata=report.metadata(base_display_name(base)))
            finally:
                unload_adapter(pipeline, _NAME)
            return context.library.add(written, safe_file_stem(files[0].name)), report.lines()
    except UserError as problem:
        text = str(problem)
        for file in files:
            text = without_path(text, shown_name(file.name), file)
        raise UserError(text) from problem


def _rank(text: str) -> Rank:
    text = text.strip()
    if text == "auto" or text == "full":
        return "auto" if text == "auto" else "full"
    if not text.isascii() or not text.isdecimal() or len(text) > 6:
        raise UserError(f"the rank must be a whole number, auto or full, got {printable(text, 20)!r}")
    return int(text)
