"""Which pictures a run makes, under which names, with which settings: known before any model is loaded."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from svft_diffusion.adapters.fitting import check_choice
from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.errors import UserError
from svft_diffusion.models.loading import base_display_name
from svft_diffusion.sampling.adapter_choice import CheckedAdapter
from svft_diffusion.sampling.adapter_sets import LoadedSets, scaled, uses_in_prompt, words_of
from svft_diffusion.sampling.adapter_use import AdapterUse, use_in_picture
from svft_diffusion.sampling.config import SamplingConfig, check_values
from svft_diffusion.sampling.prompt_files import PromptRow, SubjectWords, fill_in, read_prompts
from svft_diffusion.sampling.prompt_syntax import split_prompt
from svft_diffusion.sampling.schedulers import DEFAULT, scheduler_name
from svft_diffusion.version import __version__

SETTINGS_OF_FEW = ("scheduler_option", "batch_size", "revision", "variant", "vae")
"""Settings that a picture's file tells only where they are not the usual ones."""

_LARGEST_SEED = 2**63 - 1
_SLUG_LENGTH = 40
_MOST_PICTURES = 100_000


@dataclass(frozen=True)
class PlannedPicture:
    """One picture of a run."""

    file_name: str
    seed: int
    settings: dict[str, Any]  # what its file will tell; its size and scheduler are known after loading only


@dataclass(frozen=True)
class PlannedRow:
    """The pictures that share everything but the seed."""

    label: str
    prompt: str  # as the model reads it: without tags of adapters
    negative_prompt: str
    uses: dict[str, AdapterUse]  # adapter -> how it acts
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    pictures: list[PlannedPicture]


def check_config(config: SamplingConfig) -> None:
    """Refuse settings that can't work.

    Raises:
        UserError: names the setting and what it may be.
    """
    check_values(config)
    check_choice(config.on_mismatch)
    _check_axes(PromptRow(), config)


def check_picture_settings(seed: int, num_inference_steps: int, guidance_scale: float) -> None:
    """Refuse numbers with which no picture can be made.

    Raises:
        UserError: names the setting and what it may be.
    """
    if not 0 <= seed <= _LARGEST_SEED:
        raise UserError(f"the seed must be between 0 and {_LARGEST_SEED}, got {seed}")
    if not 1 <= num_inference_steps <= 1000:
        raise UserError(f"the number of steps must be between 1 and 1000, got {num_inference_steps}")
    if not 0 <= guidance_scale <= 1000:
        raise UserError(f"the guidance scale must be between 0 and 1000, got {guidance_scale}")


def read_prompt_rows(config: SamplingConfig) -> list[PromptRow]:
    """The prompts of ``--prompt`` and ``--prompts``, with values that can work.

    Raises:
        UserError: see `svft_diffusion.sampling.prompt_files.read_prompts`.
    """
    rows = [PromptRow(prompt) for prompt in config.prompt]
    if config.prompts is not None:
        rows += read_prompts(config.prompts)
    for row in rows:
        _check_axes(row, config)
    return rows


def plan_rows(config: SamplingConfig, prompts: Sequence[PromptRow], loaded: LoadedSets) -> list[PlannedRow]:
    """A row for each prompt, set of adapters, scheduler, number of steps, guidance and strength, in this order.

    Raises:
        UserError: strengths or sets without adapters, a prompt that names an unknown one or lacks the subject's words,
            two pictures of the same name, or more pictures than anybody wants.
    """
    if config.weights and not loaded.adapters:
        raise UserError("--weights scales adapters, but there is no --adapter")
    combinations = sum(
        len(_seeds(row, config)) * len(loaded.sets) * len(list(_combinations(row, config))) for row in prompts
    )
    if combinations > _MOST_PICTURES:
        raise UserError(f"{combinations} pictures are asked for; at most {_MOST_PICTURES} in one folder")
    texts = Counter(split_prompt(prompt.prompt)[0] for prompt in prompts)
    rows = [
        row
        for number, prompt in enumerate(prompts)
        for label in loaded.sets
        for row in _rows_of(config, number, prompt, label, loaded, texts)
    ]
    _check_names(rows)
    return rows


def picture_settings(
    *,
    base: str,
    adapters: Sequence[tuple[CheckedAdapter, AdapterUse | AdapterWeight]],
    prompt: str,
    negative_prompt: str,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
    dtype: str,
) -> dict[str, Any]:
    """What a picture's file tells about its making; adapters come with the weights at which they acted."""
    return {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "base": base_display_name(base),
        "dtype": dtype,
        "adapters": [
            {
                "name": adapter.name,
                "weight": use_in_picture(use) if isinstance(use, AdapterUse) else use,
                "sha256": adapter.sha256,
            }
            for adapter, use in adapters
        ],
        "version": f"svft_diffusion {__version__}",
    }


