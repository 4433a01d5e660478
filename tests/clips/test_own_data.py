import subprocess
from pathlib import Path

import pytest
import yaml
from small_videos import save, world

from scaling4d.clips import source
from scaling4d.records import UserError


def sh(*command):
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose data are imported from experiments/pocket, and the user's own data beside it."""
    home = tmp_path / "project"
    save(home / "experiments/pocket/videos/a.mp4", world(0, 4))
    save(tmp_path / "own" / "videos" / "deep er" / "ü.mp4", world(1, 4))
    monkeypatch.chdir(home)
    sh("git", "init", "-q")
    sh("dvc", "init", "-q")
    sh("dvc", "import-url", "experiments/pocket", "data")
    sh("dvc", "unfreeze", "data.dvc")
    return home


def files(folder: Path):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_own_data_arrive_with_the_next_repro_and_the_pocket_data_come_back(project):
    own, pocket = project.parent / "own", Path("experiments/pocket")
    before = files(own)
    source.use(own)
    assert files(Path("data")) == files(pocket)
    sh("dvc", "repro", "data.dvc")
    assert files(Path("data")) == before == files(own)
    source.use(pocket)
    assert yaml.safe_load(Path("data.dvc").read_text())["deps"] == [{"path": "experiments/pocket"}]
    sh("dvc", "repro", "data.dvc")
    assert files(Path("data")) == files(pocket)


@pytest.mark.parametrize("path", ["data", "data/videos", ".", ".."])
def test_data_that_an_import_would_overwrite_are_refused(project, path):
    before = Path("data.dvc").read_bytes()
    with pytest.raises(UserError, match=r"overlaps data/, which an import overwrites; move your data out of it"):
        source.use(Path(path))
    assert Path("data.dvc").read_bytes() == before


def test_files_that_the_user_put_into_data_are_not_lost(project):
    Path("data/videos/mine.mp4").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"^data/ was changed since its import, and a new import would replace it; "):
        source.use(project.parent / "own")
    assert Path("data/videos/mine.mp4").read_bytes() == b"mine"


def test_a_folder_that_holds_videos_directly_says_where_to_move_them(project):
    with pytest.raises(
        UserError,
        match=r"^.*/deep er has neither videos/ nor benchmarks/ \(it holds ü.mp4\); move your videos to .*/deep er/videos/$",
    ):
        source.use(project.parent / "own" / "videos" / "deep er")


def test_a_missing_or_empty_folder_is_named(project, tmp_path):
    with pytest.raises(UserError, match=r"^no folder .*none; needed a folder with videos/, benchmarks/ or both$"):
        source.use(tmp_path / "none")
    (tmp_path / "empty" / "videos").mkdir(parents=True)
    with pytest.raises(UserError, match=r"videos holds no files; "):
        source.use(tmp_path / "empty")


def test_a_check_counts_videos_and_lists_the_first_problems(tmp_path, capsys):
    save(tmp_path / "videos" / "good.mp4", world(0, 4))
    for number in range(12):
        (tmp_path / "videos" / f"{number:02d}.mp4").write_bytes(b"")
    problems = source.check_videos(tmp_path)
    assert capsys.readouterr().out.startswith("videos: 13 files, 1 open as videos")
    assert problems[0] == "videos/00.mp4: the file is empty"
    assert problems[10:] == ["videos: 2 more files do not open"]
