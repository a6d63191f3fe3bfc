"""How adapters get in each other's way: figures that can be computed by hand, and the ways to show them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import Mixed, every_method, randomize
from adapter_cases import METHODS
from PIL import Image
from test_algebra import pipeline_with
from tiny_models import tiny_text_encoder, tiny_unet

from svft_diffusion import SVDiffConfig, SVFTConfig, set_adapters
from svft_diffusion.adapters.injection import inject, spectral_layers
from svft_diffusion.algebra.interference import interference
from svft_diffusion.algebra.interference_report import report_json, report_lines, summary_lines
from svft_diffusion.errors import UserError


def two_on_one_layer(first: list[float], second: list[float]) -> dict[str, Any]:
    """A model whose layer `tall` has two SVFT adapters with given leading values."""
    model = Mixed()
    for name, values in (("a", first), ("b", second)):
        inject(model, SVFTConfig(target_modules=["tall"]), name)
        with torch.no_grad():
            spectral_layers(model)["tall"].spectral_values[name][: len(values)] = torch.tensor(values)
    return {"unet": model}


@pytest.mark.parametrize(
    ("first", "second", "cosine", "overlap"),
    [
        ([1, 2], [2, 4], 1.0, 1.0),
        ([1, 2], [-1, -2], -1.0, 1.0),
        ([1, 0], [0, 3], 0.0, 0.0),
        ([3, 4], [3, -4], -7 / 25, 1.0),
        ([1, 1], [1, 0], 2**-0.5, 0.5),
    ],
)
def test_cosine_and_overlap_of_simple_updates(
    first: list[float], second: list[float], cosine: float, overlap: float
) -> None:
    found = interference(two_on_one_layer(first, second), {"a": 1.0, "b": 0.5})
    for place in (found.total, found.blocks[0], found.layers[0]):
        assert place.meetings["a", "b"].cosine == pytest.approx(cosine, abs=1e-6)
        assert place.meetings["a", "b"].overlap == pytest.approx(overlap, abs=1e-6)


@every_method
def test_cosines_and_norms_are_those_of_the_dense_updates(method: str) -> None:
    pipe, names = pipeline_with(METHODS[method].config(), METHODS[method].config(), SVFTConfig())
    weights = dict(zip(names, (0.7, -0.4, 1.5), strict=True))
    found = interference(pipe, weights)
    dense: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for place in found.layers:
        layer = spectral_layers(pipe["unet"])[place.name.removeprefix("unet.")]
        whole = {}
        for name, weight in weights.items():
            layer.set_scale(name, weight)
            bias = layer.trained_parts(name).get("bias")
            base_bias = getattr(layer.get_base_layer(), "bias", None)
            shift = torch.zeros_like(base_bias) if bias is None and base_bias is not None else bias
            pieces = [layer.get_delta_weight(name).flatten()] + ([] if shift is None else [
                shift * (weight if bias is not None else 1.0)])  # fmt: skip
            whole[name] = torch.cat([piece.detach().double() for piece in pieces])
            dense[name].append(whole[name])
            assert place.norms[name] == pytest.approx(float(whole[name].norm()), rel=1e-5)
        for (first, second), meeting in place.meetings.items():
            expected = torch.nn.functional.cosine_similarity(whole[first], whole[second], dim=0)
            assert meeting.cosine == pytest.approx(float(expected), abs=1e-5)
    for (first, second), meeting in found.total.meetings.items():
        expected = torch.nn.functional.cosine_similarity(torch.cat(dense[first]), torch.cat(dense[second]), dim=0)
        assert meeting.cosine == pytest.approx(float(expected), abs=1e-5)


def test_parts_of_layers_add_up_to_the_whole_and_blocks_gather_layers() -> None:
    models = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}
    for seed, name in enumerate("abc"):
        for model in models.values():
            inject(model, SVFTConfig(pattern="banded", off_diagonals=1), name)
            randomize(model, name, seed=seed)
    found = interference(models, {"a": 1.0, "b": 1.0, "c": {"unet": 1.0}})
    assert {"unet.mid_block", "unet.down_blocks.1", "text_encoder.encoder.layers.0"} <= {b.name for b in found.blocks}
    for pair in (("a", "b"), ("a", "c"), ("b", "c")):
        for quantity in ("cosine", "overlap"):
            parts = [getattr(layer.meetings[pair], f"part_of_{quantity}") for layer in found.layers]
            assert sum(parts) == pytest.approx(getattr(found.total.meetings[pair], quantity), abs=1e-6)
    text = next(block for block in found.blocks if block.name == "text_encoder.encoder.layers.0")
    assert (
        text.norms["c"] == 0 and text.meetings["a", "c"].cosine is None and text.meetings["a", "b"].cosine is not None
    )
    worst = found.clashes()[0]
    assert worst[0] == min(layer.meetings[pair].part_of_cosine for layer in found.layers for pair in found.pairs) < 0
    assert found.most_shared()[0][0] == max(
        layer.meetings[pair].part_of_overlap for layer in found.layers for pair in found.pairs
    )


def test_balanced_weights_make_norms_go_as_the_weights() -> None:
    pipe = two_on_one_layer([10.0], [1.0])
    found = interference(pipe, {"a": 0.5, "b": 1.0})
    assert found.total.norms == pytest.approx({"a": 5.0, "b": 1.0})
    balanced = interference(pipe, found.balancing)
    assert balanced.total.norms["a"] == pytest.approx(0.5 * balanced.total.norms["b"])
    of_component = interference(pipe, {"a": {"unet": {"tall": 0.5}}, "b": {"unet": 1.0}}).balancing
    assert of_component["a"]["unet"]["tall"] == pytest.approx(found.balancing["a"])  # type: ignore[index]


def test_singular_values_that_the_sum_cuts_are_counted() -> None:
    model = Mixed()
    for name in "ab":
        inject(model, SVDiffConfig(target_modules=["tall"], rank=4), name)
    layer = spectral_layers(model)["tall"]
    assert layer.factors is not None
    sigma = layer.factors.S[:4]
    with torch.no_grad():  # alone none is cut, together the first three are
        layer.spectral_values["a"].copy_(-0.6 * sigma)
        layer.spectral_values["b"].copy_(-0.6 * sigma * torch.tensor([1, 1, 1, 0.1]))
    clipping = interference({"unet": model}, {"a": 1.0, "b": 1.0}).clipping
    assert clipping is not None
    assert (clipping.clipped, clipping.trained, clipping.layers) == (3, 4, {"unet.tall": 3})
    assert interference({"unet": model}, {"a": 1.0}).clipping.clipped == 0  # type: ignore[union-attr]
    assert interference(two_on_one_layer([1], [1]), {"a": 1.0}).clipping is None


def test_the_text_names_what_matters_and_the_json_has_every_layer() -> None:
    pipe, names = pipeline_with(SVDiffConfig(), SVDiffConfig())
    found = interference(pipe, dict.fromkeys(names, 1.0))
    text = "\n".join(report_lines(found))
    for expected in ("a0 / a1", "unet.tall", "cosine  overlap", "SVDiff: the sum cuts", "equal norms: a0", "\nall "):
        assert expected in text
    assert "a0 / a1" in summary_lines(found)[0]
    plain = json.loads(json.dumps(report_json(found)))
    assert {layer["name"] for layer in plain["layers"]} == {f"unet.{path}" for path in spectral_layers(pipe["unet"])}
    assert plain["total"]["pairs"][0]["adapters"] == ["a0", "a1"]


def test_many_pairs_stand_below_each_other() -> None:
    pipe, names = pipeline_with(*(SVFTConfig() for _ in range(4)))
    text = "\n".join(report_lines(interference(pipe, dict.fromkeys(names, 1.0))))
    assert "a2 / a3" in text and "block with the lowest cosine" in text


def test_an_adapter_that_changes_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="adapter 'b' changes nothing at weight 1"):
        interference(two_on_one_layer([1], [0]), {"a": 1.0, "b": 1.0})
    with pytest.raises(UserError, match="all weights are 0"):
        interference(two_on_one_layer([1], [0]), {})


def test_comparing_changes_nothing() -> None:
    pipe, names = pipeline_with(SVDiffConfig(), SVDiffConfig())
    set_adapters(pipe, {"a0": 0.3})
    interference(pipe, dict.fromkeys(names, 1.0))
    assert {layer.weights["a0"] for layer in spectral_layers(pipe["unet"]).values()} == {0.3}
    assert all(layer.active_adapters == ["a0"] for layer in spectral_layers(pipe["unet"]).values())


def test_the_plot_is_a_picture_and_replaces_nothing_unasked(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from svft_diffusion.algebra.interference_plot import write_plot

    found = interference(*_three())
    file = write_plot(found, tmp_path / "plot.png")
    with Image.open(file) as picture:
        assert picture.width > 600 and len(picture.convert("RGB").resize((60, 60)).getcolors(3600)) > 20
    content = file.read_bytes()
    with pytest.raises(UserError, match="there already"):
        write_plot(found, file)
    assert write_plot(found, file, overwrite=True).read_bytes() == content
    with pytest.raises(UserError, match=r"must end in \.png"):
        write_plot(found, tmp_path / "plot.svg")
    with pytest.raises(UserError, match="only one"):
        write_plot(interference(_three()[0], {"a0": 1.0}), tmp_path / "one.png")


def test_a_missing_matplotlib_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svft_diffusion.algebra.interference_plot import check_plot

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'svft-diffusion\[plots\]'"):
        check_plot(tmp_path / "plot.png", overwrite=False)


def _three() -> tuple[dict[str, Mixed], dict[str, float]]:
    pipe, names = pipeline_with(*(SVFTConfig(pattern="banded", off_diagonals=1) for _ in range(3)))
    return pipe, dict.fromkeys(names, 1.0)
