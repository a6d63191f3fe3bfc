"""Deleting that can be undone: what is deleted moves into a folder that lies where it lay."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from svft_diffusion.errors import UserError

TRASH_FOLDER = ".trash"
_TOKEN = re.compile(r"[0-9a-f]{32}")


class Trash:
    """What was deleted below ``root``: ``.trash/TOKEN/`` holds it under the paths that it had."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / TRASH_FOLDER

    def put(self, paths: Sequence[Path]) -> str:
        """Move files and folders below the root into the trash, all or none.

        Returns:
            A token to bring them back with.

        Raises:
            UserError: one of them can't be moved, or links lead out of the root.
        """
        token = uuid.uuid4().hex
        self._move([(path, self._folder / token / path.relative_to(self._root)) for path in paths])
        return token

    def empty(self, days: float) -> None:
        """Remove for good what was deleted more than so many days ago."""
        if self._folder.is_symlink() or not self._folder.is_dir():
            return
        for held in self._folder.iterdir():
            with contextlib.suppress(OSError):  # gone by another app
                if _TOKEN.fullmatch(held.name) and time.time() - held.stat().st_mtime > days * 86400:
                    shutil.rmtree(held)

    def forget(self, path: Path) -> None:
        """Remove for good what was deleted at ``path``, or below it."""
        if self._folder.is_symlink() or not self._folder.is_dir():
            return
        for held in self._folder.iterdir():
            if _TOKEN.fullmatch(held.name):
                gone = held / path.relative_to(self._root)
                if gone.resolve() == held.resolve() / path.relative_to(self._root):  # no link leads out
                    shutil.rmtree(gone, ignore_errors=True)

    def holds(self, token: str) -> bool:
        """Whether `restore` may find something under the token, which may be any text."""
        return _TOKEN.fullmatch(token) is not None and (self._folder / token).is_dir()

    def restore(self, token: str) -> None:
        """Bring back what was deleted under a token that it `holds`.

        Raises:
            UserError: something else is in its place by now, or it can't be moved.
        """
        held = self._folder / token
        moves = list(self._back(held))
        for _, target in moves:
            if os.path.lexists(target):
                name = target.relative_to(self._root).as_posix()
                raise UserError(f"can't undo: there is another {name} by now; rename it or move it away first")
        self._move(moves)
        _remove_empty(held)

    def _back(self, held: Path) -> Iterator[tuple[Path, Path]]:
        for path in sorted(held.iterdir()):
            target = self._root / path.relative_to(self._folder / held.relative_to(self._folder).parts[0])
            if path.is_dir() and not path.is_symlink() and target.is_dir():
                yield from self._back(path)
            else:
                yield path, target

    def _move(self, moves: Sequence[tuple[Path, Path]]) -> None:
        done: list[tuple[Path, Path]] = []
        try:
            for source, target in moves:
                target.parent.mkdir(parents=True, exist_ok=True)
                self._check_inside(source.parent)
                self._check_inside(target.parent)
                os.rename(source, target)
                done.append((source, target))
        except (OSError, UserError) as problem:
            for source, target in reversed(done):
                with contextlib.suppress(OSError):
                    os.rename(target, source)
            if isinstance(problem, UserError):
                raise
            raise UserError(f"the file can't be moved: {problem.strerror or problem}") from problem

    def _check_inside(self, folder: Path) -> None:
        if folder.resolve() != self._root.resolve() / folder.relative_to(self._root):
            raise UserError("the file can't be moved: a link leads out of the library there")


def _remove_empty(folder: Path) -> None:
    for below, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(below)
