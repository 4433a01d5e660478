import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from loading import ARGUMENTS, batches_of, same
from peak_memory import grown, in_a_new_process, needs_proc
from small_videos import save, world

from scaling4d import seeds, video
from scaling4d.clips import loader
from scaling4d.clips.crop import draw_rectangle
from scaling4d.clips.shards import read_previous
from scaling4d.records import Augmentation, UserError
from scaling4d.training.distributed import run as in_ranks

pytestmark = pytest.mark.integration

CLIPS = 23  # of `made`; ARGUMENTS are of a little over two epochs


def run(folder, **others):
    return list(batches_of(folder, **others))


def ids(batches):
    return [name for batch in batches for name in batch.ids]


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by every clip that is decoded."""
    sources, decode = [], video.decode_all
    monkeypatch.setattr(video, "decode_all", lambda source: sources.append(source) or decode(source))
    return sources


ROW = {"encoded": True, "origin_s": 0.0, "frames": 4, "rate_hz": 8.0, "side_px": 16}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """23 tiny clips to train with, in 7 shards of 1 to 5 clips, and 2 to validate."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "shards").mkdir()
    rows = []
    for number, digit in enumerate("01111122223333444555556"):
        rows.append({"id": f"clip-{number}", "split": "train", "shard": f"train-{digit}.tar", "start_s": number / 8, **ROW})
    rows += [{"id": f"val-{number}", "split": "val", "shard": "val-0.tar", "start_s": 0.0, **ROW} for number in range(2)]
    for seed, row in enumerate(rows):
        part = save(folder / "part.mp4", world(seed, 4, 16, 16), rate_hz=8).read_bytes()
        with (folder / "shards" / row["shard"]).open("ab") as file:
            row |= {"offset": file.tell(), "bytes": file.write(part)}
    write_table(folder, rows, row_group_size=10)
    return folder


def write_table(folder, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), folder / "clips.parquet", **options)


def test_a_batch_is_uint8_clips_with_their_ids_and_starts(curated):
    (batch,) = run(curated, frames=16, steps=1)
    assert batch.pixels.shape == (4, 16, 32, 32, 3) and batch.pixels.dtype == torch.uint8
    known = {clip.id: clip.start_s for clip in loader.ClipTable(curated, "train")}
    assert batch.start_s == tuple(known[name] for name in batch.ids)


@pytest.mark.parametrize(("workers", "starts"), [(0, range(13)), (1, [7]), pytest.param(3, [0], marks=pytest.mark.slow)])
def test_a_run_resumed_at_any_step_with_any_workers_gives_the_batches_of_an_unbroken_one(made, workers, starts):
    settings = {"repeats": 2, "crop": (0.5, 1.0), "window_shards": 3}
    unbroken = run(made, **settings)
    for start in starts:
        assert same(unbroken[start:], run(made, start=start, workers=workers, cached_clips=5, **settings))
    assert not multiprocessing.active_children()


def test_cached_clips_change_no_batch_and_are_decoded_once(made, decoded):
    plain = run(made)
    assert len(decoded) == 12 * 4
    assert same(plain, run(made, cached_clips=1000))
    assert len(decoded) == 12 * 4 + CLIPS


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_hold_the_parts_of_what_one_rank_holds(made, ranks):
    settings = {"batch": 8, "repeats": 2, "crop": (0.5, 1.0), "window_shards": 2}
    whole = run(made, **settings)
    parts = [run(made, rank=rank, ranks=ranks, **settings) for rank in range(ranks)]
    for step, batch in enumerate(whole):
        assert batch.ids == sum((part[step].ids for part in parts), ())
        assert torch.equal(batch.pixels, torch.cat([part[step].pixels for part in parts]))


