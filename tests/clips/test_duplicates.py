import tracemalloc

import numpy as np
import pytest

from scaling4d.clips import duplicates
from scaling4d.clips.duplicates import distinct, splits
from scaling4d.clips.examine import Clip, Finding
from scaling4d.records import Video


def finding(path, hashes, height_px=64):
    """A source with one clip a hash (`N 32` uint8)."""
    video = Video(path, f"sha of {path}", "h264", 100.0, 8.0, height_px, 96, 0)
    clips = tuple(Clip(2.0 * at, 2.0 * at + 2, (at,), phash.tobytes()) for at, phash in enumerate(hashes))
    return Finding(path, video.sha256, video, clips, ())


def flipped(phash, places):
    bits = np.unpackbits(phash)
    bits[places] ^= 1
    return np.packbits(bits)


def family(draw, size, most_flips):
    """`size 32` uint8: each hash is an earlier one with some bits flipped; every third or so is an equal one."""
    hashes = [draw.integers(0, 256, 32, dtype=np.uint8)]
    while len(hashes) < size:
        flips = draw.integers(0, most_flips + 1) * (draw.random() < 0.7)
        hashes.append(flipped(hashes[draw.integers(len(hashes))], draw.choice(256, flips, replace=False)))
    return np.stack(hashes)


def corpus(draw, clips, most_flips):
    """Findings of none to nine clips, in a random order, of three sizes."""
    hashes = family(draw, clips, most_flips)
    cuts = np.cumsum(draw.integers(0, 10, clips))
    parts = np.split(hashes, cuts[cuts < clips])
    found = [finding(f"{at:05d}.mp4", part, draw.choice([48, 64, 80])) for at, part in enumerate(parts)]
    return [found[at] for at in draw.permutation(len(found))]


def slow(findings, bits):
    """What `distinct` means, read from its first lines."""
    items = [(source, clip) for source in findings for clip in source.clips]
    kept, removed = [], []
    for source, clip in sorted(items, key=lambda item: (-item[0].video.height_px, item[0].path, item[1].start_s)):
        near = [other for other in kept if distance(other[1], clip) <= bits]
        if near:
            removed.append((source, clip, *near[0]))
        else:
            kept.append((source, clip))
    return kept, removed


def distance(one, other):
    return (int.from_bytes(one.phash) ^ int.from_bytes(other.phash)).bit_count()


@pytest.mark.parametrize("bits", [0, 1, 2, 15, 24, 60, 255])
@pytest.mark.parametrize("dense", [1, 7, 1024])
def test_the_same_clips_go_for_the_same_reason_as_when_each_is_compared_with_all_kept_ones(monkeypatch, bits, dense):
    monkeypatch.setattr(duplicates, "DENSE", dense)
    monkeypatch.setattr(duplicates, "AT_ONCE", 50)
    for seed in range(4):
        findings = corpus(np.random.default_rng(seed), 250, most_flips=2 * bits + 4 if bits < 100 else 256)
        assert distinct(findings, bits) == slow(findings, bits)


def test_thousands_of_clips_agree_with_the_slow_comparison():
    findings = corpus(np.random.default_rng(5), 3000, most_flips=30)
    kept, removed = distinct(findings, 15)
    assert (kept, removed) == slow(findings, 15)
    assert len(kept) > 1024 < len(removed)


@pytest.mark.parametrize("bits", [1, 6, 15, 24])
def test_a_pair_that_agrees_in_one_band_only_is_found(monkeypatch, bits):
    monkeypatch.setattr(duplicates, "DENSE", 1)
    draw = np.random.default_rng(0)
    base = draw.integers(0, 256, 32, dtype=np.uint8)
    edges = np.linspace(0, 256, bits + 2).astype(int)
    one_a_band = [draw.integers(start, end) for start, end in zip(edges, edges[1:], strict=False)]
    reads = [8 * (at // 8) + 7 - at % 8 for at in one_a_band]  # words hold their lowest bit first
    variants = [flipped(base, [*reads[:band], *reads[band + 1 :]]) for band in range(bits + 1)]
    kept, removed = distinct([finding("a", [base]), *(finding(f"b{at:02d}", [v]) for at, v in enumerate(variants))], bits)
    assert [source.path for source, _ in kept] == ["a"]
    assert [other.path for *_, other, _ in removed] == ["a"] * (bits + 1)


def test_hashes_that_differ_in_every_bit_are_different_clips():
    base = np.arange(32, dtype=np.uint8)
    assert len(distinct([finding("a", [base, ~base])], 255)[0]) == 2


def test_the_largest_picture_is_kept_then_the_first_path_then_the_first_start():
    phash = np.zeros((2, 32), np.uint8)
    findings = [finding("a", phash, 48), finding("c", phash), finding("b", phash)]
    kept, removed = distinct(findings, 15)
    assert [(source.path, clip.start_s) for source, clip in kept] == [("b", 0.0)]
    assert [(source.path, clip.start_s) for source, clip, *_ in removed] == [("b", 2), ("c", 0), ("c", 2), ("a", 0), ("a", 2)]


def test_no_clips_at_all_are_no_duplicates():
    assert distinct([], 15) == ([], [])
    assert distinct([finding("a", [])], 0) == ([], [])


@pytest.mark.parametrize("flips", [0, 7])
def test_memory_does_not_grow_with_the_pairs_that_are_alike(flips):
    clips, draw = 20_000, np.random.default_rng(0)
    hashes = np.zeros((clips, 32), np.uint8)
    for _ in range(flips):
        hashes[np.arange(clips), draw.integers(0, 32, clips)] ^= 1 << draw.integers(0, 8, clips, dtype=np.uint8)
    source = finding("a", hashes)
    tracemalloc.start()
    kept, removed = distinct([source], 15)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(kept) == 1 and len(removed) == clips - 1
    assert peak < 40e6  # 2e8 pairs


def test_sources_that_share_a_duplicate_lie_on_one_side_whatever_the_order_of_the_pairs():
    findings = [finding(str(at), []) for at in range(300)]
    draw = np.random.default_rng(0)
    linked = [tuple(findings[at].sha256 for at in draw.choice(300, 2, replace=False)) for _ in range(150)]
    split = splits(findings, linked, 0.4)
    assert set(split) == {source.sha256 for source in findings}
    assert set(split.values()) == {"train", "val"}
    assert all(split[one] == split[other] for one, other in linked)
    assert splits(findings, [pair[::-1] for pair in reversed(linked)], 0.4) == split


def test_two_groups_or_more_always_give_both_sides():
    for val_share in (1e-9, 0.5, 1 - 1e-9):
        for seed in range(10):
            findings = [finding(f"{seed} {at}", []) for at in range(3)]
            linked = [(findings[0].sha256, findings[1].sha256)]
            assert set(splits(findings, linked, val_share).values()) == {"train", "val"}
    assert len(set(splits(findings[:2], linked, 0.5).values())) == 1


def test_a_chain_of_duplicates_is_one_group():
    findings = [finding(f"{at:05d}", []) for at in range(5000)]
    linked = [(one.sha256, other.sha256) for one, other in zip(findings[1:], findings, strict=False)]
    assert len(set(splits(findings, linked, 0.5).values())) == 1
