"""DreamBooth training of an adapter: the command line, the demo, the evaluation and the app all call `train`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import tqdm  # shows a bar in the first process only

from svft_diffusion.data.dataset import keyed_generator
from svft_diffusion.errors import UserError
from svft_diffusion.factors import use_cache
from svft_diffusion.files.training_folder import ADAPTER_FILE
from svft_diffusion.training.batches import Batch
from svft_diffusion.training.card import write_card, write_config
from svft_diffusion.training.checks import Inputs, check
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.hub import push_to_hub
from svft_diffusion.training.interruption import Interruption
from svft_diffusion.training.metrics import FreezingLog, MetricsLog
from svft_diffusion.training.objective import Losses, denoising_losses, draw_randomness
from svft_diffusion.training.persistence import resume, save_result, save_run
from svft_diffusion.training.setup import Run, make_accelerator, prepare_run
from svft_diffusion.training.validation import draw_samples


class TrainingDiverged(UserError):
    """Loss or gradients are no finite numbers any more."""


@dataclass(frozen=True)
class StepReport:
    """What a watcher hears after every optimizer step."""

    step: int  # finished steps
    total_steps: int
    loss: float
    seconds: float  # since training began


@dataclass(frozen=True)
class TrainingResult:
    """What a run left behind."""

    output_dir: Path
    adapter: Path
    samples: list[Path]  # of the last step
    steps: int
    trained_values: int
    last_loss: float  # NaN if no step was left to do
    seconds: float  # of everything, loading included


def train(config: TrainingConfig, *, on_step: Callable[[StepReport], None] | None = None) -> TrainingResult:
    """Train an adapter and write it, with everything about it, into ``config.output_dir``.

    Args:
        on_step: called after every optimizer step.

    Raises:
        UserError: settings, files or base model that can't work, before anything is written.
        TrainingDiverged: the loss is no finite number any more; what was saved before stays.
        KeyboardInterrupt: after Ctrl-C, when the adapter and a checkpoint are saved.
    """
    started = time.perf_counter()
    inputs = check(config)
    use_cache(config.factor_cache, config.factor_cache_size)
    # Training seeds torch at every step; the caller's own random numbers are not touched by that.
    with torch.random.fork_rng(devices=[]):
        accelerator = make_accelerator(config)
        for note in inputs.notes:
            accelerator.print(note)
        try:
            return _train(prepare_run(config, inputs, accelerator), inputs, started, on_step)
        finally:
            accelerator.end_training()


def _train(run: Run, inputs: Inputs, started: float, on_step: Callable[[StepReport], None] | None) -> TrainingResult:
    config, accelerator = run.config, run.accelerator
    first_step = resume(run, inputs.checkpoint) if inputs.checkpoint else 0
    _announce(run, first_step)
    if accelerator.is_main_process:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        write_config(config)
    if accelerator.log_with:
        accelerator.init_trackers("svft-diffusion")
    accelerator.wait_for_everyone()

    last_loss = _run_steps(run, first_step, on_step)
    samples = draw_samples(run, run.total_steps)
    if accelerator.is_main_process:
        save_result(run, config.output_dir / ADAPTER_FILE, samples)
        write_card(config, samples)
        if config.push_to_hub:
            accelerator.print(f"uploaded to {push_to_hub(config, samples)}")
    accelerator.wait_for_everyone()
    return TrainingResult(
        output_dir=config.output_dir,
        adapter=config.output_dir / ADAPTER_FILE,
        samples=samples,
        steps=run.total_steps,
        trained_values=run.trained_values,
        last_loss=last_loss,
        seconds=time.perf_counter() - started,
    )


def _run_steps(run: Run, first_step: int, on_step: Callable[[StepReport], None] | None) -> float:
    """The loop: all steps from ``first_step`` on; returns the last loss."""
    config, accelerator = run.config, run.accelerator
    loss = math.nan
    batches = run.batches(first_step)
    log = MetricsLog(accelerator, config.output_dir, first_step)
    freezing_log = FreezingLog(config.output_dir, run.freezing if accelerator.is_main_process else None)
    if first_step == 0:
        draw_samples(run, 0)
    progress = tqdm(initial=first_step, total=run.total_steps, desc="training")
    started = time.perf_counter()
    try:
        with Interruption() as interruption:
            for step in range(first_step + 1, run.total_steps + 1):
                metrics = _optimizer_step(run, batches, step)
                loss = metrics["loss"]
                log.write(step, metrics)
                freezing_log.write()
                progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
                progress.update()
                if step % config.checkpointing_steps == 0:
                    save_run(run, step)
                if step % run.steps_between_samples == 0 and step < run.total_steps:
                    draw_samples(run, step)
                if on_step is not None:
                    on_step(StepReport(step, run.total_steps, loss, time.perf_counter() - started))
                if interruption.requested and step < run.total_steps:
                    _stop_early(run, step)
    finally:
        progress.close()
        log.close()
    return loss


def _optimizer_step(run: Run, batches: Iterator[Batch], step: int) -> dict[str, float]:
    """One update from ``gradient_accumulation_steps`` batches; returns the numbers of the step.

    Raises:
        TrainingDiverged: loss or gradient is not finite; the values are as they were before the step.
    """
    config, accelerator = run.config, run.accelerator
    # Noise has its own generators; this is for dropout inside a base model that has any.
    torch.manual_seed(keyed_generator(config.seed, "step", step, accelerator.process_index).initial_seed())
    sums = torch.zeros(3, device=accelerator.device)  # total, instance, prior
    for _ in range(config.gradient_accumulation_steps):
        losses = _losses(run, next(batches))
        accelerator.backward(losses.total / config.gradient_accumulation_steps)
        prior = losses.prior if losses.prior is not None else torch.zeros_like(losses.total)
        sums += torch.stack((losses.total, losses.instance, prior)).detach()
    loss, instance_loss, prior_loss = accelerator.reduce(sums / config.gradient_accumulation_steps, "mean").tolist()
    if run.freezing is not None:
        run.freezing.drop_gradients()
    _average_gradients(run)
    gradient_norm = float(accelerator.clip_grad_norm_(run.parameters.values(), config.max_grad_norm))
    # With fp16 a gradient that overflowed is normal: the scaler leaves the step out and scales less.
    if not math.isfinite(loss) or (not math.isfinite(gradient_norm) and accelerator.mixed_precision != "fp16"):
        raise TrainingDiverged(_divergence_message(run, step))
    learning_rate = run.lr_scheduler.get_last_lr()[0]
    run.optimizer.step()
    run.lr_scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    metrics = {"loss": loss, "learning_rate": learning_rate, "gradient_norm": gradient_norm}
    if config.with_prior_preservation:
        metrics |= {"instance_loss": instance_loss, "prior_loss": prior_loss}
    return metrics


def _losses(run: Run, batch: Batch) -> Losses:
    config = run.config
    randomness = draw_randomness(
        config.seed,
        batch.samples,
        batch.latents.mean,
        timestep_sampling=config.timestep_sampling,
        number_of_timesteps=run.family.number_of_timesteps,
    )
    with run.accelerator.autocast():
        return denoising_losses(
            run.family,
            batch.latents,
            run.prompts.conditioning(batch.prompts),
            randomness,
            prior_loss_weight=config.prior_loss_weight if config.with_prior_preservation else None,
        )


def _average_gradients(run: Run) -> None:
    """The mean gradient of all processes, sent as one short vector; an adapter has few values."""
    if run.accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in run.parameters.values() if parameter.grad is not None]
    mean = run.accelerator.reduce(torch.cat(gradients), "mean")
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part)


def _announce(run: Run, first_step: int) -> None:
    say = run.accelerator.print
    for stream in run.streams:
        for prompt in dict.fromkeys(picture.prompt for picture in stream.pictures):
            if lost := run.family.truncated_text(prompt):
                say(f"the text encoder does not read the end of a prompt: {lost!r}")
    say(
        f"training {run.trained_values:,} values in {run.adapted_layers} layers of {' and '.join(run.models)}, "
        f"{run.total_steps} steps, learning rate {run.config.learning_rate:g}"
    )
    if (settings := run.config.freezing) is not None and settings.warmup_steps < run.total_steps:
        frozen = settings.number_frozen(len(run.parameters))
        say(
            f"from step {settings.warmup_steps} to {settings.last_step}, the {frozen} of {len(run.parameters)} vectors "
            f"that trained most are frozen, chosen anew every {settings.interval} steps"
        )
    if first_step:
        say(f"going on from step {first_step}")


def _stop_early(run: Run, step: int) -> None:
    save_run(run, step)
    if run.accelerator.is_main_process:
        save_result(run, run.config.output_dir / ADAPTER_FILE)
    run.accelerator.print(
        f"stopped after step {step}, all saved in {run.config.output_dir}; "
        "go on with the same command and --resume_from_checkpoint latest"
    )
    raise KeyboardInterrupt


def _divergence_message(run: Run, step: int) -> str:
    return (
        f"the loss is no finite number in step {step}, so training stopped; try a lower --learning_rate than "
        f"{run.config.learning_rate:g}, or --mixed_precision no. What was saved before is in {run.config.output_dir}"
    )
