"""Target `depth_demo`: the depth demo of representations4d, with the released 4DS-B-dist-e and its readout of ScanNet.

Facts: google-deepmind/representations4d at commit 75aca30, colabs/scaling4d_depth_demo.ipynb.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from scaling4d import artifacts, video
from scaling4d.encoders.arrays import write_npz
from scaling4d.encoders.pretrained import load_encoder
from scaling4d.provenance import atomic_new, work_folder
from scaling4d.readout import released_heads
from scaling4d.readout.released_heads import ReleasedReadout
from scaling4d.records import UserError, write_json
from scaling4d.reproduce.fly_vs_fly import RELEASED_ENCODER
from scaling4d.reproduce.targets import RESULT, Download, Setting, Target, new_folder

VALID_M = (0.001, 10.0)  # depths of ScanNet that 4DS measures; kauldron's metrics
SHEET_FRAMES = 4
MOVIE_HZ = 20.0  # of the demo
NOTEBOOK = "colabs/scaling4d_depth_demo.ipynb"
BUCKET = "https://storage.googleapis.com/representations4d"
RELEASED_READOUT = {"width": 1024, "heads": 16, "queries": math.prod(RELEASED_ENCODER.clip) // 128, "out": 128, "frames": 16}
DEPTH_DEMO = Target(
    name="depth_demo",
    title="depth of the demo's video by the released readout, Scaling 4D Representations (arXiv:2412.15212)",
    expected=None,
    unpublished="the demo shows pictures, and its video has no true depth; layout, shape and range of the output are checked",
    downloads=(
        Download(
            option="--weights",
            what="4DS-B-dist-e with its readout of ScanNet's depth, one file",
            address=f"{BUCKET}/checkpoints/scaling4d_dist_b_depth.npz",
            size="420 MB, by README.md of representations4d",
            licence="CC-BY 4.0",
            command=f"wget {BUCKET}/checkpoints/scaling4d_dist_b_depth.npz",
        ),
        Download(
            option="--video",
            what="the demo's video, horsejump-high of DAVIS; any other video of 16 frames will do",
            address=f"{BUCKET}/assets/horsejump-high.mp4",
            size="size not published",
            licence="DAVIS's own",
            command=f"wget {BUCKET}/assets/horsejump-high.mp4",
        ),
    ),
    settings=(
        Setting("encoder", "patches of 2 x 16 x 16, features at 0.95 of the depth, cubic in time to 16 steps", NOTEBOOK),
        Setting("readout", "AttentionReadout, num_params 1024, 16 heads, 6,272 queries of 2 x 8 x 8 depths", NOTEBOOK),
        Setting("clip", "the first 16 frames, 0..1, Lanczos to 224 x 224 whatever the aspect ratio", f"{NOTEBOOK}, mediapy"),
        Setting("picture", "frame beside depth / largest depth, 20 frames a second", NOTEBOOK),
    ),
    differences=(
        "float32 products in full precision; JAX takes TF32 on newer GPUs",
        "another build of the video's decoder",
    ),
    hardware="a few seconds on a CPU by our estimate, not measured with the released file",
)


def run(*, weights: Path | None, video_file: Path | None, out: Path | None) -> tuple[Path, dict[str, Any]]:
    """Predict the depth of a video's first frames.

    Writes `result.json`, `depth.npz` (`T H W`, metres), `sheet.png` and `depth.mp4` to a new folder.
    Returns the folder and the content of result.json, whose `checks` are lists of name, whether it holds, and words.
    Raises UserError: files are missing or damaged, weights without a readout of depth, a video that is too short, or
    `out` exists.
    """
    DEPTH_DEMO.require({"--weights": weights, "--video": video_file})
    out = new_folder(out, DEPTH_DEMO.name)
    encoder, readout, head = load_released(weights)
    clips = read_demo_clip(video_file, encoder.clip)
    depth = predict_depth(encoder, readout, head, clips)[0]  # T H W
    if not (known := depth[np.isfinite(depth)]).size:
        raise UserError(f"{weights}: its readout predicts no numbers; download the file again")
    low, middle, high = np.quantile(known, [0, 0.5, 1]).tolist()
    evidence: dict[str, Any] = {"checks": checks_of(depth, encoder.clip)}
    evidence |= {"depth": {"smallest": low, "median": middle, "largest": high}}
    for name, path in (("weights", weights), ("video", video_file)):
        evidence[name] = {"file": path.name, "sha256": artifacts.sha256(path)}
    content = DEPTH_DEMO.result(None, deviations_of(encoder, readout), evidence)
    with atomic_new(out) as folder:
        folder.mkdir()
        write_npz(folder / "depth.npz", [("depth", depth)])
        draw(folder, clips[0].numpy(), depth)
        write_json(folder / RESULT, content)
    return out, content


def read_demo_clip(source: Path, clip: tuple[int, int, int]) -> Tensor:
    """The first frames of a video as the demo takes them, uint8 `1 T H W 3`. Raises UserError: as read_video."""
    T, height, width = clip
    pictures = map(Image.fromarray, video.read_video(source, frames=T))
    frames = [np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS)) for picture in pictures]
    return torch.from_numpy(np.stack(frames))[None]


def load_released(weights: Path) -> tuple[nn.Module, ReleasedReadout, nn.Module]:
    """Encoder, description of the readout, and readout of a released `.npz`.

    Raises UserError: a damaged file, arrays that a 4DS model does not have, or no readout of depth.
    """
    with work_folder("depth-demo") as folder:
        checkpoint = released_heads.from_4ds(weights, folder / "checkpoint")
        readout = released_heads.read_readout(checkpoint)
        if readout is None or readout.kind != "depth":
            kind = f"a readout of kind {readout.kind}" if readout else "no readout"
            raise UserError(f"{weights} holds {kind}; needed that of depth, as in {DEPTH_DEMO.downloads[0].address}")
        return load_encoder(checkpoint).eval(), readout, released_heads.load_readout(checkpoint, readout)


@torch.no_grad()
def predict_depth(encoder: nn.Module, readout: ReleasedReadout, head: nn.Module, pixels: Tensor) -> np.ndarray:
    """Clips `B T H W 3`, uint8 or float in 0..1 -> depths `B T H W`, float32. Resizes the encoder to the clips."""
    encoder.resize(tuple(pixels.shape[1:4]))
    return released_heads.predict(readout, head, encoder, encoder.features(pixels), pixels, None)[..., 0].numpy()


def checks_of(depth: np.ndarray, clip: tuple[int, int, int]) -> list[tuple[str, bool, str]]:
    """Name, whether it holds, and words of each check: shape, numbers, the median within ScanNet's range."""
    finite, (near, far), median = np.isfinite(depth).all(), VALID_M, float(np.nanmedian(depth))
    share = float(((depth >= near) & (depth <= far)).mean())
    inside = f"median {median:.3g}, {share:.1%} in {near:g} to {far:g} m, which 4DS measures of ScanNet"
    return [
        ("shape", depth.shape == tuple(clip), f"T H W = {depth.shape}, the clip has {tuple(clip)}"),
        ("finite", bool(finite), "all depths are numbers" if finite else "some depths are no numbers"),
        ("range", near <= median <= far, inside),
    ]


