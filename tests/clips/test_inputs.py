"""What counts as a video to look at: files, members of tars, what a list names."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from small_videos import SETTINGS, save, world

from scaling4d import video
from scaling4d.clips.examine import Curation, examine, fingerprint
from scaling4d.clips.inputs import Input, walk
from scaling4d.records import UserError

CURATION = Curation(**SETTINGS)


def add(tar: tarfile.TarFile, name: str, content: bytes = b"x", **more) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content) if more.get("type", tarfile.REGTYPE) == tarfile.REGTYPE else 0
    for key, value in more.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def reasons(items: list[Input]) -> dict[str, str]:
    return {item.path: item.refused.reason for item in items if item.refused}


def test_a_tar_counts_as_its_members_and_they_are_looked_at_where_they_lie(tmp_path: Path) -> None:
    one = save(tmp_path / "one.mp4", world(0, 40))
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        tar.add(one, "deep/two.mp4")
        add(tar, "deep/two.json", b"{}")
        tar.add(one, "deep/two.mp4")  # the same name again
    items = walk(tmp_path)
    paths = [item.path for item in items]
    assert paths[:3] == ["one.mp4", "some.tar/deep/two.json", "some.tar/deep/two.mp4"]
    assert len(paths) == 4 and paths[3].startswith("some.tar/deep/two.mp4@")
    hashes = fingerprint(tmp_path, items)
    assert hashes[0] == hashes[2] == hashes[3] == video.sha256(one)
    found = [examine(tmp_path, item, sha256, CURATION) for item, sha256 in zip(items, hashes, strict=True)]
    assert [clip.frames for clip in found[2].clips] == [clip.frames for clip in found[0].clips] != []
    assert [why.reason for why in found[1].rejected] == ["not a readable video"]


def test_members_that_lead_elsewhere_are_refused_unread_and_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        add(tar, "/etc/passwd")
        add(tar, "a/../../b.mp4")
        add(tar, "soft.mp4", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.mp4", type=tarfile.LNKTYPE, linkname="soft.mp4")
        add(tar, "device.mp4", type=tarfile.CHRTYPE)
        add(tar, "pipe.mp4", type=tarfile.FIFOTYPE)
        add(tar, "folder", type=tarfile.DIRTYPE)
        add(tar, "fine.mp4")
    assert reasons(walk(tmp_path)) == {
        "bad.tar//etc/passwd": "unsafe path",
        "bad.tar/a/../../b.mp4": "unsafe path",
        "bad.tar/soft.mp4": "link",
        "bad.tar/hard.mp4": "link",
        "bad.tar/device.mp4": "not a file",
        "bad.tar/pipe.mp4": "not a file",
    }


def test_archives_that_cannot_be_read_are_one_refused_input_each(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("not an archive " * 100)
    with tarfile.open(tmp_path / "nothing.tar", "w"):
        pass
    with tarfile.open(tmp_path / "short.tar", "w") as tar:
        add(tar, "first.mp4", bytes(2000))
        add(tar, "second.mp4", bytes(9000))
    whole = (tmp_path / "short.tar").read_bytes()
    (tmp_path / "short.tar").write_bytes(whole[:6000])
    (tmp_path / "out.tar").symlink_to("/etc/passwd")
    assert reasons(walk(tmp_path)) == {
        "text.tar": "damaged archive",
        "nothing.tar": "empty archive",
        "short.tar": "damaged archive",
        "short.tar/second.mp4": "damaged archive",
        "out.tar": "link",
    }


def test_a_header_that_cannot_be_read_in_the_middle_of_an_archive_is_not_its_end(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in "abc":
            add(tar, f"{name}.mp4", bytes(100))
    whole = bytearray((tmp_path / "a.tar").read_bytes())
    (tmp_path / "two.tar").write_bytes(whole + whole)
    whole[1024 + 148 : 1024 + 156] = b"99999999"  # the checksum of b's header
    (tmp_path / "a.tar").write_bytes(whole)
    assert reasons(walk(tmp_path)) == {"a.tar": "damaged archive", "two.tar": "damaged archive"}
    assert [item.path for item in walk(tmp_path) if not item.refused] == ["a.tar/a.mp4", *(f"two.tar/{n}.mp4" for n in "abc")]


@pytest.mark.parametrize("size", ["-1536", "-5", "9" * 30])
def test_sizes_that_cannot_be_end_the_reading_of_an_archive(tmp_path: Path, size: str) -> None:
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "0.mp4")
        add(tar, "a.mp4", b"", pax_headers={"size": size})
        add(tar, "b.mp4")
    assert reasons(walk(tmp_path))["s.tar"] == "damaged archive"


def test_a_name_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 3 * 2**30
    with (tmp_path / "long.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(4 * 2**30)
    assert reasons(walk(tmp_path)) == {"long.tar": "damaged archive"}


def test_members_of_one_name_are_all_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("a@1024", "a", "a", "a"):
            add(tar, name)
    assert len(walk(tmp_path)) == 4


def test_links_onto_themselves_and_closed_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.mp4", "b.tar"):
        (tmp_path / name).symlink_to(tmp_path / name)
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("/in"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    items = walk(tmp_path)
    assert reasons(items) == {"b.tar": "link", "in": "cannot be read"}
    (why,) = fingerprint(tmp_path, [Input("a.mp4")])
    assert (why.reason, why.detail) == ("link", "it leads to itself")


@pytest.fixture
def kinetics(tmp_path: Path) -> Path:
    for name in ("abc_000010_000020", "whole", "-dash_000000_000003", "other"):
        save(tmp_path / f"train/{name}.mp4", world(len(name), 100))
    rows = ["label,youtube_id,time_start,time_end,split", "a b,abc,10,20,train", "c,whole,1,3.5,train", "c,whole,4,6.25,train"]
    rows += ["d,-dash,0,3,train", "e,gone,5,15,train"]
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_a_kinetics_list_means_trimmed_files_or_stretches_of_whole_ones(kinetics: Path) -> None:
    items = {item.path: item for item in walk(kinetics, "train.csv")}
    assert reasons(list(items.values())) == {"train/other.mp4": "not listed", "gone_000005_000015": "missing"}
    assert items["train/whole.mp4"].stretches == ((1.0, 3.5), (4.0, 6.25))
    assert items["train/abc_000010_000020.mp4"].stretches == ()
    assert "train.csv" not in items
    item = items["train/whole.mp4"]
    found = examine(kinetics, item, "0" * 64, CURATION)
    assert [(clip.start_s, clip.end_s) for clip in found.clips] == [(1.0, 3.0), (4.0, 6.0)]
    assert not found.rejected


def test_a_stretch_that_a_video_does_not_have_is_named(kinetics: Path) -> None:
    found = examine(kinetics, Input("train/whole.mp4", stretches=((60.0, 70.0),)), "0" * 64, CURATION)
    assert [(why.reason, why.detail) for why in found.rejected] == [
        ("too short", "it has 6.19 s, and the list wants what comes later")
    ]


def test_a_list_of_paths_names_files_and_members_alike(kinetics: Path) -> None:
    (kinetics / "list.csv").write_text("path\n./train/other.mp4\ntrain.csv\n", encoding="utf-8-sig")
    refused = reasons(walk(kinetics, "./list.csv"))
    assert "list.csv" not in refused
    assert "train/other.mp4" not in refused
    assert refused["train/whole.mp4"] == "not listed"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n", "clips.Curation.listed = 'l.csv' has columns a, b; needed path, or youtube_id, time_start, time_end"),
        (
            "youtube_id,time_start,time_end\nx,one,2\n",
            "l.csv line 2: time_start 'one' and time_end '2'; needed seconds, 0 or more",
        ),
        (
            "youtube_id,time_start,time_end\nx,nan,2\n",
            "l.csv line 2: time_start 'nan' and time_end '2'; needed seconds, 0 or more",
        ),
        ("youtube_id,time_start,time_end\nx,5,2\n", "l.csv line 2: time_start '5' and time_end '2'; needed"),
        (None, "clips.Curation.listed = 'l.csv' cannot be read in "),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(kinetics: Path, content: str | None, said: str) -> None:
    if content is not None:
        (kinetics / "l.csv").write_text(content)
    with pytest.raises(UserError) as error:
        walk(kinetics, "l.csv")
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("limit", "value", "detail"),
    [
        ("max_s", 2.0, "it says 2 s; cut the file, or raise clips.Curation.max_s from 2"),
        ("max_bytes", 10 * 48 * 64 * 3, "more than 92160 bytes of pictures; cut the file, or raise clips.Curation.max_bytes"),
        ("max_frames", 39, "more than 39 frames; cut the file, or raise clips.Curation.max_frames"),
    ],
)
def test_a_video_that_would_take_too_much_is_refused_and_the_limit_named(
    tmp_path: Path, limit: str, value: float, detail: str
) -> None:
    save(tmp_path / "a.mp4", world(0, 40))
    found = examine(tmp_path, Input("a.mp4"), "0" * 64, Curation(**SETTINGS | {limit: value}))
    assert [(why.reason, why.detail) for why in found.rejected] == [("too long", detail)]
    assert not found.clips


def test_names_of_any_bytes_are_found(tmp_path: Path) -> None:
    names = ["-dash.mp4", "two\nlines.mp4", "größe ✓.mp4", " .mp4", "a:b.mp4"]
    for name in names:
        save(tmp_path / name, world(0, 40))
    os.rename(os.fsencode(tmp_path / " .mp4"), os.fsencode(tmp_path) + b"/\xff.mp4")
    found = {item.path: examine(tmp_path, item, "0" * 64, CURATION) for item in walk(tmp_path)}
    assert set(found) == {*names, os.fsdecode(b"\xff.mp4")} - {" .mp4"}
    assert all(finding.clips for finding in found.values())
