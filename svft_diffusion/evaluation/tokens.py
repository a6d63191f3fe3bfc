"""Prompts without the token: what a judge who never met the subject can understand."""

from __future__ import annotations

import re
import string


def without_token(prompt: str, trigger: str) -> str:
    """``a photo of sks dog`` -> ``a photo of a dog``: the class word stays, and gets an article where it needs one.

    Args:
        trigger: one word or several; as often as the prompt holds them. Nothing changes if it is empty.
    """
    if not trigger.strip():
        return prompt
    token = r"\s+".join(map(re.escape, trigger.split()))
    pattern = re.compile(rf"(?:(?<=\s)|^){token}(?=$|\s|[{re.escape(string.punctuation)}])")
    words: list[str] = []
    for number, part in enumerate(pattern.split(prompt)):
        following = part.split()
        if number and following:
            _join(words, following[0])
        words += following
    return " ".join(words)


def _join(words: list[str], following: str) -> None:
    """Put the article that fits ``following`` at the end of ``words``, unless another word has its place."""
    article = "an" if following[0].lower() in "aeiou" else "a"
    last = words[-1].lower() if words else ""
    if last in ("a", "an"):
        words[-1] = article if words[-1].islower() else article.capitalize()
    elif following[0].isalnum() and last in ("of", ""):
        words.append(article)
