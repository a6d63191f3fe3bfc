"""``report.md``: an evaluation for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from svft_diffusion.evaluation.report import EvaluationReport, ScoredRow, SummaryRow
from svft_diffusion.evaluation.scoring import FEATURE_DRIFT, PIXEL_DRIFT, PROMPT_DRIFT, SUBJECT_FIDELITY, Scores
from svft_diffusion.files.whole_files import replace_when_whole
from svft_diffusion.markdown import plain, table

PAGE_FILE = "report.md"
NO_SCORE = "-"
_DRIFTS = (PROMPT_DRIFT, FEATURE_DRIFT, PIXEL_DRIFT)
_HOW_TO_READ = """\
Cosines are plain ones, and comparable within a column only. Subject fidelity is the mean over all pairs of a picture \
and a real photo; CLIP-T, or prompt fidelity, compares a picture with its prompt without the token. PRES compares \
pictures of the class with the subject's photos: less is better, and a class that has turned into the subject has \
much. DIV is the distance between pictures of one prompt: more is more diverse. Drift is what the adapter changes in \
pictures of the class, from the same prompts and noise: none is best."""
_SOURCE = "Protocol: Ruiz et al., DreamBooth, CVPR 2023."


class ScoreTable(NamedTuple):
    """Some of the scores; in the first column, what was scored."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def write_page(report: EvaluationReport, folder: Path, pictures: Sequence[str]) -> Path:
    """Write ``report.md``; ``pictures`` are plots and contact sheets in the folder, to be shown.

    Raises:
        UserError: it can't be written.
    """
    file = folder / PAGE_FILE
    with replace_when_whole(file) as unfinished:
        unfinished.write_text(page(report, pictures), encoding="utf-8", newline="\n")
    return file


def page(report: EvaluationReport, pictures: Sequence[str]) -> str:
    """The report as Markdown."""
    parts = ["# Evaluation", *_best(report), f"{_HOW_TO_READ} {_SOURCE}", *_summary(report)]
    for one in score_tables(report):
        cells = [[plain(cell) for cell in row] for row in one.rows]
        parts += [f"## {one.title}", table(one.columns, cells)]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    parts += ["## How it was made", *_facts(report)]
    return "\n\n".join(parts) + "\n"


def score_tables(report: EvaluationReport) -> list[ScoreTable]:
    """The scores of all rows, and of the real photos, as text; drift by itself, where it was measured."""
    fidelities = [key for key in report.titles if key.partition(":")[0] not in _DRIFTS]
    drifts = [key for key in report.titles if key.partition(":")[0] in _DRIFTS]
    tables = [_rows("Fidelity", report, fidelities, with_photos=True)]
    if any(row.class_pictures for row in report.rows):
        tables.append(_rows("Drift of the class", report, drifts))
    return tables


def result_lines(report: EvaluationReport) -> list[str]:
    """The scores for a terminal: all of a single row, the deciding ones of several; the rest is in the report."""
    blocks = [(_name_of(row, report), row.scores) for row in report.rows if row.pictures]
    keys = list(report.titles)
    if len(blocks) > 1:
        keys = list(report.deciding) if report.deciding else keys[:1]
        blocks += [(f"mean of {_group(row)}", row.means) for row in report.summary]
    width = max(len(report.titles[key]) for key in keys)
    name_width = max(len(name) for name, _ in blocks)
    if len(blocks) == 1:
        [(name, scores)] = blocks
        return [name, *(f"  {report.titles[key]:<{width}}  {_number(scores.get(key))}" for key in keys)]
    lines = [" " * name_width + "".join(f"  {report.titles[key]:>{width}}" for key in keys)]
    for name, scores in blocks:
        lines.append(f"{name:<{name_width}}" + "".join(f"  {_number(scores.get(key)):>{width}}" for key in keys))
    return [*lines, *(f"the best of {subject}: {label}" for subject, label in report.best.items())]


def _best(report: EvaluationReport) -> list[str]:
    if not report.best or report.deciding is None:
        return []
    titles = " and ".join(report.titles[key] for key in report.deciding)
    picked = [f"**{plain(label)}** is the best of {plain(subject)}" for subject, label in report.best.items()]
    return [f"{', '.join(picked)}, by {report.best_rule} ({titles})."]


def _summary(report: EvaluationReport) -> list[str]:
    if not report.summary:
        return []
    keys = [key for key in report.titles if key in report.summary[0].means]
    rows = [
        [_group(row), *(_with_interval(row.means.get(key), row.intervals.get(key)) for key in keys)]
        for row in report.summary
    ]
    titles = ["subjects", *(report.titles[key] for key in keys)]
    return ["## Means", "In brackets: the 95 % bootstrap interval of the mean, over subjects.", table(titles, rows)]


def _rows(title: str, report: EvaluationReport, keys: Sequence[str], *, with_photos: bool = False) -> ScoreTable:
    keys = [key for key in keys if any(key in row.scores for row in report.rows)]
    rows = []
    for subject in report.subjects:
        of_subject = [row for row in report.rows if row.subject == subject.name]
        rows += [[_name_of(row, report), *_cells(row.scores, keys)] for row in of_subject]
        if with_photos:
            name = f"{subject.name}: " if len(report.subjects) > 1 else ""
            own = {key: value for key, value in subject.photo_scores.items() if key.startswith(SUBJECT_FIDELITY)}
            rows.append([f"{name}real photos", *_cells(own, keys)])
    return ScoreTable(title, ["", *(report.titles[key] for key in keys)], rows)


def _facts(report: EvaluationReport) -> list[str]:
    rows = [["base model", plain(f"{report.base or 'unknown'} {report.base_fingerprint or ''}".strip())]]
    told = {name: value for name, value in report.settings.items() if name not in ("backbones", "lpips")}
    rows += [[name, plain(str(value))] for name, value in told.items() if value is not None]
    for subject in report.subjects:
        words = " ".join(word for word in (subject.token, subject.class_word) if word) or "no words known"
        prompts = (
            f"{len(subject.prompts)} prompts of {subject.prompt_source}" if subject.prompts else "pictures as given"
        )
        kind = f", {subject.kind}" if subject.kind else ""
        rows.append([plain(subject.name), plain(f"{words}{kind}; {len(subject.photos)} photos; {prompts}")])
    rows += [
        [backbone["name"], plain(f"{backbone['preprocessing']}; weights {backbone['weights']}")]
        for backbone in report.backbones
    ]
    rows += [[name, plain(value)] for name, value in {**report.libraries, **report.machine}.items()]
    return [table(["", ""], rows), *(f"- {plain(note)}" for note in report.notes)]


def _name_of(row: ScoredRow, report: EvaluationReport) -> str:
    return f"{row.subject}: {row.label}" if len(report.subjects) > 1 else row.label


def _group(row: SummaryRow) -> str:
    return f"{row.group} ({row.subjects})"


def _cells(scores: Scores, keys: Sequence[str]) -> list[str]:
    return [_number(scores.get(key)) for key in keys]


def _number(value: float | None) -> str:
    return NO_SCORE if value is None else f"{value:.3f}"


def _with_interval(mean: float | None, interval: tuple[float, float] | None) -> str:
    if mean is None or interval is None:
        return _number(mean)
    return f"{mean:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
