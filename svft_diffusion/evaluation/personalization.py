"""How well a personalized embedded model draws its subject: similarity, scene and class, each beside its scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from svft_diffusion.evaluation.toy_subjects import ToySubject
from svft_diffusion.toybox.readers import identity_embeddings, images_to_tensor, read_attributes


@dataclass(frozen=True)
class SubjectScores:
    """Scores of one set of pictures; similarity is a mean cosine of identity embeddings, the others are shares."""

    subject_similarity: float
    scene_accuracy: float
    class_accuracy: float


@dataclass(frozen=True)
class SimilarityScale:
    """What a subject similarity can be for one subject.

    ``ceiling``: real new views; ``round_trip``: the same through the VAE; ``floor``: other individuals of the class.
    """

    ceiling: float
    round_trip: float
    floor: float


def subject_similarity(pictures: Sequence[Image.Image], photos: Sequence[Image.Image]) -> float:
    """Mean cosine between the identity embeddings of every picture and every photo."""
    return float((identity_embeddings(pictures) @ identity_embeddings(photos).T).mean())


def score_pictures(pictures: Sequence[Image.Image], scenes: Sequence[str], subject: ToySubject) -> SubjectScores:
    """Score pictures of a subject; ``scenes[i]`` is the scene that picture i was asked for."""
    read = read_attributes(pictures)
    return SubjectScores(
        subject_similarity=subject_similarity(pictures, subject.photos()),
        scene_accuracy=float(np.mean([seen == asked for seen, asked in zip(read["scene"], scenes, strict=True)])),
        class_accuracy=float(np.mean([seen == subject.individual.class_name for seen in read["class"]])),
    )


def similarity_scale(subject: ToySubject, vae: AutoencoderKL) -> SimilarityScale:
    """The scale beside which a similarity of this subject has to be read."""
    photos, views = subject.photos(), subject.new_views()
    return SimilarityScale(
        ceiling=subject_similarity(views, photos),
        round_trip=subject_similarity(through_autoencoder(vae, views), photos),
        floor=subject_similarity(subject.strangers(), photos),
    )


@torch.no_grad()
def through_autoencoder(vae: AutoencoderKL, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures after encoding and decoding: what the model could show at best."""
    decoded = vae.decode(vae.encode(images_to_tensor(pictures).to(vae.dtype)).latent_dist.mean).sample
    pixels = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]
