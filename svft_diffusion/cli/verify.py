"""``svft-diffusion verify``: are adapter files sound, and do they do on a base what they did in training?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from svft_diffusion.cli.arguments import Parser
from svft_diffusion.cli.base_model import add_version_flags
from svft_diffusion.errors import UserError
from svft_diffusion.terminal import json_text, printable

_DESCRIPTION = """\
Verify adapter files: each is whole, holds what was written into it, and nothing but finite numbers.

With --base also: how many of its weights are those of the training, exactly or when rounded to 16 bit, whether the
adapter loads on it, and how far its update there is from the trained one.
The exit code is 0 if all files pass, else 2.
"""
_EPILOG = """examples:
  svft-diffusion verify outputs/robot/adapter.safetensors
  svft-diffusion verify *.safetensors --base some/folder --json
"""


def run(argv: Sequence[str]) -> None:
    """Run the command with its arguments.

    Raises:
        UserError: a file does not pass, or there is no such base.
    """
    options = _parser().parse_args(argv)

    # Heavy imports come after the arguments, so that --help and typing errors answer at once.
    from svft_diffusion.files.training_folder import adapter_file
    from svft_diffusion.inspection.verification import Verifier
    from svft_diffusion.models.loading import resolve_base

    if options.base is not None:
        resolve_base(options.base, options.base_config)
    verifier = Verifier(
        options.base, revision=options.revision, variant=options.variant, base_config=options.base_config
    )
    results = []
    for file in options.files:
        result = verifier.verify(adapter_file(file))
        results.append(result)
        if not options.json and (result.problem is None or len(options.files) > 1):
            print(printable(str(result)), flush=True)
    if options.json:
        print(json_text([result.to_json() for result in results]))
    problems = [result.problem for result in results if result.problem is not None]
    if problems:
        raise UserError(problems[0] if len(results) == 1 else f"{len(problems)} of {len(results)} files failed")


def _parser() -> Parser:
    parser = Parser(prog="svft-diffusion verify", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="an adapter, a picture that carries one, or its folder"
    )
    parser.add_argument("--base", metavar="MODEL", help="a base model: toybox, a diffusers folder, or a Hub name")
    add_version_flags(parser)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser
