"""Writing a LoRA file: safetensors with many entries in its header, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from svft_diffusion.exchange.export import ExportedLora
from svft_diffusion.files.whole_files import check_output_file, replace_when_whole

_ALIGNMENT = 8  # of the tensors' bytes in the file, as the format asks for


def write_lora(
    exported: ExportedLora, file: str | Path, *, described: Mapping[str, str] | None = None, overwrite: bool = False
) -> Path:
    """Write an export, whole or not at all; equal exports under one name give equal bytes.

    The safetensors library writes the header's entries in an order that changes from run to run, so the header is
    written here. The file's own name, less its ending, is the title that tools show.

    Args:
        described: more header entries, see `svft_diffusion.exchange.lora_metadata.described`.

    Raises:
        UserError: there is such a file and ``overwrite`` is off, or it can't be written.
    """
    file = Path(file)
    check_output_file(file, overwrite=overwrite)
    digest = hashlib.sha256()
    for part in _tensor_bytes(exported.tensors):
        digest.update(part)
    metadata = {
        **exported.metadata,
        **(described or {}),
        "ss_output_name": file.stem,
        "modelspec.title": file.stem,
        # Both are the digest of the tensors' bytes; sites and pictures refer to a LoRA by the first.
        "sshs_model_hash": digest.hexdigest(),
        "modelspec.hash_sha256": f"0x{digest.hexdigest()}",
    }
    with replace_when_whole(file) as unfinished, unfinished.open("wb") as opened:
        opened.write(_header(exported.tensors, metadata))
        for part in _tensor_bytes(exported.tensors):
            opened.write(part)
    return file


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    contents: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in sorted(tensors):
        size = tensors[name].numel() * tensors[name].element_size()
        contents[name] = {
            "dtype": "F32",
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    for name in sorted(tensors):
        assert tensors[name].dtype == torch.float32
        yield tensors[name].contiguous().numpy().astype("<f4", copy=False).tobytes()
