"""``svft-diffusion evaluate``: how well adapters draw their subject, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svft_diffusion.cli.arguments import Parser, add_settings, config_from_options
from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.config import EvaluationConfig, check_config
from svft_diffusion.terminal import printable

if TYPE_CHECKING:
    from svft_diffusion.evaluation.subjects import Candidate, SubjectSource

_DESCRIPTION = """\
Score adapters by the protocol of DreamBooth: subject fidelity, prompt fidelity, prior preservation and diversity, and
the drift of the class against the base model. Missing pictures are drawn; those that are there are not drawn again.
"""
_EPILOG = """examples:
  svft-diffusion evaluate --run outputs/robot
  svft-diffusion evaluate --adapter robot.safetensors:0.8 --instance_data_dir photos --num_images 1
  svft-diffusion evaluate --pictures outputs/samples/001 --instance_data_dir photos --token sks
  svft-diffusion evaluate --subjects subjects.yaml --backbone dino-vits16 clip-vit-b32=models/clip
  accelerate launch --multi_gpu --num_processes 2 -m svft_diffusion evaluate --run outputs/robot --output_dir scores
"""


def run(argv: Sequence[str]) -> None:
    """Run the command with its arguments.

    Raises:
        UserError: see `svft_diffusion.evaluation.evaluate.evaluate`.
    """
    parser = Parser(prog="svft-diffusion evaluate", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_settings(parser, EvaluationConfig)
    options = parser.parse_args(argv)
    config = config_from_options(EvaluationConfig, options)
    check_config(config)

    # Heavy imports come after the arguments, so that --help and typing errors answer at once.
    from svft_diffusion.evaluation.evaluate import evaluate
    from svft_diffusion.evaluation.report import REPORT_FILE
    from svft_diffusion.evaluation.report_page import PAGE_FILE, result_lines

    result = evaluate(config, _sources(config))
    if result is None:
        return  # the first process tells about all
    if options.json:
        print((result.output_dir / REPORT_FILE).read_text(encoding="utf-8"), end="")
        return
    lines = [*result_lines(result.report), *(f"note: {note}" for note in result.report.notes)]
    print("\n".join(map(printable, [*lines, f"all of it: {result.output_dir / PAGE_FILE}"])))


def _sources(config: EvaluationConfig) -> list[SubjectSource]:
    """What was asked for as subjects."""
    from svft_diffusion.evaluation.subjects import SubjectSource

    if config.subjects is not None:
        return _listed(config.subjects)
    if config.pictures is not None:
        if config.instance_data_dir is None:
            raise UserError("--pictures needs the real photos beside them: --instance_data_dir")
        candidates: list[Candidate] = []
        photos = config.instance_data_dir
    else:
        candidates = _history(config.run) if config.run is not None else _adapters(config.adapter)
        folders = [config.run] if config.run is not None else [one.choice.file.parent for one in candidates]
        photos = config.instance_data_dir or _photos_of_training(folders)
    return [
        SubjectSource(
            name=config.class_word or "subject",
            candidates=candidates,
            instance_data_dir=photos,
            pictures=config.pictures,
            token=config.token,
            class_word=config.class_word,
        )
    ]


def _listed(file: Path) -> list[SubjectSource]:
    from svft_diffusion.evaluation.subjects import SubjectSource, read_subjects

    sources = []
    for subject in read_subjects(file):
        assert subject.name is not None and subject.instance_data_dir is not None  # `read_subjects`
        sources.append(
            SubjectSource(
                name=subject.name,
                candidates=_adapters([] if subject.adapter is None else [subject.adapter]),
                instance_data_dir=subject.instance_data_dir,
                pictures=subject.pictures,
                kind=subject.kind,
                token=subject.token,
                class_word=subject.class_word,
                prompts=subject.prompts,
            )
        )
    return sources


def _adapters(texts: Sequence[str]) -> list[Candidate]:
    from svft_diffusion.evaluation.subjects import Candidate
    from svft_diffusion.files import read_header
    from svft_diffusion.sampling.adapter_choice import adapter_label, parse_adapter_choice

    candidates = []
    for text in texts:
        choice = parse_adapter_choice(text)
        read_header(choice.file)  # before anything else is asked about a file that is no adapter
        at_weight = "" if choice.weight == 1 else f" at {choice.weight:g}"
        candidates.append(Candidate(choice, f"{adapter_label(choice.file)}{at_weight}"))
    labels = [candidate.label for candidate in candidates]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"two adapters would both be called {twice!r} in the report; rename a file")
    return candidates


def _history(folder: Path) -> list[Candidate]:
    from svft_diffusion.evaluation.subjects import Candidate
    from svft_diffusion.sampling.adapter_choice import AdapterChoice
    from svft_diffusion.training.history import read_history

    return [Candidate(AdapterChoice(entry.adapter), f"step {entry.step}", entry.step) for entry in read_history(folder)]


def _photos_of_training(folders: Sequence[Path]) -> Path:
    """The photos that the trainings in ``folders`` used.

    Raises:
        UserError: nothing there tells them, or they used different ones.
    """
    found = list(dict.fromkeys(map(_photos_in_settings, folders)))
    if len(found) > 1:
        raise UserError(
            f"the adapters were trained on different photos, {found[0]} and {found[1]}: if they are of one subject, "
            "give --instance_data_dir; else list them with --subjects"
        )
    if not found[0].is_dir():
        raise UserError(
            f"the photos of the training are not at {found[0]}; say with --instance_data_dir where they are"
        )
    return found[0]


def _photos_in_settings(folder: Path) -> Path:
    from svft_diffusion.cli.train import read_settings
    from svft_diffusion.training.card import CONFIG_FILE

    file = folder / CONFIG_FILE
    photos = read_settings(file).get("instance_data_dir") if file.is_file() else None
    if not isinstance(photos, str):
        raise UserError("say with --instance_data_dir where the real photos of the subject are")
    return Path(photos)