def test_crops_and_flips_that_are_left_to_the_device_are_those_of_a_worker(made):
    settings = {"repeats": 2, "crop": (0.5, 1.0)}
    for batch, left in zip(run(made, **settings), run(made, on_device=True, **settings), strict=True):
        assert batch.augmentations == () and left.ids == batch.ids
        pixels = [loader.augment(*pair) for pair in zip(left.pixels, left.augmentations, strict=True)]
        assert torch.equal(torch.stack(pixels), batch.pixels)


def test_batches_for_a_gpu_come_in_pinned_memory(made, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # there is no GPU
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda pixels: pinned.append(pixels.clone()) or pinned[-1])
    assert same(run(made), run(made)) and not pinned
    batches = run(made, on_device=True)
    assert [batch.pixels.data_ptr() for batch in batches] == [pixels.data_ptr() for pixels in pinned]


@pytest.mark.parametrize("window_shards", [0, 7, 100])
def test_one_window_shuffles_all_clips_together(made, window_shards):
    names = [clip.id for clip in loader.ClipTable(made, "train")]
    shown = ids(run(made, batch=1, steps=2 * CLIPS, window_shards=window_shards, seed=5))
    assert shown == [names[index] for epoch in (0, 1) for index in seeds.numpy_rng(5, "order", epoch).permutation(CLIPS)]


@pytest.mark.parametrize("window_shards", [1, 2, 3, 6])
def test_windows_show_every_clip_once_an_epoch_from_a_few_shards_at_a_time(made, window_shards):
    shard = {clip.id: clip.shard for clip in loader.ClipTable(made, "train")}
    shown = ids(run(made, batch=1, steps=2 * CLIPS, window_shards=window_shards))
    epochs = shown[:CLIPS], shown[CLIPS:]
    for epoch in epochs:
        assert sorted(epoch) == sorted(shard)
        read = [shard[name] for name in epoch]
        for index in range(CLIPS):
            assert len(set(read[: index + 1]) & set(read[index:])) <= window_shards  # begun and not yet done
    assert epochs[0] != epochs[1]
    assert list(dict.fromkeys(shard[name] for name in epochs[0])) != list(dict.fromkeys(shard[name] for name in epochs[1]))
    changes = sum(shard[one] != shard[other] for one, other in itertools.pairwise(epochs[0]))
    assert changes > 6 or window_shards < 3  # clips of a window are shuffled together, not shard after shard


def test_a_table_out_of_order_is_refused_by_windows(made, tmp_path):
    rows = pq.read_table(made / "clips.parquet").to_pylist()
    write_table(tmp_path, rows[::2] + rows[1::2])
    with pytest.raises(UserError, match="^23 clips are not in order of their shards$"):
        batches_of(tmp_path, window_shards=2)


def cropped(pixels, *, area, rng, aspect=(1.0, 1.0)):
    rectangle = draw_rectangle(pixels.shape[1:3], area=area, aspect=aspect, rng=rng)
    return loader.augment(pixels, Augmentation(rectangle, mirrored=False, backwards=False))


def test_a_crop_is_a_square_of_the_clip_the_same_in_all_frames_and_of_everything_changes_nothing():
    rng = np.random.default_rng(0)
    still = torch.from_numpy(world(0, 1, 32, 32)).expand(4, -1, -1, -1)
    sides = set()
    for _ in range(50):
        pixels = cropped(still, area=(0.25, 1.0), rng=rng)
        assert pixels.shape == still.shape and pixels.dtype == torch.uint8
        assert all(torch.equal(pixels[0], frame) for frame in pixels)
        sides.add(pixels.float().std().item())
    assert len(sides) > 40
    ramp = torch.arange(32, dtype=torch.uint8)[None, :, None, None].expand(1, 32, 32, 3) * 8  # rows of one grey
    crops = [cropped(ramp, area=(0.25, 0.25), rng=rng).int() for _ in range(20)]
    spans = [crop.max() - crop.min() for crop in crops]
    assert all(abs(span - 15 * 8) <= 4 for span in spans)  # 16 of 32 rows, stretched
    assert torch.equal(cropped(still, area=(1.0, 1.0), rng=rng), still)  # everything


