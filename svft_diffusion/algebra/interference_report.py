"""An interference report as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.algebra.interference import Interference, Meeting, Pair, Place

_LISTED = 8
_PAIRS_SIDE_BY_SIDE = 3
_NOTABLE = 0.3  # cosine or overlap that may show in pictures


def report_lines(found: Interference, *, with_table: bool = True) -> list[str]:
    """The report as text: sizes, how pairs meet in every block, where they clash, what the relu cuts, weights.

    Args:
        with_table: of pairs and blocks, as `meetings_table` has it.
    """
    table = ["", *_table(found)] if with_table else []
    return [*_sizes(found), *table, *_worst(found), *_clipping(found), *_balancing(found)]


def meetings_table(found: Interference) -> list[tuple[str, str, float | None, float | None]]:
    """Pair, place, cosine and overlap: of all layers together, then block by block."""
    return [
        (pair_label(pair), "all" if place is found.total else place.name, meeting.cosine, meeting.overlap)
        for pair in found.pairs
        for place in (found.total, *found.blocks)
        for meeting in (place.meetings[pair],)
    ]


def summary_lines(found: Interference) -> list[str]:
    """The part of it that nobody should miss: how pairs meet as a whole, and what the relu cuts."""
    width = max((len(pair_label(pair)) for pair in found.pairs), default=0)
    meetings = ((pair_label(pair), found.total.meetings[pair]) for pair in found.pairs)
    pairs = [f"{label:<{width}}  cosine {item.cosine:+.3f}  overlap {item.overlap:.3f}" for label, item in meetings]
    return [*pairs, *(line for line in _clipping(found) if line)]


def meetings_in_words(found: Interference, names: Mapping[str, str]) -> list[str]:
    """A line for each pair, the most entangled first, and what the relu cuts, if it does.

    Args:
        names: adapter -> what people call it.
    """
    met = sorted(found.total.meetings.items(), key=lambda item: -(item[1].overlap or 0.0))
    lines = [
        f"{names[one]} and {names[other]} {_in_words(meeting)} (cosine {meeting.cosine:+.2f}, "
        f"overlap {meeting.overlap:.2f})"
        for (one, other), meeting in met
        if meeting.cosine is not None and meeting.overlap is not None
    ]
    clipping = found.clipping
    if clipping is not None and clipping.clipped:
        lines.append(f"together they push {clipping.share:.1%} of the trained singular values below zero")
    return lines


def report_json(found: Interference) -> dict[str, Any]:
    """The report as plain values, layers included."""
    clipping = found.clipping
    return {
        "weights": found.weights,
        "balancing_weights": found.balancing,
        "total": _place_json(found.total),
        "blocks": [_place_json(place) for place in found.blocks],
        "layers": [_place_json(place) for place in found.layers],
        "clipping": None if clipping is None else {**vars(clipping), "share": clipping.share},
    }


def pair_label(pair: Pair) -> str:
    """``dog / style``."""
    return " / ".join(pair)


def weight_text(weight: AdapterWeight) -> str:
    """``0.7`` or ``unet=0.5,text_encoder=0.2``; weights of blocks by the number of blocks."""
    if not isinstance(weight, Mapping):
        return f"{weight:.3g}"
    parts = {
        component: f"({len(part)} blocks)" if isinstance(part, Mapping) else f"{part:.3g}"
        for component, part in weight.items()
    }
    return ",".join(f"{component}={part}" for component, part in parts.items())


def _in_words(meeting: Meeting) -> str:
    cosine, overlap = meeting.cosine or 0.0, meeting.overlap or 0.0
    if cosine <= -_NOTABLE:
        return "work against each other"
    if cosine >= _NOTABLE:
        return "do partly the same"
    return "use the same places, each in its own way" if overlap >= _NOTABLE else "hardly touch each other"


def _sizes(found: Interference) -> Iterable[str]:
    width = max(len(name) for name in found.weights)
    yield f"{'adapter':<{width}}  {'norm':>9}  weight"
    for name, weight in found.weights.items():
        yield f"{name:<{width}}  {found.total.norms[name]:>9.3g}  {weight_text(weight)}"


def _table(found: Interference) -> Iterable[str]:
    pairs = found.pairs
    if not pairs:
        return
    if len(pairs) > _PAIRS_SIDE_BY_SIDE:
        yield from _pairs_below_each_other(found)
        return
    places = [*found.blocks, found.total]
    width = max(len(place.name) for place in places)
    columns = [max(len(pair_label(pair)), 16) for pair in pairs]
    heads = "  ".join(f"{pair_label(pair):>{column}}" for pair, column in zip(pairs, columns, strict=True))
    yield f"{'':<{width}}  {heads}"
    yield f"{'':<{width}}  " + "  ".join(f"{'cosine  overlap':>{column}}" for column in columns)
    for place in places:
        cells = (f"{_cell(place.meetings[pair]):>{column}}" for pair, column in zip(pairs, columns, strict=True))
        yield f"{place.name:<{width}}  {'  '.join(cells)}"


def _pairs_below_each_other(found: Interference) -> Iterable[str]:
    width = max(len(pair_label(pair)) for pair in found.pairs)
    yield f"{'':<{width}}  {'cosine  overlap':>16}  block with the lowest cosine"
    for pair in found.pairs:
        cosines = {place.name: place.meetings[pair].cosine for place in found.blocks}
        known = {name: cosine for name, cosine in cosines.items() if cosine is not None}
        lowest = min(known, key=lambda name: known[name], default=None)
        where = "" if lowest is None else f"{lowest} ({known[lowest]:+.3f})"
        yield f"{pair_label(pair):<{width}}  {_cell(found.total.meetings[pair]):>16}  {where}"


def _worst(found: Interference) -> Iterable[str]:
    clashes, shared = found.clashes()[:_LISTED], found.most_shared()[:_LISTED]
    if clashes:
        yield from ("", "layers that undo each other most (what each takes from the cosine of the whole):")
        yield from (f"  {part:+.4f}  {layer}  {pair_label(pair)}" for part, layer, pair in clashes)
    if shared:
        yield from ("", "layers that share most (what each adds to the overlap of the whole):")
        yield from (f"  {part:.4f}  {layer}  {pair_label(pair)}" for part, layer, pair in shared)


def _clipping(found: Interference) -> Iterable[str]:
    if found.clipping is not None:
        clipping = found.clipping
        yield ""
        yield (
            f"SVDiff: the sum cuts {clipping.clipped} of {clipping.trained} trained singular values at zero "
            f"({clipping.share:.2%}), in {len(clipping.layers)} layers"
        )


def _balancing(found: Interference) -> Iterable[str]:
    if found.pairs:
        weights = ", ".join(f"{name} {weight_text(weight)}" for name, weight in found.balancing.items())
        yield from ("", f"weights at which equal weights would mean equal norms: {weights}")


def _cell(meeting: Meeting) -> str:
    if meeting.cosine is None or meeting.overlap is None:
        return "-        -"
    return f"{meeting.cosine:+.3f}    {meeting.overlap:.3f}"


def _place_json(place: Place) -> dict[str, Any]:
    pairs = [{"adapters": list(pair), **vars(meeting)} for pair, meeting in place.meetings.items()]
    return {"name": place.name, "norms": place.norms, "pairs": pairs}
