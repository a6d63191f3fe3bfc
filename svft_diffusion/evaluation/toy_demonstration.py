"""Personalization on the embedded model from end to end: the settings, and the pictures before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

from svft_diffusion.evaluation.personalization import SubjectScores, score_pictures
from svft_diffusion.evaluation.toy_subjects import PROMPT_SCENES, ToySubject
from svft_diffusion.sampling.sample import generate
from svft_diffusion.toybox.world import SCENES

# Class pictures are drawn in all scenes: prior pictures that vary as the prompts do keep the scenes intact.
PLAIN_BACKGROUNDS = ("white", "gray", "blue")


def write_class_prompts(subject: ToySubject, path: Path) -> Path:
    """Save one prompt of the subject's class for every scene of the world, one a line."""
    return write_scene_prompts(subject.class_prompt, path)


def write_scene_prompts(prompt: str, path: Path) -> Path:
    """Save ``prompt`` with every scene of the world, one a line."""
    phrases = [phrases[0] for phrases in SCENES.values() if phrases]
    phrases += [f"on a {colour} background" for colour in PLAIN_BACKGROUNDS]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{prompt} {phrase}\n" for phrase in phrases), encoding="utf-8")
    return path


@dataclass(frozen=True)
class SubjectPictures:
    """Pictures of a subject in the scenes of the prompts: ``pictures[i]`` was asked for in ``scenes[i]``."""

    pictures: list[Image.Image]
    scenes: list[str]

    def of_seed(self, index: int) -> list[Image.Image]:
        """The pictures of one seed, one for every scene."""
        start = index * len(PROMPT_SCENES)
        return self.pictures[start : start + len(PROMPT_SCENES)]

    def scores(self, subject: ToySubject) -> SubjectScores:
        """What the readers say."""
        return score_pictures(self.pictures, self.scenes, subject)


def draw_subject(pipeline: DiffusionPipeline, subject: ToySubject, seeds: Sequence[int]) -> SubjectPictures:
    """The subject in every scene with every seed, with the adapters that the pipeline carries now."""
    scenes = [scene for _ in seeds for scene in PROMPT_SCENES]
    pictures = [generate(pipeline, subject.prompt(scene), seed=seed) for seed in seeds for scene in PROMPT_SCENES]
    return SubjectPictures(pictures, scenes)
