"""How other tools name the layers that a LoRA file changes: their rules, written out once more.

Each function answers one question: which layer does the reader find under this key? None: it skips the key, or fails.
"""

from __future__ import annotations

import re

from torch import nn

# ComfyUI (comfy/lora.py): the names of diffusers' UNet joined by underscores, the original names of what has none
# there, and the projections of text encoders.
_COMFY_UNET = re.compile(
    r"lora_unet_("
    r"conv_in|conv_out|conv_norm_out|time_embedding_linear_[12]|label_emb_0_[02]"
    r"|(?:down_blocks_\d|up_blocks_\d|mid_block)_(?:"
    r"resnets_\d_(?:norm[12]|conv[12]|time_emb_proj|conv_shortcut)"
    r"|attentions_\d_(?:norm|proj_in|proj_out|transformer_blocks_\d_(?:norm[123]|ff_net_0_proj|ff_net_2"
    r"|attn[12]_to_(?:q|k|v|out_0)))"
    r"|downsamplers_0_conv|upsamplers_0_conv))"
)
_COMFY_TEXT = re.compile(
    r"lora_te[12]?_text_model_encoder_layers_\d+_(mlp_fc[12]|self_attn_(q|k|v|out)_proj)|lora_te[12]_text_projection"
)
_COMFY_BY_PATH = re.compile(r"text_encoders\.clip_[lgh]\.transformer\.text_model\.[a-z0-9_.]+")
_COMFY_PARTS = ("lora_up.weight", "lora_down.weight", "alpha", "diff", "diff_b", "w_norm", "b_norm")

# A1111 (networks.py): names are turned into those of Stability's models, counted in blocks of three.
_A1111_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_A1111_TRANSFORMER = re.compile(
    r"proj_in|proj_out|transformer_blocks_\d_(attn[12]_to_(q|k|v|out_0)|ff_net_0_proj|ff_net_2)"
)
_A1111_TEXT = re.compile(r"lora_(te[12]?)_text_model_encoder_layers_(\d+)_(self_attn_(?:q|k|v|out)_proj|mlp_fc[12])")
_A1111_PARTS = ("lora_up.weight", "lora_down.weight", "alpha")

# sd-scripts and LyCORIS find layers by the class of what holds them, and a few by name.
_KOHYA_UNET = {"Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"}
_KOHYA_TEXT = {"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"}
_LYCORIS_NAMES = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")


def comfyui(key: str) -> str | None:
    """The layer that ComfyUI takes a tensor for."""
    layer, _, part = key.rpartition(".weight")[0].rpartition(".") if key.endswith(".weight") else key.rpartition(".")
    part = f"{part}.weight" if key.endswith(".weight") else part
    known = any(pattern.fullmatch(layer) for pattern in (_COMFY_UNET, _COMFY_TEXT, _COMFY_BY_PATH))
    return layer if known and part in _COMFY_PARTS else None


def a1111(key: str) -> str | None:
    """The module of Stability's model that A1111 and Forge take a tensor for."""
    layer, _, part = key.partition(".")
    return _stability_name(layer) if part in _A1111_PARTS else None


def _stability_name(layer: str) -> str | None:
    if text := _A1111_TEXT.fullmatch(layer):
        return f"{text[1]}_{text[2]}_{text[3]}"
    name = layer.removeprefix("lora_unet_")
    fixed = {
        "conv_in": "input_blocks_0_0",
        "conv_out": "out_2",
        "time_embedding_linear_1": "time_embed_0",
        "time_embedding_linear_2": "time_embed_2",
        "label_emb_0_0": "label_emb_0_0",
        "label_emb_0_2": "label_emb_0_2",
    }
    if name in fixed:
        return fixed[name]
    if sampler := re.fullmatch(r"down_blocks_(\d)_downsamplers_0_conv", name):
        return f"input_blocks_{3 + 3 * int(sampler[1])}_0_op"
    if sampler := re.fullmatch(r"up_blocks_(\d)_upsamplers_0_conv", name):
        return f"output_blocks_{2 + 3 * int(sampler[1])}_{2 if int(sampler[1]) else 1}_conv"
    block = re.fullmatch(r"(?:(down|up)_blocks_(\d)|mid_block)_(attentions|resnets)_(\d)_(.+)", name)
    if block is None:
        return None
    direction, number, kind, inner, rest = block.groups()
    if kind == "resnets":
        rest = _A1111_RESNET.get(rest, "")
    elif not _A1111_TRANSFORMER.fullmatch(rest):
        rest = ""
    if not rest:
        return None
    place = int(kind == "attentions")
    if direction is None:
        return f"middle_block_{1 if place else 2 * int(inner)}_{rest}"
    count = 3 * int(number) + int(inner)
    return (
        f"input_blocks_{1 + count}_{place}_{rest}" if direction == "down" else f"output_blocks_{count}_{place}_{rest}"
    )


def kohya_modules(model: nn.Module, prefix: str) -> dict[str, str]:
    """Key -> path of the layers that sd-scripts with LyCORIS adapts in a model."""
    is_text = prefix.startswith("lora_te")
    found = {} if is_text else {f"{prefix}_{path.replace('.', '_')}": path for path in _LYCORIS_NAMES}
    for path, module in model.named_modules():
        if type(module).__name__ not in (_KOHYA_TEXT if is_text else _KOHYA_UNET):
            continue
        for inner, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                whole = f"{path}.{inner}"
                spelled = whole if not is_text or whole.startswith("text_model.") else f"text_model.{whole}"
                found[f"{prefix}_{spelled.replace('.', '_')}"] = whole
    return found
