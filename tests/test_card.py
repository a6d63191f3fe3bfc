"""The model card and the upload: any prompt leaves YAML, Markdown and examples whole, and nothing private goes out."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, RepoUrl
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from training_runs import PROMPT, short_run, trained_tensors

from svft_diffusion.adapters import runtime
from svft_diffusion.cli.arguments import Parser, add_settings, config_from_options
from svft_diffusion.cli.main import main
from svft_diffusion.errors import UserError
from svft_diffusion.files import (
    SKETCH,
    AdapterHeader,
    BaseModel,
    LayerBasis,
    digests_of_pipeline,
    pack_bases,
    read_adapter,
    read_header,
    write_adapter,
)
from svft_diffusion.files.weight_digests import digest_of_weight, digests_of_base
from svft_diffusion.models import load_pipeline
from svft_diffusion.sampling.config import SamplingConfig
from svft_diffusion.training import hub, run
from svft_diffusion.training.card import write_card
from svft_diffusion.training.checks import check_settings
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.subject_words import subject_words
from svft_diffusion.training.thumbnail import jpeg_thumbnail
from svft_diffusion.training.trainer import train

HUB_BASE = "some-account/some-model"
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
HOSTILE_PROMPTS = [
    'a photo of "sks" dog',
    "a photo of sks dog's bowl",
    "a photo of `sks` and ```sks``` dog",
    "a photo of sks dog\nin two lines\n---\nand more",
    "yes: [sks, {dog}] # & *anchor | > % @ ! - ?",
    "--sks $(touch here) $HOME \\n dog; `id`",
    "<b>sks</b> _dog_ ~~robot~~ ![x](y) | a | b |",
    "- sks",
    "null",
    "42",
    "sks 狗 🐕 \u2028 dög\u0085 \u200b",
]


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    """A run whose adapter is there and whose card is not."""
    out = tmp_path / "out"
    out.mkdir()
    base = BaseModel(
        "some-model", architecture="stable-diffusion-v1", digests=digests_of_base([digest_of_weight(torch.ones(3, 2))])
    )
    header = AdapterHeader(
        method="svft", pattern="plain", off_diagonals=0, rank=None, targets="attention", components={"unet": 1},
        base=base, trigger="sks", class_word="dog", instance_prompt="a photo of sks dog",
    )  # fmt: skip
    sketch = pack_bases({LAYER: LayerBasis(torch.zeros(0, dtype=torch.uint8), torch.zeros(4))})
    write_adapter(out / "adapter.safetensors", header, {f"{LAYER}.values": torch.ones(1234), SKETCH: sketch})
    return TrainingConfig(
        pretrained_model_name_or_path=HUB_BASE, instance_prompt="a photo of sks dog", output_dir=out, method="svft"
    )


def code_blocks(card: str, language: str) -> Iterator[str]:
    for _, block in re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", card, re.DOTALL | re.MULTILINE):
        yield block


@pytest.mark.parametrize("prompt", HOSTILE_PROMPTS)
def test_any_prompt_survives_front_matter_shell_and_python(config: TrainingConfig, prompt: str) -> None:
    picture = config.output_dir / "samples" / "step-000004-0.png"
    path = write_card(replace(config, instance_prompt=prompt, class_prompt=prompt, validation_prompt=prompt), [picture])
    card = ModelCard.load(path)
    assert card.data.instance_prompt == prompt
    assert card.data.widget == [{"text": prompt, "output": {"url": "samples/step-000004-0.png"}}]
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert {"svft-diffusion", "svft", "text-to-image"} <= set(card.data.tags)
    assert (card.data.base_model, card.data.base_model_relation) == (HUB_BASE, "adapter")

    (sample, *others) = [shlex.split(block) for block in code_blocks(card.text, "shell")]
    assert sample[:2] == ["svft-diffusion", "sample"] and [words[1] for words in others] == ["export", "merge"]
    parser = Parser(prog="sample")
    add_settings(parser, SamplingConfig)
    options = config_from_options(SamplingConfig, parser.parse_args(sample[2:]))
    assert options.prompt == [prompt] and options.adapter == ["adapter.safetensors"]
    assert options.pretrained_model_name_or_path == HUB_BASE

    programs = [ast.parse(block) for block in code_blocks(card.text, "python")]
    assert len(programs) == 3
    for program in programs:
        texts = [node.value for node in ast.walk(program) if isinstance(node, ast.Constant)]
        assert prompt in texts


@pytest.mark.parametrize("prompt", HOSTILE_PROMPTS)
def test_any_prompt_is_shown_as_it_is(config: TrainingConfig, prompt: str) -> None:
    markdown = pytest.importorskip("markdown_it")
    picture = config.output_dir / "samples" / "0.png"
    named = replace(config, instance_prompt=prompt, class_prompt=prompt, validation_prompt=prompt)
    _rewrite_header(config, instance_prompt=prompt, title=prompt)
    text = ModelCard.load(write_card(named, [picture])).text
    tokens = markdown.MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(text)
    images = [child for token in tokens for child in token.children or () if child.type == "image"]
    texts = [
        token for token in tokens if token.type == "inline" and all(child not in images for child in token.children)
    ]
    shown = [_shown(token) for token in texts]
    one_line = " ".join(prompt.split())
    assert shown[0] == one_line  # the heading
    assert shown.count(one_line) == 3  # and the prompts of subject and class, each one cell
    assert [(image.content.replace("\\", ""), image.attrs["src"]) for image in images] == [
        (one_line.replace("\\", ""), "samples/0.png")
    ]
    assert [token.content for token in tokens if token.type == "html_block"] == []
    headings = [shown[0], "Use with svft-diffusion", "Use with diffusers alone", "Training", "Terms"]
    assert [_shown(after) for token, after in pairwise(tokens) if token.type == "heading_open"] == headings


def test_card_says_what_the_file_is(config: TrainingConfig) -> None:
    text = write_card(replace(config, revision="fp 16", variant="fp16"), []).read_text(encoding="utf-8")
    header = read_header(config.output_dir / "adapter.safetensors")
    size = (config.output_dir / "adapter.safetensors").stat().st_size
    for fact in (
        "1,234 numbers",
        f"{size / 1000:,.1f} kB",
        header.base.short_fingerprint,
        "| trigger | sks |",
        "| class word | dog |",
    ):
        assert fact in text
    assert text.count("--revision='fp 16' --variant=fp16 ") == 3
    assert text.count(", revision='fp 16', variant='fp16')") == 2
    assert "widget" not in text and "license" not in text


@pytest.mark.parametrize("in_folder_above", [True, False])
def test_local_base_is_no_name_on_the_hub(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_folder_above: bool
) -> None:
    (tmp_path / "my base").mkdir()
    monkeypatch.chdir(tmp_path)
    base = str(tmp_path / "my base") if in_folder_above else "my base"
    card = ModelCard.load(write_card(replace(config, pretrained_model_name_or_path=base), []))
    assert card.data.base_model is None and "base_model_relation" not in card.data.to_dict()
    assert "path/to/my base" in card.text and str(tmp_path) not in card.content and "huggingface.co" not in card.text
    assert shlex.split(next(code_blocks(card.text, "shell")))[2] == "--pretrained_model_name_or_path=path/to/my base"


def test_embedded_base_is_no_name_on_the_hub(config: TrainingConfig) -> None:
    card = ModelCard.load(write_card(replace(config, pretrained_model_name_or_path="toybox"), []))
    assert card.data.base_model is None and "load_lora_weights" not in card.text
    assert [shlex.split(block)[1] for block in code_blocks(card.text, "shell")] == ["sample", "merge"]


@pytest.mark.parametrize(
    ("instance", "of_class", "expected"),
    [
        ("a photo of sks dog", "a photo of a dog", ("sks", "dog")),
        ("a photo of a sks robot", "a photo of a robot", ("sks", "robot")),
        ("A photo of sks dog on the beach.", "a picture of a dog", ("sks", "dog")),
        ("a photo of the ohwx zwx teddy bear, sitting", "a photo of a teddy bear", ("ohwx zwx", "teddy bear")),
        ("close-up picture of a [V] Dog", "a photo of a dog", ("[V]", "Dog")),
        ("a photo of sks, a dog", "a photo of a dog", ("sks", None)),
        ("a photo of a dog", "a photo of a dog", (None, None)),
        ("a photo of sks dog on the beach", None, ("sks dog", None)),
        ("sks dog", "dog", ("sks", "dog")),
        ("ein Foto von sks Hund", "ein Foto von Hund", ("sks", "Hund")),
        ("of", "of", (None, None)),
        (None, None, (None, None)),
    ],
)
def test_trigger_and_class_word(
    instance: str | None, of_class: str | None, expected: tuple[str | None, str | None]
) -> None:
    assert subject_words(instance, of_class) == expected


@pytest.mark.parametrize("size", [(512, 512), (700, 300), (40, 64)])
def test_thumbnail_is_small_and_holds_pixels_alone(tmp_path: Path, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = tmp_path / "noise.png"
    image = Image.fromarray(noise)
    image.info["comment"] = "secret-comment"
    exif = Image.Exif()
    exif[0x013B] = "secret-artist"
    image.save(file, exif=exif)
    encoded = jpeg_thumbnail(file)
    assert len(encoded) <= 16 * 1024 and encoded == jpeg_thumbnail(file) and b"secret" not in encoded
    with Image.open(BytesIO(encoded)) as opened:
        assert opened.format == "JPEG" and max(opened.size) == min(256, max(size)) and not opened.getexif()
        assert opened.width / opened.height == pytest.approx(size[0] / size[1], rel=0.01)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """A run that is over, with samples; its folder is only read."""
    config = replace(
        short_run(tmp_path_factory.mktemp("finished")), class_prompt="a photo of a dog", adapter_dtype="float16",
        validation_prompt="a dog", num_validation_images=2, max_train_steps=2, checkpointing_steps=1, learning_rate=0.2,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        hashed: list[object] = []
        patch.setattr(run, "digests_of_pipeline", lambda *given: hashed.append(1) or digests_of_pipeline(*given))
        patch.setattr(runtime, "digests_of_pipeline", None)  # every file takes what the run knows
        train(config)
        assert len(hashed) == 1
    return config


def test_file_holds_what_the_settings_ask_for(finished: TrainingConfig) -> None:
    adapter = finished.output_dir / "adapter.safetensors"
    header = read_header(adapter)
    assert (header.trigger, header.class_word, header.title) == ("sks", "dog", "sks dog")
    assert (header.value_dtype, header.suggested_strength, header.strength_range) == ("float16", 1.0, (0.0, 1.0))
    samples = [f"samples/step-000002-{number}.png" for number in range(2)]
    assert header.thumbnail == jpeg_thumbnail(finished.output_dir / samples[0])
    card = ModelCard.load(finished.output_dir / "README.md")
    assert [entry["output"]["url"] for entry in card.data.widget] == samples

    checkpoint = finished.output_dir / "checkpoint-2" / "adapter.safetensors"
    kept = read_header(checkpoint)
    assert (kept.value_dtype, kept.thumbnail, kept.base) == ("float32", None, header.base)
    rounded = trained_tensors(adapter)
    for name, tensor in trained_tensors(checkpoint).items():
        assert torch.equal(rounded[name], tensor.half().float()) and not torch.equal(rounded[name], tensor)


def test_resumed_run_writes_the_same_file(finished: TrainingConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished.output_dir / "checkpoint-1", out / "checkpoint-1")
    resumed = train(replace(finished, output_dir=out, resume_from_checkpoint="latest"))
    assert resumed.adapter.read_bytes() == (finished.output_dir / "adapter.safetensors").read_bytes()


def test_picture_is_left_out_on_request(finished: TrainingConfig, tmp_path: Path) -> None:
    run = replace(finished, output_dir=tmp_path / "out", max_train_steps=1, num_validation_images=1)
    header = read_header(train(replace(run, thumbnail=False, adapter_dtype="float32")).adapter)
    assert (header.thumbnail, header.value_dtype) == (None, "float32")


def test_examples_run(finished: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone who has the card, the adapter and the base does what the card says."""
    shutil.copytree(finished.pretrained_model_name_or_path, tmp_path / "path" / "to" / "tiny")
    shutil.copy(finished.output_dir / "adapter.safetensors", tmp_path)
    monkeypatch.chdir(tmp_path)
    card = ModelCard.load(finished.output_dir / "README.md").text
    for command in code_blocks(card, "shell"):
        assert main(shlex.split(command)[1:]) == 0
    pictures = []
    for program in code_blocks(card, "python"):
        seeded = program.replace(f"pipe({PROMPT!r})", f"pipe({PROMPT!r}, generator=generator)")
        names: dict[str, Any] = {"generator": torch.Generator().manual_seed(1)}
        exec(seeded, names)
        pictures.append(np.asarray(names["image"], dtype=int))
    ours, as_lora, merged = pictures
    base = load_pipeline("path/to/tiny")(PROMPT, generator=torch.Generator().manual_seed(1)).images[0]
    assert np.abs(ours - np.asarray(base, dtype=int)).mean() > 5
    assert np.abs(merged - ours).max() <= 1  # 8 bits; the sums' order differs
    assert np.abs(as_lora - ours).mean() <= 1


