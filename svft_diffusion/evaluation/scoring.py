"""The scores of one set of pictures by every backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from svft_diffusion.evaluation import measures
from svft_diffusion.evaluation.backbones import Backbone

Scores = dict[str, float | None]
"""By the key of the column, see `column_key`; None where there was nothing to measure."""

DiversityMeasure = Callable[[Sequence[Image.Image]], float]
"""Mean distance between the pictures of one prompt, at least two."""

_DIGITS = 6  # of scores; the order of a sum shows in later ones

SUBJECT_FIDELITY = "subject_fidelity"
PROMPT_FIDELITY = "prompt_fidelity"
PRIOR_PRESERVATION = "prior_preservation"
DIVERSITY = "diversity"
PROMPT_DRIFT = "prompt_drift"
FEATURE_DRIFT = "feature_drift"
PIXEL_DRIFT = "pixel_drift"
PIXELS = "pixels"
"""Stands in the place of a backbone in the name of the column that needs none."""


@dataclass(frozen=True)
class PromptedPictures:
    """Pictures and what each was asked for, without the token; None for those of which nobody knows."""

    pictures: list[Image.Image]
    prompts: list[str | None]

    def groups(self) -> list[list[int]]:
        """The numbers of the pictures of each prompt that has several."""
        by_prompt: dict[str, list[int]] = {}
        for number, prompt in enumerate(self.prompts):
            if prompt is not None:
                by_prompt.setdefault(prompt, []).append(number)
        return [numbers for numbers in by_prompt.values() if len(numbers) > 1]


@dataclass
class Scorer:
    """Scores pictures by every backbone; the photos of a subject are looked at once."""

    backbones: Sequence[Backbone]
    diversity_measures: dict[str, DiversityMeasure] = field(default_factory=dict)  # such as LPIPS, by name

    def photo_features(self, photos: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What every backbone sees in the real photos."""
        return {backbone.name: backbone.embed_pictures(photos) for backbone in self.backbones}

    def of_photos(self, real: dict[str, Tensor]) -> Scores:
        """The photos against each other: the most that subject fidelity should be."""
        return {
            column_key(SUBJECT_FIDELITY, backbone.name): _rounded(measures.mean_of_pairs(real[backbone.name]))
            for backbone in self.backbones
        }

    def score(
        self,
        real: dict[str, Tensor],
        drawn: PromptedPictures | None,
        of_class: PromptedPictures | None = None,
        base_class: PromptedPictures | None = None,
    ) -> Scores:
        """All scores of one set of pictures.

        Args:
            real: `photo_features` of the subject.
            drawn: pictures of the subject, if there are any.
            of_class: pictures of its class, for prior preservation.
            base_class: the base model's from the same prompts and noise, for drift.
        """
        scores: Scores = {}
        for backbone in self.backbones:
            found = {} if drawn is None else _of_subject(backbone, real[backbone.name], drawn)
            if of_class is not None:
                found |= _of_class(backbone, real[backbone.name], of_class, base_class)
            scores |= {column_key(measure, backbone.name): _rounded(value) for measure, value in found.items()}
        if drawn is not None:
            for name, measure in self.diversity_measures.items():
                means = [measure([drawn.pictures[number] for number in group]) for group in drawn.groups()]
                scores[column_key(DIVERSITY, name)] = _rounded(sum(means) / len(means)) if means else None
        if of_class is not None and base_class is not None:
            pixels = measures.pixel_drift(of_class.pictures, base_class.pictures)
            scores[column_key(PIXEL_DRIFT, PIXELS)] = _rounded(pixels)
        return scores

    def titles(self) -> dict[str, str]:
        """Column key -> what people read, such as ``DINO(dino-vits16)``; in the order of a table."""
        networks = self.backbones
        readers = [one for one in networks if one.reads_text]
        columns = [
            *((SUBJECT_FIDELITY, one.name, one.fidelity_label) for one in networks),
            *((PROMPT_FIDELITY, one.name, one.prompt_label) for one in readers),
            *((PRIOR_PRESERVATION, one.name, "PRES") for one in networks),
            *((DIVERSITY, one.name, "DIV") for one in networks),
            *((DIVERSITY, name, "DIV") for name in self.diversity_measures),
            *((PROMPT_DRIFT, one.name, f"drift of {one.prompt_label}") for one in readers),
            *((FEATURE_DRIFT, one.name, "drift") for one in networks),
            (PIXEL_DRIFT, PIXELS, "drift"),
        ]
        return {column_key(measure, name): f"{label}({name})" for measure, name, label in columns}


def column_key(measure: str, backbone: str) -> str:
    """The name of a column in reports: a measure by one backbone, never by several."""
    return f"{measure}:{backbone}"


def _of_subject(backbone: Backbone, real: Tensor, drawn: PromptedPictures) -> dict[str, float | None]:
    features = backbone.embed_pictures(drawn.pictures)
    found: dict[str, float | None] = {
        SUBJECT_FIDELITY: measures.subject_fidelity(features, real),
        DIVERSITY: measures.diversity([features[group] for group in drawn.groups()]),
    }
    if backbone.reads_text:
        found[PROMPT_FIDELITY] = _prompt_fidelity(backbone, features, drawn)
    return found


def _of_class(
    backbone: Backbone, real: Tensor, of_class: PromptedPictures, base_class: PromptedPictures | None
) -> dict[str, float | None]:
    adapted = backbone.embed_pictures(of_class.pictures)
    found: dict[str, float | None] = {PRIOR_PRESERVATION: measures.subject_fidelity(adapted, real)}
    if base_class is None:
        return found
    base = backbone.embed_pictures(base_class.pictures)
    found[FEATURE_DRIFT] = measures.feature_drift(adapted, base)
    if backbone.reads_text:
        after = _prompt_fidelity(backbone, adapted, of_class)
        before = _prompt_fidelity(backbone, base, base_class)
        found[PROMPT_DRIFT] = None if after is None or before is None else after - before
    return found


def _prompt_fidelity(backbone: Backbone, features: Tensor, drawn: PromptedPictures) -> float | None:
    """Of the pictures whose prompts are known."""
    known = [(number, prompt) for number, prompt in enumerate(drawn.prompts) if prompt is not None]
    if not known:
        return None
    texts = backbone.embed_texts([prompt for _, prompt in known])
    return measures.prompt_fidelity(features[[number for number, _ in known]], texts)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS) + 0.0  # adding zero turns a negative zero into zero
