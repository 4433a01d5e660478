"""The closed form beside a step of the real model under the real fully_shard."""

import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scaling4d.mae.encoder import Method
from scaling4d.pretrain.plan import dry_run as dry_runs
from scaling4d.pretrain.plan.closed_form import StepLayout, flops, memory
from scaling4d.pretrain.plan.dry_run import OLDEST, dry_run
from scaling4d.pretrain.plan.plan import build, settings_of
from scaling4d.pretrain.plan.work import work_of
from scaling4d.records import UserError

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(torch.__version__ < OLDEST, reason="the tracker of this torch counts the optimizer of all shards"),
]

ROOT = Path(__file__).parents[2]
TOTAL = 0.02  # what a block holds at once is a bound, not a trace; measured: at most 0.007


def run_apart(model: Method, **given: Any) -> dict[str, Any]:
    """In a process of its own: torch remembers where rank 0 of a mesh is, and forked ranks would inherit that."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as apart:
        return apart.submit(dry_run, model, **given).result()


@pytest.mark.usefixtures("in_the_project")
@pytest.mark.parametrize(("point", "shards", "replicas", "clips", "recompute", "microbatches"), [
    ("S", 8, 1, 8, "none", 1),
    ("S", 8, 1, 2, "none", 2),
    ("nano", 4, 2, 2, "block", 3),
    ("nano", 1, 1, 1, "none", 1),
    ("S", 1, 8, 2, "none", 1),
    ("S", 1, 1, 2, "block", 1),
    ("S", 1, 2, 2, "none", 2),
    ("L", 1, 1, 1, "block", 2),
    ("mae_st_tiny", 1, 1, 2, "none", 1),
    ("B", 8, 1, 2, "block", 1),
    ("nano", 4, 2, 2, "block", 1),
    ("nano", 1024, 1, 1, "none", 1),
    ("mae_st_tiny", 8, 1, 2, "block", 1),
    ("mae_st_B", 8, 1, 4, "none", 1),
    ("nano_distilled", 2, 1, 8, "none", 1),
    pytest.param("S", 8, 1, 8, "block", 1, marks=pytest.mark.slow),
    pytest.param("B", 8, 1, 2, "none", 1, marks=pytest.mark.slow),
    pytest.param("L", 4, 2, 1, "block", 1, marks=pytest.mark.slow),
    pytest.param("e", 64, 1, 4, "block", 1, marks=pytest.mark.slow),
    pytest.param("j", 256, 1, 8, "block", 1, marks=pytest.mark.slow),
])  # fmt: skip
def test_formula_and_dry_run_agree(point: str, shards: int, replicas: int, clips: int, recompute: str, microbatches: int) -> None:
    model = build(point, settings_of(point))
    work = replace(work_of(model), loss_kernel_values=0)
    formula = memory(work, StepLayout(shards, recompute == "block", microbatches), clips=clips)
    mesh = {"shards": shards, "replicas": replicas}
    run = run_apart(model, **mesh, clips=clips, recompute=recompute, microbatches=microbatches)
    measured = run["memory_bytes"]
    assert flops(work, recompute=recompute == "block")["total"] * clips * microbatches == run["flops"]
    assert formula["parameters"] == measured["parameters"]
    assert measured["optimizer"] - formula["optimizer"] in range(4096 * 4)  # AdamW counts its steps in each parameter
    # the trackers call a block's gradients activations until they are reduced, and cast weights of one shard likewise
    kinds = ("activations", "gradients", *(["communication"] if shards == 1 else []))
    both = [sum(content[kind] for kind in kinds) for content in (formula, measured)]
    assert shards == 1 or formula["communication"] == measured["communication"]
    assert both[0] == pytest.approx(both[1], rel=0.03)
    assert formula["total"] == pytest.approx(measured["total"], rel=TOTAL)


@pytest.mark.usefixtures("in_the_project")
@pytest.mark.parametrize("point", ["nano", "nano_distilled"])
def test_weights_that_validation_keeps_are_one_more_copy_of_the_shards(point: str) -> None:
    model = build(point, settings_of(point))
    formula = memory(replace(work_of(model), loss_kernel_values=0), StepLayout(4, False, keep_best=True), clips=2)
    measured = run_apart(model, shards=4, replicas=2, clips=2, recompute="none", keep_best=True)["memory_bytes"]
    assert formula["parameters"] == measured["parameters"]
    assert formula["total"] == pytest.approx(measured["total"], rel=TOTAL)


def test_a_dry_run_needs_little_memory() -> None:  # weights, gradients and moments alone would take 1.4 GiB
    command = [sys.executable, "-m", "scaling4d", "plan", "B", "--mesh", "8x1", "--batch", "16", "--dry-run", "--json"]
    command += ["--worker-clips-per-s", "1000"]  # loading does not bound it
    content = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert content["dry_run"]["rss_bytes"] < 1.5 * 2**30
    assert content["dry_run"]["closed_form_to_dry_run"]["flops"] == 1


def test_a_torch_that_counts_other_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_runs, "OLDEST", "99.1")
    with pytest.raises(UserError, match="^a dry run with torch .* counts too much memory; needed 99.1, as in requirements.lock$"):
        dry_run(None, shards=1, replicas=1, clips=1, recompute="none")
