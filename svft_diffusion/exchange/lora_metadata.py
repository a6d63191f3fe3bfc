"""Header entries by which other tools show what a LoRA file is: kohya's ``ss_*`` keys and ModelSpec's."""

from __future__ import annotations

import json

from svft_diffusion.exchange.lora_keys import Format
from svft_diffusion.files.header import AdapterHeader
from svft_diffusion.files.model_spec import MODEL_SPEC, base_version, model_config, trigger_phrase
from svft_diffusion.version import __version__

_IMPLEMENTATION = "https://github.com/huggingface/diffusers"  # whose names of layers the file follows
_NETWORK_MODULES: dict[Format, str] = {
    "kohya": "networks.lora",
    "diffusers": "networks.lora",
    "comfy-full": "lycoris.kohya",
}


def lora_metadata(pipe: object, format: Format, rank: int, *, has_convolutions: bool) -> dict[str, str]:
    """What the models and the rank alone tell. A base that tools have no name for stays unnamed."""
    metadata = {
        "format": "pt",
        "ss_network_module": _NETWORK_MODULES[format],
        "modelspec.sai_model_spec": MODEL_SPEC,
        "modelspec.implementation": _IMPLEMENTATION,
    }
    if rank:  # dense differences alone have none
        metadata |= {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    if has_convolutions:
        metadata["ss_network_args"] = json.dumps({"conv_alpha": str(rank), "conv_dim": str(rank)})
    prediction = model_config(pipe, "scheduler").get("prediction_type")
    if prediction in ("epsilon", "v_prediction"):
        metadata["modelspec.prediction_type"] = prediction.removesuffix("_prediction")
    base = base_version(pipe)
    if base is not None:
        metadata |= {
            "ss_base_model_version": base.kohya,
            "ss_v2": str(base.version_2),
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
    if header.title:
        metadata["modelspec.title"] = header.title
    if phrase := trigger_phrase(header):
        metadata["modelspec.trigger_phrase"] = phrase
    if header.suggested_strength != 1:
        metadata["modelspec.usage_hint"] = f"suggested weight {header.suggested_strength / strength:g}"
    return metadata
