"""The README's claim, measured: held-out toy subjects, base model against adapter, paired, with bootstrap intervals.

    python benchmarks/subjects.py --output_dir outputs/subjects

Trains one adapter for each of eight individuals that the embedded model has never seen (half of them with bodies
outside its palette), draws each in six scenes with two seeds, and lets the readers judge. Writes ``report.json``,
``report.md`` and ``grid.png``. On two CPU cores it takes about a quarter of an hour.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from svft_diffusion.cli.arguments import Parser, add_settings, config_from_options
from svft_diffusion.cli.demo import Personalization, comparison_rows, personalize
from svft_diffusion.cli.train import read_settings
from svft_diffusion.evaluation.intervals import bootstrap_interval
from svft_diffusion.evaluation.toy_subjects import PROMPT_SCENES, ToySubject, held_out_subjects, write_photos
from svft_diffusion.sampling.grid import labelled_grid
from svft_diffusion.settings import setting


@dataclass(frozen=True)
class SubjectsConfig:
    """Settings of the measurement."""

    output_dir: Path = setting(Path("outputs/subjects"), "where the report goes")
    config: Path | None = setting(None, "training settings in YAML instead of the demonstration's")
    num_subjects: int = setting(8, "subjects")
    num_seeds: int = setting(2, "pictures for each prompt")


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write the report."""
    parser = Parser(prog="benchmarks/subjects.py", description=__doc__)
    add_settings(parser, SubjectsConfig)
    config = config_from_options(SubjectsConfig, parser.parse_args(arguments))
    overrides = read_settings(config.config) if config.config else {}
    subjects = held_out_subjects(config.num_subjects)
    rows, labels, results = [], [], []
    for subject in subjects:
        folder = config.output_dir / subject.name.replace(" ", "-")
        write_photos(subject, folder / "photos", captions=True)
        result = personalize(subject, folder / "photos", folder, seeds=range(config.num_seeds), overrides=overrides)
        results.append(result)
        rows += comparison_rows(subject, result)
        labels += [f"{subject.name}: photos", "base", "adapter"]
        print(_line(subject, result), flush=True)
    report = summarize(subjects, results)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    (config.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    labelled_grid(rows, labels, list(PROMPT_SCENES)).save(config.output_dir / "grid.png")
    text = _markdown(report, subjects, results)
    (config.output_dir / "report.md").write_text(text, encoding="utf-8")
    print(text)


def summarize(subjects: Sequence[ToySubject], results: Sequence[Personalization]) -> dict[str, object]:
    """Means over subjects, the paired gain with its interval, and how far from base to ceiling the adapters came."""
    base = np.array([result.base_scores.subject_similarity for result in results])
    adapted = np.array([result.adapted_scores.subject_similarity for result in results])
    ceiling = np.array([result.scale.ceiling for result in results])
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "subjects": [subject.name for subject in subjects],
        "similarity": {
            "base": float(base.mean()),
            "adapter": float(adapted.mean()),
            "ceiling (real new views)": float(ceiling.mean()),
            "ceiling through the VAE": float(np.mean([result.scale.round_trip for result in results])),
            "floor (other individuals)": float(np.mean([result.scale.floor for result in results])),
        },
        "gain": float((adapted - base).mean()),
        "gain, 95 % interval over subjects": bootstrap_interval(adapted - base),
        "share of the way from base to ceiling": float((adapted - base).mean() / (ceiling - base).mean()),
        "scene accuracy": {
            "base": float(np.mean([result.base_scores.scene_accuracy for result in results])),
            "adapter": float(np.mean([result.adapted_scores.scene_accuracy for result in results])),
        },
        "class accuracy": {
            "base": float(np.mean([result.base_scores.class_accuracy for result in results])),
            "adapter": float(np.mean([result.adapted_scores.class_accuracy for result in results])),
        },
        "training seconds": float(np.median([result.training_seconds for result in results])),
    }


def _line(subject: ToySubject, result: Personalization) -> str:
    base, adapted = result.base_scores, result.adapted_scores
    return (
        f"{subject.name}: similarity {base.subject_similarity:.2f} -> {adapted.subject_similarity:.2f} "
        f"(ceiling {result.scale.ceiling:.2f}), scene {adapted.scene_accuracy:.2f}, class {adapted.class_accuracy:.2f}"
    )


def _markdown(report: dict[str, object], subjects: Sequence[ToySubject], results: Sequence[Personalization]) -> str:
    lines = ["| subject | base | adapter | ceiling | through the VAE | floor | scene | class |", "|" + " --- |" * 8]
    for subject, result in zip(subjects, results, strict=True):
        scores, scale = result.adapted_scores, result.scale
        cells = (result.base_scores.subject_similarity, scores.subject_similarity, scale.ceiling, scale.round_trip)
        cells += (scale.floor, scores.scene_accuracy, scores.class_accuracy)
        lines.append(f"| {subject.name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    lines += ["", "```json", json.dumps(report, indent=2), "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
