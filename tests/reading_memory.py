"""A program for tests: how much memory reading or importing files takes, each in a process of its own. Linux alone.

``python reading_memory.py read|import GOOD FILE...`` prints, as one JSON object, FILE -> bytes beyond what the process
held before. GOOD is an adapter that is read first, so that nothing is left to import.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from svft_diffusion.errors import UserError
from svft_diffusion.files import read_adapter


def main(action: str, good: str, *files: str) -> None:
    torch.set_num_threads(1)
    if action == "read":
        act: Callable[[str], object] = read_adapter
    else:
        from tiny_models import tiny_pipeline

        from svft_diffusion.exchange.importing import import_adapter

        models = {"unet": tiny_pipeline().unet}
        act = lambda file: import_adapter(models, file, "x")  # noqa: E731

    read_adapter(good)
    print(json.dumps({file: memory_of(lambda file=file: act(file)) for file in files}))  # type: ignore[misc]


def memory_of(action: Callable[[], object]) -> int:
    """Bytes that the process holds at most while it runs ``action``, beyond those that it holds already."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = _status("VmRSS")
        with contextlib.suppress(UserError):
            action()
        os.write(writer, str(_status("VmHWM") - before).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as result:
        text = result.read()
    _, how = os.waitpid(child, 0)
    if how or not text:
        raise RuntimeError(f"the process ended with status {how}")
    return int(text)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
