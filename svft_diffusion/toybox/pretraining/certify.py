"""Stages ``export`` and ``certify``: write the pipeline folder, and measure readers and model on held-out material."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from numpy.typing import NDArray

from svft_diffusion.toybox.pretraining.denoiser import NOISE_SCHEDULE, ConditionalDenoiser
from svft_diffusion.toybox.pretraining.identities import round_trip
from svft_diffusion.toybox.readers import identity_embeddings, read_attributes
from svft_diffusion.toybox.tokenizer import build_tokenizer
from svft_diffusion.toybox.world import CLASSES, PALETTE, random_individual, random_view, render, scene_phrase
from svft_diffusion.toybox.world.captions import with_article

STEPS, GUIDANCE = 25, 4.0
HELD_OUT_SEED = 1_000  # far below the seeds of the training pictures


def export_pipeline(model: ConditionalDenoiser, vae: AutoencoderKL, folder: Path) -> None:
    """Write a plain diffusers folder in half precision."""
    vae.register_to_config(_name_or_path="")  # else the folder it was loaded from is written too
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=model.text_encoder.half(),
        tokenizer=build_tokenizer(),
        unet=model.unet.half(),
        scheduler=DPMSolverMultistepScheduler(**NOISE_SCHEDULE, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    # transformers loads in the precision that a config names, diffusers in float32: without this, a pipeline that is
    # loaded without a dtype would mix the two and fail at its first picture.
    config = folder / "text_encoder" / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"dtype": "float16"', '"dtype": "float32"'), encoding="utf-8")


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt with its known answers."""

    text: str
    class_name: str
    colour: str
    scene: str


def held_out_prompts(count: int) -> list[HeldOutPrompt]:
    """``count`` prompts that name a class, a palette colour and a scene, drawn evenly."""
    generator = random.Random(HELD_OUT_SEED)
    prompts = []
    for index in range(count):
        class_name, colour = CLASSES[index % len(CLASSES)], generator.choice(list(PALETTE))
        view = random_view(generator, hat=False)
        text = f"a photo of {with_article(colour)} {class_name} {scene_phrase(view)}"
        prompts.append(HeldOutPrompt(text, class_name, colour, view.scene))
    return prompts


def model_accuracy(
    pipeline: StableDiffusionPipeline, prompts: Sequence[HeldOutPrompt], batch: int = 20
) -> tuple[dict[str, float], NDArray[np.uint8]]:
    """Shares of pictures whose scene, class and body colour the readers find right, and the pictures."""
    pictures = []
    for start in range(0, len(prompts), batch):
        texts = [prompt.text for prompt in prompts[start : start + batch]]
        generators = [torch.Generator().manual_seed(start + index) for index in range(len(texts))]
        result = pipeline(
            texts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="np"
        )
        pictures.append((result.images * 255).round().astype(np.uint8))
    images = np.concatenate(pictures)
    read = read_attributes(images)
    answers = {
        "scene": [prompt.scene for prompt in prompts],
        "class": [prompt.class_name for prompt in prompts],
        "colour": [prompt.colour for prompt in prompts],
    }
    accuracy = {
        name: float(np.mean([seen == right for seen, right in zip(read[name], expected, strict=True)]))
        for name, expected in answers.items()
    }
    return accuracy, images


def reader_accuracy(vae: AutoencoderKL, count: int = 1000) -> dict[str, dict[str, float]]:
    """The readers' accuracy on held-out renders, direct and through the VAE, and the identity scale.

    ``colour`` counts bodies of one colour and ``colour, patterned`` the others, on which a third of the body shows
    another palette colour; both leave out bodies outside the palette.
    ``identity`` gives the mean similarity of two views of one individual (direct, and with one view through the VAE)
    and of two individuals of one class.
    """
    truth: dict[str, list[str | None]] = {name: [] for name in ("scene", "class", "colour", "colour, patterned", "hat")}
    pictures, others, strangers = [], [], []
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + count):
        generator = random.Random(seed)
        individual, view = random_individual(generator), random_view(generator)
        pictures.append(render(individual, view))
        others.append(render(individual, random_view(generator)))
        strangers.append(render(random_individual(generator, individual.class_name), random_view(generator)))
        truth["scene"].append(view.scene)
        truth["class"].append(individual.class_name)
        plain = individual.pattern == "plain"
        truth["colour"].append(individual.body_name if plain else None)
        truth["colour, patterned"].append(None if plain else individual.body_name)
        truth["hat"].append("hat" if view.hat else "none")
    direct = np.stack(pictures)
    through = np.concatenate([round_trip(vae, direct[start : start + 100]) for start in range(0, count, 100)])
    result = {"direct": _accuracy(direct, truth), "through the VAE": _accuracy(through, truth)}
    views, first = identity_embeddings(np.stack(others)), identity_embeddings(direct)
    result["identity"] = {
        "same individual": float((views * first).sum(1).mean()),
        "same individual, through the VAE": float((views * identity_embeddings(through)).sum(1).mean()),
        "other individual of the class": float((identity_embeddings(np.stack(strangers)) * first).sum(1).mean()),
    }
    return result


def _accuracy(pictures: NDArray[np.uint8], truth: dict[str, list[str | None]]) -> dict[str, float]:
    read = read_attributes(pictures)
    accuracy = {}
    for name, expected in truth.items():
        seen = read[name.partition(",")[0]]
        accuracy[name] = float(np.mean([a == b for a, b in zip(seen, expected, strict=True) if b is not None]))
    return accuracy
