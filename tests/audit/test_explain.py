import contextlib
import json
import re
from pathlib import Path
from statistics import fmean

import pytest

from scaling4d import artifacts, audit
from scaling4d.audit import disk
from scaling4d.audit.explain import explain, explain_study, table_cells
from scaling4d.audit.run import locked_run
from scaling4d.provenance import read_lock
from scaling4d.records import UserError

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("here", [True, False])
def test_a_number_is_walked_back_to_the_videos(
    project: Path, here: bool, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture
) -> None:
    weights = artifacts.sha256(Path("artifacts/test/pretrain/nano/model.safetensors"))
    if not here:
        request.getfixturevalue("clone")
    assert audit.explain_number("nano/actions/frozen", "text") == 0
    text = capsys.readouterr().out
    steps = [
        "cell        reports/built/results.csv line 4: top1 = 0.5 [0.4, 0.6] share",
        "cell        reports/built/results.csv line 5: top5 = 0.875",
        "result      artifacts/test/readout/nano/actions/frozen/result.json: sha256 ",
        f"checkpoint  artifacts/test/pretrain/nano/model.safetensors: sha256 {weights}",  # without artifacts: as the table has it
        "<- readout@nano",
        "   command  true readout nano",
        "   ran on   cpus 4, machine x86_64, ",
        "<- pretrain@nano",
        '   setting  points.nano.SimpleMAE = {"clip": [4, 8, 8], "rate": 3e-06, "width": 32}',
        "<- clips",
        "   read     data/videos  md5 ",
        "<- code",
        "<- data.dvc",
        "   dvc repro readout@nano",
    ]
    places = [text.index(step) for step in steps]
    assert places == sorted(places)
    assert "mini" not in text
    assert ("unknown, it is not here" in text) is not here
    assert ("   code     pretrain: sha256 " in text) is here
    assert "torch 2.13.0" in text


def test_every_number_of_every_table_has_a_way_back(project: Path) -> None:
    run = locked_run()
    keys = {f"{row}/{cell['name']}" for row in run.records for cell in table_cells(run, row)}
    assert {"nano/actions/frozen/top1", "nano/actions/frozen/top5", "mini/pretrain/val_loss"} <= keys and len(keys) == 18
    for key in keys:
        explained = explain(run, key)
        assert [cell["name"] for cell in explained["cells"]] == [key.rsplit("/", 1)[1]]
        assert {"clips", "code", "data.dvc"} <= {stage["name"] for stage in explained["stages"]}


def test_a_number_is_explained_as_json(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert audit.explain_number("nano/pretrain/val_loss", "json") == 0
    explained = json.loads(capsys.readouterr().out)
    assert explained["cells"][0]["value"] == "0.25" and explained["cells"][0]["line"] == 3
    assert explained["result"]["sha256"] == artifacts.sha256(Path("artifacts/test/pretrain/nano/summary.json"))
    stages = {stage["name"]: stage for stage in explained["stages"]}
    assert list(stages) == ["pretrain@nano", "clips", "code", "data.dvc"]
    assert stages["pretrain@nano"]["code"]["modules"].keys() == {"scaling4d.pretrain.stage"}
    assert stages["clips"]["environment"]["versions"]["torch"] == "2.13.0"


def test_explaining_one_number_reads_no_shard(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(disk, "_digest", lambda name, digest=disk._digest: read.append(name) or digest(name))
    explain(locked_run(), "nano/actions/frozen")
    assert "artifacts/test/pretrain/nano/model.safetensors" in read
    assert not [name for name in read if name.startswith(("artifacts/test/clips/shards", "data", "experiments"))]


NEAR_NANO = "; did you mean nano/actions/frozen or nano/pretrain?"
NEAR_TOP9 = "; did you mean nano/actions/frozen or mini/actions/frozen or small/actions/frozen?"


@pytest.mark.parametrize(("key", "near"), [
    ("nano/actions", NEAR_NANO),
    ("nano/actions/frozn", NEAR_TOP9),
    ("nano/actions/frozen/top9", NEAR_TOP9),
    ("nothing", ""),
])  # fmt: skip
def test_an_unknown_number_lists_those_that_are_and_the_nearest_of_them(project: Path, key: str, near: str) -> None:
    known = "mini/pretrain, nano/pretrain, small/pretrain, mini/actions/frozen, nano/actions/frozen, small/actions/frozen"
    needed = "needed encoder/task/protocol, point/pretrain or point/reconstruct, one of: "
    with pytest.raises(UserError, match=f"^no number {key!r}; {re.escape(needed + known + near)}$"):
        explain(locked_run(), key)


def test_an_unknown_form_says_which_there_are(project: Path) -> None:
    with pytest.raises(UserError, match="^--as pdf: needed text, json$"):
        audit.explain_number("nano/actions/frozen", "pdf")


def test_a_mean_over_seeds_is_walked_back_to_the_lock_of_every_seed(capsys: pytest.CaptureFixture) -> None:
    """Of the committed study: its table, its runs and their locks are in git."""
    with contextlib.chdir(ROOT):
        explained = explain_study("seeds/mini/boxes")
        assert audit.explain_number("seeds/mini/boxes", "text") == 0
    (mean,) = (float(cell["value"]) for cell in explained["cells"] if cell["name"] == "mean")
    values = {run["seed"]: float(run["cell"]["value"]) for run in explained["runs"]}
    seeds = json.loads((ROOT / "reports/studies/seeds/study.json").read_text())["seeds"]
    assert [*values] == seeds and len(seeds) > 1 and mean == pytest.approx(fmean(values.values()))
    for run in explained["runs"]:
        lock = read_lock(ROOT / run["lock"])
        names = [stage["name"] for stage in run["stages"]]
        assert names[0] == "readout_frozen@mini-boxes" and {"pretrain@mini", "clips", "code"} <= {*names}
        assert all(stage["wrote"][0]["md5"] == lock[stage["name"]].outs[0].md5 for stage in run["stages"])
        assert next(stage["settings"]["seed"] for stage in run["stages"] if "seed" in stage["settings"]) == run["seed"]
    text = capsys.readouterr().out
    steps = [
        "table.csv line ",
        "seed 0      reports/studies/seeds/runs.csv line ",
        "<- pretrain@mini: artifacts/",
        *(f"seed {seed} " for seed in seeds[1:]),
    ]
    places = [text.index(step) for step in [*steps, f"   scaling4d study seeds --seeds {','.join(map(str, seeds))}"]]
    assert places == sorted(places)


@pytest.mark.parametrize(("key", "stage"), [
    ("seeds/mini/pretrain", "pretrain@mini"),
    ("seeds/mini/reconstruct_moving", "reconstruct@mini"),
    ("seeds/untrained_mini/actions", "readout_frozen@untrained_mini-actions"),
])  # fmt: skip
def test_every_kind_of_number_of_a_study_has_its_stage(key: str, stage: str) -> None:
    with contextlib.chdir(ROOT):
        assert {run["stages"][0]["name"] for run in explain_study(key)["runs"]} == {stage}


def test_an_unknown_number_of_a_study_says_which_arms_and_tasks_it_has() -> None:
    message = r"^no number 'seeds/mini/box'; needed seeds/arm/task; arms: nano, .*; tasks: pretrain, .*mean mini/boxes"
    with contextlib.chdir(ROOT), pytest.raises(UserError, match=message):
        explain_study("seeds/mini/box")
