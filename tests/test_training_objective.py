"""What training minimizes: targets, prior preservation, randomness of each sample, and the precision of it all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import tiny_pipeline
from training_runs import PROMPT, short_run, trained_tensors

from svft_diffusion.data.class_images import MANIFEST_FILE
from svft_diffusion.models import family_of
from svft_diffusion.training.batches import SampleNumbers
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.objective import denoising_losses, draw_randomness
from svft_diffusion.training.trainer import train


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    return short_run(tmp_path)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_target_follows_the_scheduler(prediction_type: str) -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, prediction_type=prediction_type
    )
    family = family_of(pipeline)
    latents, noise = torch.randn(2, 4, 8, 6), torch.randn(2, 4, 8, 6)
    timesteps = torch.tensor([0, 900])
    alpha = pipeline.scheduler.alphas_cumprod[timesteps].reshape(2, 1, 1, 1)
    expected = noise if prediction_type == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    torch.testing.assert_close(family.target(latents, noise, timesteps), expected)
    torch.testing.assert_close(
        family.add_noise(latents, noise, timesteps), alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    )


def test_prior_loss_weight_counts_the_second_half() -> None:
    family = family_of(tiny_pipeline())
    with torch.no_grad():
        latents = family.encode_pictures(torch.rand(4, 3, 16, 16) * 2 - 1)
        conditioning = family.encode_prompts(family.token_ids([PROMPT] * 4))
        samples = [("instance", 0), ("instance", 1), ("class", 0), ("class", 1)]
        randomness = draw_randomness(0, samples, latents.mean, timestep_sampling="uniform", number_of_timesteps=1000)
        losses = denoising_losses(family, latents, conditioning, randomness, prior_loss_weight=0.25)
        without = denoising_losses(family, latents, conditioning, randomness, prior_loss_weight=None)
    assert losses.prior is not None
    torch.testing.assert_close(losses.total, losses.instance + 0.25 * losses.prior)
    torch.testing.assert_close(without.total, (losses.instance + losses.prior) / 2)
    assert not torch.equal(randomness.noise[0], randomness.noise[2])


def test_randomness_belongs_to_the_sample_and_not_to_its_batch() -> None:
    like = torch.zeros(3, 4, 8, 8)
    options: dict[str, Any] = {"timestep_sampling": "focused", "number_of_timesteps": 1000}
    together = draw_randomness(5, [("instance", 7), ("class", 7), ("instance", 8)], like, **options)
    alone = draw_randomness(5, [("instance", 8)], like, **options)
    assert torch.equal(together.noise[2], alone.noise[0]) and together.timesteps[2] == alone.timesteps[0]
    many = draw_randomness(5, [("instance", number) for number in range(2000)], like[:, :1, :1, :1], **options)
    assert many.timesteps.min() >= 0 and many.timesteps.max() <= 999
    assert 570 < many.timesteps.float().mean() < 630  # 0.25 * 500 + 0.75 * E[1000 sigmoid(0.6 + 0.8 n)]


def test_two_processes_see_what_one_sees_with_twice_the_accumulation() -> None:
    alone = SampleNumbers(batch_size=3, accumulation=4, processes=1, process=0).batches(2, 5)
    shared = [SampleNumbers(3, 2, 2, process).batches(2, 5) for process in (0, 1)]
    merged = [batch for pair in zip(*shared, strict=True) for batch in pair]
    assert merged == alone and merged[0] == range(24, 27)


def test_prior_preservation_draws_reuses_and_redraws_class_images(config: TrainingConfig, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    prior = replace(
        config,
        with_prior_preservation=True,
        class_data_dir=folder,
        class_prompt="a photo of a dog",
        num_class_images=3,
        sample_batch_size=2,
        prior_generation_num_inference_steps=2,
        max_train_steps=1,
        checkpointing_steps=10,
    )
    train(prior)
    drawn = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert sorted(drawn) == [f"class-{index:05d}.png" for index in range(3)] and len(set(drawn.values())) == 3
    line = json.loads((config.output_dir / "metrics.jsonl").read_text(encoding="utf-8"))
    assert line["loss"] == pytest.approx(line["instance_loss"] + line["prior_loss"])

    (folder / "class-00001.png").unlink()
    (folder / ".DS_Store").write_bytes(b"\0")
    times = {name: (folder / name).stat().st_mtime_ns for name in ("class-00000.png", "class-00002.png")}
    train(prior)
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times
    assert (folder / "class-00001.png").is_file()

    train(replace(prior, class_prompt="a red dog"))
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert manifest["recipe"]["prompts"] == ["a red dog"] and list(manifest["drawn"]) == ["0", "1", "2"]
    assert (folder / "class-00000.png").read_bytes() != drawn["class-00000.png"]

    Image.new("RGB", (16, 16)).save(folder / "own.png")
    train(replace(prior, class_prompt="a red dog", num_class_images=1))  # the given picture is enough
    assert json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")) == manifest


def test_class_images_train_with_their_own_prompts(config: TrainingConfig, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog on the beach\na red dog\n", encoding="utf-8")
    train(
        replace(
            config,
            with_prior_preservation=True,
            class_data_dir=tmp_path / "class",
            class_prompts_file=prompts,
            num_class_images=3,
            prior_generation_num_inference_steps=1,
            max_train_steps=1,
        )
    )
    chunks = [Image.open(tmp_path / "class" / f"class-{index:05d}.png").info["svft_diffusion"] for index in range(3)]
    assert [json.loads(chunk)["prompt"] for chunk in chunks] == [
        "a dog on the beach",
        "a red dog",
        "a dog on the beach",
    ]


def test_bfloat16_base_trains_float32_values(config: TrainingConfig) -> None:
    result = train(
        replace(
            config,
            mixed_precision="bf16",
            gradient_checkpointing=True,
            train_text_encoder=True,
            validation_prompt=PROMPT,
            num_validation_images=1,
            max_train_steps=2,
        )
    )
    tensors = trained_tensors(result.adapter)
    assert all(tensor.dtype == torch.float32 and tensor.abs().sum() > 0 for tensor in tensors.values())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())
    assert len(result.samples) == 1


def test_gradient_checkpointing_changes_nothing(config: TrainingConfig, tmp_path: Path) -> None:
    config = replace(config, train_text_encoder=True, max_train_steps=2)
    plain = train(config).adapter.read_bytes()
    saving = train(replace(config, gradient_checkpointing=True, output_dir=tmp_path / "saving")).adapter.read_bytes()
    assert saving == plain
