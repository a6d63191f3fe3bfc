"""What the file of a blend says of itself: its sources' facts, merged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.files import AdapterHeader, AdapterMetadata


@dataclass(frozen=True)
class BlendSource:
    """An adapter that goes into a blend."""

    file: str  # its name, without folders
    sha256: str
    header: AdapterHeader
    weight: AdapterWeight


def blend_metadata(
    sources: Sequence[BlendSource], operation: str, *, base_name: str, value_dtype: str | None = None, **details: Any
) -> AdapterMetadata:
    """Facts for `save_adapter`: triggers and class words of all, prompts where all have the same, and the sources.

    Args:
        sources: at least one.
        operation: ``sum`` or ``style mix``.
        base_name: the base in the pipeline.
        value_dtype: None: `stored_dtype` of the sources.
        details: what else belongs into the entry ``blend`` of the training settings.
    """
    headers = [source.header for source in sources]
    entries = [{"file": source.file, "sha256": source.sha256, "weight": source.weight} for source in sources]
    return AdapterMetadata(
        base_name=base_name,
        base_family=headers[0].base.family,
        trigger=_joined(header.trigger for header in headers),
        class_word=_joined(header.class_word for header in headers),
        instance_prompt=_shared(header.instance_prompt for header in headers),
        class_prompt=_shared(header.class_prompt for header in headers),
        title=f"{'blend' if operation == 'sum' else operation} of {', '.join(_called(source) for source in sources)}",
        training={"blend": {"operation": operation, "sources": entries, **details}},
        value_dtype=value_dtype or stored_dtype(headers),
    )


def stored_dtype(headers: Iterable[AdapterHeader]) -> str:
    """How a blend of these stores its values if nobody says it: ``float16`` if all of them do."""
    stored = {header.value_dtype for header in headers}
    return stored.pop() if len(stored) == 1 else "float32"


def shared_triggers(sources: Iterable[BlendSource]) -> dict[str, list[str]]:
    """Trigger -> the files that have it, where there are several: a prompt can't tell these adapters apart."""
    files: dict[str, list[str]] = {}
    for source in sources:
        if source.header.trigger:
            files.setdefault(source.header.trigger, []).append(source.file)
    return {trigger: named for trigger, named in files.items() if len(named) > 1}


def _called(source: BlendSource) -> str:
    name = source.file.removesuffix(".safetensors")
    return f"{name} {source.weight:g}" if isinstance(source.weight, int | float) else name


def _joined(texts: Iterable[str | None]) -> str | None:
    return ", ".join(dict.fromkeys(text for text in texts if text)) or None


def _shared(texts: Iterable[str | None]) -> str | None:
    found = set(texts)
    return found.pop() if len(found) == 1 else None
