"""Building an argument parser from a settings dataclass."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from svft_diffusion.cli.familiar_flags import SortedArguments
from svft_diffusion.errors import UserError
from svft_diffusion.settings import Setting, nearest_hint, settings_of

Config = TypeVar("Config")


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts no abbreviations and names the nearest flag when one is unknown.

    Flags are declared and shown with underscores, and may be typed with hyphens: ``--num_images`` or ``--num-images``,
    ``--no-train_bias`` or ``--no-train-bias``.

    Args:
        set_apart: takes flags of other programs out of the arguments; what it says against them is told with everything
            else that is wrong, and its other notes are kept.
    """

    def __init__(self, *, set_apart: Callable[[Sequence[str]], SortedArguments] | None = None, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._set_apart = set_apart
        self._problems: list[str] = []
        self.notes: list[str] = []

    def parse_args(  # type: ignore[override]  # the overloads of the superclass say no more than this
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse all arguments; unknown ones end the program with code 2, and the nearest known flag of each."""
        flags = {_spelling(flag): flag for action in self._actions for flag in action.option_strings}
        given = _as_declared(list(sys.argv[1:] if args is None else args), flags)
        if self._set_apart is not None:
            given, self._problems, self.notes = self._set_apart(given)
        known = set(flags.values())
        end = given.index("--") if "--" in given else len(given)
        for argument in given[:end]:
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                self._problems.append(f"unknown argument {argument}{nearest_hint(_spelling(flag), known)}")
        options, unknown = self.parse_known_args(given, namespace)
        if unknown and not self._problems:
            self._problems.append(f"unknown argument {unknown[0]}")
        if self._problems:
            self.error(self._problems.pop())
        return options

    def error(self, message: str) -> NoReturn:
        """Print a line for each problem and exit with code 2; the full usage is what ``--help`` is for."""
        lines = [f"error: {problem}\n" for problem in self._problems]
        self.exit(2, f"{''.join(lines)}error: {message} (see {self.prog} --help)\n")


def _as_declared(arguments: Sequence[str], flags: Mapping[str, str]) -> list[str]:
    """The arguments with every flag spelled as it was declared; what follows ``--`` is no flag.

    Args:
        flags: declared flags by their spelling in underscores.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    declared = []
    for argument in arguments[:end]:
        flag, equals, value = argument.partition("=")
        declared.append(f"{flags.get(_spelling(flag), flag)}{equals}{value}")
    return [*declared, *arguments[end:]]


def _spelling(flag: str) -> str:
    """``--no-train-bias`` -> ``--no_train_bias``; what is no long flag stays as it is."""
    return f"--{flag[2:].replace('-', '_')}" if flag.startswith("--") else flag


def add_settings(
    parser: argparse.ArgumentParser, config_class: type, names: Collection[str] | None = None, *, prefix: str = ""
) -> None:
    """Add one flag per field of ``config_class``; a flag that is not given leaves no attribute behind.

    Args:
        names: of the fields, where not all of them are meant.
        prefix: before the titles of their groups in the help.
    """
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item in settings_of(config_class):
        if names is not None and item.name not in names:
            continue
        title = item.group or "settings"
        if title not in groups:
            groups[title] = parser.add_argument_group(prefix + title)
        groups[title].add_argument(f"--{item.name}", **_argument_options(item))


def _argument_options(item: Setting) -> dict[str, Any]:
    # Percent signs start format codes in argparse's help.
    text = item.help.replace("%", "%%")
    shown = "" if item.default is None or item.default in ("", [], False) else f" (default: {item.default})"
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text + shown}
    if item.kind is bool:
        # Without a --no form where "no" is the default; a default that depends (None) can be answered both ways.
        options["action"] = "store_true" if item.default is False else argparse.BooleanOptionalAction
        return options
    options["type"] = item.from_text
    if item.choices:
        options["choices"] = item.choices
    if item.is_list:
        # Repeatable, and several values after one flag: --prompt a b and --prompt a --prompt b mean the same.
        options["nargs"], options["action"] = "+", "extend"
    return options


def given_settings(config_class: type, options: argparse.Namespace) -> dict[str, Any]:
    """The settings that stood on the command line, and only those (defaults and files come below them)."""
    return {item.name: getattr(options, item.name) for item in settings_of(config_class) if hasattr(options, item.name)}


def config_from_options(config_class: type[Config], options: argparse.Namespace) -> Config:
    """The settings object of a command that reads no file.

    Raises:
        UserError: if a setting without a default is missing.
    """
    given = given_settings(config_class, options)
    try:
        return config_class(**given)
    except TypeError as error:
        raise UserError(str(error)) from error
