"""``svft-diffusion shrink``: a smaller file with the part of an adapter that matters most."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from svft_diffusion.cli.arguments import Parser
from svft_diffusion.errors import UserError

_DESCRIPTION = """\
Keep the part of an adapter that matters most, in a smaller file.

Kept are the values that change the weights most, over all layers together: of that many values no others come
closer to the whole adapter. The shifts of a layer's bias are kept or dropped together. Printed: how many numbers and
layers are left, and the relative error of all changes in total and in the layers that lose most.
"""
_EPILOG = """examples:
  svft-diffusion shrink outputs/robot/adapter.safetensors --energy 0.99 -o robot-small.safetensors
  svft-diffusion shrink robot.safetensors --size 20kB -o robot-20kB.safetensors
"""
_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "kib": 2**10, "mib": 2**20}


def run(argv: Sequence[str]) -> None:
    """Run the command with its arguments.

    Raises:
        UserError: the adapter, the base model, the amount or the output don't fit; nothing is written then.
    """
    options = _parser().parse_args(argv)

    # Heavy imports come after the arguments, so that --help and typing errors answer at once.
    from svft_diffusion.adapters import load_adapter, save_adapter, unload_adapter
    from svft_diffusion.adapters.tokens import add_tokens, tokens_in
    from svft_diffusion.algebra.shrink import check_amount, shrink_adapter
    from svft_diffusion.files import metadata_of, read_adapter
    from svft_diffusion.files.training_folder import adapter_file
    from svft_diffusion.files.whole_files import check_output_file
    from svft_diffusion.models.loading import load_pipeline
    from svft_diffusion.sampling.adapter_choice import check_adapter

    check_amount(options.keep, options.size, options.energy)
    file = adapter_file(options.file)
    check_output_file(options.output, overwrite=options.overwrite, inputs=[file])
    header, tensors = read_adapter(file)
    base: str = options.base or header.base.name
    try:
        check_adapter(file, base, name="whole", variant=options.variant, on_mismatch=options.on_mismatch)
        pipeline = load_pipeline(base, revision=options.revision, variant=options.variant)
    except UserError as problem:
        raise (
            problem if options.base is not None else UserError(f"{problem}; --base says where the base is")
        ) from problem
    load_adapter(pipeline, file, "whole", on_mismatch=options.on_mismatch)
    metadata = metadata_of(header)
    report = shrink_adapter(
        pipeline, "whole", "shrunk", keep=options.keep, size=options.size, energy=options.energy, metadata=metadata
    )
    unload_adapter(pipeline, "whole")
    if header.tokens:
        add_tokens(pipeline, "shrunk", tokens_in(header.tokens, tensors))
    save_adapter(pipeline, "shrunk", options.output, metadata=metadata)
    before, after = file.stat().st_size, options.output.stat().st_size
    if options.json:
        written = {"file": str(options.output), "bytes_before": before, "bytes": after}
        print(json.dumps({**written, **report.to_json()}, indent=2))
        return
    print(report)
    print(f"{options.output}: {after / 1000:.1f} kB, was {before / 1000:.1f} kB")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="svft-diffusion shrink", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("file", type=Path, metavar="FILE", help="the adapter, or the folder it was trained into")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--keep", type=int, metavar="K", help="how many numbers to keep")
    amount.add_argument(
        "--size", type=_size, metavar="SIZE", help="keep as many as fit in a file of this size, such as 20kB or 20KiB"
    )
    amount.add_argument(
        "--energy", type=float, metavar="PART",
        help="keep as few as hold this part of the squared norm of all changes, such as 0.99; the error is "
        "sqrt(1 - PART)",
    )  # fmt: skip
    parser.add_argument("--base", metavar="MODEL", help="the base model (default: the one that the file names)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--variant", help="file variant of the base model, such as fp16")
    parser.add_argument(
        "--on_mismatch", choices=("error", "align", "force"), default="error",
        help="what to do with another base than the adapter was trained on (default: error)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors", help="what to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _size(text: str) -> int:
    """``20kB`` -> 20000, ``20KiB`` -> 20480, ``1.5 MB`` -> 1500000; a number alone is bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].lower() not in _BYTES:
        raise argparse.ArgumentTypeError(f"expected a size such as 20kB, 20KiB or 20000, got {text!r}")
    return int(float(match[1]) * _BYTES[match[2].lower()])
