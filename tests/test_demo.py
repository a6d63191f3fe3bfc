"""The demonstration and the presets, cut short: the path is whole, the learning is measured by `make subjects`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from svft_diffusion.cli.main import main
from svft_diffusion.cli.train import read_settings
from svft_diffusion.settings import config_from_mapping
from svft_diffusion.training.checks import check_settings
from svft_diffusion.training.config import TrainingConfig

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))


def test_the_demonstration_writes_grid_adapter_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.yaml"
    short.write_text(
        "max_train_steps: 2\nnum_class_images: 2\nprior_generation_num_inference_steps: 2\n", encoding="utf-8"
    )
    output = tmp_path / "demo"
    options = ["--photos", str(ROOT / "samples"), "--config", str(short), "--output_dir", str(output)]
    assert main(["demo", *options, "--num_seeds", "1"]) == 0
    with Image.open(output / "grid.png") as grid:
        assert grid.width > 1000 and grid.height > 400
    assert (output / "adapter.safetensors").stat().st_size <= 200_000
    printed = capsys.readouterr().out
    for line in ("file size", "trained values", "subject similarity", "scene accuracy", "class accuracy", "seconds"):
        assert line in printed
    base, adapter = re.search(r"subject similarity +(-?[\d.]+) +(-?[\d.]+)", printed).groups()
    assert -1 <= float(base) <= 1 and -1 <= float(adapter) <= 1


def test_the_demonstration_refuses_a_wrong_number_of_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--num_seeds", "0"]) == 2
    assert capsys.readouterr().err.strip() == "error: --num_seeds must be at least 1"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_a_valid_configuration_with_reasons(preset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = {"instance_prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"} | read_settings(preset)
    config = config_from_mapping(
        TrainingConfig, settings | {"instance_data_dir": "samples", "class_data_dir": "outputs/class"}
    )
    check_settings(config)
    assert preset.read_text(encoding="utf-8").startswith("#")
