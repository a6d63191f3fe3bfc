"""The adapters that the app offers; the page names them by the digest of their content, never by path."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from svft_diffusion.app.shelf.base_fit import BaseFit
from svft_diffusion.app.shelf.library_folder import FoundFile, files_below, parts_of, shown
from svft_diffusion.app.shelf.library_reading import Reading, read_candidate, stamp_of
from svft_diffusion.app.shelf.trash import Trash
from svft_diffusion.app.shelf.uploads import (
    MOST_PIXELS,
    MOST_UPLOAD_BYTES,
    adapters_in_upload,
    called,
    is_foreign,
    read_upload,
    shown_name,
    start_of_upload,
    write_new,
)
from svft_diffusion.errors import UserError
from svft_diffusion.files import AdapterHeader
from svft_diffusion.sampling.adapter_choice import unique_names
from svft_diffusion.training.output_folder import working_alone

_ID = re.compile(r"[0-9a-f]{16}")
_DIGITS_OF_ID = 16
DAYS_IN_TRASH = 30
_GONE = "this adapter is no longer in the library; refresh the list and choose again"
_STEP_NAME = re.compile(r"(.+)-step-(\d+)", re.DOTALL)


def id_of(sha256: str) -> str:
    """The id of the adapter whose file has this digest."""
    return sha256[:_DIGITS_OF_ID]


@dataclass(frozen=True)
class LibraryEntry:
    """One adapter.

    Attributes:
        id: the first 16 hexadecimal digits of ``sha256``.
        name: no other adapter of the library has it, and a prompt can name it.
        file: where it lies.
        header: what it says of itself.
        sha256: of the file.
        size: in bytes.
        modified: when the file was written, in seconds since 1970.
        layers: canonical names of the layers that it changes.
        steps: how many steps its training kept, see `Library.history`; 0 for none.
        step: of its training, for an adapter of such a history.
    """

    id: str
    name: str
    file: Path
    header: AdapterHeader
    sha256: str
    size: int
    modified: float
    layers: tuple[str, ...] = ()
    steps: int = 0
    step: int | None = None

    @property
    def label(self) -> str:
        """What a list calls it: its title, and the name if that is another one."""
        title = self.header.title
        return f"{title} ({self.name})" if title and title != self.name else self.name


@dataclass(frozen=True)
class DamagedFile:
    """What is called an adapter and can't be used."""

    name: str  # of the file, with its folders below the library's
    reason: str  # in one line


@dataclass(frozen=True)
class Listing:
    """What the library holds at a moment."""

    entries: list[LibraryEntry]
    damaged: list[DamagedFile]


