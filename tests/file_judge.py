"""Judges what a reader makes of damaged files: the right adapter, or one line that says why not, and soon."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from hostile_files import METADATA, OUR_KEY, Mutant, Parts
from torch import Tensor

from svft_diffusion.errors import UserError
from svft_diffusion.files import AdapterHeader, read_adapter

LONGEST = 1.0  # seconds that a file may take
_LONGEST_MESSAGE = 1000  # letters, beside the file's own name

Result = tuple[AdapterHeader, dict[str, Tensor]]


class Findings:
    """What was read, and what happened that must not."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.read = self.accepted = 0
        self.failures: list[str] = []

    def refused(self, label: str, action: Callable[[], object]) -> bool:
        """Whether ``action`` raises `UserError`, with one line; another exception or a long time is a failure."""
        start = time.process_time()  # on a busy machine the clock goes on while nothing is done
        try:
            action()
            return False
        except UserError as refusal:
            if not str(refusal).isprintable() or len(str(refusal)) > _LONGEST_MESSAGE + 2 * len(str(self.file)):
                self.failures.append(f"{label}: the message is not one line: {str(refusal)[:200]!a}")
        except Exception as problem:
            self.failures.append(f"{label}: {type(problem).__name__}: {str(problem)[:200]!a}")
        finally:
            if time.process_time() - start > LONGEST:
                self.failures.append(f"{label}: took {time.process_time() - start:.1f} s")
        return True

    def check(self) -> None:
        assert self.read > 0
        assert not self.failures, f"{len(self.failures)} of {self.read}\n" + "\n".join(self.failures[:40])


class Judge(Findings):
    """Reads mutants of one good file."""

    def __init__(self, good: bytes, folder: Path) -> None:
        super().__init__(folder / "adapter.safetensors")
        self.file.write_bytes(good)
        self.expected = read_adapter(self.file)

    def take(self, mutants: Iterable[Mutant]) -> Iterator[tuple[Mutant, Result]]:
        """Go through all mutants; those that are accepted come out."""
        for mutant in mutants:
            self.read += 1
            self.file.write_bytes(mutant.content)
            found: list[Result] = []
            if self.refused(mutant.label, lambda found=found: found.append(read_adapter(self.file))):  # type: ignore[misc]
                continue
            self.accepted += 1
            if problem := self._wrong(mutant, found[0]):
                self.failures.append(f"{mutant.label}: {problem}")
            yield mutant, found[0]

    def go_through(self, mutants: Iterable[Mutant]) -> None:
        for _ in self.take(mutants):
            pass

    def _wrong(self, mutant: Mutant, result: Result) -> str | None:
        """What is wrong with an accepted mutant, if anything."""
        if not mutant.honest:
            return None if same(result, self.expected) else "accepted, and it is not what was written"
        if not same_tensors(result[1], said(mutant.content)):
            return "other tensors than the file says"
        fields = json.loads(Parts.of(mutant.content)[METADATA][OUR_KEY])
        for field, value in vars(result[0]).items():
            if field in fields and field != "base":
                read = list(value) if isinstance(value, tuple) else value
                if read != fields[field] or type(read) is not type(fields[field]):
                    return f"{field} is read as {value!r}, and the file says {fields[field]!r}"
        return None


def said(content: bytes) -> dict[str, Tensor]:
    """The tensors of a file whose table is in order, by the plainest of readers."""
    parts = Parts.of(content)
    kinds = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "U8": "u1"}
    tensors = {}
    for name in parts.tensors:
        entry = parts[name]
        array = np.frombuffer(parts.bytes_of(name), kinds[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = torch.from_numpy(array.astype("<f4" if entry["dtype"] == "F16" else array.dtype))
    return tensors


def same(first: Result, second: Result) -> bool:
    return first[0] == second[0] and same_tensors(first[1], second[1])


def same_tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        held.dtype == second[name].dtype
        and held.shape == second[name].shape
        and held.numpy().tobytes() == second[name].numpy().tobytes()
        for name, held in first.items()
    )
