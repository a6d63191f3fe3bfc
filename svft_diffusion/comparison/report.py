"""What a comparison leaves behind: all rows, the report as JSON and Markdown, plots, and a sheet of pictures."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svft_diffusion.comparison.plan import Plan
from svft_diffusion.comparison.plots import draw_plots
from svft_diffusion.comparison.questions import SECOND
from svft_diffusion.comparison.rows import Row, Rows, machine
from svft_diffusion.comparison.statistics import Line, Mean, lines_of, quality_by_effective_rank
from svft_diffusion.evaluation.personalization import subject_similarity
from svft_diffusion.files.whole_files import replace_when_whole
from svft_diffusion.markdown import table
from svft_diffusion.sampling.grid import labelled_grid

ROWS_FILE, JSON_FILE, MARKDOWN_FILE, SHEET_FILE = "rows.jsonl", "report.json", "report.md", "pictures.png"
_CELL = 96  # pixels of a picture in the sheet
_EXPLAINED = """\
Quality: mean over pictures of the identity reader's cosine with the photos, counted as 0 where the scene reader does
not see the scene that was asked for, and where training failed, such as by diverging; it chose the learning rates.
Other numbers are of what was drawn. Drift: 1 - cosine of pictures of class prompts without the subject, with and
without the adapter, same noise. In brackets: 95 % bootstrap intervals over subjects, of means over seeds. Bytes: of the
stored file. Step: median seconds of one optimizer step. Memory: counted bytes of trained values, gradients, optimizer
state, what the method adds to the model, and what the forward pass keeps."""


def write_report(plan: Plan, rows: Rows, folder: Path) -> dict[str, Any]:
    """Write everything into ``folder`` and return the content of ``report.json``.

    Raises:
        UserError: a file can't be written.
    """
    lines = lines_of(plan, rows)
    report = _content(plan, rows, lines)
    _write(folder / ROWS_FILE, "".join(json.dumps(row) + "\n" for row in _all_rows(plan, rows)))
    _write(folder / JSON_FILE, json.dumps(report, indent=1) + "\n")
    plots = draw_plots(lines, folder)
    sheet = _draw_sheet(plan, rows, folder / SHEET_FILE)
    _write(folder / MARKDOWN_FILE, _markdown(report, lines, [*plots, *([SHEET_FILE] if sheet else [])]))
    return report


def _content(plan: Plan, rows: Rows, lines: list[Line]) -> dict[str, Any]:
    known = {key: result for key, row in plan.all_rows(rows).items() if (result := rows.find(row)) is not None}
    rank = quality_by_effective_rank(plan, rows)
    photos = [subject.toy.photos() for subject in plan.subjects]
    views = [subject.toy.new_views() for subject in plan.subjects]
    strangers = [subject.toy.strangers() for subject in plan.subjects]
    return {
        "question": plan.question.name,
        "asks": plan.question.text,
        "machine": machine(),
        "threads": plan.config.threads,
        "code": sorted({result.code for result in known.values()}),
        "effort": dataclasses.asdict(plan.config.effort),
        "subjects": [subject.name for subject in plan.subjects],
        "seeds": plan.config.num_seeds,
        "learning_rates": {
            "factors": plan.config.lr_factors,
            "extensions": plan.config.lr_extensions,
            "subjects": plan.config.search_subjects,
            "finalists": plan.config.lr_finalists,
            "final_subjects": plan.config.final_search_subjects,
        },
        "budgets": plan.budgets,
        "scale": {
            "real new views": statistics.mean(subject_similarity(*pair) for pair in zip(views, photos, strict=True)),
            "other individuals": statistics.mean(
                subject_similarity(*pair) for pair in zip(strangers, photos, strict=True)
            ),
        },
        "rows": {"measured": len(known), "missing": len(plan.missing(rows))},
        "hours": round(sum(result.seconds for result in known.values()) / 3600, 3),
        "entries": [line.to_mapping() for line in lines],
        "quality_by_effective_rank": None if rank is None else dataclasses.asdict(rank),
        "excluded": [dataclasses.asdict(one) for one in plan.excluded],
        "without_learning_rate": [entry.name for entry in plan.entries if plan.search(entry, rows).best is None],
    }


def _all_rows(plan: Plan, rows: Rows) -> list[dict[str, Any]]:
    listed: dict[str, dict[str, Any]] = {}
    for entry in plan.entries:
        _list(listed, plan.search(entry, rows).rows, rows, entry.name, entry.budget, "search")
    for entry, rate in plan.settled(rows).items():
        _list(listed, plan.rows_of(entry, rate).values(), rows, entry.name, entry.budget, "comparison")
    return list(listed.values())


def _list(listed: dict[str, dict[str, Any]], wanted: Any, rows: Rows, name: str, budget: str, phase: str) -> None:
    row: Row
    for row in wanted:
        result = rows.find(row)
        if result is None:
            continue
        said = {"name": name, "budget": budget, "phase": phase, "key": row.key}
        listed[f"{phase} {name} {budget} {row.key}"] = said | row.content | dataclasses.asdict(result)


def _draw_sheet(plan: Plan, rows: Rows, path: Path) -> bool:
    """One picture of each subject by each entry, its first seed and scene; whether there is any."""
    pictures = [[subject.toy.photos()[0] for subject in plan.subjects]]
    labels = ["photo"]
    for entry, rate in plan.settled(rows).items():
        by_place = plan.rows_of(entry, rate)
        found = [rows.first_picture(by_place[subject, 0]) for subject in plan.subjects]
        if any(picture is not None for picture in found):
            pictures.append(found)  # type: ignore[arg-type]
            labels.append(f"{entry.name} ({entry.budget})")
    if len(pictures) == 1:
        return False
    sheet = labelled_grid(pictures, labels, [subject.name for subject in plan.subjects], cell=_CELL)
    with replace_when_whole(path) as unfinished:
        sheet.save(unfinished, format="PNG")
    return True


def _markdown(report: dict[str, Any], lines: list[Line], pictures: list[str]) -> str:
    parts = [f"# {report['asks']}", _facts(report)]
    for budget in dict.fromkeys(line.budget for line in lines):
        limit = report["budgets"].get(budget)
        of_budget = [line for line in lines if line.budget == budget]
        parts += [f"## Budget: {budget}" + (f" ({limit:,} bytes)" if limit else ""), _table(of_budget)]
        parts += [text for text in (_verdict(of_budget),) if text]
    if (rank := report["quality_by_effective_rank"]) is not None:
        parts.append(
            f"Rank correlation of quality with the growth of the effective rank, over the methods of a subject: "
            f"{_with_interval(Mean(**rank), sign='+')}."
        )
    parts += [_EXPLAINED, _rates(lines), _left_out(report, lines)]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(report: dict[str, Any]) -> str:
    effort, of_machine, search = report["effort"], report["machine"], report["learning_rates"]
    finals = f", the best {search['finalists']} rates on {search['final_subjects']}" if search["finalists"] > 1 else ""
    unfinished = f" {report['rows']['missing']} known rows are still missing." if report["rows"]["missing"] else ""
    return (
        f"{len(report['subjects'])} subjects that the embedded model has never seen x {report['seeds']} seeds, "
        f"{effort['steps']} steps of {effort['batch_size']} photos and as many class pictures, layers "
        f"{effort['targets']} of denoiser and text encoder where a name says no others; "
        f"{6 * effort['pictures']} pictures of each row, "
        f"{effort['inference_steps']} denoising steps. Everybody's learning rate was looked for alike, at "
        f"{' '.join(f'{factor:g}' for factor in search['factors'])} times its usual one and up to "
        f"{search['extensions']} times beyond, on {search['subjects']} other subjects{finals}. "
        f"{report['rows']['measured']} rows, {report['hours']:.1f} hours of one process with {report['threads']} CPU "
        f"thread(s) on {of_machine['processor']} "
        f"({of_machine['system']}), torch {of_machine['torch']}, diffusers {of_machine['diffusers']}, "
        f"PEFT {of_machine['peft']}, code {', '.join(report['code'])}.{unfinished}\n\n"
        f"On the scale of the similarity, real new views of the subjects have {report['scale']['real new views']:.3f}, "
        f"other individuals of their classes {report['scale']['other individuals']:.3f}."
    )


def _table(lines: list[Line]) -> str:
    references = list(dict.fromkeys(line.against for line in lines if line.against))
    titles = [
        "method",
        "quality",
        f"against {references[0]}" if len(references) == 1 else "against",
        "similarity",
        "scene",
        "class",
        "drift",
        "bytes",
        "step",
        "memory",
    ]
    changes = any("effective_rank_change" in line.costs for line in lines)
    if changes:
        titles.append("effective rank")
    best_first = sorted(lines, key=lambda line: -line.scores["quality"].mean if "quality" in line.scores else 1.0)
    rows = [_cells(line, changes) for line in best_first]
    if len(references) > 1:
        for line, row in zip(best_first, rows, strict=True):
            row[2] += f" ({line.against})" if row[2] else ""
    return table(titles, rows)


def _cells(line: Line, changes: bool) -> list[str]:
    def plain(score: str) -> str:
        return f"{round(line.scores[score].mean, 3) + 0.0:.3f}" if score in line.scores else ""  # never -0.000

    costs = line.costs
    cells = [
        f"**{line.name}**" if line.ours else line.name,
        _with_interval(line.scores.get("quality")),
        _with_interval(line.against_reference.get("quality"), sign="+"),
        *(plain(score) for score in ("subject_similarity", "scene_accuracy", "class_accuracy", "drift")),
        f"{costs['file_bytes']:,.0f}" if "file_bytes" in costs else "",
        f"{costs['step_seconds']:.3f} s" if "step_seconds" in costs else "",
        f"{costs['training_bytes'] / 1e6:.1f} MB" if "training_bytes" in costs else "",
    ]
    if changes:
        cells.append(f"{costs['effective_rank_change']:+.2f}" if "effective_rank_change" in costs else "")
    return cells


def _with_interval(mean: Mean | None, sign: str = "") -> str:
    return "" if mean is None else f"{mean.mean:{sign}.3f} [{mean.low:{sign}.3f}, {mean.high:{sign}.3f}]"


def _verdict(lines: list[Line]) -> str:
    """Where ours win and lose in quality, by intervals that leave zero out."""
    said = []
    for reference in dict.fromkeys(line.against for line in lines if line.against):
        said += _differences(reference, [line for line in lines if line.against == reference])
    known = [line for line in lines if "quality" in line.scores]
    spectral = [line for line in known if line.ours]
    rivals = [line for line in known if not line.ours]
    if spectral and rivals:
        best, rival = (max(group, key=lambda line: line.scores["quality"].mean) for group in (spectral, rivals))
        lead = best.scores["quality"].mean - rival.scores["quality"].mean
        said.append(f"* best of ours: {best.name}; best of the others: {rival.name}; ours {lead:+.3f}")
    return "\n".join(said)


def _differences(reference: str, lines: list[Line]) -> list[str]:
    """Who is better or worse than ``reference``, and of whom that can't be said."""
    found = [(line, line.against_reference["quality"]) for line in lines if "quality" in line.against_reference]
    said = []
    for word, kept in (("better", lambda mean: mean.low > 0), ("worse", lambda mean: mean.high < 0)):
        for whose, ours in (("ours", True), ("others", False)):
            names = [line.name for line, mean in found if line.ours == ours and kept(mean)]
            if names:
                said.append(f"* {word} than {reference} in quality, of {whose}: {', '.join(names)}")
    uncertain = [line.name for line, mean in found if mean.low <= 0 <= mean.high]
    if uncertain:
        said.append(f"* no difference from {reference} that the intervals show: {', '.join(uncertain)}")
    return said


