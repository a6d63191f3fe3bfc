"""Where to compute: one word from the command line becomes a torch device."""

from __future__ import annotations

import torch

from svft_diffusion.errors import UserError


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise UserError(f"unknown device {name!r}; use auto, cuda, cuda:1, mps or cpu") from problem
    missing = {
        "cuda": (device.index or 0) >= torch.cuda.device_count(),
        "mps": not torch.backends.mps.is_available(),
        "cpu": False,
    }
    if missing.get(device.type, True):
        raise UserError(f"this machine has no device {name!r}, or this torch can't use it; try --device cpu")
    return device
