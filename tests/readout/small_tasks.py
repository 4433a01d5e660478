"""The five tasks in small, a head for each, and a sample that has the labels of all."""

from dataclasses import replace

import numpy as np
import torch

from scaling4d import seeds
from scaling4d.readout.heads import Head, HeadConfig
from scaling4d.readout.tasks.actions import Actions
from scaling4d.readout.tasks.boxes import Boxes
from scaling4d.readout.tasks.depth import Depth
from scaling4d.readout.tasks.points import Points
from scaling4d.readout.tasks.pose import Pose
from scaling4d.readout.tasks.task import Task, collate
from scaling4d.records import Sample

CLIP, WIDTH = (8, 16, 16), 24  # of the encoder, whose features have 4 steps of 2 x 2 tokens
VIEWS = {"rate_hz": 8.0, "views": ("plain", "mirrored")}
TASK: dict[str, Task] = {
    "actions": Actions(classes=3, test_views=(1, 1), **VIEWS),
    "boxes": Boxes(objects=4, relative=False, giou_weight=0.5, **VIEWS),
    "depth": Depth(**VIEWS, offset_m=3.0),
    "points": Points(tracks=6, certain=True, relative=True, queries_at="frame_0", **VIEWS),
    "pose": Pose(**VIEWS),
}
SIZES = {"width": 32, "heads": 4, "fourier_bases": 4, "query_width": 24}
HEAD = HeadConfig(**SIZES, query_std=1.0, time_init="sincos", out_scale=1.0, stretched=True, distance_bias=(1.0, 100.0))


def head_of(task: Task, *, width: int = WIDTH, **changes: object) -> Head:
    head = Head(replace(HEAD, **changes), task.queries(CLIP), features_width=width, frames=CLIP[0])
    head.initialise(0)
    return head


def features_of(clips: int, *, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(clips, 4, 4, width, generator=seeds.torch_rng(0, "features"))


def sample(seed: int = 0) -> Sample:
    rng, (T, H, W) = seeds.numpy_rng(seed, "sample"), CLIP
    corner = rng.uniform(0, 0.5, (3, T, 2)).astype(np.float32)
    return Sample(
        id=f"s{seed}",
        video=f"v{seed}",
        pixels=rng.integers(0, 256, (T, H, W, 3), dtype=np.uint8),
        labels={
            "action": np.int64(seed % 3),
            "action_mirrored": np.int64((seed + 1) % 3),
            "boxes": np.concatenate([corner, corner + 0.3], axis=-1),
            "depth_m": rng.uniform(1, 5, (T, H, W)).astype(np.float32),
            "points": rng.uniform(0, 1, (5, T, 2)).astype(np.float32),
            "camera_to_world": np.stack([np.eye(4) + 0.1 * i for i in range(T)]),
        },
        valid={
            "boxes": np.ones((3, T), bool),
            "depth_m": rng.uniform(size=(T, H, W)) < 0.9,
            "points": rng.uniform(size=(5, T)) < 0.8,
            "camera_to_world": np.ones(T, bool),
        },
    )


def targets_of(task: Task, clips: int) -> dict[str, torch.Tensor]:
    return collate([task.target(sample(seed)) for seed in range(clips)])
