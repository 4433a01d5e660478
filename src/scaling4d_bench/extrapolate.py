"""The paper calculation: what measured rates come to at the size of the papers' corpus (170 million videos, arXiv:2412.15212)."""

from __future__ import annotations

from dataclasses import dataclass

VIDEOS = 170_000_000
VIDEO_S = 10.0
CORES = (1_000, 10_000)
HASH_BYTES = 32  # of a clip: 4 frames of 64 bits
HASH_BITS = 8 * HASH_BYTES


@dataclass(frozen=True)
class Measured:
    """What one run found.

    core_s_per_video_s: core-seconds to curate a second of video. clips_per_video_s, bytes_per_clip: what comes out of it.
    tasks_per_video: jobs that the scheduler hands out for a video. dedupe_bytes_per_clip: memory that finding duplicates takes
    beside the hash. comparisons_per_s: of two hashes, one core. hash_bits: near duplicates differ in at most so many.
    main_bytes_per_video: by which the main process grows.
    """

    core_s_per_video_s: float
    clips_per_video_s: float
    bytes_per_clip: float
    tasks_per_video: float
    tasks_per_s: float
    dedupe_bytes_per_clip: float
    comparisons_per_s: float
    hash_bits: int
    main_bytes_per_video: float


def extrapolate(
    measured: Measured, *, videos: int = VIDEOS, video_s: float = VIDEO_S, cores: tuple[int, ...] = CORES
) -> dict[str, float]:
    """Each number is a product: nothing is assumed but that twice as much takes twice as long (comparisons: four times)."""
    core_s = videos * video_s * measured.core_s_per_video_s
    clips = videos * video_s * measured.clips_per_video_s
    pairs = comparisons(clips, measured.hash_bits)
    found = {
        "core-hours": core_s / 3600,
        "clips": clips,
        "storage, TB": clips * measured.bytes_per_clip / 1e12,
        "hashes, GB": clips * HASH_BYTES / 1e9,
        "memory to find duplicates, GB": clips * (HASH_BYTES + measured.dedupe_bytes_per_clip) / 1e9,
        "memory of the main process, GB": videos * measured.main_bytes_per_video / 1e9,
        "comparisons of hashes": pairs,
        "core-hours of comparing": pairs / measured.comparisons_per_s / 3600,
        "scheduler: tasks/s it was seen to hand out": measured.tasks_per_s,
    }
    for count in cores:
        found[f"{count:,} cores: days"] = core_s / count / 86400
        found[f"{count:,} cores: tasks/s"] = videos * measured.tasks_per_video / (core_s / count)
    return found


def comparisons(clips: float, hash_bits: int) -> float:
    """Of pairs that share one of hash_bits + 1 bands, if hashes are random (see clips/duplicates.py)."""
    bands = hash_bits + 1
    return clips**2 / 2 * bands / 2 ** (HASH_BITS / bands)
