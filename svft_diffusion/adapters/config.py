"""Configuration of an adapter: which method, which entries of the core matrix, which layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from svft_diffusion.adapters.methods import method_named
from svft_diffusion.adapters.registration import SpectralPeftType
from svft_diffusion.adapters.targets import DEFAULT_PRESET, check_preset
from svft_diffusion.errors import UserError


@dataclass
class SpectralConfig(PeftConfig):
    """One configuration for every method in the singular-value space; `SVFTConfig` and `SVDiffConfig` make it.

    Attributes:
        method: ``svft`` or ``svdiff``.
        pattern: which entries of the core matrix train: ``plain`` (diagonal) or, for SVFT, ``banded``.
        off_diagonals: off-diagonals on each side of the diagonal, with the banded pattern.
        rank: number of leading singular triplets that train; None for all. The others stay as they are.
        targets: preset of layers; see `svft_diffusion.adapters.targets.PRESETS`.
        target_modules: names or a regular expression of layers as in PEFT, instead of a preset.

    Raises:
        UserError: unknown method, pattern or preset, or numbers that don't fit together.
    """

    method: str = "svft"
    pattern: str = "plain"
    off_diagonals: int = 0
    rank: int | None = None
    targets: str = DEFAULT_PRESET
    target_modules: list[str] | set[str] | str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SpectralPeftType.SPECTRAL
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if self.target_modules is None:
            check_preset(self.targets)
        method_named(self.method).check(self.pattern, self.off_diagonals)
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank must be at least 1 (or left out, for all singular values), got {self.rank}")


def SVFTConfig(
    *,
    pattern: str = "plain",
    off_diagonals: int = 0,
    rank: int | None = None,
    targets: str = DEFAULT_PRESET,
    target_modules: list[str] | str | None = None,
) -> SpectralConfig:
    """SVFT (arXiv 2405.19597): a sparse core matrix ``M`` in ``W + U M V^T``; see `SpectralConfig`."""
    return SpectralConfig(
        method="svft",
        pattern=pattern,
        off_diagonals=off_diagonals,
        rank=rank,
        targets=targets,
        target_modules=target_modules,
    )


def SVDiffConfig(
    *,
    rank: int | None = None,
    targets: str = DEFAULT_PRESET,
    target_modules: list[str] | str | None = None,
) -> SpectralConfig:
    """SVDiff (arXiv 2303.11305): shifted singular values ``relu(sigma + delta)``; see `SpectralConfig`."""
    return SpectralConfig(method="svdiff", rank=rank, targets=targets, target_modules=target_modules)
