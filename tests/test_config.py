"""Settings of training: command line, files, defaults and everything that is refused before a model is loaded."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from svft_diffusion.adapters.freezing import FreezingSettings
from svft_diffusion.adapters.methods import METHODS
from svft_diffusion.cli.arguments import Parser, add_settings, given_settings
from svft_diffusion.cli.train import read_settings
from svft_diffusion.errors import UserError
from svft_diffusion.settings import config_from_mapping
from svft_diffusion.training.card import saved_settings
from svft_diffusion.training.checks import adapter_config, check, check_settings
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.learning_rates import LEARNING_RATES, default_learning_rates

# Flags of diffusers' train_dreambooth_lora.py that mean the same here.
FAMILIAR_FLAGS = """
    pretrained_model_name_or_path revision variant instance_data_dir class_data_dir instance_prompt class_prompt
    with_prior_preservation prior_loss_weight num_class_images output_dir seed resolution center_crop
    train_text_encoder train_batch_size sample_batch_size num_train_epochs max_train_steps checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate
    scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power use_8bit_adam dataloader_num_workers adam_beta1
    adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id logging_dir allow_tf32
    report_to validation_prompt num_validation_images validation_epochs mixed_precision prior_generation_precision
    enable_xformers_memory_efficient_attention rank image_interpolation_mode
