"""``history/step-N.safetensors``: the adapter as it was after step N. Adapters are so small that all of them stay."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from svft_diffusion.data.photos import UnusablePhoto, open_photo
from svft_diffusion.errors import UserError
from svft_diffusion.files import read_adapter
from svft_diffusion.files.training_folder import METRICS_FILE, SAMPLES_FOLDER
from svft_diffusion.files.whole_files import check_output_file, replace_when_whole
from svft_diffusion.sampling.grid import labelled_grid
from svft_diffusion.sampling.png import save_png
from svft_diffusion.training.metrics import read_metrics

HISTORY_FOLDER = "history"
STRIP_FILE = "samples.png"
_ADAPTERS_OF_A_RUN = 10
_ADAPTER_NAME = re.compile(r"step-(\d+)\.safetensors")
_SAMPLE_NAME = re.compile(r"step-(\d+)-(\d+)\.png")


@dataclass(frozen=True)
class HistoryEntry:
    """One adapter of the history, and what is known of its step."""

    step: int
    adapter: Path
    samples: list[Path]  # drawn at this step
    loss: float | None  # smoothed
    value_norm: float | None


def history_interval(history_steps: int | None, total_steps: int) -> int:
    """Steps from one adapter of the history to the next, or 0 for none; a tenth of the run if nothing is said."""
    return max(1, total_steps // _ADAPTERS_OF_A_RUN) if history_steps is None else history_steps


def belongs_into_history(step: int, *, interval: int, sampled: bool, total_steps: int) -> bool:
    """Whether the adapter after ``step`` is kept; every step with samples, and the last, has its adapter there."""
    return interval > 0 and (step % interval == 0 or sampled or step == total_steps)


def history_file(output_dir: Path, step: int) -> Path:
    """Where the adapter of a step lies."""
    return output_dir / HISTORY_FOLDER / f"step-{step}.safetensors"


def history_files(output_dir: Path) -> dict[int, Path]:
    """The adapters that a run has kept, by step."""
    return {int(match.group(1)): path for path, match in _matches(output_dir / HISTORY_FOLDER, _ADAPTER_NAME)}


def has_history(output_dir: Path) -> bool:
    """Whether a run has kept an adapter there."""
    return bool(history_files(output_dir))


def read_history(output_dir: Path) -> list[HistoryEntry]:
    """The history of a run, first step first.

    Raises:
        UserError: there is none, or no such folder.
    """
    if not output_dir.is_dir():
        raise UserError(f"{output_dir} is no folder" if output_dir.exists() else f"no such folder: {output_dir}")
    found = history_files(output_dir)
    if not found:
        raise UserError(
            f"{output_dir} holds no history: give the output folder of a training run (with --history_steps 0, a run "
            "keeps none)"
        )
    samples = sample_files(output_dir)
    numbers = {row["step"]: row for row in read_metrics(output_dir / METRICS_FILE)}
    return [
        HistoryEntry(
            step,
            found[step],
            samples.get(step, []),
            numbers.get(step, {}).get("smoothed_loss"),
            numbers.get(step, {}).get("value_norm"),
        )
        for step in sorted(found)
    ]


def sample_files(output_dir: Path) -> dict[int, list[Path]]:
    """The samples of a run by step, in the order of their seeds."""
    found = sorted(
        (int(match.group(1)), int(match.group(2)), path)
        for path, match in _matches(output_dir / SAMPLES_FOLDER, _SAMPLE_NAME)
    )
    by_step: dict[int, list[Path]] = {}
    for step, _, path in found:
        by_step.setdefault(step, []).append(path)
    return by_step


def write_strip(output_dir: Path, file: Path) -> Path | None:
    """Draw all samples of a run, a column for each step from 0 (the base model) on; None if there are none.

    Raises:
        UserError: a sample is damaged, or the file can't be written.
    """
    by_step = sample_files(output_dir)
    if not by_step:
        return None
    pictures = [[_opened(path) for path in paths] for paths in by_step.values()]
    seeds = max(map(len, pictures))
    rows = [[column[seed] if seed < len(column) else None for column in pictures] for seed in range(seeds)]
    labels = ["base model" if step == 0 else f"step {step}" for step in by_step]
    names = [path.name for paths in by_step.values() for path in paths]
    return save_png(labelled_grid(rows, [""] * seeds, labels), file, {"pictures": names})


def pick(history: Sequence[HistoryEntry], step: int, file: Path, *, overwrite: bool) -> Path:
    """Copy the adapter of ``step`` to ``file``.

    Raises:
        UserError: the history has no such step, the adapter is damaged, or ``file`` is there already.
    """
    chosen = next((entry for entry in history if entry.step == step), None)
    if chosen is None:
        steps = ", ".join(str(entry.step) for entry in history)
        raise UserError(f"the history has no step {step}; there are {steps}")
    check_output_file(file, overwrite=overwrite, inputs=[entry.adapter for entry in history])
    read_adapter(chosen.adapter)
    with replace_when_whole(file) as unfinished:
        unfinished.write_bytes(chosen.adapter.read_bytes())
    return file


def _matches(folder: Path, name: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    if not folder.is_dir():
        return []
    return [(path, match) for path in folder.iterdir() if (match := name.fullmatch(path.name))]


def _opened(path: Path) -> Image.Image:
    try:
        return open_photo(path)
    except (UnusablePhoto, OSError) as problem:
        raise UserError(f"the sample {path} can't be read: {problem}; remove it and try again") from problem
