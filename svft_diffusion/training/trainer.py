"""DreamBooth training of an adapter: the command line, the demo, the evaluation and the app all call `train`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm  # shows a bar in the first process only

from svft_diffusion.errors import Interrupted, UserError
from svft_diffusion.factors import use_cache
from svft_diffusion.files.training_folder import ADAPTER_FILE
from svft_diffusion.models.loading import base_display_name
from svft_diffusion.terminal import output_may_vanish, printable
from svft_diffusion.training.base import BaseLoader
from svft_diffusion.training.card import write_card, write_config
from svft_diffusion.training.checkpoints import remove_leftovers
from svft_diffusion.training.checks import Inputs, check
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.failure import write_failure_report
from svft_diffusion.training.finite import TrainingDiverged
from svft_diffusion.training.history import belongs_into_history, history_file, history_interval
from svft_diffusion.training.hub import push_to_hub
from svft_diffusion.training.interruption import Interruption
from svft_diffusion.training.loss_plot import draw_loss
from svft_diffusion.training.memory import out_of_memory_explained
from svft_diffusion.training.metrics import FreezingLog, MetricsLog, start_tracker
from svft_diffusion.training.optimizers import state_in_8_bits
from svft_diffusion.training.output_folder import prepare_folder, working_alone
from svft_diffusion.training.persistence import resume, save_result, save_run
from svft_diffusion.training.photo_report import notes_on_photos, write_photos
from svft_diffusion.training.quantization import quantization_in_words
from svft_diffusion.training.run import Run
from svft_diffusion.training.self_check import check_file
from svft_diffusion.training.setup import make_accelerator, prepare_run
from svft_diffusion.training.sharding import shares_in_words
from svft_diffusion.training.speed import attention_in_words, compilation_explained
from svft_diffusion.training.status import ENCODING_PICTURES, SAMPLING, STOPPING, RunStatus
from svft_diffusion.training.step import optimizer_step
from svft_diffusion.training.validation import draw_samples, samples_missing


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


def train(
    config: TrainingConfig,
    *,
    on_step: Callable[[StepReport], None] | None = None,
    load: BaseLoader | None = None,
    stop_asked: Callable[[], bool] | None = None,
) -> TrainingResult:
    """Train an adapter and write it, with everything about it, into ``config.output_dir``.

    Args:
        on_step: called after every optimizer step.
        load: where the base model comes from (default: it is loaded); training changes it, see `SharedBase`.
        stop_asked: called again and again; True ends the run as a stop file does.

    Raises:
        UserError: settings, files or base model that can't work; or a file can't be written. What was saved before
            stays.
        TrainingDiverged: something is no finite number any more; what was saved before stays.
        Interrupted: after Ctrl-C, another signal or a stop file; the adapter and a checkpoint are saved.
    """
    is_new = not config.output_dir.is_dir()  # and is made for a run that can begin, not before
    with nullcontext() if is_new else working_alone(config.output_dir):
        if not is_new:
            remove_leftovers(config.output_dir)  # before the check looks for checkpoints
        return _train_checked(config, check(config), on_step, load, stop_asked, is_new)


def _train_checked(
    config: TrainingConfig,
    inputs: Inputs,
    on_step: Callable[[StepReport], None] | None,
    load: BaseLoader | None,
    stop_asked: Callable[[], bool] | None,
    is_new: bool,
) -> TrainingResult:
    started = time.perf_counter()
    use_cache(config.factor_cache, config.factor_cache_size)
    # Training seeds torch at every step; the caller's own random numbers are not touched by that.
    with torch.random.fork_rng(devices=[]), output_may_vanish():
        accelerator = make_accelerator(config)
        for note in inputs.notes:
            accelerator.print(printable(note))
        watch = _Watch(accelerator, config.output_dir, stop_asked)
        try:
            memory = out_of_memory_explained(config, accelerator.device)
            with watch.interruption, watch.status, memory, compilation_explained(config):
                run = prepare_run(config, inputs, accelerator, watch.progress, load=load)
                with run.class_folders as folders:
                    if is_new:
                        folders.enter_context(working_alone(config.output_dir))
                    return _train(run, inputs, started, watch, on_step)
        finally:
            accelerator.end_training()


class _Watch:
    """What goes on beside a run: requests to end it, and the word on where it stands."""

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, stop_asked: Callable[[], bool] | None = None
    ) -> None:
        self._together = accelerator.num_processes > 1
        self._is_first = accelerator.is_main_process
        self.interruption = Interruption(output_dir, stop_asked)
        self.status = RunStatus(output_dir, active=accelerator.is_main_process)
        if accelerator.is_main_process:
            self.interruption.forget_old_stop_file()

    def progress(self, state: str) -> None:
        """Called again and again outside of steps; raises `Interrupted` if the run shall end."""
        self.status.enter(state)
        # One of several samples, and all of them encode: none must leave the others alone. The first, which draws class
        # images, tells them if it ends.
        if not self._together or (self._is_first and state not in (SAMPLING, ENCODING_PICTURES)):
            self.interruption.check()


def _train(
    run: Run, inputs: Inputs, started: float, watch: _Watch, on_step: Callable[[StepReport], None] | None
) -> TrainingResult:
    config, accelerator = run.config, run.accelerator
    first_step = run.finished_steps = resume(run, inputs.checkpoint) if inputs.checkpoint else 0
    run.shard()
    _announce(run, first_step)
    if accelerator.log_with:
        start_tracker(accelerator, config.report_to)
    if accelerator.is_main_process:
        for note in prepare_folder(config.output_dir, first_step):
            accelerator.print(note)
        write_config(config)
        if first_step == 0:
            for note in notes_on_photos(run):
                accelerator.print(printable(note))
            write_photos(run)
    accelerator.wait_for_everyone()

    with MetricsLog(accelerator, config.output_dir, first_step) as log:
        try:
            samples = _run_steps(run, log, watch, on_step)
        except Interrupted:
            watch.status.enter(STOPPING)
            if run.finished_steps > first_step:
                _save_early(run)
            raise
        except Exception as error:
            unexpected = isinstance(error, TrainingDiverged) or not isinstance(error, UserError)
            if accelerator.is_main_process and unexpected:
                write_failure_report(run, error, log.last_losses)
            raise
    if accelerator.is_main_process:
        save_result(run, config.output_dir / ADAPTER_FILE, samples)
        write_card(config, samples)
        _say(run, draw_loss(config.output_dir))
    if run.is_sharded:
        accelerator.wait_for_everyone()  # for the file
    if config.checks_result and (accelerator.is_main_process or run.is_sharded):
        _say(run, check_file(run, config.output_dir / ADAPTER_FILE))
    if config.push_to_hub and accelerator.is_main_process:
        accelerator.print(f"uploaded to {push_to_hub(config, samples)}")
    accelerator.wait_for_everyone()
    return TrainingResult(
        output_dir=config.output_dir,
        adapter=config.output_dir / ADAPTER_FILE,
        samples=samples,
        steps=run.total_steps,
        trained_values=run.trained_values,
        last_loss=log.last_losses[-1] if run.finished_steps > first_step else math.nan,
        seconds=time.perf_counter() - started,
    )


def _run_steps(run: Run, log: MetricsLog, watch: _Watch, on_step: Callable[[StepReport], None] | None) -> list[Path]:
    """The loop: all steps that are left; returns the samples after the last."""
    config, first_step = run.config, run.finished_steps
    freezing_log = FreezingLog(config.output_dir, run.freezing if run.accelerator.is_main_process else None)
    batches = run.batches(first_step)
    watch.interruption.check_together(run.accelerator)
    if samples_missing(run, first_step):
        draw_samples(run, first_step)
    progress = tqdm(initial=first_step, total=run.total_steps, desc="training")
    started = time.perf_counter()
    try:
        for step in range(first_step + 1, run.total_steps + 1):
            begun = time.perf_counter()
            metrics = optimizer_step(run, batches, step)
            seconds = time.perf_counter() - begun
            run.finished_steps = step
            log.write(step, metrics)
            freezing_log.write()
            watch.status.step_finished(step, run.total_steps, loss=log.smoothed_loss, seconds=seconds)
            _save_what_is_due(run, step)
            if on_step is not None:
                on_step(StepReport(step, run.total_steps, metrics["loss"], time.perf_counter() - started))
            watch.interruption.check_together(run.accelerator)
            progress.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
            progress.update()
        return draw_samples(run, run.total_steps)
    finally:
        progress.close()
        if isinstance(batches, Generator):
            batches.close()  # and with it the processes that load pictures


def _save_what_is_due(run: Run, step: int) -> None:
    """The checkpoint, the adapter of the history and the samples of a step, in the order of their worth."""
    config = run.config
    if step % config.steps_between_checkpoints(run.total_steps) == 0:
        save_run(run, step)
    samples = step < run.total_steps and run.draws_samples(step)
    interval = history_interval(config.history_steps, run.total_steps)
    wanted = belongs_into_history(step, interval=interval, sampled=samples, total_steps=run.total_steps)
    if wanted and run.accelerator.is_main_process:
        save_result(run, history_file(config.output_dir, step), finished_steps=step)
    if samples:
        draw_samples(run, step)


def _announce(run: Run, first_step: int) -> None:
    say = run.accelerator.print
    say(printable(f"base model: {base_display_name(run.config.pretrained_model_name_or_path)}"))
    for stream in run.streams:
        for prompt in dict.fromkeys(picture.prompt for picture in stream.pictures):
            if lost := run.family.truncated_text(prompt):
                say(f"the text encoder does not read the end of a prompt: {lost!r}")
    say(
        f"training {run.trained_values:,} values in {run.adapted_layers} layers of {' and '.join(run.models)}, "
        f"{run.total_steps} steps, learning rate {run.optimizer.param_groups[0]['initial_lr']:g}"
    )
    say(f"attention: {attention_in_words(run.models)}")
    if (mix := run.streams[0].mix) is not None:
        say(f"{run.config.cut_mix_probability:.0%} of the samples show two subjects, such as {mix.prompts[0]!r}")
    if run.is_sharded:
        say(f"FSDP: {shares_in_words(next(iter(run.models.values())))}")
    if run.config.base_quantization != "none":
        say(quantization_in_words(next(iter(run.models.values()))))
    if run.config.optimizer == "adamw8bit":
        say("8-bit AdamW keeps the state of {:,} of {:,} values in 8 bits".format(*state_in_8_bits(run.trained)))
    if run.averaging is not None:
        say("samples and the adapter file hold the values' average over steps, checkpoints also what trains")
    if (limit := run.config.stop_text_encoder_training) is not None:
        say(f"the text encoder trains for {limit:g} steps")
    if run.tokens:
        steps = f", for {run.token_steps} steps" if run.token_steps is not None else ""
        say(
            f"new tokens train in {' and '.join(name.partition('.')[0] for name in run.tokens)}, learning rate "
            f"{run.config.token_learning_rate:g}{steps}"
        )
    if (settings := run.config.freezing) is not None and settings.warmup_steps < run.total_steps:
        frozen = settings.number_frozen(len(run.parameters))
        say(
            f"from step {settings.warmup_steps} to {settings.last_step}, the {frozen} of {len(run.parameters)} vectors "
            f"that trained most are frozen, chosen anew every {settings.interval} steps"
        )
    if first_step:
        say(f"going on from step {first_step}")


def _save_early(run: Run) -> None:
    save_run(run, run.finished_steps)
    if run.accelerator.is_main_process:
        save_result(run, run.config.output_dir / ADAPTER_FILE)
        _say(run, draw_loss(run.config.output_dir))
    run.accelerator.print(
        f"stopped after step {run.finished_steps}, all saved in {run.config.output_dir}; "
        "go on with the same command and --resume_from_checkpoint latest"
    )


def _say(run: Run, text: str) -> None:
    if text:
        run.accelerator.print(text)