def _rates(lines: list[Line]) -> str:
    searched = [line for line in lines if line.rates_tried and line.budget != SECOND]  # which keeps the first one's
    if not searched:
        return ""
    of_budgets = len({line.name for line in searched}) < len(searched)
    rows = [
        [
            f"{line.name} ({line.budget})" if of_budgets else line.name,
            f"{line.learning_rate:g}" + (" (at the edge)" if line.best_rate_at_edge else ""),
            _scores_of(line.rates_tried),
            _scores_of(line.rates_in_finals),
        ]
        for line in searched
    ]
    titles = ["method", "taken", "quality at first", "in the finals"]
    if not any(line.rates_in_finals for line in searched):
        titles, rows = titles[:-1], [row[:-1] for row in rows]
    return "## Learning rates\n\n" + table(titles, rows)


def _scores_of(rates: Mapping[float, float | None]) -> str:
    return ", ".join(
        f"{rate:g}: {'diverged' if score is None else f'{score:.3f}'}" for rate, score in sorted(rates.items())
    )


def _left_out(report: dict[str, Any], lines: list[Line]) -> str:
    said = [f"* {one['name']} ({one['budget']}): not applicable: {one['reason']}" for one in report["excluded"]]
    said += [f"* {name}: no learning rate yet" for name in report["without_learning_rate"]]
    for line in lines:
        if line.failed:
            said.append(f"* {line.name} ({line.budget}): {len(line.failed)} rows failed, such as: {line.failed[0]}")
        if line.missing:
            said.append(f"* {line.name} ({line.budget}): {line.missing} rows are not measured yet")
    return "## Left out\n\n" + "\n".join(said) if said else ""


def _write(path: Path, text: str) -> None:
    with replace_when_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
