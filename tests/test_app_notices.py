"""What visitors are told besides their pictures: errors, and prompts that are too long."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

gradio = pytest.importorskip("gradio")

from svft_diffusion.app.context import shows_user_errors  # noqa: E402
from svft_diffusion.app.drawing.gallery import details_of  # noqa: E402
from svft_diffusion.app.drawing.picture_request import PictureRequest, SavedPicture, words_on  # noqa: E402
from svft_diffusion.app.drawing.studio import Studio  # noqa: E402
from svft_diffusion.errors import UserError  # noqa: E402
from svft_diffusion.sampling.png import read_png_settings  # noqa: E402
from svft_diffusion.sampling.sample import SamplingConfig, sample  # noqa: E402


@pytest.mark.parametrize(
    ("problem", "told", "with_trace"),
    [
        (UserError("no <b>dog</b>"), "no &lt;b&gt;dog&lt;/b&gt;", False),
        (KeyError("/home/ada/secret"), "something went wrong (KeyError); the app's terminal has the details", True),
    ],
)
def test_errors_are_told_in_one_line_and_go_away(problem: Exception, told: str, with_trace: bool) -> None:
    @shows_user_errors
    def fails() -> None:
        raise problem

    @shows_user_errors
    def fails_later() -> Iterator[int]:
        yield 1
        raise problem

    later = fails_later()
    assert next(later) == 1
    for call in (fails, later.__next__):
        with pytest.raises(gradio.Error) as caught:
            call()
        assert caught.value.message == told and caught.value.print_exception is with_trace
        assert caught.value.duration == 10


def test_notices_of_handlers_stay_as_they_are() -> None:
    notice = gradio.Error("as it is", duration=3)

    @shows_user_errors
    def fails() -> None:
        raise notice

    with pytest.raises(gradio.Error) as caught:
        fails()
    assert caught.value is notice


def test_words_beyond_the_text_encoder_are_told(tmp_path: Path) -> None:
    studio = Studio(tmp_path / "app", device=torch.device("cpu"))
    request = PictureRequest(
        "toybox", " ".join(["red"] * 22 + ["robot", "on_the", "beach"]), num_inference_steps=1, width=16, height=16
    )
    (long,) = studio.generate_pictures(request)
    assert "beach" in long.not_read and "red" not in long.not_read
    settings = read_png_settings(long.path)
    assert ("Not read", long.not_read) in details_of(settings)
    said = words_on([long])
    assert said.startswith("The prompt is too long for the base model") and r"on \_ the" in said
    assert len(words_on([dataclasses.replace(long, not_read="word " * 12_000)])) < 400
    (short,) = studio.generate_pictures(dataclasses.replace(request, prompt="a red robot"))
    assert short.not_read == words_on([short]) == "" and "prompt_not_read" not in read_png_settings(short.path)

    config = SamplingConfig(
        "toybox", prompt=[request.prompt], num_inference_steps=1, width=16, height=16, output_dir=tmp_path / "command"
    )
    (picture,) = sample(config).pictures
    assert read_png_settings(picture)["prompt_not_read"] == long.not_read


def test_hidden_pictures_and_long_prompts_are_both_told() -> None:
    said = words_on([SavedPicture(Path("a.png"), 0, True, "the end")])
    assert said == (
        "It was blacked out by the base model's safety checker; another seed or prompt may pass it. "
        "The prompt is too long for the base model, which did not read its end: the end"
    )
