"""Frozen weights that training steps don't read are away meanwhile, and nothing else about a run changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch
from adapter_cases import Holder, adapted_layer, base_layer, force_strategy, layer_input
from torch import Tensor, nn
from training_runs import short_run

from svft_diffusion.adapters.injection import remove
from svft_diffusion.adapters.layers import SpectralLayer, parking, placement
from svft_diffusion.adapters.layers.parking import Parking, page_out
from svft_diffusion.training import trainer
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.resting import parkable_layers
from svft_diffusion.training.step import optimizer_step

PLANS = ("linear tall", "transformers Conv1D", "conv 2-D")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[int, Tensor]:
    """Weights are NaN while they are parked; their values meanwhile, by address."""
    kept: dict[int, Tensor] = {}
    wake = Parking.wake

    def spoil(weight: Tensor) -> None:
        kept[weight.data_ptr()] = weight.clone()
        weight.fill_(torch.nan)

    def restore(self: Parking, module: nn.Module) -> None:
        if self.parked:
            module.weight.data.copy_(kept.pop(module.weight.data_ptr()))  # type: ignore[union-attr, operator, arg-type]
        wake(self, module)

    monkeypatch.setattr(parking, "page_out", spoil)
    monkeypatch.setattr(Parking, "wake", restore)
    return kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_a_weight_is_moved_off_an_accelerator() -> None:
    layer = nn.Linear(300, 500, device="cuda").requires_grad_(False)
    weight, values, place = layer.weight, layer.weight.detach().cpu(), Parking()
    before = torch.cuda.memory_allocated()
    place.allow()
    place.park(layer)
    assert torch.cuda.memory_allocated() <= before - weight.nbytes
    assert place.parked and weight.device.type == "cpu" and torch.equal(weight, values)
    place.wake(layer)
    assert not place.parked and weight.device.type == "cuda" and torch.equal(weight.cpu(), values)
    assert layer.weight is weight


@pytest.mark.parametrize("name", PLANS)
def test_a_weight_is_away_while_steps_read_the_factors(
    name: str, kept: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = adapted_layer("svft plain", name, trains=True), layer_input(name)
    expected = {}
    for strategy in ("activation", "factors"):
        force_strategy(monkeypatch, strategy)
        expected[strategy] = layer(x)
    assert not layer.has_parked_weight, "nobody has allowed it"
    layer.allow_parking()
    assert not layer.has_parked_weight, "no step yet"
    for _ in range(2):
        assert torch.equal(layer(x), expected["factors"])
        layer(x).sum().backward()
        assert layer.has_parked_weight and kept
    force_strategy(monkeypatch, "activation")
    assert torch.equal(layer(x), expected["activation"])
    assert not layer.has_parked_weight and not kept
    force_strategy(monkeypatch, "factors")
    layer(x)
    assert not layer.has_parked_weight, "some steps read it"
    layer.allow_parking()
    layer(x)
    assert layer.has_parked_weight


def _samples(layer: SpectralLayer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, layer(x))


def _base(layer: SpectralLayer, x: Tensor) -> Tensor:
    layer.enable_adapters(False)
    return cast(Tensor, layer(x))


def _off(layer: SpectralLayer, x: Tensor) -> Tensor:
    layer.set_scale("a", 0.0)
    return cast(Tensor, layer(x))


def _each_its_own(layer: SpectralLayer, x: Tensor) -> Tensor:
    layer.sample_weights = [{"a": 0.5}, {"a": 1.0}, {}]
    return cast(Tensor, layer(x))


def _fused(layer: SpectralLayer, x: Tensor) -> Tensor:
    layer.merge()
    return cast(Tensor, layer(x))


def _moved(layer: SpectralLayer, x: Tensor) -> Tensor:
    return cast(Tensor, layer.to(torch.float64).get_base_layer().weight)


def _removed(layer: SpectralLayer, x: Tensor) -> Tensor:
    model = Holder(layer)
    remove(model, "a")
    return cast(Tensor, model.layer(x))


def _another(layer: SpectralLayer, x: Tensor) -> Tensor:
    """Another tuner's layer inside."""
    layer.keeps_base_apart = True
    return cast(Tensor, layer(x))


