"""Labelled grids of images."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 64  # pixels an image is shown at, at least
GAP = 4  # pixels between images
MARGIN = 72  # pixels for the rows' titles


def save_grid(
    path: Path, rows: list[tuple[str, list[np.ndarray | None]]], *, columns: list[str], group: int = 1
) -> None:
    """Write a PNG: a title at the left of each row, a label above each column, a wider gap after every `group` rows.

    Images are uint8 (H, W, 1 or 3), all of one size; None leaves a cell empty. Small images are enlarged without
    smoothing.
    """
    size = next(image.shape[0] for _, images in rows for image in images if image is not None)
    cell = size * max(1, CELL // size)
    font = ImageFont.load_default(size=16)
    extra = 3 * GAP  # after each group
    width = MARGIN + len(columns) * (cell + GAP)
    height = 28 + len(rows) * (cell + GAP) + (len(rows) // group) * extra
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for index, label in enumerate(columns):
        draw.text((MARGIN + index * (cell + GAP) + cell // 2, 14), label, fill="black", font=font, anchor="mm")
    for number, (title, images) in enumerate(rows):
        top = 28 + number * (cell + GAP) + (number // group) * extra
        draw.text((GAP, top + cell // 2), title, fill="black", font=font, anchor="lm")
        for index, image in enumerate(images):
            if image is not None:
                shown = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
                canvas.paste(shown.resize((cell, cell), Image.Resampling.NEAREST), (MARGIN + index * (cell + GAP), top))
    partial = path.with_name(f".{path.name}.partial")
    canvas.save(partial, format="PNG")
    os.replace(partial, path)
