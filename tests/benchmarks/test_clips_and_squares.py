"""Test views of a video: clips over its time, and squares along its longer side."""

from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from writers import write_kinetics

from scaling4d import video
from scaling4d.benchmarks import read_samples, ssv2
from scaling4d.benchmarks.samples import ClipRequest
from scaling4d.records import Sample

RATE_HZ, FRAMES = 8.0, 4


@pytest.fixture(params=["ssv2", "kinetics", "no duration"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two videos, `24 32 64 3`, brighter from frame to frame and from left to right."""
    t, x = np.arange(24)[:, None, None, None], np.arange(64)[None, None, :, None]
    pixels = np.broadcast_to(8 * t + x // 2 + 16, (24, 32, 64, 3)).astype(np.uint8)
    samples = [Sample(name, name, pixels, {"action": np.int64(0)}) for name in ("ABCDEFGHIJ1", "ABCDEFGHIJ2")]
    encoding = {"rate_hz": RATE_HZ, "crf": 10, "gop": 4}
    for split in ("train", "val"):
        if request.param == "kinetics":
            write_kinetics(tmp_path / "kinetics", split, samples, labels=("hold", "move"), **encoding)
        else:
            ssv2.write(tmp_path / "ssv2", split, samples, templates=("Holding [something]", "Moving [something]"), **encoding)
    for path in (tmp_path / "ssv2" / ssv2.VIDEOS).glob("*") if request.param == "no duration" else ():
        remove_duration(path)
    return tmp_path


def remove_duration(path: Path) -> None:
    """Write a video anew as a browser or a stream does: to a file that has no place to go back to."""
    parts: list[bytes] = []
    pipe = SimpleNamespace(write=lambda some: parts.append(bytes(some)) or len(some))
    with av.open(str(path)) as source, av.open(pipe, "w", format="webm") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    path.write_bytes(b"".join(parts))
    assert video.probe(path, sha256="").duration_s == 0


def read(data: Path, views: tuple[int, int]) -> list[Sample]:
    return list(read_samples("actions", data, "val", ClipRequest(FRAMES, RATE_HZ, 32, views)))


def test_clips_go_from_the_start_of_a_video_to_its_end_and_squares_from_side_to_side(data: Path) -> None:
    samples = read(data, (3, 3))
    assert [sample.id for sample in samples] == [sample.id for sample in read(data, (1, 1)) for _ in range(9)]
    level = np.array([sample.pixels.mean((1, 2, 3)) for sample in samples[:9]]).reshape(3, 3, FRAMES)  # clip, square, T
    assert np.abs(level[:, 1, 0] - np.array([0, 10, 20]) * 8 - level[0, 1, 0]).max() < 4
    assert np.abs(level[0, :, 0] - np.array([-8, 0, 8]) - level[0, 1, 0]).max() < 2
    assert (np.abs(np.diff(level, axis=-1) - 8) < 4).all()


def test_one_view_is_the_first_clip_and_the_middle_square(data: Path) -> None:
    one, several = read(data, (1, 1)), read(data, (2, 3))
    assert np.array_equal(one[0].pixels, several[1].pixels) and not np.array_equal(one[0].pixels, several[4].pixels)
