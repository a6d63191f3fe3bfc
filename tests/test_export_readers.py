"""Exports in the hands of those who read them: names by the rules of each tool, pictures by diffusers alone."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from adapted_models import randomize
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from exported import CONFIGS, expected_updates, relative
from lora_readers import a1111, comfyui, kohya_modules
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tiny_models import (
    POOLED_WIDTH,
    tiny_pipeline,
    tiny_projecting_text_encoder,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet_sd1,
    tiny_unet_sdxl,
    tiny_vae,
)
from tiny_transformers import tiny_flux, tiny_sd3
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from svft_diffusion import SVFTConfig
from svft_diffusion.adapters import add_training_adapter, set_adapters
from svft_diffusion.adapters.targets import adaptable_layers
from svft_diffusion.exchange.export import Dtype, export_lora
from svft_diffusion.exchange.lora_file import write_lora
from svft_diffusion.exchange.lora_keys import Format, NoName, layer_key, lora_names
from svft_diffusion.exchange.single_file_names import original_tensors
from svft_diffusion.files.names import canonical_name
from svft_diffusion.toybox import WEIGHTS_FOLDER

# Names, on the layouts of the published models


@cache
def published_layout(family: str) -> dict[str, nn.Module]:
    """The models of a family in their real layout, without weights."""
    changes = {
        "sd1": {"cross_attention_dim": 768},
        "sd2": {"cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": (5, 10, 20, 20)},
        "sdxl": {
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    }
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel(**changes[family]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(hidden_size=1024 if family == "sd2" else 768)),
        }
        if family == "sdxl":
            models["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=32))
    return models


def layers_of(models: dict[str, nn.Module]) -> dict[str, str]:
    """Canonical name -> kind of every layer that an adapter can change."""
    return {
        canonical_name(component, model, path): kind
        for component, model in models.items()
        for path, kind in adaptable_layers(model).items()
    }


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_key_is_a_layer_to_comfyui_a1111_and_kohya(family: str) -> None:
    models = published_layout(family)
    keys, unnamed = {}, []
    for layer, kind in layers_of(models).items():
        key = layer_key("kohya", layer, models)
        if kind not in ("linear", "convolution"):
            continue
        if isinstance(key, NoName):
            unnamed.append(layer)
        else:
            keys[layer] = key
    # The projection at the end of SDXL's second text encoder is the only matrix that no reader knows.
    assert unnamed == (["text_encoder_2.text_projection"] if family == "sdxl" else [])
    tensors = [name for key in keys.values() for name in lora_names("kohya", key) if name is not None]
    assert len(set(tensors)) == 3 * len(keys)
    for reader in (comfyui, a1111):
        found = [reader(name) for name in tensors]
        assert None not in found
        assert len(set(found)) == len(keys), f"{reader.__name__} takes two layers for one"
    text_keys = {"text_encoder": "lora_te1" if family == "sdxl" else "lora_te", "text_encoder_2": "lora_te2"}
    for component, model in models.items():
        ours = {key for layer, key in keys.items() if layer.startswith(f"{component}.")}
        if component != "unet":
            assert ours == kohya_modules(model, text_keys[component]).keys()
        elif family != "sdxl":  # sd-scripts has that UNet under its original names
            assert ours == kohya_modules(model, "lora_unet").keys()


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a1111_finds_the_modules_that_stabilitys_unets_have(family: str) -> None:
    models = published_layout(family)
    make = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    others = {"vae": tiny_vae(), "tokenizer": None, "scheduler": None}
    if family == "sdxl":
        others["tokenizer_2"] = None
    else:
        others |= {"safety_checker": None, "feature_extractor": None}
    original = {
        name.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
        for name in original_tensors(make(**models, **others))
    }
    layers = [name for name, kind in layers_of({"unet": models["unet"]}).items() if kind in ("linear", "convolution")]
    found = {a1111(f"{layer_key('kohya', layer, models)}.alpha") for layer in layers}
    # A1111 counts the first upsampler of SDXL as that of the older models; sd-scripts' own files spell it otherwise.
    assert found - original == ({"output_blocks_2_1_conv"} if family == "sdxl" else set())


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        ("unet.down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0",
         "input_blocks_8_1_transformer_blocks_0_attn2_to_out_0"),
        ("unet.up_blocks.1.resnets.2.conv_shortcut", "output_blocks_5_0_skip_connection"),
        ("unet.up_blocks.0.upsamplers.0.conv", "output_blocks_2_1_conv"),
        ("unet.mid_block.resnets.1.time_emb_proj", "middle_block_2_emb_layers_1"),
        ("unet.down_blocks.0.downsamplers.0.conv", "input_blocks_3_0_op"),
    ],
)  # fmt: skip
def test_a1111_finds_the_module_of_stabilitys_model(layer: str, module: str) -> None:
    assert a1111(f"{layer_key('kohya', layer, published_layout('sd1'))}.alpha") == module


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_comfyui_knows_every_name_of_comfy_full(family: str) -> None:
    models = published_layout(family)
    parts = {"norm": ("w_norm", "b_norm"), "embedding": ("diff",)}
    for layer, kind in layers_of(models).items():
        key = layer_key("comfy-full", layer, models)
        assert isinstance(key, str), layer
        for part in parts.get(kind, ("lora_up.weight", "lora_down.weight", "alpha", "diff", "diff_b")):
            assert comfyui(f"{key}.{part}"), key


# Through diffusers' own loader, in a process that knows nothing of this package

READER = """
import json, sys
import numpy as np, torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

