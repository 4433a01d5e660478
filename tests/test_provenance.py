"""Evidence: settings, numbers as text, atomic writes, gin's text, locks, DVC's cache, git."""

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import commit_here, git
from damage import ACCEPTED, REFUSED, SIZES

from scaling4d import provenance
from scaling4d.provenance import LockedFile, LockedStage, differences, folder_md5, format_number, parse_gin, read_lock, required
from scaling4d.records import UserError

ROOT = Path(__file__).parents[1]
LOCK = """schema: '2.0'
stages:
  readout@nano:
    cmd: readout nano
    deps:
    - {path: out/pretrain/nano, hash: md5, md5: b.dir, size: 7, nfiles: 2}
    params:
      params.yaml:
        seed: 0
        rate: 3e-06
    outs:
    - {path: out/readout, hash: md5, md5: c.dir, size: 9, nfiles: 1}
  other: {cmd: other, deps: [{path: data2, hash: md5, md5: d, size: 1}]}
  report: {cmd: report, deps: [{path: out, hash: md5, md5: e.dir, size: 9}]}
  pretrain@nano: {cmd: pretrain, outs: [{path: out/pretrain/nano, hash: md5, md5: b.dir, size: 7, nfiles: 2}]}
"""


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def test_settings_are_compared_level_by_level() -> None:
    some, others = {"a": {"b": 1, "c": {}}, "d": [1], "e": {"f": 2}}, {"a": {"b": 2, "c": {"g": 3}}, "d": [1]}
    expected = [("a.b", 1, 2), ("a.c.g", "missing", 3), ("e", {"f": 2}, "missing")]
    assert [*differences(some, others)] == expected
    assert dict(provenance.flatten(some)) == {"a.b": 1, "a.c": {}, "d": [1], "e.f": 2}
    assert provenance.is_below("a.b", ["a"]) and not provenance.is_below("ab", ["a"])


def test_a_number_is_written_by_its_format_and_an_unknown_format_is_refused() -> None:
    assert [format_number(0.12345, spec) for spec in (".4f", "+.1%", ".2e")] == ["0.1235", "+12.3%", "1.23e-01"]
    assert [format_number(2345678, spec) for spec in (",d", "M", ",.0fM")] == ["2,345,678", "2.35 M", "2 M"]
    assert format_number("ab12", "") == "ab12"
    with pytest.raises(ValueError, match="Unknown format code 'q'"):
        format_number(1.0, ".2q")


def test_long_values_of_gin_are_read_whole() -> None:
    text = "# Parameters for A:\n# ====\npackage.A.x = \\\n    ((1, 'a = b'),\n     (2, 'c'))\nA.y = 3e-06\nB.z = @other\n"
    assert parse_gin(text + "B.w = 'p\\\\q'\n") == {"A.x": [[1, "a = b"], [2, "c"]], "A.y": 3e-06, "B.z": "@other", "B.w": "p\\q"}


def test_a_lock_is_read_into_stages_and_a_target_requires_the_makers_of_its_inputs() -> None:
    stages = read_lock(Path("dvc.lock"), LOCK)
    readout = stages["readout@nano"]
    out, dep = LockedFile("out/readout", "c.dir", 9, 1), LockedFile("out/pretrain/nano", "b.dir", 7, 2)
    assert readout == LockedStage("readout@nano", "readout nano", (dep,), (out,), {"seed": 0, "rate": 3e-06})
    assert readout.kind == "readout"
    assert [*required(stages, ["readout@nano", "absent"])] == ["readout@nano", "pretrain@nano"]
    assert [*required(stages, ["report"])] == ["readout@nano", "report", "pretrain@nano"]


@pytest.mark.parametrize(("old", "new", "reason"), [
    ("'2.0'", "'3.0'", "schema '3.0', needed '2.0'"),
    ("hash: md5, md5: d", "md5: d", "data2 has a hash of kind None, needed md5"),
    ("params.yaml", "other.yaml", "readout@nano has settings of other.yaml, needed params.yaml"),
    ("stages:", "stages: [", "while parsing a flow sequence .*"),
    ("cmd: other,", f"cmd: {'[' * 3_000}", "maximum recursion depth .*"),
    ("cmd: other,", "cmd: 7,", "other has cmd 7 and settings {}; needed .*"),
    ("path: data2", "path: 2", "LockedFile.*; needed a path, an md5, and whole numbers"),
    ("md5: d,", "md5: [d],", "LockedFile.*; needed a path, an md5, and whole numbers"),
    ("size: 1}", "size: x}", "LockedFile.*; needed a path, an md5, and whole numbers"),
])  # fmt: skip
def test_a_damaged_lock_is_one_line(old: str, new: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"^dvc.lock is damaged: {reason}; take it from git again$"):
        read_lock(Path("dvc.lock"), LOCK.replace(old, new))


