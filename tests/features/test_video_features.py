"""Whole videos: windows, the store, what continues and what is refused, and components in colours."""

import contextlib
import errno
import json
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import small_encoder
import torch
from clips import small_videos
from clips.small_videos import world
from commands import invoke, refused_command
from safetensors.torch import load_file
from torch import Tensor

from scaling4d import read_video, video
from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.encoder import Encoder
from scaling4d.features import pca, video_features, windows
from scaling4d.features.video_features import GrowingTensor, join_tensors
from scaling4d.features.windows import WindowSettings, read_windows
from scaling4d.records import UserError
from scaling4d.video import VideoError

CLIP, RATE_HZ = (4, 32, 48), 8.0


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return small_encoder.checkpoint(tmp_path / "nano", "Backbone", RATE_HZ, clip=CLIP)


def save(path: Path, frames: int = 50, **more: object) -> Path:
    return small_videos.save(path, more.pop("pixels", world(0, frames, 48, 80)), crf=10, **more)


def forget_rate(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    del config["rate_hz"]
    (checkpoint / "config.json").write_text(json.dumps(config))


def settings_of(**changes: object) -> WindowSettings:
    return WindowSettings(**{"clip": CLIP, "rate_hz": RATE_HZ, "stride_s": 0.5, "fit": "crop"} | changes)


run, refused = partial(invoke, "features"), partial(refused_command, "features")


# ---- windows ----


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.avi", "a.mkv"])
@pytest.mark.parametrize("stride_s", [0.5, 0.2, 0.77])
def test_windows_are_the_clips_that_reading_each_part_gives(tmp_path: Path, name: str, stride_s: float) -> None:
    path = save(tmp_path / name)
    windows = list(read_windows(path, settings_of(stride_s=stride_s)))
    assert [window.start_s for window in windows] == [n * stride_s for n in range(len(windows))]
    assert len(windows) == int((50 / 16 - 3 / RATE_HZ) / stride_s - 1e-6) + 1  # the last frame is shown from 49/16 s on
    encoder = Encoder(small_encoder.model("Backbone", clip=CLIP), Checkpoint("nano", "Backbone", {}, 1, 0, 0))
    for window in windows:
        pixels = read_video(path, start_s=window.start_s, rate_hz=RATE_HZ, frames=CLIP[0])
        assert torch.equal(window.pixels, encoder.preprocess(pixels)[0])
    with pytest.raises(UserError, match="too short"):
        read_video(path, start_s=len(windows) * stride_s, rate_hz=RATE_HZ, frames=CLIP[0])


def test_windows_of_a_variable_frame_rate_have_the_frames_shown_at_their_times(tmp_path: Path) -> None:
    gaps = np.random.default_rng(0).choice([0.02, 0.05, 0.3], 60)
    times_s = np.round(np.cumsum(gaps) - gaps[0], 3)
    path = save(tmp_path / "a.mp4", pixels=world(0, 60, 48, 80), times_s=times_s + 1.5)
    windows, count = list(read_windows(path, settings_of(stride_s=0.3))), 0
    for number, window in enumerate(windows):
        wanted_s = number * 0.3 + np.arange(CLIP[0]) / RATE_HZ
        expected = [max(time_s for time_s in times_s if time_s <= wanted + video.TOLERANCE_S) for wanted in wanted_s]
        assert window.frame_s == pytest.approx(expected, abs=1e-6)
        pixels = read_video(path, start_s=window.start_s, rate_hz=RATE_HZ, frames=CLIP[0])
        assert torch.equal(window.pixels, Encoder.preprocess(FakeEncoder(), pixels)[0])
        count += len(set(window.frame_s)) < CLIP[0]
    assert len(windows) > 15 and 0 < count < len(windows)  # some frames are shown for several times, not in every window


class FakeEncoder:
    clip, rate_hz, resample, device = CLIP, RATE_HZ, "bicubic", torch.device("cpu")


def test_the_picture_is_upright_with_square_pixels_cut_or_between_bars(tmp_path: Path) -> None:
    pixels = np.zeros((12, 48, 96, 3), np.uint8)
    pixels[:, :24] = 240  # the upper half
    path = save(tmp_path / "a.mp4", pixels=pixels, rotation_deg=90)  # a player shows the bright half on the left, 96 by 48
    cut, whole = (next(read_windows(path, settings_of(clip=(2, 32, 32), fit=fit))).pixels[0].float() for fit in ("crop", "pad"))
    assert cut[:, :14].min() > 200 and cut[:, 18:].max() < 40
    assert whole[:, :8].max() == whole[:, 24:].max() == 0  # 16 of 32 columns are the picture
    assert whole[:, 9:14].min() > 200 and whole[:, 18:23].max() < 40


@pytest.mark.parametrize("stride_s", [0.5, 0.2])
def test_memory_does_not_grow_with_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride_s: float) -> None:
    rgb, frames, most = video._rgb, weakref.WeakSet(), []

    def counted(*arguments: object) -> np.ndarray:
        picture = rgb(*arguments).view(Picture)
        frames.add(picture)
        most.append(len(frames))
        return picture

    class Picture(np.ndarray):
        __hash__ = object.__hash__

    monkeypatch.setattr(video, "_rgb", counted)
    for length in (40, 400):
        del most[:]
        windows = sum(1 for _ in read_windows(save(tmp_path / f"{length}.mp4", length), settings_of(stride_s=stride_s)))
        assert windows >= (length / 16 - 0.5) // stride_s and max(most) <= 3, length


