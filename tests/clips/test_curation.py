import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_videos import SETTINGS, save, world

from scaling4d import video
from scaling4d.clips import curate, examine, loader
from scaling4d.clips.cluster import workers
from scaling4d.clips.duplicates import distinct, splits
from scaling4d.clips.examine import Curation
from scaling4d.clips.inputs import Input, walk
from scaling4d.clips.remembered import remembered
from scaling4d.records import UserError

CURATION = Curation(**SETTINGS)


def look(videos, item, curation):
    return examine.examine(videos, item, video.sha256(item.source(videos)), curation)


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
    found = {item.path for item in walk(videos)}
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
    findings = [look(tmp_path, item, CURATION) for item in walk(tmp_path)]
    for val_share in (0.1, 0.5, 0.9):
        chosen, rejected = curate.choose(findings, replace(CURATION, val_share=val_share))
        assert {path for path, why in rejected if why.reason == "near duplicate"} == {f"{seed}.mp4" for seed in range(6)}
        linked = [(f.sha256, o.sha256) for f, _, o, _ in distinct(findings, CURATION.hash_bits)[1]]
        split = splits(findings, linked, val_share)
        by_path = {finding.path: split[finding.sha256] for finding in findings}
        assert all(by_path[f"{seed}.mp4"] == by_path[f"{seed}_and_more.mp4"] for seed in range(6))
        assert {item.split for item in chosen} == {"train", "val"}


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


def plain(finding):
    """Without where the file lies."""
    return replace(finding, video=replace(finding.video, path=""))


def stopper(videos, item, sha256, curation):
    """Ends its own process the first time that it sees a certain file."""
    marker = videos.parent / "killed"
    if item.path == "good3.mp4" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return examine.examine(videos, item, sha256, curation)


def poison(videos, item, sha256, curation):
    if item.path == "good3.mp4":
        os.kill(os.getpid(), signal.SIGKILL)
    return examine.examine(videos, item, sha256, curation)


def test_a_killed_worker_loses_nothing(videos, monkeypatch):
    items = [Input(f"good{seed}.mp4") for seed in range(6)]
    monkeypatch.setattr(curate, "examine", stopper)
    with workers(CURATION) as client:
        findings = curate._examine_all(client, videos, items, CURATION, None)
    assert (videos.parent / "killed").exists()
    assert [plain(finding) for finding in findings] == [plain(look(videos, item, CURATION)) for item in items]


def test_a_file_that_kills_every_worker_is_rejected(videos, monkeypatch):
    monkeypatch.setattr(curate, "examine", poison)
    with workers(CURATION) as client:
        findings = curate._examine_all(client, videos, [Input("good2.mp4"), Input("good3.mp4")], CURATION, None)
    assert [why.reason for why in findings[1].rejected] == ["decoding crashes"]
    assert findings[0].clips


def cutter(videos, item, clips, curation, parts):
    if item.path == "good3.mp4":
        os.kill(os.getpid(), signal.SIGKILL)
    return examine.cut(videos, item, clips, curation, parts)


def test_a_file_whose_clips_cannot_be_cut_is_rejected_and_the_rest_is_used(videos, tmp_path, monkeypatch):
    corpus = few(videos, tmp_path / "corpus", 5)
    monkeypatch.setattr(curate, "cut", cutter)
    curate.curate(corpus, fresh(tmp_path / "out"), CURATION)
    assert [(row["path"], row["reason"]) for row in table(tmp_path / "out" / "rejected.parquet")] == [
        ("good3.mp4", "cutting crashes")
    ]
    assert {row["source"] for row in table(tmp_path / "out" / "clips.parquet")} == {f"good{seed}.mp4" for seed in (0, 1, 2, 4)}


def full(videos, item, clips, curation, parts):
    raise OSError(28, "No space left on device")


def test_a_full_disk_while_clips_are_cut_is_one_line(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "cut", full)
    with pytest.raises(UserError, match=r"^cutting good.\.mp4: .*No space left on device; run again when this is mended"):
        curate.curate(few(videos, tmp_path / "corpus", 3), fresh(tmp_path / "out"), replace(CURATION, workers=1))


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


