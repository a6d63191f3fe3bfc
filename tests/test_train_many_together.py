"""`train-many`: processes and workers that must not lose each other's requests, rows or failures."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from many_subjects import World
from test_quantized_base import EightBits

from svft_diffusion.errors import UserError
from svft_diffusion.files.quantized import is_quantized, kept_full_weight
from svft_diffusion.settings import config_from_mapping
from svft_diffusion.training import quantization
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.interruption import Interruption
from svft_diffusion.training.many import ray_engine, worker
from svft_diffusion.training.many.listing import read_list
from svft_diffusion.training.many.ray_engine import Outcome
from svft_diffusion.training.many.record import Claims
from svft_diffusion.training.many.report import exit_code_of
from svft_diffusion.training.many.shared_base import SharedBase
from svft_diffusion.training.many.stop_file import StopFile
from svft_diffusion.training.many.worker import Worker
from svft_diffusion.training.trainer import train

ROWS = [{"name": f"row {seed}", "seed": seed} for seed in range(4)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_the_exit_code_is_that_of_a_failure_while_rows_are_left(world: World) -> None:
    world.output.mkdir()
    assert exit_code_of(Worker(world.job(ROWS[:1])).report("finished")) == 1


def test_stop_on_error_counts_for_the_other_processes_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that another process is at fails meanwhile."""
    world.output.mkdir()
    job = replace(world.job(ROWS[:3]), stop_on_error=True)
    other, calls = Worker(job), list[str]()
    claim = Claims(world.output).claim("row 0")
    assert claim is not None
    release = claim.lock.release

    def run(config: TrainingConfig, **options: Any) -> Any:
        calls.append(config.output_dir.name)
        if config.output_dir.name == "row 0":
            raise RuntimeError("boom")
        if len(calls) == 1:
            release()
            other.take(job.rows[0], lambda: False)
        return train(config, **options)

    monkeypatch.setattr(worker, "train", run)
    assert Worker(job).work().states == {"failed": 1, "finished": 1, "waiting": 1}
    assert calls == ["row 1", "row 0"]


def test_a_process_that_starts_later_does_not_take_a_request_to_stop_away(world: World) -> None:
    world.output.mkdir()
    job = world.job(ROWS[:1])
    first = StopFile(world.output)
    claim = Claims(world.output).claim("row 0")
    assert claim is not None
    time.sleep(0.05)
    (world.output / "stop").touch()
    time.sleep(0.05)
    with claim:
        assert not Worker(job).stop_file().asked() and first.asked()
    Worker(job).stop_file()
    assert not (world.output / "stop").exists()


def test_lines_of_json_may_hold_any_character(tmp_path: Path) -> None:
    file = tmp_path / "list.jsonl"
    file.write_text('{"name": "one", "instance_prompt": "a\u2028b\u0085c"}\r\n\n{"name": "two"}\n', encoding="utf-8")
    first, second = read_list(file, {}, tmp_path / "out").rows
    assert first.config.instance_prompt == "a\u2028b\u0085c" and second.name == "two"


# --- a quantized base ---


@pytest.fixture
def in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantizer without its package."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(quantization._QUANTIZERS, "int8", lambda layer, device: EightBits(layer))


def _config(world: World, **changes: Any) -> TrainingConfig:
    return config_from_mapping(TrainingConfig, world.shared | {"base_quantization": "int8", **changes})


def test_a_row_with_other_layers_gets_a_base_whose_full_weights_are_known(world: World, in_int8: None) -> None:
    """Its files must not depend on which row came first: the few bits tell nothing."""
    base = SharedBase()

    def unknown(config: TrainingConfig) -> list[str]:
        unet = base.lend(config, torch.float32).unet
        layers = {path: layer for path, layer in unet.named_modules() if is_quantized(layer)}
        assert layers and base.take_back()
        return [path for path, layer in layers.items() if "attn" in path and kept_full_weight(layer) is None]

    some, all_of_them = _config(world, targets="cross-attention"), _config(world, targets="attention")
    assert unknown(some) and unknown(some) and base.times_loaded == 1
    assert not unknown(all_of_them) and base.times_loaded == 2
    assert not unknown(some) and base.times_loaded == 2


