"""One picture edited: an adapter trained on it where asked for, and a picture for every strength of the adapters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from svft_diffusion.adapters import load_adapter
from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.editing.config import EditConfig, check_edit
from svft_diffusion.editing.drawing import Editor, drawing_pipeline
from svft_diffusion.editing.fine_tuning import ADAPTERS_FOLDER, picture_adapter, training_settings
from svft_diffusion.editing.frame import (
    Frame,
    check_mask_inside,
    make_frame,
    open_mask,
    open_picture,
    picture_digest,
)
from svft_diffusion.errors import UserError
from svft_diffusion.factors import use_cache
from svft_diffusion.files import read_header
from svft_diffusion.files.whole_files import check_new_file, check_writable
from svft_diffusion.models import family_of
from svft_diffusion.models.loading import default_resolution, resolve_base
from svft_diffusion.models.text import truncated_text
from svft_diffusion.sampling.acting import acting_adapters
from svft_diffusion.sampling.adapter_choice import CheckedAdapter, refuse_twice, sha256_of, unique_names
from svft_diffusion.sampling.adapter_sets import AdapterSets, check_sets, entries_of, scaled, uses_in_prompt
from svft_diffusion.sampling.adapter_use import AdapterUse
from svft_diffusion.sampling.default_size import stored_resolution
from svft_diffusion.sampling.devices import resolve_device
from svft_diffusion.sampling.embedding import adapters_to_embed, embedded_in_picture
from svft_diffusion.sampling.grid import labelled_grid
from svft_diffusion.sampling.picture_size import check_picture_size
from svft_diffusion.sampling.plan import picture_settings, slug
from svft_diffusion.sampling.png import save_png
from svft_diffusion.sampling.prompt_syntax import split_prompt
from svft_diffusion.terminal import printable
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.many.shared_base import SharedBase
from svft_diffusion.training.trainer import StepReport

DEFAULT_FOLDER = Path("outputs/edits")
_OWN_ADAPTER = "picture"  # what it is called inside of the result, which does not tell the name of the source


@dataclass(frozen=True)
class EditResult:
    """What an edit wrote."""

    pictures: dict[float, Path]  # by the adapters' strength
    grid: Path | None  # the source and all pictures, where there are several
    adapter: Path | None  # that of the picture; None without a source prompt
    adapter_reused: bool  # it was trained by an earlier edit
    blacked_out: list[Path]  # of the pictures, those that the base model's safety checker has hidden


def edit_picture(
    photo: str | Path,
    config: EditConfig,
    training: Mapping[str, Any] | None = None,
    *,
    on_training_step: Callable[[StepReport], None] | None = None,
) -> EditResult:
    """Edit a picture as ``config`` says.

    Args:
        training: settings of `TrainingConfig` for the adapter of the picture, those of
            `svft_diffusion.editing.config.TRAINING_SETTINGS`.
        on_training_step: called after every step of training.

    Raises:
        UserError: settings or files that can't work, before the base model is loaded; a base that can't do it, before
            anything is trained.
        Interrupted: training was stopped; the same edit goes on with it.
    """
    photo = Path(photo)
    with _reserved(photo, config, _checked(photo, config, dict(training or {}))) as inputs:
        return _edited(photo, inputs, on_training_step)


def _edited(photo: Path, inputs: _Inputs, on_training_step: Callable[[StepReport], None] | None) -> EditResult:
    """`edit_picture` of what was checked."""
    config = inputs.config
    base = _Base(config, resolve_device(config.device))
    pipeline = base.open()
    drawing_pipeline(pipeline, config)  # so that a base that can't do it is refused before it trains
    frame = make_frame(inputs.picture.size, _drawn_size(pipeline, config), config.fit)
    if inputs.mask is not None:
        check_mask_inside(inputs.mask, frame)
    for text in (config.prompt, config.source_prompt):
        if text is not None and (lost := truncated_text(pipeline, text)):
            tqdm.write(printable(f"the text encoder does not read the end of a prompt: {lost!r}"))

    adapters, uses, own = dict(inputs.adapters), dict(inputs.uses), None
    if inputs.training is not None:
        own = picture_adapter(
            pipeline,
            inputs.picture,
            frame,
            inputs.training,
            inputs.files.folder / ADAPTERS_FOLDER,
            label=photo.stem,
            load=base.lend,
            on_step=on_training_step,
        )
        if not own.reused:
            pipeline = base.open()
        name = unique_names([*adapters, _OWN_ADAPTER])[-1]
        adapters[name] = CheckedAdapter(name, own.file, 1.0, sha256_of(own.file), read_header(own.file))
        uses[name] = AdapterUse()
        refuse_twice(adapters.values())
    _make_ready(pipeline, config, adapters)

    work = _Work(config, inputs.picture, inputs.mask, frame, adapters, uses, None if own is None else own.file)
    pictures, blacked_out = work.draw(pipeline, inputs.files.pictures)
    grid = work.save_grid(inputs.files.grid, pictures) if inputs.files.grid is not None else None
    return EditResult(pictures, grid, None if own is None else own.file, own is not None and own.reused, blacked_out)


@dataclass(frozen=True)
class _Inputs:
    """What an edit works on, looked at before the base model is loaded."""

    config: EditConfig  # its prompt without tags
    picture: Image.Image
    mask: Image.Image | None
    training: TrainingConfig | None
    adapters: Mapping[str, CheckedAdapter]
    uses: Mapping[str, AdapterUse]
    files: _Files


def _checked(photo: Path, config: EditConfig, training: Mapping[str, Any]) -> _Inputs:
    """Look at settings and files. Raises `UserError` if they can't work."""
    check_edit(config)
    if training and config.source_prompt is None:
        raise UserError(f"--{next(iter(training))} has no effect without --source_prompt, which trains an adapter")
    run = training_settings(config, training) if config.source_prompt is not None else None
    picture = open_picture(photo)
    mask = None if config.mask is None else open_mask(config.mask, picture.size)
    files = _output_files(photo, config)
    use_cache(config.factor_cache, config.factor_cache_size)
    resolve_device(config.device)
    resolve_base(config.pretrained_model_name_or_path, config.base_config)
    own_size = stored_resolution(config.pretrained_model_name_or_path)
    check_picture_size(own_size, height=config.height, width=config.width)
    given = check_sets(
        AdapterSets(entries_of(config.adapter)),
        config.pretrained_model_name_or_path,
        variant=config.variant,
        on_mismatch=cast(OnMismatch, config.on_mismatch),
    )
    refuse_twice(given.adapters.values())
    prompt, tags = split_prompt(config.prompt or "")
    uses = uses_in_prompt(given.sets[""], tags, given, prompt)
    config = replace(config, prompt=prompt)
    check_edit(config)  # of tags alone, nothing is left
    return _Inputs(config, picture, mask, run, given.adapters, uses, files)


