import numpy as np
import pytest
from PIL import Image

from dod_models.picture import CELL, GAP, MARGIN, save_grid


def read(path):
    return np.asarray(Image.open(path))


def test_every_image_stands_enlarged_and_unsmoothed_in_its_cell(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, size=(2, 2, 16, 16, 3), dtype=np.uint8)
    save_grid(tmp_path / "grid.png", [("a", list(images[0])), ("b", list(images[1]))], columns=["0", "1"], group=2)
    grid = read(tmp_path / "grid.png")
    for row in range(2):
        for column in range(2):
            top, left = 28 + row * (CELL + GAP), MARGIN + column * (CELL + GAP)
            cell = grid[top : top + CELL, left : left + CELL]
            assert np.array_equal(cell, images[row, column].repeat(4, axis=0).repeat(4, axis=1))


def test_grey_images_large_images_and_empty_cells(tmp_path):
    black = np.zeros((100, 100, 1), dtype=np.uint8)
    save_grid(tmp_path / "grid.png", [("", [None, black])], columns=["", ""])
    grid = read(tmp_path / "grid.png")
    assert (grid[28:128, MARGIN : MARGIN + 100] == 255).all()  # the empty cell
    assert (grid[28:128, MARGIN + 100 + GAP : MARGIN + 200 + GAP] == 0).all()  # 100 pixels are never shrunk
    assert (grid == 0).all(axis=2).sum() == 100 * 100


@pytest.mark.parametrize(("group", "offset"), [(1, 3 * GAP), (2, 0)])
def test_a_wider_gap_follows_every_group(tmp_path, group, offset):
    black = np.zeros((CELL, CELL, 1), dtype=np.uint8)
    save_grid(tmp_path / "grid.png", [("", [black]), ("", [black])], columns=[""], group=group)
    dark_rows = (read(tmp_path / "grid.png")[:, MARGIN] == 0).all(axis=1).nonzero()[0]
    assert dark_rows[CELL] - dark_rows[CELL - 1] - 1 == GAP + offset


def test_titles_and_labels_are_drawn_outside_the_cells(tmp_path):
    white = np.full((CELL, CELL, 1), 255, dtype=np.uint8)
    save_grid(tmp_path / "grid.png", [("stage 1", [white])], columns=["7"])
    dark = read(tmp_path / "grid.png").min(axis=2) < 128
    assert dark[28:, :MARGIN].any()  # the title
    assert dark[:28, MARGIN:].any()  # the label
    assert not dark[28:, MARGIN:].any()
