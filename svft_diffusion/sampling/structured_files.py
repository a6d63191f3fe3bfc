"""Reading the files that say what to draw: YAML and JSON, with the line of a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from svft_diffusion.errors import UserError
from svft_diffusion.terminal import printable

_LARGEST_FILE = 10_000_000  # bytes


def read_text(file: Path, what: str) -> str:
    """The text of a file, which ``what`` calls in messages.

    Raises:
        UserError: no such file, too large, or not UTF-8.
    """
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{what} {file} is larger than {_LARGEST_FILE // 1_000_000} MB")
        return file.read_text(encoding="utf-8-sig")
    except OSError as problem:
        raise UserError(f"can't read {what} {file}: {problem.strerror or problem}") from None
    except UnicodeDecodeError as problem:
        raise UserError(f"{what} {file} is no UTF-8 text (byte {problem.start})") from None


def read_structured(file: Path, what: str) -> Any:
    """What a YAML or JSON file holds, or a list of what the lines of a ``.jsonl`` file hold.

    Raises:
        UserError: it can't be read; the message names the line.
    """
    text = read_text(file, what)
    kind = {".json": "JSON", ".jsonl": "JSON"}.get(file.suffix.lower(), "YAML")
    line = 1
    try:
        if file.suffix.lower() == ".jsonl":
            values = []
            for row in text.split("\n"):
                if row.strip():
                    values.append(json.loads(row))
                line += 1
            return values
        return json.loads(text) if kind == "JSON" else yaml.safe_load(text)
    except json.JSONDecodeError as problem:
        line, reason = line + problem.lineno - 1, problem.msg
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        line, reason = (mark.line + 1 if mark else 1), problem.problem or problem.context or "malformed"
    except (yaml.YAMLError, ValueError, RecursionError) as problem:  # ValueError: no such date
        reason = " ".join(str(problem).split())
    raise UserError(f"{what} {file}, line {line}: no {kind}: {printable(reason, 200)}")
