"""Clips that are longer than a model's window, from videos to batches: MAE-ST's repeated sampling."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import loading
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from loading import same
from small_videos import SETTINGS, WORKERS, save, world

from scaling4d import seeds, video
from scaling4d.clips import curate, loader
from scaling4d.clips.crop import draw_rectangle, resized_crop
from scaling4d.clips.settings import CurationConfig
from scaling4d.records import ClipBatch

pytestmark = pytest.mark.integration

FRAMES, MAX_FRAMES, RATE_HZ = 4, 20, 8.0
SECONDS = {"a": 2.5, "b": 2.5, "c": 6.0, "d": 1.5, "e": 0.5, "f": 2.5}  # of the videos; at 16 Hz
ARGUMENTS = {"frames": FRAMES, "repeats": 4, "steps": 40, "flip": False, "reverse": False}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "videos"
    for seed, (name, seconds) in enumerate(SECONDS.items()):
        save(folder / f"{name}.mp4", world(seed, round(16 * seconds)))
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["whole sources", "encoded clips"])
def curated(request: pytest.FixtureRequest, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("curated")
    changes = {"frames": FRAMES, "max_frames": MAX_FRAMES, "encode": request.param}
    curate.curate(videos, out, CurationConfig(**SETTINGS | changes), WORKERS)
    return out


def rows_of(curated: Path) -> dict[str, dict]:
    return {row["id"]: row for row in pq.read_table(curated / "clips.parquet").to_pylist()}


def batches_of(curated: Path, **changes: object) -> Iterator[ClipBatch]:
    return loading.batches_of(curated, **ARGUMENTS | changes)


def test_a_shot_gives_clips_up_to_the_longest_and_its_rest_is_one_too(curated: Path) -> None:
    frames: dict[str, list[int]] = {}
    for row in sorted(rows_of(curated).values(), key=lambda row: row["start_s"]):
        frames.setdefault(row["source"][0], []).append(row["frames"])
    assert frames == {"a": [20], "b": [20], "c": [20, 20, 8], "d": [12], "e": [4], "f": [20]}


def test_copies_are_windows_at_different_times_that_show_the_source_there(curated: Path, videos: Path) -> None:
    rows, starts = rows_of(curated), {}
    for batch in batches_of(curated):
        (name,) = set(batch.ids)
        row = rows[name]
        room_s = (row["frames"] - FRAMES) / RATE_HZ
        assert all(row["start_s"] <= start_s <= row["start_s"] + room_s for start_s in batch.start_s)
        if row["frames"] == MAX_FRAMES:
            assert len(set(batch.start_s)) == 4 or row["encoded"]  # 17 places there, any time here
            starts.setdefault(name, []).extend(start_s - row["start_s"] for start_s in batch.start_s)
        if row["frames"] == FRAMES:
            assert set(batch.start_s) == {row["start_s"]}
            assert all(torch.equal(batch.pixels[0], pixels) for pixels in batch.pixels)
        for start_s, pixels in zip(batch.start_s, batch.pixels.numpy(), strict=True):
            times_s = start_s + np.arange(FRAMES) / RATE_HZ
            source = video.read_frames_at(videos / row["source"], times_s, side_px=32)
            if row["encoded"]:
                assert np.abs(pixels.astype(int) - source).mean() < 4
            else:
                assert np.array_equal(pixels, source)
    for drawn in starts.values():  # over the epochs, of every part of a clip
        counts, _ = np.histogram(drawn, bins=4, range=(0, 2.0))
        assert min(counts) > 0 and len(set(drawn)) > 8


def test_windows_depend_on_seed_epoch_and_clip_alone(curated: Path) -> None:
    plain = list(batches_of(curated))
    assert same(plain, list(batches_of(curated)))
    assert same(plain[7:], list(batches_of(curated, start=7)))
    assert same(plain[:4], list(batches_of(curated, workers=1, steps=4)))
    assert same(plain, list(batches_of(curated, cached_clips=100)))
    assert [batch.ids for batch in plain] != [batch.ids for batch in batches_of(curated, seed=1)]
    fewer = list(batches_of(curated, batch=2, repeats=2))
    assert [batch.start_s for batch in fewer] == [batch.start_s[:2] for batch in plain]
    parts = [list(batches_of(curated, batch=8, steps=20, rank=rank, ranks=2)) for rank in range(2)]
    assert same(plain, [batch for pair in zip(*parts, strict=True) for batch in pair])


def test_the_windows_of_a_clip_are_decoded_in_one_pass(curated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, read = [], video.OpenVideo.frames_at
    monkeypatch.setattr(video.OpenVideo, "frames_at", lambda *given, **more: passes.append(given) or read(*given, **more))
    longer = sum(rows_of(curated)[batch.ids[0]]["frames"] > FRAMES for batch in batches_of(curated, steps=16))
    assert 8 < longer <= len(passes) <= 16  # whole sources' short clips are read so, too


def test_each_copy_is_cropped_and_flipped_on_its_own(curated: Path) -> None:
    short = [name for name, row in rows_of(curated).items() if row["frames"] == FRAMES]
    for batch in batches_of(curated, crop=(0.3, 0.9), aspect=(0.75, 1.3333), flip=True):
        if batch.ids[0] in short:
            assert any(not torch.equal(batch.pixels[0], pixels) for pixels in batch.pixels)


def test_validation_shows_the_window_in_the_middle(curated: Path) -> None:
    rows = rows_of(curated)
    for split in ("train", "val"):
        (batch,) = loader.eval_batches(curated, split=split, frames=FRAMES, batch=100, rank=0, ranks=1)
        for name, start_s in zip(batch.ids, batch.start_s, strict=True):
            assert start_s - rows[name]["start_s"] == (rows[name]["frames"] - FRAMES) / 2 / RATE_HZ


def test_crops_of_the_whole_picture_are_made_before_pictures_of_other_widths_are_stacked(tmp_path: Path) -> None:
    videos, sizes = tmp_path / "videos", {"a": (64, 112), "b": (112, 64), "c": (64, 64), "d": (72, 100)}
    for seed, (name, size) in enumerate(sizes.items()):
        save(videos / f"{name}.mp4", world(seed, 32, *size))
    out = tmp_path / "clips"
    out.mkdir()
    curate.curate(videos, out, CurationConfig(**SETTINGS | {"frames": FRAMES, "encode": False}), WORKERS)
    crop = {"crop": (0.5, 1.0), "aspect": (0.75, 1.3333), "short_side_px": 48}
    rows, clips = rows_of(out), [clip.id for clip in loader.ClipTable(out, "train")]
    shown = set()
    for step, batch in enumerate(batches_of(out, batch=8, steps=6, **crop)):
        for place, (name, start_s, pixels) in enumerate(zip(batch.ids, batch.start_s, batch.pixels, strict=True)):
            number, copy = divmod(8 * step + place, 4)
            source, times_s = rows[name]["source"], start_s + np.arange(FRAMES) / RATE_HZ
            picture = torch.from_numpy(video.read_frames_at(videos / source, times_s, side_px=48, square=False))
            shown.add((source[0], *picture.shape[1:3]))
            rng = seeds.numpy_rng(0, "crop", number // len(clips), clips.index(name), copy)
            rectangle = draw_rectangle(picture.shape[1:3], area=crop["crop"], aspect=crop["aspect"], rng=rng)
            assert torch.equal(pixels, resized_crop(picture, rectangle, side=32))
    assert shown <= {("a", 48, 84), ("b", 84, 48), ("c", 48, 48), ("d", 48, 67)} and len(shown) == len(clips)
    crop |= {"batch": 8, "steps": 6, "flip": True}
    for batch, left in zip(batches_of(out, **crop), batches_of(out, on_device=True, **crop), strict=True):
        flipped = [loader.augment(*pair) for pair in zip(left.pixels, left.augmentations, strict=True)]
        assert torch.equal(torch.stack(flipped), batch.pixels)
    (batch,) = loader.eval_batches(out, split="train", frames=FRAMES, batch=4, rank=0, ranks=1)
    for name, start_s, pixels in zip(batch.ids, batch.start_s, batch.pixels, strict=True):
        times_s = start_s + np.arange(FRAMES) / RATE_HZ
        assert np.array_equal(pixels, video.read_frames_at(videos / rows[name]["source"], times_s, side_px=32))


def test_a_window_behind_the_end_of_an_encoded_clip_is_an_error(curated: Path) -> None:
    record = next(clip for clip in loader.ClipTable(curated, "train") if clip.frames == MAX_FRAMES)
    longer = replace(record, frames=MAX_FRAMES + 1)
    assert len(loader.decode_windows(curated, longer, frames=FRAMES, positions=[0.0])) == 1
    if record.encoded:
        with pytest.raises(loader.ClipsError, match=rf"^clip {record.id} of .+: ends before its 21 frames$"):
            loader.decode_windows(curated, longer, frames=FRAMES, positions=[0.999])
