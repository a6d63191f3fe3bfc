"""The rows of a comparison: each is measured once, and kept under a name that says all it follows from."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from PIL import Image

import svft_diffusion
from svft_diffusion.comparison.measuring import Effort
from svft_diffusion.comparison.methods import Method
from svft_diffusion.comparison.subjects import ComparedSubject
from svft_diffusion.files.whole_files import replace_when_whole
from svft_diffusion.toybox import WEIGHTS_FOLDER

MEASURED, FAILED = "measured", "failed"
BROKEN = "broken"  # failed for a reason that is not the method's; the next start tries again
_ROWS = "rows"
_THUMBNAIL = 64  # pixels of the side of a kept picture

# What decides on numbers; command lines, the app, file exchange and reports don't.
_CODE = (
    "adapters", "data", "evaluation", "factors", "kernels", "models", "spectral", "toybox", "training",
    "comparison/drawing.py", "comparison/measuring.py", "comparison/memory.py", "comparison/methods.py",
    "comparison/peft_methods.py", "comparison/subjects.py",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A method with a learning rate on one subject with one seed."""

    method: Method
    learning_rate: float
    effort: Effort
    subject: ComparedSubject
    seed: int

    @functools.cached_property
    def content(self) -> dict[str, Any]:
        """Everything that its numbers follow from, but for the code."""
        return {
            "method": self.method.describe(),
            "learning_rate": self.learning_rate,
            **dataclasses.asdict(self.effort),
            "subject": self.subject.number,
            "seed": self.seed,
            **circumstances(),
        }

    @functools.cached_property
    def key(self) -> str:
        """Its name in the folder."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Result:
    """What is known of a row.

    Attributes:
        numbers: see `measuring.Measured`; empty if it failed.
        seconds: that the row has taken by the clock.
        ended: when, in seconds since 1970.
    """

    state: str
    numbers: dict[str, float | int | None]
    seconds: float
    code: str
    reason: str | None = None
    ended: float = dataclasses.field(default_factory=time.time)


class Rows:
    """The results in a folder, which processes may share.

    Args:
        any_code: whether those of other versions of the code count.
    """

    def __init__(self, folder: Path, *, any_code: bool = False) -> None:
        self._folder, self._any_code = folder / _ROWS, any_code
        self._known: dict[str, Result] = {}
        self._started = time.time()
        code_version()  # of the code as it is now, which this process runs whatever becomes of the files

    def find(self, row: Row) -> Result | None:
        """The result, or None where it is still to be measured."""
        if row.key not in self._known:
            try:
                values = json.loads(self._file(row).read_text(encoding="utf-8"))
                found = Result(**values["result"])
            except (OSError, ValueError, TypeError, KeyError, RecursionError):
                return None
            if found.code != code_version() and not self._any_code:
                return None
            if found.state == BROKEN and found.ended < self._started:
                return None
            self._known[row.key] = found
        return self._known[row.key]

    def have(self, wanted: Iterable[Row]) -> bool:
        """Whether all of them are known."""
        return all(self.find(row) is not None for row in wanted)

    def keep(self, row: Row, result: Result, pictures: Sequence[Image.Image] = ()) -> None:
        """Raises `UserError` if it can't be written."""
        if pictures:
            with replace_when_whole(self.pictures_of(row)) as unfinished:
                _side_by_side(pictures).save(unfinished, format="PNG")
        with replace_when_whole(self._file(row)) as unfinished:
            text = json.dumps({"row": row.content, "result": dataclasses.asdict(result)}, indent=1)
            unfinished.write_text(text + "\n", encoding="utf-8")
        self._known[row.key] = result

    def pictures_of(self, row: Row) -> Path:
        """One small picture of each scene, side by side."""
        return self._folder / f"{row.key}.png"

    def first_picture(self, row: Row) -> Image.Image | None:
        """That of the first scene."""
        try:
            with Image.open(self.pictures_of(row)) as strip:
                return strip.crop((0, 0, _THUMBNAIL, _THUMBNAIL)).convert("RGB")
        except (OSError, ValueError):
            return None

    def _file(self, row: Row) -> Path:
        return self._folder / f"{row.key}.json"


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    strip = Image.new("RGB", (_THUMBNAIL * len(pictures), _THUMBNAIL))
    for number, picture in enumerate(pictures):
        strip.paste(picture.convert("RGB").resize((_THUMBNAIL, _THUMBNAIL)), (number * _THUMBNAIL, 0))
    return strip


@functools.cache
def circumstances() -> dict[str, Any]:
    """The base model, libraries and the kind of device."""
    return {
        "base": _digest_of_folder(WEIGHTS_FOLDER),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}",
    }


def machine() -> dict[str, Any]:
    """Where numbers on time come from; for the report."""
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "svft-diffusion": svft_diffusion.__version__,
        **circumstances(),
    }


@functools.cache
def code_version() -> str:
    """A digest of the code that decides on numbers; of what it says, without comments, docstrings and layout."""
    root = Path(svft_diffusion.__file__).parent
    files = sorted(
        file for part in _CODE for file in ([root / part] if part.endswith(".py") else (root / part).rglob("*.py"))
    )
    digest = hashlib.sha256()
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0] if node.body else None
                if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                    node.body = node.body[1:]
        digest.update(f"{file.relative_to(root).as_posix()} {ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:12]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _digest_of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]
