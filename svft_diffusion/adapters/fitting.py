"""Does an adapter file fit a pipeline? Its layers, its layout, its base weights, and at last what it does there."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from svft_diffusion.adapters.alignment import UpdateError
from svft_diffusion.adapters.config import SpectralConfig
from svft_diffusion.adapters.injection import adapters_of
from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.adapters.methods import LISTED, LayerOptions, number_of_values
from svft_diffusion.adapters.training import LARGEST_SILENT_ERROR
from svft_diffusion.adapters.tuner import layer_options
from svft_diffusion.errors import UserError
from svft_diffusion.files.fingerprint import both_bases, check_base, matches_of_pipeline, number_taken_on_trust
from svft_diffusion.files.header import AdapterHeader
from svft_diffusion.files.names import base_module, module_path, split_canonical_name
from svft_diffusion.files.tensor_names import POSITIONS, TRAINED_PARTS, layer_names, tensor_name

OnMismatch = Literal["error", "align", "force"]

# Fields of a header that say which numbers an adapter's values are.
LAYOUT_FIELDS = (
    "method", "pattern", "off_diagonals", "rank", "fraction", "select", "init", "train_values", "train_bias",
    "train_norm", "norm_shift",
)  # fmt: skip
# The relative error of an update that is not there at all.
_NOTHING_LEFT = 1.0

_logger = logging.getLogger(__name__)


class BaseDifference(NamedTuple):
    """How the base at hand differs from that of the training, going by the digests of its weights."""

    weights: str | None  # what to say of other weights; None where they are the same
    precision: bool  # whether they agree only when they are rounded to 16 bit
    nothing_agrees: bool = False


def check_choice(on_mismatch: str) -> None:
    """Raise `UserError` for what is no `OnMismatch`."""
    choices = get_args(OnMismatch)
    if on_mismatch not in choices:
        raise UserError(f"unknown on_mismatch {on_mismatch!r}; choose from {', '.join(choices)}")


def check_free(components: Mapping[str, nn.Module], name: str) -> None:
    """Raise `UserError` if a model has an adapter of this name."""
    for model in components.values():
        if name in adapters_of(model) or name in getattr(model, "peft_config", {}):
            raise UserError(f"an adapter {name!r} is already loaded; give this one another name or unload that first")


def paths_by_component(
    label: str, components: Mapping[str, nn.Module], layers: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Component -> path of the layer in this version of the model -> its canonical name.

    ``label`` is what messages call the adapter.

    Raises:
        UserError: there is no such component.
    """
    sorted_out: dict[str, dict[str, str]] = {}
    for layer in layers:
        component, path = split_canonical_name(layer)
        if component not in components:
            raise UserError(f"{label} adapts the {component}, which this pipeline does not have")
        sorted_out.setdefault(component, {})[module_path(components[component], path)] = layer
    return sorted_out


