"""Pictures on their way into training: batches, masks, several subjects, shapes, the base as its own prior, caches."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_pipeline
from tiny_transformers import tiny_pipeline_flux
from training_runs import PROMPT, arguments, short_run, trained_tensors

from svft_diffusion import SVFTConfig
from svft_diffusion.adapters import add_training_adapter
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.cli.main import run_command
from svft_diffusion.data.cutting import Cutter
from svft_diffusion.data.dataset import Picture
from svft_diffusion.errors import UserError
from svft_diffusion.files import read_adapter
from svft_diffusion.models import PICTURE_SIZES, ModelFamily, family_of
from svft_diffusion.training.batches import Batch, Encoder, cached_batches, error_weights, loaded_batches
from svft_diffusion.training.checks import check, check_settings
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.objective import denoising_losses, draw_randomness
from svft_diffusion.training.pictures import cutter_of, streams_of
from svft_diffusion.training.prior import adapters_off, base_prediction
from svft_diffusion.training.prompts import PromptTable
from svft_diffusion.training.trainer import train


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    return short_run(tmp_path)


def save_noise(file: Path, size: tuple[int, int], seed: int = 0, mask: bool = False) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(file)
    if mask:
        half = Image.new("L", size, 0)
        half.paste(255, (0, 0, size[0] // 2, size[1]))
        half.save(file.with_name(file.stem + ".mask.png"))
    return file


# Batches

SHAPES: dict[str, Any] = {"resolution": 16, "aspect_ratio_buckets": "16,16;16,24;24,16", "random_flip": True}


def batches_of(
    config: TrainingConfig,
    family: ModelFamily,
    photos: Sequence[Picture],
    classes: Sequence[Picture] = (),
    *,
    cached: bool = True,
    number: int = 12,
) -> list[Batch]:
    cutter = cutter_of(config, 8)
    streams = streams_of(config, photos, classes, cutter)
    encoder = Encoder(family, config.unmasked_weight if config.masked_loss else None)
    size = config.train_batch_size
    numbers = [range(start, start + size) for start in range(0, number * size, size)]
    if cached:
        return list(cached_batches(encoder, streams, cutter, numbers, on_picture=lambda: None))
    return list(loaded_batches(encoder, streams, cutter, numbers, workers=0))


@pytest.fixture(scope="module")
def family() -> ModelFamily:
    return family_of(tiny_pipeline())


@pytest.fixture
def photos(tmp_path: Path) -> list[Picture]:
    """Two subjects; squares, wide and tall ones."""
    sizes = [(20, 20), (30, 20), (20, 30), (31, 20), (16, 16)]
    files = [save_noise(tmp_path / "some" / f"{n}.png", size, n, mask=n < 2) for n, size in enumerate(sizes)]
    return [Picture(file, f"{PROMPT} {n}", subject=n % 2) for n, file in enumerate(files)]


def test_batches_of_several_shapes(config: TrainingConfig, family: ModelFamily, photos: list[Picture]) -> None:
    config = replace(config, **SHAPES)
    classes = [Picture(save_noise(config.output_dir / f"c{n}.png", (16, 16), 9 + n), "a dog", n % 2) for n in range(4)]
    batches = batches_of(config, family, photos, classes)
    assert {tuple(batch.latents.mean.shape[-2:]) for batch in batches} == {(8, 8), (8, 12), (12, 8)}
    for batch in batches:
        assert batch.latents.mean.shape[0] == len(batch.prompts) == len(batch.samples) == 4
        assert batch.sizes.shape == (4, 6) and batch.weights is None
        # Class pictures are cut to the shape of the photos beside them.
        assert (batch.sizes[:, 4:] == batch.sizes[0, 4:]).all()
        assert [kind for kind, _ in batch.samples] == ["instance"] * 2 + ["class"] * 2
    # Without chance in the cuts, what is kept is what would be made anew.
    same = replace(config, center_crop=True, random_flip=False)
    made_anew = batches_of(same, family, photos, classes, cached=False)
    for kept, made in zip(batches_of(same, family, photos, classes), made_anew, strict=True):
        assert kept.prompts == made.prompts and torch.equal(kept.sizes, made.sizes)
        torch.testing.assert_close(kept.latents.mean, made.latents.mean)


def test_uncached_cuts_differ_in_every_pass(config: TrainingConfig, family: ModelFamily, photos: list[Picture]) -> None:
    one = [photos[1]]
    config = replace(config, resolution=16, train_batch_size=1)
    assert len({float(batch.latents.mean.sum()) for batch in batches_of(config, family, one, number=20)}) <= 4
    assert len({float(b.latents.mean.sum()) for b in batches_of(config, family, one, cached=False, number=20)}) > 4


def test_worker_processes_load_the_same(config: TrainingConfig, family: ModelFamily, photos: list[Picture]) -> None:
    config = replace(config, resolution=16, masked_loss=True)
    cutter = cutter_of(config, 8)
    streams = streams_of(config, photos, [], cutter)
    numbers = [range(0, 2), range(2, 4), range(4, 6)]
    pickle.loads(pickle.dumps((streams, cutter)))  # what processes are given that are not forked
    here, there = (list(loaded_batches(Encoder(family, 0.1), streams, cutter, numbers, count)) for count in (0, 2))
    for first, second in zip(here, there, strict=True):
        assert torch.equal(first.latents.mean, second.latents.mean) and torch.equal(first.sizes, second.sizes)
        assert first.weights is not None and second.weights is not None and torch.equal(first.weights, second.weights)


@pytest.mark.parametrize("workers", [0, 1])
def test_photo_that_is_gone_is_named_in_one_line(
    config: TrainingConfig, family: ModelFamily, photos: list[Picture], workers: int
) -> None:
    config = replace(config, resolution=16)
    cutter = cutter_of(config, 8)
    streams = streams_of(config, photos[:1], [], cutter)
    photos[0].path.unlink()
    with pytest.raises(UserError, match=r"^[^\n]*0\.png can't be used any more: it is gone$"):
        list(loaded_batches(Encoder(family), streams, cutter, [range(0, 2)], workers))


# Masks


def test_error_weights_count_area() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :2] = 1  # a quarter
    mask[..., 2] = 0.5
    weights = error_weights(mask, (4, 4), 0.2)
    assert weights.shape == (1, 1, 4, 4)
    torch.testing.assert_close(weights[0, 0, 0], torch.tensor([1.0, 0.2 + 0.8 * 0.25, 0.2, 0.2]))
    torch.testing.assert_close(error_weights(mask[..., 2:6], (8, 1), 0.0).mean(), torch.tensor(0.125))


@pytest.mark.parametrize("cached", [True, False])
def test_masks_reach_the_batch(
    config: TrainingConfig, family: ModelFamily, photos: list[Picture], cached: bool
) -> None:
    config = replace(config, resolution=16, center_crop=True, image_interpolation_mode="nearest")
    config = replace(config, masked_loss=True, unmasked_weight=0.25)
    classes = [Picture(photos[0].path, "a dog")]  # its mask plays no part there
    for batch in batches_of(config, family, photos[:1] + photos[2:], classes, cached=cached, number=6):
        assert batch.weights is not None and batch.weights.shape == (4, 1, 8, 8)
        for prompt, weights in zip(batch.prompts[:2], batch.weights[:2], strict=True):
            assert torch.equal(weights[0, :, 4:], torch.full((8, 4), 0.25 if prompt == photos[0].prompt else 1.0))
            assert torch.equal(weights[0, :, :4], torch.ones(8, 4))
        assert torch.equal(batch.weights[2:], torch.ones(2, 1, 8, 8))


def test_weights_multiply_squared_errors(family: ModelFamily) -> None:
    with torch.no_grad():
        latents = family.encode_pictures(torch.rand(2, 3, 16, 24) * 2 - 1)
        conditioning = family.encode_prompts(family.token_ids([PROMPT] * 2))
        samples = [("instance", 0), ("instance", 1)]
        randomness = draw_randomness(0, samples, latents.mean, timestep_sampling="uniform", number_of_timesteps=1000)
        weights = torch.rand(2, 1, *latents.mean.shape[-2:])
        losses = denoising_losses(family, latents, conditioning, randomness, prior_loss_weight=None, weights=weights)
        noisy = family.add_noise(latents.sample(randomness.posterior_noise), randomness.noise, randomness.timesteps)
        errors = (family.predict(noisy, randomness.timesteps, conditioning) - randomness.noise) ** 2
    torch.testing.assert_close(losses.total, (weights * errors).mean())


def test_masked_run_learns_less_of_the_rest(config: TrainingConfig, tmp_path: Path) -> None:
    for number in range(2):
        save_noise(tmp_path / "masked" / f"{number}.png", (16, 16), number, mask=True)
    masked = replace(config, instance_data_dir=tmp_path / "masked", masked_loss=True, max_train_steps=1)
    losses = {}
    for weight in (0.0, 0.5, 1.0):
        out = tmp_path / f"out-{weight}"
        losses[weight] = train(replace(masked, unmasked_weight=weight, output_dir=out)).last_loss
    assert losses[0.0] < losses[0.5] < losses[1.0]
    assert losses[0.5] == pytest.approx((losses[0.0] + losses[1.0]) / 2, rel=1e-4)
    assert losses[1.0] == train(replace(masked, masked_loss=False, output_dir=tmp_path / "plain")).last_loss


# The base model as its own prior


def adapted(family: ModelFamily, train_text_encoder: bool = False) -> dict[str, Any]:
    models = family.adapted_models(train_text_encoder)
    for parameter in add_training_adapter(models, SVFTConfig(pattern="banded", off_diagonals=1)):
        parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return models


def test_adapters_off_is_the_base_and_leaves_no_trace() -> None:
    family, base = family_of(tiny_pipeline()), family_of(tiny_pipeline())
    models = adapted(family, train_text_encoder=True)
    trains = {id(p): p.requires_grad for model in models.values() for p in model.parameters()}
    frozen = next(p for p in models["unet"].parameters() if p.requires_grad)
    frozen.requires_grad_(False)  # as adaptive vector freezing would
    trains[id(frozen)] = False
    ids, latents, timesteps = family.token_ids([PROMPT]), torch.randn(1, 4, 8, 8), torch.tensor([400])
    with torch.no_grad():
        expected = base.predict(latents, timesteps, base.encode_prompts(ids))
        with adapters_off(models):
            assert torch.equal(family.predict(latents, timesteps, family.encode_prompts(ids)), expected)
        assert not torch.allclose(family.predict(latents, timesteps, family.encode_prompts(ids)), expected, atol=1e-3)
    assert {id(p): p.requires_grad for model in models.values() for p in model.parameters()} == trains
    assert not any(layer.disable_adapters for model in models.values() for layer in spectral_layers(model).values())
    with pytest.raises(KeyboardInterrupt), adapters_off(models):
        raise KeyboardInterrupt
    assert not any(layer.disable_adapters for layer in spectral_layers(models["unet"]).values())


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_base_is_the_target_of_the_second_half(
    config: TrainingConfig, photos: list[Picture], train_text_encoder: bool
) -> None:
    family, base = family_of(tiny_pipeline()), family_of(tiny_pipeline())
    classes = [replace(photo, prompt="a photo of a dog") for photo in photos]
    config = replace(config, resolution=16, with_prior_preservation=True, prior_source="base")
    batch = batches_of(config, family, photos, classes, number=1)[0]
    assert batch.prompts[2:] == ["a photo of a dog"] * 2
    assert torch.equal(batch.latents.mean[:2], batch.latents.mean[2:])  # the same photos, cut alike
    models = adapted(family, train_text_encoder)
    prompts = PromptTable(family, [*(p.prompt for p in photos), "a photo of a dog"], trained=models)
    randomness = draw_randomness(
        0, batch.samples, batch.latents.mean, timestep_sampling="uniform", number_of_timesteps=1000
    )
    assert not torch.equal(randomness.noise[0], randomness.noise[2])

    def conditioning(table: PromptTable) -> dict[str, torch.Tensor]:
        return table.conditioning(batch.prompts) | {PICTURE_SIZES: batch.sizes}

    losses = denoising_losses(
        family,
        batch.latents,
        conditioning(prompts),
        randomness,
        prior_loss_weight=0.5,
        base_prediction=base_prediction(family, models, prompts, batch),
    )
    losses.total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in models["unet"].parameters() if p.requires_grad)
    with torch.no_grad():
        noisy = family.add_noise(
            batch.latents.sample(randomness.posterior_noise), randomness.noise, randomness.timesteps
        )
        of_base = PromptTable(base, [*(p.prompt for p in photos), "a photo of a dog"], trained=[])
        target = base.predict(noisy, randomness.timesteps, conditioning(of_base))
        prediction = family.predict(noisy, randomness.timesteps, conditioning(prompts))
    assert losses.prior is not None and losses.prior > 1e-6
    torch.testing.assert_close(losses.prior.detach(), ((prediction - target)[2:] ** 2).mean())
    torch.testing.assert_close(losses.instance.detach(), ((prediction - randomness.noise)[:2] ** 2).mean())


def test_base_stays_the_target_when_the_text_encoder_stops(config: TrainingConfig, photos: list[Picture]) -> None:
    family, base = family_of(tiny_pipeline()), family_of(tiny_pipeline())
    config = replace(config, resolution=16, with_prior_preservation=True, prior_source="base")
    batch = batches_of(config, family, photos, [replace(photo, prompt="a dog") for photo in photos], number=1)[0]
    models = adapted(family, train_text_encoder=True)
    prompts, of_base = (PromptTable(of, ["a dog"], trained=names) for of, names in ((family, models), (base, [])))
    prompts.stop_training()
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    predicted = base_prediction(family, models, prompts, batch)(noisy, timesteps)
    conditioning = of_base.conditioning(batch.prompts[2:]) | {PICTURE_SIZES: batch.sizes[2:]}
    with torch.no_grad():
        assert torch.equal(predicted, base.predict(noisy, timesteps, conditioning))
    trained = prompts.conditioning(["a dog"])["text_states"]
    assert not trained.requires_grad
    assert not torch.allclose(trained, of_base.conditioning(["a dog"])["text_states"], atol=1e-3)


def test_base_as_prior_in_a_run(config: TrainingConfig) -> None:
    train(replace(config, with_prior_preservation=True, prior_source="base", class_prompt="a photo of a dog"))
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    # At first the adapter does nothing, so that the model is the base.
    assert lines[0]["prior_loss"] < 1e-10 < 1e-6 < lines[-1]["prior_loss"]
    assert sorted(p.name for p in config.output_dir.parent.iterdir() if p.is_dir()) == ["out", "photos", "tiny"]


# Several subjects, and all of it together


@pytest.fixture
def subjects(config: TrainingConfig, tmp_path: Path) -> TrainingConfig:
    """Two subjects with captions, masks, flips and shapes."""
    listed = []
    sizes_of = {"sks dog": [(16, 16), (30, 20), (20, 30)], "red robot": [(16, 24), (24, 16)]}
    for title, sizes in sizes_of.items():
        name = title.split()[1]
        for number, size in enumerate(sizes):
            save_noise(tmp_path / name / f"{number}.png", size, number, mask=True)
        caption = {"file_name": "1.png", "text": f"a red {name} on the beach"}
        (tmp_path / name / "metadata.jsonl").write_text(json.dumps(caption), encoding="utf-8")
        listed.append(
            {"instance_prompt": f"a photo of {title}", "instance_data_dir": str(tmp_path / name), "class_prompt": name}
        )
    (tmp_path / "subjects.json").write_text(json.dumps(listed), encoding="utf-8")
    return replace(
        config,
        **SHAPES,
        instance_data_dir=None,
        instance_prompt=None,
        concepts_list=tmp_path / "subjects.json",
        caption_source="metadata",
        masked_loss=True,
        max_train_steps=4,
        checkpointing_steps=2,
    )


@pytest.mark.parametrize("prior_source", ["images", "base"])
def test_everything_together_resumes_exactly(
    subjects: TrainingConfig, tmp_path: Path, prior_source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = replace(
        subjects,
        with_prior_preservation=True,
        prior_source=prior_source,
        class_data_dir=None,
        num_class_images=2,
        prior_generation_num_inference_steps=1,
    )
    if prior_source == "images":
        listed = json.loads((tmp_path / "subjects.json").read_text(encoding="utf-8"))
        for item in listed:
            item["class_data_dir"] = str(tmp_path / f"class-{item['class_prompt']}")
        (tmp_path / "subjects.json").write_text(json.dumps(listed), encoding="utf-8")
    whole = train(prior).adapter
    printed = capsys.readouterr().out
    assert "photos: 3 in" in printed and "photos: 2 in" in printed and "without a caption" in printed
    if prior_source == "images":
        for name in ("dog", "robot"):
            manifest = json.loads((tmp_path / f"class-{name}" / "class_images.json").read_text(encoding="utf-8"))
            assert manifest["recipe"]["prompts"] == [name] and len(manifest["drawn"]) == 2
    header, _ = read_adapter(whole)
    assert header.instance_prompt == "a photo of sks dog" and header.title == "sks dog, red robot"
    assert header.trigger == "sks, red" and header.class_word is None
    assert header.training["random_flip"] is True and str(tmp_path) not in json.dumps(header.training)
    assert "a photo of sks dog" in (prior.output_dir / "README.md").read_text(encoding="utf-8")
    part = replace(prior, output_dir=tmp_path / "part")
    train(replace(part, max_train_steps=2))
    (tmp_path / "part" / "adapter.safetensors").unlink()
    resumed = train(replace(part, resume_from_checkpoint="checkpoint-2")).adapter
    first, second = trained_tensors(whole), trained_tensors(resumed)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    # The written settings are taken back.
    again = tmp_path / "again"
    settings = str(prior.output_dir / "config.yaml")
    assert run_command("train", ["--config", settings, "--output_dir", str(again)]) == 0
    assert (again / "adapter.safetensors").read_bytes() == whole.read_bytes()


def test_run_leaves_notes_and_a_sheet_of_its_pixels(config: TrainingConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert config.instance_data_dir is not None
    (config.instance_data_dir / "broken.jpg").write_bytes(b"no picture")
    (config.instance_data_dir / "copy.png").write_bytes((config.instance_data_dir / "4.png").read_bytes())
    train(replace(config, max_train_steps=1))
    printed = capsys.readouterr().out
    assert "training sees only 6 of the 7 pictures" in printed and "broken.jpg (no readable picture)" in printed
    assert "4.png and copy.png are nearly the same photo" in printed
    with Image.open(config.output_dir / "contact_sheet.png") as sheet:
        left, top = 8, 8
        tile = np.asarray(sheet.convert("RGB").crop((left, top, left + 160, top + 160)))[::10, ::10]
    cut = Cutter(((16, 16),), False, "lanczos", 0).cut(Picture(config.instance_data_dir / "0.png", ""), 0)
    assert np.array_equal(tile, ((cut.pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def test_flow_models_take_several_shapes_and_their_own_predictions(config: TrainingConfig, tmp_path: Path) -> None:
    base = tmp_path / "flux"
    tiny_pipeline_flux().save_pretrained(base)
    run = replace(
        config,
        **SHAPES | {"aspect_ratio_buckets": "16,16;16,32;32,16"},
        pretrained_model_name_or_path=str(base),
        with_prior_preservation=True,
        prior_source="base",
        class_prompt="a dog",
        max_train_steps=3,
    )
    train(run)
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines[0]["prior_loss"] < 1e-8 < lines[-1]["prior_loss"]


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aspect_ratio_buckets": "16"}, "--aspect_ratio_buckets: expected"),
        ({"unmasked_weight": 1.5}, r"--unmasked_weight must lie in \[0, 1\]"),
        ({"unmasked_weight": float("nan")}, "--unmasked_weight"),
        ({"unmasked_weight": 0.5}, "--unmasked_weight has no effect without --masked_loss"),
        ({"encoding_cache": Path("x"), "cache_latents": False}, "--encoding_cache needs --cache_latents"),
        ({"prior_source": "base"}, "--prior_source has no effect without"),
        ({"with_prior_preservation": True, "prior_source": "base"}, "needs --class_prompt$"),
        (
            {"with_prior_preservation": True, "prior_source": "base", "class_prompt": "x", "class_data_dir": Path("y")},
            "leave out --class_data_dir",
        ),
        ({"with_prior_preservation": True, "class_prompt": "x"}, "needs --class_data_dir"),
        ({"with_prior_preservation": True, "class_data_dir": Path("x")}, r"needs --class_prompt \(or"),
        ({"class_data_dir": Path("x")}, "--class_data_dir has no effect without"),
        ({"concepts_list": Path("x")}, "leave the latter out"),
        ({"caption_source": "json"}, "not one of none, txt, metadata"),
    ],
)
def test_settings_that_do_not_fit(config: TrainingConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(replace(config, **changes))


def test_concepts_with_prior_preservation_need_classes(subjects: TrainingConfig, tmp_path: Path) -> None:
    assert [subject.class_prompts for subject in check(subjects).subjects] == [[], []]
    prior = replace(subjects, with_prior_preservation=True)
    with pytest.raises(UserError, match="subject 1: --with_prior_preservation needs class_data_dir"):
        check(prior)
    with pytest.raises(UserError, match="subject 2: its class_data_dir is that of another subject"):
        check(replace(prior, class_data_dir=tmp_path / "class"))
    checked = check(replace(prior, prior_source="base")).subjects
    assert [(subject.class_prompt, subject.class_data_dir) for subject in checked] == [("dog", None), ("robot", None)]
    listed = json.loads((tmp_path / "subjects.json").read_text(encoding="utf-8"))
    del listed[1]["class_prompt"]
    (tmp_path / "subjects.json").write_text(json.dumps(listed), encoding="utf-8")
    with pytest.raises(UserError, match="subject 2: --with_prior_preservation needs class_prompt"):
        check(replace(prior, prior_source="base"))
    (tmp_path / "out").mkdir()
    listed[1]["instance_data_dir"] = str(tmp_path / "out")
    (tmp_path / "subjects.json").write_text(json.dumps(listed), encoding="utf-8")
    with pytest.raises(UserError, match="--output_dir is the folder of the photos"):
        check(subjects)


def test_masks_that_are_missing_or_unused_are_told(config: TrainingConfig) -> None:
    assert config.instance_data_dir is not None
    with pytest.raises(UserError, match="--masked_loss finds no mask"):
        check(replace(config, masked_loss=True))
    Image.new("L", (16, 16), 255).save(config.instance_data_dir / "0.mask.png")
    assert "masks without effect: 0.mask.png; use them with --masked_loss" in check(config).notes
    notes = check(replace(config, masked_loss=True)).notes
    assert "without a mask, so that all of it is learned: 1.png, 2.png, 3.png, 4.png" in notes
    assert not any("0.mask.png" in note for note in notes)
    Image.new("L", (16, 20), 255).save(config.instance_data_dir / "0.mask.png")
    with pytest.raises(UserError, match="another shape"):
        check(replace(config, masked_loss=True))


def test_sizes_must_suit_the_base(config: TrainingConfig) -> None:
    cutter = cutter_of(replace(config, resolution=64, aspect_ratio_buckets="auto"), 16)
    assert len(cutter.sizes) > 1 and all(side % 16 == 0 for size in cutter.sizes for side in size)
    with pytest.raises(UserError, match="multiples of 16 with this base, got 64,72"):
        cutter_of(replace(config, resolution=64, aspect_ratio_buckets="64,64;64,72"), 16)


def test_bad_list_exits_with_2_and_leaves_nothing(
    config: TrainingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text('[{"instance_promt": "x"}]', encoding="utf-8")
    changes = {"instance_data_dir": None, "instance_prompt": None, "concepts_list": tmp_path / "list.json"}
    assert run_command("train", arguments(config, **changes)) == 2
    assert "did you mean 'instance_prompt'" in capsys.readouterr().err and not config.output_dir.exists()
