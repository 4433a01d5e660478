"""`scaling4d bench features`: frames a second of `scaling4d features` beside a plain loop over transformers' VideoMAE.

The encoder is a VideoMAE with random weights. The loop decodes the video once from its start to its end, as we do, and
preprocesses and encodes one window after the other. Both see the same windows of one long video, each in a process of
its own; times include imports and the loading of weights.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from scaling4d.features import video_features
from scaling4d.video import TOLERANCE_S
from scaling4d_bench import devices, measure, videos
from scaling4d_bench.measure import Measurements, Timings
from scaling4d_bench.steps import let_torchvision_load

SIZES = {  # values of VideoMAEConfig
    "base": {},
    "small": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768, "image_size": 112},
}
SECONDS, SIZE_PX = 10.0, (360, 640)  # of the made-up video, which is repeated
OURS, LOOP = "ours", "transformers, a loop"
COLUMNS = measure.SPEED | {"peak MiB": "{peak_mib:.0f}", "difference": "{difference:.4f}"}
COLUMNS = {heading.replace("clips", "frames"): text for heading, text in COLUMNS.items()}
LIBRARIES = ("av", "numpy", "torch", "transformers")


def bench(out: Path, *, source: Path | None, minutes: float, rate_hz: float, size: str, repeats: int) -> Path:
    """Measure, print a table, write `<out>/features.json`. source: a video to repeat; None: a made-up one."""
    device = devices.prepare()
    settings = {"source": source.name if source else "made up", "minutes": minutes, "rate_hz": rate_hz, "size": size}
    measurements = Measurements("features", settings | {"repeats": repeats} | devices.settings(device), LIBRARIES)
    timings, peaks = Timings({OURS: [], LOOP: []}, {OURS: [], LOOP: []}), {OURS: 0, LOOP: 0}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = source or videos.write(folder / "short.mp4", measure.SEED, seconds=SECONDS, size_px=SIZE_PX)
        repeat_video(source, folder / "long.mp4", seconds=60 * minutes)
        write_model(folder / "model", size)
        (tenth := folder / "tenth").mkdir()
        repeat_video(source, tenth / "long.mp4", seconds=6 * minutes)
        (tenth / "model").symlink_to(folder / "model")
        pooled, (*_, peak_of_a_tenth) = {}, measured_apart(ours, tenth, rate_hz, str(device))
        for _ in range(repeats):
            for name, work in ((OURS, ours), (LOOP, loop)):
                pooled[name], seconds, cpu_s, peak = measured_apart(work, folder, rate_hz, str(device))
                timings.seconds[name].append(seconds)
                timings.cpu_s[name].append(cpu_s)
                peaks[name] = max(peaks[name], peak)
    frames = read_settings(size)["num_frames"] * len(pooled[OURS])
    rows = measure.throughput(timings, dict.fromkeys(pooled, frames))
    for row in rows:
        row["peak_mib"] = peaks[row["name"]] / 2**20
        row["difference"] = float((pooled[row["name"]] - pooled[OURS]).norm() / pooled[OURS].norm())
    measurements.raw.update(seconds=timings.seconds, cpu_s=timings.cpu_s)
    measurements.results.update(rows=rows, windows=len(pooled[OURS]), peak_mib_of_a_tenth=peak_of_a_tenth / 2**20)
    measure.table(f"{minutes:g} minutes of video, {frames} frames at {rate_hz:g} Hz, VideoMAE {size}", rows, COLUMNS)
    print(f"{OURS}: peak of {peak_of_a_tenth / 2**20:.0f} MiB with a tenth of the video")
    return measurements.write(out)


def measured_apart(*arguments: Any) -> tuple[Tensor, float, float, int]:
    """As `measured`, in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, *arguments).result()


def measured(
    work: Callable[[Path, float, str], Tensor], folder: Path, rate_hz: float, device: str
) -> tuple[Tensor, float, float, int]:
    """Pooled features `W D`, seconds, CPU seconds, and peak bytes of this process."""
    torch.set_num_threads(measure.cores())
    start, start_cpu = time.perf_counter(), time.process_time()
    pooled = work(folder, rate_hz, device)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    return pooled, seconds, cpu_s, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def ours(folder: Path, rate_hz: float, device: str) -> Tensor:
    options = {"layers": (), "tokens": False, "dtype": "float32", "fit": "crop"}
    options |= dict.fromkeys(("frames", "side_px", "stride_s"))  # the encoder's own
    out = folder / f"features-{time.time_ns()}"
    paths = [folder / "long.mp4"]
    video_features.run(str(folder / "model"), paths, out, batch=8, device=device, pca=None, rate_hz=rate_hz, **options)
    tensors = load_file(out / "long.mp4.safetensors")
    return next(tensor for name, tensor in tensors.items() if name.startswith("layer_"))


@torch.no_grad()
def loop(folder: Path, rate_hz: float, device: str) -> Tensor:
    let_torchvision_load()
    from transformers import VideoMAEImageProcessor, VideoMAEModel

    model = VideoMAEModel.from_pretrained(folder / "model").eval().to(device)
    processor = VideoMAEImageProcessor.from_pretrained(folder / "model")
    pooled = []
    frames, window = model.config.num_frames, []
    for picture in shown_frames(folder / "long.mp4", rate_hz):
        window.append(picture)
        if len(window) == frames:
            inputs, window = processor(window, return_tensors="pt").to(device), []
            pooled.append(model(**inputs).last_hidden_state.mean(1).cpu())
    return torch.cat(pooled)


def shown_frames(path: Path, rate_hz: float) -> Iterator[np.ndarray]:
    """uint8 `H W 3`: the frame on show at 0, 1, 2, ... / rate_hz seconds after the first one."""
    first_s, shown, due = None, None, 0
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            first_s = frame.time if first_s is None else first_s
            while shown is not None and frame.time - first_s > due / rate_hz + TOLERANCE_S:
                yield shown.to_ndarray(format="rgb24")
                due += 1
            shown = frame
    yield shown.to_ndarray(format="rgb24")


def read_settings(size: str) -> dict[str, Any]:
    from transformers import VideoMAEConfig

    return VideoMAEConfig(**SIZES[size]).to_dict()


def write_model(folder: Path, size: str) -> None:
    let_torchvision_load()
    from transformers import VideoMAEConfig, VideoMAEImageProcessor, VideoMAEModel

    config = VideoMAEConfig(**SIZES[size])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(measure.SEED)
        VideoMAEModel(config).save_pretrained(folder)
    side = config.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    VideoMAEImageProcessor(**sizes).save_pretrained(folder)


def repeat_video(source: Path, out: Path, *, seconds: float) -> None:
    """Copy a video's packets one time after the other, without encoding them again, until it lasts so long."""
    copied, end, end_s = None, 0, 0.0
    with av.open(str(out), "w") as target:
        while end_s < seconds:
            with av.open(str(source)) as container:
                stream, shift = container.streams.video[0], None
                copied = copied or target.add_stream_from_template(stream)
                for packet in container.demux(stream):
                    if packet.dts is not None:
                        shift = end - packet.dts if shift is None else shift
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, copied
                        end, end_s = max(end, packet.pts + packet.duration), float(end * stream.time_base)
                        target.mux(packet)
