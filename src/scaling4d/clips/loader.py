"""CLIPS -> BATCHES. Batch n is a pure function of the arguments and n: to resume is to start at a step.

Table (`ClipTable`) -> order (`WindowedShuffle`) -> pixels (`decode_windows`, `AugmentedBatches`) -> `train_batches`.
A model sees windows of `frames` frames. A clip of as many frames is its own window, and its copies are alike. A longer
clip gives each copy a window at another time. With `workers` = 0 no thread and no process is started.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from scaling4d import seeds, video
from scaling4d.clips.crop import check_crop, draw_rectangle, resized_crop
from scaling4d.config import check_types, require_positive
from scaling4d.records import Augmentation, ClipBatch, MaskedTokens, UserError, shortened

REPETITIVE = ("origin_s", "frames", "rate_hz", "side_px", "encoded")  # columns of one value, or of few
ARROW_TYPES = {  # of columns, by the types of a ClipRecord's fields
    "str": ("string", "dictionary<values=string, indices=int32, ordered=0>"),
    "int": ("int64",),
    "float": ("double",),
    "bool": ("bool",),
}
PREFETCH = 2  # batches that a worker is ahead
OF_A_LOADER = ("DataLoader worker (pid", "Pin memory thread exited")  # torch's errors where a worker ended
SampledClip = tuple[int, int, int, "ClipRecord"]  # epoch, index in the table, number of the copy, record
LoadedClip = tuple[str, float, Tensor]  # id, start in seconds of the source, uint8 `T H W C`


class ClipsError(UserError):
    """Clips are missing, damaged, or not those that their table states."""


class EmptySplitError(ClipsError):
    """A split holds no clips."""


@dataclass(frozen=True)
class ClipRecord:
    """Where a clip lies: `bytes` bytes at `offset` of the shard. They are the clip itself if `encoded`.

    Otherwise they are its whole source, whose first frame is shown at `origin_s` of its clock.
    """

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

    def __post_init__(self) -> None:
        require_positive(self, "frames", "rate_hz", "side_px")
        if self.frames * self.side_px**2 > video.MAX_PIXELS:
            raise ValueError(f"{self.frames} frames of {self.side_px} px; needed at most {video.MAX_PIXELS} pixels")


class ClipTable(Sequence):
    """The clips of one split as `ClipRecord`s, kept as Arrow columns: about 60 bytes a clip."""

    def __init__(self, folder: Path, split: str, *, max_clips: int = 0) -> None:
        """max_clips: clips to take, evenly spaced over the split; 0: all.

        Raises ClipsError: `folder` has no table of clips, a damaged one, or no clip of this split.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        total, seen, parts = count_clips(folder, split), 0, []
        size = min(max_clips or total, total)
        for rows in _read_table(folder, ["split", *ClipRecord.__dataclass_fields__]):
            clips = rows.filter(pc.equal(rows["split"], split)).drop_columns("split")
            taken = np.arange(seen, seen + len(clips)) * size % total < size
            seen += len(clips)
            columns = dict(zip(clips.schema.names, clips.filter(pa.array(taken)).columns, strict=True))
            columns["shard"] = columns["shard"].dictionary_decode().dictionary_encode()  # numbered by first appearance
            columns |= {name: pc.run_end_encode(columns[name]) for name in REPETITIVE}
            parts.append(pa.table(columns))
        self.table = pa.concat_tables(filter(len, parts)).unify_dictionaries()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> ClipRecord:
        """Raises ClipsError: the row is no clip's."""
        try:
            row = {name: self.table[name][index].as_py() for name in self.table.column_names}
            check_types(ClipRecord, row)
            return ClipRecord(**row)
        except ValueError as error:
            raise ClipsError(f"row {index} of a split is damaged: {shortened(error)}") from error


def count_clips(folder: Path, split: str) -> int:
    """How many clips a split holds. Raises EmptySplitError: none."""
    import pyarrow.compute as pc

    clips = sum(pc.sum(pc.equal(rows["split"], split)).as_py() or 0 for rows in _read_table(folder, ["split"]))
    if not clips:
        raise EmptySplitError(f"{folder} holds no clips of split {split!r}")
    return clips


