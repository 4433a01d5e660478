"""CHECKPOINT, VIDEO -> FEATURES: every layer of an encoder, and what its readout says, as one `.npz`."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from scaling4d import video
from scaling4d.encoders.arrays import new, write_npz
from scaling4d.encoders.features import layer_index
from scaling4d.encoders.pretrained import load_encoder
from scaling4d.readout import released
from scaling4d.records import UserError
from scaling4d.show import trained


@dataclass(frozen=True)
class Attached:
    """A readout with its weights. says: encoder, layers, clips, queries -> output. fixed: for clips of one size only."""

    says: Callable[[nn.Module, list[Tensor], Tensor, Tensor | None], Tensor]
    fixed: bool


@torch.no_grad()
def features(folder: Path, source: Path, out: Path, *, side_px: int | None, queries: Path | None) -> list[str]:
    """Write `layer_00` ... `layer_LL`, each `B N D`, and `output` where the folder has a readout; return their names.

    Args:
        folder: a Checkpoint folder, or that of a frozen readout in artifacts/, with whose encoder it then works.
        source: a video file, of which the first frames are taken and resized to the checkpoint's clip, or a `.npy` of
          clips `B T H W C`, float in 0..1 or uint8, taken as they are.
        side_px: of the clips made from a video file, instead of the checkpoint's.
        queries: `.npy`, `Q 2` or `Q 4` in 0..1, for a readout that tracks.
    Positions are resized where the clip has another size than the checkpoint's; a readout of fixed places refuses such a clip.
    Raises:
        UserError: `out` exists, not a checkpoint, not clips, values outside 0..1, a video that is too short, or queries that do
            not fit.
    """
    with new(out) as partial:
        arrays = _features(folder, source, side_px=side_px, queries=queries)
        write_npz(partial, arrays.items())
    return list(arrays)


def _features(folder: Path, source: Path, *, side_px: int | None, queries: Path | None) -> dict[str, np.ndarray]:
    if (folder / "result.json").is_file():
        encoder, readout = _trained(folder)
    else:
        encoder, readout = load_encoder(folder).eval(), _converted(folder)
    native = encoder.clip
    asked = None if queries is None else torch.from_numpy(_array(queries, axes=2).astype(np.float32))[None]
    if asked is not None and not ((asked >= 0) & (asked <= 1)).all():
        raise UserError(f"{queries}: values from {asked.min():g} to {asked.max():g}; needed places in 0..1 of the picture")
    pixels = _clips(source) if source.suffix == ".npy" else _first_clip(source, encoder.clip, side_px)
    if hasattr(encoder, "resize"):
        encoder.resize(tuple(pixels.shape[1:4]))
    elif tuple(pixels.shape[1:4]) != encoder.clip:
        raise UserError(f"{source}: clips T H W = {tuple(pixels.shape[1:4])}; this encoder takes {encoder.clip} only")
    if readout and readout.fixed and encoder.clip != native:
        raise UserError(f"{source}: clips T H W = {encoder.clip}; this readout answers for {native} only")
    layers = encoder.features(pixels)
    arrays = {f"layer_{i:02d}": layer.numpy() for i, layer in enumerate(layers)}
    if readout:
        arrays["output"] = readout.says(encoder, layers, pixels, asked).numpy()
    return arrays


def _converted(folder: Path) -> Attached | None:
    """The readout that a converted file brought along."""
    described = released.read_readout(folder)
    if described is None:
        return None
    head = released.load_readout(folder, described)
    return Attached(
        lambda encoder, layers, pixels, asked: released.output(encoder, layers, pixels, described, head, asked),
        fixed=described.kind == "depth",
    )


def _trained(folder: Path) -> tuple[nn.Module, Attached]:
    """The encoder and the readout that the `readout` stage trained on it.

    Its output: class scores, boxes `B Q T 4`, metres `B T H W`, points `B Q T 4`, or the pose `B 3 4`.
    """
    readout = trained.read(folder)
    task, fraction = readout.result.task, readout.evaluation.depth_fraction

    def output(encoder: nn.Module, layers: list[Tensor], pixels: Tensor, asked: Tensor | None) -> Tensor:
        wanted = {"points": 2, "boxes": 4}.get(task)
        if wanted and (asked is None or asked.shape[-1] != wanted):
            raise UserError(f"the readout {task} is asked about things in the first frame, Q {wanted} in 0..1; correct --queries")
        t, h, w = encoder.grid
        features = layers[layer_index(depth=encoder.depth, fraction=fraction)].reshape(len(pixels), t, h * w, -1)
        given = None if asked is None else asked.expand(len(pixels), -1, -1)[:, :, None]
        return readout.probe.predict(features, {"depth_m": pixels[..., 0], "points": given, "boxes": given})

    return readout.encoder, Attached(output, fixed=True)


def _clips(source: Path) -> Tensor:
    array = _array(source, axes=5)
    if array.shape[-1] != 3 or not array.size or array.dtype not in (np.uint8, np.float16, np.float32, np.float64):
        raise UserError(f"{source} is {array.dtype} {array.shape}; needed B T H W 3, float in 0..1 or uint8")
    if array.dtype == np.uint8:
        return torch.from_numpy(array)
    array = array.astype(np.float32)
    if not (array.min() >= 0 and array.max() <= 1):  # false for what is not a number, too
        raise UserError(f"{source}: values from {array.min()} to {array.max()}; needed floats in 0..1, or uint8")
    return torch.from_numpy(array)


def _array(path: Path, *, axes: int) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a .npy of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "uif" or array.ndim != axes:
        raise UserError(
            f"{path} holds {getattr(array, 'dtype', 'no')} numbers {getattr(array, 'shape', '')}; needed numbers in {axes} axes"
        )
    return array


def _first_clip(source: Path, clip: tuple[int, int, int], side_px: int | None) -> Tensor:
    """uint8 `1 T H W 3`: the first T frames, each resized as a whole to H W (bicubic, antialiased)."""
    T, height, width = clip if side_px is None else (clip[0], side_px, side_px)
    pictures = []
    for _, picture in video.frames(source):
        pictures.append(np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)))
        if len(pictures) == T:
            return torch.from_numpy(np.stack(pictures))[None]
    raise UserError(f"{source} has {len(pictures)} frames; needed {T}, the checkpoint's clip")
