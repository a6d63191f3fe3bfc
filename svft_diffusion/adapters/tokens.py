"""Learned tokens (textual inversion) as a part of an adapter: words that a prompt can call the subject by.

A token has no strength: whatever the weight of its adapter, a prompt that has the token gets its embedding, and one
that does not is as if it were not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from svft_diffusion.adapters.token_rows import (
    can_take_tokens,
    knows_token,
    learned_tokens_of,
    put_tokens,
    take_tokens,
    width_of_table,
)
from svft_diffusion.adapters.weights import check_loaded
from svft_diffusion.errors import UserError
from svft_diffusion.files.names import TEXT_ENCODERS, components_of
from svft_diffusion.files.tensor_names import TOKENS, is_tokens, tensor_name

# Text encoder -> token -> its embedding (width,).
TokenTables = Mapping[str, Mapping[str, Tensor]]


def add_tokens(pipe: object, name: str, tokens: TokenTables) -> None:
    """Give an adapter tokens that it has learned; `save_adapter` writes them, `unload_adapter` removes them.

    Each becomes one token of the tokenizer, with the row given as its embedding, in float32; `token_parameters` gives
    the rows to a trainer. Prompts without the token are encoded bit for bit as before. A text encoder that was compiled
    before doesn't see the tokens: compile it again.

    Args:
        pipe: a pipeline, or a mapping of component names to models and tokenizers.
        name: an adapter that is there already.
        tokens: such as ``{"text_encoder": {"<sks>": row}}`` with ``row`` (width,). Of one token with several rows,
            pipelines read ``<sks>`` as ``<sks> <sks>_1 <sks>_2`` where those tokens are there.

    Raises:
        UserError: no such adapter, it has tokens, a text encoder or its tokenizer is missing, a row is of another
            width or not finite, or a tokenizer knows the token already. All is as it was.
    """
    check_loaded(components_of(pipe), [name])
    check_tokens(pipe, name, tokens)
    with bringing_tokens(pipe, name, tokens):
        pass


def check_tokens(pipe: object, name: str, tokens: TokenTables) -> None:
    """Refuse what `add_tokens` refuses, before anything changes."""
    components = components_of(pipe)
    for component, table in tokens.items():
        if component not in TEXT_ENCODERS:
            raise UserError(f"tokens belong to one of {', '.join(TEXT_ENCODERS)}, not to {component}")
        if component not in components:
            raise UserError(f"there are learned tokens for the {component}, which this pipeline does not have")
        encoder, tokenizer = components[component], _tokenizer_of(pipe, component)
        if tokenizer is None:
            raise UserError(
                f"learned tokens of the {component} need its tokenizer: give the pipeline, or a mapping that also "
                f"has a {_tokenizer_name(component)!r}"
            )
        width = width_of_table(encoder)
        if width is None or not can_take_tokens(tokenizer):
            kinds = f"{type(encoder).__name__} with a {type(tokenizer).__name__}"
            raise UserError(f"the {component} is a {kinds}, which can't take learned tokens")
        _check_rows(component, table, width)
        _check_free(encoder, tokenizer, name, component, list(table))


@contextmanager
def bringing_tokens(pipe: object, name: str, tokens: TokenTables) -> Iterator[None]:
    """Tokens that `check_tokens` accepted, added to an adapter; removed again if anything goes wrong within."""
    components = components_of(pipe)
    try:
        for component, table in tokens.items():
            put_tokens(components[component], _tokenizer_of(pipe, component), name, table)
        yield
    except BaseException:
        for component in tokens:
            take_tokens(components[component], name)
        raise


def tokens_of(models: object, name: str) -> dict[str, list[str]]:
    """Text encoder -> the tokens that an adapter brought to it; empty where it brought none."""
    held = {component: learned_tokens_of(model) for component, model in components_of(models).items()}
    return {
        component: list(learned.names[name])
        for component, learned in held.items()
        if learned is not None and name in learned.names
    }


def token_parameters(models: object, name: str) -> dict[str, nn.Parameter]:
    """The live rows of an adapter's tokens, ``<text encoder>.tokens`` -> (tokens, width), float32."""
    components = components_of(models)
    parameters = {}
    for component in tokens_of(models, name):
        held = learned_tokens_of(components[component])
        assert held is not None
        parameters[tensor_name(component, TOKENS)] = held.rows[name]
    return parameters


def tokens_in(names: Mapping[str, Sequence[str]], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What `add_tokens` takes, from the tokens in a file's header and its tensors."""
    return {
        component: dict(zip(listed, tensors[tensor_name(component, TOKENS)], strict=True))
        for component, listed in names.items()
    }


def without_tokens(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter that belong to layers, and the sketch."""
    return {key: tensor for key, tensor in tensors.items() if not is_tokens(key)}


def check_same_tokens(
    models: object, name: str, label: str, names: Mapping[str, Sequence[str]], tensors: Mapping[str, Tensor]
) -> None:
    """Raise `UserError` if a file's tokens can't take the place of those of adapter ``name``."""
    ours = tokens_of(models, name)
    if ours != names:
        raise UserError(
            f"{label} can't take the place of adapter {name!r}: its learned tokens are {_listed(names)}, the "
            f"adapter's {_listed(ours)}; unload that and load the file"
        )
    for key, rows in token_parameters(models, name).items():
        if rows.shape != tensors[key].shape:
            raise UserError(f"{label} can't take the place of adapter {name!r}: its {key} are of another width")


def check_token_rows(models: object, name: str, state: Mapping[str, Tensor]) -> None:
    """Raise `UserError` if the tokens of a state are not as many, and as wide, as those of adapter ``name``."""
    ours = token_parameters(models, name)
    given = {key for key in state if is_tokens(key)}
    if different := sorted(ours.keys() ^ given):
        holder = "the adapter" if different[0] in ours else "the state"
        raise UserError(f"the state does not fit adapter {name!r}: {holder} alone has {different[0]}")
    for key, rows in ours.items():
        if rows.shape != state[key].shape:
            raise UserError(f"the state does not fit adapter {name!r}: {key} is of another shape")


def copy_token_rows(models: object, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write other rows, which `check_same_tokens` accepted, over those of an adapter, in place."""
    with torch.no_grad():
        for key, rows in token_parameters(models, name).items():
            rows.copy_(tensors[key])


def _tokenizer_name(component: str) -> str:
    return component.replace("text_encoder", "tokenizer")


def _tokenizer_of(pipe: object, component: str) -> Any:
    name = _tokenizer_name(component)
    return pipe.get(name) if isinstance(pipe, Mapping) else getattr(pipe, name, None)


def _check_rows(component: str, table: Mapping[str, Tensor], width: int) -> None:
    if not table:
        raise UserError(f"no tokens are given for the {component}")
    if len({token.casefold() for token in table}) != len(table):
        raise UserError(f"tokens that differ in case alone are one to most tokenizers: {', '.join(table)}")
    for token, row in table.items():
        if not token.isprintable() or token.split() != [token]:
            raise UserError(f"a learned token is one word without spaces, not {token!r}")
        if tuple(row.shape) != (width,):
            raise UserError(
                f"token {token} has an embedding of shape {tuple(row.shape)}, the {component} takes ({width},)"
            )
        if not torch.isfinite(row).all():
            raise UserError(f"the embedding of token {token} holds NaN or infinite values")


def _check_free(encoder: nn.Module, tokenizer: Any, name: str, component: str, tokens: Sequence[str]) -> None:
    held = learned_tokens_of(encoder)
    others = {} if held is None else held.names
    if name in others:
        raise UserError(f"adapter {name!r} has tokens in the {component} already: {', '.join(others[name])}")
    for token in tokens:
        for other, theirs in others.items():
            if token in theirs:
                raise UserError(
                    f"token {token} belongs to adapter {other!r}, and can't have two meanings; unload that first"
                )
        if knows_token(tokenizer, token):
            raise UserError(f"token {token} is known to the tokenizer of the {component} already; choose another")


def _listed(names: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{component}: {', '.join(listed)}" for component, listed in names.items()) or "none"
