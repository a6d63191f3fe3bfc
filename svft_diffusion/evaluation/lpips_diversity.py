"""Diversity by LPIPS (Zhang et al., CVPR 2018), as DreamBooth's paper measures it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from svft_diffusion.errors import UserError

LPIPS_NAME = "lpips-alex"


class LpipsDiversity:
    """Mean LPIPS distance, on AlexNet, over all pairs of pictures."""

    def __init__(self, device: torch.device) -> None:
        """Loads the network.

        Raises:
            UserError: the package is not installed, or its weights can't be had.
        """
        if any(importlib.util.find_spec(package) is None for package in ("lpips", "torchvision")):
            raise UserError(
                "--lpips needs the packages lpips and torchvision: pip install 'svft-diffusion[metrics]'; "
                "without it, diversity is measured by each backbone"
            )
        try:
            import lpips

            self._network: Any = lpips.LPIPS(net="alex", verbose=False).to(device)
        except (ImportError, OSError, RuntimeError) as problem:  # such as a torchvision for another torch; no download
            reason = " ".join(str(problem).split())
            raise UserError(f"the network of --lpips can't be loaded: {reason}") from problem
        self._device = device

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> float:
        """The distance of at least two pictures of one size."""
        tensors = [_tensor(picture).to(self._device) for picture in pictures]
        return float(np.mean([float(self._network(one, other)) for one, other in combinations(tensors, 2)]))


def _tensor(picture: Image.Image) -> Tensor:
    """(1, 3, height, width) in [-1, 1]."""
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32).copy())
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1.0
