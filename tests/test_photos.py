"""Photos from people's folders: what is skipped, and how odd files become RGB pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hostile_photos import bombs, mutant, whole_pictures
from PIL import Image, ImageOps

from svft_diffusion.data import photos
from svft_diffusion.data.photos import UnusablePhoto, open_photo, read_photo, scan_photos, upright_size
from svft_diffusion.errors import UserError


def save_photo(path: Path, size: tuple[int, int] = (30, 20), colour: str = "red") -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def test_scan_keeps_photos_and_names_everything_else(tmp_path: Path) -> None:
    save_photo(tmp_path / "good.JPG")
    save_photo(tmp_path / "good.webp")
    (tmp_path / "text.jpg").write_text("not a picture", encoding="utf-8")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / ".DS_Store").write_bytes(b"\0\1")
    save_photo(tmp_path / ".hidden.png")
    (tmp_path / "good.txt").write_text("a caption", encoding="utf-8")
    whole = save_photo(tmp_path / "whole.jpg", (200, 200)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder.png").mkdir()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "Thumbs.db").write_bytes(b"\0")
    save_photo(tmp_path / "good.mask.png")
    (tmp_path / "clip.gif").write_bytes(b"GIF89a")

    found = scan_photos(tmp_path)

    assert [photo.name for photo in found.photos] == ["good.JPG", "good.webp", "whole.jpg"]
    reasons = {file.path.name: file.reason for file in found.skipped}
    assert reasons.pop("cut.jpg").startswith("damaged")
    assert reasons == {
        "text.jpg": "no readable picture",
        "empty.png": "empty file",
        ".DS_Store": "hidden file",
        ".hidden.png": "hidden file",
        "good.txt": "not a picture",
        "folder.png": "folder",
        ".ipynb_checkpoints": "hidden folder",
        "Thumbs.db": "not a picture",
        "good.mask.png": "a mask",
        "clip.gif": "GIF is not read; save it as PNG or JPEG",
    }
    assert {file.path.name for file in found.unusable_pictures} == {"text.jpg", "empty.png", "cut.jpg", "clip.gif"}


def test_scan_fails_only_when_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        scan_photos(tmp_path / "nowhere")
    with pytest.raises(UserError, match="empty"):
        scan_photos(tmp_path)
    (tmp_path / "text.jpg").write_text("not a picture", encoding="utf-8")
    with pytest.raises(UserError, match=r"text\.jpg \(no readable picture\)"):
        scan_photos(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        scan_photos(tmp_path / "text.jpg")


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = open_photo(tmp_path / "turned.png")
    assert upright.size == (20, 40)
    assert pixel(upright, 10, 5) == (255, 0, 0) and pixel(upright, 10, 35) == (0, 0, 255)


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("palette.png", Image.new("RGB", (8, 8), (200, 30, 40)).convert("P", palette=Image.Palette.ADAPTIVE), 200),
        ("cmyk.jpg", Image.new("CMYK", (8, 8), (0, 0, 0, 0)), 255),
        ("grey.png", Image.new("L", (8, 8), 77), 77),
        ("clear.png", Image.new("RGBA", (8, 8), (10, 20, 30, 0)), 255),
        ("half.png", Image.new("LA", (8, 8), (0, 128)), 127),
        ("one_bit.png", Image.new("1", (8, 8), 1), 255),
        ("sixteen.png", Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)), 128),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, name: str, image: Image.Image, expected: int) -> None:
    image.save(tmp_path / name)
    opened = open_photo(tmp_path / name)
    assert opened.mode == "RGB" and opened.size == (8, 8)
    assert abs(pixel(opened)[0] - expected) <= 2


def test_transparent_palette_is_put_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "clear.png", transparency=0)
    opened = open_photo(tmp_path / "clear.png")
    assert pixel(opened) == (255, 255, 255) and pixel(opened, 1, 0) == (255, 0, 0)


def test_pixel_limit_is_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "PIXEL_LIMIT", 599)
    save_photo(tmp_path / "large.png", (30, 20))
    with pytest.raises(UnusablePhoto, match="30x20"):
        open_photo(tmp_path / "large.png")
    Image.new("1", (15000, 15000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(photos, "PIXEL_LIMIT", 64_000_000)
    with pytest.raises(UnusablePhoto, match="too many"):
        open_photo(tmp_path / "bomb.png")


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (3300, 100)])
def test_long_and_narrow_pictures_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    """Few pixels, but many once the narrow side is scaled to the training size."""
    save_photo(tmp_path / "good.png", (64, 2))
    save_photo(tmp_path / "strip.png", size)
    found = scan_photos(tmp_path)
    assert [photo.name for photo in found.photos] == ["good.png"]
    assert found.unusable_pictures[0].reason == f"{size[0]}x{size[1]} pixels are too long and narrow"


def test_browsers_names_of_jpeg_are_read(tmp_path: Path) -> None:
    for name in ("saved.jfif", "saved.JPE"):
        Image.new("RGB", (8, 6), "red").save(tmp_path / name, format="JPEG")
    assert [photo.name for photo in scan_photos(tmp_path).photos] == ["saved.JPE", "saved.jfif"]


def test_phones_data_beside_the_rotation_do_not_matter(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    exif[0x9286] = b"UNICODE\0" + b"\xff" * 9  # a comment that is no text
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    photo = read_photo(tmp_path / "turned.jpg")
    assert photo.image.size == (20, 40) and photo.turned
    assert upright_size(tmp_path / "turned.jpg") == (40, 20)
    Image.new("RGB", (40, 20)).save(tmp_path / "plain.jpg")
    assert upright_size(tmp_path / "plain.jpg") == (20, 40) and not read_photo(tmp_path / "plain.jpg").turned


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(tmp_path: Path, orientation: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as stored:
        expected = ImageOps.exif_transpose(stored)
    photo = read_photo(tmp_path / "photo.png")
    assert np.array_equal(np.asarray(photo.image), np.asarray(expected))
    assert photo.turned == (orientation != 1) and upright_size(tmp_path / "photo.png") == expected.size[::-1]


def test_alpha_is_kept_beside_the_picture_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 4), (0, 0, 200, 255))
    image.putpixel((0, 0), (10, 10, 10, 0))
    image.save(tmp_path / "cut_out.png")
    photo = read_photo(tmp_path / "cut_out.png")
    assert pixel(photo.image) == (255, 255, 255) and pixel(photo.image, 1, 1) == (0, 0, 200)
    assert photo.alpha is not None and photo.alpha.getpixel((0, 0)) == 0 and photo.alpha.getpixel((1, 1)) == 255
    Image.new("RGBA", (8, 4), "red").save(tmp_path / "opaque.png")
    assert read_photo(tmp_path / "opaque.png").alpha is None


@pytest.mark.parametrize("name", ["moving.png", "moving.webp", "moving.tif"])
def test_first_picture_of_an_animation_is_taken(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (8, 8), "red").save(
        tmp_path / name, save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")], lossless=True
    )
    photo = read_photo(tmp_path / name)
    assert photo.frames == 2 and pixel(photo.image) == (255, 0, 0)


def test_heic_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    save_photo(tmp_path / "good.png")
    (tmp_path / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (skipped,) = scan_photos(tmp_path).skipped
    assert skipped.is_picture and "pip install 'svft-diffusion[heic]'" in skipped.reason
    with pytest.raises(UnusablePhoto, match="pillow-heif"):
        read_photo(tmp_path / "IMG_0001.HEIC")


def test_heic_is_read(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 40))).save(tmp_path / "photo.heic")
    photo = read_photo(tmp_path / "photo.heic")
    assert photo.image.size == (64, 48) and abs(pixel(photo.image)[0] - 200) < 8
    assert scan_photos(tmp_path).photos == [tmp_path / "photo.heic"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_links_to_nowhere_are_skipped(tmp_path: Path) -> None:
    save_photo(tmp_path / "good.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    found = scan_photos(tmp_path)
    assert found.photos == [tmp_path / "good.png"]
    assert {file.reason for file in found.skipped} == {"no regular file"} and len(found.skipped) == 3


def test_no_damaged_picture_ends_the_scan(tmp_path: Path) -> None:
    save_photo(tmp_path / "good.png")
    for name, content in map(mutant, range(5000)):
        (tmp_path / name).write_bytes(content)
    found = scan_photos(tmp_path)
    assert len(found.photos) + len(found.skipped) == 5001 and len(found.skipped) > 3000
    assert all(file.is_picture and file.reason and "\n" not in file.reason for file in found.skipped)
    for photo in found.photos[:300]:
        assert read_photo(photo).image.size == upright_size(photo)[::-1]


@pytest.mark.parametrize("name", whole_pictures())
def test_undamaged_ones_of_them_are_used(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(whole_pictures()[name])
    assert set(read_photo(tmp_path / name).image.size) == {20, 24}


def test_bombs_are_refused(tmp_path: Path) -> None:
    for name, content in bombs().items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnusablePhoto):
            read_photo(tmp_path / name)
    with pytest.raises(UserError, match="no usable photo"):
        scan_photos(tmp_path)


_MEASURE = """
import json, sys
from pathlib import Path
from reading_memory import memory_of
from svft_diffusion.data.photos import UnusablePhoto, read_photo

def read(file):
    try:
        read_photo(Path(file))
    except UnusablePhoto:
        pass

read(sys.argv[1])  # so that nothing is left to import
print(json.dumps({file: memory_of(lambda: read(file)) for file in sys.argv[1:]}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measured by /proc")
def test_bombs_are_refused_without_being_unpacked(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.effect_noise((4000, 3000), 50).convert("RGB").save(good, compress_level=1)
    for name, content in bombs().items():
        (tmp_path / name).write_bytes(content)
    files = [str(good), *(str(tmp_path / name) for name in bombs())]
    folder = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder.parent), str(folder)])}
    command = [sys.executable, "-c", _MEASURE, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    used = json.loads(done.stdout)
    assert used.pop(str(good)) > 30_000_000  # the measure works
    assert max(used.values()) < 10_000_000, used
