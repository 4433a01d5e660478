"""Whatever a video file holds, it is decoded or refused with a reason, wherever videos are read."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_videos import SETTINGS, save, world

from scaling4d import video
from scaling4d.clips import data_import
from scaling4d.clips.inspection import inspect_video
from scaling4d.clips.settings import CurationConfig
from scaling4d.clips.sources import SourceFile
from scaling4d.encoders.extract import read_clips
from scaling4d.records import UserError
from scaling4d.video import VideoError

NO_DECODER = "no decoder for its codec: write the file anew in another one, as by ffmpeg -i, where it plays"


@pytest.mark.parametrize(("name", "codec", "unknown"), [("a.mp4", b"avc1", b"zzzz"), ("a.webm", b"V_VP9", b"V_ZZ9")])
def test_a_codec_that_nobody_knows_is_a_reason_wherever_videos_are_read(tmp_path, capsys, name, codec, unknown):
    path = save(tmp_path / "videos" / name, world(0, 4))
    path.write_bytes(path.read_bytes().replace(codec, unknown))
    for read in (video.decode_all, lambda path: video.probe(path, sha256=""), lambda path: video.read_frames_at(path, [0.0])):
        with pytest.raises(VideoError, match=f"^{NO_DECODER}$"):
            read(path)
    assert data_import.check_videos(tmp_path) == [f"videos/{name}: {NO_DECODER}"]
    (rejected,) = inspect_video(tmp_path / "videos", SourceFile(name), "0" * 64, CurationConfig(**SETTINGS)).rejected
    assert rejected.reason == "no decoder for its codec"
    with pytest.raises(UserError, match=f"^{path}: {NO_DECODER}$"):
        read_clips(path, (4, 32, 32), None)


def damaged(content: bytes, copies: int) -> Iterator[bytes]:
    """Cut off, or with other bytes: one to thirty of them, half of the time where the header of a mp4 or webm is."""
    rng = np.random.default_rng(copies)
    for number in range(copies):
        changed = bytearray(content)
        if number % 5 == 0:
            yield content[: int(rng.integers(len(content)))]
            continue
        places = rng.integers(*[(0, 600), (max(len(content) - 1200, 0), len(content)), (0, len(content))][number % 3], size=30)
        for place in places[: int(rng.integers(1, 30))]:
            changed[min(int(place), len(content) - 1)] = int(rng.integers(256))
        yield bytes(changed)


@pytest.mark.parametrize("copies", [60, pytest.param(3_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.mkv", "a.avi"])
def test_a_damaged_video_is_decoded_or_refused(tmp_path, name, copies):
    path, refused = save(tmp_path / name, world(0, 20)), 0
    for content in damaged(path.read_bytes(), copies):
        path.write_bytes(content)
        for read in (video.decode_all, lambda path: video.probe(path, sha256=""), lambda path: video.read_frames_at(path, [0.2])):
            try:
                read(path)
            except VideoError:
                refused += 1
        assert inspect_video(Path(tmp_path), SourceFile(name), "0" * 64, CurationConfig(**SETTINGS)).source.path == name
    assert refused
