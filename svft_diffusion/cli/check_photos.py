"""``svft-diffusion check-photos``: a look at a folder of photos before training on them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from svft_diffusion.cli.arguments import Parser
from svft_diffusion.errors import UserError
from svft_diffusion.terminal import json_text, printable

_DESCRIPTION = """\
Look at a folder of photos before training on them: which can be used and, among these, copies, blur, photos that are
too small, too long or on their side, and the same background everywhere. Training itself prints the same notes.
"""
_EPILOG = """examples:
  svft-diffusion check-photos photos --resolution 512
  svft-diffusion check-photos photos --resolution 1024 --aspect_ratio_buckets auto -o sheet.png
"""


def run(argv: Sequence[str]) -> None:
    """Run the command with its arguments.

    Raises:
        UserError: no usable photo, or the sheet can't be written.
    """
    options = _parser().parse_args(argv)

    # Heavy imports come after the arguments, so that --help and typing errors answer at once.
    from svft_diffusion.data.buckets import automatic_sizes, parse_sizes
    from svft_diffusion.data.contact_sheet import contact_sheet, write_contact_sheet
    from svft_diffusion.data.cutting import Cutter
    from svft_diffusion.data.photo_check import check_folder

    if options.resolution < 8 or options.resolution % 8:
        raise UserError(f"--resolution must be a multiple of 8, got {options.resolution}")
    sizes = [(options.resolution, options.resolution)]
    if options.aspect_ratio_buckets is not None:
        sizes = parse_sizes(options.aspect_ratio_buckets) or automatic_sizes(options.resolution)
    cutter = Cutter(
        tuple(sizes), options.center_crop, "lanczos", options.seed, options.random_flip, options.masked_loss
    )
    if options.output is not None:
        _check_output(options.output, options.overwrite)
    report = check_folder(options.folder, cutter)
    if options.output is not None:
        write_contact_sheet(contact_sheet(report.pictures, cutter), options.output)
    photos, skipped = [picture.path.name for picture in report.pictures], report.skipped
    if options.json:
        reasons = {file.path.name: file.reason for file in skipped}
        print(json_text({"photos": photos, "skipped": reasons, "notes": report.notes}))
        return
    print(f"photos: {len(photos)} in {printable(str(options.folder))}")
    for note in [*(f"skipped {file.path.name}: {file.reason}" for file in skipped), *report.notes]:
        print(printable(note))
    if options.output is not None:
        print(f"{options.output}: the pixels that training would see")


def _check_output(file: Path, overwrite: bool) -> None:
    if file.suffix.lower() != ".png":
        raise UserError(f"the output {file} must end in .png")
    if file.exists() and not overwrite:
        raise UserError(f"{file} is there already; choose another name, or replace it with --overwrite")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="svft-diffusion check-photos", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the photos of one subject")
    parser.add_argument("--resolution", type=int, default=512, help="that of the training (default: 512)")
    parser.add_argument("--aspect_ratio_buckets", metavar="H,W;H,W", help="as in training: a list of shapes, or auto")
    parser.add_argument("--center_crop", action="store_true", help="as in training")
    parser.add_argument("--random_flip", action="store_true", help="as in training")
    parser.add_argument("--masked_loss", action="store_true", help="as in training: masks are read, and shown")
    parser.add_argument("--seed", type=int, default=0, help="that of the training; random cuts follow from it")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="SHEET.png", help="write a sheet of the pixels that training would see"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    return parser
