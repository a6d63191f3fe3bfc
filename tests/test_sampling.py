"""The sampler: what it draws, what it refuses, and the files that it writes."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import ModelsOnDisk, write_models
from PIL import Image, ImageFont

from svft_diffusion import load_adapter, set_adapters, unload_adapter
from svft_diffusion.cli.main import run_command
from svft_diffusion.errors import UserError
from svft_diffusion.factors import location
from svft_diffusion.models.loading import load_pipeline
from svft_diffusion.sampling import drawing
from svft_diffusion.sampling.adapter_choice import AdapterChoice, adapter_label, parse_adapter_choice, unique_names
from svft_diffusion.sampling.devices import resolve_device
from svft_diffusion.sampling.grid import labelled_grid, wrap_text
from svft_diffusion.sampling.numbered_folders import folder_of_run, new_numbered_folder
from svft_diffusion.sampling.parameters import parameters_text
from svft_diffusion.sampling.plan import slug
from svft_diffusion.sampling.png import read_png_settings, save_png
from svft_diffusion.sampling.sample import SamplingConfig, generate, sample


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    return write_models(tmp_path_factory.mktemp("models"))


def config_for(models: ModelsOnDisk, output_dir: Path, **settings: Any) -> SamplingConfig:
    defaults = {"prompt": ["a photo of sks dog"], "num_inference_steps": 2, "device": "cpu"}
    return SamplingConfig(
        pretrained_model_name_or_path=str(models.base), output_dir=output_dir, **{**defaults, **settings}
    )


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


@pytest.mark.parametrize(
    ("text", "file", "weight"),
    [
        ("dog.safetensors", "dog.safetensors", 1.0),
        ("dog.safetensors:0.8", "dog.safetensors", 0.8),
        ("dog.safetensors:-1.5", "dog.safetensors", -1.5),
        ("some/folder/dog.safetensors:.5", "some/folder/dog.safetensors", 0.5),
        (r"C:\adapters\dog.safetensors", r"C:\adapters\dog.safetensors", 1.0),
        (r"C:\adapters\dog.safetensors:0.8", r"C:\adapters\dog.safetensors", 0.8),
        (r"C:dog.safetensors", r"C:dog.safetensors", 1.0),
        ("C:/adapters/dog.safetensors:1e-1", "C:/adapters/dog.safetensors", 0.1),
    ],
)
def test_adapter_argument(text: str, file: str, weight: float) -> None:
    assert parse_adapter_choice(text) == AdapterChoice(Path(file), weight)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("dog.safetensors:strong", "not a number"),
        ("dog.safetensors:0.5:0.7", "one weight for each adapter"),
        ("dog.safetensors:nan", "finite"),
        ("dog.safetensors:inf", "finite"),
    ],
)
def test_adapter_argument_refused(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse_adapter_choice(text)


def test_adapter_argument_takes_folders_and_colons_in_names(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    assert parse_adapter_choice(str(tmp_path / "dog")) == AdapterChoice(tmp_path / "dog")  # reading it says what is in
    (tmp_path / "dog" / "adapter.safetensors").touch()
    assert parse_adapter_choice(f"{tmp_path / 'dog'}:0.5") == AdapterChoice(
        tmp_path / "dog" / "adapter.safetensors", 0.5
    )
    odd = tmp_path / "run:3"
    try:
        odd.touch()
    except OSError:
        pytest.skip("this file system allows no colons")
    assert parse_adapter_choice(str(odd)) == AdapterChoice(odd, 1.0)
    assert parse_adapter_choice(f"{odd}:2") == AdapterChoice(odd, 2.0)


def test_names_of_adapters_are_unique_and_fit_peft() -> None:
    assert adapter_label(Path("outputs/dog/adapter.safetensors")) == "dog"
    assert adapter_label(Path("outputs/style.v2.safetensors")) == "style.v2"
    assert unique_names(["dog", "style.v2", "dog", "...", "dog"]) == ["dog", "style_v2", "dog-2", "adapter", "dog-3"]
    assert unique_names(["training", "training"]) == ["training_adapter", "training_adapter-2"]


def test_png_settings_survive_any_text(tmp_path: Path) -> None:
    characters = 'ab ,:"\\\n\t<>()[]{}=é日本🙂\x00\ud800'
    generator = random.Random(0)
    image = Image.new("RGB", (3, 2), "red")
    for _ in range(200):
        text = ["".join(generator.choices(characters, k=generator.randrange(40))) for _ in range(3)]
        settings = {
            "prompt": text[0],
            "negative_prompt": text[1],
            "seed": generator.randrange(2**63),
            "guidance_scale": generator.uniform(-1e9, 1e9),
            "adapters": [{"name": text[2], "weight": generator.random()}],
            "height": None,
        }
        assert read_png_settings(save_png(image, tmp_path / "picture.png", settings)) == settings


def test_png_parameters_can_be_read_by_other_tools(tmp_path: Path) -> None:
    settings = {
        "prompt": "a dog, on the beach: sunny\nsecond line",
        "negative_prompt": "blurry",
        "num_inference_steps": 25,
        "scheduler": "DPMSolverMultistep",
        "guidance_scale": 4.0,
        "seed": 7,
        "width": 64,
        "height": 96,
        "base": "toybox",
        "adapters": [{"name": "dog", "weight": 0.8}, {"name": "style", "weight": -0.25}],
    }
    with Image.open(save_png(Image.new("RGB", (64, 96)), tmp_path / "picture.png", settings)) as image:
        *text, last = image.info["parameters"].split("\n")
    assert text == ["a dog, on the beach: sunny", "second line", "Negative prompt: blurry"]
    # The expression with which the usual web interface takes the last line apart.
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert pairs["Steps"] == "25" and pairs["Seed"] == "7" and pairs["Size"] == "64x96" and pairs["CFG scale"] == "4.0"
    assert json.loads(pairs["Adapters"]) == "dog: 0.8, style: -0.25"
    assert "Negative prompt" not in parameters_text({"prompt": "a dog", "negative_prompt": ""})


def test_png_damaged_or_foreign_files_are_refused(tmp_path: Path) -> None:
    image = Image.effect_noise((32, 32), 50)
    whole = save_png(image, tmp_path / "whole.png", {"seed": 1})
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:-200])
    image.save(tmp_path / "foreign.png")
    for name, reason in [
        ("cut.png", "can't be read"),
        ("foreign.png", "no settings"),
        ("missing.png", "can't be read"),
    ]:
        with pytest.raises(UserError, match=reason):
            read_png_settings(tmp_path / name)


def test_png_in_the_place_of_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match="can't write"):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "file" / "a.png", {})


def test_grid_places_pictures_of_any_shape() -> None:
    wide = Image.new("RGB", (40, 20), "red")
    tall = Image.new("L", (20, 40), 0)
    grid = labelled_grid([[wide, None], [tall]], ["", ""], ["", ""], cell=80)
    assert grid.size == (8 + 80 + 8 + 80 + 8, 8 + 40 + 8 + 40 + 8)
    assert grid.getpixel((48, 28)) == (255, 0, 0)
    assert grid.getpixel((136, 28)) == grid.getpixel((136, 76)) == (232, 232, 232)  # empty cells
    assert grid.getpixel((48, 76)) == (0, 0, 0)
    assert grid.getpixel((20, 76)) == (255, 255, 255)  # beside the tall picture, which keeps its shape


def test_grid_labels_take_room_and_long_ones_wrap() -> None:
    picture = Image.new("RGB", (64, 64), "blue")
    plain = labelled_grid([[picture]], [""], [""])
    labelled = labelled_grid([[picture]], ["a prompt " * 40], ["seed 0"])
    assert plain.size == (8 + 160 + 8, 8 + 160 + 8)
    assert labelled.width > plain.width and labelled.height > plain.height
    left = labelled.crop((0, 0, 220, labelled.height)).convert("L")
    assert left.getextrema()[0] < 80  # something is written there
    font = ImageFont.load_default(size=14)
    lines = wrap_text("word " * 500 + "x" * 5000, font, 220)
    assert len(lines) == 12 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 225 for line in lines)
    assert wrap_text("y" * 60, font, 100) != ["y" * 60] and "".join(wrap_text("y" * 60, font, 100)) == "y" * 60


def test_grid_refuses_wrong_labels_and_nothing() -> None:
    with pytest.raises(ValueError, match="labels"):
        labelled_grid([[Image.new("RGB", (8, 8))]], ["a", "b"], [""])
    with pytest.raises(ValueError, match="at least one picture"):
        labelled_grid([[None]], [""], [""])


def test_file_and_folder_names(tmp_path: Path) -> None:
    assert slug("A red robot, on the BEACH!") == "a-red-robot-on-the-beach"
    assert slug("日本") == "picture" and slug("../../etc") == "etc" and len(slug("long " * 100)) <= 40
    assert new_numbered_folder(tmp_path / "none") == tmp_path / "none" / "001"
    (tmp_path / "007").mkdir()
    assert new_numbered_folder(tmp_path) == tmp_path / "008"


def test_runs_that_start_together_get_folders_of_their_own(tmp_path: Path) -> None:
    parent = tmp_path / "outputs" / "samples"
    with folder_of_run(None, parent) as first, folder_of_run(None, parent) as second:
        assert (first.name, second.name) == ("001", "002")
        (second / "picture.png").touch()
    assert sorted(parent.iterdir()) == [second]
    with folder_of_run(None, tmp_path / "nothing" / "comes"):
        pass
    assert not (tmp_path / "nothing").exists()
    with folder_of_run(tmp_path / "given", parent) as given:
        assert given == tmp_path / "given" and not given.exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't write to"), folder_of_run(None, tmp_path / "file"):
        pass


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cuda", "mps", "cpu")
    for name in ("gpu", "cuda:99", "xla"):
        with pytest.raises(UserError, match="device"):
            resolve_device(name)


def test_pictures_are_those_of_the_library_call(models: ModelsOnDisk, tmp_path: Path) -> None:
    """Strength 0 is the base bit for bit; every other picture is what load, set and one pipeline call give."""
    adapters = [f"{models.dog}:0.8", f"{models.style}:-0.5"]
    config = config_for(models, tmp_path, adapter=adapters, weights=[0.0, 0.5, 1.0], num_images=2, seed=3)
    result = sample(config)

    names = [f"000_a-photo-of-sks-dog_w{strength}_seed{seed}.png" for strength in ("0", "0.5", "1") for seed in (3, 4)]
    assert [path.name for path in result.pictures] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "grid.png", "index.csv", "index.html"])

    pipe = load_pipeline(str(models.base))

    def expected(seed: int) -> bytes:
        return generate(pipe, "a photo of sks dog", seed=seed, num_inference_steps=2, guidance_scale=4.0).tobytes()

    base_pictures = [expected(3), expected(4)]
    assert [pixels(path) for path in result.pictures[:2]] == base_pictures
    load_adapter(pipe, models.style, "style")
    load_adapter(pipe, models.dog, "dog")
    for row, strength in ((1, 0.5), (2, 1.0)):
        set_adapters(pipe, {"dog": 0.8 * strength, "style": -0.5 * strength})
        assert [pixels(path) for path in result.pictures[2 * row : 2 * row + 2]] == [expected(3), expected(4)]
    unload_adapter(pipe, "dog")
    unload_adapter(pipe, "style")
    assert [expected(3), expected(4)] == base_pictures
    assert len({pixels(path) for path in result.pictures}) == 6

    settings = read_png_settings(result.pictures[3])
    assert settings["seed"] == 4 and settings["base"] == "base" and settings["width"] == settings["height"] == 16
    assert [(adapter["name"], adapter["weight"]) for adapter in settings["adapters"]] == [
        ("dog", 0.4),
        ("style", -0.25),
    ]


def test_same_bytes_again_and_no_silent_overwriting(models: ModelsOnDisk, tmp_path: Path) -> None:
    config = config_for(models, tmp_path, height=16, width=24)
    first = sample(config)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert Image.open(first.pictures[0]).size == (24, 16)

    sample(config)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    for change in (
        {"guidance_scale": 2.0},
        {"width": 16},
        {"height": None, "width": None},
        {"adapter": [str(models.dog)]},
    ):
        with pytest.raises(UserError, match="--overwrite"):
            sample(config_for(models, tmp_path, **{"height": 16, "width": 24, **change}))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    sample(config_for(models, tmp_path, guidance_scale=2.0, overwrite=True))
    assert first.pictures[0].read_bytes() != before[first.pictures[0].name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_acts_in_every_dtype(models: ModelsOnDisk, tmp_path: Path, dtype: str) -> None:
    result = sample(config_for(models, tmp_path, adapter=[str(models.dog.parent)], weights=[0, 1], dtype=dtype))
    assert pixels(result.pictures[0]) != pixels(result.pictures[1])


def test_bad_input_is_refused_before_the_model_loads(
    models: ModelsOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(drawing, "load_pipeline", fail)
    text = tmp_path / "notes.safetensors"
    text.write_text("not an adapter", encoding="utf-8")
    blocked = tmp_path / "file"
    blocked.touch()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"prompt": []}, "--prompt"),
        ({"prompt": ["a dog", " "]}, "empty"),
        ({"num_images": 0}, "num_images"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63 - 1, "num_images": 2}, "seed"),
        ({"num_inference_steps": 0}, "the number of steps must be"),
        ({"guidance_scale": float("nan")}, "the guidance scale must be"),
        ({"height": 20}, "multiple of 8"),
        ({"width": 10**9}, "--width must be at most 16384; got 1000000000"),
        (
            {"width": 16384, "height": 8192},
            "--height 8192 and --width 16384: pictures have at most 67 million pixels, ",
        ),
        ({"height": 264}, "--height must be at most 256, 16 times what this base model draws; got 264"),
        ({"weights": [1.0]}, "no --adapter"),
        ({"adapter": [str(models.dog)], "weights": [float("nan")]}, "finite"),
        ({"adapter": [str(models.dog)], "weights": [0.5, 0.50000001]}, "too close"),
        ({"adapter": ["missing.safetensors"]}, "missing.safetensors"),
        ({"adapter": [str(text)]}, "no safetensors file"),
        ({"adapter": ["x" * 300]}, "is no adapter file: .*too long" if sys.platform == "linux" else ""),
        ({"adapter": ["~nobody-of-this-name/x"]}, "x"),
        ({"pretrained_vae_model_name_or_path": str(tmp_path)}, "holds no config.json"),
        ({"adapter": [str(models.foreign)]}, "was trained on the base"),
        ({"device": "gpu"}, "device"),
        ({"output_dir": blocked}, "can't write"),
        ({"factor_cache": blocked}, "is a file; give a folder"),
        ({"factor_cache_size": "lots"}, "is not a size"),
    ]
    for change, reason in cases:
        settings = {"output_dir": tmp_path / "out", **change}
        with pytest.raises(UserError, match=reason) as caught:
            sample(config_for(models, settings.pop("output_dir"), **settings))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_base_that_can_not_be_loaded_leaves_no_folder(models: ModelsOnDisk, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be loaded"):
        sample(config_for(models, tmp_path / "out", variant="fp99"))
    assert not (tmp_path / "out").exists()


def test_decompositions_go_where_the_settings_say(
    models: ModelsOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(location, "_chosen_folder", None)
    monkeypatch.setattr(location, "_chosen_size", None)
    sample(config_for(models, tmp_path / "out", adapter=[str(models.dog)], factor_cache=tmp_path / "cache"))
    assert list((tmp_path / "cache").glob("*.factors"))


def test_command(
    models: ModelsOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["--pretrained_model_name_or_path", str(models.base), "--num_inference_steps", "1"]
    weights = ["--adapter", f"{models.dog}:-0.5", str(models.style), "--weights", "-1", "1"]
    assert run_command("sample", [*base, *weights, "--prompt", "a dog", "--prompt", "a robot"]) == 0
    output = capsys.readouterr().out
    assert "4 pictures in" in output and "grid.png" in output
    assert len(list((tmp_path / "outputs" / "samples" / "001").glob("*.png"))) == 5
    assert run_command("sample", [*base, "--prompt", "a dog"]) == 0
    assert capsys.readouterr().out.startswith("1 picture in ")
    assert (tmp_path / "outputs" / "samples" / "002" / "000_a-dog_seed0.png").is_file()
    assert run_command("sample", base) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")
