"""Dropped captions train what guidance compares with; with SDXL these are zeros."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_pipeline_sdxl
from training_runs import PROMPT, short_run

from svft_diffusion.models import family_of
from svft_diffusion.training.prompts import PromptTable
from svft_diffusion.training.trainer import train


@pytest.mark.parametrize("trained", [(), ("text_encoder", "text_encoder_2")])
def test_an_empty_prompt_is_what_guidance_of_sdxl_compares_with(trained: tuple[str, ...]) -> None:
    pipeline = tiny_pipeline_sdxl()
    pipeline.text_encoder.requires_grad_(True)
    pipeline.text_encoder_2.requires_grad_(True)
    found = PromptTable(family_of(pipeline), [PROMPT, ""], trained=trained).conditioning([PROMPT, "", PROMPT])
    with torch.no_grad():
        states, without, pooled, pooled_without = pipeline.encode_prompt(PROMPT)
    for key, prompt, empty in (("text_states", states, without), ("pooled_text", pooled, pooled_without)):
        torch.testing.assert_close(found[key].detach(), torch.cat((prompt, empty, prompt)))
        assert not empty.any() and found[key].requires_grad == bool(trained)
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    found = PromptTable(family_of(pipeline), [""], trained=()).conditioning([""])
    assert all(tensor.any() for tensor in found.values())


def test_sdxl_trains_on_dropped_captions_alone(tmp_path: Path) -> None:
    config = replace(short_run(tmp_path, tiny_pipeline_sdxl()), resolution=16, train_batch_size=1, max_train_steps=1)
    config = replace(config, caption_dropout=0.999, train_text_encoder=True)
    assert train(config).steps == 1
