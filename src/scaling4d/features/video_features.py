"""VIDEOS -> FEATURES: an encoder over whole videos, and a folder with one safetensors file a video and index.json.

A file holds `layer_00` ... (`W N D`, or `W D` where pooled), `start_s` and `end_s` (`W`), and `frame_s` (`W T`) of W
windows; times are float64, in seconds after the video's first frame.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scaling4d import __version__, video
from scaling4d.clips.sources import SourceFile, list_sources
from scaling4d.encoders.encoder import Encoder
from scaling4d.encoders.preprocess import FITS
from scaling4d.encoders.pretrained import set_clip
from scaling4d.features.pca import write_pca_video
from scaling4d.features.windows import NO_RATE, WindowSettings, batches, read_windows
from scaling4d.provenance import differences, work_folder, write_text
from scaling4d.records import UserError, file_system_errors, json_text, on_one_line, read_json_object, shortened
from scaling4d.video import VideoError, VideoInput

INDEX = "index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class FeatureSettings:
    """Which features of which windows.

    layers: numbers of blocks after which tokens are taken, 0 (the embedded tokens) to the encoder's depth.
    tokens: all tokens; false: their mean. dtype: of DTYPES, of matrix products and of the files.
    """

    windows: WindowSettings
    layers: tuple[int, ...]
    tokens: bool
    dtype: str


@dataclass
class StoredVideos:
    """What a call of `write_features_of_videos` did. problems: by video, why it has no features."""

    written: int = 0
    present: int = 0
    problems: dict[str, str] = field(default_factory=dict)


def run(
    checkpoint: str, paths: Sequence[Path], out: Path, *, batch: int, device: str, pca: Path | None, **options: Any
) -> StoredVideos:
    """Command `features`. device: empty: the GPU, if there is one. pca: see features.pca. options: of bind_features."""
    videos = videos_at(paths, out)
    needs = {"an .mp4 to write": pca and pca.suffix == ".mp4", "--tokens": options["tokens"], "one video": len(videos) == 1}
    if pca is not None and (lacking := [need for need, met in needs.items() if not met]):
        raise UserError(f"--pca {pca} with {len(videos)} videos; needed {' and '.join(lacking)}")
    if pca is not None and pca.exists():
        raise UserError(f"{pca} exists; choose another name or remove it")
    try:
        place = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        raise UserError(f"--device {device}: {shortened(error)}") from error
    encoder = Encoder.from_pretrained(checkpoint)
    settings = bind_features(encoder, **options)
    if pca is not None and settings.layers[-1] != encoder.depth:
        raise UserError(f"--pca draws the last layer; give --layer {encoder.depth} too, or no --layer")
    result = write_features_of_videos(encoder, videos, out, settings, batch=batch, device=place)
    if pca is not None and not result.problems:
        ((name, source),) = videos
        layer = f"layer_{encoder.depth:02d}"
        write_pca_video(out / f"{name}.safetensors", layer, source, pca, windows=settings.windows, grid=encoder.grid)
        print(f"wrote {pca}")
    return result


def bind_features(
    encoder: Encoder,
    *,
    layers: Sequence[int],
    tokens: bool,
    dtype: str,
    rate_hz: float | None,
    frames: int | None,
    side_px: int | None,
    stride_s: float | None,
    fit: str,
) -> FeatureSettings:
    """Settings with the encoder's own values where None is given; stride_s: a window's length. Resizes the encoder.

    layers: empty: the last. Raises UserError: no rate, or a value that does not suit the encoder.
    """
    rate_hz = encoder.rate_hz if rate_hz is None else rate_hz
    if rate_hz is None:
        raise UserError(NO_RATE)
    for option, value in (("--rate-hz", rate_hz), ("--stride", stride_s)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{option} = {value}; needed a finite number, more than 0")
    set_clip(encoder.model, frames=frames or 0, side_px=side_px or 0)
    stride_s = encoder.clip[0] / rate_hz if stride_s is None else stride_s
    for option, value, known in (("--dtype", dtype, DTYPES), ("--fit", fit, FITS)):
        if value not in known:
            raise UserError(f"{option} = {value}; needed {', '.join(known)}")
    layers = tuple(sorted(set(layers))) or (encoder.depth,)
    if not 0 <= layers[0] <= layers[-1] <= encoder.depth:
        raise UserError(f"--layer = {', '.join(map(str, layers))}; needed 0 (embedded tokens) to {encoder.depth} (last block)")
    return FeatureSettings(WindowSettings(encoder.clip, rate_hz, stride_s, fit, encoder.resample), layers, tokens, dtype)


def videos_at(paths: Sequence[Path], out: Path) -> list[tuple[str, VideoInput | str]]:
    """(name, file or the reason why there is none) of the given files and of all files below the given folders.

    A name is a path below the folder, of a member of a tar too. A path that is given twice counts once.
    Raises UserError: no such path, two videos of one name, or `out` inside a folder of videos.
    """
    videos: dict[str, VideoInput | str] = {}
    for path in {(path.resolve(), path.name): path for path in paths}.values():
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise UserError(f"{out} lies in {path}, whose files are videos; write --out elsewhere")
        sources = list_sources(path) if path.is_dir() else [SourceFile(path.name)]
        if not path.is_dir() and not path.is_file():
            raise UserError(f"no file or folder {path}")
        for source in sources:
            if source.path in videos:
                raise UserError(f"two videos are called {source.path}, one in {path}; give a folder above both, or another --out")
            root, refused = (path if path.is_dir() else path.parent), source.refused
            reason = refused and ": ".join(filter(None, (refused.reason, refused.detail)))
            outside = ".." in Path(source.path).parts
            videos[source.path] = reason or ("its name leads out of its folder" if outside else source.location(root))
    return list(videos.items())


def write_features_of_videos(
    encoder: Encoder,
    videos: Sequence[tuple[str, VideoInput | str]],
    out: Path,
    settings: FeatureSettings,
    *,
    batch: int,
    device: torch.device,
) -> StoredVideos:
    """Write features of each video to `<out>/<name>.safetensors`, and `index.json` with the settings and all videos.

    A file appears when its video is done. A later call with equal settings leaves out videos that are there and have
    the same bytes. Videos that cannot be read are problems; the others are done.
    Raises UserError: `out` holds features of other settings, or is no such folder.
    """
    from rich.console import Console
    from rich.progress import Progress

    description = json.loads(json_text(_description(encoder, settings)))
    digest = hashlib.sha256(json_text(description).encode()).hexdigest()
    entries, result = _entries(out, description), StoredVideos()
    encoder.to(device)
    console = Console(stderr=True)
    with file_system_errors(out), Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / INDEX, json_text({"settings": description, "videos": entries}))
        files, seconds = bar.add_task("videos", total=len(videos)), bar.add_task("seconds")
        try:
            for name, source in videos:
                path = out / f"{name}.safetensors"
                try:
                    if isinstance(source, str):
                        raise VideoError(source)
                    made_by = {"settings_sha256": digest, "video_sha256": video.sha256(source)}
                    entry = _read_entry(path, made_by)
                    if entry is None:
                        with video.open_video(source) as opened:
                            duration_s = opened.duration_s
                        bar.reset(seconds, total=duration_s or None, description=on_one_line(name).replace("[", r"\["))
                        show = partial(bar.update, seconds)
                        entry = write_video_features(encoder, source, path, settings, made_by=made_by, batch=batch, report=show)
                        result.written += 1
                        end_s = min(entry["end_s"], duration_s or entry["end_s"])
                        print(on_one_line(f"{name}: {entry['windows']} windows, 0 to {end_s:.2f} s of {duration_s:.2f} s"))
                    else:
                        result.present += 1
                    entries[name] = entry
                except (VideoError, OSError) as error:
                    if isinstance(error, OSError) and not _is_of_video(error, path):
                        raise
                    entries.pop(name, None)
                    result.problems[name] = str(error)
                    print(f"problem: {on_one_line(f'{name}: {error}')}")
                bar.advance(files)
        finally:
            write_text(out / INDEX, json_text({"settings": description, "videos": entries}))
    return result


def _is_of_video(error: OSError, path: Path) -> bool:
    """Whether the video is to blame, and not the folder of the features: its name is too long, or it cannot be read.

    A failed write, of a full disk, names no file.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return False
    return error.errno == errno.ENAMETOOLONG or not str(error.filename).startswith(str(path.parent))


