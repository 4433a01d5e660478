"""Settings of stage `pretrain`, bound once into one tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scaling4d import artifacts, config
from scaling4d.checkpoint import Checkpoint
from scaling4d.clips import loader
from scaling4d.config import StageConfig, require_minima, require_positive, require_words
from scaling4d.encoders.load import build_model, load_model
from scaling4d.mae.encoder import Method, MethodConfig
from scaling4d.mae.models import encoder_of, method_of
from scaling4d.records import UserError, did_you_mean, remedy
from scaling4d.training.fit import FitConfig
from scaling4d.training.launch import LaunchConfig
from scaling4d.training.parallelize import ComputeConfig, ShardingConfig

BETAS = (0.9, 0.95)  # arXiv:2205.09113; 4DS publishes none
PROBES = {"actions": ("top1", True), "depth": ("abs_rel", False)}  # tasks with a linear probe -> metric, higher is better


def probe_metric(task: str) -> str:
    """Name of the measure of a task's linear probe, as among a readout's further metrics."""
    return f"{PROBES[task][0]}_linear"


HIGHER_IS_BETTER = {"val_loss": False, "rankme": True}  # of a validation -> whether higher is better
HIGHER_IS_BETTER |= {probe_metric(task): higher_is_better for task, (_, higher_is_better) in PROBES.items()}


@dataclass(frozen=True)
class TrainingConfig(ComputeConfig):
    """How every point is trained, so that points differ in their model alone.

    ranks: processes that share a batch (on a CPU of one thread each); results depend on it. batch: clips a step, over
    all ranks. rate_times_width: peak learning rate of all matrices inside = this / the encoder's width; 0: they
    have `embedding_rate`, too (MAE-ST). embedding_rate: of all other parameters (patch embedding, positions, tokens,
    norms, biases), at every width. decay_positions: learned positions and tokens decay, as matrices do (MAE-ST).
    warmup: share of the steps. clip_norm: of the gradient. flip: mirror clips at random. reverse: play them backwards
    at random. crop: smallest and largest share of the picture's area that a random rectangle keeps. aspect: smallest
    and largest of its width by its height. short_side_px: crops are of the whole picture, resized to this shorter
    side (MAE-ST), which needs whole sources; 0: of the square in its middle. repeats: copies of a clip in a batch, each
    cropped, flipped and masked on its own, and at another time of a clip that is longer than the model's (MAE-ST's
    repeated sampling: 4).
    window_shards: shards whose clips are shuffled together, 0: all.
    val_clips: measured clips of the validation split, evenly spread over it, 0: all. masks_per_clip: masks of a
    validation clip. validate_every: steps; 0: at the end alone, and of the loss alone. log_every: steps to a line of
    losses.jsonl.
    probe_tasks: tasks whose linear probe every validation measures, see pretrain.probes. probe_items: items of a
    benchmark's training and validation split for it, evenly spread, 0: all. keep_best: the measure of the validations,
    one of HIGHER_IS_BETTER, by which the best weights are written; "": the last weights are.
    """

    ranks: int
    batch: int
    steps: int
    rate_times_width: float
    embedding_rate: float
    weight_decay: float
    decay_positions: bool
    warmup: float
    clip_norm: float
    flip: bool
    reverse: bool
    crop: tuple[float, float]
    aspect: tuple[float, float]
    short_side_px: int
    repeats: int
    window_shards: int
    val_clips: int
    masks_per_clip: int
    validate_every: int
    log_every: int
    probe_tasks: tuple[str, ...]
    probe_items: tuple[int, int]
    keep_best: str

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one = ("ranks", "batch", "steps", "log_every", "masks_per_clip")
        require_minima(self, dict.fromkeys(at_least_one, 1) | dict.fromkeys(("val_clips", "validate_every"), 0))
        require_positive(self, "embedding_rate", "clip_norm")
        require_minima(self, {"weight_decay": 0, "rate_times_width": 0, "short_side_px": 0})
        if unknown := [task for task in self.probe_tasks if task not in PROBES]:
            raise ValueError(f"probe_tasks has {unknown[0]!r}; needed some of {', '.join(PROBES)}")
        if min(self.probe_items) < 0:
            raise ValueError(f"probe_items = {list(self.probe_items)}; needed 0 or more each")
        absent = [probe_metric(task) for task in PROBES if task not in self.probe_tasks]
        require_words(self, {"keep_best": ("", *(name for name in HIGHER_IS_BETTER if name not in absent))})
        if not self.validate_every and (self.probe_tasks or self.keep_best):
            setting = "probe_tasks" if self.probe_tasks else "keep_best"
            raise ValueError(f"{setting} is set and validate_every is 0; needed validate_every of 1 step or more")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is {self.warmup}; needed a share of the steps, 0 to 1")
        order = {"repeats": self.repeats, "crop": self.crop, "aspect": self.aspect, "window_shards": self.window_shards}
        loader.check_batching(batch=self.batch, ranks=self.ranks, **order)


@dataclass(frozen=True)
class RuntimeConfig:
    """How a run is fed, saved and watched; results do not depend on it.

    workers: decoding processes of a rank, 0: the rank itself. cached_clips: decoded clips in memory, of each
    decoding process. save_every: steps to a training state. keep_latest_k: number of such states. asynchronous:
    write them while the training continues. start_s, hang_s: seconds of standstill of all ranks, until the first
    step is done and afterwards, after which the run ends and names the rank that hangs; see resume.MOST_WRITE_S.
    tensorboard: write events to `.runs/`.
    """

    workers: int
    cached_clips: int
    save_every: int
    keep_latest_k: int
    asynchronous: bool
    start_s: float
    hang_s: float
    tensorboard: bool

    def __post_init__(self) -> None:
        require_minima(self, {"workers": 0, "save_every": 1, "keep_latest_k": 1, "cached_clips": 0})
        require_positive(self, "start_s", "hang_s")


@dataclass(frozen=True)
class PretrainConfig:
    """All settings of a point's training.

    key: dotted, of the point's settings. home: folder of the profile's artifacts. bound: records the settings on which
    the result depends; launch and runtime are not among them. start_from: folder of the Checkpoint whose weights the
    point starts from; None: random ones. benchmarks, max_bad_share, rate_hz: folder, damaged share and frame rate of
    the labelled clips of probes.
    """

    point: str
    key: str
    home: Path
    seed: int
    bound: StageConfig
    method: type[Method]
    model: MethodConfig
    training: TrainingConfig
    sharding: ShardingConfig
    runtime: RuntimeConfig
    launch: LaunchConfig
    start_from: Path | None
    benchmarks: Path
    max_bad_share: float
    rate_hz: float

    @property
    def clips(self) -> Path:
        return self.home / "clips"

    @property
    def folder(self) -> Path:
        """The point's Checkpoint folder."""
        return self.home / "pretrain" / self.point

    @property
    def teacher(self) -> Path | None:
        """The teacher's Checkpoint folder; None for a point without one."""
        return self.home / "pretrain" / self.model.teacher if hasattr(self.model, "teacher") else None

    @property
    def fit(self) -> FitConfig:
        training = self.training
        return FitConfig(
            name=f"pretrain-{self.point}",
            steps=training.steps,
            batch=training.batch,
            betas=BETAS,
            weight_decay=training.weight_decay,
            decay_positions=training.decay_positions,
            warmup_steps=round(training.steps * training.warmup),
            clip_norm=training.clip_norm,
            seed=self.seed,
            rate_setting=f"pretrain.Training.{'rate_times_width' if training.rate_times_width else 'embedding_rate'}",
            device=training.device,
            accumulate=self.sharding.accumulate,
            log_every=training.log_every,
            save_every=self.runtime.save_every,
        )

    def build(self, *, teacher_weights: bool = True) -> Method:
        """The model on meta, with its teacher, if it has one. teacher_weights: False: the teacher is on meta, too."""
        teacher_encoder = None
        if self.teacher is not None:
            teacher_encoder = encoder_of(load_model(self.teacher) if teacher_weights else build_model(self.teacher)[0])
        return build_method(self.method, self.model, teacher_encoder)