def _read_table(folder: Path, columns: list[str]) -> Iterator[Any]:
    """The table in pyarrow record batches, read in the calling thread.

    Raises ClipsError: no table, a damaged one, or one that lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "clips.parquet"
    if not path.is_file():
        raise ClipsError(f"no {path}")
    try:
        with pa.memory_map(str(path)) as content:  # opened by its path, it would start a thread
            file = pq.ParquetFile(content, read_dictionary=["split", "shard"], pre_buffer=False)
            if missing := sorted(set(columns) - set(file.schema_arrow.names)):
                raise ClipsError(f"{path} has no column {', '.join(missing)}")
            for name in columns:
                kind, needed = str(file.schema_arrow.field(name).type), ARROW_TYPES[ClipRecord.__annotations__.get(name, "str")]
                if kind not in needed:
                    raise ClipsError(f"{path}: column {name} holds {kind}; needed {needed[0]}")
            yield from file.iter_batches(2**16, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError, KeyError) as error:  # KeyError: it lacks split or shard
        raise ClipsError(f"{path} is damaged: {shortened(error)}") from error


class WindowedShuffle:
    """The clip at each place of an epoch: each clip once, a pure function of (seed, epoch, place).

    Shards are shuffled and taken in windows of `window_shards` (a shuffle buffer, no window of frames), and the clips
    of a window are shuffled together. A reader opens that many files at a time and holds the order of one window. 0,
    or more than there are: one window.
    """

    def __init__(self, clips: ClipTable, *, seed: int, window_shards: int) -> None:
        """Raises ClipsError: windows of a table that is not in order of the shards."""
        self.clips, self.seed = len(clips), seed
        column = clips.table["shard"]
        shards = len(column.chunk(0).dictionary)
        self.window_shards = window_shards if 0 < window_shards < shards else 0
        if self.window_shards:
            numbers = np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks])
            if (numbers[1:] < numbers[:-1]).any():
                raise ClipsError(f"{self.clips} clips are not in order of their shards")
            self.starts = np.searchsorted(numbers, np.arange(shards + 1))
        self.windows, self.window = lru_cache(maxsize=1)(self._windows), lru_cache(maxsize=1)(self._window)

    def __call__(self, epoch: int, place: int) -> int:
        """The index of a clip."""
        if not self.window_shards:
            return int(self.window(epoch, None)[place])
        _, first = self.windows(epoch)
        number = int(np.searchsorted(first, place, side="right")) - 1
        return int(self.window(epoch, number)[place - first[number]])

    def _windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in their order, and the places at which its windows begin."""
        shards = seeds.numpy_rng(self.seed, "order", epoch).permutation(len(self.starts) - 1)
        sizes = np.diff(self.starts)[shards]
        return shards, (np.cumsum(sizes) - sizes)[:: self.window_shards]

    def _window(self, epoch: int, number: int | None) -> np.ndarray:
        """The clips of a window in their order; of all without a number."""
        if number is None:
            return seeds.numpy_rng(self.seed, "order", epoch).permutation(self.clips)
        shards = self.windows(epoch)[0][number * self.window_shards : (number + 1) * self.window_shards]
        members = np.concatenate([np.arange(self.starts[shard], self.starts[shard + 1]) for shard in shards])
        return seeds.numpy_rng(self.seed, "order", epoch, number).permutation(members)


def holds_encoded(folder: Path) -> bool:
    """Whether clips are encoded, and so squares; others are stretches of whole sources."""
    import pyarrow.compute as pc

    return any(pc.any(rows["encoded"]).as_py() for rows in _read_table(folder, ["encoded"]))


def decode_clip(folder: Path, record: ClipRecord, *, short_side_px: int = 0) -> Tensor:
    """Pixels uint8 `T side side 3` of a clip, read from its shard without extracting.

    short_side_px: of a clip of a whole source: `T H W 3`, the whole picture with its shorter side so long.
    Raises ClipsError: the clip does not decode to what the table states.
    """
    source = video.FileSlice(folder / "shards" / record.shard, record.offset, record.bytes)
    try:
        if record.encoded:
            _, pixels = video.decode_all(source)
        else:
            times_s = record.origin_s + record.start_s + np.arange(record.frames) / record.rate_hz
            pixels = video.read_frames_at(source, times_s, **_resizing(record, short_side_px))
    except (ValueError, OSError, OverflowError) as error:  # of the video, or of numbers and a name in the table
        raise ClipsError(f"clip {record.id} of {source.path}: {error}") from error
    needed = (record.frames, record.side_px, record.side_px, 3)
    if pixels.shape != needed and not short_side_px:
        raise ClipsError(f"clip {record.id}: T H W C is {pixels.shape}, needed {needed}")
    return torch.from_numpy(pixels)


