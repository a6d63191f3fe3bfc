"""``svft-diffusion blend``: one adapter of several, and a report on how they interfere."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svft_diffusion.cli.arguments import Parser
from svft_diffusion.cli.base_model import add_base_flags, base_of, load_base
from svft_diffusion.errors import UserError
from svft_diffusion.terminal import json_text, printable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from svft_diffusion.adapters.weights import AdapterWeight
    from svft_diffusion.algebra.blend_metadata import BlendSource
    from svft_diffusion.algebra.blending import BlendFacts
    from svft_diffusion.algebra.interference import Interference
    from svft_diffusion.sampling.adapter_choice import CheckedAdapter, WeightedFile

_DESCRIPTION = """\
Make one adapter file that does what several do together at their weights, exactly.

A weight follows the last colon: a number, or one for each component, unet=0.5,te=0.2 (te is the text encoder; te2, te3
and transformer are the others; what is not named is off). Without one it is 1; a negative one takes away.
"""
_EPILOG = """examples:
  svft-diffusion blend dog.safetensors:0.7 style.safetensors:0.3 -o both.safetensors
  svft-diffusion blend dog.safetensors:unet=0.8,te=0.4 style.safetensors --balance -o both.safetensors
  svft-diffusion blend dog.safetensors painting.safetensors --style_mix -o painted-dog.safetensors
  svft-diffusion blend dog.safetensors style.safetensors --report --plot interference.png
"""


def run(argv: Sequence[str]) -> None:
    """Run the command with its arguments.

    Raises:
        UserError: the files, their weights, the base model or an output don't fit; nothing is written then.
    """
    options = _parser().parse_args(argv)

    # Heavy imports come after the arguments, so that --help and typing errors answer at once.
    from svft_diffusion.algebra.blend_metadata import BlendSource, shared_triggers
    from svft_diffusion.algebra.blending import BlendFacts, compare_sources
    from svft_diffusion.algebra.interference_plot import write_plot
    from svft_diffusion.algebra.interference_report import report_json
    from svft_diffusion.sampling.adapter_choice import file_label, parse_weighted_files

    files = parse_weighted_files(options.adapters)
    weights = _weights(files, options)
    facts = BlendFacts(options.title, options.trigger, options.dtype)
    _check_outputs([file.file for file in files], weights, options)
    pipe, base_name, loaded = _loaded(files, weights, options)
    sources = {
        item.name: BlendSource(file_label(item.file), item.sha256, item.header, weight)
        for item, weight in zip(loaded, weights, strict=True)
    }
    sources, found = compare_sources(pipe, sources, balance=options.balance)
    if options.style_mix:
        found = replace(found, clipping=None)  # no layer has a sum
    by_name = {name: source.weight for name, source in sources.items()}
    result: dict[str, Any] = {"interference": report_json(found), "weights": by_name}
    if options.output is not None:
        result |= _write(pipe, sources, facts, base_name, options)
    if options.plot is not None:
        write_plot(found, options.plot, overwrite=options.overwrite)
    for trigger, named in shared_triggers(sources.values()).items():
        warning = f"{' and '.join(named)} have the same trigger {trigger!r}: a prompt can't tell them apart"
        print(f"warning: {printable(warning)}", file=sys.stderr)
    _show(result, found, list(sources.values()), options)


def _check_outputs(files: Sequence[Path], weights: Sequence[AdapterWeight], options: argparse.Namespace) -> None:
    from svft_diffusion.algebra.interference_plot import check_plot
    from svft_diffusion.files.whole_files import check_output_file

    if options.output is not None:
        check_output_file(options.output, overwrite=options.overwrite, inputs=files)
    if options.plot is not None:
        check_plot(options.plot, overwrite=options.overwrite, inputs=files)
        if sum(weight != 0 for weight in weights) == 1:
            raise UserError("a plot compares adapters, and there is only one")


def _loaded(
    files: Sequence[WeightedFile], weights: Sequence[AdapterWeight], options: argparse.Namespace
) -> tuple[DiffusionPipeline, str, list[CheckedAdapter]]:
    """The base model with all adapters in it, its name, and the adapters; all is checked before it is loaded."""
    from svft_diffusion.adapters import load_adapter
    from svft_diffusion.algebra.blending import base_name_of, check_blend
    from svft_diffusion.files import read_adapter
    from svft_diffusion.sampling.adapter_choice import AdapterChoice, check_adapters

    contents = [(str(file.file), *read_adapter(file.file)) for file in files]
    check_blend(contents, weights, value_dtype=options.dtype, compared_only=options.output is None)
    base = base_of([file.file for file in files], options)
    choices = [AdapterChoice(file.file) for file in files]
    checked = check_adapters(choices, base, variant=options.variant, on_mismatch=options.on_mismatch)
    pipe = load_base(base, options)
    for adapter in checked:
        load_adapter(pipe, adapter.file, adapter.name, on_mismatch=options.on_mismatch)
    headers = [header for _, header, _ in contents]
    return pipe, base_name_of(headers, base, is_known=options.on_mismatch == "error"), checked


def _weights(files: Sequence[WeightedFile], options: argparse.Namespace) -> list[AdapterWeight]:
    """The weight of each file, by the flags or as given."""
    modes = {
        "--average": options.average,
        "--interpolate": options.interpolate is not None,
        "--style_mix": options.style_mix,
    }
    chosen = [flag for flag, is_on in modes.items() if is_on]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} exclude each other")
    if chosen and any(file.weight != 1.0 for file in files):
        raise UserError(f"{chosen[0]} sets the weights itself; give the files without weights")
    if (options.interpolate is not None or options.style_mix) and len(files) != 2:
        raise UserError(f"{chosen[0]} takes two adapters, got {len(files)}")
    if options.balance and (options.style_mix or options.interpolate is not None):
        raise UserError(f"--balance goes with weights or --average, not with {chosen[0]}")
    if options.geometry_blocks is not None and not options.style_mix:
        raise UserError("--geometry_blocks belongs to --style_mix")
    if options.output is None:
        if not options.report:
            raise UserError("say where to write with -o OUT.safetensors, or ask for the --report alone")
        of_file = {"--title": options.title, "--trigger": options.trigger, "--dtype": options.dtype}
        given = [flag for flag, value in of_file.items() if value is not None]
        if given:
            raise UserError(f"{' and '.join(given)} belongs to -o OUT.safetensors: a report writes no adapter")
    if options.interpolate is not None and not math.isfinite(options.interpolate):
        raise UserError(f"--interpolate must be a finite number, got {options.interpolate}")
    if options.average:
        return [1 / len(files)] * len(files)
    if options.interpolate is not None:
        return [1 - options.interpolate, options.interpolate]
    return [file.weight for file in files]


def _write(
    pipe: DiffusionPipeline,
    sources: Mapping[str, BlendSource],
    facts: BlendFacts,
    base_name: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Write the blend; what there is to say of it."""
    from svft_diffusion.algebra.blending import write_blend, write_style_mix
    from svft_diffusion.sampling.adapter_choice import unique_names

    name = unique_names([*sources, "blend"])[-1]
    details: dict[str, Any] = {}
    if options.style_mix:
        details["geometry_blocks"] = write_style_mix(
            pipe, sources, name, options.output, facts, base_name=base_name, geometry_blocks=options.geometry_blocks
        )
    else:
        write_blend(pipe, sources, name, options.output, facts, base_name=base_name)
    return {"output": str(options.output), "bytes": options.output.stat().st_size, **details}


