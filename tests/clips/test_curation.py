import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
from distributed import LocalCluster
from nearness import contents
from PIL import Image, ImageOps
from small_videos import SETTINGS, WORKERS, inspect

from scaling4d import video
from scaling4d.clips import curate, inspection, loader
from scaling4d.clips.cluster import dask_client
from scaling4d.clips.settings import CurationConfig, WorkersConfig
from scaling4d.clips.sources import SourceFile, list_sources
from scaling4d.records import UserError

pytestmark = pytest.mark.integration

CONFIG = CurationConfig(**SETTINGS)
ONE = WorkersConfig(processes=1, cluster="")


@pytest.fixture(scope="module")
def quick():
    """A worker in a thread of this process, without a process to start."""
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        yield replace(ONE, cluster=cluster.scheduler_address)


def table(path):
    return pq.read_table(path).to_pylist()


def run(corpus, out, workers, config=CONFIG, **more):
    out.mkdir()
    curate.curate(corpus, out, config, workers, **more)
    return out


def few(videos, folder, count):
    folder.mkdir()
    for seed in range(count):
        shutil.copy(videos / f"good{seed}.mp4", folder)
    return folder


def frames_at(path, start_s):
    """16 frames of a video at 8 Hz, cropped and resized one by one."""
    times_s, source = video.decode_all(path)
    frames = source[video.frame_indices_at(times_s, start_s + np.arange(16) / 8)]
    return np.stack([ImageOps.fit(Image.fromarray(frame), (32, 32), Image.Resampling.BICUBIC) for frame in frames])


def test_each_file_is_used_or_listed_once_with_its_reason(curated, videos):
    reasons = [(row["path"], row["reason"]) for row in table(curated / "rejected.parquet") if row["scope"] == "file"]
    assert len(reasons) == len(dict(reasons)) and dict(reasons) == {
        "black.mp4": "black", "frozen.mp4": "frozen", "short.mp4": "too short", "small.mp4": "too small",
        "large.mp4": "too large", "long.mp4": "too long", "slow.mp4": "low frame rate", "good0.mp4": "near duplicate",
        "same_as_good1.mp4": "duplicate", "cut_off.mkv": "incomplete", "damaged.mp4": "decoding fails",
        "empty.mp4": "the file is empty", "list.mp4": "not a video", "leads_nowhere.mp4": "link",
        "leads_in_a_circle": "link", **dict.fromkeys(("cut_off.mp4", "text.mp4", ".hidden"), "not a readable video"),
    }  # fmt: skip
    files, used = {source.path for source in list_sources(videos)}, {row["source"] for row in table(curated / "clips.parquet")}
    assert used | dict(reasons).keys() == files and not used & dict(reasons).keys()
    sheet = json.loads((curated / "datasheet.json").read_text())
    assert sheet["files"] == {"found": len(files), "used": len(used), "rejected": len(reasons)}


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


@pytest.mark.parametrize(("cut_at_shots", "ranges"), [(True, [(0.0, 2.5), (2.5, 5.0)]), (False, [(0.0, 5.0)])])
def test_a_clip_goes_on_over_a_cut_where_shots_are_not_cut(videos, cut_at_shots, ranges):
    config = replace(CONFIG, max_frames=40, cut_at_shots=cut_at_shots)
    clips = inspect(videos, SourceFile("two_shots.mp4"), config).clips
    assert [(clip.start_s, clip.end_s) for clip in clips] == ranges


def test_clips_show_the_source_at_the_times_that_the_table_says(curated, videos):
    for row in table(curated / "clips.parquet"):
        with tarfile.open(curated / "shards" / row["shard"]) as tar:
            clip_s, pixels = video.decode_all(video.FileSlice(curated / "shards" / row["shard"], row["offset"], row["bytes"]))
            assert json.load(tar.extractfile(f"{row['id']}.json"))["source"] == row["source"]
        np.testing.assert_allclose(clip_s, np.arange(16) / 8, atol=1e-3)
        slow = frames_at(videos / row["source"], row["start_s"])
        assert pixels.shape == slow.shape == (16, 32, 32, 3)
        assert np.abs(pixels.astype(int) - slow).mean() < 6, row["source"]


