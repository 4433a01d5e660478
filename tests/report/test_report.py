import base64
import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from scaling4d import artifacts, report
from scaling4d.records import UserError, write_json
from scaling4d.report import figures, readouts, tables
from scaling4d.report import story as story_of
from scaling4d.report.story import published
from scaling4d.studies import experiments

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "reports/scaling.ipynb"
BUILT = Path("reports/built")
TASKS = ("actions", "boxes", "depth", "points", "pose")
OUTS = {
    *("results.csv", "pretrain.csv", "reconstruct.csv", "curves.csv", "metrics.json", "stages.json", "report.html"),
    *("scaling.ipynb", "site/index.html", "site/report.html"),
    *("headline.svg", "pretraining.svg", "training_curves.svg", "methods.svg", "reconstructions.svg", "costs.svg"),
}


def outs() -> dict[str, bytes]:
    """What was built, by name; what differs from run to run apart."""
    files = {path.relative_to(BUILT).as_posix(): path.read_bytes() for path in BUILT.rglob("*") if path.is_file()}
    assert files.pop("runs.json")
    return files


def override(key: str, value: object, stage: Path) -> None:
    """Let a stage say that a setting was overridden."""
    path = stage / "provenance.json"
    write_json(path, {**json.loads(path.read_text()), "overrides": {key: value}})


def test_the_report_is_the_same_bytes_twice_and_needs_no_network(pocket: dict, capsys: pytest.CaptureFixture) -> None:
    override("pretrain.Training.steps", 77, Path("artifacts/test/pretrain/nano"))
    artifacts.write_run("pretrain-nano", artifacts.sha256(Path("artifacts/test/reconstruct/nano")), started=0)
    artifacts.write_run("pretrain-nano", "0" * 64, started=0)
    report.build(pocket)
    first = outs()
    assert set(first) == OUTS
    report.build(pocket)
    assert outs() == first
    page = first["report.html"].decode()
    assert not re.findall(r"""(?:src|href|from|import)\s*[=(]?\s*["']?(?:https?:)?//""", page)
    assert str(Path.cwd()) not in page + first["scaling.ipynb"].decode()
    assert page.count("<svg") >= 6
    assert re.search(r"pretrain\.Training\.steps</td><td>77</td><td>pretrain/nano", page)
    shown = capsys.readouterr().out
    assert "untrained_mini" in shown and "average_jaccard ↑" in shown
    runs = json.loads((BUILT / "runs.json").read_text())["runs"]
    assert [run["stage"] for run in runs] == ["pretrain-nano", "report"]
    assert not list(artifacts.PARTIAL.iterdir())


def test_what_experiments_took_is_not_among_the_times_of_stages(pocket: dict) -> None:
    experiments.write_facts("pocket-nano-0", {"seconds": 1.0, "cpu_seconds": 1.0})
    report.build(pocket)
    assert [run["stage"] for run in json.loads((BUILT / "runs.json").read_text())["runs"]] == ["report"]


def test_tables_hold_every_result_in_full(pocket: dict) -> None:
    story = report.read(pocket)
    rows = list(csv.DictReader(tables.results_csv(story).splitlines()))
    assert list(rows[0]) == [
        *("encoder", "parameters", "task", "protocol", "metric", "value", "low", "high"),
        *("unit", "higher_is_better", "examples", "seed", "checkpoint_sha256"),
    ]
    assert len([row for row in rows if row["low"]]) == 10 * 5 + 2 * 5 + 2  # frozen, fine-tuned, classifiers
    assert {row["metric"] for row in rows if not row["low"]} == {"epe_standing_still"}
    one = next(row for row in rows if (row["encoder"], row["task"], row["protocol"]) == ("mini", "depth", "finetune"))
    tuned = tables.metrics(story)["depth"]["abs_rel↓ (ratio)"]["finetune"]["mini"]
    found = story.result("mini", "depth", "finetune")
    assert float(one["value"]) == found.value == tuned["value"]
    assert (tuned["low"], tuned["high"]) == (found.low, found.high)
    head, *points = tables.pretrain_csv(story).splitlines()
    assert head == "point,method,parameters,flops,clips_seen,train_loss,val_loss,seed"
    assert points[-1].startswith("nano_distilled,Distilled,180000,") and len(points) == 7
    assert "nano_distilled" not in tables.reconstruct_csv(story)  # it learns no pixels


def test_a_student_is_no_part_of_the_ladder_and_stands_beside_the_point_of_its_size(pocket: dict) -> None:
    story = report.read(pocket)
    assert story.methods[0] == "SimpleMAE" and story.methods[-1] == "Distilled"
    assert story.of_method("Distilled") == ["nano_distilled"]
    lines = report.table(story).splitlines()
    assert next(line for line in lines if "nano_distilled" in line)
    small = replace(story, points=("mae_st_tiny", "nano"))
    assert small.methods == ["MAEST", "SimpleMAE", "Distilled"]  # each with one point


def test_what_the_profile_has_not_is_a_dash_and_not_an_error(drawn: Callable[..., dict]) -> None:
    settings = drawn(points={"nano": 180_000, "mini": 8_000_000}, frozen=["mini"], finetune=[])
    text = report.table(report.read(settings)).splitlines()
    assert next(line for line in text if "nano" in line).split()[-5:] == ["-"] * 5
    assert "-" not in next(line for line in text if "mini" in line).split()


def test_an_encoder_that_others_published_stands_beside_ours(drawn: Callable[..., dict]) -> None:
    points, published = {"nano": 180_000, "mini": 8_000_000}, {"dinov2_l": 304_000_000}
    report.build(drawn(points=points, frozen=[*points, *published], finetune=[], published=published))
    with (BUILT / "results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["encoder"] == "dinov2_l"]
    assert {row["task"] for row in rows} == {*TASKS} and {row["parameters"] for row in rows} == {"304000000"}
    assert "dinov2_l, frozen" in (BUILT / "headline.svg").read_text()
    assert "pretrain/dinov2_l" in report.read().provenances


def test_own_videos_without_benchmarks_are_reported(drawn: Callable[..., dict]) -> None:
    report.build(drawn(points={"nano": 180_000}, frozen=[], finetune=[]))
    assert (BUILT / "results.csv").read_text().count("\n") == 1
    assert "no benchmark" in (BUILT / "report.html").read_text()
    assert set(outs()) == OUTS


@pytest.mark.parametrize(
    ("gone", "command"),
    [
        ("clips/datasheet.json", "clips"),
        ("pretrain/tiny/summary.json", "pretrain tiny"),
        ("pretrain/untrained_nano/provenance.json", "baseline untrained_nano"),
        ("readout/mini/depth/finetune/result.json", "readout mini depth finetune"),
        ("reconstruct/nano/filled.png", "reconstruct nano"),
        ("show/depth/sheet.png", "show RESULT... --out artifacts/test/show/depth"),
    ],
)
def test_a_missing_file_names_the_stage_to_run(pocket: dict, gone: str, command: str) -> None:
    path = Path("artifacts/test") / gone
    path.unlink()
    with pytest.raises(UserError) as caught:
        report.build(pocket)
    wanted = f"the report needs {path}, which is not there: run `dvc repro`, or `scaling4d {command}` alone"
    assert str(caught.value) == wanted
    assert not BUILT.exists()


def test_a_damaged_result_is_named(pocket: dict) -> None:
    path = Path("artifacts/test/readout/mini/depth/frozen/result.json")
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match=f"{path} is not a result .*run `scaling4d readout mini depth frozen`"):
        report.read(pocket)


def test_a_failing_notebook_says_which_cell(pocket: dict) -> None:
    notebook = Path("reports/scaling.ipynb")
    notebook.write_text(notebook.read_text().replace("figures.headline(story)", "1 / 0", 1))
    with pytest.raises(UserError, match="fails in cell .*ZeroDivisionError"):
        report.build(pocket)
    assert not BUILT.exists()


def test_a_notebook_that_leaves_out_a_figure_is_refused(pocket: dict) -> None:
    notebook = Path("reports/scaling.ipynb")
    notebook.write_text(notebook.read_text().replace("display(costs.costs())", "0", 1))
    with pytest.raises(UserError, match="does not show the figure 'costs'"):
        report.build(pocket)
    assert not BUILT.exists()


def test_the_notebook_is_short_and_only_calls_the_report() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert len(cells) <= 17
    assert not [cell for cell in cells if cell.get("outputs")]
    assert set(re.findall(r"import (.+)", code)) == {"Path", "config, report", "costs, figures, readouts, tables"}
    assert not re.search(r"\b(for|if|def|lambda)\b", code)


def test_an_untrained_twin_shows_what_pretraining_brought(pocket: dict) -> None:
    page = tables.differences(report.read(pocket))
    assert page.count("<tr>") == 1 + 2 * 5
    gain = re.search(r"mini</td><td>pose.*?<td>([+-][\d.]+)</td>", page)[1]
    assert float(gain) > 0  # a smaller error counts as a gain


def test_points_that_hide_otherwise_are_no_part_of_the_ladder(drawn: Callable[..., dict]) -> None:
    sizes = {"nano": 180_000, "tiny": 1_060_000, "tiny_tube": 1_060_000, "mini": 8_350_000}
    story = report.read(drawn(points=sizes, frozen=list(sizes), finetune=[]))
    assert story.ladder == ["nano", "tiny", "mini"]
    assert story.masking("tiny_tube") == "tube 95 %"
    assert "tube 95 %" in tables.pretrain(story)
    assert figures.methods(story) != figures.methods(replace(story, points=("nano", "mini")))


def test_trends_fit_ours_and_the_published_curves_by_the_same_code(pocket: dict) -> None:
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in tables.trends(report.read(pocket)).split("<tr>")[2:]]
    by_name = {row[0]: row for row in rows}
    assert len([name for name in by_name if name.startswith("4DS: ")]) == 10
    loss = by_name["ours: validation loss, parameters"]
    assert loss[1] == "5" and loss[2].startswith("0.0139 [") and loss[3].startswith("0.4000 [") and loss[-1] == "yes"
    depth = by_name["4DS: depth AbsRel, frozen"]
    assert depth[6] == "0.0840" and depth[-1] == "yes"


def test_stages_name_what_they_read_and_who_made_it(pocket: dict) -> None:
    found = tables.stages(report.read(pocket))
    readout = found["stages"]["readout/mini/depth/finetune"]
    assert readout["from"] == {"checkpoint": "pretrain/mini"}
    assert readout["operative"] == {"Kind.of": "'readout'", "Kind.steps": "3"}
    assert found["stages"]["reconstruct/nano"]["from"] == {"checkpoint": "pretrain/nano", "clips": "clips"}
    made = json.loads(Path("artifacts/test/readout/mini/depth/finetune/provenance.json").read_text())
    assert readout["code"] | {"modules": {}} == made["code"]


def test_settings_in_force_are_read_over_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "operative_config.gin"
    path.write_text("import x\n# Parameters for A:\n# ===\nA.b = \\\n    ['one',\n     'two']\nscope/A.c = 1e-3\n")
    assert story_of.operative(path) == {"A.b": "['one', 'two']", "scope/A.c": "1e-3"}


def test_published_curves_are_complete_and_fall_or_rise_as_they_say() -> None:
    paper = published()["4DS"]
    for task, known in paper["tasks"].items():
        for protocol in ("frozen", "finetune"):
            values = list(known[protocol].values())
            assert list(known[protocol]) == list(paper["sizes"]), task
            assert (values[-1] > values[0]) == known["higher_is_better"], task


def test_the_sheets_of_predictions_are_part_of_the_page(pocket: dict) -> None:
    page = readouts.sheets(report.read(pocket))
    found = re.findall(r'alt="(\w+): [^"]*" src="data:image/png;base64,([^"]+)"', page)
    assert [task for task, _ in found] == list(pocket["readout"]["tasks"])
    for task, data in found:
        assert base64.b64decode(data) == Path(f"artifacts/test/show/{task}/sheet.png").read_bytes()
    assert "draws no predictions" in readouts.sheets(replace(report.read(pocket), sheets={}))


def test_the_published_curve_stands_in_the_columns_of_our_table(pocket: dict) -> None:
    page = readouts.paper(report.read(pocket))
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    small = next(row for row in rows if row[:3] == ["4DS-B", "100 M", "frozen"])
    known = published()["4DS"]["tasks"]
    assert small[3:] == ["~0.497", *(f"{known[task]['frozen']['B']:.3f}" for task in list(known)[1:])]
    assert len([row for row in rows if row]) == 7 * 2


def test_what_is_ours_is_listed_with_the_value_of_this_run(pocket: dict) -> None:
    for task, steps in (("depth", 120), ("boxes", 300), ("pose", 300)):
        path = Path(f"artifacts/test/readout/mini/{task}/frozen/provenance.json")
        made = json.loads(path.read_text()) | {"settings": {f"readout.frozen.{task}": {"Recipe": {"steps": steps}}}}
        write_json(path, made)
    page = readouts.unstated(report.read(pocket))
    assert re.search(r"readout\.frozen\.\*\.Recipe\.steps: 300 \(boxes, pose\); 120 \(depth\)</td><td>scivid", page)
    assert "absolute relative error" in page and "place_deviation" not in page  # which no stage of this run was given


def test_every_setting_that_is_marked_ours_is_in_the_list_and_every_one_of_the_list_exists() -> None:
    """The mark is a comment in experiments/config.yaml, on the line of a key or of the mapping above it."""
    settings = dict(story_of.leaves(yaml.safe_load((ROOT / "params.yaml").read_text())))
    listed = [key for choice in readouts._choices() for key in choice.get("settings", ())]
    for key in listed:
        assert readouts._in_force(key, settings), key
    text = (ROOT / "experiments/config.yaml").read_text()
    lines = text.splitlines()
    marked = [key for key, line in keys_of(yaml.compose(text)) if "ours" in lines[line].partition("#")[2]]
    assert len(marked) > 10
    for key in marked:
        words = key.replace("recipes.frozen", "readout.frozen.*.Recipe").split(".")
        mine = [one for one in listed if all(a == b or "*" in (a, b) for a, b in zip(words, one.split("."), strict=False))]
        assert mine, f"{key} is marked ours in experiments/config.yaml and missing in report/unstated.yaml"


def keys_of(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted keys and the line on which each stands."""
    for key, value in (pair for pair in node.value if pair[0].value != "<<"):
        yield f"{prefix}{key.value}", key.start_mark.line
        if isinstance(value, yaml.MappingNode):
            yield from keys_of(value, f"{prefix}{key.value}.")
