"""The look at the photos before training: what is noted, what is not, and the sheet of what is trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from svft_diffusion.cli.main import run_command
from svft_diffusion.data.contact_sheet import MOST_TILES, contact_sheet, shown
from svft_diffusion.data.cutting import Cutter
from svft_diffusion.data.dataset import Picture
from svft_diffusion.data.photo_check import MOST_PHOTOS, photo_notes

SAMPLES = Path(__file__).parent.parent / "samples"
REAL_PHOTOS = Path(__file__).parent.parent.parent / "shared" / "data" / "dreambooth"
CUTTER = Cutter(((96, 96),), center_crop=True, interpolation="lanczos", seed=0)


def scene(number: int, size: tuple[int, int] = (128, 128), colour: tuple[int, int, int] | None = None) -> Image.Image:
    """A picture like no other: coarse and fine patterns in colours of its own, or before one ``colour``."""
    random = np.random.default_rng(number)
    if colour is None:
        coarse = Image.fromarray(random.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        image = coarse.resize(size, Image.Resampling.BICUBIC)
    else:
        image = Image.new("RGB", size, colour)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = (int(random.integers(side // 4, side * 5 // 8)) for side in size)
        corner = (x + int(random.integers(8, 32)), y + int(random.integers(8, 32)))
        draw.rectangle((x, y, *corner), fill=tuple(random.integers(0, 255, 3).tolist()), outline="black")
    return image


def notes_on(folder: Path, images: dict[str, Image.Image], cutter: Cutter = CUTTER, **options: object) -> list[str]:
    for name, image in images.items():
        image.save(folder / name, **options)
    return photo_notes([Picture(folder / name, "") for name in sorted(images)], cutter)


def scenes() -> dict[str, Image.Image]:
    return {f"{number}.png": scene(number) for number in range(4)}


def test_good_photos_need_no_word(tmp_path: Path) -> None:
    assert notes_on(tmp_path, scenes()) == []
    assert photo_notes([Picture(path, "") for path in sorted(SAMPLES.glob("*.png"))], CUTTER)  # of 64 pixels, for 96
    small = Cutter(((64, 64),), True, "lanczos", 0)
    assert photo_notes([Picture(path, "") for path in sorted(SAMPLES.glob("*.png"))], small) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda image: image, "nearly the same photo"),
        (lambda image: image.resize((300, 300)), "nearly the same photo"),
        (lambda image: image.point(lambda value: min(255, int(value * 1.2) + 8)), "nearly the same photo"),
        (lambda image: image.crop((3, 3, 125, 125)), "nearly the same photo"),
        (lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "nearly mirror images"),
    ],
)
def test_copies_are_found(tmp_path: Path, change: Callable[[Image.Image], Image.Image], word: str) -> None:
    (note,) = notes_on(tmp_path, scenes() | {"copy.png": change(scene(2))})
    assert note.startswith(f"2.png and copy.png are {word}")


def test_many_copies_are_counted(tmp_path: Path) -> None:
    notes = notes_on(tmp_path, {f"{number}.png": scene(0) for number in range(6)})
    assert sum("are nearly the same photo" in note for note in notes) == 8
    assert "and 7 more pairs of nearly the same photo" in notes


def test_blurred_photos_are_found_and_smooth_walls_are_not(tmp_path: Path) -> None:
    blurred = scene(7).filter(ImageFilter.GaussianBlur(3))
    (note,) = notes_on(tmp_path, scenes() | {"soft.png": blurred, "wall.png": scene(8, colour=(120, 130, 140))})
    assert note == "blurred, and blur is learned too: soft.png"


def test_small_photos_are_found_by_the_resolution(tmp_path: Path) -> None:
    images = scenes() | {"small.png": scene(5, (60, 70))}
    (note,) = notes_on(tmp_path, images)
    assert note.endswith("enlarged: small.png (60x70 pixels, 1.6 times)")
    (note,) = notes_on(tmp_path, images, Cutter(((136, 136),), True, "lanczos", 0))  # 128 pixels are nearly enough
    assert "small.png" in note and "0.png" not in note


def test_long_photos_are_found_by_the_shapes(tmp_path: Path) -> None:
    images = scenes() | {"wide.png": scene(5, (300, 128))}
    (note,) = notes_on(tmp_path, images)
    assert "wide.png (300x128 pixels); cut them yourself, or use --aspect_ratio_buckets auto" in note
    assert notes_on(tmp_path, images, Cutter(((96, 96), (64, 144)), True, "lanczos", 0)) == []


def test_same_background_is_found(tmp_path: Path) -> None:
    same = {f"{number}.png": scene(number, colour=(200, 190, 180)) for number in range(3)}
    (note,) = notes_on(tmp_path, same)
    assert note.startswith("the same background in 3 of 3 photos")
    (note,) = notes_on(tmp_path, same | {"x.png": scene(9)})
    assert note.startswith("the same background in 3 of 4 photos")
    assert notes_on(tmp_path, same | {"x.png": scene(9), "y.png": scene(10)}) == []


def test_turned_animated_and_transparent_photos_are_named(tmp_path: Path) -> None:
    images = scenes()
    turned, moving, clear = scene(5), scene(6), scene(7).convert("RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    moving.save(tmp_path / "moving.png", save_all=True, append_images=[scene(8)])
    clear.paste((0, 0, 0, 0), (0, 0, 10, 128))
    clear.save(tmp_path / "clear.png")
    notes_on(tmp_path, images)
    names = [*images, "clear.png", "moving.png", "turned.jpg"]
    notes = photo_notes([Picture(tmp_path / name, "") for name in names], CUTTER)
    assert notes == [
        "upright only by their EXIF data, which other programs may ignore: turned.jpg",
        "several pictures in one file, of which the first is used: moving.png (1 of 2)",
        "transparent parts become white and are learned so, without --masked_loss: clear.png",
    ]
    masked = Cutter(((96, 96),), True, "lanczos", 0, masked=True)
    assert len(photo_notes([Picture(tmp_path / name, "") for name in names], masked)) == 2


def test_of_very_many_photos_the_first_are_looked_at(tmp_path: Path) -> None:
    scene(0).save(tmp_path / "same.png")
    picture = Picture(tmp_path / "same.png", "")
    notes = photo_notes([picture] * (MOST_PHOTOS + 5), CUTTER)
    assert notes[-1] == f"the first {MOST_PHOTOS} of {MOST_PHOTOS + 5} photos were looked at" and len(notes) < 15


def test_one_photo_and_flat_ones_are_no_trouble(tmp_path: Path) -> None:
    assert notes_on(tmp_path, {"0.png": scene(0)}) == []
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (128, 4)).save(tmp_path / "line.png")
    notes = photo_notes([Picture(tmp_path / name, "") for name in ("dot.png", "line.png")], CUTTER)
    assert any("blurred" in note for note in notes)


@pytest.mark.skipif(not REAL_PHOTOS.is_dir(), reason="the DreamBooth photos are not here")
@pytest.mark.parametrize("subject", ["cat", "duck_toy", "vase"])
def test_real_photos(tmp_path: Path, subject: str) -> None:
    files = sorted((REAL_PHOTOS / subject).glob("*.jpg"))
    pictures = [Picture(file, "") for file in files]
    cutter = Cutter(((512, 512),), True, "lanczos", 0)
    assert photo_notes(pictures, cutter) == []
    with Image.open(files[0]) as image:
        side = min(image.size)
        image.filter(ImageFilter.GaussianBlur(2 * side / 512)).save(tmp_path / "blurred.png")
        image.crop((side // 50, side // 50, side, side)).save(tmp_path / "copy.jpg", quality=70)
    notes = photo_notes([*pictures, *(Picture(tmp_path / name, "") for name in ("blurred.png", "copy.jpg"))], cutter)
    assert "blurred, and blur is learned too: blurred.png" in notes
    assert any(note.startswith(f"{files[0].name} and copy.jpg are nearly the same photo") for note in notes)


# The sheet


def test_sheet_shows_the_very_pixels(tmp_path: Path) -> None:
    cutter = Cutter(((168, 168),), False, "lanczos", seed=1)
    pictures = []
    for number, size in enumerate([(200, 200), (300, 200), (168, 168)]):
        scene(number, size).save(tmp_path / f"{number}.png")
        pictures.append(Picture(tmp_path / f"{number}.png", ""))
    sheet = contact_sheet(pictures, cutter)
    for row, number in enumerate([0, 1, 1, 1, 1, 2]):
        if number != 1:
            tile = sheet.crop((8, 8 + (0, 1, 1, 1, 1, 2)[row] * 210, 8 + 168, 8 + (0, 1, 1, 1, 1, 2)[row] * 210 + 168))
            assert np.array_equal(np.asarray(tile), np.asarray(shown(cutter.cut(pictures[number], 0))))
    for variant in range(4):  # the wide one has a row of four cuts
        left = 8 + variant * 176
        tile = sheet.crop((left, 218, left + 168, 218 + 168))
        expected = cutter.cut(pictures[1], variant)
        assert np.array_equal(np.asarray(tile), np.asarray(shown(expected)))
        assert ((expected.pixels + 1) * 127.5).round().sub((expected.pixels + 1) * 127.5).abs().max() < 1e-3
    only_first = contact_sheet(pictures, cutter, all_variants=False)
    assert only_first.width == 3 * 176 + 8 and only_first.height < sheet.height


def test_sheet_enlarges_by_whole_numbers_and_darkens_what_masks_leave_out(tmp_path: Path) -> None:
    image = scene(3, (64, 64)).convert("RGBA")
    image.paste((255, 255, 255, 0), (0, 0, 64, 32))
    image.save(tmp_path / "cut_out.png")
    picture = Picture(tmp_path / "cut_out.png", "")
    sheet = contact_sheet([picture], Cutter(((64, 64),), True, "nearest", 0, masked=True))
    tile = np.asarray(sheet.crop((8, 8, 8 + 192, 8 + 192)))
    assert (tile[:96] == 63).all()  # a quarter of white
    assert np.array_equal(tile[96::3, ::3], np.asarray(image.convert("RGB"))[32:])


def test_sheet_of_many_photos_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svft_diffusion.data.contact_sheet._MOST_PIXELS", 500_000)
    scene(0).save(tmp_path / "a.png")
    sheet = contact_sheet([Picture(tmp_path / "a.png", "")] * (MOST_TILES + 9), Cutter(((176, 176),), True, "box", 0))
    assert 500_000 < sheet.width * sheet.height < 1_500_000  # labels and margins come on top
    assert sheet.width < 10 * (72 + 8) + 8


# The command


def test_command_prints_notes_and_writes_the_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    notes_on(folder, scenes() | {"copy.png": scene(1)})
    (folder / "text.jpg").write_text("no picture", encoding="utf-8")
    sheet = tmp_path / "sheet.png"
    arguments = [str(folder), "--resolution", "96", "--aspect-ratio-buckets", "auto"]
    assert run_command("check-photos", [*arguments, "-o", str(sheet)]) == 0
    printed = capsys.readouterr().out
    assert "photos: 5 in" in printed and "skipped text.jpg: no readable picture" in printed
    assert "1.png and copy.png are nearly the same photo" in printed
    with Image.open(sheet) as written:
        assert written.format == "PNG" and written.width > 3 * 96
    before = sheet.read_bytes()
    assert run_command("check-photos", [*arguments, "-o", str(sheet)]) == 2
    assert "is there already" in capsys.readouterr().err and sheet.read_bytes() == before
    assert run_command("check-photos", [*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["photos"] == ["0.png", "1.png", "2.png", "3.png", "copy.png"]
    assert report["skipped"] == {"text.jpg": "no readable picture"} and len(report["notes"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such folder"),
        (["photos", "--resolution", "100"], "multiple of 8"),
        (["photos", "--aspect_ratio_buckets", "5"], "--aspect_ratio_buckets"),
        (["photos", "-o", "sheet.jpg"], "must end in .png"),
        (["photos", "-o", "photos/0.png/sheet.png"], "can't write"),
        (["photos", "--masked_loss"], "transparent all over"),
    ],
)
def test_command_refuses_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "photos").mkdir()
    notes_on(tmp_path / "photos", scenes())
    if "--masked_loss" in arguments:
        Image.new("RGBA", (128, 128), (0, 0, 0, 0)).save(tmp_path / "photos" / "4.png")
        arguments = [*arguments, "-o", "sheet.png"]
    monkeypatch.chdir(tmp_path)
    assert run_command("check-photos", arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and message in errors[0]
