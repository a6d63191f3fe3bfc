"""Export to LoRA files: names of tensors, the file, the command, and readers of other tools that find them."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adapted_models import randomize
from adapter_files import ModelsOnDisk, write_models
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionXLPipeline
from exported import adapted_pipeline, expected_updates, relative
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import (
    POOLED_WIDTH,
    tiny_pipeline,
    tiny_projecting_text_encoder,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_unet_sdxl,
    tiny_vae,
)
from torch import Tensor, nn

from svft_diffusion import SVFTConfig
from svft_diffusion.adapters import add_training_adapter, set_adapters
from svft_diffusion.cli import main
from svft_diffusion.exchange.export import export_lora
from svft_diffusion.exchange.lora_file import write_lora
from svft_diffusion.exchange.lora_keys import Format, NoName, layer_key
from svft_diffusion.files import read_header

# Names

KOHYA_KEY = re.compile(
    r"lora_(unet_(conv_in|conv_out|time_embedding_linear_[12]|label_emb_0_[02]"
    r"|((down|up)_blocks_\d+|mid_block)_((resnets_\d+_(conv1|conv2|conv_shortcut|time_emb_proj))|(down|up)samplers_0_conv"
    r"|attentions_\d+_(proj_in|proj_out|transformer_blocks_\d+_(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2)))))"
    r"|te[12]?_text_model_encoder_layers_\d+_(self_attn_(q|k|v|out)_proj|mlp_fc[12]))"
    r"\.(lora_down\.weight|lora_up\.weight|alpha)"
)
DIFFUSERS_KEY = re.compile(
    r"(unet\.[a-z0-9_.]+|text_encoder(_2)?\.text_model\.encoder\.layers\.\d+\.(self_attn|mlp)\.\w+)\.lora_[AB]\.weight"
)


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        text_encoder_2=tiny_projecting_text_encoder(),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=tiny_unet_sdxl(),
        scheduler=EulerDiscreteScheduler(),
    )


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_sdxl_is_read_by_diffusers_with_both_text_encoders(format: str, tmp_path: Path) -> None:
    pipe = sdxl_pipeline()
    for component in ("unet", "text_encoder", "text_encoder_2"):
        config = SVFTConfig(targets="all", train_norm=False)
        add_training_adapter({component: getattr(pipe, component)}, config, "a")
        randomize(getattr(pipe, component), "a")
    exported = export_lora(pipe, "a", format=format, rank="full")  # type: ignore[arg-type]
    updates = expected_updates(pipe)
    held = {layer.layer for layer in exported.report.layers}
    assert {name for name in updates if name.startswith("unet.")} <= held
    assert {entry.layer.rpartition(".")[2] for entry in exported.report.left_out} == {
        "token_embedding", "position_embedding", "text_projection"
    }  # fmt: skip
    pattern = KOHYA_KEY if format == "kohya" else DIFFUSERS_KEY
    assert all(pattern.fullmatch(name) for name in exported.tensors)
    if format == "kohya":
        assert {name.split("_text_")[0] for name in exported.tensors if "_te" in name[:8]} == {"lora_te1", "lora_te2"}
    other = sdxl_pipeline()
    other.load_lora_weights(str(write_lora(exported, tmp_path / "lora.safetensors")))
    loaded = lora_updates(other)
    assert loaded.keys() == held
    assert max(relative(loaded[name], updates[name]) for name in held) <= 2e-6
    assert other.text_encoder_2.config.hidden_size == POOLED_WIDTH


def lora_updates(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """What the LoRAs of a pipeline change, by the canonical names of their layers."""
    found = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        for path, module in getattr(getattr(pipe, component, None), "named_modules", dict)() or ():
            if isinstance(module, LoraLayer) and component == "unet":
                found[f"{component}.{path}"] = module.get_delta_weight("default_0").detach()
            elif isinstance(module, LoraLayer):
                path = path if path.startswith("text_model.") else f"text_model.{path}"
                found[f"{component}.{path}"] = module.get_delta_weight("default_0").detach()
    return found


TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FC1 = "text_model.encoder.layers.3.mlp.fc1"


@pytest.mark.parametrize(
    ("format", "layer", "components", "expected"),
    [
        ("kohya", f"unet.{TO_Q}", "unet", "lora_unet_" + TO_Q.replace(".", "_")),
        ("kohya", "unet.mid_block.attentions.0.to_q", "unet", None),
        ("diffusers", "unet.mid_block.attentions.0.to_q", "unet", "unet.mid_block.attentions.0.to_q"),
        ("kohya", f"text_encoder.{FC1}", "unet text_encoder", "lora_te_text_model_encoder_layers_3_mlp_fc1"),
        ("kohya", f"text_encoder.{FC1}", "text_encoder text_encoder_2", "lora_te1_text_model_encoder_layers_3_mlp_fc1"),
        ("kohya", f"text_encoder_2.{FC1}", "text_encoder_2", "lora_te2_text_model_encoder_layers_3_mlp_fc1"),
        ("diffusers", f"text_encoder_2.{FC1}", "text_encoder_2", f"text_encoder_2.{FC1}"),
        ("kohya", "text_encoder.text_model.final_layer_norm", "text_encoder", None),
        ("kohya", "text_encoder.encoder.block.0.layer.0.SelfAttention.q", "text_encoder", None),
        ("comfy-full", "text_encoder.encoder.block.0.layer.0.SelfAttention.q", "text_encoder", None),
        ("comfy-full", "text_encoder.text_model.a", "text_encoder", "text_encoders.clip_h.transformer.text_model.a"),
        (
            "comfy-full", "text_encoder.text_model.a", "text_encoder text_encoder_2",
            "text_encoders.clip_l.transformer.text_model.a",
        ),
        (
            "comfy-full", "text_encoder_2.text_model.a", "text_encoder text_encoder_2",
            "text_encoders.clip_g.transformer.text_model.a",
        ),
        ("diffusers", "transformer.blocks.0.attn.to_q", "transformer", "transformer.blocks.0.attn.to_q"),
        ("kohya", "transformer.blocks.0.attn.to_q", "transformer", None),
        ("diffusers", "text_encoder_3.encoder.a", "text_encoder_3", None),
    ],
)  # fmt: skip
def test_names_of_layers(format: Format, layer: str, components: str, expected: str | None) -> None:
    of_sd2 = nn.Module()
    of_sd2.config = SimpleNamespace(hidden_size=1024)  # type: ignore[assignment]
    found = layer_key(format, layer, dict.fromkeys(components.split(), of_sd2))
    assert found == expected if expected else isinstance(found, NoName) and found.reason


# Through diffusers' own loader, in a process that knows nothing of this package

READER = """
import sys, json
import numpy as np, torch
from diffusers import StableDiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

