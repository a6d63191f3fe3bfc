"""``svft-diffusion compare``: the same subjects trained by many methods on equal terms, and a report on all."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from svft_diffusion.cli.arguments import Parser, add_settings, given_settings
from svft_diffusion.cli.train import check_settings_of_file, read_settings
from svft_diffusion.comparison.config import CompareConfig, check_config
from svft_diffusion.files.whole_files import check_writable
from svft_diffusion.settings import config_from_mapping
from svft_diffusion.terminal import json_text, printable

_DESCRIPTION = """\
Train the same subjects with many methods on equal terms, and report which draws them best for its size.

Ours and PEFT's methods, textual inversion and full fine-tuning train in the same loop on the embedded model's toy
subjects, each with a learning rate that was looked for in the same way on other subjects. The embedded model's own
readers judge.

Each training is a row of its own that is kept: the same command again goes on, and several processes at once share the
work. Write everything into the same --output_dir for all questions, and rows that they have in common are made once.
"""
_EPILOG = """examples:
  svft-diffusion compare --dry_run                                   # how many rows, and how long
  svft-diffusion compare --max_hours 2                               # the same again goes on
  svft-diffusion compare --question avf --num_seeds 1
  svft-diffusion compare --methods LoRA "SVFT plain" --num_subjects 2 --num_seeds 1
"""


def run(argv: Sequence[str]) -> None:
    """Measure rows and write the report."""
    parser = Parser(prog="svft-diffusion compare", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="settings from a file; those here win")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, and all else to stderr")
    add_settings(parser, CompareConfig)
    options = parser.parse_args(argv)
    from_file = read_settings(options.config) if options.config else {}
    check_settings_of_file(CompareConfig, from_file, options.config)
    config = config_from_mapping(CompareConfig, from_file | given_settings(CompareConfig, options))
    check_config(config)
    check_writable(config.output_dir)

    import torch

    from svft_diffusion.training.many.processes import stand_alone

    stand_alone()  # processes share the work by the folder alone
    torch.set_num_threads(config.threads)
    _work(config, as_json=options.json)


def _work(config: CompareConfig, *, as_json: bool) -> None:
    from svft_diffusion.comparison.plan import Plan
    from svft_diffusion.comparison.report import MARKDOWN_FILE, write_report
    from svft_diffusion.comparison.rows import Rows
    from svft_diffusion.comparison.work import Worker, estimate
    from svft_diffusion.training.many.record import Claims

    def say(text: str) -> None:
        print(printable(text), file=sys.stderr if as_json else sys.stdout, flush=True)

    plan = Plan(config)
    rows = Rows(config.output_dir, any_code=config.any_code)
    for one in plan.excluded:
        say(f"{one.name} takes no part ({one.budget}): {one.reason}")
    if config.dry_run:
        print(printable(estimate(plan, rows, say)))
        return
    finished = Worker(plan, rows, say).work()
    folder = config.output_dir / config.question
    with Claims(config.output_dir).claim_report():
        report = write_report(plan, rows, folder)
    if not finished:
        say(f"the time is over; {report['rows']['missing']} known rows are missing, and the same command goes on")
    if as_json:
        print(json_text(report))
        return
    for line in (folder / MARKDOWN_FILE).read_text(encoding="utf-8").splitlines():
        print(printable(line))
