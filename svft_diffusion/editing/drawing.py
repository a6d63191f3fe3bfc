"""The three ways from a picture to an edited one. All draw with the adapters that the pipeline has at the time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from PIL import Image
from torch import Tensor

from svft_diffusion.editing.config import EditConfig
from svft_diffusion.editing.inpainting import KnownLatents, cells_to_draw, diffusers_inpaints
from svft_diffusion.errors import UserError
from svft_diffusion.models import family_of
from svft_diffusion.sampling.drawing import Drawn
from svft_diffusion.sampling.inversion import ddim_scheduler, invert, scheduler_replaced, slerp

OnStep = Callable[[], object]
"""Called each time that the denoiser has run."""


@dataclass(frozen=True)
class Editor:
    """Draws edited pictures at the size of ``picture``.

    Attributes:
        base: the text-to-image pipeline with the adapters.
        pipeline: what draws; its models are those of ``base``.
        picture: RGB, at the size that is drawn.
        mask: (L) of the same size, white where to draw; with inpaint only.
    """

    base: DiffusionPipeline
    pipeline: DiffusionPipeline
    picture: Image.Image
    mask: Image.Image | None
    config: EditConfig

    @property
    def scheduler_name(self) -> str:
        """Of what samples."""
        scheduler = ddim_scheduler(self.base) if self.config.mode == "inversion" else self.pipeline.scheduler
        return type(scheduler).__name__.removesuffix("Scheduler")

    @property
    def steps(self) -> int:
        """How often the denoiser runs for one picture, about."""
        config = self.config
        if config.mode == "inversion":
            return config.num_inference_steps * (config.inversion_refinements + 2)
        return int(config.num_inference_steps * config.resolved_strength)

    def draw(self, on_step: OnStep) -> Drawn:
        """The edited picture, with the adapters that act now."""
        if self.config.mode == "inversion":
            return self._from_inversion(on_step)
        if self.config.mode == "inpaint" and not diffusers_inpaints(self.base):
            return self._around_known(on_step)
        return self._from_picture(on_step)

    def _from_inversion(self, on_step: OnStep) -> Drawn:
        config, pipeline = self.config, self.pipeline
        assert config.prompt is not None  # `check_edit`

        def report(_looks: int) -> None:
            on_step()

        noise = invert(
            pipeline,
            encoded(pipeline, self.picture).to(getattr(torch, config.dtype)),
            config.prompt,
            num_inference_steps=config.num_inference_steps,
            refinements=config.inversion_refinements,
            on_step=report,
        )
        generator = self._generator()
        if config.slerp is not None:
            new = torch.randn(noise.shape, generator=generator).to(noise)
            noise = slerp(config.slerp, noise, new)
        with scheduler_replaced(pipeline, ddim_scheduler(pipeline)):
            return self._called(generator, on_step, latents=noise, eta=config.eta or 0.0)

    def _around_known(self, on_step: OnStep) -> Drawn:
        assert self.mask is not None  # `Editor`
        known = encoded(self.base, self.picture).to(getattr(torch, self.config.dtype))
        noise = torch.randn(known.shape, generator=self._generator()).to(known)
        keep = KnownLatents(known, noise, cells_to_draw(self.mask, *known.shape[-2:]))
        if self.pipeline is self.base:  # from noise alone
            return self._called(self._generator(), on_step, keep, latents=noise)
        return self._called(
            self._generator(), on_step, keep, image=self.picture, strength=self.config.resolved_strength
        )

    def _from_picture(self, on_step: OnStep) -> Drawn:
        more: dict[str, Any] = {"image": self.picture, "strength": self.config.resolved_strength}
        if self.mask is not None:
            more["mask_image"] = self.mask
        return self._called(self._generator(), on_step, **more)

    def _generator(self) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(self.config.seed)

    def _called(
        self, generator: torch.Generator, on_step: OnStep, keep: KnownLatents | None = None, **more: Any
    ) -> Drawn:
        def report(pipeline: DiffusionPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return tensors if keep is None else keep(pipeline, step, timestep, tensors)

        config = self.config
        if config.negative_prompt:
            more["negative_prompt"] = config.negative_prompt
        if "height" in inspect.signature(type(self.pipeline).__call__).parameters:
            more |= {"height": self.picture.height, "width": self.picture.width}
        self.pipeline.set_progress_bar_config(disable=True)
        result = self.pipeline(
            prompt=config.prompt,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=generator,
            callback_on_step_end=report,
            **more,
        )
        blacked_out = getattr(result, "nsfw_content_detected", None) or [False]
        return Drawn(result.images[0], bool(blacked_out[0]))


def drawing_pipeline(base: DiffusionPipeline, config: EditConfig) -> DiffusionPipeline:
    """The pipeline of an edit's mode, with the models of ``base``: none is copied.

    Raises:
        UserError: the base can't do that.
    """
    if config.mode == "inversion":
        prediction = family_of(base).prediction_type
        if prediction == "flow":
            raise UserError(
                "--mode inversion is for bases that predict noise or velocity, as Stable Diffusion 1, 2 and XL; this "
                "one is of flow matching: use --mode img2img or inpaint"
            )
        pipeline = base
    elif config.mode == "inpaint" and config.resolved_strength == 1 and not diffusers_inpaints(base):
        pipeline = base
    else:
        inpaints = config.mode == "inpaint" and diffusers_inpaints(base)
        kind = AutoPipelineForInpainting if inpaints else AutoPipelineForImage2Image
        try:
            pipeline = kind.from_pipe(base)
        except ValueError:
            raise UserError(f"diffusers has no {config.mode} for a {type(base).__name__}") from None
    known = inspect.signature(type(pipeline).__call__).parameters
    if config.negative_prompt and ("negative_prompt" not in known or "true_cfg_scale" in known):
        raise UserError("this base model takes no negative prompt; leave it out")
    return pipeline


def encoded(pipeline: DiffusionPipeline, picture: Image.Image) -> Tensor:
    """Latents (1, C, H, W) of a picture, scaled as the denoiser sees them: the mean of what the VAE says."""
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1.0
    with _vae_wide_enough(pipeline):
        return family_of(pipeline).encode_pictures(pixels).mean


@contextmanager
def _vae_wide_enough(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within the context, a VAE that overflows in float16, as that of SDXL, is in float32."""
    before = pipeline.vae.dtype
    widened = before == torch.float16 and pipeline.vae.config.get("force_upcast", False)
    if widened:
        pipeline.vae.to(torch.float32)
    try:
        yield
    finally:
        if widened:
            pipeline.vae.to(before)
