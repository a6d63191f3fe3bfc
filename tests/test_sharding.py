"""FSDP2: a denoiser that is spread over processes computes, learns and draws what a whole one does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tiny_models import tiny_inputs, tiny_unet
from tiny_transformers import tiny_flux, tiny_flux_inputs, tiny_sd3, tiny_sd3_inputs
from torch import nn
from training_runs import PROMPT, arguments, short_run, trained_tensors

from svft_diffusion.adapters import add_training_adapter
from svft_diffusion.adapters.config import SpectralConfig
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.adapters.training import adapter_state
from svft_diffusion.cli.main import main
from svft_diffusion.errors import Interrupted, UserError
from svft_diffusion.training import self_check
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.sharding import check_launch, shard_denoiser, shares_in_words
from svft_diffusion.training.status import DRAWING_CLASS_IMAGES, ENCODING_PICTURES
from svft_diffusion.training.trainer import _Watch
from svft_diffusion.training.validation import samples_missing

REPOSITORY = Path(__file__).parents[1]
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, torch.Tensor]]] = {
    "unet": (tiny_unet, tiny_inputs()),
    "flux": (tiny_flux, tiny_flux_inputs()),
    "sd3": (tiny_sd3, tiny_sd3_inputs()),
}
METHODS = {
    "banded": {"method": "svft", "pattern": "banded", "off_diagonals": 1, "targets": "all"},
    "random triplets": {"method": "siva", "fraction": 0.5, "select": "random"},
    "svdiff": {"method": "svdiff", "train_bias": True},
}


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone: weights are spread and put together all the same."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "group").as_uri(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def trained(model: nn.Module, **options: Any) -> list[nn.Parameter]:
    parameters = add_training_adapter({_component(model): model}, SpectralConfig(**options), "a")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return parameters


def _component(model: nn.Module) -> str:
    return "unet" if "UNet" in type(model).__name__ else "transformer"


def gradients(model: nn.Module, parameters: list[nn.Parameter], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    for parameter in parameters:
        parameter.grad = None
    model(**inputs)[0].square().mean().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


@pytest.mark.parametrize(
    ("name", "method", "checkpointing"),
    [
        ("unet", "banded", True),
        ("unet", "random triplets", False),
        ("flux", "random triplets", True),
        ("flux", "svdiff", False),
        ("sd3", "svdiff", True),
        ("sd3", "banded", False),
    ],
)
def test_a_spread_denoiser_is_the_whole_one(name: str, method: str, checkpointing: bool, process_group: None) -> None:
    (make, inputs), options = MODELS[name], METHODS[method]
    model: Any = make()
    if checkpointing:
        model.enable_gradient_checkpointing()
    parameters = trained(model, **options)
    with torch.no_grad():
        output = model(**inputs)[0]
    expected = gradients(model, parameters, inputs)
    state = adapter_state({_component(model): model}, "a")
    shard_denoiser(model, "a", torch.device("cpu"), torch.float32)
    whole = {id(parameter) for parameter in parameters}
    for path, parameter in model.named_parameters():
        assert (id(parameter) in whole) != hasattr(parameter, "device_mesh"), path
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], output, atol=1e-5, rtol=1e-5)
    for found, wanted in zip(gradients(model, parameters, inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-3)
    again = adapter_state({_component(model): model}, "a")
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    assert shares_in_words(model).endswith("MiB of weights and singular factors")


def test_in_16_bit(process_group: None) -> None:
    model = tiny_flux().to(torch.bfloat16)
    inputs = tiny_flux_inputs(torch.bfloat16)
    parameters = trained(model, method="svft")
    expected = gradients(model, parameters, inputs)
    shard_denoiser(model, "a", torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    found = gradients(model, parameters, inputs)
    difference = torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)]).norm()
    assert difference < 0.1 * torch.cat([b.flatten() for b in expected]).norm()


def test_nothing_is_folded_into_a_spread_base(process_group: None) -> None:
    model = tiny_unet()
    trained(model, method="svft")
    shard_denoiser(model, "a", torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="takes no adapter into its weights"):
        next(iter(spectral_layers(model).values())).merge()


@pytest.mark.parametrize(
    ("environment", "changes", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed is set in accelerate's config, and this trainer has no"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron-LM is set in accelerate's config"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "sets FSDP 1, which is not supported; set fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params in accelerate's config is not supported"),
        (
            {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            {},
            "fsdp_cpu_ram_efficient_loading in accelerate's config is not supported",
        ),
        ({}, {"base_quantization": "int8"}, "--base_quantization does not go with FSDP"),
        ({}, {"torch_compile": True}, "--torch_compile does not go with FSDP"),
        ({}, {"dry_run": True}, "--dry_run does not go with FSDP"),
    ],
)
def test_what_does_not_go_together(
    environment: dict[str, str], changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = next(iter(environment), "")
    if not first.startswith("ACCELERATE"):
        environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **environment}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as refusal:
        check_launch(replace(TrainingConfig(), **changes))
    assert "\n" not in str(refusal.value)


def test_deepspeed_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = short_run(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert main(["train", *arguments(config)]) == 2
    assert "launch with configs/accelerate/fsdp2.yaml" in capsys.readouterr().err
    assert not config.output_dir.exists()


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs" / "accelerate").glob("*.yaml")), ids=lambda f: f.stem)
def test_accelerate_reads_the_configs(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    content = yaml.safe_load(file.read_text("utf-8"))
    read = load_config_from_file(str(file))
    assert str(getattr(read.distributed_type, "value", read.distributed_type)) == content["distributed_type"]
    assert dict(getattr(read, "fsdp_config", None) or {}) == content.get("fsdp_config", {})


def _one_of_two(**parts: Any) -> Any:
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), reduce=lambda tensor, how: tensor, gather=lambda tensor: torch.tensor([1, 0])
    )
    pipeline = SimpleNamespace(components={"unet": nn.Linear(1, 1)})
    pipeline.components["unet"].dtype = torch.float32
    return SimpleNamespace(
        accelerator=accelerator, family=SimpleNamespace(pipeline=pipeline), models=pipeline.components,
        resting=SimpleNamespace(awake=nullcontext), averaged_values=nullcontext, **parts,
    )  # fmt: skip


def test_a_process_that_can_not_draw_does_not_leave_the_others_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(self_check, "_draw", fail)
    with pytest.raises(torch.OutOfMemoryError):
        self_check.check_file(_one_of_two(is_sharded=True), Path("a.safetensors"))
    assert "no memory left" in self_check.check_file(_one_of_two(is_sharded=False), Path("a.safetensors"))
    monkeypatch.setattr(self_check, "_draw", lambda *given: 0)
    monkeypatch.setattr(self_check, "_loaded", fail)  # which all of them hear of
    said = self_check.check_file(_one_of_two(is_sharded=True), Path("a.safetensors"))
    assert said == "warning: a.safetensors was not tried in a fresh base model: no memory left"


def test_the_first_process_says_whether_samples_are_missing(tmp_path: Path) -> None:
    """Another machine may not see them yet."""
    config = replace(TrainingConfig(), output_dir=tmp_path)
    given = {"config": config, "draws_samples": lambda step: False, "total_steps": 4}
    assert samples_missing(_one_of_two(is_sharded=True, **given), 2)
    assert not samples_missing(_one_of_two(is_sharded=False, **given), 2)


def in_two_processes(config: TrainingConfig, *, sharded: bool, **changes: Any) -> Path:
    """A run of two processes on this CPU; accelerate's launcher itself leaves FSDP out where there is no GPU."""
    environment = {
        **os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_USE_FSDP": str(sharded).lower(), "FSDP_VERSION": "2",
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(REPOSITORY / "train_dreambooth.py"), *arguments(config, validation_prompt=PROMPT, **changes)]
    command += ["--num_validation_images", "1", "--validation_steps", "2"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert ("FSDP: the first process holds" in finished.stdout) == sharded
    assert "draws the same picture as the trained model" in finished.stdout
    return config.output_dir


@pytest.mark.slow
def test_two_processes_that_share_a_denoiser(tmp_path: Path) -> None:
    config = replace(short_run(tmp_path), learning_rate=0.002)
    plain = in_two_processes(replace(config, output_dir=tmp_path / "plain"), sharded=False)
    shared = in_two_processes(replace(config, output_dir=tmp_path / "shared"), sharded=True)
    expected = trained_tensors(plain / "adapter.safetensors")
    found = trained_tensors(shared / "adapter.safetensors")
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-5
    assert {file.name for file in shared.rglob("*.png")} == {file.name for file in plain.rglob("*.png")}
    parted = replace(config, output_dir=tmp_path / "parted")
    in_two_processes(replace(parted, max_train_steps=2), sharded=True)
    in_two_processes(parted, sharded=True, resume_from_checkpoint="latest")
    assert (parted.output_dir / "adapter.safetensors").read_bytes() == (shared / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize(("first", "state"), [(True, ENCODING_PICTURES), (False, DRAWING_CLASS_IMAGES)])
def test_no_process_ends_alone(first: bool, state: str, tmp_path: Path) -> None:
    """A stop file that only this one has seen yet ends all of them at the next step; the others would wait for it."""
    accelerator: Any = SimpleNamespace(num_processes=2, is_main_process=first)
    watch = _Watch(accelerator, tmp_path)
    (tmp_path / "stop").touch()
    watch.progress(state)
    with pytest.raises(Interrupted):
        watch.interruption.check()
    if first:
        with pytest.raises(Interrupted):  # which tells the others
            watch.progress(DRAWING_CLASS_IMAGES)
