import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_videos import save, world

from scaling4d import seeds, video
from scaling4d.clips import loader
from scaling4d.records import UserError
from scaling4d.training.distributed import run as in_ranks

CLIPS = 23  # of `made`
ARGUMENTS = {
    "split": "train",
    "batch": 4,
    "repeats": 1,
    "seed": 0,
    "start": 0,
    "steps": 12,  # two epochs of `made` and a bit
    "flip": True,
    "crop": (1.0, 1.0),
    "window_shards": 0,
    "rank": 0,
    "ranks": 1,
    "kept": 0,
    "workers": 0,
}


def start(folder, **others):
    return loader.batches(folder, **ARGUMENTS | others)


def run(folder, **others):
    return list(start(folder, **others))


def ids(batches):
    return [name for batch in batches for name in batch.ids]


@pytest.fixture(autouse=True)
def one_thread():
    """As in a rank."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """23 tiny clips to train with, in 7 shards of 1 to 5 clips, and 2 to validate."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "shards").mkdir()
    shards = ["train-0", *["train-1"] * 5, *["train-2"] * 4, *["train-3"] * 4, *["train-4"] * 3, *["train-5"] * 5, "train-6"]
    rows = []
    for number, shard in enumerate([*shards, "val-0", "val-0"]):
        part = save(folder / "part.mp4", world(number, 4, 16, 16), rate_hz=8).read_bytes()
        with (folder / "shards" / f"{shard}.tar").open("ab") as file:
            row = {"shard": f"{shard}.tar", "offset": file.tell(), "bytes": len(part), "encoded": True, "origin_s": 0.0}
            file.write(part)
        rows.append(row | {"id": f"clip-{number}", "split": shard.split("-")[0], "start_s": number / 8, "frames": 4})
    rows = [row | {"rate_hz": 8.0, "side_px": 16} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), folder / "clips.parquet", row_group_size=10)
    assert sum(row["split"] == "train" for row in rows) == CLIPS
    return folder


def same(one, other):
    return len(one) == len(other) and all(
        a.ids == b.ids and a.start_s == b.start_s and torch.equal(a.pixels, b.pixels) for a, b in zip(one, other, strict=True)
    )


def test_a_batch_is_uint8_clips_with_their_ids_and_starts(curated):
    batch = run(curated, steps=1)[0]
    assert batch.pixels.shape == (4, 16, 32, 32, 3)
    assert batch.pixels.dtype == torch.uint8
    known = {row.id: row.start_s for row in loader.Clips(curated, "train")}
    assert batch.start_s == tuple(known[name] for name in batch.ids)


def test_resuming_gives_the_batches_that_an_unbroken_run_gives(made):
    whole = run(made)
    for start in (0, 1, 7, 12):
        assert same(whole[start:], run(made, start=start))


def test_clips_kept_in_memory_change_no_batch_and_are_decoded_once(made, monkeypatch):
    decoded = []
    read = video.read
    monkeypatch.setattr(video, "read", lambda source: decoded.append(source) or read(source))
    plain = run(made)
    assert len(decoded) == 12 * 4
    decoded.clear()
    kept = run(made, kept=1000)
    assert len(decoded) == loader.count(made, "train") < 12 * 4
    assert same(plain, kept)


def test_every_epoch_holds_every_clip_once_in_another_order(made):
    clips = loader.count(made, "train")
    seen = ids(run(made, batch=3, steps=clips))
    epochs = [tuple(seen[at : at + clips]) for at in range(0, len(seen), clips)]
    assert len(epochs) == 3
    assert all(len(set(epoch)) == clips for epoch in epochs)
    assert len(set(epochs)) == 3


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_hold_the_parts_of_what_one_rank_holds(made, ranks):
    settings = {"batch": 8, "repeats": 2, "crop": (0.5, 1.0), "window_shards": 2}
    whole = run(made, **settings)
    parts = [run(made, rank=rank, ranks=ranks, **settings) for rank in range(ranks)]
    for step, batch in enumerate(whole):
        assert batch.ids == sum((part[step].ids for part in parts), ())
        assert torch.equal(batch.pixels, torch.cat([part[step].pixels for part in parts]))


