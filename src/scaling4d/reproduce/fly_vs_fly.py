"""Target `fly_vs_fly`: the frozen 4DS-B-dist-e with scivid's attention readout on Fly vs. Fly, mAP of split val.

Facts: google-deepmind/scivid at commit 9d03f05. Each setting of FLY_VS_FLY names its file.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling4d import artifacts, checkpoint, seeds
from scaling4d.encoders.features import features_at_depth
from scaling4d.encoders.published import import_published
from scaling4d.mae.device import to_device
from scaling4d.mae.encoder import LECUN_STD, BackboneConfig, initialise
from scaling4d.provenance import atomic_new
from scaling4d.readout.data import shuffled_batch
from scaling4d.readout.heads import AttentionReadout, stretch_time
from scaling4d.records import UserError, write_json
from scaling4d.reproduce.average_precision import class_average_precisions
from scaling4d.reproduce.fly_clips import CLASSES, FlyClips, listing_of
from scaling4d.reproduce.targets import RESULT, Download, Expected, Setting, Target, new_folder
from scaling4d.training import distributed
from scaling4d.training.fit import Batch, ChangedClips, FitConfig, fit
from scaling4d.training.observe import TrainingLog
from scaling4d.training.resume import CheckpointManager, fingerprint, remove_state, state_folder

BACKGROUND = len(CLASSES) - 1  # skipped in the mean
RARE = (1, 2)  # wing_threat, tussling: scivid also takes the mean without them
AHEAD = 4  # batches that threads read before they are needed; ours
SAVE_EVERY, LOG_EVERY = 1000, 50  # steps; no result depends on them
HEAD = "head.safetensors"
RELEASED_ENCODER = BackboneConfig(
    clip=(16, 224, 224), patch=(2, 16, 16), pixel_mean=0.0, pixel_scale=1.0, width=768, depth=12, heads=12, mlp=3072
)
TRAIN_CLIPS = 1_067_008  # in whole batches; NUM_SAMPLES_TRAIN_DROP_LAST of scivid's data/readers/flyvsfly.py


@dataclass(frozen=True)
class FlyProtocol:
    """Numbers of scivid's training. scales: of the resize jitter. width, heads, dropout: of the attention readout."""

    steps: int = 40_000
    batch: int = 32
    learning_rate: float = 3e-4
    warmup_steps: int = 1000
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    scales: tuple[float, float] = (1.0, 1.4)
    width: int = 128
    heads: int = 16
    dropout: float = 0.5


PROTOCOL = FlyProtocol()
EVAL, LAUNCH = "configs/evals/flyvsfly_classification.py", "configs/launch_config.py"  # of scivid
MODEL, READER = "configs/models/scaling4d.py", "data/readers/utils.py"
WEIGHTS_ADDRESS = "https://storage.googleapis.com/representations4d/checkpoints/scaling4d_dist_b.npz"
FLY_VS_FLY = Target(
    name="fly_vs_fly",
    title="attention readout of the frozen 4DS-B-dist-e, behaviours of flies, SciVid (arXiv:2507.03578)",
    expected=Expected(
        metric="mAP",
        value=84.3,
        unit="%",
        tolerance=1.0,
        why="ours, a guess: no spread over seeds is published; by scivid rare classes vary a lot",
        source="README.md of google-deepmind/scivid (commit 9d03f05), val results of 4DS-B-dist-e",
    ),
    unpublished="",
    downloads=(
        Download(
            option="--weights",
            what="encoder 4DS-B-dist-e",
            address=WEIGHTS_ADDRESS,
            size="334 MB, by README.md of representations4d",
            licence="CC-BY 4.0",
            command=f"wget {WEIGHTS_ADDRESS}",
        ),
        Download(
            option="--data",
            what="100 ArrayRecord shards of each of the splits train and val",
            address="gs://scivid/full/fly_vs_fly, or https://storage.googleapis.com/scivid",
            size="size not published: about 1.07 million clips to train on",
            licence="Fly-vs-Fly is CC-0, scivid's materials are CC-BY 4.0",
            command="gcloud storage rsync --recursive gs://scivid/full/fly_vs_fly fly_vs_fly",
        ),
    ),
    settings=(
        Setting("encoder", "frozen; features at 0.95 of the depth, cubic in time to 16 steps", f"{LAUNCH}, {MODEL}"),
        Setting("clip", "first 16 frames, stride 1, the last one repeated", f"{LAUNCH}, {READER}"),
        Setting("pixels", "0..1, bilinear to 224 x 224 whatever the aspect ratio", f"{LAUNCH}, {READER}"),
        Setting(
            "jitter",
            "in training: bilinear by {:g} to {:g}, then a random square of 224".format(*PROTOCOL.scales),
            f"{EVAL}, data/transforms/tf_transforms.py",
        ),
        Setting("labels", "7 classes of the middle frame, any number of them at once", "data/readers/flyvsfly.py, datasets.md"),
        Setting(
            "readout",
            f"AttentionReadout, 1 query, num_params {PROTOCOL.width}, {PROTOCOL.heads} heads, dropout {PROTOCOL.dropout}",
            f"{EVAL}, models/readouts.py",
        ),
        Setting("loss", "sigmoid cross-entropy, mean over clips and classes", EVAL),
        Setting(
            "optimizer",
            f"AdamW, betas .9 and .999, weight decay {PROTOCOL.weight_decay:g}, no clipping",
            f"{LAUNCH}; {EVAL} sets the weight decay in place of 1e-4",
        ),
        Setting("rate", f"{PROTOCOL.learning_rate:g} after {PROTOCOL.warmup_steps:,} steps, then a cosine to the end", LAUNCH),
        Setting("steps", f"{PROTOCOL.steps:,} of {PROTOCOL.batch} clips, shuffled", LAUNCH),
        Setting("precision", "float32; products in TF32 on a GPU", "JAX's default on such GPUs"),
        Setting(
            "metric",
            "mean of the average precisions of 6 classes, without not_interacting; whole batches of 32 of val, in order",
            f"{EVAL}, metrics/mean_average_precision.py, kauldron's batch_drop_remainder",
        ),
    ),
    differences=(
        "order of clips, crops, dropout and first weights come from other generators",
        "the rate is 3e-4 (step + 1) / 1,000 in the warm-up and ends at 0; in scivid 3e-4 step / 1,000, and 1e-7",
        "README.md does not say of which readout, step and seed 84.3 is; here the attention readout's after the last step, "
        "with the linear readout's beside it",
    ),
    hardware="one GPU with 24 GB, 16 cores to decode pictures; our estimate is 1 to 3 hours on an H100, not measured",
)


