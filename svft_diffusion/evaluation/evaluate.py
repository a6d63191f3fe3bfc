"""The evaluation: everything is checked first, then missing pictures are drawn, and all are scored and reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.backbones import (
    TOY_BACKBONES,
    USUAL_BACKBONES,
    Backbone,
    BackboneChoice,
    load_backbone,
    parse_backbone,
)
from svft_diffusion.evaluation.config import EvaluationConfig, check_config
from svft_diffusion.evaluation.drawing import Painter, check_others, guidance_scale
from svft_diffusion.evaluation.lpips_diversity import LPIPS_NAME, LpipsDiversity
from svft_diffusion.evaluation.plots import PLOT_MISSING, draw_pareto
from svft_diffusion.evaluation.preparation import PlannedSet, PreparedSubject, base_of, prepare_subject
from svft_diffusion.evaluation.report import (
    REPORT_FILE,
    EvaluationReport,
    ScoredRow,
    SubjectFacts,
    library_facts,
    machine_facts,
    read_report,
    summarize,
    write_report,
)
from svft_diffusion.evaluation.report_page import write_page
from svft_diffusion.evaluation.scoring import PromptedPictures, Scorer, Scores
from svft_diffusion.evaluation.selection import BEST_RULE, best_of, deciding_columns
from svft_diffusion.evaluation.sheets import first_of_prompts, write_sheet, write_strip
from svft_diffusion.evaluation.subjects import SubjectSource
from svft_diffusion.factors import use_cache
from svft_diffusion.files.whole_files import check_writable
from svft_diffusion.models.loading import EMBEDDED_MODEL, base_display_name
from svft_diffusion.sampling.adapter_choice import unique_names
from svft_diffusion.sampling.devices import resolve_device
from svft_diffusion.sampling.plan import check_picture_settings, new_numbered_folder
from svft_diffusion.sampling.spreading import threads_of_torch

DEFAULT_OUTPUT_PARENT = Path("outputs/evaluation")
_REPORTED_SETTINGS = (
    "num_images", "num_class_images", "seed", "num_inference_steps", "height", "width", "dtype", "revision", "variant",
    "on_mismatch",
)  # fmt: skip


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found, and what it wrote."""

    report: EvaluationReport
    output_dir: Path
    pictures: list[str]  # plots and contact sheets in it


@dataclass
class _Findings:
    """What grows while subjects are scored."""

    subjects: list[SubjectFacts] = field(default_factory=list)
    rows: list[ScoredRow] = field(default_factory=list)
    of_base: list[ScoredRow] = field(default_factory=list)
    sheets: list[str] = field(default_factory=list)


def evaluate(config: EvaluationConfig, sources: Sequence[SubjectSource]) -> EvaluationResult:
    """Score adapters or pictures of one subject or several; write ``report.json``, ``report.md``, plots and sheets.

    Raises:
        UserError: settings, files or folders that can't work, before the base model is loaded.
    """
    check_config(config)
    device = resolve_device(config.device)
    use_cache(config.factor_cache, config.factor_cache_size)
    choices = _distinct([parse_backbone(text) for text in config.backbone])
    base = base_of(config, sources)
    if base is not None:
        check_picture_settings(config.seed, config.num_inference_steps, guidance_scale(config, base))
    output_dir = config.output_dir or new_numbered_folder(DEFAULT_OUTPUT_PARENT)
    folders = unique_names(source.name for source in sources)
    subjects = [
        prepare_subject(source, config, base, output_dir / "pictures" / folder)
        for source, folder in zip(sources, folders, strict=True)
    ]
    choices = choices or _usual(subjects)
    _refuse_strangers(choices, subjects)
    settings = _settings(config, base, choices)
    if not config.overwrite:
        check_others(picture for subject in subjects for picture in subject.planned())
        _check_other_report(output_dir, settings, subjects)
    check_writable(output_dir)

    with threads_of_torch(config.threads):
        backbones = [load_backbone(choice, device) for choice in choices]
        scorer = Scorer(backbones, {LPIPS_NAME: LpipsDiversity(device)} if config.lpips else {})
        painter = None if base is None else Painter(base, config)
        findings = _Findings()
        for subject, folder in zip(subjects, folders, strict=True):
            prefix = f"{folder}_" if len(subjects) > 1 else ""
            _score_subject(subject, scorer, painter, findings, output_dir, prefix)
        report = _report(config, findings, scorer, base, subjects, settings, device)
    return _write(report, output_dir, folders, findings.sheets)