torch.set_num_threads(1)
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
for file in sys.argv[2:]:
    pipe.load_lora_weights(file)
    generator = torch.Generator().manual_seed(1)
    image = pipe("a photo of sks dog", num_inference_steps=3, generator=generator, output_type="np").images[0]
    np.save(file + ".npy", image)
    name = pipe.get_active_adapters()[0]
    updates = {}
    for component in ("unet", "text_encoder"):
        for path, module in getattr(pipe, component).named_modules():
            if isinstance(module, LoraLayer):
                level = "" if component == "unet" or path.startswith("text_model.") else "text_model."
                updates[f"{component}.{level}{path}"] = module.get_delta_weight(name).detach().contiguous()
    save_file(updates, file + ".updates")
    pipe.unload_lora_weights()
assert not [name for name in sys.modules if name.startswith("svft")]
"""
READ = [
    ("svft plain", "kohya"),
    ("svft banded", "diffusers"),
    ("svdiff", "kohya"),
    ("svdiff", "diffusers"),
]


def picture(pipe: DiffusionPipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(1)
    result = pipe("a photo of sks dog", num_inference_steps=3, generator=generator, output_type="np")
    image: np.ndarray = result.images[0]
    return image


@pytest.fixture(scope="module")
def read_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with exports, and what a process of its own drew with each."""
    folder = tmp_path_factory.mktemp("exports")
    tiny_pipeline().save_pretrained(folder / "base")
    files = []
    for config, format in READ:
        exported = export_lora(adapted_pipeline(config, scale=1.0), "a", format=format, rank="full")  # type: ignore[arg-type]
        assert all((KOHYA_KEY if format == "kohya" else DIFFUSERS_KEY).fullmatch(name) for name in exported.tensors)
        files.append(write_lora(exported, folder / f"{config} {format}.safetensors"))
    command = [sys.executable, "-c", READER, str(folder / "base"), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize(("config", "format"), READ)
def test_diffusers_draws_the_same_picture(read_files: Path, config: str, format: str) -> None:
    pipe = adapted_pipeline(config, scale=1.0)
    updates, loaded = expected_updates(pipe), load_file(read_files / f"{config} {format}.safetensors.updates")
    assert loaded.keys() == updates.keys()
    assert any(name.startswith("text_encoder.") for name in loaded)
    assert max(relative(loaded[name], updates[name]) for name in updates) <= 2e-6
    expected = picture(pipe)
    set_adapters(pipe, {"a": 0.0})
    base = picture(pipe)
    found = np.load(read_files / f"{config} {format}.safetensors.npy")
    assert np.abs(expected - base).mean() >= 10 * 1e-3
    assert np.abs(found - expected).mean() <= 1e-3


# The file


def test_equal_exports_give_equal_bytes_and_say_what_they_are(tmp_path: Path) -> None:
    pipe = adapted_pipeline("svft plain")
    exported, again = export_lora(pipe, "a", rank=2), export_lora(pipe, "a", rank=2)
    turned = replace(
        again,
        tensors=dict(reversed(again.tensors.items())),
        metadata=dict(reversed(again.metadata.items())),
    )
    files = [
        write_lora(content, tmp_path / folder / "dog.safetensors")
        for folder, content in (("a", exported), ("b", turned))
    ]
    content = files[0].read_bytes()
    assert content == files[1].read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0
    with safe_open(files[0], framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "2"
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2"}
    assert metadata["ss_output_name"] == metadata["modelspec.title"] == "dog"
    assert metadata["sshs_model_hash"] == hashlib.sha256(content[8 + size :]).hexdigest()
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert "ss_base_model_version" not in metadata, "no tool knows this base"
    assert str(tmp_path) not in content[8 : 8 + size].decode()


@pytest.mark.parametrize(
    ("width", "prediction", "version", "architecture", "is_v2"),
    [
        (768, "epsilon", "sd_v1", "stable-diffusion-v1/lora", "False"),
        (1024, "epsilon", "sd_v2", "stable-diffusion-v2-512/lora", "True"),
        (1024, "v_prediction", "sd_v2_768_v", "stable-diffusion-v2-768-v/lora", "True"),
        (2048, "epsilon", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "False"),
    ],
)
def test_known_bases_are_named(width: int, prediction: str, version: str, architecture: str, is_v2: str) -> None:
    unet = tiny_unet(cross_attention_dim=width)
    add_training_adapter({"unet": unet}, SVFTConfig(targets="cross-attention"), "a")
    randomize(unet, "a")
    scheduler = EulerDiscreteScheduler(prediction_type=prediction)
    metadata = export_lora({"unet": unet, "scheduler": scheduler}, "a", rank=1).metadata
    assert metadata["ss_base_model_version"] == version and metadata["ss_v2"] == is_v2
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["modelspec.prediction_type"] == prediction.removesuffix("_prediction")


# The command


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def command() -> Callable[..., int]:
    return lambda *arguments: main.main(["export", *map(str, arguments)])


def test_the_command_writes_and_reports(
    models: ModelsOnDisk, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "dog.safetensors"
    assert command(models.dog.parent, "--base", models.base, "--rank", "full", "-o", out) == 0
    printed = capsys.readouterr().out
    assert "relative error in total: 0.00e+00" in printed and f"{out}: " in printed
    with safe_open(out, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_sd_model_name"] == read_header(models.dog).base.name == "tiny"
    assert metadata["modelspec.trigger_phrase"] == "sks"
    first = out.read_bytes()
    assert command(models.dog, "--base", models.base, "--rank", "full", "-o", out, "--overwrite") == 0
    assert out.read_bytes() == first
    capsys.readouterr()
    arguments = ("--base", models.base, "--rank", 2, "--strength", 0.5, "--format", "diffusers", "--json")
    assert command(models.dog, *arguments, "-o", tmp_path / "other.safetensors") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rank"] == 2 and report["strength"] == 0.5 and 0 < report["total_error"] < 1
    assert report["layers"][0].keys() == {"layer", "norm", "rank", "dropped", "error"}


def test_bad_input_is_one_line_and_exit_code_2(
    models: ModelsOnDisk, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "page.safetensors").write_text("<!doctype html>")
    (tmp_path / "file").touch()
    save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    there = tmp_path / "there.safetensors"
    there.write_text("mine")
    out, dog, base = tmp_path / "out.safetensors", models.dog, models.base
    cases: list[tuple[tuple[object, ...], str]] = [
        ((tmp_path / "none.safetensors", "--base", base, "-o", out), "can't read"),
        ((tmp_path, "--base", base, "-o", out), "can't read"),
        ((tmp_path / "empty.safetensors", "--base", base, "-o", out), "not a safetensors file"),
        ((tmp_path / "page.safetensors", "--base", base, "-o", out), "not a safetensors file"),
        ((tmp_path / "lora.safetensors", "--base", base, "-o", out), "not an svft_diffusion adapter"),
        ((dog, "--base", models.other_base, "-o", out), "trained on"),
        ((dog, "--base", tmp_path / "nowhere", "-o", out), "nowhere"),
        ((dog, "--base", base, "-o", there), "is there already"),
        ((dog, "--base", base, "-o", tmp_path / "out.bin"), "must end in .safetensors"),
        ((dog, "--base", base, "-o", dog, "--overwrite"), "is one of the files to read"),
        ((dog, "--base", base, "-o", tmp_path / "file" / "out.safetensors"), "can't write"),
        ((dog, "--base", base, "-o", out, "--rank", 0), "rank must be"),
        ((dog, "--base", base, "-o", out, "--strength", "nan"), "strength must be"),
    ]
    for arguments, message in cases:
        assert command(*arguments) == 2, arguments
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ") and message in printed.err, (arguments, printed.err)
        assert printed.err.count("\n") == 1 and printed.out == ""
    for wrong in (("--rank", "most"), ("--format", "webui"), ("--rnk", "2")):
        with pytest.raises(SystemExit, match="2"):
            command(dog, "--base", base, "-o", out, *wrong)
        assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists() and there.read_text() == "mine"
