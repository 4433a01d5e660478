"""The depth demo: the official output on small random weights; the whole command on a file of the released layout."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import invoke, refused_command
from PIL import Image
from readout.official import BACKBONE, DEPTH, HERE, arrays_of

from scaling4d import video
from scaling4d.records import UserError
from scaling4d.reproduce import depth_demo
from scaling4d.reproduce.depth_demo import checks_of, deviations_of, load_released, predict_depth, read_demo_clip

CLIP = (6, 32, 48)  # of the fixture


def test_depth_is_that_of_the_official_code(agree: Callable[[str, float, float], None]) -> None:
    io = arrays_of(HERE / "4ds_seed0/depth_io.npz")
    depth = predict_depth(*load_released(DEPTH), torch.from_numpy(io["video"]))
    assert depth.shape == (2, *CLIP)
    agree("depth_demo output", np.abs(depth - io["output"].reshape(depth.shape)).max(), 1e-5)


def test_frames_are_the_first_ones_by_lanczos(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3)).astype(np.uint8)
    video.encode(tmp_path / "a.mp4", pixels, rate_hz=10, crf=1, gop=3)
    frames = read_demo_clip(tmp_path / "a.mp4", CLIP)[0].numpy()
    _, third = list(video.decode_frames(tmp_path / "a.mp4"))[2]
    assert frames.shape == (*CLIP, 3)
    assert np.array_equal(frames[2], np.asarray(Image.fromarray(third).resize((48, 32), Image.Resampling.LANCZOS)))
    with pytest.raises(UserError, match="a.mp4: too short: 9 frames, 0.90 s; needed 16 frames from start_s = 0; "):
        read_demo_clip(tmp_path / "a.mp4", (16, 32, 32))
    with pytest.raises(UserError, match="^no file "):
        read_demo_clip(tmp_path / "b.mp4", CLIP)


def test_checks_fail_for_another_shape_for_no_numbers_and_out_of_range() -> None:
    def holds(depth: np.ndarray) -> list[bool]:
        return [held for _, held, _ in checks_of(depth, CLIP)]

    depth = np.full(CLIP, 2.0)
    assert holds(depth) == [True, True, True] and holds(depth[1:]) == [False, True, True] and not holds(-depth)[2]
    depth[0, 0, 0] = np.nan
    assert holds(depth) == [True, False, True]


def test_the_released_shapes_are_no_deviation() -> None:
    encoder, readout, _ = load_released(DEPTH)
    assert deviations_of(encoder, readout)[0] == "an encoder of another shape than 4DS-B-dist-e"
    encoder.clip, encoder.patch, encoder.width, encoder.depth = (16, 224, 224), (2, 16, 16), 768, 12
    block = encoder.blocks[0]
    block.heads, block.mlp_in = 12, torch.nn.Linear(768, 3072)
    readout.settings.update(width=1024, heads=16, queries=6272, out=128, frames=16)
    assert deviations_of(encoder, readout) == []
    for heads, mlp in ((6, 3072), (12, 1536)):
        block.heads, block.mlp_in = heads, torch.nn.Linear(768, mlp)
        assert deviations_of(encoder, readout) == ["an encoder of another shape than 4DS-B-dist-e"]


def test_the_whole_command_on_a_file_of_the_released_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ramp = np.linspace(0, 255, 8 * 64 * 64 * 3).astype(np.uint8).reshape(8, 64, 64, 3)
    video.encode(tmp_path / "a.mp4", ramp, rate_hz=10, crf=20, gop=8)

    words = ("reproduce", "depth_demo", "--weights", DEPTH)
    done = invoke(*words, "--video", "a.mp4")
    assert "no number is published" in done.stdout and "not the released file: an encoder of another shape" in done.stdout
    assert "ok     shape: T H W = (6, 32, 48)" in done.stdout and done.exit_code == int("FAILED" in done.stdout)
    folder = Path("artifacts/reproduced/depth_demo")
    result = json.loads((folder / "result.json").read_text())
    assert "verdict" not in result and len(result["weights"]["sha256"]) == len(result["video"]["sha256"]) == 64
    assert np.load(folder / "depth.npz")["depth"].shape == CLIP
    assert Image.open(folder / "sheet.png").size == (2 * 48, depth_demo.SHEET_FRAMES * 32)
    assert len(list(video.decode_frames(folder / "depth.mp4"))) == 6
    without = refused_command(*words[:3], BACKBONE, "--video", "a.mp4", "--out", "other")
    assert "holds no readout; needed that of depth" in without and not Path("other").exists()
    assert "--video (not given)" in refused_command(*words)
    seeded = refused_command(*words, "--video", "a.mp4", "--seed", 0, "--out", "other")
    assert seeded == "depth_demo takes --video and --weights; leave out --seed"
