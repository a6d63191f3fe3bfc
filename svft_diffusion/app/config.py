"""Settings of the web app."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svft_diffusion.sampling.config import DTYPES
from svft_diffusion.settings import setting


@dataclass(frozen=True)
class AppConfig:
    """Where the app listens, and what it starts with."""

    pretrained_model_name_or_path: str = setting(
        "toybox",
        "base model at the start: toybox (embedded), a diffusers folder, or a Hugging Face Hub name",
        group="base model",
    )
    disable_safety_checker: bool = setting(
        False, "leave out the safety checker that base models bring along", group="base model"
    )

    adapter: list[str] = setting(
        [], "FILE[:weight], repeatable; there from the start, weight -1 to 2", group="adapters"
    )
    adapters_dir: Path = setting(Path("outputs"), "folder whose adapters the page offers", group="adapters")

    output_dir: Path = setting(Path("outputs/app"), "where pictures are kept", group="output")

    server_name: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 lets the whole network in", group="server")
    server_port: int = setting(7860, "port to listen on", group="server")

    device: str = setting("auto", "auto, cuda, cuda:1, mps or cpu", group="computing")
    dtype: str = setting("float32", "precision of the base model", group="computing", choices=DTYPES)
