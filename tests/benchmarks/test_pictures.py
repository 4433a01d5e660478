"""Pictures of a benchmark: its own formats alone, and none that fill the memory."""

import io
import re
import struct
import zlib
from pathlib import Path

import pytest
from numbered import CLIP
from PIL import Image
from small_benchmarks import BENCHMARKS

from scaling4d.benchmarks.frames import open_picture
from scaling4d.records import UserError

SOURCES = Path(__file__).parents[2] / "src"


def encoded(form: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, form)
    return file.getvalue()


def huge_png(side: int) -> bytes:
    """The header of a picture of side x side px, and no pixels."""
    chunks = b""
    for kind, content in ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))):
        chunks += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("form", ["EPS", "GIF", "TIFF", "BMP", "PNG"])
def test_a_format_that_the_benchmark_does_not_use_is_never_opened(tmp_path, form):
    (tmp_path / "a.jpg").write_bytes(encoded(form))
    for source in (tmp_path / "a.jpg", encoded(form)):
        with pytest.raises(UserError, match="^frame 7 cannot be read: needed JPEG$"):
            open_picture(source, "frame 7", ["JPEG"])
    assert open_picture(encoded("JPEG"), "", ["JPEG"]).size == (32, 32)


@pytest.mark.parametrize("side", [8_200, 10_000, 30_000])  # more than ours, than Pillow's warning, than Pillow's limit
def test_a_picture_too_large_for_the_memory_is_refused_by_its_header(side):
    with pytest.raises(UserError, match=r"^frame 7 (is 8200x8200 px; needed at most|cannot be read: Image size) "):
        open_picture(huge_png(side), "frame 7", ["PNG"])


@pytest.mark.parametrize("name", ["scannet_sensreader", "scannet_posed_images", "realestate10k_frames"])
@pytest.mark.parametrize("content", [encoded("EPS"), huge_png(30_000)])
def test_a_reader_skips_the_sample_of_such_a_picture(tmp_path, name, content):
    benchmark, write = BENCHMARKS[name]
    write(tmp_path)
    for path in (path for path in tmp_path.rglob("*") if path.suffix in (".png", ".jpg")):
        path.write_bytes(content)
    skipped: list = []
    assert not list(benchmark.open_split(tmp_path, "val", CLIP).part(skipped=skipped))
    assert "cannot be read: " in skipped[0].why and skipped[0].bad


def test_every_call_that_opens_a_picture_names_its_formats():
    lines = [line for path in SOURCES.rglob("*.py") for line in path.read_text().splitlines()]
    calls = [line for line in lines if re.search(r"\bImage\.open\(", line)]
    assert calls and all("formats=" in line for line in calls)
