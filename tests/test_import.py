"""Adapters of SVDiff and SVFT in their authors' formats become ours with the same outputs; the import command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import output_of
from adapter_files import write_models
from foreign_files import (
    ATTENTION,
    Base,
    OfficialSVFT,
    kohya_file,
    lora_factors,
    relative,
    svdiff_deltas,
    svdiff_model,
    svft_state,
    updates,
    written,
)
from tiny_models import tiny_inputs, tiny_pipeline, tiny_pipeline_sdxl, tiny_tokens, tiny_unet, tiny_unet_sd1
from torch import nn

from svft_diffusion import load_adapter, save_adapter, set_adapters
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.adapters.targets import linear_layers
from svft_diffusion.cli import import_adapter as command
from svft_diffusion.exchange.importing import ImportReport, import_adapter
from svft_diffusion.files import read_header
from svft_diffusion.models import family_of

# SVDiff of svdiff-pytorch


@pytest.mark.parametrize("strength", [0.5, 1.2])
@pytest.mark.parametrize("make_unet", [tiny_unet, tiny_unet_sd1])
def test_community_svdiff_gives_the_outputs_of_its_own_formula(tmp_path, make_unet, strength):
    base = Base(tmp_path, make_unet())
    originals = {"unet": make_unet(), "text_encoder": tiny_pipeline().text_encoder}
    deltas = {component: svdiff_deltas(model) for component, model in originals.items()}
    files = [
        written(tmp_path / "spectral_shifts.safetensors", deltas["unet"]),
        written(tmp_path / "spectral_shifts_te.safetensors", deltas["text_encoder"]),
    ]
    report = import_adapter(base.models, files)
    assert len(report.layers) == sum(map(len, deltas.values())) and report.error == 0 and not report.left_out
    fresh = base.saved_and_loaded(report, unet=make_unet())
    set_adapters(fresh, {"imported": strength})
    for component, inputs in (("unet", tiny_inputs()), ("text_encoder", tiny_tokens())):
        expected = output_of(svdiff_model(originals[component], deltas[component], strength), inputs)
        found, before = output_of(fresh[component], inputs), output_of(originals[component], inputs)
        assert relative(found, expected) <= 1e-5
        assert strength == 0 or relative(before, expected) > 0.01


def test_svdiff_adapts_exactly_the_layers_of_the_file(tmp_path):
    base = Base(tmp_path)
    deltas = svdiff_deltas(tiny_unet(), norms=False)  # as versions 0.1 have it
    del deltas[f"{ATTENTION}.to_q.delta"]
    report = import_adapter(base.models, written(tmp_path / "old.safetensors", deltas))
    fresh = base.saved_and_loaded(report)
    assert set(spectral_layers(fresh["unet"])) == {name.removesuffix(".delta") for name in deltas}
    assert not spectral_layers(fresh["text_encoder"])


@pytest.mark.parametrize("level", ["text_model.", ""])
def test_svdiff_of_a_text_encoder_is_read_with_and_without_the_level_text_model(tmp_path, level):
    base = Base(tmp_path)
    encoder = tiny_pipeline().text_encoder
    deltas = svdiff_deltas(encoder)
    named = {level + name.removeprefix("text_model."): delta for name, delta in deltas.items()}
    report = import_adapter(base.models, written(tmp_path / "te.safetensors", named))
    found = output_of(base.saved_and_loaded(report)["text_encoder"], tiny_tokens())
    assert relative(found, output_of(svdiff_model(encoder, deltas, 1.0), tiny_tokens())) <= 1e-5


def test_svdiff_in_16_bit_is_read(tmp_path):
    base = Base(tmp_path)
    deltas = {name: delta.half() for name, delta in svdiff_deltas(tiny_unet()).items()}
    report = import_adapter(base.models, written(tmp_path / "half.safetensors", deltas))
    found = output_of(base.saved_and_loaded(report)["unet"], tiny_inputs())
    expected = output_of(svdiff_model(tiny_unet(), {n: d.float() for n, d in deltas.items()}, 1.0), tiny_inputs())
    assert relative(found, expected) <= 1e-5


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_pipeline_sdxl])
def test_the_file_names_the_family_of_the_base(tmp_path, make):
    pipeline = make()
    report = import_adapter(pipeline, written(tmp_path / "shifts.safetensors", svdiff_deltas(pipeline.unet)))
    file = tmp_path / "imported.safetensors"
    save_adapter(pipeline, report.adapter, file, metadata=report.metadata("a base"))
    assert read_header(file).base.family == family_of(pipeline).name


# SVFT of its authors


def svft_layers(models: dict[str, nn.Module], component: str, **options: Any) -> dict[str, OfficialSVFT]:
    model = models[component]
    paths = [path for path in linear_layers(model) if "attn" in path or "ff" in path or "mlp" in path]
    return {
        path: OfficialSVFT.around(model.get_submodule(path).weight, seed=index, **options)
        for index, path in enumerate(paths)
    }


def check_svft(base: Base, files: list[Path], layers: dict[str, dict[str, OfficialSVFT]]) -> ImportReport:
    """ΔW is that of their `merge_and_unload`; from the saved file too."""
    weights = {
        component: {path: base.models[component].get_submodule(path).weight.detach().clone() for path in by_path}
        for component, by_path in layers.items()
    }
    report = import_adapter(base.models, files)
    fresh = base.saved_and_loaded(report)
    for models, name in ((base.models, report.adapter), (fresh, "imported")):
        for component, by_path in layers.items():
            found = updates(models[component], name)
            assert found.keys() == by_path.keys()
            for path, layer in by_path.items():
                expected = layer.merge_and_unload()
                weight = weights[component][path].double()
                # Relative to the weight's size: the authors' own rounding in float32 is of that order.
                assert relative(weight + found[path], expected) <= 1e-5
                assert relative(weight, expected) > 1e-3
    return report


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "banded", "off_diag": 0},
        {"pattern": "banded", "off_diag": 2},
        {"pattern": "random", "off_diag": 1},
        {"pattern": "banded", "off_diag": 1, "rank": 10},
    ],
    ids=str,
)
def test_official_svft_gives_its_merged_weights(tmp_path, options):
    base = Base(tmp_path)
    layers = {component: svft_layers(base.models, component, **options) for component in base.models}
    shapes = {layer.state["u"].shape[0] > layer.state["v"].shape[1] for layer in layers["unet"].values()}
    assert shapes == {True, False}
    files = [written(tmp_path / f"{name}.safetensors", svft_state(by_path)) for name, by_path in layers.items()]
    report = check_svft(base, files, layers)
    assert report.method == "svft" and report.error <= 5e-6 and not report.left_out


@pytest.mark.parametrize("off_diagonals", [0, 2])
def test_official_svft_keeps_its_band_where_that_is_asked_for(tmp_path, off_diagonals):
    base = Base(tmp_path)
    layers = svft_layers(base.models, "unet", pattern="banded", off_diag=off_diagonals)
    file = written(tmp_path / "svft.safetensors", svft_state(layers))
    pattern = "banded" if off_diagonals else "plain"
    report = import_adapter(base.models, file, pattern=pattern, off_diagonals=off_diagonals)
    assert (report.pattern, report.off_diagonals) == (pattern, off_diagonals)
    assert 0 < report.error < 1e-4  # what is left is rounding of the authors' singular vectors in float32


def test_update_of_official_svft_alone_is_exact(tmp_path):
    base = Base(tmp_path)
    layers = svft_layers(base.models, "unet", pattern="random", off_diag=1)
    report = import_adapter(base.models, written(tmp_path / "svft.safetensors", svft_state(layers)))
    found = updates(base.saved_and_loaded(report)["unet"], "imported")
    for path, layer in layers.items():
        held = layer.state
        assert len(held["s"]) > len(torch.unique(torch.stack([held["s_row"], held["s_col"]]), dim=1).T), "no duplicates"
        without = OfficialSVFT({**held, "s": torch.zeros_like(held["s"])})
        assert relative(found[path], layer.merge_and_unload() - without.merge_and_unload()) <= 1e-5


def test_official_svft_on_equal_singular_values_is_rotated_into_our_basis(tmp_path):
    unet = tiny_unet()
    weight = unet.get_submodule(f"{ATTENTION}.to_q").weight
    U, S, Vh = torch.linalg.svd(weight.detach(), full_matrices=False)
    S[4:8] = S[4]
    with torch.no_grad():
        weight.copy_((U * S) @ Vh)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))).Q
    layer = OfficialSVFT.around(weight, pattern="banded", off_diag=1, seed=4)
    layer.state["u"][:, 4:8] = layer.state["u"][:, 4:8] @ rotation
    layer.state["v"][4:8] = rotation.T @ layer.state["v"][4:8]
    layers = {f"{ATTENTION}.to_q": layer}
    expected = layer.merge_and_unload()
    models = {"unet": unet}
    report = import_adapter(models, written(tmp_path / "svft.safetensors", svft_state(layers)))
    assert report.error <= 1e-5
    found = updates(unet, report.adapter)[f"{ATTENTION}.to_q"]
    assert relative(found, expected - weight.detach().double()) <= 1e-5


def test_official_svft_outside_of_the_basis_states_its_error(tmp_path):
    base = Base(tmp_path)
    path = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    weight = base.models["unet"].get_submodule(path).weight.detach().clone()
    layer = OfficialSVFT.around(weight, pattern="banded", off_diag=1, seed=1, rank=20, fill_orthonormal=True)
    report = import_adapter(base.models, written(tmp_path / "svft.safetensors", svft_state({path: layer})))
    found = updates(base.models["unet"], report.adapter)[path]
    measured = relative(found, layer.merge_and_unload() - weight.double())
    assert 1e-3 < measured < 0.9
    assert report.error == pytest.approx(measured, rel=1e-3) == pytest.approx(report.layers[0].error, rel=1e-3)


def test_official_svft_reports_other_tensors_that_differ_from_the_base(tmp_path):
    base = Base(tmp_path)
    path = f"{ATTENTION}.to_out.0"
    state = svft_state(
        {
            path: OfficialSVFT.around(
                base.models["unet"].get_submodule(path).weight, pattern="banded", off_diag=0, seed=0
            )
        }
    )
    bias = base.models["unet"].get_submodule(path).bias.detach()
    norm = base.models["unet"].get_submodule("conv_norm_out").weight.detach()
    extra = {f"{path}.bias": bias, "conv_norm_out.weight": norm + 0.1, "classifier.weight": torch.ones(3)}
    report = import_adapter(base.models, written(tmp_path / "state.safetensors", state | extra))
    assert report.left_out.keys() == {"conv_norm_out.weight", "classifier.weight"}


def test_official_svft_on_a_base_in_16_bit_states_what_rounding_leaves(tmp_path):
    base = Base(tmp_path)
    layers = svft_layers(base.models, "unet", pattern="banded", off_diag=1)
    file = written(tmp_path / "svft.safetensors", svft_state(layers))
    base.models["unet"].half()
    report = import_adapter(base.models, file, pattern="banded", off_diagonals=1)
    found, lost, whole = updates(base.models["unet"], report.adapter), 0.0, 0.0
    for path, layer in layers.items():
        without = OfficialSVFT({**layer.state, "s": torch.zeros_like(layer.state["s"])})
        update = layer.merge_and_unload() - without.merge_and_unload()
        lost, whole = lost + float((found[path] - update).square().sum()), whole + float(update.square().sum())
    assert report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-2) and 1e-4 < report.error < 0.1


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    write_models(models)
    return models


def test_command_writes_an_adapter_that_acts(folder, tmp_path, capsys):
    pipe = tiny_pipeline(0)
    deltas = {"unet": svdiff_deltas(pipe.unet), "te": svdiff_deltas(pipe.text_encoder)}
    files = [str(written(tmp_path / f"{name}.safetensors", tensors)) for name, tensors in deltas.items()]
    output = tmp_path / "new" / "out.safetensors"
    command.run([*files, "--base", str(folder / "base"), "-o", str(output)])
    assert "SVDiff" in capsys.readouterr().out
    load_adapter(pipe, output, "imported")
    expected = output_of(svdiff_model(tiny_pipeline(0).unet, deltas["unet"], 1.0), tiny_inputs())
    assert relative(output_of(pipe.unet, tiny_inputs()), expected) <= 1e-5
    assert str(tmp_path).encode() not in output.read_bytes()


def test_command_prints_json_and_gives_equal_bytes(folder, tmp_path, capsys):
    factors = lora_factors(tiny_unet(), [f"{ATTENTION}.to_k"])
    file = kohya_file(tmp_path / "lora.safetensors", "lora_unet", factors)
    outputs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for output in outputs:
        command.run([str(file), "--base", str(folder / "base"), "-o", str(output), "--pattern", "banded", "--json"])
        report = json.loads(capsys.readouterr().out)
        assert report["source"] == "LoRA" and report["off_diagonals"] == 2 and report["output"] == str(output)
        assert report["bytes"] == output.stat().st_size
        assert report["error"] == report["layers"][0]["error"] > 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
