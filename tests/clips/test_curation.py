import io
import json
import os
import shutil
import signal
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_videos import SETTINGS, save, world

from scaling4d import video
from scaling4d.clips import curate, examine
from scaling4d.clips.examine import Clip, Curation, Finding
from scaling4d.clips.examine import examine as look
from scaling4d.records import UserError, Video

CURATION = Curation(**SETTINGS)


def table(path):
    return pq.read_table(path).to_pylist()


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("black.mp4", "black"),
        ("frozen.mp4", "frozen"),
        ("short.mp4", "too short"),
        ("small.mp4", "too small"),
        ("large.mp4", "too large"),
        ("long.mp4", "too long"),
        ("slow.mp4", "low frame rate"),
        ("good0.mp4", "near duplicate"),
        ("same_as_good1.mp4", "duplicate"),
        ("cut_off.mkv", "incomplete"),
        ("cut_off.mp4", "not a readable video"),
        ("damaged.mp4", "decoding fails"),
        ("empty.mp4", "the file is empty"),
        ("text.mp4", "not a readable video"),
        ("list.mp4", "not a video"),
        (".hidden", "not a readable video"),
        ("leads_out.mp4", "link"),
        ("leads_nowhere.mp4", "link"),
        ("leads_in_a_circle", "link"),
    ],
)
def test_each_bad_file_is_listed_once_with_its_reason(curated, path, reason):
    rows = [row for row in table(curated / "rejected.parquet") if row["path"] == path and row["scope"] == "file"]
    assert [row["reason"] for row in rows] == [reason]


def test_every_file_is_either_used_or_rejected(curated, videos):
    found = set(curate.walk(videos))
    used = {row["source"] for row in table(curated / "clips.parquet")}
    rejected = {row["path"] for row in table(curated / "rejected.parquet") if row["scope"] == "file"}
    assert used | rejected == found
    assert not used & rejected
    sheet = json.loads((curated / "datasheet.json").read_text())
    assert sheet["files"] == {"found": len(found), "used": len(used), "rejected": len(rejected)}
    assert sum(sheet["rejected_files"].values()) == len(rejected)
    assert sum(sheet["clips"].values()) == len(table(curated / "clips.parquet"))


def test_good_videos_are_used_whatever_their_name_rate_or_rotation(curated):
    used = {row["source"] for row in table(curated / "clips.parquet")}
    expected = {f"good{seed}.mp4" for seed in range(1, 8)} | {"near_good0.mp4", "uneven.mp4", "turned.mp4"}
    assert expected | {"-a name, with ünïcode/größe '1'.mp4"} <= used


def test_no_clip_crosses_a_cut_or_holds_black_or_frozen_frames(curated):
    starts = {}
    for row in table(curated / "clips.parquet"):
        starts.setdefault(row["source"], []).append(row["start_s"])
    assert starts["two_shots.mp4"] == [0.0, 2.5]
    assert starts["black_inside.mp4"] == [0.0, 3.125]
    assert starts["frozen_inside.mp4"] == [0.0, 4.375]
    spans = {(row["path"], row["reason"]): row["detail"] for row in table(curated / "rejected.parquet") if row["scope"] == "span"}
    assert spans["black_inside.mp4", "black"] == "2.500 to 3.125 s"
    assert spans["frozen_inside.mp4", "frozen"] == "2.438 to 4.375 s"


def test_duplicates_and_their_sources_never_straddle_the_split(videos, tmp_path):
    for seed in range(6):
        shutil.copy(videos / f"good{seed}.mp4", tmp_path / f"{seed}.mp4")
        save(tmp_path / f"{seed}_and_more.mp4", np.concatenate([world(seed, 40, 72, 96), world(100 + seed, 40, 72, 96)]), crf=28)
    findings = [look(tmp_path, path, CURATION) for path in curate.walk(tmp_path)]
    for val_share in (0.1, 0.5, 0.9):
        chosen, rejected = curate.choose(findings, replace(CURATION, val_share=val_share))
        assert {path for path, why in rejected if why.reason == "near duplicate"} == {f"{seed}.mp4" for seed in range(6)}
        linked = [(f.sha256, o.sha256) for f, _, o, _ in curate.distinct(findings, CURATION.hash_bits)[1]]
        split = curate.splits(findings, linked, val_share)
        by_path = {finding.path: split[finding.sha256] for finding in findings}
        assert all(by_path[f"{seed}.mp4"] == by_path[f"{seed}_and_more.mp4"] for seed in range(6))
        assert {item.split for item in chosen} == {"train", "val"}


def test_near_duplicates_are_those_that_comparing_all_pairs_finds():
    draw = np.random.default_rng(0)
    made = Video("v", "0", "h264", 1, 8, 64, 64, 0)
    hashes = [draw.integers(0, 256, 32, dtype=np.uint8)]
    for _ in range(300):
        bits = np.unpackbits(hashes[draw.integers(len(hashes))])
        bits[draw.choice(256, draw.integers(0, 40), replace=False)] ^= 1
        hashes.append(np.packbits(bits))
    findings = [Finding(f"{i:03d}", str(i), made, (Clip(0.0, 1.0, (0,), h.tobytes()),), ()) for i, h in enumerate(hashes)]
    kept, removed = curate.distinct(findings, 16)
    slow = []
    for finding in findings:
        if all(distance(finding, other) > 16 for other in slow):
            slow.append(finding)
    assert [finding.path for finding, _ in kept] == [finding.path for finding in slow]
    assert len(kept) + len(removed) == len(findings)
    assert removed


