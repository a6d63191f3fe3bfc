"""What a picture depends on besides model and adapters, as the page asks for it."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import gradio as gr

from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.app.components.adapter_cards import chosen_adapters
from svft_diffusion.app.drawing.picture_request import PictureRequest
from svft_diffusion.app.drawing.prompt_tags import with_tags
from svft_diffusion.app.shelf.library import Library
from svft_diffusion.errors import UserError
from svft_diffusion.sampling.prompt_syntax import split_prompt
from svft_diffusion.sampling.schedulers import DEFAULT, SCHEDULERS

_USUAL = PictureRequest(base="", prompt="")
_RANDOM_SEEDS = 2**32
_DICE = f"() => String(Math.floor(Math.random() * {_RANDOM_SEEDS}))"


@dataclass(frozen=True)
class SettingsForm:
    """The components, in the order of `PictureWishes`."""

    prompt: gr.Textbox
    negative_prompt: gr.Textbox
    seed: gr.Textbox
    random_seed: gr.Checkbox
    num_images: gr.Number
    num_inference_steps: gr.Number
    guidance_scale: gr.Number
    width: gr.Number
    height: gr.Number
    scheduler: gr.Dropdown

    @property
    def inputs(self) -> list[Any]:
        return [getattr(self, one.name) for one in fields(self)]

    def updates(self, values: Mapping[str, Any]) -> list[Any]:
        """Of every component, in their order: values by field; the others stay."""
        return [gr.update(value=values[one.name]) if one.name in values else gr.skip() for one in fields(self)]


@dataclass(frozen=True)
class PictureWishes:
    """The form, filled in; nothing in it is checked yet."""

    prompt: str
    negative_prompt: str
    seed: str
    random_seed: bool
    num_images: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    width: int | None
    height: int | None
    scheduler: str | None

    def with_seed(self) -> PictureWishes:
        """The same with another seed, if a random one is asked for."""
        return replace(self, seed=str(secrets.randbelow(_RANDOM_SEEDS))) if self.random_seed else self

    def request(self, base: str, cards: object, library: Library, on_mismatch: OnMismatch) -> PictureRequest:
        """The request for the pictures; an adapter that the prompt names acts as the prompt says.

        Raises:
            UserError: a field without a value, an unknown adapter, or one that does not fit the base.
        """
        prompt, tags = split_prompt(self.prompt or "")
        numbers = {
            "number of pictures": self.num_images,
            "number of steps": self.num_inference_steps,
            "guidance": self.guidance_scale,
        }
        for name, value in numbers.items():
            if value is None or not math.isfinite(value):
                raise UserError(f"the {name} is missing; fill it in")
        try:
            seed = int((self.seed or "").strip())
        except ValueError:
            raise UserError(f"the seed must be a whole number, got {(self.seed or 'nothing')[:40]!r}") from None
        return PictureRequest(
            base=base,
            prompt=prompt,
            adapters=chosen_adapters(with_tags(cards, tags, library), library, base, on_mismatch),
            negative_prompt=self.negative_prompt or "",
            seed=seed,
            num_images=int(self.num_images or 0),
            num_inference_steps=int(self.num_inference_steps or 0),
            guidance_scale=float(self.guidance_scale or 0),
            width=None if self.width is None else int(self.width),
            height=None if self.height is None else int(self.height),
            scheduler=None if self.scheduler in (None, DEFAULT) else self.scheduler,
        )


def prompt_field() -> gr.Textbox:
    """Place the prompt."""
    return gr.Textbox(
        label="Prompt",
        placeholder="a photo of a red robot on the beach",
        info="Name adapters in it as <adapter:name:0.8>, or use the cards below",
        lines=3,
        max_lines=12,
        elem_id="prompt",
    )


def negative_prompt_field() -> gr.Textbox:
    """Place the negative prompt."""
    return gr.Textbox(
        label="Negative prompt", placeholder="what to avoid (optional)", lines=1, max_lines=6, elem_id="negative-prompt"
    )


def settings_form(prompt: gr.Textbox, negative_prompt: gr.Textbox, resolution: int) -> SettingsForm:
    """Place the fields below the prompts.

    What they hold is judged when pictures are asked for, with words that name the field.

    Args:
        resolution: height and width that the base draws at by itself.
    """
    narrow: dict[str, Any] = {"min_width": 120}
    whole = narrow | {"precision": 0}
    with gr.Row():
        seed = gr.Textbox(
            str(_USUAL.seed),
            label="Seed",
            max_lines=1,
            html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
            elem_id="seed",
            scale=2,
            **narrow,
        )
        random_seed = gr.Checkbox(False, label="New each time", elem_id="random-seed", scale=2, min_width=120)
        dice = gr.Button("Roll dice", size="md", elem_id="dice", elem_classes="beside-field", scale=1, min_width=120)
    with gr.Row():
        num_images = gr.Number(1, label="Pictures", elem_id="num-images", **whole)
        steps = gr.Number(_USUAL.num_inference_steps, label="Steps", elem_id="steps", **whole)
        guidance = gr.Number(_USUAL.guidance_scale, label="Guidance", step=0.5, elem_id="guidance", **narrow)
    with gr.Row():
        width = gr.Number(resolution, label="Width", step=8, elem_id="width", **whole)
        height = gr.Number(resolution, label="Height", step=8, elem_id="height", **whole)
        scheduler = gr.Dropdown(
            [("Base model's own", DEFAULT), *((name, name) for name in SCHEDULERS if name != DEFAULT)],
            value=DEFAULT,
            label="Scheduler",
            elem_id="scheduler",
            **narrow,
        )
    dice.click(None, None, seed, js=_DICE)
    return SettingsForm(
        prompt, negative_prompt, seed, random_seed, num_images, steps, guidance, width, height, scheduler
    )
