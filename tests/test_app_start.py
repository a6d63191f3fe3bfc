"""What the app starts with: the adapters and settings that its command names."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from adapter_files import write_models

pytest.importorskip("gradio")

from svft_diffusion.app.config import AppConfig
from svft_diffusion.app.drawing import studio
from svft_diffusion.app.serving import launch
from svft_diffusion.errors import UserError


def test_adapters_are_called_as_other_commands_call_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = write_models(tmp_path)
    run = tmp_path / "runs" / "rex.v2"
    run.mkdir(parents=True)
    shutil.copyfile(models.style, run / "adapter.safetensors")
    threads: list[int] = []
    monkeypatch.setattr(studio, "threads_of_torch", lambda number: threads.append(number) or nullcontext())
    monkeypatch.setattr(launch, "build_page", lambda context, cards: cards)
    config = AppConfig(
        pretrained_model_name_or_path=str(models.base),
        adapter=[f"{run / 'adapter.safetensors'}:0.5"],
        adapters_dir=tmp_path / "library",
        output_dir=tmp_path / "pictures",
        device="cpu",
        threads=3,
    )
    cards: Any = launch.build_app(config)
    assert [(card["name"], card["weight"]) for card in cards] == [("rex_v2", 0.5)]
    assert threads == [3]


def test_there_is_at_least_one_thread() -> None:
    with pytest.raises(UserError, match="--threads must be at least 1"):
        AppConfig(threads=0)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"base": ["toybox", "/no/such/folder"]}, "no such base model folder: '/no/such/folder'"),
        ({"auth_file": Path("no-such-file")}, "can't read the logins in no-such-file"),
    ],
)
def test_what_can_not_work_is_told_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(launch, "Studio", None)
    with pytest.raises(UserError, match=reason):
        launch.build_app(AppConfig(**settings))
