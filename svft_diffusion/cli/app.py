"""``svft-diffusion app``: open the web app."""

from __future__ import annotations

import getpass
import importlib.util
import os
import sys
from collections.abc import Sequence

from svft_diffusion.app.config import AppConfig
from svft_diffusion.cli.arguments import Parser, add_settings, given_settings
from svft_diffusion.cli.early_checks import (
    check_adapter_is_there,
    check_base_is_there,
    check_folder_can_be,
    check_port_is_free,
)
from svft_diffusion.errors import UserError

# Before libraries are imported that read it: nobody is told that the app runs, or asked for a newer version.
_QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_TELEMETRY": "1"}


def run(argv: Sequence[str]) -> None:
    """Run the command with its arguments, until it is interrupted.

    Raises:
        UserError: Gradio is missing, the port is taken, or what `svft_diffusion.app.serving.launch` raises.
    """
    parser = Parser(prog="svft-diffusion app", description="Train, blend and use adapters in a browser.")
    add_settings(parser, AppConfig)
    parser.add_argument_group("logins").add_argument(
        "--add_login", metavar="NAME", help="ask for a password, write both to --auth_file, and end"
    )
    options = parser.parse_args(argv)
    config = AppConfig(**given_settings(AppConfig, options))
    if importlib.util.find_spec("gradio") is None:
        raise UserError('the app needs Gradio: pip install "svft-diffusion[app]"')
    os.environ.update(_QUIET)

    if options.add_login is not None:
        _add_login(config, options.add_login)
        return

    _check_at_once(config)

    # Heavy imports come after the arguments, so that --help and typing errors answer at once.
    from svft_diffusion.app.serving.launch import build_app, launch

    launch(build_app(config), config)


def _check_at_once(config: AppConfig) -> None:
    """Refuse what is missing or taken before the imports and the base model, which take their time."""
    for base in config.bases:
        check_base_is_there(base)
    for adapter in config.adapter:
        check_adapter_is_there(adapter)
    check_folder_can_be("--adapters_dir", config.adapters_dir)
    check_folder_can_be("--output_dir", config.output_dir)
    check_port_is_free(config.server_name, config.server_port)


def _add_login(config: AppConfig, name: str) -> None:
    from svft_diffusion.app.serving.logins import add_login

    if config.auth_file is None:
        raise UserError("--add_login needs --auth_file FILE, the file to write to")
    if sys.stdin.isatty():
        password = getpass.getpass(f"Password for {name}: ")
        if getpass.getpass("Once more: ") != password:
            raise UserError("these were two passwords; nothing was written")
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    add_login(config.auth_file, name, password)
    print(f"{name} can log in with this password when the app starts with --auth_file {config.auth_file}")