def slug(text: str) -> str:
    """``A red robot, on the beach!`` -> ``a-red-robot-on-the-beach``: letters of every file system, at most 40."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:_SLUG_LENGTH].strip("-") or "picture"


def _check_axes(row: PromptRow, config: SamplingConfig) -> None:
    if row.num_images is not None and row.num_images < 1:
        raise UserError(f"num_images must be at least 1, got {row.num_images}")
    for seed in row.seed if row.seed is not None else config.seed:
        last = seed + (row.num_images or config.num_images) - 1
        for steps, guidance in product(
            row.num_inference_steps or config.num_inference_steps, row.guidance_scale or config.guidance_scale
        ):
            check_picture_settings(last, steps, guidance)
            check_picture_settings(seed, steps, guidance)
    for name in row.scheduler or config.scheduler:
        scheduler_name(name)


def _seeds(row: PromptRow, config: SamplingConfig) -> list[int]:
    """Every seed once, in the order given."""
    images = row.num_images or config.num_images
    if len(row.seed or config.seed) * images > _MOST_PICTURES:
        raise UserError(f"{images} pictures for each seed are too many; at most {_MOST_PICTURES} in one folder")
    return list(dict.fromkeys(first + i for first in row.seed or config.seed for i in range(images)))


def _combinations(row: PromptRow, config: SamplingConfig) -> Iterator[tuple[str, int, float, float]]:
    """Scheduler, steps, guidance and strength of each row of pictures."""
    schedulers = dict.fromkeys(scheduler_name(name) for name in row.scheduler or config.scheduler)
    steps = dict.fromkeys(row.num_inference_steps or config.num_inference_steps)
    return product(
        schedulers, steps, dict.fromkeys(row.guidance_scale or config.guidance_scale), config.weights or [1.0]
    )


def _rows_of(
    config: SamplingConfig,
    number: int,
    given: PromptRow,
    set_label: str,
    loaded: LoadedSets,
    texts: Mapping[str, int],
) -> Iterator[PlannedRow]:
    """The rows of one prompt and set. File names and labels tell what differs among those of this prompt.

    Args:
        texts: how many prompts are the same but for their tags; names of their files tell these too.
    """
    text, tags = split_prompt(given.prompt)
    uses = uses_in_prompt(loaded.sets[set_label], tags, loaded, given.prompt)
    prompt = fill_in(text, words_of(uses, loaded, SubjectWords(config.token, config.class_word)))
    if not prompt:
        raise UserError(f"the prompt {given.prompt[:80]!r} holds tags of adapters alone; say what to draw")
    combinations = list(_combinations(given, config))
    differing = [len({values[axis] for values in combinations}) > 1 for axis in range(3)]
    tagged = {name: _weight_words(weight) for name, weight in tags.items()}
    of_tags = ", ".join(f"{name} {weight}" for name, weight in tagged.items())
    in_names = "".join(f"_{slug(name)}{weight}" for name, weight in tagged.items()) if texts[text] > 1 else ""
    negative_prompt = config.negative_prompt if given.negative_prompt is None else given.negative_prompt
    for scheduler, steps, guidance, strength in combinations:
        parts = {  # of the file name -> of the label
            f"_{slug(set_label)}": set_label if set_label else None,
            f"_{scheduler}": scheduler if differing[0] else None,
            f"_steps{steps}": f"{steps} steps" if differing[1] else None,
            f"_cfg{guidance:g}": f"guidance {guidance:g}" if differing[2] else None,
            f"_w{strength:g}": f"strength {strength:g}{f' of {of_tags}' if tags else ''}" if config.weights else None,
        }
        told = {part: label for part, label in parts.items() if label is not None}
        stem = (given.name or f"{number:03d}_{slug(prompt)}{in_names}") + "".join(told)
        scaled_uses = {name: scaled(use, strength) for name, use in uses.items()}
        pictures = [
            PlannedPicture(
                f"{stem}_seed{seed}.png",
                seed,
                picture_settings(
                    base=config.pretrained_model_name_or_path,
                    adapters=[(loaded.adapters[name], use) for name, use in scaled_uses.items()],
                    prompt=prompt,
                    negative_prompt=negative_prompt,
                    seed=seed,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    dtype=config.dtype,
                )
                | ({} if scheduler == DEFAULT else {"scheduler_option": scheduler})
                | ({} if config.batch_size == 1 else {"batch_size": config.batch_size})
                | _version_of_base(config),
            )
            for seed in _seeds(given, config)
        ]
        label = "\n".join([prompt, *([of_tags] if tags and not config.weights else []), *told.values()])
        yield PlannedRow(label, prompt, negative_prompt, scaled_uses, scheduler, steps, guidance, pictures)


def _weight_words(weight: AdapterWeight) -> str:
    """``0.5``, or ``unet0.5-text_encoder0.2``: a weight in names of files and in labels."""
    if isinstance(weight, Mapping):
        return "-".join(f"{part}{_weight_words(of_part)}" for part, of_part in weight.items())
    return f"{weight:g}"


def _version_of_base(config: SamplingConfig) -> dict[str, str]:
    """What is said of the base model besides its name."""
    vae = config.pretrained_vae_model_name_or_path
    told = {
        "revision": config.revision,
        "variant": config.variant,
        "vae": None if vae is None else base_display_name(vae),
    }
    return {name: value for name, value in told.items() if value is not None}


def _check_names(rows: Sequence[PlannedRow]) -> None:
    """Some systems don't tell the case of letters in names."""
    named: dict[str, PlannedPicture] = {}
    for row in rows:
        for picture in row.pictures:
            other = named.setdefault(picture.file_name.casefold(), picture)
            if other is picture:
                continue
            if json.dumps(other.settings) != json.dumps(picture.settings) and other.file_name == picture.file_name:
                raise UserError(
                    f"two pictures would be called {picture.file_name}: weights, guidance scales or names of sets are "
                    "too close to get different file names, or two prompts have one name"
                )
            raise UserError(f"{picture.file_name} would be drawn twice; give each value and each name once")
