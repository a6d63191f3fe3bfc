"""``svft-diffusion export``: an adapter as a LoRA file that other tools read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from svft_diffusion.cli.arguments import Parser
from svft_diffusion.cli.base_model import add_base_flags, base_of, load_base
from svft_diffusion.terminal import json_text

_DESCRIPTION = """\
Write an adapter as a LoRA file that other tools read without this package.

  kohya       read by diffusers; named by the rules of ComfyUI, A1111, Forge and kohya's scripts
  diffusers   read by diffusers and PEFT
  comfy-full  named by the rules of ComfyUI; also holds biases, norms and embeddings, as dense differences

Printed: for each layer and in total the relative error of the file as written, and what it could not hold.
"""
_EPILOG = """example:
  svft-diffusion export outputs/robot/adapter.safetensors --rank full -o robot-lora.safetensors
"""


def run(argv: Sequence[str]) -> None:
    """Run the command with its arguments.

    Raises:
        UserError: the adapter, the base model or the output don't fit; nothing is written then.
    """
    options = _parser().parse_args(argv)

    # Heavy imports come after the arguments, so that --help and typing errors answer at once.
    from svft_diffusion.adapters import load_adapter
    from svft_diffusion.exchange.export import check_arguments, export_lora
    from svft_diffusion.exchange.lora_file import write_lora
    from svft_diffusion.exchange.lora_metadata import described
    from svft_diffusion.files import read_header
    from svft_diffusion.files.training_folder import adapter_file
    from svft_diffusion.files.whole_files import check_output_file
    from svft_diffusion.sampling.adapter_choice import check_adapter

    check_arguments(options.format, options.rank, options.strength, options.dtype)
    file = adapter_file(options.file)
    check_output_file(options.output, overwrite=options.overwrite, inputs=[file])
    header = read_header(file)
    base = base_of([file], options)
    check_adapter(file, base, name="exported", variant=options.variant, on_mismatch=options.on_mismatch)
    pipeline = load_base(base, options)
    load_adapter(pipeline, file, "exported", on_mismatch=options.on_mismatch)
    exported = export_lora(
        pipeline,
        "exported",
        format=options.format,
        rank=options.rank,
        strength=options.strength,
        dtype=options.dtype,
    )
    written = write_lora(
        exported, options.output, described=described(header, options.strength), overwrite=options.overwrite
    )
    size = written.stat().st_size
    if options.json:
        described_file = {"output": str(written), "bytes": size, "left_out_tokens": header.tokens}
        print(json_text({**described_file, **exported.report.to_json()}))
        return
    print(exported.report)
    if isinstance(options.rank, int) and exported.report.layers and options.rank > exported.report.rank:
        print(f"rank {options.rank} was cut to {exported.report.rank}, that of the adapter: more would add only zeros")
    for component, tokens in sorted(header.tokens.items()):
        print(f"left out: tokens that {component} learned ({', '.join(tokens)}): a LoRA has no place for new tokens")
    print(f"wrote {written} ({size / 1000:.1f} kB)")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="svft-diffusion export", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("file", type=Path, metavar="FILE", help="the adapter, or the folder it was trained into")
    add_base_flags(parser)
    parser.add_argument(
        "--format", choices=("kohya", "diffusers", "comfy-full"), default="kohya", help="see above (default: kohya)"
    )
    parser.add_argument(
        "--rank", type=_rank, default="auto", metavar="N|auto|full",
        help="of the LoRA; auto: the smallest with an error below 1 %%, at most 128 (default: auto)",
    )  # fmt: skip
    parser.add_argument("--strength", type=float, default=1.0, help="of the adapter in the file (default: 1)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32",
        help="of the values; float16 halves the file, and its rounding is counted as error (default: float32)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors", help="what to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _rank(text: str) -> int | Literal["auto", "full"]:
    if text == "auto" or text == "full":
        return "auto" if text == "auto" else "full"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, auto or full, got {text!r}") from None
