"""Editing on tiny base models: what is drawn, what is kept for the next time, and what the files tell."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from adapter_files import ModelsOnDisk, write_models
from diffusers import DiffusionPipeline, FluxPipeline, HeunDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image
from tiny_models import tiny_pipeline_sdxl, tiny_vae
from tiny_transformers import tiny_pipeline_flux, tiny_pipeline_sd3

from svft_diffusion.editing import EditConfig, EditResult, edit_picture
from svft_diffusion.editing.drawing import Editor, drawing_pipeline
from svft_diffusion.editing.frame import make_frame
from svft_diffusion.editing.inpainting import KnownLatents, cells_to_draw
from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.toy_subjects import demonstration_subject, write_photos
from svft_diffusion.files import read_header
from svft_diffusion.models.loading import load_pipeline
from svft_diffusion.sampling.png import read_png_settings

FEW_STEPS: dict[str, Any] = {"max_train_steps": 2, "learning_rate": 0.5}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of another shape than the base model's."""
    file = tmp_path / "Mein Foto.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 28, 3), dtype=np.uint8)).save(file)
    return file


def edit_config(base: Path, output: Path, **settings: Any) -> EditConfig:
    values = {"prompt": "a photo of dog on the beach", "num_inference_steps": 3, "device": "cpu"}
    return EditConfig(pretrained_model_name_or_path=str(base), output=output, **{**values, **settings})


def pixels(result: EditResult, strength: float = 1.0) -> np.ndarray:
    with Image.open(result.pictures[strength]) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


def half_white_mask(photo: Path) -> Path:
    with Image.open(photo) as image:
        mask = Image.new("L", image.size, 0)
    mask.paste(255, (8, 5, 20, 15))
    file = photo.with_name("mask.png")
    mask.save(file)
    return file


def test_adapter_is_kept_and_found_again(models: ModelsOnDisk, photo: Path, tmp_path: Path) -> None:
    config = edit_config(models.base, tmp_path / "out" / "one.png", source_prompt="a photo of dog")
    first = edit_picture(photo, config, FEW_STEPS)
    assert first.adapter is not None and not first.adapter_reused
    assert first.adapter.parent == tmp_path / "out" / "adapters" and first.adapter.name.startswith("mein-foto-")
    assert [file.name for file in first.adapter.parent.iterdir()] == [first.adapter.name]  # nothing else is left
    header = read_header(first.adapter)
    assert header.method == "svdiff" and header.class_prompt is None

    moved = tmp_path / "other name.bmp"  # the content counts
    with Image.open(photo) as image:
        image.save(moved)
    taken = tmp_path / "out" / "adapters" / first.adapter.name.replace("mein-foto", "other-name")
    shutil.copyfile(first.adapter, taken)
    settings = read_png_settings(first.pictures[1.0])
    assert [adapter["name"] for adapter in settings["adapters"]] == ["picture"]
    assert settings["source_prompt"] == "a photo of dog" and settings["mode"] == "inversion"
    content = first.pictures[1.0].read_bytes()
    assert all(secret not in content for secret in (b"Foto", b"mein-foto", str(tmp_path).encode()))
    again = edit_picture(moved, replace(config, output=tmp_path / "out" / "two.png"), FEW_STEPS)
    assert again.adapter == taken and again.adapter_reused
    assert np.array_equal(pixels(first), pixels(again))

    other = edit_picture(
        photo, replace(config, output=tmp_path / "out" / "three.png"), {**FEW_STEPS, "max_train_steps": 3}
    )
    assert not other.adapter_reused and other.adapter != first.adapter


def test_an_adapter_trains_on_the_device_of_the_edit(models: ModelsOnDisk, photo: Path, tmp_path: Path) -> None:
    state = PartialState()
    usual = state.device
    config = edit_config(models.base, tmp_path / "edit.png", source_prompt="a photo of dog")
    devices: list[torch.device] = []
    try:
        state.device = torch.device("meta")  # what accelerate has chosen; nothing can be trained there
        result = edit_picture(
            photo, config, FEW_STEPS, on_training_step=lambda _: devices.append(AcceleratorState().device)
        )
        assert PartialState().device == torch.device("meta")  # as before, for others in this process
    finally:
        PartialState().device = usual
    assert set(devices) == {torch.device("cpu")} and result.adapter is not None


