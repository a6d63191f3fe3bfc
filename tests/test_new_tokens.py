"""Training runs that learn new tokens beside the adapter: what moves, what is saved, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_models import TEXT_WIDTH, tiny_pipeline, tiny_pipeline_sdxl
from tiny_transformers import tiny_pipeline_flux, tiny_pipeline_sd3
from training_runs import PROMPT, arguments, short_run, trained_tensors

from svft_diffusion import load_adapter
from svft_diffusion.cli.main import run_command
from svft_diffusion.errors import UserError
from svft_diffusion.files import read_adapter
from svft_diffusion.models import load_pipeline
from svft_diffusion.models.latent_diffusion import LatentDiffusionFamily
from svft_diffusion.sampling.sample import generate
from svft_diffusion.training.card import saved_settings
from svft_diffusion.training.checks import check
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.new_tokens import initial_rows
from svft_diffusion.training.run import Run
from svft_diffusion.training.setup import make_accelerator, prepare_run
from svft_diffusion.training.step import optimizer_step
from svft_diffusion.training.trainer import train

REPOSITORY = Path(__file__).parent.parent
TOKENS: dict[str, Any] = {"train_text_encoder_ti": True, "token_abstraction": "sks", "token_learning_rate": 0.01}
NAMES = ["<sks-1>", "<sks-2>"]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """A run of four steps with two new tokens, not begun; its folder is only read."""
    return replace(short_run(tmp_path_factory.mktemp("tokens")), **TOKENS)


@pytest.fixture
def config(started: TrainingConfig, tmp_path: Path) -> TrainingConfig:
    return replace(started, output_dir=tmp_path / "out")


def prepared(config: TrainingConfig) -> Run:
    return prepare_run(config, check(config), make_accelerator(config))


def test_rows_move_and_nothing_else_of_the_encoder(config: TrainingConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run = prepared(config)
    encoder = run.family.pipeline.text_encoder
    frozen = {name: tensor.clone() for name, tensor in encoder.state_dict().items() if "learned_tokens" not in name}
    (rows,) = run.tokens.values()
    start = rows.detach().clone()
    table, tokenizer = encoder.get_input_embeddings().weight, run.family.pipeline.tokenizer
    # "dog" is what the prompt says after the word that they stand for, and one token.
    (dog,) = tokenizer("dog", add_special_tokens=False).input_ids
    assert torch.equal(start, table[[dog, dog]]) and rows.dtype == torch.float32
    batches = run.batches(0)
    first = optimizer_step(run, batches, 1)
    second = optimizer_step(run, batches, 2)
    assert first["gradient_norm_tokens"] > 0 and first["token_norm"] != second["token_norm"]
    # AdamW moves every value by about the learning rate; both rows, and each its own way.
    assert ((rows - start).abs().mean(dim=1) > 0.01).all() and not torch.equal(rows[0], rows[1])
    after = {name: tensor for name, tensor in encoder.state_dict().items() if "learned_tokens" not in name}
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert not any(parameter.requires_grad for name, parameter in encoder.named_parameters() if "learned" not in name)


def test_file_brings_the_tokens_to_a_fresh_base(config: TrainingConfig, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(replace(config, validation_prompt=PROMPT, num_validation_images=1, class_prompt="a photo of a dog"))
    printed = capsys.readouterr().out
    assert "at the start they mean: <sks-1><sks-2> as 'dog'" in printed
    assert "new tokens train in text_encoder, learning rate 0.01" in printed
    assert "draws the same picture as the trained model" in printed
    header, tensors = read_adapter(result.adapter)
    assert header.tokens == {"text_encoder": NAMES} and tensors["text_encoder.tokens"].shape == (2, TEXT_WIDTH)
    assert (header.trigger, header.class_word) == ("<sks-1><sks-2>", "dog")
    assert header.instance_prompt == "a photo of <sks-1><sks-2> dog" and header.components.keys() == {"unet"}
    assert header.training["token_learning_rate"] == 0.01
    pipeline = load_pipeline(config.pretrained_model_name_or_path)
    load_adapter(pipeline, result.adapter)
    picture = generate(pipeline, header.instance_prompt, seed=0)
    (sample,) = result.samples
    assert np.abs(np.asarray(picture, dtype=int) - np.asarray(Image.open(sample), dtype=int)).max() <= 1
    card = (config.output_dir / "README.md").read_text(encoding="utf-8")
    assert (
        "instance_prompt: a photo of <sks-1><sks-2> dog\n" in card and "- text: a photo of <sks-1><sks-2> dog" in card
    )
    assert "| trigger | \\<sks-1\\>\\<sks-2\\> |" in card and "pipe('a photo of dog')" in card
    # Every file of the run has them, and the settings are as they were given.
    assert read_adapter(config.output_dir / "history" / "step-2.safetensors")[0].tokens == header.tokens
    saved = (config.output_dir / "config.yaml").read_text(encoding="utf-8")
    assert f"instance_prompt: {PROMPT}\n" in saved and "token_abstraction: sks\n" in saved


VARIANTS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "average": {"use_ema": True},
    "text encoder that stops": {"train_text_encoder": True, "stop_text_encoder_training": 3},
    "tokens that stop": {"train_text_encoder_ti_frac": 0.5, "keep_token_norm": True},
    "both stop": {"train_text_encoder_ti_frac": 0.5, "train_text_encoder": True, "stop_text_encoder_training": 3},
    "frozen vectors": {"method": "vectorfit", "freezing_warmup_steps": 1, "freezing_interval": 2, "freezing_number": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_equals_the_uninterrupted_one(config: TrainingConfig, tmp_path: Path, variant: str) -> None:
    # The step after the checkpoint is one in which something stops.
    config = replace(config, **VARIANTS[variant], max_train_steps=4)
    whole = train(config).adapter.read_bytes()
    assert (config.output_dir / "checkpoint-2").is_dir()
    again = replace(config, resume_from_checkpoint="checkpoint-2")
    assert train(again).adapter.read_bytes() == whole


def test_tokens_stop_to_the_bit_and_the_rest_goes_on(config: TrainingConfig) -> None:
    train(replace(config, train_text_encoder=True, train_text_encoder_ti_frac=0.5))
    half, end = (
        trained_tensors(config.output_dir / name / "adapter.safetensors") for name in ("checkpoint-2", "checkpoint-4")
    )
    assert torch.equal(half["text_encoder.tokens"], end["text_encoder.tokens"])
    for component in ("unet", "text_encoder.text_model"):
        changed = [name for name in end if name.startswith(component) and not torch.equal(half[name], end[name])]
        assert changed, component


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy", "adafactor", "lion", "schedulefree"])
def test_every_optimizer_moves_the_rows_without_decay(config: TrainingConfig, optimizer: str) -> None:
    run = prepared(replace(config, optimizer=optimizer, learning_rate=None, token_learning_rate=None))
    groups = {group["weight_decay"] for group in run.optimizer.param_groups if group["params"][0].dim() == 2}
    assert groups == {0.0} and {group["weight_decay"] for group in run.optimizer.param_groups} == {0.0, 0.01}
    (rows,) = run.tokens.values()
    start = rows.detach().clone()
    batches = run.batches(0)
    for step in range(1, 4):
        optimizer_step(run, batches, step)
    assert not torch.equal(rows, start)


def test_length_is_kept(config: TrainingConfig) -> None:
    def lengths(keep: bool) -> torch.Tensor:
        run = prepared(replace(config, token_learning_rate=0.5, keep_token_norm=keep))
        (rows,) = run.tokens.values()
        start = rows.detach().norm(dim=1)
        batches = run.batches(0)
        for step in range(1, 4):
            optimizer_step(run, batches, step)
        return (rows.detach().norm(dim=1) / start).log()

    kept, free = lengths(True), lengths(False)
    assert (kept > 0).all() and (kept < 0.95 * free).all()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_rows_stay_float32_in_16_bit(config: TrainingConfig, tmp_path: Path, family: str) -> None:
    if family == "sdxl":
        config = replace(short_run(tmp_path / "sdxl", tiny_pipeline_sdxl()), **TOKENS)
    run = prepared(replace(config, mixed_precision="bf16", gradient_checkpointing=True, train_text_encoder=True))
    start = {name: rows.detach().clone() for name, rows in run.tokens.items()}
    optimizer_step(run, run.batches(0), 1)
    assert run.family.pipeline.text_encoder.dtype == torch.bfloat16
    for name, rows in run.tokens.items():
        assert rows.dtype == torch.float32 and not torch.equal(rows, start[name])


# Base model -> the text encoders that learn.
FAMILIES: dict[str, tuple[Callable[[], DiffusionPipeline], list[str]]] = {
    "sdxl": (tiny_pipeline_sdxl, ["text_encoder", "text_encoder_2"]),
    "sd3": (tiny_pipeline_sd3, ["text_encoder", "text_encoder_2"]),
    "flux": (tiny_pipeline_flux, ["text_encoder"]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_clip_encoder_learns_and_t5_does_not(family: str, tmp_path: Path) -> None:
    make, learning = FAMILIES[family]
    pipeline = make()
    config = replace(
        short_run(tmp_path, pipeline), **TOKENS, max_sequence_length=16 if family != "sdxl" else None, seed=3
    )
    config = replace(config, max_train_steps=2, resolution=16, validation_prompt=PROMPT, num_validation_images=1)
    result = train(config)
    header, tensors = read_adapter(result.adapter)
    assert header.tokens == dict.fromkeys(learning, NAMES)
    first = trained_tensors(config.output_dir / "history" / "step-1.safetensors")
    for component in learning:
        width = getattr(pipeline, component).get_input_embeddings().weight.shape[1]
        rows = tensors[f"{component}.tokens"]
        assert rows.shape == (2, width) and not torch.equal(rows, first[f"{component}.tokens"])
    fresh = load_pipeline(config.pretrained_model_name_or_path)
    load_adapter(fresh, result.adapter)
    picture = generate(
        fresh,
        "a photo of <sks-1><sks-2> dog",
        seed=3,
        height=16,
        width=16,
        max_sequence_length=config.max_sequence_length,
    )
    (sample,) = result.samples
    assert np.abs(np.asarray(picture, dtype=int) - np.asarray(Image.open(sample), dtype=int)).max() <= 1


def subjects_file(folder: Path, photos: Path, prompts: Sequence[str]) -> Path:
    """A list of subjects, of which each has a copy of the photos."""
    concepts = []
    for number, prompt in enumerate(prompts):
        shutil.copytree(photos, folder / str(number))
        concepts.append({"instance_data_dir": str(folder / str(number)), "instance_prompt": prompt})
    file = folder / "subjects.json"
    file.write_text(json.dumps(concepts), encoding="utf-8")
    return file


def test_subjects_have_tokens_of_their_own(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.instance_data_dir is not None
    checked: list[str] = []

    def keep_prompt(pipeline: DiffusionPipeline, prompt: str, **options: Any) -> Image.Image:
        checked.append(prompt)
        return generate(pipeline, prompt, **options)

    monkeypatch.setattr("svft_diffusion.training.self_check.generate", keep_prompt)
    prompts = ("a photo of sks dog", "a photo of a red robot")
    config = replace(
        config,
        concepts_list=subjects_file(tmp_path, config.instance_data_dir, prompts),
        instance_data_dir=None,
        instance_prompt=None,
        token_abstraction="sks, red",
        num_new_tokens_per_abstraction=1,
        max_train_steps=2,
        check_result=True,
    )
    header, tensors = read_adapter(train(config).adapter)
    assert header.tokens == {"text_encoder": ["<sks>", "<red>"]} and header.trigger == "<sks>, <red>"
    assert checked == ["a photo of <sks> dog"] * 2  # with and without the file; the first subject speaks for all
    pipeline = load_pipeline(config.pretrained_model_name_or_path)
    ids = pipeline.tokenizer("dog robot", add_special_tokens=False).input_ids
    start = pipeline.text_encoder.get_input_embeddings().weight[ids]
    moved = (tensors["text_encoder.tokens"] - start).abs()
    assert (moved.amax(dim=1) > 0.005).all() and moved.max() < 0.05


def test_class_prompts_and_captions_without_the_word_stay_as_they_are(config: TrainingConfig, tmp_path: Path) -> None:
    assert config.instance_data_dir is not None
    photos = tmp_path / "photos"
    shutil.copytree(config.instance_data_dir, photos)
    (photos / "0.txt").write_text("a photo of a red dog", encoding="utf-8")
    (photos / "1.txt").write_text("SKS on the beach", encoding="utf-8")
    config = replace(
        config,
        instance_data_dir=photos,
        caption_source="txt",
        with_prior_preservation=True,
        prior_source="base",
        class_prompt="a photo of a dog",
        encoding_cache=tmp_path / "cache",
    )
    inputs = check(config)
    assert "prompts without a new token: 0.png" in inputs.notes
    prompts = [picture.prompt for picture in inputs.instance_pictures]
    assert prompts[:3] == ["a photo of a red dog", "<sks-1><sks-2> on the beach", "a photo of <sks-1><sks-2> dog"]
    run = prepare_run(config, inputs, make_accelerator(config))
    kept, live = "a photo of a dog", "<sks-1><sks-2> on the beach"
    batch = [live, kept, "a photo of a red dog", live]
    together = run.prompts.conditioning(batch)
    alone = run.family.encode_prompts(run.family.token_ids(batch))
    for name, tensor in alone.items():
        assert torch.allclose(together[name], tensor, atol=1e-5)
    assert not run.prompts.conditioning([kept])["text_states"].requires_grad
    assert together["text_states"].requires_grad
    metrics = optimizer_step(run, run.batches(0), 1)
    assert metrics["gradient_norm_tokens"] > 0
    # What was kept on disk is the same for the next run, and a step without any token moves no row.
    again = prepare_run(replace(config, output_dir=tmp_path / "again"), inputs, make_accelerator(config))
    assert torch.equal(
        again.prompts.conditioning([kept])["text_states"], run.prompts.conditioning([kept])["text_states"]
    )


def test_step_without_a_token_moves_no_row_that_has_not_moved(config: TrainingConfig, tmp_path: Path) -> None:
    assert config.instance_data_dir is not None
    photos = tmp_path / "photos"
    shutil.copytree(config.instance_data_dir, photos)
    for number in range(4):
        (photos / f"{number}.txt").write_text("a photo of a red dog", encoding="utf-8")
    run = prepared(replace(config, instance_data_dir=photos, caption_source="txt", train_batch_size=1))
    (rows,) = run.tokens.values()
    start = rows.detach().clone()
    moved = []
    batches = run.batches(0)
    for step in range(1, 5):
        metrics = optimizer_step(run, batches, step)
        moved.append(metrics["gradient_norm_tokens"] > 0)
        if not any(moved):
            assert torch.equal(rows, start)
    assert not moved[0] and sum(moved) <= 1


def test_start_of_several_words_and_of_more_tokens_than_words() -> None:
    pipeline = tiny_pipeline()
    table = pipeline.text_encoder.get_input_embeddings().weight.detach()
    red, dog, robot = pipeline.tokenizer("red dog robot", add_special_tokens=False).input_ids

    def rows(words: str, count: int) -> torch.Tensor:
        return initial_rows(pipeline.text_encoder, pipeline.tokenizer, words, count)

    assert torch.equal(rows("red dog", 3), table[[red, dog, red]])
    assert torch.equal(rows("red dog robot", 3), table[[red, dog, robot]])
    assert torch.allclose(rows("red dog robot", 2), torch.stack([(table[red] + table[dog]) / 2, table[robot]]))


def test_prompts() -> None:
    config = TrainingConfig(train_text_encoder_ti=True, token_abstraction="sks,TOK", num_new_tokens_per_abstraction=1)
    assert config.with_tokens("Sks dog, tok; skster (TOK)") == "<sks> dog, <TOK>; skster (<TOK>)"
    assert config.with_tokens("<sks> dog") == "<sks> dog"
    assert config.without_tokens("a photo of <sks> dog and tok") == "a photo of dog and"
    assert config.abstractions_in("a photo of tok") == ["TOK"]
    assert TrainingConfig().with_tokens("TOK dog") == "TOK dog"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "in no prompt": ({"token_abstraction": "TOK"}, "--token_abstraction TOK is in no prompt"),
    "word at hand": (
        {"token_abstraction": "TOK", "class_prompt": "a photo of a dog"},
        "TOK is in no prompt; the word there seems to be sks",
    ),
    "one of two": ({"token_abstraction": "sks,xyz"}, "--token_abstraction xyz is in no prompt"),
    "no token": ({"num_new_tokens_per_abstraction": 0}, "--num_new_tokens_per_abstraction must be from 1 to 64, got 0"),
    "no share": ({"train_text_encoder_ti_frac": 0.0}, "--train_text_encoder_ti_frac must lie in (0, 1], got 0"),
    "share above 1": ({"train_text_encoder_ti_frac": 1.5}, "--train_text_encoder_ti_frac must lie in (0, 1], got 1.5"),
    "no number": ({"train_text_encoder_ti_frac": float("nan")}, "must lie in (0, 1], got nan"),
    "rate": ({"token_learning_rate": 0.0}, "--token_learning_rate must be a finite number above 0, got 0"),
    "two words": ({"token_abstraction": "sks dog"}, "--token_abstraction must be one word"),
    "empty": ({"token_abstraction": ""}, "--token_abstraction must be one word"),
    "written as token": ({"token_abstraction": "<sks>"}, "without < and >: got '<sks>'"),
    "twice": ({"token_abstraction": "sks,SKS"}, "--token_abstraction names a word twice"),
    "starts": ({"initializer_concept": "dog,cat"}, "names 2 starts for 1 words of --token_abstraction"),
    "empty start": ({"initializer_concept": " "}, "--initializer_concept has an empty part"),
    "class": ({"class_prompt": "a photo of sks dog"}, "--token_abstraction sks is in a prompt of the class too"),
    "no class": ({"instance_prompt": "a photo of sks"}, "nothing says what --token_abstraction sks is"),
    "switched off": ({"train_text_encoder_ti": False}, "has no effect without --train_text_encoder_ti"),
    "one rate": ({"optimizer": "prodigy", "learning_rate": 1.0}, "leave out --token_learning_rate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_work_is_refused_before_the_base_is_loaded(
    config: TrainingConfig, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = REFUSED[case]

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the base model was loaded")

    monkeypatch.setattr("svft_diffusion.training.base.load_pipeline", load)
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        train(replace(config, **changes))
    assert "\n" not in str(refusal.value) and not config.output_dir.exists()


def test_refused_with_the_base_at_hand(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ten words come before it, and the tiny encoder reads ten.
    with pytest.raises(UserError, match="new token <sks-1> is so long that the text_encoder does not read it"):
        prepared(replace(config, instance_prompt="a photo of a photo of a photo of red sks dog"))
    monkeypatch.setattr(LatentDiffusionFamily, "adapted_models", lambda self, text: {"unet": self.pipeline.unet})
    with pytest.raises(UserError, match="needs a CLIP text encoder, which this base model does not have"):
        prepared(config)


def test_checkpoint_of_other_tokens_is_refused(config: TrainingConfig) -> None:
    train(config)
    for changes, message in (
        ({"num_new_tokens_per_abstraction": 1}, "trained with num_new_tokens_per_abstraction=2, now it is 1"),
        ({"train_text_encoder_ti_frac": 0.5}, "trained with token_steps=None, now it is 2"),
    ):
        with pytest.raises(UserError, match=message):
            train(replace(config, **changes, resume_from_checkpoint="checkpoint-2"))


def test_command(config: TrainingConfig, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(config, token_abstraction="TOK", instance_prompt="a photo of TOK dog", max_train_steps=1)
    assert run_command("train", [*given, "--train_text_encoder_ti"]) == 0
    adapter = config.output_dir / "adapter.safetensors"
    assert read_adapter(adapter)[0].tokens == {"text_encoder": ["<TOK-1>", "<TOK-2>"]}
    again = config.output_dir.parent / "again"
    saved = ["--config", str(config.output_dir / "config.yaml"), "--output_dir", str(again)]
    assert run_command("train", saved) == 0
    assert (again / "adapter.safetensors").read_bytes() == adapter.read_bytes()
    capsys.readouterr()
    assert run_command("inspect", [str(adapter)]) == 0
    assert "<TOK-1>" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 2])  # each of which is many to the tokenizer before it is told of them
def test_subjects_with_tokens_are_mixed(config: TrainingConfig, tmp_path: Path, count: int) -> None:
    assert config.instance_data_dir is not None
    config = replace(
        config,
        concepts_list=subjects_file(tmp_path, config.instance_data_dir, ("photo of sks dog", "photo of red robot")),
        instance_data_dir=None,
        instance_prompt=None,
        token_abstraction="sks,red",
        num_new_tokens_per_abstraction=count,
        cut_mix_unmix=True,
        cut_mix_probability=1.0,
        cut_mix_prompt="{left} on {right}",
        max_train_steps=1,
    )
    run = prepared(config)
    batches = run.batches(0)
    metrics = optimizer_step(run, batches, 1)
    assert metrics["gradient_norm_tokens"] > 0 and metrics["unmix_loss"] > 0


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_accumulation(config: TrainingConfig, tmp_path: Path) -> None:
    # With a large epsilon a step is proportional to the gradient; else Adam makes much of rounding where that is small.
    assert config.instance_data_dir is not None
    photos = tmp_path / "photos"
    shutil.copytree(config.instance_data_dir, photos)
    for number in range(3):  # so that one process may see a token and the other none
        (photos / f"{number}.txt").write_text("a photo of a red dog", encoding="utf-8")
    config = replace(
        config,
        instance_data_dir=photos,
        caption_source="txt",
        train_batch_size=1,
        adam_epsilon=1.0,
        learning_rate=1.0,
        token_learning_rate=1.0,
        train_text_encoder=True,
    )
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(saved_settings(config)), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(REPOSITORY / "train_dreambooth.py"), "--config", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    alone = replace(config, gradient_accumulation_steps=2, output_dir=tmp_path / "alone")
    train(alone)
    first, second = (trained_tensors(run.output_dir / "adapter.safetensors") for run in (alone, config))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-5)
