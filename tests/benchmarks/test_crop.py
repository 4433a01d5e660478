"""Resize and crop of pictures and labels."""

import numpy as np
import pytest

from scaling4d.benchmarks.frames import Crop


def test_sources_undo_points():
    crop = Crop(50, 71, 32)
    v, u = (np.mgrid[:32, :32] + 0.5) / 32
    assert np.allclose(crop.points(crop.sources()), np.stack([u, v], -1))


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 96), (96, 48), (50, 71), (240, 427)])
def test_points_and_boxes_stay_on_their_spot_wherever_the_square_is_cut_out(height, width, position):
    """A white box that every square shows; its corners, and its middle as a point."""
    crop, size, side = Crop(height, width, 32, position), np.array([width, height]), min(height, width)
    corner = (size - side) * position / size
    box = np.concatenate([corner + 0.3 * side / size, corner + 0.7 * side / size])
    x1, y1, x2, y2 = np.rint(box * [*size, *size]).astype(int)
    picture = np.zeros((height, width, 3), np.uint8)
    picture[y1:y2, x1:x2] = 255
    small = crop.pixels([picture])[0, ..., 0]
    v, u = np.nonzero(small > 127)
    true = np.array([x1, y1, x2, y2]) / [*size, *size]
    assert np.allclose(crop.boxes(true) * 32, [u.min(), v.min(), u.max() + 1, v.max() + 1], atol=1.0)
    y, x = np.mgrid[:32, :32] + 0.5
    middle = np.array([(small * x).sum(), (small * y).sum()]) / small.sum(dtype=float)
    assert np.allclose(crop.points((true[:2] + true[2:]) / 2) * 32, middle, atol=0.35)


def test_boxes_are_clipped_to_the_square_and_squares_at_the_ends_show_what_the_middle_does_not():
    left, middle, right = (Crop(32, 64, 32, position) for position in (0.0, 0.5, 1.0))
    assert middle.boxes(np.array([0.0, 0.25, 0.5, 0.75])).tolist() == [0.0, 0.25, 0.5, 0.75]
    assert middle.boxes(np.array([0.9, 0.25, 1.0, 0.75])).tolist() == [1.0, 0.25, 1.0, 0.75]
    assert left.points(np.array([0.0, 0.5])).tolist() == [0.0, 0.5] and right.points(np.array([1.0, 0.5])).tolist() == [1.0, 0.5]
    assert left.boxes(np.array([0.6, 0.2, 0.7, 0.4]))[0] == 1.0 and right.boxes(np.array([0.3, 0.2, 0.4, 0.4]))[2] == 0.0
