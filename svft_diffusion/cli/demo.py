"""``svft-diffusion demo``: personalize the embedded model to a toy it has never seen, and measure the result."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from svft_diffusion.adapters import load_adapter
from svft_diffusion.cli.arguments import Parser, add_settings, config_from_options
from svft_diffusion.cli.train import read_settings
from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.personalization import SimilarityScale, SubjectScores, similarity_scale
from svft_diffusion.evaluation.toy_demonstration import SubjectPictures, draw_subject, write_class_prompts
from svft_diffusion.evaluation.toy_subjects import PROMPT_SCENES, ToySubject, demonstration_subject, write_photos
from svft_diffusion.models import EMBEDDED_MODEL, load_pipeline
from svft_diffusion.sampling.grid import labelled_grid
from svft_diffusion.settings import config_from_mapping, setting
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.presets import TOY_TRAINING
from svft_diffusion.training.trainer import train


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demonstration."""

    photos: Path | None = setting(None, "folder with the five photos of the toy robot (default: they are drawn)")
    config: Path | None = setting(None, "training settings in YAML that win over the demonstration's")
    output_dir: Path = setting(Path("outputs/demo"), "where grid.png and adapter.safetensors go")
    num_seeds: int = setting(2, "pictures for each of the six prompts; the grid shows the first")


@dataclass(frozen=True)
class Personalization:
    """A subject before and after: pictures on the same seeds, their scores, and the scale of the similarity."""

    adapter: Path
    trained_values: int
    training_seconds: float
    base: SubjectPictures
    adapted: SubjectPictures
    base_scores: SubjectScores
    adapted_scores: SubjectScores
    scale: SimilarityScale


def run(argv: Sequence[str]) -> None:
    """Train, draw, write ``grid.png`` and print the table."""
    parser = Parser(prog="svft-diffusion demo", description=__doc__)
    add_settings(parser, DemoConfig)
    config = config_from_options(DemoConfig, parser.parse_args(argv))
    if config.num_seeds < 1:
        raise UserError("--num_seeds must be at least 1")
    overrides = read_settings(config.config) if config.config else {}
    started = time.monotonic()
    subject = demonstration_subject()
    photos = config.photos or config.output_dir / "photos"
    if config.photos is None:
        write_photos(subject, photos, captions=True)
    result = personalize(subject, photos, config.output_dir, seeds=range(config.num_seeds), overrides=overrides)
    grid = config.output_dir / "grid.png"
    labels = ["five photos", "base model", "with the adapter"]
    labelled_grid(comparison_rows(subject, result), labels, [subject.prompt(s) for s in PROMPT_SCENES]).save(grid)
    print(f"\n{demonstration_table(result)}\n\n{time.monotonic() - started:.0f} seconds in all. Look at {grid}")


def personalize(
    subject: ToySubject,
    photos: Path,
    output_dir: Path,
    *,
    seeds: Sequence[int],
    overrides: Mapping[str, Any] | None = None,
) -> Personalization:
    """Train an adapter on a subject's photos, and draw and score the subject with and without it.

    Raises:
        UserError: photos, settings or output folder that can't work.
    """
    settings = TOY_TRAINING | {
        "instance_data_dir": photos,
        "instance_prompt": subject.instance_prompt,
        "class_prompt": subject.class_prompt,
        "class_prompts_file": write_class_prompts(subject, output_dir / "class_prompts.txt"),
        "class_data_dir": output_dir / "class_images",
        "output_dir": output_dir,
    }
    if any(output_dir.glob("checkpoint-*")):  # an interrupted run left it: go on
        settings["resume_from_checkpoint"] = "latest"
    training = train(config_from_mapping(TrainingConfig, settings | dict(overrides or {})))
    pipeline = load_pipeline(EMBEDDED_MODEL)
    base = draw_subject(pipeline, subject, seeds)
    load_adapter(pipeline, training.adapter)
    adapted = draw_subject(pipeline, subject, seeds)
    return Personalization(
        adapter=training.adapter,
        trained_values=training.trained_values,
        training_seconds=training.seconds,
        base=base,
        adapted=adapted,
        base_scores=base.scores(subject),
        adapted_scores=adapted.scores(subject),
        scale=similarity_scale(subject, pipeline.vae),
    )


def comparison_rows(subject: ToySubject, result: Personalization) -> list[list[Image.Image]]:
    """Photos, base model and adapter, each a row, on the first seed."""
    return [subject.photos(), result.base.of_seed(0), result.adapted.of_seed(0)]


def demonstration_table(result: Personalization) -> str:
    """What was measured, readable in a terminal."""
    base, adapted, scale = result.base_scores, result.adapted_scores, result.scale
    size = result.adapter.stat().st_size
    return "\n".join(
        [
            f"adapter                 {result.adapter}",
            f"file size               {size / 1000:.1f} kB, {result.trained_values:,} trained values",
            f"training                {result.training_seconds:.0f} s, class pictures included",
            "",
            "                        base   adapter",
            f"subject similarity     {base.subject_similarity:5.2f}     {adapted.subject_similarity:5.2f}",
            f"scene accuracy         {base.scene_accuracy:5.2f}     {adapted.scene_accuracy:5.2f}",
            f"class accuracy         {base.class_accuracy:5.2f}     {adapted.class_accuracy:5.2f}",
            "",
            f"The similarity's scale: real new views {scale.ceiling:.2f} ({scale.round_trip:.2f} through the model's "
            f"autoencoder), other individuals {scale.floor:.2f}.",
        ]
    )
