"""Pictures that carry the adapters that made them: what they hold, how they load, and how damage is noticed."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import ModelsOnDisk, write_models
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_models import tiny_pipeline

from svft_diffusion import load_adapter
from svft_diffusion.adapters import adapter_state, loaded_adapters
from svft_diffusion.app.drawing.studio import PictureRequest, Studio
from svft_diffusion.cli.main import run_command
from svft_diffusion.errors import UserError
from svft_diffusion.files import read_adapter
from svft_diffusion.files.carrier import (
    ADAPTER_CHUNK,
    PNG_SIGNATURE,
    CarriedAdapter,
    adapter_in_png,
    adapters_in_png,
)
from svft_diffusion.sampling import embedding
from svft_diffusion.sampling.adapter_choice import check_adapter, parse_adapter_choice, sha256_of
from svft_diffusion.sampling.png import read_png_settings, save_png
from svft_diffusion.sampling.sample import SamplingConfig, sample


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    return write_models(tmp_path_factory.mktemp("models"))


def listed(name: Any, content: bytes, weight: Any = 0.5) -> dict[str, Any]:
    return {"name": name, "weight": weight, "sha256": hashlib.sha256(content).hexdigest()}


def picture(path: Path, *contents: bytes, settings: dict[str, Any] | None = None) -> bytes:
    image = Image.linear_gradient("L").resize((7, 5)).convert("RGB")
    return save_png(image, path, settings or {"seed": 3}, contents).read_bytes()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """The picture with chunks in front of its last one."""
    return b"".join([png[:-12], *chunks, png[-12:]])


def drawn(models: ModelsOnDisk, output_dir: Path, *adapters: object, **settings: Any) -> list[Path]:
    config = SamplingConfig(
        pretrained_model_name_or_path=str(models.base),
        adapter=[str(adapter) for adapter in adapters],
        prompt=["a photo of sks dog"],
        output_dir=output_dir,
        num_inference_steps=1,
        device="cpu",
        **settings,
    )
    return sample(config).pictures


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_the_letters_of_the_chunk_say_how_to_treat_it() -> None:
    ancillary, private, reserved, safe_to_copy = (bool(letter & 0x20) for letter in ADAPTER_CHUNK)
    assert ancillary and private and not reserved and safe_to_copy


def test_a_picture_gives_back_what_was_put_into_it(tmp_path: Path) -> None:
    dog, style = bytes(range(256)) * 3, b"another adapter"
    settings = {"prompt": "x", "adapters": [listed("style", style, 1), listed("dog", dog)]}
    data = picture(tmp_path / "two.png", dog, style, settings=settings)
    assert adapters_in_png(data, "two") == [CarriedAdapter(dog, "dog", 0.5), CarriedAdapter(style, "style", 1.0)]
    assert adapter_in_png(picture(tmp_path / "one.png", dog), "one") == dog
    assert adapter_in_png(picture(tmp_path / "none.png"), "none") is None
    # Nothing else of the picture changes.
    assert pixels(tmp_path / "two.png") == pixels(tmp_path / "none.png")
    assert read_png_settings(tmp_path / "two.png") == settings
    assert picture(tmp_path / "again.png", dog, style, settings=settings) == data


def test_several_adapters_are_named(tmp_path: Path) -> None:
    settings = {"adapters": [listed("dog\x1b[2J", b"first")]}
    data = picture(tmp_path / "two.png", b"first", b"second", settings=settings)
    second = hashlib.sha256(b"second").hexdigest()[:8]
    with pytest.raises(UserError, match=r"two.png carries 2 adapters \(dog.*inspect two.png --extract") as refused:
        adapter_in_png(data, "two.png")
    assert second in str(refused.value) and str(refused.value).isprintable()


@pytest.mark.parametrize(
    "settings",
    [
        b"not json",
        b"[" * 5000,
        b"[]",
        b'{"adapters": 3}',
        b'{"adapters": [{"sha256": []}]}',
        b'{"adapters": [null]}',
        b'{"adapters": NaN}',
        b" " * 2**20 + b"{}",
    ],
)
def test_settings_of_others_are_no_obstacle(tmp_path: Path, settings: bytes) -> None:
    data = with_chunks(picture(tmp_path / "x.png", b"content"), chunk(b"tEXt", b"svft_diffusion\0" + settings))
    assert [adapter.content for adapter in adapters_in_png(data, "x")] == [b"content"]


@pytest.mark.parametrize("weight", [True, "0.5", None, 10**400, {"unet": 1}], ids=lambda weight: type(weight).__name__)
def test_a_weight_that_is_no_number_is_left_out(tmp_path: Path, weight: Any) -> None:
    data = picture(tmp_path / "x.png", b"content", settings={"adapters": [listed(None, b"content", weight)]})
    assert adapters_in_png(data, "x") == [CarriedAdapter(b"content", None, None)]


def test_every_damage_is_noticed(tmp_path: Path) -> None:
    data = picture(tmp_path / "x.png", b"the bytes of an adapter")
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            with pytest.raises(UserError):
                adapter_in_png(bytes(changed), "x")
    for length in range(len(data)):
        with pytest.raises(UserError):
            adapter_in_png(data[:length], "x")


HEADER = chunk(b"IHDR", b"\0" * 13)
END = chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    {
        "no header": PNG_SIGNATURE + END,
        "two headers": PNG_SIGNATURE + HEADER + HEADER + END,
        "no end": PNG_SIGNATURE + HEADER,
        "end with data": PNG_SIGNATURE + HEADER + chunk(b"IEND", b"x"),
        "something after the end": PNG_SIGNATURE + HEADER + END + b"x",
        "another picture after the end": 2 * (PNG_SIGNATURE + HEADER + END),
        "length beyond the file": PNG_SIGNATURE + HEADER + struct.pack(">I4s", 2**31 - 1, ADAPTER_CHUNK) + b"x" * 20,
        "length beyond the format": PNG_SIGNATURE + HEADER + struct.pack(">I4s", 2**32 - 1, ADAPTER_CHUNK) + END,
        "a flood of chunks": PNG_SIGNATURE + HEADER + 100_001 * chunk(b"tEXt", b"") + END,
        "signature alone": PNG_SIGNATURE,
    }.items(),
    ids=lambda case: case[0],
)
def test_what_is_no_sound_picture_is_refused(data: tuple[str, bytes]) -> None:
    with pytest.raises(UserError, match="picture x"):
        adapter_in_png(data[1], "x")


def test_nothing_is_decompressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = zlib.compress(b"x" * 10**6)
    data = with_chunks(
        picture(tmp_path / "x.png", b"content"),
        chunk(b"zTXt", b"svft_diffusion\0\0" + bomb),
        chunk(b"iTXt", b"svft_diffusion\0\1\0\0\0" + bomb),
        chunk(b"iCCP", b"profile\0\0" + bomb),
    )

    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("something was decompressed")

    monkeypatch.setattr(zlib, "decompress", refuse)
    monkeypatch.setattr(zlib, "decompressobj", refuse)
    assert adapter_in_png(data, "x") == b"content"


def test_a_pickle_in_a_picture_is_not_opened(tmp_path: Path) -> None:
    class Executed:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (tmp_path / "executed",)

    picture(tmp_path / "x.png", pickle.dumps(Executed()))
    with pytest.raises(UserError, match=r"x\.png"):
        read_adapter(tmp_path / "x.png")
    assert not (tmp_path / "executed").exists()


def test_a_picture_loads_like_its_adapter(models: ModelsOnDisk, tmp_path: Path) -> None:
    picture(tmp_path / "made.png", models.dog.read_bytes())
    from_file, from_picture = tiny_pipeline(0), tiny_pipeline(0)
    load_adapter(from_file, models.dog, "dog")
    assert load_adapter(from_picture, tmp_path / "made.png") == "made"
    expected, found = adapter_state(from_file, "dog"), adapter_state(from_picture, "made")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("ending", [".png", ".PNG", ".dat"])
def test_the_content_decides_not_the_ending(models: ModelsOnDisk, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"made{ending}"
    picture(tmp_path / "made.png", models.dog.read_bytes())
    file.write_bytes((tmp_path / "made.png").read_bytes())
    assert read_adapter(file)[0] == read_adapter(models.dog)[0]
    (tmp_path / "renamed.png").write_bytes(models.dog.read_bytes())
    assert read_adapter(tmp_path / "renamed.png")[0] == read_adapter(models.dog)[0]


def test_a_picture_without_an_adapter_or_for_another_base_does_not_load(models: ModelsOnDisk, tmp_path: Path) -> None:
    pipe = tiny_pipeline(0)
    picture(tmp_path / "none.png")
    picture(tmp_path / "foreign.png", models.foreign.read_bytes())
    for name, reason in (("none.png", "carries no adapter"), ("foreign.png", "trained on")):
        with pytest.raises(UserError, match=reason):
            load_adapter(pipe, tmp_path / name)
    assert loaded_adapters(pipe) == []


def test_pictures_carry_their_adapters_and_make_themselves_again(models: ModelsOnDisk, tmp_path: Path) -> None:
    (made,) = drawn(models, tmp_path / "first", f"{models.dog}:0.8")
    assert adapter_in_png(made.read_bytes(), "made") == models.dog.read_bytes()
    assert sha256_of(made) == sha256_of(models.dog) == read_png_settings(made)["adapters"][0]["sha256"]
    (again,) = drawn(models, tmp_path / "second", f"{made}:0.8")
    assert pixels(again) == pixels(made)
    assert adapter_in_png(again.read_bytes(), "again") == models.dog.read_bytes()
    assert adapter_in_png((made.parent / "grid.png").read_bytes(), "grid") is None


def test_only_adapters_that_acted_are_carried(models: ModelsOnDisk, tmp_path: Path) -> None:
    pictures = drawn(models, tmp_path, models.dog, f"{models.style}:0", weights=[0.0, 1.0])
    without, with_dog = (adapters_in_png(file.read_bytes(), file.name) for file in pictures)
    assert without == []
    assert [adapter.content for adapter in with_dog] == [models.dog.read_bytes()]


def test_one_adapter_is_not_taken_for_two(models: ModelsOnDisk, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are the same adapter; give it once"):
        drawn(models, tmp_path, models.dog, f"{models.dog}:0.5")


@pytest.mark.parametrize(
    ("embed", "largest", "carried"),
    [(None, 10**6, True), (None, 1000, False), (True, 1000, True), (False, 10**6, False)],
)
def test_large_adapters_are_carried_when_asked_for(
    models: ModelsOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embed: bool, largest: int, carried: bool
) -> None:
    monkeypatch.setattr(embedding, "LARGEST_UNASKED", largest)
    (made,) = drawn(models, tmp_path, models.dog, embed_adapter=embed)
    assert (adapter_in_png(made.read_bytes(), "made") is not None) == carried


def test_the_command_says_what_the_pictures_carry(
    models: ModelsOnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompt", "a dog", "--adapter", str(models.dog), "--num_inference_steps", "1", "--device", "cpu"]
    arguments += ["--pretrained_model_name_or_path", str(models.base)]
    assert run_command("sample", [*arguments, "--output_dir", str(tmp_path / "with")]) == 0
    assert f"dog ({models.dog.stat().st_size / 1000:.0f} kB)" in capsys.readouterr().out
    assert run_command("sample", [*arguments, "--output_dir", str(tmp_path / "out"), "--no-embed-adapter"]) == 0
    assert "carry" not in capsys.readouterr().out


def test_pictures_tell_nothing_of_the_machine(models: ModelsOnDisk, tmp_path: Path) -> None:
    (made,) = drawn(models, tmp_path, models.dog)
    assert str(tmp_path).encode() not in made.read_bytes() and str(models.base).encode() not in made.read_bytes()
    assert Path.home().as_posix().encode() not in made.read_bytes()


def test_the_app_puts_adapters_into_pictures_only_when_told(models: ModelsOnDisk, tmp_path: Path) -> None:
    adapter = check_adapter(models.dog, str(models.base), name="dog")
    request = PictureRequest(str(models.base), "a dog", ((adapter, 0.7),), num_inference_steps=1)
    for embed in (False, True):
        studio = Studio(tmp_path / str(embed), device=torch.device("cpu"), embed_adapter=embed)
        (saved,) = studio.generate_pictures(request)
        expected = [CarriedAdapter(models.dog.read_bytes(), "dog", 0.7)] if embed else []
        assert adapters_in_png(saved.path.read_bytes(), "saved") == expected


def test_a_picture_as_an_argument_takes_a_weight(tmp_path: Path) -> None:
    choice = parse_adapter_choice("made.png:0.5")
    assert (choice.file, choice.weight) == (Path("made.png"), 0.5)
    with pytest.raises(UserError, match="not a number"):
        parse_adapter_choice("made.png:strong")


def test_other_programs_keep_the_adapter(tmp_path: Path) -> None:
    picture(tmp_path / "x.png", b"content")
    with Image.open(tmp_path / "x.png") as opened:
        opened.load()
        kept = PngInfo()
        for kind, data, *_ in opened.private_chunks:  # type: ignore[attr-defined]  # of PngImageFile
            kept.add(kind, data)
        opened.save(tmp_path / "edited.png", pnginfo=kept)
    assert adapter_in_png((tmp_path / "edited.png").read_bytes(), "edited") == b"content"


@pytest.mark.parametrize("on_mismatch", ["error", "align", "force"])
def test_an_adapter_of_another_base_is_drawn_with_when_told(
    models: ModelsOnDisk, tmp_path: Path, on_mismatch: str
) -> None:
    if on_mismatch == "error":
        with pytest.raises(UserError, match="trained on"):
            drawn(models, tmp_path / "out", models.foreign)
        assert not (tmp_path / "out").exists()
        return
    if on_mismatch == "align":  # of an unrelated base nothing is left, which the loading finds out
        with pytest.raises(UserError, match="nothing is left"):
            drawn(models, tmp_path / "out", models.foreign, on_mismatch="align")
        return
    (with_adapter,) = drawn(models, tmp_path / "out", models.foreign, on_mismatch="force")
    (without,) = drawn(models, tmp_path / "base")
    assert pixels(with_adapter) != pixels(without)


def test_a_choice_on_mismatch_that_is_none_is_refused(models: ModelsOnDisk, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown on_mismatch 'ignore'"):
        drawn(models, tmp_path, models.dog, on_mismatch="ignore")


def test_json_settings_stay_those_of_the_picture(tmp_path: Path) -> None:
    picture(tmp_path / "x.png", b"content", settings={"prompt": "a", "seed": 1})
    with Image.open(tmp_path / "x.png") as opened:
        assert json.loads(opened.text["svft_diffusion"]) == {"prompt": "a", "seed": 1}  # type: ignore[attr-defined]
