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
        UserError: an address that other machines reach, without a login or ``allow_public``; settings that would hand
            out more than pictures, or let nothing in.
    """

    pretrained_model_name_or_path: str = setting(
        "toybox",
        "base model at the start: toybox (embedded), a diffusers folder, a .safetensors file, or a Hub name",
        group="base model",
    )
    base: list[str] = setting(
        [],
        "other base models that the page offers, repeatable; when other machines can reach the page, no others are "
        "loaded",
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
        [], "FILE[:weight], repeatable; there from the start, weight -10 to 10", group="adapters"
    )
    on_mismatch: str = setting(
        "error",
        "an adapter of another base: error refuses it, align fits it to this base as far as it goes, "
        "force loads whatever fits in shape",
        group="adapters",
        choices=ON_MISMATCH,
    )
    adapters_dir: Path = setting(
        Path("outputs"),
        "folder whose adapters the page offers; uploaded adapters go into uploads/ in it, training into training/",
        group="adapters",
    )

    output_dir: Path = setting(
        Path("outputs/app"), "where pictures are kept; visitors can open what is in it", group="output"
    )
    embed_adapter: bool = setting(
        False,
        "put the adapters that made a picture into it: whoever gets the picture has them too",
        group="output",
    )

    server_name: str = setting(
        "127.0.0.1",
        "address to listen on; any other than this machine's own needs --auth_file or --allow_public",
        group="server",
    )
    server_port: int = setting(7860, "port to listen on", group="server")
    auth_file: Path | None = setting(
        None, "ask visitors for a name and a password of this file; --add_login writes it", group="server"
    )
    allow_public: bool = setting(
        False,
        "let other machines in without a login: whoever reaches the page can draw, train and delete adapters",
        group="server",
    )
    max_upload_mb: int = setting(256, "most megabytes that one upload may have, all its files together", group="server")
    max_pixels: int = setting(
        64_000_000, "most pixels that an uploaded picture may have (width times height)", group="server"
    )
    mcp_server: bool = setting(False, "offer the API to language models as MCP tools, too", group="server")

    device: str = setting("auto", "auto, cuda, cuda:1, mps or cpu", group="computing")
    dtype: str = setting("float32", "precision of the base model", group="computing", choices=DTYPES)
    threads: int = setting(
        1, "threads of torch on the CPU; pictures are the same to the byte for the same number", group="computing"
    )
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
        if not _is_loopback(self.server_name) and self.auth_file is None and not self.allow_public:
            raise UserError(
                f"--server_name {self.server_name!r} lets other machines in, and there is no login; "
                "name its file with --auth_file, or give --allow_public if everybody may come in"
            )
        if self.mcp_server and self.auth_file is not None:
            raise UserError("MCP clients can't log in: give --mcp_server without --auth_file, on this machine only")
        self._check_folder_of_pictures()
        if not 1 <= self.server_port <= 65535:
            raise UserError(f"--server_port must be from 1 to 65535, got {self.server_port}")
        for name in ("max_upload_mb", "max_pixels", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")

    def _check_folder_of_pictures(self) -> None:
        pictures = self.output_dir.resolve()
        for name in ("adapters_dir", "auth_file"):
            path = getattr(self, name)
            if path is not None and path.resolve().is_relative_to(pictures):
                raise UserError(
                    f"visitors can open everything in --output_dir {self.output_dir}, and --{name} {path} is in it; "
                    "choose a folder for pictures alone"
                )
        for folder in (self.uploads_dir, self.training_dir, self.evaluation_dir):
            if pictures.is_relative_to(folder.resolve()):
                raise UserError(
                    f"visitors can open nothing in {folder}, and --output_dir {self.output_dir} is in it; choose a "
                    "folder for pictures alone"
                )

    @property
    def bases(self) -> tuple[str, ...]:
        """The base models that the page offers, the first of them at the start."""
        return tuple(dict.fromkeys([self.pretrained_model_name_or_path, *self.base]))

    @property
    def open_to_others(self) -> bool:
        """Whether other machines reach the app; then visitors choose among `bases`, and no other can be loaded."""
        return self.allow_public or self.auth_file is not None or not _is_loopback(self.server_name)

    def offered_base(self, name: str) -> str:
        """The base model that a visitor names; the first for an empty name.

        Raises:
            UserError: it is not offered, and whoever reaches the app is not its owner.
        """
        base = name.strip() or self.pretrained_model_name_or_path
        if self.open_to_others and base not in self.bases:
            raise UserError("this base model is not offered; choose one of the list")
        return base

    @property
    def uploads_dir(self) -> Path:
        """Where uploaded adapters are kept."""
        return self.adapters_dir / "uploads"

    @property
    def training_dir(self) -> Path:
        """Where training that was started on the page works."""
        return self.adapters_dir / "training"

    @property
    def evaluation_dir(self) -> Path:
        """Where evaluations that were started on the page work; with the default settings, those of the command."""
        return self.adapters_dir / "evaluation"


def _is_loopback(server_name: str) -> bool:
    try:
        return server_name == "localhost" or ipaddress.ip_address(server_name.strip("[]")).is_loopback
    except ValueError:  # another name: it may stand for any address
        return False
