"""Three protocols: a readout on frozen features, fine-tuning with the same readout, and MAE-ST's classifier.

A protocol says what is trained on what; readout.stage drives all three alike.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaling4d import checkpoint, seeds
from scaling4d.benchmarks.samples import WINDOWS
from scaling4d.clips.crop import check_crop
from scaling4d.config import check_types, require_minima, require_positive, require_sizes, require_words
from scaling4d.encoders.features import FeatureEncoder, FeatureStore, MemoryFeatures, features_at_depth, stored_features
from scaling4d.encoders.pretrained import load_encoder
from scaling4d.mae.device import to_device
from scaling4d.mae.models import MODELS
from scaling4d.readout.augment import LARGEST_MAGNITUDE, augment_clip
from scaling4d.readout.classifier import ClassifierModel, MeanPoolClassifier, layer_decay_groups, mix_clips
from scaling4d.readout.data import ClipDataset, Encode, FeatureDataset, Predict, RankSplit, epochs_of, shuffled_batch
from scaling4d.readout.heads import Head, HeadConfig
from scaling4d.readout.linear import RegressionBatch, fit_probes
from scaling4d.readout.tasks import TASKS
from scaling4d.readout.tasks.task import Task
from scaling4d.readout.whitening import Whitening
from scaling4d.records import UserError
from scaling4d.training.fit import Batch, Callback, StepResult
from scaling4d.training.optimizer import ParamGroups
from scaling4d.training.parallelize import ComputeConfig, ShardingConfig, parallelize

Dataset = FeatureDataset | ClipDataset
HEAD = "head.safetensors"  # weights of the head and its whitening
LABELLED_CLIPS = (300, 1000)  # of which linear probes are fitted, beside all: label efficiency; ours
PROBE_BATCH = 64
CHECKS = 8  # measurements of the held-out clips within the patience; ours


@dataclass(frozen=True)
class EvaluationConfig:
    """What all readouts share.

    ranks: one-thread processes; results depend on it. whiten: whiten features over the training clips (ours; released:
    false). position_std: deviation that the mean of a token's place keeps, see readout.whitening. data: folder of the
    benchmarks. train_items, val_items: items of a split to use, evenly spread over it; 0: all. windows: in time, of a
    labelled video: "first", its first frames; "random", a new window in every epoch of a training, and even ones in a
    test (ours), see readout.data. frames, side_px: of the clips that the encoder sees and that labels are read for; 0:
    the encoder's own, see encoders.pretrained.set_clip. max_bad_share: of a split's samples that may be damaged or
    missing; they are left out (ours). feature_store: folder in which a frozen encoder's features stay for all readouts;
    "": in memory. feature_batch: clips of a rank in one pass of a frozen encoder, and of a fine-tuned one in a test;
    the last bits depend on it. cached_clips: clips of a rank that stay in memory while the encoder is trained on first
    windows; all others are read again. start_s, hang_s: seconds of standstill of a rank, until the first step of the
    training is done and afterwards, after which the readout ends. cached_clips, start_s and hang_s change no result.
    """

    ranks: int
    whiten: bool
    position_std: float
    data: str
    train_items: int
    val_items: int
    windows: str
    frames: int
    side_px: int
    max_bad_share: float
    feature_store: str
    feature_batch: int
    cached_clips: int
    start_s: float
    hang_s: float

    def __post_init__(self) -> None:
        require_minima(self, dict.fromkeys(("ranks", "feature_batch"), 1))
        require_minima(self, dict.fromkeys(("cached_clips", "position_std", "train_items", "val_items"), 0))
        require_sizes(self, "frames", "side_px", least=0)
        require_positive(self, "start_s", "hang_s")
        require_words(self, {"windows": WINDOWS})
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share is {self.max_bad_share}; needed a share, 0 to 1")


def _check_recipe(recipe: FrozenConfig | FinetuneConfig | ClassifierConfig) -> None:
    require_minima(recipe, {"steps": 1, "batch": 1, "warmup_steps": 0})
    require_positive(recipe, "learning_rate")


@dataclass(frozen=True)
class FrozenConfig:
    """Training of a readout on frozen features. shrinkage: see readout.whitening. clip_norm: of the gradient; 0: none.

    steps: at most. patience: steps without a lower loss of held-out training clips, after which the training stops; the
    weights with the lowest one are kept (ours). 0: all clips are trained on for all steps, the last weights are kept.
    rate_at_width: the matrices that read features have `learning_rate` at features of this width, and at others a rate
    in inverse proportion (ours, after Tensor Programs V, arXiv:2203.03466); 0: one rate (released).
    """

    steps: int
    batch: int
    learning_rate: float
    rate_at_width: int
    weight_decay: float
    warmup_steps: int
    clip_norm: float
    shrinkage: float
    patience: int

    def __post_init__(self) -> None:
        _check_recipe(self)
        require_minima(self, dict.fromkeys(("rate_at_width", "weight_decay", "clip_norm", "shrinkage", "patience"), 0))
        if self.patience and self.patience < CHECKS:
            raise ValueError(f"patience = {self.patience}; needed 0 or at least {CHECKS} steps")


@dataclass(frozen=True)
class FinetuneConfig:
    """Training of encoder and readout together, from the frozen readout on (ours: it saves most of the steps).

    clip_norm: of the gradient; 0: none.
    """

    steps: int
    batch: int
    learning_rate: float
    encoder_learning_rate: float
    weight_decay: float
    warmup_steps: int
    clip_norm: float

    def __post_init__(self) -> None:
        _check_recipe(self)
        require_minima(self, {"weight_decay": 0, "clip_norm": 0})
        if self.encoder_learning_rate <= 0:
            raise ValueError(f"encoder_learning_rate is {self.encoder_learning_rate}; needed more than 0, or the protocol frozen")


@dataclass(frozen=True)
class ClassifierConfig:
    """MAE-ST's fine-tuning.

    batch: clips a step, copies counted. learning_rate: of the classifier; blocks decay from it. repeats: copies of a
    video in a batch, each in a window of its own where windows are random (repeated augmentation). randaugment, crop,
    aspect, erasing: see readout.augment. dropout: of the pooled tokens. layer_decay: rate of a block by that of the
    next one. drop_path: share of clips that skip a branch of the last block; it rises from 0 at the first. per_encoder:
    name -> fields that are other ones for this encoder.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup_steps: int
    repeats: int
    randaugment: float
    crop: tuple[float, float]
    aspect: tuple[float, float]
    erasing: float
    dropout: float
    layer_decay: float
    drop_path: float
    per_encoder: Mapping[str, Mapping]

    weight_decay: ClassVar[float] = 0.05  # mae_st

    def __post_init__(self) -> None:
        _check_recipe(self)
        require_minima(self, {"repeats": 1})
        check_crop(self.crop, self.aspect)
        limits = dict.fromkeys(("erasing", "dropout", "layer_decay", "drop_path"), 1.0) | {"randaugment": LARGEST_MAGNITUDE}
        for name, largest in limits.items():
            if not 0 <= getattr(self, name) <= largest:
                raise ValueError(f"{name} is {getattr(self, name)}; needed 0 to {largest:g}")
        for encoder, changes in self.per_encoder.items():
            check_types(ClassifierConfig, changes, f"per_encoder.{encoder}.")
            try:
                self.of(encoder)
            except ValueError as error:
                raise ValueError(f"per_encoder.{encoder}: {error}") from error

    def of(self, encoder: str) -> ClassifierConfig:
        """The recipe of an encoder."""
        return replace(self, **{"per_encoder": {}, **self.per_encoder.get(encoder, {})})