def _resizing(record: ClipRecord, short_side_px: int) -> dict[str, Any]:
    """How pictures of a whole source are resized."""
    return {"side_px": short_side_px or record.side_px, "square": not short_side_px}


def decode_windows(
    folder: Path, record: ClipRecord, *, frames: int, positions: Sequence[float], short_side_px: int = 0
) -> list[tuple[float, Tensor]]:
    """Windows of a clip that is longer than `frames`: start in seconds of the source, pixels as of `decode_clip`.

    The file is decoded once, from the first window to the end of the last.

    Args:
        positions: in 0..1, of a window's start among all that the clip has room for. An encoded clip has room at its
          own frames alone; a clip of a whole source at any time.
    Raises ClipsError: the clip is shorter than a window, or does not decode to what the table states.
    """
    free = record.frames - frames
    if free < 0:
        raise ClipsError(f"clip {record.id} has {record.frames} frames; needed {frames}")
    starts = np.floor(np.asarray(positions) * (free + 1)) if record.encoded else np.asarray(positions) * free
    starts_s = starts / record.rate_hz
    first_s = 0.0 if record.encoded else record.origin_s + record.start_s  # of the clip, on the file's clock
    wanted_s = first_s + starts_s[:, None] + np.arange(frames) / record.rate_hz  # windows, T
    times_s, indices = np.unique(wanted_s, return_inverse=True)
    source = video.FileSlice(folder / "shards" / record.shard, record.offset, record.bytes)
    try:
        with video.open_video(source) as opened:
            if record.encoded and not opened.shows(times_s[-1]):
                raise video.VideoError(f"ends before its {record.frames} frames")
            pixels = opened.frames_at(times_s, **{} if record.encoded else _resizing(record, short_side_px))
    except (ValueError, OSError, OverflowError) as error:  # as of decode_clip
        raise ClipsError(f"clip {record.id} of {source.path}: {error}") from error
    needed = (record.side_px, record.side_px, 3)
    if pixels.shape[1:] != needed and not short_side_px:
        raise ClipsError(f"clip {record.id}: H W C is {pixels.shape[1:]}, needed {needed}")
    windows = torch.from_numpy(pixels[indices.reshape(wanted_s.shape)])
    return [(record.start_s + start_s, window) for start_s, window in zip(starts_s.tolist(), windows, strict=True)]


@dataclass(frozen=True)
class AugmentedBatches(Dataset):
    """Batches of clips, each copy cropped and flipped on its own. Holds no table, so that workers are small.

    Clips that are longer than a window are not cached. short_side_px: of `train_batches`. on_device: leave flips, and
    crops of squares, to the model's device. draw_masks: of `train_batches`.
    """

    folder: Path
    cached_clips: int
    frames: int
    seed: int
    flip: bool
    reverse: bool
    crop: tuple[float, float]
    aspect: tuple[float, float]
    short_side_px: int
    on_device: bool
    draw_masks: Callable[[int], MaskedTokens] | None

    @cached_property
    def decode(self) -> Callable[[ClipRecord], Tensor]:
        return lru_cache(maxsize=max(self.cached_clips, 1))(partial(decode_clip, self.folder, short_side_px=self.short_side_px))

    def __getitem__(self, sampled: tuple[int, list[SampledClip]]) -> ClipBatch | UserError:
        """The batch of a step and its clips. An error is returned, not raised: a worker process would wrap it."""
        step, samples = sampled
        try:
            clips: list[LoadedClip] = []
            augmentations: list[Augmentation] = []
            for (epoch, index), copies in itertools.groupby(samples, lambda sample: sample[:2]):
                *_, numbers, records = zip(*copies, strict=True)
                windows = self.windows(epoch, index, numbers, records[0])
                for copy, (start_s, window) in zip(numbers, windows, strict=True):
                    augmentation, pixels = self.draw_augmentation(epoch, index, copy, size=window.shape[1:3]), window
                    if self.short_side_px:  # pictures of several widths cannot be stacked
                        pixels = resized_crop(window, augmentation.rectangle, side=records[0].side_px)
                        augmentation = augmentation._replace(rectangle=None)
                    if self.on_device:
                        augmentations.append(augmentation)
                    clips.append((records[0].id, start_s, pixels if self.on_device else augment(pixels, augmentation)))
            masked = self.draw_masks(step) if self.draw_masks else None
            return replace(_stack(clips), augmentations=tuple(augmentations), masked=masked)
        except UserError as error:
            return error

    def windows(self, epoch: int, index: int, copies: Sequence[int], record: ClipRecord) -> list[tuple[float, Tensor]]:
        """The windows of a clip's copies, as `decode_windows`: each anywhere in its clip, whatever the others are.

        Source: repeated sampling of MAE-ST, arXiv:2205.09113 and its code.
        """
        if record.frames == self.frames:
            return [(record.start_s, self.decode(record)) for _ in copies]
        positions = seeds.numpy_rng(self.seed, "window", epoch, index).random(max(copies) + 1)[list(copies)]
        window = {"frames": self.frames, "short_side_px": self.short_side_px}
        return decode_windows(self.folder, record, positions=positions, **window)

    def draw_augmentation(self, epoch: int, index: int, copy: int, *, size: tuple[int, int]) -> Augmentation:
        rectangle, mirrored, backwards = None, False, False
        if self.crop != (1.0, 1.0) or self.short_side_px:
            rng = seeds.numpy_rng(self.seed, "crop", epoch, index, copy)
            rectangle = draw_rectangle(size, area=self.crop, aspect=self.aspect, rng=rng)
        if self.flip or self.reverse:
            rng = seeds.numpy_rng(self.seed, "flip", epoch, index)
            drawn = (rng.random((copy + 1, 2))[copy] < 0.5) & (self.flip, self.reverse)
            mirrored, backwards = drawn.tolist()
        return Augmentation(rectangle, mirrored, backwards)


