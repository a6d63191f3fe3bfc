"""Starting the web app."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import gradio as gr

from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.app.cards import EMPTY_SLOTS
from svft_diffusion.app.config import AppConfig
from svft_diffusion.app.handlers import Handlers
from svft_diffusion.app.page import STYLE, build_page, theme
from svft_diffusion.app.studio import Studio
from svft_diffusion.errors import UserError
from svft_diffusion.factors import use_cache
from svft_diffusion.models.loading import resolve_base
from svft_diffusion.sampling.adapter_choice import adapter_label, parse_adapter_choice
from svft_diffusion.sampling.devices import resolve_device


def build_app(config: AppConfig) -> gr.Blocks:
    """The page of ``config``, with its base model loaded.

    Raises:
        UserError: a base model, adapter or device that can't be used.
    """
    base = config.pretrained_model_name_or_path
    resolve_base(base, config.base_config)
    use_cache(config.factor_cache, config.factor_cache_size)
    studio = Studio(
        config.output_dir,
        device=resolve_device(config.device),
        dtype=config.dtype,
        disable_safety_checker=config.disable_safety_checker,
        base_config=config.base_config,
        on_mismatch=cast(OnMismatch, config.on_mismatch),
        embed_adapter=config.embed_adapter,
    )
    handlers = Handlers(studio, config.adapters_dir)
    slots = EMPTY_SLOTS
    for choice in map(parse_adapter_choice, config.adapter):
        slots = handlers.with_file(slots, choice.file, base, adapter_label(choice.file), choice.weight)
    return build_page(handlers, base, handlers.base_status(base), slots)


def launch(page: gr.Blocks, config: AppConfig, *, wait: bool = True) -> str:
    """Serve the page, say where, and return the address; with ``wait`` not before the server is stopped.

    Raises:
        UserError: the port is taken, or the pictures' folder can't be made.
    """
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"can't write to {config.output_dir}: {problem.strerror or problem}") from problem
    try:
        _, address, _ = page.queue(max_size=32).launch(
            server_name=config.server_name,
            server_port=config.server_port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            show_error=False,
            ssr_mode=False,
            enable_monitoring=False,
            allowed_paths=[str(Path(config.output_dir).absolute())],
            max_file_size="64mb",
            footer_links=["api"],
            theme=theme(),
            css=STYLE,
        )
    except OSError as problem:
        raise UserError(
            f"can't listen on {config.server_name}:{config.server_port} ({problem}); choose another --server_port"
        ) from problem
    print(f"The app is at {address} (Ctrl+C stops it)", flush=True)
    if wait:
        page.block_thread()
    return str(address)
