"""The adapter file: what is written is read back, and nothing else is."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sealed_files import sealed
from tiny_models import tiny_text_encoder
from torch import Tensor, nn

from svft_diffusion.errors import UserError
from svft_diffusion.files import (
    FORMAT_VERSION,
    SKETCH,
    AdapterHeader,
    BaseDigests,
    BaseModel,
    LayerBasis,
    bases_of,
    layer_names,
    pack_bases,
    read_adapter,
    read_header,
    split_tensor_name,
    write_adapter,
)
from svft_diffusion.files.adapter_file import METADATA_KEY
from svft_diffusion.files.model_spec import THUMBNAIL_KEY
from svft_diffusion.files.names import canonical_name, module_path
from svft_diffusion.files.weight_digests import digest_of_weight, digests_of_base


def some_digests(number: int) -> BaseDigests:
    return digests_of_base([digest_of_weight(torch.full((2, 3), float(index))) for index in range(number)])


HEADER = AdapterHeader(
    method="svft",
    pattern="banded",
    off_diagonals=2,
    rank=None,
    targets="attention",
    components={"unet": 3, "text_encoder": 1},
    base=BaseModel("toy", digests=some_digests(4)),
    init="official",
    seed=-7,
    train_bias=True,
    train_norm=False,
    norm_shift="scalar",
    trigger="sks",
    instance_prompt="a photo of sks dög",
    class_prompt="a photo of a dog",
    suggested_strength=0.9,
    training={"learning_rate": 0.05, "steps": 3, "seeds": [1, 2], "resume": None},
    libraries={"torch": "2.0"},
)
TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
Q_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
BASES = {
    TO_Q: LayerBasis(torch.arange(7, dtype=torch.uint8), torch.tensor([1.5, -2e-7, 3e9, 0.0])),
    Q_PROJ: LayerBasis(torch.zeros(0, dtype=torch.uint8), torch.tensor([0.1, 0.2, 0.3, -0.4])),
}
TENSORS = {
    f"{TO_Q}.values": torch.tensor([0.1, -2.0, 3e-9]),
    f"{TO_Q}.gate": torch.tensor([0.25]),
    f"{TO_Q}.bias": torch.tensor([0.5, -0.5]),
    "unet.conv_norm_out.norm": torch.tensor([0.01, 0.02]),
    "unet.conv_norm_out.bias": torch.tensor([0.03, 0.04]),
    "unet.conv_out.bias": torch.tensor([0.03, 0.04]),
    f"{Q_PROJ}.values": torch.tensor([1.0]),
    SKETCH: pack_bases(BASES),
}
LISTED_HEADER = replace(
    HEADER, pattern="random", components={"unet": 1}, base=BaseModel("toy", digests=some_digests(1))
)
LISTED = {
    f"{TO_Q}.values": torch.tensor([0.1, -2.0, 3e-9]),
    f"{TO_Q}.positions": torch.tensor([0, 3, 70000], dtype=torch.int32),
    SKETCH: pack_bases({TO_Q: BASES[TO_Q]}),
}
JPEG_START = b"\xff\xd8\xff"
JPEG = JPEG_START + b"a small picture"


def written_json(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    metadata: dict[str, Any] = json.loads(content[8 : 8 + size])["__metadata__"]
    return metadata


def test_header_and_values_come_back(tmp_path: Path) -> None:
    file = write_adapter(tmp_path / "new folder" / "dog.safetensors", HEADER, TENSORS)
    header, tensors = read_adapter(file)
    assert header == HEADER == read_header(file)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert all(tensors[name].dtype == TENSORS[name].dtype for name in TENSORS)
    assert [entry.name for entry in file.parent.iterdir()] == ["dog.safetensors"]


def test_positions_come_back(tmp_path: Path) -> None:
    _, tensors = read_adapter(write_adapter(tmp_path / "a.safetensors", LISTED_HEADER, LISTED))
    assert tensors.keys() == LISTED.keys()
    assert torch.equal(tensors[f"{TO_Q}.positions"], LISTED[f"{TO_Q}.positions"])


def test_the_bases_of_all_layers_come_back_from_one_tensor() -> None:
    found = bases_of(TENSORS)
    assert found.keys() == BASES.keys()
    for layer, basis in BASES.items():
        assert torch.equal(found[layer].sketch, basis.sketch) and found[layer].sketch.dtype == torch.uint8
        assert torch.equal(found[layer].probes, basis.probes)
    # What docs/file_format.md says, byte for byte: the text encoder's record comes first.
    assert bytes(TENSORS[SKETCH].tolist()) == (
        struct.pack("<I4f", 0, 0.1, 0.2, 0.3, -0.4) + struct.pack("<I7B4f", 7, *range(7), 1.5, -2e-7, 3e9, 0.0)
    )


def test_names_of_tensors() -> None:
    assert split_tensor_name("unet.a.values.norm") == ("unet.a.values", "norm")
    assert layer_names(TENSORS) == sorted([TO_Q, "unet.conv_norm_out", "unet.conv_out", Q_PROJ])
    for name in ("unet.a.weight", "values", "unet.values", "vae.a.values", "unet.a.sketch"):
        with pytest.raises(UserError):
            split_tensor_name(name)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    first = write_adapter(tmp_path / "a.safetensors", HEADER, TENSORS)
    turned = replace(HEADER, training=dict(reversed(HEADER.training.items())))
    second = write_adapter(tmp_path / "b.safetensors", turned, dict(reversed(TENSORS.items())))
    assert first.read_bytes() == second.read_bytes()


def test_other_tools_read_the_file_and_find_what_they_show(tmp_path: Path) -> None:
    file = write_adapter(tmp_path / "a.safetensors", replace(HEADER, thumbnail=JPEG, class_word="dog"), TENSORS)
    read = load_file(file)
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    metadata = written_json(file)
    assert all(isinstance(text, str) for text in metadata.values())
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion/svft"
    assert metadata["modelspec.trigger_phrase"] == "sks dog"
    assert metadata["modelspec.thumbnail"] == "data:image/jpeg;base64," + base64.b64encode(JPEG).decode()
    size = struct.unpack("<Q", file.read_bytes()[:8])[0]
    assert metadata["sshs_model_hash"] == hashlib.sha256(file.read_bytes()[8 + size :]).hexdigest()
    assert metadata["modelspec.hash_sha256"] == f"0x{metadata['sshs_model_hash']}"
    assert metadata["ss_learning_rate"] == "0.05"
    assert read_header(file).thumbnail == JPEG
    assert not {"modelspec.date", "ss_training_started_at"} & metadata.keys()


@pytest.mark.parametrize("thumbnail", [b"\x89PNG", JPEG_START + bytes(70_000)])
def test_a_thumbnail_is_a_small_jpeg(tmp_path: Path, thumbnail: bytes) -> None:
    with pytest.raises(UserError, match="a thumbnail must be a JPEG of at most 65536 bytes"):
        write_adapter(tmp_path / "a.safetensors", replace(HEADER, thumbnail=thumbnail), TENSORS)


def test_values_in_float16_take_half_the_bytes_and_come_back_rounded(tmp_path: Path) -> None:
    header = replace(HEADER, value_dtype="float16")
    file = write_adapter(tmp_path / "a.safetensors", header, TENSORS)
    assert {name: tensor.dtype for name, tensor in load_file(file).items()} == {
        name: torch.uint8 if name == SKETCH else torch.float16 for name in TENSORS
    }
    read, tensors = read_adapter(file)
    assert read == header
    assert all(torch.equal(tensors[n], TENSORS[n] if n == SKETCH else TENSORS[n].half().float()) for n in TENSORS)
    again = write_adapter(tmp_path / "b.safetensors", read, tensors)
    assert again.read_bytes() == file.read_bytes()
    huge = {**TENSORS, f"{TO_Q}.values": torch.tensor([0.1, 70000.0, 0.0])}
    with pytest.raises(UserError, match="a value too large for float16; store it as float32"):
        write_adapter(tmp_path / "c.safetensors", header, huge)


def test_learned_tokens_come_back(tmp_path: Path) -> None:
    header = replace(HEADER, tokens={"text_encoder": ["<sks>", "<style>"]})
    tensors = {**TENSORS, "text_encoder.tokens": torch.randn(2, 5)}
    file = write_adapter(tmp_path / "a.safetensors", header, tensors)
    read, found = read_adapter(file)
    assert read == header and torch.equal(found["text_encoder.tokens"], tensors["text_encoder.tokens"])
    for tokens, message in (
        ({"text_encoder": ["<sks>"]}, "names other learned tokens"),
        ({"text_encoder": ["<sks>", "<sks>"]}, "stands twice"),
        ({"text_encoder": ["<sks>", "two\nlines"]}, "not one word"),
        ({}, "names other learned tokens"),
    ):
        with pytest.raises(UserError, match=message):
            write_adapter(file, replace(header, tokens=tokens), tensors)
    with pytest.raises(UserError, match="tokens of no text encoder"):
        write_adapter(file, header, {**TENSORS, "unet.tokens": torch.randn(2, 5)})


def test_what_was_changed_after_writing_is_noticed(tmp_path: Path) -> None:
    """The container itself accepts other bytes in the place of a tensor's, and other text in its header."""
    file = write_adapter(tmp_path / "a.safetensors", HEADER, TENSORS)
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match="does not hold what was written into it"):
        read_adapter(file)
    file.write_bytes(good.replace(b"a photo of sks d", b"a photo of sks c"))
    with pytest.raises(UserError, match="does not hold what was written into it"):
        read_header(file)


