"""The report of an evaluation as HTML; whatever it says is shown as text."""

from __future__ import annotations

import html
from collections.abc import Sequence

from svft_diffusion.app.jobs.evaluation_runs import FoundReport
from svft_diffusion.evaluation.report import EvaluationReport
from svft_diffusion.evaluation.report_page import NO_SCORE, ScoreTable

_HOW_TO_READ = (
    "More is better, up to the real photos: DINO, CLIP-I and identity compare with the photos, CLIP-T and prompt with "
    "the words, DIV tells how varied the pictures are. Less is better: PRES and drift, what the adapter does to the "
    "rest of its class."
)


def report_html(found: FoundReport) -> str:
    """The best adapter, the scores, and how they were made."""
    report = found.report
    best = {str(label) for label in report.best.values()}
    first = [report.titles.get(key) for key in report.deciding or ()]
    parts = [_paragraph(_best_line(label, subject, report)) for subject, label in report.best.items()]
    parts += [_table(_without_gaps(table, first), best) for table in found.tables]
    settings = report.settings
    facts = [
        f"base model {report.base or 'unknown'}",
        f"judged by {', '.join(str(backbone.get('name')) for backbone in report.backbones)}",
        f"pictures for each prompt: {settings.get('num_images', '?')}",
        f"of the class: {settings.get('num_class_images', '?')}",
        f"steps: {settings.get('num_inference_steps', '?')}",
        f"seed: {settings.get('seed', '?')}",
    ]
    parts += [_paragraph("; ".join(facts)), *(_paragraph(f"Note: {note}") for note in report.notes)]
    return f'<div class="report">{"".join(parts)}{_paragraph(_HOW_TO_READ)}</div>'


def _best_line(label: str, subject: str, report: EvaluationReport) -> str:
    of_subject = f" of {subject}" if len(report.subjects) > 1 else ""
    return f"{label} is the best{of_subject}, by {report.best_rule}."


def _without_gaps(table: ScoreTable, first: Sequence[str | None]) -> ScoreTable:
    """The columns that hold scores, those of ``first`` before the others."""
    held = [number for number in range(1, len(table.columns)) if any(row[number] != NO_SCORE for row in table.rows)]
    held.sort(key=lambda number: first.index(title) if (title := table.columns[number]) in first else len(first))
    order = [0, *held]
    return ScoreTable(
        table.title,
        [table.columns[number] for number in order],
        [[row[number] for number in order] for row in table.rows],
    )


def _table(table: ScoreTable, best: set[str]) -> str:
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in table.columns)
    rows = "".join(_row(row, row[0] in best) for row in table.rows)
    return (
        f'<div class="scores" tabindex="0" role="region" aria-label="{_text(table.title)}"><table>'
        f"<caption>{_text(table.title)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(row: Sequence[str], is_best: bool) -> str:
    name, *scores = row
    cells = "".join(f"<td>{_text(score)}</td>" for score in scores)
    mark = " (best)" if is_best else ""
    return f'<tr{" class=best" if is_best else ""}><th scope="row">{_text(name)}{mark}</th>{cells}</tr>'


def _paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>"


def _text(text: object) -> str:
    return html.escape(str(text))
