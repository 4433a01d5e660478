"""The training state that a killed run continues from: weights, moments and progress.

    .resume/<stage>-<sha of the fingerprint>/fingerprint.json     all that the result depends on
                                             step-00000400/       DCP shards, progress.json, sha256.json

A step's folder gets its name when every rank's files are there with their sha256. Files without a matching sha256 are
not read. DCP's metadata is a pickle: a run reads its own folder only. The last step's state stays until the result is
written. `training.fit` loads a state before its first step (`_load`) and saves more; this module only stores them.
They are not the Checkpoint folders of `scaling4d.checkpoint`. No state of a loader is stored: every batch is a
function of the seed and its number.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from scaling4d import artifacts, provenance
from scaling4d.records import UserError, write_json
from scaling4d.training.distributed import STATES, heartbeat

FINGERPRINT, PROGRESS, SHAS = "fingerprint.json", "progress.json", "sha256.json"
LOCK_WAIT_S = 5.0  # a killed process may hold the lock for a moment
MOST_WRITE_S = 1800  # of waiting for an asynchronous write that are no standstill; ours, five times what j needs at .7 GB/s


def fingerprint(run: str, *, settings: Mapping[str, Any], inputs: Mapping[str, str], code_sha256: str) -> dict[str, Any]:
    """All that a run's result depends on. run: its name in messages, the same for other settings and code."""
    return {"run": run, "settings": dict(settings), "inputs": dict(inputs), "code": code_sha256}


