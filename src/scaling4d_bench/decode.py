"""`scaling4d bench decode`: clips a second from random places of videos, ours beside torchcodec, OpenCV and plain PyAV.

Each reader is called in the fastest way known to us, with one thread. It takes a path and ascending frame numbers and
returns uint8 `T S S 3`: the shorter side resized to S, the middle cropped. A loader of a reader imports its library.
"""

from __future__ import annotations

import cProfile
import importlib
import pstats
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaling4d import seeds, video
from scaling4d_bench import measure, videos
from scaling4d_bench.measure import SEED, Measurements
from scaling4d_bench.videos import RATE_HZ

SECONDS, FILES = 20.0, 2  # of a video; videos of each kind
SIZES, GOPS = ((360, 640), (720, 1280)), (12, 250)  # height, width; the kinds of video
FRAMES, STRIDE, SIDE_PX = 16, 2, 224  # of a clip
SAME_BELOW = 6.0  # largest mean absolute difference to ours, of 255: resizing differs, the pictures must not
OURS, ALONE = "ours", "FFmpeg alone"
LIBRARIES = ("av", "numpy", "opencv-python-headless", "pillow", "torch", "torchcodec")
COLUMNS = measure.SPEED | {"CPU ms a clip": "{cpu_ms:.1f}", "difference": "{shown}"}
FFMPEG_CALLS = {"decoder": "method 'decode' of 'av.", "swscale": "method 'reformat' of 'av."}

Reader = Callable[[Path, Sequence[int]], np.ndarray]
ClipList = list[tuple[Path, list[int]]]  # a file, and frame numbers


def bench(out: Path, *, clips: int, repeats: int) -> Path:
    """Measure, print a table for each kind of video, write `<out>/decode.json`."""
    settings = {"clips": clips, "repeats": repeats, "seconds": SECONDS, "files": FILES, "frames": FRAMES, "stride": STRIDE}
    settings |= {"side_px": SIDE_PX, "threads": 1, "rate_hz": RATE_HZ, "same_below": SAME_BELOW}
    measurements = Measurements("decode", settings, LIBRARIES)
    torch.set_num_threads(1)
    with suppress(*measure.CANNOT_LOAD):  # the other wheels bring their own, always the same
        measurements.versions["FFmpeg of torchcodec"] = str(importlib.import_module("torchcodec").ffmpeg_major_version)
    with tempfile.TemporaryDirectory() as folder:
        short = videos.write(Path(folder, "short.mp4"), SEED, seconds=2, size_px=(96, 128), gop=12)

        def load(loader: Callable[[], Reader]) -> Reader:
            reader = loader()
            reader(short, range(0, FRAMES * STRIDE, STRIDE))  # some libraries load their rest only now
            return reader

        loaded = measurements.load({name: partial(load, loader) for name, loader in LOADERS.items()})
        for (height, width), gop in ((size, gop) for size in SIZES for gop in GOPS):
            kind = f"{width}x{height} GOP {gop}"
            paths = [Path(folder, f"{width}x{height}-{gop}-{number}.mp4") for number in range(FILES)]
            for number, path in enumerate(paths):
                videos.write(path, SEED + number, seconds=SECONDS, size_px=(height, width), gop=gop)
            work = random_clips(paths, clips=clips, frames=round(SECONDS * RATE_HZ))
            measurements.raw[kind], results = compare(loaded, work, repeats=repeats)
            results["kbit_per_s"] = sum(path.stat().st_size for path in paths) * 8 / 1000 / (FILES * SECONDS)
            measurements.results[kind] = results
            rows, share = [], results["ffmpeg_share_of_ours"]
            for row in results["rows"]:
                shown = f"{row['difference']:.2f}" if row.get("same_frames") else "OTHER FRAMES"
                shown = "decodes only" if row["name"] == ALONE else shown
                rows.append(row | {"cpu_ms": 1000 * row["cpu_s"], "shown": shown})
            rows += [row | {"name": f"ours, {row['name']}"} for row in results["processes"]]
            title = (
                f"{kind}, {results['kbit_per_s']:.0f} kbit/s; of our time {share['decoder']:.0%} is FFmpeg's decoder and "
                f"{share['swscale']:.0%} swscale; same frames differ by < {SAME_BELOW:g} (one off: {results['one_off']:.1f})"
            )
            measure.table(title, rows, COLUMNS)
    return measurements.write(out)


def random_clips(paths: Sequence[Path], *, clips: int, frames: int) -> ClipList:
    """Clips at random places, from each file equally many; ascending frame numbers."""
    last = frames - (FRAMES - 1) * STRIDE - 1  # one more frame follows, for the difference of being one off
    starts = seeds.numpy_rng(SEED, "bench places").integers(0, last, clips)
    return [(paths[n % len(paths)], [int(start) + STRIDE * k for k in range(FRAMES)]) for n, start in enumerate(starts)]