def test_a_reader_is_at_most_one_batch_ahead(tmp_path: Path) -> None:
    drawn: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(20):
            drawn.append(number)
            yield number

    for done, batch in enumerate(video_features.batches(numbers(), 3), 1):
        assert len(drawn) <= 3 * (done + 1)
        assert batch == list(range(3 * done - 3, min(3 * done, 20)))


def test_time_stamps_that_go_backwards_are_refused_where_a_format_has_them(tmp_path: Path, monkeypatch) -> None:
    path, time_of = save(tmp_path / "a.mp4"), video._time_s
    monkeypatch.setattr(video, "_time_s", lambda *given: {0.5: 0.3}.get(time_of(*given), time_of(*given)))
    with pytest.raises(VideoError, match=r"^time stamps go backwards: by 0.14 s; write the file anew, as by ffmpeg -i$"):
        list(read_windows(path, settings_of()))


# ---- the store ----


@pytest.mark.parametrize("words", [(), ("--tokens", "--layer", 0, "--layer", 2, "--layer", 3, "--fit", "pad", "--stride", 0.3)])
def test_stored_features_are_those_of_each_window(checkpoint: Path, tmp_path: Path, words: tuple) -> None:
    path, out = save(tmp_path / "videos/sub/a.mp4"), tmp_path / "out"
    assert run(checkpoint, tmp_path / "videos", "--out", out, "--batch", 4, *words).exit_code == 0
    tensors, encoder = load_file(out / "sub/a.mp4.safetensors"), Encoder.from_pretrained(checkpoint)
    layers = ("layer_00", "layer_02", "layer_03") if words else ("layer_03",)
    assert tensors.keys() == {*layers, "start_s", "end_s", "frame_s"}
    assert len(tensors["start_s"]) == (10 if words else 6)
    assert torch.equal(tensors["end_s"], tensors["start_s"] + CLIP[0] / RATE_HZ)
    for row, start_s in enumerate(tensors["start_s"].tolist()):
        clips = encoder.preprocess(read_video(path, start_s=start_s, rate_hz=RATE_HZ, frames=4), fit="pad" if words else "crop")
        with torch.no_grad():
            output = encoder(clips)
        last = output.last_hidden_state if words else output.pooled
        assert torch.allclose(tensors["layer_03"][row], last[0], atol=1e-6)
        if words:
            assert torch.allclose(tensors["layer_00"][row], output.hidden_states[0][0], atol=1e-6)
            assert torch.allclose(tensors["layer_02"][row], output.hidden_states[3][0], atol=1e-6)  # the third block's input
    index = json.loads((out / "index.json").read_text())
    assert index["videos"].keys() == {"sub/a.mp4"} and index["videos"]["sub/a.mp4"]["windows"] == len(tensors["start_s"])
    assert index["settings"]["windows"] == {
        "clip": list(CLIP), "rate_hz": 8.0, "stride_s": 0.3 if words else 0.5, "fit": "pad" if words else "crop",
        "resample": "bicubic",
    }  # fmt: skip


