"""Numbers that are none any more (NaN, infinity): where in a step they came from, told before anything is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import Tensor

from svft_diffusion.errors import UserError
from svft_diffusion.training.batches import Batch
from svft_diffusion.training.checkpoints import last_good_checkpoint
from svft_diffusion.training.run import Run

_MOST_FILES_NAMED = 8


class TrainingDiverged(UserError):
    """Something is no finite number any more; nothing of it was saved.

    Attributes:
        files: names of the pictures that it came from, or may have come from.
    """

    def __init__(self, message: str, files: Sequence[str]) -> None:
        super().__init__(message)
        self.files = list(files)


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass of a step was given, and its loss."""

    batch: Batch
    conditioning: Mapping[str, Tensor]
    loss: Tensor


def diverged(run: Run, step: int, passes: Sequence[ForwardPass], what: str) -> TrainingDiverged:
    """The error to raise when ``what`` is not finite in ``step``. All processes must call this together.

    Args:
        passes: the step's, in this process.
        what: the quantity that was found, such as ``the loss``.
    """
    causes = [cause for part in passes if (cause := _cause(run, part)) is not None]
    found: list[tuple[str, list[str]]] = gather_object(causes)
    good = last_good_checkpoint(run.config.output_dir)
    saved = (
        f"the last good checkpoint is {good.name}: go on from it with --resume_from_checkpoint {good.name}"
        if good is not None
        else "there is no checkpoint yet"
    )
    if not found:
        advice = f"try a lower --learning_rate than {run.config.learning_rate:g}, or --mixed_precision no"
        message = f"{what} is no finite number in step {step}, so training stopped; {advice}; {saved}"
        return TrainingDiverged(message, [])
    reasons = list(dict.fromkeys(reason for reason, _ in found))
    files = list(dict.fromkeys(name for _, names in found for name in names))
    named = ", ".join(files[:_MOST_FILES_NAMED]) + (" and others" if len(files) > _MOST_FILES_NAMED else "")
    message = f"{' and '.join(reasons)} in step {step}, so training stopped; pictures: {named}; {saved}"
    return TrainingDiverged(message, files)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every value of every tensor is a finite number."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _cause(run: Run, part: ForwardPass) -> tuple[str, list[str]] | None:
    """(what is not finite, the pictures it belongs to), from the inputs to what follows from them."""
    mean, std = (values.flatten(1) for values in (part.batch.latents.mean, part.batch.latents.std))
    bad = ~(torch.isfinite(mean).all(dim=1) & torch.isfinite(std).all(dim=1))
    files = picture_names(run, part.batch)
    if bad.any():
        return "pixels or latents are not finite", [files[row] for row in bad.nonzero().flatten().tolist()]
    if not all_finite(list(part.conditioning.values())):
        return "what the text encoder says is not finite", files
    if not bool(torch.isfinite(part.loss)):
        advice = f"(try a lower --learning_rate than {run.config.learning_rate:g}, or --mixed_precision no)"
        return f"the loss is no finite number {advice}", files
    return None


def picture_names(run: Run, batch: Batch) -> list[str]:
    """The file of each row of a batch, without its folder."""
    streams = {stream.kind: stream for stream in run.streams}
    located = [(streams[kind], streams[kind].parts(number)) for kind, number in batch.samples]
    return [" beside ".join(stream.pictures[part.picture].path.name for part in parts) for stream, parts in located]