class FakeHub:
    """Takes what `huggingface_hub.HfApi` takes; ``failure`` is raised instead of creating a repository."""

    failure: Exception | None = None
    uploaded: list[str]

    def __init__(self, token: str | None) -> None:
        assert token == "hf_secret"

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> RepoUrl:
        assert private and exist_ok
        if FakeHub.failure is not None:
            raise FakeHub.failure
        return RepoUrl(f"https://huggingface.co/someone/{name}")

    def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], **named: str) -> None:
        files = (path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file())
        FakeHub.uploaded = sorted(filter_repo_objects(files, allow_patterns=allow_patterns))


@pytest.fixture
def upload(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> TrainingConfig:
    """The settings of an upload to a Hub that is none."""
    monkeypatch.setattr(hub, "HfApi", FakeHub)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    monkeypatch.setattr(FakeHub, "failure", None)
    return replace(config, push_to_hub=True, hub_token="hf_secret")


def test_upload_takes_what_is_listed_and_nothing_else(upload: TrainingConfig) -> None:
    out = upload.output_dir
    shared = {"README.md", "adapter.safetensors", "metrics.jsonl", "freezing.jsonl", "samples/step-000004-0.png"}
    private = {
        "config.yaml", "logs/events.out.tfevents.0.host", "checkpoint-2/adapter.safetensors", "photos/jane.png",
        "class/0.png", "samples/step-000000-0.png", ".README.md.tmp", "photos/README.md", "jane.png", "notes.txt",
    }  # fmt: skip
    for name in shared | private:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"x")
    assert hub.push_to_hub(upload, [out / "samples" / "step-000004-0.png"]) == "someone/out"
    assert set(FakeHub.uploaded) == shared