def fingerprint_of(run: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprint of a run whose result depends on everything in its provenance.json."""
    code = provenance["code"] or {"sha256": ""}
    return fingerprint(run, settings=provenance["settings"], inputs=provenance["inputs"], code_sha256=code["sha256"])


def state_folder(stage: str, fingerprint: Mapping[str, Any]) -> Path:
    """The folder of a run's state, named by the sha256 of its fingerprint."""
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    return provenance.WORK_FOLDER / f"{stage}-{digest[:16]}"


def acquire_lock(folder: Path, fingerprint: Mapping[str, Any]) -> IO[bytes]:
    """Take the folder for this process until the returned file is closed, and write or check its fingerprint.

    Raises:
        UserError: the folder holds another run's state, or another process of this run has the lock.
    """
    lock, fingerprint = _lock(folder), json.loads(json.dumps(fingerprint))
    there = _read_fingerprint(folder / FINGERPRINT)
    if there is None:
        for other in sorted(folder.parent.glob(f"{folder.name.split('-')[0]}-*/{FINGERPRINT}")):
            theirs = _read_fingerprint(other)
            if theirs and theirs.get("run") == fingerprint["run"]:
                print(f"the state in {other.parent} is not used: {_differences(theirs, fingerprint)}", file=sys.stderr)
        provenance.write_text(folder / FINGERPRINT, json.dumps(fingerprint, indent=2))
    elif there != fingerprint:
        present, needed = f"the training state of {there.get('run')}", f"that of {fingerprint['run']} with these settings"
        why = _differences(there, fingerprint)
        raise UserError(f"{folder} holds {present}, needed {needed} ({why}); remove the folder")
    for path in (*folder.glob("partial-*"), _trash_path(folder)):
        shutil.rmtree(path, ignore_errors=True)
    return lock


def remove_state(folder: Path) -> None:
    """Remove a run's state at one stroke, after its result is written. A state that is locked elsewhere stays."""
    if folder.is_dir():
        with suppress(UserError), _lock(folder):
            shutil.rmtree(_trash_path(folder), ignore_errors=True)
            folder.rename(_trash_path(folder))
            shutil.rmtree(_trash_path(folder))


def _trash_path(folder: Path) -> Path:
    return folder.with_name(f"removed-{folder.name}")


def _lock(folder: Path) -> IO[bytes]:
    """Raises UserError: another process of this run holds the lock."""
    try:
        lock = provenance.lock_folder(folder, wait_s=LOCK_WAIT_S)
    except OSError as error:
        if error.errno not in provenance.NO_LOCKS:
            raise
        print(f"warning: the file system of {folder} has no locks; start no second process of this run", file=sys.stderr)
        return (folder / provenance.LOCK_FILE).open("ab")
    if lock is None:
        raise UserError(f"{folder} is in use by another process that trains the same; wait until it has ended, or end it")
    return lock


def _read_fingerprint(path: Path) -> dict[str, Any] | None:
    """None: absent or damaged. The folder's name holds its hash anyway."""
    try:
        if isinstance(content := json.loads(path.read_text()), dict):
            return content
    except FileNotFoundError:
        return None
    except ValueError:
        pass
    print(f"warning: {path} is damaged and passed over", file=sys.stderr)
    return None


def _differences(there: Mapping[str, Any], needed: Mapping[str, Any]) -> str:
    """The first three settings that differ, in words."""
    first = islice(provenance.differences(there, needed), 3)
    return "; ".join(f"{key} was {was!r}, is {now!r}" for key, was, now in first)


class CheckpointManager:
    """Saves and loads the training state of one run. Every rank calls each method alike.

    Args:
        keep_latest_k: number of newest steps to keep. asynchronous: write while the training continues.
    """

    def __init__(self, stage: str, fingerprint: Mapping[str, Any], *, keep_latest_k: int, asynchronous: bool) -> None:
        self.folder, self.keep_latest_k = state_folder(stage, fingerprint), keep_latest_k
        self.asynchronous = asynchronous
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.lock = acquire_lock(self.folder, fingerprint) if self.rank == 0 else None
        dist.barrier()
        # Asynchronous writes send their messages apart from the training's.
        self.group = dist.new_group(backend="gloo", group_desc=STATES)
        self.pending: tuple[int, Any] | None = None
        self.stager: Any = None  # of asynchronous writes from GPUs; its pinned memory serves every step
        self.thread = futures.ThreadPoolExecutor(1)  # which waits for asynchronous writes and hashes their files

    def close(self) -> None:
        """Release the lock and the pinned memory."""
        self.stager = None
        self.thread.shutdown(wait=False)
        if self.lock:
            self.lock.close()

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Fill the tensors, by name and in place, from the newest intact step. A damaged one is renamed.

        Returns:
            The step's progress; None: no step, and no tensor was changed.
        """
        import torch.distributed.checkpoint as dcp  # half a second to import

        steps = [sorted(self.folder.glob("step-????????"), reverse=True) if self.rank == 0 else None]
        dist.broadcast_object_list(steps, group=self.group, device=torch.device("cpu"))  # other machines may see a folder later
        for path in steps[0]:
            if damage := self._damage(path):
                if self.rank == 0:
                    print(f"warning: {path} is damaged ({damage}) and passed over", file=sys.stderr)
                    aside = path.with_name(path.name.replace("step", "damaged"))
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
                continue
            heartbeat(f"reading the state {path.name}")
            dcp.load(dict(tensors), checkpoint_id=path, process_group=self.group)
            return json.loads((path / PROGRESS).read_text())
        return None

    def _damage(self, path: Path) -> str:
        """Names of a step's damaged files. Each rank checks its share.

        Raises:
            UserError: files cannot be read; that is no damage.
        """
        heartbeat(f"checking the state {path.name}")
        damaged, unreadable = [], []
        try:
            shas = dict(json.loads((path / SHAS).read_text()))
            damaged = [name for name in sorted(shas)[self.rank :: self.ranks] if artifacts.sha256(path / name) != shas[name]]
        except (FileNotFoundError, ValueError, TypeError) as error:
            damaged = [str(error)]
        except OSError as error:
            unreadable = [str(error)]
        if reasons := [reason for reasons in self._gather(unreadable) for reason in reasons]:
            raise UserError(f"the training state {path} cannot be read: {reasons[0]}; repair that, or remove {path}")
        return ", ".join(dict.fromkeys(name for names in self._gather(damaged) for name in names))

    def save(self, step: int, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write the state after `step` steps. An asynchronous one counts after `publish`, or `wait`.

        Args:
            progress: further state, as JSON.
        Raises:
            UserError: the state cannot be written; older states stay.
        """
        import torch.distributed.checkpoint as dcp

        self.wait()
        partial = self.folder / f"partial-{step:08d}"
        if self.rank == 0:
            with self._write_errors(step):
                partial.mkdir(parents=True)
                (partial / PROGRESS).write_text(json.dumps(progress))  # keeps the order of keys
        dist.barrier(self.group)
        if self.asynchronous and self.stager is None and any(tensor.is_cuda for tensor in tensors.values()):
            self.stager = pinned_stager()
        with self._write_errors(step):
            given = {"checkpoint_id": partial, "process_group": self.group}
            if self.asynchronous:
                write = dcp.async_save(dict(tensors), async_stager=self.stager, **given)
                self.pending = (step, self.thread.submit(self._synced_files, partial, write))
            else:
                dcp.save(dict(tensors), **given)
                self.pending = (step, None)
                self.wait()

    def _synced_files(self, partial: Path, write: futures.Future | None = None) -> dict[str, str]:
        """This rank's files of a step, which are then on the disk, each with its hash. write: is waited for."""
        if write:
            write.result()
        files = [*partial.glob(f"__{self.rank}_*")] + ([partial / PROGRESS, partial / ".metadata"] if self.rank == 0 else [])
        for path in files:
            _sync(path)
        return {path.name: artifacts.sha256(path) for path in files}

    @property
    def written(self) -> int:
        """The pending step, if this rank's files are on the disk; else 0."""
        return self.pending[0] if self.pending and self.pending[1].done() else 0

    def publish(self, written: int) -> None:
        """Publish the pending step if it is `written`, the least of all ranks: this waits for no file."""
        if self.pending and self.pending[0] == written:
            self.wait()

    def wait(self) -> None:
        """Wait until the pending step is written, publish it, and remove steps beyond `keep_latest_k`.

        Raises:
            UserError: the state cannot be written.
        """
        if self.pending is None:
            return
        (step, future), self.pending = self.pending, None
        partial = self.folder / f"partial-{step:08d}"
        with self._write_errors(step):
            if future:
                for second in range(MOST_WRITE_S):
                    heartbeat(f"writing the state of step {step} for {second} s")
                    if futures.wait([future], timeout=1).done:
                        break
            own = future.result() if future else self._synced_files(partial)
        shas = self._gather(own)
        if self.rank == 0:
            with self._write_errors(step):
                write_json(partial / SHAS, {name: sha for part in shas for name, sha in part.items()})
                for path in (partial / SHAS, partial):
                    _sync(path)
                partial.rename(self.folder / f"step-{step:08d}")
                _sync(self.folder)
            for old in sorted(self.folder.glob("step-????????"))[: -self.keep_latest_k]:
                shutil.rmtree(old)
        dist.barrier(self.group)

    @contextmanager
    def _write_errors(self, step: int) -> Iterator[None]:
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            yield
        except (CheckpointException, OSError) as error:
            shutil.rmtree(self.folder / f"partial-{step:08d}", ignore_errors=True)
            first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            why = " ".join(str(first).split())[:200]
            problem = f"the training state of step {step} cannot be written to {self.folder}: {why}"
            change = "free space there, or lower keep_latest_k (the state before it is whole, and the next run continues from it)"
            raise UserError(f"{problem}; {change}") from error

    def _gather(self, value: Any) -> list:
        values = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.group)
        return values


def pinned_stager() -> Any:
    """torch's copies of a state in pinned memory. A step waits for the copy, not for the files.

    Not torch's DefaultStager: that of torch 2.11 copies one state and refuses the next.
    """
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    return BlockingAsyncStager(cache_staged_state_dict=True, type_check=True)


def _sync(path: Path) -> None:
    """fsync of a file's content or of a folder's names: a rename must not become durable before its target."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