def test_shards_are_uncompressed_sorted_limited_and_carry_no_time_or_owner(curated):
    rows = table(curated / "clips.parquet")
    assert len(list((curated / "shards").glob("train-*"))) > 1
    for shard in (curated / "shards").iterdir():
        with tarfile.open(shard, "r:") as tar:
            members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
        ids = [row["id"] for row in rows if row["shard"] == shard.name]
        assert [m.name for m in members] == [f"{name}.{kind}" for name in ids for kind in ("mp4", "json")] and ids == sorted(ids)
        places = {m.name: (m.offset_data, m.size) for m in members}
        assert all(places[f"{row['id']}.mp4"] == (row["offset"], row["bytes"]) for row in rows if row["shard"] == shard.name)


def test_one_worker_and_two_write_the_same_bytes(curated, videos, tmp_path):
    assert contents(run(videos, tmp_path / "out", ONE)) == contents(curated)


def end_or_call(name, how, function, videos, source, *rest):
    if source.path == name and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if source.path == name:
        raise RuntimeError("a bug of the decoder")
    return function(videos, source, *rest)


@pytest.mark.parametrize("how", ["raises", pytest.param("killed", marks=pytest.mark.slow)])
def test_files_that_end_every_worker_are_rejected_and_the_rest_is_used(quick, videos, tmp_path, monkeypatch, how):
    monkeypatch.setattr(curate, "inspect_video", partial(end_or_call, "good2.mp4", how, inspection.inspect_video))
    monkeypatch.setattr(curate, "encode_clips", partial(end_or_call, "good3.mp4", how, inspection.encode_clips))
    out = run(few(videos, tmp_path / "corpus", 5), tmp_path / "out", WORKERS if how == "killed" else quick)
    rejected = [(row["path"], row["reason"]) for row in table(out / "rejected.parquet")]
    assert rejected == [("good2.mp4", "decoding crashes"), ("good3.mp4", "cutting crashes")]
    assert {row["source"] for row in table(out / "clips.parquet")} == {f"good{seed}.mp4" for seed in (0, 1, 4)}


def lose_the_disk(videos, source, *rest):
    """While a file is decoded it cannot be read any more: FFmpeg reports this as the end of the data."""
    inspected, decode_frames = videos / source.path, video.decode_frames

    def decode(location):
        frames = decode_frames(location)
        yield next(frames)
        inspected.unlink() if source.path == "good1.mp4" else inspected.write_bytes(b"another file")
        raise video.VideoError("incomplete: the data ends at 0.10 s of 1.00 s")

    with pytest.MonkeyPatch.context() as patch:
        if source.path in ("good1.mp4", "good2.mp4"):
            patch.setattr(video, "decode_frames", decode)
        return inspection.inspect_video(videos, source, *rest)


def test_a_file_that_is_lost_or_changed_while_it_is_decoded_is_no_bad_video(quick, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "inspect_video", lose_the_disk)
    corpus, sources = few(videos, tmp_path / "corpus", 3), []
    for name in ("good1.mp4", "good2.mp4"):
        sources.append(((corpus / name).read_bytes(), corpus / name))
    with dask_client(quick) as client:
        first = curate._inspect_all(client, corpus, list_sources(corpus), CONFIG, tmp_path / "cache")
        assert [[why.reason for why in file.rejected] for file in first] == [[], ["cannot be read"], ["cannot be read"]]
        monkeypatch.setattr(curate, "inspect_video", inspection.inspect_video)
        for content, path in sources:
            path.write_bytes(content)
        again = curate._inspect_all(client, corpus, list_sources(corpus), CONFIG, tmp_path / "cache")
    assert all(file.clips and not file.rejected for file in again)


def lack_a_package(*_):
    raise ModuleNotFoundError("No module named 'av'")


def test_a_worker_without_the_packages_ends_the_run_with_one_line(quick, videos, tmp_path, monkeypatch):
    for number, step in enumerate(("hash_sources", "inspect_video", "encode_clips")):
        with monkeypatch.context() as patch:
            patch.setattr(curate, step, lack_a_package)
            with pytest.raises(UserError, match=r"^.+: a Dask worker answers No module named 'av'; needed this package"):
                run(few(videos, tmp_path / f"corpus{number}", 3), tmp_path / f"out{number}", quick)


def fill_disk(videos, source, clips, config, out):
    raise OSError(28, "No space left on device")


def test_a_full_disk_while_clips_are_cut_is_one_line(quick, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "encode_clips", fill_disk)
    with pytest.raises(UserError, match=r"^cutting good.\.mp4: .*No space left on device; run again when this is mended"):
        run(few(videos, tmp_path / "corpus", 3), tmp_path / "out", quick)


