"""Code hashes follow meaning."""

import json
import re
from pathlib import Path

import pytest
import yaml

from scaling4d.pipeline.code_hashes import hashes, running, write_hashes

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/scaling4d"
FILES = {
    "records.py": '"""Doc."""\nX = 1\n',
    "clips/__init__.py": "",
    "clips/loader.py": "from scaling4d.records import X\n\n\ndef load():\n    return X\n",
    "clips/curate.py": "def cut():\n    return 1\n",
    "clips/stage.py": "from scaling4d.clips import curate\n\n\ndef clips():\n    return curate.cut()\n",
    "clips/spare.py": "Z = 1\n",
    "pretrain/__init__.py": "",
    "pretrain/stage.py": "from scaling4d.pretrain import probes\n\n\ndef train():\n    from scaling4d.clips import loader as x\n",
    "pretrain/probes.py": "from scaling4d.readout import heads\n",
    "readout/heads.py": "W = 1\n",
    "report/stage.py": "Y = 1\n",
}


def changed_packages(tmp_path: Path, **files: str) -> set[str]:
    """Packages whose hash another text of some files changes."""
    written = []
    for texts in (FILES, FILES | {name.replace("__", "/") + ".py": text for name, text in files.items()}):
        for name, text in texts.items():
            (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "src" / name).write_text(text)
        write_hashes(tmp_path / "src", tmp_path / "out")
        written.append({path.stem: json.loads(path.read_text())["sha256"] for path in (tmp_path / "out").glob("*.json")})
    assert written[0].keys() == written[1].keys() == {"clips", "pretrain", "report", "probes"}
    return {package for package in written[0] if written[0][package] != written[1][package]}


def test_comments_docstrings_and_layout_change_nothing(tmp_path: Path) -> None:
    assert changed_packages(tmp_path, records='"""Other words."""\n\n# a comment\nX   =   1\n') == set()


def test_logic_changes_the_packages_whose_stage_imports_it_also_lazily_and_no_other(tmp_path: Path) -> None:
    assert changed_packages(tmp_path, records="X = 2\n") == {"pretrain"}
    assert changed_packages(tmp_path, clips__curate="def cut():\n    return 2\n") == {"clips"}


def test_a_module_that_no_stage_imports_changes_nothing(tmp_path: Path) -> None:
    assert changed_packages(tmp_path, clips__spare="Z = 2\n") == set()


def test_a_readout_changes_the_hash_of_probes_and_not_that_of_pretraining(tmp_path: Path) -> None:
    assert changed_packages(tmp_path, readout__heads="W = 2\n") == {"probes"}
    assert changed_packages(tmp_path, pretrain__probes="from scaling4d.readout import heads as h\n") == {"probes"}
    modules = hashes(SOURCE, ["pretrain"])["pretrain"]["modules"]
    assert not [name for name in modules if name.startswith(("scaling4d.readout", "scaling4d.benchmarks"))]


@pytest.mark.integration
def test_every_stage_of_dvc_yaml_depends_on_a_hash_that_stage_code_writes() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    outs = {Path(path).stem for path in stages["code"]["outs"]}
    deps = {dep for stage in stages.values() for dep in stage.get("do", stage).get("deps", ())}
    assert outs == {Path(dep).stem for dep in deps if dep.startswith("artifacts/code/")} <= hashes(SOURCE).keys()


def test_the_report_is_hashed_with_every_module_that_its_notebook_calls() -> None:
    cells = json.loads((ROOT / "reports/scaling.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert re.findall(r"^(?:from|import) (.*)$", code, re.MULTILINE) == ["scaling4d.report import show_table"]
    assert "scaling4d.report.notebook" in hashes(SOURCE, ["report"])["report"]["modules"]  # where show_table is defined


@pytest.mark.integration
def test_a_process_names_the_code_that_it_runs(tmp_path: Path) -> None:
    write_hashes(SOURCE, tmp_path)
    assert running("pretrain") == json.loads((tmp_path / "pretrain.json").read_text())
