"""Command line of the stages: ``python -m svft_diffusion.toybox.pretraining STAGE --work_dir DIR``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from argparse import ArgumentParser as Parser
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from svft_diffusion.toybox import WEIGHTS_FOLDER
from svft_diffusion.toybox.pretraining.autoencoder import FOLDER, AutoencoderSettings, train_autoencoder
from svft_diffusion.toybox.pretraining.certify import (
    export_pipeline,
    held_out_prompts,
    model_accuracy,
    reader_accuracy,
)
from svft_diffusion.toybox.pretraining.dataset import render_dataset
from svft_diffusion.toybox.pretraining.denoiser import (
    CHECKPOINT,
    ConditionalDenoiser,
    DenoiserSettings,
    build_text_encoder,
    build_unet,
    load_state,
    train_denoiser,
)
from svft_diffusion.toybox.pretraining.identities import render_identities, round_trip_identities
from svft_diffusion.toybox.pretraining.latents import encode_dataset
from svft_diffusion.toybox.pretraining.readers import ReaderSettings, export_readers, train_readers
from svft_diffusion.toybox.readers import READERS_FILE

Options = argparse.Namespace
Settings = TypeVar("Settings")


def _render(options: Options) -> None:
    render_dataset(options.work_dir, options.count, options.size, options.processes)


def _autoencoder(options: Options) -> None:
    train_autoencoder(options.work_dir, _settings(AutoencoderSettings, options))


def _latents(options: Options) -> None:
    encode_dataset(options.work_dir, _load_vae(options.work_dir))


def _denoiser(options: Options) -> None:
    train_denoiser(options.work_dir, _denoiser_to_train(options.start_from), _settings(DenoiserSettings, options))


def _identities(options: Options) -> None:
    render_identities(options.work_dir, options.families, options.processes)
    round_trip_identities(options.work_dir, _load_vae(options.work_dir))


def _readers(options: Options) -> None:
    readers = train_readers(options.work_dir, _settings(ReaderSettings, options))
    export_readers(readers, options.output)


def _export(options: Options) -> None:
    model = ConditionalDenoiser(build_unet(), build_text_encoder())
    load_state(options.work_dir / CHECKPOINT, model)
    export_pipeline(model, _load_vae(options.work_dir), options.output)


def _certify(options: Options) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(options.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    report: dict[str, object] = dict(reader_accuracy(pipeline.vae))
    accuracy, pictures = model_accuracy(pipeline, held_out_prompts(options.prompts))
    report["model"] = accuracy
    print(json.dumps(report, indent=2))
    rows = [np.concatenate(list(pictures[start : start + 20]), axis=1) for start in range(0, len(pictures) - 19, 20)]
    Image.fromarray(np.concatenate(rows)).save(options.work_dir / "certify.png")


def _load_vae(work_dir: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(work_dir / FOLDER, torch_dtype=torch.float32).eval()


def _settings(settings_class: type[Settings], options: Options) -> Settings:
    fields = dataclasses.fields(settings_class)  # type: ignore[arg-type]
    return settings_class(**{field.name: getattr(options, field.name) for field in fields})


def _denoiser_to_train(start_from: Path | None) -> ConditionalDenoiser:
    """A new denoiser, or that of an earlier pipeline whose vocabulary may have been a part of today's."""
    text_encoder = build_text_encoder()
    if start_from is None:
        return ConditionalDenoiser(build_unet(), text_encoder)
    unet = UNet2DConditionModel.from_pretrained(start_from, subfolder="unet", torch_dtype=torch.float32)
    earlier = CLIPTextModel.from_pretrained(start_from, subfolder="text_encoder", dtype=torch.float32).state_dict()
    for name, value in text_encoder.state_dict().items():
        value[: len(earlier[name])].copy_(earlier[name])
    return ConditionalDenoiser(unet, text_encoder)


def main() -> None:
    """Parse the stage and run it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(prog="python -m svft_diffusion.toybox.pretraining", description=__doc__)
    stages = parser.add_subparsers(required=True, metavar="STAGE")

    def add_stage(name: str, run: Callable[[Options], None], text: str, settings: type | None = None) -> Parser:
        stage = stages.add_parser(name, help=text)
        stage.add_argument("--work_dir", type=Path, required=True, help="where the stages keep their files")
        for field in dataclasses.fields(settings) if settings else ():
            stage.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
        stage.set_defaults(run=run)
        return stage

    render = add_stage("render", _render, "draw the world")
    render.add_argument("--count", type=int, default=100_000, help="pictures")
    render.add_argument("--size", type=int, default=64, help="pixels a side")
    render.add_argument("--processes", type=int, default=2)
    add_stage("autoencoder", _autoencoder, "train the VAE", AutoencoderSettings)
    add_stage("latents", _latents, "encode the pictures with the VAE")
    denoiser = add_stage("denoiser", _denoiser, "train UNet and text encoder", DenoiserSettings)
    denoiser.add_argument("--start_from", type=Path, help="pipeline folder to begin with instead of random weights")
    identities = add_stage("identities", _identities, "draw several views of many individuals")
    identities.add_argument("--families", type=int, default=2000, help="of eight individuals in four views")
    identities.add_argument("--processes", type=int, default=2)
    readers = add_stage("readers", _readers, "train the readers", ReaderSettings)
    readers.add_argument("--output", type=Path, default=READERS_FILE)
    export = add_stage("export", _export, "write the averaged weights as a pipeline folder")
    export.add_argument("--output", type=Path, default=WEIGHTS_FOLDER)
    certify = add_stage("certify", _certify, "measure readers and model on held-out material")
    certify.add_argument("--model", type=Path, default=WEIGHTS_FOLDER)
    certify.add_argument("--prompts", type=int, default=200)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
