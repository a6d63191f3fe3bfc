"""Export to LoRA files: what they hold is what the report says, and what they can't hold is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from adapted_models import randomize
from exported import (
    adapted_pipeline,
    every_config,
    exact_update,
    expected_updates,
    key_of,
    product,
    relative,
    shared_pipeline,
)
from peft import convert_to_lora
from tiny_models import (
    tiny_pipeline,
    tiny_unet,
)
from torch import Tensor, nn

from svft_diffusion import SVDiffConfig, SVFTConfig, VectorFitConfig
from svft_diffusion.adapters import SpectralConfig, add_training_adapter
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.adapters.training import adapted_layers
from svft_diffusion.errors import UserError
from svft_diffusion.exchange.export import DTYPES, Dtype, export_lora
from svft_diffusion.exchange.lora_factors import decompose_core, lora_factors, smallest_rank
from svft_diffusion.exchange.lora_keys import Format, layer_key
from svft_diffusion.spectral import Core, banded_core, core_matrix, core_update, decompose, diagonal_core, sparse_core

# Factors

CORES: dict[str, Callable[[Tensor], Core]] = {
    "diagonal": lambda values: diagonal_core(values[:6]),
    "diagonal with zeros": lambda values: diagonal_core(values[:6] * torch.tensor([0.0, 1, 0, 1, 1, 0])),
    "banded": lambda values: banded_core(values[:16], 6, 1),
    "dense, two rows": lambda values: sparse_core(values[:5], torch.tensor([6, 8, 10, 25, 27]), 6),
    "dense, one column": lambda values: sparse_core(values[:3], torch.tensor([2, 14, 32]), 6),
}


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("core_name", CORES)
def test_factors_are_the_best_of_their_rank(core_name: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    U, _, Vh = decompose(torch.randn(shape, generator=generator))
    core = CORES[core_name](torch.randn(16, generator=generator))
    factors = decompose_core(core)
    update = core_update(U, core, Vh)
    s = torch.linalg.svdvals(update.double())
    assert factors.rank == int(torch.linalg.matrix_rank(core_matrix(core).double()))
    for rank in range(1, 9):
        B, A = lora_factors(U, factors, Vh, rank)
        assert B.shape == (shape[0], rank) and A.shape == (rank, shape[1])
        best = float(s[rank:].norm() / s.norm())
        assert relative(B @ A, update) == pytest.approx(best, abs=1e-6)
        assert factors.dropped(rank) / factors.dropped(0) == pytest.approx(best, abs=1e-6)
        cut = lora_factors(U, decompose_core(core, largest_rank=rank), Vh, rank)
        assert torch.allclose(cut[0] @ cut[1], B @ A, atol=1e-6)


def test_a_diagonal_core_is_not_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "svd", pytest.fail)
    assert decompose_core(diagonal_core(torch.tensor([0.1, -3.0, 0.0]))).s.tolist() == pytest.approx([3.0, 0.1])


@pytest.mark.parametrize("core", [diagonal_core(torch.zeros(4)), sparse_core(torch.zeros(1), torch.tensor([3]), 4)])
def test_a_core_of_zeros_has_rank_zero(core: Core) -> None:
    assert decompose_core(core).rank == 0


def test_smallest_rank_counts_all_layers() -> None:
    cores = [decompose_core(diagonal_core(torch.tensor(values))) for values in ([1.0, 0.006, 0.001], [0.5])]
    whole = torch.tensor([1.0, 0.006, 0.001, 0.5]).norm()
    assert smallest_rank(cores, 0.01) == 1
    assert smallest_rank(cores, 0.9 * 0.006 / float(whole)) == 2
    assert smallest_rank(cores, 1e-9) == 3


# Exports against the adapter's own update


@every_config
@pytest.mark.parametrize(("format", "strength"), [("kohya", 1.0), ("diffusers", -0.7)])
def test_full_rank_holds_every_layer(config: str, format: str, strength: float) -> None:
    pipe = shared_pipeline(config)
    exported = export_lora(pipe, "a", format=format, rank="full", strength=strength)  # type: ignore[arg-type]
    updates = expected_updates(pipe, strength)
    assert [layer.layer for layer in exported.report.layers] == list(updates)
    assert exported.report.left_out == () and exported.report.total_error <= 1e-7
    for name, update in updates.items():
        assert relative(product(exported, key_of(name, format)), update.flatten(1)) <= 2e-6, name


@every_config
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("rank", [5, "full"])
def test_the_reported_error_is_that_of_the_tensors(config: str, rank: int | str, dtype: Dtype) -> None:
    pipe = shared_pipeline(config)
    exported = export_lora(pipe, "a", rank=rank, dtype=dtype)  # type: ignore[arg-type]
    assert {tensor.dtype for name, tensor in exported.tensors.items() if "lora" in name[-20:]} == {DTYPES[dtype]}
    lost = whole = lost_by_rank = 0.0
    for layer in exported.report.layers:
        update = exact_update(pipe, layer.layer)
        distance = float((product(exported, key_of(layer.layer, "kohya")) - update).norm())
        assert layer.norm == pytest.approx(float(update.norm()), rel=1e-5)
        assert layer.error == pytest.approx(distance / float(update.norm()), rel=0.1), layer.layer
        assert 0 < layer.rounding / layer.norm < (1e-7 if dtype == "float32" else 1e-3)
        s = torch.linalg.svdvals(update)[exported.report.rank :]
        assert layer.dropped == pytest.approx(float(s.norm()), rel=1e-5, abs=1e-6)
        lost, whole, lost_by_rank = lost + distance**2, whole + layer.norm**2, lost_by_rank + layer.dropped**2
    report = exported.report
    assert report.layer_error == report.total_error == pytest.approx((lost / whole) ** 0.5, rel=0.02)
    assert report.rank_error == pytest.approx((lost_by_rank / whole) ** 0.5)


@pytest.mark.parametrize("format", ["kohya", "comfy-full"])
def test_a_value_too_large_for_float16_is_refused(format: Format) -> None:
    pipe = tiny_pipeline()
    everything_adapted(pipe)
    layers = adapted_layers(pipe, "a")
    part = {"kohya": "values", "comfy-full": "bias"}[format]
    layer = next(layer for name, layer in layers.items() if part in layer.trained_parts("a") and "to_out" in name)
    layer.trained_parts("a")[part].data.fill_(1e12)
    with pytest.raises(UserError, match=r"to_out.* has values up to .*, float16 ends at 6.55e\+04; export with"):
        export_lora(pipe, "a", format=format, rank="full", dtype="float16")
    export_lora(pipe, "a", format=format, rank="full")


def test_small_updates_do_not_vanish_in_float16() -> None:
    pipe = adapted_pipeline("svft plain", scale=1e-5)
    assert export_lora(pipe, "a", rank="full", dtype="float16").report.total_error < 1e-3


def test_auto_is_exact_for_few_values_and_all_layers_share_one_rank() -> None:
    pipe = adapted_pipeline(partial(SVFTConfig, rank=3))
    exported = export_lora(pipe, "a")
    assert exported.report.rank == 3
    ranks = {tensor.shape[0] for name, tensor in exported.tensors.items() if "lora_down" in name}
    alphas = {tensor.item() for name, tensor in exported.tensors.items() if name.endswith(".alpha")}
    assert ranks == alphas == {3}
    for name, update in expected_updates(pipe).items():
        assert relative(product(exported, key_of(name, "kohya")), update.flatten(1)) <= 1e-6
    assert export_lora(pipe, "a", rank=64).report.rank == 3, "nothing is gained by zeros"


def test_a_rank_that_loses_much_is_warned_of() -> None:
    pipe = adapted_pipeline(partial(SVFTConfig, pattern="banded", off_diagonals=2))
    report = export_lora(pipe, "a", rank=1).report
    largest = max(layer.rank for layer in report.layers)
    assert report.rank_error > 0.1 and largest > 1
    assert f"warning: rank 1 is too low for this adapter, whose layers are of ranks up to {largest}: " in str(report)
    assert f": {report.rank_error:.0%} of its update is lost" in str(report)
    assert "warning" not in str(export_lora(pipe, "a", rank="full").report)


def test_auto_takes_the_smallest_rank_below_its_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = adapted_pipeline("svft plain")
    for model in (pipe.unet, pipe.text_encoder):
        for layer in spectral_layers(model, "a").values():
            values = layer.trained_parts("a")["values"]
            values.data.copy_(0.3 ** torch.arange(len(values)))
    rank = export_lora(pipe, "a").report.rank
    assert (
        export_lora(pipe, "a", rank=rank).report.rank_error
        < 0.01
        <= export_lora(pipe, "a", rank=rank - 1).report.rank_error
    )
    monkeypatch.setattr("svft_diffusion.exchange.export.AUTO_LARGEST_RANK", 2)
    report = export_lora(pipe, "a").report
    assert report.rank == 2 and report.rank_cut and "rank auto ended at 2" in str(report)


def test_the_rest_of_a_svdiff_shift_stays_in_the_relu() -> None:
    pipe = adapted_pipeline("svdiff", scale=5.0)
    exported = export_lora(pipe, "a", rank="full", strength=2.0)
    once = expected_updates(pipe)
    for name, update in expected_updates(pipe, 2.0).items():
        assert relative(product(exported, key_of(name, "kohya")), update.flatten(1)) <= 2e-6
        assert relative(2 * once[name], update) > 0.01, "the relu acts"


@pytest.mark.parametrize("rank", [2, 4])
def test_the_closed_form_is_what_peft_finds_by_dense_decompositions(rank: int) -> None:
    unet = tiny_unet()
    config = SVFTConfig(pattern="banded", off_diagonals=1, rank=4, targets="all-linear")
    add_training_adapter({"unet": unet}, config, "a")
    randomize(unet, "a")
    _, oracle = convert_to_lora(unet, rank, adapter_name="a")
    exported = export_lora({"unet": unet}, "a", format="diffusers", rank=rank)
    assert {name.removeprefix("unet.") for name in exported.tensors} == {name.split("model.")[-1] for name in oracle}
    ends = {name.split("model.")[-1]: tensor for name, tensor in oracle.items()}
    for name, update in expected_updates({"unet": unet}).items():
        path = name.removeprefix("unet.")
        found, expected = product(exported, name), ends[f"{path}.lora_B.weight"] @ ends[f"{path}.lora_A.weight"]
        assert relative(found, update) == pytest.approx(relative(expected, update), abs=1e-6)
        # Below the full rank, PEFT's float32 mixes singular vectors to both sides of the cut that are close together.
        assert relative(found, expected) <= (1e-3 if rank < 4 else 2e-6)


# What a format can't hold


def everything_adapted(pipe: object, config: SpectralConfig | None = None) -> None:
    for component in ("unet", "text_encoder"):
        model = getattr(pipe, component)
        add_training_adapter({component: model}, config or VectorFitConfig(targets="all", train_norm=True), "a")
        randomize(model, "a")


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_what_is_left_out_is_said(format: str) -> None:
    pipe = tiny_pipeline()
    everything_adapted(pipe)
    report = export_lora(pipe, "a", format=format, rank="full").report  # type: ignore[arg-type]
    lost = {(entry.layer, entry.part): entry for entry in report.left_out}
    held = {layer.layer for layer in report.layers}
    squares = 0.0
    for name, layer in adapted_layers(pipe, "a").items():
        for part, tensor in {"weight": layer.get_delta_weight("a"), **layer.trained_parts("a")}.items():
            if part not in ("weight", "bias") or not tensor.any() or (part == "weight" and name in held):
                continue
            entry = lost.pop((name, part))
            assert entry.norm == pytest.approx(float(tensor.detach().norm()), rel=1e-5) and entry.reason
            squares += entry.norm**2
    assert not lost
    carried = sum(layer.norm**2 for layer in report.layers)
    assert report.total_error == pytest.approx((squares / (squares + carried)) ** 0.5) and report.rank_error <= 1e-7
    assert re.search(r"left out: bias of \d+ layers \(.*\), norm .*: this format has no place for biases", str(report))
    assert re.search(r"left out: weight of \d+ layers \(text_encoder.text_model.embeddings.token_emb", str(report))


def test_dense_differences_in_float16_are_reported_with_their_rounding() -> None:
    pipe = tiny_pipeline()
    everything_adapted(pipe, SVDiffConfig(targets="all", train_bias=True, norm_shift="vector"))
    exact = export_lora(pipe, "a", format="comfy-full", rank="full").tensors
    exported = export_lora(pipe, "a", format="comfy-full", rank="full", dtype="float16")
    squares = []
    for held in exported.report.dense:
        kind = adapted_layers(pipe, "a")[held.layer].kind
        ending = {"norm": {"weight": "w_norm", "bias": "b_norm"}}.get(kind, {"weight": "diff", "bias": "diff_b"})
        key = layer_key("comfy-full", held.layer, {"unet": pipe.unet, "text_encoder": pipe.text_encoder})
        name = f"{key}.{ending[held.part]}"
        distance = float((exported.tensors[name].double() - exact[name].double()).norm())
        assert exported.tensors[name].dtype == torch.float16
        assert held.error == pytest.approx(distance / float(exact[name].double().norm()), rel=1e-4) and distance > 0
        squares.append(distance**2)
    report = exported.report
    whole = sum(held.norm**2 for held in report.dense)
    assert report.dense_error == pytest.approx((sum(squares) / whole) ** 0.5, rel=1e-4)
    squares += [layer.distance**2 for layer in report.layers]
    whole += sum(layer.norm**2 for layer in report.layers)
    assert report.total_error == pytest.approx((sum(squares) / whole) ** 0.5, rel=1e-4)
    assert f"{len(report.dense)} dense differences in float16: relative error" in str(report)


@pytest.mark.parametrize("norm_shift", ["vector", "scalar"])
def test_comfy_full_holds_everything(norm_shift: str) -> None:
    pipe = tiny_pipeline()
    config = SVDiffConfig(targets="all", train_bias=True, norm_shift=norm_shift)
    everything_adapted(pipe, config)
    exported = export_lora(pipe, "a", format="comfy-full", rank="full")
    assert exported.report.left_out == () and exported.report.total_error <= 1e-7
    unread = set(exported.tensors)
    for name, layer in adapted_layers(pipe, "a").items():
        weight, bias = read_like_comfy(exported.tensors, comfy_names(name), unread)
        assert relative(weight.reshape(layer._weight.shape), layer.get_delta_weight("a")) <= 2e-6, name
        parts = layer.trained_parts("a")
        assert (bias is None) == ("bias" not in parts) and (bias is None or torch.equal(bias, parts["bias"]))
    assert not unread


def read_like_comfy(tensors: dict[str, Tensor], keys: list[str], unread: set[str]) -> tuple[Tensor, Tensor | None]:
    """The differences of weight and bias that ComfyUI's ``load_lora`` adds under the names it knows a layer by."""
    weight, bias = torch.zeros(0), None

    def take(name: str) -> Tensor:
        unread.discard(name)
        return tensors[name]

    for key in keys:
        if f"{key}.lora_up.weight" in tensors:
            up, down = take(f"{key}.lora_up.weight"), take(f"{key}.lora_down.weight")
            weight = take(f"{key}.alpha") / len(down) * (up.flatten(1) @ down.flatten(1))
        if f"{key}.w_norm" in tensors:
            weight = take(f"{key}.w_norm")
            if f"{key}.b_norm" in tensors:
                bias = take(f"{key}.b_norm")
        if f"{key}.diff" in tensors:
            weight = take(f"{key}.diff")
        if f"{key}.diff_b" in tensors:
            bias = take(f"{key}.diff_b")
    return weight, bias


