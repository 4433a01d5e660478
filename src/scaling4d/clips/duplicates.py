"""Which clips look alike, and which sources must therefore lie on the same side of the split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from scaling4d.clips.examine import HASHED, Clip, Finding

SPLITS = ("train", "val")
AT_ONCE = 1 << 16  # pairs of hashes in memory
DENSE = 1 << 10  # so few hashes are all compared with each other
KEY_BITS = 32  # of a band that are looked at; bands are wider only if hash_bits < 7


def distinct(
    findings: Iterable[Finding], bits: int
) -> tuple[list[tuple[Finding, Clip]], list[tuple[Finding, Clip, Finding, Clip]]]:
    """Keep one of every set of clips whose hashes differ in at most `bits` bits; the largest picture, then the first path.

    One clip after the other, in that order, is kept unless a kept one is near it. A hash is cut into bits + 1 bands: two
    hashes that close agree in one band at least, so only clips that share a band are compared, and none is missed.

    N different hashes take about N^2 / 2 * bands / 2^(256 / bands) comparisons if they are random: 15 bits, 16 bands of 16
    bits, 10^6 clips: 1.2e8; 24 bits: 1.1e10. Hashes that crowd together without being near share more bands, and take up to
    N^2 / 2 * bands. If this takes too long, lower clips.Curation.hash_bits. Equal hashes cost nothing more; memory grows
    with N alone, whatever is near what.
    Returns:
        (source, clip) kept; (source, clip, the first kept source and clip that it is like) removed.
    """
    order = sorted(
        ((finding, clip) for finding in findings for clip in finding.clips),
        key=lambda item: (-min(item[0].video.height_px, item[0].video.width_px), item[0].path, item[1].start_s),
    )
    hashes = np.frombuffer(b"".join(clip.phash for _, clip in order), dtype=np.uint64).reshape(-1, HASHED)  # N 4
    kept, removed = [], []
    for place, twin in enumerate(_twins(hashes, bits).tolist()):
        if place == twin:
            kept.append(order[place])
        else:
            removed.append((*order[place], *order[twin]))
    return kept, removed


def _twins(hashes: np.ndarray, bits: int) -> np.ndarray:
    """`N` for `N 4`: the place of the first kept hash that each is near; its own if it is kept."""
    first = _first_equal(hashes)  # that one is kept, or has the same twin
    unequal = np.flatnonzero(first == np.arange(len(hashes)))
    twins = np.empty(len(hashes), dtype=np.int64)
    twins[unequal] = unequal[_greedy(hashes[unequal], bits)]
    return twins[first]


def _first_equal(hashes: np.ndarray) -> np.ndarray:
    """`N` for `N 4`: where each hash occurs for the first time."""
    _, first, equal = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    return first[equal]


def _greedy(hashes: np.ndarray, bits: int) -> np.ndarray:
    """`_twins` by halves: what the first half keeps removes from the second, and the rest of the second is among itself."""
    if len(hashes) <= DENSE:
        return _greedy_dense(hashes, bits)
    half = len(hashes) // 2
    twins = _greedy(hashes[:half], bits)
    kept = np.flatnonzero(twins == np.arange(half))
    near = _first_near(hashes[kept], hashes[half:], bits)
    rest = half + np.flatnonzero(near == len(kept))
    twins = np.append(twins, np.append(kept, -1)[near])
    twins[rest] = rest[_greedy(hashes[rest], bits)]
    return twins


def _greedy_dense(hashes: np.ndarray, bits: int) -> np.ndarray:
    distance = sum((np.bitwise_count(word[:, None] ^ word) for word in hashes.T), start=np.uint16())  # N N
    near = distance <= bits
    twins = np.arange(len(hashes))
    for place in np.flatnonzero(np.tril(near, -1).any(1)):
        earlier = np.flatnonzero(near[place, :place] & (twins[:place] == np.arange(place)))
        if len(earlier):
            twins[place] = earlier[0]
    return twins


def _first_near(kept: np.ndarray, others: np.ndarray, bits: int) -> np.ndarray:
    """`M` for `K 4` and `M 4`: the place of the first of `kept` within `bits` bits of each other one; K if there is none."""
    first = np.full(len(others), len(kept))
    for start, width in _bands(bits):
        left, right = _key(kept, start, width), _key(others, start, width)
        by_left, by_right = np.argsort(left), np.argsort(right)
        low, high = (np.searchsorted(left[by_left], right[by_right], side) for side in ("left", "right"))
        far = (start // 64 + 2) % HASHED  # a word that the band says nothing about: it alone tells most pairs apart
        left, right = kept[by_left, far], others[by_right, far]
        for i, j in _pairs(low, high):
            likely = np.bitwise_count(left[i] ^ right[j]) <= bits
            one, other = by_left[i[likely]], by_right[j[likely]]
            near = np.bitwise_count(kept[one] ^ others[other]).sum(1, dtype=np.uint16) <= bits
            np.minimum.at(first, other[near], one[near])
    return first


def _bands(bits: int) -> list[tuple[int, int]]:
    """(first bit, number of bits) of bits + 1 bands that do not overlap."""
    edges = np.linspace(0, 64 * HASHED, bits + 2).astype(int).tolist()
    return [(start, min(end - start, KEY_BITS)) for start, end in zip(edges, edges[1:], strict=False)]


def _key(hashes: np.ndarray, start: int, width: int) -> np.ndarray:
    """`N` uint32 for `N 4`: the `width` bits from bit `start` on, which may reach into the next word."""
    word, shift = divmod(start, 64)
    key = hashes[:, word] >> np.uint64(shift)
    if shift + width > 64:
        key |= hashes[:, word + 1] << np.uint64(64 - shift)
    return (key & np.uint64((1 << width) - 1)).astype(np.uint32)


def _pairs(low: np.ndarray, high: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All (i, j) with low[j] <= i < high[j], at most AT_ONCE at a time."""
    ends = np.cumsum(high - low)  # of each j's pairs, if they stood in one row
    for start in range(0, int(ends[-1]), AT_ONCE):
        end = min(start + AT_ONCE, int(ends[-1]))
        first, last = np.searchsorted(ends, start, "right"), np.searchsorted(ends, end, "left")
        here = np.diff(np.minimum(ends[first : last + 1], end), prepend=start)
        j = np.repeat(np.arange(first, last + 1), here)
        yield np.arange(start, end) - ends[j] + high[j], j


def splits(findings: list[Finding], linked: list[tuple[str, str]], val_share: float) -> dict[str, str]:
    """`train` or `val` by source sha256. Sources that share a near duplicate go together; the hash of the content decides.

    If chance leaves a side empty, the group next to the border crosses it, so that two groups or more always give both.
    """
    group = {finding.sha256: finding.sha256 for finding in findings}

    def root(name: str) -> str:
        while group[name] != name:
            group[name] = group[group[name]]  # half as far the next time
            name = group[name]
        return name

    for one, other in linked:
        low, high = sorted((root(one), root(other)))
        group[high] = low
    place = {name: int(hashlib.sha256(f"split {name}".encode()).hexdigest()[:13], 16) / 16**13 for name in map(root, group)}
    val = {name for name, at in place.items() if at < val_share}
    if len(place) > 1 and not val:
        val = {min(place, key=place.__getitem__)}
    if len(place) > 1 and len(val) == len(place):
        val.remove(max(place, key=place.__getitem__))
    return {name: "val" if root(name) in val else "train" for name in group}
