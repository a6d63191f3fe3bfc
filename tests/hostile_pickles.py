"""Pickles, archives and scripts under an adapter's name, which make a file when somebody executes them."""

from __future__ import annotations

import bz2
import copy
import gzip
import io
import json
import lzma
import marshal
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from hostile_files import METADATA, OUR_KEY, Pairs, Parts
from hostile_pictures import with_chunk


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (Path(str(self.canary)),)


class HostileFile(NamedTuple):
    """``detonate`` opens it as a careless tool would; None where nothing that is installed would."""

    content: bytes
    detonate: Callable[[bytes], object] | None


def hostile_files(canary: Path, adapter: bytes, picture: bytes) -> dict[str, HostileFile]:
    """Pickles, archives of them and mixtures with good files, each of which makes ``canary`` when it is executed."""
    bomb = Bomb(canary)
    plain = pickle.dumps(bomb, 2)
    files: dict[str, HostileFile] = {}

    def add(name: str, content: bytes, detonate: Callable[[bytes], object] | None = None) -> None:
        files[name] = HostileFile(content, detonate)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        add(f"pickle, protocol {protocol}", pickle.dumps(bomb, protocol), pickle.loads)
        state = {"unet.conv_in.values": bomb, "metadata": {}}
        add(f"pickled state dict, protocol {protocol}", pickle.dumps(state, protocol), pickle.loads)
    for modern in (True, False):
        label = "zip" if modern else "file of old"
        for content_label, held in {
            "bomb": bomb,
            "state dict": {"unet.conv_in.values": torch.ones(3), "x": bomb},
        }.items():
            add(f"torch {label} with a {content_label}", _torch_bytes(held, modern), _torch_load)
    add("torch tar", _tar({"pickle": plain, "sys_info": plain, "storages": plain, "tensors": plain}), _tar_load)
    for compression, label in ((zipfile.ZIP_STORED, "stored"), (zipfile.ZIP_DEFLATED, "deflated")):
        for member in ("data.pkl", "archive/data.pkl", "adapter/data.pkl", "pickle"):
            add(f"zip, {label}, with {member}", _zip({member: plain}, compression), _zip_load)
    add("zip with an adapter and a pickle", _zip({"adapter.safetensors": adapter, "data.pkl": plain}), _zip_load)
    add("zip that climbs", _zip({"../../../tmp/evil.pkl": plain, "..\\evil.pkl": plain}), _zip_load)
    array = io.BytesIO()
    np.save(array, np.array([bomb], dtype=object), allow_pickle=True)
    add("npy", array.getvalue(), lambda content: np.load(io.BytesIO(content), allow_pickle=True))
    archive = io.BytesIO()
    np.savez(archive, values=np.array([bomb], dtype=object))
    add("npz", archive.getvalue(), lambda content: np.load(io.BytesIO(content), allow_pickle=True)["values"])
    for label, compress, expand in (
        ("gzip", gzip.compress, gzip.decompress),
        ("bz2", bz2.compress, bz2.decompress),
        ("xz", lzma.compress, lzma.decompress),
        ("zlib, as joblib", zlib.compress, zlib.decompress),
    ):
        add(f"{label} of a pickle", compress(plain), lambda content, expand=expand: pickle.loads(expand(content)))
    add("tar.gz", gzip.compress(_tar({"data.pkl": plain})), lambda content: _tar_load(gzip.decompress(content)))
    add("joblib of old", b"ZF0x" + f"{len(plain):<18x}".encode() + zlib.compress(plain))
    add("marshalled code", marshal.dumps(compile(f"open({str(canary)!r}, 'w').close()", "x", "exec")), _run_code)
    add("python source", f"open({str(canary)!r}, 'w').close()\n".encode(), lambda content: exec(content))
    add("shell script", f"#!/bin/sh\ntouch {canary}\n".encode())
    add(
        "yaml", f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]\n".encode()
    )
    # Mixtures
    empty = struct.pack("<Q", 8) + b"{}      "
    add("empty table and a pickle", empty + plain, lambda content: pickle.loads(content[16:]))
    add("table of a pickle's bytes", _as_tensor(plain), lambda content: pickle.loads(content[-len(plain) :]))
    add("adapter and a pickle", adapter + plain, lambda content: pickle.loads(content[len(adapter) :]))
    add("adapter and a zip", adapter + _zip({"data.pkl": plain}), _zip_load)
    add("adapter and a torch zip", adapter + _torch_bytes(bomb, True), _zip_load)
    add("pickle and an adapter", plain + adapter, pickle.loads)
    add("zip and an adapter", _zip({"data.pkl": plain}) + adapter)
    add("picture and a pickle", picture + plain, lambda content: pickle.loads(content[len(picture) :]))
    add("picture and a zip", picture + _zip({"data.pkl": plain}), _zip_load)
    for chunk in (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"svFT", b"svft", b"svDf"):
        held = {b"tEXt": b"svft_diffusion\0", b"zTXt": b"svft_diffusion\0\0", b"iTXt": b"svft_diffusion\0\0\0\0\0"}
        body = held.get(chunk, b"") + (zlib.compress(plain) if chunk == b"zTXt" else plain)
        add(f"picture with a pickle in {chunk.decode()}", with_chunk(picture, chunk, body))
    add("pickle that begins as an adapter", _pickle_with_length(plain), pickle.loads)
    add("pickle that is a header too", _pickle_with_length(plain, text=b'{"__metadata__":{"x":"'), pickle.loads)
    parts = Parts.of(adapter)
    for label, text in {
        "jsonpickle": json.dumps({"py/reduce": [{"py/function": "pathlib.Path.touch"}, {"py/tuple": [str(canary)]}]}),
        "a pickle": plain.decode("latin-1"),
        "yaml": f"!!python/object/apply:os.system ['touch {canary}']",
        "an expression": f"__import__('pathlib').Path({str(canary)!r}).touch()",
    }.items():
        changed = copy.deepcopy(parts)
        changed[METADATA] = {OUR_KEY: text}
        add(f"adapter whose header is {label}", changed.content())
    return files


def _torch_bytes(held: object, modern: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(held, buffer, _use_new_zipfile_serialization=modern)
    return buffer.getvalue()


def _torch_load(content: bytes) -> object:
    return torch.load(io.BytesIO(content), weights_only=False)


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _tar_load(content: bytes) -> object:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        member = archive.extractfile(archive.getmembers()[0])
        assert member is not None
        return pickle.load(member)


def _zip(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _zip_load(content: bytes) -> object:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        name = next(name for name in archive.namelist() if name.endswith(("pkl", "pickle")))
        return pickle.loads(archive.read(name))


def _run_code(content: bytes) -> object:
    return exec(marshal.loads(content))


def _as_tensor(content: bytes) -> bytes:
    """A safetensors file with the bytes of something else as its only tensor."""
    entry = {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}
    return Parts(Pairs([("unet.conv_in.values", entry)]), content).content(sealed=False)


def _pickle_with_length(plain: bytes, text: bytes = b"{") -> bytes:
    """A pickle whose first 8 bytes are a length, and whose ninth is a brace: it begins with a text of zeros."""
    held = bytes(3) + text
    content = b"X" + struct.pack("<I", len(held)) + held + b"0" + plain
    (length,) = struct.unpack_from("<Q", content)
    return content + b"}" + b" " * (length + 8 - len(content) - 1)
