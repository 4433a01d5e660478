"""Whatever a file holds, a reader gives samples, skips them with a reason, or refuses the split; nothing else."""

import errno
import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import numpy as np
import pytest
from damage import ACCEPTED, REFUSED, SIZES, SKIPPED, files_below
from numbered import CLIP, H264, left_out, pictures, three_boxes
from PIL import Image
from small_benchmarks import BENCHMARKS, YOUTUBE_ID, outcome
from writers import write_objects, write_records

from scaling4d import benchmarks
from scaling4d.benchmarks import perception_test_objects, scannet, tapvid, tfrecord, waymo
from scaling4d.benchmarks.frames import Crop, open_picture
from scaling4d.benchmarks.samples import ExcludedItem, Samples, content_of
from scaling4d.records import UserError


@SIZES
@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_read_skipped_or_refused(tmp_path, endures, name, copies):
    BENCHMARKS[name][1](tmp_path)
    assert outcome(BENCHMARKS[name][0], tmp_path) == ACCEPTED
    counts = endures(name, files_below(tmp_path), lambda _: outcome(BENCHMARKS[name][0], tmp_path), copies)
    assert counts[SKIPPED]
    assert outcome(BENCHMARKS[name][0], tmp_path) == ACCEPTED  # whole again


@SIZES
def test_a_damaged_picture_is_opened_or_refused(tmp_path, endures, copies):
    for name in ("a.jpg", "a.png"):
        Image.fromarray(pictures()[0]).save(tmp_path / name)
    counts = endures("pictures", files_below(tmp_path), lambda path: open_picture(path, path, ["JPEG", "PNG"]) and None, copies)
    assert counts[REFUSED] and counts[ACCEPTED]


def of_one(error: Exception) -> Samples:
    """Two items; the first raises."""

    def load(item: str) -> list:
        if item == "a":
            raise error
        return [item]

    return Samples(["a", "b"], load, str, 2, "")


@pytest.mark.parametrize("error", [
    TypeError("no list"), KeyError("x"), IndexError(), ZeroDivisionError(), OverflowError("large"), EOFError(), OSError("short"),
    ValueError("two\nlines"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), struct.error("short"), zlib.error("bad"),
    FileNotFoundError(errno.ENOENT, "gone"), OSError(errno.ENAMETOOLONG, "long"), AttributeError("no", obj=None, name="get"),
])  # fmt: skip
def test_an_error_of_the_content_is_a_skipped_sample_with_a_reason_of_one_line(error):
    skipped: list = []
    assert list(of_one(error).part(skipped=skipped)) == ["b"]
    assert [(item.id, item.bad) for item in skipped] == [("a", True)]
    assert skipped[0].why.startswith("a ") and len(skipped[0].why.splitlines()) == 1
    for read in (list, lambda samples: samples.at_index(0)):
        with pytest.raises(UserError, match="^a (is damaged|cannot be read): "):
            read(of_one(error))


@pytest.mark.parametrize("error", [
    NameError("x"), AssertionError(), MemoryError(), ImportError(), NotImplementedError(), KeyboardInterrupt(),
    AttributeError("no", obj=np, name="x"), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "disk"),
    OSError(errno.EMFILE, "files"), OSError(errno.ENOMEM, "memory"),
])  # fmt: skip
def test_an_error_of_the_machine_or_of_the_program_surfaces(error):
    with pytest.raises(type(error)):
        list(of_one(error).part(skipped=[]))


def test_a_refusal_keeps_its_words_and_its_kind():
    with pytest.raises(ExcludedItem, match="^a rule$"), content_of("a"):
        raise ExcludedItem("a rule")


@pytest.mark.parametrize(
    "size", [(0, 4), (4, -1), (float("nan"), 4), (4, float("inf")), (1, 10**9), (10**30, 1), (True, "x"), (None, 4)]
)
def test_a_square_needs_a_picture_with_two_sides_of_some_length(size):
    with pytest.raises(UserError, match=r"^a picture of .* px; needed "):
        Crop(*size, side_px=32)
    with pytest.raises(UserError, match=r"^pictures of 32x32 and of 31x33 px in one clip"):
        Crop(32, 32, 32).pixels([np.zeros((32, 32, 3), np.uint8), np.zeros((33, 31, 3), np.uint8)])