def test_a_folder_without_a_usable_video_says_why_and_what_to_do(quick, tmp_path):
    use = "name your own data with `scaling4d data use PATH`"
    with pytest.raises(UserError, match=rf"^no folder .*/none; run `dvc repro data.dvc`, or {use}$"):
        curate.curate(tmp_path / "none", tmp_path, CONFIG, ONE)
    (tmp_path / "videos").mkdir()
    with pytest.raises(UserError, match=rf"^.*/videos holds no files; put videos there, or {use}$"):
        curate.curate(tmp_path / "videos", tmp_path, CONFIG, ONE)
    (tmp_path / "videos/a.txt").write_text("a")
    (tmp_path / "videos/b.mp4").write_bytes(b"")
    why = r"^none of the 2 files in .* can be used \(1 not a readable video, 1 the file is empty\); see"
    with pytest.raises(UserError, match=why):
        curate.dry_run(tmp_path / "videos", CONFIG, quick)


def test_a_dry_run_counts_by_reason_and_lists_files_only_where_that_is_wanted(quick, videos, tmp_path, capsys):
    corpus = few(videos, tmp_path / "corpus", 3)
    for name in ("empty", "none"):
        (corpus / f"{name}.mp4").write_bytes(b"")
    for list_files in (False, True):
        curate.dry_run(corpus, CONFIG, quick, list_files=list_files)
        lines = capsys.readouterr().out.splitlines()
        assert lines[-2].startswith(f"5 files in {corpus}: 3 used for ") and lines[-2].endswith(", 2 rejected")
        assert lines[-1] == "rejected files: 2 the file is empty"
        assert any(".mp4" in line for line in lines) == list_files


def test_a_cluster_that_does_not_answer_is_named(videos, tmp_path, monkeypatch):
    monkeypatch.setattr("scaling4d.clips.cluster.CONNECT_S", 0.2)
    with pytest.raises(UserError, match=r"no Dask scheduler answers at 'tcp://127.0.0.1:9' .*set clips.Workers.cluster$"):
        curate.curate(videos, tmp_path, CONFIG, replace(ONE, cluster="tcp://127.0.0.1:9"))


@pytest.mark.parametrize(("name", "value"), [
    ("side_px", 33), ("val_share", 0.0), ("frames", 0), ("max_frames", 15), ("crf", 60), ("hash_bits", 256)
])  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name} = {value}"):
        CurationConfig(**SETTINGS | {name: value})


@pytest.fixture
def jobs(monkeypatch):
    """Number of jobs by title, of the last run."""
    counts, run_jobs = {}, curate.run_jobs

    def count_jobs(client, function, jobs, title, *, total):
        counts[title] = total
        return run_jobs(client, function, jobs, title, total=total)

    monkeypatch.setattr(curate, "run_jobs", count_jobs)
    return counts


def test_more_videos_cost_only_themselves_and_give_what_a_run_from_nothing_gives(quick, videos, tmp_path, jobs):
    corpus, cache = few(videos, tmp_path / "corpus", 4), tmp_path / "cache"
    first = run(corpus, tmp_path / "first", quick, cache=cache)
    assert jobs == {"reading files": 1, "looking at videos": 4, "cutting clips": 4}
    shutil.copy(videos / "good5.mp4", corpus)
    (corpus / "good0.mp4").rename(corpus / "moved.mp4")
    second = run(corpus, tmp_path / "second", quick, previous=first, cache=cache)
    assert jobs == {"reading files": 1, "looking at videos": 1, "cutting clips": 1}
    nothing_known = run(corpus, tmp_path / "nothing_known", quick)
    assert jobs == {"reading files": 1, "looking at videos": 5, "cutting clips": 5}
    assert contents(second) == contents(nothing_known)


def test_cached_results_are_not_used_for_other_settings_or_changed_clips(quick, videos, tmp_path, jobs):
    corpus, known = few(videos, tmp_path / "corpus", 3), {"cache": tmp_path / "cache"}
    first = run(corpus, tmp_path / "first", quick, **known)
    known["previous"] = first
    run(corpus, tmp_path / "sharper", quick, replace(CONFIG, crf=5), **known)
    assert (jobs["looking at videos"], jobs["cutting clips"]) == (0, 3)
    slower = replace(CONFIG, rate_hz=7.99)  # the same frames, written with other times
    again = run(corpus, tmp_path / "slower", quick, slower, **known)
    assert jobs["cutting clips"] == 3
    assert contents(again) == contents(run(corpus, tmp_path / "slower_from_nothing", quick, slower))
    run(corpus, tmp_path / "faster", quick, replace(CONFIG, rate_hz=8.5), **known)
    assert jobs["looking at videos"] == 3
    before = contents(first)
    shard = next((first / "shards").iterdir())
    shard.write_bytes(bytes(shard.stat().st_size))
    assert contents(run(corpus, tmp_path / "again", quick, **known)) == before and jobs["cutting clips"] > 0


