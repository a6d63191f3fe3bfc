"""Learned tokens of one text encoder: their names in its tokenizer, their embeddings beside its table.

The table itself is left alone. A longer one would be another weight to an adapter around it and to the digests of the
base, and making it longer loses rows where a model has more of them than its tokenizer has tokens, as T5 has. Rows
beside it also stay float32 in a 16-bit model, as all that is trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import AddedToken

from svft_diffusion.errors import UserError
from svft_diffusion.files.names import base_module, module_path

_ATTRIBUTE = "learned_tokens"
# Where the text encoders of pipelines have their table, by canonical path: CLIP, T5. Its parent calls it with
# `input_ids`, and takes `inputs_embeds` in their place.
_TABLES = ("text_model.embeddings.token_embedding", "encoder.embed_tokens")
# What configurations of CLIP call the end token where it is another: transformers then takes the highest id for it.
_WRONG_END = 2


class LearnedTokens(nn.Module):
    """The tokens that adapters brought to a text encoder, of which this is a part while there are any.

    Their ids lie above those that the tokenizer had before. They never reach the table: the rows here take the place
    of what it has for them, whatever adapters lie around it.
    """

    ids: Tensor

    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        place = _place_of_table(encoder)
        assert place is not None
        parent, self.table = place
        self.tokenizer = tokenizer
        self.names: dict[str, list[str]] = {}  # adapter -> its tokens
        self.rows = nn.ParameterDict()  # adapter -> (tokens, width), float32
        self.register_buffer("ids", torch.empty(0, dtype=torch.long), persistent=False)
        self._hook = parent.register_forward_pre_hook(self.look_up, with_kwargs=True)

    def add(self, adapter: str, tokens: Mapping[str, Tensor], device: torch.device) -> None:
        """Take an adapter's tokens and their rows, each (width,); the tokenizer must not know them."""
        self.names[adapter] = list(tokens)
        rows = torch.stack([row.detach().to(device, torch.float32) for row in tokens.values()])
        self.rows[adapter] = nn.Parameter(rows, requires_grad=False)
        self.tokenizer.add_tokens([_added_token(token) for token in tokens])
        self._renew_ids()

    def drop(self, adapter: str) -> None:
        """Forget an adapter's tokens: the tokenizer too. Those of other adapters move up."""
        _remove_from_tokenizer(self.tokenizer, self.names.pop(adapter))
        if adapter in self.rows:
            del self.rows[adapter]
        self._renew_ids()

    def detach(self) -> None:
        """Leave the text encoder."""
        self._hook.remove()

    def look_up(
        self, parent: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Embed the ids (B, T) that the parent of the table is called with, before it does it itself."""
        ids = kwargs.get("input_ids")
        if ids is None or not self.names:
            return None
        matches = ids[..., None] == self.ids.to(ids.device)  # (B, T, tokens)
        is_learned = matches.any(-1)
        embeddings = getattr(parent, self.table)(ids.masked_fill(is_learned, 0))
        rows = functional.embedding(matches.int().argmax(-1), torch.cat(list(self.rows.values())).to(ids.device))
        embeddings = torch.where(is_learned[..., None], rows.to(embeddings), embeddings)
        return args, {**kwargs, "input_ids": None, "inputs_embeds": embeddings}

    def _renew_ids(self) -> None:
        added = self.tokenizer.get_added_vocab()
        ids = [added[token] for tokens in self.names.values() for token in tokens]
        self.ids = torch.tensor(ids, dtype=torch.long, device=self.ids.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedTokens:
        """Behind ``.to``, ``.half``, ``.cuda``: rows only move."""

        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move_only, recurse)
        return self


def learned_tokens_of(encoder: nn.Module) -> LearnedTokens | None:
    """What adapters brought to a text encoder; None: nothing."""
    held = getattr(encoder, _ATTRIBUTE, None)
    return held if isinstance(held, LearnedTokens) else None


def width_of_table(encoder: nn.Module) -> int | None:
    """Elements of a row of a text encoder's table; None for an encoder that can't take learned tokens."""
    place = _place_of_table(encoder)
    if place is None:
        return None
    parent, child = place
    width: int = base_module(getattr(parent, child)).weight.shape[1]  # type: ignore[index,assignment]
    return width


def rows_of_table(encoder: nn.Module, ids: Sequence[int]) -> Tensor:
    """What the table of a text encoder that can take learned tokens has for ids: (ids, width), float32 on the CPU."""
    place = _place_of_table(encoder)
    assert place is not None
    parent, child = place
    table: Tensor = base_module(getattr(parent, child)).weight  # type: ignore[assignment]
    return table.detach()[torch.tensor(ids, device=table.device)].float().cpu()


def put_tokens(encoder: nn.Module, tokenizer: Any, adapter: str, tokens: Mapping[str, Tensor]) -> None:
    """Give an adapter's tokens to a text encoder and its tokenizer, neither of which may know them.

    Where a configuration of CLIP names a wrong end token, transformers pools the text at the highest id: that is the
    end token as long as no token is added. From here on it is told the right one.
    """
    held = learned_tokens_of(encoder)
    if held is None:
        held = LearnedTokens(encoder, tokenizer)
        if tokenizer.eos_token_id == tokenizer.vocab_size - 1:  # else it was not pooled at the end before
            _pool_at(encoder, tokenizer.eos_token_id)
        encoder.add_module(_ATTRIBUTE, held)
    device = next((parameter.device for parameter in encoder.parameters() if not parameter.is_meta), held.ids.device)
    with torch.inference_mode(False):
        held.add(adapter, tokens, device)
        held.to(device)


def take_tokens(encoder: nn.Module, adapter: str) -> None:
    """Take an adapter's tokens out again, if there are any; all is as it was before `put_tokens`.

    Raises:
        UserError: as `check_last`; nothing has changed then.
    """
    held = learned_tokens_of(encoder)
    if held is None or adapter not in held.names:
        return
    check_last(encoder, adapter)
    held.drop(adapter)
    if not held.names:
        held.detach()
        delattr(encoder, _ATTRIBUTE)
        _pool_at(encoder, _WRONG_END)


def check_last(encoder: nn.Module, adapter: str) -> None:
    """Raise `UserError` if tokens that others than adapters added would take other ids without those of ``adapter``."""
    held = learned_tokens_of(encoder)
    if held is None or adapter not in held.names:
        return
    added = held.tokenizer.get_added_vocab()
    ours = {token for tokens in held.names.values() for token in tokens}
    first = min((added[token] for token in held.names[adapter] if token in added), default=len(held.tokenizer))
    later = sorted(token for token, number in added.items() if number > first and token not in ours)
    if later:
        raise UserError(
            f"the tokens of adapter {adapter!r} can't be removed while {', '.join(later)} is in the tokenizer, which "
            "came after them; call pipe.unload_textual_inversion for that first"
        )


def can_take_tokens(tokenizer: Any) -> bool:
    """Whether `put_tokens` and `take_tokens` know how: it is one of the tokenizers library, as all in pipelines are."""
    return isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer)


def knows_token(tokenizer: Any, token: str) -> bool:
    """Whether a tokenizer has a token, or reads the text as a single one."""
    pieces = tokenizer(token, add_special_tokens=False).input_ids
    is_one = len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id
    return is_one or token in tokenizer.get_vocab()


def _place_of_table(encoder: nn.Module) -> tuple[nn.Module, str] | None:
    """The module that holds the table, and the table's name in it."""
    for path in _TABLES:
        parent_path, _, child = module_path(encoder, path).rpartition(".")
        try:
            parent = encoder.get_submodule(parent_path)
        except AttributeError:
            continue
        if isinstance(getattr(parent, child, None), nn.Module):
            return parent, child
    return None


def _pool_at(encoder: nn.Module, end: int) -> None:
    for module in encoder.modules():
        config = getattr(module, "config", None)
        if "eos_token_id" in vars(module) and getattr(config, "eos_token_id", None) == _WRONG_END:
            module.eos_token_id = end  # type: ignore[assignment]


def _added_token(token: str) -> AddedToken:
    # A token of letters must not be found in the middle of words; <token> may stand anywhere.
    return AddedToken(token, single_word=token[0].isalnum() or token[-1].isalnum())


def _remove_from_tokenizer(tokenizer: Any, tokens: Collection[str]) -> None:
    """Tokens that were added after these take the ids that become free, so that there are no gaps."""
    added = sorted(tokenizer.added_tokens_decoder.items())
    first = min((number for number, token in added if token.content in tokens), default=None)
    if first is None:  # pipe.unload_textual_inversion() removes the tokens of everybody
        return
    later = {number: token for number, token in added if number >= first}
    contents = {token.content for token in later.values()}
    state = json.loads(tokenizer.backend_tokenizer.to_str())  # no other way to remove one, diffusers does it too
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in contents]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens([token for token in later.values() if token.content not in tokens])
