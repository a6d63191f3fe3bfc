"""The networks that judge: features against those of transformers' own processors, names, digests, refusals."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import MAX_TOKENS, tiny_text_config, tiny_tokenizer
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.backbones import Backbone, load_backbone, parse_backbone, weights_digest
from svft_diffusion.evaluation.lpips_diversity import LpipsDiversity
from svft_diffusion.evaluation.preprocessing import CLIP_PREPROCESSING, DINO_PREPROCESSING
from svft_diffusion.evaluation.toy_subjects import demonstration_subject

# One layer of the true width: the width and the patches are what a name stands for.
SHALLOW: dict[str, Any] = {"num_hidden_layers": 1, "intermediate_size": 48, "num_attention_heads": 2}


def pictures(count: int = 20) -> list[Image.Image]:
    """Random pictures of many shapes: smooth, since noise of single pixels vanishes when it is resized."""
    random = np.random.default_rng(3)
    shapes = [(300, 300), (256, 341), (511, 287), (64, 64), (97, 224), (225, 640)]
    found = []
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8))
        found.append(coarse.resize(shapes[number % len(shapes)], Image.Resampling.BICUBIC))
    return found


def tiny_clip() -> CLIPModel:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**(SHALLOW | {"hidden_size": 768, "patch_size": 32}))
    config = CLIPConfig(text_config=tiny_text_config().to_dict(), vision_config=vision.to_dict(), projection_dim=20)
    return CLIPModel(config).eval()


def tiny_dino(patch: int = 16) -> ViTModel:
    torch.manual_seed(0)
    return ViTModel(ViTConfig(**(SHALLOW | {"hidden_size": 384, "patch_size": patch}))).eval()


def tiny_dinov2() -> Dinov2Model:
    torch.manual_seed(0)
    values = {"hidden_size": 384, "patch_size": 14, "image_size": 518, "mlp_ratio": 1}
    return Dinov2Model(Dinov2Config(**(SHALLOW | values))).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Backbone name -> folder with tiny weights."""
    root = tmp_path_factory.mktemp("backbones")
    models = {"clip-vit-b32": tiny_clip(), "dino-vits16": tiny_dino(), "dinov2-small": tiny_dinov2()}
    for name, model in models.items():
        model.save_pretrained(root / name)
    tiny_tokenizer().save_pretrained(root / "clip-vit-b32")
    return {name: root / name for name in models}


def loaded(folders: dict[str, Path], name: str) -> Backbone:
    return load_backbone(parse_backbone(f"{name}={folders[name]}"))


