"""Every method through every behaviour of an adapter layer, then the tuner as PEFT and diffusers use it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tiny_models import tiny_inputs, tiny_text_encoder, tiny_unet
from torch import Tensor, nn

from svft_diffusion import SVDiffConfig, SVFTConfig
from svft_diffusion.adapters import SpectralConfig
from svft_diffusion.adapters.injection import inject, remove, spectral_layers
from svft_diffusion.adapters.layer import SpectralLayer
from svft_diffusion.adapters.targets import PRESETS, matching_layers
from svft_diffusion.errors import UserError
from svft_diffusion.spectral import banded_positions

TARGETS = ["wide", "tall", "square"]
CASES: dict[str, Callable[[], SpectralConfig]] = {
    "svft plain": lambda: SVFTConfig(target_modules=TARGETS),
    "svft plain, rank 3": lambda: SVFTConfig(rank=3, target_modules=TARGETS),
    "svft banded 1": lambda: SVFTConfig(pattern="banded", off_diagonals=1, target_modules=TARGETS),
    "svft banded 3": lambda: SVFTConfig(pattern="banded", off_diagonals=3, target_modules=TARGETS),
    "svft banded 2, rank 4": lambda: SVFTConfig(pattern="banded", off_diagonals=2, rank=4, target_modules=TARGETS),
    "svdiff": lambda: SVDiffConfig(target_modules=TARGETS),
    "svdiff, rank 3": lambda: SVDiffConfig(rank=3, target_modules=TARGETS),
}
every_method = pytest.mark.parametrize("case", CASES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


class Net(nn.Module):
    """Linear layers of every proportion, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(6, 11)
        self.tall = nn.Linear(11, 7, bias=False)
        self.square = nn.Linear(7, 7)
        self.conv = nn.Conv1d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.square(torch.tanh(self.tall(torch.tanh(self.wide(x)))))
        return result


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def randomize(model: nn.Module, adapter: str, scale: float = 0.5, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in spectral_layers(model, adapter).values():
            values = layer.spectral_values[adapter]
            values.copy_(scale * torch.randn(values.shape, generator=generator))


def adapted(case: str, *, name: str = "a", dtype: torch.dtype = torch.float32, random: bool = True) -> Net:
    model = Net().to(dtype)
    inject(model, CASES[case](), name)
    if random:
        randomize(model, name)
    return model


def explicit_update(layer: nn.Module, values: Tensor, config: SpectralConfig, strength: float = 1.0) -> Tensor:
    """The papers' formulas, dense, with the layer's factors."""
    U, S, Vh = layer.factors  # type: ignore[misc,union-attr]
    rank = config.rank or len(S)
    if config.method == "svdiff":
        shift = torch.relu(S[:rank] + strength * values) - S[:rank]
        return U[:, :rank] @ torch.diag(shift) @ Vh[:rank]
    matrix = torch.zeros(rank, rank).index_put(banded_positions(rank, config.off_diagonals), values)
    return strength * U[:, :rank] @ matrix @ Vh[:rank]


def explicit_model(
    model: Net, case: str, values: dict[str, Tensor], strength: float = 1.0
) -> Callable[[Tensor], Tensor]:
    """The base network with ``W + Delta W`` in place of every adapted weight."""
    weights = {}
    for path, layer in spectral_layers(model).items():
        update = explicit_update(layer, values[path], CASES[case](), strength)
        weights[f"{path}.weight"] = layer.get_base_layer().weight.detach() + update
    return lambda x: torch.func.functional_call(Net(), weights, (x,))


def values_of(model: nn.Module, adapter: str = "a") -> dict[str, Tensor]:
    return {path: layer.spectral_values[adapter] for path, layer in spectral_layers(model, adapter).items()}


def digest(model: nn.Module) -> str:
    weights = [layer.get_base_layer().weight for layer in spectral_layers(model).values()]
    return hashlib.sha256(b"".join(weight.detach().float().numpy().tobytes() for weight in weights)).hexdigest()


# Each method through each behaviour


@every_method
@every_dtype
def test_off_means_the_base_bit_for_bit(case: str, dtype: torch.dtype) -> None:
    expected = Net().to(dtype)(inputs(dtype))
    model = adapted(case, dtype=dtype, random=False)
    assert torch.equal(model(inputs(dtype)), expected), "zero values"
    randomize(model, "a")
    assert not torch.equal(model(inputs(dtype)), expected)
    for layer in spectral_layers(model).values():
        layer.set_scale("a", 0.0)
    assert torch.equal(model(inputs(dtype)), expected), "strength 0"
    for layer in spectral_layers(model).values():
        layer.set_scale("a", 1.0)
        layer.enable_adapters(False)
    assert torch.equal(model(inputs(dtype)), expected), "disabled"


@every_method
@pytest.mark.parametrize("strength", [1.0, 0.3, -1.5])
def test_forward_is_the_explicit_formula_and_the_merged_model(case: str, strength: float) -> None:
    model = adapted(case)
    for layer in spectral_layers(model).values():
        layer.set_scale("a", strength)
    output = model(inputs())
    torch.testing.assert_close(
        output, explicit_model(model, case, values_of(model), strength)(inputs()), rtol=1e-5, atol=1e-5
    )
    for path, layer in spectral_layers(model).items():
        expected = explicit_update(layer, values_of(model)[path], CASES[case](), strength)
        torch.testing.assert_close(layer.get_delta_weight("a"), expected, rtol=1e-5, atol=1e-6)
        layer.merge(safe_merge=True)
    torch.testing.assert_close(model(inputs()), output, rtol=1e-5, atol=1e-5)


@every_method
def test_gradients_are_those_of_the_explicit_formula(case: str) -> None:
    model = adapted(case)
    for layer in spectral_layers(model).values():
        layer.set_adapter("a")
    model(inputs()).square().sum().backward()
    values = {path: value.detach().clone().requires_grad_() for path, value in values_of(model).items()}
    explicit_model(model, case, values)(inputs()).square().sum().backward()
    for path, value in values_of(model).items():
        torch.testing.assert_close(value.grad, values[path].grad, rtol=1e-4, atol=1e-5)
        assert value.grad is not None and value.grad.abs().max() > 0


@every_method
@every_dtype
def test_unmerge_restores_the_base_weight_bit_for_bit(case: str, dtype: torch.dtype) -> None:
    model = adapted(case, dtype=dtype)
    before = digest(model)
    for strength in torch.linspace(-2, 2, 20).tolist():
        for layer in spectral_layers(model).values():
            layer.set_scale("a", strength)
            layer.merge()
            layer.set_scale("a", 0.1)  # a change while fused must not leak into the weight
        assert digest(model) != before
        for layer in spectral_layers(model).values():
            layer.unmerge()
        assert digest(model) == before


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_stay_float32_in_a_16_bit_model(case: str, dtype: torch.dtype) -> None:
    assert {value.dtype for value in values_of(adapted(case, dtype=dtype)).values()} == {torch.float32}
    model = adapted(case)
    before = {path: value.detach().clone() for path, value in values_of(model).items()}
    model.to(dtype)
    assert model.square.base_layer.weight.dtype == dtype
    for path, value in values_of(model).items():
        assert value.dtype == torch.float32 and torch.equal(value, before[path])
    output = model(inputs(dtype))
    assert output.dtype == dtype
    exact = adapted(case)(inputs())
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.05)


