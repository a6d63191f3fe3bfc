"""The evaluation: everything is checked first, then missing pictures are drawn, and all are scored and reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

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
from svft_diffusion.evaluation.drawing import check_others, drawn_pictures, guidance_scale, is_blacked_out
from svft_diffusion.evaluation.lpips_diversity import LPIPS_NAME, LpipsDiversity
from svft_diffusion.evaluation.output_folder import holds_this_report
from svft_diffusion.evaluation.painter import Painter, PlannedSet
from svft_diffusion.evaluation.plots import PLOT_MISSING, can_plot, draw_pareto
from svft_diffusion.evaluation.preparation import PreparedSubject, base_of, prepare_subject
from svft_diffusion.evaluation.report import (
    EvaluationReport,
    ScoredRow,
    SubjectFacts,
    library_facts,
    machine_facts,
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
from svft_diffusion.sampling.default_size import stored_resolution
from svft_diffusion.sampling.devices import resolve_device
from svft_diffusion.sampling.numbered_folders import folder_of_run
from svft_diffusion.sampling.picture_size import check_picture_size
from svft_diffusion.sampling.plan import check_picture_settings
from svft_diffusion.sampling.spreading import (
    Process,
    device_of,
    drawing,
    this_process,
    threads_of_torch,
    wait_for_others,
)

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


def evaluate(config: EvaluationConfig, sources: Sequence[SubjectSource]) -> EvaluationResult | None:
    """Score adapters or pictures of one subject or several; write ``report.json``, ``report.md``, plots and sheets.

    Processes that ``accelerate launch`` started share the drawing; the first one scores and reports, and the others
    return None.

    Raises:
        UserError: settings, files or folders that can't work, before the base model is loaded.
    """
    check_config(config)
    process = this_process()
    device = resolve_device(device_of(process, config.device))
    use_cache(config.factor_cache, config.factor_cache_size)
    choices = _distinct([parse_backbone(text) for text in config.backbone])
    base = base_of(config, sources)
    if base is not None:
        check_picture_settings(config.seed, config.num_inference_steps, guidance_scale(config, base))
        check_picture_size(stored_resolution(base), height=config.height, width=config.width)
    if config.output_dir is None and process.count > 1:
        raise UserError("several processes write to one folder: give --output_dir")
    with folder_of_run(config.output_dir, DEFAULT_OUTPUT_PARENT) as output_dir:
        return _evaluate_into(output_dir, config, sources, base, choices, process, device)


def _evaluate_into(
    output_dir: Path,
    config: EvaluationConfig,
    sources: Sequence[SubjectSource],
    base: str | None,
    choices: Sequence[BackboneChoice],
    process: Process,
    device: torch.device,
) -> EvaluationResult | None:
    """`evaluate` once its folder is known."""
    folders = unique_names(source.name for source in sources)
    subjects = [
        prepare_subject(source, config, base, output_dir / "pictures" / folder)
        for source, folder in zip(sources, folders, strict=True)
    ]
    choices = choices or _usual(subjects)
    _refuse_strangers(choices, subjects)
    for subject in subjects if config.lpips else ():
        if subject.existing is not None:
            subject.existing.check_sizes()
    settings = _settings(config, base, choices)
    is_known = not config.overwrite and holds_this_report(output_dir, settings, subjects)
    sets = [one for subject in subjects for one in subject.planned()]
    if not config.overwrite:
        check_others([picture for one in sets for picture in one.pictures], {})
    check_writable(output_dir)

    with threads_of_torch(config.threads):
        # Before hours of drawing, whatever may be missing for scoring.
        scorer = _scorer(choices, config, device) if process.is_first else None
        if base is not None:
            _draw(Painter(base, config, device), sets, output_dir, process, of_size_unknown=not is_known)
        if scorer is None:
            return None
        findings = _Findings()
        with tqdm(total=len(sets), desc="scoring", unit="set", disable=not sets) as progress:
            for subject, folder in zip(subjects, folders, strict=True):
                prefix = f"{folder}_" if len(subjects) > 1 else ""
                _score_subject(subject, scorer, findings, output_dir, prefix, progress)
        report = _report(config, findings, scorer, base, subjects, settings, device)
    return _write(report, output_dir, folders, findings.sheets)


def _scorer(choices: Sequence[BackboneChoice], config: EvaluationConfig, device: torch.device) -> Scorer:
    backbones = [load_backbone(choice, device) for choice in choices]
    return Scorer(backbones, {LPIPS_NAME: LpipsDiversity(device)} if config.lpips else {})


def _draw(
    painter: Painter, sets: Sequence[PlannedSet], output_dir: Path, process: Process, *, of_size_unknown: bool
) -> None:
    """Draw what is missing: the first process ends when all of it is there."""
    with drawing(output_dir, process):
        painter.draw(sets, process, of_size_unknown=of_size_unknown)
    if process.is_first and process.count > 1:
        wait_for_others(output_dir, process)
        painter.draw(sets, Process(), of_size_unknown=of_size_unknown)  # what a process that was ended has left


def _score_subject(
    subject: PreparedSubject,
    scorer: Scorer,
    findings: _Findings,
    output_dir: Path,
    prefix: str,
    progress: tqdm[None],
) -> None:
    photos = subject.photos.images()
    real = scorer.photo_features(photos)
    findings.subjects.append(subject.facts(scorer.of_photos(real)))
    if subject.existing is not None:
        drawn = subject.existing.pictures()
        label, scores = subject.existing.label, scorer.score(real, drawn)
        findings.rows.append(ScoredRow(subject.source.name, label, None, None, None, len(drawn.pictures), 0, scores))
        findings.sheets.append(_sheet(output_dir, f"sheet_{prefix}pictures.png", drawn, photos))
        return
    base_class: PromptedPictures | None = None
    strip: dict[str, dict[str, Image.Image]] = {}
    for one in subject.planned():
        of_subject, of_class = drawn_pictures(one.of_subject), drawn_pictures(one.of_class)
        base_class = base_class or of_class
        progress.update()
        if of_subject is None and of_class is None:
            continue
        scores = scorer.score(real, of_subject, of_class, base_class)
        (findings.of_base if one.adapter is None else findings.rows).append(_row(subject, one, scores))
        if of_subject is not None:
            name = f"sheet_{prefix}{one.of_subject[0].file.parent.parent.name}.png"
            findings.sheets.append(_sheet(output_dir, name, of_subject, photos))
            strip[one.label] = first_of_prompts(of_subject)
    if len(strip) > 1:
        name = f"strip_{prefix}all.png"
        write_strip(output_dir / name, strip)
        findings.sheets.append(name)


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
        name = subject.source.name
        if skipped := subject.photos.skipped:
            notes.append(f"{name}: photos that were left out: {'; '.join(skipped)}")
        if hidden := sum(is_blacked_out(picture) for one in subject.planned() for picture in one.pictures):
            notes.append(
                f"{name}: blacked out by the base model's safety checker, and scored as they are: {hidden} of the "
                "pictures; the same command with --disable_safety_checker draws them anew"
            )
        if subject.existing is None:
            continue
        if skipped := subject.existing.skipped:
            notes.append(f"{name}: pictures that were left out: {'; '.join(skipped)}")
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


def _write(
    report: EvaluationReport, output_dir: Path, folders: Sequence[str], sheets: Sequence[str]
) -> EvaluationResult:
    if report.best and not can_plot():
        report.notes.append(PLOT_MISSING)
    elif not report.best and report.deciding is not None and any(row.sha256 for row in report.rows):
        report.notes.append("no pareto.png: it compares several adapters of one subject")
    write_report(report, output_dir)  # by which the rest is known to be of this evaluation
    plots = []
    for subject, folder in zip(report.subjects, folders, strict=True):
        name = "pareto.png" if len(folders) == 1 else f"pareto_{folder}.png"
        if subject.name in report.best and draw_pareto(report, subject.name, output_dir / name):
            plots.append(name)
    write_page(report, output_dir, [*plots, *sheets])
    return EvaluationResult(report, output_dir, [*plots, *sheets])
