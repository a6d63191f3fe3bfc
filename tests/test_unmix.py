"""The unmix loss: its formula by hand, the maps it reads, and what it does to a model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from tiny_models import TEXT_WIDTH, tiny_pipeline, tiny_pipeline_sdxl, tiny_tokenizer, tiny_unet
from tiny_transformers import tiny_pipeline_flux, tiny_pipeline_sd3
from torch import Tensor

from svft_diffusion.errors import UserError
from svft_diffusion.evaluation.toy_subjects import held_out_subjects, write_photos
from svft_diffusion.models import LatentDistribution, family_of
from svft_diffusion.training.batches import Batch
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.metrics import read_metrics
from svft_diffusion.training.mixing import Mixing
from svft_diffusion.training.trainer import train
from svft_diffusion.training.unmix import (
    SubjectTokens,
    Unmix,
    attention_map,
    check_unmix,
    make_unmix,
    map_layers,
    token_places,
    unmix_loss,
)

PROMPT, ALONE = "photo of sks dog on red robot", "a photo of sks dog"
TOKENS = SubjectTokens([3], [6])


# The formula


def test_loss_by_hand() -> None:
    maps = torch.zeros(3, 1, 2)
    maps[1] = torch.tensor([[0.5, 0.3]])  # of the subject on the left: 0.3 is where it does not belong
    maps[2] = torch.tensor([[0.1, 0.9]])
    assert float(unmix_loss(maps, SubjectTokens([1], [2]))) == pytest.approx(0.3**2 + 0.1**2)
    # Of several tokens, the mean of their squares; tokens in no list don't count.
    maps[0] = torch.tensor([[9.0, 0.5]])
    assert float(unmix_loss(maps, SubjectTokens([0, 1], [2]))) == pytest.approx((0.5**2 + 0.3**2) / 2 + 0.1**2)


def test_loss_is_a_mean_over_the_half_and_takes_part_of_a_column_that_is_cut() -> None:
    maps = torch.zeros(2, 2, 3)
    maps[0] = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    expected = (0.5 * (4 + 25) + (9 + 36)) / 3  # half of the middle column, in both rows
    assert float(unmix_loss(maps, SubjectTokens([0], [1]))) == pytest.approx(expected)
    assert float(unmix_loss(maps, SubjectTokens([1], [0]))) == pytest.approx((0.5 * (4 + 25) + (1 + 16)) / 3)
    only = torch.zeros(2, 4, 6)
    only[0, :, :3], only[1, :, 3:] = 1.0, 1.0
    assert float(unmix_loss(only, SubjectTokens([0], [1]))) == 0.0
    assert float(unmix_loss(only, SubjectTokens([1], [0]))) == 2.0


def test_attention_map_is_the_softmax_over_tokens_and_the_mean_over_heads() -> None:
    # Two heads of width one, one place, two tokens.
    query, key = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    first, second = torch.tensor([0.0, 0.5]).softmax(0), torch.tensor([1.0, 0.0]).softmax(0)
    torch.testing.assert_close(attention_map(query, key, 2, 0.5)[0, :, 0], (first + second) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_map_is_float32_inside_autocast(dtype: torch.dtype) -> None:
    query, key = torch.randn(1, 6, 8, dtype=dtype), torch.randn(1, 5, 8, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention_map(query, key, 2, 0.5)
    assert found.dtype == torch.float32 and torch.equal(found, attention_map(query.float(), key.float(), 2, 0.5))


# Where the maps come from


def test_layers_are_those_at_a_quarter_of_the_latents_side() -> None:
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    changes: dict[str, Any] = {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": (cross, cross, cross, plain),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "attention_head_dim": 2,
    }
    factor, layers = map_layers(tiny_unet(**changes))  # as Stable Diffusion 1.5
    assert factor == 4 and {name.rpartition(".attentions")[0] for name in layers} == {"down_blocks.2", "up_blocks.1"}
    assert all(name.endswith("attn2") for name in layers)
    factor, layers = map_layers(tiny_unet())  # has two levels
    assert factor == 2
    assert {name.rpartition(".attentions")[0] for name in layers} == {"down_blocks.1", "mid_block", "up_blocks.0"}


def batch_of(prompts: list[str], height: int = 8, width: int = 12) -> Batch:
    latents = torch.randn(len(prompts), 4, height, width)
    samples = [("instance", number) for number in range(len(prompts))]
    return Batch(LatentDistribution(latents, latents), torch.zeros(len(prompts), 6), prompts, samples)


class Read(AttnProcessor):
    """Diffusers' plain attention, which keeps its maps."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **rest: Any) -> Tensor:
        query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
        self.maps = attn.get_attention_scores(attn.head_to_batch_dim(query), attn.head_to_batch_dim(key))
        output: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, **rest)
        return output


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradient_are_those_of_diffusers_own_maps(checkpointing: bool) -> None:
    unet = tiny_unet().train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unmix = Unmix(unet, {PROMPT: TOKENS})
    batch = batch_of([ALONE, PROMPT])
    text = torch.randn(2, 9, TEXT_WIDTH)
    weight = unet.down_blocks[0].resnets[0].conv1.weight  # far before the maps

    def gradient(loss: Tensor, prediction: Tensor) -> Tensor:
        weight.grad = None
        (loss + 0.1 * prediction.square().mean()).backward()
        assert weight.grad is not None
        return weight.grad.clone()

    with unmix.reading() as projections:
        prediction = unet(batch.latents.mean, 5, text).sample
        with torch.no_grad():  # another pass, of the base model
            unet(batch.latents.mean + 1, 5, text)
    found = unmix.loss(projections, batch)
    assert not any(module._forward_hooks for module in unet.modules())
    found_gradient = gradient(found, prediction)

    unet.disable_gradient_checkpointing()
    _, layers = map_layers(unet)
    processors = {name: Read() for name in layers}
    unet.set_attn_processor(
        {n: processors.get(n.removesuffix(".processor"), AttnProcessor2_0()) for n in unet.attn_processors}
    )
    prediction = unet(batch.latents.mean, 5, text).sample
    maps = torch.stack([p.maps.unflatten(0, (2, -1))[1].mean(0) for p in processors.values()]).mean(0).T
    expected = unmix_loss(maps.unflatten(-1, (4, 6)), TOKENS) / 2  # of two photos, one is mixed
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_gradient, gradient(expected, prediction))


