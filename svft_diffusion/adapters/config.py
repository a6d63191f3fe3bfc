"""Configuration of an adapter: which method, which entries of the core matrix, which layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from svft_diffusion.adapters.methods import check_options
from svft_diffusion.adapters.registration import SpectralPeftType
from svft_diffusion.adapters.targets import DEFAULT_PRESET, check_preset

TargetModules = list[str] | set[str] | str | None


@dataclass
class SpectralConfig(PeftConfig):
    """One configuration for every method in the singular-value space.

    `SVFTConfig`, `SVDiffConfig`, `VectorFitConfig` and `SiVAConfig` make it with the fields that their method has.

    Attributes:
        method: ``svft``, ``svdiff``, ``vectorfit`` or ``siva``.
        pattern: which entries of the core matrix train: ``plain`` (the diagonal) or, for SVFT, ``banded``,
            ``random`` or ``top_k``. ``listed`` is what an adapter file has of which only some values were kept: any
            number in each layer, at positions that the file lists. For SVFT those are entries ``i * r + j`` of the
            core matrix over the leading ``r`` triplets (see ``rank``), for the other methods triplets.
        off_diagonals: off-diagonals on each side of the diagonal with the banded pattern; ``random`` and ``top_k``
            train as many entries as the banded pattern with this number would.
        rank: number of leading singular triplets that train; None for all. The others stay as they are.
        fraction: SiVA: part of the singular values that train, in (0, 1].
        select: SiVA: which ones: ``bottom`` (the smallest, the method's premise), ``top``, ``all`` or ``random``.
        init: values at the start: ``zero`` (the base model exactly), ``random`` (small, from ``seed``), or for SVFT
            ``official`` (as the authors' code: N(0, 2/|Omega|) behind a trainable gate).
        seed: seed of random positions, selections and initial values.
        train_values: whether the core matrix trains.
        train_bias: whether the existing biases of the adapted layers train.
        train_norm: whether weights of norm layers train; None: where the targets contain norm layers.
        norm_shift: ``vector`` (a shift for each entry, as the SVDiff paper) or ``scalar`` (one for each norm layer,
            as the community's SVDiff code).
        compress_activations: keep what training saves for the backward pass as 8-bit integers: a quarter of the
            memory, and about half a percent of noise in the gradients of the values.
        targets: preset of layers; see `svft_diffusion.adapters.targets.PRESETS`.
        target_modules: names or a regular expression of layers as in PEFT, instead of a preset.
        numbers_of_values: with pattern ``listed``, and only then: path of a layer -> how many values it has. A layer
            that is not in it has none, but its bias or norm may still be shifted. Loading an adapter fills it in
            from the file.
        layers_with_bias: with pattern ``listed``: paths of the layers whose bias is shifted, if ``train_bias`` is on.

    Raises:
        UserError: unknown method, pattern or preset, or numbers that don't fit together.
    """

    method: str = "svft"
    pattern: str = "plain"
    off_diagonals: int = 0
    rank: int | None = None
    fraction: float | None = None
    select: str | None = None
    init: str = "zero"
    seed: int = 0
    train_values: bool = True
    train_bias: bool = False
    train_norm: bool | None = None
    norm_shift: str = "vector"
    compress_activations: bool = False
    targets: str = DEFAULT_PRESET
    target_modules: TargetModules = field(default=None)
    numbers_of_values: dict[str, int] | None = None
    layers_with_bias: set[str] | list[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SpectralPeftType.SPECTRAL
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        self.layers_with_bias = set(self.layers_with_bias)  # a list when it comes from JSON
        if self.target_modules is None:
            check_preset(self.targets)
        check_options(self)


def SVFTConfig(
    *,
    pattern: str = "plain",
    off_diagonals: int = 0,
    rank: int | None = None,
    init: str = "zero",
    seed: int = 0,
    train_bias: bool = False,
    train_norm: bool | None = None,
    compress_activations: bool = False,
    targets: str = DEFAULT_PRESET,
    target_modules: TargetModules = None,
) -> SpectralConfig:
    """SVFT (arXiv 2405.19597): a sparse core matrix ``M`` in ``W + U M V^T``; see `SpectralConfig`."""
    return SpectralConfig(
        method="svft",
        pattern=pattern,
        off_diagonals=off_diagonals,
        rank=rank,
        init=init,
        seed=seed,
        train_bias=train_bias,
        train_norm=train_norm,
        compress_activations=compress_activations,
        targets=targets,
        target_modules=target_modules,
    )


def SVDiffConfig(
    *,
    rank: int | None = None,
    init: str = "zero",
    seed: int = 0,
    train_bias: bool = False,
    train_norm: bool | None = None,
    norm_shift: str = "vector",
    compress_activations: bool = False,
    targets: str = DEFAULT_PRESET,
    target_modules: TargetModules = None,
) -> SpectralConfig:
    """SVDiff (arXiv 2303.11305): shifted singular values ``relu(sigma + delta)``; see `SpectralConfig`."""
    return SpectralConfig(
        method="svdiff",
        rank=rank,
        init=init,
        seed=seed,
        train_bias=train_bias,
        train_norm=train_norm,
        norm_shift=norm_shift,
        compress_activations=compress_activations,
        targets=targets,
        target_modules=target_modules,
    )


def VectorFitConfig(
    *,
    rank: int | None = None,
    init: str = "zero",
    seed: int = 0,
    train_values: bool = True,
    train_bias: bool = True,
    train_norm: bool | None = None,
    compress_activations: bool = False,
    targets: str = DEFAULT_PRESET,
    target_modules: TargetModules = None,
) -> SpectralConfig:
    """VectorFit (arXiv 2503.19530): singular values and existing biases train; see `SpectralConfig`.

    Both train as shifts from the pretrained values, so that weight decay pulls towards the base model. Adaptive
    Vector Freezing belongs to training: see `svft_diffusion.adapters.freezing`.
    """
    return SpectralConfig(
        method="vectorfit",
        rank=rank,
        init=init,
        seed=seed,
        train_values=train_values,
        train_bias=train_bias,
        train_norm=train_norm,
        compress_activations=compress_activations,
        targets=targets,
        target_modules=target_modules,
    )


def SiVAConfig(
    *,
    fraction: float = 0.2,
    select: str = "bottom",
    init: str = "zero",
    seed: int = 0,
    train_bias: bool = False,
    train_norm: bool | None = None,
    compress_activations: bool = False,
    targets: str = DEFAULT_PRESET,
    target_modules: TargetModules = None,
) -> SpectralConfig:
    """SiVA (OpenReview VpeAsLmcvg): a fraction of the singular values trains; see `SpectralConfig`."""
    return SpectralConfig(
        method="siva",
        fraction=fraction,
        select=select,
        init=init,
        seed=seed,
        train_bias=train_bias,
        train_norm=train_norm,
        compress_activations=compress_activations,
        targets=targets,
        target_modules=target_modules,
    )
