"""A procedural world of toy individuals in scenes, with captions: what the embedded model was trained on.

An *individual* (:class:`Individual`) is everything that stays the same between two photos of one toy: its class, the
colours of its parts, its pattern, its emblem and its proportions. A *view* (:class:`View`) is everything that changes:
scene, place, size, rotation, light, hat. :func:`render` draws an individual in a view, :func:`caption` describes it.
Because the generator is at hand, the true identity and the true answer to every prompt are known, which real photos
never give.
"""

from svft_diffusion.toybox.world.captions import caption, scene_phrase
from svft_diffusion.toybox.world.individuals import Individual, View, random_individual, random_view
from svft_diffusion.toybox.world.render import render
from svft_diffusion.toybox.world.vocabulary import CLASSES, PALETTE, PATTERNS, RARE_TOKENS, SCENES

__all__ = [
    "CLASSES",
    "PALETTE",
    "PATTERNS",
    "RARE_TOKENS",
    "SCENES",
    "Individual",
    "View",
    "caption",
    "random_individual",
    "random_view",
    "render",
    "scene_phrase",
]