def compare(loaded: Mapping[str, Reader], work: ClipList, *, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Times of one kind of video, and the figures that follow: all readers in one process, ours also in several."""
    runs = {name: measure.timed(partial(read_all, work, read)) for name, read in {**loaded, ALONE: ffmpeg_alone}.items()}
    timings = measure.take_turns(runs, repeats=repeats)
    rows = measure.throughput(timings, dict.fromkeys(runs, len(work)))
    for row in rows[:-1]:
        row["difference"] = difference(loaded[row["name"]], work)
        row["same_frames"] = row["difference"] < SAME_BELOW
    counts = sorted({min(2**n, measure.cores()) for n in range(measure.cores().bit_length() + 1)})
    with ExitStack() as stack:
        runs = {}
        for count in counts:  # each process reads all clips
            pool = stack.enter_context(ProcessPoolExecutor(count, get_context("spawn")))
            runs[f"processes: {count}"] = measure.timed(lambda p=pool, n=count: list(p.map(read_all, [work] * n)))
        parallel = measure.take_turns(runs, repeats=repeats)
    units = {name: count * len(work) for name, count in zip(runs, counts, strict=True)}
    return {"one process": timings, "processes": parallel}, {
        "rows": rows,
        "processes": measure.throughput(parallel, units),
        "ffmpeg_share_of_ours": ffmpeg_share(partial(read_all, work)),
        "one_off": difference(lambda path, numbers: ours()(path, [number + 1 for number in numbers]), work),
    }


def read_all(work: ClipList, read: Callable[[Path, Sequence[int]], object] | None = None) -> None:
    """Read all clips. read: None: our reader."""
    read = read or ours()
    for path, numbers in work:
        read(path, numbers)


def difference(read: Reader, work: ClipList) -> float:
    """Largest mean absolute difference of a clip to ours, 0 to 255; 255 for another shape."""
    largest, our_reader = 0.0, ours()
    for path, numbers in work:
        our_pixels, theirs = our_reader(path, numbers), read(path, numbers)
        if theirs.shape != our_pixels.shape or theirs.dtype != our_pixels.dtype:
            return 255.0
        largest = max(largest, float(np.abs(our_pixels.astype(np.int16) - theirs).mean()))
    return largest


def ffmpeg_share(work: Callable[[], object]) -> dict[str, float]:
    """Shares of the time of `work` inside FFmpeg's decoder, and inside its scaling and colours (swscale).

    Python's profiler counts each call from Python into PyAV; opening and reading the file count as neither.
    """
    profile, shares = cProfile.Profile(), dict.fromkeys(FFMPEG_CALLS, 0.0)
    profile.runcall(work)
    stats = pstats.Stats(profile)
    for (_, _, function), (_, _, own_s, _, _) in stats.stats.items():
        for name, text in FFMPEG_CALLS.items():
            shares[name] += own_s / stats.total_tt if text in function else 0
    return shares


# ---- readers ----


def ours() -> Reader:
    return lambda path, numbers: video.read_frames_at(path, np.asarray(numbers) / RATE_HZ, side_px=SIDE_PX)


def torchcodec(seek_mode: str) -> Reader:
    """torchcodec's own transforms crop and resize inside its decoder; they need the picture's size, read once a file.

    It needs FFmpeg's shared libraries: the system's, or PyAV's own (`av.libs`), by links `libavcodec.so.62 ...` and
    LD_LIBRARY_PATH, so that both use the same FFmpeg.
    """
    from scaling4d_bench.steps import let_torchvision_load

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
    """One seek; other pictures are grabbed only, without a conversion of their colours."""
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
                small = cv2.resize(bgr, _size(*bgr.shape[:2]), interpolation=cv2.INTER_AREA)
                pictures.append(cv2.cvtColor(_middle(small), cv2.COLOR_BGR2RGB))
        capture.release()
        return np.stack(pictures)

    return read


def pyav() -> Reader:
    """The first program that one would write: seek, decode all frames, convert to RGB, resize with Pillow."""
    from PIL import Image

    def read(path: Path, numbers: Sequence[int]) -> np.ndarray:
        pictures = []
        for number, frame in _decode(path, numbers):
            if number in numbers:
                picture = Image.fromarray(frame.to_ndarray(format="rgb24", threads=1))
                small = picture.resize(_size(frame.height, frame.width), Image.Resampling.BICUBIC)
                pictures.append(_middle(np.asarray(small)))
        return np.stack(pictures)

    return read


def ffmpeg_alone(path: Path, numbers: Sequence[int]) -> int:
    """Decode from the key frame to the last frame, without skipping or converting one; the number of frames."""
    return sum(1 for _ in _decode(path, numbers))


LOADERS = {
    OURS: ours,
    "torchcodec": partial(torchcodec, "approximate"),
    "torchcodec exact": partial(torchcodec, "exact"),
    "torchcodec, torch resizes": torchcodec_torch,
    "OpenCV": opencv,
    "plain PyAV": pyav,
}


def _decode(path: Path, numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """(number, frame) from the key frame before the first to the last of the numbers."""
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
    """Width and height with a shorter side of SIDE_PX."""
    scale = SIDE_PX / min(height_px, width_px)
    return max(SIDE_PX, round(width_px * scale)), max(SIDE_PX, round(height_px * scale))


def _middle(picture: np.ndarray) -> np.ndarray:
    top, left = (picture.shape[0] - SIDE_PX) // 2, (picture.shape[1] - SIDE_PX) // 2
    return picture[top : top + SIDE_PX, left : left + SIDE_PX]