class FlyReadouts(nn.Module):
    """A frozen encoder with scivid's two readouts, which learn side by side without effect on each other."""

    def __init__(self, encoder: nn.Module, protocol: FlyProtocol) -> None:
        super().__init__()
        self.encoder, self.frames = encoder.requires_grad_(False), encoder.clip[0]
        settings = {"width": protocol.width, "heads": protocol.heads, "queries": 1, "query_width": 0}
        self.attention = AttentionReadout(features_width=encoder.width, frames=self.frames, out=len(CLASSES), **settings)
        self.attention.project = nn.Sequential(nn.Dropout(protocol.dropout), self.attention.project)
        self.linear = nn.Linear(encoder.width, len(CLASSES))

    def initialise(self, seed: int) -> None:
        """Draw the readouts' weights as flax does: all matrices truncated lecun-normal, those of the mlp too."""
        for part in (self.attention, self.linear):
            initialise(part, seed=seed)
        for name in ("mlp_in", "mlp_out"):
            weight = getattr(self.attention, name).weight
            std, value = math.sqrt(1 / weight.shape[1]) / LECUN_STD, torch.empty(weight.shape)
            nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std, generator=seeds.torch_rng(seed, "lecun", name))
            weight.data.copy_(value)

    def scores(self, clips: Tensor) -> dict[str, Tensor]:
        """Clips, float `B T H W 3` in 0..1 -> logits `B 7` of each readout."""
        with torch.no_grad():
            features = stretch_time(features_at_depth(self.encoder, clips), self.frames)  # B T n D
        return {"attention": self.attention(features)[:, 0], "linear": self.linear(features.mean((1, 2)))}

    def forward(self, clips: Tensor, labels: Tensor) -> Tensor:
        """labels: `B 7`, zeros and ones. Returns the sum of both readouts' losses."""
        return sum(F.binary_cross_entropy_with_logits(logits, labels) for logits in self.scores(clips).values())


@dataclass(frozen=True)
class Jitter:
    """A resize to `height` x `width` px, and the first row and column of the crop."""

    height: int
    width: int
    top: int
    left: int


def draw_jitter(rng: np.random.Generator, shape: tuple[int, int], scales: tuple[float, float]) -> Jitter:
    """One scale for both axes; sizes are rounded down. As in scivid, the last row and column begin no crop."""
    scale = rng.uniform(*scales)
    sizes = [int(scale * side) for side in shape]
    return Jitter(*sizes, *(int(rng.integers(max(size - side, 1))) for size, side in zip(sizes, shape, strict=True)))