def _score_subject(
    subject: PreparedSubject,
    scorer: Scorer,
    painter: Painter | None,
    findings: _Findings,
    output_dir: Path,
    prefix: str,
) -> None:
    photos = subject.photos.images
    real = scorer.photo_features(photos)
    findings.subjects.append(subject.facts(scorer.of_photos(real)))
    if subject.existing is not None:
        assert subject.source.pictures is not None
        label = subject.source.pictures.resolve().name
        scores = scorer.score(real, subject.existing)
        findings.rows.append(
            ScoredRow(subject.source.name, label, None, None, None, len(subject.existing.pictures), 0, scores)
        )
        findings.sheets.append(_sheet(output_dir, f"sheet_{prefix}pictures.png", subject.existing, photos))
        return
    assert painter is not None and subject.base is not None  # there are adapters
    base_class: PromptedPictures | None = None
    strip: dict[str, dict[str, Image.Image]] = {}
    for one in [subject.base, *subject.sets]:  # the base model's class pictures first, which the others are compared to
        drawn, of_class = _draw(painter, one)
        base_class = base_class or of_class
        if drawn is None and of_class is None:
            continue
        scores = scorer.score(real, drawn, of_class, base_class)
        (findings.of_base if one.adapter is None else findings.rows).append(_row(subject, one, scores))
        if drawn is not None:
            name = f"sheet_{prefix}{one.of_subject[0].file.parent.parent.name}.png"
            findings.sheets.append(_sheet(output_dir, name, drawn, photos))
            strip[one.label] = first_of_prompts(drawn)
    if len(strip) > 1:
        name = f"strip_{prefix}all.png"
        write_strip(output_dir / name, strip)
        findings.sheets.append(name)


def _draw(painter: Painter, one: PlannedSet) -> tuple[PromptedPictures | None, PromptedPictures | None]:
    """The pictures of the subject and those of its class, each None if none are planned."""
    drawn = painter.draw([*one.of_subject, *one.of_class], one.adapter, one.label)
    end = len(one.of_subject)
    parts = (
        PromptedPictures(drawn.pictures[:end], drawn.prompts[:end]),
        PromptedPictures(drawn.pictures[end:], drawn.prompts[end:]),
    )
    return parts[0] if parts[0].pictures else None, parts[1] if parts[1].pictures else None


def _row(subject: PreparedSubject, one: PlannedSet, scores: Scores) -> ScoredRow:
    return ScoredRow(
        subject=subject.source.name,
        label=one.label,
        step=one.step,
        sha256=None if one.adapter is None else one.adapter.sha256,
        weight=None if one.adapter is None else one.adapter.weight,
        pictures=len(one.of_subject),
        class_pictures=len(one.of_class),
        scores=scores,
    )


def _sheet(output_dir: Path, name: str, drawn: PromptedPictures, photos: Sequence[Image.Image]) -> str:
    write_sheet(output_dir / name, drawn, photos)
    return name


def _report(
    config: EvaluationConfig,
    findings: _Findings,
    scorer: Scorer,
    base: str | None,
    subjects: Sequence[PreparedSubject],
    settings: dict[str, Any],
    device: torch.device,
) -> EvaluationReport:
    deciding = deciding_columns(scorer.backbones)
    rows = [*findings.of_base, *findings.rows]
    made_with = base or next((subject.made_with for subject in subjects if subject.made_with), None)
    return EvaluationReport(
        base=None if made_with is None else base_display_name(made_with),
        base_fingerprint=next((subject.fingerprint for subject in subjects if subject.fingerprint), None),
        settings=settings,
        backbones=[backbone.facts() for backbone in scorer.backbones],
        titles={key: title for key, title in scorer.titles().items() if any(key in row.scores for row in rows)},
        subjects=findings.subjects,
        rows=rows,
        summary=_summary(findings) if config.subjects is not None else [],
        best=_best(findings.rows, deciding),
        best_rule=BEST_RULE,
        deciding=deciding,
        notes=_notes(findings, subjects, scorer.backbones),
        libraries=library_facts(),
        machine=machine_facts(str(device)),
    )