def _make_ready(pipeline: DiffusionPipeline, config: EditConfig, adapters: Mapping[str, CheckedAdapter]) -> None:
    if config.disable_safety_checker and getattr(pipeline, "safety_checker", None) is not None:
        pipeline.register_modules(safety_checker=None)
        pipeline.register_to_config(requires_safety_checker=False)
    for adapter in adapters.values():
        load_adapter(pipeline, adapter.file, adapter.name, on_mismatch=cast(OnMismatch, config.on_mismatch))


@dataclass(frozen=True)
class _Files:
    pictures: dict[float, Path]
    grid: Path | None

    @property
    def output(self) -> Path:
        """What was asked for: the only picture, or the grid."""
        return self.grid or next(iter(self.pictures.values()))

    @property
    def folder(self) -> Path:
        return self.output.parent


def _output_files(photo: Path, config: EditConfig) -> _Files:
    """Where everything goes. Raises `UserError` if something is there already."""
    output = config.output or _free_name(DEFAULT_FOLDER / f"{slug(photo.stem)}_{slug(config.prompt or '')}.png")
    strengths = [strength + 0.0 for strength in config.strengths] or [1.0]
    several = len(strengths) > 1
    pictures = {
        strength: output.with_name(f"{output.stem}_strength{strength:g}.png") if several else output
        for strength in strengths
    }
    inputs = [photo, *(entry.file for entry in entries_of(config.adapter))]
    inputs += [] if config.mask is None else [config.mask]
    for file in (output, *pictures.values()):
        check_new_file(file, overwrite=config.overwrite, inputs=inputs)
    if config.source_prompt is not None:
        check_writable(output.parent / ADAPTERS_FOLDER)
    return _Files(pictures, output if several else None)


def _free_name(file: Path) -> Path:
    """``file``, or the first of it with a number that is not there."""
    free, number = file, 2
    while free.exists():
        free, number = file.with_name(f"{file.stem}-{number}{file.suffix}"), number + 1
    return free


@contextmanager
def _reserved(photo: Path, config: EditConfig, inputs: _Inputs) -> Iterator[_Inputs]:
    """``inputs`` with a name that no other edit takes while within: an empty file keeps it, if nobody has chosen one.

    Raises:
        UserError: the folder can't be written to.
    """
    if config.output is not None:
        yield inputs
        return
    while True:
        files = _output_files(photo, config)
        try:
            files.output.parent.mkdir(parents=True, exist_ok=True)
            files.output.touch(exist_ok=False)
            break
        except FileExistsError:
            continue  # another edit was faster
        except OSError as problem:
            raise UserError(f"can't write {files.output}: {problem.strerror or problem}") from problem
    try:
        yield replace(inputs, files=files)
    finally:
        with suppress(OSError):
            if not files.output.stat().st_size:
                files.output.unlink()


def _drawn_size(pipeline: DiffusionPipeline, config: EditConfig) -> tuple[int, int]:
    """(width, height) in pixels that the base model draws.

    Raises:
        UserError: a size that it can't draw.
    """
    resolution, multiple = default_resolution(pipeline), family_of(pipeline).pixel_multiple
    check_picture_size(resolution, height=config.height, width=config.width)
    sizes = {"width": config.width or resolution, "height": config.height or resolution}
    for name, size in sizes.items():
        if size % multiple:
            raise UserError(f"--{name} must be a multiple of {multiple} with this base model, got {size}")
    return sizes["width"], sizes["height"]


