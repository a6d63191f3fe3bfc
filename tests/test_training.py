"""Training runs on a tiny base model: what they write, every kind of adapter, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import FREEZING, PROMPT, arguments, checkpoints, picture, short_run, trained_tensors

from svft_diffusion import load_adapter
from svft_diffusion.adapters.training import adapter_state
from svft_diffusion.cli.main import run_command
from svft_diffusion.errors import UserError
from svft_diffusion.factors import configure_cache
from svft_diffusion.files import read_adapter
from svft_diffusion.models import load_pipeline
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.run import ADAPTER_NAME
from svft_diffusion.training.trainer import StepReport, train

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """A run that is over; its folder is only read."""
    config = short_run(tmp_path_factory.mktemp("finished"))
    train(config)
    return config


@pytest.fixture
def config(finished: TrainingConfig, tmp_path: Path) -> TrainingConfig:
    """The same run in a folder of its own, not begun yet."""
    return replace(finished, output_dir=tmp_path / "out")


def test_run_writes_everything(config: TrainingConfig, capsys: pytest.CaptureFixture[str]) -> None:
    base = config.pretrained_model_name_or_path
    reports: list[StepReport] = []
    result = train(
        replace(config, validation_prompt=PROMPT, num_validation_images=1, validation_steps=2), on_step=reports.append
    )
    out = config.output_dir
    assert checkpoints(out) == {"checkpoint-2", "checkpoint-4"}
    assert sorted(path.name for path in (out / "samples").iterdir()) == [
        "step-000000-0.png",
        "step-000002-0.png",
        "step-000004-0.png",
    ]
    header, _ = read_adapter(result.adapter)
    assert result.adapter == out / "adapter.safetensors"
    assert header.instance_prompt == PROMPT and header.base.name == "tiny" and header.training["max_train_steps"] == 4
    trained = trained_tensors(result.adapter)
    assert {name.split(".")[0] for name in trained} == {"unet"}
    assert sum(tensor.numel() for tensor in trained.values()) == result.trained_values
    assert all(tensor.dtype == torch.float32 and tensor.abs().sum() > 0 for tensor in trained.values())

    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4] == [report.step for report in reports]
    assert metrics[-1]["loss"] == result.last_loss == reports[-1].loss
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"instance_prompt: {PROMPT}\n" in card and "](samples/step-000004-0.png)" in card
    assert "path/to/tiny" in card and str(Path(base).parent) not in card
    printed = capsys.readouterr().out
    assert ".DS_Store (hidden file), notes.txt (not a picture)" in printed and "photos: 5" in printed

    without = picture(base, num_inference_steps=2)
    assert not np.array_equal(picture(base, result.adapter, num_inference_steps=2), without)
    # Intermediate checkpoints are adapters too, and differ from the last.
    first, last = (out / name / "adapter.safetensors" for name in ("checkpoint-2", "checkpoint-4"))
    assert not np.array_equal(picture(base, first, num_inference_steps=2), without)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in trained_tensors(last).items())


def test_same_settings_give_the_same_file(finished: TrainingConfig, config: TrainingConfig, tmp_path: Path) -> None:
    first = (finished.output_dir / "adapter.safetensors").read_bytes()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert train(config).adapter.read_bytes() == first
    assert torch.equal(torch.get_rng_state(), before)
    assert train(replace(config, output_dir=tmp_path / "other", seed=1)).adapter.read_bytes() != first


def test_saved_config_gives_the_same_file(config: TrainingConfig, tmp_path: Path) -> None:
    first = train(replace(config, learning_rate=None, pattern="banded")).adapter
    again = tmp_path / "again"
    file = config.output_dir / "config.yaml"
    assert run_command("train", ["--config", str(file), "--output_dir", str(again)]) == 0
    assert (again / "adapter.safetensors").read_bytes() == first.read_bytes()


def test_trained_values_reach_the_file_unchanged(finished: TrainingConfig) -> None:
    adapter = finished.output_dir / "adapter.safetensors"
    pipeline = load_pipeline(finished.pretrained_model_name_or_path)
    name = load_adapter(pipeline, adapter, ADAPTER_NAME)
    tensors = trained_tensors(adapter)
    state = adapter_state(pipeline, name)
    assert state.keys() == tensors.keys() and all(torch.equal(state[key], tensors[key]) for key in state)


def test_text_encoder_gets_keys_and_its_own_learning_rate(config: TrainingConfig) -> None:
    result = train(replace(config, train_text_encoder=True, text_encoder_lr=0.001, max_train_steps=2))
    tensors = trained_tensors(result.adapter)
    assert {name.split(".")[0] for name in tensors} == {"unet", "text_encoder"}
    # AdamW moves every value by about the learning rate in each step.
    largest = {part: max(t.abs().max() for n, t in tensors.items() if n.startswith(part)) for part in ("unet", "text")}
    assert 0.0005 < largest["text"] < 0.003 and 0.04 < largest["unet"] < 0.12


KINDS: dict[str, dict[str, Any]] = {
    "svft plain": {"method": "svft"},
    "svft banded": {"method": "svft", "pattern": "banded", "targets": "all", "train_text_encoder": True},
    "svft random": {"method": "svft", "pattern": "random", "off_diagonals": 1},
    "svft top_k": {"method": "svft", "pattern": "top_k", "off_diagonals": 1, "rank": 8},
    "svft official": {"method": "svft", "pattern": "banded", "init": "official"},
    "svdiff everywhere": {"method": "svdiff", "targets": "all", "train_text_encoder": True},
    "vectorfit": {"method": "vectorfit", "freezing_warmup_steps": 1, "freezing_interval": 1, "freezing_number": 2},
    "biases and norms alone": {
        "method": "vectorfit",
        "train_values": False,
        "train_norm": True,
        "learning_rate_1d": 0.05,
    },
    "siva": {"method": "siva", "fraction": 0.5},
    "siva random": {"method": "siva", "fraction": 0.5, "select": "random", "init": "random", "targets": "all-linear"},
    "compressed": {"method": "svft", "pattern": "banded", "compress_activations": True},
}


@pytest.fixture(scope="module")
def without(finished: TrainingConfig) -> np.ndarray:
    """What the base model draws."""
    return picture(finished.pretrained_model_name_or_path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_its_file_draws_what_training_drew(
    config: TrainingConfig, without: np.ndarray, kind: str
) -> None:
    result = train(
        replace(config, **KINDS[kind], max_train_steps=3, validation_prompt=PROMPT, num_validation_images=1, seed=1)
    )
    trained = trained_tensors(result.adapter)
    assert sum(tensor.numel() for tensor in trained.values() if tensor.is_floating_point()) == result.trained_values
    loaded = picture(config.pretrained_model_name_or_path, result.adapter)
    (drawn,) = result.samples
    assert np.abs(loaded - np.asarray(Image.open(drawn), dtype=int)).max() <= 1  # 8 bits; the sums' order differs
    assert np.abs(loaded - without).max() > 1


def test_what_is_one_dimensional_has_a_learning_rate_of_its_own(config: TrainingConfig) -> None:
    result = train(replace(config, method="vectorfit", train_norm=True, learning_rate_1d=0.001, freezing_number=0))
    largest: dict[str, float] = {}
    for name, tensor in trained_tensors(result.adapter).items():
        part = name.rpartition(".")[2]
        largest[part] = max(largest.get(part, 0.0), float(tensor.abs().max()))
    # AdamW moves every value by about the learning rate in each of the four steps.
    assert largest.keys() == {"values", "bias", "norm"}
    assert 0.1 < largest["values"] < 0.25 and 0.002 < largest["bias"] < 0.005 and 0.002 < largest["norm"] < 0.005


def test_frozen_vectors_are_the_same_in_checkpoints_of_one_window(config: TrainingConfig) -> None:
    train(replace(config, **FREEZING, max_train_steps=6, checkpointing_steps=1))
    rows = [json.loads(line) for line in (config.output_dir / "freezing.jsonl").read_text("utf-8").splitlines()]
    assert [(row["step"], row["until"]) for row in rows] == [(1, 3), (3, 5)]
    for row in rows:
        states = [
            trained_tensors(config.output_dir / f"checkpoint-{step}" / "adapter.safetensors")
            for step in range(row["step"], row["until"] + 1)
        ]
        still = {name for name in states[0] if all(torch.equal(states[0][name], state[name]) for state in states)}
        assert still == set(row["frozen"]) and len(still) == 7
        strengths = list(row["frozen"].values())
        assert strengths == sorted(strengths, reverse=True) and strengths[-1] > 0
    assert rows[0]["frozen"].keys() != rows[1]["frozen"].keys()


def test_too_many_frozen_vectors_are_refused_before_class_images_are_drawn(
    config: TrainingConfig, tmp_path: Path
) -> None:
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "a dog"}
    with pytest.raises(UserError, match=r"top_k=1000 freezes all \d+ vectors"):
        train(replace(config, method="vectorfit", freezing_top_k=1000, **prior))
    assert not (tmp_path / "class").exists() and not config.output_dir.exists()


def test_factor_cache_goes_where_it_is_told(config: TrainingConfig, tmp_path: Path) -> None:
    folder = tmp_path / "factors"
    try:
        train(replace(config, factor_cache=folder, factor_cache_size="1GB", max_train_steps=1))
    finally:
        configure_cache(None, None)
    assert any(folder.iterdir())
    assert "factors" not in (config.output_dir / "config.yaml").read_text("utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instance_data_dir": "nowhere"}, "no such folder"),
        ({"instance_prompt": None}, "no prompt"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "no such base model folder"),
        ({"method": "lora"}, "invalid choice"),
        ({"learning_rat": "1"}, "did you mean '--learning_rate'"),
        ({"resume_from_checkpoint": "latest"}, "no checkpoint"),
        ({"rank": "1000"}, "singular values"),
        ({"pattern": "banded", "off_diagonals": "1000"}, "off_diagonals=1000 is too large for"),
        ({"method": "siva", "fraction": "1.5"}, "fraction must lie in (0, 1], got 1.5"),
        ({"method": "siva", "select": "middle"}, "invalid choice"),
        ({"init": "ones"}, "invalid choice"),
        ({"method": "svdiff", "pattern": "random"}, "unknown pattern 'random' for method svdiff"),
    ],
)
def test_bad_input_exits_with_2_and_leaves_nothing(
    config: TrainingConfig, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = run_command("train", arguments(config, **changes))
    except SystemExit as end:  # argparse ends the program itself
        code = end.code
    assert code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not config.output_dir.exists()


@pytest.mark.parametrize("name", ["adapter.safetensors", "README.md", "config.yaml"])
def test_command_overwrites_no_file_of_others(
    config: TrainingConfig, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.output_dir.mkdir()
    (config.output_dir / name).write_text("precious", encoding="utf-8")
    assert run_command("train", arguments(config)) == 2
    assert f"{name} is there already" in capsys.readouterr().err
    assert [path.name for path in config.output_dir.iterdir()] == [name]
    assert (config.output_dir / name).read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("index", ['{"_class_name": "FooPipeline"}', "[]", "{"])
def test_damaged_base_is_named_in_one_line(tmp_path: Path, index: str) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "model_index.json").write_text(index, encoding="utf-8")
    with pytest.raises(UserError, match="the base model damaged can't be loaded") as refusal:
        load_pipeline(str(folder))
    assert "\n" not in str(refusal.value)


def test_accelerate_launch(finished: TrainingConfig, config: TrainingConfig) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    command += [str(REPOSITORY / "train_dreambooth.py"), *arguments(config)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=config.output_dir.parent)
    assert done.returncode == 0, done.stderr
    assert checkpoints(config.output_dir) == {"checkpoint-2", "checkpoint-4"}
    launched, here = ((run.output_dir / "adapter.safetensors").read_bytes() for run in (config, finished))
    assert launched == here