def test_photos_alone_and_class_pictures_have_no_loss() -> None:
    unmix = Unmix(tiny_unet(), {PROMPT: TOKENS})
    with unmix.reading() as projections:
        pass
    batch = batch_of([ALONE])
    assert float(unmix.loss(projections, batch)) == 0.0
    of_class = Batch(batch.latents, batch.sizes, [PROMPT], [("class", 0)])
    assert (
        float(
            unmix.loss(
                projections, Batch(of_class.latents, of_class.sizes, [ALONE, PROMPT], [("instance", 0), ("class", 0)])
            )
        )
        == 0.0
    )


def test_odd_sides_are_halved_as_the_network_does() -> None:
    unet = tiny_unet()
    unmix = Unmix(unet, {PROMPT: TOKENS})
    batch = batch_of([PROMPT], 7, 10)
    with unmix.reading() as projections:
        unet(batch.latents.mean, 5, torch.randn(1, 9, TEXT_WIDTH))
    assert unmix.loss(projections, batch).item() > 0


# Which tokens


def test_places_of_words_in_a_prompt() -> None:
    tokenizer = tiny_tokenizer()
    text = "photo of sks dog on red robot"
    assert token_places(tokenizer, text, text.index("sks"), "sks") == [3]
    assert token_places(tokenizer, text, text.index("red"), "red") == [6]
    text = "photo of xy dog"  # a word of two tokens
    assert token_places(tokenizer, text, text.index("xy"), "xy") == [3, 4]
    with pytest.raises(UserError, match="spaces around"):
        token_places(tokenizer, "photo of asks", 10, "sks")


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_pipeline_sdxl])
def test_places_follow_the_sides_of_the_template(pipeline: Any) -> None:
    mixing = Mixing("{right} on the {left}", ["sks dog", "red robot"], ["sks", "red"], [])
    unmix = make_unmix(family_of(pipeline()), mixing)
    assert unmix._tokens == {
        "red robot on the sks dog": SubjectTokens([5], [1]),
        "sks dog on the red robot": SubjectTokens([5], [1]),
    }


@pytest.mark.parametrize("pipeline", [tiny_pipeline_sd3, tiny_pipeline_flux])
def test_a_base_without_cross_attention_is_refused(pipeline: Any) -> None:
    with pytest.raises(UserError, match="--unmix_loss_weight 0"):
        check_unmix(family_of(pipeline()))
    plain: Any = {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "mid_block_type": None,
    }
    with pytest.raises(UserError, match="no cross-attention"):
        check_unmix(SimpleNamespace(pipeline=SimpleNamespace(unet=tiny_unet(**plain))))  # type: ignore[arg-type]


# What it does


@pytest.mark.slow
def test_the_words_of_two_subjects_of_the_embedded_model_part(tmp_path: Path) -> None:
    listed = []
    subjects = held_out_subjects(8)
    for subject, token in ((subjects[1], "sks"), (subjects[7], "zwx")):
        write_photos(subject, tmp_path / token)
        prompt = f"a photo of {token} {subject.individual.class_name}"
        listed.append(
            {
                "instance_data_dir": str(tmp_path / token),
                "instance_prompt": prompt,
                "class_prompt": subject.class_prompt,
            }
        )
    (tmp_path / "subjects.json").write_text(json.dumps(listed), encoding="utf-8")
    config = TrainingConfig(
        concepts_list=tmp_path / "subjects.json", cut_mix_unmix=True, cut_mix_probability=1.0, unmix_loss_weight=10.0,
        output_dir=tmp_path / "out", max_train_steps=60, train_batch_size=2, report_to="none",
    )  # fmt: skip
    train(config)
    losses = [row["unmix_loss"] for row in read_metrics(config.output_dir / "metrics.jsonl")]
    assert sum(losses[-15:]) < 0.8 * sum(losses[:15])
