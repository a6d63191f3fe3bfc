"""The subjects of a comparison: held-out individuals of the embedded model's world, with what every method is given."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from svft_diffusion.comparison.drawing import draw_together
from svft_diffusion.evaluation.toy_demonstration import write_class_prompts
from svft_diffusion.evaluation.toy_subjects import PROMPT_SCENES, TOKEN, ToySubject, held_out_subjects, write_photos
from svft_diffusion.models import EMBEDDED_MODEL, load_pipeline
from svft_diffusion.toybox.world import CLASSES

_FIRST_FOR_SEARCH = 100  # far behind all that anybody compares with


@dataclass(frozen=True)
class ComparedSubject:
    """A subject by its number among the held-out ones."""

    number: int

    @property
    def toy(self) -> ToySubject:
        """The individual with its photos."""
        return _toy(self.number)

    @property
    def name(self) -> str:
        return self.toy.name

    @property
    def class_name(self) -> str:
        return self.toy.individual.class_name

    def prompt_with(self, word: str) -> str:
        """The instance prompt with another word for the subject."""
        return _with_word(self.toy.instance_prompt, word)

    def prompts(self, word: str) -> list[tuple[str, str]]:
        """Every scene and its prompt."""
        return [(scene, _with_word(self.toy.prompt(scene), word)) for scene in PROMPT_SCENES]

    def write_photos(self, folder: Path, word: str) -> Path:
        """The five photos with captions, written into ``folder``."""
        for photo in write_photos(self.toy, folder, captions=True):
            caption = photo.with_suffix(".txt")
            caption.write_text(_with_word(caption.read_text(encoding="utf-8"), word), encoding="utf-8")
        return folder

    def write_class_prompts(self, file: Path) -> Path:
        """The prompts of the class pictures."""
        return write_class_prompts(self.toy, file)

    def drift_prompts(self) -> list[str]:
        """Prompts without the subject, which an adapter should leave alone: its own class, and two others in turn."""
        own = CLASSES.index(self.class_name)
        classes = [CLASSES[(own + shift) % len(CLASSES)] for shift in (0, 1, 0, 2, 0, 1)]
        own_prompts = [prompt for _, prompt in self.prompts(TOKEN)]
        instance = self.toy.instance_prompt
        return [
            prompt.replace(instance, f"a photo of a {name}") for prompt, name in zip(own_prompts, classes, strict=True)
        ]

    def base_pictures(self, inference_steps: int, guidance_scale: float) -> list[Image.Image]:
        """What the base model draws with `drift_prompts`, picture i from seed i."""
        return _base_pictures(tuple(self.drift_prompts()), inference_steps, guidance_scale)


def compared_subjects(count: int) -> list[ComparedSubject]:
    """The subjects that are compared on."""
    return [ComparedSubject(number) for number in range(count)]


def search_subjects(count: int) -> list[ComparedSubject]:
    """Others, on which learning rates are looked for."""
    return [ComparedSubject(_FIRST_FOR_SEARCH + number) for number in range(count)]


@cache
def _toy(number: int) -> ToySubject:
    return held_out_subjects(number + 1)[number]


@cache
def _base_pictures(prompts: tuple[str, ...], inference_steps: int, guidance_scale: float) -> list[Image.Image]:
    pipeline = load_pipeline(EMBEDDED_MODEL)
    if torch.cuda.is_available():
        pipeline.to("cuda")
    return draw_together(pipeline, prompts, num_inference_steps=inference_steps, guidance_scale=guidance_scale)


def _with_word(text: str, word: str) -> str:
    return text.replace(f" {TOKEN} ", f" {word} ")
