"""The questions that a comparison answers: who takes part in each, and which size they have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from svft_diffusion.adapters.targets import DEFAULT_PRESET
from svft_diffusion.comparison.methods import FullFineTuning, Method, NewTokens, SpectralMethod, UntrainedBase
from svft_diffusion.comparison.peft_methods import PeftMethod
from svft_diffusion.errors import UserError
from svft_diffusion.settings import nearest_hint

MAIN, SECOND, OWN_SIZE = "main", "second", "own size"  # budgets; the last is none
REFERENCE = "LoRA"  # whom all methods are compared with, subject by subject
BASE = "base model"


@dataclass(frozen=True)
class Contender:
    """Who takes part.

    Attributes:
        ladder: the same method from small to large; a budget takes the largest that it can pay. Of one step: the method
            has one size, and takes part whatever that is.
        learning_rate: where the search for it begins.
        budget: a name of `MAIN`, `SECOND`, `OWN_SIZE`, or of the question's own.
        against: whom it is compared with, subject by subject.
    """

    name: str
    ladder: tuple[Method, ...]
    learning_rate: float
    budget: str = MAIN
    against: str = REFERENCE


@dataclass(frozen=True)
class Question:
    """A comparison.

    Attributes:
        budgets: own ones, each of the size of a method.
    """

    name: str
    text: str
    contenders: tuple[Contender, ...]
    budgets: Mapping[str, Method] = field(default_factory=dict)


def _spectral(**options: Any) -> SpectralMethod:
    return SpectralMethod(options)


def _grown(name: str, sizes: Sequence[int], **options: Any) -> tuple[SpectralMethod, ...]:
    return tuple(_spectral(**options, **{name: size}) for size in sizes)


def _peft(config: str, *sizes: Mapping[str, Any]) -> tuple[PeftMethod, ...]:
    return tuple(PeftMethod(config, size) for size in sizes)


def lora(rank: int, **options: Any) -> PeftMethod:
    """LoRA whose update is not scaled by its rank."""
    return PeftMethod("Lora", {"r": rank, "lora_alpha": rank, **options})


_OFF_DIAGONALS = range(1, 17)
_RANKS = (*range(1, 9), *range(10, 33, 2))
_POWERS = (2, 4, 8, 16, 32)
_TRUNCATED = range(4, 129, 4)

# Where the search for learning rates begins, to go on in both directions. Ours: rates tried by hand on one subject. Of
# the others: where their loss fell in a first try.
_DIAGONAL_RATE, _BANDED_RATE = 1e-1, 5e-2
_LORA_RATE = 1e-2

PLAIN = Contender("SVFT plain", (_spectral(pattern="plain"),), _DIAGONAL_RATE)
LORA = Contender(REFERENCE, tuple(lora(rank) for rank in _RANKS), _LORA_RATE)
_OURS = (
    PLAIN,
    *(
        Contender(f"SVFT {pattern}", _grown("off_diagonals", _OFF_DIAGONALS, pattern=pattern), _BANDED_RATE)
        for pattern in ("banded", "random", "top_k")
    ),
    Contender("SVDiff", (_spectral(method="svdiff"),), _DIAGONAL_RATE),
    Contender("VectorFit", (_spectral(method="vectorfit"),), _DIAGONAL_RATE),
    Contender("SiVA", (_spectral(method="siva"),), _DIAGONAL_RATE),
)
_OTHERS = (
    LORA,
    Contender("DoRA", tuple(lora(rank, use_dora=True) for rank in _RANKS), _LORA_RATE),
    Contender(
        "AdaLoRA",
        _peft("AdaLora", *({"target_r": r, "init_r": (3 * r + 1) // 2, "lora_alpha": r} for r in _RANKS)),
        _LORA_RATE,
    ),
    Contender(
        "VeRA", _peft("Vera", *({"r": r, "save_projection": False} for r in (16, 64, 128, 256, 512, 1024))), 5e-2
    ),
    Contender("OFT", _peft("OFT", *({"oft_block_size": size} for size in _POWERS)), 1e-2),
    Contender("BOFT", _peft("BOFT", *({"boft_block_size": size} for size in _POWERS)), 1e-2),
    Contender(
        "FourierFT",
        # PEFT's default begins at random values, which in layers this small leave nothing of the base model.
        _peft(
            "FourierFT",
            *({"n_frequency": count, "init_weights": True} for count in (50, 100, 200, 350, 700, 1400, 2800)),
        ),
        1e-1,
    ),
    Contender("LoHa", _peft("LoHa", *({"r": r, "alpha": r} for r in _RANKS)), _LORA_RATE),
    Contender("LoKr", _peft("LoKr", *({"r": r, "alpha": r} for r in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64))), _LORA_RATE),
    Contender("(IA)3", _peft("IA3", {}), 5e-2),
    Contender("textual inversion", (NewTokens(2),), 2e-2),
    Contender("full fine-tuning", (FullFineTuning(),), 1e-3),
)
_BASE = Contender(BASE, (UntrainedBase(),), 1.0)


def _methods() -> Question:
    return Question("methods", "Which method draws the subject best for its size?", (*_OURS, *_OTHERS, _BASE))


def _banded_or_diagonal() -> Question:
    small, large = "the diagonal of these layers", "the diagonal of all layers"
    diagonals = {small: "diagonal", large: "diagonal, all layers"}
    truncated = {
        pattern: _grown("rank", _TRUNCATED, pattern=pattern, off_diagonals=1) for pattern in ("banded", "random")
    }
    of_layers = {
        budget: [
            Contender(f"{pattern} d=1, leading triplets", ladder, _BANDED_RATE, budget, diagonals[budget])
            for pattern, ladder in truncated.items()
        ]
        for budget in (small, large)
    }
    banded = {"pattern": "banded", "off_diagonals": 1}
    return Question(
        "banded-or-diagonal",
        "At an equal number of values: the whole diagonal, or a band in fewer places?",
        (
            Contender(diagonals[small], (_spectral(pattern="plain"),), _DIAGONAL_RATE, small),
            *of_layers[small],
            Contender(diagonals[large], (_spectral(pattern="plain", targets="all"),), _DIAGONAL_RATE, large),
            *of_layers[large],
            Contender(
                "banded d=1, attention",
                (_spectral(targets="attention", **banded),),
                _BANDED_RATE,
                large,
                diagonals[large],
            ),
        ),
        {small: _spectral(pattern="plain"), large: _spectral(pattern="plain", targets="all")},
    )


def _siva_premise() -> Question:
    return Question(
        "siva-premise",
        "Do the smallest singular values matter most, and does a growing effective rank go with better pictures?",
        (
            *(
                Contender(
                    f"{select} {fraction:.0%}",
                    (_spectral(method="siva", select=select, fraction=fraction),),
                    _DIAGONAL_RATE,
                    OWN_SIZE,
                    "all" if select == "top" else f"top {fraction:.0%}",
                )
                for fraction in (0.2, 0.5)
                for select in ("bottom", "top", "random")
            ),
            Contender("all", (_spectral(method="siva", select="all", fraction=1.0),), _DIAGONAL_RATE, OWN_SIZE),
        ),
    )


def _avf() -> Question:
    methods: dict[str, dict[str, Any]] = {
        "VectorFit": {"method": "vectorfit"},
        "SVFT plain": {"pattern": "plain"},
        "SVDiff": {"method": "svdiff"},
    }
    return Question(
        "avf",
        "Does adaptive vector freezing help?",
        tuple(
            Contender(
                f"{name} {word} AVF",
                (_spectral(**options, freezing_number=number),),
                _DIAGONAL_RATE,
                OWN_SIZE,
                f"{name} without AVF",
            )
            for name, options in methods.items()
            for word, number in (("with", 10), ("without", 0))
        ),
    )


def _targets() -> Question:
    return Question(
        "targets",
        "Which layers are worth their bytes?",
        tuple(
            Contender(f"{name}, {preset}", (method,), rate, OWN_SIZE, f"{name}, {DEFAULT_PRESET}")
            for preset in ("attention", "feed-forward", "attention+feed-forward", "all-linear", "all")
            for name, method, rate in (
                ("SVFT plain", _spectral(pattern="plain", targets=preset), _DIAGONAL_RATE),
                ("SVFT banded d=1", _spectral(pattern="banded", off_diagonals=1, targets=preset), _BANDED_RATE),
                ("LoRA r=1", lora(1, targets=preset), _LORA_RATE),
            )
        ),
    )


def _rank_truncation() -> Question:
    return Question(
        "rank-truncation",
        "How much is lost when only leading singular triplets train, the rest of each weight being kept?",
        tuple(
            Contender(
                f"diagonal, {f'{rank} triplets' if rank else 'all triplets'}",
                (_spectral(pattern="plain", **({"rank": rank} if rank else {})),),
                _DIAGONAL_RATE,
                OWN_SIZE,
                "diagonal, all triplets",
            )
            for rank in (8, 16, 32, 64, None)
        ),
    )


QUESTIONS = {
    question.name: question
    for question in (_methods(), _banded_or_diagonal(), _siva_premise(), _avf(), _targets(), _rank_truncation())
}


def question_with(name: str, methods: Sequence[str]) -> Question:
    """A question with some of its contenders; all of them if ``methods`` is empty.

    Raises:
        UserError: one of ``methods`` does not take part in it.
    """
    question = QUESTIONS[name]
    known = {contender.name: contender for contender in question.contenders}
    for method in methods:
        if method not in known:
            hint = nearest_hint(method, known) or f"; there are {', '.join(known)}"
            raise UserError(f"--methods: nobody is called {method!r} in the question {name}{hint}")
    if len(set(methods)) < len(methods):
        raise UserError("--methods: somebody is named twice")
    chosen = tuple(known[method] for method in methods) or question.contenders
    return Question(question.name, question.text, chosen, question.budgets)