def prepare(clip: Tensor, *, size: tuple[int, int], shape: tuple[int, int], jitter: Jitter | None = None) -> Tensor:
    """uint8 `T H W 3` of stored `size`, with any margin behind it -> float `T h w 3` in 0..1 of `shape`."""
    x = clip[:, : size[0], : size[1]].permute(0, 3, 1, 2).float() / 255  # T 3 H W
    x = F.interpolate(x, shape, mode="bilinear")
    if jitter:
        x = F.interpolate(x, (jitter.height, jitter.width), mode="bilinear")
        x = x[..., jitter.top : jitter.top + shape[0], jitter.left : jitter.left + shape[1]]
    return x.permute(0, 2, 3, 1)


def read_ahead(
    read: Callable[[int], tuple[np.ndarray, np.ndarray]], batches: Iterable[list[int]], workers: int
) -> Iterator[tuple[Tensor, list[tuple[int, int]], Tensor]]:
    """Clips `B T H W 3` with margins up to the largest one, their sizes, and labels `B 7`; threads read ahead."""
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for indices in batches:
            waiting.append([pool.submit(read, index) for index in indices])
            if len(waiting) > AHEAD:
                yield _stack([one.result() for one in waiting.popleft()])
        while waiting:
            yield _stack([one.result() for one in waiting.popleft()])
    finally:
        pool.shutdown(cancel_futures=True)


