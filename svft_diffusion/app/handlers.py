"""What happens when a button of the page is pressed; the work itself is done by the studio and the sampler."""

from __future__ import annotations

import dataclasses
import functools
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from svft_diffusion.app.cards import (
    HIGHEST_WEIGHT,
    LOWEST_WEIGHT,
    Slots,
    card_updates,
    replaced,
    weighted,
    with_adapter,
)
from svft_diffusion.app.library import adapters_in
from svft_diffusion.app.studio import PictureRequest, Studio
from svft_diffusion.errors import UserError
from svft_diffusion.models.loading import base_display_name
from svft_diffusion.sampling.adapter_choice import CheckedAdapter, check_adapter, unique_names

Handler = TypeVar("Handler", bound=Callable[..., Any])


def shows_user_errors(handler: Handler) -> Handler:
    """Turn a user's error into a notice on the page, without a trace."""

    @functools.wraps(handler)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        try:
            return handler(*arguments, **named)
        except UserError as error:
            # The notice is shown as HTML, and the message may quote a file's name.
            raise gr.Error(html.escape(str(error), quote=False), duration=None, print_exception=False) from None

    return wrapped  # type: ignore[return-value]


class Handlers:
    """The page's events. What belongs to one visitor (base, adapters) comes in and goes out as state."""

    def __init__(self, studio: Studio, adapters_dir: Path) -> None:
        self._studio = studio
        self._adapters_dir = adapters_dir

    def library(self) -> list[str]:
        """Labels of the adapters that can be added."""
        return list(adapters_in(self._adapters_dir))

    def refresh_library(self) -> Any:
        """The list of adapters, read again."""
        return gr.update(choices=self.library())

    @shows_user_errors
    def load_base(self, name: str, slots: Slots, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        """Load another base model; adapters that were trained on another one leave the page."""
        base = name.strip()
        progress(0, desc=f"loading {base_display_name(base)}")
        status = self.base_status(base)
        kept = tuple(adapter if adapter is not None and self._fits(adapter, base) else None for adapter in slots)
        removed = [old.name for old, new in zip(slots, kept, strict=True) if old is not None and new is None]
        if removed:
            names = html.escape(", ".join(removed), quote=False)
            gr.Warning(f"Removed, because trained on another base model: {names}")
        return [base, status, kept, *card_updates(slots, kept)]

    def base_status(self, base: str) -> str:
        """Load ``base`` if it is not, and say so."""
        resolution = self._studio.open_base(base)
        return f"Loaded: {base_display_name(base)}, {resolution} x {resolution} pixels"

    @shows_user_errors
    def add_from_library(self, label: str | None, base: str, slots: Slots) -> list[Any]:
        """Add the adapter that is chosen in the list."""
        if not label:
            raise UserError("choose an adapter from the list first")
        file = adapters_in(self._adapters_dir).get(label)
        if file is None:
            raise UserError(f"there is no adapter {label!r} any more; refresh the list")
        after = self.with_file(slots, file, base, Path(label).name)
        return [after, *card_updates(slots, after)]

    @shows_user_errors
    def add_uploads(self, files: list[str] | None, base: str, slots: Slots) -> list[Any]:
        """Add adapters from the visitor's machine."""
        after = slots
        for file in map(Path, files or []):
            after = self.with_file(after, file, base, file.stem)
        return [after, *card_updates(slots, after)]

    def with_file(self, slots: Slots, file: Path, base: str, label: str, weight: float | None = None) -> Slots:
        """The slots with the adapter of ``file``, at ``weight`` or the one that the file suggests.

        Raises:
            UserError: the file is no adapter, belongs to another base, or there is no place for it.
        """
        name = unique_names([*(adapter.name for adapter in slots if adapter is not None), label])[-1]
        adapter = check_adapter(file, base, name=name, on_mismatch=self._studio.on_mismatch)
        if weight is None:
            weight = min(max(adapter.header.suggested_strength, LOWEST_WEIGHT), HIGHEST_WEIGHT)
        return with_adapter(slots, dataclasses.replace(adapter, weight=weight))

    def remove(self, number: int, slots: Slots) -> list[Any]:
        """Empty one slot."""
        after = replaced(slots, number, None)
        return [after, *card_updates(slots, after)]

    def _fits(self, adapter: CheckedAdapter, base: str) -> bool:
        try:
            check_adapter(adapter.file, base, name=adapter.name, on_mismatch=self._studio.on_mismatch)
        except UserError:
            return False
        return True

    @shows_user_errors
    def generate(
        self,
        base: str,
        slots: Slots,
        prompt: str,
        negative_prompt: str,
        seed: int | None,
        num_images: int,
        num_inference_steps: int,
        guidance_scale: float,
        *weights: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[list[tuple[str, str]], str]:
        """Generate, save and show the pictures."""
        if seed is None:
            raise UserError("the seed must be a whole number")
        request = PictureRequest(
            base=base,
            prompt=prompt,
            adapters=weighted(slots, weights),
            negative_prompt=negative_prompt,
            seed=int(seed),
            num_images=int(num_images),
            num_inference_steps=int(num_inference_steps),
            guidance_scale=float(guidance_scale),
        )

        def show_progress(picture: int, step: int) -> None:
            steps = request.num_inference_steps
            done = picture * steps + min(step, steps)
            progress(
                (done, request.num_images * steps), desc=f"Picture {picture + 1} of {request.num_images}", unit="steps"
            )

        progress(0, desc="Preparing")
        saved = self._studio.generate_pictures(request, show_progress)
        folder = self._studio.output_dir.as_posix()
        status = f"Saved in {folder}: {len(saved)} picture{'s' if len(saved) > 1 else ''}, settings inside"
        return [(str(picture.path), f"seed {picture.seed}") for picture in saved], status
