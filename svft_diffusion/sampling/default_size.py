"""How large the pictures of a base model are, before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from svft_diffusion.models.loading import resolve_base


def stored_resolution(base: str) -> int | None:
    """`svft_diffusion.models.loading.default_resolution` of a base model with a UNet in a folder, from its settings.

    None: another kind of base model, or one that is not here; only the loaded pipeline tells.
    """
    folder = Path(resolve_base(base))
    try:
        unet, vae = (
            json.loads((folder / part / "config.json").read_text(encoding="utf-8")) for part in ("unet", "vae")
        )
        return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, ValueError, LookupError, TypeError):
        return None
