"""Command lines of other DreamBooth trainers: a run, or a line for everything that has to change in them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from tiny_models import tiny_pipeline, tiny_vae
from training_runs import arguments, short_run

from svft_diffusion.cli.familiar_flags import INSTEAD, WITHOUT_EFFECT, set_apart
from svft_diffusion.cli.main import run_command
from svft_diffusion.errors import UserError
from svft_diffusion.models import load_pipeline
from svft_diffusion.training.checks import check
from svft_diffusion.training.config import TrainingConfig

# All flags of diffusers' train_dreambooth.py, train_dreambooth_lora.py and train_dreambooth_lora_sdxl.py.
EXAMPLES = """
    pretrained_model_name_or_path revision variant tokenizer_name instance_data_dir class_data_dir instance_prompt
    class_prompt with_prior_preservation prior_loss_weight num_class_images output_dir seed resolution center_crop
    train_text_encoder train_batch_size sample_batch_size num_train_epochs max_train_steps checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate
    scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power use_8bit_adam dataloader_num_workers adam_beta1
    adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id logging_dir allow_tf32
    report_to validation_prompt num_validation_images validation_steps mixed_precision prior_generation_precision
    local_rank enable_xformers_memory_efficient_attention set_grads_to_none offset_noise snr_gamma
    pre_compute_text_embeddings tokenizer_max_length text_encoder_use_attention_mask skip_save_text_encoder
    validation_images class_labels_conditioning validation_scheduler validation_epochs rank lora_dropout
    image_interpolation_mode pretrained_vae_model_name_or_path dataset_name dataset_config_name cache_dir image_column
    caption_column repeats do_edm_style_training output_kohya_format random_flip text_encoder_lr optimizer prodigy_beta3
    prodigy_decouple adam_weight_decay_text_encoder prodigy_use_bias_correction prodigy_safeguard_warmup use_dora
""".split()
# What their later, advanced and multi-subject scripts, and the trainers that followed them, add.
OTHERS = """
    cache_latents lora_alpha lora_layers lora_blocks upcast_before_saving max_sequence_length weighting_scheme
    logit_mean logit_std mode_scale guidance_scale bnb_quantization_config_path do_fp8_training offload
    skip_final_inference final_validation_prompt aspect_ratio_buckets caption_dropout token_abstraction
    num_new_tokens_per_abstraction initializer_concept train_text_encoder_ti train_text_encoder_ti_frac
    train_text_encoder_frac noise_offset clip_skip lora_unet_blocks use_blora real_prior freeze_model concepts_list
    modifier_token initializer_token hflip noaug no_safe_serialization save_sample_prompt save_sample_negative_prompt
    n_save_sample save_guidance_scale save_infer_steps save_interval save_min_steps log_interval pad_tokens
    not_cache_latents read_prompts_from_txts learning_rate_1d pretrained_vae_name_or_path
    prior_generation_scheduler_type prior_generation_num_inference_steps enable_token_merging
