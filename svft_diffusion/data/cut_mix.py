"""Cut-Mix: samples that show two subjects side by side (SVDiff, Han et al. 2023, section 3.3), and which these are.

Training on several subjects alone never shows two of them in one picture, so that a model mixes them when it is asked
for both. Side by side, each under its own name, it sees them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

import torch

from svft_diffusion.data.order import PictureOrder, keyed_generator

LEFT, RIGHT = "left", "right"


@dataclass(frozen=True)
class Half:
    """What one half of a mixed sample shows."""

    picture: int  # its index
    variant: int  # which of its cuts


@dataclass(frozen=True)
class MixedSample:
    """Two pictures side by side, each cut to the shape of its half, and what is said of both."""

    left: Half
    right: Half
    prompt: str


class CutMix:
    """Which samples of a stream are mixed, and of what; it follows from the seed and the sample's number alone.

    A sample keeps the picture whose turn it is, and gets one of another subject beside it: the other subject, its
    picture and the sides are drawn at random. As subjects take turns, every pair is equally frequent.

    Args:
        subjects: of each picture, which subject it shows.
        order: whose turn it is. Streams that are to mix the same subjects in the same samples, as photos and class
            pictures do, must take the subjects in the same order.
        prompts: what is said of each pair of subjects, (left, right).
        probability: share of the samples that are mixed.
        purpose: what the random choice of the other picture is for; streams of other purposes choose other pictures.
    """

    def __init__(
        self,
        subjects: Sequence[int],
        order: PictureOrder,
        prompts: Mapping[tuple[int, int], str],
        *,
        probability: float,
        seed: int,
        purpose: str,
    ) -> None:
        self._subjects = subjects
        self._order = order
        self._prompts = prompts
        self._probability = probability
        self._seed = seed
        self._purpose = purpose
        self._members: dict[int, list[int]] = {}
        for index, subject in enumerate(subjects):
            self._members.setdefault(subject, []).append(index)

    @property
    def prompts(self) -> list[str]:
        """All prompts that mixed samples have."""
        return list(self._prompts.values())

    def locate(self, sample: int) -> MixedSample | None:
        """What the n-th sample of the run shows, or None for the picture whose turn it is alone."""
        generator = keyed_generator(self._seed, "cut-mix", sample)
        if float(torch.rand((), generator=generator)) >= self._probability:
            return None
        index, pass_number = self._order.locate(sample)
        subject = self._subjects[index]
        others = sorted(self._members.keys() - {subject})
        other = others[int(torch.randint(len(others), (), generator=generator))]
        is_left = bool(torch.randint(2, (), generator=generator))
        choice = keyed_generator(self._seed, "cut-mix picture", self._purpose, sample)
        members = self._members[other]
        beside = members[int(torch.randint(len(members), (), generator=choice))]
        own, partner = Half(index, pass_number), Half(beside, int(torch.randint(2**31, (), generator=choice)))
        if is_left:
            return MixedSample(own, partner, self._prompts[subject, other])
        return MixedSample(partner, own, self._prompts[other, subject])


def side_by_side_prompts(template: str, names: Sequence[str]) -> dict[tuple[int, int], str]:
    """What is said of each pair of different subjects, (left, right), from a template with {left} and {right}."""
    return {
        (left, right): template.format(left=names[left], right=names[right])
        for left in range(len(names))
        for right in range(len(names))
        if left != right
    }


def is_side_by_side_template(template: str) -> bool:
    """Whether a template names both sides, each once, and has no other place to fill."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError:  # a single brace
        return False
    fields = [name for _, name, _, _ in parts if name is not None]
    plain = all(not format_ and conversion is None for _, name, format_, conversion in parts if name is not None)
    return sorted(fields) == [LEFT, RIGHT] and plain
