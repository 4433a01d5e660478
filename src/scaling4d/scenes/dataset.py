"""SETTINGS -> A DATA SET: worlds of every kind, written through the benchmarks' own writers, and unlabelled videos."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import Progress

from scaling4d import artifacts, config, seeds, video
from scaling4d.benchmarks import perception_test, realestate10k, scannet, ssv2, waymo
from scaling4d.records import Sample, UserError
from scaling4d.scenes import defects, rays, worlds

SIDE = 64  # of clips for which the videos' sizes are given
SIZES = ((64, 64), (64, 96), (80, 64), (72, 88), (64, 80), (96, 64))  # height, width of the videos, in turn
PLACES = ("phone/IMG_{:04d}", "camera/clip{:03d}", "archive/1998/tape_{:03d}", "misc/untitled {}")
CLIPS_PER_YOUTUBE_VIDEO = 2
START_BOX_PX = 8.0  # smaller boxes in frame 0 are not followed
README = """# Pocket data

Small 4D worlds, drawn by `scaling4d render` (seed {seed}).

* `videos/` without labels, for pretraining, with the defects that curation must deal with.
* `benchmarks/` in the on-disk formats of Something-Something v2, ScanNet, RealEstate10K, Perception Test and Waymo Open.

Pictures and labels are synthetic, exact and our own; only the formats are those of the benchmarks. What differs from the
originals: clips are 16 frames of 64 x 64 px; the eight action classes are our own set, worded after Something-Something's
templates; a Waymo box is that of the whole object, hidden parts included, is left out where under a fifth of it shows,
and every object is a vehicle; RealEstate10K's translations are in metres.

Licence: Apache-2.0, as the code.
"""


@config.configurable
@dataclass(frozen=True)
class Render:
    """What to draw.

    action ... drive: clips for training and for validation, by kind of world. videos: unlabelled ones, before the defects.
    contrast: of a room's pattern, 0 to 1, by kind of world; 1 is as strong as a thing's.
    frames and video_frames: length of a clip and of an unlabelled video. side_px: of the clips. depth_side_px: of a depth map.
    drive_rate_hz: of kind drive, rate_hz: of all others. tracks: points a clip, tracks_on_room: those that are on the room.
    crf: x264's, vp9_crf: VP9's quality, lower is better. gop: frames between key frames. workers: processes.
    """

    action: tuple[int, int]
    room: tuple[int, int]
    walk: tuple[int, int]
    track: tuple[int, int]
    drive: tuple[int, int]
    videos: int
    contrast: Mapping[str, float]
    frames: int
    video_frames: int
    side_px: int
    depth_side_px: int
    rate_hz: float
    drive_rate_hz: float
    tracks: int
    tracks_on_room: int
    crf: int
    vp9_crf: int
    jpeg_quality: int
    gop: int
    workers: int

    def __post_init__(self) -> None:
        if self.side_px % 2 or self.side_px < 16:
            raise UserError(f"Render.side_px = {self.side_px}; needed an even number from 16 up, as H.264 wants it")
        if self.frames < 2 or self.video_frames < defects.NEEDED_FRAMES:
            raise UserError(
                f"Render.frames = {self.frames} and Render.video_frames = {self.video_frames}; "
                f"needed 2 and {defects.NEEDED_FRAMES} at least"
            )
        if set(self.contrast) != set(worlds.KINDS):
            raise UserError(f"Render.contrast has {', '.join(self.contrast)}; needed {', '.join(worlds.KINDS)}")
        if not 0 <= self.tracks_on_room <= self.tracks or self.workers < 1:
            raise UserError("Render.tracks_on_room must lie in 0 .. Render.tracks, and Render.workers be 1 or more")

    def count(self, kind: str, split: str) -> int:
        return getattr(self, kind)[("train", "val").index(split)]


@dataclass(frozen=True)
class Task:
    """One world to draw: number `index` of its kind, counted through both splits."""

    seed: int
    kind: str
    index: int
    settings: Render


def render(out: Path, *, seed: int, settings: Render) -> Path:
    """Draw the data set into the new folder `out`; same seed and settings, same bytes.

    Raises:
        UserError: there is something at `out` already.
    """
    if out.exists():
        raise UserError(f"{out} exists; render writes a new folder, choose another name or remove it")
    kinds = [(kind, split) for kind in worlds.KINDS for split in ("train", "val")]
    total = sum(settings.count(kind, split) for kind, split in kinds) + settings.videos + len(defects.SHOTS)
    with (
        artifacts.folder(out) as folder,
        multiprocessing.get_context("spawn").Pool(settings.workers) as pool,
        Progress() as progress,
    ):
        bar = progress.add_task("render", total=total)

        def drawn(make: Callable, kind: str, indices: range) -> Iterator:
            for made in pool.imap(make, [Task(seed, kind, index, settings) for index in indices], chunksize=2):
                yield made
                progress.advance(bar)

        for kind, split in kinds:
            first = 0 if split == "train" else settings.count(kind, "train")
            samples = drawn(sample, kind, range(first, first + settings.count(kind, split)))
            _write(folder / "benchmarks", kind, split, samples, settings)
        files = folder / "videos"
        kept = []
        for number, pixels in enumerate(drawn(corpus_pixels, "corpus", range(settings.videos))):
            name = f"{PLACES[number % len(PLACES)].format(number)}.mp4"
            (files / name).parent.mkdir(parents=True, exist_ok=True)
            video.write(files / name, pixels, rate_hz=settings.rate_hz, codec="libx264", crf=settings.crf, gop=settings.gop)
            kept.append(name)
        defects.write(
            files,
            kept,
            list(drawn(corpus_pixels, "defect", range(len(defects.SHOTS)))),
            rng=seeds.numpy(seed, "defects"),
            rate_hz=settings.rate_hz,
            crf=settings.crf,
            gop=settings.gop,
        )
        (folder / "README.md").write_text(README.format(seed=seed))
    return out


def world_of(task: Task) -> worlds.World:
    """The task's world. Action classes come in turn, so that every split is balanced; in kind drive, frame 0 has a box."""
    s = task.settings
    motion = task.index % len(worlds.MOTIONS) if task.kind == "action" else None
    rng = seeds.numpy(task.seed, "world", task.kind, task.index)
    while True:
        world = worlds.draw(
            rng,
            task.kind,
            frames=s.frames,
            height_px=s.side_px,
            width_px=s.side_px,
            contrast=s.contrast[task.kind],
            motion=motion,
        )
        if task.kind != "drive" or _at_start(*rays.boxes(world, frames=[0]), s.side_px).any():
            return world


