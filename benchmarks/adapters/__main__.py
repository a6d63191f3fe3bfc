"""The cost of adapters, measured in one run.

    python -m benchmarks.adapters --sections layers,block
    python -m benchmarks.adapters --sections unet --latents 64 --rounds 3
    python -m benchmarks.adapters --device cuda --dtype bfloat16 --unet_batch_size 2 --latents 64

Writes results.json and results.md; docs/benchmarks.md explains the figures.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.adapters import blending, block, factorization, layers, unet
from benchmarks.adapters.config import BenchmarkConfig
from benchmarks.adapters.contenders import FLOOR
from benchmarks.adapters.report import machine, write_report
from benchmarks.adapters.results import Bar, Result, verdicts
from svft_diffusion.cli.arguments import Parser, add_settings, given_settings
from svft_diffusion.errors import UserError
from svft_diffusion.factors import CACHE_VARIABLE


@dataclass(frozen=True)
class _Section:
    measure: Callable[[BenchmarkConfig], list[Result]]
    bars: Callable[[Sequence[Result]], list[Bar]]


SECTIONS = {
    "layers": _Section(layers.measure_linear, layers.linear_bars),
    "convolutions": _Section(layers.measure_convolutions, layers.convolution_bars),
    "block": _Section(block.measure, block.bars),
    "unet": _Section(unet.measure, unet.bars),
    "factors": _Section(factorization.measure, factorization.bars),
    "blending": _Section(blending.measure, blending.bars),
}


def run(config: BenchmarkConfig) -> list[Result]:
    """Measure the sections of the settings; after each one the report is written anew."""
    os.environ[CACHE_VARIABLE] = str(config.cache.resolve())
    torch.set_num_threads(config.threads)
    results: list[Result] = []
    bars: list[Bar] = []
    for name in config.sections:
        section = SECTIONS[name]
        found = section.measure(config)
        results += found
        bars += [] if config.quick else section.bars(found)
        text = write_report(config, results, verdicts(results, bars, FLOOR), machine())
    print(text)
    return results


def main(arguments: Sequence[str]) -> None:
    """Read the command line and run."""
    parser = Parser(prog="python -m benchmarks.adapters", description=__doc__)
    add_settings(parser, BenchmarkConfig)
    options = parser.parse_args(arguments)
    given = given_settings(BenchmarkConfig, options)
    for name in ("sections", "contenders"):  # one argument may name several, with commas between them
        if name in given:
            given[name] = [part for item in given[name] for part in item.split(",")]
    run(BenchmarkConfig(**given))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
