"""Learning rates that work without thinking about them: one table for all methods and patterns."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from svft_diffusion.models import EMBEDDED_MODEL

if TYPE_CHECKING:
    from svft_diffusion.training.config import TrainingConfig


class Rates(NamedTuple):
    """Learning rates of AdamW for one method and pattern on one kind of base model."""

    values: float  # singular values and the other entries of core matrices
    one_dimensional: float  # biases, norm weights, gates


class RatesByBase(NamedTuple):
    """One row of the table."""

    embedded: Rates  # for the embedded model, whose layers are narrow and whose runs are short
    full_size: Rates  # for Stable Diffusion; from the papers, not yet tried on real weights


# Full size, values: the SVDiff paper trains shifts at 1e-3 for 500 to 1000 steps. The plain diagonal of SVFT is the
# same parametrization without the clamp, and so are VectorFit and SiVA. The SVFT paper goes ten times lower from its
# diagonal to its off-diagonals, on language models.
# Full size, one-dimensional: the SVDiff authors name 1e-6 for their norm weights. VectorFit's rate for biases is not
# known to us; 1e-4 is a usual one for training biases alone, and SVFT's biases, norms and gates follow it.
# Embedded: found by trials on a held-out subject (banded, plain, svdiff), or tried once for 200 steps (random; siva;
# vectorfit, whose biases learn more at 1e-1 than at 1e-2 with all scenes intact). By analogy: top_k as random, and what
# is one-dimensional beside the other methods.
LEARNING_RATES: dict[tuple[str, str], RatesByBase] = {
    ("svft", "plain"): RatesByBase(embedded=Rates(1e-1, 1e-2), full_size=Rates(2e-3, 1e-4)),
    ("svft", "banded"): RatesByBase(embedded=Rates(5e-2, 1e-2), full_size=Rates(1e-3, 1e-4)),
    ("svft", "random"): RatesByBase(embedded=Rates(5e-2, 1e-2), full_size=Rates(1e-3, 1e-4)),
    ("svft", "top_k"): RatesByBase(embedded=Rates(5e-2, 1e-2), full_size=Rates(1e-3, 1e-4)),
    ("svdiff", "plain"): RatesByBase(embedded=Rates(1e-1, 1e-3), full_size=Rates(1e-3, 1e-6)),
    ("vectorfit", "plain"): RatesByBase(embedded=Rates(1e-1, 1e-1), full_size=Rates(1e-3, 1e-4)),
    ("siva", "plain"): RatesByBase(embedded=Rates(1e-1, 1e-2), full_size=Rates(1e-3, 1e-4)),
}


# Lion's authors (arXiv 2302.06675, section 5) take a third to a tenth of AdamW's rate. The others take AdamW's own.
_LION_SHARE = 0.2


_FAR = 20.0  # times the table's rate, or that part of it


def notes_on_numbers(config: TrainingConfig) -> list[str]:
    """What the user should hear of numbers that are common with LoRA and mean something else here."""
    notes = []
    if config.rank is not None:
        notes.append(
            f"only the {config.rank} leading singular triplets of each layer train: --rank is not the size of a LoRA; "
            "leave it out to train all"
        )
    rate = default_learning_rates(
        config.method, config.pattern, config.pretrained_model_name_or_path, config.resolved_optimizer
    ).values
    given = config.learning_rate
    if given is not None and config.resolved_optimizer != "prodigy" and not rate / _FAR < given < rate * _FAR:
        notes.append(
            f"a learning rate of {given:g} is far from {rate:g}, which is usual for this method: rates of LoRA or full "
            "fine-tuning don't suit it; leave out --learning_rate to take that"
        )
    return notes


def default_learning_rates(method: str, pattern: str, base_name: str, optimizer: str = "adamw") -> Rates:
    """The table's rates for a base model, as ``optimizer`` takes them; Prodigy finds its own, and is given 1.

    Raises:
        KeyError: no method has the combination.
    """
    rates = LEARNING_RATES[method, pattern]
    rates_of_base = rates.embedded if base_name == EMBEDDED_MODEL else rates.full_size
    if optimizer == "prodigy":
        return Rates(1.0, 1.0)
    if optimizer == "lion":
        return Rates(*(_LION_SHARE * rate for rate in rates_of_base))
    return rates_of_base


# Embedded: of 5e-3 and 2e-2, the better one on a held-out subject. Full size: the default of the textual inversion
# script of diffusers, not yet tried on real weights.
_TOKEN_RATE_EMBEDDED = 2e-2
_TOKEN_RATE_FULL_SIZE = 5e-4


def default_token_rate(base_name: str, optimizer: str = "adamw") -> float:
    """Learning rate of new tokens' embeddings, as ``optimizer`` takes it."""
    if optimizer == "prodigy":
        return 1.0
    rate = _TOKEN_RATE_EMBEDDED if base_name == EMBEDDED_MODEL else _TOKEN_RATE_FULL_SIZE
    return _LION_SHARE * rate if optimizer == "lion" else rate