def test_changing_the_ranks_within_an_epoch_keeps_every_clip_of_it_once(made):
    epochs = []
    state = start(made).state_dict()
    for ranks in (1, 2, 4, 1, 2, 4, 1, 2, 4, 1, 2, 4):  # another number every step
        parts = [start(made, rank=rank, ranks=ranks) for rank in range(ranks)]
        for part in parts:
            part.load_state_dict(state)
        epochs += ids(next(part) for part in parts)
        assert len({pickle.dumps(part.state_dict()) for part in parts}) == 1
        state = parts[0].state_dict()
    assert epochs == ids(run(made))
    assert len(set(epochs[:CLIPS])) == len(set(epochs[CLIPS : 2 * CLIPS])) == CLIPS


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(made, workers):
    settings = {"repeats": 2, "crop": (0.5, 1.0), "window_shards": 3, "kept": 5}
    assert same(run(made, **settings), run(made, workers=workers, **settings))
    assert not multiprocessing.active_children()


def test_a_state_after_any_batch_goes_on_with_another_number_of_workers(made):
    settings = {"window_shards": 3, "crop": (0.5, 1.0)}
    whole = run(made, **settings)  # ends an epoch within steps 5 and 11
    batches, states = start(made, workers=2, **settings), []
    states.append(batches.state_dict())
    for _ in batches:
        states.append(batches.state_dict())
    assert [state["step"] for state in states] == list(range(13))
    for step, state in enumerate(states):
        resumed = start(made, kept=CLIPS, **settings)
        resumed.load_state_dict(state)
        assert same(whole[step:], list(resumed))
        assert resumed.state_dict() == states[-1]
    for step, workers in ((4, 1), (11, 3)):
        unbroken = start(made, **settings)
        for _ in range(step):
            next(unbroken)
        resumed = start(made, workers=workers, **settings)
        resumed.load_state_dict(unbroken.state_dict())
        assert same(whole[step:], list(resumed))


def test_a_state_can_be_loaded_again_while_workers_are_ahead(made):
    batches = start(made, workers=1)
    next(batches)
    state = batches.state_dict()
    first = [next(batches) for _ in range(3)]
    (left,) = multiprocessing.active_children()
    batches.load_state_dict(state)
    assert left.exitcode == 0
    assert same(first, [next(batches) for _ in range(3)])


def test_a_state_of_another_order_is_refused(made):
    state = start(made).state_dict()
    for change, why in (
        ({"seed": 1}, "seed 0, here 1"),
        ({"batch": 8, "repeats": 2}, "batch 4, here 8; repeats 1, here 2"),
        ({"window_shards": 2}, "window_shards 0, here 2"),
        ({"split": "val"}, "clips 23, here 2"),
    ):
        with pytest.raises(UserError, match=rf"^the state is of another order of clips \({why}\); resume with what it was saved"):
            start(made, **change).load_state_dict(state)
    with pytest.raises(UserError, match=r"^not a state of the loader: it has epoch, needed step, seed, clips, "):
        start(made).load_state_dict({"epoch": 1})


@pytest.mark.parametrize("window_shards", [0, 7, 100])
def test_one_window_shuffles_all_clips_together(made, window_shards):
    names = [row.id for row in loader.Clips(made, "train")]
    found = ids(run(made, batch=1, steps=2 * CLIPS, window_shards=window_shards))
    assert found == [names[index] for epoch in (0, 1) for index in seeds.numpy(0, "order", epoch).permutation(CLIPS)]