def put_and_die(folder):
    with curate.open_cache(folder, "inspections", {"a": 1}) as known:
        known.set("one", [1])
        os._exit(9)


def look_up(folder, **settings):
    with curate.open_cache(folder, "inspections", settings) as known:
        return known.get("one")


def test_entries_of_a_cache_survive_a_crash_and_are_for_the_same_settings_only(tmp_path):
    dying = multiprocessing.get_context("spawn").Process(target=put_and_die, args=(tmp_path,))
    dying.start()
    dying.join()
    assert dying.exitcode and look_up(tmp_path, a=1) == [1] and look_up(tmp_path, a=2) is None


def test_a_damaged_cache_is_named_and_begun_anew(tmp_path):
    with curate.open_cache(tmp_path, "inspections", {}) as known:
        known.set("one", [1])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:4096] + b"x" * 4096)
    with pytest.warns(UserWarning, match=f"{path} is damaged .*; its entries are computed anew"):
        assert look_up(tmp_path) is None
    with curate.open_cache(tmp_path, "inspections", {}) as known:
        known.set("one", [2])
    assert look_up(tmp_path) == [2]


def test_a_cache_that_another_run_holds_is_not_taken_for_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr("scaling4d.clips.curate.TIMEOUT_S", 0.1)
    with curate.open_cache(tmp_path, "inspections", {}) as known:
        known.set("one", [1])
        known.database.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="database is locked; needed a folder on a disk with room, and no other run at work"):
            look_up(tmp_path)
    assert look_up(tmp_path) == [1]


def test_unencoded_sources_lie_in_the_shards_once_and_rows_point_into_them(quick, videos, tmp_path):
    corpus = few(videos, tmp_path / "corpus", 3)
    for name in ("two_shots.mp4", "uneven.mp4"):
        shutil.copy(videos / name, corpus)
    out = run(corpus, tmp_path / "out", quick, replace(CONFIG, encode=False))
    rows = {row["id"]: row for row in table(out / "clips.parquet")}
    assert len([row for row in rows.values() if row["source"] == "two_shots.mp4"]) == 2
    for row in rows.values():
        shard, source = (out / "shards" / row["shard"]).read_bytes(), (corpus / row["source"]).read_bytes()
        assert not row["encoded"] and shard[row["offset"] : row["offset"] + row["bytes"]] == source
    members = []
    for shard in (out / "shards").iterdir():
        with tarfile.open(shard) as tar:
            members += tar.getnames()
    assert len(members) == len(set(members)) == 2 * 5
    for batch in loader.eval_batches(out, split="train", frames=16, batch=100, rank=0, ranks=1):
        for name, pixels in zip(batch.ids, batch.pixels.numpy(), strict=True):
            slow = frames_at(corpus / rows[name]["source"], rows[name]["start_s"])
            assert np.abs(pixels.astype(int) - slow).mean() < 3


@pytest.fixture
def scheduler(tmp_path):
    """The address of a running scheduler, and the processes of two workers of its own that nobody starts again."""
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    with LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address=None) as cluster:
        command = [*worker, "--local-directory", str(tmp_path), cluster.scheduler_address]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        processes = [subprocess.Popen(command, env=env) for _ in range(2)]
        yield cluster.scheduler_address, processes
        for process in processes:
            process.kill()
            process.wait()


def test_a_running_cluster_that_loses_a_worker_writes_the_same_bytes(scheduler, curated, videos, tmp_path, monkeypatch):
    (address, processes), real = scheduler, curate.run_jobs

    def run_jobs(client, function, jobs, title, *, total):
        client.wait_for_workers(1 if title != "reading files" else 2, timeout=30)
        for number, finished in enumerate(real(client, function, jobs, title, total=total)):
            if (title, number) == ("looking at videos", 3):
                processes[0].kill()
            yield finished

    monkeypatch.setattr(curate, "run_jobs", run_jobs)
    assert contents(run(videos, tmp_path / "out", replace(ONE, cluster=address))) == contents(curated)
