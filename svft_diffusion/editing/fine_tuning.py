"""The adapter of one picture: trained once on its description, and found again when the picture is edited anew."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from svft_diffusion.data.photos import MASK_SUFFIX
from svft_diffusion.editing.config import TRAINING_SETTINGS, EditConfig
from svft_diffusion.editing.frame import Frame, picture_digest
from svft_diffusion.errors import Interrupted, UserError
from svft_diffusion.files import fingerprint_of_pipeline
from svft_diffusion.files.names import base_module, canonical_name
from svft_diffusion.files.whole_files import replace_when_whole
from svft_diffusion.models import EMBEDDED_MODEL, family_of
from svft_diffusion.sampling.plan import slug
from svft_diffusion.settings import config_from_mapping, config_to_mapping, nearest_hint
from svft_diffusion.training.base import BaseLoader
from svft_diffusion.training.checkpoints import existing_checkpoints
from svft_diffusion.training.checks import check_settings
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.trainer import StepReport, train
from svft_diffusion.version import __version__

ADAPTERS_FOLDER = "adapters"
"""Beside the edited pictures; every edit in that folder finds the adapters there."""

EDIT_TRAINING: dict[str, Any] = {
    "method": "svdiff",
    "targets": "all",
    "train_batch_size": 1,
    "max_train_steps": 500,
}
"""Where nothing else is said: SVDiff and 500 steps of one picture, the paper's."""

EMBEDDED_TRAINING: dict[str, Any] = {"max_train_steps": 100, "learning_rate": 0.02}
"""The same for SVDiff on the embedded model. At its rate for subjects, 0.1, the background of the picture stays too."""

_PRECISIONS = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}
# Where things are and what is shown on the way; they leave the adapter as it is.
_NO_PART_OF_KEY = (
    "pretrained_model_name_or_path", "base_config", "revision", "variant", "instance_data_dir", "output_dir",
    "logging_dir", "factor_cache", "factor_cache_size", "resume_from_checkpoint",
)  # fmt: skip


@dataclass(frozen=True)
class PictureAdapter:
    """The adapter of a picture."""

    file: Path
    reused: bool  # it was there already


def training_settings(config: EditConfig, training: Mapping[str, Any]) -> TrainingConfig:
    """The training run of an edit, without its folders and size.

    Args:
        training: settings of `TrainingConfig` among `TRAINING_SETTINGS`, which win over `EDIT_TRAINING`.

    Raises:
        UserError: one that an edit decides itself, or that can't work.
    """
    for name in training:
        if name not in TRAINING_SETTINGS:
            raise UserError(f"an edit takes no setting {name!r}{nearest_hint(name, TRAINING_SETTINGS)}")
    defaults = dict(EDIT_TRAINING)
    if (config.pretrained_model_name_or_path, training.get("method", "svdiff")) == (EMBEDDED_MODEL, "svdiff"):
        defaults |= EMBEDDED_TRAINING
    if training.get("target_layers") is not None:
        del defaults["targets"]  # these layers instead
    settings = config_from_mapping(
        TrainingConfig,
        {
            **defaults,
            **training,
            "pretrained_model_name_or_path": config.pretrained_model_name_or_path,
            "base_config": config.base_config,
            "revision": config.revision,
            "variant": config.variant,
            "instance_prompt": config.source_prompt,
            "center_crop": True,
            "seed": config.seed,
            "mixed_precision": _PRECISIONS[config.dtype],
            "history_steps": 0,
            "report_to": "none",
            "factor_cache": config.factor_cache,
            "factor_cache_size": config.factor_cache_size,
        },
    )
    check_settings(settings)
    return settings


def picture_adapter(
    pipeline: DiffusionPipeline,
    picture: Image.Image,
    frame: Frame,
    settings: TrainingConfig,
    folder: Path,
    *,
    label: str,
    load: BaseLoader,
    on_step: Callable[[StepReport], None] | None = None,
) -> PictureAdapter:
    """Train an adapter on one picture, or find it in ``folder`` by picture, base weights and settings.

    A run that was stopped goes on where it was.

    Args:
        pipeline: the base model without adapters, on the device that the training takes, too.
        picture: of the whole source; ``frame`` says what of it is trained on. Padding has no part in the loss.
        label: what the file is called, before a digest.
        load: gives the training its base model; see `svft_diffusion.training.trainer.train`.

    Raises:
        UserError: as `train`.
        Interrupted: training was stopped; the next edit goes on.
    """
    fitted = frame.fitted(picture)
    masked = {"masked_loss": True, "unmasked_weight": 0.0} if frame.is_padded else {}
    shape = {"aspect_ratio_buckets": f"{fitted.height},{fitted.width}"}
    values = config_to_mapping(settings) | shape | masked
    key = {name: value for name, value in values.items() if name not in _NO_PART_OF_KEY} | {
        "picture": picture_digest(fitted),
        "inside": frame.drawn_box,
        "base": _base_digest(pipeline),
        "version": __version__,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    file = folder / f"{slug(label)}-{digest}.safetensors"
    if file.is_file():
        return PictureAdapter(file, reused=True)

    run = folder / f"{file.stem}-training"
    photos = run / "photo"
    _save(fitted, photos / "photo.png")
    if frame.is_padded:
        _save(frame.inside(), photos / f"photo{MASK_SUFFIX}")
    place = {"instance_data_dir": str(photos), "output_dir": str(run)}
    if existing_checkpoints(run):
        place["resume_from_checkpoint"] = "latest"
    goes_on = "resume_from_checkpoint" in place
    tqdm.write(f"training an adapter on the picture{', where an earlier edit was stopped' if goes_on else ''}: {file}")
    try:
        # What a training says is of files and flags that an edit has not.
        with contextlib.redirect_stdout(io.StringIO()), _training_on(pipeline.device):
            result = train(config_from_mapping(TrainingConfig, values | place), on_step=on_step, load=load)
    except Interrupted:
        if existing_checkpoints(run):
            tqdm.write(f"the training is kept in {run}, and the same edit goes on with it", file=sys.stderr)
        raise
    with replace_when_whole(file) as unfinished:
        shutil.copyfile(result.adapter, unfinished)
    shutil.rmtree(run, ignore_errors=True)  # what is left of it, such as on a network drive, costs only room
    return PictureAdapter(file, reused=False)


@contextlib.contextmanager
def _training_on(device: torch.device) -> Iterator[None]:
    """Trainings compute on ``device`` while entered: by itself, accelerate chooses one for the life of a process."""
    state = PartialState()
    usual = state.device
    if state.num_processes == 1:  # each of several has its own
        state.device = device
    try:
        yield
    finally:
        state.device = usual


def _base_digest(pipeline: DiffusionPipeline) -> str:
    """One digest of all matrices and kernels that any adapter changes."""
    names = [
        canonical_name(component, model, path)
        for component, model in family_of(pipeline).adapted_models(True).items()
        for path, module in model.named_modules()
        if getattr(base_module(module), "weight", None) is not None and module.weight.ndim > 1
    ]
    return fingerprint_of_pipeline(pipeline, names)


def _save(picture: Image.Image, file: Path) -> None:
    with replace_when_whole(file) as unfinished:
        picture.save(unfinished, format="PNG")
