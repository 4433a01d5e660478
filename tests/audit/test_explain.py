import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from scaling4d import artifacts, audit
from scaling4d.audit import disk, explain, picture
from scaling4d.audit.run import runs
from scaling4d.records import UserError


@pytest.mark.parametrize("here", [True, False])
def test_a_number_is_walked_back_to_the_videos(
    project: Path, here: bool, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture
) -> None:
    weights = artifacts.sha256(Path("artifacts/test/pretrain/nano/model.safetensors"))
    if not here:
        request.getfixturevalue("clone")
    assert audit.walk_back("nano/actions/frozen", "text") == 0
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
        '   setting  points.nano = {"SimpleMAE": {"clip": [4, 8, 8], "rate": 3e-06, "width": 32}}',
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
    found = runs()
    keys = explain.keys(found[0])
    assert {"nano/actions/frozen/top1", "nano/actions/frozen/top5", "mini/pretrain/val_loss"} <= set(keys) and len(keys) == 18
    for key in keys:
        told = explain.explain(found, key)
        assert [cell["name"] for cell in told["cells"]] == [key.rsplit("/", 1)[1]]
        assert {"clips", "code", "data.dvc"} <= {stage["name"] for stage in told["stages"]}
        ElementTree.fromstring(picture.svg(told))


def test_the_same_is_told_as_json(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert audit.walk_back("nano/pretrain/val_loss", "json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cells"][0]["value"] == "0.25" and told["cells"][0]["line"] == 3
    assert told["result"]["sha256"] == artifacts.sha256(Path("artifacts/test/pretrain/nano/summary.json"))
    stages = {stage["name"]: stage for stage in told["stages"]}
    assert list(stages) == ["pretrain@nano", "clips", "code", "data.dvc"]
    assert stages["pretrain@nano"]["code"]["modules"].keys() == {"scaling4d.pretrain.loop"}
    assert stages["clips"]["environment"]["versions"]["torch"] == "2.13.0"


def test_the_drawing_shows_every_stage_once_its_hashes_in_full_and_is_the_same_twice(project: Path) -> None:
    told = explain.explain(runs(), "nano/actions/frozen")
    drawn = picture.svg(told)
    assert drawn == picture.svg(explain.explain(runs(), "nano/actions/frozen"))
    root = ElementTree.fromstring(drawn)
    texts = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    for stage in told["stages"]:
        assert texts.count(stage["name"] * 2) == 1  # shown, and in full where the mouse rests
    assert any(told["checkpoint"]["sha256"] in text for text in texts)
    wide, high = (float(root.get(side)) for side in ("width", "height"))
    boxes = [
        {side: float(box.get(side)) for side in ("x", "y", "width", "height")}
        for box in root.iter("{http://www.w3.org/2000/svg}rect")
    ]
    assert len(boxes) == len(told["stages"]) + 1
    for index, one in enumerate(boxes):
        assert one["x"] + one["width"] <= wide and one["y"] + one["height"] <= high
        for other in boxes[:index]:
            beside = one["x"] >= other["x"] + other["width"] or other["x"] >= one["x"] + one["width"]
            assert beside or one["y"] >= other["y"] + other["height"] or other["y"] >= one["y"] + one["height"]


def test_a_number_of_a_kept_run_is_told_by_its_own_lock(project: Path) -> None:
    told = explain.explain(runs(), "kept/nano/actions/frozen")
    assert told["cells"][0]["file"] == "reports/kept/results.csv"
    assert told["result"] == {"path": "artifacts/kept/readout/nano/actions/frozen/result.json", "sha256": None}
    assert told["again"] == "scaling4d compose profile=kept && dvc repro readout@nano"


def test_explaining_one_number_reads_no_shard(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(disk, "_digest", lambda name, digest=disk._digest: read.append(name) or digest(name))
    explain.explain(runs(), "nano/actions/frozen")
    assert "artifacts/test/pretrain/nano/model.safetensors" in read
    assert not [name for name in read if name.startswith(("artifacts/test/clips/shards", "data", "experiments"))]


@pytest.mark.parametrize("key", ["nano/actions", "nano/actions/frozen/top9", "kept/tiny/actions/frozen", "nothing"])
def test_an_unknown_number_lists_those_that_are(project: Path, key: str) -> None:
    with pytest.raises(UserError) as caught:
        explain.explain(runs(), key)
    known = "mini/pretrain, nano/pretrain, small/pretrain, mini/actions/frozen, nano/actions/frozen, small/actions/frozen"
    assert str(caught.value) == (
        f"no number {key!r}; needed encoder/task/protocol, point/pretrain or point/reconstruct, one of: {known}"
    )


def test_an_unknown_form_says_which_there_are(project: Path) -> None:
    with pytest.raises(UserError, match="^--as pdf: needed text, json, svg$"):
        audit.walk_back("nano/actions/frozen", "pdf")
