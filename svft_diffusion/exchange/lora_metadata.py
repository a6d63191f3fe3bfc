"""Header entries by which other tools show what a LoRA file is: kohya's ``ss_*`` keys and ModelSpec's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from svft_diffusion.exchange.lora_keys import Format
from svft_diffusion.files.header import AdapterHeader
from svft_diffusion.version import __version__

_MODEL_SPEC = "1.0.1"
_IMPLEMENTATION = "https://github.com/huggingface/diffusers"  # whose names of layers the file follows
_NETWORK_MODULES: dict[Format, str] = {
    "kohya": "networks.lora",
    "diffusers": "networks.lora",
    "comfy-full": "lycoris.kohya",
}


class _BaseVersion(NamedTuple):
    kohya: str  # ss_base_model_version
    architecture: str  # modelspec.architecture, less the "/lora"
    resolution: str


_SD_1 = _BaseVersion("sd_v1", "stable-diffusion-v1", "512x512")
_SD_2 = _BaseVersion("sd_v2", "stable-diffusion-v2-512", "512x512")
_SD_2_V = _BaseVersion("sd_v2_768_v", "stable-diffusion-v2-768-v", "768x768")
_SDXL = _BaseVersion("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "1024x1024")
# By the width of the text that the UNet attends to, which no two of them share.
_BASE_VERSIONS = {768: _SD_1, 1024: _SD_2, 2048: _SDXL}


def lora_metadata(pipe: object, format: Format, rank: int, *, has_convolutions: bool) -> dict[str, str]:
    """What the models and the rank alone tell. A base that tools have no name for stays unnamed."""
    metadata = {
        "format": "pt",
        "ss_network_module": _NETWORK_MODULES[format],
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "modelspec.sai_model_spec": _MODEL_SPEC,
        "modelspec.implementation": _IMPLEMENTATION,
    }
    if has_convolutions:
        metadata["ss_network_args"] = json.dumps({"conv_alpha": str(rank), "conv_dim": str(rank)})
    prediction = _config(pipe, "scheduler").get("prediction_type")
    if prediction in ("epsilon", "v_prediction"):
        metadata["modelspec.prediction_type"] = prediction.removesuffix("_prediction")
    base = _base_version(pipe, prediction)
    if base is not None:
        metadata |= {
            "ss_base_model_version": base.kohya,
            "ss_v2": str(base in (_SD_2, _SD_2_V)),
            "modelspec.architecture": f"{base.architecture}/lora",
            "modelspec.resolution": base.resolution,
        }
    return metadata


def described(header: AdapterHeader, strength: float) -> dict[str, str]:
    """What the adapter file says of itself, in the keys of other tools. Base models are names there, never paths."""
    metadata = {
        "ss_sd_model_name": header.base.name,
        "modelspec.description": (
            f"LoRA exported by svft-diffusion {__version__} from an adapter of method {header.method}, "
            f"pattern {header.pattern}, at strength {strength:g}; trained on {header.base.name}"
        ),
    }
    if header.trigger:
        metadata["modelspec.trigger_phrase"] = header.trigger
    if header.suggested_strength != 1:
        metadata["modelspec.usage_hint"] = f"suggested weight {header.suggested_strength / strength:g}"
    return metadata


def _base_version(pipe: object, prediction: str | None) -> _BaseVersion | None:
    width = _config(pipe, "unet").get("cross_attention_dim")
    found = _BASE_VERSIONS.get(width) if isinstance(width, int) else None
    return _SD_2_V if found is _SD_2 and prediction == "v_prediction" else found


def _config(pipe: object, component: str) -> dict[str, Any]:
    model = pipe.get(component) if isinstance(pipe, Mapping) else getattr(pipe, component, None)
    return dict(getattr(model, "config", {}))
