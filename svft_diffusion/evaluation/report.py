"""What an evaluation found, as ``report.json``: equal work gives equal bytes, since it holds no time and no folder."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.intervals import bootstrap_interval
from svft_diffusion.evaluation.scoring import Scores
from svft_diffusion.files.header import library_versions
from svft_diffusion.files.whole_files import replace_when_whole

REPORT_FILE = "report.json"
FORMAT_VERSION = 1
_DIGITS = 6


@dataclass(frozen=True)
class SubjectFacts:
    """A subject, and how its photos look to each other."""

    name: str
    kind: str | None  # live, object, or nobody said
    token: str | None
    class_word: str | None
    prompt_source: str | None  # the list's name, or its file's; None of pictures that exist
    prompts: list[str]  # with the token
    photos: dict[str, str]  # name -> SHA-256
    photo_scores: Scores  # the most that subject fidelity should be


@dataclass(frozen=True)
class ScoredRow:
    """One adapter, or one folder of pictures, on one subject."""

    subject: str
    label: str
    step: int | None  # of the run whose history was scored
    sha256: str | None  # of the adapter
    weight: float | None
    pictures: int
    class_pictures: int
    scores: Scores


@dataclass(frozen=True)
class SummaryRow:
    """Means over subjects."""

    group: str  # all, live or object
    subjects: int
    means: Scores
    intervals: dict[str, tuple[float, float] | None]  # 95 %, over subjects; None of fewer than two


@dataclass(frozen=True)
class EvaluationReport:
    """All of it."""

    base: str | None
    base_fingerprint: str | None
    settings: dict[str, Any]
    backbones: list[dict[str, str]]
    titles: dict[str, str]  # column key -> title, in the order of a table
    subjects: list[SubjectFacts]
    rows: list[ScoredRow]
    summary: list[SummaryRow]
    best: dict[str, str]  # subject -> label of its best row, where there are several
    best_rule: str
    deciding: tuple[str, str] | None  # the columns that it looks at
    notes: list[str]
    libraries: dict[str, str]
    machine: dict[str, str]
    format_version: int = FORMAT_VERSION


def summarize(rows: Sequence[ScoredRow], kinds: dict[str, str | None]) -> list[SummaryRow]:
    """Means over the subjects of a list, all and of each kind, with intervals; one row for each subject.

    A column counts where every subject of the group has it.
    """
    groups = {"all": list(rows)}
    for kind in sorted({kind for kind in kinds.values() if kind is not None}):
        groups[kind] = [row for row in rows if kinds[row.subject] == kind]
    return [_summary(group, members) for group, members in groups.items()]


def write_report(report: EvaluationReport, folder: Path) -> Path:
    """Write ``report.json``.

    Raises:
        UserError: it can't be written.
    """
    file = folder / REPORT_FILE
    text = json.dumps(dataclasses.asdict(report), indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False)
    with replace_when_whole(file) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8", newline="\n")
    return file


def read_report(path: Path) -> EvaluationReport:
    """The report in a file, or in a folder.

    Raises:
        UserError: no such file, or no report of this version.
    """
    file = path / REPORT_FILE if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return _from_json(values)
    except OSError as problem:
        raise UserError(f"can't read {file}: {problem.strerror or problem}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise UserError(f"{file} is no report of svft-diffusion evaluate: {' '.join(str(problem).split())}") from None


def machine_facts(device: str) -> dict[str, str]:
    """What the last digits of scores may depend on."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "device": device if not device.startswith("cuda") else torch.cuda.get_device_name(torch.device(device)),
        "threads": str(torch.get_num_threads()),
    }


def library_facts() -> dict[str, str]:
    """Versions of the libraries that draw, resize and judge."""
    versions = library_versions()
    for library in ("pillow", "numpy", "lpips"):
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def _summary(group: str, rows: Sequence[ScoredRow]) -> SummaryRow:
    columns: dict[str, list[float]] = {}
    for key in rows[0].scores:
        values = [value for row in rows if (value := row.scores.get(key)) is not None]
        if len(values) == len(rows):
            columns[key] = values
    means: Scores = {key: round(sum(values) / len(values), _DIGITS) for key, values in columns.items()}
    return SummaryRow(group, len(rows), means, {key: _interval(values) for key, values in columns.items()})


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    low, high = bootstrap_interval(values)
    return round(low, _DIGITS), round(high, _DIGITS)


def _from_json(values: dict[str, Any]) -> EvaluationReport:
    if values["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {values['format_version']}")
    summary = [
        SummaryRow(
            **{
                **row,
                "intervals": {key: None if ends is None else tuple(ends) for key, ends in row["intervals"].items()},
            }
        )
        for row in values["summary"]
    ]
    return EvaluationReport(
        **{
            **values,
            "subjects": [SubjectFacts(**subject) for subject in values["subjects"]],
            "rows": [ScoredRow(**row) for row in values["rows"]],
            "summary": summary,
            "deciding": None if values["deciding"] is None else tuple(values["deciding"]),
        }
    )
