"""From locks and DVC's cache to a study's tables, figures and page; both drawn by hand."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from scaling4d import seeds, study
from scaling4d.records import UserError
from scaling4d.report import studies
from scaling4d.study import Arm, Study

SIZES = {"nano": 1e5, "micro": 3e5, "tiny": 1e6, "small": 3e6, "mini": 1e7}
TARGETS = ("readout_frozen@{}-actions", "readout_frozen@{}-pose", "reconstruct@{}")
ARMS = tuple(Arm(name, "pocket", (), name, tuple(target.format(name) for target in TARGETS)) for name in SIZES)
LADDERS = {"size": ("parameters", tuple(SIZES))}


def put(cache: Path, content: bytes) -> str:
    md5 = hashlib.md5(content).hexdigest()
    path = cache / "files/md5" / md5[:2] / md5[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return md5


def folder(cache: Path, path: str, name: str, content: dict) -> dict:
    """An out of a lock."""
    listing = json.dumps([{"md5": put(cache, json.dumps(content).encode()), "relpath": name}]).encode()
    md5 = put(cache, listing)
    (cache / "files/md5" / md5[:2] / md5[2:]).rename(cache / "files/md5" / md5[:2] / f"{md5[2:]}.dir")
    return {"path": path, "hash": "md5", "md5": f"{md5}.dir", "size": 1}


def draw(cache: Path, wanted: Study) -> None:
    """Loss and tasks fall and rise by power laws, with a little noise."""
    for arm in wanted.arms:
        for seed in wanted.seeds:
            size, rng = SIZES[arm.encoder], seeds.numpy(seed, arm.name)
            error = 0.3 * (size / 1e5) ** -0.3 * (1 + 0.01 * rng.standard_normal())
            about = {"parameters": int(size), "flops": 100 * size, "clips_seen": 800}
            result = {"encoder": arm.encoder, "parameters": int(size), "protocol": "frozen", "unit": "", "seed": seed}
            result |= {"checkpoint_sha256": hashlib.sha256(f"{arm.name} {seed}".encode()).hexdigest()}
            actions = {"task": "actions", "metric": "top1", "value": 1 - error, "higher_is_better": True}
            pose = {"task": "pose", "metric": "epe", "value": 1 + error, "higher_is_better": False}
            names = [target.format(arm.encoder) for target in TARGETS]
            results = [result | actions, result | pose, result | {"masked_mse": error / 10}]
            outs = {name: ("result.json", one) for name, one in zip(names, results, strict=True)}
            outs[f"pretrain@{arm.encoder}"] = ("summary.json", about | {"val_loss": 0.08 + error})
            stages = {"code": {"cmd": "code", "outs": [{"path": "artifacts/code/pretrain.json", "md5": "0"}]}}
            for name, (file, content) in outs.items():
                stages[name] = {
                    "cmd": "",
                    "params": {"params.yaml": {"seed": seed, f"points.{arm.encoder}": {"width": int(size)}}},
                }
                stages[name]["outs"] = [folder(cache, f"artifacts/{name}", file, content)]
            path = wanted.lock(arm.name, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"schema": "2.0", "stages": stages}))


@pytest.fixture
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(tmp_path)
    found = Study("scaling", "Does it scale?", "nano", (0, 1, 2), ARMS, LADDERS)
    draw(Path("cache"), found)
    return found


def content(of: Path) -> dict[str, bytes]:
    return {path.relative_to(of).as_posix(): path.read_bytes() for path in of.rglob("*") if path.is_file()}


TOLD = {"nano-0": {"experiment": "nano-0-abc", "seconds": 10.0, "cpu_seconds": 30.0}}


def test_a_study_is_made_of_its_locks_and_the_cache_and_is_the_same_bytes_again(wanted: Study) -> None:
    assert studies.collect(wanted, Path("cache"), TOLD) == []
    before = content(study.REPORTS)
    assert {"index.html", "scaling/runs.csv", "scaling/table.csv", "scaling/fits.csv", "scaling/ranks.csv"} <= before.keys()
    assert {"scaling/runs.svg", "scaling/laws_size.svg", "scaling/study.html", "scaling/study.json"} <= before.keys()
    rows = list(csv.DictReader((wanted.folder / "runs.csv").open()))
    assert len(rows) == 5 * 3 * 4 and rows[0]["experiment"] == "nano-0-abc"
    assert studies.collect(wanted, Path("cache"), {}) == []
    assert content(study.REPORTS) == before


def test_where_the_cache_is_gone_what_was_collected_stays(wanted: Study) -> None:
    studies.collect(wanted, Path("cache"), TOLD)
    before = content(study.REPORTS)
    shutil.rmtree("cache")
    studies.collect(wanted, Path("cache"), {})
    assert content(study.REPORTS) == before
    (wanted.folder / "runs.csv").unlink()
    with pytest.raises(UserError, match="^DVC's cache lacks results that .*nano-0.lock names; run `scaling4d study scaling`$"):
        studies.collect(wanted, Path("cache"), {})


def test_a_damaged_result_in_the_cache_is_refused(wanted: Study) -> None:
    for path in Path("cache").rglob("*"):
        if path.is_file() and path.suffix != ".dir" and b"masked_mse" in path.read_bytes():
            path.write_bytes(path.read_bytes().replace(b"0.0", b"0.1"))
    with pytest.raises(UserError, match="does not hold the bytes of its name; remove it and run the study again$"):
        studies.collect(wanted, Path("cache"), {})


def test_laws_ranks_and_what_the_smaller_say_of_the_largest(wanted: Study) -> None:
    studies.collect(wanted, Path("cache"), {})
    fits = {row["task"]: row for row in csv.DictReader((wanted.folder / "fits.csv").open())}
    for task in ("pretrain", "actions"):
        assert float(fits[task]["exponent_low"]) < 0.3 < float(fits[task]["exponent_high"])
        assert fits[task]["points"] == "15" and fits[task]["inside"] == "True" and float(fits[task]["largest"]) == 1e7
    ranks = {row["task"]: row for row in csv.DictReader((wanted.folder / "ranks.csv").open())}
    assert {row["spearman"] for row in ranks.values()} <= {"1.0", "0.9999999999999999", "1.0000000000000002"}


def test_the_page_shows_question_findings_table_and_figures(wanted: Study) -> None:
    wanted.folder.joinpath("findings.md").write_text("# Findings\n\nBigger is better [table: mini pose].\n\nNo doubt.\n")
    assert studies.collect(wanted, Path("cache"), {}) == ["a sentence without a reference: No doubt"]
    page = (wanted.folder / "study.html").read_text()
    assert page.count("<svg") == 2 and "Does it scale?" in page
    assert '<p>Bigger is better <span class="reference">[table: mini pose]</span>.</p>' in page


def test_runs_of_arms_that_a_study_no_longer_has_go(wanted: Study) -> None:
    stray = wanted.lock("giant", 0)
    stray.write_text("{}")
    studies.collect(wanted, Path("cache"), {})
    assert not stray.exists()
