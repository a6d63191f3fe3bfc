"""A sheet of exactly those pixels that are trained on, with the names of their files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from svft_diffusion.data.cutting import Cut, Cutter
from svft_diffusion.data.dataset import Picture
from svft_diffusion.files.whole_files import replace_when_whole
from svft_diffusion.sampling.grid import wrap_text
from svft_diffusion.terminal import printable

MOST_TILES = 96
_LEAST_TILE_WIDTH = 160  # smaller pictures are enlarged by a whole number, which keeps their pixels
_MOST_PIXELS = 32_000_000  # of all tiles; larger ones are reduced
_LEAST_COLUMNS = 3
_MARGIN = 8
_TEXT_SIZE, _LINE_HEIGHT, _MOST_LINES = 13, 17, 2
_LABEL_HEIGHT = _MOST_LINES * _LINE_HEIGHT + _MARGIN
_MASKED_BRIGHTNESS = 0.25

Tile = tuple[Image.Image, str]
"""A picture and its label."""


def contact_sheet(pictures: Sequence[Picture], cutter: Cutter, *, all_variants: bool = True) -> Image.Image:
    """Draw cuts of the pictures under which their names stand; what masks leave out is darkened.

    Args:
        all_variants: every cut that is kept, those of one picture in a row; otherwise the first of each picture.

    Raises:
        UserError: a picture can't be read any more.
    """
    rows: list[list[Tile]] = []
    for picture in pictures:
        variants = cutter.number_of_variants(picture) if all_variants else 1
        if sum(map(len, rows)) + variants > MOST_TILES:
            break
        name = printable(picture.path.name)
        labels = [name] if variants == 1 else [f"{name} ({number} of {variants})" for number in range(1, variants + 1)]
        rows.append([(shown(cutter.cut(picture, variant)), label) for variant, label in enumerate(labels)])
    if all(len(row) == 1 for row in rows):
        tiles = [row[0] for row in rows]
        columns = min(len(tiles), max(_LEAST_COLUMNS, math.ceil(len(tiles) ** 0.5)))
        rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    return _sheet(rows)


def write_contact_sheet(sheet: Image.Image, file: Path) -> Path:
    """Write the sheet as PNG, whole or not at all. Raises `UserError` if that fails."""
    with replace_when_whole(file) as unfinished:
        sheet.save(unfinished, format="PNG")
    return file


def shown(cut: Cut) -> Image.Image:
    """A cut as a picture, its 8-bit pixels as they were; what its mask leaves out is darkened."""
    pixels = ((cut.pixels + 1.0) * 127.5).round().clamp(0, 255)
    if cut.mask is not None:
        pixels = pixels * (_MASKED_BRIGHTNESS + (1.0 - _MASKED_BRIGHTNESS) * cut.mask)
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def _sheet(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    images = [image for row in rows for image, _ in row]
    columns = max(map(len, rows))
    scale = _scale(max(image.width for image in images), max(image.height for image in images), len(rows) * columns)
    cell_width = max(round(image.width * scale) for image in images)
    font = ImageFont.load_default(size=_TEXT_SIZE)
    heights = [max(round(image.height * scale) for image, _ in row) + _LABEL_HEIGHT for row in rows]
    sheet = Image.new("RGB", (columns * (cell_width + _MARGIN) + _MARGIN, sum(heights) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, (image, label) in enumerate(row):
            left = _MARGIN + column * (cell_width + _MARGIN)
            tile = _scaled(image, scale)
            sheet.paste(tile, (left, top))
            for line, text in enumerate(wrap_text(label, font, cell_width)[:_MOST_LINES]):
                draw.text((left, top + tile.height + 2 + line * _LINE_HEIGHT), text, font=font, fill="#202020")
        top += height
    return sheet


def _scale(width: int, height: int, tiles: int) -> float:
    """1 where that can be: then the sheet holds the very pixels. Small pictures are enlarged by a whole number."""
    enlarged = -(-_LEAST_TILE_WIDTH // width)
    affordable = math.sqrt(_MOST_PIXELS / (tiles * width * height))
    return enlarged if enlarged <= affordable else affordable


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
