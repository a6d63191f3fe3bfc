"""FSDP2: the frozen denoiser is spread over the processes, block by block, for bases that one GPU does not hold.

Each process keeps a part of every weight, and of every singular factor that the adapter trains on, which together are
twice a weight: both are put together for a block's pass and let go after it. What trains stays whole in every process;
it is small, and the trainer averages its gradients as ever. Accelerate's own preparation is not used, since it would
spread what trains, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from diffusers import DiffusionPipeline
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.errors import UserError
from svft_diffusion.training.config import TrainingConfig

_EXAMPLE = "configs/accelerate/fsdp2.yaml"


def shards(accelerator: Accelerator) -> bool:
    """Whether the denoiser is to be spread: accelerate was launched with FSDP, in several processes."""
    return _asked_for() and accelerator.num_processes > 1


def _asked_for() -> bool:
    # Of the environment, since accelerate itself passes over it on CPUs.
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def check_launch(config: TrainingConfig) -> None:
    """Refuse ways of accelerate to spread models that this trainer does not go, rather than pass over them.

    Raises:
        UserError: DeepSpeed, Megatron or the first FSDP; or settings that FSDP does not go with.
    """
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if parse_flag_from_env(variable):
            raise UserError(
                f"{name} is set in accelerate's config, and this trainer has no use for it; to spread a base that does "
                f"not fit one GPU, launch with {_EXAMPLE}"
            )
    if not _asked_for():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(f"accelerate's config sets FSDP 1, which is not supported; set fsdp_version: 2, as {_EXAMPLE}")
    # The second lets transformers load empty models in all processes but the first.
    for setting in ("fsdp_offload_params", "fsdp_cpu_ram_efficient_loading"):
        if parse_flag_from_env(setting.upper()):
            raise UserError(f"{setting} in accelerate's config is not supported; set it to false, as {_EXAMPLE}")
    for name, plain in (("base_quantization", "none"), ("torch_compile", False), ("dry_run", False)):
        if getattr(config, name) != plain:
            raise UserError(f"--{name} does not go with FSDP; leave it out, or launch without FSDP")


def shard_denoiser(denoiser: nn.Module, adapter: str, device: torch.device, dtype: torch.dtype) -> None:
    """Spread a denoiser with one adapter over all processes, in place, and move it to their devices.

    A process needs its whole in the CPU's memory before, and one block beside its part on the device from here on.
    After this, all processes must run the denoiser alike, also when it draws.

    Args:
        denoiser: frozen but for the adapter.
        dtype: of the products, in which singular factors are held.
    """
    from torch.distributed.fsdp import fully_shard

    layers = spectral_layers(denoiser, adapter)
    for layer in layers.values():
        layer.spread(adapter, dtype)
    whole = {parameter for layer in layers.values() for parameter in layer.trained_parts(adapter).values()}
    for parameter in whole:  # FSDP leaves them where they are
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in _blocks(denoiser):
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(denoiser, mesh=mesh, ignored_params=whole)


def move_all_but(component: str, pipeline: DiffusionPipeline, device: torch.device | str) -> None:
    """Move the models of a pipeline to a device, but for one."""
    for name, model in pipeline.components.items():
        if isinstance(model, nn.Module) and name != component:
            model.to(device)


def shares_in_words(denoiser: nn.Module) -> str:
    """How much of a spread denoiser this process holds."""
    from torch.distributed.tensor import DTensor

    spread = [tensor for parameter in denoiser.parameters() if isinstance(tensor := parameter.data, DTensor)]
    here = sum(tensor.to_local().nbytes for tensor in spread) / 2**20
    together = sum(tensor.numel() * tensor.element_size() for tensor in spread) / 2**20
    return f"the first process holds {here:,.1f} of {together:,.1f} MiB of weights and singular factors"


def _blocks(denoiser: nn.Module) -> Iterator[nn.Module]:
    """What is put together at a time: the members of the denoiser's own lists of blocks."""
    for child in denoiser.children():
        if isinstance(child, nn.ModuleList):
            yield from child
