from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from commands import commit_here, git
from synthetic_run import BUILT, write_tables

from scaling4d import config
from scaling4d.provenance import experiments
from scaling4d.records import Result, UserError, write_json
from scaling4d.report import compare
from scaling4d.report.built import read_built_report

pytestmark = pytest.mark.integration

LOCK = """schema: "2.0"
stages: {code: {cmd: code, outs: [{path: artifacts/code/readout.json, hash: md5, md5: abc, size: 1}]}}
"""


def move(encoder: str, task: str, protocol: str, by: float) -> None:
    path = Path("artifacts/test/readout") / encoder / task / protocol / "result.json"
    r = Result.read(path)
    replace(r, value=r.value + by, low=r.low + by, high=r.high + by).write(path)


@pytest.fixture
def two(pocket: dict) -> None:
    """A commit; here more steps, another default in force, other code, pose better, depth a little worse."""
    write_tables(pocket)
    commit_here("before", "reports", "params.yaml")
    move("mini", "pose", "frozen", -0.3)
    move("mini", "actions", "frozen", -0.3)
    move("nano", "depth", "frozen", 0.001)
    pocket["pretrain"]["Training"]["steps"] = 2000
    path = Path("artifacts/test/pretrain/mini/operative_config.gin")
    path.write_text(path.read_text().replace("Kind.steps = 3", "Training.steps = 2000\nKind.eps = 1e-05"))
    config.PARAMS.write_text(yaml.safe_dump(pocket, sort_keys=False))
    stages = write_tables(pocket)
    stages["code"]["readout"]["modules"] = {"scaling4d.readout.heads": "1" * 64}
    write_json(BUILT / "stages.json", stages)
    Path("dvc.lock").write_text(LOCK)


def test_what_moved_more_than_chance_is_named_first_with_its_direction(two: None) -> None:
    deltas = compare.deltas(read_built_report("HEAD"), read_built_report())
    assert {(d.key, d.verdict) for d in deltas[:2]} == {
        (("mini", "pose", "frozen"), "better"),
        (("mini", "actions", "frozen"), "worse"),
    }
    assert {d.key: d.verdict for d in deltas[2:] if d.verdict != "equal"} == {("nano", "depth", "frozen"): "same"}
    depth = next(d for d in deltas if d.key == ("nano", "depth", "frozen"))
    assert depth.change == pytest.approx(0.001) and depth.low < 0 < depth.high
    one = deltas[0]
    ends = ((one.b["value"] - one.b["low"]) ** 2 + (one.a["high"] - one.a["value"]) ** 2) ** 0.5
    assert one.low == pytest.approx(one.change - ends)
    assert compare.summary(deltas) == (
        "Of 62 numbers in both, 59 are equal to the last digit; of the other 3, 1 are better, 1 worse and 1 within chance,"
        " which alone puts about 0.2 outside."
    )


def test_declared_operative_and_code_differences_are_told_apart(two: None) -> None:
    a, b = read_built_report("HEAD"), read_built_report()
    stages = compare.operative_differences(a, b)
    assert stages["Training.steps", "missing", "2000"] == stages["Kind.eps", "missing", "1e-05"] == ["pretrain/mini"]
    page = compare._page(a, b, [])
    assert "<td>pretrain.Training.steps</td><td>1000</td><td>2000</td>" in page
    assert "<td>2000</td><td>declared</td>" in page
    assert "<td>1e-05</td><td>not declared: a default of the code or of a library moved</td>" in page
    assert list(compare.package_differences(a, b)) == [("readout", "only in workspace")]


def test_changed_modules_are_named_where_both_reports_know_theirs(two: None) -> None:
    after = read_built_report()
    stages = {**after.stages, "code": {"readout": {"modules": {"x": "1"}}}}
    before = replace(read_built_report("HEAD"), code={"readout": "another"}, stages=stages)
    assert list(compare.package_differences(before, after)) == [("readout", "scaling4d.readout.heads, x")]


def test_the_page_is_one_file_with_figures_and_the_same_bytes_twice(two: None, tmp_path: Path) -> None:
    sentence = compare.compare("HEAD", "workspace", tmp_path / "page.html")
    first = (tmp_path / "page.html").read_text()
    assert sentence in first and first.count("<svg") == 1 and "href" not in first.replace("xlink:href", "")
    compare.compare("HEAD", "workspace", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == first


def test_an_experiment_is_found_by_its_name(two: None) -> None:
    git("update-ref", "refs/exps/ab/cdef/longer", "HEAD")
    assert list(experiments()) == ["longer"]
    assert read_built_report("longer").revision == git("rev-parse", "HEAD").strip()
    with pytest.raises(UserError, match="no revision or experiment 'shorter'.* or an experiment: longer"):
        read_built_report("shorter")


@pytest.mark.parametrize("name", ["results.csv", "stages.json"])
def test_a_revision_without_a_report_or_with_an_older_one_says_so(two: None, name: str) -> None:
    git("rm", "-q", "--cached", f"reports/built/{name}")
    git("commit", "-qm", "none")
    with pytest.raises(UserError, match=f"HEAD has no reports/built/{name}; build the report there"):
        read_built_report("HEAD")
