"""What the original Stable Diffusion code calls the tensors of a pipeline (LDM for 1.x and 2.x, SGM for XL).

Names follow from the structure: the original numbers the layers of the U-Net through, down and up, where diffusers
counts blocks and layers in them; OpenCLIP keeps queries, keys and values of an attention in one tensor. Nothing here
has to be believed: `svft_diffusion.exchange.single_file` reads a file back before it is put in place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from svft_diffusion.errors import UserError

WRITTEN_COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""Components of a pipeline whose weights a single file holds."""

# Models that judge pictures or read them for an IP-Adapter; a single file never holds them.
_LEFT_OUT = ("safety_checker", "image_encoder")

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE_OF_BLOCKS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_LAYER = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)")
_SAMPLER = re.compile(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")

_VAE_RESNET = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)")
_VAE_SAMPLER = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv")
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.resnets\.(\d+)\.(\w+)")
_VAE_ATTENTION = re.compile(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)")
_VAE_ATTENTION_LAYERS = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_OTHER = re.compile(r"(encoder|decoder)\.(conv_in|conv_out|conv_norm_out)|(post_)?quant_conv")

_OPEN_CLIP_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_OPEN_CLIP_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_OTHER = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
# Hidden activation of the text encoders that OpenCLIP trained; OpenAI's have an approximation of it.
_OPEN_CLIP_ACTIVATION = "gelu"


