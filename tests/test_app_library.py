"""The library of the app: what it lists, takes in, deletes and brings back."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import time
import tracemalloc
import unicodedata
from pathlib import Path

import pytest
from adapter_files import ModelsOnDisk, write_models
from hostile_names import HOSTILE_NAMES
from PIL import Image
from torch import Tensor

from svft_diffusion.adapters.names import check_adapter_name
from svft_diffusion.app.shelf.library import Library
from svft_diffusion.app.shelf.trash import TRASH_FOLDER
from svft_diffusion.errors import UserError
from svft_diffusion.files import (
    SKETCH,
    AdapterHeader,
    BaseDigests,
    adapter_bytes,
    bases_of,
    layer_names,
    pack_bases,
    read_adapter,
)
from svft_diffusion.files.safe_names import safe_file_stem
from svft_diffusion.sampling.adapter_choice import sha256_of
from svft_diffusion.sampling.png import save_png
from svft_diffusion.sampling.prompt_syntax import split_prompt
from svft_diffusion.training.output_folder import working_alone


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsOnDisk:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "library"


@pytest.fixture
def library(folder: Path) -> Library:
    return Library(folder, folder / "uploads", most_upload_bytes=2**20, most_pixels=10_000)


def variant(models: ModelsOnDisk, file: Path, title: str) -> Path:
    """A small adapter, of one layer, whose content no other has."""
    header, tensors = _small_adapter(models.style)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(adapter_bytes(dataclasses.replace(header, title=title), tensors))
    return file


@functools.cache
def _small_adapter(file: Path) -> tuple[AdapterHeader, dict[str, Tensor]]:
    header, tensors = read_adapter(file)
    layer = layer_names(tensors)[0]
    digests = BaseDigests(*(kind and kind[:1] for kind in header.base.digests))
    base = dataclasses.replace(header.base, digests=digests)
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}
    sketch = pack_bases({layer: bases_of(tensors)[layer]})
    components = {layer.partition(".")[0]: 1}
    return dataclasses.replace(header, base=base, components=components), kept | {SKETCH: sketch}


def run_of(models: ModelsOnDisk, folder: Path, steps: int = 3, *, finished: bool = True) -> Path:
    """What a training leaves."""
    for step in range(1, steps + 1):
        variant(models, folder / "history" / f"step-{step}.safetensors", f"{folder.name} {step}")
    checkpoint = folder / f"checkpoint-{steps}"
    checkpoint.mkdir()
    last = folder / "history" / f"step-{steps}.safetensors"
    shutil.copy(last, checkpoint / "adapter.safetensors")
    (checkpoint / "training_state.safetensors").write_bytes(b"state")
    if finished:
        shutil.copy(last, folder / "adapter.safetensors")
    (folder / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    return folder


def names(library: Library, search: str = "") -> list[str]:
    return [entry.name for entry in library.entries(search)]


def everything(folder: Path) -> dict[str, bytes]:
    """Path -> content of all files below a folder, but for what is in the trash."""
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path.as_posix(): (folder / path).read_bytes() for path in files if TRASH_FOLDER not in path.parts}


def test_adapters_alone_are_listed(models: ModelsOnDisk, library: Library, folder: Path) -> None:
    assert library.entries() == []
    variant(models, folder / "dog.safetensors", "one")
    shutil.copytree(models.base, folder / "base")  # weights that are no adapter
    (folder / "latents.safetensors").write_bytes((8).to_bytes(8, "little") + b'{"a":{}}')
    (folder / "notes.txt").write_text("no adapter", encoding="utf-8")
    variant(models, folder / ".hidden" / "cat.safetensors", "two")
    listing = library.listing()
    assert [entry.name for entry in listing.entries] == ["dog"] and listing.damaged == []
    (entry,) = listing.entries
    assert entry.sha256 == sha256_of(entry.file) and entry.id == entry.sha256[:16]
    assert entry.size == entry.file.stat().st_size and entry.header.title == "one"
    assert library.get(entry.id) == library.by_name("dog") == entry


def test_a_training_shows_its_result_and_keeps_its_history(
    models: ModelsOnDisk, library: Library, folder: Path
) -> None:
    run_of(models, folder / "robot")
    run_of(models, folder / "killed", 2, finished=False)
    by_name = {entry.name: entry for entry in library.entries()}
    assert list(by_name) == ["killed", "robot"]
    robot = by_name["robot"]
    assert robot.file == folder / "robot" / "adapter.safetensors" and (robot.steps, robot.step) == (3, None)
    assert by_name["killed"].file.name == "step-2.safetensors"
    history = library.history(robot.id)
    assert [(step.step, step.header.title) for step in history] == [(1, "robot 1"), (2, "robot 2"), (3, "robot 3")]
    assert [step.name for step in history] == ["robot-step-1", "robot-step-2", "robot-step-3"]
    again = Library(folder, folder / "uploads")  # ids and names hold in the next session
    assert again.get(history[0].id).file == again.by_name("robot-step-1").file == history[0].file
    assert again.get(history[2].id).id == robot.id  # the last step is the result
    with pytest.raises(UserError, match="no adapter"):
        library.by_name("robot-step-9")


def test_names_are_unique_and_fit_prompts(models: ModelsOnDisk, library: Library, folder: Path) -> None:
    for number, path in enumerate(
        ["b/dog.v2.safetensors", "a/dog.v2.safetensors", "dog:1, <x>.safetensors", "clear.safetensors"]
    ):
        os.utime(variant(models, folder / path, path), (number, number))
    before = {entry.header.title: entry.name for entry in library.entries()}
    assert before["b/dog.v2.safetensors"] == "dog_v2" and before["a/dog.v2.safetensors"] == "dog_v2-2"
    for name in before.values():
        check_adapter_name(name)
        assert split_prompt(f"a <adapter:{name}:0.5>") == ("a", {name: 0.5})
    run_of(models, folder / "0" / "dog_v2")  # a later one takes nobody's name
    after = {entry.header.title: entry.name for entry in library.entries()}
    assert after.items() > before.items() and len(set(after.values())) == len(after)


def test_search_finds_by_what_the_file_says(models: ModelsOnDisk, library: Library, folder: Path) -> None:
    (folder / "runs").mkdir(parents=True)
    shutil.copytree(models.dog.parent, folder / "runs" / "rex")
    variant(models, folder / "one.safetensors", "Watercolour of a FOX")
    assert names(library) == ["one", "rex"]
    cases = {
        "fox": ["one"],
        "FOX water": ["one"],
        "sks": ["rex"],
        "svdiff": ["one"],
        "tiny": ["one", "rex"],
        "fox sks": [],
    }
    assert {search: names(library, search) for search in cases} == cases


def test_damage_is_shown_with_its_reason_and_never_ends_the_list(
    models: ModelsOnDisk, library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = variant(models, folder / "good.safetensors", "good")
    content = good.read_bytes()
    bad = {
        "empty.safetensors": b"",
        "text.safetensors": b"no adapter",
        "cut.safetensors": content[: len(content) // 2],
        "short.safetensors": content[:40],
        "flipped.safetensors": content[:-1] + bytes([content[-1] ^ 1]),
        "run/adapter.safetensors": content[:-8],
    }
    for name, data in bad.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "dangling.safetensors").symlink_to(folder / "nowhere.safetensors")
    (folder / "circle.safetensors").symlink_to(folder / "circle.safetensors")
    listing = library.listing()
    assert [entry.name for entry in listing.entries] == ["good"]
    reasons = {damaged.name: damaged.reason for damaged in listing.damaged}
    assert set(reasons) == {*bad, "dangling.safetensors", "circle.safetensors"}
    assert "digest" in reasons["flipped.safetensors"] and "cut short" in reasons["cut.safetensors"]
    assert "no longer there" in reasons["dangling.safetensors"]
    assert not [reason for reason in reasons.values() if str(folder) in reason or "\n" in reason]

    (entry,) = listing.entries  # damaged and whole again, after it was seen
    good.write_bytes(content[:-3])
    assert names(library) == []
    with pytest.raises(UserError, match="no longer in the library"):
        library.get(entry.id)
    good.write_bytes(content)
    assert library.get(entry.id).name == "good"

    resolve = Path.resolve

    def vanishing(path: Path, strict: bool = False) -> Path:
        if strict and path.name == "good.safetensors":
            path.unlink()
        return resolve(path, strict)

    os.utime(good, (1, 1))
    monkeypatch.setattr(Path, "resolve", vanishing)
    listing = library.listing()
    assert listing.entries == []
    assert "no longer there" in {damaged.name: damaged.reason for damaged in listing.damaged}["good.safetensors"]


def test_hundreds_are_listed_at_once(
    models: ModelsOnDisk, library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(300):
        variant(models, folder / f"a{number}.safetensors", f"adapter {number}")
    assert len(library.entries()) == 300
    monkeypatch.setattr("svft_diffusion.app.shelf.library.read_candidate", None)  # nothing is read again
    started = time.perf_counter()
    listed = library.entries()
    taken = time.perf_counter() - started
    assert len({entry.id for entry in listed}) == len({entry.name for entry in listed}) == 300
    assert taken < 1, f"{taken:.2f} s"
    started = time.perf_counter()
    for entry in listed:
        assert library.get(entry.id) is not None
    assert (time.perf_counter() - started) / 300 < 0.01


def test_the_base_is_compared_once_for_adapters_alike(
    models: ModelsOnDisk, library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        variant(models, folder / f"style{number}.safetensors", str(number))
    shutil.copy(models.foreign, folder / "foreign.safetensors")
    compared = []
    from svft_diffusion.app.shelf import base_fit

    original = base_fit.matches_of_folder
    monkeypatch.setattr(base_fit, "matches_of_folder", lambda *given: compared.append(given) or original(*given))
    reasons = {entry.name: library.fits(entry, str(models.base)) for entry in library.entries()}
    assert [name for name, reason in reasons.items() if reason is None] == ["style0", "style1", "style2"]
    assert reasons["foreign"] is not None and "was trained on the base" in reasons["foreign"]
    assert str(folder) not in reasons["foreign"] and str(models.base) not in reasons["foreign"]
    assert len(compared) == 2
    foreign = library.by_name("foreign")
    assert library.fits(foreign, str(models.other_base)) is None
    assert "no such base" in str(library.fits(foreign, str(folder / "nowhere")))
    assert library.fits(foreign, "nobody/knows-this-model") is None  # found out when it is loaded


def test_uploads_are_decided_by_content(models: ModelsOnDisk, library: Library, folder: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "gradio" / "0123abcd"
    temporary.mkdir(parents=True)
    upload = temporary / "blob"
    shutil.copy(models.dog, upload)
    entry = library.add(upload, "Rex.png")  # whatever it is called
    assert (entry.name, entry.file.parent) == ("Rex", folder / "uploads")
    assert library.add(upload, "other.safetensors") == entry  # it is there already
    assert len(everything(folder)) == 1

    save_png(Image.new("RGB", (8, 8)), upload, {}, [models.style.read_bytes()])
    assert library.add(upload, "picture.safetensors").header.method == "svdiff"
    both = [variant(models, tmp_path / f"{number}.safetensors", f"{number}").read_bytes() for number in range(2)]
    save_png(Image.new("RGB", (8, 8)), upload, {}, both)
    assert [one.header.title for one in library.add_all(upload, "both.png")] == ["0", "1"]
    before = everything(folder)

    content = models.foreign.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    huge = bytearray(b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR" + (60_000).to_bytes(4, "big") * 2 + bytes(9))
    save_png(Image.new("RGB", (8, 8)), tmp_path / "plain.png", {"prompt": "a dog"})
    refused = {
        b"": "empty",
        b"MZ" + bytes(100): "no safetensors",
        b"\x80\x04\x95" + bytes(100): "pickled",
        b"<!DOCTYPE html><html>": "web page",
        content[:-9]: "cut short",
        flipped: "digest",
        bytes(2**20 + 1): "larger than the 1 MB",
        bytes(huge): "60000 x 60000 pixels",
        (tmp_path / "plain.png").read_bytes(): "carries no adapter",
        (tmp_path / "plain.png").read_bytes()[:-20]: "cut short",
    }
    for data, reason in refused.items():
        upload.write_bytes(data)
        with pytest.raises(UserError, match=reason) as caught:
            library.add(upload, "C:\\me\\my <b>upload.safetensors")
        message = str(caught.value)
        assert "my <b>upload.safetensors" in message and "\n" not in message
        assert not [part for part in (str(tmp_path), "gradio", "0123abcd", "C:", "blob") if part in message]
    upload.unlink()
    with pytest.raises(UserError, match="did not arrive") as caught:
        library.add(upload, "x.safetensors")
    assert str(temporary) not in str(caught.value)
    assert everything(folder) == before


def test_names_of_uploads_lead_nowhere(models: ModelsOnDisk, library: Library, folder: Path, tmp_path: Path) -> None:
    assert len(set(HOSTILE_NAMES)) >= 200
    outside = set(os.listdir(tmp_path))
    (tmp_path / "upload").touch()
    for number, name in enumerate(HOSTILE_NAMES):
        stem = safe_file_stem(name)
        assert re.fullmatch(r"[\w-]+", stem) and not stem.startswith("-") and len(stem.encode()) < 100
        assert unicodedata.normalize("NFKC", stem) == stem
        assert not re.fullmatch(r"(con|prn|aux|nul|clock|com\d|lpt\d)", stem, re.IGNORECASE)
        if number % 10 == 0 or len(name) > 100:
            entry = library.add(variant(models, tmp_path / "upload", str(number)), name)
            assert entry.file.parent == folder / "uploads" and entry.file.is_file()
    assert set(os.listdir(tmp_path)) - outside == {"library", "upload"}
    assert {path.parent for path in folder.rglob("*") if path.is_file()} == {folder / "uploads"}
    for name in HOSTILE_NAMES:
        with pytest.raises(UserError):
            library.get(name)
        with pytest.raises(UserError):
            library.delete(name)
        with pytest.raises(UserError):
            library.undo(name)


def test_uploads_replace_nothing(models: ModelsOnDisk, library: Library, folder: Path, tmp_path: Path) -> None:
    (folder / "uploads").mkdir(parents=True)
    (folder / "uploads" / "DOG.safetensors").write_text("something else", encoding="utf-8")
    run_of(models, folder / "training" / "cat")
    stems = []
    for number, name in enumerate(["dog.safetensors", "dog.safetensors", "cat.png", "Dog.safetensors"]):
        entry = library.add(variant(models, tmp_path / "upload", str(number)), name)
        stems.append(entry.file.stem)
        assert entry.name == entry.file.stem
    assert stems == ["dog-2", "dog-3", "cat-2", "Dog-4"]
    assert (folder / "uploads" / "DOG.safetensors").read_text(encoding="utf-8") == "something else"


@pytest.mark.skipif(os.name == "nt", reason="folders are made read-only by permissions")
def test_a_library_that_cannot_be_written_says_so(models: ModelsOnDisk, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    library = Library(tmp_path, tmp_path / "file" / "uploads")
    with pytest.raises(UserError, match="the app can't write its folder") as caught:
        library.add(models.dog, "dog.safetensors")
    assert str(tmp_path) not in str(caught.value)


def test_what_is_deleted_comes_back(models: ModelsOnDisk, library: Library, folder: Path) -> None:
    run_of(models, folder / "robot")
    variant(models, folder / "uploads" / "dog.safetensors", "dog")
    shutil.copy(folder / "uploads" / "dog.safetensors", folder / "copy.safetensors")
    before = everything(folder)
    assert names(library) == ["dog", "robot"]
    robot, dog = library.by_name("robot"), library.by_name("dog")
    first = library.history(robot.id)[0]
    with pytest.raises(UserError, match="history of a training"):
        library.delete(first.id)
    tokens = [library.delete(robot.id), library.delete(dog.id)]
    assert names(library) == []
    assert list(everything(folder)) == ["robot/metrics.jsonl"]  # what a training measured is no adapter
    for gone in (robot.id, dog.id, first.id):
        with pytest.raises(UserError, match="no longer in the library"):
            library.get(gone)
    again = Library(folder, folder / "uploads")
    for token in tokens:
        again.undo(token)
        with pytest.raises(UserError, match="nothing to undo"):
            again.undo(token)
    assert everything(folder) == before
    assert [entry.id for entry in library.entries()] == [dog.id, robot.id]


def test_what_is_forgotten_does_not_come_back(models: ModelsOnDisk, library: Library, folder: Path) -> None:
    for name in ("robot", "robot-2"):
        run_of(models, folder / name)
    first, second = (library.delete(library.by_name(name).id) for name in ("robot", "robot-2"))
    library.forget(folder / "robot")
    library.forget(folder / "no-such-folder")
    library.forget(folder.parent / "elsewhere")
    assert not [path for path in (folder / TRASH_FOLDER / first).rglob("*") if path.is_file()]
    library.undo(second)
    assert names(library) == ["robot-2"]


def test_the_trash_keeps_for_a_month(models: ModelsOnDisk, library: Library, folder: Path) -> None:
    for name in ("old", "new"):
        variant(models, folder / f"{name}.safetensors", name)
    old, new = (library.delete(library.by_name(name).id) for name in ("old", "new"))
    (folder / TRASH_FOLDER / "mine").mkdir()
    for name in (old, "mine"):
        os.utime(folder / TRASH_FOLDER / name, (time.time() - 31 * 86400,) * 2)
    library.empty_trash()
    assert {path.name for path in (folder / TRASH_FOLDER).iterdir()} == {new, "mine"}
    with pytest.raises(UserError, match="nothing to undo"):
        library.undo(old)
    library.undo(new)
    assert names(library) == ["new"]


def test_of_files_of_other_tools_the_header_alone_is_read(library: Library, tmp_path: Path) -> None:
    large = Library(tmp_path, tmp_path / "uploads", most_upload_bytes=2**30)
    header = b'{"lora.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    file = tmp_path / "upload"
    with file.open("wb") as written:
        written.write(len(header).to_bytes(8, "little") + header)
        written.truncate(900 * 2**20)
    tracemalloc.start()
    try:
        assert large.is_foreign(file, "lora.safetensors")
        with pytest.raises(UserError, match="larger than the 1 MB"):
            library.add(file, "lora.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_undo_replaces_nothing(models: ModelsOnDisk, library: Library, folder: Path) -> None:
    run_of(models, folder / "robot")
    token = library.delete(library.by_name("robot").id)
    after = everything(folder)
    variant(models, folder / "robot" / "adapter.safetensors", "new")
    with pytest.raises(UserError, match=r"there is another robot/adapter\.safetensors"):
        library.undo(token)
    assert set(everything(folder)) == {*after, "robot/adapter.safetensors"}
    (folder / "robot" / "adapter.safetensors").unlink()
    library.undo(token)
    assert library.by_name("robot").steps == 3


def test_a_training_at_work_keeps_its_files(models: ModelsOnDisk, library: Library, folder: Path) -> None:
    run_of(models, folder / "robot")
    before = everything(folder)
    robot = library.by_name("robot")
    with working_alone(folder / "robot"), pytest.raises(UserError, match="training still writes robot") as caught:
        library.delete(robot.id)
    assert str(folder) not in str(caught.value)
    assert everything(folder) == before
    library.delete(robot.id)
    assert names(library) == []


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_links_do_not_lead_out(models: ModelsOnDisk, library: Library, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    secret = variant(models, outside / "secret.safetensors", "secret")
    inside = variant(models, folder / "inside.safetensors", "inside")
    (folder / "linked.safetensors").symlink_to(secret)
    (folder / "linked").symlink_to(outside)
    (folder / "alias.safetensors").symlink_to(inside)
    listing = library.listing()
    assert [entry.header.title for entry in listing.entries] == ["inside"]
    assert [(one.name, "outside" in one.reason) for one in listing.damaged] == [("linked.safetensors", True)]

    run_of(models, folder / "robot")
    robot = library.by_name("robot")
    shutil.move(folder / "robot", outside / "robot")
    (folder / "robot").symlink_to(outside / "robot")  # between listing and deleting
    before = everything(outside)
    with pytest.raises(UserError, match="no longer in the library"):
        library.delete(robot.id)
    (folder / TRASH_FOLDER).symlink_to(outside)
    with pytest.raises(UserError, match="a link leads out of the library"):
        library.delete(listing.entries[0].id)
    assert everything(outside) == before and inside.is_file()

    (folder / TRASH_FOLDER).unlink()
    (folder / "robot").unlink()
    shutil.move(outside / "robot", folder / "robot")
    token = library.delete(robot.id)
    shutil.rmtree(folder / "robot")
    (outside / "robot").mkdir()
    (folder / "robot").symlink_to(outside / "robot")
    with pytest.raises(UserError, match="a link leads out of the library"):
        library.undo(token)
    assert list((outside / "robot").iterdir()) == []


def test_uploads_may_lie_elsewhere(models: ModelsOnDisk, folder: Path, tmp_path: Path) -> None:
    library = Library(folder, tmp_path / "uploads")
    entry = library.add(models.dog, "dog.safetensors")
    assert entry.file.parent == tmp_path / "uploads" and names(library) == ["dog"]
    token = library.delete(entry.id)
    assert names(library) == []
    library.undo(token)
    assert library.get(entry.id) == entry
