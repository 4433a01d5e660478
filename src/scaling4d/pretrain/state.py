"""What a run that was killed goes on from: weights, moments and the position among the clips, beside the run.

    .resume/pretrain-<sha of what the result depends on>/about.json           whose state this is
                                                         step-00000400/       DCP shards, progress.json, sha256.json

A step's folder is written under another name and renamed when every rank's files are there with their sha256; nothing else in it
is trusted. DCP's metadata is a pickle: only the run's own folder is ever read, never one that came from elsewhere.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from scaling4d import artifacts
from scaling4d.records import UserError, write_json

ABOUT, PROGRESS, SHAS = "about.json", "progress.json", "sha256.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    step: steps done. loader: state of the clips' order. lines: of losses.jsonl and validations of validation.jsonl, so far.
    recent: of every rank, the losses since the last line. ranks: `[from_step, ranks]`, one more whenever their number changed.
    """

    step: int
    loader: dict[str, int]
    lines: list[dict]
    validations: list[dict]
    recent: list[list[float]]
    ranks: list[list[int]]


def claim(folder: Path, about: Mapping[str, Any]) -> None:
    """Make `folder` the place of this run's state, or find that it is.

    Args:
        about: all that the result depends on: point, profile, settings, inputs, code.
    Raises:
        UserError: the state there is another run's.
    """
    if (folder / ABOUT).is_file():
        found = _about(folder / ABOUT)
        if found != about:
            raise UserError(
                f"{folder} holds the training state of {found.get('point')} of profile {found.get('profile')}, needed that of "
                f"{about['point']} of {about['profile']} with these settings ({_difference(found, about)}); remove the folder"
            )
    else:
        for other in sorted(folder.parent.glob(f"{folder.name.split('-')[0]}-*/{ABOUT}")):
            found = _about(other)
            if all(found.get(name) == about[name] for name in ("point", "profile")):
                print(f"{other.parent} is not gone on from: {_difference(found, about)}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / ABOUT, about)
    for partial in folder.glob("partial-*"):
        shutil.rmtree(partial)


def _about(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; remove the folder {path.parent}") from error


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

    def load(self, tensors: Mapping[str, Tensor]) -> Progress | None:
        """Fill the tensors, by name and in place, from the newest whole step; None: there is none, and nothing was touched."""
        for path in sorted(self.folder.glob("step-????????"), reverse=True):
            if damage := self._damage(path):
                if self.rank == 0:
                    print(f"warning: {path} is damaged ({damage}) and passed over", file=sys.stderr)
                    aside = path.with_name(path.name.replace("step", "damaged"))
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
                continue
            dcp.load(dict(tensors), checkpoint_id=path, process_group=self.group)
            return Progress(**json.loads((path / PROGRESS).read_text()))
        return None

    def _damage(self, path: Path) -> str:
        """What is wrong with a step's files; every rank looks at its share of them."""
        try:
            shas = json.loads((path / SHAS).read_text())
            found = [name for name in sorted(shas)[self.rank :: self.ranks] if artifacts.sha256(path / name) != shas[name]]
        except (OSError, ValueError) as error:
            found = [str(error)]
        return ", ".join(dict.fromkeys(name for names in self._gather(found) for name in names))

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Write a step; it counts from `finish` on, which any later save calls.

        Raises:
            UserError: it cannot be written; what was kept before stays.
        """
        self.finish()
        partial = self._partial(progress.step)
        if self.rank == 0:
            with self._written(progress.step):
                partial.mkdir(parents=True)
                write_json(partial / PROGRESS, asdict(progress))
        dist.barrier(self.group)
        with self._written(progress.step):
            if self.asynchronous:
                future = dcp.async_save(dict(tensors), checkpoint_id=partial, process_group=self.group)
            else:
                future = dcp.save(dict(tensors), checkpoint_id=partial, process_group=self.group)
        self.behind = (progress.step, future if self.asynchronous else None)
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
        shas = self._gather({path.name: artifacts.sha256(path) for path in mine})
        if self.rank == 0:
            with self._written(step):
                write_json(partial / SHAS, {name: sha for some in shas for name, sha in some.items()})
            partial.rename(self.folder / f"step-{step:08d}")
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
                "pretrain.Running.keep (the state before it is whole, and the next run goes on from it)"
            ) from error

    def _gather(self, value: Any) -> list:
        found = [None] * self.ranks
        dist.all_gather_object(found, value, group=self.group)
        return found
