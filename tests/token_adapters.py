"""Adapters with learned tokens for tiny pipelines, and what they could leave behind there."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionXLPipeline
from tiny_models import (
    POOLED_WIDTH,
    TEXT_WIDTH,
    tiny_pipeline,
    tiny_projecting_text_encoder,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet_sdxl,
    tiny_vae,
)
from torch import Tensor, nn

from svft_diffusion import SVFTConfig, add_tokens, save_adapter
from svft_diffusion.adapters import SpectralConfig, add_training_adapter, loaded_adapters
from svft_diffusion.files import AdapterMetadata

METADATA = AdapterMetadata(base_name="toy")
PLAIN = "a photo of red dog on the beach"
TOKEN, LONG_TOKEN = "<robo>", ("<robo>", "<robo>_1")
WIDTHS = {"text_encoder": TEXT_WIDTH, "text_encoder_2": POOLED_WIDTH}


def rows(width: int, seed: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def sdxl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(seed),
        text_encoder=tiny_text_encoder(seed),
        text_encoder_2=tiny_projecting_text_encoder(seed),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=tiny_unet_sdxl(seed),
        scheduler=EulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES = {"sd1": tiny_pipeline, "sdxl": sdxl_pipeline}


def text_components(pipe: DiffusionPipeline) -> list[str]:
    return [component for component in WIDTHS if getattr(pipe, component, None) is not None]


def learned(pipe: DiffusionPipeline, names: tuple[str, ...] = (TOKEN,), seed: int = 5) -> dict[str, dict[str, Tensor]]:
    return {
        component: {token: rows(WIDTHS[component], seed + place) for place, token in enumerate(names)}
        for component in text_components(pipe)
    }


def live_adapter(pipe: DiffusionPipeline, name: str, config: SpectralConfig | None = None, seed: int = 1) -> None:
    """A small adapter with values in the UNet, or one of ``config`` in the text encoder."""
    models = {"unet": pipe.unet} if config is None else {"text_encoder": pipe.text_encoder}
    parameters = add_training_adapter(models, config or SVFTConfig(target_modules=r"mid_block.*attn2\.to_q"), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def adapter_file(
    file: Path,
    family: str = "sd1",
    names: tuple[str, ...] = (TOKEN,),
    config: SpectralConfig | None = None,
    seed: int = 5,
    value_dtype: str = "float32",
) -> Path:
    pipe = PIPELINES[family]()
    live_adapter(pipe, "made", config, seed)
    add_tokens(pipe, "made", learned(pipe, names, seed))
    return save_adapter(pipe, "made", file, metadata=dataclasses.replace(METADATA, value_dtype=value_dtype))


def encoded(pipe: DiffusionPipeline, prompt: str, component: str = "text_encoder") -> Any:
    tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"))
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    with torch.no_grad():
        return getattr(pipe, component)(tokenizer(prompt, **options).input_ids)


def hidden(pipe: DiffusionPipeline, prompt: str, component: str = "text_encoder") -> Tensor:
    return encoded(pipe, prompt, component).last_hidden_state


def trace(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Everything that an adapter with tokens could leave behind."""
    found: dict[str, Any] = {"adapters": loaded_adapters(pipe)}
    for component in text_components(pipe):
        tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"))
        encoder = getattr(pipe, component)
        output = hidden(pipe, PLAIN, component).tolist()  # first: the tokenizer notes how it was called last
        found[component] = [
            len(tokenizer),
            tokenizer.backend_tokenizer.to_str(),
            encoder.get_input_embeddings().weight.tolist(),
            [name for name, _ in encoder.named_modules()],
            list(encoder.state_dict()),
            sum(len(module._forward_pre_hooks) for module in encoder.modules()),
            [module.eos_token_id for module in encoder.modules() if hasattr(module, "eos_token_id")],
            output,
        ]
    return found


def with_longer_table(encoder: nn.Module, added: dict[str, Tensor]) -> nn.Module:
    """What learned tokens mean."""
    encoder = copy.deepcopy(encoder)
    table = encoder.get_input_embeddings()
    table.weight = nn.Parameter(torch.cat([table.weight, torch.stack(list(added.values()))]), requires_grad=False)
    return encoder
