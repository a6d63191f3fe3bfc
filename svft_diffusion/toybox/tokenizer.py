"""The embedded model's tokenizer: a CLIP tokenizer whose merges make each word of the world one token.

CLIP's own vocabulary has 49,408 entries; at this model's width they would weigh more than its UNet and almost none
would ever be trained. Ours holds the 256 byte symbols (alone and at a word's end), so that any text can be encoded,
and one token for each word of the world.
"""

from __future__ import annotations

from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from svft_diffusion.toybox.world.vocabulary import (
    CLASSES,
    EMBLEMS,
    NAMED_COLOURS,
    OTHER_WORDS,
    PALETTE,
    PATTERNS,
    RARE_TOKENS,
    SCENES,
)

MAXIMUM_LENGTH = 24
WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"

Merge = tuple[str, str]


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer, built from the world's vocabulary alone (no file is read)."""
    # The first group's token ids come before the special tokens and the second's after them: words that were added to
    # the world later keep the ids of all earlier tokens, so that trained embeddings stay valid.
    phrases = [phrase.split() for scene in SCENES.values() for phrase in scene]
    first = {word for phrase in phrases for word in phrase}
    first |= {*CLASSES, *PALETTE, *PATTERNS, *RARE_TOKENS, *OTHER_WORDS} - _LATER_WORDS
    later = {*NAMED_COLOURS, *EMBLEMS, *_LATER_WORDS} - first
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(symbol + WORD_END for symbol in alphabet)]
    merges: list[Merge] = []
    _add_words(first, tokens, merges)
    tokens += [START, END]
    _add_words(later, tokens, merges)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAXIMUM_LENGTH)
    tokenizer.pad_token = END
    return tokenizer


_LATER_WORDS = frozenset({"parts", "details"})


def _add_words(words: set[str], tokens: list[str], merges: list[Merge]) -> None:
    """Append the merges (and their tokens) that make each of ``words`` one token, longest words first."""
    known = set(tokens)
    for word in sorted(words, key=lambda word: (-len(word), word)):
        while len(symbols := _split(word, merges)) > 1:
            merges.append((symbols[-2], symbols[-1]))
            token = symbols[-2] + symbols[-1]
            if token not in known:
                known.add(token)
                tokens.append(token)


def _split(word: str, merges: list[Merge]) -> list[str]:
    """Byte-pair encoding of one lower-case ASCII word with the merges so far."""
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    symbols = [*word[:-1], word[-1] + WORD_END]
    while len(symbols) > 1:
        rank, index = min((ranks.get(pair, len(merges)), i) for i, pair in enumerate(pairwise(symbols)))
        if rank == len(merges):
            break
        symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]
    return symbols
