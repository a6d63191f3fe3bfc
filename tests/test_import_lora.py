"""A LoRA in any spelling becomes the nearest adapter with a pattern, and the error is stated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_files import write_models
from foreign_files import (
    ATTENTION,
    LINEAR,
    Base,
    kohya_file,
    lora_factors,
    relative,
    update_of,
    updates,
    written,
)
from peft import LoraConfig, get_peft_model
from tiny_models import (
    tiny_pipeline,
    tiny_projecting_text_encoder,
    tiny_text_encoder,
    tiny_unet,
    tiny_unet_sdxl,
)
from torch import Tensor, nn

from svft_diffusion.adapters.targets import adaptable_layers
from svft_diffusion.cli import import_adapter as command
from svft_diffusion.exchange.importing import import_adapter
from svft_diffusion.files import read_header

CONVOLUTIONS = ("down_blocks.0.resnets.0.conv1", "down_blocks.1.resnets.0.conv_shortcut", "conv_in")
ENCODER = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1")


def best_entries(model: nn.Module, path: str, update: Tensor, pattern: str, off_diagonals: int) -> Tensor:
    """The nearest update with a pattern, by dense products."""
    layer = model.get_submodule(path)
    U, S, Vh = layer.factors.U.double(), layer.factors.S, layer.factors.Vh.double()
    core, k = U.T @ update @ Vh.T, len(S)
    if pattern == "random":
        count = k * (2 * off_diagonals + 1) - off_diagonals * (off_diagonals + 1)
        mask = core.abs() >= core.abs().flatten().sort(descending=True).values[count - 1]
    else:
        mask = (torch.arange(k)[None] - torch.arange(k)[:, None]).abs() <= off_diagonals
    return U @ (core * mask) @ Vh


@pytest.mark.parametrize(("pattern", "off_diagonals"), [("plain", 0), ("banded", 1), ("banded", 3), ("random", 2)])
def test_lora_becomes_the_nearest_adapter_and_states_the_error(tmp_path, pattern, off_diagonals):
    base = Base(tmp_path)
    factors = lora_factors(base.models["unet"], [*LINEAR, *CONVOLUTIONS])
    file = kohya_file(tmp_path / "lora.safetensors", "lora_unet", factors, alpha=6.0)
    report = import_adapter(base.models, file, pattern=pattern, off_diagonals=off_diagonals)
    fresh = base.saved_and_loaded(report)
    found = updates(fresh["unet"], "imported")
    reported = {layer.layer: layer for layer in report.layers}
    lost = whole = 0.0
    for path, (up, down) in factors.items():
        update = update_of(up, down, 2.0)
        assert relative(found[path], best_entries(fresh["unet"], path, update, pattern, off_diagonals)) <= 1e-5
        assert reported[f"unet.{path}"].error == pytest.approx(relative(found[path], update), rel=1e-3, abs=1e-6)
        assert reported[f"unet.{path}"].size == pytest.approx(float(update.norm()), rel=1e-5)
        lost, whole = lost + float((found[path] - update).square().sum()), whole + float(update.square().sum())
    assert report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3) and 0.1 < report.error < 1


def test_lora_that_a_pattern_holds_is_exact(tmp_path):
    base = Base(tmp_path)
    factors = lora_factors(base.models["unet"], ["down_blocks.0.resnets.0.conv1"])  # 16 x 144
    file = kohya_file(tmp_path / "lora.safetensors", "lora_unet", factors)
    report = import_adapter(base.models, file, pattern="random", off_diagonals=15)  # all 16 x 16 entries
    found = updates(base.saved_and_loaded(report)["unet"], "imported")["down_blocks.0.resnets.0.conv1"]
    left_of_rows = relative(found, update_of(*factors["down_blocks.0.resnets.0.conv1"]))
    assert report.error == pytest.approx(left_of_rows, rel=1e-3), "144 columns, of which 16 directions are in the basis"
    layer = base.models["unet"].get_submodule(LINEAR[0])
    U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    values = torch.zeros_like(S)
    values[:3] = torch.tensor([0.5, -0.3, 0.2])
    sparse = {LINEAR[0]: ((U * values)[:, :3], Vh[:3])}
    report = import_adapter(
        base.models, kohya_file(tmp_path / "plain.safetensors", "lora_unet", sparse), pattern="plain"
    )
    assert report.error < 1e-4
    assert relative(updates(base.models["unet"], report.adapter)[LINEAR[0]], update_of(*sparse[LINEAR[0]])) < 1e-4


def test_tucker_factors_of_a_convolution_are_multiplied(tmp_path):
    base = Base(tmp_path)
    path, generator = "down_blocks.0.resnets.0.conv1", torch.Generator().manual_seed(0)
    up, mid, down = (torch.randn(*size, generator=generator) for size in ((16, 2, 1, 1), (2, 2, 3, 3), (2, 16, 1, 1)))
    name = f"lora_unet_{path.replace('.', '_')}"
    file = written(
        tmp_path / "lora.safetensors",
        {f"{name}.lora_up.weight": up, f"{name}.lora_mid.weight": mid, f"{name}.lora_down.weight": down},
    )
    report = import_adapter(base.models, file, pattern="banded")
    dense = torch.einsum("op,pqhw,qc->ochw", up[..., 0, 0], mid, down[..., 0, 0]).double().flatten(1)
    found = updates(base.models["unet"], report.adapter)[path]
    assert relative(found, best_entries(base.models["unet"], path, dense, "banded", 2)) <= 1e-5


def test_every_spelling_of_a_lora_gives_the_same_adapter(tmp_path):
    unet_paths, found = LINEAR[:2], {}
    factors = lora_factors(tiny_unet(), unet_paths)
    encoder = lora_factors(tiny_pipeline().text_encoder, [_in_encoder(path) for path in ENCODER], seed=6)
    old = {"q_proj": "to_q", "fc1": "fc1"}
    spellings = {
        "kohya": lambda part, path: f"lora_{part}_{path.replace('.', '_')}.lora_{{}}.weight",
        "diffusers": lambda part, path: f"{_component(part)}.{path}.lora_{{ab}}.weight",
        "dotted": lambda part, path: f"{_component(part)}.{path}.lora.{{}}.weight",
        "linear_layer": lambda part, path: f"{_component(part)}.{_older(path, old)}.lora_linear_layer.{{}}.weight",
        "bare": lambda part, path: f"base_model.model.{path}.lora_{{ab}}.weight",
    }
    for spelling, name in spellings.items():
        tensors = {}
        for part, of_part in (("unet", factors), ("te", encoder)):
            for path, (up, down) in of_part.items():
                path = path if part == "unet" else "text_model." + path.removeprefix("text_model.")
                tensors[name(part, path).replace("{}", "up").replace("{ab}", "B")] = up
                tensors[name(part, path).replace("{}", "down").replace("{ab}", "A")] = down
        base = Base(tmp_path)
        report = import_adapter(base.models, written(tmp_path / f"{spelling}.safetensors", tensors))
        assert len(report.layers) == 4 and not report.left_out, spelling
        found[spelling] = {c: updates(model, report.adapter) for c, model in base.models.items()}
    for spelling, by_component in found.items():
        for component, by_path in by_component.items():
            for path, update in by_path.items():
                assert torch.equal(update, found["kohya"][component][path]), spelling


def _in_encoder(path: str) -> str:
    names = dict(tiny_pipeline().text_encoder.named_modules())
    return path if path in names else f"text_model.{path}"


def _component(part: str) -> str:
    return {"unet": "unet", "te": "text_encoder"}[part]


def _older(path: str, old: dict[str, str]) -> str:
    parent, _, last = path.removesuffix(".0").rpartition(".")
    return f"{parent}.{old.get(last, last)}"


def test_processors_of_old_diffusers_files_are_read(tmp_path):
    base = Base(tmp_path)
    (up, down) = lora_factors(base.models["unet"], [LINEAR[0]])[LINEAR[0]]
    name = f"unet.{ATTENTION}.processor.to_q_lora"
    file = written(tmp_path / "old.safetensors", {f"{name}.up.weight": up, f"{name}.down.weight": down})
    assert [layer.layer for layer in import_adapter(base.models, file).layers] == [f"unet.{LINEAR[0]}"]


def test_alpha_of_a_file_that_diffusers_saved_is_in_its_header(tmp_path):
    pipe = tiny_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=5, target_modules=["to_q"], init_lora_weights="gaussian"))
    expected = {}
    for path, module in pipe.unet.named_modules():
        if hasattr(module, "lora_A"):
            nn.init.normal_(module.lora_B["default"].weight, std=0.3)
            expected[path] = update_of(
                module.lora_B["default"].weight.detach(), module.lora_A["default"].weight.detach(), 2.5
            )
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet)),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )
    base = Base(tmp_path)
    report = import_adapter(base.models, tmp_path / "pytorch_lora_weights.safetensors")
    sizes = {layer.layer: layer.size for layer in report.layers}
    assert sizes == {f"unet.{path}": pytest.approx(float(update.norm()), rel=1e-5) for path, update in expected.items()}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8 / 2**0.5)])
def test_alpha_of_a_file_that_peft_saved_lies_beside_it(tmp_path, rslora, scale):
    config = LoraConfig(r=2, lora_alpha=8, use_rslora=rslora, target_modules=["to_q"], init_lora_weights=False)
    get_peft_model(tiny_unet(), config).save_pretrained(tmp_path)
    base = Base(tmp_path)
    report = import_adapter(base.models, tmp_path / "adapter_model.safetensors")
    plain = tmp_path / "elsewhere" / "adapter_model.safetensors"
    plain.parent.mkdir()
    plain.write_bytes((tmp_path / "adapter_model.safetensors").read_bytes())
    without = import_adapter(Base(tmp_path).models, plain)
    assert report.layers and without.layers
    for layer, other in zip(report.layers, without.layers, strict=True):
        assert layer.size == pytest.approx(scale * other.size, rel=1e-5)


def test_kohya_files_for_sdxl_name_the_blocks_of_the_original_unet(tmp_path):
    unet = tiny_unet_sdxl()
    names = {
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_3_1_transformer_blocks_1_ff_net_2": "down_blocks.1.attentions.0.transformer_blocks.1.ff.net.2",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_0_0_skip_connection": "up_blocks.0.resnets.0.conv_shortcut",
        "output_blocks_1_2_conv": "up_blocks.0.upsamplers.0.conv",
        "time_embed_0": "time_embedding.linear_1",
        "label_emb_0_2": "add_embedding.linear_2",
        "out_2": "conv_out",
    }
    factors = lora_factors(unet, names.values())
    tensors = {}
    for name, path in names.items():
        tensors |= {f"lora_unet_{name}.lora_up.weight": factors[path][0]}
        tensors |= {
            f"lora_unet_{name}.lora_down.weight": factors[path][1],
            f"lora_unet_{name}.alpha": torch.tensor(3.0),
        }
    report = import_adapter({"unet": unet}, written(tmp_path / "sdxl.safetensors", tensors))
    sizes = {layer.layer: layer.size for layer in report.layers}
    assert sizes == {
        f"unet.{path}": pytest.approx(float(update_of(*factors[path]).norm()), rel=1e-5) for path in names.values()
    }


def test_what_a_lora_has_beyond_the_base_is_left_out_and_counts_as_lost(tmp_path):
    base = Base(tmp_path)
    factors = lora_factors(base.models["unet"], LINEAR)
    foreign = {"lora_unet_somewhere_else.lora_up.weight": 3 * torch.ones(4, 2)}
    foreign |= {
        "lora_unet_somewhere_else.lora_down.weight": torch.ones(2, 5),
        "lora_unet_conv_in.diff_b": torch.ones(16),
    }
    whole = {
        f"lora_unet_{path.replace('.', '_')}.lora_{part}.weight": tensor
        for path, pair in factors.items()
        for part, tensor in zip(("up", "down"), pair, strict=True)
    }
    file = written(tmp_path / "lora.safetensors", whole | foreign)
    report = import_adapter(base.models, file)
    assert report.left_out.keys() == {"lora_unet_somewhere_else", "lora_unet_conv_in.diff_b"}
    lost = sum((layer.size * layer.error) ** 2 for layer in report.layers) + 36 * 20 + 16
    size = sum(layer.size**2 for layer in report.layers) + 36 * 20 + 16
    assert report.error == pytest.approx((lost / size) ** 0.5, rel=1e-6)
    assert any("somewhere_else" in line for line in report.lines())


def test_every_adaptable_layer_has_one_name_in_kohyas_spelling(tmp_path):
    base = Base(tmp_path)
    paths = [path for path, kind in adaptable_layers(base.models["unet"]).items() if kind in ("linear", "convolution")]
    file = kohya_file(tmp_path / "all.safetensors", "lora_unet", lora_factors(base.models["unet"], paths, rank=1))
    report = import_adapter(base.models, file)
    assert {layer.layer for layer in report.layers} == {f"unet.{path}" for path in paths} and not report.left_out


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]
)
def test_factors_of_any_floating_type_are_read(tmp_path, dtype):
    factors = {
        path: (up.to(dtype), down.to(dtype)) for path, (up, down) in lora_factors(tiny_unet(), [LINEAR[0]]).items()
    }
    base = Base(tmp_path)
    report = import_adapter(base.models, kohya_file(tmp_path / "lora.safetensors", "lora_unet", factors, alpha=1.0))
    (up, down) = factors[LINEAR[0]]
    update = update_of(up, down, 1 / 3)
    found = updates(base.saved_and_loaded(report)["unet"], "imported")[LINEAR[0]]
    assert relative(found, best_entries(base.models["unet"], LINEAR[0], update, "random", 2)) <= 1e-5
    assert report.layers[0].size == pytest.approx(float(update.norm()), rel=1e-5)


def test_both_text_encoders_of_sdxl_are_found_by_kohyas_names(tmp_path):
    models = {"text_encoder": tiny_text_encoder(), "text_encoder_2": tiny_projecting_text_encoder()}
    tensors, sizes = {}, {}
    for component, prefix in (("text_encoder", "lora_te1"), ("text_encoder_2", "lora_te2")):
        path = _path_in(models[component], ENCODER[0])
        (up, down) = lora_factors(models[component], [path], seed=len(prefix + component))[path]
        name = f"{prefix}_text_model_{ENCODER[0].replace('.', '_')}"
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(6.0)}
        sizes[f"{component}.text_model.{ENCODER[0]}"] = float(update_of(up, down, 2.0).norm())
    report = import_adapter(models, written(tmp_path / "lora.safetensors", tensors))
    assert {layer.layer: layer.size for layer in report.layers} == pytest.approx(sizes, rel=1e-5)


def _path_in(model: nn.Module, path: str) -> str:
    return path if path in dict(model.named_modules()) else f"text_model.{path}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_lora_is_imported_to_a_base_in_16_bit(tmp_path, dtype):
    base = Base(tmp_path)
    base.models["unet"].to(dtype)
    factors = lora_factors(tiny_unet(), [LINEAR[2], CONVOLUTIONS[0]])
    report = import_adapter(base.models, kohya_file(tmp_path / "lora.safetensors", "lora_unet", factors))
    reported = {layer.layer: layer.error for layer in report.layers}
    for path, found in updates(base.models["unet"], report.adapter).items():
        update = update_of(*factors[path])
        assert relative(found, best_entries(base.models["unet"], path, update, "random", 2)) <= 1e-5
        assert reported[f"unet.{path}"] == pytest.approx(relative(found, update), rel=1e-3)


# What a file says of itself


def described_file(folder: Path, metadata: dict[str, str]) -> Path:
    (up, down) = lora_factors(tiny_unet(), [LINEAR[0]])[LINEAR[0]]
    name = f"lora_unet_{LINEAR[0].replace('.', '_')}"
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    return written(folder / "lora.safetensors", tensors, metadata)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, (None, None, None)),
        ({"modelspec.title": "Robot", "ss_output_name": "robot_v2"}, ("Robot", None, None)),
        ({"modelspec.title": " \n", "ss_output_name": "robot_v2"}, ("robot_v2", None, None)),
        ({"ss_output_name": "/home/bob/loras/robot"}, ("robot", None, None)),
        ({"ss_output_name": "C:\\Users\\bob\\robot"}, ("robot", None, None)),
        ({"modelspec.trigger_phrase": "sks\u202e\trobot\n\x1b[31m"}, (None, "sks robot [31m", None)),
        ({"modelspec.description": "A\r\nrobot."}, (None, None, "A robot.")),
        ({"modelspec.usage_hint": "suggested weight 0.8"}, (None, None, "usage: suggested weight 0.8")),
        (
            {"modelspec.description": "A robot.", "modelspec.usage_hint": "0.8"},
            (None, None, "A robot.; usage: 0.8"),
        ),
        ({"modelspec.title": "t" * 300}, ("t" * 197 + "...", None, None)),
        ({"modelspec.description": "d" * 100_000}, (None, None, "d" * 1997 + "...")),
    ],
)
def test_what_a_file_says_of_itself_is_kept_as_text(tmp_path, metadata, expected):
    said = import_adapter(Base(tmp_path).models, described_file(tmp_path, metadata)).labels
    assert (said.title, said.trigger, said.description) == expected


def test_the_command_keeps_what_a_file_says(tmp_path, capsys):
    models = write_models(tmp_path / "models")
    said = {"modelspec.title": "Robot", "modelspec.trigger_phrase": "sks robot", "modelspec.usage_hint": "0.8"}
    output = tmp_path / "out.safetensors"
    file = described_file(tmp_path, said)
    command.run([str(file), "--base", str(models.base), "-o", str(output)])
    assert "the file says, trigger: sks robot" in capsys.readouterr().out
    header = read_header(output)
    assert (header.title, header.trigger, header.description) == ("Robot", "sks robot", "usage: 0.8")
    assert header.suggested_strength == 1.0, "a stranger's hint sets nothing"
    command.run([str(file), "--base", str(models.base), "-o", str(output), "--overwrite", "--json"])
    assert json.loads(capsys.readouterr().out)["labels"]["title"] == "Robot"
