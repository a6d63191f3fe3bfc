"""Encodings that are kept for later runs, and what training does with them."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_pipeline
from training_runs import PROMPT, short_run

from svft_diffusion.errors import UserError
from svft_diffusion.models import ModelFamily, family_of
from svft_diffusion.training.checks import check
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.encoding_cache import EncodingCache, model_digest
from svft_diffusion.training.trainer import train


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    return short_run(tmp_path)


class Counting:
    """A family that counts what it encodes."""

    def __init__(self, family: ModelFamily) -> None:
        self.family = family
        self.pictures = self.prompts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def encode_pictures(self, pixels: torch.Tensor) -> Any:
        self.pictures += len(pixels)
        return self.family.encode_pictures(pixels)

    def encode_text(self, component: str, token_ids: torch.Tensor) -> Any:
        self.prompts += len(token_ids)
        return self.family.encode_text(component, token_ids)


def test_encodings_are_made_once_and_anew_when_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "encodings"
    pixels = torch.rand(3, 3, 16, 24) * 2 - 1
    first = Counting(family_of(tiny_pipeline()))
    ids = first.token_ids([PROMPT, "a dog"])["text_encoder"]
    with torch.no_grad():
        expected, text = first.family.encode_pictures(pixels), first.family.encode_text("text_encoder", ids)

    def encode(family: Any) -> None:
        cache = EncodingCache(folder, family)
        with torch.no_grad():
            latents, states = cache.latents(pixels), cache.text("text_encoder", ids)
        torch.testing.assert_close(latents.mean, expected.mean)
        torch.testing.assert_close(latents.std, expected.std)
        assert states.keys() == text.keys() and all(torch.equal(states[name], text[name]) for name in text)

    encode(first)
    files = sorted(folder.iterdir())
    assert (first.pictures, first.prompts, len(files)) == (3, 2, 4)
    second = Counting(family_of(tiny_pipeline()))
    encode(second)
    assert (second.pictures, second.prompts) == (0, 0)

    contents = [file.read_bytes() for file in files]
    damaged = [b"", contents[1][:-7], contents[2][:-9] + bytes([contents[2][-9] ^ 1]) + contents[2][-8:], b"\xff" * 99]
    for file, content in zip(files, damaged, strict=True):
        file.write_bytes(content)
    third = Counting(family_of(tiny_pipeline()))
    encode(third)
    assert (third.pictures, third.prompts) == (3, 2)
    assert [file.read_bytes() for file in sorted(folder.iterdir())] == contents

    other = Counting(family_of(tiny_pipeline()))
    other.pipeline.vae.encoder.conv_in.weight.data[0, 0, 0, 0] += 1e-4
    EncodingCache(folder, other).latents(pixels)  # type: ignore[arg-type]
    assert other.pictures == 3


def test_digest_counts_weights_and_settings() -> None:
    vae = tiny_pipeline().vae
    first = model_digest({"vae": vae})
    assert first == model_digest({"vae": tiny_pipeline().vae})
    vae.register_to_config(scaling_factor=0.5)
    second = model_digest({"vae": vae})
    vae.decoder.conv_out.bias.data[0] += 1
    assert len({first, second, model_digest({"vae": vae}), model_digest({"vae": vae.to(torch.bfloat16)})}) == 4


def test_cached_encodings_change_nothing(config: TrainingConfig, tmp_path: Path) -> None:
    plain = train(config).adapter.read_bytes()
    cache = tmp_path / "encodings"
    for name in ("first", "second"):
        run = replace(config, encoding_cache=cache, output_dir=tmp_path / name)
        assert train(run).adapter.read_bytes() == plain
    assert any(file.name.startswith("latents-") for file in cache.iterdir())
    assert "encoding_cache" not in (tmp_path / "second" / "config.yaml").read_text("utf-8")


def test_folder_that_takes_no_file_is_refused(config: TrainingConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"--encoding_cache .*file is no folder"):
        check(dataclasses.replace(config, encoding_cache=tmp_path / "file"))
    with pytest.raises(UserError, match="can't write to"):
        check(dataclasses.replace(config, encoding_cache=tmp_path / "file" / "below"))


def _encoded(folder: Path, pictures: torch.Tensor, limit: int) -> EncodingCache:
    cache = EncodingCache(folder, family_of(tiny_pipeline()), limit)
    cache.latents(pictures)
    return cache


def _age(folder: Path, seconds: float) -> None:
    for file in folder.iterdir():
        status = file.stat()
        os.utime(file, (status.st_atime - seconds, status.st_mtime - seconds))


def test_files_used_longest_ago_make_room(tmp_path: Path) -> None:
    folder, pictures = tmp_path / "encodings", torch.rand(3, 3, 16, 24) * 2 - 1
    names = []
    for picture in pictures:
        before = set(folder.iterdir()) if folder.exists() else set()
        _encoded(folder, picture[None], 10**9)
        names.append((set(folder.iterdir()) - before).pop().name)
        _age(folder, 100)
    of_user = folder / f"notes-{'0' * 64}.safetensors"
    killed, running = (folder / f".{names[0]}.{digit * 32}.tmp" for digit in "ab")
    for file in (of_user, killed, running):
        file.write_bytes(bytes(10**6))
    os.utime(killed, (0, 0))
    size = (folder / names[0]).stat().st_size
    _encoded(folder, pictures[:1], 2 * size).evict()  # reads the oldest, which is the newest then
    assert {file.name for file in folder.iterdir()} == {names[0], names[2], of_user.name, running.name}
    _encoded(folder, pictures[1:], 0).evict()  # what a run uses stays, however much it is
    assert {file.name for file in folder.iterdir()} == {*names[1:], of_user.name, running.name}


def test_another_process_may_remove_files_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, pictures = tmp_path / "encodings", torch.rand(2, 3, 16, 24) * 2 - 1
    first = _encoded(folder, pictures[:1], 10**9)
    expected = first.latents(pictures[:1])
    _encoded(folder, pictures[1:], 0).evict()
    assert len(list(folder.iterdir())) == 1
    torch.testing.assert_close(first.latents(pictures[:1]).mean, expected.mean, rtol=0, atol=0)

    def gone(file: Path, missing_ok: bool = False) -> None:
        os.unlink(file)
        unlink(file, missing_ok=missing_ok)  # the other process was quicker

    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", gone)
    EncodingCache(folder, family_of(tiny_pipeline()), 0).evict()
    EncodingCache(folder / "nowhere", family_of(tiny_pipeline()), 0).evict()
    assert not list(folder.iterdir())


def test_a_run_keeps_its_own_encodings_alone_where_there_is_no_room(config: TrainingConfig, tmp_path: Path) -> None:
    cache = tmp_path / "encodings"
    run = replace(config, encoding_cache=cache, encoding_cache_size="1KB", max_train_steps=1)
    train(run)
    before = {file.name for file in cache.iterdir()}
    train(replace(run, resolution=24, output_dir=tmp_path / "second"))
    after = {file.name for file in cache.iterdir()}
    assert before and not {name for name in before & after if name.startswith("latents-")}
    assert "encoding_cache_size" not in (tmp_path / "second" / "config.yaml").read_text("utf-8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoding_cache_size": "5GB"}, "has no effect without --encoding_cache"),
        ({"encoding_cache_size": "lots", "encoding_cache": Path("somewhere")}, "--encoding_cache_size 'lots' is not a"),
        ({"encoding_cache_size": "-1", "encoding_cache": Path("somewhere")}, "--encoding_cache_size '-1' is not a"),
        ({"encoding_cache_size": "", "encoding_cache": Path("somewhere")}, "--encoding_cache_size '' is not a"),
    ],
)
def test_a_size_that_is_none_is_refused(config: TrainingConfig, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(replace(config, **settings))
