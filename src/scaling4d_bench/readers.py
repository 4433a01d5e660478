"""Who reads the clip: ours and its peers, each called in the quickest way we know, with one thread.

Each takes a path and ascending frame numbers and returns uint8 `T S S 3`: the shorter side resized to S, the middle kept. A
maker loads its library only when it is called, and fails if that is not there.
"""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from scaling4d import video
from scaling4d_bench.videos import RATE_HZ

SIDE_PX = 224
Reader = Callable[[Path, Sequence[int]], np.ndarray]


def ours() -> Reader:
    return lambda path, numbers: video.at(path, np.asarray(numbers) / RATE_HZ, side_px=SIDE_PX)


def torchcodec(seek_mode: str) -> Reader:
    """Cropped and resized by its own transforms, inside its decoder; they want the size beforehand, which is found out once.

    It needs FFmpeg's shared libraries: the system's, or PyAV's own (`av.libs`), found through links `libavcodec.so.62 ...` and
    LD_LIBRARY_PATH, which compares both on the same FFmpeg.
    """
    from scaling4d_bench.peers import let_torchvision_load

    let_torchvision_load()
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import CenterCrop, Resize

    @cache
    def side(path: Path) -> int:
        header = VideoDecoder(path, seek_mode="approximate").metadata
        return min(header.height, header.width)

    def read(path: Path, numbers: Sequence[int]) -> np.ndarray:
        transforms = [CenterCrop((side(path), side(path))), Resize((SIDE_PX, SIDE_PX))]
        decoder = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode=seek_mode, dimension_order="NHWC", transforms=transforms)
        return decoder.get_frames_at(list(numbers)).data.numpy()

    return read


def torchcodec_torch() -> Reader:
    """Whole pictures from torchcodec, cropped and resized by torch."""
    import torch
    from torchcodec.decoders import VideoDecoder

    def read(path: Path, numbers: Sequence[int]) -> np.ndarray:
        decoder = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode="approximate")
        pictures = decoder.get_frames_at(list(numbers)).data  # T C H W
        side = min(pictures.shape[2:])
        top, left = ((length - side) // 2 for length in pictures.shape[2:])
        square = pictures[:, :, top : top + side, left : left + side]
        small = torch.nn.functional.interpolate(square, size=(SIDE_PX, SIDE_PX), mode="bilinear", antialias=True)
        return small.permute(0, 2, 3, 1).contiguous().numpy()

    return read


def opencv() -> Reader:
    """One seek; pictures that are not wanted are grabbed only, which leaves out their conversion to colours."""
    import cv2

    cv2.setNumThreads(1)

    def read(path: Path, numbers: Sequence[int]) -> np.ndarray:
        capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        capture.set(cv2.CAP_PROP_POS_FRAMES, numbers[0])
        pictures = []
        for number in range(numbers[0], numbers[-1] + 1):
            capture.grab()
            if number in numbers:
                _, bgr = capture.retrieve()
                height, width = _size(*bgr.shape[:2])
                small = _middle(cv2.resize(bgr, (width, height), interpolation=cv2.INTER_AREA))
                pictures.append(cv2.cvtColor(small, cv2.COLOR_BGR2RGB))
        capture.release()
        return np.stack(pictures)

    return read


def pyav() -> Reader:
    """What one writes on the first day: seek, decode everything, pictures to RGB, then to size with Pillow."""
    from PIL import Image

    def read(path: Path, numbers: Sequence[int]) -> np.ndarray:
        pictures = []
        for number, frame in _decoded(path, numbers):
            if number in numbers:
                height, width = _size(frame.height, frame.width)
                picture = Image.fromarray(frame.to_ndarray(format="rgb24", threads=1)).resize(
                    (width, height), Image.Resampling.BICUBIC
                )
                pictures.append(_middle(np.asarray(picture)))
        return np.stack(pictures)

    return read


def ffmpeg_alone(path: Path, numbers: Sequence[int]) -> int:
    """Decode from the key frame to the last wanted picture, nothing left out and nothing converted: how many pictures."""
    return sum(1 for _ in _decoded(path, numbers))


def ffmpeg_share(work: Callable[[], object]) -> dict[str, float]:
    """Of the time that `work` takes: the part inside FFmpeg's decoder, and inside its scaling and colours (swscale).

    Python's profiler counts each call from Python into PyAV; opening and reading the file count as neither.
    """
    profile = cProfile.Profile()
    profile.runcall(work)
    stats = pstats.Stats(profile)
    own_s = {name: 0.0 for name in ("decode", "reformat")}
    for (_, _, function), (_, _, seconds, _, _) in stats.stats.items():
        for name in own_s:
            if f"method '{name}' of 'av." in function:
                own_s[name] += seconds
    return {"decoder": own_s["decode"] / stats.total_tt, "swscale": own_s["reformat"] / stats.total_tt}


def _ffmpeg_of_pyav() -> str:
    import av

    return av.ffmpeg_version_info


def _ffmpeg_of_torchcodec() -> str:
    from torchcodec import ffmpeg_major_version

    return str(ffmpeg_major_version)


def _ffmpeg_of_opencv() -> str:
    import cv2

    lines = cv2.getBuildInformation().splitlines()
    return " ".join(next((line for line in lines if "avcodec:" in line), "").split()[1:])


FFMPEG = {  # which FFmpeg each of them decodes with
    "FFmpeg of av": _ffmpeg_of_pyav,
    "FFmpeg of torchcodec": _ffmpeg_of_torchcodec,
    "libavcodec of opencv": _ffmpeg_of_opencv,
}


def _decoded(path: Path, numbers: Sequence[int]):
    """(number, frame) from the key frame before the first wanted picture to the last wanted one."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        container.seek(round(numbers[0] / RATE_HZ / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            number = round(frame.pts * stream.time_base * RATE_HZ)
            yield number, frame
            if number >= numbers[-1]:
                return


def _size(height_px: int, width_px: int) -> tuple[int, int]:
    scale = SIDE_PX / min(height_px, width_px)
    return max(SIDE_PX, round(height_px * scale)), max(SIDE_PX, round(width_px * scale))


def _middle(picture: np.ndarray) -> np.ndarray:
    top, left = (picture.shape[0] - SIDE_PX) // 2, (picture.shape[1] - SIDE_PX) // 2
    return picture[top : top + SIDE_PX, left : left + SIDE_PX]
