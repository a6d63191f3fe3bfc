"""The sampler in several processes, and starts that go on from what an earlier one left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import ModelsOnDisk, write_models
from PIL import Image
from tiny_models import tiny_pipeline
from transformers import BatchFeature

from svft_diffusion.cli.main import run_command
from svft_diffusion.errors import UserError
from svft_diffusion.models.loading import load_pipeline
from svft_diffusion.sampling import drawing as drawing_module
from svft_diffusion.sampling import sample as sampler
from svft_diffusion.sampling.drawing import generate_batch
from svft_diffusion.sampling.png import read_png_settings
from svft_diffusion.sampling.sample import SamplingConfig, SamplingResult, sample
from svft_diffusion.sampling.spreading import (
    Process,
    device_of,
    drawing,
    this_process,
    threads_of_torch,
    wait_for_others,
)

REPOSITORY = Path(__file__).parent.parent
WEIGHTS = [0.0, 0.5, 1.0]
PROMPT = "a photo of sks dog"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def expected(models: ModelsOnDisk, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process writes."""
    output_dir = tmp_path_factory.mktemp("one") / "out"
    assert draw(models, output_dir).made == 9
    return contents(output_dir)


def draw(models: ModelsOnDisk, output_dir: Path, **settings: Any) -> SamplingResult:
    given = {"prompt": [PROMPT], "weights": WEIGHTS, "num_images": 3, "num_inference_steps": 2, "device": "cpu"}
    return sample(
        SamplingConfig(
            pretrained_model_name_or_path=str(models.base),
            adapter=[str(models.dog)],
            output_dir=output_dir,
            **{**given, **settings},
        )
    )


def contents(output_dir: Path) -> dict[str, bytes]:
    """Every file below a folder; folders too."""
    return {path.name: b"" if path.is_dir() else path.read_bytes() for path in output_dir.rglob("*")}


