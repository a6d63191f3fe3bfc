"""What is measured, each by one small function of features: the protocol of DreamBooth (Ruiz et al., CVPR 2023, §4.2).

Features are (n, d), a row for each picture, of any length; all cosines are plain ones, neither clamped nor scaled. What
comes from different backbones can't be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def subject_fidelity(generated: Tensor, real: Tensor) -> float:
    """Mean cosine over all pairs of a generated picture (n, d) and a real photo of the subject (m, d).

    DINO and CLIP-I of the paper, after the backbone. Of pictures of the class without the token it is the paper's PRES
    (table 3), of which less is better: then the class has not turned into the subject.
    """
    return float((_unit(generated) @ _unit(real).T).mean())


def mean_of_pairs(features: Tensor) -> float | None:
    """Mean cosine over all pairs of different rows of (n, d); None of fewer than two.

    Of the photos themselves it is the row "real images" of the paper's table 1, the most that fidelity should be.
    """
    count = len(features)
    if count < 2:
        return None
    cosines = _unit(features) @ _unit(features).T
    return float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))


def prompt_fidelity(pictures: Tensor, prompts: Tensor) -> float:
    """Mean cosine of each picture (n, d) and its own prompt (n, d) in a space that they share: CLIP-T of the paper."""
    return float((_unit(pictures) * _unit(prompts)).sum(dim=1).mean())


def diversity(groups: Sequence[Tensor]) -> float | None:
    """Mean over prompts of 1 - mean cosine between pictures of one prompt; more is more diverse.

    DIV of the paper (table 3) takes LPIPS in place of the cosine. Prompts with one picture say nothing; None if all do.
    """
    means = [mean for group in groups if (mean := mean_of_pairs(group)) is not None]
    return 1.0 - float(np.mean(means)) if means else None


def feature_drift(pictures: Tensor, base: Tensor) -> float:
    """Mean of 1 - cosine between picture i (n, d) and the base model's from the same prompt and noise (n, d)."""
    return 1.0 - prompt_fidelity(pictures, base)


def pixel_drift(pictures: Sequence[Image.Image], base: Sequence[Image.Image]) -> float:
    """Mean absolute difference of pixels, black and white being 1 apart, of picture i and the base model's.

    Raises:
        ValueError: not as many pictures, or not of the same sizes.
    """
    differences = [
        np.abs(np.asarray(one.convert("RGB"), dtype=np.float64) - np.asarray(other.convert("RGB"))).mean() / 255.0
        for one, other in zip(pictures, base, strict=True)
    ]
    return float(np.mean(differences))


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.to("cpu", torch.float64), dim=1)
