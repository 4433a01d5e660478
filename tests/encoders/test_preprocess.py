"""Videos of any size, rate and type become clips, and what is none is refused with its remedy."""

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.encoder import Encoder
from scaling4d.encoders.preprocess import FITS, resize_and_crop
from scaling4d.mae.encoder import PixelTokens, PixelTokensConfig

FRAMES, HEIGHT, WIDTH = CLIP = (4, 16, 24)
RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (*CLIP, 3), np.uint8)
FLOATS = BYTES / np.float32(255)


@pytest.fixture
def encoder() -> Encoder:
    config = {"clip": CLIP, "patch": (1, 8, 8), "pixel_mean": 0.0, "pixel_scale": 1.0}
    return Encoder(PixelTokens(PixelTokensConfig(**config)), Checkpoint("pixels", "PixelTokens", config, 0, 0, 0, rate_hz=4.0))


def test_clips_that_fit_are_left_as_they_are_from_numpy_and_torch(encoder: Encoder) -> None:
    for video in (BYTES, BYTES[::-1].copy()[::-1], torch.from_numpy(BYTES)):
        assert torch.equal(encoder.preprocess(video), torch.from_numpy(BYTES)[None])
    for kind in (np.float32, np.float64, ">f4"):
        clips = encoder.preprocess(FLOATS.astype(kind))
        assert clips.dtype == torch.float32 and torch.equal(clips, torch.from_numpy(FLOATS)[None])
    assert encoder.preprocess(torch.from_numpy(FLOATS).half()).dtype == torch.float32
    frozen = BYTES.copy()
    frozen.flags.writeable = False
    assert torch.equal(encoder.preprocess(frozen)[0], torch.from_numpy(BYTES))


def test_one_clip_many_and_lists_of_them_become_one_batch(encoder: Encoder) -> None:
    batch = np.stack([BYTES, BYTES[::-1]])
    assert torch.equal(encoder.preprocess(batch), torch.from_numpy(batch))
    large = np.repeat(np.repeat(BYTES, 2, 1), 2, 2)
    assert encoder.preprocess([BYTES, large, batch]).shape == (4, *CLIP, 3)


def test_pictures_are_cut_around_their_centre_and_resized(encoder: Encoder) -> None:
    wide = np.zeros((FRAMES, 32, 148, 3), np.uint8)
    wide[:, :, 50:98] = np.repeat(np.repeat(BYTES // 2 + 64, 2, 1), 2, 2)  # 32 x 48 in its middle
    clips = encoder.preprocess(wide)
    assert clips.shape == (1, *CLIP, 3) and clips.dtype == torch.uint8 and clips.min() > 20
    floats = encoder.preprocess(wide / 255)
    assert torch.allclose(floats * 255, clips.float(), atol=0.51) and 0 <= floats.min() <= floats.max() <= 1
    plain = np.full((FRAMES, 7, 5, 3), 77, np.uint8)
    assert (encoder.preprocess(plain) == 77).all()
    assert encoder.preprocess(np.zeros((FRAMES, 1, 9999, 3), np.uint8)).shape == (1, *CLIP, 3)


@pytest.mark.parametrize(("name", "mode", "antialias"), [("bicubic", "bicubic", True), ("bilinear", "bilinear", True),
                                                         ("bilinear, aliased", "bilinear", False)])  # fmt: skip
def test_a_filter_is_that_of_resizing_the_whole_picture_and_cutting_out_its_centre(name: str, mode: str, antialias: bool) -> None:
    wide = torch.from_numpy(RNG.random((2, 3, 48, 144), np.float32))  # B C H W
    expected = F.interpolate(wide, (16, 48), mode=mode, antialias=antialias)[..., 12:36].clamp(0, 1)
    cut = resize_and_crop(wide.movedim(1, -1)[:, None], 16, 24, name)[:, 0].movedim(-1, 1)
    inner = slice(2, -2) if antialias else slice(None)  # an antialiased filter sees beyond the cut
    assert torch.allclose(cut[..., inner], expected[..., inner], atol=1e-5)
    resized = F.interpolate(wide, (16, 48), mode=mode, antialias=antialias).clamp(0, 1)  # of its short side 14 are shown
    shown = FITS["inner"](wide.movedim(1, -1)[:, None], 14, 14, name)[:, 0].movedim(-1, 1)
    assert torch.allclose(shown[..., inner, inner], resized[..., 1:15, 17:31][..., inner, inner], atol=1e-5)
    pictures = [Image.fromarray((255 * one.movedim(0, -1)).byte().numpy()) for one in wide]
    if antialias:  # as Pillow
        shown = resize_and_crop(torch.from_numpy(np.stack(pictures))[:, None], 16, 48, name)[:, 0]
        resized = np.stack([picture.resize((48, 16), Image.Resampling[mode.upper()]) for picture in pictures])
        assert (shown.int() - torch.from_numpy(resized).int()).abs().max() <= 1


def test_a_squashed_picture_is_pillows(encoder: Encoder) -> None:
    """As the demos of 4DS and RVM show it, smaller and larger."""
    pictures = RNG.integers(0, 256, (2, 37, 90, 3), np.uint8)
    for height, width in ((16, 24), (64, 48), (37, 90)):
        expected = [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.LANCZOS)) for one in pictures]
        shown = FITS["squash"](torch.from_numpy(pictures)[None], height, width)[0]
        assert (shown.int() - torch.from_numpy(np.stack(expected)).int()).abs().max() <= 1
    with FakeTensorMode():
        assert FITS["squash"](torch.empty(1, 2, 37, 90, 3, device="cuda"), 16, 24).device.type == "cuda"
    clip = encoder.preprocess(np.concatenate([pictures] * 2) / 255, fit="squash")
    assert clip.shape == (1, *CLIP, 3) and 0 <= clip.min() <= clip.max() <= 1
    assert refused(encoder.preprocess, BYTES, fit="stretch") == "fit = 'stretch'; needed crop, inner, pad, squash"


