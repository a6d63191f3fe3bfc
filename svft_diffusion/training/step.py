"""One optimizer step: forward and backward passes, the mean of all processes' gradients, and the update."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from svft_diffusion.data.order import keyed_generator
from svft_diffusion.models import PICTURE_SIZES
from svft_diffusion.training.batches import Batch
from svft_diffusion.training.finite import ForwardPass, diverged
from svft_diffusion.training.gradients import check_gradients
from svft_diffusion.training.losses import squared_norm
from svft_diffusion.training.objective import Losses, denoising_losses, draw_randomness
from svft_diffusion.training.prior import base_prediction
from svft_diffusion.training.setup import Run


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
    text_encoder_stopped = config.stop_text_encoder_training is not None and step > config.stop_text_encoder_training
    if text_encoder_stopped:
        run.stop_text_encoder_training()
    sums = torch.zeros(3, device=accelerator.device)  # total, instance, prior
    passes: list[ForwardPass] = []
    for _ in range(config.gradient_accumulation_steps):
        losses, forward_pass = _forward(run, next(batches))
        passes.append(forward_pass)
        total = losses.total
        if config.value_norm_penalty:
            total = total + config.value_norm_penalty * squared_norm(run.parameters.values())
        accelerator.backward(total / config.gradient_accumulation_steps)
        prior = losses.prior if losses.prior is not None else torch.zeros_like(losses.total)
        sums += torch.stack((total, losses.instance, prior)).detach()
    if step == 1 and (idle := check_gradients(run.parameters)):
        accelerator.print(f"layers without effect in this base, which stay as they are ({len(idle)}): {idle[0]}, ...")
    loss, instance_loss, prior_loss = accelerator.reduce(sums / config.gradient_accumulation_steps, "mean").tolist()
    if run.freezing is not None:
        run.freezing.drop_gradients()
    if text_encoder_stopped:
        run.drop_text_encoder_gradients()
    _average_gradients(run)
    gradient_norm = float(accelerator.clip_grad_norm_(run.parameters.values(), config.max_grad_norm))
    # With fp16 a gradient that overflowed is normal: the scaler leaves the step out and scales less.
    if not math.isfinite(loss):
        raise diverged(run, step, passes, "the loss")
    if not math.isfinite(gradient_norm) and accelerator.mixed_precision != "fp16":
        raise diverged(run, step, passes, "the gradient's norm")
    gradient_norms = run.gradient_norms(gradient_norm)
    learning_rate = run.lr_scheduler.get_last_lr()[0]
    run.optimizer.step()
    run.lr_scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    value_norm = _value_norm(run)
    if not math.isfinite(value_norm):
        raise diverged(run, step, passes, "the norm of the trained values")
    metrics = {"loss": loss, "learning_rate": learning_rate, "gradient_norm": gradient_norm, "value_norm": value_norm}
    metrics |= {f"gradient_norm_{component}": norm for component, norm in gradient_norms.items()}
    if config.with_prior_preservation:
        metrics |= {"instance_loss": instance_loss, "prior_loss": prior_loss}
    return metrics


@torch.no_grad()
def _value_norm(run: Run) -> float:
    """Of all trained values together. Most start at zero, so that this is how far the model is from the base."""
    return float(torch.nn.utils.get_total_norm(run.parameters.values()))


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
    with run.accelerator.autocast():
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
    inputs = {name: tensor.detach() for name, tensor in conditioning.items()}
    return losses, ForwardPass(batch, inputs, losses.total.detach())


def _average_gradients(run: Run) -> None:
    """The mean gradient of all processes, sent as one short vector; an adapter has few values."""
    if run.accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in run.parameters.values() if parameter.grad is not None]
    mean = run.accelerator.reduce(torch.cat(gradients), "mean")
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part)
