"""What to call the subject by, from the prompts of the training: its trigger and its class word."""

from __future__ import annotations

import re
import string

# Everything up to the subject: "a photo of", "close-up picture of the".
_FRAME = re.compile(r"^.*?\bof\s+", re.IGNORECASE | re.DOTALL)
# Words that end a name: what follows says where the subject is, or begins another.
_ARTICLES = frozenset({"a", "an", "the", "one", "my"})
_PREPOSITIONS = frozenset(
    "of on in at by to with under over near inside beside behind before against from for and wearing".split()
)
_PAUSES = ",.;:!?"


def subject_words(instance_prompt: str | None, class_prompt: str | None) -> tuple[str | None, str | None]:
    """Trigger and class word: ``("sks", "robot")`` of "a photo of a sks robot" and "a photo of a robot".

    The trigger is the first run of words about the subject that the class prompt lacks; the class word, what follows
    and stands in the class prompt too. Without a class prompt nobody knows which of the words is the rare one: then the
    trigger is the whole name, ``("sks robot", None)``.
    """
    words = _FRAME.sub("", instance_prompt or "", count=1).split()
    known = {_bare(word) for word in (class_prompt or "").split()} - _ARTICLES - _PREPOSITIONS
    trigger = _first_run(words, known | _ARTICLES | _PREPOSITIONS, inside=False)
    if not trigger:
        return None, None
    after = words[words.index(trigger[0]) + len(trigger) :]
    class_word = _first_run(after, known, inside=True) if after and _bare(after[0]) in known else []
    return _joined(trigger), _joined(class_word)


def _first_run(words: list[str], listed: set[str] | frozenset[str], *, inside: bool) -> list[str]:
    """The first words in a row that all are in ``listed``, or all are not."""
    run: list[str] = []
    for word in words:
        if (_bare(word) in listed) == inside:
            run.append(word)
            if word[-1] in _PAUSES:
                break
        elif run:
            break
    return run


def _joined(words: list[str]) -> str | None:
    return " ".join(words).rstrip(_PAUSES) or None


def _bare(word: str) -> str:
    return word.strip(string.punctuation).casefold()
