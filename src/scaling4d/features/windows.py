"""VIDEO -> WINDOWS: clips for an encoder all along a video, in one pass over the file."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice

import torch
from torch import Tensor

from scaling4d import video
from scaling4d.encoders.preprocess import BICUBIC, FITS
from scaling4d.video import VideoInput

NO_RATE = "the checkpoint does not tell its clips' rate; give frames per second with --rate-hz"


@dataclass(frozen=True)
class WindowSettings:
    """clip: T H W. rate_hz: frames per second. stride_s: from a window's start to the next one's.

    fit, resample: of FITS and FILTERS.
    """

    clip: tuple[int, int, int]
    rate_hz: float
    stride_s: float
    fit: str
    resample: str = BICUBIC

    @property
    def length_s(self) -> float:
        """Every frame is shown for 1 / rate_hz."""
        return self.clip[0] / self.rate_hz


@dataclass(frozen=True)
class Window:
    """start_s, and frame_s of every frame (`T`): seconds after the video's first frame. pixels: uint8 `T H W 3`."""

    start_s: float
    frame_s: tuple[float, ...]
    pixels: Tensor


def read_windows(source: VideoInput, settings: WindowSettings) -> Iterator[Window]:
    """The windows that the video fills, as `read_video(start_s=, rate_hz=, frames=)` and `preprocess(fit=)` make them.

    Memory holds the frames of the windows at one time, in the clip's size. Raises VideoError: as decode_frames_at.
    """
    frames, height, width = settings.clip
    unfinished: dict[int, list[tuple[float, Tensor]]] = {}
    previous, fitted = None, torch.empty(0)
    times, numbers = _wanted(settings), _wanted(settings)
    decoded = video.decode_frames_at(source, (time_s for time_s, _ in times))
    for (frame_s, rgb), (_, number) in zip(decoded, numbers, strict=False):
        if rgb is not previous:
            picture = torch.from_numpy(rgb)[None, None]
            previous, fitted = rgb, FITS[settings.fit](picture, height, width, settings.resample)[0, 0]
        window = unfinished.setdefault(number, [])
        window.append((frame_s, fitted))
        if len(window) == frames:
            frame_times, pictures = zip(*unfinished.pop(number), strict=True)
            yield Window(number * settings.stride_s, frame_times, torch.stack(pictures))


def _wanted(settings: WindowSettings) -> Iterator[tuple[float, int]]:
    """(seconds after the first frame, number of the window) of all frames of all windows, ascending, without an end."""
    waiting, number = [], 0  # a heap of the next frame of each window that has begun: time, window, frame
    while True:
        start_s = number * settings.stride_s
        if not waiting or start_s <= waiting[0][0]:
            heappush(waiting, (start_s, number, 0))
            number += 1
        time_s, window, frame = heappop(waiting)
        yield time_s, window
        if frame + 1 < settings.clip[0]:
            heappush(waiting, (window * settings.stride_s + (frame + 1) / settings.rate_hz, window, frame + 1))


def batches(windows: Iterator[Window], size: int) -> Iterator[list[Window]]:
    """Lists of `size` windows, the last one may be shorter. A thread reads the next one while the caller computes."""
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(list, islice(windows, size))
        while batch := waiting.result():
            waiting = reader.submit(list, islice(windows, size))
            yield batch
