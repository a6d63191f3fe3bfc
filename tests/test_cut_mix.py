"""Cut-Mix: which samples show two subjects, what they are made of, and runs on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tiny_models import tiny_pipeline, tiny_pipeline_sdxl
from tiny_transformers import tiny_pipeline_flux, tiny_pipeline_sd3
from training_runs import short_run, trained_tensors

from svft_diffusion.cli.main import main
from svft_diffusion.data.cut_mix import CutMix, is_side_by_side_template, side_by_side_prompts
from svft_diffusion.data.dataset import Picture
from svft_diffusion.data.order import PictureOrder
from svft_diffusion.errors import UserError
from svft_diffusion.models import ModelFamily, family_of
from svft_diffusion.training.batches import Batch, Encoder, Stream, cached_batches, loaded_batches
from svft_diffusion.training.card import saved_settings
from svft_diffusion.training.checks import check, check_settings
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.mixing import Mixing, mixing_of
from svft_diffusion.training.pictures import cutter_of, streams_of
from svft_diffusion.training.subjects import read_subjects
from svft_diffusion.training.trainer import train

TEMPLATE = "photo of {left} on {right}"
REPOSITORY = Path(__file__).parent.parent
COLOURS = {0: (255, 0, 0), 1: (0, 255, 0), 2: (0, 0, 255)}


# Which samples are mixed


def mix_of(subjects: list[int], *, probability: float = 0.6, seed: int = 0, purpose: str = "instance") -> CutMix:
    order = PictureOrder(subjects, [0] * len(subjects), turn_length=1, seed=seed, purpose=purpose)
    names = [f"s{number}" for number in range(max(subjects) + 1)]
    prompts = side_by_side_prompts(TEMPLATE, names)
    return CutMix(subjects, order, prompts, probability=probability, seed=seed, purpose=purpose)


def test_share_pairs_and_sides_are_as_said() -> None:
    subjects = [0, 0, 0, 1, 2, 2]
    mix = mix_of(subjects)
    mixed = [found for sample in range(3000) if (found := mix.locate(sample)) is not None]
    assert 0.57 < len(mixed) / 3000 < 0.63
    pairs = Counter((subjects[found.left.picture], subjects[found.right.picture]) for found in mixed)
    assert set(pairs) == {(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)}
    assert all(abs(count - len(mixed) / 6) < 60 for count in pairs.values())
    for found in mixed:
        left, right = subjects[found.left.picture], subjects[found.right.picture]
        assert found.prompt == f"photo of s{left} on s{right}"
    assert {found.left.picture for found in mixed} == set(range(6))
    assert all(mix_of(subjects, probability=1.0).locate(sample) for sample in range(50))


def test_a_sample_keeps_its_own_picture_and_is_the_same_in_any_order() -> None:
    subjects = [0, 0, 1, 1]
    mix, order = mix_of(subjects), PictureOrder(subjects, [0] * 4, turn_length=1, seed=0, purpose="instance")
    forwards = [mix.locate(sample) for sample in range(60)]
    assert [mix_of(subjects).locate(sample) for sample in reversed(range(60))] == forwards[::-1]
    for sample, found in enumerate(forwards):
        assert found is None or order.locate(sample)[0] in (found.left.picture, found.right.picture)
    assert [mix_of(subjects, seed=1).locate(sample) for sample in range(60)] != forwards


def test_class_pictures_mix_as_the_photos_beside_them() -> None:
    photos, classes = [0, 1, 1], [0] * 7 + [1] * 5
    mix, of_class = mix_of(photos), mix_of(classes, purpose="class")
    for sample in range(100):
        found, beside = mix.locate(sample), of_class.locate(sample)
        assert (found is None) == (beside is None)
        if found is not None and beside is not None:
            assert photos[found.left.picture] == classes[beside.left.picture] and found.prompt == beside.prompt


@pytest.mark.parametrize(
    "text", ["{left} {left}", "{left}", "a {left} and {right} {", "{left} {right!r}", "{} {left}", ""]
)
def test_templates_that_are_none(text: str) -> None:
    assert not is_side_by_side_template(text) and is_side_by_side_template(TEMPLATE)
    with pytest.raises(UserError, match="--cut_mix_prompt must hold"):
        check_settings(TrainingConfig(cut_mix_unmix=True, concepts_list=Path("x.json"), cut_mix_prompt=text))


# What they are made of


@pytest.fixture(scope="module")
def family() -> ModelFamily:
    return family_of(tiny_pipeline())


def plain_picture(file: Path, subject: int, size: tuple[int, int], prompt: str = "alone") -> Picture:
    """One colour for each subject, with white bars where the middle of a square ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (size[1], size[0]), COLOURS[subject])
    image.save(file)
    mask = Image.new("L", image.size, 255 if subject == 0 else 0)
    mask.paste(255, (0, 0, size[1], size[0] // 2))
    mask.save(file.with_name(file.stem + ".mask.png"))
    return Picture(file, prompt, subject)


MIXING = Mixing(TEMPLATE, ["sks dog", "red robot"], ["sks", "red"], ["dog", "robot"])


def batches(
    config: TrainingConfig, family: ModelFamily, photos: list[Picture], classes: list[Picture], cached: bool
) -> tuple[list[Stream], list[Batch]]:
    cutter = cutter_of(config, 4)
    streams = streams_of(config, photos, classes, cutter, MIXING)
    encoder = Encoder(family, config.unmasked_weight if config.masked_loss else None)
    size = config.train_batch_size
    numbers = [range(start, start + size) for start in range(0, 8 * size, size)]
    if cached:
        return streams, list(cached_batches(encoder, streams, cutter, numbers, on_picture=lambda: None))
    return streams, list(loaded_batches(encoder, streams, cutter, numbers, workers=0))


@pytest.mark.parametrize("shapes", [None, "16,16;16,24;24,16"])
@pytest.mark.parametrize("prior_source", ["images", "base"])
def test_halves_show_what_is_said(tmp_path: Path, family: ModelFamily, shapes: str | None, prior_source: str) -> None:
    config = TrainingConfig(
        cut_mix_unmix=True, resolution=16, aspect_ratio_buckets=shapes, train_batch_size=2, center_crop=True,
        masked_loss=True, unmasked_weight=0.25, with_prior_preservation=True, prior_source=prior_source,
    )  # fmt: skip
    sizes = [(20, 20), (16, 24), (24, 16), (32, 32)]
    photos = [plain_picture(tmp_path / f"{n}.png", n % 2, size) for n, size in enumerate(sizes)]
    classes = [replace(photo, prompt="class") for photo in photos]
    if prior_source == "images":
        classes = [plain_picture(tmp_path / f"c{n}.png", n % 2, (18, 18), "class") for n in range(5)]
    streams, kept = batches(config, family, photos, classes, cached=True)
    _, made = batches(config, family, photos, classes, cached=False)
    mixed = 0
    for first, second in zip(kept, made, strict=True):
        assert first.prompts == second.prompts and torch.equal(first.sizes, second.sizes)
        torch.testing.assert_close(first.latents.mean, second.latents.mean)
        assert first.weights is not None and second.weights is not None and torch.equal(first.weights, second.weights)
        height, width = (2 * side for side in first.latents.mean.shape[-2:])
        for row, (kind, number) in enumerate(first.samples):
            stream = streams[kind == "class"]
            assert first.sizes[row, 4:].tolist() == [height, width]
            parts = stream.parts(number)
            if len(parts) == 1:
                assert first.prompts[row] == ("alone" if kind == "instance" else "class")
                continue
            mixed += 1
            subjects = [stream.pictures[part.picture].subject for part in parts]
            names = MIXING.names if kind == "instance" else MIXING.class_names
            assert first.prompts[row] == f"photo of {names[subjects[0]]} on {names[subjects[1]]}"
            expected = []
            for subject in subjects:
                colour = torch.tensor(COLOURS[subject]).view(3, 1, 1) / 127.5 - 1.0
                half = colour.expand(3, height, width // 2)[None].float()
                expected.append(family.encode_pictures(half).mean)
            torch.testing.assert_close(first.latents.mean[row], torch.cat(expected, dim=-1)[0])
            assert first.sizes[row, 2:4].tolist() == [0, 0]
            originals = [Image.open(stream.pictures[part.picture].path).size for part in parts]
            assert first.sizes[row, :2].tolist() == [min(o[1] for o in originals), min(o[0] for o in originals)]
            if kind == "instance":  # the mask of subject 1 is black below
                for subject, half in zip(subjects, first.weights[row, 0, -1].chunk(2), strict=True):
                    assert (half == (1.0 if subject == 0 else 0.25)).all()
            else:
                assert (first.weights[row] == 1).all()
    assert mixed > 8


def test_with_the_base_as_prior_a_mixed_photo_is_mixed_in_both_halves_of_a_batch(
    tmp_path: Path, family: ModelFamily
) -> None:
    config = TrainingConfig(
        cut_mix_unmix=True, resolution=16, train_batch_size=4, with_prior_preservation=True, prior_source="base"
    )
    photos = [plain_picture(tmp_path / f"{n}.png", n % 2, (20, 20)) for n in range(6)]
    streams, _ = batches(config, family, photos, [replace(photo, prompt="class") for photo in photos], cached=True)
    assert all(streams[0].parts(sample) == streams[1].parts(sample) for sample in range(50))


def test_halves_are_of_the_middle_of_a_photo(tmp_path: Path, family: ModelFamily) -> None:
    """A subject in the middle is in every half, although photos alone are cut at random."""
    config = TrainingConfig(cut_mix_unmix=True, cut_mix_probability=1.0, resolution=16, train_batch_size=1)
    photos = []
    for subject in (0, 1):
        image = Image.new("RGB", (32, 16), "black")
        image.paste("white", (12, 0, 20, 16))  # just what a half takes
        image.save(tmp_path / f"{subject}.png")
        photos.append(Picture(tmp_path / f"{subject}.png", "alone", subject))
    white = family.encode_pictures(torch.ones(1, 3, 16, 8)).mean
    for batch in batches(config, family, photos, [], cached=False)[1]:
        torch.testing.assert_close(batch.latents.mean, torch.cat((white, white), dim=-1))


# Runs


@pytest.fixture
def subjects(tmp_path: Path) -> Callable[..., TrainingConfig]:
    def write(pipeline: Any = None, **changes: Any) -> TrainingConfig:
        config = short_run(tmp_path, pipeline)
        listed = []
        for number, title in enumerate(["sks dog", "red robot"]):
            name = title.split()[1]
            for index, size in enumerate([(16, 16), (30, 20), (20, 30)]):
                plain_picture(tmp_path / name / f"{index}.png", number, size)
            listed.append(
                {
                    "instance_prompt": f"a photo of {title}",
                    "instance_data_dir": str(tmp_path / name),
                    "class_prompt": name,
                }
            )
        (tmp_path / "subjects.json").write_text(json.dumps(listed), encoding="utf-8")
        mixed = {"cut_mix_unmix": True, "cut_mix_prompt": TEMPLATE, "unmix_loss_weight": 2.0}
        alone = {"instance_data_dir": None, "instance_prompt": None, "concepts_list": tmp_path / "subjects.json"}
        return replace(config, **(alone | mixed | changes))

    return write


def losses_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {"with_prior_preservation": True, "prior_source": "base", "gradient_checkpointing": True},
        {"cache_latents": False, "dataloader_num_workers": 1, "aspect_ratio_buckets": "16,16;16,24"},
        {"mixed_precision": "bf16", "train_text_encoder": True, "masked_loss": True, "gradient_accumulation_steps": 2},
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(
    subjects: Callable[..., TrainingConfig], changes: dict[str, Any]
) -> None:
    config = subjects(**changes)
    train(config)
    lines = losses_of(config.output_dir)
    assert all("unmix_loss" in line for line in lines) and any(line["unmix_loss"] > 0 for line in lines)
    halfway = replace(config, output_dir=config.output_dir.with_name("resumed"))
    train(replace(halfway, max_train_steps=2))
    (halfway.output_dir / "adapter.safetensors").unlink()
    train(replace(halfway, resume_from_checkpoint="latest"))
    assert losses_of(halfway.output_dir) == lines
    whole, resumed = (trained_tensors(run.output_dir / "adapter.safetensors") for run in (config, halfway))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_the_weighted_loss_is_part_of_the_whole(subjects: Callable[..., TrainingConfig]) -> None:
    config = subjects(max_train_steps=1, cut_mix_probability=1.0)
    train(config)
    train(replace(config, unmix_loss_weight=0.0, output_dir=config.output_dir.with_name("without")))
    (with_loss,), (without,) = losses_of(config.output_dir), losses_of(config.output_dir.with_name("without"))
    assert "unmix_loss" not in without and with_loss["unmix_loss"] > 0
    assert with_loss["loss"] == pytest.approx(without["loss"] + 2.0 * with_loss["unmix_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun's rendezvous")
def test_two_processes_are_one_with_twice_the_accumulation(subjects: Callable[..., TrainingConfig]) -> None:
    # With a large epsilon a step is proportional to the gradient; else Adam makes much of rounding where that is small.
    settings = {"max_train_steps": 2, "adam_epsilon": 1.0, "learning_rate": 1.0}
    config = subjects(with_prior_preservation=True, prior_source="base", **settings)
    file = config.output_dir.with_name("run.yaml")
    file.write_text(yaml.safe_dump(saved_settings(config)), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(REPOSITORY / "train_dreambooth.py"), "--config", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=file.parent)
    assert done.returncode == 0, done.stderr
    alone = replace(config, gradient_accumulation_steps=2, output_dir=config.output_dir.with_name("alone"))
    train(alone)
    for ours, theirs in zip(losses_of(alone.output_dir), losses_of(config.output_dir), strict=True):
        assert ours["unmix_loss"] > 0
        assert theirs["unmix_loss"] == pytest.approx(ours["unmix_loss"], rel=1e-5)
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    first, second = (trained_tensors(run.output_dir / "adapter.safetensors") for run in (alone, config))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "pipeline", [tiny_pipeline_sdxl, tiny_pipeline_sd3, pytest.param(tiny_pipeline_flux, marks=pytest.mark.slow)]
)
def test_other_families_train_on_mixed_pictures(subjects: Callable[..., TrainingConfig], pipeline: Any) -> None:
    has_maps = pipeline is tiny_pipeline_sdxl
    config = subjects(pipeline(), max_train_steps=1, cut_mix_probability=1.0)
    if not has_maps:
        with pytest.raises(UserError, match="--unmix_loss_weight 0"):
            train(config)
        config = replace(config, unmix_loss_weight=0.0)
    train(config)
    assert ("unmix_loss" in losses_of(config.output_dir)[0]) == has_maps


# Refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"concepts_list": None, "instance_data_dir": Path("x"), "instance_prompt": "a"},
            "list them with --concepts_list",
        ),
        ({"cut_mix_probability": 0.0}, "above 0 and at most 1"),
        ({"cut_mix_probability": 1.5}, "above 0 and at most 1"),
        ({"cut_mix_probability": float("nan")}, "above 0 and at most 1"),
        ({"unmix_loss_weight": -1.0}, "--unmix_loss_weight must be"),
        ({"unmix_loss_weight": float("inf")}, "--unmix_loss_weight must be"),
        ({"torch_compile": True}, "--torch_compile"),
        ({"cut_mix_probability": 1.0, "caption_dropout": 0.1}, "--caption_dropout has no effect"),
        ({"cut_mix_unmix": False}, "--cut_mix_prompt has no effect"),
        (
            {"cut_mix_prompt": "photo of a {left} on the left and a {right} on the right of it"},
            "shorter --cut_mix_prompt",
        ),
        ({"resolution": 8 * 3, "pretrained_model_name_or_path": "flux"}, "multiples of"),
    ],
)
def test_what_cannot_work_is_refused(
    subjects: Callable[..., TrainingConfig], changes: dict[str, Any], message: str
) -> None:
    config = subjects()
    with pytest.raises(UserError, match=message) as refused:
        if "pretrained_model_name_or_path" in changes:
            mixing = mixing_of(config, read_subjects(config)[0])
            assert mixing is not None
            mixing.check_sizes(family_of(tiny_pipeline_flux()), [(24, 22)])
        else:
            train(replace(config, **changes))
    assert "\n" not in str(refused.value)
    assert not config.output_dir.exists()


