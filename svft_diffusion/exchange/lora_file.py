"""LoRA files: the same bytes every time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from svft_diffusion.exchange.export import ExportedLora
from svft_diffusion.files.container import container_bytes
from svft_diffusion.files.model_spec import hashes
from svft_diffusion.files.whole_files import check_output_file, replace_when_whole


def write_lora(
    exported: ExportedLora, file: str | Path, *, described: Mapping[str, str] | None = None, overwrite: bool = False
) -> Path:
    """Write an export, whole or not at all; equal exports under one name give equal bytes.

    The file's own name, less its ending, is the name that tools show; its title too, where ``described`` has none.

    Args:
        described: more header entries, see `svft_diffusion.exchange.lora_metadata.described`.

    Raises:
        UserError: there is such a file and ``overwrite`` is off, or it can't be written.
    """
    file = Path(file)
    check_output_file(file, overwrite=overwrite)
    metadata = {
        **exported.metadata,
        "modelspec.title": file.stem,
        **(described or {}),
        "ss_output_name": file.stem,  # the name by which prompts of web interfaces call the file
    }
    content = container_bytes(exported.tensors, metadata | hashes(exported.tensors, metadata))
    with replace_when_whole(file) as unfinished:
        unfinished.write_bytes(content)
    return file