def http_error(status: int, message: str) -> HfHubHTTPError:
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, message)
    error.response = type("Response", (), {"status_code": status})()
    return error


@pytest.mark.parametrize(
    ("failure", "remedy"),
    [
        (http_error(401, "401 Client Error.\n\nInvalid token hf_secret"), "hf auth login"),
        (http_error(403, "\nForbidden: hf_secret may not\nwrite"), "write access"),
        (http_error(404, "Repository Not Found"), "check --hub_model_id"),
        (http_error(500, "Internal Error"), "Internal Error"),
        (LocalTokenNotFoundError("Token is required"), "hf auth login"),
        (HfHubHTTPError.__bases__[0]("connection refused"), "can't be reached"),
        (ConnectionError("no route to host"), "can't be reached"),
    ],
)
def test_failed_upload_is_one_line_without_the_token(upload: TrainingConfig, failure: Exception, remedy: str) -> None:
    FakeHub.failure = failure
    with pytest.raises(UserError, match="the upload failed") as refusal:
        hub.push_to_hub(upload, [])
    message = str(refusal.value)
    assert remedy in message and "\n" not in message and "hf_secret" not in message


@pytest.mark.parametrize("name", ["a/b/c", "-dog", "do--g", "dog..cat", "x" * 97, "dög", "dog.git"])
def test_impossible_repository_is_refused_before_training(upload: TrainingConfig, name: str) -> None:
    with pytest.raises(UserError, match="give another --hub_model_id") as refusal:
        check_settings(replace(upload, hub_model_id=name))
    assert "\n" not in str(refusal.value)


def test_upload_by_nobody_is_refused_before_training(upload: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="hf auth login"):
        check_settings(replace(upload, hub_token=None))
    monkeypatch.setattr(hub, "get_token", lambda: "hf_from_login")
    check_settings(replace(upload, hub_token=None, hub_model_id="someone/dog"))
    check_settings(replace(upload, hub_token=None, push_to_hub=False, hub_model_id="a/b/c"))


def _rewrite_header(config: TrainingConfig, **changes: Any) -> None:
    file = config.output_dir / "adapter.safetensors"
    header, tensors = read_adapter(file)
    write_adapter(file, replace(header, **changes), tensors)


def _holds_picture(token: Any) -> bool:
    return any(child.type == "image" for child in token.children)


def _shown(token: Any) -> str:
    """The text of an inline token, as a reader sees it."""
    return "".join(child.content if child.type != "softbreak" else "\n" for child in token.children)
