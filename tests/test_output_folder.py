"""One output folder, one run at a time."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from training_runs import short_run

from svft_diffusion.errors import UserError
from svft_diffusion.training.trainer import StepReport, train

_HOLDER = """
import sys, time
from pathlib import Path
from svft_diffusion.training.output_folder import working_alone
with working_alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    config = short_run(tmp_path)
    refused = []

    def start_another(report: StepReport) -> None:
        if report.step == 1:
            with pytest.raises(UserError, match="another run is at work") as refusal:
                train(replace(config, learning_rate=0.01))
            refused.append(str(refusal.value))

    train(config, on_step=start_another)
    assert len(refused) == 1
    assert "\n" not in refused[0]
    expected = train(replace(config, output_dir=tmp_path / "alone")).adapter.read_bytes()
    assert (config.output_dir / "adapter.safetensors").read_bytes() == expected
    assert not list(config.output_dir.glob(".running*"))


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    config = short_run(tmp_path)
    config.output_dir.mkdir()
    command = [sys.executable, "-c", _HOLDER, str(config.output_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is at work"):
            train(config)
        holder.kill()
        holder.wait()
        train(config)
    assert (config.output_dir / "adapter.safetensors").exists()
