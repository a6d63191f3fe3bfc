"""`train-many`: the rows of a list become the adapters that `train` would make of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from many_subjects import World
from training_runs import FREEZING, PROMPT

from svft_diffusion.models import load_pipeline
from svft_diffusion.settings import config_from_mapping
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.many import shared_base, worker
from svft_diffusion.training.many.shared_base import SharedBase
from svft_diffusion.training.trainer import train


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


METHODS: list[dict[str, Any]] = [
    {"name": "plain"},
    {"name": "banded", "pattern": "banded", "instance_data_dir": "others"},
    {"name": "text", "method": "svdiff", "train_text_encoder": True, "gradient_checkpointing": True},
    {"name": "freezing", **FREEZING, "use_ema": True},
    {"name": "norms", "targets": "all", "validation_prompt": PROMPT, "num_validation_images": 1},
    {"name": "Prior", "with_prior_preservation": True, "class_data_dir": "classes", "class_prompt": "a dog",
     "train_text_encoder": True},
    {"name": "second prior", "with_prior_preservation": True, "class_data_dir": "classes", "class_prompt": "a dog",
     "method": "siva"},
    {"name": "new words", "train_text_encoder_ti": True, "token_abstraction": "sks"},
    {"name": "after all", "seed": 3},
]  # fmt: skip


@pytest.mark.parametrize("chosen", [METHODS[2:4], pytest.param(METHODS, marks=pytest.mark.slow)])
def test_every_adapter_is_that_of_a_separate_run(
    world: World, chosen: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"num_class_images": 2, "sample_batch_size": 2, "prior_generation_num_inference_steps": 2}
    loaded: list[str] = []
    load = shared_base.load_base

    def counting(*given: Any) -> Any:
        loaded.append("base")
        return load(*given)

    monkeypatch.setattr(shared_base, "load_base", counting)
    assert world.run(chosen, **shared) == 0
    assert loaded == ["base"]
    together = {row["name"]: world.adapter(row["name"]) for row in chosen}
    assert len(set(together.values())) == len(chosen)
    shutil.rmtree(world.folder / "classes", ignore_errors=True)
    assert together == {row["name"]: world.alone(row, **shared) for row in chosen}


def test_a_16_bit_base_too(world: World) -> None:
    """Its VAE is widened by every run, and class pictures are drawn before that."""
    rows = [
        {"name": f"row {seed}", "seed": seed, "class_data_dir": f"classes-{seed}", "class_prompt": "a dog"}
        for seed in range(2)
    ]
    shared = {
        "mixed_precision": "bf16", "with_prior_preservation": True, "num_class_images": 1,
        "prior_generation_num_inference_steps": 1, "max_train_steps": 1,
    }  # fmt: skip
    assert world.run(rows, **shared) == 0
    assert [world.adapter(row["name"]) for row in rows] == [world.alone(row, **shared) for row in rows]


def test_report_and_status(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": "one", "validation_prompt": PROMPT, "num_validation_images": 1}, {"name": "two", "seed": 1}]
    assert world.run(rows, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    report = world.report()
    assert printed == report and report["states"] == {"finished": 2}
    first, second = report["rows"]
    assert first["adapter_bytes"] == len(world.adapter("one"))
    assert (first["trigger"], first["file"], first["steps"]) == ("sks dog", "one/adapter.safetensors", 2)
    assert first["last_loss"] > 0 and first["seconds"] > 0
    assert (world.output / first["sample"]).is_file() and second["sample"] is None
    assert report["savings"]["times_loaded"] == 1 and report["savings"]["seconds_loading"] > 0
    assert (world.output / "report.png").is_file()
    text = (world.output / "report.md").read_text(encoding="utf-8")
    assert "| 2 | two | finished |" in text and "![samples](report.png)" in text
    assert str(world.folder) not in text
    status = json.loads((world.output / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["rows"]) == ("finished", {"one": "finished", "two": "finished"})


def test_finished_rows_are_skipped_and_damaged_ones_made_again(world: World) -> None:
    rows = [{"name": "one"}, {"name": "two", "seed": 1}, {"name": "three", "seed": 2}]
    assert world.run(rows) == 0
    adapters = [world.adapter(row["name"]) for row in rows]
    times = [(world.output / row["name"] / "adapter.safetensors").stat().st_mtime_ns for row in rows]
    file = world.output / "two" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    (world.output / "three" / "adapter.safetensors").unlink()
    shutil.rmtree(world.folder / "others")
    assert world.run(rows) == 0
    assert [world.adapter(row["name"]) for row in rows] == adapters
    again = [(world.output / row["name"] / "adapter.safetensors").stat().st_mtime_ns for row in rows]
    assert [before == after for before, after in zip(times, again, strict=True)] == [True, False, False]


def test_a_row_with_other_settings_is_refused_and_others_go_on(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.run([{"name": "one"}]) == 0
    before = world.adapter("one")
    assert world.run([{"name": "one", "max_train_steps": 3}, {"name": "two", "seed": 1}]) == 1
    said = capsys.readouterr().out
    assert "row 1 (one): refused: it was trained with other settings (max_train_steps was 2, is 3)" in said
    assert world.adapter("one") == before
    assert world.states() == {"one": "refused", "two": "finished"}
    assert world.run([{"name": "one"}, {"name": "two", "seed": 1}], history_steps=1) == 0  # of no consequence


def test_all_may_be_moved(world: World, tmp_path: Path) -> None:
    rows = [{"name": "one", "instance_data_dir": "photos"}]
    assert world.run(rows) == 0
    other = tmp_path / "moved"
    other.mkdir()
    for name in ("tiny", "photos", "all"):
        (world.folder / name).rename(other / name)
    world.folder, world.output = other, other / "all"
    del world.shared["instance_data_dir"]
    time = (world.output / "one" / "adapter.safetensors").stat().st_mtime_ns
    world.shared["pretrained_model_name_or_path"] = str(other / "tiny")
    assert world.run(rows) == 0
    assert (world.output / "one" / "adapter.safetensors").stat().st_mtime_ns == time


def _failing(names: Sequence[str], error: Exception) -> Callable[..., Any]:
    def run(config: TrainingConfig, **options: Any) -> Any:
        if config.output_dir.name in names:
            raise error
        return train(config, **options)

    return run


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory left"), OSError(5, "Input/output error")])
def test_one_bad_row_does_not_lose_the_others(
    world: World, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"name": "one"}, {"name": "bad"}, {"name": "two", "seed": 1}]
    monkeypatch.setattr(worker, "train", _failing(["bad"], error))
    assert world.run(rows) == 1
    assert world.states() == {"one": "finished", "bad": "failed", "two": "finished"}
    assert "row 2 (bad): failed: " in capsys.readouterr().out
    assert world.report()["rows"][1]["reason"].startswith(type(error).__name__)
    monkeypatch.setattr(worker, "train", train)
    assert world.run(rows) == 0  # it is tried again
    assert world.adapter("bad") == world.adapter("one")


def test_stop_on_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"name": "one"}, {"name": "bad"}, {"name": "two", "seed": 1}]
    monkeypatch.setattr(worker, "train", _failing(["bad"], RuntimeError("boom")))
    assert world.run(rows, "--stop_on_error") == 1
    assert world.states() == {"one": "finished", "bad": "failed", "two": "waiting"}


def test_a_run_that_diverges_and_a_photo_that_goes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"name": "diverging", "learning_rate": 1e30, "max_train_steps": 4, "max_grad_norm": 1e30, "init": "random"},
        {"name": "without photos", "instance_data_dir": "others"},
        {"name": "sound", "seed": 1},
    ]

    def removing(config: TrainingConfig, **options: Any) -> Any:
        shutil.rmtree(world.folder / "others", ignore_errors=True)
        return train(config, **options)

    monkeypatch.setattr(worker, "train", removing)
    assert world.run(rows) == 1
    assert world.states() == {"diverging": "failed", "without photos": "failed", "sound": "finished"}
    assert world.adapter("sound") == world.alone(rows[2])


def test_a_base_whose_weights_changed_is_noticed_and_loaded_again(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"name": "one"}, {"name": "two", "seed": 1}]

    def changing(config: TrainingConfig, *, load: Callable[..., Any], **options: Any) -> Any:
        result = train(config, load=load, **options)
        if config.output_dir.name == "one":
            weight = load(config, torch.float32).unet.conv_in.weight
            weight.data.view(-1)[0] += 1e-3
        return result

    monkeypatch.setattr(worker, "train", changing)
    assert world.run(rows) == 1
    assert world.states() == {"one": "failed", "two": "finished"}
    assert "weights of the base model" in capsys.readouterr().out
    assert world.adapter("two") == world.alone(rows[1])
    assert world.report()["savings"]["times_loaded"] == 2


def test_everything_on_the_base_is_undone(world: World) -> None:
    base = SharedBase()
    config = dataclasses.replace(
        config_from_mapping(TrainingConfig, world.shared),
        output_dir=world.output,
        train_text_encoder=True,
        gradient_checkpointing=True,
        mixed_precision="bf16",
    )
    train(config, load=base.lend)
    pipeline = base.lend(config, torch.bfloat16)
    assert pipeline.vae.dtype == torch.float32 and pipeline.unet.training  # something is there to be undone
    pipeline.unet.compile()
    pipeline.unet.register_forward_hook(print)
    pipeline.unet.set_attn_processor(type(next(iter(pipeline.unet.attn_processors.values())))())
    assert base.take_back()
    fresh = load_pipeline(config.pretrained_model_name_or_path, dtype=torch.bfloat16)
    for component in ("unet", "text_encoder", "vae"):
        used, unused = getattr(pipeline, component), getattr(fresh, component)
        assert {name: type(part) for name, part in used.named_modules()} == {
            name: type(part) for name, part in unused.named_modules()
        }
        for (name, tensor), (_, wanted) in zip(used.named_parameters(), unused.named_parameters(), strict=True):
            assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name
            assert tensor.requires_grad == wanted.requires_grad and tensor.grad is None, name
        assert used.training == unused.training and not used._forward_hooks
        assert {vars(part).get("gradient_checkpointing", False) for part in used.modules()} == {False}
        assert not hasattr(used, "peft_config") and used._compiled_call_impl is None
    assert base.times_loaded == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_rows(world: World) -> None:
    psutil = pytest.importorskip("psutil")
    base = SharedBase()
    sizes = []
    for number in range(10):
        config = config_from_mapping(TrainingConfig, world.shared)
        train(dataclasses.replace(config, output_dir=world.output / str(number)), load=base.lend)
        assert base.take_back()
        sizes.append(psutil.Process().memory_info().rss)
    assert sizes[-1] - sizes[4] < 8e6
