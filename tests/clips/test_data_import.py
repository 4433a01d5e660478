import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import yaml
from commands import commit_here
from nearness import contents
from small_videos import save, world

from scaling4d import config
from scaling4d.clips import data_import, sources, stage
from scaling4d.clips.sources import list_sources
from scaling4d.records import UserError

pytestmark = pytest.mark.integration


def sh(*command):
    """A command that hangs is a failure. Returns what it printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(scope="session")
def imported(tmp_path_factory):
    """A project whose data are imported from experiments/pocket, and the user's own data beside it."""
    folder = tmp_path_factory.mktemp("imported")
    save(folder / "project/experiments/pocket/videos/a.mp4", world(0, 4))
    save(folder / "own" / "videos" / "deep er" / "ü.mp4", world(1, 4))
    with contextlib.chdir(folder / "project"):
        sh("git", "init", "-q")
        sh("dvc", "init", "-q")
        sh("dvc", "import-url", "experiments/pocket", "data")
        sh("dvc", "unfreeze", "data.dvc")
    return folder


@pytest.fixture
def project(imported, tmp_path, monkeypatch):
    """A copy, as the current folder."""
    shutil.copytree(imported, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def test_own_data_are_there_at_once_and_the_pocket_data_come_back_with_the_next_repro(project):
    own, pocket = project.parent / "own", Path("experiments/pocket")
    before = contents(own)
    data_import.use_data(own)
    sh("dvc", "repro", "data.dvc")
    assert contents(Path("data")) == before == contents(own)
    data_import.use_data(pocket)
    assert yaml.safe_load(Path("data.dvc").read_text())["deps"] == [{"path": "experiments/pocket"}]
    assert contents(own) == before
    sh("dvc", "repro", "data.dvc")
    assert contents(Path("data")) == contents(pocket) and contents(own) == before


def linked_corpus(kind, own, folder):
    """The folder `own` by links of a kind. Returns what a user names."""
    videos = own / "videos"
    match kind:
        case "files":
            for file in (file for file in videos.rglob("*") if file.is_file()):
                link = folder / file.relative_to(own)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file)
        case "folders":
            (folder / "videos").mkdir(parents=True)
            for path in videos.iterdir():
                (folder / "videos" / path.name).symlink_to(path)
        case "videos":
            folder.mkdir()
            (folder / "videos").symlink_to(videos)
        case "path":
            folder.symlink_to(own)
        case "bare":
            return videos
        case "bare link":
            folder.symlink_to(videos)
    return folder


@pytest.mark.parametrize("kind", ["files", "folders", "videos", "path", "bare", "bare link"])
def test_a_corpus_of_links_and_a_bare_folder_of_videos_are_read_where_they_lie_and_dvc_copies_nothing(project, kind, capsys):
    own = project.parent / "own"
    data_import.use_data(linked_corpus(kind, own, project.parent / "linked"))
    size = sum(map(len, contents(own).values()))
    assert f"1 files (1 below videos/), {size:,} bytes, 0 benchmarks; " in capsys.readouterr().out
    sh("dvc", "repro", "data.dvc")
    assert contents(Path("data")) == contents(own)
    assert all(path.is_dir() or path.is_symlink() for path in Path("data").rglob("*"))
    assert not {*contents(own).values()} & {*contents(Path(".dvc/cache")).values()}
    assert sh("dvc", "status") == "Data and pipelines are up to date.\n"


@pytest.mark.slow
def test_linked_data_work_with_a_pipeline_and_with_experiments_and_a_changed_video_is_seen(project):
    own = project.parent / "own"
    count = {"cmd": "cat data/videos/*/* | wc -c > bytes.txt", "deps": ["data/videos"], "outs": ["bytes.txt"]}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"count": count}}))
    Path(".gitignore").write_text("/data\n/bytes.txt\n/.resume\n")
    data_import.use_data(own)
    for content in (b"one", b"three"):
        (own / "videos/deep er/ü.mp4").write_bytes(content)
        assert "modified:           data" in sh("dvc", "status")
        sh("dvc", "repro")
        assert int(Path("bytes.txt").read_text()) == len(content)
        assert "up to date" in sh("dvc", "status") and not [path for path in Path("data").rglob("*.mp4") if not path.is_symlink()]
        commit_here()
    (own / "videos/deep er/ü.mp4").write_bytes(b"of an experiment")
    sh("dvc", "exp", "run")
    assert int(Path("bytes.txt").read_text()) == len(b"of an experiment")
    assert (own / "videos/deep er/ü.mp4").read_bytes() == b"of an experiment"


