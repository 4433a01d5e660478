"""BENCHMARK -> LESSONS AND SUMS: what a rank learns from and is judged on, and how little of a split it holds at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from scaling4d import benchmarks, config
from scaling4d.benchmarks.frames import Samples
from scaling4d.benchmarks.skipped import Skipped
from scaling4d.encoders.features import Inputs, together
from scaling4d.readout import views
from scaling4d.readout.tasks.points import Points
from scaling4d.readout.tasks.task import Task
from scaling4d.records import Sample, UserError, write_json
from scaling4d.training.distributed import at, gather

Sums = dict[str, tuple[float, float]]  # metric -> sum and count


@config.configurable
@dataclass(frozen=True)
class Evaluation:
    """What all readouts share. ranks: one-thread processes; results depend on it. depth_fraction: 0.95 in 4DS.

    standardise: whiten features over the training clips before the readout (ours; released: false), see Standard.of;
    place_deviation: what a token's place then adds to all clips alike.
    data: folder of benchmarks. bootstrap_draws: resamplings of the validation videos for the interval.
    max_bad_share: of a split's samples may be damaged or missing, and are then left out (ours).
    feature_store: folder in which a frozen encoder's features stay, for all readouts to share; "": in memory, for this one alone.
    feature_dtype: of features in the store: float32 (changes no result), float16 or bfloat16. stored_depths: fractions of the
    depth that the store keeps beside depth_fraction, so that a sweep over them costs no second pass.
    kept_clips: so many clips a rank stay in memory where the encoder is trained too; the others are read again.
    hang_s: when a rank has stood still for so long, be it in a wait for slower ones, the readout is ended and says so. Neither
    changes a result.
    """

    ranks: int
    depth_fraction: float
    standardise: bool
    place_deviation: float
    data: str
    bootstrap_draws: int
    max_bad_share: float
    feature_store: str
    feature_dtype: str
    stored_depths: tuple[float, ...]
    kept_clips: int
    hang_s: float


@dataclass(frozen=True)
class Share:
    """Every `ranks`-th item of a benchmark's split, from `rank` on. clip: T H W that the encoder takes.

    skipped: what gave no sample here, filled as it is read.
    """

    task: str
    split: str
    asked: Task
    evaluation: Evaluation
    clip: tuple[int, int, int]
    rank: int
    ranks: int
    skipped: list[Skipped] = field(default_factory=list)

    def samples(self) -> Samples:
        """For validation in the task's test views, and asked about where the task says."""
        judged = self.split != "train"
        return benchmarks.read(
            self.task,
            Path(self.evaluation.data),
            self.split,
            frames=self.clip[0],
            rate_hz=self.asked.rate_hz,
            side_px=self.clip[1],
            part=slice(self.rank, None, self.ranks),
            skipped=self.skipped,
            max_bad_share=self.evaluation.max_bad_share,
            views=tuple(self.asked.test_views) if judged else (1, 1),
            queries=self.asked.queries if judged and isinstance(self.asked, Points) else None,
        )

    def by_place(self, samples: Samples) -> Iterator[tuple[int, list[Sample]]]:
        """What gives samples, item by item; when all is read, whether too much gave none.

        Raises:
            UserError: too few samples, or too large a share of the items of all ranks is damaged or missing.
        """
        read = 0
        for place, found in samples.by_place():
            at(f"item {place + 1} of {self.task} {self.split}")
            read += 1
            yield place, found
        skipped, total = self.all_skipped(), sum(gather([read]))
        benchmarks.judge(skipped, len(skipped) + total, self.evaluation.max_bad_share, f"{self.task} {self.split}")
        if not read:
            raise UserError(
                f"{self.task}: too few samples in split {self.split} for {self.ranks} ranks; "
                "lower readout.shared.Evaluation.ranks"
            )

    def all_skipped(self) -> list[Skipped]:
        """By all ranks; of use when all is read."""
        return gather(self.skipped)


# ---------------------------------------------------------------- to learn from


