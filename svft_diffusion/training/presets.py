"""Settings for those who don't want to choose any: how long to train, and what a subject's prompts are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.toy_demonstration import write_scene_prompts
from svft_diffusion.models import EMBEDDED_MODEL
from svft_diffusion.toybox.world import CLASSES, RARE_TOKENS
from svft_diffusion.training.config import DEFAULT_TRAIN_STEPS

SPEEDS = ("quick", "balanced", "thorough")
_SAVED_STEPS = 5  # of a run, with samples of each
_LONGEST_WORDS = 60

# What works on the embedded model; docs/training.md tells what was tried. Photos and prompts are added for each run.
TOY_TRAINING: dict[str, Any] = {
    "pretrained_model_name_or_path": EMBEDDED_MODEL,
    "method": "svft",
    "pattern": "banded",
    "off_diagonals": 1,
    "train_text_encoder": True,
    "caption_source": "txt",  # each photo's caption names its scene, so that the token means the subject alone
    "with_prior_preservation": True,
    "num_class_images": 26,
    "timestep_sampling": "focused",
    "train_batch_size": 5,
    "max_train_steps": 300,
    "learning_rate": 5e-2,
    "lr_scheduler": "linear",
    "lr_warmup_steps": 20,
    "adam_weight_decay": 0.0,
    "checkpointing_steps": 1_000_000,  # a run of two minutes needs none
    "report_to": "none",
}
# On the demo's robot 600 steps are too many: 0.77 for 0.79 after 300, and a class that is lost now and then.
_TOY_STEPS = {"quick": 150, "balanced": 300, "thorough": 400}

# The trainer's defaults, with what makes a large base fit. Not tried on real weights.
_FULL_SIZE_TRAINING: dict[str, Any] = {
    "caption_source": "txt",
    "with_prior_preservation": True,
    "prior_source": "base",  # no class pictures have to be drawn first
    "train_batch_size": 1,
    "gradient_checkpointing": True,
    "checkpoints_total_limit": 1,
    "report_to": "none",
}
_FULL_SIZE_CHOICES: dict[str, dict[str, Any]] = {
    "quick": {"max_train_steps": DEFAULT_TRAIN_STEPS // 2},
    "balanced": {"max_train_steps": DEFAULT_TRAIN_STEPS, "pattern": "banded"},
    "thorough": {"max_train_steps": 2 * DEFAULT_TRAIN_STEPS, "pattern": "banded"},
}


@dataclass(frozen=True)
class SubjectPrompts:
    """What the photos are called in training, and what their class is."""

    trigger: str
    class_word: str

    def __post_init__(self) -> None:
        """Raises `UserError` for names that no prompt can hold."""
        for what, words in (("kind of thing", self.class_word), ("trigger word", self.trigger)):
            if not words.strip():
                raise UserError(f"the {what} is missing: write, for example, {'dog' if 'kind' in what else 'sks'}")
            if not words.isprintable() or len(words) > _LONGEST_WORDS or set(words) & set("<>"):
                raise UserError(f"the {what} must be a word or two, without < and >")
        if len(self.trigger.split()) > 1:
            raise UserError("the trigger word must be a single one, such as sks")
        if self.trigger.strip().casefold() in self.class_word.casefold().split():
            raise UserError("the trigger word must not be among the words for the kind of thing; take a rare one: sks")

    @property
    def instance_prompt(self) -> str:
        """``a photo of sks dog``."""
        return f"a photo of {self.trigger.strip()} {' '.join(self.class_word.split())}"

    @property
    def class_prompt(self) -> str:
        """``a photo of a dog``."""
        words = " ".join(self.class_word.split())
        return f"a photo of {'an' if words[0].lower() in 'aeiou' else 'a'} {words}"

    def note(self, base: str) -> str | None:
        """What the user should hear about these words with a base model."""
        if base != EMBEDDED_MODEL:
            return None
        if self.class_word.strip() not in CLASSES:
            return f"The embedded model knows only toys of these kinds: {', '.join(CLASSES)}."
        if self.trigger.strip() not in RARE_TOKENS:
            return f"The embedded model has these trigger words: {', '.join(RARE_TOKENS)}."
        return None


def preset_settings(base: str, speed: str, prompts: SubjectPrompts, folder: Path) -> dict[str, Any]:
    """Settings of a run on a base model, without its photos; samples are drawn at every step that is kept.

    Args:
        speed: one of `SPEEDS`.
        folder: where a list of prompts may be written that the settings name.

    Raises:
        UserError: no such speed.
    """
    if speed not in SPEEDS:
        raise UserError(f"choose {', '.join(SPEEDS[:-1])} or {SPEEDS[-1]}, not {speed!r}")
    if base == EMBEDDED_MODEL:
        scenes = write_scene_prompts(prompts.class_prompt, folder / "class_prompts.txt")
        settings = TOY_TRAINING | {"max_train_steps": _TOY_STEPS[speed], "class_prompts_file": scenes}
    else:
        settings = _FULL_SIZE_TRAINING | _FULL_SIZE_CHOICES[speed]
    every = settings["max_train_steps"] // _SAVED_STEPS
    return settings | {
        "pretrained_model_name_or_path": base,
        "instance_prompt": prompts.instance_prompt,
        "class_prompt": prompts.class_prompt,
        "validation_prompt": prompts.instance_prompt,
        "num_validation_images": 2,
        "validation_steps": every,
        "history_steps": every,
    }
