"""Hashes and files of artifacts, whatever the names and the umask are."""

import os
from pathlib import Path

import pytest
import torch

from scaling4d import artifacts, checkpoint
from scaling4d.audit.disk import Disk
from scaling4d.clips.sources import walk_files


def test_a_folder_with_a_name_that_is_not_utf_8_has_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/plain").write_text("a")
    plain = artifacts.sha256(Path("out"))
    (Path("out") / os.fsdecode(b"\xff.mp4")).write_text("b")
    assert plain != artifacts.sha256(Path("out")) == Disk({}).sha256("out")


def test_files_that_macos_leaves_in_a_folder_do_not_change_its_hash(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"a")
    before = artifacts.sha256(tmp_path)
    for name in (".DS_Store", "._a.mp4"):
        (tmp_path / name).write_bytes(b"of the Finder")
    assert artifacts.sha256(tmp_path) == before and [file.path for file in walk_files(tmp_path)] == ["a.mp4"]
    (tmp_path / ".hidden").touch()
    assert artifacts.sha256(tmp_path) != before


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_have_the_mode_of_any_other_new_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        checkpoint.save_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
        assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == mode
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
