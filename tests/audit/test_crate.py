import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from scaling4d import artifacts, audit
from scaling4d.audit import crate
from scaling4d.records import UserError

pytestmark = pytest.mark.integration

TERMS = Path(__file__).parents[1] / "fixtures/ro_crate_1_1_terms.json"
ANSWER = """
import io, sys
import requests, urllib3
from requests_cache import CachedSession

class Told(requests.adapters.HTTPAdapter):
    def send(self, request, **_):
        body = urllib3.HTTPResponse(io.BytesIO(open(sys.argv[1], "rb").read()), {"Content-Type": "application/ld+json"},
                                    status=200, preload_content=False)
        return self.build_response(request, body)

with CachedSession(cache_name=sys.argv[2], backend="sqlite", expire_after=-1) as session:
    session.mount("https://", Told())
    session.get("https://w3id.org/ro/crate/1.1/context")
"""


def graph(folder: Path) -> dict[str, dict]:
    return {entity["@id"]: entity for entity in json.loads((folder / "ro-crate-metadata.json").read_text())["@graph"]}


def test_a_crate_states_who_when_what_and_how_and_is_the_same_bytes_twice(project: Path) -> None:
    assert audit.export(Path("one")) == audit.export(Path("two")) == 0
    assert artifacts.sha256(Path("one")) == artifacts.sha256(Path("two"))
    entities = graph(Path("one"))
    root = entities["./"]
    assert entities[root["author"][0]["@id"]] == {"@id": "#author/1", "@type": "Person", "name": "Ada Test"}
    assert root["license"] == {"@id": "https://spdx.org/licenses/Apache-2.0"}
    assert root["datePublished"] == "2026-11-21T19:15:45+00:00"  # of the last stage's end
    run = entities["#run/pretrain@nano"]
    assert (run["description"], run["startTime"]) == ("ran `true pretrain nano` on x86_64", "2026-11-21T19:15:44+00:00")
    setting = "#setting/points.nano.SimpleMAE"
    assert {"@id": setting} in run["object"] and {"@id": "artifacts/test/clips/"} in run["object"]
    assert json.loads(entities[setting]["value"]) == {"clip": [4, 8, 8], "rate": 3e-06, "width": 32}
    assert run["result"] == [{"@id": "artifacts/test/pretrain/nano/"}]
    software = [entities[need["@id"]] for need in entities[run["instrument"]["@id"]]["softwareRequirements"]]
    versions = {need["name"]: need["softwareVersion"] for need in software}
    assert versions == {"dvc": "3.67.1", "python": "3.11.7", "torch": "2.13.0"}
    usage = [entities[use["@id"]] for use in run["resourceUsage"]]
    assert {(use["name"], use["value"], use["unitCode"]) for use in usage} == {("cpus", "4", "C62"), ("seconds", "1.5", "SEC")}


def test_a_crate_holds_small_files_and_names_all_others_by_hash(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crate, "LARGEST_BYTES", 15)
    weights = Path("artifacts/test/pretrain/nano/model.safetensors")
    audit.export(Path("out"))
    entities = graph(Path("out"))
    held = {path.relative_to("out").as_posix() for path in Path("out").rglob("*") if path.is_file()}
    assert held - {"ro-crate-metadata.json"} <= entities.keys()
    for path in ("dvc.lock", "params.yaml", "pyproject.toml", "dvc.yaml"):
        assert (Path("out") / path).read_bytes() == Path(path).read_bytes()
    assert weights.stat().st_size == 15 and entities[weights.as_posix()]["sha256"] == artifacts.sha256(weights)
    summary = weights.parent / "summary.json"
    assert summary.as_posix() not in held
    for path in (summary, Path("data/videos")):
        assert entities[f"hash://sha256/{artifacts.sha256(path)}"]["name"] == path.as_posix()


def test_a_run_that_does_not_verify_is_not_exported(project: Path, flip: Callable[[str, str, str], None]) -> None:
    flip("artifacts/test/pretrain/nano/model.safetensors", "weights", "weighTs")
    with pytest.raises(UserError, match="wrong, so no crate was written; the first: artifacts/test/pretrain/nano: "):
        audit.export(Path("out"))
    assert not Path("out").exists()


def test_an_export_that_fails_leaves_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, before = crate.ROCrate.write, sorted(Path().iterdir())

    def write_and_fail(self: crate.ROCrate, folder: Path) -> None:
        write(self, folder)
        raise UserError("the disk is full")

    monkeypatch.setattr(crate.ROCrate, "write", write_and_fail)
    with pytest.raises(UserError, match="^the disk is full$"):
        audit.export(Path("out"))
    assert sorted(Path().iterdir()) == before


def test_an_absent_run_and_an_existing_folder_are_refused(clone: Path) -> None:
    absent = "^artifacts/code/benchmarks.json is not here, and a crate names every file: run `dvc repro` first$"
    with pytest.raises(UserError, match=absent):
        audit.export(Path("out"))
    with pytest.raises(UserError, match="^reports exists; choose another name or remove it$"):
        audit.export(Path("reports"))


@pytest.mark.parametrize("profile", ["process-run-crate-0.5", "workflow-run-crate-0.5", "provenance-run-crate-0.5"])
def test_a_crate_passes_the_required_checks_of_the_public_validator(project: Path, profile: str) -> None:
    """Offline: the terms that our crates use stand for the one document that the validator would fetch."""
    validator = shutil.which("rocrate-validator")
    if validator is None:
        pytest.skip("no rocrate-validator on the PATH: pip install roc-validator, in an environment of its own")
    audit.export(Path("out"))
    python = Path(validator).resolve().parent / "python"
    subprocess.run([python, "-c", ANSWER, TERMS, "cache"], check=True)
    options = f"--offline --cache-path cache -p {profile} -l required --no-paging -v -f json -o validated".split()
    done = subprocess.run([validator, "-y", "validate", *options, "out"], capture_output=True, text=True, check=False)
    validated = json.loads(Path("validated").read_text())
    assert validated["issues"] == [] and validated["passed"] and done.returncode == 0
    assert validated["statistics"]["total_passed_checks"] >= 40 and not validated["skipped_checks"]
