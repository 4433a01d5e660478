"""Squares of pictures and their labels; test views of a video: clips over its time, squares along its longer side."""

from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from writers import write_kinetics

from scaling4d import video
from scaling4d.benchmarks import read_samples, ssv2
from scaling4d.benchmarks.frames import Crop
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
