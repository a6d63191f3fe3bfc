"""Tiny randomly initialised transformers: denoisers, text encoders, language and vision models, and their inputs.

`ARCHITECTURES` names every tiny model of the tests, the UNets and CLIP text encoders of `tiny_models` included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny_models import (
    MAX_TOKENS,
    TEXT_WIDTH,
    WORDS,
    tiny_inputs,
    tiny_projecting_text_encoder,
    tiny_sdxl_inputs,
    tiny_text_config,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_tokens,
    tiny_unet,
    tiny_unet_sd1,
    tiny_unet_sdxl,
    tiny_vae,
)
from torch import nn
from transformers import (
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    ViTConfig,
    ViTModel,
)

VOCABULARY = 40
POOLED = 20


def tiny_sd3(seed: int = 0) -> SD3Transformer2DModel:
    """Two joint blocks as in Stable Diffusion 3.5 medium: the first attends to the picture a second time."""
    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


def tiny_sd3_inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return _denoiser_inputs(dtype) | {"pooled_projections": _random(dtype, 2, POOLED)}


def tiny_flux(seed: int = 0, *, guidance: bool = True) -> FluxTransformer2DModel:
    """One block of two streams and two of a single stream; without ``guidance`` in the layout of FLUX.1 schnell."""
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=12,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 2, 2),
    ).eval()


def tiny_flux_inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    positions = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return {
        "hidden_states": _random(dtype, 2, 16, 12),
        "encoder_hidden_states": _random(dtype, 2, MAX_TOKENS, TEXT_WIDTH),
        "pooled_projections": _random(dtype, 2, POOLED),
        "timestep": torch.tensor([0.01, 0.5]).to(dtype),
        "guidance": torch.tensor([3.5, 3.5]).to(dtype),
        "img_ids": positions.to(dtype),
        "txt_ids": torch.zeros(MAX_TOKENS, 3, dtype=dtype),
    }


def tiny_pixart(seed: int = 0) -> PixArtTransformer2DModel:
    torch.manual_seed(seed)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
        caption_channels=TEXT_WIDTH,
    ).eval()


def tiny_pixart_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return _denoiser_inputs(dtype) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def tiny_sana(seed: int = 0) -> SanaTransformer2DModel:
    """Linear attention to the picture, softmax attention to the text, a feed-forward network of convolutions."""
    torch.manual_seed(seed)
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT_WIDTH,
        sample_size=8,
        patch_size=1,
    ).eval()


def tiny_sana_inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return _denoiser_inputs(dtype)


def tiny_t5(seed: int = 0) -> T5EncoderModel:
    """In the layout of T5 1.1, the text encoder of SD3, Flux and PixArt: gated feed-forward networks."""
    torch.manual_seed(seed)
    return T5EncoderModel(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=TEXT_WIDTH,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ).eval()


def tiny_t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that knows `WORDS`."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *((f"▁{word}", -1.0) for word in WORDS)], extra_ids=0)


def tiny_pipeline_sd3(seed: int = 0, *, t5: bool = True) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3.5 pipeline for 16 x 16 pictures; both CLIPs together are narrower than T5, as there."""
    return StableDiffusion3Pipeline(
        transformer=tiny_sd3(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(seed, shift_factor=0.1),
        text_encoder=tiny_projecting_text_encoder(seed, width=8),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_projecting_text_encoder(seed + 1, width=POOLED - 8),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=tiny_t5(seed) if t5 else None,
        tokenizer_3=tiny_t5_tokenizer() if t5 else None,
    )


def tiny_pipeline_flux(seed: int = 0, *, guidance: bool = True) -> FluxPipeline:
    """A FLUX.1 pipeline, which draws pictures of 256 x 256 unless it is told another size."""
    config = tiny_text_config(hidden_size=POOLED)
    torch.manual_seed(seed)
    clip = CLIPTextModel(config).eval()
    return FluxPipeline(
        transformer=tiny_flux(seed, guidance=guidance),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(seed, latent_channels=3, shift_factor=0.1),
        text_encoder=clip,
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_t5(seed),
        tokenizer_2=tiny_t5_tokenizer(),
    )


def tiny_llama(seed: int = 0, *, tied: bool = False) -> LlamaForCausalLM:
    """With fewer heads for keys and values; ``tied``: the output layer shares the table of embeddings."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=TEXT_WIDTH,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=tied,
        )
    ).eval()


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Its blocks are made of transformers' `Conv1D`, its output layer shares the table of embeddings."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=MAX_TOKENS,
            n_embd=TEXT_WIDTH,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).eval()


def tiny_vit(seed: int = 0) -> ViTModel:
    torch.manual_seed(seed)
    return ViTModel(
        ViTConfig(
            hidden_size=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            image_size=8,
            patch_size=4,
            pooler_output_size=16,
        )
    ).eval()


def tiny_vit_inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"pixel_values": _random(dtype, 2, 3, 8, 8)}


class Architecture(NamedTuple):
    """How to build a tiny model, and the keyword arguments of one call of it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]


ARCHITECTURES = {
    "sd1": Architecture(tiny_unet_sd1, tiny_inputs),
    "sd2": Architecture(tiny_unet, tiny_inputs),
    "sdxl": Architecture(tiny_unet_sdxl, tiny_sdxl_inputs),
    "sd3": Architecture(tiny_sd3, tiny_sd3_inputs),
    "flux": Architecture(tiny_flux, tiny_flux_inputs),
    "pixart": Architecture(tiny_pixart, tiny_pixart_inputs),
    "sana": Architecture(tiny_sana, tiny_sana_inputs),
    "clip": Architecture(tiny_text_encoder, tiny_tokens),
    "clip with projection": Architecture(tiny_projecting_text_encoder, tiny_tokens),
    "t5": Architecture(tiny_t5, tiny_tokens),
    "llama": Architecture(tiny_llama, tiny_tokens),
    "gpt2": Architecture(tiny_gpt2, tiny_tokens),
    "vit": Architecture(tiny_vit, tiny_vit_inputs),
}


def _denoiser_inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": _random(dtype, 2, 4, 8, 8),
        "encoder_hidden_states": _random(dtype, 2, MAX_TOKENS, TEXT_WIDTH),
        "timestep": torch.tensor([10, 500]),
    }


def _random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