def test_another_order_of_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    file = write_adapter(tmp_path / "a.safetensors", HEADER, TENSORS)
    metadata = written_json(file)
    save_file(dict(reversed(TENSORS.items())), file, metadata=dict(reversed(metadata.items())))
    assert read_header(file) == HEADER


def test_a_prompt_that_begins_with_a_slash_is_no_path(tmp_path: Path) -> None:
    header = replace(HEADER, instance_prompt="/imagine a sks/dog", training={"validation_prompt": "/a/dog"})
    written = read_header(write_adapter(tmp_path / "dog.safetensors", header, TENSORS))
    assert written.instance_prompt == "/imagine a sks/dog"
    assert written.training == {"validation_prompt": "/a/dog"}


def test_no_folder_of_this_machine_is_written(tmp_path: Path) -> None:
    header = replace(
        HEADER,
        base=replace(HEADER.base, name=str(tmp_path / "toy")),
        training={"photos": str(tmp_path / "dog"), "logs": [r"C:\Users\me\logs"], "output": tmp_path, "hub": "a/b"},
    )
    file = write_adapter(tmp_path / "a.safetensors", header, TENSORS)
    assert str(tmp_path).encode() not in file.read_bytes()
    assert read_header(file).base.name == "toy"
    assert read_header(file).training == {"photos": "dog", "logs": ["logs"], "output": tmp_path.name, "hub": "a/b"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path, bad: float) -> None:
    for part in ("values", "gate"):
        damaged = {**TENSORS, f"{TO_Q}.{part}": torch.full_like(TENSORS[f"{TO_Q}.{part}"], bad)}
        with pytest.raises(UserError, match="NaN or infinite"):
            write_adapter(tmp_path / "a.safetensors", HEADER, damaged)
        assert not (tmp_path / "a.safetensors").exists()
    file = write_adapter(tmp_path / "a.safetensors", HEADER, TENSORS)
    file.write_bytes(sealed(damaged, written_json(file)))
    with pytest.raises(UserError, match="NaN or infinite"):
        read_adapter(file)