@every_method
def test_only_the_values_train_and_only_they_are_added_to_the_state(case: str) -> None:
    model = adapted(case)
    for layer in spectral_layers(model).values():
        layer.set_adapter("a")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{path}.spectral_values.a" for path in TARGETS}
    added = {name.replace(".base_layer", "") for name in model.state_dict()} - set(Net().state_dict())
    assert added == trainable


@every_method
def test_removing_the_adapter_gives_the_original_modules_back(case: str) -> None:
    model = Net()
    layers = [model.wide, model.tall, model.square]
    inject(model, CASES[case](), "a")
    inject(model, SVFTConfig(target_modules=["wide"]), "b")
    remove(model, "a")
    assert list(spectral_layers(model)) == ["wide"] and list(model.peft_config) == ["b"]  # type: ignore[arg-type]
    remove(model, "b")
    assert [model.wide, model.tall, model.square] == layers
    assert list(model.state_dict()) == list(Net().state_dict())
    assert not hasattr(model, "peft_config")


@every_method
def test_a_deep_copy_is_independent(case: str) -> None:
    model = adapted(case)
    twin = copy.deepcopy(model)
    expected = model(inputs())
    assert torch.equal(twin(inputs()), expected)
    randomize(twin, "a", seed=9)
    assert not torch.equal(twin(inputs()), expected)
    assert torch.equal(model(inputs()), expected)


