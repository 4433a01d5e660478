"""What counts as a video to look at: files, members of tars, what a list names."""

import io
import os
import re
import tarfile
import tracemalloc
from dataclasses import replace

import pytest
from small_videos import SETTINGS, inspect, save, world

from scaling4d import video
from scaling4d.clips import inspection
from scaling4d.clips.inspection import hash_sources, inspect_video
from scaling4d.clips.settings import CurationConfig
from scaling4d.clips.sources import SourceFile, list_sources
from scaling4d.records import UserError

pytestmark = pytest.mark.integration

CONFIG = CurationConfig(**SETTINGS)


def add(tar, name, content=b"x", **more):
    info = tarfile.TarInfo(name)
    info.size = 0 if "type" in more else len(content)
    for key, value in more.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def reasons(sources):
    return {source.path: source.refused.reason for source in sources if source.refused}


def test_a_tar_counts_as_its_members_and_they_are_looked_at_where_they_lie(tmp_path):
    one = save(tmp_path / "one.mp4", world(0, 40))
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        tar.add(one, "deep/two.mp4")
        add(tar, "deep/two.json", b"{}")
        tar.add(one, "deep/two.mp4")  # the same name again
    items = list_sources(tmp_path)
    paths = [item.path.split("@")[0] for item in items]
    assert paths == ["one.mp4", "some.tar/deep/two.json", "some.tar/deep/two.mp4", "some.tar/deep/two.mp4"]
    hashes = hash_sources(tmp_path, items)
    assert hashes[0] == hashes[2] == hashes[3] == video.sha256(one)
    inspections = [inspect_video(tmp_path, item, sha256, CONFIG) for item, sha256 in zip(items, hashes, strict=True)]
    assert [clip.frames for clip in inspections[2].clips] == [clip.frames for clip in inspections[0].clips] != []
    assert [why.reason for why in inspections[1].rejected] == ["not a readable video"]


