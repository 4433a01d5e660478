import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from scaling4d import artifacts, audit
from scaling4d.audit import crate
from scaling4d.records import UserError

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


def test_a_crate_names_who_when_what_and_how_and_is_the_same_bytes_twice(project: Path) -> None:
    assert audit.export(Path("one")) == audit.export(Path("two")) == 0
    assert artifacts.sha256(Path("one")) == artifacts.sha256(Path("two"))
    found = graph(Path("one"))
    root = found["./"]
    assert found[root["author"][0]["@id"]] == {"@id": "#author/1", "@type": "Person", "name": "Ada Test"}
    assert root["license"] == {"@id": "https://spdx.org/licenses/Apache-2.0"}
    assert root["datePublished"] == "2026-11-21T19:15:45+00:00"  # of the last stage's end
    run = found["#run/pretrain@nano"]
    assert (run["description"], run["startTime"]) == ("ran `true pretrain nano` on x86_64", "2026-11-21T19:15:44+00:00")
    assert {"@id": "#setting/points.nano"} in run["object"] and {"@id": "artifacts/test/clips/"} in run["object"]
    assert json.loads(found["#setting/points.nano"]["value"]) == {"SimpleMAE": {"clip": [4, 8, 8], "rate": 3e-06, "width": 32}}
    assert run["result"] == [{"@id": "artifacts/test/pretrain/nano/"}]
    tool = found[run["instrument"]["@id"]]
    needs = {found[need["@id"]]["name"]: found[need["@id"]]["softwareVersion"] for need in tool["softwareRequirements"]}
    assert needs == {"dvc": "3.67.1", "python": "3.11.7", "torch": "2.13.0"}
    usage = {
        found[use["@id"]]["name"]: (found[use["@id"]]["value"], found[use["@id"]]["unitCode"]) for use in run["resourceUsage"]
    }
    assert usage == {"cpus": ("4", "C62"), "seconds": ("1.5", "SEC")}


def test_a_crate_holds_every_small_file_with_its_hash_and_names_the_large_and_the_sources(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crate, "LARGEST_BYTES", 15)
    weights = Path("artifacts/test/pretrain/nano/model.safetensors")
    audit.export(Path("out"))
    found = graph(Path("out"))
    held = [path.relative_to("out").as_posix() for path in sorted(Path("out").rglob("*")) if path.is_file()]
    assert set(held) - {"ro-crate-metadata.json"} <= found.keys()
    for path in ("dvc.lock", "params.yaml", "pyproject.toml", "dvc.yaml"):
        assert (Path("out") / path).read_bytes() == Path(path).read_bytes()
    sha = artifacts.sha256(weights)
    assert weights.stat().st_size == 15 and found[weights.as_posix()]["sha256"] == sha
    summary = artifacts.sha256(weights.parent / "summary.json")
    assert f"{weights.parent}/summary.json" not in held
    assert found[f"hash://sha256/{summary}"]["name"] == f"{weights.parent}/summary.json"
    assert found[f"hash://sha256/{artifacts.sha256(Path('data/videos'))}"]["name"] == "data/videos"


def test_a_run_that_does_not_verify_is_not_exported(project: Path, flip: Callable[[str, str, str], None]) -> None:
    flip("artifacts/test/pretrain/nano/model.safetensors", "weights", "weighTs")
    with pytest.raises(UserError, match="wrong, so no crate was written; the first: artifacts/test/pretrain/nano: "):
        audit.export(Path("out"))
    assert not Path("out").exists()


def test_a_run_that_is_not_here_and_a_folder_that_is_are_refused(clone: Path) -> None:
    with pytest.raises(
        UserError, match="^artifacts/code/readout.json is not here, and a crate names every file: run `dvc repro` first$"
    ):
        audit.export(Path("out"))
    with pytest.raises(UserError, match="^reports is there already; needed the name of a new folder$"):
        audit.export(Path("reports"))


@pytest.mark.parametrize("profile", ["process-run-crate-0.5", "workflow-run-crate-0.5", "provenance-run-crate-0.5"])
def test_a_crate_passes_what_the_public_validator_requires(project: Path, profile: str) -> None:
    """Offline: the one document that it would fetch is answered by those of its terms that a crate of ours uses."""
    validator = shutil.which("rocrate-validator")
    if validator is None:
        pytest.skip("no rocrate-validator on the PATH: pip install roc-validator, in an environment of its own")
    audit.export(Path("out"))
    python = Path(validator).resolve().parent / "python"
    subprocess.run([python, "-c", ANSWER, TERMS, "cache"], check=True)
    options = [
        "--offline",
        "--cache-path",
        "cache",
        "-p",
        profile,
        "-l",
        "required",
        "--no-paging",
        "-v",
        "-f",
        "json",
        "-o",
        "said",
    ]
    done = subprocess.run([validator, "-y", "validate", *options, "out"], capture_output=True, text=True, check=False)
    said = json.loads(Path("said").read_text())
    assert said["issues"] == [] and said["passed"] and done.returncode == 0
    assert said["statistics"]["total_passed_checks"] >= 40 and not said["skipped_checks"]
