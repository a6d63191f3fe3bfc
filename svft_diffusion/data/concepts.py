"""Several subjects in one run: the list of their photos and prompts, as a JSON or YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from svft_diffusion.errors import UserError
from svft_diffusion.settings import config_from_mapping, setting


@dataclass(frozen=True)
class Concept:
    """One subject: where its photos are and what it is called. Names are those of custom_diffusion's list."""

    instance_data_dir: Path | None = setting(None, "folder with the photos of the subject")
    instance_prompt: str | None = setting(None, "prompt of the photos")
    class_data_dir: Path | None = setting(None, "folder of class pictures")
    class_prompt: str | None = setting(None, "prompt of the class pictures")


def read_concepts(file: Path) -> list[Concept]:
    """The subjects in a list; every one has photos and a prompt.

    Raises:
        UserError: no such file, no list of mappings, an unknown key (with the nearest known one), a key missing, or
            two subjects with the same photos or the same prompt.
    """
    try:
        # Every JSON text is YAML too.
        listed = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except OSError as problem:
        raise UserError(f"can't read --concepts_list {file}: {problem.strerror or problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as problem:  # ValueError: no UTF-8, or no such date
        raise UserError(f"--concepts_list {file} is neither JSON nor YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(listed, list) or not listed:
        raise UserError(
            f"--concepts_list {file} must hold a list of subjects, each with instance_prompt and instance_data_dir"
        )
    concepts = [_concept(item, f"--concepts_list {file}, subject {number}") for number, item in enumerate(listed, 1)]
    _check_distinct(concepts, file)
    return concepts


def _concept(item: object, place: str) -> Concept:
    if not isinstance(item, dict):
        raise UserError(f"{place}: expected instance_prompt, instance_data_dir and so on, got a {type(item).__name__}")
    try:
        concept = config_from_mapping(Concept, item)
    except UserError as problem:
        raise UserError(f"{place}: {problem}") from None
    for name in ("instance_prompt", "instance_data_dir"):
        if not str(getattr(concept, name) or "").strip():
            raise UserError(f"{place}: {name} is missing")
    return concept


def _check_distinct(concepts: list[Concept], file: Path) -> None:
    folders: dict[Path, int] = {}
    prompts: dict[str, int] = {}
    for number, concept in enumerate(concepts, 1):
        assert concept.instance_data_dir is not None and concept.instance_prompt is not None  # `_concept`
        folder, prompt = concept.instance_data_dir.resolve(), concept.instance_prompt.strip()
        if (other := folders.setdefault(folder, number)) != number:
            raise UserError(f"--concepts_list {file}: subjects {other} and {number} have the same photos")
        if (other := prompts.setdefault(prompt, number)) != number:
            raise UserError(
                f"--concepts_list {file}: subjects {other} and {number} have the same instance_prompt, so that nothing "
                "tells them apart; give each its own rare word"
            )
