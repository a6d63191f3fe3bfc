"""The test cases of diffusers' DreamBooth examples, row by row, as their users know them: flags in, files out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from accelerate.utils import write_basic_config
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_models import tiny_pipeline, tiny_pipeline_sdxl
from tiny_transformers import tiny_pipeline_flux, tiny_pipeline_sd3
from training_runs import checkpoints, picture, trained_tensors

from svft_diffusion.cli.main import run_command
from svft_diffusion.files import read_header
from svft_diffusion.files.tensor_names import layer_names

REPOSITORY = Path(__file__).parent.parent
PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": tiny_pipeline,
    "sdxl": tiny_pipeline_sdxl,
    "sd3": tiny_pipeline_sd3,
    "flux": tiny_pipeline_flux,
}
DENOISER = {"sd": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}
FAMILIES = list(PIPELINES)
# What is the same for all, of two families in every run of the tests.
FAMILIES_IN_TURN = ["sd", "flux", *(pytest.param(family, marks=pytest.mark.slow) for family in ("sdxl", "sd3"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of every family, and five photos with captions; all of it is only read."""
    folder = tmp_path_factory.mktemp("familiar")
    for family, make in PIPELINES.items():
        make().save_pretrained(folder / family)
    photos = folder / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    lines = []
    for number, size in enumerate([(16, 16), (20, 30), (40, 18), (24, 24), (16, 24)]):
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(photos / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a photo of sks dog {number}"}))
    (photos / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def flags(folder: Path, family: str, output_dir: Path, extra: str = "") -> list[str]:
    """What all of their tests say; the same pictures are smaller, because the models are."""
    text = f"""
        --pretrained_model_name_or_path {folder / family}
        --instance_data_dir {folder / "photos"}
        --instance_prompt photo
        --resolution 16
        --train_batch_size 1
        --gradient_accumulation_steps 1
        --max_train_steps 2
        --learning_rate 5.0e-04
        --scale_lr
        --lr_scheduler constant
        --lr_warmup_steps 0
        --output_dir {output_dir}
        --report_to none
        --checkpointing_steps 500
        --history_steps 0
        {"--max_sequence_length 16" if family in ("sd3", "flux") else ""}
        {extra}
    """
    return text.split()


def train(folder: Path, family: str, output_dir: Path, extra: str = "") -> Path:
    """Run the command; the adapter."""
    assert run_command("train", flags(folder, family, output_dir, extra)) == 0
    return output_dir / "adapter.safetensors"


def layers_of(adapter: Path) -> set[str]:
    """Canonical names, ``<component>.<path>``."""
    return layer_names(trained_tensors(adapter))


def components_in(adapter: Path) -> set[str]:
    return {name.partition(".")[0] for name in layers_of(adapter)}


def launch(arguments: list[str], folder: Path) -> None:
    """As their tests start it: ``accelerate launch`` with a basic config file."""
    settings = folder / "accelerate.yaml"
    write_basic_config(save_location=str(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings), "--cpu"]
    command += [str(REPOSITORY / "train_dreambooth.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dreambooth(folder: Path, tmp_path: Path) -> None:
    launch(flags(folder, "sd", tmp_path / "out"), tmp_path)
    adapter = tmp_path / "out" / "adapter.safetensors"
    assert adapter.is_file() and (tmp_path / "out" / "config.yaml").is_file()
    assert picture(str(folder / "sd"), adapter, num_inference_steps=2).shape == (16, 16, 3)


def test_dreambooth_checkpointing(folder: Path, tmp_path: Path) -> None:
    out, base = tmp_path / "out", str(folder / "sd")
    adapter = train(folder, "sd", out, "--max_train_steps 4 --checkpointing_steps 2 --seed 0 --learning_rate 0.5")
    assert checkpoints(out) == {"checkpoint-2", "checkpoint-4"}
    # What is written in the end runs, and what was written on the way.
    pictures = [
        picture(base, file, num_inference_steps=2)
        for file in (None, out / "checkpoint-2" / "adapter.safetensors", adapter)
    ]
    assert (pictures[0] != pictures[1]).any() and (pictures[1] != pictures[2]).any()
    shutil.rmtree(out / "checkpoint-2")
    more = "--max_train_steps 6 --checkpointing_steps 2 --seed 0 --learning_rate 0.5"
    train(folder, "sd", out, f"{more} --resume_from_checkpoint checkpoint-4")
    assert checkpoints(out) == {"checkpoint-4", "checkpoint-6"}
    assert (picture(base, adapter, num_inference_steps=2) != pictures[2]).any()


@pytest.mark.parametrize("family", FAMILIES_IN_TURN)
def test_checkpoints_total_limit(folder: Path, tmp_path: Path, family: str) -> None:
    adapter = train(folder, family, tmp_path, "--max_train_steps 6 --checkpointing_steps 2 --checkpoints_total_limit 2")
    assert checkpoints(tmp_path) == {"checkpoint-4", "checkpoint-6"}
    assert components_in(adapter) == {DENOISER[family]}


@pytest.mark.parametrize("family", FAMILIES_IN_TURN)
def test_checkpoints_total_limit_removes_multiple_checkpoints(folder: Path, tmp_path: Path, family: str) -> None:
    train(folder, family, tmp_path, "--max_train_steps 4 --checkpointing_steps 2")
    assert checkpoints(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    more = "--max_train_steps 8 --checkpointing_steps 2 --checkpoints_total_limit 2"
    train(folder, family, tmp_path, f"{more} --resume_from_checkpoint checkpoint-4")
    assert checkpoints(tmp_path) == {"checkpoint-6", "checkpoint-8"}


@pytest.mark.parametrize("family", FAMILIES)
def test_dreambooth_lora(folder: Path, tmp_path: Path, family: str) -> None:
    """Base run: only the denoiser has keys, and of the methods that replace LoRA all do."""
    adapter = train(folder, family, tmp_path, "--cache_latents")
    assert components_in(adapter) == {DENOISER[family]}


@pytest.mark.parametrize("family", FAMILIES)
def test_dreambooth_lora_text_encoder(folder: Path, tmp_path: Path, family: str) -> None:
    adapter = train(folder, family, tmp_path, "--train_text_encoder")
    clips = {"text_encoder"} if family in ("sd", "flux") else {"text_encoder", "text_encoder_2"}
    assert components_in(adapter) == {DENOISER[family], *clips}


@pytest.mark.parametrize("text_encoder", ["", "--train_text_encoder"])
def test_dreambooth_lora_sdxl_custom_captions(folder: Path, tmp_path: Path, text_encoder: str) -> None:
    train(folder, "sdxl", tmp_path / "captions", f"--caption_source metadata --learning_rate 0.1 {text_encoder}")
    train(folder, "sdxl", tmp_path / "prompt", f"--learning_rate 0.1 {text_encoder}")
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("captions", "prompt")]
    assert texts[0] != texts[1]


def test_dreambooth_lora_sdxl_checkpointing_checkpoints_total_limit(folder: Path, tmp_path: Path) -> None:
    """And then the file is loaded, and one more step drawn with it."""
    extra = "--max_train_steps 6 --checkpointing_steps 2 --checkpoints_total_limit 2"
    adapter = train(folder, "sdxl", tmp_path, extra)
    assert checkpoints(tmp_path) == {"checkpoint-4", "checkpoint-6"}
    assert picture(str(folder / "sdxl"), adapter, num_inference_steps=1).shape == (16, 16, 3)


def test_dreambooth_lora_sdxl_text_encoder_checkpointing_checkpoints_total_limit(folder: Path, tmp_path: Path) -> None:
    """The last step is no multiple of the interval."""
    extra = "--train_text_encoder --max_train_steps 7 --checkpointing_steps 2 --checkpoints_total_limit 2"
    adapter = train(folder, "sdxl", tmp_path, extra)
    assert checkpoints(tmp_path) == {"checkpoint-4", "checkpoint-6"}
    assert picture(str(folder / "sdxl"), adapter, num_inference_steps=2).shape == (16, 16, 3)


@pytest.mark.parametrize("family", FAMILIES_IN_TURN)
def test_latent_caching(folder: Path, tmp_path: Path, family: str) -> None:
    """On or off, the very same is learned where a photo is cut in one place only."""
    files = [
        train(folder, family, tmp_path / flag, f"--center_crop --{flag} --seed 0").read_bytes()
        for flag in ("cache_latents", "no-cache_latents")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("family", "named", "expected"),
    [
        ("flux", "single_transformer_blocks.0.proj_out", {"transformer.single_transformer_blocks.0.proj_out"}),
        ("sd3", "attn.to_k", {"attn.to_k"}),  # by its end: of every block
        ("sd", "attn2.to_k, attn2.to_v", {"attn2.to_k", "attn2.to_v"}),
        ("sdxl", "to_q", {"to_q"}),
    ],
)
def test_lora_layers(folder: Path, tmp_path: Path, family: str, named: str, expected: set[str]) -> None:
    """Only the layers that are named have keys."""
    arguments = [*flags(folder, family, tmp_path), "--target_layers", named]
    assert run_command("train", arguments) == 0
    adapter = tmp_path / "adapter.safetensors"
    layers = layers_of(adapter)
    ends = {end for end in expected for name in layers if name.endswith(end)}
    assert ends == expected and all(name.endswith(tuple(expected)) for name in layers)
    assert read_header(adapter).targets == "custom"


@pytest.mark.parametrize(
    ("family", "block"), [("sd3", "transformer_blocks.0"), ("flux", "transformer_blocks.0"), ("sd", "mid_block")]
)
def test_lora_block(folder: Path, tmp_path: Path, family: str, block: str) -> None:
    """Every layer of a block, and nothing else."""
    layers = layers_of(train(folder, family, tmp_path, f"--target_layers {block}"))
    assert len(layers) > 3 and all(name.startswith(f"{DENOISER[family]}.{block}.") for name in layers)


def test_lora_layers_of_text_encoders_too(folder: Path, tmp_path: Path) -> None:
    adapter = train(folder, "sd", tmp_path, "--train_text_encoder --target_layers attn2.to_v,v_proj")
    assert {name.rpartition(".")[2] for name in layers_of(adapter)} == {"to_v", "v_proj"}
    assert components_in(adapter) == {"unet", "text_encoder"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--target_layers to_kk", "layer name 'to_kk' matches no layer of the unet, did you mean 'to_k'?"),
        ("--target_layers to_k,", "names with commas between them"),
        ("--target_layers to_k --targets all", "--targets has no effect with --target_layers"),
        ("--target_layers to_k --train_text_encoder", "match no layer of the text_encoder, which trains too"),
        ("--target_layers norm1", "matches no layer"),
        ("--caption_dropout 1.0", "--caption_dropout must be at least 0 and below 1"),
    ],
)
def test_layers_that_are_not_there(
    folder: Path, tmp_path: Path, extra: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("train", flags(folder, "sd", tmp_path / "out", extra)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_with_metadata(folder: Path, tmp_path: Path) -> None:
    """What makes the adapter survives in the header: here rank and off-diagonals, as rank and alpha there."""
    extra = "--method svft --pattern banded --off_diagonals 1 --rank 5"
    header = read_header(train(folder, "flux", tmp_path, extra))
    assert (header.method, header.pattern, header.off_diagonals, header.rank) == ("svft", "banded", 1, 5)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_aspect_ratio_buckets(folder: Path, tmp_path: Path, family: str) -> None:
    """Skipped there."""
    extra = ["--aspect_ratio_buckets", "16,24;24,16;16,16", "--train_batch_size", "2"]
    assert run_command("train", [*flags(folder, family, tmp_path), *extra]) == 0
    assert read_header(tmp_path / "adapter.safetensors").training["aspect_ratio_buckets"] == "16,24;24,16;16,16"


@pytest.mark.parametrize("family", ["sd", pytest.param("sd3", marks=pytest.mark.slow)])
def test_caption_dropout(folder: Path, tmp_path: Path, family: str) -> None:
    """Skipped there. A part of the turns has an empty prompt, the same with either kind of loading."""
    settings = "--max_train_steps 4 --center_crop --learning_rate 0.1"
    texts = {}
    for name, extra in {
        "all": "",
        "half": "--caption_dropout 0.5",
        "half loaded": "--caption_dropout 0.5 --no-cache_latents",
    }.items():
        out = tmp_path / name.replace(" ", "-")
        train(folder, family, out, f"{settings} {extra}")
        texts[name] = (out / "metrics.jsonl").read_text()
    assert texts["half"] == texts["half loaded"] != texts["all"]
