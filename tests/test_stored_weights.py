"""Weights in the precision of the checkpoint, for models that were cast down when they were loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_pipeline, tiny_unet
from torch import Tensor, nn
from transformers import CLIPTextModel

from svft_diffusion.files import stored_weight as stored_module
from svft_diffusion.files.checkpoint_folder import weight_files
from svft_diffusion.files.stored_weight import stored_weight

UNET_FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original() -> StableDiffusionPipeline:
    return tiny_pipeline(seed=3)


@pytest.fixture
def folder(original: StableDiffusionPipeline, tmp_path: Path) -> Path:
    original.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Every weight of the model by the path of its module."""
    return {
        name.removesuffix(".weight"): weight
        for name, weight in model.named_parameters(remove_duplicate=False)
        if name.endswith(".weight")
    }


def found(model: nn.Module) -> list[bool]:
    return [stored_weight(model, path, weight) is not None for path, weight in weights_of(model).items()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pipeline_that_was_cast_down(original: StableDiffusionPipeline, folder: Path, dtype: torch.dtype) -> None:
    pipe = load(folder, dtype)
    for component in ("unet", "text_encoder"):
        model = getattr(pipe, component)
        exact = weights_of(getattr(original, component))
        for path, weight in weights_of(model).items():
            stored = stored_weight(model, path, weight)
            assert stored is not None, path
            assert stored.dtype == torch.float32
            assert torch.equal(stored, exact[path])


def test_nothing_to_gain(folder: Path) -> None:
    pipe = load(folder, torch.float32)
    assert not any(found(pipe.unet))
    pipe.to(dtype=torch.float16).save_pretrained(folder / "half")
    half = load(folder / "half", torch.float16)
    assert not any(found(half.unet))
    assert not any(found(half.text_encoder))


def test_float16_checkpoint_in_bfloat16(original: StableDiffusionPipeline, folder: Path) -> None:
    load(folder, torch.float16).save_pretrained(folder / "half")
    unet = load(folder / "half", torch.bfloat16).unet
    exact = weights_of(original.unet)
    for path, weight in weights_of(unet).items():
        stored = stored_weight(unet, path, weight)
        assert stored is not None
        assert stored.dtype == torch.float16
        assert torch.equal(stored, exact[path].half())


@pytest.mark.parametrize("block", [7, 2**15])
def test_other_values(folder: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_module, "_BLOCK", block)
    pipe = load(folder, torch.float16)
    path, weight = next(iter(weights_of(pipe.unet).items()))
    with torch.no_grad():
        weight.view(-1)[-1] += 0.01
    assert stored_weight(pipe.unet, path, weight) is None
    assert sum(found(pipe.unet)) == len(weights_of(pipe.unet)) - 1
    other = load(folder, torch.bfloat16)
    tiny_unet(seed=8).save_pretrained(folder / "unet")  # the folder changed under the model
    norms = [path for path in weights_of(other.unet) if "norm" in path]  # ones in both
    assert sum(found(other.unet)) == len(norms)


def test_the_sign_of_zero_counts(folder: Path) -> None:
    pipe = load(folder, torch.float16)
    path = "down_blocks.0.resnets.0.norm1"
    values = load_file(folder / "unet" / UNET_FILE)
    values[f"{path}.weight"] = torch.full_like(values[f"{path}.weight"], -0.0)
    save_file(values, folder / "unet" / UNET_FILE)
    shape = values[f"{path}.weight"].shape
    assert stored_weight(pipe.unet, path, torch.full(shape, 0.0, dtype=torch.float16)) is None
    assert stored_weight(pipe.unet, path, torch.full(shape, -0.0, dtype=torch.float16)) is not None
    assert stored_weight(pipe.unet, path, torch.full((shape[0] + 1,), -0.0, dtype=torch.float16)) is None


def test_shards(original: StableDiffusionPipeline, tmp_path: Path) -> None:
    original.unet.save_pretrained(tmp_path / "unet", max_shard_size="50KB")
    assert len(list((tmp_path / "unet").glob("*-of-*.safetensors"))) > 2
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.float16)
    assert all(found(unet))
    shutil.rmtree(tmp_path / "unet")
    assert not any(found(unet))


