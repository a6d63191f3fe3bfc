"""Lists of a run's pictures: ``index.csv`` for programs, ``index.html`` to open in a browser, without any server."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape, unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from svft_diffusion.files.whole_files import replace_when_whole
from svft_diffusion.sampling.parameters import adapters_text

CSV_FILE = "index.csv"
HTML_FILE = "index.html"

_COLUMNS = (
    "file", "prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "scheduler",
    "scheduler_option", "adapters", "base", "dtype", "width", "height",
    "blacked_out",
)  # fmt: skip
_BEGINNING = (
    '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="generator" content="svft_diffusion">'
)
_LINK = re.compile(r'<a href="([^"]*)"><img ')
_STYLE = """\
:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif }
body { margin: 1rem }
form { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; margin-bottom: 1rem }
select { font: inherit; max-width: 90vw }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); gap: 1rem }
figure { margin: 0; overflow-wrap: anywhere; content-visibility: auto; contain-intrinsic-size: auto 20rem }
img { width: 100%; height: auto; background: #8884 }
figcaption { font-size: .85rem; white-space: pre-wrap }
"""


def pictures_of_index(file: Path) -> set[str] | None:
    """Names of the pictures that a file of `write_index` lists; None for a file of somebody else."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if file.suffix == ".html":
        links = _LINK.findall(text)
        return {unquote(unescape(link)) for link in links} if text.startswith(_BEGINNING) else None
    if not text.startswith(",".join(_COLUMNS[:-1])):
        return None
    longest = csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a prompt may be of any length
    try:
        return {row["file"] for row in csv.DictReader(io.StringIO(text, newline=""))}
    except csv.Error:
        return None
    finally:
        csv.field_size_limit(longest)


def write_index(output_dir: Path, pictures: Sequence[tuple[str, Mapping[str, Any]]]) -> Path:
    """Write both lists of ``pictures``, names of files in ``output_dir`` with their settings; the page's path.

    Raises:
        UserError: they can't be written.
    """
    rows = [_row(name, settings) for name, settings in pictures]
    _write(output_dir / CSV_FILE, _csv(rows))
    return _write(output_dir / HTML_FILE, _html(rows))


def count_of(pictures: Sequence[object]) -> str:
    """``1 picture`` or ``2 pictures``."""
    return f"{len(pictures)} picture{'' if len(pictures) == 1 else 's'}"


def _row(name: str, settings: Mapping[str, Any]) -> dict[str, str]:
    told = {column: settings.get(column) for column in _COLUMNS}
    told |= {"file": name, "adapters": adapters_text(settings.get("adapters", ()))}
    return {column: "" if value is None else str(value) for column, value in told.items()}


def _csv(rows: Iterable[Mapping[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _html(rows: Sequence[Mapping[str, str]]) -> str:
    """A page of figures; two menus hide those of other prompts and adapters, by style rules alone."""
    filters = {
        column: {value: number for number, value in enumerate(dict.fromkeys(row[column] for row in rows))}
        for column in ("prompt", "adapters")
    }
    rules, menus = [], []
    for column, numbers in filters.items():
        options = "".join(
            f'<option value="{number}">{escape(_short(value) or "none")}</option>' for value, number in numbers.items()
        )
        menus.append(f'<label>{column} <select id="{column}"><option value="">all</option>{options}</select></label>')
        rules += [
            f'body:has(#{column} option[value="{number}"]:checked) figure:not([data-{column}="{number}"]) '
            "{ display: none }"
            for number in numbers.values()
        ]
    figures = [_figure(row, {column: numbers[row[column]] for column, numbers in filters.items()}) for row in rows]
    return "\n".join(
        [
            _BEGINNING,
            '<meta name="viewport" content="width=device-width">',
            f"<title>{count_of(rows)}</title>",
            f"<style>\n{_STYLE}{chr(10).join(rules)}\n</style>",
            f'<form>{" ".join(menus)} <a href="{CSV_FILE}">{CSV_FILE}</a></form>',
            "<main>",
            *figures,
            "</main>",
            "</html>\n",
        ]
    )


def _figure(row: Mapping[str, str], numbers: Mapping[str, int]) -> str:
    data = "".join(f' data-{column}="{number}"' for column, number in numbers.items())
    scheduler = row["scheduler_option"] or row["scheduler"]
    facts = f"seed {row['seed']}, {row['num_inference_steps']} steps, guidance {row['guidance_scale']}, {scheduler}"
    parts = [
        row["prompt"],
        f"without {row['negative_prompt']}" if row["negative_prompt"] else "",
        row["adapters"],
        facts,
        "blacked out by the safety checker" if row["blacked_out"] else "",
    ]
    caption = escape("\n".join(part for part in parts if part))
    address = escape(quote(row["file"]))
    size = f'width="{escape(row["width"])}" height="{escape(row["height"])}"'
    picture = f'<img src="{address}" alt="{escape(_short(row["prompt"]))}" {size} loading="lazy">'
    return f'<figure{data}><a href="{address}">{picture}</a><figcaption>{caption}</figcaption></figure>'


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:119]}…"


def _write(file: Path, text: str) -> Path:
    with replace_when_whole(file) as unfinished:
        # A lone surrogate, which no file can hold, becomes a question mark.
        unfinished.write_bytes(text.encode("utf-8", "replace"))
    return file
