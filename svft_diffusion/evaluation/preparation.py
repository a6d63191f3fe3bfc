"""A subject made ready: all of its files are read, and its pictures planned, before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.config import EvaluationConfig
from svft_diffusion.evaluation.drawing import NAME_THE_BASE, plan_class, plan_subject
from svft_diffusion.evaluation.existing import ExistingPictures, find_pictures
from svft_diffusion.evaluation.painter import PlannedSet
from svft_diffusion.evaluation.report import SubjectFacts
from svft_diffusion.evaluation.scoring import Scores
from svft_diffusion.evaluation.subjects import (
    Photos,
    SubjectPrompts,
    SubjectSource,
    kind_of,
    prompts_of,
    read_photos,
    words_of,
)
from svft_diffusion.files import read_header
from svft_diffusion.models.loading import resolve_base
from svft_diffusion.sampling.adapter_choice import check_adapter, unique_names
from svft_diffusion.sampling.prompt_files import SubjectWords

_BASE = "base"  # the folder of its pictures; no adapter's has this name


@dataclass(frozen=True)
class PreparedSubject:
    """A subject that can be drawn and scored.

    Attributes:
        prompts: None where its pictures exist.
        base: the base model's pictures; None where the subject's exist.
        sets: those of each adapter.
        existing: pictures that are there.
        made_with: the base model of its pictures, as far as they tell.
        fingerprint: of the base weights that its adapters were trained on.
    """

    source: SubjectSource
    words: SubjectWords
    photos: Photos
    prompts: SubjectPrompts | None = None
    base: PlannedSet | None = None
    sets: Sequence[PlannedSet] = ()
    existing: ExistingPictures | None = None
    made_with: str | None = None
    fingerprint: str | None = None

    def planned(self) -> list[PlannedSet]:
        """What has to be there before the subject can be scored: the base model's pictures come first."""
        return [*([self.base] if self.base else []), *self.sets]

    def rows(self) -> Iterator[tuple[str, str, str | None]]:
        """What tells the rows of a report apart: subject, label, and digest of the adapter."""
        if self.existing is not None:
            yield self.source.name, self.existing.label, None
        for one in self.planned():
            if one.pictures:
                yield self.source.name, one.label, None if one.adapter is None else one.adapter.sha256

    def facts(self, photo_scores: Scores) -> SubjectFacts:
        """What a report says of the subject."""
        source = None if self.prompts is None else self.prompts.source
        return SubjectFacts(
            name=self.source.name,
            kind=kind_of(self.source, source),
            token=self.words.token,
            class_word=self.words.class_word,
            prompt_source=source,
            prompts=[] if self.prompts is None else self.prompts.with_token,
            photos=dict(zip((file.name for file in self.photos.files), self.photos.digests, strict=True)),
            photo_scores=photo_scores,
        )


def base_of(config: EvaluationConfig, sources: Sequence[SubjectSource]) -> str | None:
    """The base model that was asked for, or that all adapters name; None where all pictures exist.

    Raises:
        UserError: the adapters name several, there is no such base, or a file is no adapter.
    """
    files = [candidate.choice.file for source in sources for candidate in source.candidates]
    names = {file: read_header(file).base.name for file in files}
    if not names:
        return None
    if config.pretrained_model_name_or_path is not None:
        resolve_base(config.pretrained_model_name_or_path, config.base_config)
        return config.pretrained_model_name_or_path
    first, base = next(iter(names.items()))
    for file, name in names.items():
        if name != base:
            raise UserError(
                f"{first} was trained on {base}, {file} on {name}: scores of different bases can't be compared; "
                "evaluate them one by one"
            )
    try:
        resolve_base(base, config.base_config)
    except UserError as problem:
        raise UserError(f"{problem}; {NAME_THE_BASE}") from problem
    return base


def prepare_subject(source: SubjectSource, config: EvaluationConfig, base: str | None, folder: Path) -> PreparedSubject:
    """Read a subject's photos, and its adapters or pictures; plan what has to be drawn into ``folder``.

    Raises:
        UserError: photos, adapters, pictures, words or prompts that are missing or don't fit.
    """
    photos = read_photos(source.instance_data_dir)
    headers = [read_header(candidate.choice.file) for candidate in source.candidates]
    words = words_of(source, headers)
    if source.pictures is not None or base is None:
        assert source.pictures is not None  # a subject without pictures has adapters, and they name a base
        existing = find_pictures(source.pictures, words.token or "")
        return PreparedSubject(source, words, photos, existing=existing, made_with=existing.base)
    prompts = prompts_of(source, words, config, base=base)
    labels = [candidate.label for candidate in source.candidates]
    names = unique_names([_BASE, *(label.lower() for label in labels)])  # folders, of which some systems ignore case
    drawn_by_base = PlannedSet(
        "base model",
        None,
        None,
        plan_subject(folder / _BASE / "subject", prompts, None, config, base) if config.with_base else [],
        plan_class(folder / _BASE / "class", prompts, None, config, base),
    )
    sets = []
    for candidate, name in zip(source.candidates, names[1:], strict=True):
        adapter = check_adapter(
            candidate.choice.file,
            base,
            name=name,
            weight=candidate.choice.weight,
            variant=config.variant,
            on_mismatch=cast(OnMismatch, config.on_mismatch),
        )
        of_subject = plan_subject(folder / name / "subject", prompts, adapter, config, base)
        of_class = plan_class(folder / name / "class", prompts, adapter, config, base)
        sets.append(PlannedSet(candidate.label, candidate.step, adapter, of_subject, of_class))
    return PreparedSubject(
        source,
        words,
        photos,
        prompts,
        drawn_by_base,
        sets,
        made_with=base,
        fingerprint=headers[0].base.fingerprint,
    )
