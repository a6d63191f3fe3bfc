"""``--dry_run``: two real steps of a run, and what they say of the whole of it. Nothing is written beside caches."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from svft_diffusion.factors import use_cache
from svft_diffusion.files.training_folder import ADAPTER_FILE
from svft_diffusion.sampling.sample import generate
from svft_diffusion.terminal import printable
from svft_diffusion.training.checks import Inputs, check
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.memory import forget_peak, memory_in_words, out_of_memory_explained, peak_memory
from svft_diffusion.training.persistence import save_result
from svft_diffusion.training.run import Run
from svft_diffusion.training.setup import make_accelerator, prepare_run
from svft_diffusion.training.speed import compilation_explained
from svft_diffusion.training.step import optimizer_step

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_SAMPLING_STEPS = 25  # of the samples that a run draws


@dataclass(frozen=True)
class DryRun:
    """What a run would need. Times are measured once each; other work on the machine is in them."""

    device: str
    peak_memory: int  # bytes; on a GPU what torch held there, elsewhere what the process held
    steps: int
    seconds_to_start: float  # loading, decompositions that are not cached, encoding
    seconds_per_step: float
    class_images: int  # yet to be drawn
    seconds_per_class_image: float
    samples: int  # in all
    seconds_per_sample: float
    adapter_bytes: int
    trained_values: dict[str, int]  # by model
    gradient_norms: dict[str, float]  # by model, in the second step
    photos: int
    passes_per_photo: float

    @property
    def total_seconds(self) -> float:
        """Estimate for the whole run."""
        return (
            self.seconds_to_start
            + self.steps * self.seconds_per_step
            + self.class_images * self.seconds_per_class_image
            + self.samples * self.seconds_per_sample
        )

    def to_mapping(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "total_seconds": self.total_seconds}

    def in_words(self) -> str:
        """Some lines for a terminal."""
        held_by = "on the GPU" if self.device.startswith("cuda") else "held by the process"
        values = ", ".join(f"{count:,} in {model}" for model, count in self.trained_values.items())
        norms = ", ".join(f"{model} {norm:.3g}" for model, norm in self.gradient_norms.items())
        times = [f"{self.seconds_to_start:.0f} s to start", f"{self.steps} steps of {self.seconds_per_step:.2f} s"]
        if self.class_images:
            times.append(f"{self.class_images} class images of {self.seconds_per_class_image:.1f} s")
        if self.samples:
            times.append(f"{self.samples} samples of {self.seconds_per_sample:.1f} s")
        lines = [
            f"memory: {memory_in_words(self.peak_memory, torch.device(self.device))} {held_by} at the most",
            f"time: about {_duration(self.total_seconds)}: {', '.join(times)}",
            f"adapter: {self.adapter_bytes / 1000:.1f} kB; trained values: {values}",
            f"gradient norm: {norms}",
            f"photos: {self.photos}, each seen {self.passes_per_photo:.0f} times",
        ]
        return "\n".join(lines)


def dry_run(config: TrainingConfig) -> DryRun:
    """Take two steps of the run that ``config`` describes, with a class image and a sample where it draws any.

    Raises:
        UserError: what the run itself would raise, a lack of memory included.
    """
    started = time.perf_counter()
    inputs = check(config)
    use_cache(config.factor_cache, config.factor_cache_size)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        tried, tried_inputs = _for_trial(config, inputs, Path(folder))
        accelerator = make_accelerator(tried)
        forget_peak(accelerator.device)
        for note in inputs.notes:
            accelerator.print(printable(note))
        with out_of_memory_explained(config, accelerator.device), compilation_explained(config):
            run = prepare_run(tried, tried_inputs, accelerator)
            with run.class_folders:
                return _measure(run, config, inputs, started)


def _for_trial(config: TrainingConfig, inputs: Inputs, folder: Path) -> tuple[TrainingConfig, Inputs]:
    """The same run with everything that it writes in ``folder``, and one hasty class image for each subject."""
    tried = dataclasses.replace(
        config,
        output_dir=folder,
        report_to="none",
        resume_from_checkpoint=None,
        num_class_images=1,
        prior_generation_num_inference_steps=1,
    )
    subjects = [
        subject if subject.class_data_dir is None else dataclasses.replace(subject, class_data_dir=folder / str(number))
        for number, subject in enumerate(inputs.subjects)
    ]
    return tried, dataclasses.replace(inputs, subjects=subjects)


def _measure(run: Run, config: TrainingConfig, inputs: Inputs, started: float) -> DryRun:
    batches = run.batches(0)
    begun = time.perf_counter()
    metrics = optimizer_step(run, batches, 1)
    if run.total_steps > 1:
        begun = time.perf_counter()  # the first begins with work that is done once, such as compilation
        metrics = optimizer_step(run, batches, 2)
    seconds_per_step, seconds_to_start = time.perf_counter() - begun, begun - started
    class_images = _missing_class_images(config, inputs)
    prompt = inputs.subjects[0].instance_prompt
    per_class_image = _drawing_time(run, prompt, config.prior_generation_num_inference_steps) if class_images else 0.0
    samples = run.config.num_validation_images * _sampling_events(run) if config.validation_prompt else 0
    adapter = run.config.output_dir / ADAPTER_FILE
    save_result(run, adapter)
    values: Counter[str] = Counter()
    for name, parameter in run.parameters.items():
        values[name.partition(".")[0]] += parameter.numel()
    for rows in run.tokens.values():
        values["new tokens"] += rows.numel()
    photos = len(run.streams[0].pictures)
    return DryRun(
        device=str(run.accelerator.device),
        steps=run.total_steps,
        seconds_to_start=seconds_to_start,
        seconds_per_step=seconds_per_step,
        class_images=class_images,
        seconds_per_class_image=per_class_image,
        samples=samples,
        seconds_per_sample=_drawing_time(run, prompt, _SAMPLING_STEPS) if samples else 0.0,
        adapter_bytes=adapter.stat().st_size,
        trained_values=dict(values),
        gradient_norms={model: metrics.get(f"gradient_norm_{model}", metrics["gradient_norm"]) for model in run.models},
        photos=photos,
        passes_per_photo=run.total_steps * config.pictures_per_step * run.accelerator.num_processes / photos,
        peak_memory=peak_memory(run.accelerator.device),  # last: pictures count too
    )


def _drawing_time(run: Run, prompt: str, steps: int) -> float:
    """Seconds for a picture of so many denoising steps, from pictures of one and of three."""

    def seconds(few_steps: int) -> float:
        begun = time.perf_counter()
        with run.resting.awake(), torch.no_grad(), run.accelerator.autocast():
            generate(
                run.family.pipeline,
                prompt,
                seed=run.config.seed,
                num_inference_steps=few_steps,
                height=run.config.resolution,
                width=run.config.resolution,
            )
        return time.perf_counter() - begun

    seconds(1)  # what a first picture takes longer
    one = seconds(1)
    return one + max(0.0, seconds(3) - one) / 2 * (steps - 1)


def _missing_class_images(config: TrainingConfig, inputs: Inputs) -> int:
    """As many as the folders lack; pictures of another recipe, which would be drawn anew, count as there."""
    folders = {subject.class_data_dir for subject in inputs.subjects if subject.class_data_dir is not None}
    there = [len([file for file in folder.glob("*") if file.suffix.lower() in _PICTURES]) for folder in folders]
    return sum(max(0, config.num_class_images - number) for number in there)


def _sampling_events(run: Run) -> int:
    """At step 0, in between, and at the end."""
    return 2 + (run.total_steps - 1) // run.steps_between_samples


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
