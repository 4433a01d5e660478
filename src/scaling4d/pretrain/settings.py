"""How points are trained, how a run is watched, and where it runs. How it lies on the ranks: shard."""

from __future__ import annotations

from dataclasses import dataclass

from scaling4d import config


@config.configurable
@dataclass(frozen=True)
class Training:
    """How every point is trained, so that points differ in their model alone.

    ranks: processes that share a batch (on a CPU of one thread each); results depend on it. device: cpu or cuda.
    compute: float32 or bfloat16; weights, their moments and sums over ranks are float32 in both. batch: clips a step, over all
    ranks. rate_times_width: peak learning rate of the matrices that read `width` numbers = this / width. embedding_rate: of all
    else (patch embedding, positions, tokens, norms, biases), the same at every width. rates_at_batch: the batch that both are
    for; they grow with the batch in proportion. warmup: share of the steps. clip_norm: of the gradient.
    ema: what is saved and measured at the end is a running mean of the weights, of which a step keeps this share; 0: the weights.
    flip: mirror and time-reverse clips at random. crop: smallest and largest share of the picture's area that a random square
    keeps. repeats: copies of a clip in a batch, each cropped, flipped and masked on its own (MAE-ST's repeated sampling: 4).
    window_shards: shards whose clips are shuffled together, 0: all. val_clips: of the validation split that are measured, evenly
    spread over it, 0: all. masks_per_clip: masks a validation clip is measured with. validate_every: steps, to measure it in
    between too; 0: at the end alone. log_every: steps, of which losses.jsonl has one line.
    """

    ranks: int
    device: str
    compute: str
    batch: int
    steps: int
    rate_times_width: float
    embedding_rate: float
    rates_at_batch: int
    betas: tuple[float, float]
    weight_decay: float
    warmup: float
    clip_norm: float
    ema: float
    flip: bool
    crop: tuple[float, float]
    repeats: int
    window_shards: int
    val_clips: int
    masks_per_clip: int
    validate_every: int
    log_every: int


@config.configurable
@dataclass(frozen=True)
class Running:
    """How a run is fed, kept safe and watched; results do not depend on it.

    workers: processes that decode for a rank, 0: itself. kept_clips: decoded clips that stay in the memory of each process that
    decodes.
    save_every: steps, after which the training state is written. keep: how many of them stay. asynchronous: write behind the
    computing. hang_s: when no rank has moved for so long, the run ends and says who hangs. tensorboard: write events to `.runs/`.
    profile: `[first step, how many]` of a torch profiler's trace in `.runs/`, or nothing.
    """

    workers: int
    kept_clips: int
    save_every: int
    keep: int
    asynchronous: bool
    hang_s: float
    tensorboard: bool
    profile: tuple[int, ...]


@config.configurable
@dataclass(frozen=True)
class Launch:
    """Where a point is trained; results do not depend on it.

    where: here (forked ranks), torchrun (on this machine), nodes (the same command on each of several machines, which meet at
    `rendezvous`) or slurm. nodes: machines, which share the ranks. rendezvous: HOST:PORT of one of the nodes. restarts: how often
    torchrun starts all ranks again when one is lost. wait_s: how long nodes wait for each other, and a scheduler for a state to
    be saved. partition, hours: of a Slurm job. cluster: slurm, or local for submitit's processes on this machine.
    """

    where: str
    nodes: int
    rendezvous: str
    restarts: int
    wait_s: int
    partition: str
    hours: int
    cluster: str
