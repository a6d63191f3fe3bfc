"""``svft-diffusion app``: open the web app."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from svft_diffusion.app.config import AppConfig
from svft_diffusion.cli.arguments import Parser, add_settings, config_from_options
from svft_diffusion.errors import UserError


def run(argv: Sequence[str]) -> None:
    """Run the command with its arguments, until it is interrupted.

    Raises:
        UserError: Gradio is missing, or what `svft_diffusion.app.launch` raises.
    """
    parser = Parser(prog="svft-diffusion app", description="Generate pictures and blend adapters in a browser.")
    add_settings(parser, AppConfig)
    config = config_from_options(AppConfig, parser.parse_args(argv))
    if importlib.util.find_spec("gradio") is None:
        raise UserError('the app needs Gradio: pip install "svft-diffusion[app]"')

    # Heavy imports come after the arguments, so that --help and typing errors answer at once.
    from svft_diffusion.app.launch import build_app, launch

    launch(build_app(config), config)
