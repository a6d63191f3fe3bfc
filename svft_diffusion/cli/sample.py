"""``svft-diffusion sample``: generate pictures with any number of adapters."""

from __future__ import annotations

from collections.abc import Sequence

from svft_diffusion.cli.arguments import Parser, add_settings, config_from_options
from svft_diffusion.sampling.config import SamplingConfig

_EPILOG = """example:
  svft-diffusion sample --adapter outputs/robot/adapter.safetensors:0.8 \\
      --prompt "a photo of sks robot on the beach" --num_images 4 --weights 0 0.5 1
"""


def run(argv: Sequence[str]) -> None:
    """Run the command with its arguments.

    Raises:
        UserError: see `svft_diffusion.sampling.sample.sample`.
    """
    parser = Parser(prog="svft-diffusion sample", description="Generate pictures with any number of adapters.")
    parser.epilog = _EPILOG
    add_settings(parser, SamplingConfig)
    config = config_from_options(SamplingConfig, parser.parse_args(argv))

    # Heavy imports come after the arguments, so that --help and typing errors answer at once.
    from svft_diffusion.sampling.sample import sample

    result = sample(config)
    print(f"{len(result.pictures)} pictures in {result.output_dir}")
    print(f"all of them at a glance: {result.grid}")
    if result.embedded:
        sizes = ", ".join(f"{name} ({size / 1000:.0f} kB)" for name, size in result.embedded.items())
        print(f"the pictures carry the adapters that made them: {sizes}; --no-embed_adapter leaves them out")
