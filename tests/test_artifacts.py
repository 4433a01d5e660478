"""Hashes and files of artifacts, whatever the names and the umask are."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from scaling4d import artifacts, checkpoint
from scaling4d.audit.disk import Disk
from scaling4d.clips.sources import walk_files
from scaling4d.provenance import folder_md5
from scaling4d.records import UserError


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


def write_files(folder: Path, *names: str) -> Path:
    """Files whose text is the last part of their name."""
    for path in (folder / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    return folder


def test_a_folder_has_the_hash_of_its_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    names = ["B", "a/b/x", "a/c", "a-b/y", "a.b/z"]  # whose texts have another order
    write_files(tmp_path, *reversed(names))
    (tmp_path / "a/link").symlink_to(tmp_path / "B")
    (tmp_path / "a/nothing").symlink_to("absent")
    texts = {name: name[-1] for name in names} | {"a/link": "B"}
    ordered = sorted(texts, key=lambda name: name.split("/"))
    lines = "".join(f"{name}\0{hashlib.sha256(texts[name].encode()).hexdigest()}\n" for name in ordered)
    assert artifacts.sha256(tmp_path) == Disk({}).sha256(str(tmp_path)) == hashlib.sha256(lines.encode()).hexdigest()


def test_linked_folders_have_the_hash_of_the_folders_themselves_and_dvc_passes_them_over(tmp_path: Path) -> None:
    plain, linked = (write_files(tmp_path / name, "a.mp4", "z/b.mp4") for name in ("plain", "linked"))
    (linked / "z/one").symlink_to(write_files(tmp_path / "one", "c.mp4"))
    (linked / "z/two").symlink_to(tmp_path / "one")  # twice is no circle
    (tmp_path / "one/deep").symlink_to(write_files(tmp_path / "deep", "d.mp4"))
    write_files(plain, *(f"z/{name}/{file}" for name in ("one", "two") for file in ("c.mp4", "deep/d.mp4")))
    assert artifacts.sha256(linked) == artifacts.sha256(plain) == Disk({}).sha256(str(linked))
    md5s = [hashlib.md5(name).hexdigest() for name in (b"a.mp4", b"b.mp4")]
    assert Disk({}).md5(str(linked)) == folder_md5(dict(zip(("a.mp4", "z/b.mp4"), md5s, strict=True)))


@pytest.mark.parametrize(("link", "target"), [("in/here/loop", "in/here"), ("in/loop", "."), ("beside/loop", "in")])
def test_a_link_to_a_folder_around_it_is_refused(tmp_path: Path, link: str, target: str) -> None:
    folder = write_files(tmp_path, "in/here/a", "beside/b") / "in"
    (folder / "here/out").symlink_to(tmp_path / "beside")
    (tmp_path / link).symlink_to(tmp_path / target)
    for sha256 in (artifacts.sha256, lambda folder: Disk({}).sha256(str(folder))):
        with pytest.raises(UserError, match=r"^.*/loop is a link to a folder around it; remove it$"):
            sha256(folder)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_have_the_mode_of_any_other_new_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        checkpoint.save_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
        assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == mode
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
