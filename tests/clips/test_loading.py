import itertools
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from scaling4d import video
from scaling4d.clips import loader
from scaling4d.records import UserError


def run(folder, *, batch=4, repeats=1, seed=0, start=0, steps=12, flip=True, rank=0, ranks=1, split="train", **others):
    return list(
        loader.batches(
            folder,
            split=split,
            batch=batch,
            repeats=repeats,
            seed=seed,
            start=start,
            steps=steps,
            flip=flip,
            rank=rank,
            ranks=ranks,
            **others,
        )
    )


def same(one, other):
    return len(one) == len(other) and all(
        a.ids == b.ids and a.start_s == b.start_s and torch.equal(a.pixels, b.pixels) for a, b in zip(one, other, strict=True)
    )


def test_a_batch_is_uint8_clips_with_their_ids_and_starts(curated):
    batch = run(curated, steps=1)[0]
    assert batch.pixels.shape == (4, 16, 32, 32, 3)
    assert batch.pixels.dtype == torch.uint8
    known = {row["id"]: row["start_s"] for row in loader.Clips(curated, "train").rows}
    assert batch.start_s == tuple(known[name] for name in batch.ids)


def test_resuming_gives_the_batches_that_an_unbroken_run_gives(curated):
    whole = run(curated)
    for start in (0, 1, 7, 12):
        assert same(whole[start:], run(curated, start=start))


def test_clips_kept_in_memory_change_no_batch_and_are_decoded_once(curated, monkeypatch):
    decoded = []
    read = video.read
    monkeypatch.setattr(video, "read", lambda source: decoded.append(source) or read(source))
    plain = run(curated)
    assert len(decoded) == 12 * 4
    decoded.clear()
    kept = run(curated, kept=1000)
    assert len(decoded) == loader.count(curated, "train") < 12 * 4
    assert same(plain, kept)


def test_every_epoch_holds_every_clip_once_in_another_order(curated):
    clips = loader.count(curated, "train")
    ids = [name for batch in run(curated, batch=3, steps=clips) for name in batch.ids]
    epochs = [tuple(ids[at : at + clips]) for at in range(0, len(ids), clips)]
    assert len(epochs) == 3
    assert all(len(set(epoch)) == clips for epoch in epochs)
    assert len(set(epochs)) == 3


def test_ranks_hold_the_parts_of_what_one_rank_holds(curated):
    whole = run(curated)
    parts = [run(curated, rank=rank, ranks=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert batch.ids == parts[0][step].ids + parts[1][step].ids
        assert torch.equal(batch.pixels, torch.cat([parts[0][step].pixels, parts[1][step].pixels]))


def test_repeated_sampling_shows_a_clip_several_times_in_a_row_flipped_on_its_own_and_decoded_once(curated, monkeypatch):
    decoded = []
    read = video.read
    monkeypatch.setattr(video, "read", lambda source: decoded.append(source) or read(source))
    steps = loader.count(curated, "train")
    repeated = run(curated, batch=4, repeats=4, steps=steps)
    assert len(decoded) == steps
    assert all(len(set(batch.ids)) == 1 for batch in repeated)
    assert [batch.ids[0] for batch in repeated] == [name for batch in run(curated, batch=1, steps=steps) for name in batch.ids]
    assert any(not torch.equal(batch.pixels[0], batch.pixels[i]) for batch in repeated for i in range(1, 4))
    ranks = [run(curated, batch=8, repeats=2, rank=rank, ranks=2) for rank in range(2)]
    whole = run(curated, batch=8, repeats=2)
    assert all(a.ids + b.ids == c.ids for a, b, c in zip(*ranks, whole, strict=True))
    with pytest.raises(UserError, match="a batch of 4 clips does not divide among 1 ranks, each clip 3 times;"):
        run(curated, batch=4, repeats=3)


def test_another_seed_gives_another_order(curated):
    assert [b.ids for b in run(curated)] != [b.ids for b in run(curated, seed=1)]


def test_flipping_mirrors_and_reverses_about_half_and_nothing_else(curated):
    clips = loader.Clips(curated, "train")
    plain = {clips[index][1]: clips[index][0] for index in range(len(clips))}
    seen = np.zeros((2, 2))
    for batch in run(curated, steps=30):
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
    unflipped = run(curated, flip=False)
    assert all(torch.equal(p, plain[name]) for batch in unflipped for p, name in zip(batch.pixels, batch.ids, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 50])
def test_validation_shows_every_clip_once_over_the_ranks(curated, ranks):
    parts = [
        [name for batch in loader.every(curated, split="val", batch=2, rank=rank, ranks=ranks) for name in batch.ids]
        for rank in range(ranks)
    ]
    whole = [row["id"] for row in loader.Clips(curated, "val").rows]
    assert sorted(itertools.chain(*parts)) == sorted(whole)
    assert all(part == whole[rank::ranks] for rank, part in enumerate(parts))


def test_global_random_states_neither_matter_nor_change(curated):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run(curated)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    np.random.seed(3)  # noqa: NPY002
    assert same(first, run(curated))


def test_loading_computes_in_the_calling_thread(curated):
    code = (
        "import os, sys, torch, pyarrow\n"
        "from pathlib import Path\n"
        "from scaling4d.clips import loader\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "args = dict(split='train', batch=4, repeats=1, seed=0, start=0, steps=5, flip=True, rank=0, ranks=1)\n"
        "assert len(list(loader.batches(Path(sys.argv[1]), **args))) == 5\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", code, curated], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]
    assert done.stderr == ""


def test_a_batch_that_does_not_divide_names_the_setting(curated):
    with pytest.raises(UserError, match="^a batch of 4 clips does not divide among 3 ranks, each clip 1 times; set batch"):
        run(curated, ranks=3)


def test_a_damaged_clip_stops_the_run_and_is_named(curated, tmp_path):
    shutil.copytree(curated, tmp_path / "clips")
    row = loader.Clips(curated, "val").rows[0]
    with (tmp_path / "clips" / "shards" / row["shard"]).open("r+b") as shard:
        shard.seek(row["offset"])
        shard.write(bytes(row["bytes"]))
    with pytest.raises(
        UserError, match=rf"^clip {row['id']} of .*{row['shard']}: not a readable video.*; run the clips stage again$"
    ):
        list(loader.every(tmp_path / "clips", split="val", batch=2, rank=0, ranks=1))


def test_a_missing_or_damaged_table_and_an_unknown_split_are_named(curated, tmp_path):
    with pytest.raises(UserError, match=r"^no .*/clips.parquet; run `dvc repro clips`$"):
        loader.count(tmp_path, "train")
    (tmp_path / "clips.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"clips.parquet is damaged: .*; run the clips stage again$"):
        loader.count(tmp_path, "train")
    with pytest.raises(UserError, match=r"holds no clips of split 'test'; "):
        loader.count(curated, "test")