def bombs() -> Iterator[tuple[ModuleType, Callable[[Path], None], str]]:
    """Small files that ask for much memory: benchmark, writer, expected reason."""

    def sens(root: Path, depth: bytes, *size: int) -> None:
        BENCHMARKS["scannet"][1](root)
        path = root / "scans/scene0003_01/scene0003_01.sens"
        content, start = bytearray(path.read_bytes()), 12 + len("scaling4d")
        frame = start + scannet.HEADER.size
        _, _, color_bytes, depth_bytes = struct.unpack_from("<QQQQ", content, frame + 64)
        struct.pack_into("<II", content, start + 272, *size)
        struct.pack_into("<Q", content, frame + 88, len(depth))
        place = frame + scannet.FRAME.size + color_bytes
        path.write_bytes(content[:place] + depth + content[place + depth_bytes :])

    yield (
        scannet,
        lambda root: sens(root, zlib.compress(bytes(2**28)), 16, 16),
        "a depth map of more than 512 bytes; needed 16 x 16",
    )
    yield scannet, lambda root: sens(root, b"", 2**31, 2**31), f"depth of {2**31}x{2**31} px, 1000.0 units"

    def record(root: Path) -> None:
        BENCHMARKS["waymo_v1"][1](root)
        length = struct.pack("<Q", 2**40)
        (path,) = root.rglob("*.tfrecord")
        path.write_bytes(length + struct.pack("<I", tfrecord.masked_crc32c(length)) + bytes(100))

    yield waymo, record, "it ends inside record 0"

    def number(root: Path) -> None:
        """A picture that is the number 10^10, which `bytes` makes that many zeros of."""
        BENCHMARKS["waymo_v1"][1](root)
        (path,) = root.rglob("*.tfrecord")
        picture = b"\x08\x01\x10" + bytes([*([0x80 | 0x64] * 4), 0x7F])
        write_records(path, [b"\x10\x00\x22" + bytes([len(picture)]) + picture])

    yield waymo, number, "record 0 is no Frame of Waymo Open"

    def metadata(root: Path, **changes: float) -> None:
        write_objects(root, "val", [three_boxes("video_7")], **H264)
        path = root / "object_tracking_valid.json"
        entries = json.loads(path.read_text())
        entries["video_7"]["metadata"].update(changes)
        path.write_text(json.dumps(entries))

    def memo(root: Path) -> None:
        """A pickle whose memo has one entry, the billionth; the unpickler in C makes room for all of them."""
        root.mkdir(exist_ok=True)
        (root / "a.pkl").write_bytes(b"\x80\x04]r" + struct.pack("<I", 10**9) + b"Na.")

    yield tapvid, memo, "a-0000: needed a dict with video, points and occluded"

    for rate_hz in (1e12, float("nan"), float("inf"), 10**30):
        expected = "the metadata of video_7 needs a frame_rate in 0 .. 1000"
        yield perception_test_objects, lambda root, rate_hz=rate_hz: metadata(root, frame_rate=rate_hz), expected


@pytest.mark.parametrize(("benchmark", "write", "expected"), [*bombs()])
def test_a_small_file_that_asks_for_much_memory_is_skipped_before_it_gets_any(tmp_path, benchmark, write, expected):
    write(tmp_path)
    tracemalloc.start()
    ((_, bad, why),) = left_out(benchmark, tmp_path, "val")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bad and expected in why and most < 2**26


def test_one_bad_entry_does_not_end_a_split_of_tracks(tmp_path):
    write_objects(tmp_path / "perception_test", "val", [three_boxes(f"video_{n}") for n in range(5)], **H264)
    path = tmp_path / "perception_test/object_tracking_valid.json"
    entries = json.loads(path.read_text())
    entries |= {"video_1": 7, "video_2": {"object_tracking": [1]}, "video_3": entries["video_3"] | {"object_tracking": [None]}}
    path.write_text(json.dumps(entries))
    skipped: list = []
    read = benchmarks.read_samples("boxes", tmp_path, "val", CLIP, skipped=skipped, max_bad_share=0.6)
    assert [sample.id for sample in read] == ["video_0", "video_4"]
    assert [item.id for item in skipped] == ["video_1", "video_2", "video_3"] and all(item.bad for item in skipped)


def test_a_folder_or_an_endless_name_in_the_place_of_a_file_is_a_reason(tmp_path):
    for name in ("realestate10k", "ssv2", "scannet_sensreader", "perception_test"):
        BENCHMARKS[name][1](tmp_path / name)
    (row_file,) = (tmp_path / "realestate10k/test").glob("*.txt")
    row_file.write_text(row_file.read_text().replace(YOUTUBE_ID, "x" * 300))
    (tmp_path / "realestate10k/test/folder.txt").mkdir()
    reasons = left_out(BENCHMARKS["realestate10k"][0], tmp_path / "realestate10k", "val")
    assert [bad for _, bad, _ in reasons] == [True, True]
    assert "[Errno 36]" in reasons[0][2] and "[Errno 21]" in reasons[1][2]
    for name, path in (
        ("ssv2", "labels/validation.json"),
        ("perception_test", "videos"),
        ("scannet_sensreader", "scans/scene0003_01/pose/0.txt"),
    ):
        place = tmp_path / name / path
        place.rename(place.with_name("elsewhere"))
        place.write_text("") if path == "videos" else place.mkdir()
        if "scannet" in name:
            assert outcome(BENCHMARKS[name][0], tmp_path / name) == SKIPPED
            continue
        with pytest.raises(UserError):
            outcome(BENCHMARKS[name][0], tmp_path / name)


def test_an_error_of_the_disk_under_a_reader_surfaces(tmp_path, monkeypatch):
    broken = Mock(side_effect=OSError(errno.EIO, "Input/output error"))
    for name, opened in (("scannet_sensreader", "read_text"), ("tapvid", "open"), ("waymo_v1", "open"), ("scannet", "open")):
        benchmark, write = BENCHMARKS[name]
        write(tmp_path / name)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
            if name.startswith("scannet"):
                samples = benchmark.open_split(tmp_path / name, "val", CLIP).part(skipped=[])
                patch.setattr(Path, opened, broken)
                list(samples)
            else:
                patch.setattr(Path, opened, broken)
                left_out(benchmark, tmp_path / name, "val")
