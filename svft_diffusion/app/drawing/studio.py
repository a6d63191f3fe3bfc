"""The one pipeline behind the page, shared by all its visitors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.app.drawing.background import Listener, Waiting, events_of
from svft_diffusion.app.drawing.open_base import OpenBase
from svft_diffusion.app.drawing.picture_request import PictureRequest, SavedPicture, Step, check_request
from svft_diffusion.app.shelf.uploads import called
from svft_diffusion.errors import UserError
from svft_diffusion.models.loading import is_single_file, resolve_base
from svft_diffusion.sampling.adapter_choice import CheckedAdapter
from svft_diffusion.sampling.drawing import facts_of, generate_batch, open_pipeline, words_not_read
from svft_diffusion.sampling.embedding import adapters_to_embed, embedded_in_picture
from svft_diffusion.sampling.plan import picture_settings, slug
from svft_diffusion.sampling.png import save_png
from svft_diffusion.sampling.schedulers import DEFAULT, check_steps
from svft_diffusion.sampling.spreading import threads_of_torch
from svft_diffusion.training.memory import is_out_of_memory

__all__ = ["Drawing", "PictureRequest", "SavedPicture", "Step", "Studio"]

Drawing = Generator[Step | SavedPicture | Waiting, None, None]
"""What happens while pictures are drawn."""


class Studio:
    """Holds the base model and its adapters; one picture at a time, whoever asks."""

    def __init__(
        self,
        output_dir: Path,
        *,
        device: torch.device,
        dtype: str = "float32",
        disable_safety_checker: bool = False,
        base_config: Path | None = None,
        on_mismatch: OnMismatch = "error",
        embed_adapter: bool = False,
        threads: int = 1,
    ) -> None:
        """
        Args:
            threads: of torch on the CPU; pictures are the same to the byte for the same number, see the sampler.
        """
        self.output_dir = output_dir
        self.on_mismatch: OnMismatch = on_mismatch
        self._embed_adapter = embed_adapter
        self._device = device
        self._dtype = dtype
        self._disable_safety_checker = disable_safety_checker
        self._base_config = base_config
        self._threads = threads
        self._lock = threading.Lock()
        self._base: OpenBase | None = None

    def open_base(self, base: str) -> int:
        """Make ``base`` the loaded model, and return the height and width that it draws at.

        Raises:
            UserError: it can't be loaded.
        """
        with self._lock, threads_of_torch(self._threads):
            return self._open(base).resolution

    @contextmanager
    def with_adapters(
        self, base: str, adapters: Sequence[tuple[CheckedAdapter, AdapterWeight]]
    ) -> Iterator[DiffusionPipeline]:
        """Within the context, the pipeline is the caller's alone, with these adapters at their weights.

        What the caller changes in it he changes back.

        Raises:
            UserError: a base or an adapter that can't be loaded.
        """
        with self._lock, threads_of_torch(self._threads):
            opened = self._open(base)
            opened.choose_scheduler(None)
            opened.choose_adapters(adapters)
            yield opened.pipeline

    def draw(self, request: PictureRequest, *, previews: bool = False) -> Drawing:
        """Generate and save the pictures of a request, and tell every step and every picture.

        Nothing is drawn before the first event is asked for. Closing the iterator ends the drawing at its next step.

        Args:
            previews: let steps carry a small picture of what is being drawn, where the base allows.

        Raises:
            UserError: settings that can't work, a base or an adapter that can't be loaded, an unwritable folder.
        """
        check_request(request)

        def work(listener: Listener[Step | SavedPicture]) -> None:
            for number in range(request.num_images):
                # Other visitors may come between two pictures, never between choosing the weights and drawing.
                with listener.holding(self._lock), threads_of_torch(self._threads):
                    saved = self._draw(request, number, previews, listener.tell)
                listener.tell(saved)

        return events_of(work)

    def generate_pictures(
        self, request: PictureRequest, on_step: Callable[[int, int], None] | None = None
    ) -> list[SavedPicture]:
        """`draw` for those who want the pictures alone.

        Args:
            on_step: called after each denoising step with the number of the picture (from 0) and of the step (from 1).

        Raises:
            UserError: as `draw`.
        """
        saved = []
        for event in self.draw(request):
            if isinstance(event, SavedPicture):
                saved.append(event)
            elif on_step is not None and isinstance(event, Step):
                on_step(event.picture, event.step)
        return saved

    def _open(self, base: str) -> OpenBase:
        if self._base is None or base != self._base.name:
            resolve_base(base)
            # The old model goes first: two may not fit into memory. If the new one fails, the old one loads again.
            self._base = None
            with _enough_memory("for this base model; close other programs that use the same device"):
                pipeline = open_pipeline(
                    base,
                    device=self._device,
                    dtype=self._dtype,
                    base_config=self._base_config if is_single_file(base) else None,
                    disable_safety_checker=self._disable_safety_checker,
                )
                self._base = OpenBase(base, pipeline, self.on_mismatch)
        return self._base

    def _draw(self, request: PictureRequest, number: int, previews: bool, tell: Callable[[Step], None]) -> SavedPicture:
        opened = self._open(request.base)
        width, height = request.width or opened.resolution, request.height or opened.resolution
        opened.check_size(width, height)
        scheduler = opened.choose_scheduler(request.scheduler)
        check_steps(opened.pipeline.scheduler, request.num_inference_steps)
        opened.choose_adapters(request.adapters)
        seed = request.seed + number
        with (
            _enough_memory(f"for a picture of {width} x {height} pixels; ask for a smaller one"),
            opened.previews.following(opened.pipeline) if previews else nullcontext(lambda: None) as preview,
        ):
            [(image, blacked_out)] = generate_batch(
                opened.pipeline,
                request.prompt,
                seeds=[seed],
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                negative_prompt=request.negative_prompt,
                height=height,
                width=width,
                on_step=lambda step: tell(Step(number, step, preview())),
            )
        facts = facts_of(opened.pipeline, image)
        facts |= {} if scheduler == DEFAULT else {"scheduler_option": scheduler}
        facts |= {"blacked_out": True} if blacked_out else {}
        not_read = words_not_read(opened.pipeline, request.prompt)
        file = self._save(request, seed, image, facts | not_read)
        return SavedPicture(file, seed, blacked_out, not_read.get("prompt_not_read", ""))

    def _save(self, request: PictureRequest, seed: int, image: Image.Image, facts: dict[str, Any]) -> Path:
        settings = picture_settings(
            base=request.base,
            adapters=request.adapters,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=seed,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            dtype=self._dtype,
        )
        contents = adapters_to_embed([adapter for adapter, _ in request.adapters], self._embed_adapter)
        carried = embedded_in_picture(contents, {adapter.name: weight for adapter, weight in request.adapters})
        file = self._new_file(f"{slug(request.prompt)}_seed{seed}.png")
        try:
            with called(file.name, file):
                return save_png(image, file, settings | facts, carried)
        except BaseException:
            file.unlink(missing_ok=True)
            raise

    def _new_file(self, name: str) -> Path:
        """An empty file with the next number before its name, which nobody else gets, not even another app."""
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            while True:
                numbers = (file.name.split("_")[0] for file in self.output_dir.glob("*_*.png"))
                taken = [int(number) for number in numbers if number.isdecimal()]
                file = self.output_dir / f"{max(taken, default=0) + 1:05d}_{name}"
                try:
                    file.touch(exist_ok=False)
                except FileExistsError:
                    continue  # another app was faster
                return file
        except OSError as problem:
            raise UserError(f"can't write to the folder of the pictures: {problem.strerror or problem}") from problem


@contextmanager
def _enough_memory(for_what: str) -> Iterator[None]:
    """Within the context, a lack of memory is a user's error."""
    try:
        yield
    except Exception as problem:
        if is_out_of_memory(problem):
            raise UserError(f"there is not enough memory {for_what}") from problem
        raise
