"""In which order training takes its pictures. All of it follows from the seed and the number of the sample alone, so
that a resumed run and several processes need no state of iterators.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def keyed_generator(seed: int, *key: object) -> torch.Generator:
    """A CPU generator whose numbers follow from the seed and a key, on every machine and in every process."""
    digest = hashlib.blake2b("|".join(map(str, (seed, *key))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class ShuffledOrder:
    """Passes over ``count`` pictures without end, each pass in its own random order."""

    def __init__(self, count: int, seed: int, purpose: str) -> None:
        self.count = count
        self.seed = seed
        self.purpose = purpose
        self._pass_number = -1
        self._order: list[int] = []

    def locate(self, sample: int) -> tuple[int, int]:
        """(index of the picture, number of the pass) of the n-th sample of the run."""
        pass_number, position = divmod(sample, self.count)
        if pass_number != self._pass_number:
            generator = keyed_generator(self.seed, "order", self.purpose, pass_number)
            self._order = torch.randperm(self.count, generator=generator).tolist()
            self._pass_number = pass_number
        return self._order[position], pass_number


class Turns:
    """Whose turn it is, without end: in every round group ``g`` has ``turns[g]`` of them, in a random order."""

    def __init__(self, turns: Sequence[int], seed: int, purpose: str) -> None:
        self._groups = [group for group, number in enumerate(turns) for _ in range(number)]
        self._turns = turns
        self._order = ShuffledOrder(len(self._groups), seed, purpose)
        self._round = -1
        self._located: list[tuple[int, int]] = []  # for each turn of the round: its group, turns that this had before

    def locate(self, turn: int) -> tuple[int, int]:
        """(group whose turn the n-th is, how many it has had before)."""
        round_number, position = divmod(turn, len(self._groups))
        if round_number != self._round:
            self._located = self._locate_round(round_number)
            self._round = round_number
        group, earlier = self._located[position]
        return group, round_number * self._turns[group] + earlier

    def _locate_round(self, round_number: int) -> list[tuple[int, int]]:
        first = round_number * len(self._groups)
        had = [0] * len(self._turns)
        located = []
        for turn in range(first, first + len(self._groups)):
            group = self._groups[self._order.locate(turn)[0]]
            located.append((group, had[group]))
            had[group] += 1
        return located


class PictureOrder:
    """The order of pictures of several subjects and shapes.

    Subjects take turns, so that each is seen equally often, however many photos there are of it. A turn is one sample,
    or a batch of one shape where pictures have several: then, within a subject, each shape has as many turns as it has
    pictures, so that after ``turn_length`` passes each picture was seen equally often. With one subject and one shape
    this is a `ShuffledOrder`.

    Args:
        subjects: of each picture, which subject it shows.
        shapes: of each picture, its shape.
        turn_length: samples in a row that are of one subject and one shape. Streams that are to show the same subjects
            at the same time must have the same.
        purpose: what the random numbers are for; streams of other purposes have other orders.
    """

    def __init__(
        self, subjects: Sequence[int], shapes: Sequence[object], *, turn_length: int, seed: int, purpose: str
    ) -> None:
        self._turn_length = turn_length
        groups: dict[int, dict[object, list[int]]] = {}
        for index, (subject, shape) in enumerate(zip(subjects, shapes, strict=True)):
            groups.setdefault(subject, {}).setdefault(shape, []).append(index)
        # Without the purpose: the class picture of a sample shows the class of its subject.
        self._subjects = Turns([1] * len(groups), seed, "subjects")
        self._shapes: list[Turns] = []
        self._members: list[list[list[int]]] = []
        self._orders: list[list[ShuffledOrder]] = []
        only_one = len(groups) == 1 and len(groups[subjects[0]]) == 1
        for subject in sorted(groups):
            members = list(groups[subject].values())
            names = [purpose if only_one else f"{purpose}, subject {subject}, {shape}" for shape in groups[subject]]
            self._shapes.append(Turns([len(part) for part in members], seed, f"{purpose}, shapes of {subject}"))
            self._members.append(members)
            self._orders.append([ShuffledOrder(len(p), seed, name) for p, name in zip(members, names, strict=True)])

    def locate(self, sample: int) -> tuple[int, int]:
        """(index of the picture, number of the pass over the pictures of its subject and shape)."""
        turn, place = divmod(sample, self._turn_length)
        subject, turn = self._subjects.locate(turn)
        shape = 0
        if len(self._orders[subject]) > 1:
            shape, turn = self._shapes[subject].locate(turn)
        position, pass_number = self._orders[subject][shape].locate(turn * self._turn_length + place)
        return self._members[subject][shape][position], pass_number
