"""SETTINGS -> A DATA SET: scenes of every kind, written through the benchmarks' own writers, and unlabelled videos."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from scaling4d import config, provenance, seeds, video
from scaling4d.benchmarks import perception_test, realestate10k, scannet, ssv2, waymo
from scaling4d.config import StageConfig
from scaling4d.records import Sample, UserError
from scaling4d.scenes import defects, raycast
from scaling4d.scenes.scene import KINDS, MOTIONS, Scene, draw_scene

TRACKS, TRACKS_ON_ROOM = 12, 3  # ours
VP9_CRF, JPEG_QUALITY, GOP = 36, 40, 16  # ours; GOP: frames between key frames
MIN_START_BOX_PX = 8.0  # an object with a smaller box in frame 0 gets no track of boxes
CLIPS_PER_YOUTUBE_VIDEO = 2
SIDE_PX = 64  # side of the clips to which the sizes of VIDEO_SIZES and of defects belong
VIDEO_SIZES = ((64, 64), (64, 96), (80, 64), (72, 88), (64, 80), (96, 64))  # height, width of the videos, in turn
VIDEO_NAMES = ("phone/IMG_{:04d}", "camera/clip{:03d}", "archive/1998/tape_{:03d}", "misc/untitled {}")
README = """# Pocket data

Small 4D worlds, drawn by `scaling4d render` (seed {seed}).

* `videos/` without labels, for pretraining, with the defects that curation must deal with.
* `benchmarks/` in the on-disk formats of Something-Something v2, ScanNet, RealEstate10K, Perception Test and Waymo Open.

Pictures and labels are synthetic, exact and our own; only the formats are those of the benchmarks. What differs from the
originals: clips are {clip}; the eight action classes are our own set, worded after
Something-Something's templates; depth is rounded to centimetres; a Waymo box is that of the whole object, hidden parts
included, is left out where under a fifth of it shows, and every object is a vehicle; RealEstate10K's translations are in
metres.

