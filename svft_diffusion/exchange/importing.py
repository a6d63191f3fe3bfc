"""Importing adapters of other tools: the formats that are known, and the way from a file to a live adapter.

A new format is a module with a `Format` and a row in `FORMATS`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from svft_diffusion.adapters.fitting import check_free
from svft_diffusion.adapters.injection import refuse_fused
from svft_diffusion.adapters.installing import install_adapter
from svft_diffusion.adapters.names import usable_adapter_name
from svft_diffusion.errors import UserError
from svft_diffusion.exchange.conversion import PATTERNS, Conversion, ConvertedLayer, Format, ProjectionOptions
from svft_diffusion.exchange.foreign_file import ForeignFile, open_foreign
from svft_diffusion.exchange.import_labels import Labels, labels_of
from svft_diffusion.exchange.import_lora import LORA
from svft_diffusion.exchange.import_svdiff import SVDIFF
from svft_diffusion.exchange.import_svft import SVFT
from svft_diffusion.files import AdapterMetadata
from svft_diffusion.files.names import components_of
from svft_diffusion.models import family_of

FORMATS: tuple[Format, ...] = (SVDIFF, SVFT, LORA)

# Lines of the printed report; the JSON form has everything.
_LISTED = 8


@dataclass(frozen=True)
class ImportReport:
    """What was imported, and what became of it.

    Attributes:
        adapter: name of the adapter in the pipeline.
        source: the format that was read.
        files: names of the files.
        method, pattern, off_diagonals: what the adapter is, as in `SpectralConfig`.
        layers: one entry for each adapted layer.
        left_out: what the files hold and the adapter does not, with the reason.
        error: of all updates together, relative to their size; what was left out counts as lost.
        labels: what the files say of themselves.
        base_family: the kind of pipeline that they were imported to.
    """

    adapter: str
    source: str
    files: list[str]
    method: str
    pattern: str
    off_diagonals: int
    layers: list[ConvertedLayer]
    left_out: dict[str, str]
    error: float
    labels: Labels
    base_family: str = AdapterMetadata.base_family

    def lines(self) -> list[str]:
        """The report as text: totals, the layers with the largest errors, and what was left out."""
        pattern = f", {self.pattern} pattern" if self.method == "svft" else ""
        band = f" with {self.off_diagonals} off-diagonals" if self.pattern != "plain" else ""
        text = [
            f"read {self.source} from {', '.join(self.files)}",
            f"imported {len(self.layers)} layers as {self.method}{pattern}{band}",
            f"error {self.error:.2g} of the update's size",
        ]
        worst = sorted((layer for layer in self.layers if layer.error > 0), key=lambda layer: -layer.error)
        text += [f"  {layer.error:.2g}  {layer.layer}" for layer in worst[:_LISTED]]
        if self.left_out:
            text.append(f"left out: {len(self.left_out)}")
            text += [f"  {name}: {reason}" for name, reason in list(self.left_out.items())[:_LISTED]]
        said = {name: line for name, line in asdict(self.labels).items() if line}
        text += [f"the file says, {name}: {line}" for name, line in said.items()]
        return text

    def metadata(self, base_name: str) -> AdapterMetadata:
        """What the adapter's file says of itself, imported for the base ``base_name``."""
        return AdapterMetadata(
            base_name=base_name,
            base_family=self.base_family,
            title=self.labels.title,
            trigger=self.labels.trigger,
            description=self.labels.description,
            training={"imported_from": self.source, "import_error": self.error},
        )

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        layers = [{"layer": layer.layer, "size": layer.size, "error": layer.error} for layer in self.layers]
        return {**self.__dict__, "layers": layers, "labels": asdict(self.labels)}


