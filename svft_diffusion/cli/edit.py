"""``svft-diffusion edit``: one picture, edited."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svft_diffusion.cli.arguments import Parser, add_settings, given_settings
from svft_diffusion.cli.train import check_settings_of_file, read_settings
from svft_diffusion.editing.config import TRAINING_SETTINGS, EditConfig
from svft_diffusion.settings import config_from_mapping, path
from svft_diffusion.terminal import printable
from svft_diffusion.training.config import TrainingConfig

_DESCRIPTION = """\
Edit one picture: an adapter is trained on it, the noise that draws it is found, and the new prompt drawn from that.

  svft-diffusion edit robot.png --source_prompt "a photo of a robot on the grass" \\
      --prompt "a photo of a robot on the beach" -o edited.png

The adapter is kept beside the result, so that another prompt is quick. Without training:

  svft-diffusion edit robot.png --mode img2img --strength 0.7 --prompt "a photo of a cat on the grass"
  svft-diffusion edit robot.png --mode inpaint --mask mask.png --prompt "a photo of a robot with a hat"
"""

_OF_BASE = ("pretrained_model_name_or_path", "base_config", "revision", "variant")


def run(argv: Sequence[str]) -> None:
    """Run the command with its arguments.

    Raises:
        UserError: see `svft_diffusion.editing.edit.edit_picture`.
    """
    parser = Parser(prog="svft-diffusion edit", description=_DESCRIPTION)
    parser.add_argument("photo", type=path, metavar="PICTURE", help="the picture to edit")
    parser.add_argument("-o", dest="output", type=path, metavar="FILE", help="short for --output")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        help="settings of a training; those on the command line win, and what an edit decides itself is left out",
    )
    add_settings(parser, EditConfig)
    add_settings(parser, TrainingConfig, TRAINING_SETTINGS, prefix="training with --source_prompt: ")
    options = parser.parse_args(argv)
    given = given_settings(EditConfig, options)
    of_training = {name: value for name, value in given_settings(TrainingConfig, options).items() if name not in given}
    if options.config is not None:
        base, training = _from_file(options.config)
        given, of_training = base | given, training | of_training
    config = config_from_mapping(EditConfig, given)

    # Heavy imports come after the arguments, so that --help and typing errors answer at once.
    from svft_diffusion.editing.edit import edit_picture

    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        result = edit_picture(options.photo, config, of_training)
    if options.json:
        written = {
            "pictures": [{"strength": strength, "file": file.as_posix()} for strength, file in result.pictures.items()],
            "grid": None if result.grid is None else result.grid.as_posix(),
            "adapter": None if result.adapter is None else result.adapter.as_posix(),
            "adapter_reused": result.adapter_reused,
            "blacked_out": [file.as_posix() for file in result.blacked_out],
        }
        print(json.dumps(written))
        return
    for file in result.pictures.values():
        print(file)
    if result.blacked_out:
        names = ", ".join(file.name for file in result.blacked_out)
        print(
            f"blacked out by the base model's safety checker: {names}; the same command with --disable_safety_checker "
            "and --overwrite draws what is missing there"
        )
    if result.grid is not None:
        print(f"all of them at a glance: {result.grid}")
    if result.adapter is not None:
        print(f"{'with the adapter of an earlier edit' if result.adapter_reused else 'adapter'}: {result.adapter}")


def _from_file(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The base model and the training of a file with settings of a training; what else is in it is told and left out.

    Raises:
        UserError: it can't be read, or holds a setting that no training has.
    """
    settings = read_settings(file)
    check_settings_of_file(TrainingConfig, settings, file)
    unused = [name for name in settings if name not in (*TRAINING_SETTINGS, *_OF_BASE)]
    if unused:
        print(printable(f"an edit decides itself, and leaves out of {file}: {', '.join(unused)}"), file=sys.stderr)
    training = {name: value for name, value in settings.items() if name in TRAINING_SETTINGS}
    return {name: settings[name] for name in _OF_BASE if name in settings}, training
