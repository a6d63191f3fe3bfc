"""The readers: small networks that judge pictures of the toy world.

One image trunk carries three things: attribute heads (class, body colour, pattern, scene, hat), an *identity*
embedding in which two views of one individual lie close together and its near-twins apart, and an embedding shared
with a small text encoder. They stand in for CLIP and DINO on the embedded model and mean nothing on other pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from svft_diffusion.toybox import WEIGHTS_FOLDER
from svft_diffusion.toybox.tokenizer import MAXIMUM_LENGTH, build_tokenizer
from svft_diffusion.toybox.world import CLASSES, PALETTE, PATTERNS, SCENES

READERS_FILE = WEIGHTS_FOLDER / "readers" / "readers.safetensors"
IMAGE_SIZE = 64
EMBEDDING = 96

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "class": CLASSES,
    "colour": tuple(PALETTE),
    "pattern": PATTERNS,
    "scene": tuple(SCENES),
    "hat": ("none", "hat"),
}


class _Stage(nn.Module):
    """Halves the resolution: two convolutions beside an averaged shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, channels_out), nn.GroupNorm(8, channels_out)])
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.norms[0](self.first(x)))
        return F.silu(self.norms[1](self.second(hidden)) + self.shortcut(F.avg_pool2d(x, 2)))


class Readers(nn.Module):
    """Image trunk with heads, and the text encoder: 0.7 M weights."""

    def __init__(self) -> None:
        super().__init__()
        channels = (32, 64, 112, 144)
        self.stem = nn.Conv2d(3, channels[0], 5, stride=2, padding=2)
        self.stages = nn.Sequential(*(_Stage(a, b) for a, b in pairwise(channels)))
        features = 2 * channels[-1]
        self.identity_head = nn.Linear(features, EMBEDDING)
        self.image_text_head = nn.Linear(features, EMBEDDING)
        self.attribute_heads = nn.ModuleDict({name: nn.Linear(features, len(c)) for name, c in ATTRIBUTES.items()})
        width = 64
        self.tokens = nn.Embedding(len(build_tokenizer()), width)
        self.positions = nn.Parameter(0.02 * torch.randn(MAXIMUM_LENGTH, width))
        self.text_layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.text_head = nn.Linear(width, EMBEDDING)
        # Logarithms of the inverse temperatures of the two contrastive losses; only training uses them.
        self.log_scales = nn.Parameter(torch.tensor([2.5, 2.5]))

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 3, 64, 64) in [-1, 1] -> pooled features (N, 288)."""
        maps = self.stages(F.silu(self.stem(images)))
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)

    def identity(self, features: Tensor) -> Tensor:
        """Unit-length identity embeddings (N, 96)."""
        return F.normalize(self.identity_head(features), dim=1)

    def attributes(self, features: Tensor) -> dict[str, Tensor]:
        """Logits of each attribute, (N, number of its values)."""
        return {name: head(features) for name, head in self.attribute_heads.items()}

    def embed_images(self, features: Tensor) -> Tensor:
        """Unit-length embeddings (N, 96) in the space shared with captions."""
        return F.normalize(self.image_text_head(features), dim=1)

    def embed_texts(self, token_ids: Tensor) -> Tensor:
        """Unit-length embeddings (N, 96) of captions, from token ids (N, 24)."""
        states = self.text_layer(self.tokens(token_ids) + self.positions)
        # Padding repeats the end token; its mean with the words is learned like everything else.
        return F.normalize(self.text_head(states.mean(dim=1)), dim=1)


def images_to_tensor(images: Sequence[Image.Image] | NDArray[np.uint8]) -> Tensor:
    """Pictures of any size -> float tensor (N, 3, 64, 64) in [-1, 1]."""
    resized = []
    for image in images:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
            picture = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
        resized.append(np.asarray(picture.convert("RGB")))
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


@cache
def load_readers(path: Path = READERS_FILE) -> Readers:
    """The trained readers, in fp32 and evaluation mode."""
    readers = Readers()
    readers.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return readers.eval()


@torch.no_grad()
def identity_embeddings(images: Sequence[Image.Image] | NDArray[np.uint8]) -> Tensor:
    """Unit-length identity embeddings (N, 96) of pictures."""
    readers = load_readers()
    return readers.identity(readers.features(images_to_tensor(images)))


@torch.no_grad()
def read_attributes(images: Sequence[Image.Image] | NDArray[np.uint8]) -> dict[str, list[str]]:
    """What the readers see in each picture: attribute name -> one value per picture."""
    readers = load_readers()
    logits = readers.attributes(readers.features(images_to_tensor(images)))
    return {name: [ATTRIBUTES[name][index] for index in value.argmax(1).tolist()] for name, value in logits.items()}


@torch.no_grad()
def prompt_similarity(images: Sequence[Image.Image] | NDArray[np.uint8], prompts: Sequence[str]) -> Tensor:
    """Cosine (N,) between each picture and its own prompt in the shared image-text space."""
    readers = load_readers()
    tokens = build_tokenizer()(
        list(prompts), padding="max_length", max_length=MAXIMUM_LENGTH, truncation=True, return_tensors="pt"
    )
    pictures = readers.embed_images(readers.features(images_to_tensor(images)))
    return (pictures * readers.embed_texts(tokens.input_ids)).sum(1)
