import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from scaling4d import config, report
from scaling4d.records import Result, UserError, write_json
from scaling4d.report import built, compare, tables

BUILT = Path("reports/built")


def git(*command: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(["git", *identity, *command], check=True, capture_output=True, text=True).stdout


def lay(settings: dict) -> None:
    """The files that a comparison reads, without the notebook and its figures."""
    story = report.read(settings)
    BUILT.mkdir(parents=True, exist_ok=True)
    for name in ("results", "pretrain", "curves"):
        (BUILT / f"{name}.csv").write_text(getattr(tables, f"{name}_csv")(story))
    write_json(BUILT / "stages.json", tables.stages(story))


def move(encoder: str, task: str, protocol: str, by: float) -> None:
    path = Path("artifacts/test/readout") / encoder / task / protocol / "result.json"
    r = Result.read(path)
    replace(r, value=r.value + by, low=r.low + by, high=r.high + by).write(path)


@pytest.fixture
def two(pocket: dict) -> None:
    """A commit; and in the workspace longer steps, another default in force, other code, pose better and depth a little worse."""
    lay(pocket)
    git("init", "-q")
    git("add", "reports", "params.yaml")
    git("commit", "-qm", "before")
    move("mini", "pose", "frozen", -0.3)
    move("mini", "actions", "frozen", -0.3)
    move("nano", "depth", "frozen", 0.001)
    pocket["pretrain"]["Training"]["steps"] = 2000
    path = Path("artifacts/test/pretrain/mini/operative_config.gin")
    path.write_text(path.read_text().replace("Kind.steps = 3", "Training.steps = 2000\nKind.eps = 1e-05"))
    config.PARAMS.write_text(yaml.safe_dump(pocket, sort_keys=False))
    story = report.read(pocket)
    stages = tables.stages(story)
    stages["code"]["readout"]["modules"] = {"scaling4d.readout.heads": "1" * 64}
    lay(pocket)
    write_json(BUILT / "stages.json", stages)
    Path("dvc.lock").write_text("stages: {code: {outs: [{path: artifacts/code/readout.json, md5: abc}]}}\n")


def test_what_moved_more_than_chance_is_named_first_with_its_direction(two: None) -> None:
    deltas = compare.differences(built.read("HEAD"), built.read())
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
    a, b = built.read("HEAD"), built.read()
    assert list(compare.declared(a, b)) == [("pretrain.Training.steps", "1000", "2000")]
    found = compare.operative(a, b)
    assert found[("Training.steps", "-", "2000")] == found[("Kind.eps", "-", "1e-05")] == ["pretrain/mini"]
    page = compare.in_force(a, b)
    assert "<td>2000</td><td>declared</td>" in page
    assert "<td>1e-05</td><td>not declared: a default of the code or of a library moved</td>" in page
    assert list(compare.rooms(a, b)) == [("readout", "only in workspace")]


def test_changed_modules_are_named_where_both_reports_know_theirs(two: None) -> None:
    after = built.read()
    before = replace(
        built.read("HEAD"), code={"readout": "another"}, stages={**after.stages, "code": {"readout": {"modules": {"x": "1"}}}}
    )
    assert list(compare.rooms(before, after)) == [("readout", "scaling4d.readout.heads, x")]


def test_the_page_is_one_file_with_figures_and_the_same_bytes_twice(two: None, tmp_path: Path) -> None:
    said = compare.compare("HEAD", "workspace", tmp_path / "page.html")
    first = (tmp_path / "page.html").read_text()
    assert said in first and first.count("<svg") == 1 and "href" not in first.replace("xlink:href", "")
    compare.compare("HEAD", "workspace", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == first


def test_an_experiment_is_found_by_its_name(two: None) -> None:
    git("update-ref", "refs/exps/ab/cdef/longer", "HEAD")
    assert built.experiments() == ["longer"]
    assert built.read("longer").revision == git("rev-parse", "HEAD").strip()
    with pytest.raises(UserError, match="no revision or experiment 'shorter'.* or an experiment: longer"):
        built.read("shorter")


def test_a_revision_without_a_report_says_so(two: None) -> None:
    git("rm", "-q", "--cached", "reports/built/results.csv")
    git("commit", "-qm", "none")
    with pytest.raises(UserError, match="HEAD has no reports/built/results.csv; build the report there"):
        built.read("HEAD")


def test_an_older_report_is_compared_as_far_as_it_goes(two: None, tmp_path: Path) -> None:
    git("rm", "-q", "--cached", "reports/built/stages.json", "reports/built/curves.csv")
    git("commit", "-qm", "older")
    compare.compare("HEAD", "workspace", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("Not compared: the report of HEAD is older than stages.json") == 2
    assert "62 numbers in both" in page
