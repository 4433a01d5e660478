import contextlib
import csv
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import chromium
import pytest
from commands import invoke, refused_command
from matplotlib.figure import Figure
from synthetic_run import BUILT, NOTEBOOK, OTHERS, POCKET, SIZES, TASKS, rows_of, validate_under_way, write_run

from scaling4d import artifacts, config
from scaling4d.audit.report_numbers import _value_at
from scaling4d.provenance import WORK_FOLDER, format_number, load_yaml
from scaling4d.records import UserError, write_json
from scaling4d.report import figures, notebook, sections, stage, tables
from scaling4d.report.layout import SECTIONS, build_page, report_html
from scaling4d.report.page import Page
from scaling4d.report.run_results import read_run_results
from scaling4d.studies.plotting import panel_title
from scaling4d.studies.words import WORDS, measure, metric_words

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
OUTS = {
    *("results.csv", "pretrain.csv", "reconstruct.csv", "curves.csv", "metrics.json", "stages.json", "report.html"),
    *("numbers.json", "derived.json", "scaling.ipynb", "site/index.html"),
    *("headline.svg", "label_efficiency.svg", "pretraining.svg", "training_curves.svg", "methods.svg", "costs.svg"),
}


def outs() -> dict[str, bytes]:
    """The files of the report by name, without runs.json and commit.js, which differ from run to run."""
    files = {path.relative_to(BUILT).as_posix(): path.read_bytes() for path in BUILT.rglob("*") if path.is_file()}
    assert files.pop("runs.json") and files.pop("commit.js")
    return files


@pytest.fixture(scope="module")
def built_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built report of a run with an override, with times of a stage, of another run and of a study's experiment."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(ROOT / "src"))
        settings = write_run(**POCKET)
        path = Path("artifacts/test/pretrain/nano/provenance.json")
        write_json(path, {**json.loads(path.read_text()), "overrides": {"pretrain.Training.steps": 77}})
        artifacts.write_run("pretrain-nano", artifacts.sha256(Path("artifacts/test/reconstruct/nano")), started=0)
        artifacts.write_run("pretrain-nano", "0" * 64, started=0)
        Path(".runs/studies").mkdir()
        write_json(Path(".runs/studies/pocket-nano-0.json"), {"seconds": 1.0, "cpu_seconds": 1.0})
        stage.build(settings)
    return folder


@pytest.fixture(scope="module")
def page(built_folder: Path) -> Page:
    """The page of that run."""
    with contextlib.chdir(built_folder):
        return build_page(read_run_results(config.read()))


