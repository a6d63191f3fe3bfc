"""What a visitor asks the studio for, and what there is in return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.errors import UserError
from svft_diffusion.markdown import plain
from svft_diffusion.sampling.adapter_choice import CheckedAdapter
from svft_diffusion.sampling.plan import check_picture_settings
from svft_diffusion.sampling.schedulers import scheduler_name

MOST_PICTURES = 16  # for one request
LARGEST_SIDE = 4096  # pixels
_LONGEST_SHOWN = 200  # characters of a prompt's end


@dataclass(frozen=True)
class PictureRequest:
    """Everything that a visitor's pictures depend on; nothing is taken from what was generated before."""

    base: str
    prompt: str
    adapters: tuple[tuple[CheckedAdapter, AdapterWeight], ...] = ()  # with their weights
    negative_prompt: str = ""
    seed: int = 0  # of the first picture; picture i has seed + i
    num_images: int = 1
    num_inference_steps: int = 25
    guidance_scale: float = 4.0
    width: int | None = None  # pixels; None: the base model's own
    height: int | None = None
    scheduler: str | None = None  # a name of `svft_diffusion.sampling.schedulers`; None: the base model's own


@dataclass(frozen=True)
class SavedPicture:
    """A picture on disk."""

    path: Path
    seed: int
    blacked_out: bool = False  # by the base model's safety checker
    not_read: str = ""  # the end of the prompt, where that is too long for the base model


@dataclass(frozen=True)
class Step:
    """How far the drawing is."""

    picture: int  # from 0
    step: int  # denoising steps done
    preview: Image.Image | None  # small, and None where it can't be had


def words_on(pictures: Sequence[SavedPicture]) -> str:
    """Sentences in Markdown on what nobody expects of pictures; empty if there is nothing."""
    return " ".join(filter(None, (_words_on_hidden(pictures), _words_on_long_prompts(pictures))))


def _words_on_hidden(pictures: Sequence[SavedPicture]) -> str:
    """A sentence on those that the base model's safety checker has blacked out; empty if there are none."""
    hidden = sum(picture.blacked_out for picture in pictures)
    if not hidden:
        return ""
    them = f"{hidden} of them {'were' if hidden > 1 else 'was'}" if len(pictures) > 1 else "It was"
    return f"{them} blacked out by the base model's safety checker; another seed or prompt may pass it."


def _words_on_long_prompts(pictures: Sequence[SavedPicture]) -> str:
    not_read = next((picture.not_read for picture in pictures if picture.not_read), "")
    if not not_read:
        return ""
    shown = not_read if len(not_read) <= _LONGEST_SHOWN else f"{not_read[: _LONGEST_SHOWN - 3]}..."
    return f"The prompt is too long for the base model, which did not read its end: {plain(shown)}"


def check_request(request: PictureRequest) -> None:
    """Refuse what no picture can be made of, before any model is loaded.

    Raises:
        UserError: names the setting and what it may be, or the adapter that is there twice.
    """
    if not request.prompt.strip():
        raise UserError("write a prompt first: what should be drawn?")
    if not 1 <= request.num_images <= MOST_PICTURES:
        raise UserError(f"the number of pictures must be between 1 and {MOST_PICTURES}, got {request.num_images}")
    for seed in (request.seed, request.seed + request.num_images - 1):
        check_picture_settings(seed, request.num_inference_steps, request.guidance_scale)
    for name, size in (("width", request.width), ("height", request.height)):
        if size is not None and (not 8 <= size <= LARGEST_SIDE or size % 8):
            raise UserError(f"the {name} must be a multiple of 8 between 8 and {LARGEST_SIDE}, got {size}")
    if request.scheduler is not None:
        scheduler_name(request.scheduler)
    names: dict[str, str] = {}
    for adapter, _ in request.adapters:
        if adapter.sha256 in names:
            twice = f"{names[adapter.sha256]} and {adapter.name} are"
            raise UserError(f"{twice} the same adapter; give it once, at the whole weight")
        names[adapter.sha256] = adapter.name
