"""RandAugment beside Pillow, which the official code calls frame by frame; random erasing."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from scaling4d import seeds
from scaling4d.readout.augment import OPERATIONS, augment_clip, rand_augment, random_erasing

NOTHING = {"randaugment": 0.0, "crop": (1.0, 1.0), "aspect": (1.0, 1.0), "erasing": 0.0}
LEVEL, HEIGHT, WIDTH = 0.7, 144, 120


def smooth_clip(frames: int = 3) -> torch.Tensor:
    """Frames of slow waves between 20 and 235; no two frames and channels alike."""
    t, y, x, c = np.meshgrid(range(frames), range(HEIGHT), range(WIDTH), range(3), indexing="ij")
    return torch.from_numpy((127.5 + 107 * np.sin(0.04 * x + 0.03 * y * (c + 1) + t)).round().astype(np.uint8))


def affine(matrix: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.transform(image.size, Image.AFFINE, matrix, resample=Image.BICUBIC, fillcolor=(128,) * 3)


def enhanced(kind: type) -> Callable[[Image.Image], Image.Image]:
    return lambda image: kind(image).enhance(1 + 0.9 * LEVEL)


PILLOW = {  # at LEVEL and a positive sign
    "auto_contrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
    "rotate": lambda image: image.rotate(30 * LEVEL, resample=Image.BICUBIC, fillcolor=(128,) * 3),
    "posterize": lambda image: ImageOps.posterize(image, 4 - int(4 * LEVEL)),
    "solarize": lambda image: ImageOps.solarize(image, 256 - int(256 * LEVEL)),
    "solarize_add": lambda image: image.point([min(255, v + int(110 * LEVEL)) if v < 128 else v for v in range(256)] * 3),
    "color": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "brightness": enhanced(ImageEnhance.Brightness),
    "sharpness": enhanced(ImageEnhance.Sharpness),
    "shear_x": affine((1, 0.3 * LEVEL, 0, 0, 1, 0)),
    "shear_y": affine((1, 0, 0, 0.3 * LEVEL, 1, 0)),
    "translate_x": affine((1, 0, 0.45 * LEVEL * WIDTH, 0, 1, 0)),
    "translate_y": affine((1, 0, 0, 0, 1, 0.45 * LEVEL * HEIGHT)),
}


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_an_operation_gives_what_pillow_gives_frame_by_frame(name: str) -> None:
    clip = smooth_clip()
    ours = OPERATIONS[name](clip, LEVEL, 1.0).round().clamp(0, 255)
    theirs = torch.stack([torch.from_numpy(np.array(PILLOW[name](Image.fromarray(frame.numpy())))) for frame in clip])
    difference = (ours - theirs.float()).abs()
    assert (difference > 2).float().mean() < 0.03, name  # Pillow interpolates otherwise where the picture ends
    assert difference.median() <= 1 and not torch.equal(ours, clip.float())


def test_no_strength_changes_nothing_but_the_operations_without_a_strength() -> None:
    clip = smooth_clip()
    same = {name for name in OPERATIONS if (OPERATIONS[name](clip, 0.0, 1.0) - clip).abs().max() < 0.01}
    assert set(OPERATIONS) - same == {"auto_contrast", "equalize", "invert", "posterize"}  # posterize: 4 bits at least


def test_all_frames_of_a_clip_have_the_same_operations_and_clips_have_their_own() -> None:
    still = smooth_clip(1).expand(4, -1, -1, -1)
    drawn = [rand_augment(still, 7.0, seeds.numpy_rng(0, "augment", clip)) for clip in range(40)]
    assert all(torch.equal(clip, clip[:1].expand_as(clip)) and clip.dtype == torch.uint8 for clip in drawn)
    assert len({clip.numpy().tobytes() for clip in drawn}) > 25
    plain = sum(torch.equal(clip, still) for clip in drawn)
    assert 3 <= plain <= 20  # both operations are left out in a quarter of the clips
    assert torch.equal(drawn[0], rand_augment(still, 7.0, seeds.numpy_rng(0, "augment", 0)))


def test_an_erased_rectangle_holds_noise_of_its_own_in_every_frame_and_the_rest_stays() -> None:
    clip, shares = torch.full((3, 32, 32, 3), 200, dtype=torch.uint8), []
    for draw in range(60):
        erased = random_erasing(clip, 0.25, seeds.numpy_rng(0, "erase", draw)) != 200
        places = erased.any((0, 3))
        rows, columns = places.any(1), places.any(0)
        assert torch.equal(places, rows[:, None] & columns) and places.sum() == rows.sum() * columns.sum()
        shares.append(places.float().mean().item())
    assert 5 < sum(share > 0 for share in shares) < 25 and max(shares) < 0.36
    noise = random_erasing(clip, 1.0, seeds.numpy_rng(0, "erase"))
    noise = noise[noise != 200] / 255
    assert noise.unique().numel() > 0.99 * noise.numel()
    assert noise.mean().item() == pytest.approx(0.45, abs=0.03) and noise.std().item() == pytest.approx(0.225, abs=0.03)


def test_without_a_setting_the_clip_stays_and_with_all_it_changes_by_the_stream_alone() -> None:
    clip = smooth_clip()[:, :WIDTH]
    assert torch.equal(augment_clip(clip, seeds.numpy_rng(0, "augment"), **NOTHING), clip)
    every = {"randaugment": 7.0, "crop": (0.08, 1.0), "aspect": (0.75, 4 / 3), "erasing": 0.25}
    one, same, other = (augment_clip(clip, seeds.numpy_rng(0, "augment", n), **every) for n in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and one.shape == clip.shape