@every_method
def test_peft_model_saves_loads_and_merges(case: str, tmp_path: Path) -> None:
    model = get_peft_model(Net(), CASES[case]())
    randomize(model, "default")
    expected = model(inputs())
    model.save_pretrained(str(tmp_path))
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, SpectralConfig)
    again = PeftModel.from_pretrained(Net(), str(tmp_path))
    assert torch.equal(again(inputs()), expected)
    with again.disable_adapter():
        assert torch.equal(again(inputs()), Net()(inputs()))
    again.load_adapter(str(tmp_path), "second")
    again.set_adapter("second")
    assert torch.equal(again(inputs()), expected)
    merged = again.merge_and_unload()
    assert type(merged.square) is nn.Linear
    torch.testing.assert_close(merged(inputs()), expected, rtol=1e-5, atol=1e-5)


# Several adapters


def test_adapters_of_different_methods_add_up() -> None:
    model = adapted("svft banded 1")
    inject(model, CASES["svdiff, rank 3"](), "b")
    inject(model, CASES["svft plain"](), "c")
    for seed, name in enumerate("abc"):
        randomize(model, name, seed=seed)
    strengths = {"a": 0.7, "b": 1.3, "c": -0.4}
    cases = {"a": "svft banded 1", "b": "svdiff, rank 3", "c": "svft plain"}
    for layer in spectral_layers(model).values():
        layer.set_adapter(list("abc"))
        for name, strength in strengths.items():
            layer.set_scale(name, strength)
    x = torch.randn(3, 11)
    layer = spectral_layers(model)["tall"]
    update = sum(
        explicit_update(layer, layer.spectral_values[name], CASES[cases[name]](), strengths[name]) for name in "abc"
    )
    torch.testing.assert_close(model.tall(x), x @ (layer.get_base_layer().weight + update).T, rtol=1e-5, atol=1e-5)


def test_two_svdiff_adapters_meet_inside_the_relu() -> None:
    model = adapted("svdiff")
    inject(model, CASES["svdiff"](), "b")
    layer = spectral_layers(model)["wide"]
    U, S, Vh = layer.factors
    with torch.no_grad():
        layer.spectral_values["a"].copy_(-3 * S)
        layer.spectral_values["b"].copy_(2.5 * S)
    layer.set_adapter(["a", "b"])
    x = inputs()
    expected = x @ ((U * (0.5 * S)) @ Vh).T + layer.get_base_layer().bias  # relu(S - 3 S + 2.5 S), not 0 + 3.5 S
    torch.testing.assert_close(model.wide(x), expected, rtol=1e-5, atol=1e-5)


def test_factors_are_shared_by_all_adapters_of_a_layer() -> None:
    model = adapted("svft plain")
    before = model.wide.factors  # type: ignore[union-attr]
    inject(model, CASES["svft banded 3"](), "b")
    assert model.wide.factors is before  # type: ignore[union-attr]
    assert type(model.wide.base_layer) is nn.Linear


def test_the_scale_of_one_call_is_taken_back_exactly() -> None:
    model = adapted("svft plain")
    layer = spectral_layers(model)["wide"]
    layer.set_scale("a", 0.7)
    expected = layer.get_delta_weight("a")
    layer.scale_layer(0.3)
    torch.testing.assert_close(layer.get_delta_weight("a"), 0.3 * expected)
    layer.unscale_layer(0.3)
    assert torch.equal(layer.get_delta_weight("a"), expected)
    layer.scale_layer(0.0)
    assert not layer.get_delta_weight("a").any()
    layer.set_scale("a", 1.0)  # how diffusers ends a call with scale 0
    assert torch.equal(layer.get_delta_weight("a"), expected)


