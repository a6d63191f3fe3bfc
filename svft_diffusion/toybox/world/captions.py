"""Captions: what is in a picture, with attributes left out at random as people leave them out."""

from __future__ import annotations

import random

from svft_diffusion.toybox.world.individuals import Individual, View
from svft_diffusion.toybox.world.vocabulary import RARE_TOKENS, SCENES, nearest_colour_name


def with_article(word: str) -> str:
    """``a car``, ``an orange``."""
    return f"an {word}" if word[0] in "aeio" else f"a {word}"


def scene_phrase(view: View, generator: random.Random | None = None) -> str:
    """The words for a view's scene, such as ``on the beach``; the first of its phrases without a ``generator``."""
    if view.scene == "plain":
        return f"on {with_article(view.background)} background"
    phrases = SCENES[view.scene]
    return generator.choice(phrases) if generator else phrases[0]


def caption(individual: Individual, view: View, generator: random.Random) -> str:
    """A caption of at most 22 words.

    Emblem and part colours are named only in some captions: mostly they are seen and not told, which is what a
    personalization adapter has to learn of its subject. A rare token stands before the class in 4 % of captions.
    """
    words = []
    if generator.random() < 0.04:
        words.append(generator.choice(RARE_TOKENS))
    if individual.pattern != "plain" and generator.random() < 0.7:
        words.append(individual.pattern)
    if generator.random() < 0.65:
        words.append(individual.body_name or nearest_colour_name(individual.body))
    words.append(individual.class_name)
    article = generator.choices((with_article(words[0]), words[0], f"the {words[0]}"), (0.85, 0.08, 0.07))[0]
    text = " ".join([article, *words[1:]])
    if view.hat and generator.random() < 0.92:
        text += f" wearing {with_article(view.hat)} hat" if generator.random() < 0.7 else " wearing a hat"
    else:
        text += _told_parts(individual, generator)
    if generator.random() < 0.88:
        text += f" {scene_phrase(view, generator)}"
    opening = generator.choices(("a photo of ", "a picture of ", "", "an image of "), (0.7, 0.1, 0.1, 0.1))[0]
    return opening + text


def _told_parts(individual: Individual, generator: random.Random) -> str:
    draw = generator.random()
    if draw < 0.3:
        parts, details = nearest_colour_name(individual.parts), nearest_colour_name(individual.details)
        return f" with {parts} parts and {details} details"
    if draw < 0.6 and individual.emblem != "none":
        return f" with {with_article(nearest_colour_name(individual.emblem_colour))} {individual.emblem}"
    return ""
