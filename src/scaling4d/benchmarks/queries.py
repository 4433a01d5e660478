"""In which frames of a video its tracks are asked about. A readout is asked in the first frame of a clip, so each such frame
starts a clip of its own; where TAP-Vid also measures what came before, a second clip runs backwards from there.

"frame_0": the tracks that are visible in the first frame (4DS, by its released readouts). "first": every track where it is first
visible; "strided": every track in every STRIDE-th frame where it is visible (TAP-Vid's two protocols). That the clip, and not the
video, bounds what is measured around a query is ours; a query from which no whole clip fits into the video is not asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scaling4d.records import UserError

QUERIES = ("frame_0", "first", "strided")
STRIDE = 5  # frames; tapnet's sample_queries_strided


@dataclass(frozen=True)
class Asked:
    """A clip of a video: numbers `T` of its frames, falling where it runs backwards, and the tracks that are asked about in its
    first one: points `Q T 2` float32, 0 where not visible, and visible `Q T`."""

    id: str
    numbers: np.ndarray
    points: np.ndarray
    visible: np.ndarray


def check(how: str) -> None:
    """Raises UserError: not one of QUERIES."""
    if how not in QUERIES:
        raise UserError(f"readout.tasks.points: queries = {how!r}; needed one of {', '.join(QUERIES)}")


def asked(video: str, points: np.ndarray, visible: np.ndarray, after: np.ndarray, how: str) -> list[Asked]:
    """The clips of a video by the frames in which something is asked.

    Args:
        points: `Q F 2` in all frames of the video. visible: bool `Q F`. after: `T`, a clip's frames counted from its first, 0.
        how: one of QUERIES.
    """
    assert how in QUERIES
    total, found = visible.shape[1], []
    for frame in range(0, total if how != "frame_0" else 1, STRIDE if how == "strided" else 1):
        tracks = visible[:, frame]
        if how == "first":
            tracks = tracks & ~visible[:, :frame].any(1)
        for step in (1, -1) if how == "strided" else (1,):
            numbers = frame + step * after
            if tracks.any() and 0 <= numbers[-1] < total:
                seen = visible[tracks][:, numbers]
                places = np.where(seen[..., None], points[tracks][:, numbers], 0).astype(np.float32)
                name = video if how == "frame_0" else f"{video}@{frame}{'' if step > 0 else 'b'}"
                found.append(Asked(name, numbers, places, seen))
    return found
