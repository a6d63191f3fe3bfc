"""Batches of latents: which pictures each step sees, encoded once before training or loaded as they are needed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import tqdm  # shows a bar in the first process only
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from svft_diffusion.data.buckets import Size
from svft_diffusion.data.cutting import Cut, Cutter
from svft_diffusion.data.dataset import Picture
from svft_diffusion.data.order import PictureOrder
from svft_diffusion.models import LatentDistribution, ModelFamily
from svft_diffusion.training.encoding_cache import EncodingCache


@dataclass(frozen=True)
class Stream:
    """Pictures of one kind (``instance`` or ``class``) and the order in which training takes them."""

    kind: str
    pictures: Sequence[Picture]
    order: PictureOrder
    sizes: Sequence[Size] | None  # the training size of each picture; None: that of the pictures it is in a batch with


@dataclass(frozen=True)
class Batch:
    """One forward pass: first the instance pictures, then as many class pictures under prior preservation."""

    latents: LatentDistribution
    sizes: Tensor  # (B, 6), see `Cut`
    prompts: list[str]
    samples: list[tuple[str, int]]  # (kind, number in the run): what the randomness of each row follows from
    weights: Tensor | None = None  # (B, 1, h, w), of the errors in each place of the latents; None: all alike


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


@dataclass(frozen=True)
class Encoder:
    """From cuts to rows of a batch."""

    family: ModelFamily
    unmasked_weight: float | None = None  # of errors where the subject is not; None: masks play no part
    cache: EncodingCache | None = None

    def __call__(self, cuts: Sequence[Cut]) -> EncodedCuts:
        """Encode cuts of one size; those that the cache holds are read."""
        pixels = torch.stack([cut.pixels for cut in cuts])
        latents = self.family.encode_pictures(pixels) if self.cache is None else self.cache.latents(pixels)
        mean, std = latents.mean.float(), latents.std.float()
        weights = None
        if self.unmasked_weight is not None:
            masks = [torch.ones_like(cut.pixels[:1]) if cut.mask is None else cut.mask for cut in cuts]
            weights = error_weights(torch.stack(masks), mean.shape[-2:], self.unmasked_weight).to(mean.device)
        return EncodedCuts(mean, std, torch.stack([cut.sizes for cut in cuts]).to(mean.device), weights)


@dataclass(frozen=True)
class EncodedCuts:
    """Rows of a batch; the first dimension of every tensor counts them."""

    mean: Tensor
    std: Tensor
    sizes: Tensor
    weights: Tensor | None


def error_weights(masks: Tensor, latent_size: Sequence[int], unmasked_weight: float) -> Tensor:
    """Weights of squared errors (B, 1, h, w): 1 on the subject, ``unmasked_weight`` elsewhere, between them at edges.

    Args:
        masks: (B, 1, H, W) in [0, 1]; what lies under a place of the latents counts by its area.
    """
    covered = functional.interpolate(masks, size=tuple(latent_size), mode="area")
    return unmasked_weight + (1.0 - unmasked_weight) * covered


class CachedCuts:
    """All pictures of a stream, encoded before training; on the family's device in float32.

    Args:
        sizes: the sizes to keep of each picture where the stream has none of its own.
        on_picture: called before each picture.
    """

    def __init__(
        self,
        encoder: Encoder,
        stream: Stream,
        cutter: Cutter,
        sizes: Sequence[Size],
        on_picture: Callable[[], None],
    ) -> None:
        self._kept: dict[tuple[int, Size], list[EncodedCuts]] = {}
        for index, picture in enumerate(tqdm(stream.pictures, desc=f"encoding {stream.kind} pictures", leave=False)):
            on_picture()
            for size in sizes if stream.sizes is None else [stream.sizes[index]]:
                self._kept[index, size] = [
                    encoder([cutter.cut(picture, variant, size)])
                    for variant in range(cutter.number_of_variants(picture, size))
                ]

    def __call__(self, places: Sequence[tuple[int, int]], size: Size) -> list[EncodedCuts]:
        """Rows of (index of a picture, number of the pass) pairs."""
        kept = [(self._kept[index, size], pass_number) for index, pass_number in places]
        return [variants[pass_number % len(variants)] for variants, pass_number in kept]


class _Cuts(Dataset[list[Cut]]):
    """Pictures by the number of the sample, for the worker processes of a `DataLoader`."""

    def __init__(self, streams: Sequence[Stream], cutter: Cutter) -> None:
        self._streams = streams
        self._cutter = cutter

    def __getitem__(self, sample: int) -> list[Cut]:
        """One cut for each stream."""
        size = batch_size_of(self._streams, sample)
        cuts = []
        for stream in self._streams:
            index, pass_number = stream.order.locate(sample)
            cuts.append(self._cutter.cut(stream.pictures[index], pass_number, size))
        return cuts


def batch_size_of(streams: Sequence[Stream], sample: int) -> Size:
    """Height and width of the pictures in the batch of a sample: those of its instance picture."""
    first = streams[0]
    assert first.sizes is not None
    return first.sizes[first.order.locate(sample)[0]]


def cached_batches(
    encoder: Encoder,
    streams: Sequence[Stream],
    cutter: Cutter,
    numbers: Sequence[range],
    on_picture: Callable[[], None],
) -> Iterator[Batch]:
    """Batches of latents; all pictures are encoded before this returns, and ``on_picture`` is called before each."""
    assert streams[0].sizes is not None
    sizes = list(dict.fromkeys(streams[0].sizes))
    caches: list[CachedCuts] = []
    for stream in streams:
        # With the base's own predictions as the prior, the second stream has the photos of the first.
        same = caches and _files_and_sizes(stream) == _files_and_sizes(streams[0])
        caches.append(caches[0] if same else CachedCuts(encoder, stream, cutter, sizes, on_picture))
    return (_cached_batch(streams, caches, samples) for samples in numbers)


def _files_and_sizes(stream: Stream) -> tuple[list[Path], Sequence[Size] | None]:
    return [picture.path for picture in stream.pictures], stream.sizes


def _cached_batch(streams: Sequence[Stream], caches: Sequence[CachedCuts], samples: range) -> Batch:
    size = batch_size_of(streams, samples[0])
    rows = [
        row
        for stream, cache in zip(streams, caches, strict=True)
        for row in cache([stream.order.locate(sample) for sample in samples], size)
    ]
    weights = [row.weights for row in rows if row.weights is not None]
    joined = EncodedCuts(
        mean=torch.cat([row.mean for row in rows]),
        std=torch.cat([row.std for row in rows]),
        sizes=torch.cat([row.sizes for row in rows]),
        weights=torch.cat(weights) if weights else None,
    )
    return _batch(streams, samples, joined)


def loaded_batches(
    encoder: Encoder, streams: Sequence[Stream], cutter: Cutter, numbers: Sequence[range], workers: int
) -> Iterator[Batch]:
    """Batches of pictures that are loaded, cut anew and encoded as training goes."""
    loader = DataLoader(
        _Cuts(streams, cutter),
        batch_sampler=[list(samples) for samples in numbers],
        num_workers=workers,
        collate_fn=_by_stream,
        worker_init_fn=_leave_signals_to_the_run,
    )
    for samples, cuts in zip(numbers, loader, strict=True):
        yield _batch(streams, samples, encoder(cuts))


def _leave_signals_to_the_run(worker: int) -> None:
    """Terminals and schedulers send signals to every process; the step that runs still needs its pictures."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _by_stream(samples: list[list[Cut]]) -> list[Cut]:
    """All cuts of the first stream, then all of the second."""
    return [cut for of_stream in zip(*samples, strict=True) for cut in of_stream]


def _batch(streams: Sequence[Stream], samples: range, encoded: EncodedCuts) -> Batch:
    weights = encoded.weights
    if weights is not None:
        weights = weights.clone()
        weights[len(samples) :] = 1.0  # of class pictures, everything counts
    return Batch(
        latents=LatentDistribution(encoded.mean, encoded.std),
        sizes=encoded.sizes,
        prompts=[stream.pictures[stream.order.locate(sample)[0]].prompt for stream in streams for sample in samples],
        samples=[(stream.kind, sample) for stream in streams for sample in samples],
        weights=weights,
    )
