"""Adapters that follow a schedule or act in a region, while a pipeline of diffusers draws.

At every step the denoiser runs once for what no region covers and once for each region, with the adapters and the
prompt that count there, and the predictions are put together by the regions' shares. So each region's prediction is
bit for bit that of its own adapters; attention still sees the whole picture, so that regions fit together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from torch import Tensor

from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.adapters.weights import layers_with_weights, set_adapters
from svft_diffusion.errors import UserError
from svft_diffusion.files.names import TEXT_ENCODERS
from svft_diffusion.sampling.adapter_use import AdapterUse
from svft_diffusion.sampling.regions import Region, shares
from svft_diffusion.sampling.step_schedule import part_done

_DENOISERS = ("unet", "transformer")
# Arguments of denoisers that hold what the text encoders said; a batch of them has the prompts of all passes.
_OF_TEXT = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "added_cond_kwargs")

# What else `encode_prompt` takes of the prompt, beside ``prompt``.
_OTHER_PROMPTS = ("prompt_2", "prompt_3", "prompt_embeds", "pooled_prompt_embeds")

LayerWeights = Sequence[tuple[SpectralLayer, Mapping[str, float]]]


@contextmanager
def acting_adapters(pipe: DiffusionPipeline, uses: Mapping[str, AdapterUse]) -> Iterator[None]:
    """Within the context, the pipeline draws with the adapters as ``uses`` says; those not mentioned are off.

    Uses that are a weight alone are left to `set_adapters`, at full speed, and stay after the context. With a region or
    a schedule the adapters are computed beside the base layers, and afterwards the pipeline is as before; schedules act
    on the denoiser, since the text encoders speak before the first step. Not for several threads at once.

    Raises:
        UserError: as `set_adapters`, or inside of another such context or of `per_sample_adapters`.
    """
    _refuse_within_another(pipe)
    if all(use.is_plain for use in uses.values()):
        set_adapters(pipe, {name: use.weight for name, use in uses.items()})
        yield
        return
    acting = _Acting(pipe, uses)
    denoiser = acting.denoiser
    with (
        _replaced(denoiser, "forward", acting.denoise_with(denoiser.forward)),
        _replaced(pipe, "encode_prompt", acting.encode_with(pipe.encode_prompt)),
        acting.layers_taken(),
    ):
        yield


@dataclass(frozen=True)
class _Pass:
    """One run of the denoiser in a step."""

    region: Region | None  # None: what no region covers
    uses: Mapping[str, AdapterUse]
    layers: Mapping[str, LayerWeights]  # by component

    def enter(self, components: Sequence[str], done: float | None = None) -> None:
        """Give the layers of ``components`` their weights, those of schedules for the part ``done`` of the steps."""
        factors = {
            name: 1.0 if done is None or use.schedule is None else use.schedule.factor(done)
            for name, use in self.uses.items()
        }
        for component in components:
            for layer, weights in self.layers.get(component, ()):
                acting = {name: weight * factors[name] for name, weight in weights.items()}
                # An adapter at 0 is left out: then the layer computes the base, bit for bit.
                layer.sample_weights = [{name: weight for name, weight in acting.items() if weight != 0}]


class _Acting:
    """Replaces a pipeline's denoiser and its reading of prompts for the time of a context."""

    def __init__(self, pipe: DiffusionPipeline, uses: Mapping[str, AdapterUse]) -> None:
        self._pipe = pipe
        regions = list(dict.fromkeys(use.region for use in uses.values() if use.region is not None))
        everywhere = {name: use for name, use in uses.items() if use.region is None}
        self._passes = []
        for region in (None, *regions):
            here = everywhere | {name: use for name, use in uses.items() if use.region == region}
            layers = layers_with_weights(pipe, {name: use.weight for name, use in here.items()})
            self._passes.append(_Pass(region, here, layers))
        self.denoiser = next(model for name in _DENOISERS if (model := getattr(pipe, name, None)) is not None)
        self._uncompiled = getattr(self.denoiser, "_orig_mod", self.denoiser)  # what torch.compile wraps
        self._prompts = 0  # rows of one pass's text, set when the pipeline reads its prompts
        self._has_prompt = False  # read since the denoiser ran last
        self._shares: dict[tuple[int, int], Tensor] = {}

    def encode_with(self, encode_prompt: Callable[..., Any]) -> Callable[..., Any]:
        """``encode_prompt`` for all passes: their results one after the other in the batch."""
        signature = inspect.signature(encode_prompt)

        def encode(*args: Any, **kwargs: Any) -> Any:
            # Flux reads what to avoid by a second call, and that is the same in every region.
            is_avoided = self._has_prompt and "negative_prompt" not in signature.parameters
            self._has_prompt = True
            results = []
            for one in self._passes:
                one.enter(TEXT_ENCODERS)
                arguments = signature.bind(*args, **kwargs).arguments
                if one.region is not None and one.region.prompt is not None and not is_avoided:
                    arguments |= _with_prompt(arguments, one.region.prompt)
                results.append(encode_prompt(**arguments))
            self._prompts = len(results[0][0])
            return tuple(self._joined(parts) for parts in zip(*results, strict=True))

        return encode

    def denoise_with(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward`` of the denoiser, once for each pass that counts somewhere, and their predictions together."""
        signature = inspect.signature(self._uncompiled.forward)

        def denoise(*args: Any, **kwargs: Any) -> Any:
            self._has_prompt = False
            arguments = signature.bind(*args, **kwargs).arguments
            sample = next(iter(arguments.values()))
            done = part_done(self._pipe.scheduler.timesteps, self._timestep(arguments["timestep"]))
            total: Tensor | None = None
            output: Any = None
            for number, share in enumerate(self._shares_of(sample, arguments)):
                if not share.any():
                    continue
                self._passes[number].enter(_DENOISERS, done)
                of_pass = {
                    name: self._text_of_pass(value, number, len(sample)) if name in _OF_TEXT else value
                    for name, value in arguments.items()
                }
                output = forward(**of_pass)
                prediction = output[0] * share.to(output[0])
                total = prediction if total is None else total + prediction
            return (total, *output[1:]) if isinstance(output, tuple) else type(output)(total)

        return denoise

    @contextmanager
    def layers_taken(self) -> Iterator[None]:
        """Within the context, layers have weights of samples; afterwards those of the pipeline count again."""
        layers = _layers_of(self._pipe)
        try:
            self._passes[0].enter([*self._passes[0].layers])
            yield
        finally:
            for layer in layers:
                layer.sample_weights = None

    def _joined(self, parts: Sequence[Any]) -> Any:
        """One part of what the passes' prompts became. What has no row for each prompt is the same for all passes."""
        if isinstance(parts[0], Tensor) and len(parts[0]) == self._prompts:
            return torch.cat(list(parts))
        return parts[0]

    def _text_of_pass(self, value: Any, number: int, batch: int) -> Any:
        """The rows of one pass of what the text encoders said; with guidance, the batch holds all passes twice."""
        if isinstance(value, Mapping):
            return {key: self._text_of_pass(part, number, batch) for key, part in value.items()}
        if not isinstance(value, Tensor) or len(value) != batch * len(self._passes):
            return value  # such as SDXL's sizes, of which there is a row for each picture
        return value.unflatten(0, (-1, len(self._passes), self._prompts))[:, number].flatten(0, 1)

    def _timestep(self, told: Any) -> float:
        """The scheduler's timestep, from what the denoiser is told; Flux is told thousandths."""
        timestep = float(torch.as_tensor(told).flatten()[0])
        is_flux = isinstance(self._uncompiled, FluxTransformer2DModel)
        return timestep * self._pipe.scheduler.config.num_train_timesteps if is_flux else timestep

    def _shares_of(self, sample: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """(passes, ...) that each pass's prediction is multiplied by."""
        if sample.ndim == 4:
            return self._shares_on_grid(*sample.shape[-2:])[:, None, None]
        rows, columns = (int(size) + 1 for size in arguments["img_ids"].amax(dim=0)[1:])
        return self._shares_on_grid(rows, columns).flatten(1)[:, None, :, None]  # of packed patches, as Flux has

    def _shares_on_grid(self, height: int, width: int) -> Tensor:
        if (height, width) not in self._shares:
            regions = [one.region for one in self._passes if one.region is not None]
            self._shares[height, width] = shares(regions, height, width) if regions else torch.ones(1, height, width)
        return self._shares[height, width]


def _layers_of(pipe: DiffusionPipeline) -> list[SpectralLayer]:
    return [layer for of_component in layers_with_weights(pipe, {}).values() for layer, _ in of_component]


def _refuse_within_another(pipe: DiffusionPipeline) -> None:
    if any(layer.sample_weights is not None for layer in _layers_of(pipe)):
        raise UserError(
            "adapters act by region, by schedule or per sample already; such contexts can't be one inside of the other"
        )


def _with_prompt(arguments: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """Arguments of ``encode_prompt`` with another prompt, for as many pictures, to all text encoders."""
    given, read = arguments.get("prompt"), arguments.get("prompt_embeds")
    several = given if isinstance(given, list) else read
    replaced: dict[str, Any] = {"prompt": prompt if several is None else [prompt] * len(several)}
    return replaced | {name: None for name in _OTHER_PROMPTS if name in arguments}


@contextmanager
def _replaced(owner: object, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Within the context, ``owner`` has another method of this name, whether it had one of its own or its class's."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
