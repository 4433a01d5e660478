"""Small benchmarks of every layout, each with the writer of its files, and one way to read a split of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
from benchmarks import writers
from damage import ACCEPTED, SKIPPED
from numbered import CLIP, H264, INTRINSICS, T, pictures, poses, three_boxes

from scaling4d import seeds
from scaling4d.benchmarks import kinetics, perception_test, perception_test_objects, realestate10k, scannet, ssv2, tapvid, waymo
from scaling4d.records import Sample

YOUTUBE_ID = "abcdefghijk"


def points() -> Sample:
    xy = seeds.numpy_rng(0, "points").uniform(0.3, 0.7, (4, 30, 2)).astype(np.float32)
    return Sample("video_7", "video_7", pictures(30, 32, 48), {"points": xy}, {"points": np.ones((4, 30), bool)})


def clip(name: str, frames: int = T) -> Sample:
    depth = np.linspace(0.5, 4, frames * 16 * 16).reshape(frames, 16, 16)
    labels = {"action": np.int64(0), "depth_m": depth, "camera_to_world": poses(frames), "intrinsics": INTRINSICS}
    return Sample(name, YOUTUBE_ID, pictures(frames), labels)


# ---- benchmarks, each with the writer of a small copy ----

SLOW, JPEG = replace(CLIP, frames=4, rate_hz=5.0), {"rate_hz": 8.0, "jpeg_quality": 90}
SENSREADER, POSED_IMAGES = scannet.EXPORTS
Writer = Callable[[Path], None]


def both_splits(write: Callable, **options: object) -> Writer:
    return lambda root: [write(root, split, [clip("0")], **options, **H264) for split in ("train", "val")]


def export(layout: str) -> Writer:
    return lambda root: writers.write_scannet_export(root, clip("scene0003_01", 30), layout)


BENCHMARKS: dict[str, tuple[ModuleType, Writer]] = {
    "kinetics": (kinetics, both_splits(writers.write_kinetics, labels=["a"])),
    "ssv2": (ssv2, both_splits(ssv2.write, templates=["Eating [something]"])),
    "perception_test": (perception_test, lambda root: perception_test.write(root, "val", [points()], **H264)),
    "perception_test_objects": (
        perception_test_objects,
        lambda root: writers.write_objects(root, "val", [three_boxes("video_7")], **H264),
    ),
    "tapvid": (tapvid, lambda root: writers.write_tapvid(root, [points()])),
    "tapvid_kinetics": (tapvid, lambda root: writers.write_tapvid_kinetics(root, [points()], shards=1)),
    "waymo_v2": (waymo, lambda root: waymo.write(root, "val", [three_boxes("a")], **JPEG)),
    "waymo_v1": (waymo, lambda root: writers.write_waymo_v1(root, "val", three_boxes("a"), **JPEG)),
    "scannet": (scannet, lambda root: scannet.write(root, "val", [clip("scene0003_01")], **JPEG)),
    "scannet_sensreader": (scannet, export(SENSREADER)),
    "scannet_posed_images": (scannet, export(POSED_IMAGES)),
    "realestate10k": (realestate10k, lambda root: realestate10k.write(root, "val", [clip("0" * 16)], **H264)),
    "realestate10k_frames": (
        realestate10k,
        lambda root: writers.write_realestate10k_frames(root, "val", clip("0" * 16), rate_hz=8.0),
    ),
}


def outcome(benchmark: ModuleType, root: Path) -> str:
    """What became of a split: ACCEPTED or SKIPPED. Raises UserError: it is refused."""
    request = SLOW if benchmark is tapvid else CLIP
    skipped: list = []
    for sample in benchmark.open_split(root, "val", request).part(skipped=skipped):
        assert sample.pixels.shape == (request.frames, request.side_px, request.side_px, 3)
    return SKIPPED if skipped else ACCEPTED
