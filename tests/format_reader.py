"""A reader of adapter files that was made from docs/file_format.md alone: it imports nothing of the library."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from typing import Any

import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "F16": torch.float16, "I32": torch.int32, "U8": torch.uint8}


class DocumentReader:
    """An adapter file as its document describes it."""

    def __init__(self, data: bytes) -> None:
        (length,) = struct.unpack_from("<Q", data)
        table = json.loads(data[8 : 8 + length])
        self.metadata: dict[str, str] = table.pop("__metadata__")
        self.header: dict[str, Any] = json.loads(self.metadata["svft_diffusion"])
        self.body = body = data[8 + length :]
        self.entries = {
            name: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])]) for name, entry in table.items()
        }
        self.tensors = {
            name: torch.frombuffer(bytearray(content), dtype=DTYPES[dtype]).reshape(shape)
            for name, (dtype, shape, content) in self.entries.items()
        }
        alone = {"sketch", *(name for name in table if name.endswith(".tokens") and name.count(".") == 1)}
        self.layers = sorted({name.rpartition(".")[0] for name in table.keys() - alone})

    def digest(self) -> str:
        digest = hashlib.sha256()
        for name, (dtype, shape, content) in sorted(self.entries.items()):
            described = json.dumps([name, dtype, *shape]).encode()
            digest.update(struct.pack("<Q", len(described)) + described)
            digest.update(struct.pack("<Q", len(content)) + content)
        others = {key: text for key, text in self.metadata.items() if key != "svft_diffusion.digest"}
        text = json.dumps(others, sort_keys=True).encode()
        digest.update(struct.pack("<Q", len(text)) + text)
        return digest.hexdigest()

    def digests_of_base(self, weights: dict[str, Tensor]) -> dict[str, str]:
        """What the header should say, given the weights of the base by the names of their layers."""
        found = {}
        for kind, dtype in {"stored": None, "float16": torch.float16, "bfloat16": torch.bfloat16}.items():
            if kind == "float16" and any(weights[layer].dtype == torch.bfloat16 for layer in self.layers):
                continue
            digests = b""
            for layer in self.layers:
                weight = weights[layer].detach().to(dtype or weights[layer].dtype)
                content = weight.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                start = f"{weight.dtype}|{tuple(weight.shape)}|".encode()
                digests += hashlib.sha256(start + content).digest()[:6]
            found[kind] = base64.b64encode(digests).decode()
        return found

    def records(self) -> dict[str, tuple[bytes, tuple[float, ...]]]:
        """Layer -> its basis sketch and its four probes."""
        if "sketch" not in self.entries:
            return {}
        packed, position, found = self.entries["sketch"][2], 0, {}
        for layer in self.layers:
            if f"{layer}.values" not in self.tensors:
                continue
            (length,) = struct.unpack_from("<I", packed, position)
            end = position + 4 + length
            found[layer] = (packed[position + 4 : end], struct.unpack_from("<4f", packed, end))
            position = end + 16
        assert position == len(packed)
        return found

    def triplets(self, layer: str, size: int) -> list[int]:
        """The triplets of ``size`` that train in a layer."""
        header, listed = self.header, self.tensors.get(f"{layer}.positions")
        if header["method"] != "svft" and listed is not None:
            return listed.tolist()
        if header["method"] == "siva" and header["select"] != "all":
            count = max(1, math.ceil(header["fraction"] * size - 1e-9))
            return list(range(size - count, size) if header["select"] == "bottom" else range(count))
        return list(range(header["rank"] or size))

    def core(self, layer: str, sigma: Tensor) -> Tensor:
        """``C`` (k, k) with the update ``U C V^T`` of a layer that has the singular values ``sigma`` (k,)."""
        header, values = self.header, self.tensors[f"{layer}.values"].float()
        if header["init"] == "official":
            values = values * torch.sigmoid(self.tensors[f"{layer}.gate"].float())
        trained = self.triplets(layer, len(sigma))
        r, d = len(trained), header["off_diagonals"]
        if header["method"] == "svft" and header["pattern"] in ("random", "top_k", "listed"):
            flat = self.tensors[f"{layer}.positions"].tolist()
            places = [(position // r, position % r) for position in flat]
        else:
            places = [(i, j) for i in range(r) for j in range(r) if abs(i - j) <= d]
        if header["pattern"] != "listed":
            assert len(values) == r * (2 * d + 1) - d * (d + 1)
        core = torch.zeros(len(sigma), len(sigma))
        for (i, j), value in zip(places, values, strict=True):
            core[trained[i], trained[j]] = value
        if header["method"] == "svdiff":
            core = torch.diag(torch.relu(sigma + core.diagonal()) - sigma)
        return core


def check_basis_sketch(sketch: bytes, k: int, may_leave_the_diagonal: bool) -> int:
    """Go through a basis sketch to its last byte; returns the number of clusters in it."""
    assert sketch[0] >> 4 == 1 and sketch[0] & 15 == may_leave_the_diagonal
    assert struct.unpack_from("<H", sketch, 1) == (k,)
    position = 3 + (math.ceil(k / 2) if may_leave_the_diagonal else 0)
    assert all(-32767 <= number <= 32767 for number in struct.unpack_from("<8h", sketch, position))
    position += 16
    clusters = last = 0
    while position < len(sketch):
        first, size_and_flag = struct.unpack_from("<HB", sketch, position)
        size, sides = size_and_flag & 127, 1 + (size_and_flag >> 7)
        assert last <= first < first + size <= k
        last, clusters = first + size, clusters + 1
        position += 3 + 2 * sides * (size + 1) * size
    assert position == len(sketch)
    return clusters
