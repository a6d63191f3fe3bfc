"""``inspect`` and ``verify``: what they say of adapters and pictures, and that no file speaks to the terminal."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import ModelsOnDisk, write_models
from PIL import Image
from tiny_models import tiny_pipeline

from svft_diffusion import SiVAConfig, SVDiffConfig, SVFTConfig, VectorFitConfig, save_adapter
from svft_diffusion.adapters import SpectralConfig, add_training_adapter
from svft_diffusion.adapters.alignment import layers_by_name
from svft_diffusion.adapters.layers import matrix_of
from svft_diffusion.cli.main import run_command
from svft_diffusion.files import AdapterMetadata, read_adapter, write_adapter
from svft_diffusion.files.names import components_of
from svft_diffusion.inspection.card import method_in_words
from svft_diffusion.inspection.facts import block_of, facts_of_adapter
from svft_diffusion.sampling.png import save_png
from svft_diffusion.terminal import json_text, printable

Output = Callable[..., tuple[int, str, str]]

CONFIGS: dict[str, SpectralConfig] = {
    "svft plain": SVFTConfig(train_bias=True),
    "svft banded": SVFTConfig(pattern="banded", off_diagonals=2),
    "svft random": SVFTConfig(pattern="random", off_diagonals=1),
    "svft top-k": SVFTConfig(pattern="top_k", off_diagonals=1, rank=8),
    "svft official": SVFTConfig(pattern="banded", off_diagonals=1, init="official"),
    "svdiff": SVDiffConfig(),
    "vectorfit": VectorFitConfig(),
    "siva": SiVAConfig(fraction=0.4),
    "siva random": SiVAConfig(fraction=0.4, select="random"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Output:
    """Runs a command: exit code, standard output, standard error."""

    def run(command: str, *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command(command, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def described(file: Path, target: Path, **fields: Any) -> Path:
    """A copy of an adapter with other fields in its header."""
    header, tensors = read_adapter(file)
    return write_adapter(target, dataclasses.replace(header, **fields), tensors)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("value_dtype", ["float32", "float16"])
def test_norms_are_those_of_the_update(tmp_path: Path, name: str, value_dtype: str) -> None:
    config, pipe = CONFIGS[name], tiny_pipeline(0)
    generator = torch.Generator().manual_seed(1)
    for values in add_training_adapter(pipe, config, "new"):
        values.data.copy_(0.01 * torch.randn(values.shape, generator=generator))
    file = tmp_path / "a.safetensors"
    save_adapter(pipe, "new", file, metadata=AdapterMetadata(base_name="tiny", value_dtype=value_dtype))
    facts = facts_of_adapter(file.read_bytes(), "a")
    layers = layers_by_name(components_of(pipe), "new")
    assert [norm.name for norm in facts.layers] == sorted(layers) and len(layers) > 40
    tolerance = 2e-3 if value_dtype == "float16" else 1e-4
    for norm in facts.layers:
        delta = matrix_of(layers[norm.name].kind, layers[norm.name].get_delta_weight("new")).detach()
        found = float(delta.double().norm())
        if facts.exact_norms:
            assert norm.update == pytest.approx(found, rel=tolerance)
        else:
            assert found <= norm.update * (1 + tolerance)
        parts = layers[norm.name].trained_parts("new")
        assert norm.values == sum(part.numel() for part in parts.values())
        assert (norm.shifts > 0) == bool({"bias", "norm"} & parts.keys())
    assert math.hypot(*(block.update for block in facts.blocks)) == pytest.approx(
        math.hypot(*(layer.update for layer in facts.layers))
    )
    assert sum(block.layers for block in facts.blocks) == len(layers)
    assert facts.exact_norms == (config.method != "svdiff")


def test_sizes_add_up(models: ModelsOnDisk) -> None:
    content = models.dog.read_bytes()
    sizes = facts_of_adapter(content, "dog").sizes
    tensors = read_adapter(models.dog)[1]
    assert sizes.file == len(content) == sizes.header + sizes.values + sizes.sketch
    assert sizes.sketch == tensors["sketch"].numel()
    assert sizes.values == sum(4 * tensor.numel() for name, tensor in tensors.items() if name != "sketch")


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", "unet.down_blocks.0"),
        ("unet.mid_block.attentions.0.proj_in", "unet.mid_block"),
        ("unet.conv_in", "unet.conv_in"),
        ("unet.time_embedding.linear_1", "unet.time_embedding"),
        ("transformer.transformer_blocks.17.attn.to_q", "transformer.transformer_blocks.17"),
        ("text_encoder.text_model.encoder.layers.3.mlp.fc1", "text_encoder.encoder.layers.3"),
        ("text_encoder.text_model.embeddings.token_embedding", "text_encoder.embeddings"),
        ("text_encoder_3.encoder.block.11.layer.0.SelfAttention.q", "text_encoder_3.encoder.block.11"),
    ],
)
def test_blocks_of_layers(layer: str, block: str) -> None:
    assert block_of(layer) == block


def test_the_card_says_what_the_adapter_is(models: ModelsOnDisk, tmp_path: Path, output: Output) -> None:
    file = described(
        models.dog,
        tmp_path / "dog.safetensors",
        title="My dog",
        description="A small brown dog.",
        class_word="dog",
        instance_prompt="a photo of sks dog",
        class_prompt="a photo of a dog",
        suggested_strength=0.8,
        strength_range=(0.25, 1.5),
        thumbnail=b"\xff\xd8\xff" + bytes(1200),
        training={"max_train_steps": 300, "learning_rate": 0.05, "lr_scheduler": "linear"},
    )
    code, text, error = output("inspect", file)
    assert code == 0 and error == ""
    header = read_adapter(file)[0]
    for said in (
        "My dog", "A small brown dog.", "SVFT", "the diagonal", "all singular triplets", "40 in unet",
        "12 in text_encoder", "attention+feed-forward", "1,248 spectral values", "float32", "sketch", "tiny",
        header.base.short_fingerprint, "52 stored", "sks", "a photo of sks dog", "a photo of a dog", "0.8 suggested",
        "from 0.25 to 1.5", "1.2 kB", "max_train_steps = 300", "lr_scheduler = linear", "torch", "unet.mid_block",
        "###",
    ):  # fmt: skip
        assert said in text, said
    assert "mid_block.attentions" not in text
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q" in output("inspect", file, "--layers")[1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("svft plain", "SVFT, a sparse matrix between the singular vectors; the diagonal; all singular triplets"),
        ("svft banded", "a band of 2 diagonals on each side"),
        ("svft random", "random places, as many as a band of 1"),
        ("svft top-k", "the leading 8 singular triplets"),
        ("svdiff", "SVDiff, a shift of each singular value; all singular triplets"),
        ("siva", "SiVA, some of the singular values; 40% of the singular values, bottom"),
    ],
)
def test_methods_in_words(models: ModelsOnDisk, name: str, words: str) -> None:
    config, header = CONFIGS[name], read_adapter(models.dog)[0]
    fields = ("method", "pattern", "off_diagonals", "rank", "fraction", "select")
    assert words in method_in_words(dataclasses.replace(header, **{field: getattr(config, field) for field in fields}))


def test_a_training_folder_stands_for_the_adapter_in_it(models: ModelsOnDisk, output: Output) -> None:
    assert output("inspect", models.dog.parent) == output("inspect", models.dog)
    assert output("verify", models.dog.parent) == output("verify", models.dog)


def test_json_holds_everything(models: ModelsOnDisk, output: Output) -> None:
    code, text, error = output("inspect", models.dog, "--json")
    found = json.loads(text)
    assert code == 0 and error == ""
    assert found["kind"] == "adapter" and found["method"] == "svft" and found["trigger"] == "sks"
    assert found["bytes"]["file"] == models.dog.stat().st_size
    assert found["base"]["digests"] == {"stored": 52, "float16": 52, "bfloat16": 52}
    assert len(found["layers"]) == 52 and found["trained"] == {"values": 1248}
    assert found["metadata"]["modelspec.sai_model_spec"] and "svft_diffusion" not in found["metadata"]


# Pictures


@pytest.fixture
def picture(models: ModelsOnDisk, tmp_path: Path) -> Path:
    """Carries both adapters; its settings know the first."""
    facts = facts_of_adapter(models.dog.read_bytes(), "dog")
    settings = {
        "prompt": "a photo of sks dog",
        "seed": 7,
        "adapters": [{"name": "dog", "weight": 0.8, "sha256": facts.sha256}],
    }
    contents = [models.dog.read_bytes(), models.style.read_bytes()]
    return save_png(Image.new("RGB", (9, 6)), tmp_path / "made.png", settings, contents)


def test_a_picture_shows_its_settings_and_adapters(picture: Path, output: Output) -> None:
    code, text, _ = output("inspect", picture)
    assert code == 0
    for said in ("a photo of sks dog", "seed", "7", "carries the adapter dog, which acted at weight 0.8", "SVDiff"):
        assert said in text, said
    found = json.loads(output("inspect", picture, "--json")[1])
    assert found["kind"] == "picture" and found["settings"]["seed"] == 7
    assert [adapter["weight"] for adapter in found["adapters"]] == [0.8, None]
    assert found["adapters"][0]["name"] == "dog"
    assert [adapter["method"] for adapter in found["adapters"]] == ["svft", "svdiff"]


def test_adapters_are_taken_out_of_a_picture(
    models: ModelsOnDisk, picture: Path, tmp_path: Path, output: Output
) -> None:
    folder = tmp_path / "new" / "adapters"
    code, text, _ = output("inspect", picture, "--extract", folder)
    first, second = sorted(folder.iterdir())
    assert code == 0 and f"wrote {folder / 'dog.safetensors'}" in text
    by_name = {file.stem: file.read_bytes() for file in (first, second)}
    assert by_name.pop("dog") == models.dog.read_bytes() and list(by_name.values()) == [models.style.read_bytes()]
    (folder / "dog.safetensors").write_bytes(b"mine")
    code, _, error = output("inspect", picture, "--extract", folder)
    assert code == 2 and "there already" in error and (folder / "dog.safetensors").read_bytes() == b"mine"
    assert output("inspect", picture, "--extract", folder, "--overwrite")[0] == 0
    assert (folder / "dog.safetensors").read_bytes() == models.dog.read_bytes()


@pytest.mark.parametrize("name", ["../../outside", "/outside", "C:\\outside", "a/b", "..", "con\0", "\x1b[2J"])
def test_a_name_in_a_picture_leads_nowhere_else(
    models: ModelsOnDisk, tmp_path: Path, output: Output, name: str
) -> None:
    content = models.dog.read_bytes()
    settings = {"adapters": [{"name": name, "weight": 1, "sha256": facts_of_adapter(content, "dog").sha256}]}
    file = save_png(Image.new("RGB", (4, 4)), tmp_path / "in" / "x.png", settings, [content])
    assert output("inspect", file, "--extract", tmp_path / "in" / "out")[0] == 0
    inside = [found for found in tmp_path.rglob("*") if found.is_file()]
    assert len(inside) == 2 and all(found.parent.name in ("in", "out") for found in inside)


def test_names_of_extracted_files_are_apart_on_every_system(
    models: ModelsOnDisk, tmp_path: Path, output: Output
) -> None:
    contents = [file.read_bytes() for file in (models.dog, models.style, models.foreign)]
    adapters = [
        {"name": name, "weight": 1, "sha256": facts_of_adapter(content, name).sha256}
        for name, content in zip(("Dog", "dog", "con"), contents, strict=True)
    ]
    file = save_png(Image.new("RGB", (4, 4)), tmp_path / "x.png", {"adapters": adapters}, contents)
    assert output("inspect", file, "--extract", tmp_path / "out")[0] == 0
    found = {extracted.name: extracted.read_bytes() for extracted in (tmp_path / "out").iterdir()}
    assert found == dict(
        zip(("Dog.safetensors", "dog-2.safetensors", "con_adapter.safetensors"), contents, strict=True)
    )


def test_inspecting_loads_no_model_library(models: ModelsOnDisk) -> None:
    code = (
        "import sys; from svft_diffusion.cli.main import run_command; run_command('inspect', sys.argv[1:]); "
        "print(sorted({'diffusers', 'transformers', 'peft'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, str(models.dog)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.endswith("###\n[]\n")


def test_pictures_without_adapters(models: ModelsOnDisk, tmp_path: Path, output: Output) -> None:
    bare = save_png(Image.new("RGB", (4, 4)), tmp_path / "bare.png", {"prompt": "a dog"})
    code, text, _ = output("inspect", bare)
    assert code == 0 and "a dog" in text and "carries no adapter" in text
    code, _, error = output("inspect", bare, "--extract", tmp_path / "out")
    assert code == 2 and "carries no adapter" in error and not (tmp_path / "out").exists()
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    code, _, error = output("inspect", tmp_path / "other.png")
    assert code == 2 and error.count("\n") == 1
    code, _, error = output("inspect", models.dog, "--extract", tmp_path / "out")
    assert code == 2 and "no PNG picture" in error


# Untrusted text

HOSTILE = "\x1b[2J\x1b]0;title\x07 \x9b31m \r\n\t\x08\x00\x7f \u202egnp.exe\u2066 \u2028\u200b \ud800 plain"


def is_safe(text: str) -> bool:
    return all(
        character == "\n" or unicodedata.category(character)[0] not in "CZ" or character == " " for character in text
    )


def test_text_that_is_printed_cannot_command_a_terminal() -> None:
    shown = printable(HOSTILE)
    assert is_safe(shown) and "\n" not in shown and shown.endswith("plain") and "\\x1b[2J" in shown
    assert printable("Ein größeres Bild, 犬") == "Ein größeres Bild, 犬"
    assert printable("abcdef", 3) == "abc..."
    assert is_safe(json_text({HOSTILE: [HOSTILE]})) and json.loads(json_text(HOSTILE)) == HOSTILE


@pytest.mark.parametrize("options", [[], ["--layers"], ["--json"]])
def test_no_header_commands_the_terminal(
    models: ModelsOnDisk, tmp_path: Path, output: Output, options: list[str]
) -> None:
    texts = ("title", "description", "trigger", "class_word", "instance_prompt", "class_prompt")
    training = {HOSTILE: HOSTILE, "list": [HOSTILE, {HOSTILE: HOSTILE}]}
    file = described(models.dog, tmp_path / "x.safetensors", training=training, **dict.fromkeys(texts, HOSTILE))
    code, text, error = output("inspect", file, *options)
    assert code == 0 and is_safe(text) and error == "" and "plain" in text
    code, text, error = output("verify", file, *[option for option in options if option == "--json"])
    assert code == 0 and is_safe(text + error)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_no_picture_commands_the_terminal(
    models: ModelsOnDisk, tmp_path: Path, output: Output, options: list[str]
) -> None:
    content = models.dog.read_bytes()
    settings = {
        name: HOSTILE for name in ("prompt", "negative_prompt", "seed", "scheduler", "base", "width", "height", HOSTILE)
    }
    adapters = [{"name": HOSTILE, "weight": 1, "sha256": facts_of_adapter(content, "dog").sha256}]
    file = save_png(
        Image.new("RGB", (4, 4)), tmp_path / "x.png", {**settings, "adapters": adapters}, [content, b"no adapter"]
    )
    code, text, error = output("inspect", file, *options)
    assert code == 2 and is_safe(text + error) and error.count("\n") == 1
    file = save_png(Image.new("RGB", (4, 4)), tmp_path / "x.png", {**settings, "adapters": adapters}, [content])
    code, text, error = output("inspect", file, *options)
    assert code == 0 and is_safe(text + error) and "plain" in text


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_no_file_name_commands_the_terminal(models: ModelsOnDisk, tmp_path: Path, output: Output, command: str) -> None:
    file = tmp_path / "\x1b[2J\n\x07.safetensors"
    missing = output(command, file)
    file.write_bytes(models.dog.read_bytes())
    present = output(command, file)
    file.write_bytes(b"no adapter")
    damaged = output(command, file)
    assert [missing[0], present[0], damaged[0]] == [2, 0, 2]
    assert all(is_safe(text + error) for _, text, error in (missing, present, damaged))
    assert missing[2].count("\n") == damaged[2].count("\n") == 1


def test_letters_that_the_output_lacks_are_escaped(
    models: ModelsOnDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = described(models.dog, tmp_path / "x.safetensors", title="犬")
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr("sys.stdout", narrow)
    assert run_command("inspect", [str(file)]) == 0
    narrow.flush()
    assert b"title        \\u72ac" in narrow.buffer.getvalue()  # type: ignore[attr-defined]  # of BytesIO


# verify


def test_verify_without_a_base(models: ModelsOnDisk, output: Output) -> None:
    code, text, error = output("verify", models.dog)
    assert code == 0 and error == "" and text.count("\n") == 1
    assert "whole" in text and "1,248 finite values in 52 layers" in text


def test_verify_measures_the_update_on_the_base(models: ModelsOnDisk, output: Output) -> None:
    code, text, _ = output("verify", models.dog, models.style, "--base", models.base, "--json")
    results = json.loads(text)
    assert code == 0
    for result in results:
        assert result["ok"] and result["problem"] is None
        assert result["weights"] == {"matched": 52, "rounded": 0, "total": 52}
        assert 0 <= result["update_error"]["total"] < 1e-5


def test_verify_tells_weights_that_agree_when_rounded(models: ModelsOnDisk, tmp_path: Path, output: Output) -> None:
    pipe = tiny_pipeline(0).to(torch.float16)
    pipe.save_pretrained(tmp_path / "half")
    code, text, _ = output("verify", models.dog, "--base", tmp_path / "half", "--json")
    (result,) = json.loads(text)
    assert code == 0 and result["weights"] == {"matched": 52, "rounded": 52, "total": 52}
    assert 0 < result["update_error"]["total"] < 0.05
    assert "52 only when rounded to 16 bit" in output("verify", models.dog, "--base", tmp_path / "half")[1]


def test_verify_counts_the_weights_of_another_base(models: ModelsOnDisk, tmp_path: Path, output: Output) -> None:
    pipe = tiny_pipeline(0)
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.add_(0.1)
    pipe.save_pretrained(tmp_path / "tuned")
    code, text, error = output("verify", models.dog, "--base", tmp_path / "tuned")
    assert code == 2 and text == "" and error.count("\n") == 1 and "51 of 52" in error
    code, text, _ = output("verify", models.dog, "--base", tmp_path / "tuned", "--json")
    (result,) = json.loads(text)
    assert code == 2 and not result["ok"] and result["weights"]["matched"] == 51 and "51 of 52" in result["problem"]


def test_verify_names_every_file_and_fails_if_one_does(models: ModelsOnDisk, tmp_path: Path, output: Output) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(models.dog.read_bytes()[:-1])
    code, text, error = output("verify", models.dog, cut, models.foreign, "--base", models.base)
    lines = text.splitlines()
    assert code == 2 and error == "error: 2 of 3 files failed\n" and len(lines) == 3
    assert ["failed" in line for line in lines] == [False, True, True]
    assert lines[0].startswith(str(models.dog)) and "0 of 52" in lines[2]


def test_verify_leaves_no_trace_of_a_file_in_the_next(models: ModelsOnDisk, output: Output) -> None:
    together = output("verify", models.style, models.dog, models.style, "--base", models.base)[1].splitlines()
    alone = output("verify", models.style, "--base", models.base)[1].splitlines()
    assert together[0] == together[2] == alone[0]


def test_verify_needs_no_base_model_that_is_not_there(models: ModelsOnDisk, tmp_path: Path, output: Output) -> None:
    code, text, error = output("verify", models.dog, "--base", tmp_path / "nowhere")
    assert code == 2 and text == "" and "no such base model folder" in error