def bind_pretrain(point: str, settings: Mapping[str, Any]) -> PretrainConfig:
    """Bind and check the settings of one point, before a rank starts or a clip is read.

    Raises:
        UserError: as bind_point; no teacher, no checkpoint to start from, no clips or unsuitable ones, no TensorBoard.
    """
    pretraining = bind_point(point, settings)
    for folder in filter(None, (pretraining.teacher, pretraining.start_from)):
        Checkpoint.read(folder)
    if pretraining.runtime.tensorboard and find_spec("tensorboard") is None:
        needed = "needed the package, as in the extra `cluster`, or set it to false"
        raise UserError(f"pretrain.Runtime.tensorboard = true, and tensorboard is not installed; {needed}")
    with clips_remedies():
        loader.count_clips(pretraining.clips, "train")
        if (short_side_px := pretraining.training.short_side_px) and loader.holds_encoded(pretraining.clips):
            problem = f"pretrain.Training.short_side_px = {short_side_px} crops whole pictures, and {pretraining.clips}"
            raise UserError(f"{problem} holds encoded squares; set clips.Curation.encode to false, or it to 0")
    return pretraining


def bind_point(point: str, settings: Mapping[str, Any]) -> PretrainConfig:
    """Bind the settings of one point, and read no file.

    Raises:
        UserError: unknown point or setting, a mesh or a batch that does not divide, a mask that hides all or nothing.
    """
    key, method = find_point(point, settings)
    training_key, sharding_key = "pretrain.Training", f"{key}.Sharding"
    keys = ["profile", "seed", "clip.rate_hz", training_key, f"{key}.model", sharding_key]
    start_key = f"{key}.start_from"
    if key.startswith("continued."):
        keys.append(start_key)
    unrecorded = {"pretrain.Runtime": RuntimeConfig, f"{key}.Launch": LaunchConfig}
    bound = config.bind(settings, keys, TrainingConfig, method.config_class, ShardingConfig, unrecorded=unrecorded)
    training, sharding = bound[TrainingConfig], bound[ShardingConfig]
    tasks = config.section(settings, "benchmarks.tasks")
    if unread := [task for task in training.probe_tasks if task not in tasks]:
        raise UserError(f"{training_key}.probe_tasks has {unread[0]}, which benchmarks.tasks lacks; add it there")
    try:
        sharding.check(ranks=training.ranks, batch=training.batch)
    except ValueError as error:
        raise UserError(f"{key}, {training_key}: {error}") from error
    model = bound[method.config_class]
    return PretrainConfig(
        point=point,
        key=key,
        home=artifacts.home(settings),
        seed=bound.declared["seed"],
        bound=bound,
        method=method,
        model=model,
        training=training,
        sharding=sharding,
        runtime=bound[RuntimeConfig],
        launch=bound[LaunchConfig],
        start_from=Path(bound.declared[start_key]) if start_key in bound.declared else None,
        benchmarks=Path(config.section(settings, "benchmarks.root")),
        max_bad_share=config.section(settings, "benchmarks.max_bad_share"),
        rate_hz=bound.declared["clip.rate_hz"],
    )


