import json
import re
from pathlib import Path

import pydot
import pytest

from scaling4d import artifacts, audit
from scaling4d.audit import disk
from scaling4d.audit.explain import as_dot, explain, table_cells
from scaling4d.audit.run import locked_runs
from scaling4d.records import UserError

pytestmark = pytest.mark.integration


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
    runs = locked_runs()
    keys = {f"{row}/{cell['name']}" for row in runs[0].records for cell in table_cells(runs[0], row)}
    assert {"nano/actions/frozen/top1", "nano/actions/frozen/top5", "mini/pretrain/val_loss"} <= keys and len(keys) == 18
    for key in keys:
        explained = explain(runs, key)
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pydot's own parser
def test_graphviz_text_has_a_node_for_each_stage_and_an_edge_from_maker_to_reader(project: Path) -> None:
    explained = explain(locked_runs(), "nano/actions/frozen")
    (graph,) = pydot.graph_from_dot_data(as_dot(explained))
    labels = {node.get_name().strip('"'): node.get_label() for node in graph.get_nodes() if node.get_label()}
    edges = {(edge.get_source().strip('"'), edge.get_destination().strip('"')) for edge in graph.get_edges()}
    assert labels.keys() == {"nano/actions/frozen", *(stage["name"] for stage in explained["stages"])}
    label = labels["pretrain@nano"]
    assert "true pretrain nano" in label and "wrote artifacts/test/pretrain/nano md5 " in label
    assert explained["checkpoint"]["sha256"] in labels["nano/actions/frozen"]
    makers = {maker for maker, reader in edges if reader == "readout@nano"}
    assert makers == {"pretrain@nano", "benchmarks", "code"} and ("readout@nano", "nano/actions/frozen") in edges


def test_a_number_of_a_kept_run_is_told_by_its_own_lock(project: Path) -> None:
    told = explain(locked_runs(), "kept/nano/actions/frozen")
    assert told["cells"][0]["file"] == "reports/kept/results.csv"
    assert told["result"] == {"path": "artifacts/kept/readout/nano/actions/frozen/result.json", "sha256": None}
    assert told["again"] == "scaling4d compose profile=kept && dvc repro readout@nano"


def test_explaining_one_number_reads_no_shard(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(disk, "_digest", lambda name, digest=disk._digest: read.append(name) or digest(name))
    explain(locked_runs(), "nano/actions/frozen")
    assert "artifacts/test/pretrain/nano/model.safetensors" in read
    assert not [name for name in read if name.startswith(("artifacts/test/clips/shards", "data", "experiments"))]


NEAR_NANO = "; did you mean nano/actions/frozen or nano/pretrain?"
NEAR_TOP9 = "; did you mean nano/actions/frozen or mini/actions/frozen or small/actions/frozen?"


@pytest.mark.parametrize(("key", "near"), [
    ("nano/actions", NEAR_NANO),
    ("nano/actions/frozn", NEAR_TOP9),
    ("nano/actions/frozen/top9", NEAR_TOP9),
    ("kept/tiny/actions/frozen", "; did you mean mini/actions/frozen or nano/actions/frozen or small/actions/frozen?"),
    ("nothing", ""),
])  # fmt: skip
def test_an_unknown_number_lists_those_that_are_and_the_nearest_of_them(project: Path, key: str, near: str) -> None:
    known = "mini/pretrain, nano/pretrain, small/pretrain, mini/actions/frozen, nano/actions/frozen, small/actions/frozen"
    needed = "needed encoder/task/protocol, point/pretrain or point/reconstruct, one of: "
    with pytest.raises(UserError, match=f"^no number {key!r}; {re.escape(needed + known + near)}$"):
        explain(locked_runs(), key)


def test_an_unknown_form_says_which_there_are(project: Path) -> None:
    with pytest.raises(UserError, match="^--as pdf: needed text, json, dot$"):
        audit.explain_number("nano/actions/frozen", "pdf")
