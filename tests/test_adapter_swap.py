"""Putting a file in the place of a loaded adapter, and leaving no trace where that or loading fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_adapter_portability import relative_error, updates, write
from tiny_models import tiny_inputs, tiny_unet
from torch import Tensor, nn

from svft_diffusion import (
    SiVAConfig,
    SVFTConfig,
    load_adapter,
    save_adapter,
    set_adapters,
    swap_adapter,
)
from svft_diffusion.adapters import SpectralConfig, add_training_adapter, runtime
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.adapters.training import adapted_layers, live_tensors
from svft_diffusion.errors import UserError
from svft_diffusion.files import AdapterMetadata, read_adapter

LAYOUTS: dict[str, Callable[[int], SpectralConfig]] = {
    "banded": lambda seed: SVFTConfig(pattern="banded", off_diagonals=1, seed=seed),
    "random": lambda seed: SVFTConfig(pattern="random", off_diagonals=1, seed=seed, init="official"),
    "siva": lambda seed: SiVAConfig(fraction=0.5, select="random", seed=seed, train_bias=True),
}


def output(models: dict[str, nn.Module]) -> Tensor:
    with torch.no_grad():
        result: Tensor = models["unet"](**tiny_inputs()).sample
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_swapped_adapter_is_the_other_one_in_the_same_tensors(tmp_path: Path, layout: str) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    write(one, LAYOUTS[layout](1), seed=1)
    expected = write(two, LAYOUTS[layout](2), seed=2)
    models = {"unet": tiny_unet()}
    load_adapter(models, one, "slot")
    set_adapters(models, {"slot": 0.5})
    places = {key: tensor.data_ptr() for key, tensor in live_tensors(adapted_layers(models, "slot"), "slot").items()}
    before = output(models)
    swap_adapter(models, "slot", two)
    tensors = live_tensors(adapted_layers(models, "slot"), "slot")
    assert {key: tensor.data_ptr() for key, tensor in tensors.items()} == places
    assert {layer.weights["slot"] for layer in spectral_layers(models["unet"]).values()} == {0.5}
    fresh = {"unet": tiny_unet()}
    load_adapter(fresh, two, "slot")
    set_adapters(fresh, {"slot": 0.5})
    assert torch.equal(output(models), output(fresh)) and not torch.equal(output(models), before)
    set_adapters(models, {"slot": 1.0})
    assert relative_error(updates(models, "slot"), expected) == 0
    again = save_adapter(models, "slot", tmp_path / "again.safetensors", metadata=AdapterMetadata(base_name="toy"))
    assert again.read_bytes() == two.read_bytes()


def test_what_can_not_take_the_place_leaves_it_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tmp_path / "one.safetensors"
    write(one, LAYOUTS["random"](1))
    files = {
        "pattern is banded, the adapter's random": SVFTConfig(pattern="banded", off_diagonals=1),
        "off_diagonals is 2": SVFTConfig(pattern="random", off_diagonals=2, init="official"),
        "method is siva": SiVAConfig(),
        "layers differ": SVFTConfig(pattern="random", off_diagonals=1, init="official", targets="attention"),
    }
    models = {"unet": tiny_unet()}
    load_adapter(models, one, "slot")
    before, state = (
        output(models),
        {k: t.clone() for k, t in live_tensors(adapted_layers(models, "slot"), "slot").items()},
    )

    def assert_as_it_was() -> None:
        tensors = live_tensors(adapted_layers(models, "slot"), "slot")
        assert all(torch.equal(tensor, state[key]) for key, tensor in tensors.items())
        assert torch.equal(output(models), before)

    for message, config in files.items():
        write(tmp_path / "two.safetensors", config)
        with pytest.raises(UserError, match=message):
            swap_adapter(models, "slot", tmp_path / "two.safetensors")
        assert_as_it_was()
    write(tmp_path / "two.safetensors", LAYOUTS["random"](2), base=5)
    with pytest.raises(UserError, match="was trained on the base toy"):
        swap_adapter(models, "slot", tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="nothing is left of it"):
        swap_adapter(models, "slot", tmp_path / "two.safetensors", on_mismatch="align")
    assert_as_it_was()
    with pytest.raises(UserError, match="no adapter 'cat'"):
        swap_adapter(models, "cat", one)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime, "judge_update", interrupted)
    write(tmp_path / "two.safetensors", LAYOUTS["random"](2))
    with pytest.raises(KeyboardInterrupt):
        swap_adapter(models, "slot", tmp_path / "two.safetensors")
    assert_as_it_was()


@pytest.mark.parametrize("place", ["inject", "copy_tensors", "align_layers", "measured_error", "judge_update"])
def test_an_interruption_while_loading_leaves_no_trace(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "one.safetensors", LAYOUTS["banded"](1))
    write(tmp_path / "two.safetensors", SVFTConfig(targets="all"))
    models = {"unet": tiny_unet()}
    load_adapter(models, tmp_path / "one.safetensors", "one")
    set_adapters(models, {"one": 0.5})
    trained = add_training_adapter(models, SVFTConfig(targets="cross-attention"), "trained")
    for layer in spectral_layers(models["unet"]).values():
        layer.set_adapter(["one", "trained"])
    flags = {name: parameter.requires_grad for name, parameter in models["unet"].named_parameters()}
    assert all(parameter.requires_grad for parameter in trained)
    before, modules = output(models), list(models["unet"].modules())
    original = getattr(runtime, place)

    def interrupted(*args: object) -> object:
        original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(models, tmp_path / "two.safetensors")
    assert [name for name, _ in models["unet"].named_parameters()] == list(flags)
    assert list(models["unet"].modules()) == modules
    assert {name: parameter.requires_grad for name, parameter in models["unet"].named_parameters()} == flags
    assert set(models["unet"].peft_config) == {"one", "trained"}
    assert torch.equal(output(models), before)
    monkeypatch.undo()
    load_adapter(models, tmp_path / "two.safetensors")
    assert all(parameter.requires_grad for parameter in trained), "loading does not stop a training"
    assert all(layer.active_adapters == ["one", "trained", "two"] for layer in spectral_layers(models["unet"]).values())


def test_positions_beyond_the_core_matrix_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    for layout in ("random", "siva"):
        write(file, LAYOUTS[layout](1))
        header, tensors = read_adapter(file)
        key = next(name for name in tensors if name.endswith(".positions"))
        tensors[key][-1] = 2**31 - 1
        runtime.write_adapter(file, header, tensors)
        models = {"unet": tiny_unet()}
        with pytest.raises(UserError, match="has no such positions"):
            load_adapter(models, file)
        assert not hasattr(models["unet"], "peft_config") and not spectral_layers(models["unet"])