torch.set_num_threads(1)
for base, prompt, files in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for file in files:
        pipe.load_lora_weights(file)
        generator = torch.Generator().manual_seed(1)
        image = pipe(prompt, num_inference_steps=3, generator=generator, output_type="np").images[0]
        np.save(file + ".npy", image)
        name = pipe.get_active_adapters()[0]
        updates = {}
        for component in ("unet", "text_encoder", "text_encoder_2"):
            for path, module in getattr(getattr(pipe, component, None), "named_modules", dict)() or ():
                if isinstance(module, LoraLayer):
                    level = "" if component == "unet" or path.startswith("text_model.") else "text_model."
                    updates[f"{component}.{level}{path}"] = module.get_delta_weight(name).detach().contiguous()
        save_file(updates, file + ".updates")
        pipe.unload_lora_weights()
assert not [name for name in sys.modules if name.partition(".")[0] == "svft_diffusion"]
"""


class Case(NamedTuple):
    base: str
    config: str
    format: Format
    dtype: Dtype = "float32"

    @property
    def file(self) -> str:
        return f"{' '.join(self)}.safetensors"


CASES = [
    Case("sd1", "svft plain", "kohya"),
    Case("sd1", "svft plain", "kohya", "float16"),
    Case("sd1", "svdiff", "diffusers"),
    Case("sd2", "svft banded", "diffusers"),
    Case("sd2", "svdiff", "kohya"),
    Case("sdxl", "svft plain", "kohya"),
    Case("sdxl", "svdiff", "diffusers", "float16"),
    Case("toybox", "svdiff", "kohya"),
]


def sd1_pipeline() -> DiffusionPipeline:
    pipe = tiny_pipeline()
    pipe.unet = tiny_unet_sd1()
    return pipe


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        text_encoder_2=tiny_projecting_text_encoder(),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=tiny_unet_sdxl(),
        scheduler=EulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def toybox_pipeline() -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(WEIGHTS_FOLDER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd1": sd1_pipeline,
    "sd2": tiny_pipeline,
    "sdxl": sdxl_pipeline,
    "toybox": toybox_pipeline,
}
# What random values do to a picture depends on the model: toybox was trained, the others are noise.
SCALES = {"sd1": 1.0, "sd2": 1.0, "sdxl": 1.0, "toybox": 0.1}
PROMPTS = {"toybox": "a red robot on the beach"}


def prompt_of(base: str) -> str:
    return PROMPTS.get(base, "a photo of sks dog")


def lora_layers(model: nn.Module) -> str:
    """The linear layers and convolutions as a pattern. SDXL's pipeline asks add_embedding for its size as it draws."""
    kinds = adaptable_layers(model).items()
    paths = [path for path, kind in kinds if kind in ("linear", "convolution") and "add_embedding" not in path]
    return "|".join(re.escape(path) for path in paths if path != "text_projection")


def picture(pipe: DiffusionPipeline, base: str) -> np.ndarray:
    generator = torch.Generator().manual_seed(1)
    result = pipe(prompt_of(base), num_inference_steps=3, generator=generator, output_type="np")
    image: np.ndarray = result.images[0]
    return image


