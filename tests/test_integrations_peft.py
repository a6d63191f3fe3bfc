"""What PEFT promises of every method (the behaviours of its own test matrix), for each method here."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from adapted_models import CONFIGS, IDS, Mixed, digest_of_base, every_method, randomize, trained
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor, nn

from svft_diffusion import SVFTConfig, VectorFitConfig
from svft_diffusion.adapters import SpectralConfig, tuner
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.adapters.layers import SpectralLayer
from svft_diffusion.spectral import SingularFactors

pytestmark = pytest.mark.filterwarnings("error:Found missing adapter keys", "error:Already found a `peft_config`")


def adapted(method: str, *, dtype: torch.dtype = torch.float32, seed: int | None = 2) -> PeftModel:
    model = get_peft_model(Mixed().to(dtype), CONFIGS[method](targets="all"))
    if seed is not None:
        randomize(model, "default", seed)
    return model


def base_output() -> Tensor:
    output: Tensor = Mixed()(IDS)
    return output


# Save and load


@every_method
def test_a_saved_adapter_loads_as_it_was(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    expected = model(IDS)
    assert not torch.allclose(expected, base_output(), atol=1e-3)
    model.save_pretrained(str(tmp_path))
    files = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert not {"model.safetensors", "config.json"} & files

    config, original = PeftConfig.from_pretrained(str(tmp_path)), model.peft_config["default"]
    assert isinstance(config, SpectralConfig) and config.inference_mode
    differing = {key for key, value in original.to_dict().items() if config.to_dict()[key] != value}
    assert differing <= {"inference_mode", "auto_mapping"}

    again = PeftModel.from_pretrained(Mixed(), str(tmp_path))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(again(IDS), model.eval()(IDS)) or torch.allclose(again(IDS), expected, rtol=1e-5, atol=1e-6)
    state, expected_state = again.state_dict(), model.state_dict()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[key], expected_state[key]) for key in state)


@every_method
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_more_copies_of_an_adapter_load_beside_it(method: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = adapted(method)
    expected = model(IDS)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(Mixed(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(again(IDS), expected, rtol=1e-5, atol=1e-6)
    result = again.load_adapter(str(tmp_path), "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert {tensor.device.type for tensor in again.state_dict().values()} == {"cpu"}
    again.set_adapter("second")
    torch.testing.assert_close(again(IDS), expected, rtol=1e-5, atol=1e-6)
    original = trained(model, "default")
    assert all(torch.equal(value, original[key]) for key, value in trained(again, "second").items())


def test_saving_selected_adapters_writes_no_other() -> None:
    model = adapted("svft random")
    tensors = set(get_peft_model_state_dict(model))
    for name in ("default2", "other_default", "efaul"):
        model.add_adapter(name, CONFIGS["svft random"](targets="all"))
    assert set(get_peft_model_state_dict(model, adapter_name="default")) == tensors
    assert all(key.startswith("base_model.model.") and "default" not in key for key in tensors)
    kinds = {key.rpartition(".")[2] for key in tensors}
    assert kinds == {"spectral_values", "spectral_norm", "spectral_positions", "spectral_sketch"}


def test_saving_with_several_adapters_makes_a_folder_for_each(tmp_path: Path) -> None:
    model = adapted("svft plain")
    model.add_adapter("new", CONFIGS["svdiff"](targets="all"))
    randomize(model, "new", 5)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(Mixed(), str(tmp_path))
    again.load_adapter(str(tmp_path / "new"), "new")
    for name in ("default", "new"):
        assert all(torch.equal(value, trained(model, name)[key]) for key, value in trained(again, name).items())
    model.save_pretrained(str(tmp_path / "one"), selected_adapters=["default"])
    assert not (tmp_path / "one" / "new").exists()


def test_a_config_that_names_its_layers_is_used_as_it_is(tmp_path: Path) -> None:
    config = SVFTConfig(target_modules=["tall"])
    model = get_peft_model(Mixed(), config)
    assert model.peft_config["default"] is config
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(Mixed(), str(tmp_path), config=config)
    assert again.peft_config["default"] is config and config.inference_mode


def test_one_config_with_a_preset_serves_two_models() -> None:
    config = SVFTConfig(targets="all-linear")
    first, second = get_peft_model(Mixed(), config), get_peft_model(nn.Sequential(nn.Linear(3, 4)), config)
    assert config.target_modules is None
    assert sorted(spectral_layers(first.get_base_model())) == ["conv1d", "tall", "wide"]
    assert sorted(spectral_layers(second.get_base_model())) == ["0"]


def test_a_model_and_its_pickled_and_deep_copies_are_independent() -> None:
    model = adapted("svft random")
    expected = model(IDS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS), expected)
        randomize(twin, "default", 9)
        assert not torch.equal(twin(IDS), expected)
        assert torch.equal(model(IDS), expected)


# The values of a file stand on the basis that its sketch tells


def flip_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine: every other singular pair has the other sign."""
    original = tuner.cached_factors_of

    def flipped(weights: dict[str, Tensor], **options: bool) -> dict[str, SingularFactors]:
        found = {}
        for path, (U, S, Vh) in original(weights).items():
            signs = torch.where(torch.arange(len(S)) % 2 == 0, -1.0, 1.0)
            found[path] = SingularFactors(U * signs, S, signs[:, None] * Vh)
        return found

    monkeypatch.setattr(tuner, "cached_factors_of", flipped)


