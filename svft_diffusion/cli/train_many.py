"""``svft-diffusion train-many``: one adapter for each subject of a list, from one loaded base model."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svft_diffusion.cli.arguments import Parser, add_settings, given_settings
from svft_diffusion.cli.train import check_settings_of_file, read_settings
from svft_diffusion.errors import UserError
from svft_diffusion.files.whole_files import check_writable
from svft_diffusion.terminal import json_text, printable
from svft_diffusion.training.config import TrainingConfig

if TYPE_CHECKING:
    from svft_diffusion.training.many.processes import Process
    from svft_diffusion.training.many.report import Report
    from svft_diffusion.training.many.worker import Job

_DESCRIPTION = """\
Train one adapter for each subject of a list, from one base model that is loaded once.

LIST is YAML, JSON or JSON lines (.jsonl); each row has a name, which is its folder in --output_dir, and any settings
of `train` that differ from those given here or in --config:

  - name: rex
    instance_data_dir: photos/rex        # paths in a row start at the list
    instance_prompt: a photo of sks dog
  - name: luna
    instance_data_dir: photos/luna
    instance_prompt: a photo of sks cat
    max_train_steps: 600

Or LIST is a folder: every folder in it is a row with its name and photos. In prompts and folders that are given here or
in --config, {name} is the name of the row: --instance_prompt "a photo of sks {name}".

The same command again goes on: finished rows are skipped, others resumed. Start it by accelerate launch, or several
times at once, and each process takes rows that no other has; --engine ray spreads them over machines.
The exit code is 0 if every row is finished or was stopped by a file in its folder, 1 if some are not, 2 if something
is wrong with the list or the base model.
"""
_EPILOG = """examples:
  svft-diffusion train-many subjects.yaml --output_dir outputs/subjects --max_train_steps 500
  accelerate launch --multi_gpu --num_processes 4 -m svft_diffusion train-many subjects.yaml \\
      --output_dir outputs/subjects
"""


def run(argv: Sequence[str]) -> None:
    """Train with the settings of the command line, which win over those of ``--config``, and of rows, which win over
    both.

    Raises:
        SystemExit: with 1, if a row failed, was refused or is left.
    """
    options = _parser().parse_args(argv)
    from_file = read_settings(options.config) if options.config else {}
    check_settings_of_file(TrainingConfig, from_file, options.config)
    shared = from_file | given_settings(TrainingConfig, options)
    if shared.get("output_dir") is None:
        raise UserError("no place for the adapters: give --output_dir FOLDER")
    if options.engine != "ray" and (options.ray_address is not None or options.ray_workers is not None):
        raise UserError("--ray_address and --ray_workers have no effect without --engine ray")
    if options.ray_workers is not None and options.ray_workers < 1:
        raise UserError(f"--ray_workers must be at least 1, got {options.ray_workers}")

    from svft_diffusion.training.many.processes import stand_alone

    process = stand_alone()
    output = Path(shared["output_dir"])
    with _messages(options.json):
        job = _job(options.list, shared, output, options.stop_on_error, process)
        if any(row.config.dry_run for row in job.rows):
            if process.index > 0:
                return
            result, code = _dry_run(job, options.json), 0
        elif options.engine == "ray":
            result, code = _summary(_with_ray(job, process, options), output, options.json)
        else:
            result, code = _summary(_alone(job, process), output, options.json)
    if process.index == 0:
        print(result)
    if code:
        raise SystemExit(code)


def _parser() -> Parser:
    parser = Parser(prog="svft-diffusion train-many", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("list", type=Path, metavar="LIST", help="YAML, JSON or JSON lines, or a folder of folders")
    parser.add_argument(
        "--config", type=Path, metavar="FILE.yaml", help="settings of all rows from a file; those here win"
    )
    parser.add_argument("--stop_on_error", action="store_true", help="leave the other rows alone once one has failed")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, and all else to stderr")
    parser.add_argument(
        "--engine", choices=("here", "ray"), default="here", help="here: the processes that run this command; ray: a "
        "Ray cluster, whose machines see LIST, photos and --output_dir under the same paths (default: here)",
    )  # fmt: skip
    parser.add_argument("--ray_address", help="the cluster (default: that of RAY_ADDRESS, else one on this machine)")
    parser.add_argument("--ray_workers", type=int, help="rows at a time (default: one for each GPU, else machine)")
    add_settings(parser, TrainingConfig)
    return parser


def _job(source: Path, shared: dict[str, Any], output: Path, stop_on_error: bool, process: Process) -> Job:
    """The rows, every one of which is checked.

    Raises:
        UserError: the list or one of its rows can't be; each problem is told on stderr first.
    """
    from svft_diffusion.training.many.listing import read_list
    from svft_diffusion.training.many.worker import Job, Worker

    listing = read_list(source, shared, output)
    check_writable(output)
    origin = source if source.is_dir() else source.parent
    job = Job(listing.rows, output, Path(os.path.abspath(origin)), stop_on_error)
    problems = listing.problems + Worker(job).check_rows()
    if problems:
        for problem in problems if process.index == 0 else []:
            print(printable(problem), file=sys.stderr)
        number = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{number} in {source}, see above; nothing was begun")
    return job


def _alone(job: Job, process: Process) -> Report:
    from svft_diffusion.training.many.worker import Worker

    place = f"process {process.index + 1}: " if process.count > 1 else ""

    def say(text: str) -> None:
        print(printable(f"{place}{text}"), flush=True)

    _make(job.output_dir)
    return Worker(job, say=say, quiet=process.index > 0).work()


def _with_ray(job: Job, process: Process, options: Any) -> Report:
    if process.count > 1:
        raise UserError("--engine ray starts its own processes; leave out accelerate launch")
    from svft_diffusion.training.many.ray_engine import train_with_ray

    _make(job.output_dir)
    return train_with_ray(job, address=options.ray_address, workers=options.ray_workers)


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"can't write to {output}: {problem.strerror or problem}") from problem


def _dry_run(job: Job, as_json: bool) -> str:
    from svft_diffusion.training.many.estimate import estimate

    result = estimate(job.rows)
    return json_text(result.to_mapping()) if as_json else result.in_words()


def _summary(report: Report, output: Path, as_json: bool) -> tuple[str, int]:
    from svft_diffusion.training.many.report import REPORT_MARKDOWN, exit_code_of

    counted = ", ".join(f"{count} {state}" for state, count in report.states.items())
    words = f"{counted}, {report.seconds:.0f} s; see {printable(str(output / REPORT_MARKDOWN))}"
    return json_text(report.to_mapping()) if as_json else words, exit_code_of(report)


@contextlib.contextmanager
def _messages(as_json: bool) -> Iterator[None]:
    """What is said on the way goes to stderr where stdout is for JSON."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield
