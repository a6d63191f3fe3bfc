"""``svft-diffusion history``: the adapters that a run has kept of its steps, with their samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svft_diffusion.cli.arguments import Parser
from svft_diffusion.errors import UserError
from svft_diffusion.terminal import json_text, printable

if TYPE_CHECKING:
    from svft_diffusion.training.history import HistoryEntry

_DESCRIPTION = """\
List the adapters that a training run has kept in OUTPUT_DIR/history, and draw the samples of all steps side by side.

With --pick, copy one of them to a file of its own.
"""
_EPILOG = """examples:
  svft-diffusion history outputs/dog
  svft-diffusion history outputs/dog --pick 240 -o dog-240.safetensors
"""


def run(argv: Sequence[str]) -> None:
    """Run the command with its arguments.

    Raises:
        UserError: there is no history or no such step, or the output is there already.
    """
    options = _parser().parse_args(argv)

    # Heavy imports come after the arguments, so that --help and typing errors answer at once.
    from svft_diffusion.training.history import HISTORY_FOLDER, STRIP_FILE, pick, read_history, write_strip

    folder: Path = options.folder
    history = read_history(folder)
    if options.pick is not None:
        file = pick(
            history,
            options.pick,
            options.output or folder / f"adapter-step-{options.pick}.safetensors",
            overwrite=options.overwrite,
        )
        print(json_text({"step": options.pick, "output": str(file)}) if options.json else f"wrote {_shown(file)}")
        return
    if options.output is not None:
        raise UserError("-o names the copy of one adapter; say which with --pick STEP")
    strip = write_strip(folder, folder / HISTORY_FOLDER / STRIP_FILE)
    if options.json:
        print(
            json_text({"steps": [_facts(entry) for entry in history], "strip": None if strip is None else str(strip)})
        )
        return
    print("\n".join(_table(history)))
    hint = "no samples: they are drawn with --validation_prompt" if strip is None else f"samples: {_shown(strip)}"
    print(f"{hint}\nkeep one: svft-diffusion history {_shown(folder)} --pick STEP")


def _table(history: Sequence[HistoryEntry]) -> list[str]:
    lines = [f"{'step':>8}  {'kB':>8}  {'loss':>8}  {'norm':>8}  samples"]
    for entry in history:
        size = f"{entry.adapter.stat().st_size / 1000:.1f}"
        lines.append(
            f"{entry.step:>8}  {size:>8}  {_number(entry.loss):>8}  {_number(entry.value_norm):>8}  "
            f"{len(entry.samples) or '-'}"
        )
    return lines


def _facts(entry: HistoryEntry) -> dict[str, Any]:
    return {
        "step": entry.step,
        "adapter": str(entry.adapter),
        "bytes": entry.adapter.stat().st_size,
        "smoothed_loss": entry.loss,
        "value_norm": entry.value_norm,
        "samples": [str(path) for path in entry.samples],
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _shown(path: Path) -> str:
    return printable(str(path))


def _parser() -> Parser:
    parser = Parser(prog="svft-diffusion history", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("folder", type=Path, metavar="OUTPUT_DIR", help="the folder that a run was trained into")
    parser.add_argument("--pick", type=int, metavar="STEP", help="copy the adapter of this step")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where to (default: OUTPUT_DIR/adapter-step-STEP.safetensors)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser
