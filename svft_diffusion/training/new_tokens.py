"""New tokens in a run: their rows beside the text encoders' tables, where they start, and what keeps their length."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svft_diffusion.adapters import add_tokens, token_parameters
from svft_diffusion.adapters.token_rows import learned_tokens_of, rows_of_table
from svft_diffusion.errors import UserError
from svft_diffusion.models import ModelFamily
from svft_diffusion.models.text import text_readers
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.subjects import Subject
from svft_diffusion.training.token_words import initial_words

_PULL = 0.1  # part of the way back to its length, in logarithms, that a row takes after a step


def clip_encoders(family: ModelFamily) -> dict[str, nn.Module]:
    """The text encoders that can learn, by component.

    Raises:
        UserError: the base model has none.
    """
    encoders = {name: model for name, model in family.adapted_models(True).items() if name.startswith("text_encoder")}
    if not encoders:
        raise UserError("--train_text_encoder_ti needs a CLIP text encoder, which this base model does not have")
    return encoders


def add_new_tokens(
    config: TrainingConfig, family: ModelFamily, subjects: Sequence[Subject], adapter: str
) -> dict[str, nn.Parameter]:
    """Give an adapter the tokens that the settings ask for; their rows (tokens, width), float32, by canonical name.

    Raises:
        UserError: the base has no CLIP text encoder, its tokenizer knows a token already, or no prompt is short enough
            for all of a word's tokens to be read.
    """
    if not config.train_text_encoder_ti:
        return {}
    encoders = clip_encoders(family)
    readers = text_readers(family.pipeline)
    starts = initial_words(config, subjects)
    tables = {
        component: {
            token: row
            for word, tokens in config.new_tokens.items()
            for token, row in zip(
                tokens, initial_rows(encoder, readers[component].tokenizer, starts[word], len(tokens)), strict=True
            )
        }
        for component, encoder in encoders.items()
    }
    add_tokens(family.pipeline, adapter, tables)
    parameters = token_parameters(family.pipeline, adapter)
    for rows in parameters.values():
        rows.requires_grad_(True)
    _check_read(family, encoders, [picture.prompt for subject in subjects for picture in subject.pictures])
    return parameters


def initial_rows(encoder: nn.Module, tokenizer: Any, words: str, count: int) -> Tensor:
    """(count, width): the rows of the words' own tokens, repeated where there are too few; else means of neighbours."""
    ids = tokenizer(words, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(f"the tokenizer reads nothing in --initializer_concept {words!r}")
    rows = rows_of_table(encoder, ids)
    if len(rows) < count:
        return torch.stack(list(itertools.islice(itertools.cycle(rows), count)))
    return torch.stack([part.mean(dim=0) for part in rows.tensor_split(count)])


def keep_norms(optimizer: torch.optim.Optimizer, rows: Mapping[str, nn.Parameter]) -> None:
    """After each step of ``optimizer``, pull every row a part of the way to the length that it has now.

    The advanced scripts of diffusers pull all rows to the spread of the whole table, with the same power. Here it is
    the length of the words that they start from: tables hold rows of other lengths that training never saw.
    """
    lengths = {name: row.detach().norm(dim=1, keepdim=True) for name, row in rows.items()}

    def pull(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for name, row in rows.items():
                if row.grad is not None:  # else it trains no more
                    row.mul_((lengths[name] / row.norm(dim=1, keepdim=True).clamp_min(1e-12)) ** _PULL)

    optimizer.register_step_post_hook(pull)


def check_token_gradients(rows: Mapping[str, nn.Parameter]) -> None:
    """Raise `UserError` if the tokens in a batch that had any got no gradient in one of the text encoders."""
    for name, row in rows.items():
        if row.grad is None or not bool(row.grad.any()):
            raise UserError(
                f"the new tokens get no gradient in the {name.partition('.')[0]}, so that training would not change "
                "them; leave out --train_text_encoder_ti"
            )


def have_tokens(encoder: nn.Module, token_ids: Tensor) -> Tensor:
    """Which of the prompts (B, T) have tokens that an adapter brought: (B,), on the CPU."""
    learned = learned_tokens_of(encoder)
    if learned is None:
        return torch.zeros(len(token_ids), dtype=torch.bool)
    return torch.isin(token_ids.cpu(), learned.ids.cpu()).any(dim=1)


def _check_read(family: ModelFamily, encoders: Mapping[str, nn.Module], prompts: Sequence[str]) -> None:
    for component, ids in family.token_ids(list(dict.fromkeys(prompts))).items():
        learned = learned_tokens_of(encoders[component]) if component in encoders else None
        if learned is None:
            continue
        unread = ~torch.isin(learned.ids.cpu(), ids)
        if unread.any():
            names = [name for listed in learned.names.values() for name in listed]
            first = names[int(unread.nonzero()[0])]
            raise UserError(
                f"every prompt with the new token {first} is so long that the {component} does not read it; write it "
                "further to the front, or ask for fewer with --num_new_tokens_per_abstraction"
            )
