"""Base models of the Hub that leave a component out, from its local cache, and names that it is not asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_transformers import tiny_pipeline_sd3
from training_runs import short_run, trained_tensors

from svft_diffusion.errors import UserError
from svft_diffusion.models import load_pipeline, resolve_base
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


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("toyboxx", "no such base model folder: 'toyboxx', did you mean 'toybox'?"),
        ("Toy-Box", "no such base model folder: 'Toy-Box', did you mean 'toybox'?"),
        ("x" * 300, f"no such base model folder: {'x' * 80}..."),
        ("~nobody-of-this-name/x", "no such base model folder: ~nobody-of-this-name/x"),
        ("a\x00b", "no such base model folder: a\\x00b"),
    ],
)
def test_names_that_the_hub_is_not_asked_for(name: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "svft_diffusion.models.loading.hf_hub_download", lambda *_, **__: pytest.fail("the Hub is asked")
    )
    for call in (resolve_base, load_pipeline):
        with pytest.raises(UserError) as refused:
            call(name)
        assert str(refused.value).startswith(problem) and "\n" not in str(refused.value)


def test_names_that_only_the_hub_knows() -> None:
    for name in ("gpt2", "someone/toyboxx", "stable-diffusion-v1-5"):
        assert resolve_base(name) == name


def test_a_hub_that_is_not_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unreachable(source: str, *_: object, **__: object) -> None:
        asked.append(source)
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("svft_diffusion.models.loading.hf_hub_download", unreachable)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("the Hub is asked again"))
    with pytest.raises(UserError, match="someone/model: no such folder, and the Hugging Face Hub can't be reached"):
        load_pipeline("someone/model")
    assert asked == ["someone/model"]


def test_the_command_says_nothing_of_asking_again() -> None:
    program = """
from svft_diffusion.cli.main import run_command
run_command("inspect", ["nowhere.safetensors"])
from huggingface_hub.utils import logging
logging.get_logger("huggingface_hub.utils._http").warning("Retrying in 8s [Retry 5/5].")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Retrying" not in ended.stderr and "nowhere" in ended.stderr