def points_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of all points by name."""
    return {name: point for group in config.POINTS for name, point in settings[group].items()}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises UserError: settings of a point that the stage refuses, or a teacher that the profile lacks."""
    for point in points_of(settings):
        teacher = bind_point(point, settings).teacher
        if teacher is not None and teacher.name not in settings["points"]:
            near = did_you_mean(teacher.name, settings["points"])
            raise UserError(f"{point} has teacher {teacher.name!r}, which profile {settings['profile']} lacks{near}")


@contextmanager
def clips_remedies() -> Iterator[None]:
    """Append what to do about the clips to errors about them."""
    with (
        remedy(loader.ClipsError, "run `dvc repro clips`"),
        remedy(loader.EmptySplitError, "change clips.Curation.val_share, or add videos"),
    ):
        yield


def find_point(point: str, settings: Mapping[str, Any]) -> tuple[str, type[Method]]:
    """Dotted key of a point's settings, and its method; a point with a teacher is below `distilled`."""
    group = next((group for group in config.POINTS[1:] if point in config.section(settings, group)), config.POINTS[0])
    key = f"{group}.{point}"
    return key, method_of(config.section(settings, f"{key}.model"), f"{key}.model", with_teacher=group == "distilled")


def build_method(method: type[Method], model_config: MethodConfig, teacher_encoder: nn.Module | None) -> Method:
    """A model on meta. teacher_encoder: the teacher's encoder; None: a method without a teacher."""
    with torch.device("meta"):
        return method(model_config) if teacher_encoder is None else method(model_config, teacher_encoder)
