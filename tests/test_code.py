"""Code hashes follow meaning."""

import json
from pathlib import Path

from scaling4d.code import write_hashes

FILES = {
    "records.py": '"""Doc."""\nX = 1\n',
    "clips/__init__.py": "",
    "clips/loader.py": "from scaling4d.records import X\n\n\ndef load():\n    return X\n",
    "clips/curate.py": "def cut():\n    return 1\n",
    "pretrain/__init__.py": "",
    "pretrain/loop.py": "def train():\n    from scaling4d.clips import loader\n\n    return loader\n",
    "report/__init__.py": "Y = 1\n",
}


def hashes(tmp_path: Path, **changed: str) -> dict[str, str]:
    for name, text in (FILES | {key.replace("__", "/") + ".py": value for key, value in changed.items()}).items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text(text)
    write_hashes(tmp_path / "src", tmp_path / "out")
    return {path.stem: json.loads(path.read_text())["sha256"] for path in (tmp_path / "out").glob("*.json")}


def test_comments_docstrings_and_layout_change_nothing(tmp_path: Path) -> None:
    before = hashes(tmp_path)
    after = hashes(tmp_path, records='"""Other words."""\n\n# a comment\nX   =   1\n')
    assert before == after


def test_logic_changes_the_rooms_that_use_it_and_no_other(tmp_path: Path) -> None:
    before, after = hashes(tmp_path), hashes(tmp_path, records="X = 2\n")
    assert {room for room in before if before[room] != after[room]} == {"clips", "pretrain"}


def test_a_lazily_imported_module_counts_and_its_neighbour_does_not(tmp_path: Path) -> None:
    before = hashes(tmp_path)
    neighbour = hashes(tmp_path, clips__curate="def cut():\n    return 2\n")
    assert {room for room in before if before[room] != neighbour[room]} == {"clips"}
