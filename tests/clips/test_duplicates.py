import tracemalloc

import numpy as np
import pytest
from small_videos import SETTINGS

from scaling4d.clips import duplicates
from scaling4d.clips.duplicates import assign_splits, remove_near_duplicates, select_clips
from scaling4d.clips.inspection import Clip, Inspection
from scaling4d.clips.settings import CurationConfig
from scaling4d.clips.sources import SourceFile
from scaling4d.records import Video


def inspection(path, hashes, height_px=64):
    """A source with one clip a hash (`N 32` uint8)."""
    video = Video(path, f"sha of {path}", "h264", 100.0, 8.0, height_px, 96, 0)
    clips = tuple(Clip(2.0 * at, 2.0 * at + 2, (at,), phash.tobytes()) for at, phash in enumerate(hashes))
    return Inspection(SourceFile(path), video.sha256, video, clips, ())


def flipped(phash, places):
    bits = np.unpackbits(phash)
    bits[places] ^= 1
    return np.packbits(bits)


def corpus(draw, clips, most_flips):
    """Inspections of none to nine clips, in a random order, of three sizes.

    Each hash is an earlier one with some bits flipped; every third or so is an equal one.
    """
    hashes = [draw.integers(0, 256, 32, dtype=np.uint8)]
    while len(hashes) < clips:
        flips = draw.integers(0, most_flips + 1) * (draw.random() < 0.7)
        hashes.append(flipped(hashes[draw.integers(len(hashes))], draw.choice(256, flips, replace=False)))
    cuts = np.cumsum(draw.integers(0, 10, clips))
    parts = np.split(np.stack(hashes), cuts[cuts < clips])
    sources = [inspection(f"{at:05d}.mp4", part, draw.choice([48, 64, 80])) for at, part in enumerate(parts)]
    return [sources[at] for at in draw.permutation(len(sources))]


def slow(inspections, bits):
    """What `remove_near_duplicates` means, read from its first lines."""
    items = [(source, clip) for source in inspections for clip in source.clips]
    kept, removed = [], []
    for source, clip in sorted(items, key=lambda item: (-item[0].video.height_px, item[0].path, item[1].start_s)):
        phash = int.from_bytes(clip.phash)
        near = [other for other in kept if (int.from_bytes(other[1].phash) ^ phash).bit_count() <= bits]
        if near:
            removed.append((source, clip, *near[0]))
        else:
            kept.append((source, clip))
    return kept, removed


@pytest.mark.integration
@pytest.mark.parametrize("bits", [0, 1, 2, 15, 24, 60, 255])
@pytest.mark.parametrize("dense", [1, 7, 1024])
def test_the_same_clips_go_for_the_same_reason_as_when_each_is_compared_with_all_kept_ones(monkeypatch, bits, dense):
    monkeypatch.setattr(duplicates, "DENSE", dense)
    monkeypatch.setattr(duplicates, "PAIRS", 50)
    for seed in range(4):
        inspections = corpus(np.random.default_rng(seed), 250, most_flips=2 * bits + 4 if bits < 100 else 256)
        assert remove_near_duplicates(inspections, bits) == slow(inspections, bits)


def test_opposite_hashes_are_different_clips_and_no_clips_are_no_duplicates():
    base = np.arange(32, dtype=np.uint8)
    assert len(remove_near_duplicates([inspection("a", [base, ~base])], 255)[0]) == 2
    assert remove_near_duplicates([], 15) == remove_near_duplicates([inspection("a", [])], 0) == ([], [])


@pytest.mark.integration
@pytest.mark.parametrize("flips", [0, 7])
def test_memory_does_not_grow_with_the_pairs_that_are_alike(flips):
    clips, draw = 20_000, np.random.default_rng(0)
    hashes = np.zeros((clips, 32), np.uint8)
    for _ in range(flips):
        hashes[np.arange(clips), draw.integers(0, 32, clips)] ^= 1 << draw.integers(0, 8, clips, dtype=np.uint8)
    source = inspection("a", hashes)
    tracemalloc.start()
    kept, removed = remove_near_duplicates([source], 15)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(kept) == 1 and len(removed) == clips - 1
    assert peak < 40e6  # 2e8 pairs


def test_sources_that_share_a_duplicate_lie_on_one_side_whatever_the_order_of_the_pairs():
    hashes, draw = [f"sha of {at}" for at in range(300)], np.random.default_rng(0)
    linked = [tuple(hashes[at] for at in draw.choice(300, 2, replace=False)) for _ in range(150)]
    split = assign_splits(hashes, linked, 0.4)
    assert set(split) == set(hashes)
    assert set(split.values()) == {"train", "val"}
    assert all(split[one] == split[other] for one, other in linked)
    assert assign_splits(hashes, [pair[::-1] for pair in reversed(linked)], 0.4) == split


def test_two_groups_or_more_always_give_both_sides():
    for val_share in (1e-9, 0.5, 1 - 1e-9):
        for seed in range(10):
            one, two, three = (f"{seed} {at}" for at in range(3))
            assert set(assign_splits([one, two, three], [(one, two)], val_share).values()) == {"train", "val"}
    assert len(set(assign_splits([one, two], [(one, two)], 0.5).values())) == 1


def test_selected_clips_of_sources_that_share_a_near_duplicate_lie_on_one_side():
    shared, own = np.random.default_rng(0).integers(0, 256, (2, 10, 32), dtype=np.uint8)
    pairs = [(inspection(f"{at}a", shared[[at]]), inspection(f"{at}b", [own[at], flipped(shared[at], [9])])) for at in range(10)]
    for val_share in (0.1, 0.5, 0.9):
        clips, rejected = select_clips([*sum(pairs, ())], CurationConfig(**SETTINGS | {"val_share": val_share}))
        split = {clip.inspection.path: clip.split for clip in clips}
        assert [(path, why.reason) for path, why in rejected] == [(f"{at}b", "near duplicate") for at in range(10)]
        assert all(split[one.path] == split[other.path] for one, other in pairs) and set(split.values()) == {"train", "val"}


def test_a_chain_of_duplicates_is_one_group():
    hashes = [f"{at:05d}" for at in range(5000)]
    linked = list(zip(hashes[1:], hashes, strict=False))
    assert len(set(assign_splits(hashes, linked, 0.5).values())) == 1