def import_adapter(
    pipe: object,
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    name: str | None = None,
    *,
    pattern: str | None = None,
    off_diagonals: int | None = None,
) -> ImportReport:
    """Turn an adapter of another tool into one of ours; it is active at weight 1 beside those already active, frozen.

    The format is told by the names and shapes of the tensors: SVDiff of svdiff-pytorch and SVFT of its authors' code
    become the same adapter, a plain LoRA (kohya, diffusers, PEFT) the nearest one with a pattern. `save_adapter`
    writes the result.

    Args:
        pipe: a diffusers pipeline, or a mapping of component names to models: the base that the files belong to.
        files: one safetensors file, or several of one format for different components.
        name: what to call the adapter; the first file's name, made fit for a parameter, when left out.
        pattern: of a LoRA or SVFT, what to keep: ``plain``, ``banded``, or ``random``, which keeps the largest
            entries. Left out, ``random`` for a LoRA, and for SVFT what holds the update as it is.
        off_diagonals: with ``banded``, diagonals on each side of the main one; ``random`` keeps as many entries as
            that band has. Two when left out.

    Raises:
        UserError: a file is damaged, of no known format, an adapter of this product, or made for another base; the
            pipeline is as it was.
    """
    paths = [files] if isinstance(files, str | os.PathLike) else list(files)
    options = _checked_options(pattern, off_diagonals)
    source, opened = recognised(paths)
    if options != ProjectionOptions() and not source.projects:
        raise UserError(f"{opened[0].name} is {source.title}: it becomes method svdiff, which has no other pattern")
    components = components_of(pipe)
    name = usable_adapter_name(opened[0].path.stem) if name is None else name
    check_free(components, name)
    for model in components.values():
        refuse_fused(model, f"import {opened[0].name}")
    conversion = source.convert(opened, components, options)
    _check_finite(opened[0], conversion)
    install_adapter(components, name, conversion.options, conversion.tensors)
    fields = conversion.options
    return ImportReport(
        adapter=name,
        source=source.title,
        files=[file.name for file in opened],
        method=fields["method"],
        pattern=fields.get("pattern", "plain"),
        off_diagonals=fields.get("off_diagonals", 0),
        layers=conversion.layers,
        left_out=conversion.left_out,
        error=conversion.error,
        labels=labels_of(opened),
        base_family=_family_of(pipe),
    )


def recognised(paths: Sequence[str | os.PathLike[str]]) -> tuple[Format, list[ForeignFile]]:
    """The one format of all files, by their tables of contents.

    Raises:
        UserError: a file is damaged, of no known format or of another than the first, or an adapter of this product.
    """
    files = [open_foreign(path) for path in paths]
    if not files:
        raise UserError("there is no file to import")
    found = [_format_of(file) for file in files]
    for file, other in zip(files, found, strict=True):
        if other is not found[0]:
            raise UserError(f"{files[0].name} is {found[0].title}, {file.name} is {other.title}; import one by one")
    return found[0], files


def _family_of(pipe: object) -> str:
    """The name of a pipeline's family; of models alone, and of a pipeline that nothing trains, the usual one."""
    if isinstance(pipe, DiffusionPipeline):
        with suppress(UserError):
            return family_of(pipe).name
    return AdapterMetadata.base_family


def _checked_options(pattern: str | None, off_diagonals: int | None) -> ProjectionOptions:
    if pattern is not None and pattern not in PATTERNS:
        raise UserError(f"unknown pattern {pattern!r}; choose from {', '.join(PATTERNS)}")
    return ProjectionOptions(pattern, off_diagonals)


def _format_of(file: ForeignFile) -> Format:
    for known in FORMATS:
        if known.recognises(file):
            return known
    raise UserError(
        f"{file.path} is none of {', '.join(known.title for known in FORMATS)}: its {len(file.shapes)} tensors have "
        f"names such as {next(iter(file.shapes))!r}"
    )


def _check_finite(file: ForeignFile, conversion: Conversion) -> None:
    for tensor_name, tensor in conversion.tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{file.name}: {tensor_name} is too large for float32; the training went wrong")