def deviations_of(encoder: nn.Module, readout: ReleasedReadout) -> list[str]:
    """Where the file differs in shape from the released one, in words."""
    released, block = RELEASED_ENCODER, encoder.blocks[0]
    shape = (encoder.clip, encoder.patch, encoder.width, encoder.depth, block.heads, block.mlp_in.out_features)
    deviations = []
    if shape != (released.clip, released.patch, released.width, released.depth, released.heads, released.mlp):
        deviations.append("an encoder of another shape than 4DS-B-dist-e")
    if changed := [name for name, value in RELEASED_READOUT.items() if readout.settings[name] != value]:
        words = (f"{name} {readout.settings[name]}, released {RELEASED_READOUT[name]}" for name in changed)
        deviations.append(f"a readout of another shape than the released one: {', '.join(words)}")
    return deviations


def draw(folder: Path, frames: np.ndarray, depth: np.ndarray) -> None:
    """`depth.mp4`, all frames beside their depths, and `sheet.png`, some of them above each other."""
    grey = np.clip(np.nan_to_num(depth / max(np.nanmax(depth), 1e-6)), 0, 1)
    pictures = np.concatenate([frames, (255 * grey).round().astype(np.uint8)[..., None].repeat(3, -1)], 2)  # T H 2W 3
    video.encode(folder / "depth.mp4", pictures, rate_hz=MOVIE_HZ, crf=18, gop=len(pictures))
    chosen = np.linspace(0, len(pictures) - 1, SHEET_FRAMES).round().astype(int)
    Image.fromarray(np.concatenate(list(pictures[chosen]))).save(folder / "sheet.png")
