"""Choose the corpus's clips: drop near duplicates, and keep sources that share one in the same split."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from scaling4d.clips.inspection import Clip, Inspection
from scaling4d.clips.settings import PHASH_FRAMES, CurationConfig
from scaling4d.clips.sources import Rejection, printable_path

SPLITS = ("train", "val")
PAIRS = 1 << 16  # of hashes in memory
DENSE = 1 << 10  # up to this many hashes, all pairs are compared
KEY_BITS = 32  # of a band that are compared; bands are wider only if hash_bits < 7
RejectedFile = tuple[str, Rejection]  # path, and why the file or a span of it is not used


@dataclass(frozen=True, slots=True)
class SelectedClip:
    """A clip of the corpus."""

    id: str
    split: str
    inspection: Inspection
    clip: Clip


def select_clips(inspections: list[Inspection], config: CurationConfig) -> tuple[list[SelectedClip], list[RejectedFile]]:
    """Remove duplicates and assign splits by source.

    Returns the clips by id; the rejections by `rejection_order`. A file has clips, or one rejection of the whole.
    """
    rejected = {inspection.path: list(inspection.rejected) for inspection in inspections}
    sources: dict[str, Inspection] = {}  # by sha256
    for inspection in inspections:
        if inspection.clips and inspection.sha256 in sources:
            detail = f"the same bytes as {printable_path(sources[inspection.sha256].path)}"
            rejected[inspection.path].append(Rejection("duplicate", detail))
        elif inspection.clips:
            sources[inspection.sha256] = inspection
    kept, duplicates = remove_near_duplicates(sources.values(), config.hash_bits)
    for source, clip, first_source, first_clip in duplicates:
        detail = f"like {printable_path(first_source.path)} from {first_clip.start_s:.2f} s"
        rejected[source.path].append(Rejection("near duplicate", detail, clip.start_s, clip.end_s))
    linked = [(source.sha256, first_source.sha256) for source, _, first_source, _ in duplicates]
    split = assign_splits(sources, linked, config.val_share)
    number = {(sha256, clip.start_s): number for sha256, source in sources.items() for number, clip in enumerate(source.clips)}
    selected = [
        SelectedClip(f"{source.sha256[:16]}-{number[source.sha256, clip.start_s]:05d}", split[source.sha256], source, clip)
        for source, clip in kept
    ]
    used = {item.inspection.path for item in selected}
    for path in rejected.keys() - used:
        spans = [why for why in rejected[path] if why.start_s is not None]
        if len(spans) == len(rejected[path]):  # one rejection of the whole file, which replaces that of a single span
            seconds: Counter[str] = Counter()
            for span in spans:
                seconds[span.reason] += span.end_s - span.start_s
            alone = spans[0].detail or f"{spans[0].start_s:.2f} to {spans[0].end_s:.2f} s"
            detail = f"{len(spans)} spans, see their rows" if len(spans) > 1 else alone
            of_file = Rejection(max(sorted(seconds), key=seconds.__getitem__), detail)
            rejected[path] = [of_file, *spans] if len(spans) > 1 else [of_file]
    rows = [(path, why) for path, reasons in rejected.items() for why in reasons]
    assert {path for path, why in rows if why.start_s is None} == rejected.keys() - used
    return sorted(selected, key=lambda item: item.id), sorted(rows, key=rejection_order)


def rejection_order(row: RejectedFile) -> tuple[str, bool, float, str]:
    """By path, the whole file before its spans."""
    path, why = row
    return path, why.start_s is not None, why.start_s or 0.0, why.reason


def remove_near_duplicates(
    inspections: Iterable[Inspection], bits: int
) -> tuple[list[tuple[Inspection, Clip]], list[tuple[Inspection, Clip, Inspection, Clip]]]:
    """Keep one of every set of clips whose hashes differ in at most `bits` bits: largest picture, then first path.

    In that order, a clip is kept unless a kept clip is near it. A hash is cut into bits + 1 bands. Two hashes within
    `bits` bits agree in at least one band: only clips that share a band are compared, and none is missed.

    N different random hashes take about N^2 / 2 * bands / 2^(256 / bands) comparisons: 15 bits, 16 bands of 16 bits,
    10^6 clips: 1.2e8; 24 bits: 1.1e10. Hashes that crowd share more bands and take up to N^2 / 2 * bands: lower
    clips.Curation.hash_bits. Equal hashes add nothing; memory grows with N alone.

    Returns (source, clip) kept; (source, clip, source and clip of the first kept one near it) removed.
    """
    clips = [(inspection, clip) for inspection in inspections for clip in inspection.clips]
    order = sorted(clips, key=lambda c: (-min(c[0].video.height_px, c[0].video.width_px), c[0].path, c[1].start_s))
    hashes = np.frombuffer(b"".join(clip.phash for _, clip in order), dtype=np.uint64).reshape(-1, PHASH_FRAMES)  # N 4
    _, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    first_equal = first[inverse]  # N: the first clip with the same hash
    unequal = np.flatnonzero(first_equal == np.arange(len(hashes)))
    representative = np.empty(len(hashes), dtype=np.int64)
    representative[unequal] = unequal[_representatives(hashes[unequal], bits)]
    pairs = list(enumerate(representative[first_equal].tolist()))
    kept = [order[index] for index, other in pairs if index == other]
    return kept, [(*order[index], *order[other]) for index, other in pairs if index != other]


def _representatives(hashes: np.ndarray, bits: int) -> np.ndarray:
    """`N` for `N 4`: index of the first kept hash near each; its own if it is kept.

    By halves: hashes kept of the first half remove some of the second, whose rest is compared with itself.
    """
    if len(hashes) <= DENSE:
        near = sum((np.bitwise_count(word[:, None] ^ word) for word in hashes.T), start=np.uint16()) <= bits  # N N
        result = np.arange(len(hashes))
        for index in np.flatnonzero(np.tril(near, -1).any(1)):
            earlier = np.flatnonzero(near[index, :index] & (result[:index] == np.arange(index)))
            if len(earlier):
                result[index] = earlier[0]
        return result
    half = len(hashes) // 2
    result = _representatives(hashes[:half], bits)
    kept = np.flatnonzero(result == np.arange(half))
    near = _first_near(hashes[kept], hashes[half:], bits)
    rest = half + np.flatnonzero(near == len(kept))
    result = np.append(result, np.append(kept, -1)[near])
    result[rest] = rest[_representatives(hashes[rest], bits)]
    return result


def _first_near(kept: np.ndarray, others: np.ndarray, bits: int) -> np.ndarray:
    """`M` for `K 4` and `M 4`: index of the first of `kept` within `bits` bits of each other hash; K if none is."""
    first = np.full(len(others), len(kept))
    edges = np.linspace(0, 64 * PHASH_FRAMES, bits + 2).astype(int).tolist()
    for start, end in zip(edges, edges[1:], strict=False):
        left, right = (_band_key(hashes, start, min(end - start, KEY_BITS)) for hashes in (kept, others))
        by_left, by_right = np.argsort(left), np.argsort(right)
        low, high = (np.searchsorted(left[by_left], right[by_right], side) for side in ("left", "right"))
        far = (start // 64 + 2) % PHASH_FRAMES  # a word outside the band tells most pairs apart
        left, right = kept[by_left, far], others[by_right, far]
        for i, j in _pairs(low, high):
            likely = np.bitwise_count(left[i] ^ right[j]) <= bits
            one, other = by_left[i[likely]], by_right[j[likely]]
            near = np.bitwise_count(kept[one] ^ others[other]).sum(1, dtype=np.uint16) <= bits
            np.minimum.at(first, other[near], one[near])
    return first


def _band_key(hashes: np.ndarray, start: int, width: int) -> np.ndarray:
    """`N` uint32 for `N 4`: `width` bits from bit `start` on, which may reach into the next word."""
    word, shift = divmod(start, 64)
    key = hashes[:, word] >> np.uint64(shift)
    if shift + width > 64:
        key |= hashes[:, word + 1] << np.uint64(64 - shift)
    return (key & np.uint64((1 << width) - 1)).astype(np.uint32)


def _pairs(low: np.ndarray, high: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All (i, j) with low[j] <= i < high[j], at most PAIRS at a time."""
    ends = np.cumsum(high - low)  # of each j's pairs in one row of all pairs
    for start in range(0, int(ends[-1]), PAIRS):
        end = min(start + PAIRS, int(ends[-1]))
        first, last = np.searchsorted(ends, start, "right"), np.searchsorted(ends, end, "left")
        counts = np.diff(np.minimum(ends[first : last + 1], end), prepend=start)
        j = np.repeat(np.arange(first, last + 1), counts)
        yield np.arange(start, end) - ends[j] + high[j], j


def assign_splits(hashes: Iterable[str], linked: Iterable[tuple[str, str]], val_share: float) -> dict[str, str]:
    """`train` or `val` by source sha256. Linked sources, which share a near duplicate, go together; their hash decides.

    Where chance leaves a side empty, the group next to the border crosses it: two groups or more fill both sides.
    """
    from scipy.cluster.hierarchy import DisjointSet

    sets = DisjointSet(hashes)
    for one, other in linked:
        sets.merge(one, other)
    groups = {min(group): group for group in sets.subsets()}
    draw = {name: int(hashlib.sha256(f"split {name}".encode()).hexdigest()[:13], 16) / 16**13 for name in groups}
    count = sum(value < val_share for value in draw.values())
    if len(draw) > 1:
        count = min(max(count, 1), len(draw) - 1)
    val = set(sorted(draw, key=draw.__getitem__)[:count])
    return {sha256: "val" if name in val else "train" for name, group in groups.items() for sha256 in group}
