"""One optimizer step: forward and backward passes, the mean of all processes' gradients, and the update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from svft_diffusion.data.order import keyed_generator
from svft_diffusion.models import PICTURE_SIZES
from svft_diffusion.training.batches import Batch
from svft_diffusion.training.finite import ForwardPass, diverged
from svft_diffusion.training.gradients import check_gradients
from svft_diffusion.training.losses import squared_norm
from svft_diffusion.training.new_tokens import check_token_gradients
from svft_diffusion.training.objective import Losses, denoising_losses, draw_randomness
from svft_diffusion.training.prior import base_prediction
from svft_diffusion.training.run import Run
from svft_diffusion.training.unmix import Projections

_SMALLEST_SCALE = 1e-4  # of the loss with fp16, as in fairseq: thirty steps in a row are left out before


def optimizer_step(run: Run, batches: Iterator[Batch], step: int) -> dict[str, float]:
    """One update from ``gradient_accumulation_steps`` batches; returns the numbers of the step.

    Raises:
        TrainingDiverged: loss or gradient is not finite, and the values are as they were before the step; or the values
            themselves are not finite after it.
        UserError: in the first step, a model gets no gradient.
    """
    config, accelerator = run.config, run.accelerator
    # Noise has its own generators; this is for dropout inside a base model that has any.
    torch.manual_seed(keyed_generator(config.seed, "step", step, accelerator.process_index).initial_seed())
    if run.text_stopped(step):
        run.stop_text_encoder_training()
    sums = torch.zeros(4, device=accelerator.device)  # total, instance, prior, unmix
    passes: list[ForwardPass] = []
    for _ in range(config.gradient_accumulation_steps):
        losses, forward_pass = _forward(run, next(batches))
        passes.append(forward_pass)
        total = losses.total
        if config.value_norm_penalty:
            total = total + config.value_norm_penalty * squared_norm(run.parameters.values())
        accelerator.backward(total / config.gradient_accumulation_steps)
        parts = [torch.zeros_like(total) if part is None else part for part in (losses.prior, losses.unmix)]
        sums += torch.stack((total, losses.instance, *parts)).detach()
    told = any(run.prompts.says_something(part.batch.prompts) for part in passes)
    if step == 1 and told and (idle := check_gradients(run.parameters)):
        accelerator.print(f"layers without effect in this base, which stay as they are ({len(idle)}): {idle[0]}, ...")
    if step == 1 and any(run.prompts.has_new_tokens(part.batch.prompts) for part in passes):
        check_token_gradients(run.tokens)
    means = accelerator.reduce(sums / config.gradient_accumulation_steps, "mean")
    loss, instance_loss, prior_loss, unmix_loss = means.tolist()
    if run.freezing is not None:
        run.freezing.drop_gradients()
    if run.text_encoder_stopped(step):
        run.drop_text_encoder_gradients()
    if run.tokens_stopped(step):
        run.drop_token_gradients()
    else:
        run.complete_token_gradients()
    _average_gradients(run)
    gradient_norm = float(accelerator.clip_grad_norm_(run.trained.values(), config.max_grad_norm))
    if not math.isfinite(loss):
        raise diverged(run, step, passes, "the loss")
    if not math.isfinite(gradient_norm) and not _scales_less(accelerator.scaler):
        raise diverged(run, step, passes, "the gradient's norm")
    gradient_norms = run.gradient_norms(gradient_norm)
    learning_rate = run.lr_scheduler.get_last_lr()[0]
    run.optimizer.step()
    run.lr_scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    value_norm, token_norm = _norm(run.parameters), _norm(run.tokens)
    if not math.isfinite(value_norm):
        raise diverged(run, step, passes, "the norm of the trained values")
    if not math.isfinite(token_norm):
        raise diverged(run, step, passes, "the norm of the new tokens")
    metrics = {"loss": loss, "learning_rate": learning_rate, "gradient_norm": gradient_norm, "value_norm": value_norm}
    metrics |= {f"gradient_norm_{component}": norm for component, norm in gradient_norms.items()}
    if run.tokens:
        metrics["token_norm"] = token_norm
    if config.with_prior_preservation:
        metrics |= {"instance_loss": instance_loss, "prior_loss": prior_loss}
    if run.unmix is not None:
        metrics |= {"unmix_loss": unmix_loss}
    return metrics


def _scales_less(scaler: torch.amp.GradScaler | None) -> bool:
    """With fp16 a gradient that overflows is normal: the step is left out, and the next loss is multiplied by less. In
    the end it is not the scale.
    """
    return scaler is not None and scaler.get_scale() >= _SMALLEST_SCALE


@torch.no_grad()
def _norm(parameters: Mapping[str, nn.Parameter]) -> float:
    """Of all values together. Those of layers mostly start at zero, so that this is how far they are from the base."""
    return float(torch.nn.utils.get_total_norm(parameters.values()))


def _forward(run: Run, batch: Batch) -> tuple[Losses, ForwardPass]:
    config = run.config
    assert config.timestep_sampling is not None
    randomness = draw_randomness(
        config.seed,
        batch.samples,
        batch.latents.mean,
        timestep_sampling=config.timestep_sampling,
        number_of_timesteps=run.family.number_of_timesteps,
        noise_offset=config.noise_offset,
        input_perturbation=config.input_perturbation,
    )
    with run.accelerator.autocast(), _reading(run) as projections:
        conditioning = run.prompts.conditioning(batch.prompts) | {PICTURE_SIZES: batch.sizes}
        losses = denoising_losses(
            run.family,
            batch.latents,
            conditioning,
            randomness,
            prior_loss_weight=config.prior_loss_weight if config.with_prior_preservation else None,
            settings=config.loss,
            weights=batch.weights,
            base_prediction=base_prediction(run.family, run.models, run.prompts, batch)
            if config.with_prior_preservation and config.prior_source == "base"
            else None,
        )
    if run.unmix is not None and projections is not None:
        unmix = run.unmix.loss(projections, batch)
        losses = dataclasses.replace(losses, total=losses.total + config.unmix_loss_weight * unmix, unmix=unmix)
    inputs = {name: tensor.detach() for name, tensor in conditioning.items()}
    return losses, ForwardPass(batch, inputs, losses.total.detach())


def _reading(run: Run) -> AbstractContextManager[Projections | None]:
    return nullcontext() if run.unmix is None else run.unmix.reading()


def _average_gradients(run: Run) -> None:
    """The mean gradient of all processes, sent as one short vector; an adapter has few values."""
    if run.accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in run.trained.values() if parameter.grad is not None]
    mean = run.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
