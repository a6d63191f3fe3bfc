"""What can't be done is refused with its place and its remedy, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from tiny_models import tiny_unet
from torch import Tensor, nn

from svft_diffusion import SiVAConfig, SVDiffConfig, SVFTConfig, VectorFitConfig
from svft_diffusion.adapters import SpectralConfig, add_training_adapter, tuner
from svft_diffusion.adapters.injection import inject, remove, spectral_layers
from svft_diffusion.errors import UserError
from svft_diffusion.factors import cache, cached_factors_of
from svft_diffusion.spectral import SingularFactors, decompose

TARGETS = ["wide", "tall", "square"]


class Net(nn.Module):
    """Layers that can carry adapters, and some that can't."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(6, 11)
        self.tall = nn.Linear(11, 7, bias=False)
        self.square = nn.Linear(7, 7)
        self.norm = nn.LayerNorm(7)
        self.table = nn.Embedding(9, 6, max_norm=1.0)
        self.mixing = nn.Bilinear(7, 7, 7)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.square(torch.tanh(self.tall(torch.tanh(self.wide(x))))))
        return result


def adapted_net() -> Net:
    """A net with an active, training adapter on all of its linear layers, and a frozen one on two of them."""
    model = Net()
    inject(model, SVDiffConfig(target_modules=["wide", "tall"]), "frozen")
    inject(model, SVFTConfig(target_modules=TARGETS), "other")
    for layer in spectral_layers(model).values():
        layer.set_adapter([name for name in ("other",) if layer.has_adapter(name)])
    return model


def with_lora() -> Net:
    model = Net()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["wide"]), model, "lora")
    return model


every_model = pytest.mark.parametrize("make_model", [Net, adapted_net, with_lora])


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a refused adapter must leave as it was."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_meta},
        "modules": {path: id(module) for path, module in model.named_modules()},
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "configs": dict(getattr(model, "peft_config", {})),
        "has configs": hasattr(model, "peft_config"),
        "loaded": getattr(model, "_hf_peft_config_loaded", False),
        "active": {path: list(layer.active_adapters) for path, layer in spectral_layers(model).items()},
        "adapters": {path: list(layer.options) for path, layer in spectral_layers(model).items()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    states = before.pop("state"), after.pop("state")
    assert after == before
    assert states[0].keys() == states[1].keys()
    for before_tensor, after_tensor in zip(states[0].values(), states[1].values(), strict=True):
        torch.testing.assert_close(after_tensor, before_tensor, rtol=0, atol=0, equal_nan=True)


# Options


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpectralConfig(method="svd"), "unknown method 'svd'; choose from svft, svdiff, vectorfit, siva"),
        (
            lambda: SVFTConfig(pattern="diagonal"),
            "unknown pattern 'diagonal' for method svft; choose from plain, banded, random, top_k",
        ),
        (
            lambda: SpectralConfig(method="svdiff", pattern="banded", off_diagonals=1),
            "unknown pattern 'banded' for method svdiff; choose from plain",
        ),
        (lambda: SVFTConfig(pattern="banded"), "off_diagonals of at least 1, got 0; 2 is a good start"),
        (
            lambda: SVFTConfig(off_diagonals=2),
            "plain has no off-diagonals, got off_diagonals=2; use pattern banded, or off_diagonals 0",
        ),
        (
            lambda: SpectralConfig(method="siva", off_diagonals=1),
            "plain has no off-diagonals, got off_diagonals=1; use method svft with pattern banded, or off_diagonals 0",
        ),
        (lambda: SVFTConfig(pattern="random", off_diagonals=-1), "off_diagonals can't be negative, got -1"),
        (lambda: SVFTConfig(rank=0), r"rank must be at least 1 \(or left out, for all singular values\), got 0"),
        (lambda: SVFTConfig(init="ones"), "unknown init 'ones' for method svft; choose from zero, random, official"),
        (lambda: SVDiffConfig(init="official"), "unknown init 'official' for method svdiff; choose from zero, random"),
        (lambda: SVDiffConfig(norm_shift="both"), "unknown norm_shift 'both'; choose from vector, scalar"),
        (lambda: SiVAConfig(fraction=0.0), r"fraction must lie in \(0, 1\], got 0.0; 0.2 is a good start"),
        (lambda: SiVAConfig(fraction=1.1), r"fraction must lie in \(0, 1\], got 1.1"),
        (lambda: SiVAConfig(fraction=float("nan")), r"fraction must lie in \(0, 1\], got nan"),
        (lambda: SiVAConfig(select="middle"), "unknown select 'middle'; choose from bottom, top, all, random"),
        (lambda: SpectralConfig(method="siva", rank=3), "siva takes a fraction of the singular values, no rank"),
        (lambda: SpectralConfig(fraction=0.5), "fraction belongs to method siva; method svft takes a rank"),
        (lambda: SpectralConfig(select="top"), "select belongs to method siva; method svft takes a rank"),
        (lambda: VectorFitConfig(train_values=False, train_bias=False), "nothing would train: train_values, train_bi"),
        (
            lambda: SVDiffConfig(targets="atention"),
            "unknown targets 'atention'; choose from attention, cross-attention",
        ),
    ],
)
def test_options_that_do_not_exist_are_refused_with_the_choices(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_a_config_read_from_a_file_is_checked_too(tmp_path: Any) -> None:
    SVFTConfig(pattern="banded", off_diagonals=2).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"banded"', '"striped"'))
    with pytest.raises(UserError, match="unknown pattern 'striped'"):
        PeftConfig.from_pretrained(str(tmp_path))


# Layers


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: SVFTConfig(pattern="banded", off_diagonals=6, target_modules=TARGETS),
            "layer wide: off_diagonals=6 is too large for 6 singular values: use at most 5",
        ),
        (
            lambda: SVFTConfig(pattern="random", off_diagonals=3, rank=3, target_modules=TARGETS),
            "layer square: off_diagonals=3 is too large for 3 singular values: use at most 2",
        ),
        (
            lambda: SVFTConfig(rank=7, target_modules=TARGETS),
            "layer wide: it has 6 singular values, fewer than rank=7; use a smaller rank",
        ),
        (
            lambda: SVFTConfig(target_modules=[*TARGETS, "mixing"]),
            "layer mixing is a Bilinear, which no adapter here fits; leave it out",
        ),
        (
            lambda: SVFTConfig(target_modules=[*TARGETS, "table"]),
            r"layer table changes its own table as it reads it \(max_norm\); leave it out",
        ),
        (
            lambda: SVFTConfig(target_modules=[*TARGETS, "norm"], train_norm=False),
            "layer norm has nothing that would train .*; leave it out",
        ),
        (
            lambda: VectorFitConfig(target_modules=TARGETS, train_values=False),
            "layer tall has nothing that would train .*; leave it out",
        ),
        (lambda: SVFTConfig(targets="attention"), "match no layer of Net; choose from all-linear"),
        (
            lambda: SVFTConfig(target_modules=["to_q", "to_k"]),
            "target_modules to_k, to_q match no layer of Net; its layers are called wide, ta",
        ),
        (
            lambda: SVFTConfig(target_modules="to_[qk]"),
            r"target_modules 'to_\[qk\]' match no layer of Net; its layers are called wide",
        ),
    ],
)
@every_model
def test_layers_that_cannot_carry_the_adapter_are_named(
    config: Callable[[], SpectralConfig], message: str, make_model: Callable[[], Net]
) -> None:
    model = make_model()
    before = snapshot(model)
    with pytest.raises(UserError, match=message):
        inject(model, config(), "a")
    assert_unchanged(model, before)


