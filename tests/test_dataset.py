"""Captions, subjects, the order of pictures, and what is cut from them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from svft_diffusion.data.buckets import automatic_sizes, nearest_size, parse_sizes
from svft_diffusion.data.captions import read_captions
from svft_diffusion.data.concepts import read_concepts
from svft_diffusion.data.cutting import VARIANTS_KEPT, Cutter
from svft_diffusion.data.dataset import Picture, pictures_with_prompts
from svft_diffusion.data.order import PictureOrder, ShuffledOrder, Turns
from svft_diffusion.data.photos import scan_photos
from svft_diffusion.errors import UserError
from svft_diffusion.training.subjects import folder_notes

PROMPT = "a photo of sks dog"


def save_photo(path: Path, size: tuple[int, int] = (30, 20), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def save_noise(path: Path, size: tuple[int, int]) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return noise


def as_pixels(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1


# Captions


def prompts_of(folder: Path, caption_source: str) -> list[str]:
    found = scan_photos(folder)
    return [p.prompt for p in pictures_with_prompts(found, PROMPT, read_captions(folder, found, caption_source))]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    save_photo(folder / "a.png")
    save_photo(folder / "b.png")
    return folder


def test_captions_from_text_files(photos: Path) -> None:
    (photos / "b.txt").write_text("a photo of sks dog\n on the beach ", encoding="utf-8")
    assert prompts_of(photos, "txt") == [PROMPT, "a photo of sks dog on the beach"]
    assert prompts_of(photos, "none") == [PROMPT] * 2
    (photos / "a.txt").write_text("  ", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.txt is empty"):
        prompts_of(photos, "txt")
    (photos / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"a\.txt can't be read as UTF-8"):
        prompts_of(photos, "txt")


def test_captions_that_nobody_asked_for_are_told(photos: Path) -> None:
    def told(source: str) -> list[str]:
        found = scan_photos(photos)
        notes = folder_notes(photos, found, read_captions(photos, found, source))
        return [note for note in notes if "captions lie beside the photos" in note]

    assert told("none") == []
    photo = scan_photos(photos).photos[0]
    (photos / "metadata.jsonl").write_text(f'{{"file_name": "{photo.name}", "text": "a"}}', encoding="utf-8")
    assert "--caption_source metadata uses them" in told("none")[0]
    photo.with_suffix(".txt").write_text("a dog", encoding="utf-8")
    assert "--caption_source txt uses them" in told("none")[0]
    assert told("txt") == told("metadata") == []


def test_captions_from_metadata(photos: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"no picture")
    lines = [
        {"file_name": "b.png", "text": "sks dog\u2028 at  night", "other": 3},
        {"file_name": "broken.jpg", "text": "never seen"},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\r\n"
    (photos / "metadata.jsonl").write_text(text, encoding="utf-8")
    assert prompts_of(photos, "metadata") == [PROMPT, "sks dog at night"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"file_name": "a.png"}', "line 2: 'text' is missing"),
        ('{"file_name": "a.png", "texts": "x"}', "line 2: 'text' is missing, did you mean 'texts'"),
        ('{"file_name": "a.png", "text": " "}', "line 2: 'text' must be a text that is not empty"),
        ('{"file_name": 3, "text": "x"}', "line 2: 'file_name' must be a text"),
        ('{"file_name": "c.png", "text": "x"}', "line 2: no file 'c.png' in the folder"),
        (
            '{"file_name": "../a.png", "text": "x"}',
            r"line 2: no file '\.\./a\.png' in the folder, did you mean 'a.png'",
        ),
        ('{"file_name": "b.png", "text": "x"}', "line 2: 'b.png' has a line already"),
        ("[" * 100_000, "line 2: no JSON"),
    ],
)
def test_wrong_metadata_names_the_line(photos: Path, line: str, message: str) -> None:
    first = '{"file_name": "b.png", "text": "sks dog"}'
    (photos / "metadata.jsonl").write_text(f"{first}\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=message) as refusal:
        prompts_of(photos, "metadata")
    assert "\n" not in str(refusal.value)


def test_metadata_must_be_there_and_hold_something(photos: Path) -> None:
    with pytest.raises(UserError, match=r"needs .*metadata\.jsonl, which is not there"):
        prompts_of(photos, "metadata")
    (photos / "metadata.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no caption"):
        prompts_of(photos, "metadata")
    (photos / "metadata.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="can't be read as UTF-8"):
        prompts_of(photos, "metadata")


# Subjects


def test_concepts_from_json_and_yaml(tmp_path: Path) -> None:
    listed = [
        {"instance_prompt": "sks dog", "instance_data_dir": "dog", "class_prompt": "dog", "class_data_dir": "dogs"},
        {"instance_prompt": "zwx cat", "instance_data_dir": "cat"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(listed), encoding="utf-8")
    lines = ["- instance_prompt: sks dog", "  instance_data_dir: dog", "  class_prompt: dog", "  class_data_dir: dogs"]
    lines += ["- {instance_prompt: zwx cat, instance_data_dir: cat}"]
    (tmp_path / "list.yaml").write_text("\n".join(lines), encoding="utf-8")
    dog, cat = read_concepts(tmp_path / "list.json")
    assert [dog, cat] == read_concepts(tmp_path / "list.yaml")
    assert dog.class_data_dir == Path("dogs") and cat.instance_data_dir == Path("cat") and cat.class_prompt is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no YAML"),
        ("{}", "must hold a list"),
        ("[]", "must hold a list"),
        ("[3]", "subject 1: expected instance_prompt"),
        ("[{instance_promt: x, instance_data_dir: y}]", "'instance_promt', did you mean 'instance_prompt'"),
        ("[{instance_prompt: x}]", "subject 1: instance_data_dir is missing"),
        ("[{instance_prompt: ' ', instance_data_dir: y}]", "subject 1: instance_prompt is missing"),
        ("[{instance_prompt: [x], instance_data_dir: y}]", "subject 1: instance_prompt: expected text"),
        ("[{instance_prompt: x, instance_data_dir: y}, {instance_prompt: z, instance_data_dir: ./y}]", "same photos"),
        ("[{instance_prompt: x, instance_data_dir: y}, {instance_prompt: 'x ', instance_data_dir: z}]", "own rare wor"),
        ("[" * 20_000, "no YAML"),
        ("[2020-13-77]", "no YAML"),
    ],
)  # fmt: skip
def test_wrong_lists_of_concepts(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as refusal:
        read_concepts(tmp_path / "list.yaml")
    assert "\n" not in str(refusal.value)


def test_list_of_concepts_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't read --concepts_list"):
        read_concepts(tmp_path / "nowhere.json")
    (tmp_path / "latin.json").write_bytes(b'[{"instance_prompt": "\xe9"}]')
    with pytest.raises(UserError, match="no UTF-8 text"):
        read_concepts(tmp_path / "latin.json")


# The order


def test_order_covers_every_picture_in_each_pass() -> None:
    order = ShuffledOrder(5, seed=1, purpose="instance")
    places = [order.locate(sample) for sample in range(15)]
    for pass_number in range(3):
        part = places[5 * pass_number : 5 * pass_number + 5]
        assert sorted(index for index, _ in part) == [0, 1, 2, 3, 4]
        assert {number for _, number in part} == {pass_number}
    assert len({tuple(index for index, _ in places[start : start + 5]) for start in (0, 5, 10)}) > 1
    assert ShuffledOrder(5, seed=1, purpose="instance").locate(13) == places[13]


def test_one_subject_and_shape_keep_the_plain_order() -> None:
    plain = ShuffledOrder(5, seed=1, purpose="instance")
    order = PictureOrder([0] * 5, ["square"] * 5, turn_length=1, seed=1, purpose="instance")
    assert [order.locate(sample) for sample in range(20)] == [plain.locate(sample) for sample in range(20)]


def test_turns_are_shared_as_said() -> None:
    turns = Turns([3, 1, 2], seed=4, purpose="shapes")
    located = [turns.locate(turn) for turn in range(60)]
    for start in range(0, 60, 6):
        assert Counter(group for group, _ in located[start : start + 6]) == {0: 3, 1: 1, 2: 2}
    for group in range(3):
        assert [before for g, before in located if g == group] == list(range(sum(g == group for g, _ in located)))


def test_subjects_are_seen_equally_often() -> None:
    subjects = [0] * 6 + [1] * 2
    order = PictureOrder(subjects, [None] * 8, turn_length=1, seed=3, purpose="instance")
    seen = [order.locate(sample) for sample in range(48)]
    for start in range(0, 48, 2):
        assert {subjects[index] for index, _ in seen[start : start + 2]} == {0, 1}
    assert Counter(index for index, _ in seen) == {**dict.fromkeys(range(6), 4), 6: 12, 7: 12}
    assert order.locate(17) == seen[17]  # no state
    classes = PictureOrder([0] * 5 + [1] * 9, [None] * 14, turn_length=1, seed=3, purpose="class")
    assert [classes.locate(n)[0] < 5 for n in range(48)] == [subjects[index] == 0 for index, _ in seen]


@pytest.mark.parametrize("subjects", [[0] * 7, [0, 1, 0, 1, 0, 0, 1]])
def test_batches_are_of_one_shape_and_fair(subjects: list[int]) -> None:
    shapes = ["wide", "wide", "tall", "wide", "wide", "tall", "square"]
    order = PictureOrder(subjects, shapes, turn_length=3, seed=3, purpose="instance")
    indices = [order.locate(sample)[0] for sample in range(3 * 7 * 4 * 12)]
    for start in range(0, len(indices), 3):
        assert len({(shapes[index], subjects[index]) for index in indices[start : start + 3]}) == 1
    counts = Counter(indices)
    for subject in set(subjects):
        # Whole rounds of a subject: as many turns for each shape as it has pictures.
        of_subject = [counts[index] for index in range(7) if subjects[index] == subject]
        assert len(set(of_subject)) == 1
    again = PictureOrder(subjects, shapes, turn_length=3, seed=3, purpose="instance")
    assert [again.locate(sample)[0] for sample in reversed(range(60))] == indices[59::-1]


# Shapes


def test_listed_and_automatic_sizes() -> None:
    assert parse_sizes("1024,1024;768,1360") == [(1024, 1024), (768, 1360)]
    assert parse_sizes(" 64 , 128 ; 128,64; ") == [(64, 128), (128, 64)] and parse_sizes("auto") is None
    for resolution, multiple in ((512, 8), (1024, 16), (64, 8), (96, 32)):
        sizes = automatic_sizes(resolution, multiple)
        assert sizes[0] == (resolution, resolution) and len(set(sizes)) == len(sizes) > 1
        for height, width in sizes:
            assert height % multiple == width % multiple == 0 and height * width <= resolution**2
            assert height * width > 0.75 * resolution**2 and (width, height) in sizes
    assert automatic_sizes(512) == [
        (512, 512), (448, 576), (576, 448), (384, 640), (640, 384), (320, 704), (704, 320)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "512", "512,512,512", "a,b", "512x512", "64,64;", "-8,8", "8,0", "60,64", "64,64;64,64"]
)
def test_wrong_sizes_are_refused(text: str) -> None:
    if text == "64,64;":
        assert parse_sizes(text) == [(64, 64)]
        return
    with pytest.raises(UserError, match="--aspect_ratio_buckets"):
        parse_sizes(text)


def test_nearest_size_by_shape() -> None:
    sizes = [(512, 512), (384, 640), (640, 384)]
    assert nearest_size(100, 100, sizes) == (512, 512)
    assert nearest_size(100, 400, sizes) == (384, 640) and nearest_size(4000, 1000, sizes) == (640, 384)
    assert nearest_size(100, 120, sizes) == (512, 512) and nearest_size(100, 140, sizes) == (384, 640)


# Cuts


@pytest.mark.parametrize("size", [(30, 20), (20, 31), (200, 48), (16, 16), (5, 9)])
@pytest.mark.parametrize("target", [(16, 16), (24, 16)])
def test_cuts_are_of_the_size_and_in_range(tmp_path: Path, size: tuple[int, int], target: tuple[int, int]) -> None:
    picture = Picture(save_photo(tmp_path / "photo.png", size, "white"), "a photo")
    for center_crop in (True, False):
        cut = Cutter((target,), center_crop, "bilinear", seed=3).cut(picture, variant=0)
        assert cut.pixels.shape == (3, *target) and cut.pixels.dtype == torch.float32 and cut.mask is None
        assert torch.equal(cut.pixels, torch.ones_like(cut.pixels))
        height, width, top, left, *cut_size = cut.sizes.tolist()
        assert (width, height) == size and tuple(cut_size) == target and (top == 0 or left == 0)


def test_random_cuts_follow_from_seed_and_variant(tmp_path: Path) -> None:
    noise = save_noise(tmp_path / "photo.png", (80, 16))
    picture = Picture(tmp_path / "photo.png", "a photo")
    cutter = Cutter(((16, 16),), center_crop=False, interpolation="nearest", seed=3)
    lefts = [int(cutter.cut(picture, variant).sizes[3]) for variant in range(6)]
    assert len(set(lefts)) > 2
    for variant, left in enumerate(lefts):
        assert torch.equal(cutter.cut(picture, variant).pixels, as_pixels(noise[:, left : left + 16]))
    middle = Cutter(((16, 16),), center_crop=True, interpolation="nearest", seed=3).cut(picture, 5)
    assert torch.equal(middle.pixels, as_pixels(noise[:, 32:48])) and middle.sizes.tolist()[2:4] == [0, 32]


def test_half_of_the_variants_are_flipped(tmp_path: Path) -> None:
    noise = save_noise(tmp_path / "photo.png", (16, 16))
    picture = Picture(tmp_path / "photo.png", "a photo")
    cutter = Cutter(((16, 16),), True, "nearest", seed=0, random_flip=True)
    flips = [torch.equal(cutter.cut(picture, n).pixels, as_pixels(noise[:, ::-1])) for n in range(40)]
    plain = [torch.equal(cutter.cut(picture, n).pixels, as_pixels(noise)) for n in range(40)]
    assert all(flip != straight for flip, straight in zip(flips, plain, strict=True))
    assert all(flips[n] != flips[n + 1] for n in range(0, 40, 2))  # of every pair, one
    assert 0 < sum(flips[::2]) < 20  # and by chance which
    assert [flips[n] for n in range(40)] == [
        torch.equal(cutter.cut(picture, n).pixels, as_pixels(noise[:, ::-1])) for n in range(40)
    ]


def test_flip_counts_the_left_edge_as_it_is_seen(tmp_path: Path) -> None:
    save_noise(tmp_path / "photo.png", (40, 16))
    picture = Picture(tmp_path / "photo.png", "a photo")
    plain = Cutter(((16, 16),), False, "nearest", seed=0)
    flipping = Cutter(((16, 16),), False, "nearest", seed=0, random_flip=True)
    lefts = [(int(plain.cut(picture, n).sizes[3]), int(flipping.cut(picture, n).sizes[3])) for n in range(8)]
    assert all(seen in (left, 24 - left) for left, seen in lefts) and any(seen != left for left, seen in lefts)


def test_as_many_variants_are_kept_as_differ(tmp_path: Path) -> None:
    square = Picture(save_photo(tmp_path / "square.png", (20, 20)), "")
    wide = Picture(save_photo(tmp_path / "wide.png", (40, 20)), "")
    plain, center = (Cutter(((16, 16),), middle, "nearest", 0) for middle in (False, True))
    assert [plain.number_of_variants(picture) for picture in (square, wide)] == [1, VARIANTS_KEPT]
    assert [center.number_of_variants(picture) for picture in (square, wide)] == [1, 1]
    plain, center = (Cutter(((16, 16),), middle, "nearest", 0, random_flip=True) for middle in (False, True))
    assert [plain.number_of_variants(picture) for picture in (square, wide)] == [2, VARIANTS_KEPT]
    assert [center.number_of_variants(picture) for picture in (square, wide)] == [2, 2]
    shapes = Cutter(((16, 16), (16, 32)), False, "nearest", 0)
    assert [shapes.size_of(picture) for picture in (square, wide)] == [(16, 16), (16, 32)]
    assert shapes.number_of_variants(wide) == 1 and shapes.number_of_variants(wide, (16, 16)) == VARIANTS_KEPT
    assert shapes.cut(wide, 0).pixels.shape == (3, 16, 32)


# Masks


def masked_cut(photo: Path, **options: object) -> torch.Tensor | None:
    cutter = Cutter(((16, 16),), center_crop=True, interpolation="nearest", seed=0, masked=True, **options)  # type: ignore[arg-type]
    return cutter.cut(Picture(photo, ""), 0).mask


def test_mask_is_cut_and_flipped_with_its_photo(tmp_path: Path) -> None:
    photo = save_photo(tmp_path / "dog.jpg", (32, 16))
    assert masked_cut(photo) is None
    mask = np.zeros((16, 32), dtype=np.uint8)
    mask[4:, 8:12] = 255  # the left quarter of the middle square, below its top quarter
    Image.fromarray(mask).save(tmp_path / "dog.mask.png")
    expected = torch.zeros(1, 16, 16)
    expected[:, 4:, :4] = 1
    cut = masked_cut(photo)
    assert cut is not None and torch.equal(cut, expected)
    cutter = Cutter(((16, 16),), True, "nearest", seed=0, random_flip=True, masked=True)
    masks = [cutter.cut(Picture(photo, ""), variant).mask for variant in (0, 1)]
    assert masks[0] is not None and masks[1] is not None and torch.equal(masks[0].flip(-1), masks[1])
    assert torch.equal(masks[0], expected) or torch.equal(masks[1], expected)


def test_alpha_is_a_mask_and_a_file_beside_the_photo_comes_first(tmp_path: Path) -> None:
    image = Image.new("RGBA", (16, 16), "red")
    image.paste((0, 0, 0, 0), (0, 0, 16, 8))
    image.save(tmp_path / "dog.png")
    cut = masked_cut(tmp_path / "dog.png")
    assert cut is not None and cut[:, :8].sum() == 0 and cut[:, 8:].min() == 1
    Image.new("L", (32, 32), 255).save(tmp_path / "dog.mask.png")  # of another size, but of the same shape
    cut = masked_cut(tmp_path / "dog.png")
    assert cut is not None and torch.equal(cut, torch.ones(1, 16, 16))


def test_transparent_parts_of_a_mask_are_outside(tmp_path: Path) -> None:
    """As drawn on a layer of its own: white where the subject is, and nothing elsewhere."""
    photo = save_photo(tmp_path / "dog.jpg", (16, 16))
    mask = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 16, 8))
    mask.save(tmp_path / "dog.mask.png")
    cut = masked_cut(photo)
    assert cut is not None and cut[:, :8].min() == 1 and cut[:, 8:].max() == 0
    Image.new("RGBA", (16, 16), (255, 255, 255, 0)).save(tmp_path / "dog.mask.png")
    with pytest.raises(UserError, match="black all over"):
        masked_cut(photo)


def test_wrong_masks_are_refused(tmp_path: Path) -> None:
    photo = save_photo(tmp_path / "dog.jpg", (32, 16))
    mask = tmp_path / "dog.mask.png"
    Image.new("L", (16, 32), 255).save(mask)
    with pytest.raises(UserError, match=r"dog\.mask\.png has 16x32 pixels and its photo 32x16"):
        masked_cut(photo)
    Image.new("L", (32, 16), 0).save(mask)
    with pytest.raises(UserError, match="black all over"):
        masked_cut(photo)
    mask.write_bytes(b"no picture")
    with pytest.raises(UserError, match="can't be used: no readable picture"):
        masked_cut(photo)
    Image.new("RGBA", (32, 16), (0, 0, 0, 0)).save(tmp_path / "ghost.png")
    with pytest.raises(UserError, match="transparent all over"):
        masked_cut(tmp_path / "ghost.png")


def test_photo_that_changed_is_named(tmp_path: Path) -> None:
    photo = save_photo(tmp_path / "dog.jpg")
    cutter = Cutter(((16, 16), (16, 24)), True, "nearest", 0)
    photo.write_bytes(b"")
    for look in (cutter.size_of, lambda picture: cutter.cut(picture, 0, (16, 16))):
        with pytest.raises(UserError, match=r"dog\.jpg can't be used any more"):
            look(Picture(photo, ""))  # type: ignore[operator]
    photo.unlink()
    with pytest.raises(UserError, match=r"dog\.jpg can't be used any more"):
        cutter.cut(Picture(photo, ""), 0, (16, 16))
