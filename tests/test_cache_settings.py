"""What commands are told of the cache of singular factors is checked before they do anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from training_runs import short_run

from svft_diffusion.app.config import AppConfig
from svft_diffusion.app.serving.launch import build_app
from svft_diffusion.errors import UserError
from svft_diffusion.factors import CACHE_SIZE_VARIABLE, location, use_cache
from svft_diffusion.training.trainer import train


def test_training_refuses_a_wrong_size_before_class_pictures_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_SIZE_VARIABLE, "lots")
    config = dataclasses.replace(
        short_run(tmp_path),
        with_prior_preservation=True,
        class_data_dir=tmp_path / "class",
        class_prompt="a photo of a dog",
        num_class_images=1,
    )
    with pytest.raises(UserError, match=f"^{CACHE_SIZE_VARIABLE} 'lots' is not a size"):
        train(config)
    assert not (tmp_path / "class").exists() and not config.output_dir.exists()


def test_a_file_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file; give a folder"):
        use_cache(tmp_path / "file", None)


def test_the_app_takes_the_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "_chosen_folder", None)
    monkeypatch.setattr(location, "_chosen_size", None)
    with pytest.raises(UserError, match="is not a size"):
        build_app(AppConfig(factor_cache_size="lots"))
    build_app(AppConfig(factor_cache=tmp_path / "cache", factor_cache_size="5MB"))
    assert location.cache_folder() == tmp_path / "cache"
    assert location.cache_size_limit() == 5_000_000
