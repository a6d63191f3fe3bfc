"""The sampler: every combination of prompts, adapters and settings with every seed, each picture on its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from svft_diffusion.adapters import load_adapter
from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.adapters.weights import AdapterWeight, layers_with_weights
from svft_diffusion.errors import UserError
from svft_diffusion.factors import use_cache
from svft_diffusion.files.whole_files import check_writable
from svft_diffusion.models.loading import default_resolution, resolve_base
from svft_diffusion.models.text import truncated_text
from svft_diffusion.models.vae import resolve_vae
from svft_diffusion.sampling.acting import acting_adapters
from svft_diffusion.sampling.adapter_choice import refuse_twice
from svft_diffusion.sampling.adapter_sets import AdapterSets, LoadedSets, check_sets, entries_of
from svft_diffusion.sampling.config import SamplingConfig
from svft_diffusion.sampling.default_size import stored_resolution
from svft_diffusion.sampling.devices import resolve_device
from svft_diffusion.sampling.drawing import (
    arguments_of_few,
    facts_of,
    generate,
    generate_batch,
    open_pipeline,
    words_not_read,
)
from svft_diffusion.sampling.embedding import adapters_to_embed, embedded_in_picture
from svft_diffusion.sampling.folder import finished_pictures
from svft_diffusion.sampling.numbered_folders import folder_of_run
from svft_diffusion.sampling.overview import write_overview
from svft_diffusion.sampling.picture_size import check_picture_size
from svft_diffusion.sampling.plan import (
    PlannedPicture,
    PlannedRow,
    check_config,
    plan_rows,
    read_prompt_rows,
)
from svft_diffusion.sampling.png import save_png
from svft_diffusion.sampling.prompt_files import unknown_placeholder_note, unknown_placeholders
from svft_diffusion.sampling.schedulers import check_steps, make_scheduler
from svft_diffusion.sampling.spreading import (
    Process,
    device_of,
    drawing,
    this_process,
    threads_of_torch,
    wait_for_others,
)
from svft_diffusion.terminal import printable

__all__ = ["SamplingConfig", "SamplingResult", "facts_of", "generate", "open_pipeline", "sample"]

DEFAULT_OUTPUT_PARENT = Path("outputs/samples")
_PAUSE_IN_FILES = 30.0  # seconds between lines on the progress that no terminal shows

_Batch = tuple[list[PlannedPicture], list[PlannedPicture]]  # all of its pictures, and those that are missing


@dataclass(frozen=True)
class SamplingResult:
    """What a run wrote."""

    output_dir: Path
    pictures: list[Path]
    made: int  # of the pictures, by this process; the others were there, or other processes made them
    grids: list[Path]  # none from processes other than the first
    index: Path | None
    embedded: dict[str, int]  # adapters that the pictures carry where they act, with their sizes in bytes
    blacked_out: list[Path]  # of the pictures, those that the base model's safety checker has hidden; as the grids

    @property
    def grid(self) -> Path:
        """The first of the grids."""
        return self.grids[0]


def sample(config: SamplingConfig, adapters: AdapterSets | None = None) -> SamplingResult:
    """Generate the pictures that ``config`` asks for, but those that are there already.

    Picture i of every combination has seed + i. Processes that ``accelerate launch`` started share the work; the first
    one writes grids and index when all are done.

    Args:
        adapters: with how they act, and sets of them to compare; those of ``config.adapter`` if None.

    Raises:
        UserError: settings, adapters or output folder that can't work, before anything is drawn.
    """
    check_config(config)
    process = this_process()
    use_cache(config.factor_cache, config.factor_cache_size)
    device = resolve_device(device_of(process, config.device))
    resolve_base(config.pretrained_model_name_or_path, config.base_config)
    own_size = stored_resolution(config.pretrained_model_name_or_path)
    check_picture_size(own_size, height=config.height, width=config.width)
    if config.pretrained_vae_model_name_or_path is not None:
        resolve_vae(config.pretrained_vae_model_name_or_path)
    prompts = read_prompt_rows(config)
    loaded = check_sets(
        adapters or AdapterSets(entries_of(config.adapter)),
        config.pretrained_model_name_or_path,
        variant=config.variant,
        on_mismatch=cast(OnMismatch, config.on_mismatch),
    )
    embedded = adapters_to_embed(list(loaded.adapters.values()), config.embed_adapter)
    refuse_twice(loaded.adapters.values())
    rows = plan_rows(config, prompts, loaded)
    if process.is_first:
        for word in dict.fromkeys(word for row in prompts for word in unknown_placeholders(row.prompt)):
            tqdm.write(printable(unknown_placeholder_note(word)))
    _check_output_dir(config, process)
    with folder_of_run(config.output_dir, DEFAULT_OUTPUT_PARENT) as output_dir:
        finished = _finished(output_dir, rows, config, config.width, config.height)
        check_writable(output_dir)
        made = 0
        if not _is_all_there(finished, rows, config):
            with threads_of_torch(config.threads):
                made = _draw_missing(config, rows, loaded, output_dir, embedded, device, process)
        overview = write_overview(output_dir, rows) if process.is_first else None
    return SamplingResult(
        output_dir,
        [output_dir / picture.file_name for row in rows for picture in row.pictures],
        made,
        overview.grids if overview else [],
        overview.page if overview else None,
        embedded={name: len(content) for name, content in embedded.items()},
        blacked_out=overview.blacked_out if overview else [],
    )


def _finished(
    output_dir: Path, rows: Sequence[PlannedRow], config: SamplingConfig, width: int | None, height: int | None
) -> dict[str, tuple[int, int]]:
    """See `finished_pictures`."""
    return finished_pictures(
        output_dir,
        rows,
        width=width,
        height=height,
        overwrite=config.overwrite,
        disable_safety_checker=config.disable_safety_checker,
    )


def _is_all_there(finished: Mapping[str, tuple[int, int]], rows: Sequence[PlannedRow], config: SamplingConfig) -> bool:
    """Whether there is surely nothing to draw; if the size is not given, only a base model in a folder tells it."""
    resolution = stored_resolution(config.pretrained_model_name_or_path)
    size = (config.width or resolution, config.height or resolution)
    return len(finished) == sum(len(row.pictures) for row in rows) and all(found == size for found in finished.values())


def _draw_missing(
    config: SamplingConfig,
    rows: Sequence[PlannedRow],
    loaded: LoadedSets,
    output_dir: Path,
    embedded: Mapping[str, bytes],
    device: torch.device,
    process: Process,
) -> int:
    """Draw this process's share; the first one then what the others have left. The number of pictures made."""
    with drawing(output_dir, process):
        work = _Work(_open_base(config, device), config, rows, output_dir, embedded)
        finished = work.finished()
        work.load(loaded, notes=process.is_first)
        made = work.draw(finished, process)
    if process.is_first and process.count > 1:
        wait_for_others(output_dir, process)
        made += work.draw(work.finished(), Process())  # what a process that was ended has left
    return made


