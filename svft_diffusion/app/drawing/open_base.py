"""A base model in memory with the adapters that visitors use on it."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import DiffusionPipeline

from svft_diffusion.adapters import load_adapter, set_adapters, unload_adapter
from svft_diffusion.adapters.fitting import OnMismatch
from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.app.drawing.preview import Previews
from svft_diffusion.errors import UserError
from svft_diffusion.models.families import family_of
from svft_diffusion.models.loading import default_resolution
from svft_diffusion.sampling.adapter_choice import CheckedAdapter, sha256_of
from svft_diffusion.sampling.schedulers import DEFAULT, make_scheduler, scheduler_name

MOST_KEPT = 16
"""Adapters that stay loaded, switched off, after the last picture that used them."""

MOST_TIMES_OWN = 4
"""How much larger than its own side a base draws at most: the time of a step, which nothing ends, grows as the fourth
power, and everybody else waits."""


class OpenBase:
    """The pipeline of one base model. Not for several threads at once.

    Attributes:
        name: what it was opened as.
        resolution: height and width in pixels that it draws at by itself.
    """

    def __init__(self, name: str, pipeline: DiffusionPipeline, on_mismatch: OnMismatch) -> None:
        self.name = name
        self.pipeline = pipeline
        self.resolution = default_resolution(pipeline)
        self.previews = Previews(pipeline)
        self._on_mismatch: OnMismatch = on_mismatch
        self._scheduler = pipeline.scheduler
        self._pixel_multiple = _pixel_multiple(pipeline)
        self._loaded: dict[str, CheckedAdapter] = {}  # by sha256 of the file, the last used at the end

    def choose_adapters(self, adapters: Sequence[tuple[CheckedAdapter, AdapterWeight]]) -> None:
        """Let exactly these adapters act. The others stay loaded for a while, so that they are back at once.

        Raises:
            UserError: a file that has changed since it was checked, or an adapter that does not fit.
        """
        wanted = {adapter.sha256: adapter for adapter, _ in adapters}
        self._make_room(wanted)
        for sha256, adapter in wanted.items():
            if sha256 not in self._loaded:
                if sha256_of(adapter.file) != sha256:
                    raise UserError(f"the file of {adapter.name} has changed; remove the adapter and add it again")
                load_adapter(self.pipeline, adapter.file, name_in_pipeline(sha256), on_mismatch=self._on_mismatch)
            self._loaded.pop(sha256, None)
            self._loaded[sha256] = adapter
        set_adapters(self.pipeline, {name_in_pipeline(adapter.sha256): weight for adapter, weight in adapters})

    def choose_scheduler(self, name: str | None) -> str:
        """Draw with the scheduler ``name`` from now on, or with the base's own, and return its name.

        Raises:
            UserError: there is none of this name, or it can't draw with this base.
        """
        self.pipeline.scheduler = self._scheduler
        name = DEFAULT if name is None else scheduler_name(name)
        self.pipeline.scheduler = make_scheduler(self.pipeline, name)
        return name

    def check_size(self, width: int, height: int) -> None:
        """Raise `UserError` if the base can't draw pictures of this size in pixels."""
        multiple = self._pixel_multiple
        if width % multiple or height % multiple:
            raise UserError(f"this base draws multiples of {multiple} pixels; got {width} x {height}")
        longest = MOST_TIMES_OWN * self.resolution
        if max(width, height) > longest:
            raise UserError(
                f"this base draws at most {longest} pixels a side here, {MOST_TIMES_OWN} times its own "
                f"{self.resolution}; got {width} x {height}"
            )

    def _make_room(self, wanted: dict[str, CheckedAdapter]) -> None:
        idle = [sha256 for sha256 in self._loaded if sha256 not in wanted]
        # A learned token is one of the tokenizer as long as its adapter is loaded: it would act in others' prompts.
        unloaded = [sha256 for sha256 in idle if self._loaded[sha256].header.tokens]
        idle = [sha256 for sha256 in idle if sha256 not in unloaded]
        for sha256 in [*unloaded, *idle[: max(0, len(idle) - MOST_KEPT)]]:
            del self._loaded[sha256]
            unload_adapter(self.pipeline, name_in_pipeline(sha256))


def _pixel_multiple(pipeline: DiffusionPipeline) -> int:
    """What heights and widths of pictures must be multiples of."""
    try:
        return family_of(pipeline).pixel_multiple
    except UserError:  # it can draw and not be trained
        return int(pipeline.vae_scale_factor)


def name_in_pipeline(sha256: str) -> str:
    """What an adapter is called there: by content, as two visitors may call different files by the same name."""
    return f"sha256-{sha256}"