@pytest.mark.parametrize("lora_first", [True, False])
def test_a_lora_on_the_same_layers(lora_first: bool) -> None:
    model = Net()
    lora = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    torch.manual_seed(5)
    for config, name in ((lora, "lora"), (CASES["svft banded 1"](), "a"))[:: 1 if lora_first else -1]:
        inject_adapter_in_model(config, model, name)
    randomize(model, "a")
    both = model(inputs())
    inject(model, CASES["svft plain"](), "b")
    assert sum(isinstance(module, SpectralLayer) for module in model.modules()) == len(TARGETS), "b shares wrappers"
    remove(model, "b")
    for layer in spectral_layers(model).values():
        layer.set_adapter("a")
    assert torch.equal(model(inputs()), both)
    for _ in range(2):
        model.apply(lambda module: module.merge() if hasattr(module, "merge") else None)
        torch.testing.assert_close(model(inputs()), both, rtol=1e-4, atol=1e-5)
        model.apply(lambda module: module.unmerge() if hasattr(module, "unmerge") else None)
        torch.testing.assert_close(model(inputs()), both, rtol=1e-4, atol=1e-5)


# Errors, before anything changes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpectralConfig(method="svd"), "unknown method 'svd'; choose from svft, svdiff"),
        (
            lambda: SVFTConfig(pattern="diagonal"),
            "unknown pattern 'diagonal' for method svft; choose from plain, banded",
        ),
        (lambda: SpectralConfig(method="svdiff", pattern="banded", off_diagonals=1), "unknown pattern 'banded'"),
        (lambda: SVFTConfig(pattern="banded"), "off_diagonals of at least 1"),
        (lambda: SVFTConfig(off_diagonals=2), "plain has no off-diagonals"),
        (lambda: SVFTConfig(rank=0), "rank must be at least 1"),
        (
            lambda: SVDiffConfig(targets="atention"),
            "unknown targets 'atention'; choose from attention, cross-attention",
        ),
    ],
)
def test_options_that_do_not_exist_are_refused_with_the_choices(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: SVFTConfig(pattern="banded", off_diagonals=6, target_modules=TARGETS), "layer wide: off_diagonals=6"),
        (lambda: SVFTConfig(rank=7, target_modules=TARGETS), "layer wide has 6 singular values"),
        (lambda: SVFTConfig(target_modules=[*TARGETS, "conv"]), "layer conv is a Conv1d"),
        (lambda: SVFTConfig(targets="attention"), "match no layer of Net; choose from all-linear"),
    ],
)
def test_layers_that_cannot_carry_the_adapter_leave_the_model_as_it_was(
    config: Callable[[], SpectralConfig], message: str
) -> None:
    for model in (Net(), adapted("svdiff", name="other")):
        before = (list(model.state_dict()), list(getattr(model, "peft_config", {})))
        with pytest.raises(UserError, match=message):
            inject(model, config(), "a")
        assert (list(model.state_dict()), list(getattr(model, "peft_config", {}))) == before


def test_weights_that_cannot_be_decomposed_are_named() -> None:
    model = Net()
    with torch.no_grad():
        model.tall.weight[2, 3] = float("nan")
    with pytest.raises(UserError, match="layer tall can't be decomposed: the weight holds NaN"):
        inject(model, CASES["svft plain"](), "a")
    assert type(model.wide) is nn.Linear


def test_nothing_is_decomposed_while_an_adapter_is_fused() -> None:
    model = adapted("svft plain")
    spectral_layers(model)["wide"].merge()
    with pytest.raises(UserError, match=r"fused into layer wide; call pipe.unfuse_lora\(\) first"):
        inject(model, CASES["svdiff"](), "b")


