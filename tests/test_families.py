"""Every family of base models through the one training loop: what it is told, what it learns, and what is saved."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler, FluxPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image
from tiny_models import tiny_pipeline, tiny_pipeline_sdxl, tiny_unet
from tiny_transformers import tiny_pipeline_flux, tiny_pipeline_sd3
from torch import Tensor
from training_runs import PROMPT, picture, short_run, trained_tensors

from svft_diffusion import load_adapter, set_adapters
from svft_diffusion.adapters import SpectralConfig, add_training_adapter
from svft_diffusion.errors import UserError
from svft_diffusion.files import read_header
from svft_diffusion.models import PICTURE_SIZES, ModelFamily, family_of, load_pipeline
from svft_diffusion.models.flux import packed, positions, unpacked
from svft_diffusion.sampling.sample import generate
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.gradients import check_gradients
from svft_diffusion.training.objective import denoising_losses, draw_randomness
from svft_diffusion.training.prompts import PromptTable
from svft_diffusion.training.trainer import train
from svft_diffusion.training.validation import decoding_without_autocast


def tiny_pipeline_v(seed: int = 0) -> DiffusionPipeline:
    """In the layout of Stable Diffusion 2.1, which predicts velocities."""
    pipeline = tiny_pipeline(seed)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    return pipeline


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd2-v": tiny_pipeline_v,
    "sdxl": tiny_pipeline_sdxl,
    "sd3": tiny_pipeline_sd3,
    "sd3-without-t5": lambda: tiny_pipeline_sd3(t5=False),
    "flux": tiny_pipeline_flux,
    "flux-schnell": lambda: tiny_pipeline_flux(guidance=False),
}
TRAINED = {"sdxl": tiny_pipeline_sdxl, "sd3": tiny_pipeline_sd3, "flux": tiny_pipeline_flux}
CLIPS = {
    "sdxl": {"unet", "text_encoder", "text_encoder_2"},
    "sd3": {"transformer", "text_encoder", "text_encoder_2"},
    "flux": {"transformer", "text_encoder"},
}
SIZES = torch.tensor([[30.0, 20, 3, 0, 16, 16], [16, 16, 0, 0, 16, 16]])


def one_photo(folder: Path, pipeline: DiffusionPipeline) -> TrainingConfig:
    """A run on one photo, cut at random; text of few tokens, since that of T5 is long."""
    config = short_run(folder, pipeline)
    photos = folder / "one"
    photos.mkdir()
    ramp = np.linspace(0, 255, 20 * 30).reshape(20, 30).astype(np.uint8)
    Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], axis=-1)).save(photos / "photo.png")
    has_t5 = hasattr(pipeline, "transformer")
    return replace(
        config,
        instance_data_dir=photos,
        resolution=16,
        max_sequence_length=16 if has_t5 else None,
        factor_cache_size="1GB",
    )


@pytest.fixture(scope="module", params=TRAINED)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, TrainingConfig]:
    """A run of each family with its text encoders, which is over; its folder is only read."""
    family: str = request.param
    config = one_photo(tmp_path_factory.mktemp(family), TRAINED[family]())
    config = replace(
        config,
        train_text_encoder=True,
        max_train_steps=15,
        checkpointing_steps=10,
        learning_rate=0.05,
        validation_prompt=PROMPT,
        num_validation_images=1,
        validation_steps=15,
    )
    train(config)
    return family, config


def fixed_loss(pipeline: DiffusionPipeline, config: TrainingConfig) -> float:
    """The mean loss of the photo with noises and timesteps that no training saw."""
    family = family_of(pipeline, max_sequence_length=config.max_sequence_length)
    assert config.instance_data_dir is not None
    photo = Image.open(config.instance_data_dir / "photo.png").crop((0, 0, 20, 20)).resize((16, 16))
    pixels = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = family.encode_pictures(pixels.expand(32, -1, -1, -1))
    with torch.no_grad():
        conditioning = family.encode_prompts(family.token_ids([PROMPT] * 32))
        randomness = draw_randomness(
            99,
            [("test", number) for number in range(32)],
            latents.mean,
            timestep_sampling="uniform",
            number_of_timesteps=family.number_of_timesteps,
        )
        conditioning[PICTURE_SIZES] = SIZES[1].expand(32, -1)
        losses = denoising_losses(family, latents, conditioning, randomness, prior_loss_weight=None)
    return float(losses.total)


def test_training_lowers_the_loss_and_the_file_brings_it_along(finished: tuple[str, TrainingConfig]) -> None:
    family, config = finished
    base = config.pretrained_model_name_or_path
    adapter = config.output_dir / "adapter.safetensors"
    pipeline = load_pipeline(base)
    before = fixed_loss(pipeline, config)
    load_adapter(pipeline, adapter, "subject")
    assert fixed_loss(pipeline, config) < 0.97 * before
    assert {name.split(".")[0] for name in trained_tensors(adapter)} == CLIPS[family]
    header = read_header(adapter)
    assert header.base.family == family_of(pipeline).name
    assert header.training["timestep_sampling"] == ("uniform" if family == "sdxl" else "logit_normal")

    # The last sample of the training is what a fresh pipeline draws with the file, and strength 0 is the base.
    options: dict[str, Any] = {"height": 16, "width": 16, "max_sequence_length": config.max_sequence_length}
    sample = np.asarray(Image.open(config.output_dir / "samples" / "step-000015-0.png"), dtype=int)
    assert np.array_equal(np.asarray(generate(pipeline, PROMPT, seed=0, **options), dtype=int), sample)
    without = np.asarray(generate(load_pipeline(base), PROMPT, seed=0, **options), dtype=int)
    assert not np.array_equal(sample, without)
    assert np.array_equal(
        np.asarray(Image.open(config.output_dir / "samples" / "step-000000-0.png"), dtype=int), without
    )
    set_adapters(pipeline, {"subject": 0.0})
    assert np.array_equal(np.asarray(generate(pipeline, PROMPT, seed=0, **options), dtype=int), without)
    assert fixed_loss(pipeline, config) == before


def test_resumed_run_ends_as_the_uninterrupted_one(finished: tuple[str, TrainingConfig], tmp_path: Path) -> None:
    _, config = finished
    uninterrupted = (config.output_dir / "adapter.safetensors").read_bytes()
    (tmp_path / "out").mkdir()
    (config.output_dir / "checkpoint-10").rename(tmp_path / "out" / "checkpoint-10")
    again = replace(config, output_dir=tmp_path / "out", resume_from_checkpoint="latest", thumbnail=True)
    try:
        assert train(again).adapter.read_bytes() == uninterrupted
    finally:
        (tmp_path / "out" / "checkpoint-10").rename(config.output_dir / "checkpoint-10")


def test_every_text_encoder_that_is_asked_for_trains(finished: tuple[str, TrainingConfig]) -> None:
    family, config = finished
    tensors = trained_tensors(config.output_dir / "adapter.safetensors")
    for component in CLIPS[family]:
        assert sum(tensor.abs().sum() for name, tensor in tensors.items() if name.startswith(f"{component}.")) > 0
    metrics = [
        json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for component in CLIPS[family]:
        assert metrics[0][f"gradient_norm_{component}"] > 0


@pytest.mark.parametrize("family", TRAINED)
def test_bfloat16_base_trains_float32_values(family: str, tmp_path: Path) -> None:
    config = replace(
        one_photo(tmp_path, TRAINED[family]()),
        mixed_precision="bf16",
        gradient_checkpointing=True,
        train_text_encoder=True,
        validation_prompt=PROMPT,
        num_validation_images=1,
        max_train_steps=2,
    )
    tensors = trained_tensors(train(config).adapter)
    assert {name.split(".")[0] for name in tensors} == CLIPS[family]
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in tensors.values())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())


@pytest.mark.parametrize("name", ["sdxl", "sd3-without-t5", "flux-schnell"])
def test_prior_preservation(name: str, tmp_path: Path) -> None:
    config = replace(
        one_photo(tmp_path, PIPELINES[name]()),
        with_prior_preservation=True,
        class_data_dir=tmp_path / "class",
        class_prompt="a dog",
        num_class_images=2,
        prior_generation_num_inference_steps=1,
        max_train_steps=2,
        cache_latents=False,
    )
    result = train(config)
    line = json.loads((config.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert line["loss"] == pytest.approx(line["instance_loss"] + line["prior_loss"]) and line["prior_loss"] > 0
    assert result.steps == 2 and len(list((tmp_path / "class").glob("*.png"))) == 2


@pytest.mark.parametrize("name", PIPELINES)
def test_prompts_are_encoded_as_in_sampling(name: str) -> None:
    pipeline = PIPELINES[name]()
    family = family_of(pipeline)
    prompts = [PROMPT, "a red robot on the beach"]
    with torch.no_grad():
        mine = family.encode_prompts(family.token_ids(prompts))
        if isinstance(pipeline, FluxPipeline):
            states, pooled, _ = pipeline.encode_prompt(prompts, None)
        elif name.startswith("sd3"):
            states, _, pooled, _ = pipeline.encode_prompt(prompts, None, None)
        elif isinstance(pipeline, StableDiffusionXLPipeline):
            states, _, pooled, _ = pipeline.encode_prompt(prompts)
        else:
            states, pooled = pipeline.encode_prompt(prompts, "cpu", 1, True)[0], None
    assert torch.equal(mine["text_states"], states)
    if pooled is not None:
        assert torch.equal(mine["pooled_text"], pooled)


@pytest.mark.parametrize("name", PIPELINES)
def test_kept_text_is_the_same_as_encoded_anew(name: str) -> None:
    family = family_of(PIPELINES[name]())
    prompts = ["a dog", PROMPT]
    with torch.no_grad():
        table, training = (PromptTable(family, prompts, trained=trained) for trained in ((), ("text_encoder",)))
        kept, anew = table.conditioning([PROMPT, PROMPT, "a dog"]), training.conditioning([PROMPT, PROMPT, "a dog"])
    assert kept.keys() == anew.keys()
    for key, rows in kept.items():
        assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
        torch.testing.assert_close(rows, anew[key])


@pytest.mark.parametrize("name", PIPELINES)
def test_denoiser_takes_the_precision_that_diffusers_tells(name: str) -> None:
    pipeline = PIPELINES[name]().to(torch.bfloat16)
    family: Any = family_of(pipeline)
    denoiser = getattr(pipeline, family.denoiser)
    add_training_adapter({family.denoiser: denoiser}, SpectralConfig(method="svdiff", targets="all"))  # in float32
    assert family.denoiser_dtype == denoiser.dtype == torch.bfloat16
    pipeline.to(torch.float32)
    assert family.denoiser_dtype == denoiser.dtype == torch.float32


def test_many_prompts_are_encoded_some_at_a_time() -> None:
    """A long T5 that reads hundreds of captions at once would take the memory of several of itself."""
    family = family_of(tiny_pipeline_flux())
    prompts = [f"a dog {number}" for number in range(40)]
    counts: list[int] = []
    encode = family.encode_text

    def counting(component: str, token_ids: Tensor) -> dict[str, Tensor]:
        counts.append(len(token_ids))
        return encode(component, token_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "encode_text", counting)
        table = PromptTable(family, prompts, trained=["text_encoder"])
        table.stop_training()
    assert max(counts) <= 16 and sum(counts) == 2 * 40
    with torch.no_grad():
        expected = family.encode_prompts(family.token_ids(prompts[38:]))
    for name, rows in table.conditioning(prompts[38:]).items():
        torch.testing.assert_close(rows, expected[name])


def example_loss(pipeline: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """One step's loss by the formulas of diffusers' DreamBooth examples, written out for two samples."""
    prompts = [PROMPT, PROMPT]
    if isinstance(pipeline, FluxPipeline):
        sigmas = (timesteps + 1).float() / 1000  # dynamic shifting: none of it while training
        states, pooled, text_ids = pipeline.encode_prompt(prompts, None)
        noisy = (1 - sigmas.view(-1, 1, 1, 1)) * latents + sigmas.view(-1, 1, 1, 1) * noise
        height, width = latents.shape[2:]
        guidance = torch.tensor([3.5]).expand(2) if pipeline.transformer.config.guidance_embeds else None
        prediction = pipeline.transformer(
            hidden_states=pipeline._pack_latents(noisy, *noisy.shape),
            timestep=sigmas,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=text_ids,
            img_ids=pipeline._prepare_latent_image_ids(2, height // 2, width // 2, "cpu", torch.float32),
            return_dict=False,
        )[0]
        factor = pipeline.vae_scale_factor
        prediction = pipeline._unpack_latents(prediction, height * factor, width * factor, factor)
        target = noise - latents
    elif hasattr(pipeline, "transformer"):
        shares = (timesteps + 1).float() / 1000
        sigmas = 3 * shares / (1 + 2 * shares)
        states, _, pooled, _ = pipeline.encode_prompt(prompts, None, None)
        noisy = (1 - sigmas.view(-1, 1, 1, 1)) * latents + sigmas.view(-1, 1, 1, 1) * noise
        prediction = pipeline.transformer(noisy, states, pooled, sigmas * 1000, return_dict=False)[0]
        target = noise - latents
    else:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        alphas = torch.cumprod(1 - betas, dim=0)[timesteps].view(-1, 1, 1, 1)
        noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        target = noise
        if pipeline.scheduler.config.prediction_type == "v_prediction":
            target = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
        if isinstance(pipeline, StableDiffusionXLPipeline):
            states, _, pooled, _ = pipeline.encode_prompt(prompts)
            conditions = {"text_embeds": pooled, "time_ids": SIZES}
            prediction = pipeline.unet(noisy, timesteps, states, added_cond_kwargs=conditions, return_dict=False)[0]
        else:
            states = pipeline.encode_prompt(prompts, "cpu", 1, True)[0]
            prediction = pipeline.unet(noisy, timesteps, states, return_dict=False)[0]
    return torch.nn.functional.mse_loss(prediction.float(), target.float(), reduction="mean")


@pytest.mark.parametrize("name", PIPELINES)
def test_loss_is_that_of_the_official_examples(name: str) -> None:
    pipeline = PIPELINES[name]()
    family = family_of(pipeline)
    pixels = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = family.encode_pictures(pixels)
    randomness = draw_randomness(
        3, [("instance", 4), ("instance", 9)], latents.mean, timestep_sampling="uniform", number_of_timesteps=1000
    )
    with torch.no_grad():
        conditioning = family.encode_prompts(family.token_ids([PROMPT, PROMPT])) | {PICTURE_SIZES: SIZES}
        mine = denoising_losses(family, latents, conditioning, randomness, prior_loss_weight=None).total
        posterior = pipeline.vae.encode(pixels).latent_dist
        shift, factor = pipeline.vae.config.shift_factor or 0, pipeline.vae.config.scaling_factor
        raw = posterior.mean + posterior.std * randomness.posterior_noise
        expected = example_loss(pipeline, (raw - shift) * factor, randomness.noise, randomness.timesteps)
    torch.testing.assert_close(mine, expected)


def test_flow_timesteps_follow_the_official_density() -> None:
    draws = draw_randomness(
        0,
        [("instance", number) for number in range(4000)],
        torch.zeros(4000, 1, 1, 1),
        timestep_sampling="logit_normal",
        number_of_timesteps=1000,
    ).timesteps
    torch.manual_seed(0)
    shares = compute_density_for_timestep_sampling("logit_normal", 4000, 0.0, 1.0, 1.29)
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert draws.float().quantile(quantile) == pytest.approx(1000 * shares.quantile(quantile), abs=25)
    assert draws.min() >= 0 and draws.max() <= 999


def test_higher_timesteps_are_noisier_in_every_family() -> None:
    for make in PIPELINES.values():
        family = family_of(make())
        ratios = family.signal_to_noise(torch.tensor([0, 1, 500, 998, 999]))
        assert (ratios.diff() < 0).all()


def test_packing_is_that_of_the_flux_pipeline() -> None:
    latents = torch.randn(2, 3, 6, 4)
    assert torch.equal(packed(latents), FluxPipeline._pack_latents(latents, 2, 3, 6, 4))
    assert torch.equal(unpacked(packed(latents), 6, 4), latents)
    assert torch.equal(positions(6, 4), FluxPipeline._prepare_latent_image_ids(2, 3, 2, "cpu", torch.float32))


def test_sdxl_is_told_where_its_pictures_were_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(one_photo(tmp_path, tiny_pipeline_sdxl()), max_train_steps=4, train_batch_size=3)
    seen: list[Tensor] = []
    from svft_diffusion.models.stable_diffusion_xl import StableDiffusionXLFamily

    predict = StableDiffusionXLFamily.predict

    def spy(self: Any, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        seen.append(conditioning[PICTURE_SIZES])
        return predict(self, noisy, timesteps, conditioning)

    monkeypatch.setattr(StableDiffusionXLFamily, "predict", spy)
    train(config)
    sizes = torch.cat(seen)
    assert sizes.shape == (12, 6)
    assert (sizes[:, [0, 1, 2, 4, 5]] == torch.tensor([20.0, 30, 0, 16, 16])).all()
    assert sizes[:, 3].unique().numel() > 1 and sizes[:, 3].max() <= 8  # 30 x 20 becomes 24 x 16


def test_a_model_without_gradient_is_an_error() -> None:
    trains, stays, zero = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    trains.grad, zero.grad = torch.ones(2), torch.zeros(2)
    assert check_gradients({"unet.a.values": trains, "unet.a.bias": stays, "unet.b.values": stays}) == ["unet.b"]
    for other in (stays, zero):
        with pytest.raises(UserError, match=r"text_encoder_2 gets no gradient.*--train_text_encoder"):
            check_gradients({"unet.a.values": trains, "text_encoder_2.a.values": other})


def test_decoding_keeps_the_precision_of_the_vae() -> None:
    vae = tiny_pipeline().vae
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = vae.decode(latents.bfloat16().float()).sample
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(vae.decode(latents).sample.float(), expected)
            with decoding_without_autocast(vae):
                assert torch.equal(vae.decode(latents.bfloat16(), return_dict=False)[0], expected)
    assert "decode" not in vars(vae)


def refused(make: Callable[[], DiffusionPipeline], change: Callable[[Any], None], **options: Any) -> str:
    pipeline = make()
    change(pipeline)
    with pytest.raises(UserError) as problem:
        family_of(pipeline, **options)
    return str(problem.value)


def test_what_does_not_fit_a_family_is_refused_in_one_line() -> None:
    def edm(pipeline: Any) -> None:
        pipeline.scheduler = EDMEulerScheduler()

    def without(name: str) -> Callable[[Any], None]:
        return lambda pipeline: setattr(pipeline, name, None)

    def inpainting(pipeline: Any) -> None:
        pipeline.unet = tiny_unet(in_channels=9)

    def sampler_of_diffusion(pipeline: Any) -> None:
        pipeline.scheduler = tiny_pipeline().scheduler

    def nothing(pipeline: Any) -> None:
        pass

    assert "EDMEulerScheduler" in refused(tiny_pipeline_sdxl, edm)
    for make in (tiny_pipeline, tiny_pipeline_sdxl, tiny_pipeline_sd3, tiny_pipeline_flux):
        for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
            if make is not tiny_pipeline or not name.endswith("2"):
                assert "can't be trained" in refused(make, without(name)), (make, name)
    assert "can't be trained" in refused(tiny_pipeline, inpainting)
    assert "flow matching" in refused(tiny_pipeline_flux, sampler_of_diffusion)
    assert "--max_sequence_length has no effect" in refused(tiny_pipeline_sdxl, nothing, max_sequence_length=77)
    assert "from 1 to 512" in refused(tiny_pipeline_flux, nothing, max_sequence_length=513)
    assert "--guidance_scale has no effect" in refused(tiny_pipeline_sd3, nothing, guidance_scale=3.5)
    assert "--guidance_scale has no effect" in refused(PIPELINES["flux-schnell"], nothing, guidance_scale=3.5)
    assert family_of(tiny_pipeline_flux(), guidance_scale=1.0).guidance_scale == 1.0


def test_resolution_must_fit_the_patches(tmp_path: Path) -> None:
    pipeline = tiny_pipeline_sd3()
    config = replace(one_photo(tmp_path, pipeline), resolution=24, max_train_steps=1)
    assert train(config).steps == 1
    family: ModelFamily = family_of(pipeline)
    assert family.pixel_multiple == 4 and family_of(tiny_pipeline_flux()).pixel_multiple == 4


def test_flux_takes_no_negative_prompt_and_other_families_do() -> None:
    options: dict[str, Any] = {"seed": 1, "num_inference_steps": 1, "height": 16, "width": 16}
    with pytest.raises(UserError, match="no negative prompt"):
        generate(tiny_pipeline_flux(), PROMPT, negative_prompt="a red dog", **options)
    for make in (tiny_pipeline, tiny_pipeline_sdxl, tiny_pipeline_sd3):
        pipeline = make()
        one, other = (generate(pipeline, PROMPT, negative_prompt=text, **options) for text in ("", "a red dog"))
        assert not np.array_equal(np.asarray(one), np.asarray(other))


def test_end_of_a_prompt_is_lost_only_if_no_encoder_reads_it() -> None:
    long = "a photo of sks dog on the beach red robot style style"
    assert family_of(tiny_pipeline_sdxl()).truncated_text(long) == "style style"
    assert family_of(tiny_pipeline_sd3()).truncated_text(long) == ""
    assert family_of(tiny_pipeline_sd3(t5=False)).truncated_text(long) == "style style"
    assert family_of(tiny_pipeline_flux(), max_sequence_length=12).truncated_text(long) == "style"


def test_default_resolution_of_each_family() -> None:
    from svft_diffusion.models import default_resolution

    made = {name: default_resolution(make()) for name, make in PIPELINES.items()}
    assert made == {"sd2-v": 16, "sdxl": 16, "sd3": 16, "sd3-without-t5": 16, "flux": 256, "flux-schnell": 256}


def test_equal_settings_give_equal_files_with_flow_matching(tmp_path: Path) -> None:
    config = replace(one_photo(tmp_path, tiny_pipeline_flux()), max_train_steps=2)
    first = train(config).adapter.read_bytes()
    assert train(replace(config, output_dir=tmp_path / "again")).adapter.read_bytes() == first
    assert train(replace(config, output_dir=tmp_path / "seed", seed=1)).adapter.read_bytes() != first
    assert not math.isnan(float(picture(config.pretrained_model_name_or_path, height=16, width=16).mean()))
    saved = (config.output_dir / "config.yaml").read_text(encoding="utf-8")
    assert re.search(r"guidance_scale: 3\.5\n", saved) and "max_sequence_length: 16\n" in saved