def test_training_that_was_stopped_goes_on(models: ModelsOnDisk, photo: Path, tmp_path: Path) -> None:
    training = {**FEW_STEPS, "max_train_steps": 4}
    output = tmp_path / "again" / "edit.png"
    config = edit_config(models.base, tmp_path / "whole" / "edit.png", source_prompt="a photo of dog")
    whole = edit_picture(photo, config, training)

    def stop(report: Any) -> None:
        if report.step == 2:
            (tmp_path / "again" / "adapters" / f"{name}-training" / "stop").touch()

    assert whole.adapter is not None
    name = whole.adapter.stem
    config = replace(config, output=output)
    with pytest.raises(KeyboardInterrupt):
        edit_picture(photo, config, training, on_training_step=stop)
    assert not output.exists() and not (tmp_path / "again" / "adapters" / whole.adapter.name).exists()
    steps: list[int] = []
    again = edit_picture(photo, config, training, on_training_step=lambda report: steps.append(report.step))
    assert steps == [3, 4] and np.array_equal(pixels(again), pixels(whole))


def test_strengths_give_a_picture_each_and_a_grid(models: ModelsOnDisk, photo: Path, tmp_path: Path) -> None:
    config = edit_config(models.base, tmp_path / "edit.png", adapter=[str(models.style)], strengths=[0, 0.5, 1])
    result = edit_picture(photo, config)
    assert list(result.pictures) == [0.0, 0.5, 1.0] and result.grid == tmp_path / "edit.png"
    assert not np.array_equal(pixels(result, 0.0), pixels(result, 1.0))
    weights = [read_png_settings(file)["adapters"][0]["weight"] for file in result.pictures.values()]
    assert weights == [0.0, 0.5, 1.0]
    tagged = "a photo of dog on the beach <adapter:style:0>"
    base = edit_picture(
        photo,
        edit_config(
            models.base, tmp_path / "base.png", adapter=[str(models.style)], prompt=tagged, embed_adapter=False
        ),
    )
    assert np.array_equal(pixels(base), pixels(result, 0.0))


@pytest.mark.parametrize(
    "settings", [{}, {"eta": 0.5}, {"slerp": 0.5}, {"eta": 1.0, "seed": 3}, {"inversion_refinements": 0}]
)
def test_edit_is_deterministic(models: ModelsOnDisk, photo: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    config = edit_config(models.base, tmp_path / "one.png", adapter=[str(models.dog)], **settings)
    first = edit_picture(photo, config).pictures[1.0].read_bytes()
    assert edit_picture(photo, replace(config, output=tmp_path / "two.png")).pictures[1.0].read_bytes() == first
    if settings:
        plain = edit_config(models.base, tmp_path / "plain.png", adapter=[str(models.dog)])
        assert edit_picture(photo, plain).pictures[1.0].read_bytes() != first


def test_reconstruction_with_the_same_prompt(models: ModelsOnDisk, photo: Path, tmp_path: Path) -> None:
    """At guidance 1 the edit is what the VAE makes of the picture; at a higher one it is not."""
    pipeline = load_pipeline(str(models.base))
    # Velocity converges fast, and as with a trained model, latents are as large as the noise.
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    pipeline.vae.register_to_config(scaling_factor=3.0)
    pipeline.save_pretrained(tmp_path / "base")
    config = edit_config(
        tmp_path / "base",
        tmp_path / "one.png",
        adapter=[f"{models.dog}:0.01"],
        guidance_scale=1.0,
        inversion_refinements=10,
        num_inference_steps=10,
    )
    found = pixels(edit_picture(photo, config))
    with Image.open(photo) as image:
        fitted = make_frame(image.size, (16, 16), "crop").fitted(image.convert("RGB"))
    values = torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.encode(values).latent_dist.mean).sample
    expected = pipeline.image_processor.postprocess(decoded, output_type="np")[0] * 255
    assert np.abs(found - expected).max() < 3
    more = pixels(edit_picture(photo, replace(config, output=tmp_path / "two.png", guidance_scale=5.0)))
    assert np.abs(more - expected).max() > 3


def test_file_tells_all_but_names(models: ModelsOnDisk, photo: Path, tmp_path: Path) -> None:
    mask = half_white_mask(photo)
    config = edit_config(
        models.base, tmp_path / "edit.png", mode="inpaint", mask=mask, adapter=[f"{models.dog}:0.5"], fit="pad"
    )
    file = edit_picture(photo, config).pictures[1.0]
    settings = read_png_settings(file)
    assert {name: settings[name] for name in ("mode", "strength", "fit", "drawn_size", "width", "height", "seed")} == {
        "mode": "inpaint", "strength": 1.0, "fit": "pad", "drawn_size": [16, 16], "width": 28, "height": 20, "seed": 0
    }  # fmt: skip
    assert len(settings["source_sha256"]) == len(settings["mask_sha256"]) == 64
    assert "eta" not in settings and "slerp" not in settings
    assert settings["adapters"][0]["weight"] == 0.5
    content = file.read_bytes()
    for secret in (photo.stem, str(tmp_path), mask.name):
        assert secret.encode() not in content and secret not in str(settings)