def watched(monkeypatch):
    """What `finish` is asked to do, by title."""
    asked = {}
    real = curate.finish

    def finish(client, work, jobs, title, *, total):
        asked[title] = total
        return real(client, work, jobs, title, total=total)

    monkeypatch.setattr(curate, "finish", finish)
    return asked


def few(videos, folder, count):
    folder.mkdir()
    for seed in range(count):
        shutil.copy(videos / f"good{seed}.mp4", folder)
    return folder


def test_more_videos_cost_only_themselves_and_give_what_a_run_from_nothing_gives(videos, tmp_path, monkeypatch):
    corpus, memory = few(videos, tmp_path / "corpus", 4), tmp_path / "memory"
    asked = watched(monkeypatch)
    one = replace(CURATION, workers=1)
    curate.curate(corpus, fresh(tmp_path / "first"), one, memory=memory)
    assert asked == {"reading files": 1, "looking at videos": 4, "cutting clips": 4}
    shutil.copy(videos / "good5.mp4", corpus)
    (corpus / "good0.mp4").rename(corpus / "moved.mp4")
    curate.curate(corpus, fresh(tmp_path / "second"), one, before=tmp_path / "first", memory=memory)
    assert asked == {"reading files": 1, "looking at videos": 1, "cutting clips": 1}
    curate.curate(corpus, fresh(tmp_path / "nothing_known"), one)
    assert asked == {"reading files": 1, "looking at videos": 5, "cutting clips": 5}
    assert contents(tmp_path / "second") == contents(tmp_path / "nothing_known")


def test_what_was_known_is_not_used_for_other_settings_or_changed_clips(videos, tmp_path, monkeypatch):
    corpus, memory = few(videos, tmp_path / "corpus", 3), tmp_path / "memory"
    asked = watched(monkeypatch)
    one = replace(CURATION, workers=1)
    curate.curate(corpus, fresh(tmp_path / "first"), one, memory=memory)
    sharper = replace(one, crf=5)
    curate.curate(corpus, fresh(tmp_path / "sharper"), sharper, before=tmp_path / "first", memory=memory)
    assert (asked["looking at videos"], asked["cutting clips"]) == (0, 3)
    slower = replace(one, rate_hz=7.99)  # the same frames, written with other times
    curate.curate(corpus, fresh(tmp_path / "slower"), slower, before=tmp_path / "first", memory=memory)
    assert asked["cutting clips"] == 3
    curate.curate(corpus, fresh(tmp_path / "slower_from_nothing"), slower)
    assert contents(tmp_path / "slower") == contents(tmp_path / "slower_from_nothing")
    strict = replace(one, min_distinct=13)
    curate.curate(corpus, fresh(tmp_path / "strict"), strict, before=tmp_path / "first", memory=memory)
    assert (asked["looking at videos"], asked["cutting clips"]) == (3, 0)
    shard = next((tmp_path / "first" / "shards").iterdir())
    shard.write_bytes(bytes(len(shard.read_bytes())))
    curate.curate(corpus, fresh(tmp_path / "again"), one, before=tmp_path / "first", memory=memory)
    assert asked["cutting clips"] > 0
    curate.curate(corpus, fresh(tmp_path / "new"), one)
    assert contents(tmp_path / "again") == contents(tmp_path / "new")


def test_what_could_not_be_read_for_the_moment_is_looked_at_again(videos, tmp_path, monkeypatch):
    corpus, memory = few(videos, tmp_path / "corpus", 3), tmp_path / "memory"
    one = replace(CURATION, workers=1)
    with workers(one) as client:
        monkeypatch.setattr(curate, "examine", away)
        findings = curate._examine_all(client, corpus, walk(corpus), one, memory)
        assert [why.reason for why in findings[1].rejected] == ["cannot be read"]
        monkeypatch.setattr(curate, "examine", examine.examine)
        assert curate._examine_all(client, corpus, walk(corpus), one, memory)[1].clips


def away(videos, item, sha256, curation):
    """One file is not there while it is looked at."""
    return examine.examine(videos / "gone" if item.path == "good1.mp4" else videos, item, sha256, curation)


def test_what_was_found_out_is_there_after_a_crash_and_for_the_same_circumstances_only(tmp_path):
    dying = multiprocessing.get_context("spawn").Process(target=put_and_die, args=(tmp_path,))
    dying.start()
    dying.join()
    assert dying.exitcode
    with remembered(tmp_path, "looked", {"a": 1}) as known:
        assert "one" in known and "two" not in known and (known.get("one"), known.get("two")) == ([1], None)
    with remembered(tmp_path, "looked", {"a": 2}) as known:
        assert known.get("one") is None


