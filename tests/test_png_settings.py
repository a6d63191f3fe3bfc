"""Settings in pictures: what JSON keeps of them, and what the lines that other tools read can hold."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from svft_diffusion.files import whole_files
from svft_diffusion.sampling.parameters import parameters_text, parse_parameters
from svft_diffusion.sampling.png import is_damaged_png, read_png_settings, save_png

PIECES = [
    *"abz 019,:;\"'\\/\n\r\t<>()[]{}=|#&%\x00\x1f\x7f\u2028\u202e\ufeff\ud800é日🙂",
    "Negative prompt:", "\nNegative prompt: x", "Steps: 20, Seed: 1, Size: 1x1", "<adapter:dog:0.8>", "{token}",
    "\\n", '\\"',
]  # fmt: skip


def random_text(generator: random.Random, longest: int = 25) -> str:
    return "".join(generator.choices(PIECES, k=generator.randrange(longest)))


def random_settings(generator: random.Random) -> dict[str, Any]:
    weights = [
        generator.uniform(-2, 2),
        float(generator.randrange(3)),
        {"unet": 0.5, "text_encoder": generator.random()},
    ]
    return {
        "prompt": random_text(generator),
        "negative_prompt": random_text(generator),
        "seed": generator.randrange(2**63),
        "num_inference_steps": generator.randrange(1, 1001),
        "guidance_scale": generator.uniform(0, 30),
        "scheduler": generator.choice(["DDIM", random_text(generator)]),
        "base": random_text(generator),
        "width": 8 * generator.randrange(1, 200),
        "height": 8 * generator.randrange(1, 200),
        "adapters": [
            {"name": random_text(generator), "weight": generator.choice(weights)} for _ in range(generator.randrange(3))
        ],
        "version": random_text(generator),
    }


def test_json_keeps_ten_thousand_random_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_files, "flush_to_disk", lambda path: None)  # a disk that is waited for takes minutes
    generator = random.Random(0)
    image = Image.new("RGB", (1, 1))
    for _ in range(10_000):
        settings = random_settings(generator)
        assert read_png_settings(save_png(image, tmp_path / "picture.png", settings)) == settings


def test_parameters_keep_what_the_format_can_hold() -> None:
    """All values, whatever is in them; of prompts, all but spaces around lines and a line that begins the other one."""
    generator = random.Random(1)
    for _ in range(10_000):
        settings = random_settings(generator)
        for name in ("prompt", "negative_prompt"):
            lines = [line.strip() for line in settings[name].replace("Negative prompt:", "").split("\n")]
            settings[name] = "\n".join(lines).strip()
        if not settings["adapters"]:
            del settings["adapters"]
        assert parse_parameters(parameters_text(settings)) == settings


def test_parameters_with_a_prompt_that_begins_the_negative_one() -> None:
    """The format has no escape: every reader takes this apart alike, and JSON is what keeps it."""
    settings = {"prompt": "a\nNegative prompt: b", "num_inference_steps": 1, "guidance_scale": 2.0, "seed": 3}
    found = parse_parameters(parameters_text(settings))
    assert (found["prompt"], found["negative_prompt"]) == ("a", "b") and found["seed"] == 3


def test_parameters_of_another_tool() -> None:
    text = (
        "masterpiece, a dog\nsecond line\nNegative prompt: blurry\nworse\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 512x768, Model: v1-5, "
        'Lora hashes: "dog: 0123, cat: 4567", Version: v1.10.1'
    )
    assert parse_parameters(text) == {
        "prompt": "masterpiece, a dog\nsecond line",
        "negative_prompt": "blurry\nworse",
        "num_inference_steps": 20,
        "scheduler": "DPM++ 2M",
        "guidance_scale": 7.0,
        "seed": 42,
        "width": 512,
        "height": 768,
        "base": "v1-5",
        "version": "v1.10.1",
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "a dog: nice, very: much",
        "Steps: x, Seed: y, CFG scale: z",
        'Adapters: "x: {", Steps: , Seed: ',
        "\n" * 9,
    ],
)
def test_parameters_that_are_none(text: str) -> None:
    found = parse_parameters(text)
    assert found.keys() == {"prompt", "negative_prompt"}


@pytest.mark.parametrize("text", ["a" * 100_000, "Negative prompt:" * 6000, "\n" * 100_000, 'a: "\\' * 25_000])
def test_hostile_parameters_take_no_time(text: str) -> None:
    begin = time.perf_counter()
    parse_parameters(text)
    assert time.perf_counter() - begin < 2  # on a busy machine; quadratic time would be minutes


def test_a_picture_that_ends_early_is_damaged(tmp_path: Path) -> None:
    file = save_png(Image.effect_noise((16, 16), 50), tmp_path / "a.png", {"prompt": "x"}, [b"adapter" * 9])
    whole = file.read_bytes()
    assert not is_damaged_png(file)
    for end in (0, 20, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        file.write_bytes(whole[:end])
        assert is_damaged_png(file)
    place = whole.index(b"IDAT") + 20
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert is_damaged_png(file)
    file.write_text("something else", encoding="utf-8")
    assert not is_damaged_png(file)


def test_the_expression_is_that_of_the_usual_web_interface() -> None:
    settings = {"prompt": "p", "num_inference_steps": 3, "guidance_scale": 1.5, "seed": 9, "base": 'a "b", c: d\n'}
    last = parameters_text(settings).split("\n")[-1]
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert pairs == {"Steps": "3", "CFG scale": "1.5", "Seed": "9", "Model": '"a \\"b\\", c: d\\n"'}
