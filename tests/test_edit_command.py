"""``svft-diffusion edit``: what it prints, and what it refuses in one line before anything is written."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from adapter_files import ModelsOnDisk, write_models
from PIL import Image

from svft_diffusion.cli.main import run_command
from svft_diffusion.editing.config import TRAINING_SETTINGS, EditConfig
from svft_diffusion.editing.drawing import Editor
from svft_diffusion.editing.fine_tuning import training_settings
from svft_diffusion.errors import UserError
from svft_diffusion.training import trainer
from svft_diffusion.training.config import TrainingConfig


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(file)
    return file


def edit(models: ModelsOnDisk, photo: Path, *arguments: str) -> int:
    base = ["--pretrained_model_name_or_path", str(models.base), "--num_inference_steps", "2", "--device", "cpu"]
    return run_command("edit", [str(photo), *base, *arguments])


def test_json_says_what_was_written(
    models: ModelsOnDisk, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = tmp_path / "training.yaml"
    training.write_text("method: svft\nmax_train_steps: 7\nwith_prior_preservation: true\n", encoding="utf-8")
    output = tmp_path / "edits" / "one.png"
    arguments = ["--source-prompt", "a dog", "--prompt", "a red dog", "-o", str(output), "--strengths", "0.5", "1"]
    more = ["--json", "--config", str(training), "--max_train_steps", "1", "--seed", "5"]
    assert edit(models, photo, *arguments, *more) == 0
    printed = capsys.readouterr()
    written = json.loads(printed.out)
    assert [item["strength"] for item in written["pictures"]] == [0.5, 1.0]
    assert all(Path(item["file"]).is_file() for item in written["pictures"]) and Path(written["grid"]) == output
    assert Path(written["adapter"]).is_file() and not written["adapter_reused"]
    assert "leaves out of" in printed.err and "with_prior_preservation" in printed.err
    assert edit(models, photo, *arguments, *more, "--overwrite") == 0
    assert json.loads(capsys.readouterr().out)["adapter_reused"]


INVERSION = ["--prompt", "a dog", "--source_prompt", "a cat"]
IMG2IMG = ["--prompt", "a dog", "--mode", "img2img"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--prompt"),
        (["--prompt", " "], "--prompt"),
        (["--prompt", "a dog"], "--source_prompt"),
        (["--prompt", "a dog", "--source_prompt", ""], "--source_prompt is empty"),
        (["--prompt", "a dog <adapter:none:1>", "--source_prompt", "a cat"], "unknown adapter 'none'"),
        (["--prompt", "<adapter:none:1>", "--source_prompt", "a cat"], "unknown adapter 'none'"),
        ([*INVERSION, "--eta", "0.5", "--slerp", "0.5"], "give one of them"),
        ([*INVERSION, "--eta", "1.5"], "--eta must be between 0 and 1"),
        ([*INVERSION, "--slerp", "nan"], "--slerp must be between 0 and 1"),
        ([*INVERSION, "--strength", "0.5"], "--strengths scales adapters"),
        ([*INVERSION, "--mask", "mask.png"], "take --mode inpaint"),
        ([*INVERSION, "--inversion_refinements", "-1"], "between 0 and 100"),
        ([*INVERSION, "--strengths", "1", "nan"], "finite"),
        ([*INVERSION, "--strengths", "1", "1.00000001"], "too close"),
        ([*INVERSION, "--height", "20"], "multiple of 8"),
        ([*INVERSION, "--height", "1000000000"], "--height must be at most 16384; got 1000000000"),
        ([*INVERSION, "--width", "264"], "--width must be at most 256, 16 times what this base model draws"),
        ([*INVERSION, "--max_train_steps", "0"], "at least 1"),
        ([*INVERSION, "--method", "siva", "--pattern", "banded"], "pattern"),
        ([*INVERSION, "--num_inference_steps", "0"], "between 1 and 1000"),
        ([*INVERSION, "-o", "edit.jpg"], "must end in .png"),
        ([*IMG2IMG, "--strength", "0"], "above 0"),
        ([*IMG2IMG, "--strength", "0.1"], "less than one"),
        ([*IMG2IMG, "--eta", "0.5"], "no effect with --mode img2img"),
        ([*IMG2IMG, "--inversion_refinements", "0"], "no effect with --mode img2img"),
        ([*IMG2IMG, "--method", "svft"], "no effect without --source_prompt"),
        ([*IMG2IMG, "--strengths", "0.5"], "there is none"),
        ([*IMG2IMG, "--adapter", "nothing.safetensors"], "nothing.safetensors"),
        (["--prompt", "a dog", "--mode", "inpaint"], "needs a --mask"),
        (["--prompt", "a dog", "--mode", "inpaint", "--mask", "gone.png"], "no such mask"),
    ],
)
def test_refused_in_one_line(
    models: ModelsOnDisk,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert edit(models, photo, *arguments) == 2
    printed = capsys.readouterr().err
    assert reason in printed and len(printed.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [photo.name]


def test_files_are_not_replaced(
    models: ModelsOnDisk, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = photo.read_bytes()
    assert edit(models, photo, *IMG2IMG, "-o", str(photo), "--overwrite") == 2
    assert "one of the files to read" in capsys.readouterr().err and photo.read_bytes() == before
    taken = tmp_path / "edit_strength1.png"
    taken.write_bytes(b"mine")
    more = ["--adapter", str(models.dog), "--strengths", "0", "1", "-o", str(tmp_path / "edit.png")]
    assert edit(models, photo, *IMG2IMG, *more) == 2
    assert "--overwrite" in capsys.readouterr().err and taken.read_bytes() == b"mine"


def test_an_adapter_in_a_picture_is_not_replaced(
    models: ModelsOnDisk, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    carrier = tmp_path / "carrier.png"
    assert edit(models, photo, *IMG2IMG, "--adapter", str(models.dog), "--embed_adapter", "-o", str(carrier)) == 0
    before = carrier.read_bytes()
    again = [*IMG2IMG, "--adapter", f"{carrier}:0.5", "-o", str(carrier), "--overwrite"]
    capsys.readouterr()
    assert edit(models, photo, *again) == 2
    assert "one of the files to read" in capsys.readouterr().err and carrier.read_bytes() == before


def test_training_tells_no_place_that_goes_away(
    models: ModelsOnDisk, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "edits" / "edit.png"
    assert edit(models, photo, *INVERSION, "--max_train_steps", "1", "-o", str(output)) == 0
    said = capsys.readouterr().out
    assert "-training" not in said and "photo.png" not in said.replace(str(photo), "")
    [adapter] = (output.parent / "adapters").iterdir()
    assert f"training an adapter on the picture: {adapter}" in said


def test_interrupted_training_says_how_to_go_on(
    models: ModelsOnDisk,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = trainer.optimizer_step

    def interrupted_step(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(trainer, "optimizer_step", interrupted_step)
    output = tmp_path / "edits" / "edit.png"
    assert edit(models, photo, *INVERSION, "--max_train_steps", "3", "-o", str(output)) == 130
    said = capsys.readouterr()
    assert "the same edit goes on with it" in said.err and "resume_from_checkpoint" not in said.out + said.err


def test_interrupted_drawing_says_what_is_kept(
    models: ModelsOnDisk,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw, drawn = Editor.draw, []

    def stop(editor: Editor, on_step: Any) -> Image.Image:
        if drawn:
            raise KeyboardInterrupt
        drawn.append(draw(editor, on_step))
        return drawn[0]

    monkeypatch.setattr(Editor, "draw", stop)
    more = ["--adapter", str(models.dog), "--strengths", "0", "1", "-o", str(tmp_path / "edit.png")]
    assert edit(models, photo, *IMG2IMG, *more) == 130
    said = capsys.readouterr().err
    assert "written: edit_strength0.png" in said and "--overwrite" in said
    assert (tmp_path / "edit_strength0.png").is_file() and not (tmp_path / "edit_strength1.png").exists()


def test_foreign_adapter_and_missing_photo(
    models: ModelsOnDisk, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["-o", str(tmp_path / "edit.png")]
    assert edit(models, photo, *IMG2IMG, *output, "--adapter", str(models.foreign)) == 2
    assert "was trained on" in capsys.readouterr().err
    assert edit(models, tmp_path / "gone.png", *IMG2IMG, *output) == 2
    assert "no such picture" in capsys.readouterr().err


def test_training_settings_of_an_edit() -> None:
    config = EditConfig("some/model", prompt="a", source_prompt="a dog", seed=4, dtype="bfloat16")
    run = training_settings(config, {})
    assert (run.method, run.targets, run.max_train_steps, run.train_batch_size) == ("svdiff", "all", 500, 1)
    assert (run.instance_prompt, run.seed, run.mixed_precision) == ("a dog", 4, "bf16")
    assert not run.with_prior_preservation and run.class_prompt is None
    assert training_settings(config, {"target_layers": "attn2.to_k"}).targets == TrainingConfig().targets
    embedded = EditConfig(prompt="a", source_prompt="a dog")
    assert training_settings(embedded, {}).max_train_steps == 100
    assert training_settings(embedded, {"method": "svft"}).max_train_steps == 500
    with pytest.raises(UserError, match="did you mean 'max_train_steps'"):
        training_settings(config, {"max_train_step": 4})
    with pytest.raises(UserError, match="with_prior_preservation"):
        training_settings(config, {"with_prior_preservation": True})


def test_no_setting_has_two_meanings() -> None:
    own: set[str] = set(EditConfig.__dataclass_fields__)
    names: Any = set(TRAINING_SETTINGS)
    assert not own & names and names < set(TrainingConfig.__dataclass_fields__)
