import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from nearness import contents
from small_videos import save, world

from scaling4d.clips import data_import
from scaling4d.records import UserError

pytestmark = pytest.mark.integration


def sh(*command):
    subprocess.run(command, check=True, capture_output=True)


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


def test_own_data_arrive_with_the_next_repro_and_the_pocket_data_come_back(project):
    own, pocket = project.parent / "own", Path("experiments/pocket")
    before = contents(own)
    data_import.use_data(own)
    assert contents(Path("data")) == contents(pocket)
    sh("dvc", "repro", "data.dvc")
    assert contents(Path("data")) == before == contents(own)
    data_import.use_data(pocket)
    assert yaml.safe_load(Path("data.dvc").read_text())["deps"] == [{"path": "experiments/pocket"}]
    sh("dvc", "repro", "data.dvc")
    assert contents(Path("data")) == contents(pocket)


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


MOVE = r"^.*/deep er has neither videos/ nor benchmarks/ \(it holds ü.mp4\); move your videos to .*/deep er/videos/$"


@pytest.mark.parametrize(("path", "message"), [
    ("none", r"^no folder .*none; needed a folder with videos/, benchmarks/ or both$"),
    ("empty", r"videos holds no files; "),
    ("own/videos/deep er", MOVE),
])  # fmt: skip
def test_a_missing_or_empty_folder_is_named_and_one_that_holds_videos_directly_says_where_to_move_them(project, path, message):
    (project.parent / "empty/videos").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        data_import.use_data(project.parent / path)


def test_a_check_counts_videos_and_lists_the_first_problems(tmp_path, capsys):
    save(tmp_path / "videos" / "good.mp4", world(0, 4))
    for number in range(12):
        (tmp_path / "videos" / f"{number:02d}.mp4").write_bytes(b"")
    problems = data_import.check_videos(tmp_path)
    assert capsys.readouterr().out.startswith("videos: 13 files, 1 open as videos")
    assert problems[0] == "videos/00.mp4: the file is empty"
    assert problems[10:] == ["videos: 2 more files do not open"]
