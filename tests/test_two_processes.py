"""Two processes on one machine: they learn what one learns with twice the accumulation, and end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import arguments, short_run, trained_tensors

from svft_diffusion.errors import Interrupted
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.interruption import Interruption
from svft_diffusion.training.trainer import train

REPOSITORY = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun's rendezvous")


def start(config: TrainingConfig, flags: list[str], log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(REPOSITORY / "train_dreambooth.py"), *arguments(config), *flags]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=log.parent)


def test_two_processes_equal_one_with_twice_the_accumulation(tmp_path: Path) -> None:
    """Text encoder, averaging and dropped captions included."""
    config = replace(short_run(tmp_path), train_batch_size=1, checkpointing_steps=2, learning_rate=0.01)
    log = tmp_path / "log"
    flags = ["--train_text_encoder", "--use_ema", "--caption_dropout", "0.3", "--history_steps", "0"]
    process = start(replace(config, output_dir=tmp_path / "two"), flags, log)
    alone = replace(
        config,
        output_dir=tmp_path / "one",
        train_text_encoder=True,
        use_ema=True,
        caption_dropout=0.3,
        history_steps=0,
        gradient_accumulation_steps=2,
    )
    result = train(alone)
    assert process.wait(timeout=240) == 0, log.read_text(encoding="utf-8", errors="replace")
    expected = trained_tensors(result.adapter)
    for file in ("adapter.safetensors", "checkpoint-2/adapter.safetensors"):
        expected, found = (trained_tensors(tmp_path / name / file) for name in ("one", "two"))
        assert {name.partition(".")[0] for name in found} == {"unet", "text_encoder"}
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)
    assert max(float(tensor.abs().max()) for tensor in expected.values()) > 1e-3


@pytest.mark.slow
def test_all_end_well_when_the_first_is_stopped_while_it_draws(tmp_path: Path) -> None:
    """The others wait for class images then, and must neither draw on nor lose the connection."""
    config = short_run(tmp_path)
    flags = ["--with_prior_preservation", "--class_prompt", "a dog", "--class_data_dir", str(tmp_path / "class")]
    flags += ["--num_class_images", "4000", "--prior_generation_num_inference_steps", "2"]
    log = tmp_path / "log"
    process = start(config, flags, log)
    try:
        while process.poll() is None and not (tmp_path / "class" / "class-00003.png").exists():
            time.sleep(0.1)
        (config.output_dir / "stop").touch()
        code = process.wait(timeout=240)
    finally:
        process.kill()
    said = log.read_text(encoding="utf-8", errors="replace")
    assert code == 0 and "Traceback" not in said and said.count("stopped") == 2, said
    assert not (config.output_dir / "stop").exists() and not list((tmp_path / "class").glob("*.used"))


def test_signal_while_the_processes_agree_counts_at_the_next_step() -> None:
    """Most of a step of several processes is waiting for the others: a signal that comes then must not be lost."""

    class Accelerator:
        num_processes = 2
        device = torch.device("cpu")
        signals = iter((True, False))

        def gather(self, asked: torch.Tensor) -> torch.Tensor:
            if next(self.signals):
                signal.raise_signal(signal.SIGTERM)
            return torch.cat([asked, torch.tensor([-1])])

    accelerator: Any = Accelerator()
    with Interruption(None) as interruption:
        interruption.check_together(accelerator)  # the other process has heard nothing: both go on
        with pytest.raises(Interrupted) as request:
            interruption.check_together(accelerator)
    assert request.value.exit_code == 143