def spoil_with(value: float) -> Callable[[Net], None]:
    def spoil(model: Net) -> None:
        with torch.no_grad():
            base_of(model.tall).weight[2, 3] = value  # type: ignore[index,operator]

    return spoil


def base_of(module: nn.Module) -> nn.Module:
    while hasattr(module, "base_layer"):
        module = module.base_layer  # type: ignore[assignment]
    return module


def quantize(model: Net) -> None:
    base_of(model.tall).weight = nn.Parameter(torch.zeros(7, 11, dtype=torch.int8), requires_grad=False)


def to_float8(model: Net) -> None:
    base_of(model.tall).to(torch.float8_e4m3fn)


def to_meta(model: Net) -> None:
    base_of(model.tall).to("meta")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_with(float("nan")), "layer tall can't be decomposed: the weight holds NaN"),
        (spoil_with(float("inf")), "layer tall can't be decomposed: the weight holds NaN or infinite values"),
        (quantize, r"layer tall is quantized \(torch.int8\), and adapters .*: load the base model unquantized"),
        (to_float8, r"layer tall is quantized \(torch.float8_e4m3fn\), and .*: load the base model unquantized"),
        (to_meta, r"layer tall has no values yet \(it lies on the meta device\); load the weights first"),
    ],
)
@pytest.mark.parametrize("make_model", [Net, with_lora])
@pytest.mark.parametrize("targets", [TARGETS, "all-linear", "wide|tall|square"])
def test_weights_that_cannot_be_decomposed_are_named(
    spoil: Callable[[Net], None], message: str, make_model: Callable[[], Net], targets: list[str] | str
) -> None:
    model = make_model()
    spoil(model)
    before = snapshot(model)
    with pytest.raises(UserError, match=message):
        inject(model, SVFTConfig(target_modules=targets), "a")
    assert_unchanged(model, before)