def test_the_cache_is_read_by_hash_and_wrong_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"b": "2" * 32, "a/c": "1" * 32, "a-b": "3" * 32}
    md5 = folder_md5(files)
    listing = json.dumps([{"md5": files[name], "relpath": name} for name in ("a-b", "a/c", "b")])
    assert md5 == hashlib.md5(listing.encode()).hexdigest() + ".dir"  # as DVC sorts: by the plain name
    path = f"cache/files/md5/{md5[:2]}/{md5[2:]}"
    assert provenance.cached_listing(md5, Path("cache")) is None
    write(path, listing)
    assert provenance.cached_listing(md5, Path("cache")) == files
    write(path, listing + " ")
    with pytest.raises(UserError, match=f"^{path} does not hold the bytes of its name; remove it and run its stage again$"):
        provenance.cached(md5, Path("cache"))


@pytest.mark.parametrize("disks", ["one disk", "two disks"])
def test_files_appear_by_rename_or_not_at_all(disks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def rename_on_a_disk(path: Path, new: Path) -> None:
        if disks == "two disks" and (Path(path).parts[0] == ".resume") != (Path(new).parts[0] == ".resume"):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(path))
        rename(path, new)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "rename", rename_on_a_disk)
    for text in ("first", "second"):
        with provenance.atomic_folder(Path("out/folder")) as folder:
            write(f"{folder}/{text}", text)
    with pytest.raises(OSError, match="stop"), provenance.atomic_folder(Path("out/folder")) as folder:
        raise OSError("stop")
    assert [path.as_posix() for path in Path("out").rglob("*")] == ["out/folder", "out/folder/second"]
    assert Path("out/folder/second").read_text() == "second" and not [*Path(".resume").iterdir()]
    with provenance.atomic_new(Path("new")) as partial:
        partial.write_text("new")
    with pytest.raises(OSError, match="stop"), provenance.atomic_new(Path("other")) as partial:
        partial.mkdir()
        raise OSError("stop")
    for path, message in (
        ("new", "new exists; choose another name or remove it"),
        ("no/x", "no folder no to write x in; make it"),
    ):
        with pytest.raises(UserError, match=f"^{message}"), provenance.atomic_new(Path(path)):
            pass
    provenance.write_text(Path("new"), "newer")
    assert sorted(path.name for path in Path().iterdir()) == [".resume", "new", "out"] and Path("new").read_text() == "newer"


def test_folders_of_a_killed_run_go_and_one_in_use_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with provenance.work_folder("out-folder") as in_use:
        killed = [Path(".resume/out-folder.partial-0123abcd"), Path("out/.folder.partial-0123abcd")]
        other = Path(".resume/out-folder.partial-of-a-user")
        for folder in (*killed, other):
            write(f"{folder}/out/part", "half")
        (killed[0] / provenance.LOCK_FILE).touch()
        with provenance.atomic_folder(Path("out/folder")) as folder:
            write(f"{folder}/whole", "whole")
        assert in_use.is_dir() and other.is_dir() and not any(folder.exists() for folder in killed)
    assert [path.name for path in Path(".resume").iterdir()] == [other.name]


def test_a_linked_folder_stays_on_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk/folder").mkdir(parents=True)
    Path("out").symlink_to("disk/folder")
    with provenance.atomic_folder(Path("out")) as folder:
        write(f"{folder}/a", "new")
    assert Path("out").is_symlink() and Path("disk/folder/a").read_text() == "new"


@pytest.mark.parametrize(("number", "needed"), [
    (errno.ENOSPC, "room on its disk"),
    (errno.EFBIG, "room on its disk"),
    (errno.EROFS, "permission for this user"),
    (errno.EACCES, "permission for this user"),
    (errno.EBUSY, "a folder that is no mount point"),
])  # fmt: skip
@pytest.mark.parametrize("write_to", [provenance.atomic_folder, provenance.atomic_new, provenance.write_text])
def test_a_full_or_read_only_disk_is_one_line_and_the_former_result_stays(
    write_to: Callable, number: int, needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    former = {provenance.atomic_folder: "out/former", provenance.atomic_new: "other", provenance.write_text: "out"}[write_to]
    write(former, "former")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match=f"^out: {os.strerror(number)}; needed {needed}; repair that, and the same command con"):
        if write_to is provenance.write_text:
            monkeypatch.setattr(Path, "write_text", refuse)
            write_to(Path("out"), "text")
        else:
            with write_to(Path("out")) as partial:
                write(f"{partial}/a" if former == "out/former" else partial, "half")
                refuse()
    assert [path.as_posix() for path in Path().rglob("*") if path.is_file()] == [former] and Path(former).read_text() == "former"


def test_another_disk_that_fills_while_a_folder_is_published_costs_no_former_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write("out/former", "former")

    def other_disk(path: Path, new: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(path))

    def full(source: str, target: str) -> None:
        Path(target).touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source, None, target)

    monkeypatch.setattr(os, "rename", other_disk)
    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(UserError, match="^[^;]*/new/[ab]: No space left on device; needed room on its disk; [^;]*$"):
        with provenance.atomic_folder(Path("out")) as folder:
            for name in "ab":
                write(f"{folder}/{name}", "new")
    assert [path.as_posix() for path in Path().rglob("*") if path.is_file()] == ["out/former"]


@pytest.mark.parametrize("file_system", ["locks", "no locks"])
def test_writers_of_the_same_name_do_not_meet(file_system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.chdir(tmp_path)
    if file_system == "no locks":
        monkeypatch.setattr(provenance.fcntl, "flock", no_locks)
    with provenance.atomic_folder(Path("out")) as first:
        write(f"{first}/a", "first")
        with provenance.atomic_folder(Path("out")) as second:
            write(f"{second}/a", "second")
        assert Path("out/a").read_text() == "second"
    assert Path("out/a").read_text() == "first" and not [*Path(".resume").iterdir()]


@pytest.mark.integration
def test_git_gives_files_hashes_and_settings_of_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert provenance.git("log") is None and provenance.commits_of("a") == []
    for name, text in (("src/b", "2"), ("src/a/c", "1"), ("settings/x.yaml", "x: 1"), ("settings/y.md", "y")):
        write(name, text)
    first = commit_here()
    write("src/b", "3")
    second = commit_here()
    md5s = {"b": hashlib.md5(b"2").hexdigest(), "a/c": hashlib.md5(b"1").hexdigest()}
    assert provenance.md5_at(first, "src") == folder_md5(md5s) and provenance.md5_at(first, "src/b") == md5s["b"]
    assert provenance.md5_at(first, "none") is provenance.file_at(first, "none") is None
    assert provenance.file_at(first, "src/b") == "2" and provenance.commits_of("src") == [second, first]
    write("src/d", "4")
    write("src/b", "5")
    assert provenance.edited_files("src") == ["b", "d"]
    assert provenance.commit_and_edits("settings") == first[:12]
    assert provenance.commit_and_edits("settings", "src") == f"{second[:12]}, and edits of src that are not committed"
    provenance.write_yaml_files_at(first, "settings", Path("copy"))
    provenance.write_yaml_files_at(first, "none", Path("copy"))
    assert [path.as_posix() for path in Path("copy").rglob("*.*")] == ["copy/settings/x.yaml"]
    for name in (f"{first[:2]}/{first[2:]}/brave-one", "stash", "exec/EXEC_HEAD"):
        git("update-ref", f"refs/exps/{name}", second)
    assert provenance.experiments() == {"brave-one": f"refs/exps/{first[:2]}/{first[2:]}/brave-one"}
    with pytest.raises(UserError, match="^git show nothing: fatal: "):
        provenance.git_or_error("show", "nothing")


def test_a_csv_keeps_every_digit_of_a_float() -> None:
    rows = [{"a": 0.1 + 0.2, "b": None, "other": 1}, {"a": 1}]
    assert provenance.to_csv(["a", "b"], rows) == "a,b\n0.30000000000000004,\n1,\n"


@SIZES
def test_a_damaged_lock_is_read_or_refused(tmp_path: Path, endures: Callable, copies: int) -> None:
    paths = [tmp_path / name for name in ("dvc.lock", "data.dvc")]
    for path, text in zip(paths, (LOCK, (ROOT / "data.dvc").read_text()), strict=True):
        path.write_text(text)
    counts = endures("locks and .dvc files", paths, lambda path: read_lock(path) and None, copies)
    assert counts[REFUSED] and counts[ACCEPTED]


def test_a_new_folder_waits_for_a_run_that_took_it_for_one_of_a_killed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of the folder and its lock, another run of the name may lock it, to remove it."""
    monkeypatch.setattr(provenance.secrets, "token_hex", lambda _: "0123abcd")
    folder = tmp_path / "out.partial-0123abcd"
    lock = provenance.lock_folder(folder, wait_s=0)

    def remove() -> None:
        shutil.rmtree(folder)
        lock.close()

    other = threading.Timer(0.3, remove)
    other.start()
    with provenance.work_folder("out", tmp_path) as out:
        other.join()
        assert out.is_dir()
    assert not list(tmp_path.iterdir())
