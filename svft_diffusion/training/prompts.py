"""Conditioning of the prompts of a run: every prompt is tokenized once, and encoded once where that is enough."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from svft_diffusion.models import Conditioning, ModelFamily
from svft_diffusion.training.encoding_cache import EncodingCache
from svft_diffusion.training.new_tokens import have_tokens

_PROMPTS_AT_ONCE = 16


class PromptTable:
    """The distinct prompts of a run and their conditioning.

    Args:
        trained: components of the pipeline that train. A text encoder among them runs in every step, once for each
            distinct prompt of a batch; what the others say is kept, but for prompts with new tokens, which train.
        cache: where what they say is kept for other runs.
    """

    def __init__(
        self,
        family: ModelFamily,
        prompts: Sequence[str],
        *,
        trained: Collection[str],
        cache: EncodingCache | None = None,
    ) -> None:
        self._family = family
        self._row = {prompt: row for row, prompt in enumerate(prompts)}
        self._token_ids = family.token_ids(prompts)
        # Which rows say another thing in every step; where it is none, all is kept.
        self._changing = {
            component: torch.ones(len(ids), dtype=torch.bool)
            if component in trained
            else have_tokens(getattr(family.pipeline, component), ids)
            for component, ids in self._token_ids.items()
        }
        self._ever_changed = dict(self._changing)
        self._kept: dict[str, Conditioning] = {}
        with torch.no_grad():
            encode = family.encode_text if cache is None else cache.text
            for component, ids in self._token_ids.items():
                constant = ~self._changing[component]
                if constant.any():
                    self._kept[component] = _in_parts(encode, component, ids[constant])

    def stop_training(self) -> None:
        """What every text encoder says from here on is what it says now."""
        for component, ids in self._token_ids.items():
            changing = self._changing[component]
            if changing.any():
                with torch.no_grad():
                    self._kept[component] = _in_parts(self._family.encode_text, component, ids)
                self._changing[component] = torch.zeros_like(changing)

    @property
    def read_in_steps(self) -> list[str]:
        """The text encoders that `conditioning` still runs; what the others say is kept."""
        return [component for component, changing in self._changing.items() if changing.any()]

    def has_new_tokens(self, prompts: Sequence[str]) -> bool:
        """Whether one of ``prompts``, which must be in the table, has a token that trains."""
        rows = [self._row[prompt] for prompt in prompts]
        pipeline = self._family.pipeline
        return any(
            bool(have_tokens(getattr(pipeline, component), ids[rows]).any())
            for component, ids in self._token_ids.items()
        )

    def says_something(self, prompts: Sequence[str]) -> bool:
        """Whether the denoiser is told anything by ``prompts``: zeros leave what reads text without gradient."""
        return any(prompts) or not self._family.zeros_for_empty_prompt

    def conditioning(self, prompts: Sequence[str], *, anew: bool = False) -> Conditioning:
        """Conditioning with one row for each of ``prompts``, which must be in the table.

        Args:
            anew: nothing that came from training is taken from what is kept, even after `stop_training`.
        """
        distinct = list(dict.fromkeys(prompts))
        rows = [self._row[prompt] for prompt in distinct]
        changing = self._ever_changed if anew else self._changing
        encoded = {component: self._encoded(component, rows, changing[component]) for component in self._token_ids}
        combined = self._family.combine_text(encoded)
        if self._family.zeros_for_empty_prompt:
            combined = _without_empty(combined, distinct)
        return _rows(combined, [distinct.index(prompt) for prompt in prompts])

    def _encoded(self, component: str, rows: list[int], changing: Tensor) -> Conditioning:
        ids = self._token_ids[component]
        places = (~self._changing[component]).cumsum(0) - 1  # of the rows that are kept, among those
        kept = [place for place, row in enumerate(rows) if not changing[row]]
        if len(kept) == len(rows):
            return _rows(self._kept[component], places[rows].tolist())
        live = [place for place, row in enumerate(rows) if changing[row]]
        encoded = self._family.encode_text(component, ids[[rows[place] for place in live]])
        if not kept:
            return encoded
        constant = _rows(self._kept[component], places[[rows[place] for place in kept]].tolist())
        together = {name: torch.cat((constant[name].to(tensor), tensor)) for name, tensor in encoded.items()}
        order = kept + live
        return _rows(together, [order.index(place) for place in range(len(rows))])


def _without_empty(conditioning: Conditioning, prompts: Sequence[str]) -> Conditioning:
    """Zeros in the rows of empty prompts. They stay part of the graph: all processes need a gradient of every value."""
    empty = torch.tensor([not prompt for prompt in prompts])
    return {
        name: tensor.masked_fill(empty.to(tensor.device).view(-1, *[1] * (tensor.ndim - 1)), 0)
        for name, tensor in conditioning.items()
    }


def _in_parts(encode: Callable[[str, Tensor], Conditioning], component: str, ids: Tensor) -> Conditioning:
    """`ModelFamily.encode_text`, of a few prompts at a time: there may be hundreds of captions."""
    parts = [encode(component, part) for part in ids.split(_PROMPTS_AT_ONCE)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _rows(encoded: Conditioning, rows: list[int]) -> Conditioning:
    return {name: tensor[torch.tensor(rows, device=tensor.device)] for name, tensor in encoded.items()}
