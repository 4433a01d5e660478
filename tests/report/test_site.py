import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import HTTPServer, ThreadingHTTPServer
from pathlib import Path

import chromium
import pytest
from chromium import Browser
from commands import commit_here, git
from damage import ACCEPTED, SIZES, SKIPPED
from synthetic_run import BUILT, write_tables

from scaling4d.records import UserError
from scaling4d.report import site
from scaling4d.report.built import read_built_report


def write_site(settings: dict) -> None:
    """The page and the files that it needs, without the notebook and its figures."""
    write_tables(settings)
    (BUILT / "site").mkdir(exist_ok=True)
    (BUILT / "report.html").write_text("<!doctype html><title>report</title><h1>the report</h1>")
    (BUILT / "site/index.html").write_text(site.site_page(read_built_report()))


@chromium.needed
def test_the_page_sorts_filters_and_shows_lineage_from_its_file(pocket: dict, tmp_path: Path) -> None:
    write_site(pocket)
    with chromium.browser(tmp_path / "browser") as page:
        page.open((tmp_path / BUILT / "site/index.html").as_uri())
        assert page.value("document.querySelector('section.here').id") == "report"
        assert page.value("document.querySelector('iframe').src").endswith("reports/built/report.html")
        page.click("nav a[href='#table']")
        page.wait("document.querySelector('section.here').id === 'table'")
        assert len(page.texts("#rows tbody tr")) == 10 + 2 + 2  # frozen, fine-tuned, classifiers
        _sorting(page)
        _filtering(page)
        page.click("#rows tbody tr td a[href$='/readout/mini/pose/finetune']")
        page.wait("document.querySelector('section.here').id === 'lineage'")
        assert page.value("location.hash") == "#lineage/0/readout/mini/pose/finetune"
        boxes = page.texts("g.node > title")
        assert {"readout/mini/pose/finetune", "pretrain/mini", "clips", "code: readout", "code: pretrain"} <= set(boxes)
        page.click("g.node[data-id='pretrain/mini']")
        assert "scaling4d pretrain mini" in page.texts("#detail code")
        assert "Kind.steps" in page.texts("#detail td")
        assert page.requested and all(url.startswith("file://") for url in page.requested)


def _sorting(page: Browser) -> None:
    page.click("th[data-key='pose epe↓']")
    rising = [float(text) for text in page.texts("#rows tbody td:nth-child(10)") if text]
    page.click("th[data-key='pose epe↓']")
    falling = [float(text) for text in page.texts("#rows tbody td:nth-child(10)") if text]
    assert rising == sorted(rising) and falling == rising[::-1] and len(set(rising)) > 5


def _filtering(page: Browser) -> None:
    page.type("input[data-key='protocol']", "=finetune")
    assert page.texts("#rows tbody td:nth-child(4)") == ["finetune"] * 2
    page.type("input[data-key='parameters']", ">1e6")
    assert page.texts("#rows tbody td:nth-child(2)") == ["mini"]
    assert page.texts("#shown") == ["1 of 14 rows"]


@chromium.needed
def test_the_page_names_metrics_in_words_fits_a_telephone_and_leads_numbers_back(pocket: dict, tmp_path: Path) -> None:
    write_site(pocket)
    with chromium.browser(tmp_path / "browser") as page:
        page.open((tmp_path / BUILT / "site/index.html").as_uri() + "#table")
        page.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
        page.wait("document.querySelectorAll('#rows tbody tr').length > 0")
        heads = page.texts("#rows thead tr:first-child th")
        assert not [head for head in heads if "_" in head]
        assert {
            "validation loss of pretraining ↓",
            "depthrelative error of depth, AbsRel ↓",
            "actionstop-1 accuracy of actions ↑",
        } <= {*heads}
        assert page.value("document.documentElement.scrollWidth") == page.value("innerWidth") == 390
        links = page.value("[...document.querySelectorAll('#rows tbody a')].map(e => e.hash)")
        assert len(set(links)) == 10 * 5 + 2 * 5 + 2 + 7  # results, and a validation loss for each point
        ends = page.value(
            "(links => links.map(link => { const [at, ...rest] = link.split('/').slice(1); const run = runs[at];"
            " const stage = rest.join('/'); const [nodes, edges] = walk(run, stage, numberOf(run, stage));"
            " if (!edges.every(edge => edge.every(id => nodes[id]))) return 'an edge without a box';"
            " return Object.values(nodes).map(n => n.kind).sort().join(' '); }))(" + json.dumps(links) + ")"
        )
        assert all("code" in kinds and "number" in kinds and "stage" in kinds for kinds in ends)


@chromium.needed
def test_experiments_stand_beside_this_report_and_their_names_are_text(pocket: dict, tmp_path: Path) -> None:
    write_site(pocket)
    commit_here("one", "reports", "params.yaml")
    results = BUILT / "results.csv"
    results.write_text(results.read_text().replace(",share,", ",share<img src=x onerror=alert(1)>,"))
    git("commit", "-qam", "two")
    git("update-ref", "refs/exps/ab/cdef/longer<b>", "HEAD")
    write_site(pocket)
    assert site.write_experiments(BUILT) == ["longer<b>"]
    with chromium.browser(tmp_path / "browser") as page:
        page.open((tmp_path / BUILT / "site/index.html").as_uri() + "#table")
        page.wait("document.querySelectorAll('#rows tbody tr').length > 0")
        assert page.texts("#shown") == ["28 of 28 rows"]  # this report and the experiment
        assert page.texts("#rows tbody td:nth-child(1)").count("longer<b>") == 14
        assert page.value("document.querySelectorAll('img').length") == 0


