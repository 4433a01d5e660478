"""CLIPS -> BATCHES: the order is a pure function of (seed, position), so a resumed run sees what an unbroken one would.

Table (`Clips`) -> order (`Order`) -> draws of a step (`Steps`) -> pixels (`Reader`, `Views`) -> `Batches`. With `workers` = 0 no
thread and no process is started: the ranks that call it are one-thread processes already.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from scaling4d import seeds, video
from scaling4d.records import ClipBatch, UserError

NUMBERS = {
    "offset": np.int64,
    "bytes": np.int64,
    "start_s": np.float64,
    "origin_s": np.float64,
    "frames": np.int32,
    "rate_hz": np.float64,
    "side_px": np.int32,
    "encoded": np.bool_,
}
ROWS = 2**16  # of the table that are decoded at a time
PREFETCH = 2  # batches that a worker is ahead
WAITING = {signal.SIGINT, signal.SIGUSR1, signal.SIGTERM}  # signals that a worker leaves to its rank
LOST = (EOFError, ConnectionError, FileNotFoundError)  # raised by torch where a worker ended a moment ago


@dataclass(frozen=True)
class Row:
    """Where a clip lies: `bytes` bytes at `offset` of the shard. They are the clip itself if `encoded`, else its whole source,
    whose first frame is shown at `origin_s` of its own clock."""

    id: str
    shard: str
    offset: int
    bytes: int
    start_s: float
    origin_s: float
    frames: int
    rate_hz: float
    side_px: int
    encoded: bool


class Clips(Sequence):
    """The table of one split, a `Row` a clip, kept as columns: about 60 bytes a clip."""

    def __init__(self, folder: Path, split: str, *, most: int = 0) -> None:
        """
        Args:
            most: clips to take, spread evenly over the split; 0: all.
        Raises:
            UserError: `folder` is not what the clips stage writes, or holds no clip of this split.
        """
        import pyarrow as pa

        total = count(folder, split)
        most = min(most or total, total)
        columns = {name: np.empty(most, kind) for name, kind in {"shard": np.int32, **NUMBERS}.items()}
        ids, shards, seen, end = [], {}, 0, 0
        for rows in _rows(folder, ["split", "id", "shard", *NUMBERS]):
            mine = _is(rows["split"], split)
            places = np.flatnonzero(mine)
            mine[places[(seen + np.arange(len(places))) * most % total >= most]] = False
            seen += len(places)
            ids.append(rows["id"].filter(pa.array(mine)))
            start, end = end, end + len(ids[-1])
            columns["shard"][start:end] = _numbered(rows["shard"], mine, shards)
            for name in NUMBERS:
                columns[name][start:end] = rows[name].to_numpy(zero_copy_only=False)[mine]
        self.ids, self.shards = pa.chunked_array(ids), list(shards)
        self.columns = {name: _constant(columns.pop(name)) for name in list(columns)}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Row:
        values = {name: column[index].item() for name, column in self.columns.items()}
        return Row(id=self.ids[index].as_py(), **values | {"shard": self.shards[values["shard"]]})


def _rows(folder: Path, columns: list[str]) -> Iterator[Any]:
    """The table in pyarrow record batches, read in the calling thread.

    Raises:
        UserError: no table, a damaged one, or one that lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "clips.parquet"
    if not path.is_file():
        raise UserError(f"no {path}; run `dvc repro clips`")
    try:
        with pa.memory_map(str(path)) as content:  # opened by its path, it would start a thread
            file = pq.ParquetFile(content, read_dictionary=["split", "shard"], pre_buffer=False)
            missing = sorted(set(columns) - set(file.schema_arrow.names))
            if missing:
                raise UserError(f"{path} has no column {', '.join(missing)}; run the clips stage again")
            yield from file.iter_batches(ROWS, columns=columns, use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is damaged: {error}; run the clips stage again") from error


def _is(words: Any, wanted: str) -> np.ndarray:
    """Where a dictionary column holds the word."""
    return np.isin(words.indices.to_numpy(), [at for at, word in enumerate(words.dictionary.to_pylist()) if word == wanted])


def _numbered(words: Any, mine: np.ndarray, known: dict[str, int]) -> np.ndarray:
    """The chosen rows of a dictionary column as numbers into `known`, which grows by the new words in order of appearance."""
    places = words.indices.to_numpy()[mine]
    dictionary = words.dictionary.to_pylist()
    _, first = np.unique(places, return_index=True)
    numbers = np.full(len(dictionary), -1, dtype=np.int32)
    for place in places[np.sort(first)]:
        numbers[place] = known.setdefault(dictionary[place], len(known))
    return numbers[places]


def _constant(column: np.ndarray) -> np.ndarray:
    """The same column; one that holds a single value takes no memory."""
    return np.broadcast_to(column[0], column.shape) if (column == column[0]).all() else column


class Order:
    """Which clip stands at which place of an epoch: each clip once, a pure function of (seed, epoch, place).

    Shards are shuffled and taken in windows of `window_shards`, and the clips of a window are shuffled together: whoever reads
    along reads that many files at a time and holds the order of one window. 0, or more than there are: one window of all clips.
    """

    def __init__(self, clips: Clips, *, seed: int, window_shards: int) -> None:
        """Raises UserError: windows are wanted, and the table is not in order of the shards."""
        self.clips, self.seed = len(clips), seed
        self.window_shards = window_shards if 0 < window_shards < len(clips.shards) else 0
        if self.window_shards:
            shard = clips.columns["shard"]
            if (shard[1:] < shard[:-1]).any():
                raise UserError(f"{self.clips} clips are not in order of their shards; run the clips stage again")
            self.starts = np.searchsorted(shard, np.arange(len(clips.shards) + 1))
        self.windows, self.window = lru_cache(maxsize=1)(self._windows), lru_cache(maxsize=1)(self._window)

    def __call__(self, epoch: int, place: int) -> int:
        if not self.window_shards:
            return int(self.window(epoch, None)[place])
        _, first = self.windows(epoch)
        number = int(np.searchsorted(first, place, side="right")) - 1
        return int(self.window(epoch, number)[place - first[number]])

    def _windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in their order, and the places at which its windows begin."""
        shards = seeds.numpy(self.seed, "order", epoch).permutation(len(self.starts) - 1)
        sizes = np.diff(self.starts)[shards]
        return shards, (np.cumsum(sizes) - sizes)[:: self.window_shards]

    def _window(self, epoch: int, number: int | None) -> np.ndarray:
        """The clips of a window in their order; of all without a number."""
        if number is None:
            return seeds.numpy(self.seed, "order", epoch).permutation(self.clips)
        shards = self.windows(epoch)[0][number * self.window_shards : (number + 1) * self.window_shards]
        members = np.concatenate([np.arange(self.starts[shard], self.starts[shard + 1]) for shard in shards])
        return seeds.numpy(self.seed, "order", epoch, number).permutation(members)


class Reader:
    """Pixels uint8 `T side side 3` of clips, read from their shards where they lie; no file stays open."""

    def __init__(self, folder: Path, *, kept: int) -> None:
        """kept: how many decoded clips stay in memory."""
        self.folder = folder
        self.pixels = lru_cache(maxsize=kept)(self._decode)

    def _decode(self, row: Row) -> Tensor:
        """Raises UserError: the clip does not decode to what the table says."""
        source = video.Member(self.folder / "shards" / row.shard, row.offset, row.bytes)
        try:
            if row.encoded:
                _, pixels = video.read(source)
            else:
                times_s = row.origin_s + row.start_s + np.arange(row.frames) / row.rate_hz
                pixels = video.at(source, times_s, side_px=row.side_px)
        except (video.VideoError, OSError) as error:
            raise UserError(f"clip {row.id} of {source.path}: {error}; run the clips stage again") from error
        needed = (row.frames, row.side_px, row.side_px, 3)
        if pixels.shape != needed:
            raise UserError(f"clip {row.id}: T H W C is {pixels.shape}, needed {needed}; run the clips stage again")
        return torch.from_numpy(pixels)


class Draw(NamedTuple):
    """One of the copies of a clip in an epoch, with all that a worker needs to know of it."""

    epoch: int
    index: int
    copy: int
    row: Row


@dataclass(frozen=True)
class Views(Dataset):
    """Batches of clips as training sees them, each copy cropped and flipped on its own; a failure comes back as a value, since a
    worker process would wrap it. Holds no table, so that workers are small."""

    folder: Path
    kept: int
    seed: int
    flip: bool
    crop: tuple[float, float]

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.folder, kept=max(self.kept, 1))

    def __getitem__(self, draws: list[Draw]) -> ClipBatch | UserError:
        try:
            return _together([draw.row for draw in draws], map(self.view, draws))
        except UserError as error:
            return error

    def view(self, draw: Draw) -> Tensor:
        pixels = self.reader.pixels(draw.row)
        if self.crop != (1.0, 1.0):
            rng = seeds.numpy(self.seed, "crop", draw.epoch, draw.index, draw.copy)
            pixels = cropped(pixels, area=self.crop, rng=rng)
        if self.flip:
            chances = seeds.numpy(self.seed, "flip", draw.epoch, draw.index).random((draw.copy + 1, 2))[draw.copy]
            mirror, backwards = chances < 0.5
            pixels = pixels.flip([axis for axis, wanted in ((0, backwards), (2, mirror)) if wanted])
        return pixels


def cropped(pixels: Tensor, *, area: tuple[float, float], rng: np.random.Generator) -> Tensor:
    """A random square of a clip, the same in all its frames, resized to the clip's own side: uint8 `T H W C`, H = W.

    Args:
        area: share of the picture that the square covers, uniform between the two.
    Source: random resized crop of MAE-ST, arXiv:2205.09113 (there the sides also vary from 3:4 to 4:3).
    """
    side = pixels.shape[1]
    kept = max(round(side * rng.uniform(*area) ** 0.5), 1)
    top, left = rng.integers(side - kept, size=2, endpoint=True)
    square = pixels[:, top : top + kept, left : left + kept].permute(0, 3, 1, 2).float()  # T C H W
    resized = functional.interpolate(square, size=(side, side), mode="bilinear")  # never smaller: nothing to smooth before
    return resized.round_().to(torch.uint8).permute(0, 2, 3, 1)  # T H W C


@dataclass(frozen=True)
class Steps:
    """What is drawn in the steps `start` ... `steps - 1`: this rank's part of each global batch."""

    clips: Clips
    order: Order
    batch: int
    repeats: int
    start: int
    steps: int
    rank: int
    ranks: int

    def __iter__(self) -> Iterator[list[Draw]]:
        part = self.batch // self.ranks
        for step in range(self.start, self.steps):
            first = step * self.batch + self.rank * part
            yield [self.draw(position) for position in range(first, first + part)]

    def draw(self, position: int) -> Draw:
        loaded, copy = divmod(position, self.repeats)
        epoch, place = divmod(loaded, len(self.clips))
        index = self.order(epoch, place)
        return Draw(epoch, index, copy, self.clips[index])


class Batches(Iterator[ClipBatch]):
    """This rank's part of one global batch after another; `state_dict()` after any of them says where to go on.

    The state is the next step, so it fits any number of ranks and of workers (StatefulDataLoader's own fits one of workers).
    """

    def __init__(self, steps: Steps, views: Views, *, workers: int) -> None:
        self.steps, self.views, self.workers = steps, views, workers
        self.running: Iterator[ClipBatch | UserError] | None = None

    def state_dict(self) -> dict[str, int]:
        """The step that comes next, and what the order of the clips depends on."""
        steps, order = self.steps, self.steps.order
        return {
            "step": steps.start,
            "seed": order.seed,
            "clips": order.clips,
            "window_shards": order.window_shards,
            "batch": steps.batch,
            "repeats": steps.repeats,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at the state's step.

        Raises:
            UserError: the state is of another order of clips.
        """
        mine = self.state_dict()
        if state.keys() != mine.keys():
            raise UserError(f"not a state of the loader: it has {', '.join(state) or 'nothing'}, needed {', '.join(mine)}")
        other = [f"{name} {state[name]}, here {mine[name]}" for name in mine if name != "step" and state[name] != mine[name]]
        if other:
            raise UserError(f"the state is of another order of clips ({'; '.join(other)}); resume with what it was saved with")
        self._go_on(state["step"], None)

    def _go_on(self, step: int, running: Iterator[ClipBatch | UserError] | None) -> None:
        self.steps, self.running = replace(self.steps, start=step), running

    def __next__(self) -> ClipBatch:
        """Raises UserError: a clip cannot be decoded, or a worker process ended."""
        step, running = self.steps.start, self.running
        self.running = None  # what fails is over; the next call would start anew at this step
        if step >= self.steps.steps:
            raise StopIteration
        try:
            running = running if running is not None else _started(self.steps, self.views, self.workers)
            batch = next(running)
        except (RuntimeError, *LOST) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                raise
            why = f"{type(error).__name__}: {error}".strip(": ")
            raise UserError(
                f"step {step}: a process that decodes clips ended ({why}); lower pretrain.Running.workers if memory ran out"
            ) from error
        if isinstance(batch, UserError):
            raise batch
        self._go_on(step + 1, running)
        return batch


def _started(steps: Steps, views: Views, workers: int) -> Iterator[ClipBatch | UserError]:
    """What a loader gives from now on. Workers are spawned, since a rank has threads of gloo and perhaps CUDA, which a fork does
    not survive; they end when their rank is gone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
        loader = StatefulDataLoader(
            views,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=_serve,
            collate_fn=_as_it_is,
            generator=seeds.stream(steps.order.seed, "loader"),
            snapshot_every_n_steps=0,
        )
    if not workers:
        return iter(loader)
    multiprocessing.current_process().daemon = False  # a rank is a daemon, and Python lets those start no process
    with _signals():
        return iter(loader)


def check(*, batch: int, ranks: int, repeats: int, crop: tuple[float, float], window_shards: int, workers: int) -> None:
    """What of `batches` can be refused before there are clips.

    Raises:
        UserError: batch does not divide by ranks and repeats; crop, window_shards or workers out of range.
    """
    if repeats < 1 or batch % (ranks * repeats):
        raise UserError(
            f"a batch of {batch} clips does not divide among {ranks} ranks, each clip {repeats} times; set batch to a multiple"
        )
    if not 0 < crop[0] <= crop[1] <= 1:
        raise UserError(f"crop is {list(crop)}, needed 0 < smallest <= largest <= 1; set pretrain.Training.crop")
    for name, value, setting in (("workers", workers, "Running"), ("window_shards", window_shards, "Training")):
        if value < 0:
            raise UserError(f"{name} is {value}, needed 0 or more; set pretrain.{setting}.{name}")


@contextmanager
def _signals() -> Iterator[None]:
    """While workers start: interrupts and requests to save and stop wait, which workers inherit and so leave them to their rank,
    also where they are sent to all processes of a job, as Slurm does; and torch's handler, which raises wherever a rank is when
    a worker has ended, does not stay: `next` finds that out by itself, within 5 s."""
    handler = signal.getsignal(signal.SIGCHLD)
    resource_tracker.ensure_running()  # Python's, which the first worker would start: that unblocks signals
    waiting = signal.pthread_sigmask(signal.SIG_BLOCK, WAITING)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, waiting)


def batches(
    folder: Path,
    *,
    split: str,
    batch: int,
    repeats: int,
    seed: int,
    start: int,
    steps: int,
    flip: bool,
    crop: tuple[float, float],
    window_shards: int,
    rank: int,
    ranks: int,
    kept: int,
    workers: int,
) -> Batches:
    """This rank's part of the global batches `start` ... `steps - 1` of an endless sequence of epochs.

    Position p of the sequence is clip q % n of the order of epoch q // n, q = p // repeats; batch s holds positions s * batch ...
    and rank r its r-th part, so batches follow one another across epochs and every epoch covers every clip `repeats` times.

    Args:
        batch: clips a step over all ranks, copies counted. repeats: copies of a clip in a row, each cropped, flipped (and later
          masked) on its own; it is decoded once. start: step to begin at, to resume. flip: mirror and time-reverse at random.
        crop: smallest and largest share of the picture's area that a random square keeps. window_shards: as in `Order`.
        kept: how many decoded clips stay in the memory of each process that decodes; the batches do not depend on it.
        workers: processes that decode for this rank, 0: itself; the batches do not depend on it.
    Raises:
        UserError: as `check`; no clips.
    """
    check(batch=batch, ranks=ranks, repeats=repeats, crop=crop, window_shards=window_shards, workers=workers)
    clips = Clips(folder, split)
    order = Order(clips, seed=seed, window_shards=window_shards)
    drawn = Steps(clips, order, batch=batch, repeats=repeats, start=start, steps=steps, rank=rank, ranks=ranks)
    return Batches(drawn, Views(folder, kept=kept, seed=seed, flip=flip, crop=tuple(crop)), workers=workers)


def every(folder: Path, *, split: str, batch: int, rank: int, ranks: int, most: int = 0) -> Iterator[ClipBatch]:
    """Every clip of a split once over all ranks, in a fixed order: clip i goes to rank i % ranks. The last batch may be small.

    most: as of `Clips`.
    """
    clips, reader = Clips(folder, split, most=most), Reader(folder, kept=0)
    mine = range(rank, len(clips), ranks)
    for first in range(0, len(mine), batch):
        rows = [clips[index] for index in mine[first : first + batch]]
        yield _together(rows, map(reader.pixels, rows))


def count(folder: Path, split: str) -> int:
    """How many clips a split holds; UserError if none."""
    found = sum(int(_is(rows["split"], split).sum()) for rows in _rows(folder, ["split"]))
    if not found:
        raise UserError(f"{folder} holds no clips of split {split!r}; raise clips.Curation.val_share, or add videos")
    return found


def _together(rows: list[Row], views: Iterable[Tensor]) -> ClipBatch:
    """One batch, each clip put in its place as it is made; a worker makes it in memory that its rank sees, too."""
    shape = (len(rows), rows[0].frames, rows[0].side_px, rows[0].side_px, 3)
    pixels = torch.empty(0, dtype=torch.uint8)
    if get_worker_info() is None:
        pixels = pixels.new_empty(shape)
    else:
        pixels.set_(torch.UntypedStorage._new_shared(math.prod(shape)), 0, shape)
    for place, view in zip(pixels, views, strict=True):
        place.copy_(view)
    return ClipBatch(pixels, tuple(row.id for row in rows), tuple(row.start_s for row in rows))


def _serve(worker: int) -> None:
    """In a worker: only its rank ends it. Then nothing is taken down first; that aborts, with a message, where a batch is still
    on its way."""
    atexit.register(os._exit, 0)
    threading.Thread(target=_leave_when_the_rank_says_so, daemon=True).start()


def _leave_when_the_rank_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _as_it_is(batch: ClipBatch | UserError) -> ClipBatch | UserError:
    return batch