def comfy_names(name: str) -> list[str]:
    component, _, path = name.partition(".")
    if component == "unet":
        return [f"lora_unet_{path.replace('.', '_')}"]
    return [f"text_encoders.clip_l.transformer.{path}", f"lora_te_{path.replace('.', '_')}"]


def test_a_norm_whose_bias_alone_trains_is_read_by_comfy() -> None:
    pipe = tiny_pipeline()
    add_training_adapter({"unet": pipe.unet}, VectorFitConfig(targets="all", train_norm=True), "a")
    for layer in spectral_layers(pipe.unet, "a").values():
        for part, tensor in layer.trained_parts("a").items():
            tensor.data.fill_(0.1 if part == "bias" else 0.0)
    tensors = export_lora(pipe, "a", format="comfy-full").tensors
    norms = [name.removesuffix(".b_norm") for name in tensors if name.endswith(".b_norm")]
    assert norms and all(not tensors[f"{name}.w_norm"].any() for name in norms)
    assert not any(".lora_" in name for name in tensors)
    assert "ss_network_dim" not in export_lora(pipe, "a", format="comfy-full").metadata, "no rank at all"


def test_an_adapter_of_which_nothing_fits_is_refused() -> None:
    pipe = tiny_pipeline()
    add_training_adapter({"unet": pipe.unet}, VectorFitConfig(train_values=False), "a")
    with pytest.raises(UserError, match="changes nothing at strength 1; there is nothing to export"):
        export_lora(pipe, "a")
    randomize(pipe.unet, "a")
    with pytest.raises(UserError, match="nothing of adapter 'a' fits format kohya: this format has no place for bias"):
        export_lora(pipe, "a")
    assert export_lora(pipe, "a", format="comfy-full").report.rank == 0