class Expected(NamedTuple):
    """What the adapter itself does: pictures in [0, 1] with it and without, and the updates of its layers."""

    adapted: np.ndarray
    plain: np.ndarray
    updates: dict[str, Tensor]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Expected]]:
    """A folder with exports and what a process of its own drew with each, and what it should have drawn."""
    folder = tmp_path_factory.mktemp("exports")
    expected, files = {}, {}
    for case in CASES:
        pipe = PIPELINES[case.base]()
        if case.base not in files:
            if case.base != "toybox":
                pipe.save_pretrained(folder / case.base)
            files[case.base] = []
        for component in ("unet", "text_encoder", "text_encoder_2"):
            model = getattr(pipe, component, None)
            if model is not None:
                config = CONFIGS[case.config](target_modules=lora_layers(model), train_norm=False)
                add_training_adapter({component: model}, config, "a")
                randomize(model, "a", scale=SCALES[case.base])
        exported = export_lora(pipe, "a", format=case.format, rank="full", dtype=case.dtype)
        assert not exported.report.left_out
        files[case.base].append(str(write_lora(exported, folder / case.file)))
        adapted, updates = picture(pipe, case.base), expected_updates(pipe)
        set_adapters(pipe, {"a": 0.0})
        expected[case.file] = Expected(adapted, picture(pipe, case.base), updates)
    folders = {"toybox": WEIGHTS_FOLDER}
    work = [(str(folders.get(base, folder / base)), prompt_of(base), listed) for base, listed in files.items()]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", READER, json.dumps(work)], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_diffusers_alone_draws_the_same_picture(exports: tuple[Path, dict[str, Expected]], case: Case) -> None:
    folder, expected = exports
    adapted, plain, updates = expected[case.file]
    found = np.load(folder / f"{case.file}.npy")
    assert found.min() >= 0 and found.max() <= 1
    assert np.abs(adapted - plain).mean() >= 1e-2, "the adapter changes the picture"
    assert np.abs(found - adapted).mean() <= 1e-3
    loaded = load_file(folder / f"{case.file}.updates")
    assert loaded.keys() == updates.keys()
    assert {name.partition(".")[0] for name in loaded} == {"unet", "text_encoder"} | (
        {"text_encoder_2"} if case.base == "sdxl" else set()
    )
    largest = max(relative(loaded[name], updates[name]) for name in updates)
    assert largest <= (2e-6 if case.dtype == "float32" else 2e-3)


@pytest.mark.parametrize(("make", "pipeline"), [(tiny_flux, FluxPipeline), (tiny_sd3, StableDiffusion3Pipeline)])
def test_transformer_denoisers_are_read_by_diffusers(
    make: Callable[[], nn.Module], pipeline: type[DiffusionPipeline], tmp_path: Path
) -> None:
    model, other = make(), make()
    add_training_adapter({"transformer": model}, SVFTConfig(targets="all-linear"), "a")
    randomize(model, "a")
    exported = export_lora({"transformer": model}, "a", format="diffusers", rank="full")
    file = write_lora(exported, tmp_path / "lora.safetensors")
    parts = dict.fromkeys(inspect.signature(pipeline.__init__).parameters)
    del parts["self"]
    pipeline(**{**parts, "transformer": other}).load_lora_weights(str(file))
    updates = expected_updates({"transformer": model})
    loaded = {
        f"transformer.{path}": module.get_delta_weight("default_0").detach()
        for path, module in other.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert loaded.keys() == updates.keys()
    assert max(relative(loaded[name], updates[name]) for name in updates) <= 2e-6


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_sdxl_is_read_by_diffusers_with_both_text_encoders(format: str, tmp_path: Path) -> None:
    pipe = sdxl_pipeline()
    for component in ("unet", "text_encoder", "text_encoder_2"):
        config = SVFTConfig(targets="all", train_norm=False)
        add_training_adapter({component: getattr(pipe, component)}, config, "a")
        randomize(getattr(pipe, component), "a")
    exported = export_lora(pipe, "a", format=format, rank="full")  # type: ignore[arg-type]
    updates = expected_updates(pipe)
    held = {layer.layer for layer in exported.report.layers}
    assert {name for name in updates if name.startswith("unet.")} <= held
    assert {entry.layer.rpartition(".")[2] for entry in exported.report.left_out} == {
        "token_embedding", "position_embedding", "text_projection"
    }  # fmt: skip
    if format == "kohya":
        assert all(comfyui(name) and a1111(name) for name in exported.tensors)
        assert {name.split("_text_")[0] for name in exported.tensors if "_te" in name[:8]} == {"lora_te1", "lora_te2"}
    other = sdxl_pipeline()
    other.load_lora_weights(str(write_lora(exported, tmp_path / "lora.safetensors")))
    loaded = lora_updates(other)
    assert loaded.keys() == held
    assert max(relative(loaded[name], updates[name]) for name in held) <= 2e-6
    assert other.text_encoder_2.config.hidden_size == POOLED_WIDTH


def lora_updates(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """What the LoRAs of a pipeline change, by the canonical names of their layers."""
    found = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        for path, module in getattr(getattr(pipe, component, None), "named_modules", dict)() or ():
            if isinstance(module, LoraLayer) and component == "unet":
                found[f"{component}.{path}"] = module.get_delta_weight("default_0").detach()
            elif isinstance(module, LoraLayer):
                path = path if path.startswith("text_model.") else f"text_model.{path}"
                found[f"{component}.{path}"] = module.get_delta_weight("default_0").detach()
    return found
