"""VIDEO -> CLIPS: arrays of any size, rate and type, checked, and made into the clips that an encoder takes."""

from __future__ import annotations

import math
from functools import partial
from numbers import Real

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scaling4d.records import UserError

TOLERANCE_S = 1.01e-3  # a frame that starts this much after a wanted time counts as shown then, as in video.py
NEEDED = "floats in 0..1, or uint8"
BICUBIC, ALIASED, LANCZOS = "bicubic", "bilinear, aliased", "lanczos"
FILTERS = {BICUBIC: ("bicubic", True), "bilinear": ("bilinear", True), ALIASED: ("bilinear", False)}  # mode, antialias


def check_video(video: object) -> Tensor:
    """A numpy array or a tensor `T H W 3` or `B T H W 3` -> the tensor `B T H W 3`, uint8 or float32 in 0..1.

    Raises UserError: another kind, type or shape, and values outside 0..1.
    """
    if not isinstance(video, np.ndarray | Tensor):
        needed = "needed a numpy array or a torch tensor, T H W 3 or B T H W 3; scaling4d.read_video(path) reads one"
        raise UserError(f"video is a {type(video).__name__}; {needed}")
    numpy, shape, kind = isinstance(video, np.ndarray), tuple(video.shape), str(video.dtype).removeprefix("torch.")
    if not (kind == "uint8" or (video.dtype.kind == "f" if numpy else video.is_floating_point())):
        to_bytes = "video.astype(np.uint8)" if numpy else "video.to(torch.uint8)"
        fix = f"False and True, black and white: 255 * {to_bytes}" if kind == "bool" else f"values in 0..255: {to_bytes}"
        raise UserError(f"video is {kind}; needed {NEEDED}; {fix}")
    if len(shape) not in (4, 5):
        raise UserError(f"video has {len(shape)} axes {shape}; needed T H W 3 or B T H W 3{_axes(shape, numpy)}")
    if shape[-1] != 3:
        raise UserError(f"video {shape}: {_channels(shape, numpy)}")
    if not math.prod(shape):
        raise UserError(f"video {shape} is empty; needed at least one frame of at least one pixel")
    if numpy:
        video = video if kind == "uint8" else video.astype(np.float32, copy=False)
        video = torch.from_numpy(np.require(video, requirements=("C", "W")))
    pixels = video if video.dtype == torch.uint8 else video.float()
    if pixels.dtype == torch.float32:
        _check_values(pixels)
    return pixels if pixels.ndim == 5 else pixels[None]


def _axes(shape: tuple[int, ...], numpy: bool) -> str:
    """How to add the axis that is missing."""
    if len(shape) != 3:
        return ""
    if shape[-1] == 3:
        return f"; a list of frames: {'np' if numpy else 'torch'}.stack(frames)"
    return f"; grey frames: {'np.repeat(video[..., None], 3, -1)' if numpy else 'video[..., None].repeat_interleave(3, -1)'}"


def _channels(shape: tuple[int, ...], numpy: bool) -> str:
    """What is wrong with the last axis, and how to change it."""
    move, times = ("np.moveaxis(video, {}, -1)", "np.repeat(video, 3, -1)") if numpy else ("video.movedim({}, -1)", "")
    for axis in (-3, -4) if shape[-1] not in (1, 4) else ():
        if shape[axis] == 3:
            return f"axis {axis} has the 3 channels; needed them last, T H W 3 or B T H W 3: {move.format(axis)}"
    channels = f"{shape[-1]} channel{'s' * (shape[-1] != 1)}; needed 3 (red, green, blue) on the last axis"
    fixes = {1: times or "video.repeat_interleave(3, -1)", 4: "video[..., :3], without the alpha channel"}
    return f"{channels}{f': {fixes[shape[-1]]}' if shape[-1] in fixes else ''}"


def _check_values(pixels: Tensor) -> None:
    low, high = (bound.item() for bound in pixels.detach().aminmax())  # NaN if one value is
    if low >= 0 and high <= 1:
        return
    if not (math.isfinite(low) and math.isfinite(high)):
        count = int((~pixels.isfinite()).sum())
        raise UserError(f"video has {count:,} values that are NaN or infinite; needed {NEEDED}; leave out or repair their frames")
    if low >= 0 and 1.5 < high <= 255:
        fix = "divide by 255"
    elif low >= -0.5 and high <= 1.5:
        fix = "video.clip(0, 1)"
    else:
        fix = "undo any normalisation, the encoder does its own"
    raise UserError(f"video has floats from {low:g} to {high:g}; needed {NEEDED}; {fix}")


def check_rate(rate_hz: object) -> float:
    """Frames per second. Raises UserError: no finite number above 0."""
    if not (isinstance(rate_hz, Real) and math.isfinite(rate_hz) and rate_hz > 0):
        raise UserError(f"rate_hz = {rate_hz!r}; needed frames per second, a finite number above 0")
    return float(rate_hz)


