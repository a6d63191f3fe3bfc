"""What the bytes of an adapter file are spent on, for Stable Diffusion 1.5's geometry with random weights.

    python -m benchmarks.adapter_sizes

Adapts attention and feed-forward layers of the UNet and the text encoder, stores float16, and prints a table. The first
run decomposes all weights, which takes minutes; the factors are kept for the next.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.adapters.config import BenchmarkConfig
from benchmarks.adapters.unet import random_unet
from svft_diffusion.adapters import add_training_adapter, save_adapter, unload_adapter
from svft_diffusion.adapters.training import adapter_parameters
from svft_diffusion.cli.arguments import Parser, add_settings, config_from_options
from svft_diffusion.errors import UserError
from svft_diffusion.factors import CACHE_VARIABLE
from svft_diffusion.files import SKETCH, AdapterMetadata, BaseDigests, digests_of_pipeline, layer_names
from svft_diffusion.files.adapter_file import DIGEST_KEY, METADATA_KEY
from svft_diffusion.files.container import read_container
from svft_diffusion.files.model_spec import THUMBNAIL_KEY
from svft_diffusion.settings import setting
from svft_diffusion.training.checks import adapter_config
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.persistence import described
from svft_diffusion.training.subjects import Subject
from svft_diffusion.training.thumbnail import jpeg_thumbnail

LARGEST_SHARE = 0.3
"""Of a file, what may be anything but values."""
METHODS = {"svft": 500_000, "vectorfit": 1_100_000}
"""Method -> the most bytes that a file may take, both with a plain pattern and without a thumbnail."""


@dataclass(frozen=True)
class SizesConfig:
    """Settings of the measurement."""

    cache: Path = setting(Path("outputs/adapter_benchmark/factors"), "singular factors, kept for the next run")
    picture: Path = setting(Path("docs/images/real_photos.png"), "what the thumbnail shows")


def main(arguments: Sequence[str]) -> None:
    """Write each file with and without a thumbnail, and print what its bytes are spent on."""
    parser = Parser(prog="python -m benchmarks.adapter_sizes", description=__doc__)
    add_settings(parser, SizesConfig)
    config = config_from_options(SizesConfig, parser.parse_args(arguments))
    os.environ[CACHE_VARIABLE] = str(config.cache.resolve())
    models = {"unet": random_unet(BenchmarkConfig()), "text_encoder": random_text_encoder()}
    thumbnail = jpeg_thumbnail(config.picture)
    files: dict[str, bytes] = {}
    base_digests: BaseDigests | None = None
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            add_training_adapter(models, adapter_config(usual_training(method)), "sizes")
            fill(adapter_parameters(models, "sizes"))
            base_digests = base_digests or digests_of_pipeline(models, layer_names(adapter_parameters(models, "sizes")))
            metadata = replace(usual_metadata(method), base_digests=base_digests)
            for label, picture in ((method, None), (f"{method}, thumbnail", thumbnail)):
                file = Path(folder) / "adapter.safetensors"
                save_adapter(models, "sizes", file, metadata=replace(metadata, thumbnail=picture))
                files[label] = file.read_bytes()
            unload_adapter(models, "sizes")
    print(report({label: division(data) for label, data in files.items()}))


def random_text_encoder() -> CLIPTextModel:
    """Stable Diffusion 1.5's text encoder with random weights."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    return CLIPTextModel(config)


def fill(parameters: Mapping[str, nn.Parameter]) -> None:
    """Numbers as training leaves them, none of which is like another."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def usual_training(method: str) -> TrainingConfig:
    """A usual training by a method."""
    return TrainingConfig(
        pretrained_model_name_or_path="stable-diffusion-v1-5/stable-diffusion-v1-5",
        instance_prompt="a photo of sks dog",
        class_prompt="a photo of a dog",
        method=method,
        targets="attention+feed-forward",
        resolution=512,
        max_train_steps=800,
        learning_rate=1e-3,
        text_encoder_lr=1e-3,
        train_text_encoder=True,
        with_prior_preservation=True,
        mixed_precision="fp16",
    )


def usual_metadata(method: str) -> AdapterMetadata:
    """What it says of its adapter."""
    config = usual_training(method)
    assert config.instance_prompt is not None
    said = described(config, [Subject(config.instance_prompt, [], None, config.class_prompt, [])])
    return replace(said, base_architecture="stable-diffusion-v1", value_dtype="float16")


def division(data: bytes) -> dict[str, int]:
    """What the bytes of an adapter file are spent on; the parts add up to its size."""
    container = read_container(data, "the adapter")
    tensors = {name: entry.end - entry.start for name, entry in container.entries.items()}
    sketch = tensors.pop(SKETCH, 0)
    texts = {key: len(json.dumps(key)) + len(json.dumps(text)) + len(":,") for key, text in container.metadata.items()}
    digests = sum(len(text) for text in json.loads(container.metadata[METADATA_KEY])["base"]["digests"].values())
    parts = {
        "values": sum(tensors.values()),
        "sketch": sketch,
        "digests of the base": digests,
        "own header": texts.pop(METADATA_KEY) - digests,
        "thumbnail": texts.pop(THUMBNAIL_KEY, 0),
        "digest of the content": texts.pop(DIGEST_KEY),
        "entries for other tools": sum(texts.values()),
    }
    return {**parts, "table of tensors": len(data) - sum(parts.values())}


def report(divisions: Mapping[str, Mapping[str, int]]) -> str:
    """A Markdown table of what each file is spent on, and whether it keeps to its bars."""
    names = list(next(iter(divisions.values())))
    lines = [f"| bytes | {' | '.join(divisions)} |", "| --- |" + " --- |" * len(divisions)]
    for name in names:
        cells = (f"{parts[name]:,} ({parts[name] / sum(parts.values()):.1%})" for parts in divisions.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sizes = [sum(parts.values()) for parts in divisions.values()]
    lines.append(f"| file | {' | '.join(f'{size:,}' for size in sizes)} |")
    lines.append(f"| bars | {' | '.join(_verdict(label, parts) for label, parts in divisions.items())} |")
    return "\n".join(lines)


def broken_bars(label: str, parts: Mapping[str, int]) -> list[str]:
    """The bars that a file breaks, in words; its size counts without a thumbnail."""
    size = sum(parts.values())
    method = label.partition(",")[0]
    share = 1 - parts["values"] / size
    broken = [] if size - parts["thumbnail"] <= METHODS[method] else [f"larger than {METHODS[method]:,}"]
    return broken if share <= LARGEST_SHARE else [*broken, f"{share:.1%} is no values"]


def _verdict(label: str, parts: Mapping[str, int]) -> str:
    return "; ".join(broken_bars(label, parts)) or "hold"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
