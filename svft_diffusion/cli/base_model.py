"""The base model of commands that work on adapter files: its flags, the base that the files name, loading it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svft_diffusion.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_NAME_THE_BASE = "say with --base where the base model is"


def add_base_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that takes the base which the files name, unless it is told another."""
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="toybox, a diffusers folder, a .safetensors file, or a Hub name (default: what the files name)",
    )
    add_version_flags(parser)
    parser.add_argument(
        "--on_mismatch", choices=("error", "align", "force"), default="error",
        help="what to do with another base than an adapter was trained on (default: error)",
    )  # fmt: skip


def add_version_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which files of a base model are meant."""
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--variant", help="file variant of the base model, such as fp16")
    parser.add_argument(
        "--base_config", type=Path, metavar="FOLDER",
        help="for a .safetensors file as base: a pipeline folder with its settings and tokenizers (default: the Hub's)",
    )  # fmt: skip


def base_of(files: Sequence[Path], options: argparse.Namespace) -> str:
    """The base model that was asked for, or that all files name; another one's adapters are fitted to the first's.

    Of a folder, which may be another machine's, the files know the last part.

    Raises:
        UserError: the files name several, and ``--on_mismatch`` is ``error``; or there is no such base; or a file is
            no adapter.
    """
    from svft_diffusion.files import read_header
    from svft_diffusion.models.loading import resolve_base

    if options.base is not None:
        resolve_base(options.base, options.base_config)
        return str(options.base)
    names = {file: read_header(file).base.name for file in files}
    first, base = next(iter(names.items()))
    for other, name in names.items():
        if name != base and options.on_mismatch == "error":
            raise UserError(
                f"{first} was trained on {base}, {other} on {name}: name the base for both with --base, "
                "and with --on_mismatch align adapters of a similar one are fitted to it"
            )
    try:
        resolve_base(base)
    except UserError as problem:
        raise UserError(f"{problem}; {_NAME_THE_BASE}") from problem
    return base


def load_base(base: str, options: argparse.Namespace) -> DiffusionPipeline:
    """The pipeline of `base_of`.

    Raises:
        UserError: it can't be loaded.
    """
    from svft_diffusion.models.loading import load_pipeline

    try:
        return load_pipeline(base, revision=options.revision, variant=options.variant, base_config=options.base_config)
    except UserError as problem:
        raise problem if options.base is not None else UserError(f"{problem}; {_NAME_THE_BASE}") from problem
