"""The whole path at full size: Stable Diffusion 1.5's geometry with random weights, two steps at 512 pixels.

    python benchmarks/full_size.py --instance_data_dir PHOTOS --work_dir outputs/full_size

Writes the random pipeline once (2.1 GB), trains two steps, saves, loads in a fresh pipeline and samples; prints
seconds and peak memory. Its pictures are noise: it shows that the code carries the real shapes, not that it learns.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from random_pipelines import write_stable_diffusion_15

from svft_diffusion.adapters import load_adapter, set_adapters
from svft_diffusion.cli.arguments import Parser, add_settings, config_from_options
from svft_diffusion.errors import UserError
from svft_diffusion.models import load_pipeline
from svft_diffusion.sampling.sample import generate
from svft_diffusion.settings import setting
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.trainer import StepReport, train


@dataclass(frozen=True)
class FullSizeConfig:
    """Settings of the run."""

    instance_data_dir: Path | None = setting(None, "photos (required)")
    work_dir: Path = setting(Path("outputs/full_size"), "where the random pipeline and the results go")
    max_train_steps: int = setting(2, "optimizer steps")
    num_inference_steps: int = setting(2, "denoising steps of the pictures")


def main(arguments: Sequence[str]) -> None:
    """Write, train, load, sample; print a JSON of what it cost."""
    parser = Parser(prog="benchmarks/full_size.py", description=__doc__)
    add_settings(parser, FullSizeConfig)
    config = config_from_options(FullSizeConfig, parser.parse_args(arguments))
    if config.instance_data_dir is None:
        raise UserError("--instance_data_dir is missing")
    folder = write_stable_diffusion_15(config.work_dir / "stable-diffusion-1.5-random")
    steps: list[StepReport] = []
    result = train(
        TrainingConfig(
            pretrained_model_name_or_path=str(folder),
            instance_data_dir=config.instance_data_dir,
            instance_prompt="a photo of sks dog",
            output_dir=config.work_dir / "adapter",
            train_text_encoder=True,
            train_batch_size=1,
            max_train_steps=config.max_train_steps,
            report_to="none",
        ),
        on_step=steps.append,
    )
    costs: dict[str, object] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "trained values": result.trained_values,
        "file kB": round(result.adapter.stat().st_size / 1000, 1),
        "seconds until the first step": round(result.seconds - steps[-1].seconds, 1),
        "seconds for all steps": round(steps[-1].seconds, 1),
    }
    costs |= _load_and_sample(folder, result.adapter, config)
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    costs["peak memory GB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 1)
    print(json.dumps(costs, indent=2))


def _load_and_sample(folder: Path, adapter: Path, config: FullSizeConfig) -> dict[str, object]:
    pipeline = load_pipeline(str(folder))
    prompt, steps = "a photo of sks dog on the beach", config.num_inference_steps
    base = generate(pipeline, prompt, seed=0, num_inference_steps=steps)
    started = time.perf_counter()
    name = load_adapter(pipeline, adapter)
    loaded = time.perf_counter()
    with_adapter = generate(pipeline, prompt, seed=0, num_inference_steps=steps)
    sampled = time.perf_counter()
    set_adapters(pipeline, {name: 0.0})
    switched_off = generate(pipeline, prompt, seed=0, num_inference_steps=steps)
    return {
        "seconds to load the adapter, factors cached": round(loaded - started, 1),
        f"seconds for a picture of {steps} steps": round(sampled - loaded, 1),
        "picture size": list(with_adapter.size),
        "strength 0 is the base bit for bit": switched_off.tobytes() == base.tobytes(),
    }


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
