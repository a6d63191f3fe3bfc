"""The names that LoRA files have for the layers of a base: kohya's, diffusers' (old and new) and PEFT's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from torch import nn

from svft_diffusion.errors import UserError
from svft_diffusion.exchange.base_layers import BaseLayer
from svft_diffusion.exchange.foreign_file import ForeignFile

_KOHYA_PREFIXES = {
    "unet": ("lora_unet",),
    "transformer": ("lora_unet", "lora_transformer"),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
}
_PEFT_PREFIX = "base_model.model."
_SGM_BLOCKS = {"input_blocks": "down_blocks", "middle_block": "mid_block", "output_blocks": "up_blocks"}
_UNET_BLOCKS = re.compile(rf"lora_unet_({'|'.join([*_SGM_BLOCKS, *_SGM_BLOCKS.values()])})_")
# Layers of Stability's own UNet, once diffusers has numbered the blocks around them as its own.
_SGM_LAYERS = {
    "_in_layers_2": "_conv1",
    "_emb_layers_1": "_time_emb_proj",
    "_out_layers_3": "_conv2",
    "_skip_connection": "_conv_shortcut",
    "_downsamplers_0_op": "_downsamplers_0_conv",
    "lora_unet_input_blocks_0_0": "lora_unet_conv_in",
    "lora_unet_out_2": "lora_unet_conv_out",
    "lora_unet_time_embed_0": "lora_unet_time_embedding_linear_1",
    "lora_unet_time_embed_2": "lora_unet_time_embedding_linear_2",
    "lora_unet_label_emb_0_0": "lora_unet_add_embedding_linear_1",
    "lora_unet_label_emb_0_2": "lora_unet_add_embedding_linear_2",
}


def names_in_diffusers_spelling(file: ForeignFile, components: Mapping[str, nn.Module]) -> dict[str, str]:
    """Tensor names in diffusers' spelling -> in the file; kohya's for SDXL go by the blocks of Stability's UNet.

    Raises:
        UserError: they name blocks that this UNet does not have.
    """
    names = {name: name for name in file.shapes}
    blocks = {match[1] for name in names if (match := _UNET_BLOCKS.match(name))}
    if "unet" in components and blocks and blocks <= _SGM_BLOCKS.keys():
        try:
            names = _maybe_map_sgm_blocks_to_diffusers(names, components["unet"].config)
        except (ValueError, IndexError, KeyError) as problem:
            raise UserError(f"{file.name} was made for another base: its blocks are not this UNet's") from problem
    return {_renamed_layer(name): tensor for name, tensor in names.items()}


def _renamed_layer(name: str) -> str:
    for theirs, ours in _SGM_LAYERS.items():
        name = re.sub(rf"{theirs}(?=\.)", ours, name)
    for theirs, ours in _SGM_BLOCKS.items():
        name = name.replace(f"lora_unet_{theirs}_", f"lora_unet_{ours}_")
    return name


def layers_by_name(layers: Mapping[str, Mapping[str, BaseLayer]]) -> dict[str, BaseLayer]:
    """Every name that a file can have for a linear layer or convolution; bare paths only where they mean one layer."""
    named: dict[str, BaseLayer] = {}
    bare: dict[str, list[BaseLayer]] = {}
    for component, by_path in layers.items():
        for path, layer in by_path.items():
            if layer.kind in ("norm", "embedding"):
                continue
            named |= {f"{prefix}_{path.replace('.', '_')}": layer for prefix in _KOHYA_PREFIXES[component]}
            for spelling in (path, _older_spelling(path)):
                named[f"{component}.{spelling}"] = layer
                bare.setdefault(spelling, []).append(layer)
    for path, candidates in bare.items():
        if len({layer.canonical for layer in candidates}) == 1:
            named |= {path: candidates[0], _PEFT_PREFIX + path: candidates[0]}
    return named


def _older_spelling(path: str) -> str:
    """What diffusers called the projections of an attention before it left LoRA to PEFT; other layers as they are."""
    parent, _, last = path.removesuffix(".0").rpartition(".")
    older = {"to_out": "to_out", "q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    return f"{parent}.{older[last]}" if last in older else path


def without_processor(name: str) -> str:
    """A layer's name without the attention processor that diffusers' oldest files have in it."""
    return name.replace(".processor.", ".")
