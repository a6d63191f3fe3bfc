"""Optimizers, averages of the values and a text encoder that stops: what they do, and that runs resume exactly."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.optimization import get_scheduler
from PIL import Image
from training_runs import PROMPT, picture, short_run, trained_tensors

from svft_diffusion.errors import UserError
from svft_diffusion.models import EMBEDDED_MODEL
from svft_diffusion.training.averaging import make_averaging
from svft_diffusion.training.checkpoints import load_checkpoint_state
from svft_diffusion.training.checks import check_settings
from svft_diffusion.training.config import LR_SCHEDULERS, OPTIMIZERS, TrainingConfig
from svft_diffusion.training.learning_rates import default_learning_rates
from svft_diffusion.training.optimizers import check_optimizer, make_optimizer, state_in_8_bits
from svft_diffusion.training.trainer import StepReport, train

EIGHT_BIT = pytest.param(
    "adamw8bit", marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")
)
AVAILABLE = [EIGHT_BIT if name == "adamw8bit" else name for name in OPTIMIZERS]
TEXT_ENCODER: dict[str, Any] = {"train_text_encoder": True, "targets": "attention", "stop_text_encoder_training": 3.0}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """A run that is not begun, in a folder that the tests of this file share."""
    return replace(short_run(tmp_path_factory.mktemp("run")), max_train_steps=6, check_result=False)


@pytest.fixture
def config(started: TrainingConfig, tmp_path: Path) -> TrainingConfig:
    return replace(started, output_dir=tmp_path / "out")


def stop_at(step: int, how: Callable[[], object]) -> Callable[[StepReport], None]:
    def stop(report: StepReport) -> None:
        if report.step == step:
            how()

    return stop


def power_cut() -> None:
    raise RuntimeError("power cut")


def changes_of(optimizer: str) -> dict[str, Any]:
    return {"optimizer": optimizer, "learning_rate": None if optimizer == "prodigy" else 0.05}


RESUMED: list[Any] = [
    *({"use_ema": True} | more for more in ({}, {"method": "vectorfit", "freezing_number": 2, "freezing_interval": 2})),
    TEXT_ENCODER | {"use_ema": True, "value_norm_penalty": 0.1},
    TEXT_ENCODER | {"stop_text_encoder_training": 0.5, "gradient_accumulation_steps": 2},
    *(changes_of(name) for name in OPTIMIZERS[2:]),
    pytest.param(changes_of("adamw8bit") | {"pattern": "banded", "off_diagonals": 8}, marks=EIGHT_BIT.marks),
    changes_of("schedulefree") | {"lr_warmup_steps": 3, "validation_prompt": PROMPT, "num_validation_images": 1},
    changes_of("prodigy") | {"method": "vectorfit", "freezing_warmup_steps": 1, "freezing_interval": 2},
]


@pytest.mark.parametrize("changes", RESUMED, ids=lambda changes: "-".join(map(str, changes.values())))
def test_resumed_run_equals_uninterrupted(config: TrainingConfig, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = replace(config, **changes)
    whole = train(config)
    parts = replace(config, output_dir=tmp_path / "parts")
    with pytest.raises(RuntimeError, match="power cut"):
        train(parts, on_step=stop_at(5, power_cut))
    result = train(replace(parts, resume_from_checkpoint="latest"))
    assert result.adapter.read_bytes() == whole.adapter.read_bytes()
    lines = [(folder / "metrics.jsonl").read_bytes() for folder in (config.output_dir, parts.output_dir)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("changes", [{"use_ema": True}, changes_of("schedulefree")])
def test_saving_and_sampling_move_nothing(config: TrainingConfig, tmp_path: Path, changes: dict[str, Any]) -> None:
    """A schedule-free optimizer writes its averages into the values and back, which rounds; a run must not see it."""
    config = replace(config, **changes, checkpointing_steps=100)
    quiet = train(config).adapter.read_bytes()
    busy = replace(
        config,
        output_dir=tmp_path / "busy",
        checkpointing_steps=1,
        validation_prompt=PROMPT,
        num_validation_images=1,
        validation_steps=2,
        thumbnail=False,
    )
    assert train(busy).adapter.read_bytes() == quiet
    stopped = replace(config, output_dir=tmp_path / "stopped")
    with pytest.raises(BaseException) as stop:  # what the command turns into its exit code
        train(stopped, on_step=stop_at(3, lambda: signal.raise_signal(signal.SIGINT)))
    assert not isinstance(stop.value, Exception)
    assert train(replace(stopped, resume_from_checkpoint="latest")).adapter.read_bytes() == quiet


def test_moving_average_is_that_of_the_steps(config: TrainingConfig) -> None:
    decay = 0.3
    result = train(replace(config, use_ema=True, ema_decay=decay, checkpointing_steps=1))
    trained = [
        load_checkpoint_state(config.output_dir / f"checkpoint-{step}")["pieces"]["averaging"]["trained"]
        for step in range(1, 7)
    ]
    for name, saved in trained_tensors(result.adapter).items():
        average = trained[0][name].double()
        for n, state in enumerate(trained[1:], start=1):
            share = min((1 + n) / (10 + n), decay)
            average = share * average + (1 - share) * state[name].double()
        torch.testing.assert_close(saved.double(), average, rtol=1e-5, atol=1e-7)
        assert not torch.equal(saved, trained[-1][name])
    without = train(replace(config, output_dir=config.output_dir.parent / "without"))
    assert all(torch.equal(tensor, trained[-1][name]) for name, tensor in trained_tensors(without.adapter).items())


@pytest.mark.parametrize("changes", [{"use_ema": True}, {"optimizer": "schedulefree"}])
def test_average_is_in_place_only_while_asked_for(changes: dict[str, Any]) -> None:
    config = replace(_resolved(**changes), ema_decay=0.5)
    parameters = {"unet.a.values": torch.nn.Parameter(torch.zeros(7))}
    optimizer = make_optimizer(config, parameters, 1)
    averaging = make_averaging(config, parameters, optimizer)
    assert averaging is not None
    for _ in range(4):
        parameters["unet.a.values"].grad = torch.randn(7, generator=torch.Generator().manual_seed(1))
        optimizer.step()
    before = parameters["unet.a.values"].detach().clone()
    with pytest.raises(RuntimeError, match="power cut"), averaging.in_place():
        assert (parameters["unet.a.values"] - before).abs().min() > 0
        power_cut()
    assert torch.equal(parameters["unet.a.values"], before)
    optimizer.step()  # a schedule-free one refuses to unless it was told that training goes on
    assert make_averaging(replace(config, use_ema=False, optimizer="adamw"), parameters, optimizer) is None


def test_text_encoder_stops_to_the_bit_and_the_denoiser_goes_on(config: TrainingConfig) -> None:
    train(replace(config, **TEXT_ENCODER, value_norm_penalty=0.1, checkpointing_steps=1))
    steps = [trained_tensors(config.output_dir / f"checkpoint-{n}" / "adapter.safetensors") for n in range(1, 7)]
    for number, (earlier, later) in enumerate(itertools.pairwise(steps), start=2):
        moved = {name.split(".")[0] for name in later if not torch.equal(earlier[name], later[name])}
        assert moved == ({"unet", "text_encoder"} if number <= 3 else {"unet"})
    assert any(name.startswith("text_encoder") and tensor.any() for name, tensor in steps[-1].items())


@pytest.mark.parametrize("name", AVAILABLE)
def test_every_optimizer_goes_down_and_its_state_is_plain(name: str) -> None:
    config = _resolved(optimizer=name)
    torch.manual_seed(0)
    target = torch.randn(5000)
    parameters = {
        "unet.a.values": torch.nn.Parameter(torch.zeros(5000)),
        "unet.b.bias": torch.nn.Parameter(torch.zeros(3)),
    }
    optimizer = make_optimizer(config, parameters, 1)
    loss = (parameters["unet.a.values"] - target).square().mean()
    first = float(loss.detach())
    for _ in range(90):  # Prodigy finds its rate in the first sixty
        loss = (parameters["unet.a.values"] - target).square().mean() + parameters["unet.b.bias"].sum() * 0
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert float(loss.detach()) < 0.9 * first
    assert all(isinstance(leaf, (int, float, str, bool, torch.Tensor, type(None))) for leaf in _leaves(optimizer))


def _leaves(optimizer: torch.optim.Optimizer) -> list[Any]:
    found: list[Any] = []
    rest: list[Any] = [copy.deepcopy(optimizer.state_dict())]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            rest += item.values()
        elif isinstance(item, list | tuple):
            rest += item
        else:
            found.append(item)
    return found


def _resolved(**changes: Any) -> TrainingConfig:
    config = TrainingConfig(learning_rate=0.05, learning_rate_1d=0.05, **changes)
    return replace(config, learning_rate=1.0, learning_rate_1d=1.0) if config.optimizer == "prodigy" else config


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_every_schedule_takes_every_optimizer(name: str) -> None:
    for optimizer_name in set(OPTIMIZERS) - {"adamw8bit", "schedulefree"}:
        config = _resolved(optimizer=optimizer_name, lr_scheduler=name)
        parameters = {"unet.a.values": torch.nn.Parameter(torch.zeros(3))}
        optimizer = make_optimizer(config, parameters, 1)
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=4)
        rates = []
        for _ in range(5):
            rates += scheduler.get_last_lr()
            optimizer.step()
            scheduler.step()
        assert max(rates) == config.learning_rate and (rates[4] < 1e-3) == (not name.startswith("constant"))


def test_scaled_rate_is_the_one_that_is_told(config: TrainingConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(config, scale_lr=True, gradient_accumulation_steps=2, lr_scheduler="linear", max_train_steps=1))
    assert "1 steps, learning rate 0.2\n" in capsys.readouterr().out


def test_default_rates_suit_the_optimizer() -> None:
    plain = default_learning_rates("svft", "banded", EMBEDDED_MODEL)
    assert default_learning_rates("svft", "banded", EMBEDDED_MODEL, "adafactor") == plain
    assert default_learning_rates("svft", "banded", EMBEDDED_MODEL, "prodigy") == (1.0, 1.0)
    lion = default_learning_rates("svft", "banded", EMBEDDED_MODEL, "lion")
    assert all(rate / 10 <= own <= rate / 3 for own, rate in zip(lion, plain, strict=True))


def test_prodigy_warns_of_a_rate_that_is_not_one(config: TrainingConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_optimizer(replace(config, optimizer="prodigy", learning_rate=1.0)) == []
    train(replace(config, optimizer="prodigy", learning_rate=0.5, max_train_steps=1))
    assert "meant to run with 1, not 0.5" in capsys.readouterr().out


def test_8_bit_state_is_counted() -> None:
    parameters = {name: torch.nn.Parameter(torch.zeros(size)) for name, size in (("a", 4095), ("b", 4096))}
    assert state_in_8_bits(parameters) == (4096, 8191)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "'sgd' is not one of adamw, "),
        ({"optimizer": "lion", "use_8bit_adam": True}, "asks for 8-bit AdamW and --optimizer for lion; leave one out"),
        ({"optimizer": "prodigy", "learning_rate_1d": 0.1, "train_bias": True}, "leave out --learning_rate_1d"),
        ({"optimizer": "prodigy", "text_encoder_lr": 0.1, "train_text_encoder": True}, "leave out --text_encoder_lr"),
        ({"optimizer": "schedulefree", "lr_scheduler": "cosine"}, "leave out --lr_scheduler"),
        ({"optimizer": "schedulefree", "use_ema": True}, "leave out --use_ema"),
        ({"optimizer": "schedulefree", "adam_beta1": 0.0}, "must be above 0"),
        ({"lr_warmup_steps": 5}, "no effect with --lr_scheduler constant; take constant_with_warmup"),
        ({"lr_num_cycles": 2, "lr_scheduler": "cosine"}, "no effect without --lr_scheduler cosine_with_restarts"),
        ({"lr_power": 2.0}, "no effect without --lr_scheduler polynomial"),
        ({"learning_rate": 1e-7, "lr_scheduler": "polynomial"}, "ends at 1e-07; --learning_rate must be above"),
        ({"ema_decay": 0.5}, "--ema_decay has no effect without --use_ema"),
        ({"ema_decay": 1.0, "use_ema": True}, "--ema_decay must be at least 0 and below 1"),
        ({"stop_text_encoder_training": 5.0}, "no effect without --train_text_encoder"),
        ({"stop_text_encoder_training": 0.0, "train_text_encoder": True}, "must be above 0"),
    ],
)
def test_settings_that_can_not_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(replace(TrainingConfig(), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "prodigy"}, r"--optimizer prodigy needs the package prodigyopt: .*svft-diffusion\[optimizers\]"),
        ({"optimizer": "lion"}, r"--optimizer lion needs the package lion_pytorch: .*svft-diffusion\[optimizers\]"),
        ({"optimizer": "schedulefree"}, r"needs the package schedulefree: .*svft-diffusion\[optimizers\]"),
        ({"optimizer": "adamw8bit"}, r"--optimizer adamw8bit needs the package bitsandbytes: .*svft-diffusion\[8bit\]"),
        ({"use_8bit_adam": True}, r"--use_8bit_adam needs the package bitsandbytes: .*svft-diffusion\[8bit\]"),
    ],
)
def test_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        check_optimizer(replace(TrainingConfig(), **changes))


def test_checkpoint_of_another_optimizer_or_average_is_refused(config: TrainingConfig) -> None:
    train(replace(config, max_train_steps=2))
    resumed = replace(config, resume_from_checkpoint="latest")
    for changes, message in (
        (changes_of("lion"), "trained with optimizer=adamw, now it is lion"),
        ({"use_ema": True}, "trained with use_ema=False, now it is True"),
    ):
        with pytest.raises(UserError, match=message):
            train(replace(resumed, **changes))


@pytest.mark.parametrize(
    ("begun", "changes", "message"),
    [
        ({"scale_lr": True}, {"train_batch_size": 1}, "pictures_per_step_of_scale_lr=2, now it is 1"),
        ({"scale_lr": True}, {"gradient_accumulation_steps": 3}, "pictures_per_step_of_scale_lr=2, now it is 6"),
        (
            changes_of("schedulefree") | {"lr_warmup_steps": 2},
            {"lr_warmup_steps": 5},
            "lr_warmup_steps_of_schedulefree=2, now it is 5",
        ),
    ],
)
def test_settings_that_the_optimizer_s_state_would_bring_back_are_refused(
    config: TrainingConfig, begun: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    config = replace(config, **begun)
    train(replace(config, max_train_steps=2))
    with pytest.raises(UserError, match=message):
        train(replace(config, **changes, resume_from_checkpoint="latest"))


def test_batch_and_warm_up_may_change_where_they_have_an_effect(config: TrainingConfig) -> None:
    train(replace(config, max_train_steps=2, lr_scheduler="constant_with_warmup", lr_warmup_steps=2))
    changed = replace(config, train_batch_size=1, lr_scheduler="constant_with_warmup", lr_warmup_steps=5)
    assert train(replace(changed, resume_from_checkpoint="latest")).steps == 6


@pytest.mark.parametrize("changes", [{"use_ema": True, "ema_decay": 0.9}, changes_of("schedulefree")])
def test_samples_show_what_the_file_holds(config: TrainingConfig, changes: dict[str, Any]) -> None:
    changes = changes | {"validation_prompt": PROMPT, "num_validation_images": 1, "learning_rate": 0.5}
    result = train(replace(config, **changes, seed=1))
    base = config.pretrained_model_name_or_path
    drawn = np.asarray(Image.open(result.samples[-1]), dtype=int)
    assert np.abs(picture(base, result.adapter) - drawn).max() <= 1  # 8 bits; the sums' order differs
    last = load_checkpoint_state(config.output_dir / "checkpoint-6")["pieces"]["averaging"]["trained"]
    saved = trained_tensors(result.adapter)
    assert max(float((saved[name] - last[name]).abs().max()) for name in saved) > 0.01
