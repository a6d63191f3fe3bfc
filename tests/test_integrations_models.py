"""Adapters in models of transformers: text encoders, language and vision models, with PEFT around them or without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted_models import CONFIGS, digest_of_base, error, output_of, randomize
from peft import PeftModel, get_peft_model
from tiny_models import tiny_text_encoder, tiny_tokens
from tiny_transformers import ARCHITECTURES, tiny_gpt2, tiny_llama
from torch import nn

from svft_diffusion import SVFTConfig, VectorFitConfig
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.adapters.targets import adaptable_layers

MODELS = ["clip", "clip with projection", "t5", "llama", "gpt2", "vit"]
METHODS_OF_MODELS = ["svft random", "svdiff", "vectorfit", "siva random"]
# PEFT warns of every tied embedding, whatever the method does about it, and saves what it calls embedding layers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Model (has|with) `tie_word_embeddings=True`",
    "ignore:Input and output embeddings are no longer tied",
    "ignore:Setting `save_embedding_layers`",
)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS_OF_MODELS)
def test_a_model_trains_saves_loads_and_merges(method: str, name: str, tmp_path: Path) -> None:
    build, inputs = ARCHITECTURES[name].build, ARCHITECTURES[name].inputs()
    base = output_of(build(), inputs)
    model = get_peft_model(build(), CONFIGS[method](targets="all"))
    assert set(spectral_layers(model.get_base_model())) == set(adaptable_layers(build()))
    assert torch.equal(output_of(model, inputs), base)
    model(**inputs)[0].square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) > 0.8 * len(gradients)
    randomize(model, "default", scale=0.05)
    expected, before = output_of(model, inputs), digest_of_base(model)

    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(build(), str(tmp_path))
    assert torch.equal(output_of(again, inputs), expected)
    again.load_adapter(str(tmp_path), "second")
    again.set_adapter("second")
    assert error(output_of(again, inputs), expected, base) < 1e-5
    again.base_model.set_adapter(["default", "second"])
    assert not torch.allclose(output_of(again, inputs), expected)

    with model.disable_adapter():
        assert torch.equal(output_of(model, inputs), base)
    model.merge_adapter(safe_merge=True)
    assert error(output_of(model, inputs), expected, base) < 1e-4
    model.unmerge_adapter()
    assert digest_of_base(model) == before
    merged = model.merge_and_unload()
    assert type(merged) is type(build())
    assert error(output_of(merged, inputs), expected, base) < 1e-4


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_language_models_generate(build: type[nn.Module]) -> None:
    ids = tiny_tokens()["input_ids"][:, :4]
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    model = get_peft_model(build(), SVFTConfig(pattern="banded", off_diagonals=1, targets="attention+feed-forward"))
    before = model.generate(input_ids=ids, **settings)
    assert before.shape == (2, 8)
    randomize(model, "default", scale=2.0)
    adapted = model.generate(input_ids=ids, **settings)
    assert not torch.equal(adapted, before)
    model.merge_adapter()
    assert torch.equal(model.generate(input_ids=ids, **settings), adapted)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=ids, **settings), before)


@pytest.mark.parametrize("targets", ["attention", "feed-forward", "attention+feed-forward", "all-linear"])
@pytest.mark.parametrize("name", MODELS)
def test_presets_and_peft_agree_on_the_layers(name: str, targets: str) -> None:
    model = get_peft_model(ARCHITECTURES[name].build(), SVFTConfig(targets=targets))
    paths = set(spectral_layers(model.get_base_model()))
    assert paths and len(paths) == len(model.targeted_module_names)
    kinds = {layer.kind for layer in spectral_layers(model).values()}
    assert kinds <= {"linear", "conv1d"}


def test_embeddings_and_norms_by_name() -> None:
    config = VectorFitConfig(target_modules=["token_embedding", "layer_norm1", "final_layer_norm", "q_proj"])
    model = get_peft_model(tiny_text_encoder(), config)
    kinds = [layer.kind for layer in spectral_layers(model).values()]
    assert kinds.count("embedding") == 1 and kinds.count("norm") == 3 and kinds.count("linear") == 2


# Layers that share one weight


def tied_models() -> dict[str, tuple[nn.Module, str, str]]:
    """Models whose output layer shares the table of embeddings, with the paths of both."""
    return {
        "llama": (tiny_llama(tied=True), "model.embed_tokens", "lm_head"),
        "gpt2": (tiny_gpt2(), "transformer.wte", "lm_head"),
    }


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_into_a_tied_layer_leaves_the_other_one_alone(name: str) -> None:
    model, embedding, head = tied_models()[name]
    base, table = output_of(model, tiny_tokens()), model.get_submodule(head).weight
    assert model.get_submodule(embedding).weight is table
    peft_model = get_peft_model(model, VectorFitConfig(targets="all"))
    assert embedding in spectral_layers(model) and head not in spectral_layers(model)
    randomize(peft_model, "default", scale=0.1)
    expected, before = output_of(peft_model, tiny_tokens()), table.clone()
    for _ in range(2):
        peft_model.merge_adapter()
        assert error(output_of(peft_model, tiny_tokens()), expected, base) < 1e-4
        assert model.get_submodule(head).weight is table and torch.equal(table, before)
        peft_model.unmerge_adapter()
        assert model.get_submodule(embedding).get_base_layer().weight is table, "tied again"
        assert torch.equal(output_of(peft_model, tiny_tokens()), expected)
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        merged = peft_model.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    assert error(output_of(merged, tiny_tokens()), expected, base) < 1e-4
    assert torch.equal(merged.get_submodule(head).weight, before)


def test_merging_leaves_another_model_with_the_same_weights_alone() -> None:
    """Several adapters can each have their own copy of the modules over shared weights."""
    first, second = tiny_text_encoder(), tiny_text_encoder()
    for path, module in second.named_modules():
        for name in dict(module.named_parameters(recurse=False)):
            setattr(module, name, getattr(first.get_submodule(path), name))
    base = output_of(second, tiny_tokens())
    model = get_peft_model(first, SVFTConfig(targets="all"))
    randomize(model, "default")
    model.merge_adapter()
    assert not torch.equal(output_of(model, tiny_tokens()), base)
    assert torch.equal(output_of(second, tiny_tokens()), base)