class Library:
    """Adapters below a folder, and those that visitors upload. Files are read again when they change, not before."""

    def __init__(
        self,
        folder: Path,
        uploads: Path,
        *,
        most_upload_bytes: int = MOST_UPLOAD_BYTES,
        most_pixels: int = MOST_PIXELS,
    ) -> None:
        """
        Args:
            folder: what it offers; need not be there yet.
            uploads: where uploads go, below ``folder`` or elsewhere.
            most_upload_bytes, most_pixels: of an uploaded file, and of an uploaded picture.
        """
        self._folder = folder.absolute()
        self._uploads = uploads.absolute()
        inside = self._uploads.is_relative_to(self._folder)
        self._roots = [self._folder] if inside else [self._folder, self._uploads]
        self._most_upload_bytes = most_upload_bytes
        self._most_pixels = most_pixels
        self._fit = BaseFit()
        self._lock = threading.RLock()
        self._readings: dict[Path, Reading] = {}
        self._entries: dict[str, LibraryEntry] = {}  # by id, as last seen; steps of trainings among them

    def listing(self, search: str = "") -> Listing:
        """The adapters that hold every word of ``search`` in a name, title, trigger or fact, by name; and what is
        damaged. Of a training there is one, its result; what it kept before is its history."""
        with self._lock:
            entries, damaged = self._look()
        words = search.casefold().split()
        return Listing([entry for entry in entries if all(word in _searched(entry) for word in words)], damaged)

    def entries(self, search: str = "") -> list[LibraryEntry]:
        """The adapters of `listing`."""
        return self.listing(search).entries

    def get(self, id: str) -> LibraryEntry:
        """The adapter with an id, which may be any text; one of a history, too.

        Raises:
            UserError: it is no longer there.
        """
        if _ID.fullmatch(id) is not None:
            with self._lock:
                entry = self._entries.get(id)
                if entry is not None and self._is_as_seen(entry):
                    return entry
                entries, _ = self._look()
                for entry in entries:
                    if entry.id == id:
                        return entry
                found = self._found()
                for listed in entries:
                    for entry in self._steps_of(listed, found) if listed.steps else ():
                        if entry.id == id:
                            return entry
        raise UserError(_GONE)

    def by_name(self, name: str) -> LibraryEntry:
        """The adapter with a name; ``NAME-step-40`` is the one of a history.

        Raises:
            UserError: there is none.
        """
        entries = self.entries()
        match = _STEP_NAME.fullmatch(name)
        for entry in entries:
            if entry.name == name:
                return entry
        for entry in entries:
            if match is not None and entry.name == match[1]:
                for one in self.history(entry.id):
                    if one.name == name:
                        return one
        raise UserError(f"there is no adapter {name!r} in the library")

    def history(self, id: str) -> list[LibraryEntry]:
        """The adapters that a training kept of its steps, first step first; none where it is no training's.

        Raises:
            UserError: there is no such adapter.
        """
        entry = self.get(id)
        with self._lock:
            return self._steps_of(entry, self._found())

    def fits(self, entry: LibraryEntry, base: str) -> str | None:
        """Why an adapter does not fit a base model, in one line; None: it fits, as far as can be told before it is
        loaded."""
        return self._fit.problem(entry.name, entry.header, entry.layers, base)

    def is_compared(self, entry: LibraryEntry, base: str) -> bool:
        """Whether `fits` answers from memory, at once."""
        return self._fit.is_known(entry.header, entry.layers, base)

    def add(self, file: Path, file_name: str) -> LibraryEntry:
        """Take an uploaded adapter into the library, or the one that an uploaded PNG picture carries.

        Args:
            file: where the upload lies.
            file_name: what the visitor calls it; any text.

        Raises:
            UserError: as `add_all`, or the picture carries several.
        """
        entries = self.add_all(file, file_name)
        if len(entries) > 1:
            raise UserError(f"{shown_name(file_name)} carries {len(entries)} adapters, not one")
        return entries[0]

    def add_all(self, file: Path, file_name: str) -> list[LibraryEntry]:
        """`add` for pictures that may carry several. What is in the library already stays as it is.

        Raises:
            UserError: no adapter, damaged, or too large; then nothing is written.
        """
        with called(shown_name(file_name), file):
            content = read_upload(file, file_name, self._most_upload_bytes)
            adapters = adapters_in_upload(content, file_name, self._most_pixels)
        with self._lock:
            return [self._taken_in(stem, data) for stem, data in adapters]

    def is_foreign(self, file: Path, file_name: str) -> bool:
        """Whether an uploaded file is none for `add`, but may be an adapter of another tool.

        Raises:
            UserError: it is too large, or gone.
        """
        return is_foreign(start_of_upload(file, file_name, self._most_upload_bytes))

    def delete(self, id: str) -> str:
        """Move an adapter, its history and its copies into the trash of the library.

        Returns:
            A token for `undo`.

        Raises:
            UserError: there is none, it is one step of a history, a training still writes it, or it can't be moved.
        """
        entry = self.get(id)
        if entry.step is not None:
            raise UserError(f"{entry.name} belongs to the history of a training and goes with its result")
        root = self._root_of(entry.file)
        with self._lock, contextlib.ExitStack() as held:
            copies = [
                one
                for one in shown(files_below(root))
                if self._reading(one).damage is None and self._reading(one).sha256 == entry.sha256
            ]
            if not copies:
                raise UserError(_GONE)
            for one in copies:
                if one.run is not None:
                    held.enter_context(_at_rest(one.run, entry.name))
            return Trash(root).put([path for one in copies for path in parts_of(one)])

    def undo(self, token: str) -> None:
        """Bring back what `delete` moved away; ``token`` may be any text.

        Raises:
            UserError: nothing was deleted under it, or something else is in its place by now.
        """
        with self._lock:
            for root in self._roots:
                if Trash(root).holds(token):
                    Trash(root).restore(token)
                    return
        raise UserError("there is nothing to undo any more")

    def empty_trash(self, days: float = DAYS_IN_TRASH) -> None:
        """Remove for good what was deleted so long ago."""
        with self._lock:
            for root in self._roots:
                Trash(root).empty(days)

    def forget(self, folder: Path) -> None:
        """Remove for good what was deleted from a folder of the library; no `undo` brings it back."""
        with self._lock:
            for root in self._roots:
                if folder.is_relative_to(root):
                    Trash(root).forget(folder)

    def _look(self) -> tuple[list[LibraryEntry], list[DamagedFile]]:
        found = self._found()
        known = {one.file for one in found}
        self._readings = {file: reading for file, reading in self._readings.items() if file in known}
        good: list[tuple[FoundFile, Reading, AdapterHeader]] = []
        damaged = []
        for one in shown(found):
            reading = self._reading(one)
            if reading.damage is not None:
                damaged.append(DamagedFile(self._shown_path(one.file), reading.damage))
            elif reading.header is not None:
                good.append((one, reading, reading.header))
        # Names go to the oldest first, so that what is added later takes nobody's name away. Copies are one adapter.
        good.sort(key=lambda item: (item[1].stamp.modified, item[0].file.as_posix()))
        good = list({item[1].sha256: item for item in reversed(good)}.values())[::-1]
        steps = Counter(run for run, _ in {(one.run, one.step) for one in found if one.step is not None})
        names = unique_names(one.label for one, _, _ in good)
        entries = [
            replace(_entry(one, reading, header, name), step=None, steps=steps[one.run] if one.run else 0)
            for (one, reading, header), name in zip(good, names, strict=True)
        ]
        self._entries = {entry.id: entry for entry in entries}
        return sorted(entries, key=lambda entry: (entry.name.casefold(), entry.name)), damaged

    def _found(self) -> list[FoundFile]:
        return [one for root in self._roots for one in files_below(root)]

    def _reading(self, one: FoundFile) -> Reading:
        reading = self._readings.get(one.file)
        try:
            now = stamp_of(one.file.stat())
        except OSError:
            now = None
        if reading is None or reading.stamp != now:
            reading = read_candidate(one.file, self._root_of(one.file), one.file.name)
            self._readings[one.file] = reading
        return reading

    def _steps_of(self, entry: LibraryEntry, found: Sequence[FoundFile]) -> list[LibraryEntry]:
        run = next((one.run for one in found if one.file == entry.file), None)
        by_step: dict[int, FoundFile] = {}
        for one in found:  # in the order of the paths: the history comes after the checkpoints
            if run is not None and one.run == run and one.step is not None:
                by_step[one.step] = one
        history = []
        for step, one in sorted(by_step.items()):
            reading = self._reading(one)
            if reading.header is not None:
                history.append(_entry(one, reading, reading.header, f"{entry.name}-step-{step}"))
        for one_step in history:
            self._entries.setdefault(one_step.id, one_step)
        return history

    def _taken_in(self, stem: str, content: bytes) -> LibraryEntry:
        sha256 = hashlib.sha256(content).hexdigest()
        entries = self.entries()
        for entry in entries:
            if entry.sha256 == sha256:
                return entry
        write_new(self._uploads, stem, content, [entry.name for entry in entries])
        return self.get(id_of(sha256))

    def _is_as_seen(self, entry: LibraryEntry) -> bool:
        reading = self._readings.get(entry.file)
        try:
            return reading is not None and stamp_of(entry.file.stat()) == reading.stamp
        except OSError:
            return False

    def _root_of(self, file: Path) -> Path:
        return next(root for root in self._roots if file.is_relative_to(root))

    def _shown_path(self, file: Path) -> str:
        return file.relative_to(self._root_of(file)).as_posix()


def _entry(one: FoundFile, reading: Reading, header: AdapterHeader, name: str) -> LibraryEntry:
    return LibraryEntry(
        id=id_of(reading.sha256),
        name=name,
        file=one.file,
        header=header,
        sha256=reading.sha256,
        size=reading.stamp.size,
        modified=reading.stamp.modified / 1e9,
        layers=reading.layers,
        step=one.step,
    )


def _searched(entry: LibraryEntry) -> str:
    header = entry.header
    tokens = [token for tokens in header.tokens.values() for token in tokens]
    facts = (header.title, header.trigger, header.class_word, header.description, header.instance_prompt)
    parts = (entry.name, header.method, header.pattern, header.base.name, *facts, *tokens)
    return "\n".join(part for part in parts if part).casefold()


@contextlib.contextmanager
def _at_rest(run: Path, name: str) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(working_alone(run))
        except UserError as problem:
            raise UserError(f"a training still writes {name}, or its folder is read-only; stop it first") from problem
        yield
