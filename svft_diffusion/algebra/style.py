"""Style mixing: the layers that draw the geometry from one adapter, all others from another (SVDiff).

SVDiff takes "(16, down, 1) to (8, down, 0)" for the geometry, by the names that XTI (Voynov et al., arXiv 2303.09522)
gives the 16 cross-attentions of Stable Diffusion 1: the width of the latent picture, the way down or up, and a number.
They are (64, 32, 16; down; 0, 1), one at width 8, and (16, 32, 64; up; 0 to 2). In diffusers these are
``down_blocks.0`` to ``2`` with two attentions each, ``mid_block`` with the one at width 8, and ``up_blocks.1`` to ``3``
with three each. So the geometry is what a picture passes from the last attention on the way down, with the resnet
before it, to the end of the mid block: ``down_blocks.2.resnets.1`` and ``.attentions.1``, the downsampler,
``down_blocks.3`` (no attention), and ``mid_block``.

`geometry_blocks` finds the same in other UNets: from the last attention of the deepest down block that has one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from svft_diffusion.adapters.training import adapted_layers
from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.algebra.combine import combine
from svft_diffusion.errors import UserError
from svft_diffusion.files.names import canonical_name, components_of

_DENOISERS = ("unet", "transformer")


def style_mix(
    pipe: object, geometry: str, appearance: str, name: str, blocks: Sequence[str] | None = None
) -> list[str]:
    """Add an adapter that has the geometry layers of one and all other layers, text encoders too, of another.

    Args:
        pipe: a diffusers pipeline, or a mapping of component names to models.
        geometry, appearance: names of adapters in it.
        name: of the new adapter.
        blocks: module paths of the geometry layers in the denoiser; None: those of `geometry_blocks`.

    Returns:
        The geometry blocks.

    Raises:
        UserError: as `combine`; the blocks are not known and not given, or not in the model; or an adapter has no layer
            where it is needed.
    """
    if geometry == appearance:
        raise UserError("style mixing takes two adapters, one for the geometry and one for the appearance")
    components = components_of(pipe)
    component = next((component for component in _DENOISERS if component in components), None)
    if component is None:
        raise UserError("style mixing needs the denoiser: a unet or a transformer")
    model = components[component]
    chosen = list(blocks) if blocks is not None else geometry_blocks(model)
    for block in blocks or ():
        try:
            model.get_submodule(block)
        except AttributeError:
            raise UserError(f"the {component} has no module {block!r}") from None
    starts = tuple(f"{canonical_name(component, model, block)}." for block in chosen)
    shapes = [layer for layer in adapted_layers(pipe, geometry) if f"{layer}.".startswith(starts)]
    if not shapes:
        raise UserError(f"adapter {geometry!r} has no layer in the geometry blocks: {', '.join(chosen)}")
    looks: dict[str, dict[str, float]] = {}
    for layer in adapted_layers(pipe, appearance):
        if not f"{layer}.".startswith(starts):
            part, _, path = layer.partition(".")
            looks.setdefault(part, {})[path] = 1.0
    if not looks:
        raise UserError(f"adapter {appearance!r} has no layer outside of the geometry blocks")
    paths = {layer.partition(".")[2]: 1.0 for layer in shapes}
    weights: dict[str, AdapterWeight] = {geometry: {component: paths}, appearance: looks}
    combine(pipe, weights, name)
    return chosen


def geometry_blocks(model: nn.Module) -> list[str]:
    """Module paths of the layers that draw the geometry in a UNet; for Stable Diffusion 1 those of the SVDiff paper.

    Raises:
        UserError: the model has no down blocks with attentions followed by a mid block.
    """
    down_blocks = getattr(model, "down_blocks", None)
    attentive = [
        index for index, block in enumerate(down_blocks or ()) if len(getattr(block, "attentions", None) or ()) > 0
    ]
    if down_blocks is None or not attentive or getattr(model, "mid_block", None) is None:
        raise UserError(
            f"which layers of {type(model).__name__} draw the geometry is not known; name them with geometry_blocks"
        )
    deepest = attentive[-1]
    block = down_blocks[deepest]
    last = len(block.attentions) - 1
    inside = [f"resnets.{last}", f"attentions.{last}"]
    if getattr(block, "downsamplers", None) is not None:
        inside.append("downsamplers")
    deeper = [f"down_blocks.{index}" for index in range(deepest + 1, len(down_blocks))]
    return [*(f"down_blocks.{deepest}.{part}" for part in inside), *deeper, "mid_block"]
