"""One row: a method trains on one subject in our loop, the result draws, and the readers judge."""

from __future__ import annotations

import contextlib
import io
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from svft_diffusion.comparison.drawing import draw_together
from svft_diffusion.comparison.memory import SavedBytes, bytes_of_training
from svft_diffusion.comparison.methods import Method
from svft_diffusion.comparison.subjects import ComparedSubject
from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.measures import feature_drift, pixel_drift
from svft_diffusion.evaluation.personalization import score_pictures
from svft_diffusion.evaluation.toy_subjects import TOKEN
from svft_diffusion.models import EMBEDDED_MODEL, load_pipeline
from svft_diffusion.settings import config_from_mapping
from svft_diffusion.toybox.readers import identity_embeddings, read_attributes
from svft_diffusion.training.checks import check
from svft_diffusion.training.config import FREEZING, TrainingConfig
from svft_diffusion.training.finite import TrainingDiverged
from svft_diffusion.training.run import Run
from svft_diffusion.training.setup import make_accelerator, prepare_run
from svft_diffusion.training.step import optimizer_step

_TOKEN_WORD = "TOK"  # stands for new tokens in prompts

# What all methods have in common; the demonstration trains alike. Weight decay would pull some to the base model, and
# others, such as full fine-tuning, away from it.
COMMON: dict[str, Any] = {
    "pretrained_model_name_or_path": EMBEDDED_MODEL,
    "train_text_encoder": True,
    "caption_source": "txt",
    "with_prior_preservation": True,
    "timestep_sampling": "focused",
    "lr_scheduler": "linear",
    "adam_weight_decay": 0.0,
    "report_to": "none",
}


@dataclass(frozen=True)
class Effort:
    """How long everybody trains, and on what the results are judged."""

    steps: int
    batch_size: int
    class_images: int
    targets: str
    pictures: int  # of the subject, for each scene
    inference_steps: int
    guidance_scale: float


@dataclass(frozen=True)
class Measured:
    """What a row says.

    Attributes:
        numbers: by name, see `docs` of the columns in `report`.
        pictures: the first of each scene.
    """

    numbers: dict[str, float | int | None]
    pictures: list[Image.Image]


def measure(
    method: Method, learning_rate: float, effort: Effort, subject: ComparedSubject, seed: int, folder: Path
) -> Measured:
    """Train a method on a subject and judge what it draws.

    Args:
        folder: keeps class pictures for other rows.

    Raises:
        TrainingDiverged: something is no finite number any more.
        UserError: the method can't be trained here.
    """
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory(dir=folder) as scratch:
        config = training_config(method, learning_rate, effort, subject, seed, folder, Path(scratch))
        if not method.trains:
            pipeline = load_pipeline(EMBEDDED_MODEL).to(_device())
            return _judged(pipeline, config, subject, effort, {})
        with _silent():
            run, numbers = _trained(method, config)
        with run.class_folders:
            stored = method.stored(run, Path(scratch))
            numbers |= {
                "values": stored.values,
                "file_bytes": stored.file_bytes,
                "effective_rank_change": method.change_of_effective_rank(run),
            }
            return _judged(run.family.pipeline, config, subject, effort, numbers)


def training_config(
    method: Method,
    learning_rate: float,
    effort: Effort,
    subject: ComparedSubject,
    seed: int,
    folder: Path,
    scratch: Path,
) -> TrainingConfig:
    """The settings of a run; the method's own win over those that all have in common.

    Args:
        folder: keeps class pictures.
        scratch: gets the photos.
    """
    own = method.settings(learning_rate)
    word = _TOKEN_WORD if own.get("train_text_encoder_ti") else TOKEN
    settings = COMMON | {
        "instance_data_dir": subject.write_photos(scratch / "photos", word),
        "instance_prompt": subject.prompt_with(word),
        "class_prompt": subject.toy.class_prompt,
        "class_prompts_file": subject.write_class_prompts(scratch / "class_prompts.txt"),
        # Drawn once for each class and seed, whichever method trains.
        "class_data_dir": folder / "class_images" / f"{subject.class_name}-{seed}",
        "num_class_images": effort.class_images,
        "output_dir": scratch / "run",
        "targets": effort.targets,
        "train_batch_size": effort.batch_size,
        "max_train_steps": effort.steps,
        "lr_warmup_steps": effort.steps // 15,
        "checkpointing_steps": effort.steps + 1,
        "seed": seed,
    }
    settings |= own
    config = config_from_mapping(TrainingConfig, settings)
    return config_from_mapping(TrainingConfig, settings | _freezing(config, effort.steps))


