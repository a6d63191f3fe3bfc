"""``svft-diffusion inspect``: what an adapter file, or a picture that carries one, says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svft_diffusion.cli.arguments import Parser
from svft_diffusion.errors import UserError
from svft_diffusion.terminal import json_text, printable

if TYPE_CHECKING:
    from svft_diffusion.inspection.picture import PictureFacts

_DESCRIPTION = """\
Show what an adapter is: its method, base model, trigger, size, training, and how much it changes in each block.

Of a PNG picture also how it was made, and the adapters that it carries. Nothing else is needed, no base model either.
"""
_EPILOG = """examples:
  svft-diffusion inspect outputs/robot/adapter.safetensors --layers
  svft-diffusion inspect picture.png --extract adapters
"""


def run(argv: Sequence[str]) -> None:
    """Run the command with its arguments.

    Raises:
        UserError: the file is neither an adapter nor a picture of this product, or damaged; or an adapter can't be
            written where it should be extracted to, and none is then.
    """
    options = _parser().parse_args(argv)

    # Heavy imports come after the arguments, so that --help and typing errors answer at once.
    from svft_diffusion.files.carrier import PNG_SIGNATURE
    from svft_diffusion.files.container import read_bytes
    from svft_diffusion.files.training_folder import adapter_file
    from svft_diffusion.inspection.card import adapter_card, picture_card
    from svft_diffusion.inspection.facts import facts_of_adapter
    from svft_diffusion.inspection.picture import extract, facts_of_picture

    file = adapter_file(options.file)
    data = read_bytes(file)
    if not data.startswith(PNG_SIGNATURE):
        if options.extract is not None:
            raise UserError(f"{file} is no PNG picture; --extract takes adapters out of one")
        facts = facts_of_adapter(data, str(file))
        card = [printable(str(file)), *adapter_card(facts, layers=options.layers)]
        print(json_text({"kind": "adapter", **facts.to_json()}) if options.json else "\n".join(card))
        return
    picture = facts_of_picture(data, file)
    written = [] if options.extract is None else extract(picture, options.extract, overwrite=options.overwrite)
    if options.json:
        print(json_text(_picture_json(picture, written)))
        return
    print("\n".join([printable(str(file)), *picture_card(picture.settings or {})]))
    for carried in picture.adapters:
        print(f"\ncarries the adapter {printable(carried.name)}{_at_weight(carried.weight)}")
        print("\n".join(adapter_card(carried.facts, layers=options.layers)))
    if not picture.adapters:
        print("carries no adapter")
    for path in written:
        print(f"wrote {printable(str(path))}")


def _at_weight(weight: float | None) -> str:
    return "" if weight is None else f", which acted at weight {weight:g}"


def _picture_json(picture: PictureFacts, written: Sequence[Path]) -> dict[str, Any]:
    return {
        "kind": "picture",
        "file": str(picture.file),
        "settings": picture.settings,
        "adapters": [
            {"name": carried.name, "weight": carried.weight, **carried.facts.to_json()} for carried in picture.adapters
        ],
        "extracted": [str(path) for path in written],
    }


def _parser() -> Parser:
    parser = Parser(prog="svft-diffusion inspect", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("file", type=Path, metavar="FILE", help="the adapter, the folder it was trained into, or a PNG")
    parser.add_argument("--layers", action="store_true", help="list the norms of every layer instead of every block")
    parser.add_argument(
        "--extract", type=Path, metavar="FOLDER", help="write the adapters that a picture carries there"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files of the same names in FOLDER")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser
