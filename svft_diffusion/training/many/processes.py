"""The processes that accelerate starts: each trains whole subjects, as if it were alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from svft_diffusion.errors import UserError

# What torchrun and MPI tell a process of the others.
_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
    *(f"{kind}_{part}" for kind in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD") for part in ("RANK", "SIZE")),
    *(f"{kind}_LOCAL_{part}" for kind in ("OMPI_COMM_WORLD", "MV2_COMM_WORLD") for part in ("RANK", "SIZE")),
    "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
)  # fmt: skip
_SPLITTERS = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


@dataclass(frozen=True)
class Process:
    """This one among those that were started together."""

    index: int = 0
    count: int = 1


def stand_alone() -> Process:
    """Make this process forget the others, before accelerate looks for them, and keep to a GPU of its own.

    Raises:
        UserError: it was started to hold a part of a model only.
    """
    for variable, name in _SPLITTERS.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise UserError(f"train-many trains each subject in one process; start it without {name}")
    process = Process(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if process.count > 1 and torch.cuda.device_count() > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local % len(devices)]
    for variable in _VARIABLES:
        os.environ.pop(variable, None)
    return process
