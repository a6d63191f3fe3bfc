"""Weights of adapters: by component, by block, by sample of a batch."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_inputs, tiny_text_encoder, tiny_unet
from torch import Tensor, nn

from svft_diffusion import SVDiffConfig, SVFTConfig, per_sample_adapters, set_adapters, unload_adapter
from svft_diffusion.adapters import add_training_adapter
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.adapters.layer_index import indexed_layers
from svft_diffusion.errors import UserError


@pytest.fixture
def models() -> dict[str, nn.Module]:
    """Two frozen adapters: "dog" everywhere, "style" in the UNet."""
    models: dict[str, nn.Module] = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}
    generator = torch.Generator().manual_seed(0)
    for name, config, components in (
        ("dog", SVFTConfig(), models),
        ("style", SVDiffConfig(targets="attention"), {"unet": models["unet"]}),
    ):
        for parameter in add_training_adapter(components, config, name):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    set_adapters(models, {"dog": 1.0, "style": 1.0})
    for model in models.values():
        model.requires_grad_(False)
    return models


def output(models: dict[str, nn.Module]) -> Tensor:
    with torch.no_grad():
        result: Tensor = models["unet"](**tiny_inputs()).sample
    return result


def weights(models: dict[str, nn.Module], component: str, adapter: str) -> dict[str, float]:
    return {path: layer.weights[adapter] for path, layer in spectral_layers(models[component], adapter).items()}


def test_the_longest_path_that_leads_to_a_layer_counts(models: dict[str, nn.Module]) -> None:
    blocks = {"down_blocks": 0.5, "down_blocks.1.attentions.0.transformer_blocks.0.attn1": 0.7, "up_blocks.0": -1.0}
    set_adapters(models, {"dog": {"unet": blocks}})
    found = weights(models, "unet", "dog")
    assert set(found.values()) == {0.5, 0.7, -1.0, 0.0}
    for path, weight in found.items():
        block = path.partition(".")[0]
        expected = {"down_blocks": 0.7 if ".attn1." in path else 0.5, "mid_block": 0.0, "up_blocks": -1.0}[block]
        assert weight == expected, path
    assert set(weights(models, "text_encoder", "dog").values()) == {0.0}
    set_adapters(models, {"dog": {"unet": {"mid_block": 0.1, "": 0.9}, "text_encoder": 0.2}})
    found = weights(models, "unet", "dog")
    assert {weight for path, weight in found.items() if path.startswith("mid_block")} == {0.1}
    assert {weight for path, weight in found.items() if not path.startswith("mid_block")} == {0.9}
    assert set(weights(models, "text_encoder", "dog").values()) == {0.2}


def test_blocks_of_a_text_encoder_are_called_as_in_files(models: dict[str, nn.Module]) -> None:
    for prefix in ("text_model.encoder.layers.1", "text_model"):
        set_adapters(models, {"dog": {"text_encoder": {prefix: 0.5}}})
        found = weights(models, "text_encoder", "dog")
        lit = {path for path, weight in found.items() if weight == 0.5}
        assert lit == ({path for path in found if ".1." in path} if prefix != "text_model" else set(found))


def test_a_block_without_adapted_layers_is_refused(models: dict[str, nn.Module]) -> None:
    before = output(models)
    for blocks in ({"down": 0.5}, {"down_blocks.0": 0.5}, {"mid_block": 0.5, "up_block": 1.0}):
        with pytest.raises(UserError, match=r"no layer below .* in the unet; choose from down_blocks, .*up_blocks.0"):
            set_adapters(models, {"style": 0.0, "dog": {"unet": blocks}})
    with pytest.raises(UserError, match="finite number"):
        set_adapters(models, {"dog": {"unet": {"mid_block": float("inf")}}})
    assert torch.equal(output(models), before)


def test_layers_are_found_again_after_every_change(models: dict[str, nn.Module]) -> None:
    unet = models["unet"]
    assert indexed_layers(unet) == spectral_layers(unet) == indexed_layers(unet)
    before = len(indexed_layers(unet))
    add_training_adapter({"unet": unet}, SVFTConfig(targets="all"), "wide")
    assert indexed_layers(unet) == spectral_layers(unet) and len(indexed_layers(unet)) > before
    unload_adapter(models, "wide")
    assert indexed_layers(unet) == spectral_layers(unet) and len(indexed_layers(unet)) == before
    unet.delete_adapters("dog")
    assert indexed_layers(unet) == spectral_layers(unet)
    for name in ("style",):
        unload_adapter({"unet": unet}, name)
    assert indexed_layers(unet) == {}


def test_setting_weights_leaves_alone_who_trains(models: dict[str, nn.Module]) -> None:
    trained = add_training_adapter({"unet": tiny_unet()}, SVFTConfig(), "new")
    assert all(parameter.requires_grad for parameter in trained)
    fresh = {"unet": tiny_unet()}
    parameters = add_training_adapter(fresh, SVFTConfig(), "new")
    set_adapters(fresh, {"new": 0.5})
    assert all(parameter.requires_grad for parameter in parameters)


# Samples of a batch


def test_each_sample_has_its_own_weights(models: dict[str, nn.Module]) -> None:
    samples = [{"dog": 0.5, "style": 1.0}, {"style": {"unet": {"up_blocks": -0.7}}}]
    alone = []
    for index, sample in enumerate(samples):
        set_adapters(models, sample)
        alone.append(output(models)[index])
    set_adapters(models, {"dog": 1.0})
    before = output(models)
    with per_sample_adapters(models, samples):
        together = output(models)
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(alone[0], before[0], atol=1e-3)
    assert torch.equal(output(models), before)


def test_guidance_repeats_the_samples(models: dict[str, nn.Module]) -> None:
    inputs = {name: torch.cat([value, value]) for name, value in tiny_inputs().items()}
    with torch.no_grad(), per_sample_adapters(models, [{"dog": 1.0}, {"style": 0.5}]):
        once = output(models)
        twice = models["unet"](**inputs).sample
    torch.testing.assert_close(twice, torch.cat([once, once]), atol=1e-5, rtol=1e-4)


def test_samples_end_with_their_context_however_it_ends(models: dict[str, nn.Module]) -> None:
    before = output(models)
    for problem in (KeyboardInterrupt, ValueError):
        with pytest.raises(problem), per_sample_adapters(models, [{"dog": 0.3}]):
            assert not torch.equal(output(models), before)
            raise problem
        assert torch.equal(output(models), before)
    with per_sample_adapters(models, [{"dog": 0.3}]):
        outer = output(models)
        with per_sample_adapters(models, [{}]):
            assert not torch.equal(output(models), outer)
        assert torch.equal(output(models), outer)


def test_samples_that_make_no_sense(models: dict[str, nn.Module]) -> None:
    for samples, message in (
        ([], "at least one sample"),
        ([{"dog": 1.0}, {"cat": 1.0}], "no adapter 'cat'"),
        ([{"dog": {"vae": 1.0}}], "no component 'vae'"),
        ([{"dog": float("nan")}], "finite number"),
    ):
        with pytest.raises(UserError, match=message), per_sample_adapters(models, samples):  # type: ignore[arg-type]
            pass
    models["unet"].fuse_lora()
    with pytest.raises(UserError, match="is fused"), per_sample_adapters(models, [{"dog": 1.0}]):
        pass


@pytest.mark.parametrize("given", [["dog", "style"], "dog", None])
def test_names_without_weights_are_refused_with_an_example(models: dict[str, nn.Module], given: object) -> None:
    with pytest.raises(UserError, match=r"such as \{'dog': 1.0\}"):
        set_adapters(models, given)  # type: ignore[arg-type]
    if given is not None:
        with pytest.raises(UserError, match=r"such as \{'dog': 1.0\}"), per_sample_adapters(models, [given]):  # type: ignore[list-item]
            pass


def test_a_component_that_was_compiled_in_place_of_itself_is_found(models: dict[str, nn.Module]) -> None:
    expected = output(models)
    models["unet"] = torch.compile(models["unet"], backend="eager")  # type: ignore[assignment]
    set_adapters(models, {"dog": 0.0})
    set_adapters(models, {"dog": 1.0, "style": 1.0})
    torch.testing.assert_close(output(models), expected, rtol=1e-4, atol=1e-5)
