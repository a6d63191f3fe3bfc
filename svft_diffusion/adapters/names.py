"""Names that an adapter can have: in every layer that carries it, its name is the name of a parameter."""

from __future__ import annotations

import re

from torch import nn

from svft_diffusion.errors import UserError

# Entries of a ParameterDict become its attributes: one called `training` would stand in the way of `model.train()`.
_PARAMETERS = nn.ParameterDict()


def check_adapter_name(name: str) -> None:
    """Raise `UserError` if no parameter can have this name: it is empty, has a dot, or is taken by torch."""
    if not name or "." in name or hasattr(_PARAMETERS, name):
        raise UserError(f"an adapter can't have the name {name!r}; call it {usable_adapter_name(name)!r}, for example")


def usable_adapter_name(label: str) -> str:
    """The nearest name for what is called ``label``: ``style.v2`` -> ``style_v2``, ``...`` -> ``adapter``."""
    name = re.sub(r"[^\w-]+", "_", label).strip("_") or "adapter"
    return f"{name}_adapter" if hasattr(_PARAMETERS, name) else name
