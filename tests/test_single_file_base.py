"""Base models in one file: loaded with a local folder of settings, trained on, sampled, and refused in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import tiny_pipeline, tiny_pipeline_sdxl, tiny_unet_sd1
from training_runs import PROMPT, arguments, short_run, trained_tensors

from svft_diffusion import load_adapter
from svft_diffusion.app.drawing.studio import Studio
from svft_diffusion.cli.main import run_command
from svft_diffusion.errors import UserError
from svft_diffusion.exchange.merging import stored_dtypes
from svft_diffusion.exchange.single_file import write_single_file
from svft_diffusion.files import read_header
from svft_diffusion.files.names import components_of
from svft_diffusion.models import base_display_name, family_of, hub_name, load_pipeline
from svft_diffusion.models.loading import resolve_base
from svft_diffusion.sampling.sample import generate
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.trainer import train


def tiny_pipeline_sd1(seed: int = 0) -> DiffusionPipeline:
    pipeline = tiny_pipeline(seed)
    pipeline.register_modules(unet=tiny_unet_sd1(seed))
    return pipeline


PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {"sd1": tiny_pipeline_sd1, "sdxl": tiny_pipeline_sdxl}


@dataclass(frozen=True)
class Base:
    """One base model in two layouts."""

    name: str
    folder: Path
    file: Path
    settings: Path  # the folder without any weights
    config: TrainingConfig  # of a run on the folder


@pytest.fixture(scope="module", params=PIPELINES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = PIPELINES[request.param]()
    config = replace(short_run(folder, pipeline), max_train_steps=2)
    settings = folder / "settings"
    shutil.copytree(folder / "tiny", settings, ignore=shutil.ignore_patterns("*.safetensors"))
    file = write_single_file(pipeline, folder / "model.safetensors", metadata={})
    return Base(request.param, folder / "tiny", file, settings, config)


def test_file_is_the_same_model_as_the_folder(base: Base) -> None:
    from_file = load_pipeline(str(base.file), base_config=base.settings)
    from_folder = load_pipeline(str(base.folder))
    assert type(from_file) is type(from_folder)
    for name, model in components_of(from_folder).items():
        read = components_of(from_file)[name].state_dict()
        assert all(torch.equal(tensor, read[key]) for key, tensor in model.state_dict().items())
    one, other = (generate(pipeline, PROMPT, seed=3, num_inference_steps=2) for pipeline in (from_file, from_folder))
    assert np.array_equal(np.asarray(one), np.asarray(other))
    assert (
        components_of(load_pipeline(str(base.file), base_config=base.settings, dtype=torch.float16))["unet"].dtype
        == torch.float16
    )


@pytest.mark.parametrize("base", ["sdxl"], indirect=True)
def test_training_on_the_file_is_training_on_the_folder(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_folder = train(replace(base.config, output_dir=tmp_path / "folder")).adapter
    flags = arguments(
        replace(base.config, output_dir=tmp_path / "file"),
        pretrained_model_name_or_path=base.file,
        base_config=base.settings,
    )
    assert run_command("train", flags) == 0
    on_file = tmp_path / "file" / "adapter.safetensors"
    first, second = trained_tensors(on_folder), trained_tensors(on_file)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert read_header(on_file).base.name == "model.safetensors"
    assert read_header(on_file).base.digests == read_header(on_folder).base.digests
    card = (tmp_path / "file" / "README.md").read_text(encoding="utf-8")
    assert "Pipeline.from_single_file('path/to/model.safetensors')" in card and str(base.file.parent) not in card

    # What was trained on one is at home on the other, in every command.
    pictures = {}
    for name, flags in {
        "folder": [f"--pretrained_model_name_or_path={base.folder}"],
        "file": [f"--pretrained_model_name_or_path={base.file}", f"--base_config={base.settings}"],
    }.items():
        out = tmp_path / f"drawn-{name}"
        asked = [f"--adapter={on_file}", "--prompt", PROMPT, "--num_inference_steps=2", f"--output_dir={out}"]
        assert run_command("sample", [*flags, *asked]) == 0
        pictures[name] = [file for file in out.glob("*.png") if file.name != "grid.png"]
    drawn = [load_picture(files[0]) for files in pictures.values()]
    assert np.array_equal(*drawn)

    flags = ["--base", str(base.file), "--base_config", str(base.settings)]
    capsys.readouterr()
    assert run_command("verify", [str(on_folder), *flags, "--json"]) == 0
    assert '"ok": true' in capsys.readouterr().out
    assert run_command("export", [str(on_folder), *flags, "-o", str(tmp_path / "lora.safetensors")]) == 0
    smaller = str(tmp_path / "shrunk.safetensors")
    assert run_command("shrink", [str(on_folder), *flags, "--energy", "0.9", "-o", smaller]) == 0
    assert run_command("merge", [str(on_folder), *flags, "-o", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model_index.json").is_file()
    before = base.file.read_bytes()
    assert run_command("merge", [str(on_folder), *flags, "-o", str(base.file), "--overwrite"]) == 2
    assert base.file.read_bytes() == before


def load_picture(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("base", ["sd1"], indirect=True)
def test_app_opens_the_file_and_other_bases_beside_it(base: Base, tmp_path: Path) -> None:
    studio = Studio(tmp_path, device=torch.device("cpu"), base_config=base.settings)
    assert studio.open_base(str(base.file)) == 16
    assert studio.open_base(str(base.folder)) == 16


@pytest.mark.parametrize("base", ["sd1"], indirect=True)
def test_half_precision_file_is_known_whatever_it_is_loaded_as(base: Base, tmp_path: Path) -> None:
    half = PIPELINES[base.name]().to(torch.float16)
    file = write_single_file(half, tmp_path / "half.safetensors", metadata={})
    config = replace(base.config, pretrained_model_name_or_path=str(file), base_config=base.settings)
    adapter = train(replace(config, output_dir=tmp_path / "out", mixed_precision="bf16", max_train_steps=1)).adapter
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = load_pipeline(str(file), base_config=base.settings, dtype=dtype)
        load_adapter(pipeline, adapter)
        assert set(stored_dtypes(pipeline, single_file=file).values()) == {torch.float16}
    with pytest.raises(UserError, match="trained on the base half"):
        load_adapter(PIPELINES[base.name](seed=1), adapter)


def message(base: Path | str, base_config: Path | None) -> str:
    with pytest.raises(UserError) as problem:
        load_pipeline(str(base), base_config=base_config)
    assert "\n" not in str(problem.value)
    return str(problem.value)


def test_what_is_no_such_file_is_refused_in_one_line(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model.ckpt", "model.PT", "model.bin"):
        (tmp_path / name).write_bytes(b"\x80\x04N.")
        assert "is a pickle" in message(tmp_path / name, None)
    (tmp_path / "notes.txt").write_text("no model", encoding="utf-8")
    assert "is no base model" in message(tmp_path / "notes.txt", None)
    assert "model_index.json" in message(base.file, tmp_path)
    assert "--base_config has no effect on tiny" in message(base.folder, base.settings)
    assert "--base_config has no effect on toybox" in message("toybox", base.settings)

    content = base.file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    assert "cut.safetensors can't be loaded" in message(tmp_path / "cut.safetensors", base.settings)
    save_file({"something.weight": torch.zeros(3, 2)}, tmp_path / "other.safetensors")
    assert "other.safetensors can't be loaded" in message(tmp_path / "other.safetensors", base.settings)
    tensors = load_file(base.file)
    name = next(name for name in tensors if name.startswith("model.diffusion_model.") and name.endswith("to_q.weight"))
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "lacking.safetensors")
    assert "lacking.safetensors can't be loaded" in message(tmp_path / "lacking.safetensors", base.settings)
    for other in PIPELINES.values():
        other().save_pretrained(tmp_path / "other")
        if (tmp_path / "other" / "model_index.json").read_text("utf-8") != (base.folder / "model_index.json").read_text(
            "utf-8"
        ):
            assert "model.safetensors can't be loaded" in message(base.file, tmp_path / "other")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "--base_config" in message(base.file, None)


@pytest.mark.parametrize("base", ["sdxl"], indirect=True)
def test_file_says_that_it_predicts_velocity(base: Base, tmp_path: Path) -> None:
    """As v-prediction models of SDXL's build do by empty tensors; the settings are those of SDXL."""
    for marks in ({"v_pred"}, {"v_pred", "ztsnr"}):
        save_file(load_file(base.file) | {name: torch.zeros(0) for name in marks}, tmp_path / "model.safetensors")
        pipeline = load_pipeline(str(tmp_path / "model.safetensors"), base_config=base.settings)
        family = family_of(pipeline)
        assert family.prediction_type == "v_prediction"
        assert bool(pipeline.scheduler.config.rescale_betas_zero_snr) == ("ztsnr" in marks)
        assert (float(family.signal_to_noise(torch.tensor([999]))) == 0) == ("ztsnr" in marks)
    assert family_of(load_pipeline(str(base.file), base_config=base.settings)).prediction_type == "epsilon"


def test_names_of_files_tell_no_folders(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.file.parent.parent)
    relative = f"{base.file.parent.name}/{base.file.name}"
    assert resolve_base(relative) == relative
    assert base_display_name(relative) == base_display_name(str(base.file)) == "model.safetensors"
    assert hub_name(relative) is None
