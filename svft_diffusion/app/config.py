"""Settings of the web app."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from svft_diffusion.errors import UserError
from svft_diffusion.sampling.config import DTYPES, ON_MISMATCH
from svft_diffusion.settings import setting


@dataclass(frozen=True)
class AppConfig:
    """Where the app listens, and what it starts with.

    Raises:
        UserError: an address that other machines reach, without ``allow_public``.
    """

    pretrained_model_name_or_path: str = setting(
        "toybox",
        "base model at the start: toybox (embedded), a diffusers folder, a .safetensors file, or a Hub name",
        group="base model",
    )
    base_config: Path | None = setting(
        None,
        "for a file: a pipeline folder with its settings and tokenizers (default: from the Hub)",
        group="base model",
    )
    disable_safety_checker: bool = setting(
        False, "leave out the safety checker that base models bring along", group="base model"
    )

    adapter: list[str] = setting(
        [], "FILE[:weight], repeatable; there from the start, weight -1 to 2", group="adapters"
    )
    on_mismatch: str = setting(
        "error",
        "an adapter of another base: error refuses it, align fits it to this base as far as it goes, "
        "force loads whatever fits in shape",
        group="adapters",
        choices=ON_MISMATCH,
    )
    adapters_dir: Path = setting(Path("outputs"), "folder whose adapters the page offers", group="adapters")

    output_dir: Path = setting(Path("outputs/app"), "where pictures are kept", group="output")
    embed_adapter: bool = setting(
        False,
        "put the adapters that made a picture into it: whoever gets the picture has them too",
        group="output",
    )

    server_name: str = setting(
        "127.0.0.1", "address to listen on; any other than this machine's own needs --allow_public", group="server"
    )
    allow_public: bool = setting(
        False,
        "let other machines in: whoever reaches the page can draw and load any base model, there is no login",
        group="server",
    )
    server_port: int = setting(7860, "port to listen on", group="server")

    device: str = setting("auto", "auto, cuda, cuda:1, mps or cpu", group="computing")
    dtype: str = setting("float32", "precision of the base model", group="computing", choices=DTYPES)
    factor_cache: Path | None = setting(
        None,
        "folder of decompositions, shared by all runs (default: the platform's cache folder)",
        group="computing",
    )
    factor_cache_size: str | None = setting(
        None,
        "how much that folder may hold, such as 5GB; what was not used for longest goes first (default: 20 GiB)",
        group="computing",
    )

    def __post_init__(self) -> None:
        if not self.allow_public and not _is_loopback(self.server_name):
            raise UserError(
                f"--server_name {self.server_name!r} lets other machines in, and the app has no login; "
                "give --allow_public too if you mean it"
            )


def _is_loopback(server_name: str) -> bool:
    try:
        return server_name == "localhost" or ipaddress.ip_address(server_name).is_loopback
    except ValueError:  # another name: it may stand for any address
        return False