def _summary(findings: _Findings) -> list[Any]:
    kinds = {subject.name: subject.kind for subject in findings.subjects}
    return summarize(findings.rows, kinds)


def _best(rows: Sequence[ScoredRow], deciding: tuple[str, str] | None) -> dict[str, str]:
    """The best row of each subject that has several with both scores that decide."""
    if deciding is None:
        return {}
    best = {}
    for name in dict.fromkeys(row.subject for row in rows):
        known = [
            (row.label, (fidelity, prompt))
            for row in rows
            if row.subject == name
            and (fidelity := row.scores.get(deciding[0])) is not None
            and (prompt := row.scores.get(deciding[1])) is not None
        ]
        if len(known) > 1:
            best[name] = known[best_of([point for _, point in known])][0]
    return best


def _notes(findings: _Findings, subjects: Sequence[PreparedSubject], backbones: Sequence[Backbone]) -> list[str]:
    notes = []
    for subject in subjects:
        if subject.existing is None:
            continue
        name = subject.source.name
        if not subject.words.token:
            notes.append(f"{name}: no token was given, so that none was taken out of the prompts")
        if unknown := sum(prompt is None for prompt in subject.existing.prompts):
            notes.append(f"{name}: {unknown} pictures have no prompt; they count for subject fidelity alone")
    if not any(backbone.reads_text for backbone in backbones):
        notes.append("no backbone reads text, so that prompt fidelity was not measured and no adapter picked")
    return notes


def _settings(config: EvaluationConfig, base: str | None, choices: Sequence[BackboneChoice]) -> dict[str, Any]:
    """The settings that scores depend on; of pictures that exist nobody knows how they were made."""
    settings: dict[str, Any] = {"backbones": [choice.name for choice in choices], "lpips": config.lpips}
    if base is not None:
        settings |= {name: getattr(config, name) for name in _REPORTED_SETTINGS}
        settings["guidance_scale"] = guidance_scale(config, base)
    return settings


def _distinct(choices: list[BackboneChoice]) -> list[BackboneChoice]:
    names = [choice.name for choice in choices]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--backbone {twice} is there twice; a backbone has one column")
    return choices


def _usual(subjects: Sequence[PreparedSubject]) -> list[BackboneChoice]:
    names = TOY_BACKBONES if all(subject.made_with == EMBEDDED_MODEL for subject in subjects) else USUAL_BACKBONES
    return [BackboneChoice(name) for name in names]


def _refuse_strangers(choices: Sequence[BackboneChoice], subjects: Sequence[PreparedSubject]) -> None:
    for choice in choices:
        for subject in subjects:
            if choice.name in TOY_BACKBONES and subject.made_with not in (None, EMBEDDED_MODEL):
                raise UserError(
                    f"--backbone {choice.name} knows pictures of the embedded model alone, not of {subject.made_with}"
                )


def _check_other_report(output_dir: Path, settings: dict[str, Any], subjects: Sequence[PreparedSubject]) -> None:
    """Refuse to replace a report on something else.

    Raises:
        UserError: there is one.
    """
    file = output_dir / REPORT_FILE
    if not file.exists():
        return
    try:
        found = read_report(file)
        is_same = found.settings == settings and [one.name for one in found.subjects] == [
            subject.source.name for subject in subjects
        ]
    except UserError:
        is_same = False
    if not is_same:
        raise UserError(f"{file} is of another evaluation; choose another --output_dir, or replace it with --overwrite")


def _write(
    report: EvaluationReport, output_dir: Path, folders: Sequence[str], sheets: Sequence[str]
) -> EvaluationResult:
    plots = []
    for subject, folder in zip(report.subjects, folders, strict=True):
        if subject.name not in report.best:
            continue
        name = "pareto.png" if len(folders) == 1 else f"pareto_{folder}.png"
        if draw_pareto(report, subject.name, output_dir / name):
            plots.append(name)
        elif PLOT_MISSING not in report.notes:
            report.notes.append(PLOT_MISSING)
    write_report(report, output_dir)
    write_page(report, output_dir, [*plots, *sheets])
    return EvaluationResult(report, output_dir, [*plots, *sheets])