""".split()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "photo.png")
    return folder


@pytest.fixture
def config(photos: Path, tmp_path: Path) -> TrainingConfig:
    return TrainingConfig(
        pretrained_model_name_or_path="some/model",
        instance_data_dir=photos,
        instance_prompt="a photo of sks dog",
        output_dir=tmp_path / "out",
    )


def test_familiar_flags_exist() -> None:
    assert {field.name for field in dataclasses.fields(TrainingConfig)} >= set(FAMILIAR_FLAGS)


def test_every_method_and_pattern_has_a_learning_rate() -> None:
    combinations = {(name, pattern) for name, method in METHODS.items() for pattern in method.patterns}
    assert combinations == LEARNING_RATES.keys()


def test_the_embedded_model_has_learning_rates_of_its_own() -> None:
    embedded = default_learning_rates("svft", "banded", "toybox")
    full_size = default_learning_rates("svft", "banded", "someone/stable-diffusion")
    assert embedded == LEARNING_RATES["svft", "banded"].embedded
    assert embedded.values > 10 * full_size.values


def test_command_line_wins_over_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("max_train_steps: 10\nlearning_rate: 1e-3\ncenter_crop: true\n", encoding="utf-8")
    parser = Parser(prog="train")
    add_settings(parser, TrainingConfig)
    given = given_settings(TrainingConfig, parser.parse_args(["--max_train_steps", "20", "--no-cache_latents"]))
    config = config_from_mapping(TrainingConfig, read_settings(file) | given)
    assert config.max_train_steps == 20 and config.learning_rate == 1e-3 and config.center_crop
    assert not config.cache_latents and TrainingConfig().cache_latents


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "did you mean 'learning_rate'"),
        ("rank: many", "rank: expected a whole number"),
        ("method: lora", "not one of svft"),
        ("fractoin: 0.5", "did you mean 'fraction'"),
        ("freezing_topk: 3", "did you mean 'freezing_top_k'"),
        ("max_train_steps: .inf", "max_train_steps: expected a whole number"),
        ("instance_prompt: [a dog, a cat]", "instance_prompt: expected text"),
        ("output_dir: ''", "output_dir: expected a path, got ''"),
        ("- a list", "name: value"),
        ("a: [", "no YAML"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        config_from_mapping(TrainingConfig, read_settings(file))


def test_saved_settings_can_be_fed_back(config: TrainingConfig) -> None:
    config = dataclasses.replace(config, hub_token="secret", resume_from_checkpoint="latest", learning_rate=1e-5)
    text = yaml.safe_dump(saved_settings(config))
    assert "secret" not in text
    again = config_from_mapping(TrainingConfig, yaml.safe_load(text))
    assert again == dataclasses.replace(config, hub_token=None, resume_from_checkpoint=None)


def test_steps_and_passes() -> None:
    assert TrainingConfig().steps(5) == 400
    config = TrainingConfig(num_train_epochs=3, train_batch_size=2, gradient_accumulation_steps=2, validation_epochs=2)
    assert config.steps(5) == 6 and config.steps(5, number_of_processes=2) == 3
    assert config.steps_between_samples(5) == 4
    assert dataclasses.replace(config, max_train_steps=7).steps(5) == 7


def test_off_diagonals_default() -> None:
    assert TrainingConfig().resolved_off_diagonals == 0
    assert TrainingConfig(pattern="banded").resolved_off_diagonals == 2
    assert TrainingConfig(pattern="random").resolved_off_diagonals == 2
    assert TrainingConfig(pattern="banded", off_diagonals=5).resolved_off_diagonals == 5


def test_biases_train_where_the_method_says_so_or_the_user() -> None:
    assert not TrainingConfig().resolved_train_bias and TrainingConfig(train_bias=True).resolved_train_bias
    assert TrainingConfig(method="vectorfit").resolved_train_bias
    parser = Parser(prog="train")
    add_settings(parser, TrainingConfig)
    given = given_settings(TrainingConfig, parser.parse_args(["--method", "vectorfit", "--no-train_bias"]))
    assert not config_from_mapping(TrainingConfig, given).resolved_train_bias


def test_freezing_belongs_to_vectorfit_and_can_be_had_elsewhere() -> None:
    assert TrainingConfig(method="vectorfit").freezing == FreezingSettings()
    assert TrainingConfig(method="vectorfit", freezing_number=0).freezing is None
    assert TrainingConfig(method="svdiff").freezing is None
    chosen = TrainingConfig(method="svdiff", freezing_number=3, freezing_top_k=4, freezing_interval=7)
    assert chosen.freezing == FreezingSettings(interval=7, top_k=4, number_of_freezings=3)


def test_adapter_gets_every_setting(config: TrainingConfig) -> None:
    config = dataclasses.replace(
        config,
        method="siva",
        fraction=0.5,
        select="random",
        init="random",
        seed=3,
        train_bias=True,
        train_norm=True,
        compress_activations=True,
        targets="all",
    )
    made = adapter_config(config)
    for name in (
        "method", "pattern", "rank", "fraction", "select", "init", "seed", "train_values", "train_bias", "train_norm",
        "compress_activations", "targets",
    ):  # fmt: skip
        assert getattr(made, name) == getattr(config, name), name
    assert not adapter_config(dataclasses.replace(config, train_values=False)).train_values
    banded = dataclasses.replace(config, method="svft", fraction=None, select=None, pattern="banded", rank=6)
    assert adapter_config(banded).off_diagonals == 2 and adapter_config(banded).rank == 6


def test_cache_of_one_machine_is_not_written_into_the_settings(config: TrainingConfig) -> None:
    saved = saved_settings(dataclasses.replace(config, factor_cache=Path("/somewhere"), factor_cache_size="5GB"))
    assert "factor_cache" not in saved and "factor_cache_size" not in saved


PRESETS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def test_every_method_has_a_preset_for_every_base() -> None:
    made = [(path.name.split("_")[0], yaml.safe_load(path.read_text(encoding="utf-8"))["method"]) for path in PRESETS]
    assert set(made) == {(base, method) for base in ("toybox", "sd15", "sdxl", "sd3", "flux") for method in METHODS}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_pass_the_checks(preset: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(preset.parent.parent)  # a preset names files relative to the repository
    paths = {"instance_data_dir": photos, "class_data_dir": tmp_path / "class", "output_dir": tmp_path / "out"}
    prompts = {"instance_prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"}
    check(config_from_mapping(TrainingConfig, prompts | read_settings(preset) | paths))
    lines = preset.read_text(encoding="utf-8").splitlines()
    settings = [line for line in lines if not line.startswith("#")]
    assert len(settings) >= 5 and all(re.match(r"\w+: .*\S +# \S", line) for line in settings)
    assert lines[0].startswith("# ") and f"svft-diffusion train --config configs/{preset.name} " in lines[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instance_data_dir": None}, "--instance_data_dir"),
        ({"instance_prompt": None}, "--instance_prompt"),
        ({"instance_prompt": "  "}, "--instance_prompt"),
        ({"method": "lora"}, "lora"),
        ({"method": "svdiff", "pattern": "banded"}, "banded"),
        ({"method": "vectorfit", "pattern": "random"}, "unknown pattern 'random' for method vectorfit"),
        ({"pattern": "plain", "off_diagonals": 2}, "off_diagonals=2|no off-diagonals"),
        ({"pattern": "top_k", "off_diagonals": -1}, "off_diagonals can't be negative"),
        ({"method": "siva", "fraction": 0.0}, r"fraction must lie in \(0, 1\], got 0.0"),
        ({"method": "siva", "fraction": 1.5}, r"fraction must lie in \(0, 1\], got 1.5"),
        ({"method": "siva", "fraction": float("nan")}, r"fraction must lie in \(0, 1\], got nan"),
        ({"method": "siva", "rank": 4}, "siva takes a fraction"),
        ({"fraction": 0.5}, "fraction belongs to method siva"),
        ({"method": "siva", "select": "middle"}, "select: 'middle' is not one of bottom, top, all, random"),
        ({"init": "ones"}, "init: 'ones' is not one of zero, random, official"),
        ({"method": "svdiff", "init": "official"}, "unknown init 'official' for method svdiff"),
        ({"train_values": False}, "nothing would train"),
        ({"learning_rate_1d": 1e-4}, "no effect where no bias, norm or gate trains"),
        ({"train_bias": True, "learning_rate_1d": 0.0}, "--learning_rate_1d must be above 0"),
        ({"freezing_number": -1}, "--freezing_number must be 0 or more"),
        ({"freezing_interval": 5}, "--freezing_interval has no effect without freezing; add --freezing_number"),
        ({"method": "vectorfit", "freezing_interval": 0}, "--freezing_interval must be at least 1"),
        ({"method": "vectorfit", "freezing_smoothing": 1.0}, "--freezing_smoothing must be at least 0 and below 1"),
        ({"factor_cache_size": "lots"}, "--factor_cache_size 'lots' is not a size"),
        ({"targets": "everything"}, "everything"),
        ({"rank": 0}, "rank"),
        ({"train_batch_size": 0}, "--train_batch_size must be at least 1"),
        ({"learning_rate": -1.0}, "--learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "--learning_rate must be a finite number"),
        ({"prior_loss_weight": -0.5}, "--prior_loss_weight must be 0 or more"),
        ({"adam_beta1": 1.0}, "--adam_beta1 must be at least 0 and below 1"),
        ({"adam_beta2": -0.1}, "--adam_beta2 must be at least 0 and below 1"),
        ({"lr_power": float("nan")}, "--lr_power must be a finite number"),
        ({"prior_generation_guidance_scale": float("inf")}, "--prior_generation_guidance_scale must be a finite"),
        ({"resolution": 65}, "--resolution must be a multiple of 8, got 65"),
        ({"resolution": 10**9}, "--resolution must be at most 16384; got 1000000000"),
        ({"resolution": 16384}, "--resolution 16384: pictures have at most 67 million pixels, these 268"),
        ({"seed": 2**64}, "--seed must be below"),
        ({"with_prior_preservation": True, "class_prompt": "a dog"}, "needs --class_data_dir"),
        ({"with_prior_preservation": True, "class_data_dir": Path("c")}, "needs --class_prompt"),
        ({"with_prior_preservation": True, "class_data_dir": Path("c"), "class_prompt": " "}, "needs --class_prompt"),
        ({"class_data_dir": Path("c")}, "no effect without --with_prior_preservation"),
        ({"text_encoder_lr": 1e-3}, "no effect without --train_text_encoder"),
        ({"train_text_encoder": True, "targets": "cross-attention"}, "no layer in the text encoder"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "no such base model folder"),
        ({"resume_from_checkpoint": "latest"}, "no checkpoint in"),
    ],
)
def test_bad_settings_are_refused_in_one_line(config: TrainingConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        check(dataclasses.replace(config, **changes))
    assert "\n" not in str(refusal.value)
    assert not config.output_dir.exists()


def test_output_below_a_file_is_refused(config: TrainingConfig, photos: Path) -> None:
    for output_dir in (photos / "photo.png", photos / "photo.png" / "deep" / "folder"):
        with pytest.raises(UserError, match=r"can't write to .*photo\.png is a file"):
            check(dataclasses.replace(config, output_dir=output_dir))


def test_folder_that_refuses_files_is_found_out(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*positional: Any, **named: Any) -> Any:
        raise OSError(30, "Read-only file system")

    # Permission bits say nothing of this, and nothing at all to root.
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(UserError, match=r"can't write to .*out: Read-only file system"):
        check(config)


def test_writable_folders_are_left_as_they_were(config: TrainingConfig) -> None:
    check(config)
    assert not config.output_dir.exists()
    config.output_dir.mkdir()
    check(config)
    assert list(config.output_dir.iterdir()) == []


def test_files_of_the_class_folder_that_are_not_used_are_listed(config: TrainingConfig, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "own.png")
    (folder / "text.jpg").write_text("no picture", encoding="utf-8")
    prior = dataclasses.replace(config, with_prior_preservation=True, class_data_dir=folder, class_prompt="a dog")
    assert "in the class folder, skipped text.jpg (no readable picture)" in check(prior).notes


def test_class_pictures_and_results_don_t_mix(config: TrainingConfig) -> None:
    prior = dataclasses.replace(
        config, with_prior_preservation=True, class_data_dir=config.output_dir, class_prompt="a dog"
    )
    with pytest.raises(UserError, match="--class_data_dir is the folder of --output_dir"):
        check(prior)


def test_nothing_is_written_among_the_photos(config: TrainingConfig, photos: Path) -> None:
    with pytest.raises(UserError, match="--output_dir is the folder of the photos"):
        check(dataclasses.replace(config, output_dir=photos))
    prior = dataclasses.replace(config, with_prior_preservation=True, class_prompt="a dog", class_data_dir=photos)
    with pytest.raises(UserError, match="--class_data_dir is the folder of the photos"):
        check(prior)


def test_named_checkpoint_must_exist(config: TrainingConfig) -> None:
    (config.output_dir / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no checkpoint .checkpoint-3.*there are checkpoint-4"):
        check(dataclasses.replace(config, resume_from_checkpoint="checkpoint-3"))
    with pytest.raises(UserError, match=r"no checkpoint is whole: .*checkpoint-4 is incomplete"):
        check(dataclasses.replace(config, resume_from_checkpoint="latest"))
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        check(config)


def test_missing_packages_are_named(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="bitsandbytes"):
        check_settings(dataclasses.replace(config, use_8bit_adam=True))
    with pytest.raises(UserError, match="xformers"):
        check_settings(dataclasses.replace(config, enable_xformers_memory_efficient_attention=True))


def test_class_prompts_file(config: TrainingConfig, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prior = dataclasses.replace(
        config, with_prior_preservation=True, class_data_dir=tmp_path / "class", class_prompts_file=prompts
    )
    with pytest.raises(UserError, match="can't be read"):
        check(prior)
    prompts.write_text("\n\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no prompt"):
        check(prior)
    prompts.write_text("a dog on the beach\n\n a dog \n", encoding="utf-8")
    assert check(prior).subjects[0].class_prompts == ["a dog on the beach", "a dog"]