def test_the_sides_of_a_crop_vary_around_the_square_and_what_does_not_fit_is_not_taken():
    rng = np.random.default_rng(0)
    y, x = np.meshgrid(np.arange(240), np.arange(240), indexing="ij")
    places = torch.from_numpy(np.stack([y, x, 0 * x], -1)[None].astype(np.uint8))  # a pixel tells its place
    shares, aspects = [], []
    for _ in range(400):
        crop = cropped(places, area=(0.5, 1.0), aspect=(0.75, 4 / 3), rng=rng)[0].int()
        height, width = (crop[..., axis].max() - crop[..., axis].min() + 1 for axis in (0, 1))
        shares.append(height * width / 240**2)
        aspects.append(width / height)
    assert min(shares) > 0.49 and max(shares) > 0.95
    assert 0.74 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.35
    assert abs(np.mean(np.log(aspects))) < 0.05  # as often wide as high


def test_of_a_wide_picture_crops_come_from_end_to_end_and_the_middle_is_taken_where_none_fits():
    rng, crop = np.random.default_rng(0), {"area": (0.5, 1.0), "aspect": (0.75, 4 / 3)}
    for size, middle in (((90, 160), (0, 20, 90, 120)), ((160, 90), (20, 0, 120, 90))):
        rectangles = np.array([draw_rectangle(size, rng=rng, **crop) for _ in range(400)])
        ends = rectangles[:, :2] + rectangles[:, 2:]
        assert (rectangles[:, :2].min(0) == 0).all() and (ends.max(0) == size).all()
        assert (np.abs(np.log(rectangles[:, 3] / rectangles[:, 2])) < np.log(4 / 3) + 0.02).all()
        assert (rectangles[:, 2:].prod(1) > 0.49 * 90 * 160).all()
        assert 0.05 < (rectangles == middle).all(1).mean() < 0.5
        assert draw_rectangle(size, area=(1.0, 1.0), aspect=(0.75, 4 / 3), rng=rng) == middle


def test_crops_differ_between_copies_and_epochs_and_leave_the_order_alone(made):
    settings = {"batch": 2, "repeats": 2, "steps": 2 * CLIPS, "flip": False, "reverse": False}
    batches, plain = run(made, crop=(0.3, 0.9), **settings), run(made, **settings)
    assert ids(batches) == ids(plain)
    assert all(not torch.equal(batch.pixels[0], batch.pixels[1]) for batch in batches)
    later = {batch.ids[0]: batch.pixels for batch in batches[CLIPS:]}
    assert all(not torch.equal(batch.pixels, later[batch.ids[0]]) for batch in batches[:CLIPS])


def test_workers_inside_ranks_give_what_the_ranks_give_alone(made):
    assert in_ranks(_in_rank, ranks=2, folder=made, workers=1) == in_ranks(_in_rank, ranks=2, folder=made, workers=0)
    assert not multiprocessing.active_children()


def _in_rank(*, rank, ranks, folder, workers):
    batches = batches_of(folder, rank=rank, ranks=ranks, workers=workers)
    return [(batch.ids, batch.pixels.numpy().tobytes()) for batch in batches]


