"""The console script: finds the command's module, runs it, and turns a user's error into one line and exit code 2."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence

from svft_diffusion.errors import Interrupted, UserError
from svft_diffusion.settings import nearest_hint
from svft_diffusion.terminal import printable

# Command -> (module with ``run(argv)``, what it does). Modules are imported only when their command runs.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("svft_diffusion.cli.train", "train an adapter on a few photos of a subject (DreamBooth)"),
    "train-many": ("svft_diffusion.cli.train_many", "train an adapter for each subject of a list, on one loaded base"),
    "history": ("svft_diffusion.cli.history", "list the adapters of a run's steps with their samples, and pick one"),
    "sample": ("svft_diffusion.cli.sample", "generate pictures with any number of adapters"),
    "edit": ("svft_diffusion.cli.edit", "edit one picture: by a new description, or behind a mask"),
    "evaluate": ("svft_diffusion.cli.evaluate", "score adapters: subject and prompt fidelity, diversity, drift"),
    "inspect": ("svft_diffusion.cli.inspect", "show what an adapter, or a picture that carries one, is"),
    "verify": ("svft_diffusion.cli.verify", "check that adapters are sound, and that they fit a base model"),
    "export": ("svft_diffusion.cli.export", "write an adapter as a LoRA file that other tools read"),
    "import": ("svft_diffusion.cli.import_adapter", "turn an adapter of another tool into one of ours"),
    "merge": ("svft_diffusion.cli.merge", "bake adapters into a complete model"),
    "shrink": ("svft_diffusion.cli.shrink", "keep the part of an adapter that matters most, in a smaller file"),
    "blend": ("svft_diffusion.cli.blend", "make one adapter of several, and show how they interfere"),
    "compare": ("svft_diffusion.cli.compare", "train the same subjects with many methods, and report which is best"),
    "check-photos": ("svft_diffusion.cli.check_photos", "look at a folder of photos before training on them"),
    "app": ("svft_diffusion.cli.app", "open the web app"),
    "demo": ("svft_diffusion.cli.demo", "train and sample on the embedded model, and show the result"),
}

_BROKEN_PIPE = 141  # what a shell says of a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``svft-diffusion COMMAND ...`` and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    command = arguments[0]
    if command == "--version":
        from svft_diffusion import __version__

        print(__version__)
        return 0
    if command not in COMMANDS:
        print(f"error: unknown command {command!r}{nearest_hint(command, COMMANDS)}", file=sys.stderr)
        return 2
    return run_command(command, arguments[1:])


def run_command(command: str, arguments: Sequence[str]) -> int:
    """Run one command with its arguments; the scripts at the top of the repository call this too."""
    # Their notices on optional packages would bury ours; who wants them sets the variables.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # a line for each time that it asks again
    if isinstance(sys.stdout, io.TextIOWrapper):  # a redirected one on Windows holds few letters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        importlib.import_module(COMMANDS[command][0]).run(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)  # messages quote names from files of others
        return 2
    except Interrupted as request:
        return _interrupted(str(request), request.exit_code)
    except KeyboardInterrupt:
        return _interrupted("interrupted", 130)
    except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
        _drop_what_nobody_reads()
        return _BROKEN_PIPE
    return 0


def _interrupted(message: str, exit_code: int) -> int:
    with contextlib.suppress(OSError):  # Ctrl-C has ended a reader of the output, such as `tee`, too
        print(message, file=sys.stderr)
    _drop_what_nobody_reads()
    return exit_code


def _drop_what_nobody_reads() -> None:
    """Python flushes the output at its end, and would change the exit code if that failed."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _overview() -> str:
    lines = ["usage: svft-diffusion COMMAND [--help]", "", "commands:"]
    lines += [f"  {name:<{max(map(len, COMMANDS))}} {description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join(lines)
