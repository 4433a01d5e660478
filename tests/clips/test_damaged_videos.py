"""Whatever a video file holds, it is decoded or refused with a reason, wherever videos are read."""

import tarfile
from pathlib import Path

import pytest
from damage import ACCEPTED, REFUSED, SIZES, SKIPPED, files_below
from small_videos import SETTINGS, inspect, save, world

from scaling4d import video
from scaling4d.clips import data_import
from scaling4d.clips.curate import curate
from scaling4d.clips.inspection import hash_sources, inspect_video
from scaling4d.clips.loader import eval_batches
from scaling4d.clips.settings import CurationConfig, WorkersConfig
from scaling4d.clips.shards import read_previous
from scaling4d.clips.sources import SourceFile, list_sources
from scaling4d.features.inputs import first_clip
from scaling4d.features.windows import WindowSettings
from scaling4d.records import UserError
from scaling4d.video import VideoError

CONFIG = CurationConfig(**SETTINGS | {"frames": 8})
NO_DECODER = "no decoder for its codec: write the file anew in another one, as by ffmpeg -i, where it plays"


@pytest.mark.parametrize(("name", "codec", "unknown"), [("a.mp4", b"avc1", b"zzzz"), ("a.webm", b"V_VP9", b"V_ZZ9")])
def test_a_codec_that_nobody_knows_is_a_reason_wherever_videos_are_read(tmp_path, capsys, name, codec, unknown):
    path = save(tmp_path / "videos" / name, world(0, 4))
    path.write_bytes(path.read_bytes().replace(codec, unknown))
    for read in (video.decode_all, lambda path: video.probe(path, sha256=""), lambda path: video.read_frames_at(path, [0.0])):
        with pytest.raises(VideoError, match=f"^{NO_DECODER}$"):
            read(path)
    assert data_import.check_videos(tmp_path) == [f"videos/{name}: {NO_DECODER}"]
    (rejected,) = inspect(tmp_path / "videos", SourceFile(name), CONFIG).rejected
    assert rejected.reason == "no decoder for its codec"
    with pytest.raises(UserError, match=f"^{path}: {NO_DECODER}$"):
        first_clip(path, WindowSettings((4, 32, 32), 8.0, 0.5, "crop"))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder of one video in every container."""
    folder = tmp_path_factory.mktemp("good")
    for name in ("a.mp4", "a.webm", "a.mkv", "a.avi"):
        save(folder / name, world(0, 40))
    return folder


def inspected(folder: Path, sources: list[SourceFile]) -> str:
    """What became of sources: ACCEPTED, or SKIPPED where anything is rejected. An inspection raises nothing."""
    rejected = [source.refused for source in sources if source.refused]
    sources = [source for source in sources if not source.refused]
    for source, digest in zip(sources, hash_sources(folder, sources), strict=True):
        rejected += inspect_video(folder, source, digest, CONFIG).rejected if isinstance(digest, str) else [digest]
    return SKIPPED if rejected else ACCEPTED


@SIZES
def test_a_damaged_video_is_inspected_or_rejected(good, endures, copies):
    counts = endures("videos, inspected", files_below(good), lambda path: inspected(good, [SourceFile(path.name)]), copies)
    assert counts[SKIPPED] and counts[ACCEPTED]


@SIZES
def test_a_damaged_video_is_decoded_or_refused(good, endures, copies):
    def read(path: Path) -> None:
        failed = []
        works = [video.read_video, lambda path: video.read_video(path, rate_hz=8, frames=4, start_s=0.2), video.decode_all]
        for work in [*works, lambda path: video.probe(path, sha256=""), lambda path: video.read_frames_at(path, [0.2])]:
            try:
                work(path)
            except UserError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    counts = endures("videos, read_video", files_below(good), read, copies)
    assert counts[REFUSED] and counts[ACCEPTED]


@SIZES
def test_a_damaged_tar_of_videos_gives_what_can_be_read(good, tmp_path, endures, copies):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.mp4", "é" * 120 + ".webm"):
            tar.add(good / f"a{Path(name).suffix}", name)
    counts = endures("tar of videos", files_below(tmp_path), lambda _: inspected(tmp_path, list_sources(tmp_path)), copies)
    assert counts[SKIPPED] and counts[ACCEPTED]


@SIZES
def test_a_damaged_list_of_videos_is_followed_or_refused(tmp_path, endures, copies):
    for name in ("a.mp4", "abcdefghijk_000001_000003.mp4"):
        (tmp_path / name).write_bytes(b"video")
    (tmp_path / "paths.csv").write_text("path,more\na.mp4,1\nabcdefghijk_000001_000003.mp4,2\n")
    (tmp_path / "times.csv").write_text("youtube_id,time_start,time_end\na,0,1.5\nabcdefghijk,1,3\n")

    def read(path: Path) -> str:
        sources = [source for source in list_sources(tmp_path, path.name) if not source.path.endswith(".csv")]
        return SKIPPED if any(source.refused for source in sources) else ACCEPTED

    counts = endures("lists of videos", [tmp_path / "paths.csv", tmp_path / "times.csv"], read, copies)
    assert counts[SKIPPED] and counts[REFUSED]


@SIZES
@pytest.mark.parametrize("encode", [True, False])
def test_a_damaged_corpus_of_clips_is_read_or_refused(tmp_path, endures, copies, encode):
    for seed in range(4):
        save(tmp_path / f"videos/{seed}.mp4", world(seed, 40))
    config = CurationConfig(**SETTINGS | {"encode": encode, "frames": 8})
    (tmp_path / "clips").mkdir()
    curate(tmp_path / "videos", tmp_path / "clips", config, WorkersConfig(processes=1, cluster=""))

    def read(_: Path) -> None:
        read_previous(tmp_path / "clips")
        for batch in eval_batches(tmp_path / "clips", split="train", batch=2, rank=0, ranks=1, frames=8, max_clips=2):
            assert batch.pixels.ndim == 5  # of the sides that the table states

    files = [path for path in files_below(tmp_path / "clips") if path.name == "clips.parquet" or path.name.startswith("train")]
    counts = endures(f"shards of {'clips' if encode else 'sources'}", files, read, copies)
    assert counts[REFUSED] and counts[ACCEPTED]
