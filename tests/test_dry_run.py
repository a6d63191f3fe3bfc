"""``--dry_run``, memory that is not enough, and what runs the attention: measured, and said in words that help."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_pipeline
from training_runs import PROMPT, arguments, short_run, trained_tensors

from svft_diffusion.cli.main import run_command
from svft_diffusion.errors import UserError
from svft_diffusion.training import step as step_module
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.dry_run import DryRun, dry_run
from svft_diffusion.training.memory import is_out_of_memory, memory_remedies, peak_memory
from svft_diffusion.training.speed import attention_in_words, compilation_explained
from svft_diffusion.training.trainer import train


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """A run that is not begun, in a folder that the tests of this file share."""
    return short_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def config(started: TrainingConfig, tmp_path: Path) -> TrainingConfig:
    return replace(started, output_dir=tmp_path / "out")


def test_dry_run_measures_what_the_run_then_needs_and_writes_nothing(config: TrainingConfig, tmp_path: Path) -> None:
    config = replace(
        config,
        train_text_encoder=True,
        with_prior_preservation=True,
        class_data_dir=tmp_path / "class",
        class_prompt="a dog",
        num_class_images=2,
        prior_generation_num_inference_steps=2,
        validation_prompt=PROMPT,
        num_validation_images=2,
        validation_steps=2,
        thumbnail=False,
    )
    before = sorted(tmp_path.rglob("*"))
    report = dry_run(config)
    assert sorted(tmp_path.rglob("*")) == before
    assert (report.steps, report.photos, report.class_images, report.samples) == (4, 5, 2, 6)
    assert report.passes_per_photo == 4 * 2 / 5
    assert report.peak_memory > 100e6 and report.seconds_per_step > 0 < report.seconds_per_sample
    assert report.gradient_norms.keys() == {"unet", "text_encoder"} and min(report.gradient_norms.values()) > 0
    assert report.total_seconds > report.seconds_to_start + 4 * report.seconds_per_step

    result = train(config)
    assert len(list((config.output_dir / "samples").glob("*.png"))) == report.samples
    assert abs(result.adapter.stat().st_size - report.adapter_bytes) < 100  # the header's text differs
    values = {"unet": 0, "text_encoder": 0}
    for name, tensor in trained_tensors(result.adapter).items():
        values[name.partition(".")[0]] += tensor.numel()
    assert report.trained_values == values
    assert dry_run(replace(config, output_dir=tmp_path / "other")).class_images == 0


def test_command_prints_words_or_json_and_ends_with_0(
    config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("train", [*arguments(config), "--dry_run"]) == 0
    words = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in words] == ["memory", "time", "adapter", "gradient norm", "photos"]
    assert "960 in unet" in words[2] and "4 steps of " in words[1] and "5, each seen 2 times" in words[4]
    assert run_command("train", [*arguments(config), "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trained_values"] == {"unet": 960} and report["total_seconds"] > 0
    assert not config.output_dir.exists()
    assert run_command("train", [*arguments(config), "--json"]) == 2
    assert "--json prints what --dry_run measures" in capsys.readouterr().err


def test_dry_run_refuses_what_the_run_would(config: TrainingConfig) -> None:
    with pytest.raises(UserError, match="no such folder"):
        dry_run(replace(config, instance_data_dir=Path("nowhere")))


def test_time_is_estimated_from_everything_that_is_done() -> None:
    report = DryRun(
        device="cpu",
        peak_memory=1,
        steps=7200,
        seconds_to_start=10.0,
        seconds_per_step=1.0,
        class_images=3,
        seconds_per_class_image=2.0,
        samples=4,
        seconds_per_sample=3.0,
        adapter_bytes=1000,
        trained_values={"unet": 1},
        gradient_norms={"unet": 0.5},
        photos=5,
        passes_per_photo=3.0,
    )
    assert report.total_seconds == 10 + 7200 + 6 + 12 and "about 2 h 0 min" in report.in_words()
    assert report.to_mapping()["total_seconds"] == report.total_seconds


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        MemoryError(),
    ],
    ids=lambda problem: type(problem).__name__,
)
def test_lack_of_memory_is_answered_with_peak_and_remedies(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    real, calls = step_module.denoising_losses, [0]

    def failing(*positional: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise problem
        return real(*positional, **named)

    monkeypatch.setattr(step_module, "denoising_losses", failing)
    with pytest.raises(UserError) as refusal:
        train(config)
    text = str(refusal.value)
    assert "\n" not in text and "memory is not enough (peak before it failed: " in text and " GB)" in text
    assert "--gradient_checkpointing, --train_batch_size 1 --gradient_accumulation_steps 2, --mixed_precision" in text
    assert (config.output_dir / "checkpoint-2").is_dir()


def test_real_lack_of_memory_is_known_and_other_errors_are_not(config: TrainingConfig) -> None:
    with pytest.raises(RuntimeError) as problem:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(problem.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_remedies_are_those_that_are_left(config: TrainingConfig) -> None:
    smallest = replace(
        config,
        gradient_checkpointing=True,
        train_batch_size=1,
        mixed_precision="bf16",
        compress_activations=True,
        targets="cross-attention",
    )
    assert memory_remedies(smallest)[0] == "a smaller --resolution" and len(memory_remedies(smallest)) == 3
    assert "no --train_text_encoder" in memory_remedies(replace(smallest, targets="attention", train_text_encoder=True))


def test_peak_memory_is_of_this_process() -> None:
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(int(before * 1.2), dtype=torch.uint8)
    assert peak_memory(torch.device("cpu")) > before
    assert block.all()


def test_attention_is_read_from_the_models() -> None:
    pipeline = tiny_pipeline()
    models = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    assert attention_in_words(models) == "unet SDPA, text_encoder SDPA"
    pipeline.enable_attention_slicing()
    assert attention_in_words(models).startswith("unet plain")


def test_repeated_blocks_are_compiled(config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def pretend(function: Any) -> Any:
        compiled.append(function.__self__)
        return function

    config = replace(config, max_train_steps=1)
    plain = train(config).adapter.read_bytes()
    monkeypatch.setattr(torch, "compile", pretend)
    assert train(replace(config, torch_compile=True, output_dir=tmp_path / "compiled")).adapter.read_bytes() == plain
    assert len(compiled) > 3 and {type(block).__name__ for block in compiled} == {"BasicTransformerBlock"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_compiled_blocks_have_the_same_losses(config: TrainingConfig, tmp_path: Path) -> None:
    config = replace(config, gradient_checkpointing=True, validation_prompt=PROMPT, num_validation_images=1)
    plain = train(config)
    compiled = train(replace(config, torch_compile=True, output_dir=tmp_path / "compiled"))
    losses = [
        [json.loads(line)["loss"] for line in (result.output_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
        for result in (plain, compiled)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and len(losses[1]) == 4
    assert trained_tensors(plain.adapter).keys() == trained_tensors(compiled.adapter).keys()


def test_compilation_that_fails_is_one_line(config: TrainingConfig) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    failure = BackendCompilerFailed(lambda: None, RuntimeError("Compiler: cl is not found.\nmore"), None)
    with pytest.raises(UserError) as refusal, compilation_explained(replace(config, torch_compile=True)):
        raise failure
    assert "\n" not in str(refusal.value) and "--torch_compile does not work here" in str(refusal.value)
    with pytest.raises(BackendCompilerFailed), compilation_explained(config):
        raise failure
