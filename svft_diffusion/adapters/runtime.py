"""Adapters on a pipeline: load, swap, unload, save. The command line, the app and users' code call these."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from svft_diffusion.adapters.alignment import (
    align_layers,
    layers_by_name,
    measured_error,
    sketch_of_bases,
    stored_bases,
)
from svft_diffusion.adapters.config import SpectralConfig
from svft_diffusion.adapters.fitting import (
    LAYOUT_FIELDS,
    BaseDifference,
    OnMismatch,
    check_choice,
    check_fit,
    check_free,
    check_layout,
    config_of_layers,
    difference_of_base,
    in_16_bit,
    judge_update,
    paths_by_component,
)
from svft_diffusion.adapters.injection import adapters_of, inject, refuse_fused, remove, spectral_layers
from svft_diffusion.adapters.joining import joining
from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.adapters.names import usable_adapter_name
from svft_diffusion.adapters.targets import PRESETS
from svft_diffusion.adapters.token_rows import check_last
from svft_diffusion.adapters.tokens import (
    bringing_tokens,
    check_same_tokens,
    check_tokens,
    copy_token_rows,
    tokens_in,
    tokens_of,
    without_tokens,
)
from svft_diffusion.adapters.training import adapted_layers, adapter_state, copy_tensors, live_tensors
from svft_diffusion.adapters.tuner import preset_layers
from svft_diffusion.adapters.weights import check_loaded
from svft_diffusion.errors import UserError
from svft_diffusion.files.adapter_file import read_adapter, stored_tensor, write_adapter
from svft_diffusion.files.fingerprint import digests_of_pipeline
from svft_diffusion.files.header import AdapterHeader, AdapterMetadata, BaseModel, library_versions, makers_fields
from svft_diffusion.files.model_spec import base_version
from svft_diffusion.files.names import components_of
from svft_diffusion.files.tensor_names import SKETCH, layer_names
from svft_diffusion.files.training_folder import adapter_file

# Fields of a header that, beside `LAYOUT_FIELDS`, make a configuration.
_HISTORY_FIELDS = ("seed", "targets")


def load_adapter(
    pipe: object,
    file: str | os.PathLike[str],
    name: str | None = None,
    *,
    on_mismatch: OnMismatch = "error",
) -> str:
    """Load an adapter file into a pipeline; it is active at weight 1 beside those already active, and frozen.

    An adapter's values stand on the singular vectors of the base weights. Those are recomputed here and aligned to
    the sketch in the file, and then it is measured by how much the adapter's update differs from the trained one,
    relative to its size. ``on_mismatch`` says what to do when the base or the update is not the same:

    * ``error``: refuse other base weights (by the digest of each), and an update that is off by more than 0.1 %.
      Where the base is in 16 bit, or that of the training was, rounding alone can exceed that; the base is the
      right one, so the adapter is loaded and the measured error logged as a warning.
    * ``align``: accept slightly other weights too, such as a fine-tuned copy; the measured error is logged as a
      warning.

      Both refuse what leaves nothing of the update: an error of 100 % or more. Biases and norms alone can't be
      measured: of their layers one weight at least must be that of the training.
    * ``force``: load the values as they are, without alignment, with a warning on all that differs.

    Learned tokens in the file join the pipeline's tokenizers until the adapter is unloaded. They have no strength: a
    prompt with the token gets its embedding even at weight 0, and prompts without it are encoded as before.

    Args:
        pipe: a diffusers pipeline, or a mapping of component names to models (and tokenizers, for learned tokens).
        file: the adapter's ``.safetensors`` file, a picture that carries it, or the folder it was trained into.
        name: what to call it; the file's name, made fit for a parameter, when left out.
        on_mismatch: see above.

    Returns:
        The name of the adapter.

    Raises:
        UserError: the file, the pipeline or the name does not fit; the pipeline is as it was.
    """
    file = adapter_file(Path(file))
    check_choice(on_mismatch)
    header, tensors = read_adapter(file)
    components = components_of(pipe)
    name = usable_adapter_name(file.stem) if name is None else name
    check_free(components, name)
    tokens, tensors = tokens_in(header.tokens, tensors), without_tokens(tensors)
    if not tensors:
        raise UserError(
            f"{file} holds learned tokens alone, and adapts no layer; pipe.load_textual_inversion is for such"
        )
    check_tokens(pipe, name, tokens)
    paths = paths_by_component(str(file), components, layer_names(tensors))
    configs = {component: _config_of(header, by_path, tensors) for component, by_path in paths.items()}
    for component, by_path in paths.items():
        refuse_fused(components[component], f"load {file.name}")
        check_fit(file, component, components[component], configs[component], by_path, tensors)
    difference = difference_of_base(pipe, file, header, tensors, on_mismatch)
    models = {component: components[component] for component in paths}
    with bringing_tokens(pipe, name, tokens), joining(models, name):
        for component, by_path in paths.items():
            inject(models[component], configs[component], name, list(by_path))
        _fill(layers_by_name(models, name), name, file, tensors, on_mismatch, difference)
    return name


def swap_adapter(pipe: object, name: str, file: str | os.PathLike[str], *, on_mismatch: OnMismatch = "error") -> None:
    """Put another file's values in the place of a loaded adapter's: its weights, and whether it acts, stay.

    No tensor is replaced, so a compiled pipeline is not compiled again. The file is checked as by `load_adapter`.

    Raises:
        UserError: no such adapter, it is fused, or the file is of another layout (method, pattern, layers, ...), has
            other learned tokens, or does not fit the base; the adapter is as it was.
    """
    file = adapter_file(Path(file))
    check_choice(on_mismatch)
    header, tensors = read_adapter(file)
    layers = adapted_layers(pipe, name)
    models = {component: model for component, model in components_of(pipe).items() if name in adapters_of(model)}
    for model in models.values():
        refuse_fused(model, f"swap {name!r}")
    for model in models.values():
        check_layout(file, header, _config_in(model, name), name)
    check_same_tokens(pipe, name, file.name, header.tokens, tensors)
    difference = difference_of_base(pipe, file, header, tensors, on_mismatch)
    before = {key: tensor.detach().clone() for key, tensor in live_tensors(layers, name).items()}
    sketches = {canonical: layer.sketch(name) for canonical, layer in layers.items()}
    try:
        _fill(layers, name, file, without_tokens(tensors), on_mismatch, difference)
        copy_token_rows(pipe, name, tensors)
    except BaseException:
        copy_tensors(layers, name, before)  # the positions, which the alignment goes by
        for canonical, layer in layers.items():
            layer.align(name, sketches[canonical])
        copy_tensors(layers, name, before)  # the values, whose signs it may have changed
        raise
    for model in models.values():
        history = {field: getattr(header, field) for field in _HISTORY_FIELDS}
        model.peft_config[name] = dataclasses.replace(_config_in(model, name), **history)  # type: ignore[index,operator]


def unload_adapter(pipe: object, name: str) -> None:
    """Remove an adapter and its tokens. When no other is left, the original layers are back: base names, base output,
    bit for bit.

    Raises:
        UserError: no such adapter, it is fused, or ``pipe.load_textual_inversion`` added tokens after those it has.
    """
    components = components_of(pipe)
    tokens = tokens_of(pipe, name)
    if not tokens:
        check_loaded(components, [name])
    for model in components.values():
        refuse_fused(model, f"unload {name!r}")
        check_last(model, name)
    for component, model in components.items():
        if name in adapters_of(model) or component in tokens:
            remove(model, name)


def save_adapter(pipe: object, name: str, file: str | os.PathLike[str], *, metadata: AdapterMetadata) -> Path:
    """Write an adapter of a pipeline (or of a mapping of component names to models) to a file.

    Equal values, metadata and singular vectors give equal bytes.

    Raises:
        UserError: no such adapter, it is fused, its values are not finite, or the file can't be written.
    """
    components = components_of(pipe)
    state = {key: stored_tensor(key, tensor, metadata.value_dtype) for key, tensor in adapter_state(pipe, name).items()}
    for model in components.values():
        refuse_fused(model, f"save {name!r}")
    used = {component: model for component, model in components.items() if name in adapters_of(model)}
    sketch = sketch_of_bases(adapted_layers(used, name), name, state)
    if sketch is not None:
        state[SKETCH] = sketch
    return write_adapter(Path(file), _header_for(pipe, used, name, layer_names(state), metadata), state)


def loaded_adapters(pipe: object) -> list[str]:
    """Names of the adapters in a pipeline, sorted."""
    return sorted({name for model in components_of(pipe).values() for name in adapters_of(model)})


def _fill(
    layers: Mapping[str, SpectralLayer],
    name: str,
    file: Path,
    tensors: Mapping[str, Tensor],
    on_mismatch: OnMismatch,
    difference: BaseDifference,
) -> None:
    """Give an adapter the contents of a file, on the basis that it describes, and judge what comes of it."""
    bases = stored_bases(tensors)
    with torch.inference_mode(False):
        copy_tensors(layers, name, tensors)
        if on_mismatch != "force":
            align_layers(layers, name, bases)
        error = measured_error(layers, name, bases)
    judge_update(file, error, on_mismatch, difference, in_16_bit(layers.values()))


def _header_for(
    pipe: object, used: Mapping[str, nn.Module], name: str, layers: Sequence[str], metadata: AdapterMetadata
) -> AdapterHeader:
    """The header of adapter ``name``, which the models ``used`` carry in the layers with these canonical names."""
    config = _config_in(next(iter(used.values())), name)
    options = {field: getattr(config, field) for field in (*LAYOUT_FIELDS, *_HISTORY_FIELDS)}
    architecture = metadata.base_architecture
    if architecture is None:
        version = base_version(pipe)
        architecture = "" if version is None else version.architecture
    base = BaseModel(
        name=metadata.base_name,
        family=metadata.base_family,
        architecture=architecture,
        digests=metadata.base_digests or digests_of_pipeline(pipe, layers),
    )
    return AdapterHeader(
        **{**options, **makers_fields(metadata), "targets": _targets_label(used, name, config)},
        components={component: len(spectral_layers(model, name)) for component, model in used.items()},
        tokens=tokens_of(pipe, name),
        base=base,
        libraries=library_versions(),
    )


def _config_of(header: AdapterHeader, paths: Mapping[str, str], tensors: Mapping[str, Tensor]) -> SpectralConfig:
    options = {field: getattr(header, field) for field in (*LAYOUT_FIELDS, *_HISTORY_FIELDS)}
    return config_of_layers(options, paths, tensors)


def _config_in(model: nn.Module, name: str) -> SpectralConfig:
    config: SpectralConfig = model.peft_config[name]  # type: ignore[index,assignment]
    return config


def _targets_label(models: Mapping[str, nn.Module], name: str, config: SpectralConfig) -> str:
    """The preset if it names exactly the adapted layers, else ``custom``."""
    if config.targets not in PRESETS:
        return "custom"
    for model in models.values():
        try:
            if set(preset_layers(model, config)) != set(spectral_layers(model, name)):
                return "custom"
        except UserError:
            return "custom"
    return config.targets
