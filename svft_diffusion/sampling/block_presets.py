"""Parts of a denoiser by name, for adapters that shall act in some of its blocks only.

A UNet goes down to small maps and up again: what it does on the way down and in the middle decides more of the
composition, the way up more of colours and surfaces. A transformer has no such ways; its blocks are divided into
thirds. Text encoders are not concerned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from svft_diffusion.adapters.weights import BlockWeights
from svft_diffusion.errors import UserError
from svft_diffusion.files.names import block_of, natural_order

ALL_BLOCKS = "all"
BLOCK_PRESETS: dict[str, str] = {
    ALL_BLOCKS: "all blocks",
    "first": "way down (first third)",
    "middle": "middle",
    "last": "way up (last third)",
    "first_middle": "way down and middle",
    "middle_last": "middle and way up",
}
"""Names of the presets, and what people call them."""

_THIRDS = ("first", "middle", "last")
_WAYS = {"down_blocks": "first", "mid_block": "middle", "up_blocks": "last"}
_DENOISERS = ("unet", "transformer")


def usable_presets(layers: Iterable[str]) -> list[str]:
    """The presets in which an adapter has layers, by the canonical names of these."""
    thirds = _thirds(layers)
    return [ALL_BLOCKS, *(name for name in BLOCK_PRESETS if name != ALL_BLOCKS and _paths(name, thirds))]


def block_weights(weights: Mapping[str, float], preset: str, layers: Iterable[str]) -> dict[str, float | BlockWeights]:
    """Component -> weight, with those of the denoiser for the blocks of a preset alone, as `set_adapters` takes it.

    Args:
        weights: component -> weight.
        preset: one of `BLOCK_PRESETS`.
        layers: canonical names of the layers that the adapter changes.

    Raises:
        UserError: no such preset, or the adapter has no layer there.
    """
    if preset not in BLOCK_PRESETS:
        raise UserError(f"there are no blocks called {preset!r}; choose from {', '.join(BLOCK_PRESETS)}")
    if preset == ALL_BLOCKS:
        return dict(weights)
    paths = _paths(preset, _thirds(layers))
    if not paths:
        raise UserError(f"it has no layer in the blocks {preset!r} ({BLOCK_PRESETS[preset]})")
    return {
        component: dict.fromkeys(paths, weight) if component in _DENOISERS else weight
        for component, weight in weights.items()
    }


def preset_of(blocks: BlockWeights, layers: Iterable[str]) -> tuple[str, float] | None:
    """The preset and weight of which `block_weights` makes these weights of the denoiser's blocks, if there is one."""
    thirds = _thirds(layers)
    if len(set(blocks.values())) != 1:
        return None
    names = (name for name in BLOCK_PRESETS if name != ALL_BLOCKS and _paths(name, thirds) == sorted(blocks))
    found = next(names, None)
    return None if found is None else (found, next(iter(blocks.values())))


def _paths(preset: str, thirds: Mapping[str, Sequence[str]]) -> list[str]:
    """Paths of the blocks; none unless there are layers in every part of the preset."""
    parts = [thirds[name] for name in preset.split("_")]
    return sorted(path for part in parts for path in part) if all(parts) else []


def _thirds(layers: Iterable[str]) -> dict[str, list[str]]:
    """First, middle, last -> paths of the blocks there that hold layers."""
    thirds: dict[str, list[str]] = {name: [] for name in _THIRDS}
    blocks: set[str] = set()
    for layer in layers:
        component, path = block_of(layer).split(".", 1)
        if component == "unet" and (way := path.split(".")[0]) in _WAYS:
            if way not in thirds[_WAYS[way]]:
                thirds[_WAYS[way]].append(way)
        elif component == "transformer" and "blocks." in path:
            blocks.add(path)
    # Blocks that read text and picture apart come before the "single" ones, which read both together.
    ordered = sorted(blocks, key=lambda path: (path.startswith("single"), natural_order(path)))
    for position, path in enumerate(ordered):
        thirds[_THIRDS[3 * position // len(ordered)]].append(path)
    return thirds
