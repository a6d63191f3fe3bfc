"""Memory: the measured peak of a run, and what to do when it is not enough."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from svft_diffusion.errors import UserError
from svft_diffusion.training.config import TrainingConfig

# What torch raises on the CPU and on Apple's chips is a plain RuntimeError.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def peak_memory(device: torch.device) -> int:
    """Most bytes that torch held at a time on a GPU, since `forget_peak`; elsewhere that the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(device: torch.device) -> None:
    """Measure the peak from here on; the peak of a process can't be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_in_words(bytes_: int, device: torch.device) -> str:
    """``7.9 of 8.0 GB`` of a GPU, ``3.2 GB`` of a process."""
    if device.type == "cuda":
        return f"{bytes_ / 1e9:.1f} of {torch.cuda.get_device_properties(device).total_memory / 1e9:.1f} GB"
    return f"{bytes_ / 1e9:.1f} GB"


@contextmanager
def out_of_memory_explained(config: TrainingConfig, device: torch.device) -> Iterator[None]:
    """Turn a lack of memory inside into one line with the measured peak and the settings that help most.

    Raises:
        UserError: in the place of torch's exception.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as problem:
        if not is_out_of_memory(problem):
            raise
        where = "the GPU's memory" if device.type == "cuda" else "memory"
        raise UserError(
            f"{where} is not enough (peak before it failed: {memory_in_words(peak_memory(device), device)}); "
            f"what helps most here: {', '.join(memory_remedies(config)[:3])}. What was saved before is kept"
        ) from problem


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an exception is a lack of memory on any device."""
    if isinstance(problem, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(problem, RuntimeError) and any(words in str(problem).lower() for words in _OUT_OF_MEMORY)


def memory_remedies(config: TrainingConfig) -> list[str]:
    """Settings that would make this run smaller, the most helpful one first; three at least."""
    pictures = config.train_batch_size
    candidates = {
        "--gradient_checkpointing": not config.gradient_checkpointing,
        f"--train_batch_size 1 --gradient_accumulation_steps {config.pictures_per_step}": pictures > 1,
        "--mixed_precision bf16": config.mixed_precision in (None, "no"),
        "--sample_batch_size 1": config.with_prior_preservation and config.sample_batch_size > 1,
        "no --train_text_encoder": config.train_text_encoder,
        "--compress_activations": not config.compress_activations,
        "a smaller --resolution": True,
        "--targets cross-attention": config.targets != "cross-attention" and not config.train_text_encoder,
        "a --rank of a quarter of what it is": True,
        "closing other programs that use the same device": True,
    }
    return [remedy for remedy, helps in candidates.items() if helps]