def put_and_die(folder):
    with remembered(folder, "looked", {"a": 1}) as known:
        known.put("one", [1])
        os._exit(9)


def test_a_damaged_memory_is_named_and_begun_anew(tmp_path):
    with remembered(tmp_path, "looked", {}) as known:
        known.put("one", [1])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:4096] + b"x" * 4096)
    with pytest.warns(UserWarning, match=f"{path} is damaged .*; what it held is found out anew"):
        with remembered(tmp_path, "looked", {}) as known:
            assert "one" not in known
            known.put("one", [2])
    with remembered(tmp_path, "looked", {}) as known:
        assert known.get("one") == [2]


def test_a_memory_that_another_run_holds_is_not_taken_for_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr("scaling4d.clips.remembered.PATIENCE_S", 0.1)
    with remembered(tmp_path, "looked", {}) as known:
        known.put("one", [1])
        known.database.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="database is locked; needed a folder on a disk with room, and no other run at work"):
            with remembered(tmp_path, "looked", {}):
                pass
    with remembered(tmp_path, "looked", {}) as known:
        assert known.get("one") == [1]


def fresh(folder):
    folder.mkdir()
    return folder


def test_sources_kept_as_they_are_lie_in_the_shards_once_and_rows_point_into_them(videos, tmp_path):
    corpus = few(videos, tmp_path / "corpus", 3)
    for name in ("two_shots.mp4", "uneven.mp4"):
        shutil.copy(videos / name, corpus)
    curate.curate(corpus, fresh(tmp_path / "out"), replace(CURATION, encode=False, workers=1))
    rows = table(tmp_path / "out/clips.parquet")
    assert len([row for row in rows if row["source"] == "two_shots.mp4"]) == 2
    assert not any(row["encoded"] for row in rows)
    for row in rows:
        shard = (tmp_path / "out/shards" / row["shard"]).read_bytes()
        assert shard[row["offset"] : row["offset"] + row["bytes"]] == (corpus / row["source"]).read_bytes()
    members = []
    for shard in (tmp_path / "out/shards").iterdir():
        with tarfile.open(shard) as tar:
            members += tar.getnames()
    assert len(members) == len(set(members)) == 2 * 5
    batches = loader.every(tmp_path / "out", split="train", batch=100, rank=0, ranks=1)
    for batch in batches:
        for name, pixels in zip(batch.ids, batch.pixels.numpy(), strict=True):
            row = next(row for row in rows if row["id"] == name)
            times_s, source = video.read(corpus / row["source"])
            slow = np.stack([examine.square(source[i], 32) for i in video.nearest(times_s, row["start_s"] + np.arange(16) / 8)])
            assert np.abs(pixels.astype(int) - slow).mean() < 3


@pytest.fixture
def scheduler(tmp_path):
    """A real scheduler and two worker processes of their own on loopback; the workers' process ids."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    address = tmp_path / "scheduler.json"
    host = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(address)]
    processes = [subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_scheduler", *host], env=env)]
    try:
        until = time.monotonic() + 30
        while not address.is_file() and time.monotonic() < until:
            time.sleep(0.1)
        place = json.loads(address.read_text())["address"]
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", place, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
        processes += [subprocess.Popen([*worker, "--local-directory", str(tmp_path)], env=env) for _ in range(2)]
        yield place, [process.pid for process in processes[1:]]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_running_cluster_that_loses_a_worker_writes_the_same_bytes(scheduler, curated, videos, tmp_path, monkeypatch):
    place, pids = scheduler
    real = curate.finish

    def finish(client, work, jobs, title, *, total):
        client.wait_for_workers(1 if title != "reading files" else 2, timeout=30)
        for number, ended in enumerate(real(client, work, jobs, title, total=total)):
            if (title, number) == ("looking at videos", 3):
                os.kill(pids[0], signal.SIGKILL)
            yield ended

    monkeypatch.setattr(curate, "finish", finish)
    curate.curate(videos, fresh(tmp_path / "out"), replace(CURATION, cluster=place))
    assert contents(tmp_path / "out") == contents(curated)