def original_tensors(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """The weights of a Stable Diffusion 1.x, 2.x or XL pipeline under their original names, in their dtypes.

    Tensors are those of the pipeline; only OpenCLIP's joined projections are new ones.

    Raises:
        UserError: a pipeline of another kind, or with tensors that the original layout has no names for.
    """
    check_single_file_layout(pipeline)
    tensors = {
        **_prefixed("model.diffusion_model.", _unet_tensors(pipeline.unet)),
        **_prefixed("first_stage_model.", _vae_tensors(pipeline.vae)),
    }
    second = getattr(pipeline, "text_encoder_2", None)
    if second is not None:
        tensors |= _prefixed("conditioner.embedders.0.transformer.text_model.", _text_tensors(pipeline.text_encoder))
        tensors |= _prefixed("conditioner.embedders.1.model.", _open_clip_tensors(second))
    elif pipeline.text_encoder.config.hidden_act == _OPEN_CLIP_ACTIVATION:
        tensors |= _prefixed("cond_stage_model.model.", _open_clip_tensors(pipeline.text_encoder))
    else:
        tensors |= _prefixed("cond_stage_model.transformer.text_model.", _text_tensors(pipeline.text_encoder))
    return tensors


def check_single_file_layout(pipeline: DiffusionPipeline) -> None:
    """Raise `UserError` unless a pipeline is of a kind that the original layout was made for."""
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    if getattr(pipeline, "text_encoder_2", None) is not None:
        kinds["text_encoder_2"] = CLIPTextModelWithProjection
    fits = all(isinstance(getattr(pipeline, name, None), kind) for name, kind in kinds.items())
    models = {name for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    if not fits or models - {*WRITTEN_COMPONENTS, *_LEFT_OUT}:
        raise UserError(
            f"a {type(pipeline).__name__} can't be written as a single file, only Stable Diffusion 1.x, 2.x and XL; "
            "name a folder as the output"
        )


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _renamed(model: nn.Module, layer_name: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The tensors of a model with the path of their layer, all but the last part of the name, replaced."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        layer, _, parameter = name.rpartition(".")
        renamed = layer_name(layer)
        if renamed is None:
            raise _no_name(model, name)
        tensors[f"{renamed}.{parameter}"] = tensor
    return tensors


def _no_name(model: nn.Module, name: str) -> UserError:
    return UserError(
        f"a single file has no name for {name} of this {type(model).__name__}; name a folder as the output"
    )


def _unet_tensors(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    layers_per_block = unet.config.layers_per_block
    if not isinstance(layers_per_block, int):
        raise UserError("a single file can't hold a U-Net whose blocks differ in depth; name a folder as the output")
    in_block = layers_per_block + 1  # of the original's numbers: down a block ends with its sampler

    def layer_name(layer: str) -> str | None:
        if layer in _OUTSIDE_OF_BLOCKS:
            return _OUTSIDE_OF_BLOCKS[layer]
        if match := _MIDDLE.fullmatch(layer):
            kind, index, rest = match.groups()
            number = 2 * int(index) + (kind == "attentions")
            return _in_layer(f"middle_block.{number}", kind, rest)
        if match := _LAYER.fullmatch(layer):
            direction, block, kind, index, rest = match.groups()
            number = int(block) * in_block + int(index)
            place = f"input_blocks.{number + 1}" if direction == "down" else f"output_blocks.{number}"
            return _in_layer(f"{place}.{int(kind == 'attentions')}", kind, rest)
        if match := _SAMPLER.fullmatch(layer):
            direction, block = match[1], int(match[2])
            if direction == "down":
                return f"input_blocks.{(block + 1) * in_block}.0.op"
            after = 2 if hasattr(unet.up_blocks[block], "attentions") else 1
            return f"output_blocks.{block * in_block + layers_per_block}.{after}.conv"
        return None

    return _renamed(unet, layer_name)


def _in_layer(place: str, kind: str, rest: str) -> str | None:
    if kind == "attentions":
        return f"{place}.{rest}"
    return f"{place}.{_RESNET[rest]}" if rest in _RESNET else None


def _vae_tensors(vae: AutoencoderKL) -> dict[str, Tensor]:
    last = len(vae.config.block_out_channels) - 1

    def block(half: str, index: str) -> str:
        # The original counts the decoder's blocks by their resolution, from the finest.
        return f"encoder.down.{index}" if half == "encoder" else f"decoder.up.{last - int(index)}"

    def layer_name(layer: str) -> str | None:
        if match := _VAE_RESNET.fullmatch(layer):
            return f"{block(match[1], match[2])}.block.{match[3]}.{_vae_layer(match[4])}"
        if match := _VAE_SAMPLER.fullmatch(layer):
            return f"{block(match[1], match[2])}.{match[3]}sample.conv"
        if match := _VAE_MIDDLE.fullmatch(layer):
            return f"{match[1]}.mid.block_{int(match[2]) + 1}.{_vae_layer(match[3])}"
        if match := _VAE_ATTENTION.fullmatch(layer):
            inner = _VAE_ATTENTION_LAYERS.get(match[2])
            return None if inner is None else f"{match[1]}.mid.attn_1.{inner}"
        return layer.replace("conv_norm_out", "norm_out") if _VAE_OTHER.fullmatch(layer) else None

    tensors = _renamed(vae, layer_name)
    # There the attention's projections are convolutions of 1 x 1.
    return {
        name: tensor[:, :, None, None] if ".mid.attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }


def _vae_layer(layer: str) -> str:
    return "nin_shortcut" if layer == "conv_shortcut" else layer


def _text_tensors(text_encoder: nn.Module) -> dict[str, Tensor]:
    """The tensors of a CLIP text encoder below its ``text_model``, a level that transformers 5 dropped from one."""
    return {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}


def _open_clip_tensors(text_encoder: nn.Module) -> dict[str, Tensor]:
    own, tensors = _text_tensors(text_encoder), {}
    for name, tensor in own.items():
        layer, _, parameter = name.rpartition(".")
        match = _OPEN_CLIP_BLOCK.fullmatch(layer)
        if name in _OPEN_CLIP_OTHER:
            tensors[_OPEN_CLIP_OTHER[name]] = tensor
        elif name == "text_projection.weight":
            tensors["text_projection"] = tensor.T.contiguous()  # there it is multiplied from the right
        elif match and match[2] in _OPEN_CLIP_LAYERS:
            tensors[f"transformer.resblocks.{match[1]}.{_OPEN_CLIP_LAYERS[match[2]]}.{parameter}"] = tensor
        elif match and match[2] == "self_attn.q_proj":
            joined = [own[name.replace("q_proj", projection)] for projection in ("q_proj", "k_proj", "v_proj")]
            tensors[f"transformer.resblocks.{match[1]}.attn.in_proj_{parameter}"] = torch.cat(joined)
        elif not (match and match[2] in ("self_attn.k_proj", "self_attn.v_proj")):
            raise _no_name(text_encoder, name)
    return tensors