@dataclass(frozen=True)
class SavingConfig:
    """Training state of a fine-tuning; no result depends on it.

    save_every: steps; 0: never. keep_latest_k: number of states.
    """

    save_every: int
    keep_latest_k: int

    def __post_init__(self) -> None:
        require_minima(self, {"save_every": 0, "keep_latest_k": 1})


@dataclass(frozen=True)
class ReadoutConfig:
    """folder: the encoder's Checkpoint folder. frozen_head: weights that fine-tuning starts from."""

    folder: Path
    task_name: str
    task: Task
    seed: int
    evaluation: EvaluationConfig
    recipe: FrozenConfig | FinetuneConfig | ClassifierConfig
    head: HeadConfig | None = None
    compute: ComputeConfig | None = None
    sharding: ShardingConfig | None = None
    saving: SavingConfig | None = None
    frozen_head: Path | None = None

    @property
    def device(self) -> str:
        return self.compute.device

    def load_encoder(self) -> nn.Module:
        """The encoder, for clips of the evaluation's frames and side. Raises UserError: as pretrained.load_encoder."""
        return load_encoder(self.folder, frames=self.evaluation.frames, side_px=self.evaluation.side_px)

    def new_head(self, encoder: nn.Module) -> Head:
        return Head(self.head, self.task.queries(encoder.clip), features_width=encoder.width, frames=encoder.clip[0])


