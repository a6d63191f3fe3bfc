"""Which sizes of pictures can be drawn."""

from __future__ import annotations

from svft_diffusion.errors import UserError

_MOST_PIXELS = 2**26  # 8192 x 8192
_LONGEST_SIDE = 2**14
_MOST_TIMES_OWN = 16
"""How much larger than its own side a base model is asked to draw at most; what it draws falls apart far earlier."""


def check_picture_size(own: int | None = None, **sides: int | None) -> None:
    """Refuse sizes that no base model can draw, or that no memory holds.

    Args:
        own: the side at which the base model was made to draw, as far as it is known.
        sides: pixels by the name of the flag; None where the base model's own is meant.

    Raises:
        UserError: names the flag and what it may be.
    """
    longest = _LONGEST_SIDE if own is None else min(_LONGEST_SIDE, _MOST_TIMES_OWN * own)
    for name, side in sides.items():
        if side is None:
            continue
        if side < 8 or side % 8:
            raise UserError(f"--{name} must be a multiple of 8, got {side}")
        if side > longest:
            reason = f", {_MOST_TIMES_OWN} times what this base model draws" if longest < _LONGEST_SIDE else ""
            raise UserError(f"--{name} must be at most {longest}{reason}; got {side}")
    pixels = 1
    for side in sides.values():
        pixels *= side or own or 1
    if len(sides) == 1:
        pixels *= pixels  # a square
    if pixels > _MOST_PIXELS:
        given = " and ".join(f"--{name} {side}" for name, side in sides.items() if side is not None)
        raise UserError(
            f"{given}: pictures have at most {_MOST_PIXELS // 10**6} million pixels, these {pixels / 1e6:.0f}"
        )