def test_equal_results_give_equal_bytes_without_a_link_to_the_network(pocket: dict) -> None:
    write_site(pocket)
    first = (BUILT / "site/index.html").read_text()
    write_site(pocket)
    assert (BUILT / "site/index.html").read_text() == first
    assert first.count("</script>") == 3  # no text of a result ends its script element
    assert "http://" not in first.replace("http://www.w3.org/2000/svg", "") and "https://" not in first


def test_a_damaged_experiment_is_listed_and_the_others_are_shown(pocket: dict) -> None:
    write_site(pocket)
    commit_here("whole", "reports", "params.yaml")
    git("update-ref", "refs/exps/ab/cdef/whole", "HEAD")
    for name, file, content in (
        ("numbers", "results.csv", "encoder,low,value\nnano,0.1,many\n"),
        ("stages", "stages.json", "[]"),
        ("columns", "pretrain.csv", "no,such\n1,2\n"),
        ("half", "params.yaml", Path("params.yaml").read_text() + '\nmore: "\\ud800"\n'),
        ("nested", "stages.json", "[" * 100_000),
        ("round", "params.yaml", Path("params.yaml").read_text() + "\nmore: &a {b: *a}\n"),
        ("row", "pretrain.csv", "no,such\n1,2,3\n"),
    ):
        path = Path(file) if file == "params.yaml" else BUILT / file
        before = path.read_text()
        path.write_text(content)
        git("commit", "-qam", name)
        git("update-ref", f"refs/exps/ab/cdef/{name}", "HEAD")
        path.write_text(before)
    assert site.write_experiments(BUILT) == ["columns", "half", "nested", "numbers", "round", "row", "stages", "whole"]
    listed = json.loads((BUILT / "site/experiments.js").read_text().removeprefix("window.EXPERIMENTS = ").rstrip(";\n"))
    assert [bool(report.get("damaged")) for report in listed] == [True] * 7 + [False]
    with pytest.raises(UserError, match="numbers: its report is damaged"):
        read_built_report("numbers")


@contextmanager
def answering(server: HTTPServer) -> Iterator[HTTPServer]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()


@pytest.fixture
def server(pocket: dict) -> Iterator[HTTPServer]:
    """A server of the built site."""
    write_site(pocket)
    (BUILT / "site/experiments.js").write_text("window.EXPERIMENTS = [1];\n")
    with site.serve(BUILT, 0) as serving, answering(serving):
        yield serving


@pytest.mark.integration
@pytest.mark.parametrize(("path", "headers", "status"), [
    ("report.html", {"Host": "example.org"}, 403),  # a name that was rebound to this machine
    ("site/experiments.js", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
    ("site/experiments.js", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}, 403),  # another port
    ("report%00.html", {}, 404),
    ("../params.yaml", {}, 404),
])  # fmt: skip
def test_requests_from_elsewhere_and_odd_paths_are_refused(server: HTTPServer, path: str, headers: dict, status: int) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}/{path}", headers=headers)
    with pytest.raises(urllib.error.HTTPError, match=f" {status}: "):
        urllib.request.urlopen(request)


@chromium.needed
@pytest.mark.integration
def test_a_page_of_another_origin_reads_nothing(server: HTTPServer, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    url = f"http://127.0.0.1:{server.server_port}/site/experiments.js"
    (folder / "index.html").write_text(f"""<script src="{url}"></script><script>
        fetch("{url}").then(() => {{ window.read = "all"; }}, () => {{ window.read = "nothing"; }});</script>""")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(site.LocalHandler, directory=str(folder))) as other, answering(other):
        with chromium.browser(tmp_path / "browser") as page:
            page.open(f"http://localhost:{other.server_port}/index.html")
            page.wait("window.read !== undefined")
            assert page.value("[window.read, String(window.EXPERIMENTS)]") == ["nothing", "undefined"]
            page.open(f"http://127.0.0.1:{server.server_port}/site/index.html")
            assert page.value("window.EXPERIMENTS.length") == 1


@pytest.mark.integration
def test_the_server_answers_this_machine_alone(server: HTTPServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    for path, file in (("site/", "site/index.html"), ("report.html", "report.html")):
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/{path}") as answer:
            assert answer.read() == (BUILT / file).read_bytes()
    with pytest.raises(UserError, match=f"port {server.server_port} cannot be used.*--port"):
        site.serve(BUILT, server.server_port)


def test_a_report_that_was_never_built_names_the_command(pocket: dict) -> None:
    with pytest.raises(UserError, match="no reports/built/site/index.html: build the report with `dvc repro`"):
        site.write_experiments(BUILT)


@SIZES
def test_a_damaged_report_of_an_experiment_is_named_beside_the_others(
    pocket: dict, endures: Callable, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_site(pocket)
    monkeypatch.setattr(site, "experiments", lambda: {"longer": ""})
    monkeypatch.setattr(site, "read_built_report", lambda _: read_built_report())

    def read(_: Path) -> str:
        assert site.write_experiments(BUILT) in (["longer"], [])
        return SKIPPED if '"damaged"' in (BUILT / "site" / site.EXPERIMENTS).read_text() else ACCEPTED

    paths = [Path("params.yaml"), *(BUILT / name for name in ("results.csv", "pretrain.csv", "curves.csv", "stages.json"))]
    counts = endures("reports of experiments", paths, read, copies)
    assert counts[SKIPPED] and counts[ACCEPTED]
