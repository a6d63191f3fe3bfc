"""Adapter files whose digest is right, whatever they say: made by somebody who knows how."""

from __future__ import annotations

from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

from svft_diffusion.files.adapter_file import DIGEST_KEY
from svft_diffusion.files.container import content_digest, read_container


def sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A file of these tensors and metadata entries, whose digest is made anew."""
    others = {key: text for key, text in metadata.items() if key != DIGEST_KEY}
    container = read_container(save(dict(tensors), others), "sealed")
    entries = sorted(container.entries.items())
    parts = [(name, entry.dtype, entry.shape, container.bytes_of(name)) for name, entry in entries]
    return save(dict(tensors), {**others, DIGEST_KEY: content_digest(parts, others)})
