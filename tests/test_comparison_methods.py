"""What trains in our loop in the place of our adapter: PEFT's methods, new tokens, all weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svft_diffusion.comparison.measuring import Effort, _trained, training_config
from svft_diffusion.comparison.methods import FullFineTuning, Method, NewTokens, SpectralMethod
from svft_diffusion.comparison.peft_methods import PeftMethod
from svft_diffusion.comparison.questions import QUESTIONS, lora
from svft_diffusion.comparison.subjects import search_subjects
from svft_diffusion.models import EMBEDDED_MODEL, load_pipeline
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.run import Run

SMALL = Effort(4, 1, 1, "attention", 1, 2, 4.0)


def trained(method: Method, folder: Path, rate: float = 0.01) -> tuple[Run, dict[str, float | int | None]]:
    config = training_config(method, rate, SMALL, search_subjects(1)[0], 0, folder, folder)
    run, numbers = _trained(method, config)
    run.class_folders.close()
    return run, numbers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods")


@pytest.mark.parametrize(
    "name", [one.name for one in QUESTIONS["methods"].contenders if isinstance(one.ladder[0], PeftMethod)]
)
def test_every_method_of_peft_begins_at_the_base_model(name: str) -> None:
    contender = next(one for one in QUESTIONS["methods"].contenders if one.name == name)
    method = contender.ladder[min(2, len(contender.ladder) - 1)]
    assert isinstance(method, PeftMethod)
    model = load_pipeline(EMBEDDED_MODEL).text_encoder
    words = torch.tensor([[5, 7, 11, 2]])
    with torch.no_grad():
        before = model(words).last_hidden_state
        added = method._add(TrainingConfig(targets="attention", max_train_steps=100), {"text_encoder": model})
        after = model(words).last_hidden_state
    assert added
    assert torch.dist(before, after) < 1e-4 * before.norm()


QUICK = ("SVFT plain", "LoRA", "textual inversion", "full fine-tuning")
NAMES = [one.name for one in QUESTIONS["methods"].contenders if one.name != "base model"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NAMES]
)
def test_every_method_trains_what_it_counts(name: str, folder: Path) -> None:
    contender = next(one for one in QUESTIONS["methods"].contenders if one.name == name)
    method = contender.ladder[0]
    if name == "BOFT":  # its kernel for the CPU is slow with small blocks
        method = contender.ladder[2]
    base = load_pipeline(EMBEDDED_MODEL)
    counted = method.count_values({"unet": base.unet, "text_encoder": base.text_encoder}, "attention")
    run, numbers = trained(method, folder, contender.learning_rate)
    stored = method.stored(run, folder)
    if name != "AdaLoRA":  # which prunes whole triplets
        assert stored.values == counted
    assert 4 * stored.values < stored.file_bytes < 4 * stored.values + 120_000 + 4 * stored.values
    assert numbers["training_bytes"] > 4 * stored.values * 4  # type: ignore[operator]  # gradients and Adam's moments
    frozen = dict(base.unet.named_parameters())
    now = {path.replace("base_layer.", ""): value for path, value in run.models["unet"].named_parameters()}
    if name == "full fine-tuning":
        assert any(not torch.equal(now[path], value) for path, value in frozen.items())
    else:
        assert all(torch.equal(now[path], value) for path, value in frozen.items())
    assert all(bool(value.grad is None) for value in run.trained.values())
    moved = [value for value in run.trained.values() if bool(value.detach().any())]
    assert moved


def test_ours_in_this_loop_is_what_the_trainer_trains(folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from svft_diffusion.files import read_adapter
    from svft_diffusion.training.trainer import train

    method = SpectralMethod({"pattern": "plain"})
    config = training_config(method, 0.05, SMALL, search_subjects(1)[0], 0, folder, folder)
    run, _ = trained(method, folder, 0.05)
    result = train(replace(config, output_dir=tmp_path / "out"))
    _, tensors = read_adapter(result.adapter)
    assert all(torch.equal(tensors[name], value.detach().cpu()) for name, value in run.parameters.items())


def test_adalora_prunes_to_the_ranks_that_it_promises(folder: Path) -> None:
    method = PeftMethod("AdaLora", {"target_r": 1, "init_r": 3, "lora_alpha": 1})
    run, numbers = trained(method, folder)
    left = sum(int((value != 0).sum()) for name, value in run.parameters.items() if ".lora_E." in name)
    layers = sum(".lora_E." in name for name in run.parameters)
    assert numbers["trained_values"] == run.trained_values > method.stored(run, folder).values
    assert left == layers  # one triplet for each layer on average


def test_equal_seeds_give_equal_values_and_others_other_ones(folder: Path) -> None:
    first, again = trained(lora(1), folder)[0], trained(lora(1), folder)[0]
    assert all(torch.equal(value, again.parameters[name]) for name, value in first.parameters.items())


def test_rates_of_what_is_one_dimensional_keep_their_distance() -> None:
    method = SpectralMethod({"method": "svdiff", "targets": "all"})
    usual, tripled = method.settings(0.1), method.settings(0.3)
    assert usual["learning_rate_1d"] == pytest.approx(1e-3) and tripled["learning_rate_1d"] == pytest.approx(3e-3)
    assert "learning_rate_1d" not in SpectralMethod({"method": "svdiff"}).settings(0.1)


def test_freezing_has_the_same_shares_of_a_shorter_run(folder: Path) -> None:
    effort = Effort(100, 1, 1, "attention", 1, 2, 4.0)
    config = training_config(
        SpectralMethod({"method": "vectorfit"}), 0.1, effort, search_subjects(1)[0], 0, folder, folder
    )
    assert config.freezing is not None
    assert (config.freezing.warmup_steps, config.freezing.interval, config.freezing.last_step) == (15, 5, 65)
    without = SpectralMethod({"method": "vectorfit", "freezing_number": 0})
    assert training_config(without, 0.1, effort, search_subjects(1)[0], 0, folder, folder).freezing is None


def test_new_tokens_stand_where_the_rare_word_did(folder: Path) -> None:
    config: TrainingConfig = training_config(NewTokens(2), 0.02, SMALL, search_subjects(1)[0], 0, folder, folder)
    captions = [file.read_text(encoding="utf-8") for file in sorted((folder / "photos").glob("*.txt"))]
    assert captions and all("a photo of TOK robot" in caption and "sks" not in caption for caption in captions)
    assert config.with_tokens("a photo of TOK robot") == "a photo of <TOK-1><TOK-2> robot"


def test_full_fine_tuning_changes_the_text_encoder_too(folder: Path) -> None:
    run, _ = trained(FullFineTuning(), folder, 1e-3)
    base = dict(load_pipeline(EMBEDDED_MODEL).text_encoder.named_parameters())
    assert any(not torch.equal(base[path], value) for path, value in run.models["text_encoder"].named_parameters())
