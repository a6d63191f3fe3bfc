"""Several subjects in one run: the list of their photos and prompts, as a JSON or YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svft_diffusion.errors import UserError
from svft_diffusion.settings import setting
from svft_diffusion.structured_files import read_rows


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
    needed = ("instance_prompt", "instance_data_dir")
    concepts = read_rows(file, "--concepts_list", "subject", Concept, needed=needed)
    _check_distinct(concepts, file)
    return concepts


def _check_distinct(concepts: list[Concept], file: Path) -> None:
    folders: dict[Path, int] = {}
    prompts: dict[str, int] = {}
    for number, concept in enumerate(concepts, 1):
        assert concept.instance_data_dir is not None and concept.instance_prompt is not None  # `read_rows`
        folder, prompt = concept.instance_data_dir.resolve(), concept.instance_prompt.strip()
        if (other := folders.setdefault(folder, number)) != number:
            raise UserError(f"--concepts_list {file}: subjects {other} and {number} have the same photos")
        if (other := prompts.setdefault(prompt, number)) != number:
            raise UserError(
                f"--concepts_list {file}: subjects {other} and {number} have the same instance_prompt, so that nothing "
                "tells them apart; give each its own rare word"
            )