def _show(
    result: Mapping[str, Any], found: Interference, sources: Sequence[BlendSource], options: argparse.Namespace
) -> None:
    from svft_diffusion.algebra.interference_report import report_lines, summary_lines, weight_text

    if options.json:
        print(json_text(result))
        return
    print("\n".join(report_lines(found) if options.report else summary_lines(found)))
    if options.plot is not None:
        print(f"wrote {options.plot}")
    if options.output is not None:
        weights = [weight_text(source.weight) for source in sources]
        roles = ["as geometry", "as appearance"] if options.style_mix else weights
        blended = ", ".join(f"{printable(source.file)} {role}" for source, role in zip(sources, roles, strict=True))
        print(f"wrote {options.output} ({result['bytes'] / 1000:.1f} kB): {blended}")


def _parser() -> Parser:
    parser = Parser(prog="svft-diffusion blend", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("adapters", nargs="+", metavar="FILE[:WEIGHT]", help="an adapter file, or its training folder")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.safetensors", help="the adapter file to write")
    parser.add_argument("--average", action="store_true", help="the mean of all")
    parser.add_argument("--interpolate", type=float, metavar="T", help="(1 - T) of the first and T of the second")
    parser.add_argument(
        "--style_mix", action="store_true", help="geometry layers of the first, all other layers of the second"
    )
    parser.add_argument(
        "--geometry_blocks", nargs="+", metavar="PATH",
        help="with --style_mix, modules of the denoiser (default: from the last attention on the way down of a UNet "
        "through its mid block)",
    )  # fmt: skip
    parser.add_argument(
        "--balance", action="store_true", help="scale the weights so that equal ones mean updates of equal size"
    )
    add_base_flags(parser)
    parser.add_argument(
        "--report", action="store_true", help="show how the adapters interfere in every block; needs no -o"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write that report as a picture")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), help="of the values in the file (default: as in the sources)"
    )
    parser.add_argument("--title", help="of the new adapter (default: names its sources)")
    parser.add_argument("--trigger", help="what a prompt calls it by (default: the triggers of all sources)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there to write")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser
