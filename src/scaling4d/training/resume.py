"""What a training that was killed goes on from: weights, moments and how far it was, beside the run.

    .resume/<stage>-<sha of what the result depends on>/about.json           whose state this is
                                                        step-00000400/       DCP shards, progress.json, sha256.json

A step's folder is written under another name and renamed when every rank's files are there with their sha256; nothing else in it
is trusted. DCP's metadata is a pickle: only the run's own folder is ever read, never one that came from elsewhere.
The last step's state stays until all that is made of it is written and every rank has ended.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from scaling4d import artifacts
from scaling4d.records import UserError, write_json

ABOUT, PROGRESS, SHAS, LOCK = "about.json", "progress.json", "sha256.json", "lock"
PATIENCE_S = 5.0  # for a process that was killed a moment ago and is not gone yet
REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}  # no room, or no right


def folder_of(stage: str, about: Mapping[str, Any]) -> Path:
    """Where the state of a stage's run lies: the name is the sha256 of all that the result should depend on."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return artifacts.PARTIAL / f"{stage}-{digest[:16]}"


def tensors_of(model: nn.Module, adamw: torch.optim.AdamW) -> dict[str, Tensor]:
    """Weights and moments by name, in place; every parameter must have its moments."""
    found = {}
    for name, p in model.named_parameters():
        moments = adamw.state[p]
        found |= {f"weight.{name}": p.detach(), f"first.{name}": moments["exp_avg"], f"second.{name}": moments["exp_avg_sq"]}
    return found


def claim(folder: Path, about: Mapping[str, Any]) -> IO[str]:
    """Make `folder` the place of this run's state, or find that it is; it is this process's until the returned file is closed.

    Args:
        about: all that the result depends on: run (its name), profile, settings, inputs, code.
    Raises:
        UserError: the state there is another run's, or another process of this run is at it.
    """
    lock = _locked(folder)
    found = _about(folder / ABOUT)
    if found is None:
        for other in sorted(folder.parent.glob(f"{folder.name.split('-')[0]}-*/{ABOUT}")):
            theirs = _about(other)
            if theirs and all(theirs.get(name) == about[name] for name in ("run", "profile")):
                print(f"{other.parent} is not gone on from: {_difference(theirs, about)}", file=sys.stderr)
        partial = folder / f"{ABOUT}.partial"
        write_json(partial, about)
        partial.rename(folder / ABOUT)
    elif found != about:
        raise UserError(
            f"{folder} holds the training state of {found.get('run')} of profile {found.get('profile')}, needed that of "
            f"{about['run']} of {about['profile']} with these settings ({_difference(found, about)}); remove the folder"
        )
    for left in (*folder.glob("partial-*"), _away(folder)):
        shutil.rmtree(left, ignore_errors=True)
    return lock


def remove(folder: Path) -> None:
    """Once its result is written: the state goes, at one stroke. Where another process is at it, it stays."""
    if folder.is_dir():
        try:
            lock = _locked(folder)
        except UserError:
            return
        shutil.rmtree(_away(folder), ignore_errors=True)
        folder.rename(_away(folder))
        shutil.rmtree(_away(folder))
        lock.close()


def _away(folder: Path) -> Path:
    return folder.with_name(f"removed-{folder.name}")


def _locked(folder: Path) -> IO[str]:
    """Raises UserError: another process of this run holds the lock, and keeps it."""
    until = time.monotonic() + PATIENCE_S
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / LOCK).open("a")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                return file
        except FileNotFoundError:  # it was removed meanwhile
            continue
        except BlockingIOError:
            if time.monotonic() > until:
                raise UserError(
                    f"{folder} is in use by another process that trains the same; wait until it has ended, or end it"
                ) from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(f"warning: {folder} lies where nothing can be locked; start no second process of this run", file=sys.stderr)
            return file


def _about(path: Path) -> dict[str, Any] | None:
    """None: there is none that can be read; the folder's own name says as much."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        print(f"warning: {path} is damaged and passed over", file=sys.stderr)
        return None
    return found


def _difference(found: Any, needed: Any, key: str = "") -> str:
    """The first settings that differ, in words."""
    if isinstance(found, dict) and isinstance(needed, dict):
        parts = [_difference(found.get(name), needed.get(name), f"{key}.{name}") for name in sorted(found.keys() | needed.keys())]
        return "; ".join([part for part in parts if part][:3])
    return "" if found == needed else f"{key[1:]} was {found!r}, is {needed!r}"


class State:
    """The steps of one run that are kept. Every method is called alike in every rank."""

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool, rank: int, ranks: int) -> None:
        """keep: how many of the newest stay. asynchronous: write behind the computing."""
        self.folder, self.keep, self.asynchronous = folder, keep, asynchronous
        self.rank, self.ranks = rank, ranks
        self.group = dist.new_group(backend="gloo")  # writing behind the computing must not mix with it
        self.behind: tuple[int, Any] | None = None

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Fill the tensors, by name and in place, from the newest whole step, and return its progress; None: there is none, and
        nothing was touched."""
        for path in self._newest_first():
            if damage := self._damage(path):
                if self.rank == 0:
                    print(f"warning: {path} is damaged ({damage}) and passed over", file=sys.stderr)
                    aside = path.with_name(path.name.replace("step", "damaged"))
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
                continue
            dcp.load(dict(tensors), checkpoint_id=path, process_group=self.group)
            return json.loads((path / PROGRESS).read_text())
        return None

    def _newest_first(self) -> list[Path]:
        """As rank 0 sees them: on other machines a folder may appear later."""
        found = [sorted(self.folder.glob("step-????????"), reverse=True) if self.rank == 0 else None]
        dist.broadcast_object_list(found, group=self.group, device=torch.device("cpu"))
        return found[0]

    def _damage(self, path: Path) -> str:
        """What is wrong with a step's files; every rank looks at its share of them.

        Raises:
            UserError: they cannot be read, which is no damage.
        """
        wrong, unread = [], []
        try:
            shas = dict(json.loads((path / SHAS).read_text()))
            wrong = [name for name in sorted(shas)[self.rank :: self.ranks] if artifacts.sha256(path / name) != shas[name]]
        except (FileNotFoundError, ValueError, TypeError) as error:
            wrong = [str(error)]
        except OSError as error:
            unread = [str(error)]
        if unread := [why for whys in self._gather(unread) for why in whys]:
            raise UserError(
                f"the training state {path} cannot be read: {unread[0]}; mend that, or remove {path} to do without it"
            )
        return ", ".join(dict.fromkeys(name for names in self._gather(wrong) for name in names))

    def save(self, step: int, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a step; it counts from `finish` on, which any later save calls.

        Args:
            step: steps done. progress: what else is to be found again, as JSON.
        Raises:
            UserError: it cannot be written; what was kept before stays.
        """
        self.finish()
        partial = self._partial(step)
        if self.rank == 0:
            with self._written(step):
                partial.mkdir(parents=True)
                (partial / PROGRESS).write_text(json.dumps(progress))  # lines keep the order of their keys
        dist.barrier(self.group)
        with self._written(step):
            if self.asynchronous:
                future = dcp.async_save(dict(tensors), checkpoint_id=partial, process_group=self.group)
            else:
                future = dcp.save(dict(tensors), checkpoint_id=partial, process_group=self.group)
        self.behind = (step, future if self.asynchronous else None)
        if not self.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait until the step that is being written is whole, and let it count; steps beyond `keep` go.

        Raises:
            UserError: it cannot be written.
        """
        if self.behind is None:
            return
        (step, future), self.behind = self.behind, None
        partial = self._partial(step)
        with self._written(step):
            if future is not None:
                future.result()
        mine = [*partial.glob(f"__{self.rank}_*")] + ([partial / PROGRESS, partial / ".metadata"] if self.rank == 0 else [])
        with self._written(step):
            for path in mine:
                _to_the_disk(path)
        shas = self._gather({path.name: artifacts.sha256(path) for path in mine})
        if self.rank == 0:
            with self._written(step):
                write_json(partial / SHAS, {name: sha for some in shas for name, sha in some.items()})
                for path in (partial / SHAS, partial):
                    _to_the_disk(path)
                partial.rename(self.folder / f"step-{step:08d}")
                _to_the_disk(self.folder)
            for old in sorted(self.folder.glob("step-????????"))[: -self.keep]:
                shutil.rmtree(old)
        dist.barrier(self.group)

    def _partial(self, step: int) -> Path:
        return self.folder / f"partial-{step:08d}"

    @contextmanager
    def _written(self, step: int) -> Iterator[None]:
        try:
            yield
        except (CheckpointException, OSError) as error:
            first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            why = " ".join(str(first).split())[:200]
            raise UserError(
                f"the training state of step {step} cannot be written to {self.folder}: {why}; free space there, or lower "
                "keep, in pretrain.Running or readout.Saving (the state before it is whole, and the next run goes on from it)"
            ) from error

    def _gather(self, value: Any) -> list:
        found = [None] * self.ranks
        dist.all_gather_object(found, value, group=self.group)
        return found


def _to_the_disk(path: Path) -> None:
    """Of a file its content, of a folder the names in it: a rename must not be there before what it names."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def refusals() -> Iterator[None]:
    """What a file system refuses, a full disk above all, in one line.

    Raises:
        UserError: so it does.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise UserError(
            f"{error.filename or 'a file'}: {error.strerror}; mend that, and the same command goes on from the last state"
        ) from error
