"""Target presets on every architecture, and the names of the layers in files."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from peft import LoraConfig, inject_adapter_in_model
from tiny_models import TEXT_WIDTH, tiny_projecting_text_encoder, tiny_text_encoder, tiny_unet
from tiny_transformers import ARCHITECTURES, tiny_flux, tiny_llama, tiny_sana, tiny_sd3, tiny_t5
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from svft_diffusion import SVFTConfig
from svft_diffusion.adapters.targets import (
    DEFAULT_PRESET,
    PRESETS,
    adaptable_layers,
    linear_layers,
    matching_layers,
)
from svft_diffusion.errors import UserError
from svft_diffusion.files.names import COMPONENTS, canonical_name, module_path, split_canonical_name

# How many layers each preset names, in the order of PRESETS less the sum attention+feed-forward; then the norms.
COUNTS = {
    "sd1": (32, 16, 8, 50, 116, 33),
    "sd2": (32, 16, 8, 58, 116, 33),
    "sdxl": (64, 32, 16, 100, 170, 45),
    "sd3": (19, 0, 6, 36, 47, 10),
    "flux": (14, 0, 8, 36, 44, 8),
    "pixart": (16, 8, 4, 26, 27, 0),
    "sana": (16, 8, 6, 22, 30, 1),
    "clip": (8, 0, 4, 12, 19, 5),
    "clip with projection": (8, 0, 4, 13, 20, 5),
    "t5": (8, 0, 6, 14, 21, 5),
    "llama": (8, 0, 6, 15, 21, 5),
    "gpt2": (4, 0, 4, 8, 15, 5),
    "vit": (8, 0, 4, 13, 19, 5),
}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def matched(model: nn.Module, preset: str, *, train_norm: bool | None = None) -> set[str]:
    """The layers that a preset names, none where it is an error."""
    try:
        layers = matching_layers(model, preset, train_norm=train_norm)
    except UserError:
        return set()
    assert layers == [path for path, _ in model.named_modules() if path in set(layers)], "the order of the model"
    return set(layers)


def skeleton(*paths: str) -> nn.Module:
    """A model with linear layers at the given paths."""
    model = nn.Module()
    for path in paths:
        *parents, name = path.split(".")
        parent = model
        for level in parents:
            if not hasattr(parent, level):
                parent.add_module(level, nn.Module())
            parent = parent.get_submodule(level)
        parent.add_module(name, nn.Linear(3, 2))
    return model


# Presets


@every_architecture
def test_each_preset_names_so_many_layers(architecture: str) -> None:
    model = ARCHITECTURES[architecture].build()
    layers = {preset: matched(model, preset) for preset in PRESETS}
    attention, cross, feed_forward, linear, everything, norms = COUNTS[architecture]
    assert [len(layers[preset]) for preset in PRESETS] == [
        attention,
        cross,
        feed_forward,
        attention + feed_forward,
        linear,
        everything,
    ]
    assert layers["attention+feed-forward"] == layers["attention"] | layers["feed-forward"]
    assert layers["cross-attention"] <= layers["attention"]
    assert layers["attention"] < layers["all-linear"] < layers["all"] > layers["feed-forward"]
    named_norms = {path for path, kind in adaptable_layers(model).items() if kind == "norm"}
    assert len(named_norms) == norms and named_norms <= layers["all"]


@every_architecture
def test_norms_come_with_all_and_where_they_are_asked_for(architecture: str) -> None:
    model = ARCHITECTURES[architecture].build()
    norms = {path for path, kind in adaptable_layers(model).items() if kind == "norm"}
    for preset in PRESETS:
        layers = matched(model, preset)
        if not layers:
            continue
        assert matched(model, preset, train_norm=True) == layers | norms
        assert matched(model, preset, train_norm=False) == layers - norms
        assert preset == "all" or not layers & norms


@every_architecture
@torch.no_grad()
def test_the_model_calls_every_layer_that_is_matched(architecture: str) -> None:
    build, inputs = ARCHITECTURES[architecture]
    model = build()
    layers = matching_layers(model, "all")
    called = set()
    for path in layers:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: called.add(path))
    model(**inputs())
    assert called == set(layers)


@pytest.mark.parametrize(
    ("model", "preset", "names"),
    [
        (
            tiny_sd3,
            "attention",
            "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj attn.add_v_proj "
            "attn.to_add_out attn2.to_q attn2.to_k attn2.to_v attn2.to_out.0",
        ),
        (tiny_sd3, "feed-forward", "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2"),
        (
            tiny_flux,
            "feed-forward",
            "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2 proj_mlp proj_out",
        ),
        (tiny_sana, "feed-forward", "ff.conv_inverted ff.conv_depth ff.conv_point"),
        (tiny_t5, "attention", "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v "
         "layer.0.SelfAttention.o"),
        (tiny_t5, "feed-forward", "layer.1.DenseReluDense.wi_0 layer.1.DenseReluDense.wi_1 layer.1.DenseReluDense.wo"),
        (tiny_llama, "feed-forward", "mlp.gate_proj mlp.up_proj mlp.down_proj"),
    ],
)  # fmt: skip
def test_the_layers_of_a_block(model: type[nn.Module], preset: str, names: str) -> None:
    paths = matching_layers(model(), preset)
    blocks = ("transformer_blocks", "single_transformer_blocks", "block", "layers")
    inside = set()
    for path in paths:
        levels = path.split(".")
        block = next(index for index, level in enumerate(levels) if level in blocks)
        inside.add(".".join(levels[block + 2 :]))
    assert inside == set(names.split())


ATTENTION = {"attention", "attention+feed-forward", "all-linear", "all"}
CROSS_ATTENTION = ATTENTION | {"cross-attention"}
FEED_FORWARD = {"feed-forward", "attention+feed-forward", "all-linear", "all"}
OTHERS = {"all-linear", "all"}


@pytest.mark.parametrize(
    ("path", "presets"),
    [
        ("text_model.encoder.layers.0.self_attn.out_proj", ATTENTION),  # CLIP before transformers 5
        ("text_model.encoder.layers.0.mlp.fc1", FEED_FORWARD),
        ("encoder.layer.0.attention.attention.query", ATTENTION),  # ViT before transformers 5
        ("encoder.layer.0.attention.output.dense", ATTENTION),
        ("encoder.layer.0.intermediate.dense", FEED_FORWARD),
        ("encoder.layer.0.output.dense", FEED_FORWARD),
        ("encoder.layers.0.fc1", FEED_FORWARD),  # BART
        ("decoder.layers.0.encoder_attn.k_proj", CROSS_ATTENTION),
        ("decoder.block.0.layer.1.EncDecAttention.q", CROSS_ATTENTION),  # T5
        ("encoder.block.0.layer.1.DenseReluDense.wi", FEED_FORWARD),
        ("mid_block.attentions.0.to_q", ATTENTION),  # UNets with an attention alone
        ("mid_block.attentions.0.to_out.0", ATTENTION),
        ("face_adapter.0.to_out", ATTENTION),  # Wan Animate
        ("single_transformer_blocks.0.attn.to_qkv_mlp_proj", ATTENTION),  # Flux 2
        ("blocks.0.ffn.net.0.proj", FEED_FORWARD),  # Wan
        ("layers.0.feed_forward.w1", FEED_FORWARD),  # Z-Image
        ("transformer_blocks.0.img_mlp.net.2", FEED_FORWARD),  # Qwen-Image
        ("transformer_blocks.0.cross_attn.to_kv", CROSS_ATTENTION),  # Stable Audio 3
        ("transformer_blocks.0.norm1.linear", OTHERS),
        ("t_embedder.mlp.0", OTHERS),  # the embedding of the time is no feed-forward network
        ("down_blocks.0.attentions.0.proj_in", OTHERS),
        ("proj_out", OTHERS),
        ("0.attn2.processor.to_k_ip", set()),  # belongs to an IP-Adapter
    ],
)
def test_presets_know_the_spellings_of_other_models(path: str, presets: set[str]) -> None:
    assert {preset for preset in PRESETS if matched(skeleton(path), preset)} == presets


def test_cross_attention_is_what_attends_to_the_text_whatever_its_name() -> None:
    assert all(".attn2." in path for path in matching_layers(tiny_unet(), "cross-attention"))
    upscaler = matching_layers(tiny_unet(only_cross_attention=True), "cross-attention")
    assert any(".attn1." in path for path in upscaler), "the upscaler's attn1 attends to the text"
    assert any(".attn2." in path for path in matching_layers(tiny_sd3(), "attention"))
    assert not matched(tiny_sd3(), "cross-attention"), "attn2 of Stable Diffusion 3.5 attends to the picture"


def test_a_projection_at_the_end_of_a_single_block_is_not_the_one_at_the_end_of_the_model() -> None:
    assert {path for path in matching_layers(tiny_flux(), "feed-forward") if path.endswith("proj_out")} == {
        "single_transformer_blocks.0.proj_out",
        "single_transformer_blocks.1.proj_out",
    }


# One weight, one path


def test_a_tied_weight_is_named_once() -> None:
    encoder = matching_layers(tiny_t5(), "all")
    assert "encoder.embed_tokens" in encoder and "shared" not in encoder

    config = T5Config(vocab_size=20, d_model=12, d_kv=4, d_ff=20, num_layers=1, num_heads=3)
    whole = T5ForConditionalGeneration(config)
    layers = matching_layers(whole, "all")
    assert {"encoder.embed_tokens", "shared", "decoder.embed_tokens", "lm_head"} & set(layers) == {
        "encoder.embed_tokens"
    }
    weights = [id(whole.get_submodule(path).weight) for path in layers]
    assert len(set(weights)) == len(weights)
    assert all("EncDecAttention" in path for path in matching_layers(whole, "cross-attention"))

    assert "lm_head" in matching_layers(tiny_llama(), "all-linear")
    tied = matching_layers(tiny_llama(tied=True), "all")
    assert "model.embed_tokens" in tied and "lm_head" not in tied


def test_layers_that_an_adapter_could_not_stand_in_for_are_left_out() -> None:
    model = skeleton("blocks.0.attn.to_q", "blocks.0.attn.to_k")
    model.add_module("again", model.get_submodule("blocks.0.attn.to_k"))  # replaced here, it would stay there
    model.add_module("pooling", nn.MultiheadAttention(4, 2))  # reads the weights of its layers, calls none
    model.add_module("upsampling", nn.ConvTranspose2d(2, 3, 2))
    model.add_module("plain_norm", nn.LayerNorm(3, elementwise_affine=False))
    assert matching_layers(model, "all") == ["blocks.0.attn.to_q"]
    assert linear_layers(model) == ["blocks.0.attn.to_q"]


def test_an_ip_adapter_does_not_change_what_is_matched() -> None:
    unet = tiny_unet()
    before = {preset: matching_layers(unet, preset) for preset in PRESETS}
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.set_processor(IPAdapterAttnProcessor2_0(24, TEXT_WIDTH))
    assert any("to_k_ip" in path for path, _ in unet.named_modules())
    assert {preset: matching_layers(unet, preset) for preset in PRESETS} == before


@every_architecture
def test_layers_below_a_lora_keep_their_paths(architecture: str) -> None:
    model = ARCHITECTURES[architecture].build()
    before = {preset: matched(model, preset) for preset in PRESETS}
    lora = LoraConfig(r=2, target_modules=r".*(to_q|to_out\.0|q_proj|fc1|conv_point|conv1|\.q|wi_0|c_attn|proj_mlp)")
    inject_adapter_in_model(lora, model, "lora")
    assert any("lora_A" in path for path, _ in model.named_modules())
    assert {preset: matched(model, preset) for preset in PRESETS} == before


def test_presets_see_adapted_layers_under_their_own_names() -> None:
    unet = tiny_unet()
    before = {preset: matching_layers(unet, preset) for preset in PRESETS}
    unet.add_adapter(SVFTConfig(targets="all-linear"), "a")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "lora")
    assert {preset: matching_layers(unet, preset) for preset in PRESETS} == before


# Errors


def test_an_unknown_preset_is_refused_with_the_choices() -> None:
    assert DEFAULT_PRESET == "attention+feed-forward"
    with pytest.raises(
        UserError, match=r"unknown targets 'atention'; choose from attention, cross-attention, .*, all$"
    ):
        matching_layers(tiny_unet(), "atention")


def test_a_preset_that_matches_nothing_lists_what_would_match() -> None:
    message = (
        r"targets 'cross-attention' match no layer of CLIPTextModel; choose from attention, feed-forward, "
        r"attention\+feed-forward, all-linear, all "
        r"\(its layers are called embeddings\.token_embedding, .*, encoder\.layers\.1\.mlp\.fc2\)"
    )
    for train_norm in (None, True):
        with pytest.raises(UserError, match=message):
            matching_layers(tiny_text_encoder(), "cross-attention", train_norm=train_norm)
    with pytest.raises(UserError, match=r"choose from all-linear, all \(its layers are called first, second\)"):
        matching_layers(skeleton("first", "second"), "attention")
    with pytest.raises(UserError, match="ReLU; the model has no linear layer, convolution or embedding"):
        matching_layers(nn.ReLU(), "all")


# Names in files


@pytest.mark.parametrize(
    ("build", "path", "canonical"),
    [
        (tiny_text_encoder, "encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.q_proj"),
        (tiny_projecting_text_encoder, "text_model.encoder.layers.1.mlp.fc1", "text_model.encoder.layers.1.mlp.fc1"),
        (tiny_projecting_text_encoder, "text_projection", "text_projection"),
        (tiny_t5, "encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.q"),
        (tiny_unet, "mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_in"),
        (tiny_flux, "single_transformer_blocks.1.proj_mlp", "single_transformer_blocks.1.proj_mlp"),
    ],
)
@pytest.mark.parametrize("component", COMPONENTS)
def test_canonical_names_lead_back_to_the_module(
    build: type[nn.Module], path: str, canonical: str, component: str
) -> None:
    model = build()
    if build is tiny_text_encoder and hasattr(model, "text_model"):  # before transformers 5
        path = f"text_model.{path}"
    name = canonical_name(component, model, path)
    assert name == f"{component}.{canonical}"
    assert split_canonical_name(name) == (component, canonical)
    assert module_path(model, canonical) == path
    assert isinstance(model.get_submodule(module_path(model, canonical)), nn.Module)


@every_architecture
def test_all_canonical_names_of_a_model_lead_back(architecture: str) -> None:
    model = ARCHITECTURES[architecture].build()
    for path in matching_layers(model, "all"):
        _, canonical = split_canonical_name(canonical_name("text_encoder", model, path))
        assert module_path(model, canonical) == path


def test_a_clip_text_encoder_of_transformers_4_has_the_same_names() -> None:
    old = skeleton("text_model.encoder.layers.0.self_attn.q_proj")
    old.config = SimpleNamespace(model_type="clip_text_model")  # type: ignore[assignment]
    new = skeleton("encoder.layers.0.self_attn.q_proj")
    new.config = SimpleNamespace(model_type="clip_text_model")  # type: ignore[assignment]
    (old_path,), (new_path,) = matching_layers(old, "attention"), matching_layers(new, "attention")
    name = canonical_name("text_encoder", old, old_path)
    assert name == canonical_name("text_encoder", new, new_path)
    _, canonical = split_canonical_name(name)
    assert (module_path(old, canonical), module_path(new, canonical)) == (old_path, new_path)


@pytest.mark.parametrize("name", ["vae.decoder.conv_in", "prior.proj_in", "unet", "unet.", "text_encoder_4.a"])
def test_a_name_of_no_component_is_refused(name: str) -> None:
    with pytest.raises(
        UserError, match="none of the components unet, transformer, text_encoder, text_encoder_2, text_encoder_3"
    ):
        split_canonical_name(name)
