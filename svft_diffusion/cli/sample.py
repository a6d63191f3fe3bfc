"""``svft-diffusion sample``: generate pictures with any number of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svft_diffusion.cli.arguments import Parser, add_settings, given_settings
from svft_diffusion.cli.early_checks import check_adapter_is_there
from svft_diffusion.sampling.config import SamplingConfig, check_values

_DESCRIPTION = """\
Generate pictures with any number of adapters: every combination of the values of repeatable flags.

Start the same command again, and only pictures that are missing or damaged are made. Started by accelerate launch, each
process draws a part of them; files are the same to the byte for any number of processes.
"""
_EPILOG = """examples:
  svft-diffusion sample --adapter outputs/robot/adapter.safetensors:0.8 \\
      --prompt "a photo of sks robot on the beach" --num_images 4 --weights 0 0.5 1
  svft-diffusion sample --matrix samples/sampling/matrix.yaml --output_dir outputs/matrix
  accelerate launch --multi_gpu --num_processes 2 -m svft_diffusion sample --prompts dreambooth_object \\
      --adapter outputs/robot/adapter.safetensors --output_dir outputs/robot-prompts
"""
_MOST_NAMES = 5  # of files in a line


def run(argv: Sequence[str]) -> None:
    """Run the command with its arguments.

    Raises:
        UserError: see `svft_diffusion.sampling.sample.sample`.
    """
    parser = Parser(prog="svft-diffusion sample", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument(
        "--matrix",
        type=Path,
        metavar="FILE",
        help="YAML or JSON with these flags as keys, lists of values, adapters with schedules and regions, and named "
        "sets of them; flags of the command line win",
    )
    add_settings(parser, SamplingConfig)
    options = parser.parse_args(argv)
    given = given_settings(SamplingConfig, options)
    _check_at_once(given, options.matrix)

    # Heavy imports come after the arguments, so that --help and typing errors answer at once.
    from svft_diffusion.sampling.index_page import count_of
    from svft_diffusion.sampling.matrix import read_matrix
    from svft_diffusion.sampling.sample import sample

    config, adapters = (SamplingConfig(**given), None) if options.matrix is None else read_matrix(options.matrix, given)
    result = sample(config, adapters)
    if result.index is None:
        return  # the first process tells about all
    there = f" ({len(result.pictures) - result.made} made before or by other processes)"
    print(f"{count_of(result.pictures)} in {result.output_dir}{there if result.made < len(result.pictures) else ''}")
    other_grids = f" and {len(result.grids) - 1} more" if len(result.grids) > 1 else ""
    if result.blacked_out:
        names = ", ".join(file.name for file in result.blacked_out[:_MOST_NAMES])
        others = ", ..." if len(result.blacked_out) > _MOST_NAMES else ""
        print(
            f"{count_of(result.blacked_out)} blacked out by the base model's safety checker: {names}{others}; the same "
            "command with --disable_safety_checker draws what is missing there"
        )
    print(f"all of them at a glance: {result.grid}{other_grids}, {result.index}")
    if result.embedded and result.made:
        sizes = ", ".join(f"{name} ({size / 1000:.0f} kB)" for name, size in result.embedded.items())
        print(f"the pictures carry the adapters that made them: {sizes}; --no-embed_adapter leaves them out")


def _check_at_once(given: Mapping[str, Any], matrix: Path | None) -> None:
    """Refuse wrong numbers and missing files before the imports, which take seconds; the rest is checked after them."""
    if matrix is None:
        check_values(SamplingConfig(**given))
    for text in given.get("adapter", ()):
        check_adapter_is_there(text)
