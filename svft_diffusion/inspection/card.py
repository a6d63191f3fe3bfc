"""The facts of an adapter or a picture as text for a terminal. Text from the file is untrusted, see `printable`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from svft_diffusion.files import AdapterHeader
from svft_diffusion.inspection.facts import AdapterFacts, FileSizes, UpdateNorm, numbers_of_digests
from svft_diffusion.terminal import printable

_LABEL_WIDTH = 12
_BAR_WIDTH = 24
_LONGEST_NAME = 70
_LONGEST_TEXT = 400
_LONGEST_SETTING = 120

_METHODS = {
    "svft": "SVFT, a sparse matrix between the singular vectors",
    "svdiff": "SVDiff, a shift of each singular value",
    "vectorfit": "VectorFit, singular values and biases",
    "siva": "SiVA, some of the singular values",
}
_PARTS = {
    "values": "spectral values",
    "bias": "shifts of biases",
    "norm": "shifts of norm weights",
    "gate": "gates",
    "tokens": "numbers of learned tokens",
}
_PICTURE_SETTINGS = {
    "prompt": "prompt",
    "negative_prompt": "avoided",
    "seed": "seed",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "scheduler": "scheduler",
    "base": "base",
    "dtype": "precision",
    "version": "made with",
}


def adapter_card(facts: AdapterFacts, *, layers: bool = False) -> list[str]:
    """Lines that say what an adapter is; with ``layers`` the norms of each layer instead of each block."""
    header = facts.header
    numbers = ", ".join(f"{count:,} {_PARTS[part]}" for part, count in facts.trained.items())
    adapted = ", ".join(f"{count} in {name}" for name, count in header.components.items())
    low, high = header.strength_range
    lines = [
        *_lines(
            {
                "title": header.title,
                "about": header.description,
                "method": method_in_words(header),
                "layers": f"{adapted} ({header.targets})",
                "trained": f"{numbers}, stored as {header.value_dtype}",
                "file": _sizes_in_words(facts.sizes),
                "base": _base_in_words(header),
                "trigger": header.trigger,
                "class word": header.class_word,
                "prompt": header.instance_prompt,
                "class prompt": header.class_prompt,
                "tokens": ", ".join(token for tokens in header.tokens.values() for token in tokens),
                "strength": f"{header.suggested_strength:g} suggested, good from {low:g} to {high:g}",
                "thumbnail": None if header.thumbnail is None else f"yes, {len(header.thumbnail) / 1000:.1f} kB",
                "libraries": ", ".join(f"{name} {version}" for name, version in sorted(header.libraries.items())),
                "digest": f"right: the file holds what was written; its SHA-256 is {facts.sha256}",
            }
        )
    ]
    if header.training:
        lines += ["", "training"]
        lines += [f"  {_shown(name)} = {_setting(value)}" for name, value in sorted(header.training.items())]
    kind = "norm of the update" if facts.exact_norms else "norm of the update, at most (the relu may hold it back)"
    return [*lines, "", f"{kind}, at strength 1", *_norm_table(facts.layers if layers else facts.blocks)]


def picture_card(settings: Mapping[str, Any]) -> list[str]:
    """Lines that say how a picture was made, from what `read_png_settings` found."""
    facts = {label: settings[name] for name, label in _PICTURE_SETTINGS.items() if settings.get(name) not in (None, "")}
    if "width" in settings and "height" in settings:
        facts["size"] = f"{settings['width']} x {settings['height']}"
    return list(_lines(facts))


def method_in_words(header: AdapterHeader) -> str:
    """Method, pattern and rank of an adapter, as a person would say it."""
    method = _METHODS.get(header.method, header.method)
    plural = "" if header.off_diagonals == 1 else "s"
    band = f"a band of {header.off_diagonals} diagonal{plural} on each side of the main one"
    patterns = {
        "plain": "the diagonal" if header.method == "svft" else "",
        "banded": band,
        "random": f"random places, as many as {band} has",
        "top_k": f"the places where singular vectors are most alike, as many as {band} has",
        "listed": "listed places",
    }
    rank = "all singular triplets" if header.rank is None else f"the leading {header.rank} singular triplets"
    if header.fraction is not None:
        rank = f"{header.fraction:.0%} of the singular values, {header.select}"
    said = [method, patterns.get(header.pattern, header.pattern), rank if header.train_values else "no singular values"]
    return "; ".join(part for part in said if part)


def _base_in_words(header: AdapterHeader) -> str:
    base = header.base
    kinds = ", ".join(f"{count} {name}" for name, count in numbers_of_digests(header).items())
    return f"{base.name} ({base.architecture or base.family}), fingerprint {base.short_fingerprint}, digests: {kinds}"


def _sizes_in_words(sizes: FileSizes) -> str:
    parts = {"values": sizes.values, "sketch of the basis": sizes.sketch, "header": sizes.header}
    divided = ", ".join(
        f"{name} {size / 1000:.1f} kB ({size / sizes.file:.0%})" for name, size in parts.items() if size
    )
    return f"{sizes.file / 1000:.1f} kB: {divided}"


def _norm_table(norms: Sequence[UpdateNorm]) -> Iterable[str]:
    largest = max((norm.update for norm in norms), default=0.0)
    names = [_shown(norm.name, _LONGEST_NAME) for norm in norms]
    width = max((len(name) for name in names), default=0)
    has_shifts = any(norm.shifts for norm in norms)
    shifts_title = f" {'shifts':>9}" if has_shifts else ""
    yield f"  {'':<{width}} {'layers':>6} {'trained':>9} {'update':>9}{shifts_title}"
    for name, norm in zip(names, norms, strict=True):
        bar = "#" * round(_BAR_WIDTH * norm.update / largest) if largest else ""
        shifts = f" {norm.shifts:>9.3g}" if has_shifts else ""
        yield f"  {name:<{width}} {norm.layers:>6} {norm.values:>9,} {norm.update:>9.3g}{shifts}  {bar}".rstrip()


def _lines(facts: Mapping[str, Any]) -> Iterable[str]:
    for label, value in facts.items():
        if value not in (None, ""):
            yield f"{label:<{_LABEL_WIDTH}} {_shown(str(value), _LONGEST_TEXT)}"


def _setting(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return _shown(text, _LONGEST_SETTING)


def _shown(text: str, longest: int = _LONGEST_NAME) -> str:
    return printable(text, longest)
