"""How a picture is fitted to the base model's size, and what was drawn comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svft_diffusion.editing.frame import check_mask_inside, make_frame, open_mask, open_picture, picture_digest
from svft_diffusion.errors import UserError

WIDE, TALL = (60, 40), (30, 70)


def picture_of(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [WIDE, TALL])
def test_crop_takes_the_middle(size: tuple[int, int]) -> None:
    frame = make_frame(size, (16, 16), "crop")
    left, top, right, bottom = frame.source_box
    assert right - left == bottom - top == min(size)
    assert (left, top) == (size[0] - right, size[1] - bottom)
    assert frame.fitted(picture_of(size)).size == frame.result_size == (16, 16) and not frame.is_padded


@pytest.mark.parametrize(("size", "inside"), [(WIDE, (16, 11)), (TALL, (7, 16))])
def test_padding_is_mirrored_and_cut_off_again(size: tuple[int, int], inside: tuple[int, int]) -> None:
    frame = make_frame(size, (16, 16), "pad")
    fitted = np.asarray(frame.fitted(picture_of(size)))
    assert fitted.shape == (16, 16, 3) and frame.is_padded and frame.result_size == inside
    left, top, right, bottom = frame.drawn_box
    if size == WIDE:
        assert np.array_equal(fitted[top - 1], fitted[top]) and np.array_equal(fitted[bottom], fitted[bottom - 1])
    else:
        assert np.array_equal(fitted[:, left - 1], fitted[:, left])
        assert np.array_equal(fitted[:, right], fitted[:, right - 1])
    unfitted = frame.unfitted(Image.fromarray(fitted))
    assert unfitted.size == inside and np.array_equal(np.asarray(unfitted), fitted[top:bottom, left:right])
    assert np.array_equal(
        np.asarray(frame.inside()) == 255, np.pad(np.ones(inside[::-1], bool), ((top, 16 - bottom), (left, 16 - right)))
    )


def test_squeezing_is_undone() -> None:
    frame = make_frame(WIDE, (16, 16), "resize")
    assert frame.fitted(picture_of(WIDE)).size == (16, 16)
    assert frame.unfitted(picture_of((16, 16))).size == (16, 11)


def test_a_picture_of_the_base_size_stays_as_it_is() -> None:
    picture = picture_of((24, 16))
    for fit in ("crop", "pad", "resize"):
        frame = make_frame(picture.size, (24, 16), fit)
        assert frame.fitted(picture) == picture == frame.unfitted(picture)


@pytest.mark.parametrize("fit", ["crop", "pad", "resize"])
@pytest.mark.parametrize("size", [WIDE, TALL])
def test_what_is_black_in_the_mask_keeps_its_bits(size: tuple[int, int], fit: str) -> None:
    picture = picture_of(size)
    mask = Image.new("L", size, 0)
    box = (size[0] // 2 - 4, size[1] // 2 - 4, size[0] // 2 + 4, size[1] // 2 + 3)
    mask.paste(255, box)
    mask.putpixel(box[:2], 100)  # a soft edge
    frame = make_frame(size, (16, 16), fit)
    check_mask_inside(mask, frame)
    result = np.asarray(frame.pasted(Image.new("RGB", (16, 16), "red"), picture, mask))
    black, white = np.asarray(mask) == 0, np.asarray(mask) == 255
    assert np.array_equal(result[black], np.asarray(picture)[black])
    assert (result[white] == (255, 0, 0)).all()


def test_fitted_mask_covers_all_that_is_white() -> None:
    mask = Image.new("L", WIDE, 3)  # nearly black, as JPEG leaves it
    mask.putpixel((30, 20), 255)
    fitted = np.asarray(make_frame(WIDE, (16, 16), "pad").fitted_mask(mask))
    assert set(np.unique(fitted)) == {0, 255} and 1 <= (fitted == 255).sum() <= 4


def test_mask_outside_of_the_crop_is_refused() -> None:
    mask = Image.new("L", WIDE, 0)
    mask.paste(255, (0, 0, 20, 10))
    with pytest.raises(UserError, match="--fit pad"):
        check_mask_inside(mask, make_frame(WIDE, (16, 16), "crop"))
    check_mask_inside(mask, make_frame(WIDE, (16, 16), "pad"))


def test_masks_that_can_not_be_meant(tmp_path: Path) -> None:
    for name, mask, reason in (
        ("black", Image.new("L", WIDE, 0), "black all over"),
        ("small", Image.new("L", (6, 4), 255), "6x4 pixels and the picture 60x40"),
        ("clear", Image.new("LA", WIDE, (255, 0)), "black all over"),
    ):
        mask.save(tmp_path / f"{name}.png")
        with pytest.raises(UserError, match=reason):
            open_mask(tmp_path / f"{name}.png", WIDE)
    with pytest.raises(UserError, match="no such mask"):
        open_mask(tmp_path / "none.png", WIDE)
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(UserError, match="can't be used"):
        open_picture(tmp_path / "text.png")


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    picture = picture_of(WIDE)
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "b.bmp")
    one, other = (picture_digest(open_picture(tmp_path / name)) for name in ("a.png", "b.bmp"))
    assert one == other != picture_digest(picture.transpose(Image.Transpose.ROTATE_90))