@pytest.mark.parametrize("make_model", [Net, with_lora])
@pytest.mark.parametrize("targets", [TARGETS, "all-linear"])
def test_a_decomposition_that_fails_midway_leaves_nothing_behind(
    make_model: Callable[[], Net], targets: list[str] | str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("SVFT_DIFFUSION_CACHE", str(tmp_path))

    def fail_for_tall(weight: Tensor) -> SingularFactors:
        if weight.shape == (7, 11):
            raise RuntimeError("the algorithm failed to converge")
        return decompose(weight)

    monkeypatch.setattr(cache, "decompose", fail_for_tall)
    model = make_model()
    before = snapshot(model)
    with pytest.raises(UserError, match="layer tall can't be decomposed: the algorithm failed to converge"):
        inject(model, SVFTConfig(target_modules=targets), "a")
    assert_unchanged(model, before)


@every_model
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_failure_while_layers_are_wrapped_leaves_nothing_behind(
    make_model: Callable[[], Net], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svft_diffusion.adapters.layers import SpectralLayer

    model = make_model()
    before = snapshot(model)
    original = SpectralLayer.add_adapter
    wrapped = []

    def fail_later(layer: SpectralLayer, *args: Any, **options: Any) -> None:
        if len(wrapped) == at:
            raise MemoryError
        wrapped.append(layer)
        original(layer, *args, **options)

    monkeypatch.setattr(SpectralLayer, "add_adapter", fail_later)
    with pytest.raises(MemoryError):
        inject(model, SVFTConfig(target_modules=TARGETS), "a")
    assert_unchanged(model, before)


@pytest.mark.parametrize("targets", [TARGETS, "all-linear"])
def test_nothing_is_decomposed_while_an_adapter_is_fused(targets: list[str] | str) -> None:
    model = adapted_net()
    spectral_layers(model)["wide"].merge()
    before = snapshot(model)
    with pytest.raises(UserError, match=r"an adapter is fused into layer wide; call pipe.unfuse_lora\(\) first"):
        inject(model, SVDiffConfig(target_modules=targets), "b")
    assert_unchanged(model, before)
    lora = with_lora()
    lora.wide.merge()  # type: ignore[operator]
    before = snapshot(lora)
    with pytest.raises(UserError, match="an adapter is fused into layer wide"):
        inject(lora, SVDiffConfig(target_modules=TARGETS), "b")
    assert_unchanged(lora, before)


@pytest.mark.parametrize("name", ["", "style.v2", "training", "forward"])
@every_model
def test_names_that_no_adapter_can_have_are_refused(name: str, make_model: Callable[[], Net]) -> None:
    model = make_model()
    before = snapshot(model)
    with pytest.raises(UserError, match=f"an adapter can't have the name {name!r}; call it '[^']+', for example"):
        inject(model, SVFTConfig(target_modules=TARGETS), name)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "config",
    [
        SVFTConfig(target_modules=TARGETS),
        SVFTConfig(rank=9, target_modules=TARGETS),
        SVFTConfig(target_modules=["nowhere"]),
    ],
)
@pytest.mark.parametrize("name", ["other", "frozen"])
def test_a_name_that_is_taken_is_refused(config: SpectralConfig, name: str) -> None:
    model = adapted_net()
    before = snapshot(model)
    with pytest.raises(
        UserError, match=f"an adapter '{name}' is already there; remove it first, or give this one another name"
    ):
        inject(model, config, name)
    assert_unchanged(model, before)


@pytest.mark.parametrize(("rank", "shown"), [(None, True), ("0", True), ("1", False)])
def test_one_process_of_a_launcher_shows_a_bar(rank: str | None, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recorded(weights: dict[str, Tensor], *, progress: bool) -> dict[str, SingularFactors]:
        asked.append(progress)
        return cached_factors_of(weights, progress=False)

    monkeypatch.setattr(tuner, "cached_factors_of", recorded)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    inject(Net(), SVFTConfig(target_modules=["wide"]), "dog")
    assert asked == [shown]


def test_the_config_of_the_caller_is_not_changed() -> None:
    config = SVFTConfig()
    with pytest.raises(UserError):
        inject(Net(), SVFTConfig(targets="attention"), "a")
    model = Net()
    config = SVFTConfig(targets="all-linear")
    inject(model, config, "a")
    assert config.target_modules is None
    assert set(spectral_layers(model)) == set(TARGETS)
    remove(model, "a")


@pytest.mark.parametrize("make_model", [Net, adapted_net])
def test_training_on_several_models_is_all_or_nothing(make_model: Callable[[], Net]) -> None:
    good, bad = make_model(), Net()
    spoil_with(float("nan"))(bad)
    before = snapshot(good), snapshot(bad)
    with pytest.raises(UserError, match="text_encoder: layer tall can't be decomposed"):
        add_training_adapter({"unet": good, "text_encoder": bad}, SVFTConfig(target_modules=TARGETS))
    assert_unchanged(good, before[0])
    assert_unchanged(bad, before[1])


def test_a_model_of_diffusers_takes_another_adapter_after_a_refusal() -> None:
    unet = tiny_unet()
    with pytest.raises(UserError, match="fewer than rank=5000"):
        unet.add_adapter(SVFTConfig(rank=5000), "a")
    unet.add_adapter(SVFTConfig(), "a")
    assert spectral_layers(unet, "a")
