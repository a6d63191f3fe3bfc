"""Class pictures for prior preservation: what they depend on, and that none is used that is not as it was drawn."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from training_runs import short_run

from svft_diffusion.data.class_folder import drawing_alone, in_use, is_in_use
from svft_diffusion.data.class_images import MANIFEST_FILE, ClassImageRecipe, class_pictures, given_class_pictures
from svft_diffusion.data.photos import PhotoFolder
from svft_diffusion.errors import Interrupted, UserError
from svft_diffusion.models import load_pipeline
from svft_diffusion.training.checks import check
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.dry_run import dry_run
from svft_diffusion.training.trainer import train

RECIPE = ClassImageRecipe(
    base_model="tiny",
    base_digest="0123",
    precision="float32",
    scheduler="PNDMScheduler",
    scheduler_settings={"beta_start": 0.00085, "trained_betas": None, "sizes": [1, 2]},
    prompts=["a dog", "a red dog"],
    seed=5,
    resolution=8,
    num_inference_steps=2,
    guidance_scale=4.0,
)


class Painter:
    """Stands for a pipeline: paints one colour for each seed, and blanks what its safety checker dislikes."""

    def __init__(self, disliked: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        self.disliked = disliked
        self.seeds: list[int] = []
        self.stop_after: int | None = None

    def set_progress_bar_config(self, **options: Any) -> None:
        pass

    def __call__(self, *, prompt: list[str], generator: list[torch.Generator], height: int, **options: Any) -> Any:
        if self.stop_after is not None and len(self.seeds) >= self.stop_after:
            raise KeyboardInterrupt
        seeds = [part.initial_seed() for part in generator]
        self.seeds += seeds
        blanked = [seed in self.disliked for seed in seeds]
        images = [
            Image.new("RGB", (height, height), "black" if black else (seed % 256, len(text), 99))
            for seed, text, black in zip(seeds, prompt, blanked, strict=True)
        ]
        return SimpleNamespace(images=images, nsfw_content_detected=blanked if self.disliked else None)


def draw(
    folder: Path, painter: Painter, recipe: ClassImageRecipe = RECIPE, count: int = 5, **options: Any
) -> list[str]:
    """The names of the class pictures."""
    found = class_pictures(painter, folder, recipe, count=count, batch_size=2, **options)  # type: ignore[arg-type]
    assert all(picture.path.is_file() for picture in found)
    return [picture.path.name for picture in found]


def test_pictures_are_drawn_once(tmp_path: Path) -> None:
    painter = Painter()
    names = draw(tmp_path / "class", painter)
    assert names == [f"class-{number:05d}.png" for number in range(5)] and painter.seeds == [5, 6, 7, 8, 9]
    assert draw(tmp_path / "class", painter) == names and len(painter.seeds) == 5  # by the next run
    assert draw(tmp_path / "class", painter, count=7) == [*names, "class-00005.png", "class-00006.png"]
    assert painter.seeds[5:] == [10, 11]
    assert len(draw(tmp_path / "class", painter, count=2)) == 2 and len(painter.seeds) == 7


@pytest.mark.parametrize(
    "change",
    [
        {"base_digest": "4567"},
        {"base_model": "other"},
        {"precision": "bfloat16"},
        {"scheduler": "DDIMScheduler"},
        {"scheduler_settings": {"beta_start": 0.00086}},
        {"prompts": ["a cat"]},
        {"seed": 6},
        {"resolution": 16},
        {"num_inference_steps": 3},
        {"guidance_scale": 5.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_recipe_draws_all_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    draw(tmp_path, Painter(), count=5)
    own = tmp_path / "mine.png"
    Image.new("RGB", (9, 9)).save(own)
    painter = Painter()
    other = replace(RECIPE, **change)
    assert draw(tmp_path, painter, other, count=3) == ["mine.png", "class-00000.png", "class-00001.png"]
    assert painter.seeds == [other.seed, other.seed + 1]
    assert not (tmp_path / "class-00004.png").exists() and own.exists()  # old drawings go, people's pictures stay
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert manifest["recipe"][next(iter(change))] == next(iter(change.values())) and set(manifest["drawn"]) == {
        "0",
        "1",
    }


def test_files_that_changed_are_drawn_again(tmp_path: Path) -> None:
    draw(tmp_path, Painter())
    whole = (tmp_path / "class-00001.png").read_bytes()
    (tmp_path / "class-00001.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "class-00003.png").unlink()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "class-00004.png")
    painter = Painter()
    draw(tmp_path, painter)
    assert painter.seeds == [6, 8, 9] and (tmp_path / "class-00001.png").read_bytes() == whole


def test_drawing_goes_on_where_it_stopped(tmp_path: Path) -> None:
    painter = Painter()
    painter.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "stopped", painter)
    painter.stop_after = None
    draw(tmp_path / "stopped", painter)
    assert painter.seeds == [5, 6, 7, 8, 9]
    draw(tmp_path / "whole", Painter())
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "stopped" / file.name).read_bytes() == file.read_bytes()


def picture_of_somebody(file: Path, colour: str = "purple") -> bytes:
    Image.new("RGB", (9, 9), colour).save(file)
    return file.read_bytes()


@pytest.mark.parametrize("manifest", [None, "{", "drawn"])
def test_pictures_with_names_like_ours_are_kept_and_count(tmp_path: Path, manifest: str | None) -> None:
    if manifest == "drawn":  # by another recipe, whose pictures go
        draw(tmp_path, Painter(), replace(RECIPE, seed=77), count=1)
    elif manifest is not None:
        (tmp_path / MANIFEST_FILE).write_text(manifest, encoding="utf-8")
    theirs = tmp_path / "class-00001.png"
    before = picture_of_somebody(theirs)
    (tmp_path / "class-00003.png").write_bytes(b"no picture")
    assert [photo.name for photo in given_class_pictures(tmp_path).photos] == ["class-00001.png"]
    painter = Painter()
    names = draw(tmp_path, painter, count=4)
    assert names == ["class-00001.png", "class-00000.png", "class-00002.png", "class-00004.png"]
    assert painter.seeds == [5, 7, 9] and theirs.read_bytes() == before
    assert (tmp_path / "class-00003.png").read_bytes() == b"no picture"
    assert draw(tmp_path, painter, count=4) == names and len(painter.seeds) == 3
    draw(tmp_path, Painter(), replace(RECIPE, seed=88), count=4)
    assert theirs.read_bytes() == before


def test_a_picture_that_was_being_drawn_when_the_run_was_killed_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_half(image: Image.Image, file: Path, settings: dict[str, Any]) -> Path:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("svft_diffusion.data.class_images.save_png", save_half)
        draw(tmp_path, Painter())
    assert (tmp_path / "class-00000.png").is_file() and given_class_pictures(tmp_path) == PhotoFolder([], [])
    painter = Painter()
    assert len(draw(tmp_path, painter)) == 5 and painter.seeds == [5, 6, 7, 8, 9]


def test_blanked_pictures_are_never_used(tmp_path: Path) -> None:
    painter = Painter(disliked={6, 9})
    assert draw(tmp_path, painter) == ["class-00000.png", "class-00002.png", "class-00003.png"]
    assert len(list(tmp_path.glob("*.png"))) == 3
    assert draw(tmp_path, painter) and len(painter.seeds) == 5  # nor drawn again
    with pytest.raises(UserError, match="blanked every class image"):
        draw(tmp_path / "other", Painter(disliked=set(range(20))))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"recipe": {}}', '{"recipe": {}, "drawn": [0, 1], "withheld": []}',
             '{"recipe": {}, "drawn": {"../../x": "0"}, "withheld": []}', '{"recipe": {}, "drawn": {}, "withheld": 3}'],
)  # fmt: skip
def test_damaged_manifest_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(text, encoding="utf-8")
    painter = Painter()
    assert len(draw(tmp_path, painter)) == 5 == len(painter.seeds)


def test_given_pictures_count_and_have_captions(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "mine.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "mine.png", "text": "my old dog"}', encoding="utf-8")
    painter = Painter()
    found = class_pictures(
        painter, tmp_path, RECIPE, count=3, batch_size=2, caption_source="metadata", subject=1  # type: ignore[arg-type]
    )  # fmt: skip
    assert [picture.prompt for picture in found] == ["my old dog", "a dog", "a red dog"]
    assert {picture.subject for picture in found} == {1} and len(painter.seeds) == 2


# In a run


@pytest.fixture
def prior(tmp_path: Path) -> TrainingConfig:
    return replace(
        short_run(tmp_path),
        with_prior_preservation=True,
        class_data_dir=tmp_path / "class",
        class_prompt="a photo of a dog",
        num_class_images=2,
        prior_generation_num_inference_steps=1,
        max_train_steps=1,
        checkpointing_steps=10,
    )


def manifest_of(config: TrainingConfig) -> dict[str, Any]:
    assert config.class_data_dir is not None
    manifest: dict[str, Any] = json.loads((config.class_data_dir / MANIFEST_FILE).read_text(encoding="utf-8"))
    return manifest


def test_manifest_says_what_made_the_pictures(prior: TrainingConfig, tmp_path: Path) -> None:
    train(prior)
    first = manifest_of(prior)
    pipeline = load_pipeline(prior.pretrained_model_name_or_path)
    recipe = first["recipe"]
    assert recipe["prompts"] == ["a photo of a dog"] and recipe["seed"] == prior.seed
    assert recipe["scheduler"] == type(pipeline.scheduler).__name__ and recipe["precision"] == "float32"
    assert recipe["scheduler_settings"]["beta_end"] == pipeline.scheduler.config.beta_end
    assert str(tmp_path) not in json.dumps(first)

    train(replace(prior, output_dir=tmp_path / "out2", prior_generation_precision="fp32"))  # which it was
    assert manifest_of(prior) == first
    train(replace(prior, output_dir=tmp_path / "out3", prior_generation_precision="bf16"))
    second = manifest_of(prior)
    assert second["recipe"]["precision"] == "bfloat16" and second["drawn"] != first["drawn"]


def test_captions_of_given_pictures_are_looked_at_before_the_base_is_loaded(prior: TrainingConfig) -> None:
    folder, photos = prior.class_data_dir, prior.instance_data_dir
    assert folder is not None and photos is not None
    folder.mkdir()
    Image.new("RGB", (9, 9)).save(folder / "mine.png")
    (folder / "mine.txt").write_text("my old dog", encoding="utf-8")
    (folder / "list.txt").write_text("of no picture", encoding="utf-8")
    (note,) = (note for note in check(replace(prior, caption_source="txt")).notes if "in the class folder" in note)
    assert "list.txt (not a picture)" in note and "mine.txt" not in note
    (folder / "mine.txt").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.txt is empty"):
        check(replace(prior, caption_source="txt"))
    assert check(prior).notes


def _change_vae(pipeline: Any) -> None:
    pipeline.vae.decoder.conv_out.bias.data += 0.5


def _change_scheduler(pipeline: Any) -> None:
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, beta_end=0.013)


@pytest.mark.parametrize("change", [_change_vae, _change_scheduler])
def test_any_change_of_the_base_draws_anew(
    prior: TrainingConfig, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    train(prior)
    first = manifest_of(prior)
    pipeline = load_pipeline(prior.pretrained_model_name_or_path)
    change(pipeline)
    pipeline.save_pretrained(prior.pretrained_model_name_or_path)  # under the same name
    train(replace(prior, output_dir=tmp_path / "out2"))
    assert manifest_of(prior)["recipe"] != first["recipe"] and manifest_of(prior)["drawn"] != first["drawn"]


# --- several runs in one folder at once ---

OTHER = replace(RECIPE, seed=77)


def test_pictures_that_another_run_needs_stay(tmp_path: Path) -> None:
    with ExitStack() as users:
        names = draw(tmp_path, Painter(), users=users)
        before = {name: (tmp_path / name).read_bytes() for name in names}
        with pytest.raises(UserError, match=r"another run needs the class images .* --class_data_dir") as refusal:
            draw(tmp_path, Painter(), OTHER)
        assert "\n" not in str(refusal.value)
        assert {name: (tmp_path / name).read_bytes() for name in names} == before
        painter = Painter()
        assert draw(tmp_path, painter, users=users) == names and painter.seeds == []  # one recipe is shared
    painter = Painter()
    draw(tmp_path, painter, OTHER)
    assert len(painter.seeds) == 5
    assert not list(tmp_path.glob("*.used"))


def test_runs_draw_one_after_the_other(tmp_path: Path) -> None:
    waited = 0

    def wait() -> None:
        nonlocal waited
        waited += 1
        raise Interrupted(143)

    painter = Painter()
    with drawing_alone(tmp_path, wait), pytest.raises(Interrupted):
        draw(tmp_path, painter, on_progress=wait)
    assert waited == 1 and painter.seeds == []
    assert len(draw(tmp_path, painter)) == 5


def test_killed_runs_hold_nothing(tmp_path: Path) -> None:
    draw(tmp_path, Painter())
    program = f"""
