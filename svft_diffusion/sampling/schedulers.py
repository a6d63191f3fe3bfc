"""Sampling methods by the names that people know, as diffusers' schedulers with the base model's own settings."""

from __future__ import annotations

import inspect
import re
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from svft_diffusion.errors import UserError
from svft_diffusion.settings import nearest_hint

DEFAULT = "default"
"""The scheduler that the base model brings along."""

_OF_DIFFUSION: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIM", {}),
    "ddpm": ("DDPM", {}),
    "pndm": ("PNDM", {"skip_prk_steps": True}),
    "euler": ("EulerDiscrete", {}),
    "euler_karras": ("EulerDiscrete", {"use_karras_sigmas": True}),
    "euler_a": ("EulerAncestralDiscrete", {}),
    "heun": ("HeunDiscrete", {}),
    "dpm2": ("KDPM2Discrete", {}),
    "dpm2_a": ("KDPM2AncestralDiscrete", {}),
    "dpm++_2m": ("DPMSolverMultistep", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": False}),
    "dpm++_2m_karras": ("DPMSolverMultistep", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "dpm++_2m_sde": ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": False}),
    "dpm++_2m_sde_karras": ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    "unipc": ("UniPCMultistep", {}),
    "deis": ("DEISMultistep", {"algorithm_type": "deis"}),
    "lcm": ("LCM", {}),
    "tcd": ("TCD", {}),
}
_OF_FLOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "flow_match": ("FlowMatchEulerDiscrete", {}),
    "flow_match_heun": ("FlowMatchHeunDiscrete", {}),
}
# Where the base's own scheduler has no such setting: latents are not confined to [-1, 1] as pixels are, and the last
# step ends where that of Stable Diffusion does.
_OF_LATENTS = {"clip_sample": False, "set_alpha_to_one": False}
_SPELLINGS = {"dpmpp": "dpm++", "ancestral": "a", "uni_pc": "unipc"}  # of other tools
SCHEDULERS = (DEFAULT, *_OF_DIFFUSION, *_OF_FLOWS)


def scheduler_name(text: str) -> str:
    """The name of `SCHEDULERS` that somebody means: ``DPM++ 2M Karras`` and ``k_dpmpp_2m_karras`` are
    ``dpm++_2m_karras``.

    Raises:
        UserError: there is none, with the nearest one.
    """
    name = re.sub(r"[\s\-]+", "_", text.strip().lower()).removeprefix("k_")
    for other, ours in _SPELLINGS.items():
        name = name.replace(other, ours)
    if name not in SCHEDULERS:
        hint = nearest_hint(name[:80], SCHEDULERS)
        there = " There" if hint else "; there"
        raise UserError(f"unknown scheduler {text[:80]!r}{hint}{there} are {', '.join(SCHEDULERS)}")
    return name


def make_scheduler(pipeline: DiffusionPipeline, name: str) -> Any:
    """A new scheduler for a pipeline; ``default`` is the one that the pipeline has.

    Raises:
        UserError: it is none for the kind of model: a model of flow matching knows no noise levels of diffusion, and
            the other way round.
    """
    if name == DEFAULT:
        return pipeline.scheduler
    flows = "FlowMatch" in type(pipeline.scheduler).__name__
    fitting, kind = (_OF_FLOWS, "flow matching") if flows else (_OF_DIFFUSION, "denoising diffusion")
    if name not in fitting:
        raise UserError(
            f"--scheduler {name} can't draw with this base model, which was made by {kind}; choose from "
            f"{', '.join((DEFAULT, *fitting))}"
        )
    class_name, options = fitting[name]
    kind_of_scheduler = getattr(diffusers, f"{class_name}Scheduler")
    known = inspect.signature(kind_of_scheduler.__init__).parameters
    defaults = {setting: value for setting, value in _OF_LATENTS.items() if setting in known}
    return kind_of_scheduler.from_config({**defaults, **pipeline.scheduler.config}, **options)


def check_steps(scheduler: Any, num_inference_steps: int) -> None:
    """Refuse more denoising steps than a scheduler has places for; some of them would end in an error or in noise.

    Raises:
        UserError: says how many it takes.
    """
    config = scheduler.config
    most = config.get("num_train_timesteps", num_inference_steps) - config.get("steps_offset", 0)
    most = min(most, config.get("original_inference_steps", most))
    if num_inference_steps > most:
        name = type(scheduler).__name__.removesuffix("Scheduler")
        raise UserError(f"the scheduler {name} takes at most {most} steps, got {num_inference_steps}")