@pytest.mark.parametrize("method", ["svft banded 1", "svft random", "svft top-k, rank 4", "siva random", "svft plain"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_directories_mean_the_same_on_flipped_factors(
    method: str, low_cpu_mem_usage: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(method)
    expected = model(IDS)
    model.save_pretrained(str(tmp_path))
    flip_signs(monkeypatch)
    again = PeftModel.from_pretrained(Mixed(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(again(IDS), expected, rtol=1e-5, atol=1e-5)
    # A second copy comes into layers whose factors another adapter stands on.
    again.load_adapter(str(tmp_path), "second", low_cpu_mem_usage=low_cpu_mem_usage)
    again.set_adapter("second")
    torch.testing.assert_close(again(IDS), expected, rtol=1e-5, atol=1e-5)


def test_a_second_adapter_follows_its_own_sketch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("svft banded 1")
    expected = model(IDS)
    model.save_pretrained(str(tmp_path))
    flip_signs(monkeypatch)
    other = get_peft_model(Mixed(), CONFIGS["svft banded 1"](targets="all"), "native")  # stands on flipped factors
    randomize(other, "native", 4)
    native = other(IDS)
    other.load_adapter(str(tmp_path), "loaded")
    torch.testing.assert_close(other(IDS), native)
    other.set_adapter("loaded")
    torch.testing.assert_close(other(IDS), expected, rtol=1e-5, atol=1e-5)


def test_positions_are_those_of_the_file(tmp_path: Path) -> None:
    model = get_peft_model(Mixed(), SVFTConfig(pattern="random", off_diagonals=1, seed=1, target_modules=["tall"]))
    randomize(model, "default")
    expected = model(IDS)
    model.save_pretrained(str(tmp_path))
    config = SVFTConfig(pattern="random", off_diagonals=1, seed=77, target_modules=["tall"])
    again = PeftModel.from_pretrained(Mixed(), str(tmp_path), config=config)
    torch.testing.assert_close(again(IDS), expected, rtol=1e-5, atol=1e-6)


@every_method
def test_layers_can_be_chosen_by_the_keys_of_a_state_dict(method: str) -> None:
    model = inject_adapter_in_model(CONFIGS[method](targets="all"), Mixed(), "a")
    randomize(model, "a")
    state = get_peft_model_state_dict(model, adapter_name="a")
    again = inject_adapter_in_model(CONFIGS[method](), Mixed(), "b", state_dict=state)
    assert spectral_layers(again).keys() == spectral_layers(model).keys()
    assert again.peft_config["b"].target_modules == set(spectral_layers(model))
    result = set_peft_model_state_dict(again, state, adapter_name="b")
    assert result.unexpected_keys == []
    torch.testing.assert_close(again(IDS), model(IDS), rtol=1e-5, atol=1e-6)


# Merge


@every_method
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_and_taking_out_again(method: str, safe_merge: bool) -> None:
    model = adapted(method)
    before, expected = digest_of_base(model), model(IDS)
    for _ in range(2):
        model.merge_adapter(safe_merge=safe_merge)
        torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)
        assert digest_of_base(model) != before
        model.unmerge_adapter()
        assert digest_of_base(model) == before
        assert torch.equal(model(IDS), expected)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    torch.testing.assert_close(merged(IDS), expected, rtol=1e-5, atol=1e-5)
    assert type(merged) is Mixed and list(merged.state_dict()) == list(Mixed().state_dict())
    assert [type(module) for module in merged.modules()] == [type(module) for module in Mixed().modules()]
    assert not hasattr(merged, "peft_config")


@every_method
def test_unloading_gives_the_base_model_back(method: str) -> None:
    unloaded = adapted(method).unload()
    assert torch.equal(unloaded(IDS), base_output())
    assert not any(isinstance(module, SpectralLayer) for module in unloaded.modules())


@every_method
def test_numbers_that_are_not_finite_are_merged_nowhere(method: str) -> None:
    model = adapted(method)
    before = digest_of_base(model)
    with torch.no_grad():
        for layer in spectral_layers(model).values():
            for part in layer.trained_parts("default").values():
                part[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.merge_adapter(safe_merge=True)
    assert digest_of_base(model) == before
    model.merge_adapter()  # as PEFT's own methods, unless asked to be safe
    assert model(IDS).isnan().any()
    model.unmerge_adapter()
    assert digest_of_base(model) == before


@every_method
def test_several_adapters_act_and_merge_together(method: str) -> None:
    model = adapted(method)
    first = model(IDS)
    model.add_adapter("b", CONFIGS[method](targets="all"))
    randomize(model, "b", 8)
    assert torch.equal(model(IDS), first), "an added adapter is not active"
    model.set_adapter("b")
    second = model(IDS)
    model.base_model.set_adapter(["default", "b"])
    both = model(IDS)
    assert not torch.allclose(both, first) and not torch.allclose(both, second)
    model.merge_adapter(["b"])
    torch.testing.assert_close(model(IDS), second, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="You are now additionally merging default"):
        model.merge_adapter(["default"])
    torch.testing.assert_close(model(IDS), both, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    torch.testing.assert_close(model(IDS), both, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(IDS), both)


# Switch off and delete


@every_method
def test_within_disable_adapter_the_model_is_the_base(method: str) -> None:
    model = adapted(method)
    expected = model(IDS)
    with model.disable_adapter():
        assert torch.equal(model(IDS), base_output())
    assert torch.equal(model(IDS), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(IDS), base_output()), "disabling takes out what was merged"
    assert torch.equal(model(IDS), expected)


@every_method
def test_deleting_adapters(method: str) -> None:
    model = adapted(method)
    expected = model(IDS)
    model.add_adapter("b", CONFIGS[method](targets="all"))
    model.delete_adapter("b")
    assert torch.equal(model(IDS), expected), "an inactive one"
    assert list(model.peft_config) == ["default"] and not any(key.endswith(".b") for key in model.state_dict())
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("b")
    model.add_adapter("third", CONFIGS[method](targets="all"))
    randomize(model, "third", 8)
    with pytest.warns(UserWarning, match="Setting active adapter to third"):
        model.delete_adapter("default")
    assert model.active_adapters == ["third"]
    assert not torch.allclose(model(IDS), expected) and not torch.allclose(model(IDS), base_output())
    model.delete_adapter("third")
    assert torch.equal(model.base_model(IDS), base_output()), "the last one"


# Train


@every_method
def test_only_the_active_adapter_trains(method: str) -> None:
    model = adapted(method)
    model.add_adapter("b", CONFIGS[method](targets="all"))
    randomize(model, "b", 8)
    before, base = trained(model, "b"), digest_of_base(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("spectral_" in name and name.endswith(".default") for name in trainable)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    start = trained(model, "default")
    for _ in range(3):
        optimizer.zero_grad()
        (model(IDS) * torch.linspace(-1, 1, 6)).tanh().mean().backward()
        optimizer.step()
    assert digest_of_base(model) == base
    assert all(torch.equal(value, before[key]) for key, value in trained(model, "b").items())
    assert all(not torch.equal(value, start[key]) for key, value in trained(model, "default").items())
    model.set_adapter("b")
    assert all(name.endswith(".b") for name, p in model.named_parameters() if p.requires_grad)
    with model.disable_adapter():
        assert not any(parameter.requires_grad for parameter in model.parameters())


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_models_in_16_bit(method: str, dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    config = CONFIGS[method](targets="all")
    model = get_peft_model(Mixed().to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    randomize(model, "default")
    assert {tensor.dtype for tensor in trained(model, "default").values()} == {torch.float32}, "whatever is asked for"
    output = model(IDS)
    assert output.dtype == dtype and output.isfinite().all()
    exact = adapted(method)(IDS)
    torch.testing.assert_close(output.float(), exact, rtol=0.1, atol=0.1)
    output.float().square().mean().backward()
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).float(), exact, rtol=0.1, atol=0.1)


def test_a_second_adapter_raises_no_alarm() -> None:
    model = Mixed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_adapter_in_model(SVFTConfig(targets="all"), model, "a")
        inject_adapter_in_model(VectorFitConfig(targets="all"), model, "b")
    assert "spectral_values" in repr(model)


# Where PEFT ends; a test that fails here says that PEFT has moved on


def test_a_linear_adapter_becomes_a_lora_but_no_other(tmp_path: Path) -> None:
    model = get_peft_model(Mixed(), SVFTConfig(rank=3, target_modules=["tall", "wide"]))
    randomize(model, "default")
    config, state = convert_to_lora(model, rank=3)
    lora = get_peft_model(Mixed(), config)
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(lora(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError):
        convert_to_lora(adapted("svft plain"), rank=3)


def test_what_peft_keeps_for_its_own_methods(tmp_path: Path) -> None:
    model = adapted("svft plain")
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", LoraConfig(target_modules=["tall"]))
    with pytest.raises(ValueError, match="PeftMixedModel"):
        get_peft_model(Mixed(), SVFTConfig(targets="all"), mixed=True)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="only supports"):
        hotswap_adapter(model, str(tmp_path), "default")
    assert load_file(tmp_path / "adapter_model.safetensors")
