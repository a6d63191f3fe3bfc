"""A labelled grid of pictures: what the sampler, the demo and the evaluation show at a glance."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 8  # pixels around every picture and label
_TEXT_SIZE = 14
_LINE_HEIGHT = 18
_MOST_LINES = 12
_LABEL_WIDTH = 220
_SMALLEST_DEFAULT_CELL, LARGEST_DEFAULT_CELL = 160, 512
_MOST_PIXELS = 64_000_000

_BACKGROUND, _TEXT, _EMPTY = "white", "#202020", "#e8e8e8"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def labelled_grid(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    cell: int | None = None,
) -> Image.Image:
    """Draw pictures in rows and columns, with wrapped labels at the left and on top.

    Args:
        rows: pictures; ``None`` or a row that ends early leaves an empty cell. Pictures keep their shape.
        row_labels: one for each row; when all are empty there is no label column.
        column_labels: one for each column; when all are empty there is no label row.
        cell: width of a cell in pixels; its height follows from the first picture. By default the first picture's
            width, between 160 and 512, and less where the whole grid would exceed 64 million pixels.

    Raises:
        ValueError: no picture at all, or the labels don't fit the rows and columns.
    """
    columns = max((len(row) for row in rows), default=0)
    first = next((image for row in rows for image in row if image is not None), None)
    if first is None:
        raise ValueError("a grid needs at least one picture")
    if len(row_labels) != len(rows) or len(column_labels) != columns:
        raise ValueError(f"{len(rows)} x {columns} pictures, but {len(row_labels)} x {len(column_labels)} labels")
    cell_width = cell or _default_cell_width(first, len(rows) * columns)
    cell_height = max(1, round(cell_width * first.height / first.width))
    font = ImageFont.load_default(size=_TEXT_SIZE)

    label_width = _LABEL_WIDTH if any(row_labels) else 0
    wrapped_rows = [wrap_text(label, font, _LABEL_WIDTH) for label in row_labels]
    wrapped_columns = [wrap_text(label, font, cell_width) for label in column_labels]
    row_heights = [max(cell_height, len(lines) * _LINE_HEIGHT) for lines in wrapped_rows]
    lefts = [
        (label_width + _MARGIN if label_width else 0) + _MARGIN + i * (cell_width + _MARGIN) for i in range(columns)
    ]
    top = _MARGIN
    if any(column_labels):
        top += max(len(lines) for lines in wrapped_columns) * _LINE_HEIGHT + _MARGIN

    size = (lefts[-1] + cell_width + _MARGIN, top + sum(row_heights) + _MARGIN * len(rows))
    grid = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for left, lines in zip(lefts, wrapped_columns, strict=True):
        _draw_lines(draw, (left, _MARGIN), lines, font)
    for row, lines, height in zip(rows, wrapped_rows, row_heights, strict=True):
        _draw_lines(draw, (_MARGIN, top), lines, font)
        for column, left in enumerate(lefts):
            image = row[column] if column < len(row) else None
            if image is None:
                draw.rectangle((left, top, left + cell_width - 1, top + cell_height - 1), fill=_EMPTY)
            else:
                grid.paste(*_fitted(image, left, top, cell_width, cell_height))
        top += height + _MARGIN
    return grid


def wrap_text(text: str, font: Font, width: int) -> list[str]:
    """Lines of ``text`` that fit ``width`` pixels; at most 12, the last one then ends in an ellipsis."""
    lines: list[str] = []
    # More characters than 12 lines can hold need not be measured.
    for paragraph in text[: width * _MOST_LINES].splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            *full, line = _split_word(word, font, width)
            lines += full
        lines.append(line)
    if len(lines) <= _MOST_LINES:
        return lines
    return [*lines[: _MOST_LINES - 1], lines[_MOST_LINES - 1][:-1] + "…"]


def _split_word(word: str, font: Font, width: int) -> list[str]:
    """A word cut into pieces that fit; one piece for most words, never none."""
    pieces, piece = [], ""
    for character in word:
        if piece and font.getlength(piece + character) > width:
            pieces.append(piece)
            piece = ""
        piece += character
    return [*pieces, piece]


def _default_cell_width(first: Image.Image, cells: int) -> int:
    wanted = min(max(first.width, _SMALLEST_DEFAULT_CELL), LARGEST_DEFAULT_CELL)
    affordable = int((_MOST_PIXELS / cells * first.width / first.height) ** 0.5)
    return max(16, min(wanted, affordable))


def _fitted(image: Image.Image, left: int, top: int, width: int, height: int) -> tuple[Image.Image, tuple[int, int]]:
    """The picture scaled into a cell without changing its shape, and where its corner goes."""
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    scaled = image.convert("RGB")
    if scaled.size != size:
        scaled = scaled.resize(size, Image.Resampling.LANCZOS)
    return scaled, (left + (width - size[0]) // 2, top + (height - size[1]) // 2)


def _draw_lines(draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], font: Font) -> None:
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * _LINE_HEIGHT), line, font=font, fill=_TEXT)