def test_frames_are_picked_at_the_rate_of_the_clips(encoder: Encoder) -> None:
    video = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((HEIGHT, WIDTH, 3), np.uint8)
    for rate_hz, expected in (
        (4, [0, 1, 2, 3]),
        (8, [0, 2, 4, 6]),
        (30, [0, 7, 15, 22]),
        (2, [0, 0, 1, 1]),
        (29.97, [0, 7, 15, 22]),
    ):
        assert encoder.preprocess(video, rate_hz=rate_hz)[0, :, 0, 0, 0].tolist() == expected
    encoder.rate_hz = 1000.0
    for rate_hz, expected in ((1000, [0, 1, 2, 3]), (4000, [0, 4, 8, 12]), (12000, [0, 12, 24, 36])):
        assert encoder.preprocess(video, rate_hz=rate_hz)[0, :, 0, 0, 0].tolist() == expected


NEEDED = "needed floats in 0..1, or uint8"
RGB = "needed 3 (red, green, blue) on the last axis"
REFUSED = {  # what arrives -> message
    "path": (
        "video.mp4",
        "video is a str; needed a numpy array or a torch tensor, T H W 3 or B T H W 3; scaling4d.read_video(path) reads one",
    ),
    "no videos": ([], "no video in the list"),
    "mixed": ([BYTES, FLOATS], "videos of a list are some uint8, some float; needed one type"),
    "int64": (BYTES.astype(np.int64), f"video is int64; {NEEDED}; values in 0..255: video.astype(np.uint8)"),
    "torch int32": (torch.from_numpy(BYTES).int(), f"video is int32; {NEEDED}; values in 0..255: video.to(torch.uint8)"),
    "bool": (BYTES > 9, f"video is bool; {NEEDED}; False and True, black and white: 255 * video.astype(np.uint8)"),
    "a list of frames": (
        list(BYTES),
        "video has 3 axes (16, 24, 3); needed T H W 3 or B T H W 3; a list of frames: np.stack(frames)",
    ),
    "grey T H W": (
        torch.from_numpy(BYTES[..., 0]),
        "video has 3 axes (4, 16, 24); needed T H W 3 or B T H W 3; grey frames: video[..., None].repeat_interleave(3, -1)",
    ),
    "three grey frames": (BYTES[:3, ..., :1], f"video (3, 16, 24, 1): 1 channel; {RGB}: np.repeat(video, 3, -1)"),
    "three frames with alpha": (
        np.concatenate([BYTES, BYTES[..., :1]], -1)[:3],
        f"video (3, 16, 24, 4): 4 channels; {RGB}: video[..., :3], without the alpha channel",
    ),
    "six axes": (BYTES[None, None], "video has 6 axes (1, 1, 4, 16, 24, 3); needed T H W 3 or B T H W 3"),
    "T C H W": (
        np.moveaxis(BYTES, -1, -3),
        "video (4, 3, 16, 24): axis -3 has the 3 channels; needed them last, T H W 3 or B T H W 3: np.moveaxis(video, -3, -1)",
    ),
    "B C T H W": (
        torch.from_numpy(BYTES)[None].movedim(-1, 1),
        "video (1, 3, 4, 16, 24): axis -4 has the 3 channels; needed them last, T H W 3 or B T H W 3: video.movedim(-4, -1)",
    ),
    "grey": (BYTES[..., :1], f"video (4, 16, 24, 1): 1 channel; {RGB}: np.repeat(video, 3, -1)"),
    "torch grey": (
        torch.from_numpy(BYTES[..., :1]),
        f"video (4, 16, 24, 1): 1 channel; {RGB}: video.repeat_interleave(3, -1)",
    ),
    "alpha": (
        np.concatenate([BYTES, BYTES[..., :1]], -1),
        f"video (4, 16, 24, 4): 4 channels; {RGB}: video[..., :3], without the alpha channel",
    ),
    "two channels": (BYTES[..., :2], f"video (4, 16, 24, 2): 2 channels; {RGB}"),
    "empty": (BYTES[:0], "video (0, 16, 24, 3) is empty; needed at least one frame of at least one pixel"),
    "0..255": (BYTES.astype(np.float32), f"video has floats from 0 to 255; {NEEDED}; divide by 255"),
    "normalised": (
        FLOATS * 4 - 2,
        f"video has floats from -2 to 2; {NEEDED}; undo any normalisation, the encoder does its own",
    ),
    "overshoot": (FLOATS + np.float32(0.25), f"video has floats from 0.25 to 1.25; {NEEDED}; video.clip(0, 1)"),
    "NaN": (
        np.where(BYTES.max() == BYTES, np.nan, FLOATS),
        f"video has {(BYTES.max() == BYTES).sum()} values that are NaN or infinite; {NEEDED}; leave out or repair their frames",
    ),
    "frames": (
        BYTES[:3],
        "video has 3 frames; needed 4, those of a clip; give a longer video, or call encoder.resize to take clips of 3",
    ),
    "longer": (
        np.concatenate([BYTES, BYTES]),
        "video has 8 frames; needed 4, those of a clip; give rate_hz, the video's rate, to have 4 picked at 4 Hz, "
        "or call encoder.resize to take clips of 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_video_is_refused_with_its_remedy(encoder: Encoder, name: str) -> None:
    video, message = REFUSED[name]
    assert refused(encoder.preprocess, video) == message


def test_a_video_that_is_too_short_at_its_rate_is_refused(encoder: Encoder) -> None:
    message = "video has 4 frames, 0.25 s at 16 Hz; needed 4 frames at 4 Hz, from 13 of the video's; give a longer video"
    assert refused(encoder.preprocess, BYTES, rate_hz=16) == message


def test_an_encoder_without_a_rate_says_how_to_give_one(encoder: Encoder) -> None:
    encoder.rate_hz = None
    message = "video has 8 frames; needed 4, those of a clip; pick 4, or call encoder.resize to take"
    assert refused(encoder.preprocess, np.concatenate([BYTES, BYTES])).startswith(message)
    message = "rate_hz = 8, but the checkpoint does not tell its clips' rate; set encoder.rate_hz, or pick 4"
    assert refused(encoder.preprocess, BYTES, rate_hz=8).startswith(message)
    encoder.rate_hz = 8.0
    assert encoder.preprocess(BYTES, rate_hz=8).shape == (1, *CLIP, 3)


@pytest.mark.parametrize("rate_hz", [-1, 0, "4", [8, 8], float("nan"), float("inf")])
def test_neither_a_video_nor_an_encoder_takes_a_rate_that_is_none(encoder: Encoder, rate_hz: object) -> None:
    message = f"rate_hz = {rate_hz!r}; needed frames per second, a finite number above 0"
    assert refused(setattr, encoder, "rate_hz", rate_hz) == refused(encoder.preprocess, BYTES, rate_hz=rate_hz) == message
    assert encoder.rate_hz == 4.0


def test_the_encoder_itself_refuses_what_preprocessing_refuses(encoder: Encoder) -> None:
    message = "video has floats from 0 to 255; needed floats in 0..1, or uint8; divide by 255"
    assert refused(encoder, BYTES.astype(np.float32)) == message
