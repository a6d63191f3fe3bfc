"""A VAE of its own for a base model, such as the one for SDXL that works in float16."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from svft_diffusion.errors import UserError

_SETTINGS = "config.json"
_IN_PIPELINES = "vae"


def resolve_vae(name: str) -> tuple[str, str]:
    """The folder or Hub name of a VAE, and the folder in it where it lies, empty if it is all that is there.

    Raises:
        UserError: a folder without a VAE, or a file.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        for inside in ("", _IN_PIPELINES):
            if (path / inside / _SETTINGS).is_file():
                return str(path), inside
        raise UserError(f"--pretrained_vae_model_name_or_path {name} holds no {_SETTINGS}, so it is no folder of a VAE")
    if path.is_file() or path.is_absolute() or name.startswith((".", "~")):
        raise UserError(
            f"--pretrained_vae_model_name_or_path takes a diffusers folder or a name on the Hub; {name} is neither"
        )
    return name, ""


def use_vae(pipeline: DiffusionPipeline, name: str, *, dtype: torch.dtype, local_files_only: bool = False) -> None:
    """Put the VAE that `resolve_vae` finds into a pipeline.

    Raises:
        UserError: its latents are of another size, scale or number of channels than the pipeline's.
        OSError, ValueError, RuntimeError: it can't be loaded.
    """
    source, inside = resolve_vae(name)
    vae = AutoencoderKL.from_pretrained(
        source, subfolder=inside or None, torch_dtype=dtype, local_files_only=local_files_only, use_safetensors=True
    )
    wanted, found = (_shape_of_latents(part) for part in (pipeline.vae, vae))
    if wanted != found:
        raise UserError(
            f"the VAE {name} makes latents of {found[0]} channels, {found[1]} times smaller than the picture; those of "
            f"this base model have {wanted[0]}, and are {wanted[1]} times smaller"
        )
    if _scale_of_latents(pipeline.vae) != _scale_of_latents(vae):
        raise UserError(
            f"the VAE {name} is of another kind of base model: its latents have another scale (scaling_factor, "
            "shift_factor), so that this base would not know what they show"
        )
    pipeline.register_modules(vae=vae)


def _scale_of_latents(vae: AutoencoderKL) -> tuple[float, float]:
    """By which latents are multiplied, after so much was taken from them."""
    return vae.config.scaling_factor, vae.config.shift_factor or 0.0


def _shape_of_latents(vae: AutoencoderKL) -> tuple[int, int]:
    """Channels, and pixels along a side for one place."""
    return vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