def pick_frames(pixels: Tensor, frames: int, *, rate_hz: float | None, encoder_rate_hz: float | None) -> Tensor:
    """`B T H W C` -> the frames of a clip, `B frames H W C`.

    rate_hz: of the video; the frames shown at the times of a clip of `encoder_rate_hz` are picked, from the first frame
    on. None: the video already has the frames of a clip.
    Raises UserError: another number of frames, too few of them, a rate that is none, or no rate of the encoder.
    """
    T = pixels.shape[1]
    if rate_hz is None:
        if frames != T:
            fix = f"pick {frames}" if frames < T else "give a longer video"
            if encoder_rate_hz and frames < T:
                fix = f"give rate_hz, the video's rate, to have {frames} picked at {encoder_rate_hz:g} Hz"
            fix = f"{fix}, or call encoder.resize to take clips of {T}"
            raise UserError(f"video has {T} frames; needed {frames}, those of a clip; {fix}")
        return pixels
    check_rate(rate_hz)
    if encoder_rate_hz is None:
        raise UserError(
            f"rate_hz = {rate_hz:g}, but the checkpoint does not tell its clips' rate; "
            f"set encoder.rate_hz, or pick {frames} frames and leave out rate_hz"
        )
    tolerance_s = min(TOLERANCE_S, 0.5 / rate_hz)  # less than a frame of a fast camera
    indices = [int((k / encoder_rate_hz + tolerance_s) * rate_hz) for k in range(frames)]
    if indices[-1] >= T:
        needed = f"{frames} frames at {encoder_rate_hz:g} Hz, from {indices[-1] + 1} of the video's"
        raise UserError(f"video has {T} frames, {T / rate_hz:.2f} s at {rate_hz:g} Hz; needed {needed}; give a longer video")
    return pixels[:, indices]


def resize_and_crop(pixels: Tensor, height: int, width: int, resample: str = BICUBIC, *, share: float = 1.0) -> Tensor:
    """`B T H W C` -> `B T height width C`: the largest centred part of that shape, resized.

    resample: of FILTERS. share: of that part's sides; only its centre of this share is shown.
    """
    H, W = pixels.shape[2:4]
    if (height, width) == (H, W) and share == 1:
        return pixels
    h, w = (max(1, round(share * side)) for side in (min(H, W * height / width), min(W, H * width / height)))
    top, left = (H - h) // 2, (W - w) // 2
    return _resized(pixels[:, :, top : top + h, left : left + w], height, width, resample)


def _resized(pixels: Tensor, height: int, width: int, resample: str) -> Tensor:
    """`B T H W C` -> `B T height width C`, whatever the aspect ratio. resample: of FILTERS, or LANCZOS."""
    B, T, H, W, C = pixels.shape
    x = pixels.flatten(0, 1).movedim(-1, 1).float()  # B*T C H W
    if resample == LANCZOS:
        across, down = _lanczos_weights(W, width).to(x.device), _lanczos_weights(H, height).to(x.device)
        x = down @ _as_pixels(x @ across.T, pixels.dtype).float()  # Pillow rounds after the first axis, too
    elif (height, width) != (H, W):
        mode, antialias = FILTERS[resample]
        x = F.interpolate(x, (height, width), mode=mode, antialias=antialias, align_corners=False)
    return _as_pixels(x, pixels.dtype).movedim(1, -1).reshape(B, T, height, width, C)


def _as_pixels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers in 0..255, or floats in 0..1."""
    return x.clamp(0, 255).round().to(torch.uint8) if dtype == torch.uint8 else x.clamp(0, 1)


def _lanczos_weights(size: int, new: int) -> Tensor:
    """Weights `new size` of a line's pixels, of Pillow's filter LANCZOS, which has three lobes."""
    scale = size / new
    x = (torch.arange(size) + 0.5 - (torch.arange(new)[:, None] + 0.5) * scale) / max(scale, 1.0)
    weights = torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)
    return weights / weights.sum(1, keepdim=True)


def resize_and_pad(pixels: Tensor, height: int, width: int, resample: str = BICUBIC) -> Tensor:
    """`B T H W C` -> `B T height width C`: the whole picture, resized, in the middle of black (0)."""
    H, W = pixels.shape[2:4]
    scale = min(height / H, width / W)
    h, w = min(height, max(1, round(H * scale))), min(width, max(1, round(W * scale)))
    top, left = (height - h) // 2, (width - w) // 2
    return F.pad(resize_and_crop(pixels, h, w, resample), (0, 0, left, width - w - left, top, height - h - top))


def squash(pixels: Tensor, height: int, width: int, resample: str = BICUBIC) -> Tensor:
    """`B T H W C` -> `B T height width C`: all of the picture, by the filter LANCZOS; `resample` is not used.

    Source: the demos of 4DS and RVM (mediapy, which calls Pillow).
    """
    return _resized(pixels, height, width, LANCZOS)


FITS = {  # ways to bring a picture to a clip's shape; all but `squash` keep its aspect ratio
    "crop": resize_and_crop,
    "inner": partial(resize_and_crop, share=7 / 8),  # 224 of 256 pixels: the code of V-JEPA, processors of transformers
    "pad": resize_and_pad,
    "squash": squash,
}