def test_workers_stay_over_epochs_and_only_their_rank_ends_them(made):
    unbroken = run(made)
    batches = batches_of(made, workers=2)
    first = [next(batches)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # of another process, as Slurm's to a whole job
    rest = [next(batches) for _ in range(10)]  # an epoch ends within step 5
    assert {worker.pid for worker in multiprocessing.active_children()} == {worker.pid for worker in workers}
    assert same(unbroken, first + rest + list(batches))
    assert {worker.exitcode for worker in workers} <= {None, 0}
    batches = batches_of(made, workers=1, steps=1000)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0


def test_a_killed_worker_ends_the_run_with_one_line(made):
    batches = batches_of(made, workers=2, steps=1000)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    ended = r"a process that decodes clips ended \(.+\)"
    with pytest.raises(UserError, match=rf"^step \d+: {ended}; lower `workers` if memory ran out$"):
        list(batches)


def test_workers_end_when_their_rank_is_killed(made):
    code = (
        "import multiprocessing, os, pathlib, sys\n"
        "from scaling4d.clips import loader\n"
        f"batches = loader.train_batches(pathlib.Path(sys.argv[1]), **{ARGUMENTS | {'workers': 1, 'steps': 1000}})\n"
        "next(batches)\n"
        "print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, made], check=False, stdout=subprocess.PIPE, text=True, timeout=100)
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -9 and len(pids) == 1
    deadline = time.monotonic() + 30
    while any(map(_lives, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_repeated_sampling_shows_a_clip_several_times_in_a_row_flipped_on_its_own_and_decoded_once(made, decoded):
    repeated = run(made, batch=4, repeats=4, steps=CLIPS)
    assert len(decoded) == CLIPS
    assert all(len(set(batch.ids)) == 1 for batch in repeated)
    assert [batch.ids[0] for batch in repeated] == ids(run(made, batch=1, steps=CLIPS))
    assert any(not torch.equal(batch.pixels[0], batch.pixels[i]) for batch in repeated for i in range(1, 4))


def test_flipping_mirrors_and_reverses_about_half_and_nothing_else(made):
    plain = {clip.id: loader.decode_clip(made, clip) for clip in loader.ClipTable(made, "train")}
    flips = Counter()
    for batch in run(made, steps=30):
        for pixels, name in zip(batch.pixels, batch.ids, strict=True):
            flips.update(axes for axes in ((), (0,), (2,), (0, 2)) if torch.equal(pixels, plain[name].flip(axes)))
    assert flips.total() == 120 and min(flips.values()) > 12 and len(flips) == 4
    for one, axis in (("flip", 2), ("reverse", 0)):
        alone = {"flip": False, "reverse": False} | {one: True}
        kinds = Counter()
        for batch in run(made, steps=10, **alone):
            for pixels, name in zip(batch.pixels, batch.ids, strict=True):
                kinds.update(axes for axes in ((), (axis,)) if torch.equal(pixels, plain[name].flip(axes)))
        assert kinds.total() == 40 and min(kinds[()], kinds[(axis,)]) > 8


@pytest.mark.parametrize("ranks", [1, 2, 50])
def test_validation_shows_every_clip_once_over_the_ranks(made, ranks):
    parts = [ids(loader.eval_batches(made, split="val", frames=4, batch=2, rank=rank, ranks=ranks)) for rank in range(ranks)]
    whole = [clip.id for clip in loader.ClipTable(made, "val")]
    assert sorted(itertools.chain(*parts)) == sorted(whole)
    assert all(part == whole[rank::ranks] for rank, part in enumerate(parts))


@pytest.mark.parametrize("most", [1, 2, 3, 1000])
def test_some_of_the_validation_clips_are_spread_evenly_over_all(made, most):
    every, some = (
        ids(loader.eval_batches(made, split="val", frames=4, batch=3, rank=0, ranks=1, max_clips=n)) for n in (0, most)
    )
    wanted = min(most, len(every))
    assert some == [every[-(-number * len(every) // wanted)] for number in range(wanted)]


def test_global_random_states_neither_matter_nor_change(made):
    first = run(made)
    torch.manual_seed(2)
    np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state()
    assert same(first, run(made)) and torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_loading_without_workers_computes_in_the_calling_thread_and_leaves_no_shard_open(made):
    code = (
        "import os, sys, torch, pyarrow\n"
        "from pathlib import Path\n"
        "from scaling4d.clips import loader\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        f"batches = loader.train_batches(Path(sys.argv[1]), **{ARGUMENTS | {'crop': (0.5, 1.0), 'window_shards': 2}})\n"
        "next(batches)\n"
        "files = [os.path.realpath(f'/proc/self/fd/{number}') for number in os.listdir('/proc/self/fd')]\n"
        "assert len(list(batches)) == 11\n"
        "print(len(os.listdir('/proc/self/task')) - before, sum(file.endswith('.tar') for file in files))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, made], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0"]
    assert done.stderr == ""


@pytest.mark.parametrize(("change", "message"), [
    ({"ranks": 3}, "batch = 4 does not divide among 3 ranks, each clip 1 times; needed a multiple"),
    ({"repeats": 3}, "batch = 4 does not divide among 1 ranks, each clip 3 times; needed a multiple"),
    ({"repeats": 0}, "batch = 4 does not divide among 1 ranks, each clip 0 times; needed a multiple"),
    ({"crop": (0.0, 1.0)}, r"crop = \[0.0, 1.0\]; needed 0 < smallest <= largest <= 1"),
    ({"crop": (0.9, 0.5)}, r"crop = \[0.9, 0.5\]; needed 0 < smallest <= largest <= 1"),
    ({"aspect": (1.2, 0.8)}, r"aspect = \[1.2, 0.8\]; needed 0 < smallest <= largest"),
    ({"aspect": (0.0, 0.8)}, r"aspect = \[0.0, 0.8\]; needed 0 < smallest <= largest"),
    ({"window_shards": -1}, "window_shards = -1; needed 0 or more"),
])  # fmt: skip
def test_arguments_out_of_range_are_refused_by_name(made, change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        batches_of(made, **change)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_clip_stops_the_run_and_is_named(made, tmp_path, workers):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    row = loader.ClipTable(made, "train")[1]
    with (tmp_path / "shards" / row.shard).open("r+b") as shard:
        shard.seek(row.offset)
        shard.write(bytes(row.bytes))
    wanted = rf"^clip {row.id} of .*{row.shard}: not a readable video.*$"
    with pytest.raises(UserError, match=wanted):
        run(tmp_path, workers=workers)
    with pytest.raises(UserError, match=wanted):
        list(loader.eval_batches(tmp_path, split="train", frames=4, batch=2, rank=0, ranks=1))


def test_a_clip_of_another_size_than_the_table_says_is_named(made, tmp_path):
    rows = pq.read_table(made / "clips.parquet").to_pylist()
    write_table(tmp_path, [row | {"frames": 5} for row in rows])
    (tmp_path / "shards").symlink_to(made / "shards")
    needed = r"T H W C is \(4, 16, 16, 3\), needed \(5, 16, 16, 3\)"
    with pytest.raises(UserError, match=rf"^clip clip-\d+: {needed}$"):
        run(tmp_path, frames=5)
    with pytest.raises(UserError, match=r"^clip clip-\d+ has 5 frames; needed 8$"):
        run(tmp_path, frames=8)


def test_a_source_kept_whole_gives_the_clips_that_the_table_names(tmp_path):
    source = save(tmp_path / "source.mp4", world(3, 40, 48, 64), rate_hz=16)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/train-00000.tar").write_bytes(bytes(512) + source.read_bytes() + bytes(99))
    row = ROW | {"split": "train", "shard": "train-00000.tar", "offset": 512, "bytes": source.stat().st_size}
    row |= {"encoded": False, "frames": 8, "side_px": 32}
    write_table(tmp_path, [row | {"id": f"clip-{start_s}", "start_s": start_s} for start_s in (0.0, 1.0)])
    (batch,) = loader.eval_batches(tmp_path, split="train", frames=8, batch=2, rank=0, ranks=1)
    assert batch.pixels.shape == (2, 8, 32, 32, 3) and batch.start_s == (0.0, 1.0)
    for pixels, start_s in zip(batch.pixels, batch.start_s, strict=True):
        times_s = start_s + np.arange(8) / 8
        assert np.array_equal(pixels, video.read_frames_at(source, times_s, side_px=32))
    write_table(tmp_path, [row | {"id": "clip", "start_s": 0.5, "origin_s": 0.5}])
    (later,) = loader.eval_batches(tmp_path, split="train", frames=8, batch=2, rank=0, ranks=1)
    assert torch.equal(later.pixels[0], batch.pixels[1])


def bytes_of_a_look(folder: Path) -> int:
    """Of a table that is opened, its shuffled order, and one row."""

    def look() -> None:
        clips = loader.ClipTable(folder, "train")
        row = clips[loader.WindowedShuffle(clips, seed=0, window_shards=64)(0, 700_000)]
        assert len(clips) == 900_000 and row.shard == f"shard-{int(row.id[:16], 16) // 1000:05d}.tar", row

    loader.count_clips(folder, "train")  # loads the libraries
    return grown(look)


@needs_proc
def test_a_million_clips_take_little_memory(tmp_path):
    number = np.arange(1_000_000)
    table = {name: np.full(len(number), value) for name, value in ROW.items()}
    table |= {"id": [f"{n:016x}-{n % 7:05d}" for n in number], "split": pa.array(np.where(number % 10, "train", "val"))}
    table |= {"shard": [f"shard-{n // 1000:05d}.tar" for n in number], "offset": number % 1000 * 10_000}
    table |= {"bytes": 9000 + number % 500, "start_s": number % 60 / 8}
    table["source"] = [f"a/rather/long/name/of/a/source/{n}.mp4" for n in number]
    pq.write_table(pa.table(table), tmp_path / "clips.parquet")
    assert in_a_new_process(bytes_of_a_look, tmp_path) < 200 * 10**6


def test_a_missing_or_damaged_table_and_an_unknown_split_are_named(made, tmp_path):
    with pytest.raises(UserError, match=r"^no .*/clips.parquet$"):
        loader.count_clips(tmp_path, "train")
    (tmp_path / "clips.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"clips.parquet is damaged: .*$"):
        loader.count_clips(tmp_path, "train")
    with pytest.raises(UserError, match=r"holds no clips of split 'test'$"):
        loader.count_clips(made, "test")
    rows = pq.read_table(made / "clips.parquet", columns=["id", "split", "shard", "offset", "bytes", "start_s", "frames"])
    pq.write_table(rows, tmp_path / "clips.parquet")
    with pytest.raises(UserError, match=r"clips.parquet has no column encoded, origin_s, rate_hz, side_px$"):
        batches_of(tmp_path)


@pytest.mark.parametrize(("column", "value", "message"), [
    ("shard", 1, "clips.parquet: column shard holds int64; needed string$"),
    ("split", True, "clips.parquet: column split holds bool; needed string$"),
    ("start_s", "x", "clips.parquet: column start_s holds .*; needed double$"),
    ("rate_hz", 0.0, "row 0 of a split is damaged: rate_hz is 0.0; needed more than 0$"),
    ("start_s", float("inf"), "row 0 of a split is damaged: start_s = inf is a float; needed a finite number$"),
    ("frames", 2**62, r"row 0 of a split is damaged: \d+ frames of 16 px; needed at most 67108864 pixels$"),
    ("offset", 2**62, "clip .* of .*: .*"),
])  # fmt: skip
def test_a_table_with_impossible_values_is_refused(made, tmp_path, column, value, message):
    shutil.copytree(made, tmp_path / "clips")
    table = pq.read_table(made / "clips.parquet")
    changed = table.set_column(table.column_names.index(column), column, pa.array([value] * len(table)))
    pq.write_table(changed, tmp_path / "clips/clips.parquet")
    with pytest.raises(UserError, match=message):
        list(loader.eval_batches(tmp_path / "clips", split="train", frames=4, batch=2, rank=0, ranks=1))
    read_previous(tmp_path / "clips")
