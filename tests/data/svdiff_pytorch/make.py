"""Made the files of this folder: SVDiff files of the published package svdiff-pytorch, and what it computes with them.

The package (version 0.2.0, MIT licence, Copyright (c) 2023 mkshing) needs libraries of early 2023, so this runs in an
environment of its own, and the tests read only what it wrote::

    pip install torch numpy safetensors pillow tqdm pyyaml requests regex packaging importlib-metadata psutil
    pip install --no-deps svdiff-pytorch==0.2.0 diffusers==0.14.0 transformers==4.27.3 accelerate==0.18.0 \\
        huggingface_hub==0.16.4 tokenizers==0.13.3 einops==0.8.2 "setuptools<70"
    python make.py

Python was 3.11, torch 2.13 on a CPU; everything random comes from one seed.

``unet`` and ``text_encoder`` are models with random weights, in float16. The package's own loaders make its modules of
them, its shifts are trained with AdamW as its ``train_svdiff.py`` does and saved by the keys that this script saves.
Then the package loads the files again, and ``outputs.safetensors`` gets what the models give at each strength.
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file
from svdiff_pytorch import load_text_encoder_for_svdiff, load_unet_for_svdiff
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

FOLDER = Path(__file__).parent
SEED = 0
STRENGTHS = (0.0, 0.5, 1.0, 1.2)
STEPS = 40
LEARNING_RATE = 0.02

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": [4, 8],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
}
TEXT_ENCODER = {
    "vocab_size": 48,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 10,
    "bos_token_id": 46,
    "eos_token_id": 47,
}


def write_base() -> None:
    """Both models with every weight random, norms and biases too, and rounded to float16."""
    text_config = CLIPTextConfig(**TEXT_ENCODER)
    for name, model in (("unet", diffusers.UNet2DConditionModel(**UNET)), ("text_encoder", CLIPTextModel(text_config))):
        for parameter in model.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, mean=0.0, std=0.2)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                nn.init.normal_(module.weight, mean=1.0, std=0.3)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
            elif name == "text_encoder" and isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.4)
        if name == "unet":
            model.half().save_pretrained(FOLDER / name, safe_serialization=True)
            continue
        weights = {key: tensor.half() for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
        (FOLDER / name).mkdir(exist_ok=True)
        save_file(weights, FOLDER / name / "model.safetensors", {"format": "pt"})
        settings = {**TEXT_ENCODER, "architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
        (FOLDER / name / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load(shifts: str | None = None) -> dict[str, nn.Module]:
    """The package's modules around the base, with the shifts saved in the folder ``shifts``."""
    common = {"torch_dtype": torch.float32, "spectral_shifts_ckpt": shifts}
    return {
        "unet": load_unet_for_svdiff(str(FOLDER), subfolder="unet", **common),
        "text_encoder": load_text_encoder_for_svdiff(str(FOLDER), subfolder="text_encoder", **common),
    }


def train(models: dict[str, nn.Module]) -> None:
    """Steps of denoising on random latents; only ``delta`` trains."""
    shifts = []
    for model in models.values():
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "delta" in name:
                shifts.append(parameter.requires_grad_())
    optimizer = torch.optim.AdamW(shifts, lr=LEARNING_RATE)
    latents, tokens = torch.randn(4, 4, 8, 8), torch.randint(0, 46, (4, 10))
    for _ in range(STEPS):
        noise, timesteps = torch.randn(latents.shape), torch.randint(0, 1000, (4,))
        text = models["text_encoder"](tokens)[0]
        predicted = models["unet"](latents + noise, timesteps, text).sample
        loss = functional.mse_loss(predicted, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def save(models: dict[str, nn.Module]) -> None:
    """What ``save_weights`` of ``train_svdiff.py`` writes."""
    for component, file in (("unet", "spectral_shifts"), ("text_encoder", "spectral_shifts_te")):
        state_dict = models[component].state_dict()
        save_file({k: state_dict[k] for k in state_dict if "delta" in k}, FOLDER / f"{file}.safetensors")


@torch.no_grad()
def outputs() -> dict[str, torch.Tensor]:
    """Inputs, and the models' outputs by strength."""
    models = load(str(FOLDER))
    found = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([10, 500]),
        "encoder_hidden_states": torch.randn(2, 10, 8),
        "input_ids": torch.randint(0, 46, (2, 10)),
    }
    for strength in STRENGTHS:
        for model in models.values():
            for module in model.modules():
                if hasattr(module, "set_scale"):
                    module.set_scale(strength)
        inputs = (found["sample"], found["timestep"], found["encoder_hidden_states"])
        found[f"unet {strength}"] = models["unet"](*inputs).sample
        found[f"text_encoder {strength}"] = models["text_encoder"](found["input_ids"])[0]
    return {name: tensor.contiguous() for name, tensor in found.items()}


if __name__ == "__main__":
    torch.manual_seed(SEED)
    write_base()
    models = load()
    train(models)
    save(models)
    save_file(outputs(), FOLDER / "outputs.safetensors")
