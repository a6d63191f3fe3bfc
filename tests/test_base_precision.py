"""Adapters that were trained on a base in one precision and are loaded on the same base in another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_runtime import METADATA, picture
from tiny_models import tiny_pipeline, tiny_unet

from svft_diffusion import SVFTConfig, load_adapter, save_adapter, set_adapters, swap_adapter, unload_adapter
from svft_diffusion.adapters import add_training_adapter
from svft_diffusion.errors import UserError
from svft_diffusion.files import (
    digests_of_pipeline,
    layer_names,
    matches_of_folder,
    read_adapter,
    write_adapter,
)
from svft_diffusion.models import load_pipeline
from svft_diffusion.sampling.adapter_choice import check_adapter

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYERS = ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet.mid_block.resnets.0.conv1")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, and copies of it that were saved in 16 bit."""
    folder = tmp_path_factory.mktemp("bases")
    tiny_pipeline().save_pretrained(folder / "float32")
    for name in ("float16", "bfloat16"):
        load_pipeline(str(folder / "float32"), dtype=DTYPES[name]).save_pretrained(folder / name)
    return {name: folder / name for name in DTYPES}


def train(pipe: object, file: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    for parameter in add_training_adapter(pipe, SVFTConfig(pattern="banded", off_diagonals=1), "made"):
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return save_adapter(pipe, "made", file, metadata=METADATA)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("svft_diffusion")]


@pytest.mark.parametrize("trained_in", DTYPES)
@pytest.mark.parametrize("loaded_in", DTYPES)
def test_the_precision_in_which_a_base_is_loaded_is_no_other_base(
    bases: dict[str, Path], tmp_path: Path, trained_in: str, loaded_in: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = str(bases["float32"])
    file = train(load_pipeline(base, dtype=DTYPES[trained_in]), tmp_path / "dog.safetensors")
    check_adapter(file, base, name="dog")
    load_adapter(load_pipeline(base, dtype=DTYPES[loaded_in]), file)
    assert warnings(caplog) == []


@pytest.mark.parametrize("trained_on", ["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_of_a_16_bit_copy_is_measured_on_the_original(
    bases: dict[str, Path], tmp_path: Path, trained_on: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    trained_in = DTYPES["float32"] if dtype == "float32" else DTYPES[trained_on]
    file = train(load_pipeline(str(bases[trained_on]), dtype=trained_in), tmp_path / "dog.safetensors")
    load_adapter(load_pipeline(str(bases["float32"])), file)
    (message,) = warnings(caplog)
    assert message.startswith("the base has the weights of the training in another precision; the update of dog")
    assert 1e-3 < float(message.partition("trained one by ")[2].split()[0]) < 0.5


def test_a_16_bit_base_on_which_nothing_of_the_update_is_left_is_refused(tmp_path: Path) -> None:
    """Other weights that a forged header claims: rounding to 16 bit does not explain them."""
    header, tensors = read_adapter(train({"unet": tiny_unet()}, tmp_path / "dog.safetensors"))
    unet = tiny_unet(5).to(dtype=torch.float16)
    base = dataclasses.replace(header.base, digests=digests_of_pipeline({"unet": unet}, layer_names(tensors)))
    file = write_adapter(tmp_path / "dog.safetensors", dataclasses.replace(header, base=base), tensors)
    with pytest.raises(UserError, match="nothing is left of it on this base"):
        load_adapter({"unet": unet}, file)
    assert not hasattr(unet, "peft_config")


def test_an_unloaded_adapter_leaves_the_16_bit_picture_and_what_trains(tmp_path: Path) -> None:
    """On the CPU, PyTorch rounds products in float16 by whether a weight requires a gradient."""
    file = train({"unet": tiny_unet()}, tmp_path / "dog.safetensors")
    pipe = tiny_pipeline().to(dtype=torch.float16)
    pipe.unet.conv_in.requires_grad_(False)
    base, trains = picture(pipe), [parameter.requires_grad for parameter in pipe.unet.parameters()]
    load_adapter(pipe, file, "dog")
    own = [parameter.requires_grad for name, parameter in pipe.unet.named_parameters() if ".spectral_" not in name]
    assert own == trains and {True, False} == set(trains)
    set_adapters(pipe, {"dog": 0.0})
    assert (picture(pipe) == base).all()
    unload_adapter(pipe, "dog")
    assert (picture(pipe) == base).all()
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == trains


def test_a_file_of_other_components_can_not_be_swapped_in(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    load_adapter(pipe, train({"unet": tiny_unet()}, tmp_path / "unet.safetensors"), "dog")
    both = train(tiny_pipeline(), tmp_path / "both.safetensors")
    with pytest.raises(UserError, match="the state does not fit adapter 'dog': 12 layers differ"):
        swap_adapter(pipe, "dog", both)


def test_the_weights_of_a_folder_are_those_of_the_chosen_variant(tmp_path: Path) -> None:
    tiny_unet(0).save_pretrained(tmp_path / "unet")
    tiny_unet(1).save_pretrained(tmp_path / "unet", variant="non_ema")
    first, second = (digests_of_pipeline({"unet": tiny_unet(seed)}, LAYERS) for seed in (0, 1))
    for variant, trained in ((None, first), ("non_ema", second), ("fp16", first)):  # no fp16: diffusers takes what is
        assert matches_of_folder(tmp_path, LAYERS, trained, variant) == (2, 0, 2)
    assert matches_of_folder(tmp_path, LAYERS, first, "non_ema") == (0, 0, 2)


def test_a_folder_is_asked_by_the_shared_name_of_a_table(tmp_path: Path) -> None:
    """T5 saves the table of its tokens as ``shared.weight``; its layer is called ``encoder.embed_tokens``."""
    name, table = "text_encoder.encoder.embed_tokens", torch.randn(7, 5)
    (tmp_path / "text_encoder").mkdir()
    save_file({"shared.weight": table}, tmp_path / "text_encoder" / "model.safetensors")
    live = torch.nn.Module()
    live.encoder = torch.nn.Module()
    live.encoder.embed_tokens = torch.nn.Embedding(7, 5, _weight=table)
    trained = digests_of_pipeline({"text_encoder": live}, [name])
    assert matches_of_folder(tmp_path, [name], trained) == (1, 0, 1)
