"""Stage ``identities``: several views of each of many individuals, as seen directly and through the VAE."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from svft_diffusion.toybox.pretraining.dataset import NO_LABEL
from svft_diffusion.toybox.pretraining.latents import BATCH, to_tensor
from svft_diffusion.toybox.world import (
    CLASSES,
    PALETTE,
    PATTERNS,
    SCENES,
    Individual,
    random_individual,
    random_view,
    render,
)

VIEWS = 4
FAMILY = 8
IDENTITY_PICTURES, IDENTITY_LABELS, ROUND_TRIPS = "identities.npy", "identity_labels.npy", "identity_round_trips.npy"
FIRST_FAMILY_SEED = 50_000_000

# Fields of which a near-twin changes one to three. The name of the body colour goes with the body.
_TWIN_FIELDS = ("body", "parts", "details", "pattern", "pattern_colour", "emblem", "emblem_colour", "proportions")


def near_twin(individual: Individual, other: Individual, generator: random.Random) -> Individual:
    """``individual`` with one to three fields taken from ``other``: the hard negatives of the identity embedding."""
    changes = {name: getattr(other, name) for name in generator.sample(_TWIN_FIELDS, generator.randint(1, 3))}
    if "body" in changes:
        changes["body_name"] = other.body_name
    assert set(changes) <= {field.name for field in fields(Individual)}
    return replace(individual, **changes)


def draw_family(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Eight individuals of one class, some near-twins of the first: pictures (8, 4, 64, 64, 3), labels (8, 4, 5)."""
    generator = random.Random(seed)
    class_name = generator.choice(CLASSES)
    first = random_individual(generator, class_name)
    pictures = np.zeros((FAMILY, VIEWS, 64, 64, 3), dtype=np.uint8)
    labels = np.zeros((FAMILY, VIEWS, 5), dtype=np.int64)
    for member in range(FAMILY):
        individual = random_individual(generator, class_name) if member else first
        if member and generator.random() < 0.35:
            individual = near_twin(first, individual, generator)
        colour = NO_LABEL if individual.body_name is None else list(PALETTE).index(individual.body_name)
        for number in range(VIEWS):
            view = random_view(generator)
            pictures[member, number] = render(individual, view)
            labels[member, number] = (
                CLASSES.index(class_name),
                colour,
                PATTERNS.index(individual.pattern),
                list(SCENES).index(view.scene),
                int(view.hat is not None),
            )
    return pictures, labels


def render_identities(work_dir: Path, families: int, processes: int) -> None:
    """Render ``families`` families of eight individuals in four views each."""
    pictures = np.lib.format.open_memmap(
        work_dir / IDENTITY_PICTURES, mode="w+", dtype=np.uint8, shape=(families, FAMILY, VIEWS, 64, 64, 3)
    )
    labels = np.zeros((families, FAMILY, VIEWS, 5), dtype=np.int64)
    with Pool(processes) as pool:
        seeds = range(FIRST_FAMILY_SEED, FIRST_FAMILY_SEED + families)
        for index, (drawn, label) in enumerate(pool.imap(draw_family, seeds, chunksize=8)):
            pictures[index], labels[index] = drawn, label
    pictures.flush()
    np.save(work_dir / IDENTITY_LABELS, labels)


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures (N, H, W, 3) after encoding and decoding."""
    with torch.autocast("cpu", torch.bfloat16):
        decoded = vae.decode(vae.encode(to_tensor(pictures)).latent_dist.mean).sample
    return ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def round_trip_identities(work_dir: Path, vae: AutoencoderKL) -> None:
    """The same pictures through the VAE, so that the readers know how the model's pictures look."""
    pictures = np.load(work_dir / IDENTITY_PICTURES, mmap_mode="r")
    result = np.lib.format.open_memmap(work_dir / ROUND_TRIPS, mode="w+", dtype=np.uint8, shape=pictures.shape)
    flat_in, flat_out = pictures.reshape(-1, 64, 64, 3), result.reshape(-1, 64, 64, 3)
    for start in range(0, len(flat_in), BATCH):
        flat_out[start : start + BATCH] = round_trip(vae, flat_in[start : start + BATCH])
    result.flush()
