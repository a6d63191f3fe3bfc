"""Settings of a training run about new tokens (textual inversion), and what they make of prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from svft_diffusion.settings import setting

_TOKENS = "new tokens"


@dataclass(frozen=True)
class TokenSettings:
    """The part of `TrainingConfig` about tokens that train beside the adapter; `check_token_settings` judges it.

    Names are those of the advanced DreamBooth scripts of diffusers.
    """

    train_text_encoder_ti: bool = setting(
        False,
        "learn new tokens for the subject beside the adapter (textual inversion), in the CLIP text encoders; they take "
        "the place of --token_abstraction in all prompts, also with the text encoders frozen",
        group=_TOKENS,
    )
    token_abstraction: str = setting(
        "TOK", "word of the prompts that stands for the new tokens; of several subjects, with commas", group=_TOKENS
    )
    num_new_tokens_per_abstraction: int = setting(2, "tokens for each such word", group=_TOKENS)
    initializer_concept: str | None = setting(
        None,
        "word or words whose embedding they start from; for several, with commas (default: the class word, as in 'a "
        "photo of TOK dog' or --class_prompt)",
        group=_TOKENS,
    )
    train_text_encoder_ti_frac: float = setting(1.0, "share of the steps in which they train", group=_TOKENS)
    token_learning_rate: float | None = setting(
        None, "their learning rate (default: from the table for the base)", group=_TOKENS
    )
    keep_token_norm: bool = setting(
        False, "after each step, pull the length of their embeddings back to that of the start", group=_TOKENS
    )

    @property
    def new_tokens(self) -> dict[str, tuple[str, ...]]:
        """Each word of `token_abstraction`, as written, and the tokens that take its place; empty where none train."""
        if not self.train_text_encoder_ti:
            return {}
        return {word: self._tokens_for(word) for word in listed(self.token_abstraction)}

    def with_tokens(self, prompt: str) -> str:
        """A prompt with every abstraction, in capitals or not, replaced by its tokens: ``a photo of <sks> dog``."""
        tokens = {word.casefold(): "".join(names) for word, names in self.new_tokens.items()}
        if not tokens:
            return prompt
        return _pattern(tokens).sub(lambda found: tokens[found.group().casefold()], prompt)

    def without_tokens(self, prompt: str) -> str:
        """A prompt with neither abstractions nor tokens."""
        for names in self.new_tokens.values():
            prompt = prompt.replace("".join(names), " ")
        words = self.new_tokens
        return " ".join((_pattern(words).sub(" ", prompt) if words else prompt).split())

    def abstractions_in(self, prompt: str) -> list[str]:
        """The words of `token_abstraction` that stand in a prompt."""
        return [word for word in self.new_tokens if _pattern([word]).search(prompt)]

    def token_steps(self, steps: int) -> int | None:
        """Steps of a run of ``steps`` in which the tokens train; None for all of them."""
        share = self.train_text_encoder_ti_frac
        return None if share == 1 or not self.train_text_encoder_ti else max(1, round(share * steps))

    def _tokens_for(self, word: str) -> tuple[str, ...]:
        # Not `<sks>`, `<sks>_1`: diffusers' pipelines put all of them in the place of the first, SD 3's alone does not,
        # so that no way to write them would mean the same everywhere.
        count = self.num_new_tokens_per_abstraction
        return (f"<{word}>",) if count == 1 else tuple(f"<{word}-{number}>" for number in range(1, count + 1))


def listed(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [part.strip() for part in text.split(",")]


def _pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Any of the words as a whole; not within a token, which begins with ``<``."""
    return re.compile(rf"(?<![\w<])(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
