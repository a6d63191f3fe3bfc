"""What a visitor does with all adapters of the cards together; the work is that of `svft-diffusion blend`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from diffusers import DiffusionPipeline

from svft_diffusion.adapters import load_adapter, loaded_adapters, unload_adapter
from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.algebra.blend_metadata import BlendSource, shared_triggers
from svft_diffusion.algebra.blending import BlendFacts, base_name_of, check_blend, compare_sources, write_blend
from svft_diffusion.algebra.interference import Interference
from svft_diffusion.algebra.interference_report import summary_lines, weight_text
from svft_diffusion.app.context import AppContext
from svft_diffusion.app.shelf.library import LibraryEntry, id_of
from svft_diffusion.app.shelf.library_actions import check_export, write_export
from svft_diffusion.app.shelf.uploads import called
from svft_diffusion.errors import UserError
from svft_diffusion.exchange.export import export_lora
from svft_diffusion.files import read_adapter, read_header
from svft_diffusion.files.safe_names import safe_name
from svft_diffusion.sampling.adapter_choice import CheckedAdapter, file_label, unique_names
from svft_diffusion.terminal import printable

Chosen = Sequence[tuple[CheckedAdapter, AdapterWeight]]

DEFAULT_NAME = "blend"


def interference_of(context: AppContext, base: str, chosen: Chosen) -> Interference:
    """How adapters get on at their weights, by their names in the library.

    Raises:
        UserError: all weights are 0, an adapter changes nothing at its weight, or the base can't be loaded.
    """
    acting = _acting(chosen)
    _check(acting, compared_only=True)
    with _loaded(context, base, acting) as (pipeline, sources, _):
        return compare_sources(pipeline, sources)[1]


def balancing_factors(context: AppContext, base: str, chosen: Chosen) -> dict[str, float]:
    """Id in the library -> the factor of its weight at which equal weights would mean updates of equal size.

    Raises:
        UserError: as `interference_of`, or there are not two to balance.
    """
    acting = _acting(chosen)
    if len(acting) < 2:
        raise UserError("balancing takes two adapters that are on, at weights other than 0")
    factors = interference_of(context, base, acting).factors.values()
    return {id_of(adapter.sha256): factor for (adapter, _), factor in zip(acting, factors, strict=True)}


def save_blend(
    context: AppContext, base: str, chosen: Chosen, name: str, facts: BlendFacts
) -> tuple[LibraryEntry, list[str]]:
    """Make one adapter of several, and take it into the library.

    Args:
        name: what the file is called; where there is such a name already, it gets a number.

    Returns:
        The new adapter, and lines that say what it is called, what it is made of and what to mind. What is in the
        library already stays as it is.

    Raises:
        UserError: the adapters have no sum, or it can't be written.
    """
    with TemporaryDirectory() as folder, _blended(context, base, chosen, Path(folder), facts) as made:
        known = {entry.id for entry in context.library.entries()}
        entry = context.library.add(made.file, f"{safe_name(name or DEFAULT_NAME)}.safetensors")
        called_so = _called(entry, name.strip(), is_new=entry.id not in known)
        return entry, [printable(f"{called_so}, {entry.size / 1000:.1f} kB"), *made.lines]


def _called(entry: LibraryEntry, typed: str, *, is_new: bool) -> str:
    """What the blend is called in the library, and why not as it was typed."""
    if not is_new:
        unused = f"; the name {typed!r} was not used" if typed not in ("", entry.name) else ""
        return f"the same adapter is in the library already, as {entry.name}{unused}"
    if typed in ("", entry.name):
        return f"in the library as {entry.name}"
    wanted = safe_name(typed)
    why = f"{wanted} was taken" if wanted == typed else "names have letters, digits, _ and - alone"
    return f"in the library as {entry.name}, not as {typed!r}: {why}"


def export_blend(
    context: AppContext, base: str, chosen: Chosen, name: str, *, format: str, rank: str, half: bool
) -> tuple[Path, str]:
    """Write what several adapters do together as a LoRA where the visitor can get it; see `library_actions`.

    Raises:
        UserError: as `save_blend`; or the settings don't fit.
    """
    options = check_export(format, rank, 1.0, half=half)
    with TemporaryDirectory() as folder, _blended(context, base, chosen, Path(folder), BlendFacts()) as made:
        exported = export_lora(made.pipeline, made.name, strength=1.0, **options)
        header = read_header(made.file)
    file, report = write_export(exported, header, safe_name(f"{name or DEFAULT_NAME}-{format}"), 1.0)
    return file, "\n".join([*made.lines, "", report])


@dataclass(frozen=True)
class _Blend:
    """A blend in the pipeline and in a file."""

    pipeline: DiffusionPipeline
    name: str
    file: Path
    lines: list[str]  # what it is made of, and what to mind


@contextmanager
def _blended(context: AppContext, base: str, chosen: Chosen, folder: Path, facts: BlendFacts) -> Iterator[_Blend]:
    acting = _acting(chosen)
    _check(acting, compared_only=False)
    file = folder / "blend.safetensors"
    with called("the blend", file), _loaded(context, base, acting) as (pipeline, sources, name):
        sources, found = compare_sources(pipeline, sources)
        headers = [source.header for source in sources.values()]
        base_name = base_name_of(headers, base, is_known=context.studio.on_mismatch == "error")
        write_blend(pipeline, sources, name, file, facts, base_name=base_name)
        parts = ", ".join(f"{source} {weight_text(described.weight)}" for source, described in sources.items())
        lines = [parts, *summary_lines(found)]
        for trigger, named in shared_triggers(sources.values()).items():
            lines.append(f"{' and '.join(named)} have the same trigger {trigger!r}: a prompt can't tell them apart")
        yield _Blend(pipeline, name, file, [printable(line) for line in lines])


@contextmanager
def _loaded(
    context: AppContext, base: str, acting: Chosen
) -> Iterator[tuple[DiffusionPipeline, dict[str, BlendSource], str]]:
    """The pipeline with the adapters under names for people, these, and the name for their blend."""
    *names, blend = unique_names([*(adapter.name for adapter, _ in acting), DEFAULT_NAME])
    with context.studio.with_adapters(base, ()) as pipeline:
        before = loaded_adapters(pipeline)
        try:
            sources = {}
            for name, (adapter, weight) in zip(names, acting, strict=True):
                with called(adapter.name, adapter.file):
                    load_adapter(pipeline, adapter.file, name, on_mismatch=context.studio.on_mismatch)
                sources[name] = BlendSource(file_label(adapter.file), adapter.sha256, adapter.header, weight)
            yield pipeline, sources, blend
        finally:
            for name in loaded_adapters(pipeline):
                if name not in before:
                    unload_adapter(pipeline, name)


def _acting(chosen: Chosen) -> Chosen:
    acting = [(adapter, weight) for adapter, weight in chosen if weight != 0]
    if not acting:
        raise UserError("there is nothing to blend: no adapter is on at a weight other than 0")
    return acting


def _check(acting: Chosen, *, compared_only: bool) -> None:
    contents = []
    for adapter, _ in acting:
        with called(adapter.name, adapter.file):
            contents.append((adapter.name, *read_adapter(adapter.file)))
    check_blend(contents, [weight for _, weight in acting], compared_only=compared_only)
