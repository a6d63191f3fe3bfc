"""Training loops as people write them: gradient checkpointing, accelerate, DDP, autocast, averaged weights."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from adapted_models import CONFIGS, IDS, Mixed, digest_of_base, every_method, output_of, randomize, trained
from peft import inject_adapter_in_model
from tiny_models import tiny_inputs, tiny_unet_sd1
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from svft_diffusion import SVFTConfig
from svft_diffusion.adapters.injection import spectral_layers

SOME_METHODS = ["svft banded 1, official init", "svdiff, scalar norms", "vectorfit", "siva random"]


def adapted(method: str) -> Mixed:
    model: Mixed = inject_adapter_in_model(CONFIGS[method](targets="all"), Mixed(), "a")
    randomize(model, "a")
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of everything that trains; nothing is left out."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found and all(gradient is not None for gradient in found.values())
    return {name.removeprefix("module."): gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("method", SOME_METHODS)
def test_gradient_checkpointing_gives_the_same_gradients(method: str) -> None:
    found = []
    for checkpointing in (False, True):
        unet = tiny_unet_sd1().train()
        unet.add_adapter(CONFIGS[method](targets="all"), "a")
        randomize(unet, "a", scale=0.1)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(**tiny_inputs()).sample.square().mean().backward()
        found.append(gradients(unet))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", SOME_METHODS)
def test_accelerate_trains_and_resumes(method: str, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, base = adapted(method), digest_of_base(Mixed())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step() -> float:
        optimizer.zero_grad()
        loss: Tensor = (model(IDS) - 0.3).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        return loss.item()

    losses = [step() for _ in range(3)]
    assert losses[2] < losses[0]
    accelerator.save_state(str(tmp_path))
    following = step()
    accelerator.load_state(str(tmp_path))
    assert step() == following
    assert digest_of_base(accelerator.unwrap_model(model)) == base


@every_method
def test_autocast(method: str) -> None:
    model = adapted(method)
    exact = model(IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(IDS)
        with torch.no_grad():
            folded = model(IDS)
    weights = torch.linspace(-1, 1, 6)
    (output.float() * weights).square().sum().backward()
    found = gradients(model)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    torch.testing.assert_close(output.float(), exact, rtol=0.1, atol=0.1)
    torch.testing.assert_close(folded.float(), exact, rtol=0.1, atol=0.1)
    model.zero_grad()
    (model(IDS) * weights).square().sum().backward()
    in_16_bit, exactly = (torch.cat([g.flatten() for g in all_of.values()]) for all_of in (found, gradients(model)))
    assert (in_16_bit - exactly).norm() < 0.1 * exactly.norm()


@every_method
def test_averaged_values_put_in_through_data_are_seen(method: str) -> None:
    model = adapted(method)
    with torch.no_grad():
        before, kept = model(IDS), trained(model, "a")
        reference = adapted(method)
        for path, layer in spectral_layers(model).items():
            for part, tensor in layer.trained_parts("a").items():
                tensor.data.copy_(0.5 * tensor.data)
                spectral_layers(reference)[path].trained_parts("a")[part].copy_(0.5 * kept[f"{path}.{part}"])
        halved = model(IDS)
        assert torch.equal(halved, reference(IDS)) and not torch.allclose(halved, before)
        for path, layer in spectral_layers(model).items():
            for part, tensor in layer.trained_parts("a").items():
                tensor.data.copy_(kept[f"{path}.{part}"])
        assert torch.equal(model(IDS), before)


@every_method
@pytest.mark.parametrize("checkpointing", [False, True])
def test_optimizers_that_write_through_data_train(method: str, checkpointing: bool) -> None:
    """As Prodigy, Adafactor and the 8-bit optimizers do; no version counter sees it."""
    found = []
    for behind_the_back in (False, True):
        model = adapted(method)
        for _ in range(3):
            model.zero_grad()
            output = checkpoint(model, IDS, use_reentrant=False) if checkpointing else model(IDS)
            output.square().mean().backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    with torch.no_grad():
                        (parameter.data if behind_the_back else parameter).sub_(parameter.grad)
        found.append(trained(model, "a"))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


def test_a_preview_in_inference_mode_between_two_steps_changes_nothing() -> None:
    found = []
    for preview in (False, True):
        unet = tiny_unet_sd1()
        unet.add_adapter(SVFTConfig(pattern="banded", off_diagonals=1, targets="all"), "a")
        randomize(unet, "a", scale=0.1)
        optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            unet(**tiny_inputs()).sample.square().mean().backward()
            optimizer.step()
            if preview:
                with torch.inference_mode():
                    unet.fuse_lora()
                    output_of(unet, tiny_inputs())
                    unet.unfuse_lora()
                    output_of(unet, tiny_inputs())
        found.append(trained(unet, "a"))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


# Two processes


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def train_on_one_rank(rank: int, port: int, folder: str, method: str) -> None:
    """Two steps of DDP, each rank on its own half of the batch; the state goes into ``folder``."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SVFT_DIFFUSION_CACHE": folder}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = DistributedDataParallel(adapted(method))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS[rank : rank + 1]).square().mean().backward()
        optimizer.step()
    torch.save((gradients(model), trained(model.module, "a")), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("method", SOME_METHODS)
def test_ddp_trains_like_one_process(method: str, tmp_path: Path) -> None:
    multiprocessing.spawn(train_on_one_rank, args=(free_port(), str(tmp_path), method), nprocs=2)
    (first_gradients, first), (second_gradients, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(gradient, second_gradients[name]) for name, gradient in first_gradients.items())
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    alone = adapted(method)
    optimizer = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        alone(IDS).square().mean().backward()
        optimizer.step()
    for name, gradient in gradients(alone).items():
        torch.testing.assert_close(first_gradients[name], gradient, rtol=1e-4, atol=1e-6)
    for name, value in trained(alone, "a").items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