def test_a_terminal_shows_the_video_and_its_progress(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "videos/a.mp4")
    words = (checkpoint, tmp_path / "videos", "--out")
    assert "a.mp4" not in run(*words, tmp_path / "quiet").stderr
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal
    shown = run(*words, tmp_path / "out").stderr
    assert re.search(r"videos.*100%", shown) and re.search(r"a\.mp4.*%", shown)


def test_half_precision_is_computed_and_stored(checkpoint: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.mp4")
    for dtype in ("float32", "bfloat16", "float16"):
        assert run(checkpoint, path, "--out", tmp_path / dtype, "--dtype", dtype).exit_code == 0
    full, *halves = (
        load_file(tmp_path / dtype / "a.mp4.safetensors")["layer_03"] for dtype in ("float32", "bfloat16", "float16")
    )
    assert [half.dtype for half in halves] == [torch.bfloat16, torch.float16]
    assert all(
        torch.allclose(half.float(), full, rtol=0.05, atol=0.05) and not torch.equal(half.float(), full) for half in halves
    )


def test_windows_have_the_frames_and_the_rate_that_are_given(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(checkpoint, save(tmp_path / "a.mp4"), "--out", out, "--frames", 8, "--rate-hz", 5, "--tokens").exit_code == 0
    tensors = load_file(out / "a.mp4.safetensors")
    assert tensors["layer_03"].shape == (2, 4 * 2 * 3, 24) and tensors["end_s"].tolist() == [1.6, 3.2]
    assert run(checkpoint, save(tmp_path / "a.mp4"), "--out", tmp_path / "large", "--side-px", 64, "--tokens").exit_code == 0
    assert load_file(tmp_path / "large/a.mp4.safetensors")["layer_03"].shape == (6, 2 * 4 * 4, 24)


def test_a_broken_video_is_a_line_and_the_others_are_done(checkpoint: Path, tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    save(videos / "a.mp4")
    save(videos / "c.mp4", frames=6)
    shutil.copy(videos / "a.mp4", videos / f"{'f' * 250}.mp4")
    (videos / "b.mp4").write_bytes((videos / "a.mp4").read_bytes()[:3000])
    (videos / "d.txt").write_text("no video")
    result = run(checkpoint, videos, save(tmp_path / "e.mp4"), "--out", out)
    lines = result.output.splitlines()
    assert result.exit_code == 1 and lines[-1] == f"wrote {out}: 2 videos; 0 were there, 4 have problems"
    assert lines[0] == "a.mp4: 6 windows, 0 to 3.00 s of 3.12 s"
    assert lines[1].startswith("problem: b.mp4: not a readable video: ")
    needed = "needed 0.50 s, 4 frames at 8 Hz; lower --frames or raise --rate-hz"
    assert lines[2] == f"problem: c.mp4: too short: {needed}"
    assert lines[3].startswith("problem: d.txt: not a readable video: ")
    assert lines[4].startswith("problem: fff") and "File name too long" in lines[4]
    assert sorted(path.name for path in out.iterdir()) == ["a.mp4.safetensors", "e.mp4.safetensors", "index.json"]
    assert json.loads((out / "index.json").read_text())["videos"].keys() == {"a.mp4", "e.mp4"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_stops_the_command_and_is_no_problem_of_the_video(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out, begun = tmp_path / "out", []

    def full(tensor: GrowingTensor, rows: Tensor) -> None:
        begun.append(tensor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(GrowingTensor, "append", full)
    for name in ("a.mp4", "b.mp4"):
        save(tmp_path / "videos" / name)
    needed = "needed room on its disk; repair that, and the same command continues"
    assert refused(checkpoint, tmp_path / "videos", "--out", out) == f"{out}: {os.strerror(number)}; {needed}"
    assert len(begun) == 1


def test_a_video_that_is_given_twice_is_written_once(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(checkpoint, save(tmp_path / "a.mp4"), "a.mp4", "--out", "out")
    assert result.exit_code == 0 and result.output.splitlines()[-1] == "wrote out: 1 videos; 0 were there, 0 have problems"


def test_a_stopped_command_continues_and_done_videos_are_left_alone(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    videos, out, forward = tmp_path / "videos", tmp_path / "out", Encoder.forward
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        save(videos / name)
    passes: list[int] = []

    def stopping(encoder: Encoder, clips: Tensor) -> object:
        passes.append(len(clips))
        if len(passes) == 5:  # in b.mp4, which has three batches
            raise KeyboardInterrupt
        return forward(encoder, clips)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "forward", stopping)
        with contextlib.suppress(KeyboardInterrupt):
            run(checkpoint, videos, "--out", out, "--batch", 2)
        assert sorted(path.name for path in out.iterdir()) == ["a.mp4.safetensors", "index.json"]
        before = (out / "a.mp4.safetensors").stat().st_mtime_ns
        result = run(checkpoint, videos, "--out", out, "--batch", 2)
    assert result.output.splitlines()[-1] == f"wrote {out}: 2 videos; 1 were there, 0 have problems"
    assert len(passes) == 5 + 6 and (out / "a.mp4.safetensors").stat().st_mtime_ns == before
    whole = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert len(json.loads((out / "index.json").read_text())["videos"]) == len(whole) == 3
    assert all(
        torch.equal(whole["a.mp4.safetensors"][key], whole["b.mp4.safetensors"][key]) for key in whole["a.mp4.safetensors"]
    )
    save(videos / "b.mp4", frames=80)
    (out / "c.mp4.safetensors").write_bytes(b"half of a file")
    result = run(checkpoint, videos, "--out", out)
    assert result.output.splitlines()[-1] == f"wrote {out}: 2 videos; 1 were there, 0 have problems"
    assert (
        len(load_file(out / "b.mp4.safetensors")["start_s"]) == 10 and len(load_file(out / "c.mp4.safetensors")["start_s"]) == 6
    )


def test_the_index_has_the_videos_that_were_done_before_a_stop_and_none_that_is_a_problem_now(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos, out, write_video_features = tmp_path / "videos", tmp_path / "out", video_features.write_video_features
    for name in ("a.mp4", "b.mp4"):
        save(videos / name)

    def stopped(*arguments: object, **options: object) -> object:
        if "b.mp4" in str(arguments[1]):
            raise KeyboardInterrupt
        return write_video_features(*arguments, **options)

    monkeypatch.setattr(video_features, "write_video_features", stopped)
    run(checkpoint, videos, "--out", out)
    indexed = lambda: set(json.loads((out / "index.json").read_text())["videos"])  # noqa: E731
    assert indexed() == {"a.mp4"}
    monkeypatch.undo()
    assert run(checkpoint, videos, "--out", out).exit_code == 0 and indexed() == {"a.mp4", "b.mp4"}
    (videos / "a.mp4").write_bytes(b"no video")
    assert run(checkpoint, videos, "--out", out).exit_code == 1 and indexed() == {"b.mp4"}


def test_features_beyond_a_type_or_the_memory_are_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, forward = save(tmp_path / "a.mp4"), tmp_path / "out", Encoder.forward

    def large(self: Encoder, clips: Tensor) -> object:
        output = forward(self, clips)
        output.hidden_states[2].fill_(1e5)
        return output

    monkeypatch.setattr(Encoder, "forward", large)
    words = (checkpoint, path, "--out", out, "--layer", 1, "--dtype", "float16")
    assert refused(*words) == "layer 1 has values that are NaN or beyond float16; choose another --dtype"
    assert not (out / "a.mp4.safetensors").exists()

    def exhausted(self: Encoder, clips: Tensor) -> object:
        raise torch.OutOfMemoryError("Tried to allocate 34.00 GiB")

    monkeypatch.setattr(Encoder, "forward", exhausted)
    assert refused(*words) == "no memory for 6 windows at once (Tried to allocate 34.00 GiB); lower --batch"


@pytest.mark.parametrize("words", [(), ("--frames", 6, "--side-px", 64, "--rate-hz", 5, "--fit", "squash")])
def test_a_npz_has_every_layer_of_the_first_window(checkpoint: Path, tmp_path: Path, words: tuple) -> None:
    path, encoder = save(tmp_path / "a.mp4"), Encoder.from_pretrained(checkpoint)
    assert run(checkpoint, path, "--out", tmp_path / "x.npz", *words).exit_code == 0
    if words:
        encoder.resize((6, 64, 64))
    pixels = read_video(path, rate_hz=5 if words else RATE_HZ, frames=6 if words else 4)
    with torch.no_grad():
        output = encoder(encoder.preprocess(pixels, fit="squash" if words else "crop"))
    arrays = np.load(tmp_path / "x.npz")
    assert arrays.files == [*(f"layer_{n:02d}" for n in range(4)), "last_hidden_state"]
    assert np.allclose(arrays["last_hidden_state"], output.last_hidden_state, atol=1e-6)
    assert all(np.allclose(arrays[f"layer_{n:02d}"], state, atol=1e-6) for n, state in enumerate(output.hidden_states))


def test_a_npz_of_an_array_takes_it_as_it_is_and_one_of_a_video_needs_a_rate(checkpoint: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 4, 32, 48, 3), np.uint8))
    refusal = refused(checkpoint, tmp_path / "a.npy", "--out", tmp_path / "y.npz", "--side-px", 64)
    as_it_is = f"{tmp_path / 'a.npy'} is taken as it is; leave out --frames, --side-px, --rate-hz and --fit"
    assert refusal == refused(checkpoint, tmp_path / "a.npy", "--out", tmp_path / "y.npz", "--fit", "pad") == as_it_is
    np.save(tmp_path / "queries.npy", np.zeros((1, 2)))
    refusal = refused(checkpoint, tmp_path / "a.npy", "--out", tmp_path / "y.npz", "--queries", tmp_path / "queries.npy")
    assert refusal == f"{checkpoint} has no readout that takes queries; leave out --queries"
    forget_rate(checkpoint)
    assert run(checkpoint, tmp_path / "a.npy", "--out", tmp_path / "z.npz").exit_code == 0
    assert refused(checkpoint, save(tmp_path / "a.mp4"), "--out", tmp_path / "y.npz") == windows.NO_RATE


def test_what_cannot_be_done_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    path, out = save(tmp_path / "videos/a.mp4"), tmp_path / "out"
    assert refused(checkpoint, tmp_path / "none.mp4", "--out", out) == f"no file or folder {tmp_path / 'none.mp4'}"
    other = save(tmp_path / "more/a.mp4")
    twice = f"two videos are called a.mp4, one in {other}; give a folder above both, or another --out"
    assert refused(checkpoint, path, other, "--out", out) == twice
    inside = f"{tmp_path / 'videos/out'} lies in {tmp_path / 'videos'}, whose files are videos; write --out elsewhere"
    assert refused(checkpoint, tmp_path / "videos", "--out", tmp_path / "videos/out") == inside
    assert refused(checkpoint, path, "--out", out, "--layer", 4) == "--layer = 4; needed 0 (embedded tokens) to 3 (last block)"
    assert refused(checkpoint, path, "--out", out, "--dtype", "int8") == "--dtype = int8; needed float32, bfloat16, float16"
    for option in ("--stride", "--rate-hz"):
        assert refused(checkpoint, path, "--out", out, option, 0) == f"{option} = 0.0; needed a finite number, more than 0"
    assert refused(checkpoint, path, "--out", out, "--frames", 5).startswith(
        "clip T H W = (5, 32, 48) does not divide into patches"
    )
    assert refused(checkpoint, path, "--out", out, "--device", "gpu").startswith("--device gpu: ")
    if not torch.cuda.is_available():
        assert refused(checkpoint, path, "--out", out, "--device", "cuda").startswith("--device cuda: ")
    picture = f"--pca {tmp_path / 'p.mp4'} with 1 videos; needed --tokens"
    assert refused(checkpoint, path, "--out", out, "--pca", tmp_path / "p.mp4") == picture
    assert (
        refused(checkpoint, path, "--out", tmp_path) == f"{tmp_path} exists and has no index.json; choose a new folder as --out"
    )
    assert not out.exists()
    assert run(checkpoint, path, "--out", out).exit_code == 0
    changed = f"{out} holds features of other settings (windows.stride_s: 0.5 there, 1.0 now); choose another --out"
    assert refused(checkpoint, path, "--out", out, "--stride", 1) == changed
    forget_rate(checkpoint)
    no_rate = "the checkpoint does not tell its clips' rate; give frames per second with --rate-hz"
    assert refused(checkpoint, path, "--out", out) == windows.NO_RATE == no_rate


# ---- components in colours ----


def test_components_are_those_of_a_decomposition_of_all_tokens(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(20, 6, 5, generator=generator) * torch.tensor([1.0, 5, 0.1, 3, 2]) + 100
    with (tmp_path / "x").open("w+b") as file:
        (growing := GrowingTensor(file)).append(tokens)
        join_tensors(tmp_path / "joined", [growing], {})
    mean, basis = pca.principal_components(tmp_path / "joined", "x")
    x = tokens.flatten(0, 1).double()
    assert torch.allclose(mean, x.mean(0))
    projected = (x - mean) @ basis
    assert torch.allclose(projected.T @ projected / len(x), torch.eye(3, dtype=torch.float64), atol=1e-6)
    _, _, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    cosines = torch.nn.functional.cosine_similarity(axes[:3], basis.T)
    assert torch.allclose(cosines.abs(), torch.ones(3, dtype=torch.float64), atol=1e-6)
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize(("stride", "frames"), [(0.5, 6 * 4), (0.25, 10 * 2 + 4), (0.7, 4 * 4)])
def test_a_video_of_components_shows_each_frame_beside_its_colours(
    checkpoint: Path, tmp_path: Path, stride: float, frames: int
) -> None:
    path, picture = save(tmp_path / "a.mp4"), tmp_path / "pca.mp4"
    words = (checkpoint, path, "--out", tmp_path / "out", "--tokens", "--stride", stride, "--pca", picture)
    result = run(*words)
    assert result.exit_code == 0 and f"wrote {picture}\n" in result.output
    times_s, pixels = video.decode_all(picture)
    assert pixels.shape == (frames, 192, 2 * 288, 3) and times_s[1] == pytest.approx(1 / RATE_HZ, abs=1e-3)
    assert video.probe(picture, sha256="").codec == "h264"
    windows = list(read_windows(path, settings_of(stride_s=stride)))
    for index, shown in ((0, windows[0].pixels[0]), (len(pixels) - 1, windows[-1].pixels[-1])):
        expected = shown.numpy().repeat(6, 0).repeat(6, 1)
        assert np.abs(pixels[index, :, :288].astype(int) - expected).mean() < 4
    assert pixels[:, :, 288:].std() > 10
    assert re.search("exists; choose another name or remove it$", refused(*words))
    picture.unlink()
    again = run(*words)
    assert again.exit_code == 0 and "1 were there" in again.output and np.array_equal(video.decode_all(picture)[1], pixels)
