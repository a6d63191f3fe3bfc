"""Batches of latents: which pictures each step sees, encoded once before training or loaded as they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import tqdm  # shows a bar in the first process only
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from svft_diffusion.data.dataset import Picture, ShuffledOrder, SquareCrop
from svft_diffusion.models import LatentDistribution, ModelFamily

CUTS_PER_PHOTO = 4
"""Cached latents keep so many random cuts of a photo that is not square; the passes take them in turn."""


@dataclass(frozen=True)
class Stream:
    """Pictures of one kind (``instance`` or ``class``) and the order in which training takes them."""

    kind: str
    pictures: Sequence[Picture]
    order: ShuffledOrder


@dataclass(frozen=True)
class Batch:
    """One forward pass: first the instance pictures, then as many class pictures under prior preservation."""

    latents: LatentDistribution
    prompts: list[str]
    samples: list[tuple[str, int]]  # (kind, number in the run): what the randomness of each row follows from


@dataclass(frozen=True)
class SampleNumbers:
    """Which samples of the run a process takes when.

    Numbers count the samples of all processes, so that two processes see together what one sees with twice the
    accumulation.
    """

    batch_size: int
    accumulation: int
    processes: int
    process: int

    def batches(self, first_step: int, steps: int) -> list[range]:
        """The batches of optimizer steps ``first_step`` to ``steps - 1``, ``accumulation`` of them for each step."""
        return [
            range(start := (micro_step * self.processes + self.process) * self.batch_size, start + self.batch_size)
            for micro_step in range(first_step * self.accumulation, steps * self.accumulation)
        ]


class CachedLatents:
    """All pictures of a stream, encoded before training; on the family's device in float32."""

    def __init__(self, family: ModelFamily, stream: Stream, crop: SquareCrop) -> None:
        self._rows: list[tuple[int, int]] = []  # for each picture: its first row, its number of cuts
        encoded: list[LatentDistribution] = []
        for picture in tqdm(stream.pictures, desc=f"encoding {stream.kind} pictures", leave=False):
            cuts = crop.number_of_variants(picture, CUTS_PER_PHOTO)
            self._rows.append((len(encoded), cuts))
            encoded += [family.encode_pictures(crop.pixels(picture, cut)[None]) for cut in range(cuts)]
        self._mean = torch.cat([latents.mean for latents in encoded]).float()
        self._std = torch.cat([latents.std for latents in encoded]).float()

    def __call__(self, places: Sequence[tuple[int, int]]) -> LatentDistribution:
        """Latents of (index of a picture, number of the pass) pairs."""
        first_and_cuts = [(self._rows[index], pass_number) for index, pass_number in places]
        rows = torch.tensor([first + pass_number % cuts for (first, cuts), pass_number in first_and_cuts])
        rows = rows.to(self._mean.device)
        return LatentDistribution(self._mean[rows], self._std[rows])


class _Pixels(Dataset[Tensor]):
    """Pictures by the number of the sample, for the worker processes of a `DataLoader`."""

    def __init__(self, streams: Sequence[Stream], crop: SquareCrop) -> None:
        self._streams = streams
        self._crop = crop

    def __getitem__(self, sample: int) -> Tensor:
        """(streams, 3, H, W)."""
        pixels = []
        for stream in self._streams:
            index, pass_number = stream.order.locate(sample)
            pixels.append(self._crop.pixels(stream.pictures[index], pass_number))
        return torch.stack(pixels)


def cached_batches(
    family: ModelFamily, streams: Sequence[Stream], crop: SquareCrop, numbers: Sequence[range]
) -> Iterator[Batch]:
    """Batches of latents; all pictures are encoded before this returns."""
    caches = [CachedLatents(family, stream, crop) for stream in streams]
    return (_cached_batch(streams, caches, samples) for samples in numbers)


def _cached_batch(streams: Sequence[Stream], caches: Sequence[CachedLatents], samples: range) -> Batch:
    parts = [
        cache([stream.order.locate(sample) for sample in samples])
        for stream, cache in zip(streams, caches, strict=True)
    ]
    mean, std = torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])
    return _batch(streams, samples, LatentDistribution(mean, std))


def loaded_batches(
    family: ModelFamily, streams: Sequence[Stream], crop: SquareCrop, numbers: Sequence[range], workers: int
) -> Iterator[Batch]:
    """Batches of pictures that are loaded, cut anew and encoded as training goes."""
    loader = DataLoader(
        _Pixels(streams, crop), batch_sampler=[list(samples) for samples in numbers], num_workers=workers
    )
    for samples, pixels in zip(numbers, loader, strict=True):
        latents = family.encode_pictures(pixels.transpose(0, 1).flatten(0, 1))
        yield _batch(streams, samples, LatentDistribution(latents.mean.float(), latents.std.float()))


def _batch(streams: Sequence[Stream], samples: range, latents: LatentDistribution) -> Batch:
    return Batch(
        latents=latents,
        prompts=[stream.pictures[stream.order.locate(sample)[0]].prompt for stream in streams for sample in samples],
        samples=[(stream.kind, sample) for stream in streams for sample in samples],
    )