Licence: Apache-2.0, as the code.
"""


@dataclass(frozen=True)
class RenderConfig:
    """Size of the rendered data set.

    action, room, walk, track, drive: clips of that kind for training and for validation. videos: unlabelled videos,
    without the defective ones. frames, video_frames: length of a clip and of a video, at rate_hz. side_px: of a clip,
    even.
    depth_side_px: of a depth map. crf: x264's quality, lower is better. workers: processes; no byte depends on them.
    """

    action: tuple[int, int]
    room: tuple[int, int]
    walk: tuple[int, int]
    track: tuple[int, int]
    drive: tuple[int, int]
    videos: int
    frames: int
    video_frames: int
    rate_hz: float
    side_px: int
    depth_side_px: int
    crf: int
    workers: int

    def __post_init__(self) -> None:
        for kind in KINDS:
            counts = getattr(self, kind)
            if len(counts) != 2 or min(counts) < 0:
                raise ValueError(f"{kind} = {list(counts)}; needed [clips for training, clips for validation]")
        if self.side_px % 2:
            raise ValueError(f"side_px = {self.side_px}; needed an even number from 16 up, for H.264")
        least = {"side_px": 16, "frames": 2, "video_frames": defects.MIN_FRAMES, "videos": 0, "depth_side_px": 1, "workers": 1}
        config.require_minima(self, least)
        config.require_positive(self, "rate_hz")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf = {self.crf}; needed 0 to 51")

    def clips(self, kind: str, split: str) -> range:
        """Indices of the clips of a split: validation follows training."""
        train, val = getattr(self, kind)
        return range(train) if split == "train" else range(train, train + val)


@dataclass(frozen=True)
class SceneSpec:
    """One scene to draw: number `index` of its kind, which is one of KINDS, "corpus" (videos) or "defect" (shots)."""

    seed: int
    kind: str
    index: int
    settings: RenderConfig


def bind_render(settings: Mapping[str, Any]) -> StageConfig:
    """Settings of `render`, checked. Raises UserError: settings that it refuses."""
    return config.bind(settings, ["seed", "render"], RenderConfig)


def write_dataset(out: Path, *, seed: int, settings: RenderConfig) -> Path:
    """Render the data set into the new folder `out`. Same seed and settings, same bytes.

    Raises:
        UserError: `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists; render writes a new folder, choose another name or remove it")
    splits = [(kind, split) for kind in KINDS for split in ("train", "val")]
    total = sum(len(settings.clips(*split)) for split in splits) + settings.videos + len(defects.SHOT_SIZES)
    h264 = {"rate_hz": settings.rate_hz, "crf": settings.crf, "gop": GOP}
    with (
        provenance.atomic_folder(out) as folder,
        multiprocessing.get_context("spawn").Pool(settings.workers) as pool,
        Progress() as progress,
    ):
        bar = progress.add_task("render", total=total)

        def draw_all(draw: Callable[[SceneSpec], Any], kind: str, indices: range) -> Iterator[Any]:
            for drawn in pool.imap(draw, [SceneSpec(seed, kind, index, settings) for index in indices], chunksize=2):
                yield drawn
                progress.advance(bar)

        root, videos = folder / "benchmarks", folder / "videos"
        writers = {
            "action": partial(ssv2.write, root / "ssv2", templates=MOTIONS, **h264 | {"crf": VP9_CRF}),
            "room": partial(scannet.write, root / "scannet", rate_hz=settings.rate_hz, jpeg_quality=JPEG_QUALITY),
            "walk": partial(realestate10k.write, root / "realestate10k", **h264),
            "track": partial(perception_test.write, root / "perception_test", **h264),
            "drive": partial(waymo.write, root / "waymo", rate_hz=settings.rate_hz, jpeg_quality=JPEG_QUALITY),
        }
        for kind, split in splits:
            writers[kind](split, draw_all(draw_sample, kind, settings.clips(kind, split)))
        names = [f"{VIDEO_NAMES[n % len(VIDEO_NAMES)].format(n)}.mp4" for n in range(settings.videos)]
        for name, pixels in zip(names, draw_all(draw_video, "corpus", range(settings.videos)), strict=True):
            (videos / name).parent.mkdir(parents=True, exist_ok=True)
            video.encode(videos / name, pixels, **h264)
        shots = list(draw_all(draw_video, "defect", range(len(defects.SHOT_SIZES))))
        defects.write_defects(videos, names, shots, rng=seeds.numpy_rng(seed, "defects"), **h264)
        clip = f"{settings.frames} frames of {settings.side_px} x {settings.side_px} px, {settings.rate_hz:g} a second"
        (folder / "README.md").write_text(README.format(seed=seed, clip=clip))
    return out


def draw_sample(spec: SceneSpec) -> Sample:
    """A labelled clip: frames, the labels of its benchmark, and names in the benchmark's style.

    Classes of kind action come in turn, so every split is balanced. Every scene of kind drive has a box at its start.
    """
    kind, index, s = spec.kind, spec.index, spec.settings
    size = {"frames": s.frames, "rate_hz": s.rate_hz, "height_px": s.side_px, "width_px": s.side_px}
    rng, motion = seeds.numpy_rng(spec.seed, "world", kind, index), index % len(MOTIONS) if kind == "action" else None
    scene = draw_scene(rng, kind, motion=motion, **size)
    while kind == "drive" and not _boxed_at_start(scene, *raycast.bounding_boxes(scene, frames=[0])).any():
        scene = draw_scene(rng, kind, **size)
    labels, valid = {}, {}
    if kind == "action":
        name = source = str(index + 1)
        names = sorted(MOTIONS)  # class names sort as templates do: all start with "Moving [something] "
        labels["action"] = np.int64(names.index(MOTIONS[scene.motion]))
    elif kind in ("room", "walk"):
        name, source = f"scene{index:04d}_00", f"scene{index:04d}"
        labels |= {"camera_to_world": scene.camera_to_world, "intrinsics": scene.intrinsics}
        if kind == "room":
            depth_m = raycast.depth_maps(scene, height=s.depth_side_px, width=s.depth_side_px)
            labels["depth_m"] = depth_m.round(2)  # the files become half as large
        else:
            val = index - len(s.clips("walk", "train"))
            group = index // CLIPS_PER_YOUTUBE_VIDEO if val < 0 else f"val{val // CLIPS_PER_YOUTUBE_VIDEO}"
            name = f"{seeds.number(spec.seed, 'walk', index):016x}"
            source = f"{seeds.number(spec.seed, 'youtube', group):016x}"[-11:]
    elif kind == "track":
        name = source = f"video_{index}"
        rng = seeds.numpy_rng(spec.seed, "tracks", index)
        labels["points"], valid["points"] = raycast.track_points(scene, count=TRACKS, on_room=TRACKS_ON_ROOM, rng=rng)
    else:
        name = source = f"{seeds.number(spec.seed, 'drive', index)}_{10 * index:03d}_000_{10 * index + 20:03d}_000"
        boxes, present = raycast.bounding_boxes(scene, frames=range(s.frames))
        tracked = _boxed_at_start(scene, boxes, present)
        labels["boxes"], valid["boxes"] = boxes[tracked], present[tracked]
    return Sample(id=name, video=source, pixels=raycast.render_frames(scene), labels=labels, valid=valid)


def _boxed_at_start(scene: Scene, boxes: np.ndarray, present: np.ndarray) -> np.ndarray:
    """`Q`: whether an object has a box of MIN_START_BOX_PX or more in frame 0."""
    return present[:, 0] & ((boxes[:, 0, 2:] - boxes[:, 0, :2]).min(-1) * scene.width_px >= MIN_START_BOX_PX)


def draw_video(spec: SceneSpec) -> np.ndarray:
    """uint8 `T H W 3` of an unlabelled video, or of a shot for a defect. The kinds of scenes come in turn."""
    sizes, s = defects.SHOT_SIZES if spec.kind == "defect" else VIDEO_SIZES, spec.settings
    height, width = (2 * round(px * s.side_px / SIDE_PX / 2) for px in sizes[spec.index % len(sizes)])  # even
    rng, kind = seeds.numpy_rng(spec.seed, "world", spec.kind, spec.index), KINDS[spec.index % len(KINDS)]
    return raycast.render_frames(
        draw_scene(rng, kind, frames=s.video_frames, rate_hz=s.rate_hz, height_px=height, width_px=width)
    )