def augment(pixels: Tensor, augmentation: Augmentation) -> Tensor:
    """uint8 `T H W C` of the same shape, on any device; a GPU may round a resized value to its neighbour."""
    rectangle, mirrored, backwards = augmentation
    if rectangle is not None:
        pixels = resized_crop(pixels, rectangle)
    axes = [axis for axis, flipped in ((0, backwards), (2, mirrored)) if flipped]
    return pixels.flip(axes) if axes else pixels


def _stack(clips: Sequence[LoadedClip]) -> ClipBatch:
    """One batch; a worker makes it in memory that it shares with its rank."""
    ids, starts_s, pixels = zip(*clips, strict=True)
    return ClipBatch(default_collate(list(pixels)), ids, starts_s)


def check_batching(
    *, batch: int, ranks: int, repeats: int, crop: tuple[float, float], aspect: tuple[float, float], window_shards: int
) -> None:
    """Check arguments of `train_batches` before there are clips.

    Raises ValueError: batch does not divide by ranks and repeats; repeats, crop, aspect or window_shards out of range.
    """
    if repeats < 1 or batch % (ranks * repeats):
        raise ValueError(f"batch = {batch} does not divide among {ranks} ranks, each clip {repeats} times; needed a multiple")
    check_crop(crop, aspect)
    if window_shards < 0:
        raise ValueError(f"window_shards = {window_shards}; needed 0 or more")


def train_batches(
    folder: Path,
    *,
    frames: int,
    batch: int,
    repeats: int,
    seed: int,
    start: int,
    steps: int,
    flip: bool,
    reverse: bool,
    crop: tuple[float, float],
    aspect: tuple[float, float],
    short_side_px: int,
    on_device: bool,
    window_shards: int,
    rank: int,
    ranks: int,
    cached_clips: int,
    workers: int,
    draw_masks: Callable[[int], MaskedTokens] | None = None,
) -> Iterator[ClipBatch]:
    """This rank's part of the global batches `start` ... `steps - 1` of endless shuffled epochs of the training split.

    Position p of the sequence is clip q % n of the order of epoch q // n, q = p // repeats. Batch s holds the positions
    from s * batch on, and rank r its r-th part: batches cross epochs, and an epoch covers every clip `repeats` times.

    Args:
        frames: of a window. batch: clips a step over all ranks, copies counted. repeats: copies of a clip in a row,
          decoded once and each cropped, flipped (and later masked) on its own; of a clip that is longer than a window,
          each at another time. start: first step. flip: mirror at random. reverse: play backwards at random.
        crop, aspect: area and aspect of `draw_rectangle`; crop = (1, 1): none. short_side_px: crop the whole picture of
          whole sources, its shorter side so long; 0: the square in its middle. on_device: leave flips, and crops of
          squares, to the caller, as `ClipBatch.augmentations`. window_shards: of `WindowedShuffle`. cached_clips:
          decoded clips in memory of each process that decodes. workers: processes that decode for this rank; 0:
          itself. The batches depend on neither of the last two. draw_masks: step -> `ClipBatch.masked`, drawn where the
          clips are decoded; workers need one that pickles.
    Raises ValueError, as `check_batching`; ClipsError: no clips; from the iterator ClipsError: a clip cannot be
    decoded, and UserError: a worker ended.
    """
    check_batching(batch=batch, ranks=ranks, repeats=repeats, crop=crop, aspect=aspect, window_shards=window_shards)
    clips = ClipTable(folder, "train")
    order = WindowedShuffle(clips, seed=seed, window_shards=window_shards)

    def sample(position: int) -> SampledClip:
        number, copy = divmod(position, repeats)
        epoch, place = divmod(number, len(clips))
        index = order(epoch, place)
        return epoch, index, copy, clips[index]

    size = batch // ranks
    firsts = ((step, step * batch + rank * size) for step in range(start, steps))
    sampler = ((step, [sample(position) for position in range(first, first + size)]) for step, first in firsts)
    augmentation = {"flip": flip, "reverse": reverse, "crop": tuple(crop), "aspect": tuple(aspect)}
    augmentation["short_side_px"] = short_side_px
    read = {"frames": frames, "seed": seed, "on_device": on_device, "draw_masks": draw_masks}
    dataset = AugmentedBatches(folder, cached_clips, **read, **augmentation)
    return _load(dataset, sampler, start=start, workers=workers)