def _freezing(config: TrainingConfig, steps: int) -> dict[str, Any]:
    """Adaptive vector freezing at the same shares of the run as the defaults have of a run of 400 steps."""
    if config.freezing is None:
        return {}
    warmup, interval = (max(1, round(steps * part / 400)) for part in (FREEZING.warmup_steps, FREEZING.interval))
    return {"freezing_warmup_steps": warmup, "freezing_interval": interval}


def _trained(method: Method, config: TrainingConfig) -> tuple[Run, dict[str, float | int | None]]:
    """A finished run, and what it took."""
    inputs = check(config)
    accelerator = make_accelerator(config)
    run = prepare_run(config, inputs, accelerator, add_trainable=method.add_trainable)
    try:
        method.attach(run)
        batches = run.batches(0)
        seconds, losses, saved = [], [], SavedBytes(run)
        for step in range(1, run.total_steps + 1):
            begun = _clock()
            with saved if step == 1 else contextlib.nullcontext():
                metrics = optimizer_step(run, batches, step)
            seconds.append(_clock() - begun)
            losses.append(metrics["loss"])
    except BaseException:
        run.class_folders.close()
        raise
    numbers: dict[str, float | int | None] = {
        "step_seconds": statistics.median(seconds[1:] or seconds),
        "last_loss": statistics.mean(losses[-max(1, len(losses) // 10) :]),
        "training_bytes": bytes_of_training(run, saved),
        "trained_values": run.trained_values,
    }
    return run, numbers


def _judged(
    pipeline: DiffusionPipeline,
    config: TrainingConfig,
    subject: ComparedSubject,
    effort: Effort,
    numbers: dict[str, float | int | None],
) -> Measured:
    """The scores beside ``numbers``."""
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            model.eval()

    def draw(prompts: Sequence[str]) -> list[Image.Image]:
        return draw_together(
            pipeline,
            [config.with_tokens(prompt) for prompt in prompts],
            num_inference_steps=effort.inference_steps,
            guidance_scale=effort.guidance_scale,
        )

    word = _TOKEN_WORD if config.train_text_encoder_ti else TOKEN
    with torch.no_grad():
        prompts = [(scene, prompt) for _ in range(effort.pictures) for scene, prompt in subject.prompts(word)]
        pictures = draw([prompt for _, prompt in prompts])
        of_class = draw(subject.drift_prompts())
        base = subject.base_pictures(effort.inference_steps, effort.guidance_scale)
    scenes = [scene for scene, _ in prompts]
    scores = score_pictures(pictures, scenes, subject.toy)
    seen = read_attributes(pictures)["scene"]
    similarities = (identity_embeddings(pictures) @ identity_embeddings(subject.toy.photos()).T).mean(dim=1).tolist()
    in_scene = [near if seen[i] == scenes[i] else 0.0 for i, near in enumerate(similarities)]
    numbers = numbers | {
        "quality": statistics.mean(in_scene),
        "subject_similarity": scores.subject_similarity,
        "scene_accuracy": scores.scene_accuracy,
        "class_accuracy": scores.class_accuracy,
        "drift": feature_drift(identity_embeddings(of_class), identity_embeddings(base)),
        "pixel_drift": pixel_drift(of_class, base),
    }
    return Measured({name: _rounded(value) for name, value in numbers.items()}, pictures[: len(subject.prompts(word))])


def reason_of(problem: Exception) -> str:
    """One line on why a row has no scores."""
    if isinstance(problem, TrainingDiverged | UserError):
        return " ".join(str(problem).split())
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"


def _clock() -> float:
    """Seconds of this process on the CPU, where another program's work does not count; of the clock with a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _rounded(value: float | int | None) -> float | int | None:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stderr(nowhere),  # bars
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield
