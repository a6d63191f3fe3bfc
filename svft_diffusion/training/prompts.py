"""Conditioning of the prompts of a run: every prompt is tokenized once, and encoded once where that is enough."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from svft_diffusion.models import Conditioning, ModelFamily


class PromptTable:
    """The distinct prompts of a run and their conditioning.

    Args:
        encode_once: the text encoder is frozen, so its output is kept; otherwise it runs in every step, once for
            each distinct prompt of a batch.
    """

    def __init__(self, family: ModelFamily, prompts: Sequence[str], *, encode_once: bool) -> None:
        self._family = family
        self._row = {prompt: row for row, prompt in enumerate(prompts)}
        self._token_ids = family.token_ids(prompts)
        self._encoded: Conditioning | None = None
        if encode_once:
            with torch.no_grad():
                self._encoded = family.encode_prompts(self._token_ids)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning with one row for each of ``prompts``, which must be in the table."""
        if self._encoded is not None:
            return _rows(self._encoded, [self._row[prompt] for prompt in prompts])
        distinct = list(dict.fromkeys(prompts))
        encoded = self._family.encode_prompts(self._token_ids[[self._row[prompt] for prompt in distinct]])
        return _rows(encoded, [distinct.index(prompt) for prompt in prompts])


def _rows(encoded: Conditioning, rows: list[int]) -> Conditioning:
    return {name: tensor[torch.tensor(rows, device=tensor.device)] for name, tensor in encoded.items()}
