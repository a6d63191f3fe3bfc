"""The results as JSON and as Markdown."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.adapters.config import BenchmarkConfig
from benchmarks.adapters.contenders import FLOOR, LORA
from benchmarks.adapters.results import Result, Verdict, extra_saved, find
from benchmarks.adapters.timing import median_ratio, ratios

_NOTE = (
    "One run; contenders take turns and the ratios are medians over the rounds, smallest and largest in brackets. "
    "Every contender has its own modules over one set of base weights. Saved: bytes kept for backward in storages that "
    "the model does not hold anyway. Held: what the modules keep between steps beyond the base model (adapters, "
    "singular factors, weights rebuilt once in a step). The community SVDiff and the official SVFT are re-derived "
    "from their formulas, see benchmarks/adapters/peers.py."
)


def machine() -> dict[str, object]:
    """What the figures depend on."""
    names = ("torch", "diffusers", "peft", "transformers")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def write_report(
    config: BenchmarkConfig, results: Sequence[Result], verdicts: Sequence[Verdict], described: dict[str, object]
) -> str:
    """Write ``results.json`` and ``results.md`` into the output folder; return the Markdown."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    data = {
        "machine": described,
        "settings": {name: str(value) for name, value in asdict(config).items()},
        "results": [asdict(result) for result in results],
        "bars": [{**asdict(verdict.bar), "measured": verdict.measured, "holds": verdict.holds} for verdict in verdicts],
    }
    (config.output_dir / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    text = markdown(results, verdicts, described)
    (config.output_dir / "results.md").write_text(text, encoding="utf-8")
    return text


def markdown(results: Sequence[Result], verdicts: Sequence[Verdict], described: dict[str, object]) -> str:
    """The whole report: machine, bars, one table for each case."""
    lines = ["# Adapter benchmark", "", ", ".join(f"{key} {value}" for key, value in described.items()), "", _NOTE, ""]
    if verdicts:
        lines += ["## Bars", "", *_bar_table(verdicts), ""]
    for section, case in dict.fromkeys((result.section, result.case) for result in results):
        rows = [result for result in results if (result.section, result.case) == (section, case)]
        lines += [f"## {section}: {case}", "", *_case_table(rows), ""]
    return "\n".join(lines)


def _bar_table(verdicts: Sequence[Verdict]) -> list[str]:
    lines = ["| section | case | what | bar | measured | holds |", "|" + " --- |" * 6]
    for verdict in verdicts:
        bar = verdict.bar
        what = bar.contender + (f" / {bar.reference}" if bar.reference else "")
        quantity = "" if bar.quantity == "seconds" else f" ({bar.quantity})"
        limit = f"≤ {bar.limit:g}" if bar.at_least is None else f"{bar.at_least:g} to {bar.limit:g}"
        limit += " s" if bar.reference is None and bar.quantity == "seconds" else ""
        lines.append(
            f"| {bar.section} | {bar.case} | {what}{quantity} | {limit} | {verdict.measured:.3g} | "
            f"{'yes' if verdict.holds else '**no**'} |"
        )
    return lines


def _case_table(rows: Sequence[Result]) -> list[str]:
    """One row for each contender; the columns that the case has."""
    first = rows[0]
    reference = find(rows, first.section, first.case, LORA) or first
    floor = find(rows, first.section, first.case, FLOOR)
    columns = ["contender"]
    timed = any(row.seconds for row in rows)
    if timed:
        columns += ["ms", f"time / {reference.contender}"]
    columns += [f"{kind} MB" for kind in first.memory]
    if floor is not None and "saved" in first.memory:
        columns += ["saved beyond the base, MB", f"the same / {reference.contender}"]
    figures = list(dict.fromkeys(name for row in rows for name in row.figures))
    columns += figures
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [row.contender]
        if timed:
            cells += _time_cells(row, reference)
        cells += [f"{number / 1e6:.2f}" for number in row.memory.values()]
        if floor is not None and "saved" in row.memory:
            extra, usual = extra_saved(row, floor), extra_saved(reference, floor)
            # A convolution keeps its input anyway: what LoRA adds to that is next to nothing.
            comparable = usual > 0.01 * reference.memory["saved"]
            cells += [f"{extra / 1e6:.2f}", f"{extra / usual:.3f}" if comparable else ""]
        cells += [f"{row.figures[name]:.3g}" if name in row.figures else "" for name in figures]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _time_cells(row: Result, reference: Result) -> list[str]:
    if not row.seconds:
        return ["", ""]
    spread = ratios(row.seconds, reference.seconds)
    return [
        f"{statistics.median(row.seconds) * 1000:.4g}",
        f"{median_ratio(row.seconds, reference.seconds):.3f} [{min(spread):.2f}, {max(spread):.2f}]",
    ]


def _processor() -> str:
    """The processor's name where the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