def test_layers_that_do_not_exist_end_one_row_alone_on_a_quantized_base_too(world: World, in_int8: None) -> None:
    rows = [{"name": "bad", "target_layers": "no.such.layer"}, {"name": "good"}]
    assert world.run(rows, base_quantization="int8") == 1
    assert world.states() == {"bad": "failed", "good": "finished"}
    assert "no.such.layer" in world.report()["rows"][0]["reason"]


# --- Ray ---


class RayError(Exception):
    """As Ray's."""


class RayTaskError(RayError):
    """As Ray's."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"a long traceback\n{cause}")
        self.cause = cause


class FakeRay:
    """A cluster whose workers answer as told; None: never, as one for which no machine has room."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(
        self, ready: Sequence[bool | Exception | None], answer: Callable[[int], Outcome], **node: float
    ) -> None:
        self._ready = list(ready)
        self._answer = answer
        self._node = {"CPU": 8.0, **node}
        self.options: dict[str, Any] = {}

    def remote(self, kind: type) -> Any:
        def options(**given: Any) -> Any:
            self.options = given
            return SimpleNamespace(remote=self._start)

        return SimpleNamespace(options=options)

    def _start(self, *given: object) -> Any:
        ready = self._ready.pop(0)

        def train(index: int) -> Any:
            return lambda: None if not ready else self._answer(index)

        return SimpleNamespace(ready=SimpleNamespace(remote=lambda: lambda: ready), train=SimpleNamespace(remote=train))

    def wait(self, futures: Sequence[Any], **given: Any) -> Any:
        done = [future for future in futures if future() is not None][:1]
        return done, [future for future in futures if future not in done]

    def get(self, future: Any) -> Any:
        value = future()
        if isinstance(value, Exception):
            raise value
        return value

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": self._node}]


def _drive(world: World, ray: FakeRay, workers: int | None = None) -> Worker:
    world.output.mkdir(exist_ok=True)
    job = world.job(ROWS[:3])
    watch = Worker(job)
    stop = StopFile(world.output)
    with Interruption(None) as interruption:
        ray_engine._Driver(ray, watch, stop, interruption, workers).run()
    return watch


def test_rows_go_to_workers_for_which_there_is_room(world: World) -> None:
    trained: list[int] = []

    def answer(index: int) -> Outcome:
        if index not in trained:
            trained.append(index)
        return Outcome("finished", [])

    _drive(world, FakeRay([True, None, None], answer), workers=3)
    assert sorted(trained) == [0, 1, 2]


def test_workers_that_can_not_start_are_told_at_once(world: World) -> None:
    ray = FakeRay([RayError("no such folder"), RayError("no such folder")], lambda index: Outcome("finished", []))
    with pytest.raises(UserError, match=r"no worker of Ray could start: .*no such folder") as refusal:
        _drive(world, ray, workers=2)
    assert "\n" not in str(refusal.value)


def test_a_row_that_a_worker_could_not_even_begin_is_a_failed_one(world: World) -> None:
    class Died(RayError):
        pass

    def answer(index: int) -> Any:
        return {0: Died("killed"), 1: RayTaskError(OSError(28, "No space left"))}.get(index, Outcome("finished", []))

    states = {row.name: (state, reason) for row, state, reason, _ in _rows(_drive(world, FakeRay([True], answer), 1))}
    assert states["row 0"] == ("failed", "its worker died again and again (Died)")
    assert states["row 1"][0] == "failed" and "No space left" in str(states["row 1"][1])


def _rows(watch: Worker) -> list[tuple[Any, str, str | None, Any]]:
    return [(row, *watch.state_of(row)) for row in watch.job.rows]


@pytest.mark.parametrize(
    ("node", "workers", "resources"),
    [
        (
            {"GPU": 2.0},
            3,
            {"num_gpus": 0.5, "num_cpus": 2},
        ),  # two workers share a GPU; none waits for two thirds of one
        ({"GPU": 3.0}, 3, {"num_gpus": 1.0, "num_cpus": 2}),
        ({"CPU": 2.0}, 3, {"num_cpus": 0.66}),
        ({}, 2, {"num_cpus": 4}),
    ],
)
def test_all_workers_fit(world: World, node: dict[str, float], workers: int, resources: dict[str, float]) -> None:
    ray = FakeRay([True] * workers, lambda index: Outcome("finished", []), **node)
    _drive(world, ray, workers)
    assert {name: ray.options[name] for name in resources} == resources
