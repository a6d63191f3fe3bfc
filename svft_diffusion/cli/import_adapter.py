"""``svft-diffusion import``: turn an adapter of another tool into an adapter file of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from svft_diffusion.cli.arguments import Parser
from svft_diffusion.cli.base_model import add_version_flags
from svft_diffusion.terminal import json_text

_DESCRIPTION = """Turn an adapter of another tool into an adapter file.

Read are SVDiff files of svdiff-pytorch (spectral_shifts.safetensors, spectral_shifts_te.safetensors) and state dicts
of SVFT's authors, which stay what they are, and plain LoRAs in the spellings of kohya, diffusers and PEFT, of which
the largest part that the pattern can hold is kept; the error is stated. Title, trigger phrase and description in a
file's header are kept as text. Pickled files are never opened.
"""
_EPILOG = """examples:
  svft-diffusion import spectral_shifts.safetensors spectral_shifts_te.safetensors --base MODEL -o dog.safetensors
  svft-diffusion import lora.safetensors --base MODEL --pattern banded --off_diagonals 4 -o style.safetensors
"""


def run(argv: Sequence[str]) -> None:
    """Run the command with its arguments.

    Raises:
        UserError: see `svft_diffusion.exchange.importing.import_adapter`; or the target is there already, or can't
            be written. It is as it was then.
    """
    options = _parser().parse_args(argv)
    files: list[Path] = options.files
    output: Path = options.output

    # Heavy imports come after the arguments, so that --help and typing errors answer at once.
    from svft_diffusion.adapters import save_adapter
    from svft_diffusion.exchange.importing import import_adapter, recognised
    from svft_diffusion.files.whole_files import check_output_file
    from svft_diffusion.models import base_display_name, load_pipeline

    check_output_file(output, overwrite=options.overwrite, inputs=files)
    recognised(files)  # before the base is loaded, which may take minutes
    pipe = load_pipeline(
        options.base, revision=options.revision, variant=options.variant, base_config=options.base_config
    )
    report = import_adapter(pipe, files, pattern=options.pattern, off_diagonals=options.off_diagonals)
    save_adapter(pipe, report.adapter, output, metadata=report.metadata(base_display_name(options.base)))
    size = output.stat().st_size
    if options.json:
        print(json_text({"output": str(output), "bytes": size, **report.to_json()}))
    else:
        print("\n".join([*report.lines(), f"wrote {output} ({size / 1000:.1f} kB)"]))


def _parser() -> Parser:
    from svft_diffusion.exchange.conversion import PATTERNS

    parser = Parser(prog="svft-diffusion import", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="one file, or one for each component")
    parser.add_argument(
        "--base", required=True, metavar="MODEL",
        help="the base model that the files were trained on: toybox, a diffusers folder, or a Hub name",
    )  # fmt: skip
    add_version_flags(parser)
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="OUT.safetensors", help="the adapter file to write"
    )
    parser.add_argument("--pattern", choices=PATTERNS, help="entries to keep (default for a LoRA: random, the largest)")
    parser.add_argument("--off_diagonals", type=int, help="width of the pattern (default: 2)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser
