import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from scaling4d import audit
from scaling4d.audit.report_numbers import page_numbers
from scaling4d.audit.run import locked_run

pytestmark = pytest.mark.integration

NANO, MINI = (f"artifacts/test/readout/{point}/actions/frozen/result.json" for point in ("nano", "mini"))
BUILT = "reports/built"
SHOWN, HIDDEN = '<span class="number" id="n-1">0.7500</span>', '<!--an class="number" id="n-1">0.7500</s-->'


@pytest.mark.parametrize(("file", "old", "new", "message"), [
    ("results.csv", "top1,0.75,", "top1,0.95,", f"line 2: mini/actions/frozen top1 value = 0.95, {MINI} has 0.75"),
    ("results.csv", "small,6,a", "smell,6,a", "line 6: no stage of dvc.lock makes the numbers of smell/actions/frozen"),
    ("pretrain.csv", "nano,5,0.5", "nano,5,0.4", "line 3: nano/pretrain train_loss = 0.4, artifacts/test/pretrain/nano/"),
    ("metrics.json", '"low": 0.4,', '"low": 0.3,', "actions.top1↑ (share).frozen.nano.low = 0.3, the tables have 0.4"),
    ("report.html", ">0.7500<", ">0.8500<", "n-1 shows 0.8500, reports/built/numbers.json has 0.7500"),
    ("report.html", '"n-1"', '"n-x"', f"not those of {BUILT}/numbers.json in the same order: n-x only in the page, n-1 only"),
    ("report.html", '"n-1"', '"n-0"', f"not those of {BUILT}/numbers.json in the same order: none only in the page, n-1 "),
    ("report.html", SHOWN, HIDDEN, f"not those of {BUILT}/numbers.json in the same order: none only in the page, n-1 only in"),
    ("numbers.json", '"text": "0.7500"', '"text": "0.8500"', "n-1: 0.75 with format '.4f' is 0.7500, its text is 0.8500"),
    ("numbers.json", '".4f"', '".4q"', "n-1: 0.75 with format '.4q' is nothing (Unknown format code 'q'"),
    ("numbers.json", '"value": 0.75', '"value": 0.85', f"n-1: value 0.85, {MINI} has 0.75 at ['value']"),
    ("numbers.json", '"top5"', '"topX"', f"n-3: {MINI} has nothing at ['others', 'topX'] ('topX')"),
    ("numbers.json", '"encoder": "mini"', '"encoder": "many"', "n-2: reports/built/results.csv has nothing at [{"),
    ("numbers.json", "readout/mini", "readout/many", "n-0: no stage of dvc.lock wrote or read artifacts/test/readout/many/"),
    ("derived.json", '"value": 0.5', '"value": 0.6', "n-5: value 0.5, reports/built/derived.json has 0.6 at ['gain mini',"),
    ("derived.json", '"value"\n', '"vilue"\n', f"reports/built/derived.json gain mini: {MINI} has nothing at ['vilue']"),
])  # fmt: skip
def test_changed_numbers_are_named_by_file(flip: Callable, wrong: Callable, file: str, old: str, new: str, message: str) -> None:
    flip(f"{BUILT}/{file}", old, new)
    text = wrong()
    assert f"wrong       {BUILT}/{file}: md5 " in text and message in text


def test_a_result_without_a_row_is_named(wrong: Callable) -> None:
    path = Path(BUILT, "results.csv")
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("nano,")))
    assert f"wrong       {path}: it has no row of nano/actions/frozen, though {NANO} is here" in wrong()


def test_a_further_metric_and_a_training_without_a_row_are_named(wrong: Callable) -> None:
    for name, start, message in (
        ("results.csv", "nano,5,actions,frozen,top5", "it has no top5 of nano/actions/frozen"),
        ("pretrain.csv", "nano,", "it has no row of nano/pretrain, though artifacts/test/pretrain/nano/summary.json is here"),
    ):
        path = Path(BUILT, name)
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if not line.startswith(start)))
        assert path.read_text() != "".join(lines) and f"wrong       {path}: {message}" in wrong()


def test_a_number_of_a_file_that_no_stage_wrote_is_named(wrong: Callable) -> None:
    Path(BUILT, "extra.json").write_text('{"value": 0.75}')
    numbers = json.loads(Path(BUILT, "numbers.json").read_text())
    numbers[1] |= {"source": f"{BUILT}/extra.json", "key": ["value"]}
    Path(BUILT, "numbers.json").write_text(json.dumps(numbers))
    assert f"n-1: no stage of dvc.lock wrote or read {BUILT}/extra.json" in wrong()


def test_a_script_of_the_page_that_does_more_than_name_the_commit_is_named(wrong: Callable) -> None:
    script, path = Path(__file__).parents[2] / BUILT / "commit.js", Path(BUILT, "commit.js")
    shutil.copyfile(script, path)
    assert wrong() == ""
    path.write_text(path.read_text() + 'document.querySelector("#n-1").textContent = "0.99";\n')
    assert wrong() == f"wrong       {path}: report.html runs it, and it does more than name a commit: run stage report again"


def test_numbers_of_a_page_are_read_as_a_browser_shows_them() -> None:
    shown = '<p><span id="n-0" class="number">1 &lt; 2</span> and <span class="number" id="n-1">3<span>4</span></span></p>'
    hidden = """<!-- <span class="number" id="n-2">5</span> --><script>'<span class="number" id="n-3">6</span>'</script>"""
    assert page_numbers(f"{shown}{hidden}<p>7</p>") == [("n-0", "1 < 2"), ("n-1", "34")]


def test_a_changed_number_of_the_page_is_named_where_every_hash_was_made_to_fit(flip: Callable, wrong: Callable) -> None:
    path = f"{BUILT}/report.html"
    md5, sha256 = (hash_of(path) for hash_of in (locked_run().disk.md5, locked_run().disk.sha256))
    flip(path, ">0.7500<", ">0.8500<")
    flip("dvc.lock", md5, locked_run().disk.md5(path))
    flip(f"{BUILT}/runs.json", sha256, locked_run().disk.sha256(path))
    assert wrong() == f"wrong       {path}: n-1 shows 0.8500, {BUILT}/numbers.json has 0.7500"


def test_entries_that_are_no_numbers_are_named(wrong: Callable) -> None:
    numbers = json.loads(Path(BUILT, "numbers.json").read_text())
    del numbers[3]["source"]
    Path(BUILT, "numbers.json").write_text(json.dumps(numbers))
    malformed = f"{BUILT}/numbers.json: an entry of it or of {BUILT}/derived.json is malformed: "
    assert malformed in wrong() and "'source'; run stage report again" in wrong()


def test_derived_numbers_need_a_hash_in_the_lock(wrong: Callable) -> None:
    for name in ("dvc.yaml", "dvc.lock"):
        Path(name).write_text(Path(name).read_text().replace("derived.json", "settled.json"))
    assert f"{BUILT}/derived.json: dvc.lock has no hash of it: it has to be an out of stage report" in wrong()


def test_numbers_whose_sources_are_absent_are_not_checked(clone: Path, messages: Callable) -> None:
    unchecked = messages("not checked")
    assert f"not checked {BUILT}/numbers.json: the values of 3 sources that are not here ({MINI}, {NANO} and 1 more)" in unchecked
    assert f"not checked {BUILT}: 6 rows of its tables: their results are not in artifacts/test" in unchecked
    Path(BUILT, "numbers.json").unlink()
    assert audit.check() == 0
    earlier = "not here: an earlier version made this report, so neither its page nor metrics.json is checked"
    assert f"not checked {BUILT}/numbers.json: {earlier}" in messages("not checked")