@pytest.fixture
def built(built_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of that run as the current one."""
    monkeypatch.chdir(built_folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    return built_folder


def test_the_report_is_the_same_bytes_twice_and_needs_no_network(built: Path, capsys: pytest.CaptureFixture) -> None:
    first = outs()
    strips = {f"pictures/clip_{clip}_{row}.png" for clip in (0, 1) for row in ("input", "masked", *SIZES, "difference")}
    pictures = strips | {f"pictures/clip_{clip}.webm" for clip in (0, 1)} | {f"pictures/sheet_{task}.png" for task in TASKS}
    assert set(first) == OUTS | pictures
    stage.build(config.read())
    assert outs() == first
    table = capsys.readouterr().out
    assert "untrained_mini" in table and "average_jaccard ↑" in table
    page = first["report.html"].decode()
    assert not re.findall(r"""(?:src|href|from|import)\s*[=(]?\s*["']?(?:https?:)?//""", page)
    assert str(Path.cwd()) not in page + first["scaling.ipynb"].decode()
    assert re.search(r'pretrain\.Training\.steps</td><td><span class="number" id="n-\d+">77</span></td><td>pretrain/nano', page)
    runs = json.loads((BUILT / "runs.json").read_text())["runs"]
    assert {run["stage"] for run in runs} == {"pretrain-nano", "report"}
    assert not list(WORK_FOLDER.iterdir())


def test_the_page_links_every_figure_and_picture_and_holds_none(built: Path) -> None:
    files = outs()
    text = files["report.html"].decode()
    links = re.findall(r'<img [^>]*src="([^"]+)"', text)
    assert sorted(links) == sorted(name for name in files if name.endswith((".svg", ".png")))
    assert re.findall(r'<video [^>]*src="([^"]+)"', text) == ["pictures/clip_0.webm", "pictures/clip_1.webm"]
    assert "<svg" not in text and "base64" not in text and "data:image" not in text
    for task in TASKS:
        assert files[f"pictures/sheet_{task}.png"] == Path(f"artifacts/test/show/{task}/sheet.png").read_bytes()
    assert "<text" in files["headline.svg"].decode()


def test_the_notebook_embeds_the_csv_files_and_no_picture(built: Path) -> None:
    cells = json.loads((BUILT / "scaling.ipynb").read_text())["cells"]
    outputs = [output["data"] for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert all(data.keys() == {"text/html", "text/plain"} for data in outputs)
    assert not re.search("<svg|<img|data:image|base64", json.dumps(outputs))
    links = re.findall(r"!\[.+?\]\((.+?)\)", "".join("".join(cell["source"]) for cell in cells))
    assert sorted(links) == sorted(path.name for path in BUILT.glob("*.svg"))

    shown = ["".join(data["text/html"]) for data in outputs]
    for table, name in zip(shown, ("results", "pretrain", "reconstruct"), strict=True):
        rows = list(csv.DictReader((BUILT / f"{name}.csv").read_text().splitlines()))
        assert table.count("<tr>") == 1 + len([row for row in rows if row.get("low") != ""])
        assert "_" not in "".join(re.findall(r"<th>(.*?)</th>", table)) and "sha256" not in table


def test_the_kept_report_adds_at_most_two_megabytes_to_git() -> None:
    files = [path for path in (ROOT / "reports/built").rglob("*") if path.is_file()]
    assert sum(len(zlib.compress(path.read_bytes())) for path in files) < 2_000_000  # git stores zlib's


def test_where_artifacts_are_missing_the_table_is_that_of_the_committed_report(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = invoke("table")
    clone = tmp_path / "clone"
    shutil.copytree(built, clone, symlinks=True, ignore=shutil.ignore_patterns("artifacts", ".runs"))
    monkeypatch.chdir(clone)
    committed = invoke("table")
    assert committed.exit_code == 0 and "is missing: run `dvc repro`" in committed.stderr
    lines = {line.split()[0]: line.split() for line in committed.stdout.splitlines()[4:] if line.strip()}
    (line,) = (line.split() for line in full.stdout.splitlines() if line.split()[:1] == ["untrained_mini"])
    numbers, expected = (list(map(float, words[-len(TASKS) : -1])) for words in (lines["untrained_mini"], line))  # 120 columns
    assert numbers == pytest.approx(expected, abs=1e-3)
    shutil.rmtree(clone / "reports/built")
    assert "is missing: run `dvc repro`" in refused_command("table")


def test_a_damaged_result_is_named_and_the_table_is_not_the_committed_one(built: Path) -> None:
    (damaged,) = Path("artifacts").glob("*/readout/untrained_mini/depth/frozen/result.json")
    text = damaged.read_text()
    damaged.write_text(text[:-9])
    try:
        assert refused_command("table").startswith(f"{damaged} is damaged (")
    finally:
        damaged.write_text(text)


def test_no_table_head_shows_a_raw_key(built: Path) -> None:
    heads = re.findall(r"<th>(.*?)</th>", (BUILT / "report.html").read_text())
    assert len(heads) > 60
    for head in heads:
        assert "_" not in head and not set(re.findall(r"\w+", head)) & {*WORDS} - {"precision", "recall"}, head
    assert sum("↑" in head or "↓" in head for head in heads) >= 25


def test_every_metric_of_the_kept_report_has_words_direction_and_unit() -> None:
    rows = list(csv.DictReader((ROOT / "reports/built/results.csv").read_text().splitlines()))
    for row in rows:
        words, direction, unit = WORDS[row["metric"].partition("_linear")[0]]
        assert words and unit and direction in ("↑", "↓")
        if row["unit"]:
            assert (unit, direction) == (row["unit"], "↑" if row["higher_is_better"] == "True" else "↓")
    assert measure("top1_linear_300") == "top-1 accuracy of actions, linear probe of 300 clips ↑"
    assert measure("my_own", "↓") == "my own ↓"


def test_every_figure_has_a_caption_and_that_of_the_tasks_names_its_baselines(page: Page) -> None:
    for name in ("headline", "label_efficiency", "pretraining", "training_curves", "methods", "costs"):
        assert re.search(r"<figcaption>\w.+\.</figcaption>", page.sections[name]), name
    for words in ("untrained nano", "untrained mini", "raw pixels"):
        assert words in page.sections["headline"] and words in page.sections["label_efficiency"]
    assert "untrained_" not in re.sub(r'<img [^>]+>|<a [^>]+>|<section id="[^"]+">', "", page.sections["headline"])
    assert page.sections["sheets"].count(sections.DRAWN_CLIPS) == len(TASKS)
    assert "ridge regression" in page.sections["label_efficiency"] and "gradient steps" in page.sections["label_efficiency"]


def test_the_title_of_a_panel_has_words_in_at_most_two_lines(pocket: dict) -> None:
    run = read_run_results(pocket)
    svg = figures.headline(run)
    for r in run.results:
        name, *words, direction = panel_title(r.task, r.metric, r.unit, r.higher_is_better).splitlines()
        assert 1 <= len(words) <= 2 and " ".join(words) == f"{metric_words(r.metric)} ({r.unit})"
        assert all(f">{line}</text>" in svg for line in words) and ("↑" in direction) == r.higher_is_better


def test_the_answer_comes_first_and_details_are_folded(page: Page) -> None:
    assert [*page.sections] == [section.name for section in SECTIONS]
    assert [*page.sections][:5] == ["conclusion", "verdict", "rules", "headline", "results"]
    assert re.search(r"</h1>\n<section[^>]*><p>(Better|Within|Not)", report_html(page, "commit.js"))
    folded = {name for name, content in page.sections.items() if "<details>" in content}
    details = {"further", "paper", "mae_st", "trends", "fidelity", "overrides", "deviations", "unstated", "agreements", "lineage"}
    assert folded == {"rules"} | details


@chromium.needed
def test_the_page_fits_a_telephone(built: Path, tmp_path: Path) -> None:
    with chromium.browser(tmp_path / "browser") as page:
        page.open((built / BUILT / "report.html").as_uri())
        metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        page.call("Emulation.setDeviceMetricsOverride", **metrics)
        page.value("document.querySelectorAll('details').forEach(details => { details.open = true; })")
        page.wait("[...document.images].every(image => image.complete)")
        assert page.value("document.documentElement.scrollWidth") == page.value("innerWidth") == 390
        assert page.value("[...document.querySelectorAll('table')].every(table => table.parentNode.className === 'scroll')")
        for figure in ("headline", "label_efficiency", "pretraining"):
            image, box = f"document.querySelector('img[src=\"{figure}.svg\"]')", f"document.querySelector('#{figure} .scroll')"
            assert (
                page.value(f"{image}.clientWidth") == page.value(f"{box}.scrollWidth") == 720 > page.value(f"{box}.clientWidth")
            )


@chromium.needed
def test_the_folder_opens_from_any_place_with_all_its_pictures(built: Path, tmp_path: Path) -> None:
    shutil.copytree(BUILT, tmp_path / "moved")
    with chromium.browser(tmp_path / "browser") as page:
        page.open((tmp_path / "moved/report.html").as_uri())
        page.wait("[...document.images].every(image => image.complete)")
        assert page.value("document.images.length") == 6 + len(TASKS) + 2 * (len(SIZES) + 3)
        assert page.value("[...document.images].filter(image => !image.naturalWidth).length") == 0
        assert all(url.startswith(("file://", "data:")) for url in page.requested)  # data: of the browser's own controls
        cell = "[...document.querySelectorAll('#summary tr')].find(row => row.cells[0].textContent === 'commit').cells[1]"
        assert page.value(f"{cell}.textContent") == "no commit"


def test_every_number_of_the_page_is_listed_with_the_file_and_place_that_hold_it(built: Path) -> None:
    numbers = json.loads((BUILT / "numbers.json").read_text())
    spans = re.findall(r'<span class="number" id="([^"]+)">([^<]*)</span>', (BUILT / "report.html").read_text())
    assert spans == [(number["id"], number["text"]) for number in numbers]
    assert len({number["id"] for number in numbers}) == len(numbers) > 600

    @cache
    def read(name: str) -> Any:
        text = Path(name.replace("src/", f"{ROOT}/src/")).read_text()
        return list(map(json.loads, text.splitlines())) if name.endswith(".jsonl") else load_yaml(text)

    for number in numbers:
        content = read(number["source"])
        for key in number["key"]:
            content = content[key]
        assert content == number["value"], number
        assert number["text"] == format_number(number["value"], number["format"])


def test_no_digit_of_a_table_of_numbers_stands_outside_a_number(page: Page) -> None:
    for name in ("results", "further", "points", "fidelity", "reconstructions"):
        body = re.sub(r"<thead>.*?</thead>|<summary>.*?</summary>|<h2>.*?</h2>", "", page.sections[name])
        text = re.sub(r'<span class="number".*?</span>|<[^>]+>|4DS|95 %|0\.\.1|&#x27;', "", body)
        assert not re.search(r"\d", text), (name, text)


def test_further_metrics_say_at_which_step_early_stopping_took_the_weights(page: Page, pocket: dict) -> None:
    assert page.sections["further"].count("<th>step with the lowest<br>held-out loss</th><th>last step</th></tr>") == len(TASKS)
    steps = {(encoder, protocol): cells[-2:] for encoder, protocol, *cells in filter(None, rows_of(page.sections["further"]))}
    assert steps["mini", "frozen"] == steps["untrained nano", "frozen"] == ["120", "300"]  # the first of two equal losses
    assert steps["mini", "finetune"] == steps["raw pixels", "frozen"] == ["-", "-"]
    run = read_run_results(pocket)
    number, _ = tables.held_out_parts(run, run.result("mini", "pose", "frozen"))
    assert number.value == _value_at(number.source, Path(number.source).read_text(), number.key) == 120


def test_derived_numbers_name_the_numbers_that_they_come_from(built: Path) -> None:
    derived = json.loads((BUILT / "derived.json").read_text())
    trend = derived["trend of SimpleMAE"]
    losses = [json.loads(Path(source).read_text())["val_loss"] for source, key in trend["from"] if key == ["val_loss"]]
    assert len(losses) == 5 and trend["value"]["change"] == abs(1 - losses[-1] / losses[0])
    law = derived["law of ours: validation loss, parameters"]
    assert law["value"]["sizes"] == 5 and len(law["from"]) == 10
    assert ["artifacts/test/pretrain/mini/summary.json", ["val_loss"]] in law["from"]


def test_tables_hold_every_result_in_full(pocket: dict) -> None:
    run = read_run_results(pocket)
    rows = list(csv.DictReader(tables.results_csv(run).splitlines()))
    assert list(rows[0]) == [
        *("encoder", "parameters", "task", "protocol", "metric", "value", "low", "high"),
        *("unit", "higher_is_better", "examples", "seed", "checkpoint_sha256"),
    ]
    assert len([row for row in rows if row["low"]]) == 10 * 5 + 2 * 5 + 2  # frozen, fine-tuned, classifiers
    assert {row["metric"] for row in rows if not row["low"]} == {name for others in OTHERS.values() for name in others}
    one = next(row for row in rows if (row["encoder"], row["task"], row["protocol"]) == ("mini", "depth", "finetune"))
    tuned = tables.metrics(run)["depth"]["abs_rel↓ (ratio)"]["finetune"]["mini"]
    result = run.result("mini", "depth", "finetune")
    assert float(one["value"]) == result.value == tuned["value"]
    assert (tuned["low"], tuned["high"]) == (result.low, result.high)
    head, *points = tables.pretrain_csv(run).splitlines()
    assert head == "point,method,parameters,flops,clips_seen,train_loss,val_loss,seed"
    assert points[-1].startswith("nano_distilled,Distilled,180000,") and len(points) == 7
    assert "nano_distilled" not in tables.reconstruct_csv(run)  # it predicts no pixels


def test_linear_probes_are_drawn_from_few_to_all_labelled_clips(pocket: dict) -> None:
    run, results, metrics = read_run_results(pocket), [], {"actions": "top1", "depth": "abs_rel"}
    assert "no readout with linear probes" in figures.label_efficiency(run)
    for r in run.results:
        worse, metric = -1 if r.higher_is_better else 1, metrics.get(r.task)
        clips = {"": 0, "_1000": 0.1, "_300": 0.2}  # all labelled clips, and fewer
        probes = {f"{metric}_linear{suffix}": r.value + worse * loss for suffix, loss in clips.items()}
        results.append(replace(r, others=r.others | probes) if metric and r.protocol == "frozen" else r)
    run = replace(run, results=tuple(results))
    svg = figures.label_efficiency(run)
    places = [svg.index(f">{words}</text>") for words in ("300", "1,000", "all")]
    assert places == sorted(places)
    for words in (*run.ladder, "mae_st_tiny", "untrained mini", "raw pixels", "actions", "depth"):
        assert f">{words}</text>" in svg
    assert "pose" not in svg and svg == figures.label_efficiency(run)


def test_a_student_is_no_part_of_the_ladder_and_stands_beside_the_point_of_its_size(pocket: dict) -> None:
    run = read_run_results(pocket)
    assert run.methods[0] == "SimpleMAE" and run.methods[-1] == "Distilled"
    assert run.of_method("Distilled") == ["nano_distilled"]
    assert "nano_distilled" in tables.table_text(run)
    small = replace(run, points=("mae_st_tiny", "nano"))
    assert small.methods == ["MAEST", "SimpleMAE", "Distilled"]  # each with one point


def test_a_missing_readout_of_the_profile_is_a_dash_and_not_an_error(new_run: Callable[..., dict]) -> None:
    settings = new_run(points={"nano": 180_000, "mini": 8_000_000}, frozen=["mini"], finetune=[])
    text = tables.table_text(read_run_results(settings)).splitlines()
    assert next(line for line in text if "nano" in line).split()[-5:] == ["-"] * 5
    assert "-" not in next(line for line in text if "mini" in line).split()


def test_a_published_encoder_stands_beside_ours(new_run: Callable[..., dict]) -> None:
    points, published = {"nano": 180_000, "mini": 8_000_000}, {"dinov2_l": 304_000_000}
    run = read_run_results(new_run(points=points, frozen=[*points, *published], finetune=[], published=published))
    rows = [row for row in csv.DictReader(tables.results_csv(run).splitlines()) if row["encoder"] == "dinov2_l"]
    assert {row["task"] for row in rows} == {*TASKS} and {row["parameters"] for row in rows} == {"304000000"}
    assert "dinov2_l, frozen" in figures.headline(run)
    assert "pretrain/dinov2_l" in run.provenances


def test_own_videos_without_benchmarks_are_reported(new_run: Callable[..., dict]) -> None:
    stage.build(new_run(points={"nano": 180_000}, frozen=[], finetune=[]))
    assert (BUILT / "results.csv").read_text().count("\n") == 1
    page = (BUILT / "report.html").read_text()
    assert "no benchmark" in page and "draws no predictions" in page
    strips = {f"pictures/clip_{clip}_{row}.png" for clip in (0, 1) for row in ("input", "masked", "nano")}
    assert set(outs()) == OUTS | strips | {f"pictures/clip_{clip}.webm" for clip in (0, 1)}


@pytest.mark.parametrize(("gone", "command"), [
    ("clips/datasheet.json", "clips"),
    ("pretrain/tiny/summary.json", "pretrain tiny"),
    ("pretrain/untrained_nano/provenance.json", "baseline untrained_nano"),
    ("readout/mini/depth/finetune/result.json", "readout mini depth finetune"),
    ("reconstruct/nano/filled.png", "reconstruct nano"),
    ("show/depth/sheet.png", "show RESULT... --out artifacts/test/show/depth"),
])  # fmt: skip
def test_a_missing_file_names_the_stage_to_run(pocket: dict, gone: str, command: str) -> None:
    path = Path("artifacts/test") / gone
    path.unlink()
    expected = f"the report needs {path}, which is missing: run `dvc repro`, or `scaling4d {command}` alone"
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        stage.build(pocket)
    assert not BUILT.exists()


def test_a_damaged_result_and_one_of_another_version_are_named(pocket: dict) -> None:
    path = Path("artifacts/test/readout/mini/depth/frozen/result.json")
    content = path.read_text()
    for damaged in (content[:40], content.replace('"metric"', '"measure"')):
        path.write_text(damaged)
        with pytest.raises(UserError, match=f"{path} is damaged .*run `scaling4d readout mini depth frozen`"):
            read_run_results(pocket)
    path.write_text(content)
    path = Path("artifacts/test/pretrain/mini/summary.json")
    path.write_text(path.read_text().replace('"flops"', '"operations"'))
    with pytest.raises(UserError, match=f"^{path} lacks flops: it was made by another version; run its stage again$"):
        read_run_results(pocket)


def test_a_notebook_has_no_temporary_file_outside_its_own_folder() -> None:
    with notebook._private_jupyter():
        folder = Path(tempfile.gettempdir())
        assert folder.parent.name.startswith("scaling4d-jupyter.partial-") and os.environ["TMPDIR"] == str(folder)
    assert not folder.parent.exists() and Path(tempfile.gettempdir()) != folder


def test_the_kernel_imports_this_package_and_what_its_parent_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"libraries{os.pathsep}{tmp_path}/more")
    with notebook._private_jupyter():
        folders = os.environ["PYTHONPATH"].split(os.pathsep)
    assert folders == [str(ROOT / "src"), str(tmp_path / "libraries"), str(tmp_path / "more")]


def test_a_failing_notebook_is_refused_with_its_cell(pocket: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "draw_figures", lambda run: {})
    source = notebook.NOTEBOOK.read_text()
    notebook.NOTEBOOK.write_text(source.replace('show_table(\\"pretrain.csv\\")', "1 / 0", 1))
    with pytest.raises(UserError, match="fails in cell .*ZeroDivisionError"):
        stage.build(pocket)
    assert not BUILT.exists()


def test_the_notebook_is_short_and_only_calls_the_report() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert len(cells) <= 10
    assert not [cell for cell in cells if cell.get("outputs")]
    assert not re.search(r"\b(for|if|def|lambda)\b", code)


def test_the_main_table_has_losses_of_one_method_and_the_table_of_points_has_all(page: Page, pocket: dict) -> None:
    rows = {row[0]: row for row in rows_of(page.sections["results"])[1:] if row[2] == "frozen"}
    assert "<th>validation loss of pretraining ↓<br>SimpleMAE</th>" in page.sections["results"]
    assert rows["mae_st_tiny"][3] == rows["nano_distilled"][3] == "-" and float(rows["mini"][3]) > 0
    text = tables.table_text(read_run_results(pocket))
    assert next(line for line in text.splitlines() if "mae_st_tiny" in line).split()[4] == "-"
    points = {row[0]: row for row in rows_of(page.sections["points"])[1:]}
    assert float(points["mae_st_tiny"][7]) > 0 and "do not compare" in page.sections["points"]


def test_measures_of_validations_are_drawn_below_the_losses_and_stand_in_the_table_of_points(new_run: Callable) -> None:
    settings = new_run(points={"nano": 180_000, "mini": 8_350_000}, frozen=[], finetune=[])
    without = read_run_results(settings)
    figure, page = figures.training_curves(without), build_page(without)
    validate_under_way("mini")
    run = read_run_results(settings)
    assert run.measures == ["val_loss", "rankme", "top1_linear", "abs_rel_linear"] and without.measures == []
    drawn, validated = figures.training_curves(run), build_page(run)
    for name in run.measures:
        assert measure(name) in drawn and measure(name) not in figure
    assert "Below: measures of validations" in validated.sections["training_curves"]
    assert "Below" not in page.sections["training_curves"]
    _, nano, mini = rows_of(validated.sections["points"])
    assert mini[9:13] == ["7.5000", "0.3100", "0.2200", "500"] and nano[9:13] == ["-"] * 4
    assert not {measure("rankme"), "step of the"} & set(re.findall(r"<th>(.*?)<", page.sections["points"]))


def test_a_trivial_answer_beyond_the_encoders_is_named_at_the_edge_and_does_not_stretch_the_axis(pocket: dict) -> None:
    axes = Figure().subplots()
    axes.plot([1, 2], [0.6, 0.7])
    low, high = axes.get_ylim()
    figures._draw_trivial(axes, 0.65)
    assert axes.get_ylim() == (low, high) and not axes.texts
    figures._draw_trivial(axes, 0.1)
    assert axes.get_ylim()[1] == high and low - 0.2 * (high - low) < axes.get_ylim()[0] < low
    assert [text.get_text() for text in axes.texts] == ["↓ off axis: trivial 0.1"]
    assert ">↑ off axis: trivial 0.3</text>" in figures.headline(read_run_results(pocket))  # an error of depth


def test_points_with_another_masking_are_no_part_of_the_ladder(new_run: Callable[..., dict]) -> None:
    sizes = {"nano": 180_000, "tiny": 1_060_000, "tiny_tube": 1_060_000, "mini": 8_350_000}
    run = read_run_results(new_run(points=sizes, frozen=list(sizes), finetune=[]))
    assert run.ladder == ["nano", "tiny", "mini"]
    assert run.masking("tiny_tube") == "tube 95%"
    losses = {row[0]: row[3] for row in tables.overview(run, intervals=False) if row[2] == "frozen"}
    assert losses["tiny_tube"] == tables.NOTHING and tables.NOTHING not in (losses["tiny"], losses["mini"])
    assert run.ladder_of("MAEST") == []
    assert rows_of(sections.points(run, Page(BUILT)))[3][-1].split() == ["tube", "95%"]
    assert "tube 95%" in figures.methods(run)


def test_trends_fit_ours_and_the_published_curves_by_the_same_code(page: Page) -> None:
    rows = {row[0]: row for row in rows_of(page.sections["trends"])[1:]}
    assert len([name for name in rows if name.startswith("4DS: ")]) == 10
    loss = rows["ours: validation loss, parameters"]
    assert loss[1] == "5" and loss[2].split()[0] == "0.0139" and loss[3].split()[0] == "0.4000" and loss[-1] == "yes"
    depth = rows["4DS: depth AbsRel, frozen"]
    assert depth[6] == "0.0840" and depth[-1] == "yes"


def test_stages_name_their_inputs_and_the_stages_that_made_them(pocket: dict) -> None:
    stages = tables.stages(read_run_results(pocket))["stages"]
    readout = stages["readout/mini/depth/finetune"]
    assert readout["from"] == {"checkpoint": "pretrain/mini"}
    assert readout["operative"] == {"Kind.of": "readout", "Kind.steps": 3}
    assert stages["reconstruct/nano"]["from"] == {"checkpoint": "pretrain/nano", "clips": "clips"}
    provenance = json.loads(Path("artifacts/test/readout/mini/depth/finetune/provenance.json").read_text())
    assert readout["code"] | {"modules": {}} == provenance["code"]


def test_the_published_curves_are_complete_and_stand_in_the_columns_of_our_table(page: Page) -> None:
    paper = tables.published()["4DS"]
    for task, curve in paper["tasks"].items():
        for protocol in ("frozen", "finetune"):
            values = list(curve[protocol].values())
            assert list(curve[protocol]) == list(paper["sizes"]), task
            assert (values[-1] > values[0]) == curve["higher_is_better"], task
    rows = rows_of(page.sections["paper"])[1:]
    base = next(row for row in rows if row[:3] == ["4DS-B", "100 M", "frozen"])
    curves = [paper["tasks"][task]["frozen"]["B"] for task in TASKS]
    assert base[3:] == [f"~ {curves[0]}", *(f"{value:.3f}" for value in curves[1:])]
    quoted = [tables.published()[name] for name in sections.QUOTING]
    assert len(rows) == 7 * 2 + sum(1 + len(paper["accuracies"]) for paper in quoted)
    assert ["V-JEPA-H", "635 M", "0.722", "Gen4U", "-"] in rows and ["V-JEPA2-L", "-", "0.689", "InternVideo-Next", "-"] in rows
    assert "AbsRel ↓, ScanNet" in page.sections["paper"] and all(paper["source"] in page.sections["paper"] for paper in quoted)


def test_mae_sts_numbers_have_sources_and_stand_beside_the_classifiers_of_the_run(page: Page, pocket: dict) -> None:
    known = tables.published()["MAE-ST"]
    rows = rows_of(page.sections["mae_st"])
    assert ["ViT-B", "87 M", "0.813", "models", "-"] in rows
    assert ["ViT-L, from scratch", "-", "0.714", "text", "-"] in rows
    assert ["Kinetics-700, masked autoencoding", "-", "0.331", "0.736"] in rows
    assert len(rows) == 3 + sum(map(len, (known["accuracies"], known["speedups"], known["transfer"]["rows"])))
    sources = {row["source"] for row in known["accuracies"]}
    assert all(source in known["source"] for source in sources) and "arXiv:2205.09113" in page.sections["mae_st"]
    run = read_run_results(pocket)
    frozen = next(r for r in run.results if r.task == "actions")
    ours = replace(frozen, encoder="mae_st_L_tube", protocol="classifier", value=0.5, low=0.25, high=0.75)
    section = sections.mae_st(replace(run, results=(*run.results, ours)), Page(BUILT))
    (tube,) = (row for row in rows_of(section) if row[:1] == ["ViT-L, tube masking"])
    assert [float(number) for number in re.findall(r"[\d.]+", tube[-1])] == [0.5, 0.25, 0.75]


def test_the_points_of_profile_mae_st_are_those_that_the_published_numbers_name() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        encoders = config.compose(["profile=mae_st"])["encoders"]["classifier"]
    assert {row["encoder"] for row in tables.published()["MAE-ST"]["accuracies"] if "encoder" in row} == {*encoders}


def test_our_own_choices_are_listed_with_their_values_in_this_run(pocket: dict) -> None:
    for task, steps in (("depth", 120), ("boxes", 300), ("pose", 300)):
        path = Path(f"artifacts/test/readout/mini/{task}/frozen/provenance.json")
        content = json.loads(path.read_text()) | {"settings": {f"readout.frozen.{task}": {"Frozen": {"steps": steps}}}}
        write_json(path, content)
    section = sections.unstated(read_run_results(pocket), Page(BUILT))
    cells = [cell for row in rows_of(section) for cell in row]
    assert any(cell.startswith("readout.frozen.*.Frozen.steps: 300 (boxes, pose); 120 (depth)") for cell in cells)
    assert "absolute relative error" in section and "position_std" not in section  # no stage of this run was given it
    assert "Depth is trained on its metric." in section and "patches of one frame" not in section


def test_the_lists_of_the_protocol_name_source_and_reason_and_the_shape_of_j_is_called_inferred(page: Page) -> None:
    topics = {
        name: {row[0]: row for row in rows_of(page.sections[name])[1:]} for name in ("deviations", "unstated", "agreements")
    }
    assert [len({*rows} & {*others}) for rows, others in combinations(topics.values(), 2)] == [0, 0, 0]
    patch = topics["deviations"]["patches of SimpleMAE"]
    assert patch[1].endswith("(4DS, method figure, as reported)") and "no learning" in patch[2]
    assert "masking of MAE-ST" not in topics["deviations"] and "loss of SimpleMAE" in topics["agreements"]
    assert "MAE-ST&#x27;s alone" in page.sections["unstated"] and "profile pocket" in page.sections["deviations"]
    assert "shape of the encoder of 4DS-j: not stated" in page.sections["paper"] and "inferred" in page.sections["paper"]


def test_costs_have_a_column_for_each_axis_of_growth() -> None:
    path = ROOT / "reports/bench/costs.json"
    axes, svg = json.loads(path.read_text())["results"], figures.costs(path)
    assert len(re.findall(r'<g id="axes_\d+">', svg)) == 2 * len(axes)
    for name, axis in axes.items():
        grown = axis["exponents"]
        assert f">{name}</text>" in svg
        assert f">exponent {grown['seconds']:.2f} (dashed {grown['flops']:.2f})</text>" in svg
        assert f">exponent {grown['bytes']:.2f} (dashed {grown['bytes_by_formula']:.2f})</text>" in svg
    assert svg == figures.costs(path)
