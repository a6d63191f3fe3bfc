"""Which part of the package may import which: data flows one way, and nothing imports in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import svft_diffusion

PACKAGE = Path(svft_diffusion.__file__).parent

# From the top down: a part imports those that stand below it.
LAYERS = (
    ("cli",),
    ("app",),
    ("comparison", "editing"),
    ("training",),
    ("evaluation",),
    ("data",),
    ("sampling", "inspection", "exchange", "algebra"),
    ("adapters",),
    ("models",),
    ("kernels", "factors", "files"),
    ("spectral", "toybox"),
    ("structured_files",),
    ("settings", "terminal", "markdown"),
    ("errors", "version"),
)
ENTRIES = ("__init__", "__main__")  # the package's own face, and its command
LEVELS = {part: level for level, parts in enumerate(LAYERS) for part in parts}


MODULES = {
    ".".join(("svft_diffusion", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """This package's modules that a part of a syntax tree imports, in functions too, not for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            taken = [f"{node.module}.{name.name}" for name in node.names]  # modules of a package, or names in a module
            yield from {name if name in MODULES else node.module or "" for name in taken} & MODULES.keys()
        elif isinstance(node, ast.Import):
            yield from {name.name for name in node.names} & MODULES.keys()
        else:
            yield from imports_of(node)


IMPORTS = {module: set(imports_of(ast.parse(file.read_text("utf-8")))) for module, file in MODULES.items()}


def part_of(module: str) -> str:
    """The folder or the file of the package that a module is or lies in."""
    return MODULES[module].relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_part_has_a_layer() -> None:
    assert {part_of(module) for module in MODULES} == {*LEVELS, *ENTRIES}


@pytest.mark.parametrize("part", LEVELS)
def test_a_part_imports_only_what_lies_below_it(part: str) -> None:
    inside = [module for module in MODULES if part_of(module) == part]
    upwards = [
        f"{module} imports {name}"
        for module in inside
        for name in IMPORTS[module]
        if (other := part_of(name)) in LEVELS and other != part and LEVELS[other] <= LEVELS[part]
    ]
    assert inside and not upwards


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the modules of a circle
