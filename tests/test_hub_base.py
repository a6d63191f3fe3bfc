"""Base models of the Hub that leave a component out, from its local cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from tiny_transformers import tiny_pipeline_sd3
from training_runs import short_run, trained_tensors

from svft_diffusion.models import load_pipeline
from svft_diffusion.training.trainer import train

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Stable Diffusion 3 without its T5, as ``some/sd3`` in a cache of the Hub."""
    folder = tmp_path / "hub" / "models--some--sd3"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    tiny_pipeline_sd3(t5=False).save_pretrained(folder / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "some/sd3"


@pytest.mark.parametrize("local_files_only", [False, True])
def test_a_component_that_is_null_stays_out(repository: str, local_files_only: bool) -> None:
    pipeline = load_pipeline(repository, local_files_only=local_files_only)
    assert pipeline.text_encoder_3 is None and pipeline.tokenizer_3 is None
    assert pipeline.text_encoder_2 is not None


def test_a_run_on_it(repository: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    config = short_run(tmp_path / "run", tiny_pipeline_sd3(t5=False))
    on_folder = trained_tensors(train(config).adapter)
    changed = {"pretrained_model_name_or_path": repository, "output_dir": tmp_path / "hub-run"}
    on_hub = trained_tensors(train(type(config)(**{**vars(config), **changed})).adapter)
    assert on_hub.keys() == on_folder.keys()
    assert all((on_hub[name] == on_folder[name]).all() for name in on_folder)
