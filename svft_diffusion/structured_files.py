"""Reading the files that people write: settings and lists in YAML and JSON, with the line of a mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from svft_diffusion.errors import UserError
from svft_diffusion.settings import config_from_mapping
from svft_diffusion.terminal import printable

_LARGEST_FILE = 10_000_000  # bytes

Row = TypeVar("Row")
_KEY_OR_BRACE = re.compile(r'"(?:[^"\\]|\\.)*"(\s*:)?|[{}]')  # of text that is known to be JSON
_DEEPEST = 100  # lists and mappings within each other
_TOO_DEEP = f"lists and mappings are more than {_DEEPEST} deep in each other"
_MOST_VALUES = 2_000_000  # each as often as YAML's aliases repeat it
# That of libyaml, where PyYAML has it, is many times faster, but ends the program where it gets too deep.
_YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _RepeatedKey(ValueError):
    """A key that stands in a mapping twice, of which YAML and JSON would take the last."""

    def __init__(self, key: str, line: int) -> None:
        super().__init__(key)
        self.key, self.line = key, line


class _Mapping:
    """A mapping of YAML while its keys and values are read in turn."""

    def __init__(self) -> None:
        self._keys: set[str] = set()
        self._key_is_next = True

    def add(self, event: yaml.Event) -> None:
        """The event that ends the next key or value. Raises `_RepeatedKey`."""
        if self._key_is_next and isinstance(event, yaml.ScalarEvent):
            if event.value in self._keys:
                raise _RepeatedKey(event.value, event.start_mark.line + 1 if event.start_mark else 1)
            self._keys.add(event.value)
        self._key_is_next = not self._key_is_next


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
        raise UserError(f"can't read {what} {str(file)[:200]}: {problem.strerror or problem}") from None
    except UnicodeDecodeError as problem:
        raise UserError(f"{what} {file} is no UTF-8 text (byte {problem.start})") from None
    except ValueError as problem:  # a name with a null character
        raise UserError(f"can't read {what} {str(file)[:200]!r}: {problem}") from None


def read_structured(file: Path, what: str) -> Any:
    """What a YAML or JSON file holds, or a list of what the lines of a ``.jsonl`` file hold.

    Raises:
        UserError: it can't be read, or a key is in a mapping twice; the message names the line.
    """
    text = read_text(file, what)
    kind = {".json": "JSON", ".jsonl": "JSON"}.get(file.suffix.lower(), "YAML")
    line = 1
    try:
        if file.suffix.lower() == ".jsonl":
            values = []
            for row in text.split("\n"):
                if row.strip():
                    values.append(_parse_json(row))
                line += 1
            return values
        if kind == "JSON" and not text.strip():
            raise UserError(f"{what} {file} is empty")
        return _parse_json(text) if kind == "JSON" else _parse_yaml(text)
    except _RepeatedKey as problem:
        raise UserError(
            f"{what} {file}, line {line + problem.line - 1}: {printable(problem.key, 80)!r} is there twice; remove one"
        ) from None
    except json.JSONDecodeError as problem:
        line, reason = line + problem.lineno - 1, problem.msg
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        line, reason = (mark.line + 1 if mark else 1), problem.problem or problem.context or "malformed"
    except (yaml.YAMLError, ValueError, RecursionError) as problem:  # ValueError: no such date
        # A character that YAML does not allow; its message would name the text by a name of the parser's own.
        reason = problem.reason if isinstance(problem, yaml.reader.ReaderError) else " ".join(str(problem).split())
    raise UserError(f"{what} {file}, line {line}: no {kind}: {printable(reason, 200)}")


def _parse_json(text: str) -> Any:
    """Raises `ValueError` for what is no JSON or has a key twice."""
    value = json.loads(text)
    mappings: list[set[str]] = []  # the keys of those that begin before a place and end after it
    for found in _KEY_OR_BRACE.finditer(text):
        if found[0] == "{":
            mappings.append(set())
        elif found[0] == "}":
            mappings.pop()
        elif found[1] is not None:
            key = json.loads(found[0].removesuffix(found[1]))
            if key in mappings[-1]:
                raise _RepeatedKey(key, text.count("\n", 0, found.start()) + 1)
            mappings[-1].add(key)
    return value


def _parse_yaml(text: str) -> Any:
    """Raises `ValueError` for what is nested too deeply, grows by aliases or has a key twice, `yaml.YAMLError` for what
    is no YAML."""
    around: list[_Mapping | None] = []  # what a place lies in; None: a list
    for event in yaml.parse(text, Loader=_YAML_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            around.append(_Mapping() if isinstance(event, yaml.MappingStartEvent) else None)
            if len(around) > _DEEPEST:
                raise ValueError(_TOO_DEEP)
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            around.pop()
        elif not isinstance(event, yaml.NodeEvent):
            continue  # of streams and documents
        if around and (mapping := around[-1]) is not None:
            mapping.add(event)
    value = yaml.load(text, Loader=_YAML_LOADER)
    _measure(value, {})
    return value


def _measure(value: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values are in ``value``, and how deep, aliases written out. Raises `ValueError` if it is too much.

    Args:
        known: lists and mappings measured before by their `id`; it grows.
    """
    if not isinstance(value, list | dict):
        return 1, 0
    if id(value) not in known:
        known[id(value)] = (0, _DEEPEST)  # what holds itself is too deep
        inner = [_measure(item, known) for item in (value.values() if isinstance(value, dict) else value)]
        known[id(value)] = 1 + sum(count for count, _ in inner), 1 + max((depth for _, depth in inner), default=0)
    count, depth = known[id(value)]
    if depth > _DEEPEST:
        raise ValueError(_TOO_DEEP)
    if count > _MOST_VALUES:
        raise ValueError(f"aliases make more than {_MOST_VALUES} values of it")
    return count, depth


def read_rows(file: Path, what: str, row_name: str, row_class: type[Row], *, needed: Sequence[str]) -> list[Row]:
    """The rows of a list of mappings, such as one of subjects, each as an object of settings.

    Args:
        what: the flag that named the file, for messages, as ``row_name`` is.
        needed: settings that every row must have.

    Raises:
        UserError: it can't be read, is no such list, or a row has an unknown key (with the nearest known one), a value
            of the wrong type, or lacks one that is needed.
    """
    listed = read_structured(file, what)
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{what} {file} must hold a list of {row_name}s, each with {' and '.join(needed)}")
    return [
        _row(item, f"{what} {file}, {row_name} {number}", row_class, needed) for number, item in enumerate(listed, 1)
    ]


def _row(item: object, place: str, row_class: type[Row], needed: Sequence[str]) -> Row:
    if not isinstance(item, dict):
        raise UserError(f"{place}: expected {', '.join(needed)} and so on, got a {type(item).__name__}")
    try:
        row = config_from_mapping(row_class, item)
    except UserError as problem:
        raise UserError(f"{place}: {problem}") from None
    for name in needed:
        if not str(getattr(row, name) or "").strip():
            raise UserError(f"{place}: {name} is missing")
    return row
