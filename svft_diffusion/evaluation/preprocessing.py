"""How a picture becomes a backbone's input. The resampling is Pillow's, whatever else is installed: scores of the same
pictures differ by hundredths with the way of resizing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """Bicubic resizing of the shorter side, a square cut from the middle, and normalization of the colours."""

    resize: int  # pixels of the shorter side
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures of any sizes -> (n, 3, crop, crop)."""
        pixels = np.stack([np.asarray(self._cut(picture.convert("RGB")), dtype=np.float32) for picture in pictures])
        scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255.0
        mean, std = torch.tensor(self.mean).view(3, 1, 1), torch.tensor(self.std).view(3, 1, 1)
        return (scaled - mean) / std

    def __str__(self) -> str:
        return (
            f"shorter side to {self.resize} (Pillow bicubic), centre crop {self.crop}, mean {self.mean}, std {self.std}"
        )

    def _cut(self, picture: Image.Image) -> Image.Image:
        shorter, longer = sorted(picture.size)
        long_side = int(self.resize * longer / shorter)
        size = (self.resize, long_side) if picture.width <= picture.height else (long_side, self.resize)
        resized = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = (resized.width - self.crop) // 2, (resized.height - self.crop) // 2
        return resized.crop((left, top, left + self.crop, top + self.crop))


CLIP_PREPROCESSING = Preprocessing(224, 224, _CLIP_MEAN, _CLIP_STD)
"""OpenAI's own, which resizes to the crop itself."""

DINO_PREPROCESSING = Preprocessing(256, 224, _IMAGENET_MEAN, _IMAGENET_STD)
"""That of the evaluations of DINO and DINOv2 by their authors."""
