"""Tiny randomly initialised models in the layout of the embedded one, built in code: no file, no hub."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = ("a", "photo", "of", "sks", "dog", "robot", "on", "the", "beach", "red", "style")
MAX_TOKENS = 12
TEXT_WIDTH = 24
POOLED_WIDTH = 32


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows `WORDS` as whole tokens and spells everything else in bytes."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {token: index for index, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:  # merge from the right, so that words share their ends
            pair = (pieces[-2], pieces[-1])
            pieces[-2:] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
            vocabulary.setdefault(pieces[-1], len(vocabulary))
    vocabulary["<|startoftext|>"] = len(vocabulary)
    vocabulary["<|endoftext|>"] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def tiny_text_config(**changes: Any) -> CLIPTextConfig:
    tokenizer = tiny_tokenizer()
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**(values | changes))


def tiny_text_encoder(seed: int = 0) -> CLIPTextModel:
    config = tiny_text_config()
    torch.manual_seed(seed)
    return CLIPTextModel(config).eval()


def tiny_projecting_text_encoder(seed: int = 0, width: int = POOLED_WIDTH) -> CLIPTextModelWithProjection:
    """In the layout of the second text encoder of SDXL: wider than the first, with a projection at the end."""
    config = tiny_text_config(hidden_size=width, projection_dim=width, hidden_act="gelu")
    torch.manual_seed(seed)
    return CLIPTextModelWithProjection(config).eval()


def tiny_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """In the layout of Stable Diffusion 2, whose transformers begin and end with a linear layer."""
    torch.manual_seed(seed)
    values = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 24),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": (2, 2),
        "norm_num_groups": 8,
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**(values | changes)).eval()


def tiny_unet_sd1(seed: int = 0) -> UNet2DConditionModel:
    """In the layout of Stable Diffusion 1, whose transformers begin and end with a 1 x 1 convolution."""
    return tiny_unet(seed, use_linear_projection=False, attention_head_dim=2)


def tiny_unet_sdxl(seed: int = 0) -> UNet2DConditionModel:
    """In the layout of SDXL: two transformer blocks in one place, text of two encoders, size conditions."""
    return tiny_unet(
        seed,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=TEXT_WIDTH + POOLED_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=POOLED_WIDTH + 6 * 4,
    )


def tiny_vae(seed: int = 0, **changes: Any) -> AutoencoderKL:
    torch.manual_seed(seed)
    values = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**(values | changes)).eval()


def tiny_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline for 16 x 16 pictures with random weights that depend on ``seed`` alone."""
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(seed),
        text_encoder=tiny_text_encoder(seed),
        tokenizer=tiny_tokenizer(),
        unet=tiny_unet(seed),
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pipeline_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL pipeline for 16 x 16 pictures."""
    return StableDiffusionXLPipeline(
        vae=tiny_vae(seed),
        text_encoder=tiny_text_encoder(seed),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_projecting_text_encoder(seed),
        tokenizer_2=tiny_tokenizer(),
        unet=tiny_unet_sdxl(seed),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )


def tiny_inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Inputs of one call of `tiny_unet`."""
    generator = torch.Generator().manual_seed(7)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator).to(dtype),
        "timestep": torch.tensor([10, 500]),
        "encoder_hidden_states": torch.randn(2, MAX_TOKENS, TEXT_WIDTH, generator=generator).to(dtype),
    }


def tiny_sdxl_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Inputs of one call of `tiny_unet_sdxl`."""
    generator = torch.Generator().manual_seed(8)
    text = torch.randn(2, MAX_TOKENS, TEXT_WIDTH + POOLED_WIDTH, generator=generator).to(dtype)
    pooled = torch.randn(2, POOLED_WIDTH, generator=generator).to(dtype)
    sizes = torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2).to(dtype)
    conditions = {"text_embeds": pooled, "time_ids": sizes}
    return tiny_inputs(dtype) | {"encoder_hidden_states": text, "added_cond_kwargs": conditions}


def tiny_tokens() -> dict[str, torch.Tensor]:
    """Inputs of one call of any tiny text encoder or language model, which all know more than 32 tokens."""
    return {"input_ids": torch.randint(3, 32, (2, MAX_TOKENS), generator=torch.Generator().manual_seed(9))}