def test_another_folder_can_be_named_before_the_first_one_is_read(project):
    for path in (project.parent / "own", project.parent / "own/videos", Path("experiments/pocket"), project.parent / "own"):
        data_import.use_data(path)
    assert contents(Path("data")) == contents(project.parent / "own")


def add_odd_files(videos):
    """One of each kind that DVC stops at, waits for, or drops. Returns the line of a check for each."""
    os.mkfifo(videos / "pipe.mp4")
    (videos / "endless.mp4").symlink_to("/dev/zero")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server, contextlib.chdir(videos):
        server.bind("socket.mp4")
    (videos / "dangling.mp4").symlink_to("nothing.mp4")
    (videos / "self.mp4").symlink_to("self.mp4")
    (videos / "around").symlink_to("..")
    (videos / ".dvcignore").write_text("*.mp4")
    (videos / ".dvc").mkdir()
    Path(os.fsdecode(os.fsencode(videos) + b"/\xff.mp4")).write_bytes(b"x")
    return {
        "videos/pipe.mp4: not a file: a pipe, socket or device", "videos/endless.mp4: not a file: a pipe, socket or device",
        "videos/socket.mp4: not a file: a pipe, socket or device", "videos/dangling.mp4: link: it leads to nothing",
        "videos/self.mp4: link: it leads to itself", "videos/around: link: it leads to a folder around it",
        "videos/.dvcignore: name: DVC does not track .dvcignore", "videos/.dvc: name: DVC does not track .dvc",
        "videos/\\xff.mp4: name: it is not UTF-8, as DVC needs; rename it",
    }  # fmt: skip


def test_files_that_dvc_cannot_read_are_listed_with_their_reasons_and_left_out(project, capsys):
    own = project.parent / "own"
    before, lines = contents(own), add_odd_files(own / "videos")
    assert {*data_import.check_videos(own)} == lines
    assert "1 files (1 below videos/)" in (out := capsys.readouterr().out) and f"{len(lines)} others left out" in out
    data_import.use_data(own)
    assert {line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")} == {
        "left out: " + line for line in lines
    }
    sh("dvc", "repro", "data.dvc")
    assert contents(Path("data")) == before


@pytest.mark.parametrize("odd", ["pipe", "link", "bare"])
def test_a_folder_of_the_project_that_dvc_would_not_import_as_it_is_becomes_links(project, odd):
    videos, before = Path("experiments/pocket/videos"), contents(Path("experiments/pocket"))
    if odd == "pipe":
        os.mkfifo(videos / "pipe.mp4")
    elif odd == "link":
        (videos / "more").symlink_to(project.parent / "own/videos")
        before["videos/more/deep er/ü.mp4"] = (project.parent / "own/videos/deep er/ü.mp4").read_bytes()
    data_import.use_data(videos if odd == "bare" else videos.parent)
    sh("dvc", "repro", "data.dvc")
    assert contents(Path("data")) == before
    assert all(path.is_dir() or path.is_symlink() for path in Path("data").rglob("*"))


def test_a_folder_without_a_usable_file_is_refused_and_a_check_says_why(project):
    (project.parent / "odd").mkdir()
    (project.parent / "odd/a.mp4").symlink_to("nothing")
    why = "videos/a.mp4: link: it leads to nothing"
    with pytest.raises(UserError, match=rf"^.*odd holds no files that can be read \({why}\); see `scaling4d data check .*odd`$"):
        data_import.use_data(project.parent / "odd")
    assert data_import.check_videos(project.parent / "odd") == [why]
    assert contents(Path("data")) == contents(Path("experiments/pocket"))


def test_a_file_that_may_not_be_read_is_left_out(project, monkeypatch):
    secret = project.parent / "own/videos/secret.mp4"
    secret.write_bytes(b"x")
    monkeypatch.setattr(sources.os, "access", lambda path, mode: not str(path).endswith("secret.mp4"))
    assert data_import.check_videos(project.parent / "own") == ["videos/secret.mp4: cannot be read: Permission denied"]