import os, pathlib
from svft_diffusion.data.class_folder import drawing_alone, in_use
folder = pathlib.Path({str(tmp_path)!r})
drawing, used = drawing_alone(folder, lambda: None), in_use(folder)
drawing.__enter__(), used.__enter__()
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    assert len(list(tmp_path.glob("*.used"))) == 1
    with in_use(tmp_path):
        assert is_in_use(tmp_path)
    assert not is_in_use(tmp_path) and not list(tmp_path.glob("*.used"))
    assert len(draw(tmp_path, Painter(), OTHER)) == 5


def test_locks_are_no_pictures(tmp_path: Path) -> None:
    with ExitStack() as users:
        draw(tmp_path, Painter(), users=users)
        found = given_class_pictures(tmp_path)
        assert found.photos == [] and found.skipped == []
        (tmp_path / "notes.txt").touch()
        assert [file.path.name for file in given_class_pictures(tmp_path).skipped] in ([], ["notes.txt"])


def test_a_folder_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(lock: object, **options: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(UserError, match=r"can't write class images to .* no file locks there"):
        draw(tmp_path, Painter())


def test_a_run_that_fails_before_its_steps_needs_nothing_any_more(
    prior: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise UserError("no such optimizer")

    monkeypatch.setattr("svft_diffusion.training.setup.make_optimizer", fail)
    with pytest.raises(UserError, match="no such optimizer") as problem:
        train(prior)
    assert prior.class_data_dir is not None and (prior.class_data_dir / MANIFEST_FILE).is_file()
    assert not list(prior.class_data_dir.glob("*.used"))
    assert problem.value.__traceback__ is not None  # which holds all that was there


def test_a_dry_run_leaves_no_open_file(prior: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows removes no folder with one."""
    used: list[list[Path]] = []

    class Noting(tempfile.TemporaryDirectory[str]):
        def cleanup(self) -> None:
            used.append(list(Path(self.name).rglob("*.used")))
            super().cleanup()

    monkeypatch.setattr(tempfile, "TemporaryDirectory", Noting)
    dry_run(prior)
    assert used and not any(used)