@torch.no_grad()
def write_video_features(
    encoder: Encoder,
    source: VideoInput,
    path: Path,
    settings: FeatureSettings,
    *,
    made_by: Mapping[str, str],
    batch: int,
    report: Callable[..., object] = dict,
) -> dict[str, Any]:
    """Features of one video, in one pass; memory holds two batches. Returns its entry in index.json.

    made_by: for the file's metadata. report: receives `completed=`, the end of the windows so far in seconds.
    Raises VideoError: as read_windows, or the video is shorter than a window; no file is written then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    windows = settings.windows
    with work_folder(".features", path.parent) as folder, ExitStack() as stack:
        growing = [GrowingTensor(stack.enter_context((folder / f"layer_{n:02d}").open("w+b"))) for n in settings.layers]
        frame_s, start_s = [], []
        for clips in batches(read_windows(source, windows), batch):
            pixels = torch.stack([window.pixels for window in clips])
            for tensor, rows in zip(growing, _features_of(encoder, pixels.to(encoder.device), settings), strict=True):
                tensor.append(rows)
            start_s += [window.start_s for window in clips]
            frame_s.append(torch.tensor([window.frame_s for window in clips], dtype=torch.float64))  # B T
            report(completed=start_s[-1] + windows.length_s)
        if not start_s:
            needed = f"{windows.length_s:.2f} s, {windows.clip[0]} frames at {windows.rate_hz:g} Hz"
            raise VideoError(f"too short: needed {needed}; lower --frames or raise --rate-hz")
        starts = torch.tensor(start_s, dtype=torch.float64)
        times = {"start_s": starts, "end_s": starts + windows.length_s, "frame_s": torch.cat(frame_s)}
        for name, values in times.items():
            growing.append(GrowingTensor(stack.enter_context((folder / name).open("w+b"))))
            growing[-1].append(values)
        metadata = {**made_by, "windows": str(len(start_s)), "end_s": str(start_s[-1] + windows.length_s)}
        join_tensors(folder / "joined", growing, metadata)
        (folder / "joined").replace(path)
    return _entry(metadata)


def _features_of(encoder: Encoder, pixels: Tensor, settings: FeatureSettings) -> list[Tensor]:
    """Features of a batch of windows, a tensor a layer. Raises UserError: no memory, or not finite."""
    dtype, features = DTYPES[settings.dtype], []
    try:
        with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            states = encoder(pixels).block_outputs
    except torch.OutOfMemoryError as error:
        raise UserError(f"no memory for {len(pixels)} windows at once ({shortened(error)}); lower --batch") from error
    for layer in settings.layers:
        features.append((states[layer] if settings.tokens else states[layer].float().mean(1)).to(dtype).cpu())
        if not features[-1].isfinite().all():
            raise UserError(f"layer {layer} has values that are NaN or beyond {settings.dtype}; choose another --dtype")
    return features


class GrowingTensor:
    """A tensor in an open file, to which rows are appended. Its name is the file's."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.rows, self.bytes = file, 0, 0
        self.row_shape: tuple[int, ...] = ()
        self.dtype = torch.float32

    def append(self, rows: Tensor) -> None:
        self.row_shape, self.dtype, self.rows = tuple(rows.shape[1:]), rows.dtype, self.rows + len(rows)
        self.bytes += self.file.write(rows.contiguous().view(torch.uint8).numpy().data)


