"""Photos from people's folders: what is skipped, and how odd files become RGB pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from svft_diffusion.data import photos
from svft_diffusion.data.dataset import Picture, ShuffledOrder, SquareCrop, pictures_with_prompts
from svft_diffusion.data.photos import UnusablePhoto, open_photo, scan_photos
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
    }


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


@pytest.mark.parametrize("size", [(30, 20), (20, 31), (200, 48), (16, 16), (5, 9)])
def test_crops_are_squares_in_range(tmp_path: Path, size: tuple[int, int]) -> None:
    picture = Picture(save_photo(tmp_path / "photo.png", size, "white"), "a photo")
    for center_crop in (True, False):
        pixels = SquareCrop(16, center_crop, "bilinear", seed=3).pixels(picture, variant=0)
        assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
        assert torch.equal(pixels, torch.ones_like(pixels))


def test_random_crops_follow_from_seed_and_variant(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (16, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    picture = Picture(tmp_path / "photo.png", "a photo")
    crop = SquareCrop(16, center_crop=False, interpolation="nearest", seed=3)
    assert torch.equal(crop.pixels(picture, 1), crop.pixels(picture, 1))
    assert len({crop.pixels(picture, variant).sum().item() for variant in range(6)}) > 2
    middle = SquareCrop(16, center_crop=True, interpolation="nearest", seed=3).pixels(picture, 5)
    expected = torch.from_numpy(noise[:, 32:48].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(middle, expected)


def test_order_covers_every_picture_in_each_pass() -> None:
    order = ShuffledOrder(5, seed=1, purpose="instance")
    places = [order.locate(sample) for sample in range(15)]
    for pass_number in range(3):
        part = places[5 * pass_number : 5 * pass_number + 5]
        assert sorted(index for index, _ in part) == [0, 1, 2, 3, 4]
        assert {number for _, number in part} == {pass_number}
    assert len({tuple(index for index, _ in places[start : start + 5]) for start in (0, 5, 10)}) > 1
    assert ShuffledOrder(5, seed=1, purpose="instance").locate(13) == places[13]


def test_captions_from_sidecar_files(tmp_path: Path) -> None:
    save_photo(tmp_path / "a.png")
    save_photo(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("a photo of sks dog\n on the beach ", encoding="utf-8")
    found = scan_photos(tmp_path)
    prompts = [picture.prompt for picture in pictures_with_prompts(found, "a photo of sks dog", "txt")]
    assert prompts == ["a photo of sks dog", "a photo of sks dog on the beach"]
    prompts = [picture.prompt for picture in pictures_with_prompts(found, "a photo of sks dog", "none")]
    assert prompts == ["a photo of sks dog"] * 2
    (tmp_path / "a.txt").write_text("  ", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.txt is empty"):
        pictures_with_prompts(found, "a photo of sks dog", "txt")
