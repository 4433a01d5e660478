"""Conditions of published results; `make release-check` runs these tests, `make test` does not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from published_numbers import README, statements

import scaling4d
from scaling4d.provenance import load_yaml

pytestmark = [pytest.mark.release, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[1]


def printed(*words: str, folder: Path = ROOT) -> str:
    """Output of a command in the project, or in a clone of it."""
    environment = os.environ | {"PYTHONPATH": str(folder / "src")}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_the_lock_and_the_reports_are_of_this_code() -> None:
    output = printed("dvc", "repro", "--dry", "--allow-missing")
    stages = [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]
    if stages or "ERROR" in output:
        names = f"{', '.join(stages[:5])} and {len(stages[5:])} more" if stages[5:] else ", ".join(stages) or output[-500:]
        pytest.fail(f"dvc.lock is older than the code: {names}; run `make repro`, commit dvc.lock and reports/", pytrace=False)


def test_the_audit_finds_nothing_wrong() -> None:
    output = printed("scaling4d", "audit")
    if not output.splitlines()[-1].startswith("0 wrong"):
        wrong = "\n".join(line for line in output.splitlines() if line.startswith("wrong"))
        pytest.fail(f"`scaling4d audit` finds:\n{wrong[:3000]}\n{output.splitlines()[-1]}", pytrace=False)


def plain(text: str) -> str:
    """In one line, without the space before a percent sign."""
    return " ".join(text.split()).replace(" %", "%")


def test_the_numbers_of_readme_and_guide_are_those_of_the_tables() -> None:
    wrong = [f"{file}: {text}" for file, text in statements() if plain(text) not in plain((ROOT / file).read_text())]
    if wrong:
        pytest.fail("by the committed tables these sentences should stand there:\n" + "\n".join(wrong), pytrace=False)
    _, start, rest = (ROOT / README).read_text().partition("Results of the pocket:")
    assert plain(start + rest.partition("\n\n")[0]) in [plain(text) for _, text in statements()], "other words above the table"
    results = plain(start + rest.partition("## Two commands")[0])
    for _, text in statements():
        results = results.replace(plain(text), "")
    assert not re.findall(r"\d+", results), f"numbers without a table: {results}"


def test_the_readme_has_two_screens() -> None:
    assert len((ROOT / README).read_text().split()) <= 700


def test_a_fresh_clone_has_the_trained_encoders_before_anything_is_trained(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    files = [path for path in (clone / "reports/weights").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    readouts = [f"readout_frozen@mini-{task}" for task in ("actions", "boxes", "depth", "points", "pose")]
    pulled = printed("dvc", "pull", "-r", "weights", "pretrain", *readouts, folder=clone)
    encoders = sorted(path.parent.name for path in clone.glob("artifacts/pocket/pretrain/*/model.safetensors"))
    assert encoders == sorted(load_yaml((ROOT / "params.yaml").read_text())["points"]), pulled
    checkpoint, video = "artifacts/pocket/pretrain/mini", "experiments/pocket/videos/phone/IMG_0000.mp4"
    assert scaling4d.Encoder.from_pretrained(clone / checkpoint).rate_hz
    printed("scaling4d", "features", checkpoint, video, "--out", "features", folder=clone)
    assert [*(clone / "features").glob("*.safetensors")]
    printed("dvc", "repro", "-q", "data.dvc", folder=clone)
    printed("scaling4d", "show", "artifacts/pocket/readout/mini/depth/frozen", "--out", "shown", folder=clone)
    assert (clone / "shown/sheet.png").is_file()
    table = printed("scaling4d", "table", folder=clone)
    assert re.search(r"^.*mini.*0\.\d+", table, re.M), table
    audit = printed("scaling4d", "audit", folder=clone)
    assert audit.splitlines()[-1].startswith("0 wrong"), audit[-3000:]