class Lessons(Protocol):
    """What a readout is trained on: clips in all the views of its task."""

    def __len__(self) -> int: ...

    def batch(self, chosen: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Inputs, pixels `B T H W C` or features `B t n D`, and what is to be learned of them."""
        ...


@dataclass(frozen=True)
class Held:
    """Inputs that are ready, in memory or mapped into it."""

    inputs: Sequence[Tensor]
    targets: list[dict[str, np.ndarray]]

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, chosen: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        return together(self.inputs, chosen), stacked([self.targets[index] for index in chosen])


@dataclass(frozen=True)
class Place:
    """A clip: item of the list, which of its samples, and the view of it."""

    item: int
    sample: int
    view: str


@dataclass(frozen=True)
class Reread:
    """Clips as they are: the first of them in memory, the others read from the benchmark whenever they are wanted."""

    samples: Samples
    asked: Task
    places: list[Place]
    kept: list[tuple[np.ndarray, dict[str, np.ndarray]]]

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, chosen: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, targets = zip(*(self._one(index) for index in chosen), strict=True)
        return torch.from_numpy(np.stack(pixels)), stacked(targets)

    def _one(self, index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        if index < len(self.kept):
            return self.kept[index]
        place = self.places[index]
        (seen,) = views.views(self.samples.at(place.item)[place.sample], (place.view,))
        return lesson(self.asked, seen)


def held(share: Share, inputs: Inputs) -> Held:
    """The lessons of a frozen encoder: its features, made once.

    Raises:
        UserError: as Share.by_place.
    """
    added, targets = [], []
    for _, sample in _views(share, share.samples()):
        pixels, target = lesson(share.asked, sample)
        added.append(inputs.add(torch.from_numpy(pixels)))
        targets.append(target)
    inputs.flush()
    return Held(inputs.ready(added), targets)


def reread(share: Share) -> Reread:
    """The lessons of an encoder that is trained too. All is read once, to know what can be.

    Raises:
        UserError: as Share.by_place.
    """
    samples = share.samples()
    places, kept = [], []
    for place, sample in _views(share, samples):
        places.append(place)
        if len(kept) < share.evaluation.kept_clips:
            kept.append(lesson(share.asked, sample))
    return Reread(samples, share.asked, places, kept)


def _views(share: Share, samples: Samples) -> Iterator[tuple[Place, Sample]]:
    names = share.asked.views
    for item, found in share.by_place(samples):
        for number, plain in enumerate(found):
            for name, seen in zip(names, views.views(plain, names), strict=True):
                yield Place(item, number, name), seen


def lesson(asked: Task, sample: Sample) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Pixels `T H W C`, and what is to be learned of them."""
    return sample.pixels, asked.lesson(asked.target(sample))


# ---------------------------------------------------------------- to be judged on


@torch.no_grad()
def judged(
    share: Share, inputs: Inputs, says: Callable[[Tensor, dict[str, Tensor]], Tensor], *, size: int
) -> tuple[list[str], list[Sums], float]:
    """The video of every clip of a split, the metric's sums of what a readout says of it, `size` clips at a time; and the seconds
    that the readout and the metric took of it.

    A clip's test views follow one another and are judged together.
    Raises:
        UserError: as Share.by_place.
    """
    views_of_one = math.prod(share.asked.test_views)
    samples = (sample for _, found in share.by_place(share.samples()) for sample in found)
    videos, sums, said, judging_s = [], [], [], 0.0
    while some := list(islice(samples, size)):
        ready = inputs.ready([inputs.add(torch.from_numpy(sample.pixels)) for sample in some])
        videos += [sample.video for sample in some]
        batch = stacked([share.asked.target(sample) for sample in some])
        started = time.monotonic()
        said += zip(says(together(ready, range(len(some))), batch).cpu().numpy(), one_by_one(batch), strict=True)
        whole = len(said) - len(said) % views_of_one
        sums += measured(share.asked, said[:whole])
        judging_s += time.monotonic() - started
        said = said[whole:]
    inputs.flush()
    return videos[::views_of_one], sums, judging_s


def measured(asked: Task, said: Sequence[tuple[np.ndarray, dict[str, np.ndarray]]]) -> list[Sums]:
    """Of predictions and their targets; the test views of a clip are pooled."""
    count, found = math.prod(asked.test_views), []
    for start in range(0, len(said), count):
        predicted, target = said[start]
        one = predicted if count == 1 else asked.pooled(np.stack([view for view, _ in said[start : start + count]]))
        found.append(asked.measure(one, target))
    return found


def stacked(targets: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """A batch. Where clips differ in how many things are followed, zeros fill up: what is not there is not valid."""
    batch = {}
    for name in targets[0]:
        values = [np.asarray(target[name]) for target in targets]
        if values[0].ndim:
            longest = max(map(len, values))
            values = [np.concatenate([v, np.zeros((longest - len(v), *v.shape[1:]), v.dtype)]) for v in values]
        batch[name] = torch.from_numpy(np.stack(values))
    return batch


def one_by_one(batch: dict[str, Tensor]) -> Iterator[dict[str, np.ndarray]]:
    """The targets of a batch's clips."""
    for row in range(len(next(iter(batch.values())))):
        yield {name: value[row].numpy() for name, value in batch.items()}


def write_skipped(out: Path, **splits: list[Skipped]) -> None:
    """`skipped.json`, if anything was: what the splits list and the result does not rest on."""
    listed = [{"split": split, **asdict(item)} for split, skipped in splits.items() for item in skipped]
    if listed:
        write_json(out / "skipped.json", listed)
