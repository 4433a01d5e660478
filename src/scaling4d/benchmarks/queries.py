"""Query frames of a video: the frames in which its point tracks are given.

A clip's queries lie in its first frame, so every query frame starts a clip of its own. TAP-Vid also measures frames
before a query: there, a second clip runs backwards.

"frame_0": the tracks that are visible in a window's first frame (MooG's demo, in the released code). "first": every
track in the frame of its first appearance; "strided": in every STRIDE-th frame, the tracks that are visible there
(TAP-Vid's two protocols). Ours: the clip, not the video, bounds the measured frames, and a query frame is dropped if no
full clip fits from there.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence

import numpy as np

from scaling4d.benchmarks.samples import ClipRequest, at_positions

STRIDE = 5  # frames; tapnet's sample_queries_strided


# A clip that starts in a query frame. frame_numbers: `T` of the video, falling in a clip that runs backwards.
# points: `Q T 2` float32 of the tracks that are visible in the first frame, 0 where they are not. visible: `Q T`.
QueryClip = namedtuple("QueryClip", "id frame_numbers points visible")


def query_clips(
    video: str, points: np.ndarray, visible: np.ndarray, offsets: np.ndarray, request: ClipRequest, positions: Sequence[float]
) -> list[QueryClip]:
    """The clips of a video, by query frame.

    points: `Q F 2`, in 0..1 of the square, in all F frames of the video; those outside do not count as visible.
    visible: bool `Q F`. offsets: `T`, a clip's frames counted from its first. positions: of the windows, of frame_0
    alone; a window starts where a track is visible.
    """
    visible = visible & ((points >= 0) & (points < 1)).all(-1)
    queries, total, clips = request.queries, visible.shape[1], []
    starts = [frame for frame in request.start_frames(offsets, total) if visible[:, frame].any()]
    every = range(0, total, STRIDE if queries == "strided" else 1)
    for frame in at_positions(starts, positions) if queries == "frame_0" else every:
        tracks = visible[:, frame]
        if queries == "first":
            tracks = tracks & ~visible[:, :frame].any(1)
        for step in (1, -1) if queries == "strided" else (1,):
            numbers = frame + step * offsets
            if tracks.any() and 0 <= numbers[-1] < total:
                seen = visible[tracks][:, numbers]
                seen_points = np.where(seen[..., None], points[tracks][:, numbers], 0).astype(np.float32)
                clip_id = video if queries == "frame_0" else f"{video}@{frame}{'' if step > 0 else 'b'}"
                clips.append(QueryClip(clip_id, numbers, seen_points, seen))
    return clips