def _stack(clips: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, list[tuple[int, int]], Tensor]:
    sizes = [pixels.shape[1:3] for pixels, _ in clips]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    stacked = np.zeros((len(clips), len(clips[0][0]), height, width, 3), np.uint8)
    for row, (pixels, _) in zip(stacked, clips, strict=True):
        row[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return torch.from_numpy(stacked), sizes, torch.from_numpy(np.stack([labels for _, labels in clips]))


def training_batches(
    clips: FlyClips, start: int, *, shape: tuple[int, int], protocol: FlyProtocol, seed: int, workers: int
) -> Iterator[Batch]:
    """Batches from step `start` on; each depends on seed and step alone. The device resizes and crops."""
    orders = (shuffled_batch(step, protocol.batch, len(clips), seed, 0) for step in range(start, protocol.steps))
    for step, (pixels, sizes, labels) in zip(count(start), read_ahead(clips.read, orders, workers), strict=False):
        jitters = (draw_jitter(seeds.numpy_rng(seed, "jitter", step, n), shape, protocol.scales) for n in range(len(sizes)))
        changes = (partial(prepare, size=size, shape=shape, jitter=one) for size, one in zip(sizes, jitters, strict=True))
        yield Batch((ChangedClips(pixels, tuple(changes)), labels))


@torch.no_grad()
def measure(model: FlyReadouts, clips: FlyClips, *, shape: tuple[int, int], batch: int, workers: int) -> dict[str, float]:
    """Metrics in % over the whole batches of a split: `mAP` of the attention readout, `linear_mAP`, and of classes.

    Raises UserError: fewer clips than a batch, or a class without a clip.
    """
    if len(clips) < batch:
        raise UserError(f"split {clips.split} has {len(clips)} clips; needed at least a batch of {batch}")
    device = model.linear.weight.device.type
    orders = (list(range(first, first + batch)) for first in range(0, len(clips) - batch + 1, batch))
    scores: dict[str, list[Tensor]] = {"attention": [], "linear": []}
    truth, shown = [], time.monotonic()
    for pixels, sizes, labels in read_ahead(clips.read, orders, workers):
        on_device = to_device(pixels, device)
        prepared = [prepare(clip, size=size, shape=shape) for clip, size in zip(on_device, sizes, strict=True)]
        for name, logits in model.scores(torch.stack(prepared)).items():
            scores[name].append(logits.cpu())
        truth.append(labels)
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            print(f"fly_vs_fly {clips.split}: {len(truth) * batch} of {len(clips)} clips", file=sys.stderr, flush=True)
    labels = torch.cat(truth).numpy() > 0
    if unseen := [name for name, seen in zip(CLASSES, labels.any(0), strict=True) if not seen]:
        raise UserError(f"split {clips.split} has no clip of {', '.join(unseen)}; needed all shards of the split")
    values = {name: 100 * class_average_precisions(torch.cat(parts).numpy(), labels) for name, parts in scores.items()}
    of_classes = values["attention"]
    return {
        "mAP": float(of_classes[:BACKGROUND].mean()),
        "mAP_without_rare": float(np.delete(of_classes[:BACKGROUND], RARE).mean()),
        "linear_mAP": float(values["linear"][:BACKGROUND].mean()),
        **{f"AP_{name}": float(value) for name, value in zip(CLASSES, of_classes, strict=True)},
    }


def run(
    *, weights: Path | None, data: Path | None, out: Path | None, device: str, seed: int, steps: int | None, workers: int
) -> tuple[Path, dict[str, Any]]:
    """Train, measure, and write `result.json`, `losses.jsonl` and `head.safetensors` to a new folder.

    A killed run continues from its last saved state with the same command.
    steps: another number than the protocol's, for a trial. workers: threads that read clips.
    Returns the folder and the content of result.json.
    Raises UserError: files are missing or damaged, or `out` exists. Preempted: a signal asked to stop.
    """
    FLY_VS_FLY.require({"--weights": weights, "--data": data})
    out, started = new_folder(out, FLY_VS_FLY.name), time.time()
    protocol = PROTOCOL if steps is None else replace(PROTOCOL, steps=steps, warmup_steps=min(PROTOCOL.warmup_steps, steps - 1))
    weights_sha256 = artifacts.sha256(weights)
    settings = {"protocol": asdict(protocol), "seed": seed, "device": device}
    listings = {split: listing_of(data, split) for split in ("train", "val")}
    inputs = {"weights": weights_sha256, **{split: str(one["names_and_sizes_sha256"]) for split, one in listings.items()}}
    state = fingerprint(FLY_VS_FLY.name, settings=settings, inputs=inputs, code_sha256=artifacts.sha256(Path(__file__)))
    arguments = {"weights": weights, "data": data, "protocol": protocol, "seed": seed, "workers": workers, "state": state}
    trained = distributed.run(_train_and_measure_on_rank, ranks=1, device=device, where=device, **arguments)
    measured, records, deviations, lines, head = trained
    facts = {split: one | {"records": records[split]} for split, one in listings.items()}
    evidence = settings | {"metrics": measured, "data": facts, "weights": {"file": weights.name, "sha256": weights_sha256}}
    content = FLY_VS_FLY.result(measured["mAP"], deviations, evidence)
    with atomic_new(out) as folder:
        folder.mkdir()
        checkpoint.save_tensors(folder / HEAD, head)
        (folder / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_json(folder / RESULT, content)
    remove_state(state_folder("reproduce", state))
    artifacts.write_run(f"reproduce-{FLY_VS_FLY.name}", artifacts.sha256(out), started=started, device=device)
    return out, content


def _train_and_measure_on_rank(
    *,
    rank: int,
    ranks: int,
    weights: Path,
    data: Path,
    protocol: FlyProtocol,
    seed: int,
    where: str,
    workers: int,
    state: Mapping[str, Any],
) -> tuple[dict[str, float], dict[str, int], list[str], list[dict[str, Any]], dict[str, Tensor]]:
    """The one rank of a run. Returns metrics, records by split, deviations, losses, the readouts' weights."""
    if where == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    config, encoder = import_published(weights)
    frames, *shape = encoder.clip
    train, val = (FlyClips(data, split, frames) for split in ("train", "val"))
    records = {"train": len(train), "val": len(val)}
    deviations = deviations_of(protocol, config, len(train))
    for text in deviations:
        print(f"not the protocol: {text}", file=sys.stderr, flush=True)
    model = FlyReadouts(encoder, protocol)
    model.initialise(seed)
    model.to(where)
    fit_config = FitConfig(
        name=FLY_VS_FLY.name,
        steps=protocol.steps,
        batch=protocol.batch,
        betas=protocol.betas,
        weight_decay=protocol.weight_decay,
        warmup_steps=protocol.warmup_steps,
        clip_norm=math.inf,
        seed=seed,
        rate_setting="learning_rate",
        device=where,
        accumulate=1,
        log_every=LOG_EVERY,
        save_every=SAVE_EVERY,
    )
    log = TrainingLog(fit_config)
    manager = CheckpointManager("reproduce", state, keep_latest_k=1, asynchronous=False)
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    batches = partial(training_batches, train, shape=tuple(shape), protocol=protocol, seed=seed, workers=workers)
    groups = {"readouts": (trained, protocol.learning_rate)}
    fit(model, batches, fit_config, param_groups=groups, callbacks=[log], manager=manager)
    measured = measure(model.eval(), val, shape=tuple(shape), batch=protocol.batch, workers=workers)
    manager.close()
    return measured, records, deviations, log.lines, {name: weight.detach().cpu() for name, weight in trained}


def deviations_of(protocol: FlyProtocol, encoder: Any, clips: int) -> list[str]:
    """Where a run differs from PROTOCOL, in words. encoder: its config. clips: to train on."""
    deviations = []
    if protocol != PROTOCOL:
        deviations.append(f"{protocol.steps:,} steps, the protocol has {PROTOCOL.steps:,}")
    if encoder != RELEASED_ENCODER:
        deviations.append("an encoder of another shape than 4DS-B-dist-e")
    if (whole := clips // protocol.batch * protocol.batch) != TRAIN_CLIPS:
        deviations.append(f"{whole:,} clips to train on in whole batches, scivid has {TRAIN_CLIPS:,}")
    return deviations
