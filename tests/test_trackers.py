"""Curves and samples where people look at them: TensorBoard and W&B."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from training_runs import PROMPT, short_run

from svft_diffusion.training.trainer import train


class FakeWandb(ModuleType):
    """What accelerate and the samples need of the package."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def init(self, **options: Any) -> FakeWandb:
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        assert not self.rows or step >= self.rows[-1][0], "W&B drops rows of earlier steps"
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True

    class Image:
        def __init__(self, file: str, caption: str) -> None:
            self.file, self.caption = Path(file), caption


def test_wandb_gets_curves_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr("svft_diffusion.training.trainer.make_accelerator", _with_wandb)
    config = replace(short_run(tmp_path), validation_prompt=PROMPT, num_validation_images=2, validation_steps=2)
    train(replace(config, report_to="wandb", check_result=False))
    samples = {step: row["samples"] for step, row in package.rows if "samples" in row}
    assert sorted(samples) == [0, 2, 4] and package.finished
    for step, pictures in samples.items():
        assert [picture.file.name for picture in pictures] == [f"step-{step:06d}-{number}.png" for number in (0, 1)]
        assert all(picture.file.is_file() and picture.caption == PROMPT for picture in pictures)
    assert [step for step, row in package.rows if "loss" in row] == [1, 2, 3, 4]


def _with_wandb(config: Any) -> Any:
    """As `make_accelerator` would where the package is installed; a made-up module has no place to be found at."""
    from accelerate.tracking import WandBTracker

    from svft_diffusion.training.setup import make_accelerator

    accelerator = make_accelerator(replace(config, report_to="none"))
    accelerator.log_with = [WandBTracker("svft-diffusion")]
    accelerator.log_with[0].start()
    return accelerator


def test_tensorboard_gets_samples(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = replace(short_run(tmp_path), validation_prompt=PROMPT, num_validation_images=2, validation_steps=2)
    train(replace(config, report_to="tensorboard", check_result=False))
    (folder,) = {file.parent for file in (config.output_dir / "logs").rglob("events*")}
    found = events.EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert [(image.step, image.width, image.height) for image in found.Images("samples")] == [
        (step, 2 * 16, 16) for step in (0, 2, 4)
    ]
    assert [scalar.step for scalar in found.Scalars("loss")] == [1, 2, 3, 4]
