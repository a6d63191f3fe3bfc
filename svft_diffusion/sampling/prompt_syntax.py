"""Adapters in a prompt: ``a dog <adapter:dog:0.8> on the beach``."""

from __future__ import annotations

import re

from svft_diffusion.adapters.weights import AdapterWeight
from svft_diffusion.errors import UserError
from svft_diffusion.sampling.weight_text import component_weights, weight_number

# No part of a tag holds an angle bracket: a search that fails gives up at the next one, and never goes back.
_TAG = re.compile(r"<adapter:([^<>]*)>", re.IGNORECASE)
_WITHOUT_END = re.compile(r"<adapter:[^<>]*", re.IGNORECASE)
_OF_OTHER_TOOLS = re.compile(r"<(?:lora|lyco|hypernet):([^<>]*)>", re.IGNORECASE)
_EXAMPLE = "<adapter:dog:0.8> or <adapter:dog:unet=0.5,te=0.2>"


def split_prompt(text: str) -> tuple[str, dict[str, AdapterWeight]]:
    """The prompt without its tags, and the weights of the adapters they name, in their order.

    ``<adapter:NAME>`` is weight 1, ``<adapter:NAME:0.8>`` one for all, ``<adapter:NAME:unet=0.5,te=0.2>`` one
    for each component, where those not named are off. Spaces around a tag become one; a prompt without tags stays as
    it is.

    Raises:
        UserError: another tool's tag for a LoRA, a tag without an end or a name, a weight that is missing or no number,
            an adapter named twice, two numbers without names, of which tools disagree which is the text encoder's.
    """
    if other := _OF_OTHER_TOOLS.search(text):  # the text encoder would read it as words
        raise UserError(
            f"{_short(other[0])}: adapters are named as in {_EXAMPLE}; "
            "`svft-diffusion import` makes one of a LoRA's file"
        )
    weights: dict[str, AdapterWeight] = {}
    for found in _TAG.finditer(text):
        name, weight = _parse_tag(found[0], found[1])
        if name in weights:
            raise UserError(f"{_short(found[0])}: the prompt names {name!r} twice")
        weights[name] = weight
    plain = _TAG.sub(" ", text)
    if rest := _WITHOUT_END.search(plain):
        raise UserError(f"{_short(rest[0].strip())}: a tag has no end; write {_EXAMPLE}")
    if not weights:
        return text, {}
    return re.sub(r"[ \t]+", " ", plain).strip(), weights


def _parse_tag(tag: str, inside: str) -> tuple[str, AdapterWeight]:
    name, *numbers = (part.strip() for part in inside.split(":"))
    if not name:
        raise UserError(f"{_short(tag)}: an adapter's name is missing; write {_EXAMPLE}")
    if len(numbers) > 1 or (numbers and "," in numbers[0] and "=" not in numbers[0]):
        raise UserError(
            f"{_short(tag)}: one weight, or named ones: tools disagree on which of two numbers is the text encoder's, "
            f"so write <adapter:{_short(name)}:unet=0.5,te=0.2>"
        )
    weight = numbers[0] if numbers else ""
    if numbers and not weight:
        raise UserError(f"{_short(tag)}: the weight after the last colon is missing; write {_EXAMPLE}")
    return name, component_weights(_short(tag), weight) or weight_number(_short(tag), weight, _EXAMPLE)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