def with_metadata(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def rewrite(file: Path) -> None:
        write_adapter(file, HEADER, TENSORS)
        fields = json.loads(written_json(file)[METADATA_KEY])
        change(fields)
        file.write_bytes(sealed(TENSORS, {**written_json(file), METADATA_KEY: json.dumps(fields)}))

    return rewrite


def with_tensors(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    def rewrite(file: Path) -> None:
        write_adapter(file, HEADER, TENSORS)
        file.write_bytes(sealed(tensors, written_json(file)))

    return rewrite


def with_change(**changes: Tensor | None) -> Callable[[Path], None]:
    """The good tensors but for some of the first layer's parts, or the sketch; None leaves one out."""
    renamed = {name if name == SKETCH else f"{TO_Q}.{name}": tensor for name, tensor in changes.items()}
    return with_tensors({name: t for name, t in {**TENSORS, **renamed}.items() if t is not None})


def with_positions(positions: list[int] | Tensor | None) -> Callable[[Path], None]:
    def rewrite(file: Path) -> None:
        write_adapter(file, LISTED_HEADER, LISTED)
        as_tensor = torch.tensor(positions, dtype=torch.int32) if isinstance(positions, list) else positions
        assert as_tensor is not None
        file.write_bytes(sealed({**LISTED, f"{TO_Q}.positions": as_tensor}, written_json(file)))

    return rewrite


def cut_short(file: Path) -> None:
    write_adapter(file, HEADER, TENSORS)
    file.write_bytes(file.read_bytes()[:-3])


def nested(depth: int) -> dict[str, Any]:
    return {} if depth == 0 else {"a": nested(depth - 1)}


def newer(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Callable[[Path], None]:
    """A file of a later format, in which this one would find other things wrong too."""

    def rewrite(file: Path) -> None:
        with_metadata(lambda fields: fields.update(format_version=FORMAT_VERSION + 1))(file)
        save_file({**TENSORS, **tensors}, file, metadata={**written_json(file), **metadata})

    return rewrite


def twice(file: Path) -> None:
    write_adapter(file, HEADER, TENSORS)
    metadata = written_json(file)
    again = metadata[METADATA_KEY].replace("{", '{"rank": 3, ', 1)
    file.write_bytes(sealed(TENSORS, {**metadata, METADATA_KEY: again}))


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (Path("pickle-was-opened"),)


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda file: None, "can't read .*No such file"),
    "empty": (lambda file: file.write_bytes(b""), "is empty; copy or download it again"),
    "pickle": (lambda file: file.write_bytes(pickle.dumps(Bomb())), "pickled or packed file .* never opened"),
    "huge header": (lambda file: file.write_bytes(struct.pack("<Q", 2**40) + b"{"), "header of 1099511627776 bytes"),
    "large header": (lambda file: file.write_bytes(struct.pack("<Q", 2**22) + b"{"), "more than any adapter needs"),
    "web page": (lambda file: file.write_bytes(b"<!DOCTYPE html><html>"), "a web page, not an adapter"),
    "pointer": (lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "folder": (lambda file: file.mkdir(), "is a folder; no adapter is in it"),
    "picture": (lambda file: file.write_bytes(JPEG + bytes(20)), "a picture that carries no adapter"),
    "header past the end": (lambda file: file.write_bytes(struct.pack("<Q", 500) + b"{}"), "cut short"),
    "cut short": (cut_short, r"is cut short: it should have \d+ bytes"),
    "no JSON": (lambda file: file.write_bytes(struct.pack("<Q", 4) + b"{abc"), "no safetensors file|damaged header"),
    "lora": (
        lambda file: save_file({"unet.lora_A.weight": torch.ones(2, 2)}, file),
        "not an svft_diffusion adapter: `svft-diffusion import`",
    ),
    "newer": (with_metadata(lambda fields: fields.update(format_version=FORMAT_VERSION + 1)), "update svft_diffusion"),
    "newer with a new type": (newer({"unet.a.scale": torch.ones(2).to(torch.float8_e4m3fn)}, {}), "update svft_diff"),
    "newer with another thumbnail": (
        newer({}, {THUMBNAIL_KEY: "data:image/webp;base64,AAAA"}),
        "update svft_diffusion",
    ),
    "no version": (with_metadata(lambda fields: fields.pop("format_version")), "damaged header"),
    "no method": (with_metadata(lambda fields: fields.pop("method")), "damaged header"),
    "base is a number": (with_metadata(lambda fields: fields.update(base=3)), "damaged header"),
    "rank is text": (with_metadata(lambda fields: fields.update(rank="4")), "damaged header"),
    "prompt is a list": (with_metadata(lambda fields: fields.update(instance_prompt=[1])), "damaged header"),
    "components is a list": (with_metadata(lambda fields: fields.update(components=["unet"])), "damaged header"),
    "training is a list": (with_metadata(lambda fields: fields.update(training=[1])), "damaged header"),
    "version below zero": (with_metadata(lambda fields: fields.update(format_version=-1)), "damaged header"),
    "strength beyond floats": (
        with_metadata(lambda fields: fields.update(suggested_strength=10**400)),
        "damaged header",
    ),
    "base of two lines": (with_metadata(lambda fields: fields["base"].update(name="a\nb")), "damaged header"),
    "layers missing": (with_tensors(dict([*TENSORS.items()][:6])), "text_encoder: 1 layers, the file holds 0"),
    "older": (with_metadata(lambda fields: fields.update(format_version=0)), "version 0, .* train it again, or use"),
    "version is true": (with_metadata(lambda fields: fields.update(format_version=True)), "damaged header"),
    "seed is text": (with_metadata(lambda fields: fields.update(seed="1")), "damaged header"),
    "seed beyond 64 bits": (with_metadata(lambda fields: fields.update(seed=2**70)), "damaged header"),
    "switch is a number": (with_metadata(lambda fields: fields.update(train_bias=2)), "damaged header"),
    "fraction is infinite": (with_metadata(lambda fields: fields.update(fraction=float("inf"))), "damaged header"),
    "select is a list": (with_metadata(lambda fields: fields.update(select=["top"])), "damaged header"),
    "unknown part": (with_change(scale=torch.ones(3)), "unexpected tensor .*names end in .values, .bias"),
    "empty values": (with_change(values=torch.ones(0)), "one row of float32"),
    "norm of two dimensions": (with_change(norm=torch.ones(2, 2)), "one row of float32"),
    "gate in 16 bit": (with_change(gate=torch.ones(1, dtype=torch.float16)), "one row of float32"),
    "sketch of floats": (with_change(sketch=torch.ones(8)), "'sketch' must be one row of bytes"),
    "no sketch": (with_change(sketch=None), "is not whole: there is a tensor 'sketch' where"),
    "a sketch of nothing": (with_change(sketch=torch.zeros(3, dtype=torch.uint8)), "sketch: it ends before the record"),
    "a sketch cut short": (with_change(sketch=TENSORS[SKETCH][:-1]), "sketch: it ends within the record of layer unet"),
    "a longer sketch": (
        with_change(sketch=torch.cat([TENSORS[SKETCH], TENSORS[SKETCH][:2]])),
        "sketch: it has 2 bytes after",
    ),
    "a sketch that claims 4 GB": (
        with_change(sketch=torch.cat([torch.full((4,), 255, dtype=torch.uint8), TENSORS[SKETCH][4:]])),
        "sketch: it ends within",
    ),
    "probes are NaN": (
        with_change(sketch=pack_bases({**BASES, TO_Q: LayerBasis(BASES[TO_Q].sketch, torch.full((4,), torch.nan))})),
        "probes of layer unet.* are not finite",
    ),
    "positions of a band": (with_change(positions=torch.arange(3, dtype=torch.int32)), "has no use for positions"),
    "positions of floats": (with_positions(torch.arange(3.0)), "one row of int32"),
    "long positions": (with_positions(torch.arange(3)), "one row of int32"),
    "fewer positions": (with_positions([0, 1]), "3 values at 2 positions"),
    "double positions": (with_positions([0, 3, 3]), "not ascending and distinct"),
    "positions out of order": (with_positions([0, 5, 3]), "not ascending and distinct"),
    "positions below zero": (with_positions([-1, 0, 3]), "not ascending and distinct"),
    "strength is text": (with_metadata(lambda fields: fields.update(suggested_strength="1")), "damaged header"),
    "deep settings": (
        with_metadata(lambda fields: fields.update(training=nested(40))),
        "deeper than any adapter needs",
    ),
    "many entries": (
        lambda file: save_file({"unet.a.values": torch.ones(3)}, file, metadata={"mood": "[]," * 150_000}),
        "more entries than any adapter",
    ),
    "a field twice": (twice, "damaged header: the name 'rank' stands twice"),
    "name of two lines": (
        lambda file: save_file({"unet.a\nb.values": torch.ones(3)}, file),
        "damaged header: .* is no name of a tensor",
    ),
    "a long name": (lambda file: save_file({"unet." + "a" * 600: torch.ones(3)}, file), "is no name of a tensor"),
    "too many tensors": (
        lambda file: save_file({f"unet.{number}.bias": torch.ones(1) for number in range(10_001)}, file),
        "10001 tensors are more than any adapter needs",
    ),
    "other tensor": (with_tensors({"unet.conv_in.weight": torch.ones(3)}), "unexpected tensor"),
    "other component": (with_tensors({"vae.decoder.values": torch.ones(3)}), "none of the components"),
    "matrix": (with_tensors({"unet.a.values": torch.ones(3, 3)}), "one row of float32"),
    "integers": (with_tensors({"unet.a.values": torch.ones(3, dtype=torch.int64)}), "one row of float32"),
    "float64": (with_tensors({"unet.a.values": torch.full((3,), 1e300, dtype=torch.float64)}), "one row of float32"),
    "float8": (with_tensors({"unet.a.values": torch.ones(3).to(torch.float8_e4m3fn)}), "one row of float32"),
    "lora in 8 bit": (
        lambda file: save_file({"unet.lora_A.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, file),
        "not an svft_diffusion adapter: `svft-diffusion import`",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_and_damaged_files_are_refused_in_one_line(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = FOREIGN[kind]
    file = tmp_path / "adapter.safetensors"
    make(file)
    with pytest.raises(UserError, match=message) as refused:
        read_adapter(file)
    assert "\n" not in str(refused.value)
    assert not Path("pickle-was-opened").exists()


def test_fields_of_a_later_release_of_this_format_are_ignored(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with_metadata(lambda fields: fields.update(mood="sunny"))(file)
    assert read_header(file) == HEADER


def test_an_unfinished_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_adapter(tmp_path / "a.safetensors", HEADER, TENSORS)
    before = file.read_bytes()

    def full_disk(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match="No space left"):
        write_adapter(file, replace(HEADER, trigger="other"), TENSORS)
    assert file.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match="can't write"):
        write_adapter(tmp_path / "file" / "a.safetensors", HEADER, TENSORS)


def test_digests_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    for change in ({"stored": "AAAA"}, {"stored": "no base64!"}, {"stored": 3}, {"bfloat16": ""}):
        with_metadata(lambda fields, change=change: fields["base"]["digests"].update(change))(
            tmp_path / "a.safetensors"
        )
        with pytest.raises(UserError, match=r"damaged header: .*digests? of the base"):
            read_header(tmp_path / "a.safetensors")
    three = replace(HEADER, base=BaseModel("toy", digests=some_digests(3)))
    with pytest.raises(UserError, match="digests of 3 weights for 4 layers"):
        write_adapter(tmp_path / "a.safetensors", three, TENSORS)


# Names


def test_the_canonical_name_has_text_model_whatever_the_version_of_transformers() -> None:
    flat = tiny_text_encoder()
    nested = nn.Module()
    nested.config = flat.config
    nested.text_model = nn.Module()
    canonical = "text_model.encoder.layers.0.mlp.fc1"
    paths = (canonical, "encoder.layers.0.mlp.fc1")
    here = paths[0] if hasattr(flat, "text_model") else paths[1]
    assert flat.get_submodule(here) is flat.get_submodule(module_path(flat, canonical))
    assert canonical_name("text_encoder", flat, here) == f"text_encoder.{canonical}"
    assert canonical_name("text_encoder", nested, canonical) == f"text_encoder.{canonical}"
    assert module_path(nested, canonical) == canonical
