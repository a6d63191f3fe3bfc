"""The recipe of the embedded model, run in miniature: every stage works on what the one before it left."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from svft_diffusion.toybox.pretraining import __main__ as stages
from svft_diffusion.toybox.pretraining.autoencoder import build_autoencoder, standardise_latents
from svft_diffusion.toybox.pretraining.denoiser import (
    ConditionalDenoiser,
    build_text_encoder,
    build_unet,
    draw_timesteps,
    load_state,
)
from svft_diffusion.toybox.pretraining.identities import draw_family
from svft_diffusion.toybox.pretraining.readers import attribute_loss, identity_loss
from svft_diffusion.toybox.readers import ATTRIBUTES, load_readers


def run_stage(monkeypatch: pytest.MonkeyPatch, stage: str, work_dir: Path, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pretraining", stage, "--work_dir", str(work_dir), *options])
    stages.main()


def test_the_stages_lead_from_nothing_to_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    run_stage(monkeypatch, "render", work, "--count", "600", "--processes", "1")
    run_stage(monkeypatch, "autoencoder", work, "--minutes", "0.02", "--batch_size", "4")
    run_stage(monkeypatch, "latents", work)
    latents = np.load(work / "latent_means.npy")
    assert latents.shape == (600, 8, 16, 16) and np.isfinite(latents).all()

    run_stage(monkeypatch, "denoiser", work, "--minutes", "0.01", "--batch_size", "1")
    model = ConditionalDenoiser(build_unet(), build_text_encoder())
    first = load_state(work / "denoiser.pt", model)
    assert first > 0
    run_stage(monkeypatch, "denoiser", work, "--minutes", "0.01", "--batch_size", "1")
    assert load_state(work / "denoiser.pt", model) > first  # went on, did not begin again

    run_stage(monkeypatch, "export", work, "--output", str(tmp_path / "pipeline"))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32)
    assert torch.equal(pipeline.unet.conv_in.weight, model.unet.conv_in.weight.half().float())

    run_stage(monkeypatch, "identities", work, "--families", "2", "--processes", "1")
    readers_file = tmp_path / "readers.safetensors"
    run_stage(monkeypatch, "readers", work, "--minutes", "0.02", "--families", "1", "--output", str(readers_file))
    assert load_readers(readers_file).tokens.weight.isfinite().all()


def test_standardising_latents_changes_no_picture() -> None:
    torch.manual_seed(0)
    vae, pictures = build_autoencoder().eval(), torch.rand(16, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(pictures).latent_dist.mean).sample
        standardise_latents(vae, pictures)
        latents = vae.encode(pictures).latent_dist.mean
        after = vae.decode(latents).sample
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(8), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(8), atol=1e-3)


def test_timesteps_concentrate_where_layout_is_decided() -> None:
    torch.manual_seed(0)
    focused, uniform = draw_timesteps(20_000, 0.25), draw_timesteps(20_000, 1.0)
    assert focused.min() >= 0 and focused.max() <= 999
    assert 480 < uniform.float().mean() < 520 < focused.float().mean() - 60
    assert (focused < 200).float().mean() > 0.04  # details are trained too


def test_a_family_holds_twins_that_differ_and_labels_that_fit() -> None:
    pictures, labels = draw_family(7)
    assert pictures.shape == (8, 4, 64, 64, 3) and labels.shape == (8, 4, 5)
    assert len({int(label) for label in labels[..., 0].ravel()}) == 1  # one class
    assert all(not np.array_equal(pictures[0, 0], pictures[member, 0]) for member in range(1, 8))


def test_losses_are_lowest_for_the_right_answer() -> None:
    labels = torch.tensor([[1, -1, 2, 3, 0], [4, 5, 0, 1, 1]])
    right = {
        name: torch.full((2, len(values)), -9.0).scatter(1, labels[:, [column]].clamp(min=0), 9.0)
        for column, (name, values) in enumerate(ATTRIBUTES.items())
    }
    assert attribute_loss(right, labels) < 0.01
    assert attribute_loss({name: -logits for name, logits in right.items()}, labels) > 10
    pairs = torch.eye(4)[[0, 0, 1, 1]]
    assert identity_loss(pairs, torch.tensor(20.0)) < 0.01 < identity_loss(pairs[[0, 2, 1, 3]], torch.tensor(20.0))
