"""The one pipeline behind the page, shared by all its visitors."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from svft_diffusion.adapters import load_adapter, set_adapters, unload_adapter
from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.errors import UserError
from svft_diffusion.models.loading import default_resolution, is_single_file, resolve_base
from svft_diffusion.sampling.adapter_choice import CheckedAdapter, sha256_of
from svft_diffusion.sampling.embedding import adapters_to_embed, embedded_in_picture
from svft_diffusion.sampling.plan import check_picture_settings, picture_settings, slug
from svft_diffusion.sampling.png import save_png
from svft_diffusion.sampling.sample import facts_of, generate, open_pipeline

MOST_PICTURES = 16  # for one request


@dataclass(frozen=True)
class PictureRequest:
    """Everything that a visitor's pictures depend on; nothing is taken from what was generated before."""

    base: str
    prompt: str
    adapters: tuple[tuple[CheckedAdapter, float], ...] = ()  # with their weights
    negative_prompt: str = ""
    seed: int = 0  # of the first picture; picture i has seed + i
    num_images: int = 1
    num_inference_steps: int = 25
    guidance_scale: float = 4.0


@dataclass(frozen=True)
class SavedPicture:
    """A picture on disk."""

    path: Path
    seed: int


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
    ) -> None:
        self.output_dir = output_dir
        self.on_mismatch: OnMismatch = on_mismatch
        self._embed_adapter = embed_adapter
        self._device = device
        self._dtype = dtype
        self._disable_safety_checker = disable_safety_checker
        self._base_config = base_config
        self._lock = threading.Lock()
        self._base: str | None = None
        self._pipeline: DiffusionPipeline | None = None
        self._loaded: dict[str, str] = {}  # sha256 of an adapter's file -> its name in the pipeline

    def open_base(self, base: str) -> int:
        """Make ``base`` the loaded model, and return the height and width that it draws at.

        Raises:
            UserError: it can't be loaded.
        """
        with self._lock:
            return default_resolution(self._pipeline_for(base))

    def generate_pictures(
        self, request: PictureRequest, on_step: Callable[[int, int], None] | None = None
    ) -> list[SavedPicture]:
        """Generate and save the pictures of a request.

        Args:
            on_step: called after each denoising step with the number of the picture (from 0) and of the step (from 1).

        Raises:
            UserError: settings that can't work, a base or an adapter that can't be loaded, an unwritable folder.
        """
        _check_request(request)
        saved = []
        for number in range(request.num_images):
            # Other visitors may come between two pictures, never between choosing the weights and drawing.
            with self._lock:
                pipeline = self._pipeline_for(request.base)
                self._choose_adapters(pipeline, request.adapters)
                image = generate(
                    pipeline,
                    request.prompt,
                    seed=request.seed + number,
                    num_inference_steps=request.num_inference_steps,
                    guidance_scale=request.guidance_scale,
                    negative_prompt=request.negative_prompt,
                    on_step=None if on_step is None else functools.partial(on_step, number),
                )
                saved.append(self._save(pipeline, request, request.seed + number, image))
        return saved

    def _pipeline_for(self, base: str) -> DiffusionPipeline:
        if self._pipeline is None or base != self._base:
            resolve_base(base)
            # The old model goes first: two may not fit into memory. If the new one fails, the old one loads again.
            self._base, self._pipeline, self._loaded = None, None, {}
            self._pipeline = open_pipeline(
                base,
                device=self._device,
                dtype=self._dtype,
                base_config=self._base_config if is_single_file(base) else None,
                disable_safety_checker=self._disable_safety_checker,
            )
            self._base = base
        return self._pipeline

    def _choose_adapters(self, pipeline: DiffusionPipeline, adapters: tuple[tuple[CheckedAdapter, float], ...]) -> None:
        wanted = {adapter.sha256 for adapter, _ in adapters}
        for sha256 in [sha256 for sha256 in self._loaded if sha256 not in wanted]:
            unload_adapter(pipeline, self._loaded.pop(sha256))
        for adapter, _ in adapters:
            if adapter.sha256 not in self._loaded:
                if sha256_of(adapter.file) != adapter.sha256:
                    raise UserError(f"the file of {adapter.name} has changed; remove the adapter and add it again")
                # Named by content: two visitors may call different files by the same name.
                name = f"sha256-{adapter.sha256}"
                load_adapter(pipeline, adapter.file, name, on_mismatch=self.on_mismatch)
                self._loaded[adapter.sha256] = name
        set_adapters(pipeline, {self._loaded[adapter.sha256]: weight for adapter, weight in adapters})

    def _save(
        self, pipeline: DiffusionPipeline, request: PictureRequest, seed: int, image: Image.Image
    ) -> SavedPicture:
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
        taken = [
            int(number) for file in self.output_dir.glob("*_*.png") if (number := file.name.split("_")[0]).isdecimal()
        ]
        file_name = f"{max(taken, default=0) + 1:05d}_{slug(request.prompt)}_seed{seed}.png"
        contents = adapters_to_embed([adapter for adapter, _ in request.adapters], self._embed_adapter)
        carried = embedded_in_picture(contents, {adapter.name: weight for adapter, weight in request.adapters})
        file = save_png(image, self.output_dir / file_name, settings | facts_of(pipeline, image), carried)
        return SavedPicture(file, seed)


def _check_request(request: PictureRequest) -> None:
    if not request.prompt.strip():
        raise UserError("write a prompt first: what should be drawn?")
    if not 1 <= request.num_images <= MOST_PICTURES:
        raise UserError(f"the number of pictures must be between 1 and {MOST_PICTURES}, got {request.num_images}")
    for seed in (request.seed, request.seed + request.num_images - 1):
        check_picture_settings(seed, request.num_inference_steps, request.guidance_scale)