def test_members_that_lead_elsewhere_are_refused_unread_and_named(tmp_path):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        add(tar, "/etc/passwd")
        add(tar, "a/../../b.mp4")
        add(tar, "soft.mp4", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.mp4", type=tarfile.LNKTYPE, linkname="soft.mp4")
        add(tar, "device.mp4", type=tarfile.CHRTYPE)
        add(tar, "pipe.mp4", type=tarfile.FIFOTYPE)
        add(tar, "folder", type=tarfile.DIRTYPE)
        add(tar, "fine.mp4")
    assert reasons(list_sources(tmp_path)) == {
        "bad.tar//etc/passwd": "unsafe path", "bad.tar/a/../../b.mp4": "unsafe path",
        "bad.tar/soft.mp4": "link", "bad.tar/hard.mp4": "link",
        "bad.tar/device.mp4": "not a file", "bad.tar/pipe.mp4": "not a file",
    }  # fmt: skip


def test_archives_that_cannot_be_read_are_one_refused_input_each(tmp_path):
    (tmp_path / "text.tar").write_text("not an archive " * 100)
    with tarfile.open(tmp_path / "nothing.tar", "w"):
        pass
    with tarfile.open(tmp_path / "short.tar", "w") as tar:
        add(tar, "first.mp4", bytes(2000))
        add(tar, "second.mp4", bytes(9000))
    whole = (tmp_path / "short.tar").read_bytes()
    (tmp_path / "short.tar").write_bytes(whole[:6000])
    (tmp_path / "out.tar").symlink_to("/etc/passwd")
    damaged = dict.fromkeys(("text.tar", "short.tar", "short.tar/second.mp4"), "damaged archive")
    assert reasons(list_sources(tmp_path)) == damaged | {"nothing.tar": "empty archive", "out.tar": "damaged archive"}


def test_a_header_that_cannot_be_read_in_the_middle_of_an_archive_is_not_its_end(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in "abc":
            add(tar, f"{name}.mp4", bytes(100))
    whole = bytearray((tmp_path / "a.tar").read_bytes())
    (tmp_path / "two.tar").write_bytes(whole + whole)
    whole[1024 + 148 : 1024 + 156] = b"99999999"  # the checksum of b's header
    (tmp_path / "a.tar").write_bytes(whole)
    sources = list_sources(tmp_path)
    assert reasons(sources) == {"a.tar": "damaged archive", "two.tar": "damaged archive"}
    paths = [source.path for source in sources if not source.refused]
    assert paths == ["a.tar/a.mp4", *(f"two.tar/{name}.mp4" for name in "abc")]


@pytest.mark.parametrize("size", ["-1536", "-5", "9" * 30])
def test_sizes_that_cannot_be_end_the_reading_of_an_archive(tmp_path, size):
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "0.mp4")
        add(tar, "a.mp4", b"", pax_headers={"size": size})
        add(tar, "b.mp4")
    assert reasons(list_sources(tmp_path))["s.tar"] == "damaged archive"


@pytest.mark.parametrize("behind", [0, 1])
def test_a_name_of_gigabytes_is_not_read(tmp_path, behind):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 3 * 2**30
    with (tmp_path / "long.tar").open("wb") as file:
        file.write(tarfile.TarInfo("empty.mp4").tobuf(tarfile.GNU_FORMAT) * behind + info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(4 * 2**30)
    tracemalloc.start()
    assert reasons(list_sources(tmp_path)) == {"long.tar": "damaged archive"}
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_members_of_one_name_are_all_counted(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("a@1024", "a", "a", "a"):
            add(tar, name)
    assert len(list_sources(tmp_path)) == 4


def test_links_onto_themselves_and_closed_folders_are_refused(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in ("a.mp4", "b.tar"):
        (tmp_path / name).symlink_to(tmp_path / name)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("/in"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert reasons(list_sources(tmp_path)) == {"a.mp4": "link", "b.tar": "link", "in": "cannot be read"}
    (why,) = hash_sources(tmp_path, [SourceFile("a.mp4")])
    assert (why.reason, why.detail) == ("link", "it leads to itself")


@pytest.fixture
def kinetics(tmp_path):
    for name in ("abc_000010_000020", "whole", "-dash_000000_000003", "other"):
        save(tmp_path / f"train/{name}.mp4", world(len(name), 100))
    rows = ["label,youtube_id,time_start,time_end,split", "a b,abc,10,20,train", "c,whole,1,3.5,train", "c,whole,4,6.25,train"]
    rows += ["d,-dash,0,3,train", "e,gone,5,15,train"]
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_a_kinetics_list_means_trimmed_files_or_stretches_of_whole_ones_which_must_have_them(kinetics):
    items = {item.path: item for item in list_sources(kinetics, "train.csv")}
    assert reasons(list(items.values())) == {"train/other.mp4": "not listed", "gone_000005_000015": "missing"}
    assert items["train/whole.mp4"].stretches == ((1.0, 3.5), (4.0, 6.25))
    assert items["train/abc_000010_000020.mp4"].stretches == ()
    assert "train.csv" not in items
    whole = inspect(kinetics, items["train/whole.mp4"], CONFIG)
    assert [(clip.start_s, clip.end_s) for clip in whole.clips] == [(1.0, 3.0), (4.0, 6.0)] and not whole.rejected
    (why,) = inspect(kinetics, replace(items["train/whole.mp4"], stretches=((60.0, 70.0),)), CONFIG).rejected
    assert (why.reason, why.detail) == ("too short", "it has 6.19 s, and the list names later ones")


def test_a_list_of_paths_names_files_and_members_alike(kinetics):
    (kinetics / "list.csv").write_text("path\n./train/other.mp4\ntrain.csv\n", encoding="utf-8-sig")
    refused = reasons(list_sources(kinetics, "./list.csv"))
    assert not {"list.csv", "train/other.mp4"} & refused.keys() and refused["train/whole.mp4"] == "not listed"


TIMES = "youtube_id,time_start,time_end\nx,"


@pytest.mark.parametrize(("content", "message"), [
    ("a,b\n1,2\n", "clips.Curation.listed = 'l.csv' has columns a, b; needed path, or youtube_id, time_start, time_end"),
    ('"a\nb",c\n1,2\n', "clips.Curation.listed = 'l.csv' has columns a\\nb, c; needed path"),
    (f"{TIMES}one,2\n", "l.csv line 2: time_start 'one' and time_end '2'; needed seconds, 0 or more"),
    (f"{TIMES}nan,2\n", "l.csv line 2: time_start 'nan' and time_end '2'; needed seconds, 0 or more"),
    (f"{TIMES}5,2\n", "l.csv line 2: time_start '5' and time_end '2'; needed"),
    (None, "clips.Curation.listed = 'l.csv' cannot be read in "),
])  # fmt: skip
def test_a_list_that_cannot_be_used_is_refused(kinetics, content, message):
    if content is not None:
        (kinetics / "l.csv").write_text(content)
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        list_sources(kinetics, "l.csv")


@pytest.mark.parametrize(("limit", "value", "detail"), [
    ("MAX_S", 2.0, "its header states 2 s; needed at most 2 s; cut the file"),
    ("MAX_BYTES", 10 * 64 * 80 * 3, "more than 153600 bytes of decoded frames; cut the file"),
    ("MAX_FRAMES", 39, "more than 39 frames; cut the file"),
])  # fmt: skip
def test_a_video_that_would_take_too_much_is_refused_and_the_limit_named(tmp_path, monkeypatch, limit, value, detail):
    save(tmp_path / "a.mp4", world(0, 40))
    monkeypatch.setattr(inspection, limit, value)
    result = inspect(tmp_path, SourceFile("a.mp4"), CONFIG)
    assert [(why.reason, why.detail) for why in result.rejected] == [("too long", detail)] and not result.clips


def test_names_of_any_bytes_are_found(tmp_path):
    names = ["-dash.mp4", "two\nlines.mp4", "größe ✓.mp4", " .mp4", "a:b.mp4"]
    for name in names:
        save(tmp_path / name, world(0, 40))
    os.rename(os.fsencode(tmp_path / " .mp4"), os.fsencode(tmp_path) + b"/\xff.mp4")
    inspections = {item.path: inspect(tmp_path, item, CONFIG) for item in list_sources(tmp_path)}
    assert set(inspections) == {*names, os.fsdecode(b"\xff.mp4")} - {" .mp4"}
    assert all(inspection.clips for inspection in inspections.values())
    assert reasons(list_sources(tmp_path)) == {os.fsdecode(b"\xff.mp4"): "name"}