@pytest.mark.parametrize("window_shards", [1, 2, 3, 6])
def test_windows_show_every_clip_once_an_epoch_from_a_few_shards_at_a_time(made, window_shards):
    clips = loader.Clips(made, "train")
    shard = {row.id: row.shard for row in clips}
    found = ids(run(made, batch=1, steps=2 * CLIPS, window_shards=window_shards))
    epochs = found[:CLIPS], found[CLIPS:]
    for epoch in epochs:
        assert sorted(epoch) == sorted(shard)
        read = [shard[name] for name in epoch]
        for at in range(CLIPS):
            assert len(set(read[: at + 1]) & set(read[at:])) <= window_shards  # begun and not yet read to their end
    assert epochs[0] != epochs[1]
    assert list(dict.fromkeys(shard[name] for name in epochs[0])) != list(dict.fromkeys(shard[name] for name in epochs[1]))


def test_clips_of_a_window_are_shuffled_together(made):
    shard = {row.id: row.shard for row in loader.Clips(made, "train")}
    found = [shard[name] for name in ids(run(made, batch=1, steps=CLIPS, window_shards=3))]
    changes = sum(one != other for one, other in itertools.pairwise(found))
    assert changes > 6  # one shard after another


def test_a_table_out_of_order_is_refused_by_windows(made, tmp_path):
    rows = pq.read_table(made / "clips.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist(rows[::2] + rows[1::2]), tmp_path / "clips.parquet")
    with pytest.raises(UserError, match="^23 clips are not in order of their shards; run the clips stage again$"):
        start(tmp_path, window_shards=2)


def test_a_crop_is_a_square_of_the_clip_the_same_in_all_frames():
    rng = np.random.default_rng(0)
    still = torch.from_numpy(world(0, 1, 32, 32)).expand(4, -1, -1, -1)
    sides = set()
    for _ in range(50):
        pixels = loader.cropped(still, area=(0.25, 1.0), rng=rng)
        assert pixels.shape == still.shape and pixels.dtype == torch.uint8
        assert all(torch.equal(pixels[0], frame) for frame in pixels)
        sides.add(pixels.float().std().item())
    assert len(sides) > 40
    ramp = torch.arange(32, dtype=torch.uint8)[None, :, None, None].expand(1, 32, 32, 3) * 8  # rows of one grey
    spans = [crop.max() - crop.min() for crop in (loader.cropped(ramp, area=(0.25, 0.25), rng=rng).int() for _ in range(20))]
    assert all(abs(span - 15 * 8) <= 4 for span in spans)  # 16 of 32 rows, stretched


def test_a_crop_of_everything_changes_nothing(made):
    pixels = torch.from_numpy(world(0, 4, 32, 32))
    assert torch.equal(loader.cropped(pixels, area=(1.0, 1.0), rng=np.random.default_rng(0)), pixels)
    plain = {row.id: loader.Reader(made, kept=0).pixels(row) for row in loader.Clips(made, "train")}
    for batch in run(made, flip=False):
        assert all(torch.equal(p, plain[name]) for p, name in zip(batch.pixels, batch.ids, strict=True))


def test_crops_differ_between_copies_and_epochs_and_leave_the_order_alone(made):
    settings = {"batch": 2, "repeats": 2, "steps": 2 * CLIPS, "flip": False}
    batches, plain = run(made, crop=(0.3, 0.9), **settings), run(made, **settings)
    assert ids(batches) == ids(plain)
    assert all(not torch.equal(batch.pixels[0], batch.pixels[1]) for batch in batches)
    later = {batch.ids[0]: batch.pixels for batch in batches[CLIPS:]}
    assert all(not torch.equal(batch.pixels, later[batch.ids[0]]) for batch in batches[:CLIPS])


def test_workers_inside_ranks_give_what_the_ranks_give_alone(made):
    found = in_ranks(_in_rank, ranks=2, folder=made, workers=1)
    assert found == in_ranks(_in_rank, ranks=2, folder=made, workers=0)
    assert not multiprocessing.active_children()


def _in_rank(*, rank, ranks, folder, workers):
    return [(batch.ids, batch.pixels.numpy().tobytes()) for batch in start(folder, rank=rank, ranks=ranks, workers=workers)]


def test_workers_stay_over_epochs_and_leave_an_interrupt_to_their_rank(made):
    whole = run(made)
    batches = start(made, workers=2)
    first = [next(batches)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    rest = [next(batches) for _ in range(10)]  # an epoch ends within step 5
    assert {worker.pid for worker in multiprocessing.active_children()} == {worker.pid for worker in workers}
    assert same(whole, first + rest + list(batches))


def test_only_its_rank_ends_a_worker(made):
    whole = list(start(made, steps=12))
    batches = start(made, workers=2, steps=12)
    first = [next(batches)]
    workers = multiprocessing.active_children()
    for worker in workers:
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # of another process, as Slurm's to a whole job
    assert same(whole, first + list(batches))
    assert {worker.exitcode for worker in workers} <= {None, 0}
    batches = start(made, workers=1, steps=1000)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0


def test_a_killed_worker_ends_the_run_with_one_line(made):
    batches = start(made, workers=2, steps=1000)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    wanted = r"^step \d+: a process that decodes clips ended \(.+\); lower pretrain.Running.workers if memory ran out$"
    with pytest.raises(UserError, match=wanted):
        list(batches)


def test_workers_end_when_their_rank_is_killed(made):
    code = (
        "import multiprocessing, os, pathlib, sys\n"
        "from scaling4d.clips import loader\n"
        f"batches = loader.batches(pathlib.Path(sys.argv[1]), **{ARGUMENTS | {'workers': 2, 'steps': 1000}})\n"
        "next(batches)\n"
        "print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, made], check=False, stdout=subprocess.PIPE, text=True, timeout=100)
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -9 and len(pids) == 2
    deadline = time.monotonic() + 30
    while any(map(_lives, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_repeated_sampling_shows_a_clip_several_times_in_a_row_flipped_on_its_own_and_decoded_once(made, monkeypatch):
    decoded = []
    read = video.read
    monkeypatch.setattr(video, "read", lambda source: decoded.append(source) or read(source))
    steps = loader.count(made, "train")
    repeated = run(made, batch=4, repeats=4, steps=steps)
    assert len(decoded) == steps
    assert all(len(set(batch.ids)) == 1 for batch in repeated)
    assert [batch.ids[0] for batch in repeated] == ids(run(made, batch=1, steps=steps))
    assert any(not torch.equal(batch.pixels[0], batch.pixels[i]) for batch in repeated for i in range(1, 4))
    ranks = [run(made, batch=8, repeats=2, rank=rank, ranks=2) for rank in range(2)]
    whole = run(made, batch=8, repeats=2)
    assert all(a.ids + b.ids == c.ids for a, b, c in zip(*ranks, whole, strict=True))
    with pytest.raises(UserError, match="a batch of 4 clips does not divide among 1 ranks, each clip 3 times;"):
        run(made, batch=4, repeats=3)


def test_another_seed_gives_another_order(made):
    assert [b.ids for b in run(made)] != [b.ids for b in run(made, seed=1)]


def test_flipping_mirrors_and_reverses_about_half_and_nothing_else(made):
    reader = loader.Reader(made, kept=0)
    plain = {row.id: reader.pixels(row) for row in loader.Clips(made, "train")}
    seen = np.zeros((2, 2))
    for batch in run(made, steps=30):
        for pixels, name in zip(batch.pixels, batch.ids, strict=True):
            found = [
                (mirror, backwards)
                for mirror, backwards in itertools.product((0, 1), repeat=2)
                if torch.equal(pixels, plain[name].flip([2] * mirror + [0] * backwards))
            ]
            assert len(found) == 1
            seen[found[0]] += 1
    assert seen.sum() == 120
    assert (seen > 12).all()
    unflipped = run(made, flip=False)
    assert all(torch.equal(p, plain[name]) for batch in unflipped for p, name in zip(batch.pixels, batch.ids, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 50])
def test_validation_shows_every_clip_once_over_the_ranks(made, ranks):
    parts = [ids(loader.every(made, split="val", batch=2, rank=rank, ranks=ranks)) for rank in range(ranks)]
    whole = [row.id for row in loader.Clips(made, "val")]
    assert sorted(itertools.chain(*parts)) == sorted(whole)
    assert all(part == whole[rank::ranks] for rank, part in enumerate(parts))


@pytest.mark.parametrize("most", [1, 2, 3, 1000])
def test_some_of_the_validation_clips_are_spread_evenly_over_all(made, most):
    every = [clip for batch in loader.every(made, split="val", batch=3, rank=0, ranks=1) for clip in batch.ids]
    found = [clip for batch in loader.every(made, split="val", batch=3, rank=0, ranks=1, most=most) for clip in batch.ids]
    wanted = min(most, len(every))
    assert found == [every[-(-number * len(every) // wanted)] for number in range(wanted)]


def test_global_random_states_neither_matter_nor_change(made):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run(made)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    np.random.seed(3)  # noqa: NPY002
    assert same(first, run(made))


def test_loading_without_workers_computes_in_the_calling_thread(made):
    code = (
        "import os, sys, torch, pyarrow\n"
        "from pathlib import Path\n"
        "from scaling4d.clips import loader\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        f"batches = loader.batches(Path(sys.argv[1]), **{ARGUMENTS | {'crop': (0.5, 1.0), 'window_shards': 2}})\n"
        "assert len(list(batches)) == 12\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", code, made], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]
    assert done.stderr == ""


def test_a_batch_that_does_not_divide_names_the_setting(made):
    with pytest.raises(UserError, match="^a batch of 4 clips does not divide among 3 ranks, each clip 1 times; set batch"):
        run(made, ranks=3)


def test_settings_out_of_range_are_named(made):
    for change, why in (
        ({"crop": (0.0, 1.0)}, r"crop is \[0.0, 1.0\], needed 0 < smallest <= largest <= 1; set pretrain.Training.crop"),
        ({"crop": (0.9, 0.5)}, r"crop is \[0.9, 0.5\], needed .*"),
        ({"workers": -1}, "workers is -1, needed 0 or more; set pretrain.Running.workers"),
        ({"window_shards": -1}, "window_shards is -1, needed 0 or more; set pretrain.Training.window_shards"),
    ):
        with pytest.raises(UserError, match=f"^{why}$"):
            start(made, **change)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_clip_stops_the_run_and_is_named(made, tmp_path, workers):
    shutil.copytree(made, tmp_path / "clips")
    row = loader.Clips(made, "val")[1]
    with (tmp_path / "clips" / "shards" / row.shard).open("r+b") as shard:
        shard.seek(row.offset)
        shard.write(bytes(row.bytes))
    wanted = rf"^clip {row.id} of .*{row.shard}: not a readable video.*; run the clips stage again$"
    batches = start(tmp_path / "clips", split="val", batch=1, workers=workers)
    with pytest.raises(UserError, match=wanted):
        list(batches)
    with pytest.raises(UserError, match=wanted):
        next(batches)
    with pytest.raises(UserError, match=wanted):
        list(loader.every(tmp_path / "clips", split="val", batch=2, rank=0, ranks=1))


def test_a_clip_of_another_size_than_the_table_says_is_named(made, tmp_path):
    rows = pq.read_table(made / "clips.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist([row | {"frames": 5} for row in rows]), tmp_path / "clips.parquet")
    (tmp_path / "shards").symlink_to(made / "shards")
    wanted = r"^clip clip-\d+: T H W C is \(4, 16, 16, 3\), needed \(5, 16, 16, 3\); run the clips stage again$"
    with pytest.raises(UserError, match=wanted):
        run(tmp_path)


def test_a_source_kept_whole_gives_the_clips_that_the_table_names(tmp_path):
    source = save(tmp_path / "source.mp4", world(3, 40, 48, 64), rate_hz=16)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/train-00000.tar").write_bytes(bytes(512) + source.read_bytes() + bytes(99))
    row = {"split": "train", "shard": "train-00000.tar", "offset": 512, "bytes": source.stat().st_size, "encoded": False}
    row |= {"frames": 8, "rate_hz": 8.0, "side_px": 32, "origin_s": 0.0}
    rows = [row | {"id": f"clip-{number}", "start_s": start_s} for number, start_s in enumerate((0.0, 1.0))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "clips.parquet")
    (batch,) = loader.every(tmp_path, split="train", batch=2, rank=0, ranks=1)
    assert batch.pixels.shape == (2, 8, 32, 32, 3) and batch.start_s == (0.0, 1.0)
    for pixels, start_s in zip(batch.pixels, batch.start_s, strict=True):
        times_s = start_s + np.arange(8) / 8
        assert np.array_equal(pixels, video.at(source, times_s, side_px=32))
    pq.write_table(pa.Table.from_pylist([rows[1] | {"start_s": 0.5, "origin_s": 0.5}]), tmp_path / "clips.parquet")
    (later,) = loader.every(tmp_path, split="train", batch=2, rank=0, ranks=1)
    assert torch.equal(later.pixels[0], batch.pixels[1])


def test_no_shard_stays_open(made):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    batches = start(made)
    shards = lambda: [path for path in map(opened, os.listdir("/proc/self/fd")) if path.endswith(".tar")]  # noqa: E731
    next(batches)
    assert not shards()
    list(batches)
    assert not shards()


def opened(number):
    """What lies behind one of this process's file descriptors; nothing if it is closed by now."""
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except FileNotFoundError:
        return ""


def test_a_million_clips_take_little_memory(tmp_path):
    if not os.path.isfile("/proc/self/status"):
        pytest.skip("needs /proc")
    number = np.arange(1_000_000)
    table = {
        "id": [f"{n:016x}-{n % 7:05d}" for n in number],
        "split": pa.array(np.where(number % 10, "train", "val")),
        "shard": pa.array([f"shard-{n // 1000:05d}.tar" for n in number]),
        "offset": number % 1000 * 10_000,
        "bytes": 9000 + number % 500,
        "start_s": number % 60 / 8,
        "origin_s": np.zeros(len(number)),
        "frames": np.full(len(number), 16),
        "rate_hz": np.full(len(number), 8.0),
        "side_px": np.full(len(number), 64),
        "encoded": np.full(len(number), True),
        "source": [f"a/rather/long/name/of/a/source/{n}.mp4" for n in number],
    }
    pq.write_table(pa.table(table), tmp_path / "clips.parquet")
    code = (
        "import pathlib, sys, pyarrow.parquet\n"
        "from scaling4d.clips import loader\n"
        "def mb(what): return int(open('/proc/self/status').read().split(what + ':')[1].split()[0]) / 1000\n"
        "loader.count(pathlib.Path(sys.argv[1]), 'train')  # loads the libraries\n"
        "before = mb('VmRSS')\n"
        "clips = loader.Clips(pathlib.Path(sys.argv[1]), 'train')\n"
        "order = loader.Order(clips, seed=0, window_shards=64)\n"
        "row = clips[order(0, 700_000)]\n"
        "assert len(clips) == 900_000 and row.shard == f'shard-{int(row.id[:16], 16) // 1000:05d}.tar', row\n"
        "print(mb('VmRSS') - before, mb('VmHWM') - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    held, peak = map(float, done.stdout.split())
    assert held < 200 and peak < 200


def test_a_missing_or_damaged_table_and_an_unknown_split_are_named(made, tmp_path):
    with pytest.raises(UserError, match=r"^no .*/clips.parquet; run `dvc repro clips`$"):
        loader.count(tmp_path, "train")
    (tmp_path / "clips.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"clips.parquet is damaged: .*; run the clips stage again$"):
        loader.count(tmp_path, "train")
    with pytest.raises(UserError, match=r"holds no clips of split 'test'; "):
        loader.count(made, "test")
    rows = pq.read_table(made / "clips.parquet", columns=["id", "split", "shard", "offset", "bytes", "start_s", "frames"])
    pq.write_table(rows, tmp_path / "clips.parquet")
    with pytest.raises(UserError, match=r"clips.parquet has no column encoded, origin_s, rate_hz, side_px; run the clips stage"):
        start(tmp_path)