class Grouped(nn.Module):
    """A convolution in groups under a name that UNets have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 6, 3, groups=2)


def test_a_convolution_in_groups_is_no_lora() -> None:
    model = Grouped()
    add_training_adapter({"unet": model}, SVFTConfig(targets="all"), "a")
    randomize(model, "a")
    with pytest.raises(UserError, match="it has groups"):
        export_lora({"unet": model}, "a")
    exported = export_lora({"unet": model}, "a", format="comfy-full")
    assert torch.equal(exported.tensors["lora_unet_conv_in.diff"], model.conv_in.get_delta_weight("a"))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "koyha"}, "unknown format 'koyha', did you mean 'kohya'"),
        ({"rank": 0}, "rank must be a whole number"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"rank": True}, "rank must be a whole number"),
        ({"rank": "all"}, "rank must be a whole number"),
        ({"dtype": "bfloat16"}, "unknown dtype 'bfloat16', did you mean 'float16'"),
        ({"strength": 0.0}, "strength must be a finite number"),
        ({"strength": float("nan")}, "strength must be a finite number"),
        ({"name": "b"}, "there is no adapter 'b'"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, object], message: str) -> None:
    unet = tiny_unet()
    add_training_adapter({"unet": unet}, SVFTConfig(targets="cross-attention"), "a")
    with pytest.raises(UserError, match=message):
        export_lora(**{"pipe": {"unet": unet}, "name": "a", **changes})  # type: ignore[arg-type]


def test_a_fused_adapter_is_refused() -> None:
    unet = tiny_unet()
    add_training_adapter({"unet": unet}, SVFTConfig(targets="cross-attention"), "a")
    next(iter(spectral_layers(unet, "a").values())).merge(adapter_names=["a"])
    with pytest.raises(UserError, match="is fused"):
        export_lora({"unet": unet}, "a")