def command(models: ModelsOnDisk, output_dir: Path) -> list[str]:
    numbers = ["--weights", *map(str, WEIGHTS), "--num_images", "3", "--num_inference_steps", "2", "--device", "cpu"]
    named = ["--pretrained_model_name_or_path", str(models.base), "--adapter", str(models.dog), "--prompt", PROMPT]
    return ["-m", "svft_diffusion", "sample", *named, *numbers, "--output_dir", str(output_dir)]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    everything = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.Popen(
        [sys.executable, *arguments], env=everything, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_all(count: int, models: ModelsOnDisk, output_dir: Path) -> list[subprocess.Popen[str]]:
    """Processes with the numbers that a launcher gives them, and different numbers of threads that they should use."""
    return [
        start(command(models, output_dir), RANK=str(i), WORLD_SIZE=str(count), OMP_NUM_THREADS=str(i + 1))
        for i in range(count)
    ]


def test_two_processes_write_the_files_of_one(models: ModelsOnDisk, expected: dict[str, bytes], tmp_path: Path) -> None:
    processes = start_all(2, models, tmp_path / "out")
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "9 pictures in" in said[0] and "pictures in" not in said[1]
    assert contents(tmp_path / "out") == expected


@pytest.mark.slow
def test_four_processes_write_the_files_of_one(
    models: ModelsOnDisk, expected: dict[str, bytes], tmp_path: Path
) -> None:
    processes = start_all(4, models, tmp_path / "out")
    assert [process.wait(timeout=600) for process in processes] == [0] * 4
    assert contents(tmp_path / "out") == expected


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun's rendezvous")
def test_accelerate_launch(models: ModelsOnDisk, expected: dict[str, bytes], tmp_path: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    process = start([*launcher, *command(models, tmp_path / "out")], MASTER_PORT="0")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "made before or by other processes" in said and contents(tmp_path / "out") == expected


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_leaves_no_gap(
    killed: int, models: ModelsOnDisk, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Another worker's pictures are drawn by the first; the first one's by the next start."""
    processes = start_all(2, models, tmp_path / "out")
    while not list((tmp_path / "out").glob("*seed*.png")) and processes[killed].poll() is None:
        time.sleep(0.01)
    processes[killed].send_signal(signal.SIGKILL)
    assert processes[1 - killed].wait(timeout=240) == 0
    for process in processes:
        process.wait()
    draw(models, tmp_path / "out") if killed == 0 else None
    found = contents(tmp_path / "out")
    left = {name for name in found if name.endswith((".lock", ".tmp"))}
    assert {name: content for name, content in found.items() if name not in left} == expected


def test_the_first_process_draws_what_is_missing_in_the_end(
    models: ModelsOnDisk, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    result = draw(models, tmp_path / "out")
    assert result.made == 3 and result.grids == [] and result.index is None
    assert len(contents(tmp_path / "out")) == 3
    monkeypatch.setenv("RANK", "0")  # the second process never came
    assert draw(models, tmp_path / "out").made == 6
    assert contents(tmp_path / "out") == expected
    with pytest.raises(UserError, match="give --output_dir"):
        draw(models, None)  # type: ignore[arg-type]


def test_locks_are_taken_while_others_remove_theirs(tmp_path: Path) -> None:
    """A lock's file may vanish at any moment."""
    problems: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for _ in range(200):
                with drawing(tmp_path, Process(index, 4)):
                    pass
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(1, 4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        wait_for_others(tmp_path, Process(0, 4))
    for thread in threads:
        thread.join()
    assert not problems and not list(tmp_path.iterdir())


def test_only_missing_and_damaged_pictures_are_made_again(
    models: ModelsOnDisk, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    names = sorted(name for name in expected if "seed" in name)
    for name in names:
        (output_dir / name).write_bytes(expected[name])
    before = {name: (output_dir / name).stat().st_mtime_ns for name in names}
    (output_dir / names[2]).write_bytes(expected[names[2]][:-100])
    (output_dir / names[4]).write_bytes(b"")
    (output_dir / names[7]).unlink()
    assert draw(models, output_dir).made == 3
    assert contents(output_dir) == expected
    kept = {name for name in names if (output_dir / name).stat().st_mtime_ns == before[name]}
    assert kept == set(names) - {names[2], names[4], names[7]}
    assert draw(models, output_dir).made == 0 and contents(output_dir) == expected


def test_an_interrupted_batch_is_drawn_as_a_whole(models: ModelsOnDisk, tmp_path: Path) -> None:
    assert draw(models, tmp_path / "out", batch_size=2).made == 9
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / next(name for name in whole if "w0.5_seed1" in name)).unlink()
    assert draw(models, tmp_path / "out", batch_size=2).made == 1
    assert contents(tmp_path / "out") == whole
    with pytest.raises(UserError, match="--overwrite"):
        draw(models, tmp_path / "out")  # one by one, pixels may differ


def test_somebody_elses_files_are_not_replaced(models: ModelsOnDisk, tmp_path: Path) -> None:
    for name in ("grid.png", "index.csv", "index.html"):
        output_dir = tmp_path / name.replace(".", "-")
        output_dir.mkdir()
        (output_dir / name).write_text("mine", encoding="utf-8")
        with pytest.raises(UserError, match=f"{name} was not written by this command"):
            draw(models, output_dir)
        assert (output_dir / name).read_text(encoding="utf-8") == "mine"


def test_grids_and_lists_of_another_run_are_not_replaced(models: ModelsOnDisk, tmp_path: Path) -> None:
    """Its pictures have other names, but what shows and lists them has the same."""
    one = draw(models, tmp_path, num_images=1, weights=[], prompt=['a "dog" & cat'])
    before = contents(tmp_path)
    other = {"num_images": 1, "weights": [], "prompt": ["a robot"]}
    for gone in ((), ("grid.png",), ("grid.png", "index.csv"), ("grid.png", "index.html")):
        kept = {name: content for name, content in before.items() if name not in gone}
        for name in before:
            (tmp_path / name).unlink(missing_ok=True)
        for name, content in kept.items():
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"shows pictures of another run, such as {one.pictures[0].name}; choose"):
            draw(models, tmp_path, **other)
        assert contents(tmp_path) == kept
    assert draw(models, tmp_path, **other, overwrite=True).made == 1
    assert contents(tmp_path)[one.pictures[0].name] == before[one.pictures[0].name]


def test_nothing_is_loaded_where_nothing_is_missing(
    models: ModelsOnDisk, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    for name, content in expected.items():
        if "seed" in name:
            (output_dir / name).write_bytes(content)
    monkeypatch.setattr(drawing_module, "load_pipeline", lambda *_, **__: pytest.fail("the model was loaded"))
    assert draw(models, output_dir).made == 0 and contents(output_dir) == expected
    assert draw(models, output_dir, width=16, height=16).made == 0
    with pytest.raises(UserError, match="is another picture"):
        draw(models, output_dir, width=24)
    with Image.open(next(output_dir.glob("*_w1_seed0.png"))) as picture:
        assert picture.size == (16, 16)
    with monkeypatch.context() as other:  # the base model's own size could be another one
        other.setattr(sampler, "stored_resolution", lambda _: None)
        with pytest.raises(pytest.fail.Exception, match="was loaded"):
            draw(models, output_dir)


def test_another_version_of_the_base_makes_other_pictures(models: ModelsOnDisk, tmp_path: Path) -> None:
    few = {"num_images": 1, "weights": []}
    vae = tmp_path / "another-vae"
    changed = tiny_pipeline(5).vae
    changed.save_pretrained(vae)
    first = draw(models, tmp_path / "out", **few)
    for change in ({"pretrained_vae_model_name_or_path": str(vae)}, {"revision": "main"}, {"variant": "fp16"}):
        with pytest.raises(UserError, match="is another picture"):
            draw(models, tmp_path / "out", **few, **change)
    second = draw(models, tmp_path / "other", **few, pretrained_vae_model_name_or_path=str(vae))
    assert read_png_settings(second.pictures[0])["vae"] == "another-vae"
    assert Image.open(second.pictures[0]).tobytes() != Image.open(first.pictures[0]).tobytes()
    assert draw(models, tmp_path / "other", **few, pretrained_vae_model_name_or_path=str(vae)).made == 0
    with pytest.raises(UserError, match="is another picture"):
        draw(models, tmp_path / "other", **few)


def test_names_of_black_pictures_are_not_mixed_up_with_the_grids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [tmp_path / f"{number}.png" for number in range(7)]
    grids = [tmp_path / "grid-1.png", tmp_path / "grid-2.png"]
    result = SamplingResult(tmp_path, pictures, 7, grids, tmp_path / "index.html", {}, [])
    for blacked_out, told in ((pictures[:1], "0.png; "), (pictures, "4.png, ...; ")):
        drawn = replace(result, blacked_out=blacked_out)
        monkeypatch.setattr("svft_diffusion.sampling.sample.sample", lambda *_, drawn=drawn: drawn)
        assert run_command("sample", ["--prompt", "a dog", "--output_dir", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert told in said and f"{grids[0]} and 1 more, {tmp_path / 'index.html'}" in said


def test_pictures_that_the_safety_checker_blacked_out_are_told(
    models: ModelsOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Checker(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, images: Any, **_: Any) -> tuple[Any, list[bool]]:
            return images * 0, [True] * len(images)

    load = load_pipeline

    def with_checker(*given: Any, **named: Any) -> Any:
        pipeline = load(*given, **named)
        pipeline.safety_checker = Checker()
        pipeline.feature_extractor = lambda images, return_tensors: BatchFeature({"pixel_values": torch.zeros(1)})
        return pipeline

    monkeypatch.setattr(drawing_module, "load_pipeline", with_checker)
    arguments = command(models, tmp_path)[3:]
    few = ["--weights", "1", "--num_images", "1"]
    arguments = [*arguments[: arguments.index("--weights")], *few, *arguments[arguments.index("3") + 1 :]]
    assert run_command("sample", arguments) == 0
    said = capsys.readouterr()
    [picture] = tmp_path.glob("*_seed0.png")
    assert f"1 picture blacked out by the base model's safety checker: {picture.name}; " in said.out
    assert read_png_settings(picture)["blacked_out"] is True and not any(Image.open(picture).tobytes())
    assert "blacked out" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert (tmp_path / "index.csv").read_text(encoding="utf-8").splitlines()[1].endswith(",True")
    monkeypatch.setattr(drawing_module, "load_pipeline", lambda *_, **__: pytest.fail("the model was loaded"))
    assert run_command("sample", arguments) == 0 and "blacked out" in capsys.readouterr().out
    monkeypatch.setattr(drawing_module, "load_pipeline", load)  # --disable_safety_checker leaves one out
    assert run_command("sample", [*arguments, "--disable_safety_checker"]) == 0
    assert "blacked out" not in capsys.readouterr().out and any(Image.open(picture).tobytes())


def test_a_bar_is_for_terminals(
    models: ModelsOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(models, tmp_path / "a", num_images=1, weights=[])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    draw(models, tmp_path / "b", num_images=2, weights=[])
    assert "drawing" in capsys.readouterr().err


def test_more_pictures_join_those_that_are_there(
    models: ModelsOnDisk, expected: dict[str, bytes], tmp_path: Path
) -> None:
    assert draw(models, tmp_path / "out", num_images=1).made == 3
    assert draw(models, tmp_path / "out").made == 6
    assert contents(tmp_path / "out") == expected


def test_the_sampler_sets_its_own_threads(models: ModelsOnDisk, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[int] = []

    def noting(*given: Any, **named: Any) -> Any:
        seen.append(torch.get_num_threads())
        return generate_batch(*given, **named)

    monkeypatch.setattr(sampler, "generate_batch", noting)
    with threads_of_torch(3):
        draw(models, tmp_path / "out", num_images=1, weights=[])
        draw(models, tmp_path / "more", num_images=1, weights=[], threads=2)
        assert torch.get_num_threads() == 3
    assert seen == [1, 2]


def test_processes_take_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert this_process() == Process(3, 4, 1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert device_of(Process(3, 4, 3), "auto") == "cuda:1" and device_of(Process(3, 4, 3), "cpu") == "cpu"
    assert device_of(Process(), "auto") == "auto"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert device_of(Process(3, 4, 3), "auto") == "auto"
