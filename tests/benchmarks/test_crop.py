"""Resize and crop of pictures and labels."""

import numpy as np
import pytest

from scaling4d.benchmarks.frames import Crop


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (96, 64), (50, 71), (240, 427)])
def test_a_point_stays_on_its_spot_through_resize_and_crop(height, width):
    y, x = np.mgrid[:height, :width] + 0.5
    centre = np.array([0.47 * width, 0.55 * height])
    blob = 255 * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (0.08 * min(height, width)) ** 2)
    crop = Crop(height, width, 32)
    small = crop.pixels([blob[..., None].repeat(3, -1).astype(np.uint8)])[0, ..., 0].astype(float)
    assert small.shape == (32, 32)
    v, u = np.mgrid[:32, :32] + 0.5
    found = np.array([(small * u).sum(), (small * v).sum()]) / small.sum()
    assert np.allclose(crop.points(centre / [width, height]) * 32, found, atol=0.35)


def test_sources_undo_points():
    crop = Crop(50, 71, 32)
    v, u = (np.mgrid[:32, :32] + 0.5) / 32
    assert np.allclose(crop.points(crop.sources()), np.stack([u, v], -1))


def test_boxes_are_clipped_to_the_square():
    assert Crop(32, 64, 32).boxes(np.array([0.0, 0.25, 0.5, 0.75])).tolist() == [0.0, 0.25, 0.5, 0.75]
    assert Crop(32, 64, 32).boxes(np.array([0.9, 0.25, 1.0, 0.75])).tolist() == [1.0, 0.25, 1.0, 0.75]


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("height", "width"), [(48, 96), (96, 48), (50, 71)])
def test_points_and_boxes_stay_on_their_spot_wherever_the_square_is_cut_out(height, width, place):
    """A white box in what every square shows; its corners, and its middle as a point."""
    crop = Crop(height, width, 32, place)
    low = np.maximum(0, np.array([width, height]) - min(height, width)) * place / [width, height]
    box = np.concatenate(
        [low + 0.3 * min(height, width) / np.array([width, height]), low + 0.7 * min(height, width) / np.array([width, height])]
    )
    x1, y1, x2, y2 = np.rint(box * [width, height, width, height]).astype(int)
    picture = np.zeros((height, width, 3), np.uint8)
    picture[y1:y2, x1:x2] = 255
    small = crop.pixels([picture])[0, ..., 0] > 127
    v, u = np.nonzero(small)
    true = np.array([x1, y1, x2, y2]) / [width, height, width, height]
    assert np.allclose(crop.boxes(true) * 32, [u.min(), v.min(), u.max() + 1, v.max() + 1], atol=1.0)
    assert np.allclose(crop.points((true[:2] + true[2:]) / 2) * 32, [u.mean() + 0.5, v.mean() + 0.5], atol=0.6)


def test_squares_at_the_ends_show_what_the_middle_does_not():
    left, right = (Crop(32, 96, 32, place) for place in (0.0, 1.0))
    assert left.points(np.array([0.0, 0.5])).tolist() == [0.0, 0.5] and right.points(np.array([1.0, 0.5])).tolist() == [1.0, 0.5]
    assert left.boxes(np.array([0.5, 0.2, 0.6, 0.4]))[0] == 1.0 and right.boxes(np.array([0.5, 0.2, 0.6, 0.4]))[2] == 0.0
