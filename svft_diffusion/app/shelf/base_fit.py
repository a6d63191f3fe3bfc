"""Does an adapter belong to a base model? Asked for a whole library, the weights of the base are compared once."""

from __future__ import annotations

import threading
from pathlib import Path

from huggingface_hub import snapshot_download

from svft_diffusion.errors import UserError
from svft_diffusion.files import AdapterHeader, BaseDigests, Matches, matches_of_folder
from svft_diffusion.files.fingerprint import both_bases
from svft_diffusion.models.loading import base_display_name, hub_name, resolve_base

_Question = tuple[str, tuple[str, ...], BaseDigests]


class BaseFit:
    """Answers, and remembers them: adapters of one training recipe on one base share theirs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: dict[_Question, Matches | None] = {}

    def is_known(self, header: AdapterHeader, layers: tuple[str, ...], base: str) -> bool:
        """Whether `problem` answers from memory. Where it does not, it may read the base's weights for seconds."""
        with self._lock:
            return (base, layers, header.base.digests) in self._answers

    def problem(self, name: str, header: AdapterHeader, layers: tuple[str, ...], base: str) -> str | None:
        """Why the adapter ``name`` does not fit ``base``, in one line; None: it fits, or loading it will tell.

        A base that is a single file, or on the Hub and not on this machine, is compared when it is loaded.
        """
        try:
            folder = _folder_of(base)
        except UserError as problem:
            return str(problem)
        if folder is None:
            return None
        question = (base, layers, header.base.digests)
        with self._lock:
            if question not in self._answers:
                self._answers[question] = matches_of_folder(folder, layers, header.base.digests)
            matches = self._answers[question]
        if matches is None:
            if hub_name(base) is not None:  # the local copy may hold other files only
                return None
            matches = Matches(0, 0, len(layers))
        return None if matches.all else both_bases(header, matches, base_display_name(base), adapter=name)


def _folder_of(base: str) -> Path | None:
    source = resolve_base(base)
    if Path(source).is_dir():
        return Path(source)
    if hub_name(base) is None:
        return None
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (OSError, ValueError):
        return None