def distance(one, other):
    return int(np.bitwise_count(np.frombuffer(one.clips[0].phash, "u1") ^ np.frombuffer(other.clips[0].phash, "u1")).sum())


def test_clips_show_the_source_at_the_times_that_the_table_says(curated, videos):
    for row in table(curated / "clips.parquet"):
        with tarfile.open(curated / "shards" / row["shard"]) as tar:
            clip_s, pixels = video.read(io.BytesIO(tar.extractfile(f"{row['id']}.mp4").read()))
            told = json.load(tar.extractfile(f"{row['id']}.json"))
        assert told["source"] == row["source"]
        times_s, source = video.read(videos / row["source"])
        wanted = video.nearest(times_s, row["start_s"] + np.arange(16) / 8)
        np.testing.assert_allclose(clip_s, np.arange(16) / 8, atol=1e-3)
        slow = np.stack([examine.square(frame, 32) for frame in source[wanted]])
        assert pixels.shape == slow.shape == (16, 32, 32, 3)
        assert np.abs(pixels.astype(int) - slow).mean() < 6, row["source"]


def test_shards_are_uncompressed_sorted_limited_and_carry_no_time_or_owner(curated):
    rows = table(curated / "clips.parquet")
    shards = sorted((curated / "shards").iterdir())
    assert len([shard for shard in shards if shard.name.startswith("train-")]) > 1
    for shard in shards:
        with tarfile.open(shard, "r:") as tar:
            members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
        ids = [row["id"] for row in rows if row["shard"] == shard.name]
        assert [m.name for m in members] == [f"{name}.{kind}" for name in ids for kind in ("mp4", "json")]
        assert ids == sorted(ids)
        places = {m.name: (m.offset_data, m.size) for m in members}
        assert all(places[f"{row['id']}.mp4"] == (row["offset"], row["bytes"]) for row in rows if row["shard"] == shard.name)


def test_one_worker_and_two_write_the_same_bytes(curated, videos, tmp_path):
    curate.curate(videos, tmp_path, replace(CURATION, workers=1))
    assert contents(tmp_path) == contents(curated)


def stopper(videos, path, curation):
    """Ends its own process the first time that it sees a certain file."""
    marker = videos.parent / "killed"
    if path == "good3.mp4" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return look(videos, path, curation)


def poison(videos, path, curation):
    if path == "good3.mp4":
        os.kill(os.getpid(), signal.SIGKILL)
    return look(videos, path, curation)


def test_a_killed_worker_loses_nothing(videos, monkeypatch):
    paths = [f"good{seed}.mp4" for seed in range(6)]
    monkeypatch.setattr(curate, "examine", stopper)
    with curate.workers(CURATION) as client:
        findings = curate._examine_all(client, videos, paths, CURATION)
    assert (videos.parent / "killed").exists()
    assert findings == [look(videos.resolve(), path, CURATION) for path in paths]


def test_a_file_that_kills_every_worker_is_rejected(videos, monkeypatch):
    monkeypatch.setattr(curate, "examine", poison)
    with curate.workers(CURATION) as client:
        findings = curate._examine_all(client, videos, ["good2.mp4", "good3.mp4"], CURATION)
    assert [why.reason for why in findings[1].rejected] == ["decoding crashes"]
    assert findings[0].clips


def test_an_empty_or_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(
        UserError, match=r"^.*/videos holds no files; put videos there, or name your own data with `scaling4d data use PATH`$"
    ):
        (tmp_path / "videos").mkdir()
        curate.curate(tmp_path / "videos", tmp_path, CURATION)
    with pytest.raises(UserError, match=r"^no folder .*/none; run `dvc repro data.dvc`, or name your own data with"):
        curate.curate(tmp_path / "none", tmp_path, CURATION)


def test_a_folder_without_a_usable_video_says_why(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.txt").write_text("a")
    (tmp_path / "videos" / "b.mp4").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"^none of the 2 files in .* can be used \(1 not a readable video, 1 the file is empty\); see"
    ):
        curate.dry(tmp_path / "videos", replace(CURATION, workers=1))


def test_a_cluster_that_does_not_answer_is_named(videos, tmp_path):
    with pytest.raises(UserError, match=r"no Dask scheduler answers at 'tcp://127.0.0.1:9' .*set clips.Curation.cluster$"):
        curate.curate(videos, tmp_path, replace(CURATION, cluster="tcp://127.0.0.1:9"))


@pytest.mark.parametrize(
    ("name", "value"), [("side_px", 33), ("val_share", 0.0), ("frames", 0), ("min_distinct", 17), ("crf", 60)]
)
def test_settings_that_cannot_be_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=rf"^clips.Curation.{name} = {value}"):
        Curation(**SETTINGS | {name: value})