def _load(
    dataset: AugmentedBatches, sampler: Iterable[tuple[int, list[SampledClip]]], *, start: int, workers: int
) -> Iterator[ClipBatch]:
    """The batches of a sampler. Workers are spawned: the rank's threads of gloo, and CUDA, do not survive a fork."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
        options = {"batch_size": None, "num_workers": workers, "worker_init_fn": _init_worker, "snapshot_every_n_steps": 0}
        options |= {"prefetch_factor": PREFETCH, "multiprocessing_context": "spawn"} if workers else {}
        options |= {"pin_memory": True} if dataset.on_device else {}  # by a thread, where workers decode
        loader = StatefulDataLoader(dataset, sampler=sampler, generator=seeds.torch_rng(dataset.seed, "loader"), **options)
    step = start
    try:
        with _no_signals() if workers else nullcontext():
            batches = iter(loader)
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
            step += 1
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:  # torch's, where a worker ended
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in OF_A_LOADER):
            raise
        why = f"{type(error).__name__}: {error}".strip(": ")
        raise UserError(f"step {step}: a process that decodes clips ended ({why}); lower `workers` if memory ran out") from error


@contextmanager
def _no_signals() -> Iterator[None]:
    """Block signals while workers start, which inherit the mask: those to all processes of a job, as Slurm sends them,
    are the rank's alone.

    Also removes torch's handler of SIGCHLD, which raises anywhere in a rank when a worker ends (`next` notices within
    5 s), and the rank's daemon flag, since Python lets no daemon start processes.
    """
    multiprocessing.current_process().daemon = False
    handler = signal.getsignal(signal.SIGCHLD)
    resource_tracker.ensure_running()  # Python's, which the first worker would start: that unblocks signals
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1, signal.SIGTERM})
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _init_worker(worker: int) -> None:
    """Let only the rank's SIGTERM end a worker, and at once: a clean exit aborts where a batch is still on its way."""
    atexit.register(os._exit, 0)

    def exit_at_the_ranks_sigterm() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    if not hasattr(signal, "sigwaitinfo"):  # macOS: anyone's SIGTERM ends it
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return

    threading.Thread(target=exit_at_the_ranks_sigterm, daemon=True).start()


def eval_batches(
    folder: Path, *, split: str, frames: int, batch: int, rank: int, ranks: int, max_clips: int = 0
) -> Iterator[ClipBatch]:
    """Every clip of a `ClipTable` once, clip i by rank i % ranks, in a fixed order. The last batch may be small.

    frames: of a window; a longer clip shows the window in its middle.
    """
    clips = ClipTable(folder, split, max_clips=max_clips)
    indices = range(rank, len(clips), ranks)
    for first in range(0, len(indices), batch):
        yield _stack([_middle_window(folder, clips[index], frames) for index in indices[first : first + batch]])


def _middle_window(folder: Path, record: ClipRecord, frames: int) -> LoadedClip:
    if record.frames == frames:
        return record.id, record.start_s, decode_clip(folder, record)
    ((start_s, pixels),) = decode_windows(folder, record, frames=frames, positions=[0.5])
    return record.id, start_s, pixels
