"""Is an adapter file sound, is a base the one it was trained on, and does it do there what it did in training?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from svft_diffusion.adapters import load_adapter, unload_adapter
from svft_diffusion.adapters.alignment import UpdateError, layers_by_name, measured_error, stored_bases
from svft_diffusion.errors import UserError
from svft_diffusion.files import (
    AdapterHeader,
    Matches,
    adapter_from_bytes,
    check_base,
    layer_names,
    matches_of_folder,
    matches_of_pipeline,
)
from svft_diffusion.files.carrier import file_of_adapter
from svft_diffusion.files.names import components_of
from svft_diffusion.models.loading import base_display_name, load_pipeline, resolve_base

_NAME = "verified"


@dataclass(frozen=True)
class Verification:
    """What is known of one file.

    Attributes:
        file: as it was given.
        problem: why it is not sound, or not for the base; None where all is well.
        layers, values: how many there are; 0 where it could not be read.
        base: name of the base that it was compared with, if any.
        matches: how many of the base's weights are those of the training.
        error: how far the update on the base is from the trained one.
    """

    file: Path
    problem: str | None
    layers: int = 0
    values: int = 0
    base: str | None = None
    matches: Matches | None = None
    error: UpdateError | None = None

    def __str__(self) -> str:
        if self.problem is not None:
            return f"{self.file}: failed: {self.problem}"
        text = (
            f"{self.file}: whole, unchanged since it was written, {self.values:,} finite values in {self.layers} layers"
        )
        if self.matches is not None:
            rounded = f" ({self.matches.rounded} only when rounded to 16 bit)" if self.matches.rounded else ""
            text += f"; {self.base}: {self.matches}{rounded}"
        if self.error is not None:
            text += f"; the update differs from the trained one by {self.error.total:.2g} of its size"
        return text

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return {
            "file": str(self.file),
            "ok": self.problem is None,
            "problem": self.problem,
            "layers": self.layers,
            "values": self.values,
            "base": self.base,
            "weights": None if self.matches is None else self.matches._asdict(),
            "update_error": None if self.error is None else self.error._asdict(),
        }


class Verifier:
    """Verifies files one after the other; the base is loaded once, when the first file needs it."""

    def __init__(
        self,
        base: str | None = None,
        *,
        revision: str | None = None,
        variant: str | None = None,
        base_config: Path | None = None,
        pipeline: DiffusionPipeline | None = None,
    ) -> None:
        """
        Args:
            base: what to compare with; None: files alone are verified.
            revision, variant, base_config: of the base, as `load_pipeline` takes them.
            pipeline: the base, where it is loaded already; it is left as it was.
        """
        self._base = base
        self._base_config = base_config
        self._revision = revision
        self._variant = variant
        self._pipeline: DiffusionPipeline | None = pipeline

    def verify(self, file: Path) -> Verification:
        """What is known of one file. Whatever is wrong with it, or with the base, is told and not raised."""
        try:
            header, tensors = adapter_from_bytes(file_of_adapter(file), str(file))
        except UserError as problem:
            return Verification(file, str(problem))
        layers = layer_names(tensors)
        values = sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
        sound = Verification(file, None, len(layers), values)
        return sound if self._base is None else self._on_base(sound, header, tensors, self._base)

    def _on_base(
        self, sound: Verification, header: AdapterHeader, tensors: Mapping[str, Tensor], base: str
    ) -> Verification:
        compared = replace(sound, base=base_display_name(base))
        folder = Path(resolve_base(base))
        try:
            # The weights can be compared without making a model of them; one of others need not be loaded.
            matches = matches_of_folder(folder, layer_names(tensors), header.base.digests, self._variant)
            if matches is None:
                matches = matches_of_pipeline(self._loaded(base), layer_names(tensors), header.base.digests)
            compared = replace(compared, matches=matches)
            check_base(header, matches, base_display_name(base), adapter=sound.file.name)
            return replace(compared, error=_error_on(self._loaded(base), sound.file, tensors))
        except UserError as problem:
            return replace(compared, problem=str(problem))

    def _loaded(self, base: str) -> DiffusionPipeline:
        if self._pipeline is None:
            self._pipeline = load_pipeline(
                base, revision=self._revision, variant=self._variant, base_config=self._base_config
            )
        return self._pipeline


def _error_on(pipeline: DiffusionPipeline, file: Path, tensors: Mapping[str, Tensor]) -> UpdateError:
    """How far the update of an adapter on a base is from the trained one.

    Raises:
        UserError: it can't be loaded there; the base is as it was, as it is afterwards.
    """
    load_adapter(pipeline, file, _NAME)
    try:
        return measured_error(layers_by_name(components_of(pipeline), _NAME), _NAME, stored_bases(tensors))
    finally:
        unload_adapter(pipeline, _NAME)
