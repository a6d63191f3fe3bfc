"""Adapters on a whole pipeline: train, save, load, blend, unload."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import inject_adapter_in_model
from safetensors.torch import save_file
from tiny_models import tiny_inputs, tiny_pipeline, tiny_text_encoder, tiny_unet

import svft_diffusion
from svft_diffusion import (
    SiVAConfig,
    SVDiffConfig,
    SVFTConfig,
    VectorFitConfig,
    load_adapter,
    save_adapter,
    set_adapters,
    unload_adapter,
)
from svft_diffusion.adapters import (
    SpectralConfig,
    adapter_state,
    add_training_adapter,
    load_adapter_state,
    loaded_adapters,
)
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.errors import UserError
from svft_diffusion.files import (
    AdapterMetadata,
    BaseDigests,
    digests_of_pipeline,
    layer_names,
    read_adapter,
    read_header,
    write_adapter,
)

METADATA = AdapterMetadata(base_name="toy", trigger="sks", instance_prompt="a photo of sks dog", training={"steps": 3})
COMPONENTS = ("unet", "text_encoder")
CONFIGS = {
    "plain": SVFTConfig(),
    "banded": SVFTConfig(pattern="banded", off_diagonals=2),
    "svdiff": SVDiffConfig(targets="attention"),
    "rank": SVFTConfig(pattern="banded", off_diagonals=1, rank=5, targets="all-linear"),
    "random": SVFTConfig(pattern="random", off_diagonals=1, seed=3, init="official", targets="attention"),
    "top_k": SVFTConfig(pattern="top_k", off_diagonals=1, rank=7, targets="cross-attention"),
    "vectorfit": VectorFitConfig(targets="attention"),
    "siva": SiVAConfig(fraction=0.4, select="bottom"),
    "siva random": SiVAConfig(fraction=0.4, select="random", seed=5),
    "all": SVDiffConfig(targets="all", train_bias=True, norm_shift="scalar"),
    "all but norms": SVDiffConfig(targets="all", train_norm=False),
    "biases and norms": SpectralConfig(method="vectorfit", train_values=False, train_bias=True, train_norm=True),
}
# The text encoder has no cross-attention.
COMPONENTS_OF = {"top_k": ("unet",)}


def picture(pipe: StableDiffusionPipeline, scale: float | None = None) -> np.ndarray:
    kwargs = {} if scale is None else {"cross_attention_kwargs": {"scale": scale}}
    result = pipe(
        "a photo of sks dog",
        num_inference_steps=2,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **kwargs,
    )
    images: np.ndarray = result.images
    return images


def make_adapter(
    file: Path, config: SpectralConfig, seed: int = 1, components: tuple[str, ...] = COMPONENTS
) -> np.ndarray:
    """Write an adapter with random values; returns what the pipeline paints with it."""
    pipe = tiny_pipeline()
    parameters = add_training_adapter({name: getattr(pipe, name) for name in components}, config, "made")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_adapter(pipe, "made", file, metadata=METADATA)
    for parameter in parameters:
        parameter.requires_grad_(False)  # adapters that train run by other kernels, which round differently
    return picture(pipe)


@pytest.fixture
def dog(tmp_path: Path) -> Path:
    make_adapter(tmp_path / "dog.safetensors", CONFIGS["banded"])
    return tmp_path / "dog.safetensors"


@pytest.fixture
def style(tmp_path: Path) -> Path:
    make_adapter(tmp_path / "style.safetensors", CONFIGS["svdiff"], seed=2)
    return tmp_path / "style.safetensors"


def state_of(pipe: StableDiffusionPipeline) -> list[str]:
    return [name for component in COMPONENTS for name in getattr(pipe, component).state_dict()]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_saved_adapter_paints_the_same_picture_in_a_fresh_pipeline(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "dog.safetensors"
    components = COMPONENTS_OF.get(kind, COMPONENTS)
    expected = make_adapter(file, CONFIGS[kind], components=components)
    pipe = tiny_pipeline()
    base = picture(pipe)
    with caplog.at_level("WARNING"):
        assert load_adapter(pipe, file) == "dog"
    assert not caplog.records
    assert np.array_equal(picture(pipe), expected)
    assert np.abs(expected - base).max() > 1e-3
    own = [p for layer in spectral_layers(pipe.unet).values() for p in layer.trained_parts("dog").values()]
    assert own and not any(parameter.requires_grad for parameter in own)
    header = read_header(file)
    assert header.components == {component: len(spectral_layers(getattr(pipe, component))) for component in components}
    assert (header.trigger, header.targets, header.training) == ("sks", CONFIGS[kind].targets, {"steps": 3})
    assert (header.init, header.seed, header.fraction) == tuple(
        getattr(CONFIGS[kind], field) for field in ("init", "seed", "fraction")
    )
    again = save_adapter(pipe, "dog", tmp_path / "again.safetensors", metadata=METADATA)
    assert again.read_bytes() == file.read_bytes()


def test_files_spell_names_with_text_model(dog: Path) -> None:
    names = list(read_adapter(dog)[1])
    names.remove("sketch")
    text = [name for name in names if name.startswith("text_encoder.")]
    assert len(text) == 12 and all(name.startswith("text_encoder.text_model.encoder.layers.") for name in text)
    assert all(name.endswith(".values") for name in names)


def test_unloading_restores_modules_names_and_the_picture(dog: Path, style: Path) -> None:
    pipe = tiny_pipeline()
    base, names = picture(pipe), state_of(pipe)
    modules = [list(getattr(pipe, component).modules()) for component in COMPONENTS]
    load_adapter(pipe, dog)
    with_dog = picture(pipe)
    load_adapter(pipe, style)
    assert loaded_adapters(pipe) == ["dog", "style"]
    unload_adapter(pipe, "style")
    assert np.array_equal(picture(pipe), with_dog)
    unload_adapter(pipe, "dog")
    assert np.array_equal(picture(pipe), base)
    assert state_of(pipe) == names
    assert [list(getattr(pipe, component).modules()) for component in COMPONENTS] == modules
    assert load_adapter(pipe, dog) == "dog"
    assert np.array_equal(picture(pipe), with_dog)


def test_a_second_adapter_joins_the_first(dog: Path, style: Path) -> None:
    pipe = tiny_pipeline()
    load_adapter(pipe, dog)
    set_adapters(pipe, {"dog": 0.6})
    load_adapter(pipe, style)
    joined = picture(pipe)
    set_adapters(pipe, {"dog": 0.6, "style": 1.0})
    assert np.array_equal(picture(pipe), joined)
    pipe.set_adapters(["dog", "style"], [0.6, 1.0])
    np.testing.assert_allclose(picture(pipe), joined, atol=1e-5)


def test_weights(dog: Path, style: Path) -> None:
    pipe = tiny_pipeline()
    base = picture(pipe)
    load_adapter(pipe, dog)
    full = picture(pipe)
    load_adapter(pipe, style)
    set_adapters(pipe, {})
    assert np.array_equal(picture(pipe), base), "nothing mentioned"
    set_adapters(pipe, {"dog": 0, "style": {"unet": 0.0}})
    assert np.array_equal(picture(pipe), base), "all weights 0"
    set_adapters(pipe, {"dog": 1.0})
    assert np.array_equal(picture(pipe), full), "style is not mentioned"
    set_adapters(pipe, {"dog": {"unet": 0.5}})
    layers = [*spectral_layers(pipe.unet, "dog").values(), *spectral_layers(pipe.text_encoder, "dog").values()]
    assert [layer.weights["dog"] for layer in layers] == [0.5] * 40 + [0.0] * 12
    half = picture(pipe)
    assert not np.array_equal(half, base) and not np.array_equal(half, full)


def test_pipeline_methods_of_diffusers(dog: Path, style: Path) -> None:
    pipe = tiny_pipeline()
    base = picture(pipe)
    load_adapter(pipe, dog)
    load_adapter(pipe, style)
    pipe.set_adapters(["dog", "style"], [0.7, 0.3])
    both = picture(pipe)
    assert pipe.get_active_adapters() == ["dog", "style"]
    assert pipe.get_list_adapters() == {component: ["dog", "style"] for component in COMPONENTS}
    pipe.disable_lora()
    assert np.array_equal(picture(pipe), base)
    pipe.enable_lora()
    assert np.array_equal(picture(pipe), both)
    for _ in range(3):
        pipe.fuse_lora(components=["unet", "text_encoder"])
        np.testing.assert_allclose(picture(pipe), both, atol=1e-4)
        pipe.unfuse_lora(components=["unet", "text_encoder"])
        assert np.array_equal(picture(pipe), both)
    half = picture(pipe, scale=0.5)
    assert not np.array_equal(half, both) and not np.array_equal(half, base)
    assert np.array_equal(picture(pipe, scale=0.0), base)
    assert np.array_equal(picture(pipe), both), "the scale of a call ends with it"
    pipe.delete_adapters("style")
    set_adapters(pipe, {"dog": 0.7})
    assert loaded_adapters(pipe) == ["dog"]
    assert not np.array_equal(picture(pipe), base)


def test_fuse_with_a_scale_does_not_outlive_unfuse(dog: Path) -> None:
    pipe = tiny_pipeline()
    load_adapter(pipe, dog)
    expected = picture(pipe)
    pipe.fuse_lora(components=["unet", "text_encoder"], lora_scale=0.5)
    assert np.abs(picture(pipe) - expected).max() > 1e-3
    pipe.unfuse_lora(components=["unet", "text_encoder"])
    assert np.array_equal(picture(pipe), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_pipeline_takes_the_adapter(dog: Path, dtype: torch.dtype) -> None:
    exact, pipe = tiny_unet(), tiny_pipeline().to(dtype=dtype)
    base = pipe.unet(**tiny_inputs(dtype)).sample
    load_adapter(pipe, dog)
    output = pipe.unet(**tiny_inputs(dtype)).sample
    assert output.dtype == dtype and not torch.equal(output, base) and output.isfinite().all()
    assert {value.dtype for value in adapter_state(pipe, "dog").values()} == {torch.float32}
    set_adapters(pipe, {"dog": 0.0})
    assert torch.equal(pipe.unet(**tiny_inputs(dtype)).sample, base)
    pipe.to(dtype=torch.float32)
    assert not torch.equal(pipe.unet(**tiny_inputs()).sample, exact(**tiny_inputs()).sample)


# Refusals leave the pipeline as it was


def assert_untouched(pipe: StableDiffusionPipeline) -> None:
    fresh = tiny_pipeline()
    assert state_of(pipe) == state_of(fresh)
    assert not hasattr(pipe.unet, "peft_config") and not hasattr(pipe.text_encoder, "peft_config")
    assert loaded_adapters(pipe) == []


def rewritten(file: Path, **changes: object) -> Path:
    header, tensors = read_adapter(file)
    fields = {**header.__dict__, **changes}
    return write_adapter(file, type(header)(**fields), tensors)  # type: ignore[arg-type]


def test_a_foreign_method_is_refused(dog: Path) -> None:
    pipe = tiny_pipeline()
    with pytest.raises(UserError, match="unknown method 'magic'; choose from svft, svdiff, vectorfit, siva"):
        load_adapter(pipe, rewritten(dog, method="magic"))
    assert_untouched(pipe)


@pytest.mark.parametrize(("field", "value"), [("off_diagonals", 1), ("rank", 5)])
def test_values_that_do_not_fit_the_header_are_refused(dog: Path, field: str, value: int) -> None:
    pipe = tiny_pipeline()
    with pytest.raises(UserError, match=r"made for another architecture: layer .* takes"):
        load_adapter(pipe, rewritten(dog, **{field: value}))
    assert_untouched(pipe)


@pytest.mark.parametrize("layer", ["unet.no.such.layer", "text_encoder.text_model.encoder.layers.7.mlp.fc1"])
def test_layers_that_the_model_lacks_are_refused(dog: Path, layer: str) -> None:
    header, tensors = read_adapter(dog)
    header.components[layer.partition(".")[0]] += 1
    known = header.base.digests
    more = BaseDigests(*(digests + digests[:1] for digests in known))
    header = replace(header, base=replace(header.base, digests=more))
    write_adapter(dog, header, {**tensors, f"{layer}.bias": torch.ones(3)})
    pipe = tiny_pipeline()
    with pytest.raises(UserError, match="there is no layer"):
        load_adapter(pipe, dog)
    assert_untouched(pipe)


def test_another_base_is_refused_or_warned_about(dog: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_pipeline(seed=5)
    with pytest.raises(UserError, match=r"dog.safetensors was trained on the base toy .*give it the base toy"):
        load_adapter(pipe, dog)
    assert_untouched(pipe)
    with caplog.at_level("WARNING"):
        assert load_adapter(pipe, dog, on_mismatch="force") == "dog"
    assert "was trained on the base toy" in caplog.text
    assert "the update of dog.safetensors differs from the trained one by 1.4" in caplog.text
    with pytest.raises(UserError, match="choose from error, align, force"):
        load_adapter(pipe, dog, "other", on_mismatch="ignore")  # type: ignore[arg-type]


def test_a_component_that_the_pipeline_lacks_is_named(dog: Path) -> None:
    with pytest.raises(UserError, match="adapts the text_encoder, which this pipeline does not have"):
        load_adapter({"unet": tiny_unet()}, dog)


def test_a_failure_half_way_is_rolled_back(dog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svft_diffusion.adapters import runtime

    pipe, calls = tiny_pipeline(), []
    inject = runtime.inject

    def fail_at_the_second(*args: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        inject(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(runtime, "inject", fail_at_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        load_adapter(pipe, dog)
    assert len(calls) == 2
    assert_untouched(pipe)


def test_fused_adapters_block_what_they_would_spoil(dog: Path, style: Path) -> None:
    pipe = tiny_pipeline()
    load_adapter(pipe, dog)
    pipe.fuse_lora(components=["unet"])
    for act in (
        lambda: load_adapter(pipe, style),
        lambda: set_adapters(pipe, {"dog": 0.5}),
        lambda: unload_adapter(pipe, "dog"),
        lambda: save_adapter(pipe, "dog", dog, metadata=METADATA),
    ):
        with pytest.raises(UserError, match=r"fused .*call pipe.unfuse_lora\(\) first"):
            act()
    pipe.unfuse_lora(components=["unet"])
    set_adapters(pipe, {"dog": 0.5})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"cat": 1.0}, "no adapter 'cat'; loaded: dog"),
        ({"dog": float("nan")}, "finite number"),
        ({"dog": "1"}, "finite number"),
        ({"dog": {"vae": 1.0}}, "no component 'vae'; choose from unet, text_encoder"),
    ],
)
def test_weights_that_make_no_sense(dog: Path, weights: dict[str, float], message: str) -> None:
    pipe = tiny_pipeline()
    load_adapter(pipe, dog)
    expected = picture(pipe)
    with pytest.raises(UserError, match=message):
        set_adapters(pipe, weights)
    assert np.array_equal(picture(pipe), expected)


def test_names(dog: Path) -> None:
    pipe = tiny_pipeline()
    assert load_adapter(pipe, dog, "my dog-2") == "my dog-2"
    with pytest.raises(UserError, match="'my dog-2' is already loaded"):
        load_adapter(pipe, dog, "my dog-2")
    with pytest.raises(UserError, match="no adapter 'dog'; loaded: my dog-2"):
        unload_adapter(pipe, "dog")
    with pytest.raises(UserError, match="no adapter 'dog'"):
        save_adapter(pipe, "dog", dog, metadata=METADATA)


@pytest.mark.parametrize("name", ["", "my.dog", "training", "values", "_parameters"])
def test_names_that_no_parameter_can_have_are_refused(dog: Path, name: str) -> None:
    pipe = tiny_pipeline()
    before = picture(pipe)
    for add in (
        lambda: load_adapter(pipe, dog, name),
        lambda: add_training_adapter(pipe, SVFTConfig(), name),
        lambda: inject_adapter_in_model(SVFTConfig(), pipe.unet, name),
    ):
        with pytest.raises(UserError, match="name"):
            add()
    assert_untouched(pipe)
    assert np.array_equal(picture(pipe), before)


@pytest.mark.parametrize(
    ("stem", "name"), [("training", "training_adapter"), ("my.dog v2", "my_dog_v2"), ("...", "adapter")]
)
def test_a_file_may_have_any_name(dog: Path, stem: str, name: str) -> None:
    pipe = tiny_pipeline()
    assert load_adapter(pipe, dog.rename(dog.with_name(f"{stem}.safetensors"))) == name
    pipe.unet.train().eval()
    changed = picture(pipe)
    unload_adapter(pipe, name)
    assert not np.array_equal(picture(pipe), changed)
    assert_untouched(pipe)


def test_a_lora_file_is_told_apart(tmp_path: Path) -> None:
    save_file({"unet.to_q.lora_A.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"`svft-diffusion import` turns a LoRA.* pipe.load_lora_weights loads a LoRA"):
        load_adapter(tiny_pipeline(), tmp_path / "lora.safetensors")


# For the trainer


def test_training_moves_only_the_values() -> None:
    models = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}
    parameters = add_training_adapter(models, CONFIGS["banded"], "dog")
    assert len(parameters) == 52 and all(p.requires_grad and p.dtype == torch.float32 for p in parameters)
    trainable = [p for model in models.values() for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in parameters}
    before = {key: value.clone() for key, value in models["unet"].state_dict().items()}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        models["unet"](**tiny_inputs()).sample.square().mean().backward()
        optimizer.step()
    for key, value in models["unet"].state_dict().items():
        assert torch.equal(value, before[key]) == ("spectral_values" not in key), key


def test_training_state_goes_to_a_checkpoint_and_back() -> None:
    models = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}
    for parameter in add_training_adapter(models, CONFIGS["plain"], "dog"):
        torch.nn.init.normal_(parameter)
    state = adapter_state(models, "dog")
    again = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}
    parameters = add_training_adapter(again, CONFIGS["plain"], "default")
    load_adapter_state(again, "default", state)
    assert adapter_state(again, "default").keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in adapter_state(again, "default").items())
    assert all(parameter.requires_grad for parameter in parameters)
    missing = dict(list(state.items())[1:])
    with pytest.raises(UserError, match="1 layers differ"):
        load_adapter_state(again, "default", missing)
    first = next(iter(state))
    with pytest.raises(UserError, match="another number of values"):
        load_adapter_state(again, "default", {**state, first: state[first][:-1]})
    with pytest.raises(UserError, match="no adapter 'cat'; loaded: default"):
        adapter_state(again, "cat")


def test_a_component_without_targets_leaves_all_as_they_were() -> None:
    models = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}
    with pytest.raises(UserError, match="text_encoder: targets 'cross-attention' match no layer of CLIPTextModel"):
        add_training_adapter(models, SVFTConfig(targets="cross-attention"))
    assert not spectral_layers(models["unet"])
    parameters = add_training_adapter(models, SVFTConfig())
    with pytest.raises(UserError, match="unet already has an adapter 'default'"):
        add_training_adapter(models, SVFTConfig())
    assert len(parameters) == len(adapter_state(models, "default"))


def test_values_trained_in_16_bit_are_saved_with_the_digests_of_the_full_base(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    add_training_adapter(pipe, SVFTConfig(), "dog")
    full = digests_of_pipeline(pipe, layer_names(adapter_state(pipe, "dog")))
    pipe.to(dtype=torch.bfloat16)
    metadata = AdapterMetadata(base_name="toy", base_digests=full)
    file = save_adapter(pipe, "dog", tmp_path / "dog.safetensors", metadata=metadata)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        load_adapter(tiny_pipeline().to(dtype=dtype), file)


def test_the_package_exports_what_it_says() -> None:
    for name in svft_diffusion.__all__:
        assert getattr(svft_diffusion, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = svft_diffusion.nothing