def test_subjects_that_prompts_do_not_tell_apart(subjects: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    config = subjects()
    file = tmp_path / "subjects.json"
    listed = json.loads(file.read_text("utf-8"))
    for change, message in (
        ([listed[0]], "two subjects or more"),
        (
            [listed[0], listed[1] | {"instance_prompt": "a picture of sks dog", "class_prompt": "dog"}],
            "called 'sks dog'",
        ),
        ([listed[0], listed[1] | {"instance_prompt": "a photo of robot"}], "names no subject"),
    ):
        file.write_text(json.dumps(change), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            check(config)
    file.write_text(json.dumps([listed[0], listed[1] | {"class_prompt": "of the"}]), encoding="utf-8")
    check(config)
    with pytest.raises(UserError, match="names no class"):
        check(replace(config, with_prior_preservation=True, prior_source="base"))


def test_settings_survive_a_config_file(subjects: Callable[..., TrainingConfig], tmp_path: Path) -> None:
    config = subjects(max_train_steps=1)
    train(config)
    written = config.output_dir / "config.yaml"
    assert main(["train", "--config", str(written), "--output_dir", str(tmp_path / "again")]) == 0
    again = tmp_path / "again" / "adapter.safetensors"
    first, second = trained_tensors(config.output_dir / "adapter.safetensors"), trained_tensors(again)
    assert all(torch.equal(second[name], value) for name, value in first.items())
