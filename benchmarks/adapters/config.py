"""Settings of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from svft_diffusion.errors import UserError
from svft_diffusion.settings import setting

SECTIONS = ("layers", "convolutions", "block", "unet", "factors", "blending")


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure, on what, and how often."""

    output_dir: Path = setting(Path("outputs/adapter_benchmark"), "where results.json and results.md go")
    cache: Path = setting(Path("outputs/adapter_benchmark/factors"), "singular factors, kept for the next run")
    sections: list[str] = setting(list(SECTIONS), f"what to measure, of {', '.join(SECTIONS)}")
    contenders: list[str] = setting([], "only contenders whose name contains one of these; all when left out")
    rounds: int = setting(5, "turns of every contender; the ratios are medians over them")
    device: str = setting("cpu", "cpu or cuda")
    dtype: str = setting(
        "float32",
        "of the model; autocast is a bfloat16 model with float32 adapters under autocast",
        choices=("float32", "bfloat16", "autocast"),
    )
    threads: int = setting(1, "CPU threads of a step; the CPU clock holds for one thread")
    batch_sizes: list[int] = setting([1, 2], "of the single layers")
    unet_batch_size: int = setting(1, "of the whole UNet")
    latents: list[int] = setting([32], "height and width of the whole UNet's latents")
    targets: list[str] = setting(
        ["attention", "attention+feed-forward"], "of the whole UNet", choices=("attention", "attention+feed-forward")
    )
    quick: bool = setting(False, "tiny shapes and one round: shows that everything runs, measures nothing")

    def __post_init__(self) -> None:
        unknown = [name for name in self.sections if name not in SECTIONS]
        if unknown:
            raise UserError(f"unknown section {unknown[0]!r}; choose from {', '.join(SECTIONS)}")
        if self.rounds < 1:
            raise UserError(f"rounds must be at least 1, got {self.rounds}")

    @property
    def torch_device(self) -> torch.device:
        """The device of the models."""
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the models' weights."""
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    @property
    def autocast(self) -> bool:
        """Whether steps run under autocast."""
        return self.dtype == "autocast"
