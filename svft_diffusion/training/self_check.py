"""The end of a run: does the file that was written draw what the trained model draws?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from svft_diffusion.adapters import load_adapter
from svft_diffusion.errors import UserError
from svft_diffusion.sampling.sample import generate
from svft_diffusion.training.base import load_base
from svft_diffusion.training.run import ADAPTER_NAME, Run
from svft_diffusion.training.sharding import move_all_but, shard_denoiser
from svft_diffusion.training.validation import decoding_without_autocast

_STEPS = 4  # enough for every layer to count
_VISIBLE = 8  # of 255 levels


def check_file(run: Run, adapter: Path) -> str:
    """Load ``adapter`` into a fresh base model, draw one picture with it and with the trained model, and say how they
    compare.

    The trained model is moved off the accelerator before the fresh one comes: they need not fit there together. The
    run is over by then, and nothing that goes wrong here ends it; but for one of several processes that can't draw,
    for which the others would wait.
    """
    live_pipeline = run.family.pipeline
    denoiser = next(iter(run.models))
    device, dtype = run.accelerator.device, live_pipeline.components[denoiser].dtype
    try:
        with run.resting.awake(), run.averaged_values():
            live = _draw(run, live_pipeline)
        if run.is_sharded:
            move_all_but(denoiser, live_pipeline, "cpu")
        elif device.type != "cpu":
            live_pipeline.to("cpu")
        fresh = _in_all_processes(run, lambda: _loaded(run, adapter, dtype))
        if run.is_sharded:
            move_all_but(denoiser, fresh, device)
            shard_denoiser(fresh.components[denoiser], ADAPTER_NAME, device, dtype)
        else:
            fresh.to(device)
        if fresh.vae.dtype != live_pipeline.vae.dtype:
            fresh.vae.to(live_pipeline.vae.dtype)
        levels = np.abs(_draw(run, fresh) - live)
    except (UserError, RuntimeError, MemoryError, OSError) as problem:  # such as too little memory for another model
        if run.is_sharded and not isinstance(problem, _NotLoaded):
            raise
        return f"warning: {adapter.name} was not tried in a fresh base model: {' '.join(str(problem).split())}"
    if not levels.any():
        return f"checked: loaded into a fresh base model, {adapter.name} draws the same picture as the trained model"
    where = f"up to {levels.max()} of 255 levels, {levels.mean():.2g} on average"
    if levels.max() < _VISIBLE:
        return f"checked: {adapter.name} draws what the trained model draws, but for rounding ({where})"
    return (
        f"warning: loaded into a fresh base model, {adapter.name} draws another picture than the trained model "
        f"({where}); compare its samples with those of the run before you rely on it"
    )


class _NotLoaded(UserError):
    """At least one of several processes has no fresh base model, and all of them know."""


def _loaded(run: Run, adapter: Path, dtype: torch.dtype) -> DiffusionPipeline:
    fresh = load_base(run.config, dtype)
    load_adapter(fresh, adapter, ADAPTER_NAME)
    return fresh


def _in_all_processes(run: Run, load: Callable[[], DiffusionPipeline]) -> DiffusionPipeline:
    """What ``load`` gives; where all processes are to draw together, none goes on unless all have it."""
    if not run.is_sharded:
        return load()
    loaded, reason = None, "another of the processes could not load it, such as for lack of memory"
    try:
        loaded = load()
    except (UserError, RuntimeError, MemoryError, OSError) as error:
        reason = str(error)
    failures = run.accelerator.reduce(torch.tensor([float(loaded is None)], device=run.accelerator.device), "sum")
    if loaded is None or failures.item():
        raise _NotLoaded(reason)
    return loaded


def _draw(run: Run, pipeline: DiffusionPipeline) -> np.ndarray:
    for model in pipeline.components.values():
        if isinstance(model, nn.Module):
            model.eval()
    with torch.no_grad(), run.accelerator.autocast(), decoding_without_autocast(pipeline.vae):
        image = generate(
            pipeline,
            run.config.with_tokens(run.config.validation_prompt or run.subjects[0].instance_prompt),
            seed=run.config.seed,
            num_inference_steps=_STEPS,
            height=run.config.resolution,
            width=run.config.resolution,
            max_sequence_length=run.config.max_sequence_length,
        )
    return np.asarray(image, dtype=int)