def test_a_check_says_of_links_what_it_says_of_the_files_and_curation_sees_the_same(tmp_path, capsys):
    save(tmp_path / "own/videos/one/good.mp4", world(0, 4))
    (tmp_path / "own/videos/one/empty.mp4").write_bytes(b"")
    (tmp_path / "own/videos/two").mkdir()
    (tmp_path / "own/videos/two/text.mp4").write_text("text")
    (tmp_path / "twin/videos").mkdir(parents=True)
    (tmp_path / "twin/videos/one").symlink_to(tmp_path / "own/videos/one")
    (tmp_path / "twin/videos/two").symlink_to("../../own/videos/two")
    problems = [data_import.check_videos(tmp_path / name) for name in ("own", "twin")]
    assert problems[0] == problems[1] and len(problems[0]) == 2
    counts = capsys.readouterr().out.splitlines()
    assert "3 files (3 below videos/)" in counts[2] and "3 of the files through links" in counts[2]
    assert list_sources(tmp_path / "own/videos") == list_sources(tmp_path / "twin/videos")


def test_a_dry_run_looks_at_the_folder_that_data_dvc_names_and_never_at_older_data(project, monkeypatch):
    looked_at = []
    monkeypatch.setattr(stage.curate, "dry_run", lambda videos, *_, **__: looked_at.append(videos.resolve()))
    monkeypatch.setattr(config, "bind", lambda *_, **__: {stage.CurationConfig: None, stage.WorkersConfig: None})
    monkeypatch.setattr(stage, "_cache", lambda: None)
    own, pocket = project.parent / "own", project / "experiments/pocket"
    for path, videos in ((own, own / "videos"), (own / "videos", own / "videos"), (pocket, pocket / "videos")):
        data_import.use_data(path)
        stage.dry_run({}, list_files=False)
        assert looked_at[-1] == videos
    shutil.move(project.parent / "own", project.parent / "elsewhere")
    data_import.IMPORT.write_text(yaml.safe_dump({"outs": [{"path": "data"}], "meta": {"path": "../own"}}))
    with pytest.raises(UserError, match=r"^no folder ../own; needed .*; data.dvc names it; choose another with `scaling4d data"):
        stage.dry_run({}, list_files=False)


def test_a_clone_of_the_project_gets_the_links_that_data_dvc_names(project, tmp_path):
    data_import.use_data(project.parent / "own")
    (tmp_path / "clone").mkdir()
    shutil.copy("data.dvc", tmp_path / "clone")
    data_import.restore_links(tmp_path / "clone")
    assert contents(tmp_path / "clone/data") == contents(project.parent / "own")


@pytest.mark.parametrize("path", ["data", "data/videos", ".", ".."])
def test_data_that_an_import_would_overwrite_are_refused(project, path):
    before = Path("data.dvc").read_bytes()
    with pytest.raises(UserError, match=r"overlaps data/, which an import overwrites; move your data out of it"):
        data_import.use_data(Path(path))
    assert Path("data.dvc").read_bytes() == before


def test_files_that_the_user_put_into_data_are_not_lost(project):
    Path("data/videos/mine.mp4").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"^data/ was changed since its import, and a new import would replace it; "):
        data_import.use_data(project.parent / "own")
    assert Path("data/videos/mine.mp4").read_bytes() == b"mine"


NEEDED = "needed a folder of videos, or one with videos/, benchmarks/ or both"


@pytest.mark.parametrize(("path", "message"), [
    ("none", f"no folder .*none; {NEEDED}$"),
    ("empty", f".*empty holds no files; {NEEDED}$"),
])  # fmt: skip
def test_a_missing_or_empty_folder_is_refused(project, path, message):
    (project.parent / "empty/videos").mkdir(parents=True)
    for command in (data_import.use_data, data_import.check_videos):
        with pytest.raises(UserError, match=f"^{message}"):
            command(project.parent / path)
    assert contents(Path("data")) == contents(Path("experiments/pocket"))


def test_a_check_counts_videos_and_lists_the_first_problems(tmp_path, capsys):
    save(tmp_path / "videos" / "good.mp4", world(0, 4))
    for number in range(12):
        (tmp_path / "videos" / f"{number:02d}.mp4").write_bytes(b"")
    problems = data_import.check_videos(tmp_path)
    assert "\nvideos: 13 files, 1 open as videos" in capsys.readouterr().out
    assert problems[0] == "videos/00.mp4: the file is empty"
    assert problems[10:] == ["videos: 2 more files do not open"]