@pytest.mark.parametrize("read", [_samples, _base, _off, _each_its_own, _fused, _moved, _removed, _another])
def test_whatever_reads_the_weight_finds_it(
    read: Callable[[SpectralLayer, Tensor], Tensor], kept: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    force_strategy(monkeypatch, "factors")
    x = layer_input("linear tall")
    expected = read(adapted_layer("svft plain", "linear tall", trains=True), x)
    layer = adapted_layer("svft plain", "linear tall", trains=True)
    layer.allow_parking()
    layer(x)
    assert layer.has_parked_weight
    assert torch.equal(read(layer, x), expected)
    assert not layer.has_parked_weight and not kept


def test_others_may_read_what_is_shared_or_asked_for() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = adapted_layer("svft plain", "linear tall")
            self.shared = adapted_layer("svft plain", "linear tall")
            self.other = base_layer("linear tall")
            self.other.weight = self.shared.get_base_layer().weight
            self.hooked = adapted_layer("svft plain", "linear tall")
            vars(self.hooked.get_base_layer())["_hf_hook"] = None
            self.apart = adapted_layer("svft plain", "linear tall")
            self.apart.keeps_base_apart = True
            self.free = adapted_layer("svft plain", "linear tall")

    model = Model()
    assert parkable_layers({"unet": model}) == [model.free]


# In a run


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    settings = {"validation_prompt": "a dog", "num_validation_images": 1, "validation_steps": 2, "max_train_steps": 3}
    return replace(short_run(tmp_path), **settings)


def _results(config: TrainingConfig, folder: str) -> tuple[bytes, bytes, list[bytes]]:
    """The adapter, the last loss and the samples of a run."""
    result = trainer.train(replace(config, output_dir=config.output_dir / folder))
    samples = [file.read_bytes() for file in sorted((result.output_dir / "samples").glob("*.png"))]
    return result.adapter.read_bytes(), repr(result.last_loss).encode(), samples


def test_a_run_is_the_same_bit_for_bit(
    config: TrainingConfig, kept: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    force_strategy(monkeypatch, "factors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parking, "allow", lambda parking: None)
        expected = _results(config, "expected")
    parked: list[int] = []

    def step(run: Any, *args: Any) -> Any:
        _ = run.base_digests  # on an accelerator they are read from where the weight is
        metrics = optimizer_step(run, *args)
        parked.append(len(kept))
        return metrics

    monkeypatch.setattr(trainer, "optimizer_step", step)
    assert _results(config, "parked") == expected
    assert min(parked) > 5 and not kept, "back for the samples, and not away again without a step"


def test_weights_stay_where_every_step_reads_them(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parking, "allow", lambda parking: pytest.fail("allowed"))
    prior = {"with_prior_preservation": True, "prior_source": "base", "class_prompt": "a photo of a dog"}
    trainer.train(replace(config, max_train_steps=2, validation_prompt=None, **prior))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_a_run_on_an_accelerator_is_the_same(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    force_strategy(monkeypatch, "factors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parking, "allow", lambda parking: None)
        expected = _results(config, "expected")
    assert _results(config, "parked") == expected


# Pages


def test_what_is_paged_out_keeps_its_values(tmp_path: Path) -> None:
    file = tmp_path / "values"
    values = torch.arange(1 << 22, dtype=torch.float32)
    file.write_bytes(values.numpy().tobytes())
    mapped = torch.from_file(str(file), shared=False, size=len(values), dtype=torch.float32)
    mapped[5000] = -1  # in this process alone
    assert mapped.sum() > 0
    before = psutil.Process().memory_info().rss
    page_out(mapped)
    if sys.platform == "linux":
        assert psutil.Process().memory_info().rss < before - (1 << 23)
    values[5000] = -1
    assert torch.equal(mapped, values)


def test_what_can_not_be_paged_out_stays() -> None:
    for tensor in (torch.ones(3), torch.ones(0), torch.ones(()), torch.ones(4000, 50)[:, ::2]):
        page_out(tensor)
        assert (tensor == 1).all()


def test_factors_with_copies_need_not_be_in_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    out: list[Tensor] = []
    monkeypatch.setattr(placement, "page_out", out.append)
    layer = adapted_layer("svft plain", "linear tall", trains=True)
    factors = layer.factors
    assert factors is not None
    layer(layer_input("linear tall"))
    assert not out, "products read the factors themselves"
    with torch.autocast("cpu", torch.bfloat16):
        layer(layer_input("linear tall"))
    assert [tensor.data_ptr() for tensor in out] == [factors.U.data_ptr(), factors.Vh.data_ptr()]
    layer = adapted_layer("svft plain, rank 3", "linear tall", trains=True)
    factors = layer.factors
    assert factors is not None
    out.clear()
    layer(layer_input("linear tall"))
    assert [tensor.data_ptr() for tensor in out] == [factors.U.data_ptr()], "some rows of Vh are no copy"