def _at_start(boxes: np.ndarray, present: np.ndarray, side_px: int) -> np.ndarray:
    """`Q`: in frame 0 of the clip, with a box large enough to be followed."""
    return present[:, 0] & ((boxes[:, 0, 2:] - boxes[:, 0, :2]).min(-1) * side_px >= START_BOX_PX)


def sample(task: Task) -> Sample:
    """The task's world with its pixels and the labels that its benchmark needs."""
    world, s = world_of(task), task.settings
    labels, valid = {}, {}
    if task.kind == "action":
        names = sorted(worlds.MOTIONS)  # templates and class names sort alike: all start with "Moving [something] "
        labels["action"] = np.int64(names.index(worlds.MOTIONS[world.motion]))
    elif task.kind in ("room", "walk"):
        labels |= {"camera_to_world": world.camera_to_world, "intrinsics": world.intrinsics}
        if task.kind == "room":
            labels["depth_m"], _ = rays.depth_and_things(world, height=s.depth_side_px, width=s.depth_side_px)
    elif task.kind == "track":
        rng = seeds.numpy(task.seed, "tracks", task.index)
        labels["points"], valid["points"] = rays.tracks(world, count=s.tracks, on_room=s.tracks_on_room, rng=rng)
    else:
        boxes, present = rays.boxes(world, frames=range(world.frames))
        keep = _at_start(boxes, present, s.side_px)
        labels["boxes"], valid["boxes"] = boxes[keep], present[keep]
    name, source = _names(task)
    return Sample(id=name, video=source, pixels=rays.pixels(world), labels=labels, valid=valid)


def corpus_pixels(task: Task) -> np.ndarray:
    """uint8 `T H W 3` of an unlabelled video, or of a shot for a defect: all kinds of worlds in turn."""
    sizes = defects.SHOTS if task.kind == "defect" else SIZES
    height, width = sizes[task.index % len(sizes)]
    rng = seeds.numpy(task.seed, "world", task.kind, task.index)
    kind = worlds.KINDS[task.index % len(worlds.KINDS)]
    s = task.settings
    height_px, width_px = (2 * round(px * s.side_px / SIDE / 2) for px in (height, width))  # even, as H.264 wants them
    world = worlds.draw(rng, kind, frames=s.video_frames, height_px=height_px, width_px=width_px, contrast=s.contrast[kind])
    return rays.pixels(world)


def _names(task: Task) -> tuple[str, str]:
    """A sample's id and its video, in the manner of the benchmark."""
    index = task.index
    if task.kind == "action":
        return str(index + 1), str(index + 1)
    if task.kind == "room":
        return f"scene{index:04d}_00", f"scene{index:04d}"
    if task.kind == "track":
        return f"video_{index}", f"video_{index}"
    if task.kind == "walk":
        first = task.settings.count("walk", "train")
        group = index // CLIPS_PER_YOUTUBE_VIDEO if index < first else f"val{(index - first) // CLIPS_PER_YOUTUBE_VIDEO}"
        youtube = f"{seeds.number(task.seed, 'youtube', group):016x}"[-11:]
        return f"{seeds.number(task.seed, 'walk', index):016x}", youtube
    context = f"{seeds.number(task.seed, 'drive', index)}_{10 * index:03d}_000_{10 * index + 20:03d}_000"
    return context, context


def _write(root: Path, kind: str, split: str, samples: Iterator[Sample], s: Render) -> None:
    encoding = {"rate_hz": s.rate_hz, "gop": s.gop}
    if kind == "action":
        ssv2.write(root / "ssv2", split, samples, templates=worlds.MOTIONS, crf=s.vp9_crf, **encoding)
    elif kind == "room":
        scannet.write(root / "scannet", split, samples, rate_hz=s.rate_hz, jpeg_quality=s.jpeg_quality)
    elif kind == "walk":
        realestate10k.write(root / "realestate10k", split, samples, crf=s.crf, **encoding)
    elif kind == "track":
        perception_test.write(root / "perception_test", split, samples, crf=s.crf, **encoding)
    else:
        waymo.write(root / "waymo", split, samples, rate_hz=s.drive_rate_hz, jpeg_quality=s.jpeg_quality)
