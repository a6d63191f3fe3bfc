"""`svft-diffusion merge`: folders and single files that diffusers alone loads, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from adapted_models import IDS, output_of, randomize
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    infer_diffusers_model_type,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import (
    tiny_pipeline,
    tiny_projecting_text_encoder,
    tiny_text_config,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_unet_sd1,
    tiny_unet_sdxl,
    tiny_vae,
)
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from svft_diffusion import SiVAConfig, SVDiffConfig, SVFTConfig, VectorFitConfig, load_adapter, save_adapter
from svft_diffusion.adapters import SpectralConfig, add_training_adapter, set_adapters, unload_adapter
from svft_diffusion.adapters.injection import spectral_layers
from svft_diffusion.cli.main import main
from svft_diffusion.exchange.merging import merge_adapters, stored_dtypes
from svft_diffusion.exchange.single_file_names import original_tensors
from svft_diffusion.files import AdapterMetadata
from svft_diffusion.models import load_pipeline

PROMPT = "a photo of sks dog on the beach"


def stable_diffusion(unet: nn.Module, text_encoder: nn.Module) -> StableDiffusionPipeline:
    pipe = tiny_pipeline()
    return StableDiffusionPipeline(**{**pipe.components, "unet": unet, "text_encoder": text_encoder})


def sd1() -> StableDiffusionPipeline:
    return stable_diffusion(tiny_unet_sd1(), tiny_text_encoder())


def sd2() -> StableDiffusionPipeline:
    torch.manual_seed(3)
    return stable_diffusion(tiny_unet(), CLIPTextModel(tiny_text_config(hidden_act="gelu")).eval())


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        text_encoder_2=tiny_projecting_text_encoder(),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=tiny_unet_sdxl(),
        scheduler=EulerDiscreteScheduler(),
    )


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl}


def write_adapter(pipe: DiffusionPipeline, config: SpectralConfig, file: Path, seed: int = 2, **said: Any) -> Path:
    """An adapter in everything that an adapter can be in, with an effect that a picture shows."""
    add_training_adapter(pipe, config, "new")
    for component in ("unet", "text_encoder", "text_encoder_2"):
        if (model := getattr(pipe, component, None)) is not None:
            randomize(model, "new", seed)
    save_adapter(pipe, "new", file, metadata=AdapterMetadata(**{"base_name": "tiny", **said}))
    unload_adapter(pipe, "new")
    return file


def picture(pipe: DiffusionPipeline) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    result: np.ndarray = pipe(
        PROMPT, height=16, width=16, num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="np"
    ).images[0]
    return result


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in folder.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


# Loaded by diffusers alone

_READER = """
import json, sys
import numpy as np, torch, diffusers
for job in json.loads(sys.argv[1]):
    if job["config"]:
        kind = getattr(diffusers, job["kind"])
        pipe = kind.from_single_file(job["path"], config=job["config"], local_files_only=True)
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(job["path"], local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    image = pipe(job["prompt"], height=16, width=16, num_inference_steps=2, guidance_scale=3.0,
                 generator=generator, output_type="np").images[0]
    np.save(job["picture"], image)
assert not [name for name in sys.modules if name.startswith("svft_diffusion")]
"""


def job(name: str, folder: Path, pipe: DiffusionPipeline, output: Path, config: Path) -> dict[str, object]:
    """What `_READER` does with an output: a single file needs the folder with the settings of a pipeline."""
    return {
        "kind": type(pipe).__name__,
        "path": str(output),
        "config": str(config) if output.suffix == ".safetensors" else None,
        "prompt": PROMPT,
        "picture": str(folder / f"{name}.npy"),
    }


def test_a_process_without_this_package_draws_the_live_adapters_pictures(tmp_path: Path) -> None:
    expected, jobs = {}, []
    for name, make in PIPELINES.items():
        pipe, base = make(), tmp_path / name
        pipe.save_pretrained(base)
        targets = "all" if name == "sd1" else "attention+feed-forward"
        config = SVFTConfig(targets=targets, pattern="banded", off_diagonals=1)
        dog = write_adapter(pipe, config, tmp_path / name / "dog.safetensors")
        style = write_adapter(pipe, SVDiffConfig(targets=targets), tmp_path / name / "style.safetensors", seed=4)
        before = digests(base)
        without = picture(live := load_pipeline(str(base)))
        load_adapter(live, dog)
        load_adapter(live, style)
        set_adapters(live, {"dog": {"unet": 0.7, "text_encoder": 0.9}, "style": 0.4})
        for output in (tmp_path / f"{name}-folder", tmp_path / f"{name}-file.safetensors"):
            adapters = [f"{dog}:unet=0.7,te=0.9", f"{style}:0.4"]
            assert main(["merge", *adapters, "--base", str(base), "-o", str(output)]) == 0
            expected[output.stem] = picture(live)
            jobs.append(job(output.stem, tmp_path, pipe, output, base))
        assert np.abs(expected[f"{name}-file"] - without).max() > 1e-2
        assert digests(base) == before

    live = load_pipeline("toybox")
    robot = write_adapter(live, SVFTConfig(targets="attention"), tmp_path / "robot.safetensors", base_name="toybox")
    load_adapter(live, robot)
    for output in (tmp_path / "toybox-folder", tmp_path / "toybox-file.safetensors"):
        assert main(["merge", str(robot), "-o", str(output), "--dtype", "float32"]) == 0
        expected[output.stem] = picture(live)
        jobs.append(job(output.stem, tmp_path, live, output, tmp_path / "toybox-folder"))

    subprocess.run(
        [sys.executable, "-I", "-c", _READER, json.dumps(jobs)], cwd=tmp_path, check=True, capture_output=True
    )
    differences = {name: np.abs(np.load(tmp_path / f"{name}.npy") - image).max() for name, image in expected.items()}
    assert max(differences.values()) <= 1e-5, differences


# The merged weights

CONFIGS: dict[str, Callable[[], SpectralConfig]] = {
    "svft banded": partial(SVFTConfig, targets="all", pattern="banded", off_diagonals=2),
    "svft random": partial(SVFTConfig, targets="all", pattern="random", off_diagonals=1),
    "svdiff": partial(SVDiffConfig, targets="all"),
    "svdiff, scalar norms": partial(SVDiffConfig, targets="all", norm_shift="scalar"),
    "vectorfit": partial(VectorFitConfig, targets="all"),
    "siva": partial(SiVAConfig, targets="all", fraction=0.5, select="random"),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_the_output_is_that_of_the_live_adapters(config: str) -> None:
    pipe, plain = sd2(), sd2()
    for name, seed in (("a", 3), ("b", 4)):
        add_training_adapter(pipe, CONFIGS[config](), name)
        for component in ("unet", "text_encoder"):
            randomize(getattr(pipe, component), name, seed)
    set_adapters(pipe, {"a": {"unet": 0.8, "text_encoder": -0.5}, "b": 0.6})
    expected, base = picture(pipe), picture(plain)
    layers = [weakref.ref(layer) for layer in spectral_layers(pipe.unet).values()]
    merged = merge_adapters(pipe, {})
    assert not any(layer() for layer in layers)  # nor what they held: old weights and factors
    assert set(merged) == {"unet", "text_encoder"}
    assert np.abs(expected - base).max() > 1e-2
    assert np.abs(picture(pipe) - expected).max() <= 1e-5
    for component in ("unet", "text_encoder"):
        model, other = getattr(pipe, component), getattr(plain, component)
        assert list(model.state_dict()) == list(other.state_dict())
        assert [type(module) for module in model.modules()] == [type(module) for module in other.modules()]
        assert not getattr(model, "_hf_peft_config_loaded", False)


@pytest.fixture(scope="module")
def base_and_adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = CLIPConfig(text_config=small, vision_config={**small, "image_size": 16, "patch_size": 8})
    parts = {
        "safety_checker": StableDiffusionSafetyChecker(checker),
        "feature_extractor": CLIPImageProcessor(crop_size=16),
    }
    pipe = StableDiffusionPipeline(**{**sd1().components, **parts})
    pipe.save_pretrained(folder / "base")
    config = SVFTConfig(train_bias=True)
    said = {"trigger": "sks", "instance_prompt": "a photo of sks dog", "title": "My dog"}
    return folder / "base", write_adapter(pipe, config, folder / "dog.safetensors", **said)


@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
def test_16_bit_is_the_float32_sum_rounded_once(
    output: str, base_and_adapter: tuple[Path, Path], tmp_path: Path
) -> None:
    base, dog = base_and_adapter
    half_base = tmp_path / "half"
    pipe = load_pipeline(str(base))
    pipe.to(torch.float16)
    pipe.save_pretrained(half_base)
    tensors = {}
    for dtype in ("float32", "bfloat16", None):
        chosen = ["--dtype", dtype] if dtype else []
        folder = tmp_path / str(dtype)
        arguments = ["merge", str(dog), "--base", str(half_base), "--on-mismatch", "align", "-o", str(folder / output)]
        assert main([*arguments, *chosen]) == 0
        tensors[dtype] = tensors_of(folder)
    exact = tensors.pop("float32")
    assert any(not torch.equal(tensor.half().float(), tensor) for tensor in exact.values())
    for dtype, found in tensors.items():
        expected = getattr(torch, dtype or "float16")  # that of the base's files
        assert found.keys() == exact.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected
            assert torch.equal(tensor, exact[name].to(expected)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weight_zero_is_the_base_bit_for_bit(
    dtype: torch.dtype, base_and_adapter: tuple[Path, Path], tmp_path: Path
) -> None:
    pipe = load_pipeline(str(base_and_adapter[0]))
    pipe.to(dtype)
    pipe.save_pretrained(tmp_path / "base")
    dog = write_adapter(pipe, SVFTConfig(targets="all"), tmp_path / "dog.safetensors")
    merged = tmp_path / "merged"
    assert main(["merge", f"{dog}:0", "--base", str(tmp_path / "base"), "-o", str(merged)]) == 0
    expected, found = tensors_of(tmp_path / "base"), tensors_of(merged)
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == tensor.dtype == dtype for name, tensor in expected.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_base_of_several_dtypes_loses_nothing(tmp_path: Path) -> None:
    pipe = sd1()
    pipe.to(torch.float16)
    pipe.unet.conv_norm_out.float()
    pipe.vae.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    dtypes = stored_dtypes(load_pipeline(str(tmp_path)))
    assert dtypes == {"unet": torch.float32, "vae": torch.bfloat16, "text_encoder": torch.float16}


def test_a_table_of_tokens_that_is_held_twice_is_saved_with_the_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 1, "num_heads": 3, "vocab_size": 40}
    model = T5EncoderModel(T5Config(**sizes)).eval()
    pipe = tiny_pipeline()
    pipe.text_encoder = model
    add_training_adapter({"text_encoder": model}, SVFTConfig(targets="all"), "a")
    randomize(model, "a")
    inputs = {"input_ids": IDS}
    expected = output_of(model, inputs)
    merge_adapters(pipe, {})
    assert model.shared.weight is model.encoder.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(output_of(T5EncoderModel.from_pretrained(tmp_path), inputs), output_of(model, inputs))
    torch.testing.assert_close(output_of(model, inputs), expected, atol=1e-5, rtol=0)


def test_what_does_not_fit_into_16_bit_is_refused(
    base_and_adapter: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, dog = base_and_adapter
    arguments = ["merge", f"{dog}:1e7", "--base", str(base), "-o", str(tmp_path / "merged"), "--dtype"]
    assert main([*arguments, "float16"]) == 2
    assert "does not fit into float16; use lower weights, or --dtype" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main([*arguments, "bfloat16"]) == 0


# What the output says of itself


def test_a_folder_comes_with_all_of_the_base_and_a_card(
    base_and_adapter: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, dog = base_and_adapter
    output = tmp_path / "merged"
    assert main(["merge", f"{dog}:0.8", "--base", str(base), "-o", str(output), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    assert report["layers"].keys() == {"unet", "text_encoder"}
    assert set(digests(output)) == {*digests(base), "README.md"}
    assert report["dtypes"].keys() == {"unet", "vae", "text_encoder", "safety_checker"}
    found = tensors_of(output)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors_of(base).items() if "safety" in name)
    for unchanged in ("tokenizer/tokenizer.json", "scheduler/scheduler_config.json", "model_index.json"):
        settings = [json.loads((folder / unchanged).read_text(encoding="utf-8")) for folder in (base, output)]
        assert settings[0] == {name: value for name, value in settings[1].items() if name != "_name_or_path"}
    card = yaml.safe_load((output / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert "base_model" not in card and report["base"] == "base"  # a folder is no model of the Hub
    assert card["library_name"] == "diffusers"
    assert card["instance_prompt"] == "a photo of sks dog"
    assert card["merged_from"] == report["merged_from"]
    assert card["merged_from"][0] == {
        "file": "dog.safetensors",
        "weight": 0.8,
        "method": "svft",
        "trigger": "sks",
        "instance_prompt": "a photo of sks dog",
        "sha256": hashlib.sha256(dog.read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
def test_nothing_names_a_place_on_this_machine(
    output: str, base_and_adapter: tuple[Path, Path], tmp_path: Path
) -> None:
    base, dog = base_and_adapter
    assert main(["merge", str(dog), "--base", str(base), "-o", str(tmp_path / "out" / output)]) == 0
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            for place in (base.parent, tmp_path, Path.home(), Path(sys.prefix)):
                assert str(place).encode() not in content, (file, place)


def test_a_single_file_says_what_was_merged(base_and_adapter: tuple[Path, Path], tmp_path: Path) -> None:
    base, dog = base_and_adapter
    output = tmp_path / "dog-model.safetensors"
    assert main(["merge", str(dog), "--base", str(base), "-o", str(output)]) == 0
    with safe_open(output, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == "dog-model"
    assert metadata["modelspec.merged_from"] == "base, dog.safetensors"
    assert metadata["modelspec.trigger_phrase"] == "sks"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert json.loads(metadata["svft_diffusion.merged_from"])[0]["weight"] == 1.0


def test_files_that_the_trainer_named_are_called_by_their_folders(
    base_and_adapter: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, dog = base_and_adapter
    robot = tmp_path / "robot" / "adapter.safetensors"
    robot.parent.mkdir()
    shutil.copy(dog, robot)
    arguments = [str(robot.parent), str(dog), "--base", str(base), "-o", str(tmp_path / "model.safetensors"), "--json"]
    assert main(["merge", *arguments]) == 0
    merged = json.loads(capsys.readouterr().out)["merged_from"]
    assert [source["file"] for source in merged] == ["robot", "dog.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
def test_file_names_that_are_no_text_are_escaped(
    output: str, base_and_adapter: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, dog = base_and_adapter
    named = shutil.copy(dog, tmp_path / os.fsdecode(b"d\xffg.safetensors"))
    out = tmp_path / output
    assert main(["merge", str(named), "--base", str(base), "-o", str(out), "--json"]) == 0
    if out.is_file():
        with safe_open(out, framework="pt") as file:
            assert file.metadata()["modelspec.merged_from"] == r"base, d\udcffg.safetensors"
    assert json.loads(capsys.readouterr().out)["merged_from"][0]["file"] == named.name


# Names in single files

_TEXT_1 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_TEXT_2 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_TEXT_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_XL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def full_size(model: str) -> DiffusionPipeline:
    """The models of the published size, without memory for their weights."""
    gelu = {"hidden_act": "gelu"}
    parts = {name: None for name in ("tokenizer", "scheduler")}
    with torch.device("meta"):
        parts["vae"] = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
        if model == "xl_base":
            parts["unet"] = UNet2DConditionModel(**_XL_UNET)
            parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**_TEXT_1))
            second = CLIPTextConfig(**_TEXT_G, **gelu, projection_dim=1280)
            parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
            return StableDiffusionXLPipeline(**parts, tokenizer_2=None)
        if model == "v1":
            parts["unet"] = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
            parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**_TEXT_1))
        else:
            heads = (5, 10, 20, 20)
            parts["unet"] = UNet2DConditionModel(
                cross_attention_dim=1024, attention_head_dim=heads, use_linear_projection=True
            )
            parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**_TEXT_2, **gelu))
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@pytest.mark.parametrize(("model", "unet_tensors", "text_tensors"), [("v1", 686, 196), ("v2", 686, 280)])
def test_tensors_of_the_published_sizes_are_named_as_in_the_original(
    model: str, unet_tensors: int, text_tensors: int
) -> None:
    check_names(full_size(model), model, unet_tensors, text_tensors)


def test_tensors_of_xl_are_named_as_in_the_original() -> None:
    check_names(full_size("xl_base"), "xl_base", 1680, 196 + 389)


def check_names(pipe: DiffusionPipeline, model: str, unet_tensors: int, text_tensors: int) -> None:
    tensors = original_tensors(pipe)
    assert infer_diffusers_model_type(tensors) == model
    counts = {
        start: sum(name.startswith(start) for name in tensors)
        for start in ("model.diffusion_model.", "first_stage_model.", "cond")
    }
    assert counts == {"model.diffusion_model.": unet_tensors, "first_stage_model.": 248, "cond": text_tensors}
    for convert, component in ((convert_ldm_unet_checkpoint, pipe.unet), (convert_ldm_vae_checkpoint, pipe.vae)):
        found = convert(dict(tensors), component.config)
        assert {name: tensor.shape for name, tensor in found.items()} == {
            name: tensor.shape for name, tensor in component.state_dict().items()
        }