class ReadoutModel(nn.Module):
    """Encoder (None: inputs are features), whitening and head."""

    def __init__(self, encoder: nn.Module | None, whitening: Whitening, head: nn.Module, task: Task) -> None:
        super().__init__()
        self.encoder, self.whitening, self.head, self.task = encoder, whitening, head, task

    def forward(self, inputs: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Pixels `B T H W C` or features `B t n D` -> loss."""
        features = inputs if self.encoder is None else features_at_depth(self.encoder, inputs)
        return self.task.loss(self.predict(features, target), target)

    def predict(self, features: Tensor, target: dict[str, Tensor]) -> Tensor:
        return self.task.predict(self.head, self.whitening(features), target)


class EarlyStopping(Callback):
    """Stops when the loss of held-out clips no longer falls; `restore` then gives the model its best weights.

    Attributes:
        lines: so far, each {"step", "held_out_loss"}.
    """

    def __init__(self, model: ReadoutModel, train_set: FeatureDataset, recipe: FrozenConfig) -> None:
        self.model, self.train_set, self.recipe = model, train_set, recipe
        self.lines: list[dict[str, float]] = []
        self.best_step, self.best_loss, self.best_weights = 0, math.inf, {}

    def after_step(self, result: StepResult) -> bool:
        if result.step % (self.recipe.patience // CHECKS) and not result.last:
            return False
        loss = self.held_out_loss()
        self.lines.append({"step": result.step, "held_out_loss": loss})
        if loss < self.best_loss:
            weights = {name: weight.clone() for name, weight in self.model.head.state_dict().items()}
            self.best_step, self.best_loss, self.best_weights = result.step, loss, weights
        return result.step - self.best_step >= self.recipe.patience

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean over the held-out clips of all ranks."""
        clips, size, device = self.train_set.held_out, self.recipe.batch, self.model.whitening.matrix.device.type
        total = torch.zeros((), dtype=torch.float64, device=device)
        for first in range(0, len(clips), size):
            features, target = self.train_set.batch(part := clips[first : first + size])
            on_device = {name: to_device(value, device) for name, value in target.items()}
            total += self.model(to_device(features, device), on_device).double() * len(part)
        sums = torch.tensor([total.item(), len(clips)], dtype=torch.float64)
        dist.all_reduce(sums)
        return (sums[0] / sums[1]).item()

    def restore(self) -> None:
        self.model.head.load_state_dict(self.best_weights)


@dataclass(frozen=True)
class ReadoutProtocol(ABC):
    """One way to train and evaluate. Class methods serve the binding of settings; the others run in every rank.

    tasks: names of the tasks that it trains. trains_encoder: whether the encoder's weights change, too.
    """

    config: ReadoutConfig

    name: ClassVar[str]
    recipe_class: ClassVar[type]
    evaluation_batch: ClassVar[int] = 16
    trains_encoder: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = tuple(TASKS)

    @property
    def clip_norm(self) -> float:
        """Largest norm of the gradient."""
        return self.config.recipe.clip_norm or math.inf

    @classmethod
    def recipe_key(cls, task: str) -> str:
        """Dotted key of the section that holds the recipe."""
        return f"readout.{cls.name}.{task}"

    @classmethod
    def config_keys(cls, task: str) -> dict[type, str]:
        """Dotted key of each config's section, for `config.bind`. A task's section may change the head."""
        keys = {HeadConfig: "readout.Head", EvaluationConfig: "readout.Evaluation", TASKS[task]: f"readout.tasks.{task}"}
        keys[cls.recipe_class] = cls.recipe_key(task)
        return keys | {ComputeConfig: "readout.Compute", ShardingConfig: "readout.Sharding"}

    @classmethod
    def recipe_of(cls, recipe: Any, encoder: str) -> Any:
        """The recipe of an encoder, by the recipe of all."""
        return recipe

    @classmethod
    def check_batch(cls, recipe: Any, ranks: int) -> None:
        """Raises ValueError: the recipe's batch does not suit the number of ranks."""
        if recipe.batch % ranks:
            raise ValueError(f"batch {recipe.batch} does not divide over {ranks} ranks; set batch to a multiple")

    @classmethod
    def supports(cls, model: str) -> bool:
        """Whether the protocol can train on an encoder. model: its class, as a Checkpoint names it."""
        return True

    @classmethod
    def frozen_head(cls, home: Path, encoder: str, task: str) -> Path | None:
        """Weights of the frozen readout that the training starts from, if there is one. Raises UserError: no such file.

        home: folder of the profile's artifacts.
        """
        return None

    def train_set(self, split: RankSplit, encoder: nn.Module) -> Dataset:
        return ClipDataset(split, self.config.evaluation.cached_clips)

    @abstractmethod
    def build(self, encoder: nn.Module, train_set: Dataset) -> nn.Module:
        """The model with its first weights; `model(*inputs)` is the loss."""

    def batch(self, train_set: Dataset, rank: int, step: int) -> Batch:
        """This rank's part of a step's batch."""
        size, length = self.config.recipe.batch // self.config.evaluation.ranks, len(train_set)
        drawn = shuffled_batch(step, size, length, self.config.seed, rank)
        return Batch(train_set.batch(drawn, epochs_of(step, size, length)))

    def batches(self, train_set: Dataset, rank: int, start: int) -> Iterator[Batch]:
        """This rank's batches from step `start` on."""
        return map(partial(self.batch, train_set, rank), count(start))

    @abstractmethod
    def param_groups(self, model: nn.Module) -> ParamGroups: ...

    def early_stopping(self, model: nn.Module, train_set: Dataset) -> EarlyStopping | None:
        """The rule that ends the training before its last step, if there is one."""
        return None

    @abstractmethod
    def evaluator(self, model: nn.Module, train_set: Dataset) -> tuple[Encode, Predict]:
        """`encode` and `predict` of readout.data.evaluate."""

    def flush(self, train_set: Dataset) -> Callable[[], object]:
        """`flush` of readout.data.evaluate."""
        return lambda: None

    def probes(self, train_set: Dataset) -> dict[str, Predict]:
        """`probes` of readout.data.evaluate."""
        return {}


class Frozen(ReadoutProtocol):
    """The encoder's features are computed once; a readout learns from them.

    4DS's frozen curves (arXiv:2412.15212, headline figure): the AttentionReadout of representations4d at 95 % of the
    depth. The recipe is not published; profile `paper` takes scivid's. Ours: whitening, early stopping, linear probes;
    in the pocket, clipping. Labels of boxes are also propagated, see encoders.propagation.
    """

    name, recipe_class, trains_encoder = "frozen", FrozenConfig, False

    def train_set(self, split: RankSplit, encoder: nn.Module) -> FeatureDataset:
        train_set = FeatureDataset(split, self.features_of(encoder))
        clips = torch.tensor(len(train_set))
        dist.all_reduce(clips)
        if split.rank == 0:
            recipe, windows = self.config.recipe, split.task.train_windows
            size, reused = stored_features(encoder, int(clips), windows, draws=recipe.steps * recipe.batch)
            what = f"features of {clips} clips of {self.config.task_name} x {windows} windows, {size / 1e9:.3g} GB"
            print(f"{what}; {reused:.1%} of the training's draws take one again", file=sys.stderr, flush=True)
        return train_set

    def features_of(self, encoder: nn.Module) -> MemoryFeatures:
        """The source of an encoder's features, on the ranks and the device of the settings."""
        config, evaluation = self.config, self.config.evaluation
        model = FeatureEncoder(encoder)
        parallelize(model, config.sharding, config.compute, ranks=evaluation.ranks)
        model.to(config.device)
        passes = {"device": config.device, "batch": evaluation.feature_batch, "collective": config.sharding.shards > 1}
        if not evaluation.feature_store:
            return MemoryFeatures(model, **passes)
        return FeatureStore(Path(evaluation.feature_store), config.folder, model, compute=config.compute.compute, **passes)

    def batch(self, train_set: FeatureDataset, rank: int, step: int) -> Batch:
        size = self.config.recipe.batch // self.config.evaluation.ranks
        clips = train_set.trained_on if self.config.recipe.patience else range(len(train_set))
        drawn = shuffled_batch(step, size, len(clips), self.config.seed, rank)
        return Batch(train_set.batch([clips[index] for index in drawn], epochs_of(step, size, len(clips))))

    def build(self, encoder: nn.Module, train_set: FeatureDataset) -> ReadoutModel:
        evaluation, recipe, head = self.config.evaluation, self.config.recipe, self.config.new_head(encoder)
        head.initialise(self.config.seed)
        whitening = Whitening.identity(encoder.width)
        if evaluation.whiten:
            strength = {"shrinkage": recipe.shrinkage, "position_std": evaluation.position_std}
            whitening = Whitening.fit(train_set.features, len(train_set), **strength)
        return ReadoutModel(None, whitening, head, self.config.task)

    def param_groups(self, model: ReadoutModel) -> ParamGroups:
        recipe, named = self.config.recipe, dict(model.head.named_parameters())
        keys_values = [(name, named.pop(name)) for name in ("readout.key.weight", "readout.value.weight")]
        share = recipe.rate_at_width / model.head.readout.key.in_features if recipe.rate_at_width else 1.0
        rate = recipe.learning_rate
        return {"head": (list(named.items()), rate), "keys_values": (keys_values, share * rate)}

    def early_stopping(self, model: ReadoutModel, train_set: FeatureDataset) -> EarlyStopping | None:
        return EarlyStopping(model, train_set, self.config.recipe) if self.config.recipe.patience else None

    def evaluator(self, model: ReadoutModel, train_set: FeatureDataset) -> tuple[Encode, Predict]:
        return train_set.source.encode, model.predict

    def flush(self, train_set: FeatureDataset) -> Callable[[], object]:
        return train_set.source.flush

    def probes(self, train_set: FeatureDataset) -> dict[str, Predict]:
        """Linear probes of the features as they are, of the first LABELLED_CLIPS and of all; and the trivial answer.

        Held-out clips among them choose the penalty, the others are fitted. Or label propagation, without any fit.
        """
        task, ranks, views = self.config.task, self.config.evaluation.ranks, len(self.config.task.views)
        if task.propagates:
            return {"propagated": task.predict_propagated}
        if not task.linear or not task.suits_probe(train_set.source.model.encoder):
            return {}
        shortest = torch.tensor(len(train_set))
        dist.all_reduce(shortest, dist.ReduceOp.MIN)
        ends = {f"linear_{clips}": last for clips in LABELLED_CLIPS if (last := clips // ranks * views) < shortest}
        ends |= {"linear": len(train_set)}

        def batches(clips: list[int], first: int, last: int) -> Iterator[RegressionBatch]:
            part = [index for index in clips if first <= index < last]
            for start in range(0, len(part), PROBE_BATCH):
                yield task.regression(*train_set.batch(part[start : start + PROBE_BATCH]))

        fitted, held_out = train_set.trained_on, train_set.held_out
        groups = ((batches(fitted, *span), batches(held_out, 0, span[1])) for span in pairwise([0, *ends.values()]))
        mean, probes = fit_probes(groups, self.config.device)
        named = zip(["mean", *ends], [mean, *probes], strict=True)
        return {name: partial(task.predict_linear, probe) for name, probe in named}


class Finetune(ReadoutProtocol):
    """Encoder and readout are trained together, from the frozen readout on.

    4DS's fine-tuned curves (arXiv:2412.15212, headline figure). The recipe is not published; start and rates are ours.
    """

    name, recipe_class = "finetune", FinetuneConfig

    @classmethod
    def frozen_head(cls, home: Path, encoder: str, task: str) -> Path:
        path = home / "readout" / encoder / task / Frozen.name / HEAD
        if not path.is_file():
            command = f"scaling4d readout {encoder} {task} {Frozen.name}"
            raise UserError(f"no {path}; fine-tuning starts from the frozen readout: run `{command}`")
        return path

    def build(self, encoder: nn.Module, train_set: ClipDataset) -> ReadoutModel:
        head = self.config.new_head(encoder)
        whitening = load_readout_weights(head, self.config.frozen_head)
        return ReadoutModel(encoder, whitening, head, self.config.task)

    def param_groups(self, model: ReadoutModel) -> ParamGroups:
        recipe = self.config.recipe
        head, encoder = (list(module.named_parameters()) for module in (model.head, model.encoder))
        return {"head": (head, recipe.learning_rate), "encoder": (encoder, recipe.encoder_learning_rate)}

    def evaluator(self, model: ReadoutModel, train_set: ClipDataset) -> tuple[Encode, Predict]:
        passes = {"device": self.config.device, "batch": self.config.evaluation.feature_batch}
        return MemoryFeatures(FeatureEncoder(model.encoder), **passes).encode, model.predict


class Classifier(ReadoutProtocol):
    """MAE-ST's fine-tuning for actions (arXiv:2205.09113, by the settings of mae_st); see readout.classifier."""

    name, recipe_class, evaluation_batch = "classifier", ClassifierConfig, 8
    clip_norm = 5.0
    tasks = ("actions",)

    @classmethod
    def recipe_key(cls, task: str) -> str:
        return f"readout.{cls.name}"

    @classmethod
    def config_keys(cls, task: str) -> dict[type, str]:
        return {kind: key for kind, key in super().config_keys(task).items() if kind is not HeadConfig}

    @classmethod
    def recipe_of(cls, recipe: ClassifierConfig, encoder: str) -> ClassifierConfig:
        return recipe.of(encoder)

    @classmethod
    def check_batch(cls, recipe: ClassifierConfig, ranks: int) -> None:
        super().check_batch(recipe, ranks)
        batch, repeats = recipe.batch, recipe.repeats
        if batch == ranks:
            raise ValueError(f"batch {batch} leaves one clip to each of {ranks} ranks, and mixup needs two")
        if batch // ranks % repeats:
            raise ValueError(f"batch {batch} does not divide among {ranks} ranks, each video {repeats} times; needed a multiple")

    @classmethod
    def supports(cls, model: str) -> bool:
        return model in MODELS and model != "PixelTokens"

    def build(self, encoder: nn.Module, train_set: ClipDataset) -> ClassifierModel:
        for number, block in enumerate(encoder.blocks):
            block.drop_path = self.config.recipe.drop_path * number / max(len(encoder.blocks) - 1, 1)
        head = MeanPoolClassifier(width=encoder.width, classes=self.config.task.classes, dropout=self.config.recipe.dropout)
        head.initialise(encoder, self.config.seed)
        return ClassifierModel(encoder, head)

    def batch(self, train_set: ClipDataset, rank: int, step: int) -> Batch:
        recipe, seed, length = self.config.recipe, self.config.seed, len(train_set)
        videos, copies = recipe.batch // self.config.evaluation.ranks // recipe.repeats, range(recipe.repeats)
        drawn = zip(shuffled_batch(step, videos, length, seed, rank), epochs_of(step, videos, length), strict=True)
        places = [(index, epoch * recipe.repeats + copy) for index, epoch in drawn for copy in copies]
        pixels, target = train_set.batch(*map(list, zip(*places, strict=True)))
        strength = {name: getattr(recipe, name) for name in ("randaugment", "crop", "aspect", "erasing")}
        clips = [augment_clip(clip, seeds.numpy_rng(seed, "augment", rank, step, n), **strength) for n, clip in enumerate(pixels)]
        rng = seeds.numpy_rng(seed, "mix", rank, step)
        return Batch(mix_clips(torch.stack(clips), target["action"], self.config.task.classes, rng))

    def param_groups(self, model: ClassifierModel) -> ParamGroups:
        return layer_decay_groups(model, self.config.recipe.learning_rate, self.config.recipe.layer_decay)

    def evaluator(self, model: ClassifierModel, train_set: ClipDataset) -> tuple[Encode, Predict]:
        return lambda clips: torch.stack(clips).to(self.config.device), lambda pixels, _: model.scores(pixels)


PROTOCOLS: dict[str, type[ReadoutProtocol]] = {protocol.name: protocol for protocol in (Frozen, Finetune, Classifier)}


def load_readout_weights(head: Head, path: Path) -> Whitening:
    """Fill a head from `head.safetensors` of a frozen readout; returns its whitening.

    Raises UserError: the file is damaged, or of another head.
    """
    tensors = checkpoint.load_tensors(path)
    try:
        whitening = Whitening(tensors.pop("whitening.matrix"), tensors.pop("whitening.offset"))
        head.load_state_dict(tensors, assign=next(head.parameters()).is_meta)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} does not fit these settings, or is of another version: {reason}") from error
    return whitening
