"""``svft-diffusion merge``: bake adapters into a complete model that diffusers alone can load."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svft_diffusion.cli.arguments import Parser
from svft_diffusion.cli.base_model import add_base_flags, base_of, load_base
from svft_diffusion.errors import UserError
from svft_diffusion.terminal import json_text

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from svft_diffusion.exchange.merge_card import Ingredient

_DESCRIPTION = """\
Bake one or several adapters into a complete model that loads with nothing but diffusers.

OUT is a folder, with the tokenizer and all else that the base has; or, if it ends in .safetensors, one checkpoint in
the original layout of Stable Diffusion 1.x, 2.x or XL, which ComfyUI, A1111 and Forge read too.

Sums run in float32 and are rounded once, to the dtype of the output.
"""
_EPILOG = """examples:
  svft-diffusion merge outputs/robot/adapter.safetensors:0.8 -o robot-model
  svft-diffusion merge dog.safetensors style.safetensors:unet=0.5 --base MODEL -o dog-model.safetensors
"""


def run(argv: Sequence[str]) -> None:
    """Run the command with its arguments.

    Raises:
        UserError: the adapters, the base or the output don't fit; what was at the output is as it was.
    """
    options = _parser().parse_args(argv)

    # Heavy imports come after the arguments, so that --help and typing errors answer at once.
    from svft_diffusion.adapters import load_adapter, set_adapters
    from svft_diffusion.exchange.merge_card import Ingredient
    from svft_diffusion.exchange.merging import DTYPES, merge_adapters, stored_dtypes
    from svft_diffusion.exchange.single_file_names import check_single_file_layout
    from svft_diffusion.models import base_display_name
    from svft_diffusion.models.loading import is_single_file
    from svft_diffusion.sampling.adapter_choice import (
        AdapterChoice,
        check_adapters,
        file_label,
        parse_weighted_files,
    )

    given = parse_weighted_files(options.adapters)
    files = [item.file for item in given]
    base = base_of(files, options)
    _check_output(options.output, base, files, overwrite=options.overwrite)
    choices = [AdapterChoice(file) for file in files]
    adapters = check_adapters(choices, base, variant=options.variant, on_mismatch=options.on_mismatch)
    pipeline = load_base(base, options)
    if _is_single_file(options.output):
        check_single_file_layout(pipeline)  # before the adapters, which take a while
    for adapter in adapters:
        load_adapter(pipeline, adapter.file, adapter.name, on_mismatch=options.on_mismatch)
    set_adapters(pipeline, {adapter.name: item.weight for adapter, item in zip(adapters, given, strict=True)})
    dtypes = stored_dtypes(pipeline, options.variant, Path(base).expanduser() if is_single_file(base) else None)
    if options.dtype is not None:
        dtypes = dict.fromkeys(dtypes, DTYPES[options.dtype])
    layers = merge_adapters(pipeline, dtypes)
    ingredients = [
        Ingredient(file_label(adapter.file), adapter.sha256, item.weight, adapter.header)
        for adapter, item in zip(adapters, given, strict=True)
    ]
    _write(pipeline, base, ingredients, options)
    report = {
        "output": str(options.output),
        "bytes": sum(file.stat().st_size for file in [options.output, *options.output.rglob("*")] if file.is_file()),
        "base": base_display_name(base),
        "dtypes": {component: str(dtype).removeprefix("torch.") for component, dtype in dtypes.items()},
        "layers": layers,
        "left_out_tokens": sorted(
            {token for item in adapters for listed in item.header.tokens.values() for token in listed}
        ),
        "merged_from": [ingredient.to_json() for ingredient in ingredients],
    }
    print(json_text(report) if options.json else _summary(report))


def _write(
    pipeline: DiffusionPipeline, base: str, ingredients: Sequence[Ingredient], options: argparse.Namespace
) -> None:
    from svft_diffusion.exchange.merge_card import merged_card, merged_metadata
    from svft_diffusion.exchange.pipeline_folder import write_pipeline_folder
    from svft_diffusion.exchange.single_file import write_single_file
    from svft_diffusion.models import base_display_name, hub_name

    if _is_single_file(options.output):
        metadata = merged_metadata(pipeline, options.output.stem, base_display_name(base), ingredients)
        write_single_file(pipeline, options.output, metadata=metadata, overwrite=options.overwrite)
    else:
        card = merged_card(base_display_name(base), ingredients, hub_name=hub_name(base))
        write_pipeline_folder(pipeline, options.output, card=card, overwrite=options.overwrite)


def _summary(report: Mapping[str, Any]) -> str:
    layers = ", ".join(f"{number} of the {component}" for component, number in report["layers"].items()) or "none"
    number = len(report["merged_from"])
    lines = [
        f"merged {number} adapter{'' if number == 1 else 's'} into {report['base']}; layers that changed: {layers}"
    ]
    if tokens := report["left_out_tokens"]:
        lines.append(f"left out: the learned tokens {', '.join(tokens)}; write prompts without them")
    lines.append(f"wrote {report['output']} ({report['bytes'] / 1e6:.1f} MB)")
    return "\n".join(lines)


def _is_single_file(output: Path) -> bool:
    return output.suffix == ".safetensors"


def _check_output(output: Path, base: str, files: Sequence[Path], *, overwrite: bool) -> None:
    from svft_diffusion.exchange.pipeline_folder import check_output_folder
    from svft_diffusion.files.whole_files import check_output_file
    from svft_diffusion.models.loading import resolve_base

    folder = Path(resolve_base(base))
    if _is_single_file(output):
        inputs = [folder] if folder.is_file() else folder.rglob("*.safetensors")
        check_output_file(output, overwrite=overwrite, inputs=[*files, *inputs])
        return
    if output.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(f"the output {output} must be a folder, or a file that ends in .safetensors")
    check_output_folder(output, overwrite=overwrite, inputs=[*files, *([folder] if folder.is_dir() else [])])


def _parser() -> Parser:
    parser = Parser(prog="svft-diffusion merge", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument(
        "adapters", nargs="+", metavar="FILE[:WEIGHT]",
        help="an adapter or the folder it was trained into, and its weight: a number, or unet=0.7,te=0.3 (default: 1)",
    )  # fmt: skip
    add_base_flags(parser)
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"),
        help="of the output's weights (default: of each component, that of the base's files)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder or .safetensors file")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser
