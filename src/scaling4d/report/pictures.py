"""Filled-in clips of all points side by side: a strip of frames for each row of the page, and a looping video."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from scaling4d import video

ROWS = ("input", "masked", "filled in")  # of a clip in `filled.png` of stage `reconstruct`
AMPLIFIED = 3  # factor of differences; ours
VIDEO_SCALE, VIDEO_RATE_HZ, VIDEO_CRF = 2, 4.0, 32  # ours


def strip_name(clip: int, row: str) -> str:
    return f"clip_{clip}_{row.replace(' ', '_')}.png"


def video_name(clip: int) -> str:
    return f"clip_{clip}.webm"


def count_clips(pictures: Mapping[str, Path], side_px: int) -> int:
    """Clips in every point's `filled.png`. side_px: of a frame."""
    return min((Image.open(path, formats=("PNG",)).height // (len(ROWS) * side_px) for path in pictures.values()), default=0)


def draw_strips(pictures: Mapping[str, Path], side_px: int, ladder: list[str], out: Path) -> None:
    """Write the strips and the video of each clip: input, masked, each point's, and the ladder's ends' difference."""
    arrays = {point: np.asarray(Image.open(path, formats=("PNG",)).convert("RGB")) for point, path in pictures.items()}
    clips = count_clips(pictures, side_px)
    for clip in range(clips):
        parts = {point: np.split(np.split(array, clips)[clip], len(ROWS)) for point, array in arrays.items()}
        first = next(iter(parts.values()))
        rows = {"input": first[0], "masked": first[1]} | {point: part[2] for point, part in parts.items()}
        if len(ladder) > 1:
            difference = np.abs(rows[ladder[-1]].astype(int) - rows[ladder[0]])
            rows["difference"] = np.minimum(AMPLIFIED * difference, 255).astype(np.uint8)
        for name, strip in rows.items():
            Image.fromarray(strip).save(out / strip_name(clip, name), optimize=True)
        tiles = np.concatenate([strip.reshape(side_px, -1, side_px, 3) for strip in rows.values()], axis=2)  # side n rows*side 3
        frames = tiles.transpose(1, 0, 2, 3).repeat(VIDEO_SCALE, 1).repeat(VIDEO_SCALE, 2)
        video.encode(out / video_name(clip), np.ascontiguousarray(frames), rate_hz=VIDEO_RATE_HZ, crf=VIDEO_CRF, gop=len(frames))
