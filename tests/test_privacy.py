"""What is meant for sharing says nothing of the person, the machine or the photos that it was made with."""

from __future__ import annotations

import base64
import getpass
import json
import platform
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import RepoUrl
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from privacy_scan import leaks
from safetensors.torch import save_file
from training_runs import FREEZING, short_run

from svft_diffusion.cli.main import main
from svft_diffusion.training import hub
from svft_diffusion.training.trainer import train

USER, HOST, PERSON, CAPTION, TOKEN = "zaphod-b", "heart-of-gold-7", "trillian-m", "at-marvins-place", "hf_Magrathea42"


@dataclass(frozen=True)
class Shared:
    """Files meant for others, and what none of them may hold."""

    home: Path
    files: list[Path]
    markers: list[str]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Everything that the commands write for others, made by a user, on a host and from photos with telling names."""
    root = tmp_path_factory.mktemp("machine")
    home = root / "home" / USER
    home.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("USER", "LOGNAME", "USERNAME"):
            patch.setenv(name, USER)
        for name in ("HOME", "USERPROFILE"):
            patch.setenv(name, str(home))
        for name in ("HOSTNAME", "COMPUTERNAME"):
            patch.setenv(name, HOST)
        patch.setattr(socket, "gethostname", lambda: HOST)
        patch.setattr(platform, "node", lambda: HOST)
        patch.setattr(getpass, "getuser", lambda: USER)
        patch.setattr(hub, "HfApi", FakeHub)
        patch.chdir(home)
        files = [*_trained(home), *_made_with(home)]
    yield Shared(home, files, [USER, HOST, PERSON, CAPTION, TOKEN, str(root), root.name, "personal-class"])


class FakeHub:
    """Notes which files of the folder would be uploaded."""

    uploaded: list[Path]

    def __init__(self, token: str | None) -> None:
        assert token == TOKEN

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> RepoUrl:
        assert private and exist_ok
        return RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], commit_message: str, **_: Any) -> None:
        paths = {path.relative_to(folder_path).as_posix(): path for path in folder_path.rglob("*") if path.is_file()}
        FakeHub.uploaded = [paths[name] for name in filter_repo_objects(paths, allow_patterns=allow_patterns)]
        (folder_path / "message.txt").write_text(commit_message, encoding="utf-8")
        FakeHub.uploaded.append(folder_path / "message.txt")


def _trained(home: Path) -> list[Path]:
    """A run with every kind of file, in the folder that holds its photos too; what it uploads."""
    config = short_run(home)
    assert config.instance_data_dir is not None
    exif = Image.Exif()
    exif[0x013B] = PERSON  # the artist
    for number, photo in enumerate(sorted(config.instance_data_dir.glob("*.png"))):
        named = home / "out" / "photos" / f"{PERSON}-{number}.jpg"
        named.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(photo) as opened:
            opened.save(named, exif=exif, comment=PERSON)
        named.with_suffix(".txt").write_text(f"a photo of sks dog {CAPTION}", encoding="utf-8")
    train(
        replace(
            config,
            **FREEZING,
            instance_data_dir=home / "out" / "photos",
            caption_source="txt",
            train_text_encoder=True,
            with_prior_preservation=True,
            class_data_dir=home / "out" / "personal-class",
            class_prompt="a photo of a dog",
            num_class_images=2,
            prior_generation_num_inference_steps=2,
            factor_cache=home / "factors",
            validation_prompt="a photo of sks dog on the beach",
            num_validation_images=2,
            report_to="tensorboard",
            push_to_hub=True,
            hub_token=TOKEN,
            hub_model_id="someone/dog",
        )
    )
    return FakeHub.uploaded


def _made_with(home: Path) -> list[Path]:
    """What the other commands write, given absolute paths."""
    base, adapter, made = str(home / "tiny"), str(home / "out" / "adapter.safetensors"), home / "made"
    pictures, merged = made / "pictures", made / "merged"
    options = ["--prompt", "a photo of sks dog", "--num_images", "2", "--num_inference_steps", "2", "--embed_adapter"]
    commands = [
        ["sample", "--pretrained_model_name_or_path", base, "--adapter", adapter, *options, "--output_dir", pictures],
        ["merge", adapter, "--base", base, "-o", merged],
        ["blend", f"{adapter}:0.5", f"{adapter}:0.25", "-o", made / "blend.safetensors"],
        ["shrink", adapter, "--energy", "0.5", "--base", base, "-o", made / "shrink.safetensors"],
    ]
    for kind in ("kohya", "diffusers", "comfy-full"):
        commands.append(["export", adapter, "--base", base, "--format", kind, "-o", made / f"{kind}.safetensors"])
    commands += [
        ["merge", adapter, "--base", base, "-o", made / "merged.safetensors"],
        ["import", made / "kohya.safetensors", "--base", base, "-o", made / "imported.safetensors"],
        ["inspect", pictures / "000_a-photo-of-sks-dog_seed0.png", "--extract", made / "extracted"],
    ]
    for command in commands:
        assert main([str(part) for part in command]) == 0, command
    return sorted(path for path in made.rglob("*") if path.is_file())


def test_everything_is_there(shared: Shared) -> None:
    names = {path.name for path in shared.files}
    assert {
        "adapter.safetensors", "README.md", "metrics.jsonl", "freezing.jsonl", "step-000004-0.png", "grid.png",
        "blend.safetensors", "shrink.safetensors", "kohya.safetensors", "diffusers.safetensors",
        "comfy-full.safetensors", "model_index.json", "merged.safetensors", "imported.safetensors", "message.txt",
    } <= names  # fmt: skip
    assert any(path.parent.name == "extracted" for path in shared.files)
    assert not names & {"config.yaml", "training_state.json", f"{PERSON}-0.jpg", "step-000000-0.png"}
    assert not any(name.startswith("events.") for name in names)


def test_shared_files_tell_nothing_of_their_maker(shared: Shared) -> None:
    assert leaks(shared.files, shared.markers) == []


def test_files_that_stay_on_the_machine_do(shared: Shared) -> None:
    """The markers are where they are looked for: the settings of the run name the folders."""
    assert leaks([shared.home / "out" / "config.yaml"], [USER])
    assert leaks((shared.home / "out" / "photos").glob("*.jpg"), [PERSON])


def test_token_is_in_no_file_at_all(shared: Shared) -> None:
    files = [path for path in shared.home.rglob("*") if path.is_file() and path.suffix != ".factors"]
    assert len(files) > len(shared.files)
    assert [leak for leak in leaks(files, [TOKEN]) if "token" in leak or TOKEN in leak] == []


def test_scan_finds_what_is_hidden(tmp_path: Path) -> None:
    secret = "/home/zaphod/x"
    exif = Image.Exif()
    exif[0x9C9D] = "zaphod".encode("utf-16-le")  # the author, as Windows writes it
    image = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
    chunks = PngInfo()
    chunks.add_text("note", "x" * 50 + "zaphod", zip=True)
    international = PngInfo()
    international.add_itxt("note", "x" * 50 + "zaphod", zip=True)
    image.save(tmp_path / "zip.png", pnginfo=chunks)
    image.save(tmp_path / "itxt.png", pnginfo=international)
    image.save(tmp_path / "exif.jpg", exif=exif)
    image.save(tmp_path / "exif.png", exif=exif)
    packed = base64.b64encode(f"thumbnail of {secret}".encode()).decode()
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"own": json.dumps({"picture": f"data:{packed}"})})
    escaped = json.dumps({"name": "zaphod"}).replace("z", "\\u007a")
    (tmp_path / "a.json").write_text(escaped, encoding="utf-8")
    (tmp_path / "wide.bin").write_bytes(b"\x00" + "ZAPHOD".encode("utf-16-be"))
    (tmp_path / "zaphod.txt").write_text("nothing", encoding="utf-8")
    files = sorted(tmp_path.iterdir())
    assert {leak.partition(":")[0] for leak in leaks(files, ["zaphod"])} == {path.name for path in files}
    assert leaks(files, ["trillian"]) == ["a.safetensors: an absolute path ('/home/zaphod/x')"]


@pytest.mark.parametrize("text", ["C:\\Users", "see (/tmp/x)", "mail someone@example.org", "hf_abcdefgh12"])
def test_scan_finds_paths_addresses_and_tokens(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.md"
    file.write_text(f"said: {text}", encoding="utf-8")
    assert len(leaks([file], [])) == 1
    file.write_text("https://example.org/home/x samples/tmp/x a:b hf_hub @ path/to/base", encoding="utf-8")
    assert leaks([file], []) == []