def config_of_layers(
    options: Mapping[str, Any], paths: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> SpectralConfig:
    """The configuration of a frozen adapter in exactly these layers of a model.

    Args:
        options: fields of `SpectralConfig` other than ``target_modules`` and those that the tensors tell.
        paths: path of the layer in the model -> its canonical name.
        tensors: of the adapter, named as in its file.

    Raises:
        UserError: options that do not go together.
    """
    # PEFT shortens a list of paths to their ends, in an order that changes from run to run, and may match more.
    exact_paths = "|".join(re.escape(path) for path in paths)
    listed = _listed_fields(options.get("pattern", ""), paths, tensors)
    return SpectralConfig(**options, **listed, target_modules=exact_paths, inference_mode=True)


def _listed_fields(pattern: str, paths: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a `SpectralConfig` that pattern listed takes from an adapter's tensors; none for other patterns."""
    if pattern != LISTED:
        return {}
    values = {path: tensors.get(tensor_name(canonical, "values")) for path, canonical in paths.items()}
    return {
        "numbers_of_values": {path: len(tensor) for path, tensor in values.items() if tensor is not None},
        "layers_with_bias": {path for path, canonical in paths.items() if tensor_name(canonical, "bias") in tensors},
    }


def check_fit(
    file: Path,
    component: str,
    model: nn.Module,
    config: SpectralConfig,
    paths: Mapping[str, str],
    tensors: Mapping[str, Tensor],
) -> None:
    """Refuse a file whose layers or shapes are not the model's, before any layer is touched.

    Args:
        paths: path of the layer in the model -> its canonical name.
    """
    for path, canonical in paths.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise UserError(
                f"{file} was made for another architecture: there is no layer {path} in this {component}"
            ) from None
        options, _ = layer_options(module, path, config)
        expected = _sizes(base_module(module), options)
        held = {
            part: len(tensors[tensor_name(canonical, part)])
            for part in (*TRAINED_PARTS, POSITIONS)
            if tensor_name(canonical, part) in tensors
        }
        if held != expected:
            raise UserError(
                f"{file} was made for another architecture: layer {path} of the {component} takes {_listed(expected)}, "
                f"the file has {_listed(held)}"
            )


def check_layout(file: Path, header: AdapterHeader, config: SpectralConfig, name: str) -> None:
    """Refuse a file whose values do not mean the same numbers as those of the loaded adapter ``name``."""
    for field in LAYOUT_FIELDS:
        here, there = getattr(config, field), getattr(header, field)
        if here != there:
            raise UserError(
                f"{file.name} can't take the place of adapter {name!r}: its {field} is {there}, the adapter's {here}; "
                "unload that and load the file"
            )


def difference_of_base(
    pipe: object, file: Path, header: AdapterHeader, tensors: Mapping[str, Tensor], on_mismatch: OnMismatch
) -> BaseDifference:
    """Compare the weights of the base at hand with those of the training, by their digests.

    Raises:
        UserError: some are others, and ``on_mismatch`` is ``error``; or the pipeline lacks a layer, or the full weight
            of a quantized one is not to be had.
    """
    matches = matches_of_pipeline(pipe, layer_names(tensors), header.base.digests)
    if on_mismatch == "error":
        check_base(header, matches, _base_name(pipe), adapter=str(file))
    if on_trust := number_taken_on_trust(pipe, layer_names(tensors)):
        _logger.warning(
            "%d of %d adapted layers are quantized, which hides their weights: those that the base's checkpoint holds "
            "stand for them, compared with the training and decomposed", on_trust, matches.total,
        )  # fmt: skip
    if matches.all:
        return BaseDifference(None, precision=matches.rounded > 0)
    weights = both_bases(header, matches, _base_name(pipe), adapter=str(file))
    return BaseDifference(weights, precision=False, nothing_agrees=matches.matched == 0)


def judge_update(
    file: Path, error: UpdateError, on_mismatch: OnMismatch, difference: BaseDifference, in_16_bit: bool
) -> None:
    """Accept, warn about or refuse what an adapter does on this base; `load_adapter` says which is when.

    Raises:
        UserError: refused.
    """
    same = error.total <= LARGEST_SILENT_ERROR  # not so where it is no number
    if same and difference.weights is None:
        return
    if error.worst_layer is None:
        _judge_unmeasured(file, on_mismatch, difference)
        return
    found = f"the update of {file.name} differs from the trained one by {error}"
    if on_mismatch == "error" and not (in_16_bit or difference.precision):
        raise UserError(
            f"{found}: the singular vectors of this base are not those of the training; "
            'on_mismatch="align" accepts the difference'
        )
    if on_mismatch != "force" and not error.total < _NOTHING_LEFT:
        raise UserError(f'{found}: nothing is left of it on this base; only on_mismatch="force" loads it all the same')
    if in_16_bit:
        same_weights = "the base is in 16 bit"
    elif difference.precision:
        same_weights = "the base has the weights of the training in another precision"
    else:
        same_weights = "the base has the weights of the training"
    reason = difference.weights or same_weights
    _logger.warning("%s; %s", reason, found)


def _judge_unmeasured(file: Path, on_mismatch: OnMismatch, difference: BaseDifference) -> None:
    """`judge_update` on another base for an adapter of biases and norms alone, which stand on no basis."""
    if difference.nothing_agrees and on_mismatch != "force":
        raise UserError(f'{difference.weights}; only on_mismatch="force" loads it all the same')
    _logger.warning(
        "%s; %s has no singular values by which to measure what it does there", difference.weights, file.name
    )


def in_16_bit(layers: Iterable[SpectralLayer]) -> bool:
    """Whether an adapted weight has lost bits of a checkpoint in full precision."""
    return any(base_module(layer).weight.dtype in (torch.float16, torch.bfloat16) for layer in layers)


def _sizes(module: nn.Module, options: LayerOptions) -> dict[str, int]:
    """Elements of each tensor that an adapter has in a layer."""
    sizes = {}
    if "values" in options.parts:
        sizes["values"] = number_of_values(options)
    if "bias" in options.parts:
        sizes["bias"] = len(module.bias)  # type: ignore[arg-type]
    if "norm" in options.parts:
        sizes["norm"] = len(module.weight) if options.norm_shift == "vector" else 1  # type: ignore[arg-type]
    if "gate" in options.parts:
        sizes["gate"] = 1
    if options.lists_positions:
        sizes[POSITIONS] = sizes["values"]
    return sizes


def _listed(sizes: Mapping[str, int]) -> str:
    return " and ".join(f"{size} {part}" for part, size in sizes.items()) or "nothing"


def _base_name(pipe: object) -> str:
    name = str(getattr(pipe, "name_or_path", "") or "a model without a name")
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name
