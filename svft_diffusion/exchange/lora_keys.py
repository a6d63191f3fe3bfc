"""Names of LoRA tensors in the spelling that other tools read.

====================  ===============================================================================================
format                tensors of one layer
====================  ===============================================================================================
``kohya``             ``lora_unet_down_blocks_0_..._to_q`` + ``.lora_down.weight``, ``.lora_up.weight``, ``.alpha``
``diffusers``         ``unet.down_blocks.0....to_q`` + ``.lora_A.weight``, ``.lora_B.weight``
``comfy-full``        those of ``kohya``, and dense differences ``.diff``, ``.diff_b``, ``.w_norm``, ``.b_norm``
====================  ===============================================================================================

A text encoder is ``lora_te``, the two of SDXL are ``lora_te1`` and ``lora_te2``. What lies outside of a text encoder's
blocks has no name in this spelling; ComfyUI knows it by its own path, ``text_encoders.clip_l.transformer....``, and the
projection at the end of SDXL's second one as ``lora_te2_text_projection``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from torch import nn

from svft_diffusion.files.names import split_canonical_name

Format = Literal["kohya", "diffusers", "comfy-full"]
FORMATS: tuple[Format, ...] = get_args(Format)

_RESNET = r"resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj|norm1|norm2)"
_TRANSFORMER_BLOCK = r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)|norm[123])"
_TRANSFORMER = rf"attentions\.\d+\.(norm|proj_in|proj_out|{_TRANSFORMER_BLOCK})"
_UNET_LAYER = re.compile(
    r"conv_in|conv_out|conv_norm_out|(time|add)_embedding\.linear_[12]"
    rf"|((down|up)_blocks\.\d+|mid_block)\.({_RESNET}|{_TRANSFORMER}|(down|up)samplers\.0\.conv)"
)
_TEXT_PROJECTION = re.compile(r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")

# diffusers reads the sizes' embedding of SDXL by the name that it has in the original model only.
_ORIGINAL_NAMES = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}
# Text encoders as ComfyUI calls them, by the width of the first: that of Stable Diffusion 2 is OpenCLIP's ViT-H.
_WIDTH_OF_CLIP_H = 1024


class NoName(NamedTuple):
    """The readers of a format have no name for a layer."""

    reason: str


def layer_key(format: Format, layer: str, components: Mapping[str, nn.Module]) -> str | NoName:
    """What the readers of ``format`` call the layer with the canonical name ``layer``; its tensors' names begin so.

    Args:
        components: all models of the pipeline; two text encoders are named otherwise than one.
    """
    component, path = split_canonical_name(layer)
    if component == "unet":
        if format == "diffusers":
            return layer
        if not _UNET_LAYER.fullmatch(path):
            return NoName("the readers of this format know no such layer of a UNet")
        return "lora_unet_" + _ORIGINAL_NAMES.get(path, path.replace(".", "_"))
    if component == "transformer":
        if format == "diffusers":
            return layer
        return NoName("this format has no common names for transformer denoisers; diffusers has")
    if component not in ("text_encoder", "text_encoder_2"):
        return NoName(f"the readers of this format don't adapt {component}")
    if _TEXT_PROJECTION.fullmatch(path):
        return layer if format == "diffusers" else f"{_kohya_text_encoder(component, components)}_{_joined(path)}"
    if format == "comfy-full" and layer == "text_encoder_2.text_projection":
        return "lora_te2_text_projection"
    if format == "comfy-full" and path.startswith("text_model."):
        return f"text_encoders.{_comfy_text_encoder(component, components)}.transformer.{path}"
    return NoName("the readers of this format know only the projections of a text encoder's blocks")


def lora_names(format: Format, key: str) -> tuple[str, str, str | None]:
    """Names of ``A``, of ``B`` and of alpha, which the diffusers format takes to be the rank."""
    if format == "diffusers":
        return f"{key}.lora_A.weight", f"{key}.lora_B.weight", None
    return f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"


def _joined(path: str) -> str:
    return path.replace(".", "_")


def _kohya_text_encoder(component: str, components: Mapping[str, nn.Module]) -> str:
    if component == "text_encoder_2":
        return "lora_te2"
    return "lora_te1" if "text_encoder_2" in components else "lora_te"


def _comfy_text_encoder(component: str, components: Mapping[str, nn.Module]) -> str:
    if component == "text_encoder_2":
        return "clip_g"
    width = getattr(getattr(components[component], "config", None), "hidden_size", None)
    return "clip_h" if width == _WIDTH_OF_CLIP_H and "text_encoder_2" not in components else "clip_l"
