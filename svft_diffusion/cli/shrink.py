"""``svft-diffusion shrink``: a smaller file with the part of an adapter that matters most."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from svft_diffusion.cli.arguments import Parser
from svft_diffusion.cli.base_model import add_base_flags, base_of, load_base
from svft_diffusion.terminal import json_text

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
    from svft_diffusion.models import base_display_name
    from svft_diffusion.sampling.adapter_choice import check_adapter

    check_amount(options.keep, options.size, options.energy)
    file = adapter_file(options.file)
    check_output_file(options.output, overwrite=options.overwrite, inputs=[file])
    header, tensors = read_adapter(file)
    base = base_of([file], options)
    check_adapter(file, base, name="whole", variant=options.variant, on_mismatch=options.on_mismatch)
    pipeline = load_base(base, options)
    load_adapter(pipeline, file, "whole", on_mismatch=options.on_mismatch)
    metadata = metadata_of(header)
    if options.on_mismatch != "error":  # the result stands on this base now
        metadata = replace(metadata, base_name=base_display_name(base))
    report = shrink_adapter(
        pipeline, "whole", "shrunk", keep=options.keep, size=options.size, energy=options.energy, metadata=metadata
    )
    unload_adapter(pipeline, "whole")
    if header.tokens:
        add_tokens(pipeline, "shrunk", tokens_in(header.tokens, tensors))
    save_adapter(pipeline, "shrunk", options.output, metadata=metadata)
    before, after = file.stat().st_size, options.output.stat().st_size
    larger = (
        "the file did not become smaller: each value now stands beside its position, which takes 4 bytes; keep less"
    )
    for warning in filter(None, (larger if after >= before else None, report.warning)):
        print(f"warning: {warning}", file=sys.stderr)
    if options.json:
        written = {"output": str(options.output), "bytes": after, "bytes_before": before}
        print(json_text({**written, **report.to_json()}))
        return
    print(report)
    print(f"wrote {options.output} ({after / 1000:.1f} kB, was {before / 1000:.1f} kB)")


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
    add_base_flags(parser)
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
