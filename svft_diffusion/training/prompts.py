"""Conditioning of the prompts of a run: every prompt is tokenized once, and encoded once where that is enough."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from svft_diffusion.models import Conditioning, ModelFamily
from svft_diffusion.training.encoding_cache import EncodingCache


class PromptTable:
    """The distinct prompts of a run and their conditioning.

    Args:
        trained: components of the pipeline that train. A text encoder among them runs in every step, once for each
            distinct prompt of a batch; what the others say is kept.
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
        with torch.no_grad():
            encode = family.encode_text if cache is None else cache.text
            self._kept = {
                component: encode(component, ids)
                for component, ids in self._token_ids.items()
                if component not in trained
            }

    def stop_training(self) -> None:
        """What every text encoder says from here on is what it says now."""
        for component, ids in self._token_ids.items():
            if component not in self._kept:
                with torch.no_grad():
                    self._kept[component] = self._family.encode_text(component, ids)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning with one row for each of ``prompts``, which must be in the table."""
        distinct = list(dict.fromkeys(prompts))
        rows = [self._row[prompt] for prompt in distinct]
        encoded = {
            component: _rows(self._kept[component], rows)
            if component in self._kept
            else self._family.encode_text(component, ids[rows])
            for component, ids in self._token_ids.items()
        }
        return _rows(self._family.combine_text(encoded), [distinct.index(prompt) for prompt in prompts])


def _rows(encoded: Conditioning, rows: list[int]) -> Conditioning:
    return {name: tensor[torch.tensor(rows, device=tensor.device)] for name, tensor in encoded.items()}