def test_a_picture_in_inference_mode_leaves_a_16_bit_layer_trainable() -> None:
    model = adapted("svft plain", dtype=torch.bfloat16)
    with torch.inference_mode():
        model(inputs(torch.bfloat16))
    x = inputs(torch.bfloat16).requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_merge_refuses_values_that_are_not_finite_when_asked_to() -> None:
    model = adapted("svft plain")
    layer = spectral_layers(model)["wide"]
    before = digest(model)
    with torch.no_grad():
        layer.spectral_values["a"][0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        layer.merge(safe_merge=True)
    assert digest(model) == before and not layer.merged


# Presets


def test_presets_name_the_layers_by_what_they_do() -> None:
    unet = {preset: set(matching_layers(tiny_unet(), preset)) for preset in PRESETS}
    blocks = 4  # one in the down path, one in the middle, two in the up path
    assert len(unet["attention"]) == 8 * blocks
    assert len(unet["cross-attention"]) == 4 * blocks and unet["cross-attention"] < unet["attention"]
    assert len(unet["feed-forward"]) == 2 * blocks
    assert unet["attention+feed-forward"] == unet["attention"] | unet["feed-forward"]
    assert unet["attention+feed-forward"] < unet["all-linear"]
    assert "time_embedding.linear_1" in unet["all-linear"]
    text = {preset: matching_layers(tiny_text_encoder(), preset) for preset in PRESETS if preset != "cross-attention"}
    assert [len(text[preset]) for preset in text] == [8, 4, 12, 12]
    with pytest.raises(UserError, match="match no layer of CLIPTextModel; choose from attention, feed-forward"):
        matching_layers(tiny_text_encoder(), "cross-attention")


def test_presets_see_adapted_layers_under_their_own_names() -> None:
    unet = tiny_unet()
    before = {preset: matching_layers(unet, preset) for preset in PRESETS}
    unet.add_adapter(SVFTConfig(targets="all-linear"), "a")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "lora")
    assert {preset: matching_layers(unet, preset) for preset in PRESETS} == before


def test_one_config_serves_two_models() -> None:
    config = SVFTConfig(pattern="banded", off_diagonals=2)
    unet, text_encoder = tiny_unet(), tiny_text_encoder()
    inject(unet, config, "a")
    inject(text_encoder, config, "a")
    assert len(spectral_layers(unet)) == 40 and len(spectral_layers(text_encoder)) == 12
    assert config.target_modules is None


# diffusers


def test_unet_adapters_of_diffusers() -> None:
    unet = tiny_unet()
    base = unet(**tiny_inputs()).sample
    unet.add_adapter(SVFTConfig(pattern="banded", off_diagonals=2), "a")
    unet.add_adapter(SVDiffConfig(targets="cross-attention"), "b")
    randomize(unet, "a", scale=0.3)
    randomize(unet, "b", scale=0.3)
    unet.set_adapters(["a", "b"], [0.7, 0.3])
    both = unet(**tiny_inputs()).sample
    for path, layer in spectral_layers(unet).items():
        assert layer.weights == ({"a": 0.7, "b": 0.3} if "attn2" in path else {"a": 0.7})
    unet.set_adapters(["a", "b"], [0.0, 0.0])
    assert torch.equal(unet(**tiny_inputs()).sample, base)
    unet.set_adapters(["a", "b"], [0.7, 0.3])
    unet.fuse_lora()
    torch.testing.assert_close(unet(**tiny_inputs()).sample, both, rtol=1e-4, atol=1e-5)
    unet.unfuse_lora()
    assert torch.equal(unet(**tiny_inputs()).sample, both)
    unet.disable_adapters()
    assert torch.equal(unet(**tiny_inputs()).sample, base)
    unet.enable_adapters()
    unet.delete_adapters("a")
    unet.set_adapters("b", 0.3)
    assert not torch.equal(unet(**tiny_inputs()).sample, base)
    with pytest.raises(ValueError, match="already exists"):
        unet.add_adapter(SVFTConfig(), "b")


def test_training_under_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        unet = tiny_unet().train()
        unet.add_adapter(SVFTConfig(pattern="banded", off_diagonals=1), "a")
        randomize(unet, "a", scale=0.1)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(**tiny_inputs()).sample.square().mean().backward()
        gradients.append([values.grad for values in values_of(unet).values()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)


def test_autocast_in_bfloat16_trains_float32_values() -> None:
    unet = tiny_unet()
    unet.add_adapter(SVFTConfig(), "a")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = unet(**tiny_inputs()).sample.float().square().mean()
    loss.backward()
    for values in values_of(unet).values():
        assert values.grad is not None and values.grad.dtype == torch.float32
    assert sum(float(values.grad.abs().sum()) for values in values_of(unet).values() if values.grad is not None) > 0
