"""Digests of the base: the same weights are recognised in other dtypes and files, and others are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_pipeline

from svft_diffusion.errors import UserError
from svft_diffusion.files import (
    AdapterHeader,
    BaseModel,
    check_base,
    digests_of_pipeline,
    matches_of_folder,
    matches_of_pipeline,
)

LAYERS = [
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "text_encoder.text_model.encoder.layers.1.mlp.fc1",
]


def trained_on(pipe: object) -> AdapterHeader:
    base = BaseModel("toy", digests=digests_of_pipeline(pipe, LAYERS))
    return AdapterHeader("svft", "plain", 0, None, "custom", {"unet": 2, "text_encoder": 1}, base)


@pytest.mark.parametrize("saved", ["float32", "sharded", "variant", "both variants"])
def test_a_folder_holds_the_weights_of_the_live_pipeline(tmp_path: Path, saved: str) -> None:
    pipe = tiny_pipeline()
    trained = digests_of_pipeline(pipe, LAYERS)
    assert trained == digests_of_pipeline({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, reversed(LAYERS))
    if saved == "sharded":
        pipe.save_pretrained(tmp_path, max_shard_size="50KB")
        assert list((tmp_path / "unet").glob("*.index.json"))
    elif saved != "variant":
        pipe.save_pretrained(tmp_path)
    if "variant" in saved:
        pipe.to(dtype=torch.float16)
        pipe.save_pretrained(tmp_path, variant="fp16")
        assert list((tmp_path / "unet").glob("*.fp16.safetensors"))
    rounded = 3 if saved == "variant" else 0
    assert matches_of_folder(tmp_path, LAYERS, trained) == (3, rounded, 3)
    assert matches_of_folder(tmp_path, LAYERS, digests_of_pipeline(tiny_pipeline(seed=1), LAYERS)) == (0, 0, 3)


def test_weights_are_recognised_in_other_dtypes_one_by_one() -> None:
    trained = digests_of_pipeline(tiny_pipeline(), LAYERS)
    for dtype, rounded in ((torch.float32, 0), (torch.float64, 3), (torch.float16, 3), (torch.bfloat16, 3)):
        assert matches_of_pipeline(tiny_pipeline().to(dtype=dtype), LAYERS, trained) == (3, rounded, 3)
    half = digests_of_pipeline(tiny_pipeline().to(dtype=torch.bfloat16), LAYERS)
    assert half.float16 is None and half.fingerprint == trained.fingerprint.split()[1]
    assert matches_of_pipeline(tiny_pipeline(), LAYERS, half) == (3, 3, 3)
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.unet.get_submodule(LAYERS[0].removeprefix("unet.")).weight[0, 0] += 1e-3  # one element in one layer
    assert matches_of_pipeline(pipe, LAYERS, trained) == (2, 0, 3)
    assert digests_of_pipeline(pipe, LAYERS).fingerprint != trained.fingerprint


def test_another_base_is_refused_with_both_names_and_how_much_agrees() -> None:
    header = trained_on(tiny_pipeline())
    check_base(header, matches_of_pipeline(tiny_pipeline(), LAYERS, header.base.digests), "toy")
    mixed = {"unet": tiny_pipeline(seed=1).unet, "text_encoder": tiny_pipeline().text_encoder}
    message = (
        r"dog was trained on the base toy \(fingerprint \w{8}\), but the loaded base is other: 1 of 3 adapted weights "
        r"are those of the training; give it the base toy, or --on_mismatch align"
    )
    with pytest.raises(UserError, match=message):
        check_base(header, matches_of_pipeline(mixed, LAYERS, header.base.digests), "other", adapter="dog")


def test_what_is_no_model_folder_is_no_base(tmp_path: Path) -> None:
    trained = digests_of_pipeline(tiny_pipeline(), LAYERS)
    assert matches_of_folder("someone/some-model", LAYERS, trained) is None
    assert matches_of_folder(tmp_path, LAYERS, trained) is None
    tiny_pipeline().unet.save_pretrained(tmp_path / "unet")
    of_unet = digests_of_pipeline(tiny_pipeline(), LAYERS[:2])
    assert matches_of_folder(tmp_path, LAYERS[:2], of_unet) == (2, 0, 2)
    assert matches_of_folder(tmp_path, LAYERS, trained) is None
    assert matches_of_folder(tmp_path, ["unet.no.such.layer"], of_unet) == (0, 0, 1)


def test_a_layer_that_the_pipeline_lacks_is_named() -> None:
    with pytest.raises(UserError, match=r"no layer unet\.no\.such\.layer"):
        digests_of_pipeline(tiny_pipeline(), ["unet.no.such.layer"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_checkpoint_loaded_in_float32_is_the_same_base(dtype: torch.dtype) -> None:
    pipe = tiny_pipeline().to(dtype=dtype)
    trained = digests_of_pipeline(pipe.to(dtype=torch.float32), LAYERS)
    assert matches_of_pipeline(pipe.to(dtype=dtype), LAYERS, trained) == (3, 0, 3)
