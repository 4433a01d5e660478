"""Settings of curation, sections `clips.Curation` and `clips.Workers`."""

from __future__ import annotations

from dataclasses import dataclass

from scaling4d import config

PHASH_FRAMES = 4  # frames of a clip that have a perceptual hash of 64 bits each (ours)


@dataclass(frozen=True)
class CurationConfig:
    """What a clip is, and which videos are good enough.

    frames, rate_hz, side_px: of a clip. max_frames: of a shot's clips, cut one after the other; its last one may be as
    short as `frames`. cut_at_shots: false: a clip may go on over a cut, and only black and still stretches end it
    (MAE-ST takes a window anywhere in a video). encode: write clips as H.264 of that side and quality `crf`, for fast
    random access; false: the sources go into the shards unchanged, and the loader seeks in them and resizes.
    listed: a csv in the folder that names the videos to use (see `sources.list_sources`); empty: all.
    hash_bits: clips whose hashes (4 frames of 64 bits) differ in at most this many of 256 bits are near duplicates.
    val_share: of the source videos. shard_bytes: a shard is closed when it is this large.

    Raises:
        ValueError: a value out of range, by its field's name.
    """

    frames: int
    max_frames: int
    cut_at_shots: bool
    rate_hz: float
    side_px: int
    encode: bool
    crf: int
    listed: str
    hash_bits: int
    val_share: float
    shard_bytes: int

    def __post_init__(self) -> None:
        positive = ("frames", "rate_hz", "side_px", "shard_bytes")
        needed = {name: (getattr(self, name) > 0, "more than 0") for name in positive}
        needed["max_frames"] = self.max_frames >= self.frames, f"{self.frames}, which is frames, or more"
        needed["crf"] = 0 <= self.crf <= 51, "0 (best) to 51"
        needed["hash_bits"] = 0 <= self.hash_bits < 64 * PHASH_FRAMES, f"0 to {64 * PHASH_FRAMES - 1}"
        needed["val_share"] = 0 < self.val_share < 1, "between 0 and 1"
        for name, (fits, values) in needed.items():
            if not fits:
                raise ValueError(f"{name} = {getattr(self, name)}; needed {values}")
        if self.side_px % 2:
            raise ValueError(f"side_px = {self.side_px} is odd; H.264 needed an even number; set clip.side_px")


@dataclass(frozen=True)
class WorkersConfig:
    """Processes that look at videos and cut clips. No result depends on them.

    processes: on this machine. cluster: address of a running Dask scheduler, whose workers do all work; empty: none.

    Raises:
        ValueError: no process.
    """

    processes: int
    cluster: str

    def __post_init__(self) -> None:
        config.require_minima(self, {"processes": 1})