def _open_base(config: SamplingConfig, device: torch.device) -> DiffusionPipeline:
    """The base model of a run. Raises `UserError` if it can't be loaded."""
    return open_pipeline(
        config.pretrained_model_name_or_path,
        device=device,
        dtype=config.dtype,
        revision=config.revision,
        variant=config.variant,
        base_config=config.base_config,
        vae=config.pretrained_vae_model_name_or_path,
        local_files_only=config.local_files_only,
        disable_safety_checker=config.disable_safety_checker,
    )


def _check_output_dir(config: SamplingConfig, process: Process) -> None:
    if config.output_dir is None and process.count > 1:
        raise UserError("several processes write to one folder: give --output_dir")


class _Work:
    """The pictures of a run and what draws them."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        config: SamplingConfig,
        rows: Sequence[PlannedRow],
        output_dir: Path,
        embedded: Mapping[str, bytes],
    ) -> None:
        self._pipeline = pipeline
        self._config = config
        self._rows = rows
        self._output_dir = output_dir
        self._embedded = embedded
        resolution = default_resolution(pipeline)
        check_picture_size(resolution, height=config.height, width=config.width)
        self._height, self._width = config.height or resolution, config.width or resolution
        self._schedulers = {name: make_scheduler(pipeline, name) for name in {row.scheduler for row in rows}}
        for row in rows:
            check_steps(self._schedulers[row.scheduler], row.num_inference_steps)

    def finished(self) -> set[str]:
        """Names of the pictures that need not be made; see `finished_pictures`."""
        return {*_finished(self._output_dir, self._rows, self._config, self._width, self._height)}

    def load(self, loaded: LoadedSets, *, notes: bool) -> None:
        """Load the adapters, and check what only the model can tell; with ``notes`` on prompts that are too long.

        Raises:
            UserError: an adapter that doesn't fit, a weight of a component or block that it doesn't have, or a negative
                prompt for a model that takes none.
        """
        for adapter in loaded.adapters.values():
            on_mismatch = cast(OnMismatch, self._config.on_mismatch)
            load_adapter(self._pipeline, adapter.file, adapter.name, on_mismatch=on_mismatch)
        for weights in _distinct([{name: use.weight for name, use in row.uses.items()} for row in self._rows]):
            layers_with_weights(self._pipeline, weights)
        for negative_prompt in {row.negative_prompt for row in self._rows}:
            arguments_of_few(self._pipeline, negative_prompt)
        for prompt in dict.fromkeys(row.prompt for row in self._rows) if notes else ():
            if lost := truncated_text(self._pipeline, prompt):
                tqdm.write(f"the text encoder does not read the end of a prompt: {printable(repr(lost), 200)}")

    def draw(self, finished: set[str], process: Process) -> int:
        """Draw the share of ``process`` in what is not ``finished``; the number of pictures made."""
        shares = list(self._share(finished, process))
        made = 0
        total = sum(len(missing) for _, batches in shares for _, missing in batches)
        delay, pause = (0, 0.1) if sys.stderr.isatty() else (_PAUSE_IN_FILES, _PAUSE_IN_FILES)
        with tqdm(
            total=total, desc="drawing", unit="picture", mininterval=pause, delay=delay,
            disable=not process.is_first or not total,
        ) as progress:  # fmt: skip
            for row, batches in shares:
                self._pipeline.scheduler = self._schedulers[row.scheduler]
                with acting_adapters(self._pipeline, row.uses):
                    for batch, missing in batches:
                        self._draw_batch(row, batch, missing)
                        made += len(missing)
                        progress.update(len(missing))
        return made

    def _share(self, finished: set[str], process: Process) -> Iterator[tuple[PlannedRow, list[_Batch]]]:
        """The batches of a process with their missing pictures. A batch is drawn whole, as its pixels depend on it."""
        number = 0
        for row in self._rows:
            batches: list[_Batch] = []
            for start in range(0, len(row.pictures), self._config.batch_size):
                batch = row.pictures[start : start + self._config.batch_size]
                missing = [picture for picture in batch if picture.file_name not in finished]
                if missing and number % process.count == process.index:
                    batches.append((batch, missing))
                number += 1
            if batches:
                yield row, batches

    def _draw_batch(self, row: PlannedRow, batch: list[PlannedPicture], missing: list[PlannedPicture]) -> None:
        drawn = generate_batch(
            self._pipeline,
            row.prompt,
            seeds=[picture.seed for picture in batch],
            num_inference_steps=row.num_inference_steps,
            guidance_scale=row.guidance_scale,
            negative_prompt=row.negative_prompt,
            height=self._height,
            width=self._width,
        )
        carried = embedded_in_picture(self._embedded, {name: use.weight for name, use in row.uses.items()})
        facts = words_not_read(self._pipeline, row.prompt)
        for picture, (image, blacked_out) in zip(batch, drawn, strict=True):
            if picture in missing:
                settings = picture.settings | facts | facts_of(self._pipeline, image)
                settings |= {"blacked_out": True} if blacked_out else {}
                save_png(image, self._output_dir / picture.file_name, settings, carried)


def _distinct(weights: Sequence[dict[str, AdapterWeight]]) -> list[dict[str, AdapterWeight]]:
    return list({json.dumps(of_row): of_row for of_row in weights}.values())
