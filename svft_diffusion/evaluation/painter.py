"""Draws the planned pictures that are missing, with one base model for all adapters; processes share the work."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from svft_diffusion.adapters import load_adapter, set_adapters, unload_adapter
from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.config import EvaluationConfig
from svft_diffusion.evaluation.drawing import NAME_THE_BASE, PlannedPicture, check_others, is_blacked_out, is_made
from svft_diffusion.models.loading import default_resolution
from svft_diffusion.sampling.adapter_choice import CheckedAdapter
from svft_diffusion.sampling.drawing import facts_of, generate_batch, open_pipeline
from svft_diffusion.sampling.picture_size import check_picture_size
from svft_diffusion.sampling.png import save_png
from svft_diffusion.sampling.spreading import Process


@dataclass(frozen=True)
class PlannedSet:
    """The pictures by one adapter, or by none: the base model's."""

    label: str
    step: int | None
    adapter: CheckedAdapter | None
    of_subject: list[PlannedPicture]  # none of a base model that only serves to measure drift
    of_class: list[PlannedPicture]

    @property
    def pictures(self) -> list[PlannedPicture]:
        """All of them."""
        return [*self.of_subject, *self.of_class]


class Painter:
    """Draws with a base model that is loaded when it is needed first."""

    def __init__(self, base: str, config: EvaluationConfig, device: torch.device) -> None:
        self._base, self._config, self._device = base, config, device
        self._pipeline: DiffusionPipeline | None = None

    def draw(self, sets: Sequence[PlannedSet], process: Process, *, of_size_unknown: bool = False) -> None:
        """Draw the share of ``process`` in the pictures that are not there.

        Args:
            of_size_unknown: pictures that are there may have been drawn at another size than the base model's own.

        Raises:
            UserError: the base model can't be loaded, an adapter does not fit it, a file can't be written, or, unless
                ``overwrite`` is set, one is another picture.
        """
        planned = [picture for one in sets for picture in one.pictures]
        sizes = self._sizes() if of_size_unknown and any(picture.file.exists() for picture in planned) else {}
        if not self._config.overwrite:
            check_others(planned, sizes)
        shares = list(_shares(sets, sizes, process, hidden_too=self._config.disable_safety_checker))
        total = sum(len(missing) for _, missing in shares)
        if not total:
            return
        if process.is_first:
            steps = self._config.num_inference_steps
            among = "" if process.count == 1 else f" by this one of {process.count} processes"
            there = f"; {len(planned) - total} more are there" if process.count == 1 and total < len(planned) else ""
            tqdm.write(f"{total} pictures to draw{among}, {steps} steps each{there}", file=sys.stderr)
        with tqdm(total=total, unit="picture", disable=not process.is_first) as progress:
            for one, missing in shares:
                progress.set_description(one.label)
                self._draw_set(one.adapter, missing, progress)

    def _draw_set(
        self, adapter: CheckedAdapter | None, missing: Sequence[PlannedPicture], progress: tqdm[None]
    ) -> None:
        config, sizes = self._config, self._sizes()
        with self._acting(adapter) as pipeline:
            for picture in missing:
                [(image, blacked_out)] = generate_batch(
                    pipeline,
                    picture.prompt,
                    seeds=[picture.seed],
                    num_inference_steps=config.num_inference_steps,
                    guidance_scale=picture.settings["guidance_scale"],
                    height=sizes["height"],
                    width=sizes["width"],
                )
                settings = picture.settings | facts_of(pipeline, image) | ({"blacked_out": True} if blacked_out else {})
                save_png(image, picture.file, settings)
                progress.update()

    @contextmanager
    def _acting(self, adapter: CheckedAdapter | None) -> Iterator[DiffusionPipeline]:
        """The base model, with the adapter at its weight while within."""
        pipeline = self._opened()
        if adapter is None:
            yield pipeline
            return
        load_adapter(pipeline, adapter.file, adapter.name, on_mismatch=cast(OnMismatch, self._config.on_mismatch))
        try:
            set_adapters(pipeline, {adapter.name: adapter.weight})
            yield pipeline
        finally:
            unload_adapter(pipeline, adapter.name)

    def _sizes(self) -> dict[str, int]:
        """Height and width in pixels."""
        resolution = default_resolution(self._opened())
        check_picture_size(resolution, height=self._config.height, width=self._config.width)
        return {"height": self._config.height or resolution, "width": self._config.width or resolution}

    def _opened(self) -> DiffusionPipeline:
        if self._pipeline is None:
            config = self._config
            try:
                self._pipeline = open_pipeline(
                    self._base,
                    device=self._device,
                    dtype=config.dtype,
                    revision=config.revision,
                    variant=config.variant,
                    base_config=config.base_config,
                    disable_safety_checker=config.disable_safety_checker,
                )
            except UserError as problem:
                if config.pretrained_model_name_or_path is not None:
                    raise
                raise UserError(f"{problem}; {NAME_THE_BASE}") from problem
        return self._pipeline


def _shares(
    sets: Sequence[PlannedSet], sizes: dict[str, int], process: Process, *, hidden_too: bool
) -> Iterator[tuple[PlannedSet, list[PlannedPicture]]]:
    """Of every set, the missing pictures that fall to ``process``: every n-th of all, whatever is there.

    Args:
        hidden_too: pictures that a safety checker has blacked out are missing too.
    """
    number = 0
    for one in sets:
        missing = []
        for picture in one.pictures:
            is_there = is_made(picture, sizes) and not (hidden_too and is_blacked_out(picture))
            if number % process.count == process.index and not is_there:
                missing.append(picture)
            number += 1
        if missing:
            yield one, missing
