"""Export to LoRA files: names of tensors, the file, the command, and readers of other tools that find them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapted_models import randomize
from adapter_files import ModelsOnDisk, write_models
from diffusers import EulerDiscreteScheduler
from exported import adapted_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import (
    tiny_unet,
)
from torch import nn

from svft_diffusion import SVFTConfig
from svft_diffusion.adapters import add_training_adapter
from svft_diffusion.cli import main
from svft_diffusion.exchange.export import export_lora
from svft_diffusion.exchange.lora_file import write_lora
from svft_diffusion.exchange.lora_keys import Format, NoName, layer_key
from svft_diffusion.files import read_header

# Names

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
        ("kohya", "text_encoder_2.text_projection", "text_encoder text_encoder_2", None),
        ("comfy-full", "text_encoder_2.text_projection", "text_encoder text_encoder_2", "lora_te2_text_projection"),
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
    total = re.search(r"relative error in total: (\S+)\n", printed)
    assert total and 0 < float(total[1]) < 1e-7 and f"wrote {out} (" in printed
    with safe_open(out, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_sd_model_name"] == read_header(models.dog).base.name == "tiny"
    assert metadata["modelspec.trigger_phrase"] == "sks"
    first = out.read_bytes()
    assert "was cut" not in printed
    assert command(models.dog, "--base", models.base, "--rank", "99999", "-o", out, "--overwrite") == 0
    assert out.read_bytes() == first
    rank = metadata["ss_network_dim"]
    assert f"rank 99999 was cut to {rank}, that of the adapter: more would add only zeros" in capsys.readouterr().out
    capsys.readouterr()
    arguments = ("--base", models.base, "--rank", 2, "--strength", 0.5, "--format", "diffusers", "--json")
    assert command(models.dog, *arguments, "-o", tmp_path / "other.safetensors") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rank"] == 2 and report["strength"] == 0.5 and 0 < report["total_error"] < 1
    assert report["output"] == str(tmp_path / "other.safetensors")
    assert report["layers"][0].keys() == {"layer", "norm", "rank", "dropped", "rounding", "error"}


def test_the_command_writes_half_the_bytes_in_float16(
    models: ModelsOnDisk, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    assert command(models.dog, "--base", models.base, "--rank", "full", "-o", whole) == 0
    capsys.readouterr()
    arguments = ("--base", models.base, "--rank", "full", "--dtype", "float16", "--json")
    assert command(models.dog, *arguments, "-o", half) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dtype"] == "float16" and 1e-5 < report["total_error"] < 1e-3 and report["rank_error"] < 1e-7
    exact, rounded = load_file(whole), load_file(half)
    assert exact.keys() == rounded.keys()
    sizes = {False: 0, True: 0}
    for name, tensor in rounded.items():
        assert torch.equal(tensor, exact[name].to(tensor.dtype))
        if not name.endswith(".alpha"):
            assert tensor.dtype == torch.float16
            sizes[False] += exact[name].nbytes
            sizes[True] += tensor.nbytes
    assert sizes[False] == 2 * sizes[True]


def test_learned_tokens_are_named_as_left_out(
    models: ModelsOnDisk,
    command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    header = replace(read_header(models.dog), tokens={"text_encoder": ["<dog>", "<dog>_1"]})
    monkeypatch.setattr("svft_diffusion.files.read_header", lambda file: header)
    assert command(models.dog, "--base", models.base, "-o", tmp_path / "a.safetensors") == 0
    assert "left out: tokens that text_encoder learned (<dog>, <dog>_1)" in capsys.readouterr().out
    assert command(models.dog, "--base", models.base, "-o", tmp_path / "b.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out)["left_out_tokens"] == {"text_encoder": ["<dog>", "<dog>_1"]}


@pytest.mark.usefixtures("no_hub")
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
        ((tmp_path, "--base", base, "-o", out), "is a folder"),
        ((tmp_path / "empty.safetensors", "--base", base, "-o", out), "is empty"),
        ((tmp_path / "page.safetensors", "--base", base, "-o", out), "is a web page"),
        ((tmp_path / "lora.safetensors", "--base", base, "-o", out), "not an svft_diffusion adapter"),
        ((dog, "--base", models.other_base, "-o", out), "trained on"),
        ((dog, "--base", tmp_path / "nowhere", "-o", out), "nowhere"),
        ((dog, "-o", out), "say with --base where the base model is"),
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
    for wrong in (("--rank", "most"), ("--format", "webui"), ("--dtype", "int8"), ("--rnk", "2")):
        with pytest.raises(SystemExit, match="2"):
            command(dog, "--base", base, "-o", out, *wrong)
        assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists() and there.read_text() == "mine"