def test_component_in_a_subfolder(folder: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.bfloat16)
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.bfloat16)
    assert all(found(unet))
    assert all(found(encoder))


@pytest.mark.parametrize("prefix", ["", "text_model.", "model.", "model.text_model."])
def test_other_prefixes(folder: Path, prefix: str) -> None:
    encoder = load(folder, torch.float16).text_encoder
    file = folder / "text_encoder" / "model.safetensors"
    values = load_file(file)
    save_file({prefix + name.removeprefix("text_model."): value for name, value in values.items()}, file)
    path = "encoder.layers.0.mlp.fc1"
    weight = encoder.get_submodule(path).weight
    assert all(found(encoder))
    with_level = stored_weight(encoder, f"text_model.{path}", weight)  # as transformers 4 calls it
    assert (with_level is not None) == (prefix != "model.")
    assert stored_weight(encoder, "mlp.fc1", weight) is None  # two layers end like this


def test_hub_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--someone--some-model"
    snapshot = repository / "snapshots" / "0123abcd"
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd", encoding="utf-8")
    unet = load(folder, torch.float16).unet
    unet.register_to_config(_name_or_path="someone/some-model")
    assert not any(found(unet))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert all(found(unet))


@pytest.mark.parametrize("source", [None, "", "someone/not-here", "no name at all", "/no/such/folder"])
def test_a_model_from_nowhere(source: str | None) -> None:
    unet = tiny_unet().half()
    unet.register_to_config(_name_or_path=source)
    assert not any(found(unet))
    assert stored_weight(nn.Linear(3, 4).half(), "", torch.zeros(4, 3, dtype=torch.float16)) is None


@pytest.mark.parametrize("content", [b"", b"no safetensors file"])
def test_damaged_checkpoints(folder: Path, content: bytes) -> None:
    unet = load(folder, torch.float16).unet
    (folder / "unet" / UNET_FILE).write_bytes(content)
    assert not any(found(unet))
    (folder / "unet" / UNET_FILE).unlink()
    for index in ("[]", "{}", "no json", '{"weight_map": {"conv_in.weight": "missing.safetensors"}}'):
        (folder / "unet" / f"{UNET_FILE}.index.json").write_text(index, encoding="utf-8")
        assert not any(found(unet))


def test_full_precision_comes_before_variants(tmp_path: Path) -> None:
    def save(name: str, dtype: torch.dtype) -> None:
        save_file({"a.weight": torch.ones(2, dtype=dtype)}, tmp_path / name)

    def index(name: str, file: str) -> None:
        (tmp_path / name).write_text(json.dumps({"weight_map": {"a.weight": file}}), encoding="utf-8")

    def chosen() -> str:
        return weight_files(tmp_path)["a.weight"].name

    with pytest.raises(FileNotFoundError, match="no safetensors"):
        weight_files(tmp_path)
    shard, half_shard = "model-00001-of-00001.safetensors", "model.fp16-00001-of-00001.safetensors"
    save(half_shard, torch.float16)
    index("model.safetensors.index.fp16.json", half_shard)
    assert chosen() == half_shard
    save("model.fp16.safetensors", torch.float16)
    assert chosen() == "model.fp16.safetensors"
    save(shard, torch.float32)
    index("model.safetensors.index.json", shard)
    assert chosen() == shard  # full precision in shards, though the variant is whole
    save("adapter_model.safetensors", torch.float32)
    save("model.safetensors", torch.float32)
    assert chosen() == "model.safetensors"


def test_reads_only_what_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = load(folder, torch.float16).unet
    read = []

    class Recorder:
        def __init__(self, file: Path, framework: str) -> None:
            self.file = safe_open(file, framework=framework)

        def __enter__(self) -> Recorder:
            return self

        def __exit__(self, *error: object) -> None: ...

        def get_slice(self, name: str) -> object:
            return self.file.get_slice(name)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr("svft_diffusion.files.stored_weight.safe_open", Recorder)
    assert stored_weight(unet, "conv_in", unet.conv_in.weight) is not None
    assert read == ["conv_in.weight"]