@pytest.mark.parametrize("fit", ["crop", "pad", "resize"])
def test_inpainting_leaves_the_rest_alone(models: ModelsOnDisk, photo: Path, tmp_path: Path, fit: str) -> None:
    mask = half_white_mask(photo)
    config = edit_config(models.base, tmp_path / "edit.png", mode="inpaint", mask=mask, fit=fit)
    drawn = pixels(edit_picture(photo, config))
    with Image.open(photo) as image:
        before = np.asarray(image, dtype=int)
    with Image.open(mask) as image:
        black = np.asarray(image) == 0
    assert np.array_equal(drawn[black], before[black])
    assert (drawn[~black] != before[~black]).any(axis=-1).mean() > 0.9


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting_on_the_embedded_model(tmp_path: Path, strength: float) -> None:
    """Its latents have eight channels, which diffusers' inpainting refuses."""
    subject = demonstration_subject()
    photo = write_photos(subject, tmp_path / "photos")[0]
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    config = edit_config(
        Path("toybox"), tmp_path / "edit.png", mode="inpaint", mask=tmp_path / "mask.png", strength=strength,
        num_inference_steps=8, prompt="a photo of a robot in the snow",
    )  # fmt: skip
    edited = pixels(edit_picture(photo, config))
    with Image.open(photo) as image:
        picture = image.convert("RGB")
    before = np.asarray(picture, dtype=int)
    assert np.array_equal(edited[:, :32], before[:, :32])
    assert np.abs(edited[:, 32:] - before[:, 32:]).mean() > 10

    # What the model drew goes on from the known part, which is why it was put back after every step.
    base = load_pipeline("toybox")
    editor = Editor(base, drawing_pipeline(base, config), picture, mask, config)
    steps: list[None] = []
    drawn = np.asarray(editor.draw(lambda: steps.append(None)).image, dtype=int)
    assert len(steps) == editor.steps == 8 * strength
    assert np.abs(drawn[:, :24] - before[:, :24]).mean() < 8 < np.abs(drawn[:, 40:] - before[:, 40:]).mean()