""".split()
OURS = {field.name for field in dataclasses.fields(TrainingConfig)}


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    return short_run(tmp_path)


@pytest.mark.parametrize("name", [*EXAMPLES, *OTHERS])
def test_every_flag_is_known(name: str) -> None:
    places = [name in OURS, name in INSTEAD, name in WITHOUT_EFFECT]
    assert places.count(True) == 1


def test_advice_names_flags_that_there_are() -> None:
    for advice in [*INSTEAD.values(), *(reason for _, reason in WITHOUT_EFFECT.values())]:
        named = {flag.removeprefix("no-") for flag in re.findall(r"--([a-z_-]+)", advice)}
        assert named <= OURS | {"weights"} and "\n" not in advice


def test_all_problems_are_told_at_once(config: TrainingConfig, capsys: pytest.CaptureFixture[str]) -> None:
    pasted = ["--lora_alpha=4", "--use-dora", "--learning_rat", "1", "--validation_images", "a.png", "b.png"]
    with pytest.raises(SystemExit) as ended:
        run_command("train", [*arguments(config), *pasted, "--rank", "four"])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and all(line.startswith("error: ") for line in lines)
    for named, line in zip(
        ("lora_alpha", "use_dora", "validation_images", "learning_rat,", "rank"), lines, strict=True
    ):
        assert f"--{named}" in line
    assert "did you mean '--learning_rate'" in lines[3]
    assert not config.output_dir.exists()


def test_what_changes_nothing_is_noted_and_the_run_goes_on(
    config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    pasted = ["--set_grads_to_none", "--local_rank", "-1", "--pre-compute-text-embeddings", "--prodigy_decouple=True"]
    assert run_command("train", [*arguments(config), *pasted, "--optimizer", "AdamW"]) == 0
    said = capsys.readouterr().err
    for name in ("set_grads_to_none", "local_rank", "pre_compute_text_embeddings", "prodigy_decouple"):
        assert f"--{name} has no effect: " in said


def test_values_go_with_their_flag() -> None:
    found = set_apart(
        ["--seed", "1", "--lora_layers", "a,b", "--seed=2", "--prodigy_decouple", "False", "--", "--offload"]
    )
    assert found.ours == ["--seed", "1", "--seed=2", "--"] and found.notes == []
    assert [problem.partition(":")[0] for problem in found.problems] == [
        "--lora_layers",
        "--prodigy_decouple",
        "--offload",
    ]


def test_what_does_not_belong_to_a_flag_without_effect_is_not_swallowed(
    config: TrainingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    found = set_apart(["--set_grads_to_none", "photos", "--local_rank", "-1", "oops", "--pad_tokens=True"])
    assert found.problems == ["unknown argument photos", "unknown argument oops"] and len(found.notes) == 3
    with pytest.raises(SystemExit):
        run_command("train", [*arguments(config), "--skip_final_inference", "photos"])
    assert "unknown argument photos" in capsys.readouterr().err


def test_share_of_one_is_not_told_to_be_a_step() -> None:
    advice = INSTEAD["train_text_encoder_frac"]
    assert "below 1" in advice and "leave it out" in advice  # diffusers' default is 1: all steps


@pytest.mark.parametrize(("name", "told"), [("lora_alpha", "strength"), ("set_grads_to_none", "always so")])
def test_settings_files_are_told_the_same(
    config: TrainingConfig, tmp_path: Path, name: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"{name}: 4\n", encoding="utf-8")
    assert run_command("train", ["--config", str(file), *arguments(config)]) == 2
    assert f"{name} in {file}: " in (said := capsys.readouterr().err) and told in said


def test_numbers_that_mean_something_else_are_noted(config: TrainingConfig) -> None:
    def notes(**changes: object) -> str:
        return "\n".join(check(dataclasses.replace(config, **changes)).notes)  # type: ignore[arg-type]

    assert notes(learning_rate=None) == notes(learning_rate=0.002) == notes(learning_rate=0.01)
    assert "learning rate of 1e-06 is far from 0.002" in notes(learning_rate=1e-6)
    assert "learning rate of 1 is far from 0.002" in notes(learning_rate=1.0)
    assert "only the 4 leading singular triplets" in notes(rank=4)


# --- a VAE of its own ---


def test_another_vae_encodes_the_pictures(config: TrainingConfig, tmp_path: Path) -> None:
    tiny_vae(seed=5).save_pretrained(tmp_path / "vae")
    other = tiny_pipeline(seed=5)
    other.save_pretrained(tmp_path / "other")
    for name in (tmp_path / "vae", tmp_path / "other"):  # a folder of its own, or of a pipeline that has it
        pipeline = load_pipeline(config.pretrained_model_name_or_path, vae=str(name))
        for key, tensor in pipeline.vae.state_dict().items():
            assert tensor.equal(other.vae.state_dict()[key])
    logs = []
    for folder, extra in (("plain", []), ("with", ["--pretrained_vae_model_name_or_path", str(tmp_path / "vae")])):
        out = tmp_path / folder
        assert run_command("train", [*arguments(config, output_dir=out), *extra]) == 0
        logs.append((out / "metrics.jsonl").read_text(encoding="utf-8"))
    assert logs[0] != logs[1]


def test_vaes_that_do_not_fit_are_refused_in_one_line(config: TrainingConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "vae.safetensors").write_bytes(b"")
    for name, message in [
        (tmp_path / "empty", "holds no config.json"),
        (tmp_path / "vae.safetensors", "takes a diffusers folder"),
        (tmp_path / "nowhere", "takes a diffusers folder"),
    ]:
        with pytest.raises(UserError, match=message) as refusal:
            check(dataclasses.replace(config, pretrained_vae_model_name_or_path=str(name)))
        assert "\n" not in str(refusal.value)
    tiny_vae(latent_channels=8).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=r"8 channels, 2 times smaller .* have 4"):
        load_pipeline(config.pretrained_model_name_or_path, vae=str(tmp_path / "vae"))
    for changes in ({"scaling_factor": 0.13025}, {"shift_factor": 0.1}):  # as of another family of bases
        tiny_vae(**changes).save_pretrained(tmp_path / "scaled")
        with pytest.raises(UserError, match="of another kind of base model") as refusal:
            load_pipeline(config.pretrained_model_name_or_path, vae=str(tmp_path / "scaled"))
        assert "\n" not in str(refusal.value)
    (tmp_path / "vae" / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="the VAE vae") as refusal:
        load_pipeline(config.pretrained_model_name_or_path, vae=str(tmp_path / "vae"))
    assert "\n" not in str(refusal.value)
