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
