import json
import subprocess
import threading
import urllib.request
from pathlib import Path

import chromium
import pytest
from chromium import Browser

from scaling4d import report
from scaling4d.records import UserError, write_json
from scaling4d.report import built, site, tables

BUILT = Path("reports/built")
needs_chromium = pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium on this machine (Debian: apt install chromium)")


def lay(settings: dict) -> None:
    """What the page is made of, without the notebook and its figures."""
    story = report.read(settings)
    (BUILT / "site").mkdir(parents=True, exist_ok=True)
    (BUILT / "results.csv").write_text(tables.results_csv(story))
    (BUILT / "pretrain.csv").write_text(tables.pretrain_csv(story))
    write_json(BUILT / "stages.json", tables.stages(story))
    (BUILT / "site/report.html").write_text("<!doctype html><title>report</title><h1>the report</h1>")
    (BUILT / "site/index.html").write_text(site.page(built.read()))


def git(*command: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *command], check=True, capture_output=True)


@needs_chromium
def test_the_page_sorts_filters_and_walks_back_from_its_file(pocket: dict, tmp_path: Path) -> None:
    lay(pocket)
    with chromium.browser(tmp_path / "browser") as page:
        page.open((tmp_path / BUILT / "site/index.html").as_uri())
        assert page.texts("section.here h1") == [] and page.value("document.querySelector('section.here').id") == "report"
        page.click("nav a[href='#table']")
        page.wait("document.querySelector('section.here').id === 'table'")
        assert len(page.texts("#rows tbody tr")) == 10 + 2 + 2  # frozen, fine-tuned, classifiers
        _sorting(page)
        _filtering(page)
        page.click("#rows tbody tr td a[href$='/readout/mini/pose/finetune']")
        page.wait("document.querySelector('section.here').id === 'lineage'")
        assert page.value("location.hash") == "#lineage/0/readout/mini/pose/finetune"
        shown = page.texts("g.node > title")
        assert {"readout/mini/pose/finetune", "pretrain/mini", "clips", "code: readout", "code: pretrain"} <= set(shown)
        page.click("g.node[data-id='pretrain/mini']")
        assert "scaling4d pretrain mini" in page.texts("#detail code")
        assert "Kind.steps" in page.texts("#detail td")
        assert page.asked and all(url.startswith("file://") for url in page.asked)


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


@needs_chromium
def test_every_number_of_the_page_leads_back_to_data_and_code(pocket: dict, tmp_path: Path) -> None:
    lay(pocket)
    with chromium.browser(tmp_path / "browser") as page:
        page.open((tmp_path / BUILT / "site/index.html").as_uri() + "#table")
        page.wait("document.querySelectorAll('#rows tbody tr').length > 0")
        links = page.value("[...document.querySelectorAll('#rows tbody a')].map(e => e.hash)")
        assert len(set(links)) == 10 * 5 + 2 * 5 + 2 + 7  # results, and a validation loss a point
        ends = page.value(
            "(links => links.map(link => { const [at, ...rest] = link.split('/').slice(1); const run = runs[at];"
            " const stage = rest.join('/'); const [nodes] = walk(run, stage, numberOf(run, stage));"
            " return Object.values(nodes).map(n => n.kind).sort().join(' '); }))(" + json.dumps(links) + ")"
        )
        assert all("code" in kinds and "number" in kinds and "stage" in kinds for kinds in ends)


@needs_chromium
def test_experiments_stand_beside_this_report_and_their_names_are_text(pocket: dict, tmp_path: Path) -> None:
    lay(pocket)
    git("init", "-q")
    git("add", "reports", "params.yaml")
    git("commit", "-qm", "one")
    results = BUILT / "results.csv"
    results.write_text(results.read_text().replace(",share,", ",share<img src=x onerror=alert(1)>,"))
    git("commit", "-qam", "two")
    git("update-ref", "refs/exps/ab/cdef/longer<b>", "HEAD~1")
    lay(pocket)
    assert site.gather(BUILT)[0] == "longer<b>"
    with chromium.browser(tmp_path / "browser") as page:
        page.open((tmp_path / BUILT / "site/index.html").as_uri() + "#table")
        page.wait("document.querySelectorAll('#rows tbody tr').length > 0")
        assert page.texts("#shown") == ["42 of 42 rows"]  # this report, the experiment, and the commit that says something else
        assert page.texts("#rows tbody td:nth-child(1)").count("longer<b>") == 14
        assert page.value("document.querySelectorAll('img').length") == 0


def test_the_page_of_equal_results_is_equal_bytes_and_asks_nobody(pocket: dict) -> None:
    lay(pocket)
    first = (BUILT / "site/index.html").read_text()
    lay(pocket)
    assert (BUILT / "site/index.html").read_text() == first
    assert first.count("</script>") == 3  # nothing of a result ends the element that it stands in
    assert "http://" not in first.replace("http://www.w3.org/2000/svg", "") and "https://" not in first


def test_it_is_served_to_this_machine_alone(pocket: dict) -> None:
    lay(pocket)
    with site.serve(BUILT, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert server.server_address[0] == "127.0.0.1"
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/") as answer:
                assert answer.read() == (BUILT / "site/index.html").read_bytes()
            with pytest.raises(UserError, match=f"port {server.server_port} cannot be used.*--port"):
                site.serve(BUILT, server.server_port)
        finally:
            server.shutdown()
            thread.join()


def test_a_report_that_was_never_built_names_the_command(pocket: dict) -> None:
    with pytest.raises(UserError, match="no reports/built/site/index.html: build the report with `dvc repro`"):
        site.gather(BUILT)