@torch.no_grad()
def expected_features(name: str) -> torch.Tensor:
    """The same by transformers' own preprocessing, with the sizes that the networks' authors evaluate them at."""
    if name == "clip-vit-b32":
        model = tiny_clip()
        inputs = CLIPImageProcessor()(pictures(), return_tensors="pt")
        return model.visual_projection(model.vision_model(**inputs).pooler_output)
    processor = BitImageProcessor(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    model = tiny_dino() if name == "dino-vits16" else tiny_dinov2()
    return model(**processor(pictures(), return_tensors="pt")).last_hidden_state[:, 0]


@pytest.mark.parametrize("name", ["clip-vit-b32", "dino-vits16", "dinov2-small"])
def test_features_are_those_of_the_published_preprocessing(folders: dict[str, Path], name: str) -> None:
    found = loaded(folders, name).embed_pictures(pictures())
    expected = expected_features(name)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert F.cosine_similarity(found, expected).min() >= 0.9999
    # The test can fail: features of different pictures are not that near.
    assert F.cosine_similarity(found, expected.roll(1, 0)).min() < 0.9999


def test_the_text_features_are_those_of_each_prompt_alone(folders: dict[str, Path]) -> None:
    model, tokenizer = tiny_clip(), tiny_tokenizer()
    texts = ["a photo of a dog", "a red robot on the beach"]
    found = loaded(folders, "clip-vit-b32").embed_texts(texts)
    for text, features in zip(texts, found, strict=True):
        with torch.no_grad():
            read = model.text_model(**tokenizer(text, return_tensors="pt"))
            expected = model.text_projection(read.pooler_output)[0]
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_that_is_too_long_is_cut(folders: dict[str, Path]) -> None:
    long = " ".join(["dog"] * (3 * MAX_TOKENS))
    assert torch.isfinite(loaded(folders, "clip-vit-b32").embed_texts([long])).all()


def test_preprocessing_ends_at_the_crop_whatever_the_shape() -> None:
    for preprocessing in (CLIP_PREPROCESSING, DINO_PREPROCESSING):
        for size in ((1, 32), (32, 1), (224, 224), (701, 333)):
            assert preprocessing([Image.new("RGBA", size, "red")]).shape == (1, 3, 224, 224)


def test_preprocessing_normalizes_by_the_backbones_colours() -> None:
    white = DINO_PREPROCESSING([Image.new("RGB", (300, 256), "white")])
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(white[0, :, 100, 100], expected)


def test_a_report_tells_which_weights_judged(folders: dict[str, Path], tmp_path: Path) -> None:
    first = loaded(folders, "dino-vits16")
    assert first.facts()["weights"] == loaded(folders, "dino-vits16").facts()["weights"]
    other = tiny_dino()
    with torch.no_grad():
        other.layernorm.bias[0] += 1e-3
    other.save_pretrained(tmp_path)
    changed = load_backbone(parse_backbone(f"dino-vits16={tmp_path}"))
    assert weights_digest(changed.model) != weights_digest(first.model)
    assert first.facts()["name"] == "dino-vits16" and "256" in first.facts()["preprocessing"]


def test_the_embedded_readers_stand_in_under_their_own_names() -> None:
    subject = demonstration_subject()
    looks, reads = load_backbone(parse_backbone("toy-identity")), load_backbone(parse_backbone("toy-text"))
    assert (looks.name, looks.reads_text, reads.name, reads.reads_text) == ("toy-identity", False, "toy-text", True)
    photos = subject.photos()
    assert looks.embed_pictures(photos).shape[0] == len(photos)
    own, other = reads.embed_texts([subject.class_prompt, "a photo of a mug"])
    similarity = F.normalize(reads.embed_pictures(photos), dim=1) @ torch.stack([own, other]).T
    assert (similarity[:, 0] > similarity[:, 1]).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dino-vits61", "unknown backbone 'dino-vits61', did you mean 'dino-vits16'?"),
        ("resnet", "there are clip-vit-b32"),
        ("", "unknown backbone ''"),
        ("dino-vits16=", "an empty path is no folder of a model"),
        ("dino-vits16=/no/such/folder", "is no folder of a model"),
        ("toy-text=readers", "toy-text is embedded; leave out the folder"),
    ],
)
def test_backbones_that_can_not_be_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        parse_backbone(text)


def test_another_network_under_a_name_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    tiny_dino(patch=8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="another network: width 384 and patches of 8 pixels in place of 384 and 16"):
        load_backbone(parse_backbone(f"dino-vits16={tmp_path}"))
    with pytest.raises(UserError, match="can't be loaded from"):
        load_backbone(parse_backbone(f"dino-vits16={folders['clip-vit-b32']}"))


def test_weights_that_a_file_lacks_are_not_made_up(folders: dict[str, Path], tmp_path: Path) -> None:
    model = tiny_dino()
    weights = {name: value for name, value in model.state_dict().items() if name != "layernorm.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UserError, match=r"lacks weights of a ViTModel, such as layernorm\.weight"):
        load_backbone(parse_backbone(f"dino-vits16={tmp_path}"))


def test_a_backbone_that_is_not_here_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as refusal:
        load_backbone(parse_backbone("dino-vits16"))
    assert "is not on this machine" in str(refusal.value) and "\n" not in str(refusal.value)
    assert "--backbone dino-vits16=FOLDER" in str(refusal.value)


def test_lpips_is_the_mean_over_all_pairs_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distance(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()

        def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            assert one.shape == other.shape == (1, 3, 6, 4)
            assert min(one.min(), other.min()) >= -1 and max(one.max(), other.max()) <= 1
            return (one - other).abs().mean().view(1, 1, 1, 1)

    for name in ("lpips", "torchvision"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.LPIPS = Distance  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    shades = [Image.new("RGB", (4, 6), (grey, grey, grey)) for grey in (0, 51, 255)]
    # Black and white are 2 apart.
    assert LpipsDiversity(torch.device("cpu"))(shades) == pytest.approx((0.4 + 2.0 + 1.6) / 3)


def test_an_lpips_that_can_not_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, "lpips", None)  # as with a torchvision that was built for another torch
    with pytest.raises(UserError, match="the network of --lpips can't be loaded: import of lpips") as refusal:
        LpipsDiversity(torch.device("cpu"))
    assert "\n" not in str(refusal.value)
