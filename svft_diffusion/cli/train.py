"""``svft-diffusion train``, which is also ``train_dreambooth.py``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svft_diffusion.cli.arguments import Parser, add_settings, given_settings
from svft_diffusion.cli.familiar_flags import refuse_foreign_settings, set_apart
from svft_diffusion.errors import UserError
from svft_diffusion.settings import config_from_mapping
from svft_diffusion.structured_files import read_structured
from svft_diffusion.training.checks import check_nothing_is_overwritten
from svft_diffusion.training.config import TrainingConfig

_DESCRIPTION = """\
Train an adapter on a few photos of a subject (DreamBooth).

  svft-diffusion train --instance_data_dir photos --instance_prompt "a photo of sks dog" --output_dir my-dog
"""


def run(argv: Sequence[str]) -> None:
    """Train with the settings of the command line, which win over those of ``--config``."""
    parser = Parser(set_apart=set_apart, prog="svft-diffusion train", description=_DESCRIPTION)
    parser.add_argument(
        "--config", type=Path, metavar="FILE.yaml", help="settings from a file; those on the command line win"
    )
    parser.add_argument("--json", action="store_true", help="print what --dry_run measures as JSON")
    add_settings(parser, TrainingConfig)
    options = parser.parse_args(argv)
    settings = read_settings(options.config) if options.config else {}
    refuse_foreign_settings(settings, options.config)
    check_settings_of_file(TrainingConfig, settings, options.config)
    config = config_from_mapping(TrainingConfig, settings | given_settings(TrainingConfig, options))

    if options.json and not config.dry_run:
        raise UserError("--json prints what --dry_run measures; add that flag or leave this one out")
    check_nothing_is_overwritten(config)

    from accelerate import PartialState

    if os.environ.get("RANK", "0") == "0":  # not asked of accelerate, which would set processes up for good
        for note in parser.notes:
            print(note, file=sys.stderr)
    if config.dry_run:
        from svft_diffusion.training.dry_run import dry_run

        with contextlib.redirect_stdout(sys.stderr):  # where what it says on the way belongs
            report = dry_run(config)
        PartialState().print(json.dumps(report.to_mapping()) if options.json else report.in_words())
        return

    from svft_diffusion.training.trainer import train  # heavy; --help and typing errors come first

    result = train(config)
    size = result.adapter.stat().st_size / 1000
    PartialState().print(f"{result.adapter}: {size:.1f} kB, {result.trained_values:,} values, {result.seconds:.0f} s")


def read_settings(file: Path) -> dict[str, Any]:
    """Settings from a YAML file.

    Raises:
        UserError: no such file, or it holds something else; the message names the line.
    """
    settings = read_structured(file, "--config")
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"--config {file} must hold lines of 'name: value'")
    return settings


def check_settings_of_file(config_class: type, settings: Mapping[str, Any], file: Path) -> None:
    """Raise `UserError`, which names the file, for an unknown name or a value of the wrong type."""
    try:
        config_from_mapping(config_class, settings)
    except UserError as problem:
        raise UserError(f"--config {file}: {problem}") from None
