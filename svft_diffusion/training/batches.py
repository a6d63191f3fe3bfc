"""Batches of latents: which pictures each step sees, encoded once before training or loaded as they are needed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import tqdm  # shows a bar in the first process only
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from svft_diffusion.data.buckets import Size
from svft_diffusion.data.cut_mix import CutMix, Half
from svft_diffusion.data.cutting import Cut, Cutter
from svft_diffusion.data.dataset import Picture
from svft_diffusion.data.order import PictureOrder, keyed_generator
from svft_diffusion.errors import UserError
from svft_diffusion.models import LatentDistribution, ModelFamily
from svft_diffusion.training.encoding_cache import EncodingCache
from svft_diffusion.training.interruption import SIGNALS


@dataclass(frozen=True)
class Stream:
    """Pictures of one kind (``instance`` or ``class``) and the order in which training takes them."""

    kind: str
    pictures: Sequence[Picture]
    order: PictureOrder
    sizes: Sequence[Size] | None  # the training size of each picture; None: that of the pictures it is in a batch with
    caption_dropout: float = 0.0  # part of the samples that have an empty prompt
    seed: int = 0  # of which samples those are
    mix: CutMix | None = None  # which samples show two subjects side by side; None: no sample does

    def parts(self, sample: int) -> list[Half]:
        """What the n-th sample of the run shows: one picture, or its left and its right half."""
        mixed = None if self.mix is None else self.mix.locate(sample)
        return [Half(*self.order.locate(sample))] if mixed is None else [mixed.left, mixed.right]

    def prompt(self, sample: int) -> str:
        """What training reads with the n-th sample of the run."""
        mixed = None if self.mix is None else self.mix.locate(sample)
        if mixed is not None:
            return mixed.prompt
        if self.caption_dropout:
            drawn = torch.rand((), generator=keyed_generator(self.seed, "caption dropout", self.kind, sample))
            if drawn < self.caption_dropout:
                return ""
        return self.pictures[self.order.locate(sample)[0]].prompt


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
        self._halves: dict[tuple[int, Size], list[EncodedCuts]] = {}  # by the size of the whole
        for index, picture in enumerate(tqdm(stream.pictures, desc=f"encoding {stream.kind} pictures", leave=False)):
            on_picture()
            for size in sizes if stream.sizes is None else [stream.sizes[index]]:
                self._kept[index, size] = _variants(encoder, cutter, picture, size)
            if stream.mix is not None:  # of any picture, as it may stand beside one of another size
                for size in sizes:
                    self._halves[index, size] = _variants(encoder, half_cutter(cutter), picture, half_size(size))

    def __call__(self, parts: Sequence[Half], size: Size) -> EncodedCuts:
        """The row of a sample of this size from its parts."""
        kept = [(self._kept if len(parts) == 1 else self._halves)[part.picture, size] for part in parts]
        rows = [variants[part.variant % len(variants)] for variants, part in zip(kept, parts, strict=True)]
        return rows[0] if len(rows) == 1 else side_by_side(*rows)


def _variants(encoder: Encoder, cutter: Cutter, picture: Picture, size: Size) -> list[EncodedCuts]:
    count = cutter.number_of_variants(picture, size)
    return [encoder([cutter.cut(picture, variant, size)]) for variant in range(count)]


Parts = list[Cut]
"""What one sample is encoded from: one cut, or those of its halves. Halves are encoded by themselves, so that what lies
in one has no part in the latents of the other, and one encoding of a photo serves all that it is mixed with."""


class _Cuts(Dataset[list[Parts] | UserError]):
    """Pictures by the number of the sample, for the worker processes of a `DataLoader`.

    What is wrong with a file is handed over, since raised in a worker it would become a text with all lines of the
    traceback, which would keep the worker alive.
    """

    def __init__(self, streams: Sequence[Stream], cutter: Cutter) -> None:
        self._streams = streams
        self._cutter = cutter

    def __getitem__(self, sample: int) -> list[Parts] | UserError:
        """The parts of the sample in each stream."""
        size = batch_size_of(self._streams, sample)
        try:
            return [self._cut(stream, stream.parts(sample), size) for stream in self._streams]
        except UserError as problem:
            return problem

    def _cut(self, stream: Stream, parts: list[Half], size: Size) -> Parts:
        cutter, part_size = (self._cutter, size) if len(parts) == 1 else (half_cutter(self._cutter), half_size(size))
        return [cutter.cut(stream.pictures[part.picture], part.variant, part_size) for part in parts]


def batch_size_of(streams: Sequence[Stream], sample: int) -> Size:
    """Height and width of the pictures in the batch of a sample: those of its instance picture."""
    first = streams[0]
    assert first.sizes is not None
    return first.sizes[first.order.locate(sample)[0]]


def half_size(size: Size) -> Size:
    """Height and width of each half of a mixed sample."""
    return size[0], size[1] // 2


def half_cutter(cutter: Cutter) -> Cutter:
    """Halves are cut from the middle: at a random place of a photo, a narrow cut would often miss its subject."""
    return replace(cutter, center_crop=True)


def side_by_side(left: EncodedCuts, right: EncodedCuts) -> EncodedCuts:
    """One row of two halves. What is told of its size is the smaller of both originals, cut nowhere."""
    sizes = torch.minimum(left.sizes, right.sizes)  # (1, 6), see `Cut`
    sizes[:, 2:4] = 0
    sizes[:, 5] = left.sizes[:, 5] + right.sizes[:, 5]
    return EncodedCuts(
        mean=torch.cat((left.mean, right.mean), dim=-1),
        std=torch.cat((left.std, right.std), dim=-1),
        sizes=sizes,
        weights=None if left.weights is None or right.weights is None else torch.cat((left.weights, right.weights), -1),
    )


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
        cache(stream.parts(sample), size) for stream, cache in zip(streams, caches, strict=True) for sample in samples
    ]
    return _batch(streams, samples, one_below_another(rows))


def one_below_another(rows: Sequence[EncodedCuts]) -> EncodedCuts:
    """Rows as a batch."""
    weights = [row.weights for row in rows if row.weights is not None]
    return EncodedCuts(
        mean=torch.cat([row.mean for row in rows]),
        std=torch.cat([row.std for row in rows]),
        sizes=torch.cat([row.sizes for row in rows]),
        weights=torch.cat(weights) if weights else None,
    )


def loaded_batches(
    encoder: Encoder, streams: Sequence[Stream], cutter: Cutter, numbers: Sequence[range], workers: int
) -> Iterator[Batch]:
    """Batches of pictures that are loaded, cut anew and encoded as training goes.

    Raises:
        UserError: a picture can't be read any more.
    """
    loader = DataLoader(
        _Cuts(streams, cutter),
        batch_sampler=[list(samples) for samples in numbers],
        num_workers=workers,
        collate_fn=_by_stream,
        worker_init_fn=_leave_signals_to_the_run,
    )
    for samples, rows in zip(numbers, loader, strict=True):
        if isinstance(rows, UserError):
            raise rows
        yield _batch(streams, samples, _encoded(encoder, rows))


def _encoded(encoder: Encoder, rows: list[Parts]) -> EncodedCuts:
    if all(len(parts) == 1 for parts in rows):
        return encoder([cut for (cut,) in rows])
    return one_below_another(
        [encoder(parts) if len(parts) == 1 else side_by_side(encoder(parts[:1]), encoder(parts[1:])) for parts in rows]
    )


def _leave_signals_to_the_run(worker: int) -> None:
    """Terminals and schedulers send signals to every process; the step that runs still needs its pictures."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _by_stream(samples: list[list[Parts] | UserError]) -> list[Parts] | UserError:
    """All samples of the first stream, then all of the second; or what is wrong with one of them."""
    usable = [sample for sample in samples if not isinstance(sample, UserError)]
    if problems := [sample for sample in samples if isinstance(sample, UserError)]:
        return problems[0]
    return [parts for of_stream in zip(*usable, strict=True) for parts in of_stream]


def _batch(streams: Sequence[Stream], samples: range, encoded: EncodedCuts) -> Batch:
    weights = encoded.weights
    if weights is not None:
        weights = weights.clone()
        weights[len(samples) :] = 1.0  # of class pictures, everything counts
    return Batch(
        latents=LatentDistribution(encoded.mean, encoded.std),
        sizes=encoded.sizes,
        prompts=[stream.prompt(sample) for stream in streams for sample in samples],
        samples=[(stream.kind, sample) for stream in streams for sample in samples],
        weights=weights,
    )
