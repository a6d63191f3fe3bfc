"""Starting the web app."""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import gradio as gr
from starlette.middleware import Middleware

from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.app.components.adapter_cards import chosen_adapters, with_card
from svft_diffusion.app.config import AppConfig
from svft_diffusion.app.context import AppContext
from svft_diffusion.app.drawing.studio import Studio
from svft_diffusion.app.jobs.training_jobs import TrainingJobs
from svft_diffusion.app.page import build_page, style, theme
from svft_diffusion.app.serving.logins import Login, read_logins
from svft_diffusion.app.serving.security import LOCAL_NAMES, Guard
from svft_diffusion.app.serving.served import blocked_paths
from svft_diffusion.app.shelf.library import Library
from svft_diffusion.errors import UserError
from svft_diffusion.factors import use_cache
from svft_diffusion.files import read_adapter
from svft_diffusion.models.loading import resolve_base
from svft_diffusion.sampling.adapter_choice import file_label, parse_adapter_choice
from svft_diffusion.sampling.devices import resolve_device

_MOST_WAITING = 32


def build_app(config: AppConfig) -> gr.Blocks:
    """The page of ``config``, with its base model loaded.

    Raises:
        UserError: a base model, adapter or device that can't be used, or what `launch` would find of the settings.
    """
    base = config.pretrained_model_name_or_path
    resolve_base(base, config.base_config)
    for other in config.base:
        resolve_base(other)
    _login(config)
    _check_mcp(config)
    use_cache(config.factor_cache, config.factor_cache_size)
    studio = Studio(
        config.output_dir,
        device=resolve_device(config.device),
        dtype=config.dtype,
        disable_safety_checker=config.disable_safety_checker,
        base_config=config.base_config,
        on_mismatch=cast(OnMismatch, config.on_mismatch),
        embed_adapter=config.embed_adapter,
        threads=config.threads,
    )
    library = Library(
        config.adapters_dir,
        config.uploads_dir,
        most_upload_bytes=config.max_upload_mb * 2**20,
        most_pixels=config.max_pixels,
    )
    library.empty_trash()
    cards = _first_cards(config, library)
    studio.open_base(base)
    return build_page(AppContext(config, studio, library, TrainingJobs(config.training_dir, config.device)), cards)


def _first_cards(config: AppConfig, library: Library) -> list[dict[str, Any]]:
    """Cards of the adapters that the command line names; a file from elsewhere is copied into the library."""
    cards: list[dict[str, Any]] = []
    for text in config.adapter:
        choice = parse_adapter_choice(text)
        read_adapter(choice.file)  # whose errors tell of files, those of the library of uploads
        cards = with_card(cards, library.add(choice.file, file_label(choice.file)), choice.weight)
    chosen_adapters(cards, library, config.pretrained_model_name_or_path, cast(OnMismatch, config.on_mismatch))
    return cards


def launch(page: gr.Blocks, config: AppConfig, *, wait: bool = True) -> str:
    """Serve the page, say where, and return the address; with ``wait`` not before the server is stopped.

    Raises:
        UserError: the port is taken, the pictures' folder can't be made, the logins can't be read, or a package is
            missing.
    """
    login = _login(config)
    _check_mcp(config)
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"can't write to {config.output_dir}: {problem.strerror or problem}") from problem
    host = f"[{config.server_name}]" if config.server_name.count(":") > 1 else config.server_name
    # With a login, or when everybody may come in, it may be reached through a proxy under any name.
    names = LOCAL_NAMES | {host.lower()} if login is None and not config.allow_public else None
    guard = Middleware(Guard, most_upload_bytes=config.max_upload_mb * 2**20, names=names)
    try:
        _, address, _ = page.queue(max_size=_MOST_WAITING).launch(
            server_name=host,
            server_port=config.server_port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            show_error=False,
            ssr_mode=False,
            enable_monitoring=False,
            run_history=False,
            mcp_server=config.mcp_server,
            auth=None if login is None else login.check,
            auth_message=None if login is None else "After five wrong passwords, wait a minute.",
            app_kwargs={"middleware": [guard]},
            allowed_paths=[str(config.output_dir.absolute())],
            blocked_paths=blocked_paths(config),
            max_file_size=config.max_upload_mb * 2**20,
            footer_links=["api"],
            theme=theme(),
            css=style(),
        )
    except OSError as problem:
        raise UserError(
            f"can't listen on {config.server_name}:{config.server_port} ({problem}); choose another --server_port"
        ) from problem
    if config.mcp_server and page.mcp_error is not None:  # Gradio goes on without
        page.close()
        raise UserError(f'the MCP server did not start ({page.mcp_error}): pip install "svft-diffusion[mcp]"')
    print(f"The app is at {address} (Ctrl+C stops it)", flush=True)
    if wait:
        page.block_thread()
    return str(address)


def _login(config: AppConfig) -> Login | None:
    return None if config.auth_file is None else Login(read_logins(config.auth_file))


def _check_mcp(config: AppConfig) -> None:
    if config.mcp_server and importlib.util.find_spec("mcp") is None:
        raise UserError('the MCP server needs another package: pip install "svft-diffusion[mcp]"')
