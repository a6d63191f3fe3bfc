"""New tokens before the base model is loaded: are the settings right, and do the prompts have words for them?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from svft_diffusion.errors import UserError
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.subject_words import subject_words
from svft_diffusion.training.subjects import Subject
from svft_diffusion.training.token_settings import TokenSettings, listed

_LISTED_PHOTOS = 5
_MOST_TOKENS = 64  # CLIP reads 77 in all


def check_token_settings(config: TrainingConfig) -> None:
    """Check the settings about new tokens without looking at any prompt.

    Raises:
        UserError: values or combinations that can't work.
    """
    if not config.train_text_encoder_ti:
        for field in dataclasses.fields(TokenSettings):
            if getattr(config, field.name) != field.default:
                raise UserError(f"--{field.name} has no effect without --train_text_encoder_ti")
        return
    if not 1 <= config.num_new_tokens_per_abstraction <= _MOST_TOKENS:
        raise UserError(
            f"--num_new_tokens_per_abstraction must be from 1 to {_MOST_TOKENS}, got "
            f"{config.num_new_tokens_per_abstraction}"
        )
    if not 0 < config.train_text_encoder_ti_frac <= 1:  # NaN too
        raise UserError(f"--train_text_encoder_ti_frac must lie in (0, 1], got {config.train_text_encoder_ti_frac:g}")
    rate = config.token_learning_rate
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise UserError(f"--token_learning_rate must be a finite number above 0, got {rate:g}")
    words = listed(config.token_abstraction)
    for word in words:
        if not word or not word.isprintable() or word.split() != [word] or set(word) & set("<>"):
            raise UserError(
                f"--token_abstraction must be one word, or several with commas, without < and >: got {word!r}"
            )
    if len({word.casefold() for word in words}) < len(words):
        raise UserError(f"--token_abstraction names a word twice: {config.token_abstraction}")
    concepts = [] if config.initializer_concept is None else listed(config.initializer_concept)
    if not all(concepts):
        raise UserError(f"--initializer_concept has an empty part: {config.initializer_concept!r}")
    if len(concepts) not in (0, 1, len(words)):
        raise UserError(
            f"--initializer_concept names {len(concepts)} starts for {len(words)} words of --token_abstraction: give "
            "one for all, or one for each"
        )
    if config.resolved_optimizer == "schedulefree" and config.keep_token_norm:
        raise UserError("--keep_token_norm would change what --optimizer schedulefree averages; leave one out")


def with_new_tokens(config: TrainingConfig, subjects: Sequence[Subject]) -> tuple[list[Subject], list[str]]:
    """The subjects with tokens in their prompts where the abstractions stood, and notes on prompts without one.

    Raises:
        UserError: an abstraction is in no prompt or in one of the class, a subject has none, or nothing says what its
            tokens start from.
    """
    if not config.train_text_encoder_ti:
        return list(subjects), []
    prompts = [picture.prompt for subject in subjects for picture in subject.pictures]
    for word in config.new_tokens:
        if not any(word in config.abstractions_in(prompt) for prompt in prompts):
            raise UserError(f"--token_abstraction {word} is in no prompt{_remedy(subjects[0])}")
    notes = []
    for number, subject in enumerate(subjects, 1):
        for prompt in filter(None, (subject.class_prompt, *subject.class_prompts)):
            for word in config.abstractions_in(prompt):
                raise UserError(
                    f"--token_abstraction {word} is in a prompt of the class too: {prompt!r}; leave it out there"
                )
        without = [picture.path.name for picture in subject.pictures if not config.abstractions_in(picture.prompt)]
        if len(without) == len(subject.pictures):
            raise UserError(
                f"subject {number} ({subject.instance_prompt!r}) has none of --token_abstraction "
                f"{config.token_abstraction} in its prompts"
            )
        if without:
            named = ", ".join(without[:_LISTED_PHOTOS]) + (" and others" if len(without) > _LISTED_PHOTOS else "")
            notes.append(f"prompts without a new token: {named}")
    starts = ", ".join(
        f"{''.join(config.new_tokens[word])} as {start!r}" for word, start in initial_words(config, subjects).items()
    )
    replaced = ", ".join(config.new_tokens)
    notes.append(f"new tokens take the place of {replaced} in prompts; at the start they mean: {starts}")
    return [_with_tokens(config, subject) for subject in subjects], notes


def initial_words(config: TrainingConfig, subjects: Sequence[Subject]) -> dict[str, str]:
    """Abstraction -> the word or words that its tokens start from.

    Args:
        subjects: with abstractions or with tokens in their prompts.

    Raises:
        UserError: nothing says it.
    """
    words = list(config.new_tokens)
    if config.initializer_concept is not None:
        concepts = listed(config.initializer_concept)
        return dict(zip(words, concepts * len(words) if len(concepts) == 1 else concepts, strict=True))
    return {word: _class_word(config, word, subjects) for word in words}


def trigger_and_class(config: TrainingConfig, subject: Subject) -> tuple[str | None, str | None]:
    """`subject_words` of a subject; without a class prompt, what is not its new tokens is known to be the class."""
    known = config.without_tokens(subject.instance_prompt) if config.train_text_encoder_ti else None
    return subject_words(subject.instance_prompt, subject.class_prompt or known)


def _class_word(config: TrainingConfig, word: str, subjects: Sequence[Subject]) -> str:
    tokens = config.with_tokens(word)
    for subject in subjects:
        for prompt in (subject.instance_prompt, *(picture.prompt for picture in subject.pictures)):
            with_tokens = config.with_tokens(prompt)
            if tokens not in with_tokens:
                continue
            class_word = subject_words(with_tokens, config.without_tokens(prompt))[1]
            class_word = class_word or subject_words(subject.class_prompt, None)[0]
            if class_word is not None:
                return class_word
    raise UserError(
        f"nothing says what --token_abstraction {word} is: write the class behind it ('a photo of {word} dog'), or "
        "give --initializer_concept"
    )


def _with_tokens(config: TrainingConfig, subject: Subject) -> Subject:
    return dataclasses.replace(
        subject,
        instance_prompt=config.with_tokens(subject.instance_prompt),
        pictures=[
            dataclasses.replace(picture, prompt=config.with_tokens(picture.prompt)) for picture in subject.pictures
        ],
    )


def _remedy(subject: Subject) -> str:
    trigger, class_word = subject_words(subject.instance_prompt, subject.class_prompt)
    known = trigger is not None and class_word is not None and " " not in trigger
    return f"; the word there seems to be {trigger}" if known else "; name the rare word that stands for the subject"