def test_known_latents_have_the_noise_of_the_next_step() -> None:
    base = load_pipeline("toybox")
    known, noise = torch.full((1, 8, 4, 4), 3.0), torch.full((1, 8, 4, 4), 0.5)
    mask = Image.new("L", (16, 16), 0)
    mask.putpixel((15, 0), 1)  # of the cells, the one at the top right
    drawn = cells_to_draw(mask, 4, 4)
    assert drawn.sum() == 1 == drawn[0, 0, 0, 3]
    keep = KnownLatents(known, noise, drawn)
    seen: list[Any] = []

    def look(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept = keep(pipeline, step, timestep, tensors)
        assert torch.equal(kept["latents"][..., 0, 3], tensors["latents"][..., 0, 3])
        seen.append(kept["latents"][0, :, 1, 0])
        return kept

    base("a robot", num_inference_steps=4, height=16, width=16, callback_on_step_end=look, output_type="latent")
    timesteps = base.scheduler.timesteps
    signal = torch.tensor([*base.scheduler.alphas_cumprod[timesteps[1:]], 1.0])
    expected = signal.sqrt() * 3.0 + (1 - signal).sqrt() * 0.5
    assert torch.allclose(torch.stack(seen)[:, 0], expected, atol=1e-3)
    assert all((cell == cell[0]).all() for cell in seen)


def test_a_base_of_other_latents_can_be_inpainted(models: ModelsOnDisk, photo: Path, tmp_path: Path) -> None:
    """With a scheduler that counts in sigmas and takes every step twice."""
    pipeline = load_pipeline(str(models.base))
    pipeline.register_modules(
        unet=with_channels(pipeline.unet, in_channels=6, out_channels=6), vae=tiny_vae(latent_channels=6),
        scheduler=HeunDiscreteScheduler.from_config(pipeline.scheduler.config),
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "base")
    config = edit_config(tmp_path / "base", tmp_path / "edit.png", mode="inpaint", mask=half_white_mask(photo))
    for strength in (1.0, 0.7):
        drawn = edit_picture(photo, replace(config, strength=strength, output=tmp_path / f"{strength}.png"))
        assert pixels(drawn).std() > 1


def test_edits_at_once_take_names_of_their_own(
    models: ModelsOnDisk, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another edit that begins while the first one draws."""
    monkeypatch.chdir(tmp_path)
    config = replace(edit_config(models.base, tmp_path / "x.png", mode="img2img"), output=None, strengths=[])
    results: list[EditResult] = []
    draw = Editor.draw

    def draw_after_another(editor: Editor, on_step: Any) -> Any:
        monkeypatch.setattr(Editor, "draw", draw)
        results.append(edit_picture(photo, config))
        return draw(editor, on_step)

    monkeypatch.setattr(Editor, "draw", draw_after_another)
    results.append(edit_picture(photo, config))
    name = "mein-foto_a-photo-of-dog-on-the-beach"
    assert [result.pictures[1.0].name for result in results] == [f"{name}-2.png", f"{name}.png"]
    assert all(pixels(result).std() > 1 for result in results)

    def fail(*_: object) -> None:
        raise UserError("no")

    monkeypatch.setattr(Editor, "draw", fail)
    for wrong in (config, replace(config, strengths=[1.0, 2.0], adapter=[str(models.dog)])):
        with pytest.raises(UserError, match="no"):
            edit_picture(photo, wrong)
    assert sorted(file.name for file in Path("outputs/edits").iterdir()) == [f"{name}-2.png", f"{name}.png"]


@pytest.mark.parametrize("mode", ["img2img", "inpaint"])
def test_a_picture_that_the_safety_checker_blacked_out_is_told(
    models: ModelsOnDisk, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    draw = Editor._called
    monkeypatch.setattr(Editor, "_called", lambda *given, **named: draw(*given, **named)._replace(blacked_out=True))
    mask = half_white_mask(photo) if mode == "inpaint" else None
    config = edit_config(models.base, tmp_path / "edit.png", mode=mode, mask=mask)
    result = edit_picture(photo, config)
    assert result.blacked_out == [tmp_path / "edit.png"]
    assert read_png_settings(tmp_path / "edit.png")["blacked_out"] is True
    monkeypatch.undo()
    again = edit_picture(photo, replace(config, overwrite=True))
    assert again.blacked_out == [] and "blacked_out" not in read_png_settings(tmp_path / "edit.png")


def test_little_strength_changes_little(models: ModelsOnDisk, photo: Path, tmp_path: Path) -> None:
    config = edit_config(models.base, tmp_path / "edit.png", mode="img2img", num_inference_steps=20, strength=0.05)
    little = pixels(edit_picture(photo, config))
    much = pixels(edit_picture(photo, replace(config, output=tmp_path / "much.png", strength=1.0)))
    before = pixels(edit_picture(photo, replace(config, output=tmp_path / "same.png", strength=0.06)))
    assert np.abs(little - before).mean() < np.abs(much - before).mean()


def flux_with_four_channels() -> DiffusionPipeline:
    """Latents of three channels, as the tiny one has, would be taken for pictures."""
    pipeline = tiny_pipeline_flux()
    pipeline.register_modules(
        transformer=with_channels(pipeline.transformer, in_channels=16),
        vae=tiny_vae(latent_channels=4, shift_factor=0.1),
    )
    return FluxPipeline(**pipeline.components)


def sd3_with_sixteen_channels() -> DiffusionPipeline:
    """Its inpainting takes no other."""
    pipeline = tiny_pipeline_sd3()
    pipeline.register_modules(
        transformer=with_channels(pipeline.transformer, in_channels=16, out_channels=16),
        vae=tiny_vae(latent_channels=16, shift_factor=0.1),
    )
    return StableDiffusion3Pipeline(**pipeline.components)


def with_channels(transformer: Any, **channels: int) -> Any:
    torch.manual_seed(0)
    return type(transformer).from_config({**transformer.config, **channels}).eval()


@pytest.mark.parametrize("make", [tiny_pipeline_sdxl, sd3_with_sixteen_channels, flux_with_four_channels])
@pytest.mark.parametrize("mode", ["img2img", "inpaint", "inversion"])
def test_families(make: Any, mode: str, photo: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    make().save_pretrained(base)
    more: dict[str, Any] = {"mask": half_white_mask(photo)} if mode == "inpaint" else {}
    if mode == "inversion":
        more["source_prompt"] = "a photo of dog"
    config = edit_config(base, tmp_path / "edit.png", mode=mode, height=16, width=32, fit="pad", **more)
    training = {"max_train_steps": 1} if mode == "inversion" else {}
    if mode == "inversion" and make is not tiny_pipeline_sdxl:
        with pytest.raises(UserError, match="flow matching"):
            edit_picture(photo, config, training)
        assert not (tmp_path / "adapters").exists()
        return
    drawn = pixels(edit_picture(photo, config, training))
    assert drawn.shape == ((20, 28, 3) if mode == "inpaint" else (16, 22, 3))
    assert drawn.std() > 1


@pytest.mark.parametrize("mode", ["img2img", "inpaint"])
def test_models_are_shared(models: ModelsOnDisk, mode: str) -> None:
    base = load_pipeline(str(models.base))
    pipeline = drawing_pipeline(base, EditConfig(prompt="a", mode=mode))
    assert pipeline.unet is base.unet and pipeline.vae is base.vae and pipeline.text_encoder is base.text_encoder
