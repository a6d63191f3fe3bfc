"""The words of the world: classes, colours, patterns, emblems, scenes and the rare tokens left free for subjects."""

from __future__ import annotations

Colour = tuple[int, int, int]

CLASSES = ("robot", "car", "house", "tree", "fish", "mug", "teddy", "rocket", "duck", "mushroom")

# The ten body colours that captions name and the attribute reader tells apart. "black" is lightened so that the dark
# outline of a part stays visible on it.
PALETTE: dict[str, Colour] = {
    "red": (205, 45, 40),
    "orange": (240, 140, 30),
    "yellow": (245, 215, 50),
    "green": (60, 160, 70),
    "blue": (50, 95, 205),
    "purple": (130, 65, 175),
    "pink": (240, 140, 185),
    "white": (240, 240, 238),
    "black": (62, 62, 68),
    "brown": (125, 80, 45),
}

# Names for colours between those of the palette; only captions use them.
NAMED_COLOURS: dict[str, Colour] = PALETTE | {
    "gray": (128, 128, 130),
    "teal": (30, 150, 150),
    "cyan": (70, 205, 230),
    "lime": (150, 215, 60),
    "navy": (35, 45, 110),
    "magenta": (205, 50, 150),
    "maroon": (120, 30, 45),
    "olive": (125, 125, 50),
    "beige": (220, 200, 160),
    "gold": (200, 160, 60),
}

PATTERNS = ("plain", "striped", "dotted", "checkered")
EMBLEMS = ("none", "star", "heart", "disc", "cross", "bolt")

# Scene -> the phrases that captions use for it. "plain" is a coloured background and names its colour instead.
SCENES: dict[str, tuple[str, ...]] = {
    "grass": ("on the grass", "in a meadow"),
    "beach": ("on the beach",),
    "night": ("at night", "in the night sky"),
    "snow": ("in the snow",),
    "checker": ("on a checkerboard floor",),
    "brick": ("in front of a brick wall",),
    "water": ("under water",),
    "desert": ("in the desert",),
    "wood": ("on a wooden table",),
    "sunset": ("at sunset",),
    "plain": (),
}

# Tokens that appear before the class word of random individuals: trained, so that they are no noise, and without a
# meaning, so that an adapter can give them one.
RARE_TOKENS = ("sks", "zwx", "ohwx", "qxj")

# Words that only glue captions together, or that people type at a model of this kind.
OTHER_WORDS = tuple(
    "a an the of photo picture image on background wearing hat in at under gray with and two one big small toy "
    "painting drawing sketch pixel art style parts details".split()
)


def nearest_colour_name(colour: Colour, names: dict[str, Colour] = NAMED_COLOURS) -> str:
    """The name in ``names`` whose colour is nearest to ``colour`` (Euclidean distance in 8-bit RGB)."""
    return min(names, key=lambda name: sum((a - b) ** 2 for a, b in zip(colour, names[name], strict=True)))