def join_tensors(path: Path, tensors: Sequence[GrowingTensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose tensors need not fit into memory. Wide types come first: all are aligned."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header, offset = {"__metadata__": dict(metadata)}, 0
    for tensor in ordered:
        place = {"shape": [tensor.rows, *tensor.row_shape], "data_offsets": [offset, offset + tensor.bytes]}
        header[Path(tensor.file.name).name] = {"dtype": SAFETENSORS_NAMES[tensor.dtype]} | place
        offset += tensor.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as joined:
        joined.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered:
            tensor.file.seek(0)
            shutil.copyfileobj(tensor.file, joined, 2**20)


def _description(encoder: Encoder, settings: FeatureSettings) -> dict[str, Any]:
    """Everything that features depend on, except rounding by the batch's size and the device."""
    weights = hashlib.sha256()
    for name, weight in encoder.state_dict().items():
        weights.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        weights.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    checkpoint, windows = encoder.checkpoint, settings.windows
    return {
        "encoder": {"name": checkpoint.name, "model": checkpoint.model, "weights_sha256": weights.hexdigest()}
        | {"settings": checkpoint.settings, "grid": encoder.grid, "width": encoder.width, "depth": encoder.depth},
        "windows": asdict(windows),
        "versions": {"scaling4d": __version__, "torch": torch.__version__},
        "features": {"layers": settings.layers, "pooling": "none" if settings.tokens else "mean", "dtype": settings.dtype},
    }


def _entries(out: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """Videos of the index in a folder. Raises UserError: the folder is of other settings, or holds other files."""
    path = out / INDEX
    if not path.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and has no {INDEX}; choose a new folder as --out")
        return {}
    try:
        content = read_json_object(path)
        old, entries = dict(content["settings"]), dict(content["videos"])
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}; remove it, with its folder") from error
    changed = [f"{key}: {one} there, {other} now" for key, one, other in differences(old, description)]
    if changed:
        raise UserError(f"{out} holds features of other settings ({'; '.join(changed[:3])}); choose another --out")
    return entries


def _read_entry(path: Path, made_by: Mapping[str, str]) -> dict[str, Any] | None:
    """The index's entry of a finished file; None: there is none of this video and these settings."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return _entry(metadata) if made_by.items() <= metadata.items() else None


def _entry(metadata: Mapping[str, str]) -> dict[str, Any]:
    return {"windows": int(metadata["windows"]), "end_s": float(metadata["end_s"]), "video_sha256": metadata["video_sha256"]}