class _Base:
    """The base model, loaded once for the training and the drawing."""

    def __init__(self, config: EditConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._shared = SharedBase()

    def open(self) -> DiffusionPipeline:
        """The pipeline as it was loaded, ready to draw; whatever a training changed is undone."""
        config = self._config
        self._shared.take_back()
        settings = TrainingConfig(
            pretrained_model_name_or_path=config.pretrained_model_name_or_path,
            base_config=config.base_config,
            revision=config.revision,
            variant=config.variant,
        )
        return self.lend(settings, getattr(torch, config.dtype)).to(self._device)

    def lend(self, settings: TrainingConfig, dtype: torch.dtype) -> DiffusionPipeline:
        """For `svft_diffusion.training.trainer.train`."""
        return self._shared.lend(settings, dtype)


@dataclass(frozen=True)
class _Work:
    """The pictures of an edit, one after the other."""

    config: EditConfig
    picture: Image.Image
    mask: Image.Image | None
    frame: Frame
    adapters: dict[str, CheckedAdapter]
    uses: dict[str, AdapterUse]
    own: Path | None  # the adapter of the picture, if there is one

    def draw(self, base: DiffusionPipeline, files: Mapping[float, Path]) -> tuple[dict[float, Path], list[Path]]:
        """Draw and write a picture for each strength, and say what there is if that is interrupted.

        Returns:
            The pictures by strength, and those of them that a safety checker has blacked out.
        """
        written: dict[float, Path] = {}
        hidden: list[Path] = []
        try:
            for strength, file, blacked_out in self._drawn(base, files):
                written[strength] = file
                hidden += [file] if blacked_out else []
        except KeyboardInterrupt:
            names = ", ".join(file.name for file in written.values())
            again = f"written: {names}; give --overwrite with the same command, which draws all anew"
            kept = "" if self.own is None else f"; the adapter of the picture is kept in {self.own}"
            tqdm.write(printable(f"{again if written else 'no picture was written'}{kept}"), file=sys.stderr)
            raise
        return written, hidden

    def _drawn(self, base: DiffusionPipeline, files: Mapping[float, Path]) -> Iterator[tuple[float, Path, bool]]:
        mask = None if self.mask is None else self.frame.fitted_mask(self.mask)
        pipeline = drawing_pipeline(base, self.config)
        editor = Editor(base, pipeline, self.frame.fitted(self.picture), mask, self.config)
        embedded = adapters_to_embed(list(self.adapters.values()), self.config.embed_adapter)
        with tqdm(total=editor.steps * len(files), desc="drawing") as progress:
            for strength, file in files.items():
                uses = {name: scaled(use, strength) for name, use in self.uses.items()}
                with acting_adapters(pipeline, uses):
                    drawn, blacked_out = editor.draw(progress.update)
                image = self._finished(drawn)
                weights: dict[str, AdapterWeight] = {name: use.weight for name, use in uses.items()}
                settings = self._settings(uses) | {
                    "width": image.width,
                    "height": image.height,
                    "scheduler": editor.scheduler_name,
                }
                settings |= {"blacked_out": True} if blacked_out else {}
                yield strength, save_png(image, file, settings, embedded_in_picture(embedded, weights)), blacked_out

    def save_grid(self, file: Path, pictures: Mapping[float, Path]) -> Path:
        """The source and the pictures beside each other."""
        images = [self._finished(self.frame.fitted(self.picture))]
        for picture in pictures.values():
            with Image.open(picture) as image:
                images.append(image.convert("RGB"))
        labels = ["the picture", *(f"strength {strength:g}" for strength in pictures)]
        names = [path.name for path in pictures.values()]
        return save_png(labelled_grid([images], [self.config.prompt or ""], labels), file, {"pictures": names})

    def _finished(self, drawn: Image.Image) -> Image.Image:
        if self.mask is None:
            return self.frame.unfitted(drawn)
        return self.frame.pasted(drawn, self.picture, self.mask)

    def _settings(self, uses: Mapping[str, AdapterUse]) -> dict[str, Any]:
        """What the file tells of its making: the sources by their content, never by their names."""
        config = self.config
        settings = picture_settings(
            base=config.pretrained_model_name_or_path,
            adapters=[(adapter, uses[name]) for name, adapter in self.adapters.items()],
            prompt=config.prompt or "",
            negative_prompt=config.negative_prompt,
            seed=config.seed,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            dtype=config.dtype,
        )
        of_edit: dict[str, Any] = {
            "mode": config.mode,
            "source_sha256": picture_digest(self.picture),
            "source_prompt": config.source_prompt,
            "fit": config.fit,
            "drawn_size": list(self.frame.drawn_size),
        }
        if config.mode == "inversion":
            refinements = config.inversion_refinements
            of_edit |= {"eta": config.eta, "slerp": config.slerp, "inversion_refinements": refinements}
        else:
            of_edit["strength"] = config.resolved_strength
        if self.mask is not None:
            of_edit["mask_sha256"] = picture_digest(self.mask)
        return settings | {name: value for name, value in of_edit.items() if value is not None}
