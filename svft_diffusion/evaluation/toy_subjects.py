"""Held-out individuals of the toy world: the subjects that demonstrations and measurements personalize to."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from svft_diffusion.toybox.world import (
    CLASSES,
    Individual,
    View,
    random_individual,
    random_view,
    render,
    scene_phrase,
)

TOKEN = "sks"
# Photos show the subject in these scenes, prompts ask for it in others.
PHOTO_SCENES = ("plain", "wood", "grass", "brick", "checker")
PROMPT_SCENES = ("beach", "snow", "night", "water", "desert", "sunset")


@dataclass(frozen=True)
class ToySubject:
    """An individual that no training picture showed, with the seed of its photos."""

    name: str
    individual: Individual
    seed: int

    @property
    def instance_prompt(self) -> str:
        return f"a photo of {TOKEN} {self.individual.class_name}"

    @property
    def class_prompt(self) -> str:
        return f"a photo of a {self.individual.class_name}"

    def prompt(self, scene: str) -> str:
        """The subject in a scene, such as ``a photo of sks robot on the beach``."""
        return f"{self.instance_prompt} {scene_phrase(self._view(scene, 0))}"

    def photo_views(self) -> list[View]:
        """The views of its five photos."""
        return [self._view(scene, number) for number, scene in enumerate(PHOTO_SCENES)]

    def photos(self) -> list[Image.Image]:
        """Its five photos, 64 x 64 pixels."""
        return [Image.fromarray(render(self.individual, view)) for view in self.photo_views()]

    def new_views(self, scenes: Sequence[str] = PROMPT_SCENES, each: int = 4) -> list[Image.Image]:
        """Real pictures of the subject in scenes where no photo shows it: the best an adapter could draw."""
        views = [self._view(scene, 100 + number) for scene in scenes for number in range(each)]
        return [Image.fromarray(render(self.individual, view)) for view in views]

    def strangers(self, scenes: Sequence[str] = PROMPT_SCENES, each: int = 4) -> list[Image.Image]:
        """Other individuals of the class in the same scenes: what a model that learned nothing could draw at best."""
        pictures = []
        for scene in scenes:
            for number in range(each):
                generator = random.Random(f"{self.seed} {scene} {number}")
                other = random_individual(generator, self.individual.class_name)
                pictures.append(Image.fromarray(render(other, self._view(scene, 200 + number))))
        return pictures

    def _view(self, scene: str, number: int) -> View:
        return random_view(random.Random(f"{self.seed} {scene} {number}"), scene, hat=False)


def demonstration_subject() -> ToySubject:
    """The subject of ``make demo``: a teal robot with orange parts and a pink heart; teal is outside the palette."""
    robot = Individual(
        class_name="robot",
        body_name=None,
        body=(30, 170, 170),
        parts=(245, 120, 60),
        details=(250, 230, 80),
        pattern="plain",
        pattern_colour=(240, 240, 238),
        pattern_frequency=4.0,
        pattern_angle=0.0,
        emblem="heart",
        emblem_colour=(235, 50, 110),
        proportions=(0.8, 0.7, 0.9, 0.1, 0.9, 0.9),
    )
    return ToySubject("teal robot", robot, seed=77)


def held_out_subjects(count: int) -> list[ToySubject]:
    """``count`` subjects over all classes, half of them with bodies outside the palette."""
    subjects = []
    for number in range(count):
        generator = random.Random(500 + number)
        class_name = CLASSES[number % len(CLASSES)]
        individual = random_individual(generator, class_name, off_palette=1.0 if number % 2 else 0.0)
        subjects.append(ToySubject(f"{class_name} {number}", individual, seed=500 + number))
    return subjects


def write_photos(subject: ToySubject, folder: Path, *, captions: bool = False) -> list[Path]:
    """Save a subject's photos as ``01.png`` ...; with ``captions`` each with a ``.txt`` that names its scene."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (photo, view) in enumerate(zip(subject.photos(), subject.photo_views(), strict=True), start=1):
        path = folder / f"{number:02d}.png"
        photo.save(path)
        if captions:
            text = f"{subject.instance_prompt} {scene_phrase(view)}\n"
            path.with_suffix(".txt").write_text(text, encoding="utf-8")
        paths.append(path)
    return paths
