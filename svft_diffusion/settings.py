"""Typed settings: one dataclass per command serves the command line, YAML files and the app.

A field made with :func:`setting` carries its help text, its group in ``--help`` and its allowed values, so that none
of them is written twice.
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from svft_diffusion.errors import UserError

Config = TypeVar("Config")

_KINDS: dict[type, str] = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path",
}  # fmt: skip
"""What a value of each type is called in messages."""


def setting(default: Any, help: str, *, group: str = "", choices: Sequence[str] = ()) -> Any:
    """A dataclass field with its documentation; a list as ``default`` is copied for each instance."""
    metadata = {"help": help, "group": group, "choices": tuple(choices)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """One field of a settings dataclass, as the command line and the YAML reader need it."""

    name: str
    kind: type  # str, int, float, bool or Path; of the items, if ``is_list``
    is_list: bool
    optional: bool
    default: Any
    help: str
    group: str
    choices: tuple[str, ...]

    @property
    def from_text(self) -> Callable[[str], Any]:
        """What turns text into a value, for argparse. Raises `ValueError` for other text."""
        return path if self.kind is Path else self.kind

    def convert(self, value: Any) -> Any:
        """``value`` as this setting's type.

        Raises:
            UserError: if it is of another type or not among the choices.
        """
        if value is None and self.optional:
            return None
        if self.is_list:
            items = value if isinstance(value, list) else [value]
            return [self._convert_item(item) for item in items]
        return self._convert_item(value)

    def _convert_item(self, value: Any) -> Any:
        if self.kind is bool:
            converted = value if isinstance(value, bool) else None
        elif value is None or isinstance(value, bool | list | dict):  # as text, they would be taken for a prompt
            converted = None
        else:
            try:
                converted = self.from_text(value)
            except (TypeError, ValueError, OverflowError):
                converted = None
            if self.kind is int and isinstance(value, float) and value != converted:
                converted = None
        if converted is None:
            raise UserError(f"{self.name}: expected {_KINDS[self.kind]}, got {_shown(value)}")
        if self.choices and converted not in self.choices:
            raise UserError(f"{self.name}: {_shown(converted)} is not one of {', '.join(self.choices)}")
        return converted


def _shown(value: Any) -> str:
    """``value`` as Python writes it, but no more than a line of it; what refers to itself or to much ends in dots."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 80
    return brief.repr(value)


def path(text: str | Path) -> Path:
    """A path; the empty one, as of a shell variable that is not set, is no name of the current folder."""
    if text == "":
        raise ValueError("empty")
    return Path(text)


def settings_of(config_class: type) -> list[Setting]:
    """The settings of a dataclass, in the order of its fields."""
    hints = get_type_hints(config_class)
    return [_describe(field, hints[field.name]) for field in dataclasses.fields(config_class)]


def _describe(field: dataclasses.Field[Any], hint: Any) -> Setting:
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        alternatives = [part for part in get_args(hint) if part is not type(None)]
        optional, hint = True, alternatives[0]
    is_list = get_origin(hint) is list
    kind = get_args(hint)[0] if is_list else hint
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    documentation = field.metadata
    return Setting(
        name=field.name,
        kind=kind,
        is_list=is_list,
        optional=optional,
        default=default,
        help=documentation.get("help", ""),
        group=documentation.get("group", ""),
        choices=documentation.get("choices", ()),
    )


def config_from_mapping(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """A settings object from plain values, as they come from YAML or JSON.

    Raises:
        UserError: for an unknown name (with the nearest known one) or a value of the wrong type.
    """
    known = {item.name: item for item in settings_of(config_class)}
    for name in values:
        if name not in known:
            raise UserError(f"unknown setting {_shown(name)}{nearest_hint(str(name), known)}")
    return config_class(**{name: known[name].convert(value) for name, value in values.items()})


def config_to_mapping(config: Any) -> dict[str, Any]:
    """The settings as plain values that YAML and JSON can hold; paths become text with forward slashes."""
    plain = dataclasses.asdict(config)
    return {name: value.as_posix() if isinstance(value, Path) else value for name, value in plain.items()}


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """``, did you mean 'x'?`` for the known name nearest to ``name``, or nothing.

    Where none is near as a whole, it is one that ends with a word near to it: ``promt`` is near to ``instance_prompt``.
    """
    names = list(known)
    matches = difflib.get_close_matches(name, names, n=1)
    if not matches:
        last_words = {known_name.rpartition("_")[2]: known_name for known_name in reversed(names)}
        matches = [last_words[word] for word in difflib.get_close_matches(name, last_words, n=1, cutoff=0.8)]
    return f", did you mean {matches[0]!r}?" if matches else ""
