"""The smallest layout (method, pattern, rank, what trains) that holds a sum of adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svft_diffusion.adapters import SpectralConfig
from svft_diffusion.adapters.methods import LISTED, METHODS, Term, core_rows_and_columns
from svft_diffusion.adapters.targets import DEFAULT_PRESET, PRESETS
from svft_diffusion.errors import UserError
from svft_diffusion.spectral import banded_positions

_PATTERNS_WITH_A_LIST = ("random", "top_k", LISTED)


@dataclass(frozen=True)
class Operand:
    """An adapter in a sum."""

    name: str
    config: SpectralConfig
    terms: dict[str, Term]  # canonical layer -> its part there, at its weight; layers of weight 0 are left out

    def has(self, part: str) -> bool:
        """Whether some layer has the part."""
        return any(part in term.parts for term in self.terms.values())


def common_options(operands: Sequence[Operand], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Fields of the `SpectralConfig` that holds the sum of all operands.

    Adapters of one layout keep it. Else the method is ``svft``, unless all have the same; the band is the widest one;
    adapters that list their entries get a list of all entries of all of them.

    Args:
        operands: at least one, each with at least one layer.
        sizes: canonical name of each layer, norms left out -> how many singular values it has.

    Raises:
        UserError: their sum is no adapter.
    """
    configs = [operand.config for operand in operands]
    return {
        **_core_options([operand for operand in operands if operand.has("values")] or operands, sizes),
        "init": _shared((config.init for config in configs if config.init != "official"), "zero"),
        "seed": configs[0].seed,
        "train_values": any(config.train_values for config in configs),
        "train_bias": any(config.train_bias for config in configs),
        "train_norm": _shared((config.train_norm for config in configs), any(item.has("norm") for item in operands)),
        "norm_shift": _norm_shift(operands),
        # A label of layers that no preset names is no choice; `save_adapter` finds it again.
        "targets": _shared((config.targets for config in configs if config.targets in PRESETS), DEFAULT_PRESET),
    }


def places(term: Term) -> tuple[Tensor, Tensor]:
    """Row and column of each of a term's values in the core matrix over all triplets of the layer, int64."""
    if term.options.listed_triplets:
        assert term.positions is not None
        return term.positions.long(), term.positions.long()
    rows, columns = core_rows_and_columns(term)
    return rows + term.options.first, columns + term.options.first


def places_of_sum(options: Mapping[str, Any], terms: Sequence[Term], size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows and columns, as `places` gives them, of the values that a sum has in a layer; and what its file lists.

    Args:
        options: from `common_options`.
        terms: those that have values in the layer; at least one where the options list anything.
        size: number of singular values of the layer.
    """
    if options.get("pattern") == LISTED:
        found = [places(term) for term in terms]
        width = (options["rank"] or size) if METHODS[options["method"]].lists_entries else size
        flat = torch.cat([rows * width + columns for rows, columns in found]).unique()
        rows, columns = flat // width, flat % width
        return rows, columns, (flat if METHODS[options["method"]].lists_entries else rows).int()
    if options.get("pattern") in _PATTERNS_WITH_A_LIST or options.get("select") == "random":
        return *places(terms[0]), terms[0].positions
    triplets = METHODS[options["method"]].triplets(SpectralConfig(**options), size, 0)
    assert isinstance(triplets, slice)
    rows, columns = banded_positions(triplets.stop - triplets.start, options.get("off_diagonals", 0))
    return rows + triplets.start, columns + triplets.start, None


def check_methods(methods: Mapping[str, str]) -> None:
    """Raise `UserError` if SVDiff would be added to another method; ``methods`` has that of each adapter by name."""
    shifts = next((name for name, method in methods.items() if method == "svdiff"), None)
    other = next((name for name, method in methods.items() if method != "svdiff"), None)
    if shifts is not None and other is not None:
        raise UserError(
            f"{shifts!r} is svdiff, whose relu adds up with nothing but svdiff, and {other!r} is {methods[other]}: "
            "keep both files and use them side by side, each at its weight"
        )


def _core_options(operands: Sequence[Operand], sizes: Mapping[str, int]) -> dict[str, Any]:
    check_methods({operand.name: operand.config.method for operand in operands})
    methods = {operand.config.method for operand in operands}
    rank = _common_rank(operands, sizes)
    method = methods.pop() if len(methods) == 1 else "svft"
    if method == "svft":
        return {"method": method, "rank": rank, **_pattern_options(operands, rank, sizes)}
    if any(operand.config.pattern == LISTED for operand in operands):
        return {"method": method, "rank": rank, "pattern": LISTED}
    return {"method": method, **(_siva_options(operands, sizes) if method == "siva" else {"rank": rank})}


def _pattern_options(operands: Sequence[Operand], rank: int | None, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Pattern and off-diagonals of SVFT."""
    first = operands[0].config
    width = max(operand.config.off_diagonals for operand in operands)
    if all(operand.config.pattern not in _PATTERNS_WITH_A_LIST for operand in operands):
        if all(width < min(size, rank or size) for size in sizes.values()):
            return {"pattern": "banded" if width else "plain", "off_diagonals": width}
    elif len({(item.config.pattern, item.config.rank) for item in operands}) == 1 and _same_list(operands, sizes):
        return {"pattern": first.pattern, "off_diagonals": first.off_diagonals}
    return {"pattern": LISTED}


def _siva_options(operands: Sequence[Operand], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The larger fraction where all select from one end; else all triplets, unless all select the same random ones."""
    selections = {operand.config.select for operand in operands}
    select = selections.pop() if len(selections) == 1 else "all"
    if select == "random" and not _same_list(operands, sizes):
        select = "all"
    return {"select": select, "fraction": max(operand.config.fraction or 0.0 for operand in operands)}


def _common_rank(operands: Sequence[Operand], sizes: Mapping[str, int]) -> int | None:
    """The largest rank, or None (all triplets) if one has no rank or a layer has too few triplets."""
    ranks = [operand.config.rank for operand in operands]
    given = [rank for rank in ranks if rank is not None]
    if len(given) < len(ranks) or any(size < max(given) for size in sizes.values()):
        return None
    return max(given)


def _same_list(operands: Sequence[Operand], sizes: Mapping[str, int]) -> bool:
    """Whether every layer has a list, and all operands the same one."""
    found: dict[str, Tensor] = {}
    for operand in operands:
        for layer, term in operand.terms.items():
            if term.positions is not None and not torch.equal(found.setdefault(layer, term.positions), term.positions):
                return False
    return found.keys() == sizes.keys()


def _norm_shift(operands: Sequence[Operand]) -> str:
    kinds = {operand.config.norm_shift: operand.name for operand in operands if operand.has("norm")}
    if len(kinds) > 1:
        raise UserError(
            f"{kinds['vector']!r} shifts each entry of the norms, {kinds['scalar']!r} rescales whole norms; one file "
            "can't do both: keep both files and use them side by side, each at its weight"
        )
    return next(iter(kinds), operands[0].config.norm_shift)


def _shared(values: Iterable[Any], otherwise: Any) -> Any:
    """The value that all have, or ``otherwise``."""
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else otherwise
