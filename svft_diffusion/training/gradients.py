"""Does everything that was asked to train get a gradient?"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from svft_diffusion.errors import UserError
from svft_diffusion.files.tensor_names import layer_names


def check_gradients(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """The layers that get no gradient, and stay as they are: SDXL reads its first text encoder before the last block.

    Args:
        parameters: the trained values of all models, by canonical name.

    Raises:
        UserError: a whole model gets none; it would stay as it is, and nobody would notice.
    """
    trains = {
        name for name, parameter in parameters.items() if parameter.grad is not None and bool(parameter.grad.any())
    }
    components = {name.partition(".")[0] for name in trains}
    for component in dict.fromkeys(name.partition(".")[0] for name in parameters):
        if component not in components:
            raise UserError(
                f"the {component} gets no gradient, so that training would not change it: choose other --targets"
                + (", or leave out --train_text_encoder" if component.startswith("text_encoder") else "")
            )
    layers = set(layer_names(trains))
    return [layer for layer in layer_names(parameters) if layer not in layers]
