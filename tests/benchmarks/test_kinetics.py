"""Kinetics: what is written is read back, and the traps of the real download."""

from pathlib import Path

import numpy as np
import pytest
from benchmarks.writers import write_kinetics
from numbered import CLIP, H264, left_out, missing, numbers, pictures, read, refused

from scaling4d.benchmarks import kinetics
from scaling4d.records import Sample

LABELS_K = ("riding a bike", "abseiling", "petting animal (not cat), slowly", "dancing 'macarena'")
IDS = ("-0_aB_c-D_e", "_bcdefghijk", "abcdefghijk", "ABC_DEF_GHI")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four videos in both splits, of an own class and shade each."""
    for split in ("train", "val"):
        write_kinetics(tmp_path, split, samples(), labels=LABELS_K, **H264)
    return tmp_path


def samples() -> list[Sample]:
    return [Sample(name, name, pictures() + np.uint8(40 * n), {"action": np.int64(n)}) for n, name in enumerate(IDS)]


def train_video(root: Path, n: int) -> Path:
    return root / "train" / f"{IDS[n]}_000000_000001.mp4"


def shades(root: Path, split: str) -> list[int]:
    return [numbers(sample.pixels)[0] for sample in read(kinetics, root, split)]


def test_kinetics_reads_back_by_ids_that_hold_lines_and_labels_that_hold_commas(root):
    assert '\n"petting animal (not cat), slowly",' in (root / "train.csv").read_text()
    assert kinetics.class_names(root) == sorted(LABELS_K)
    assert kinetics.open_split(root, "train", CLIP).count == 4
    assert shades(root, "train") == [0, 5, 10, 15]
    for n, sample in enumerate(read(kinetics, root, "train")):
        assert (sample.video, sample.labels["action"], sample.labels["action_mirrored"]) == (IDS[n], n, n)


def test_kinetics_classes_are_those_of_the_training_list_alone_without_quotes_within_quotes(root):
    path = root / "train.csv"
    path.write_text(path.read_text().replace("abseiling", '"""abseiling"""'))
    assert kinetics.class_names(root) == sorted(LABELS_K)
    write_kinetics(root, "val", samples()[:1], labels=["riding a bike"], **H264)  # class 0 of its own labels
    assert [int(sample.labels["action"]) for sample in read(kinetics, root, "val")] == [3]


def test_kinetics_in_a_folder_a_class_under_the_other_names_of_lists_and_splits(root):
    (root / "annotations").mkdir()
    (root / "val.csv").rename(root / "annotations/validate.csv")
    (root / "val").rename(root / "validation")
    for n, path in enumerate(sorted((root / "validation").glob("*.mp4"))):
        (root / f"validation/class_{n}").mkdir()
        path.rename(root / f"validation/class_{n}" / path.name)
    (root / "validation/class_0").rename(root / "elsewhere")
    (root / "validation/class_0").symlink_to(root / "elsewhere")
    assert kinetics.open_split(root, "val", CLIP).layout == "annotations/validate.csv, videos in a folder a class"
    assert shades(root, "val") == [0, 5, 10, 15]


@pytest.mark.parametrize(("name", "shade"), [
    (f"k400/{IDS[0]}_000000_000001", 15), (IDS[0], 15), (f"{IDS[0]}_000010_000020", 0)
])  # fmt: skip
def test_kinetics_a_replacement_of_the_same_segment_or_by_a_bare_id_goes_before_the_file(root, name, shade):
    path = root / "replacement" / f"{name}.mp4"
    path.parent.mkdir(parents=True)
    path.write_bytes(train_video(root, 3).read_bytes())
    assert shades(root, "train")[0] == shade
    train_video(root, 0).write_bytes(b"no video")
    assert len(left_out(kinetics, root, "train")) == (shade != 15)


def test_kinetics_another_segment_of_the_same_video_is_not_what_is_listed(root):
    train_video(root, 1).rename(root / "train" / f"{IDS[1]}_000010_000020.mp4")
    expected = "train lacks 1 of 4 videos of train, the first is _bcdefghijk_000000_000001.mp4"
    assert missing(kinetics, root, "train").endswith(expected)
    refused(r"train.csv, line 3: no file _bcdefghijk_000000_000001.mp4 below .*train", kinetics, root, "train")
    skipped = []
    assert [sample.video for sample in read(kinetics, root, "train", skipped=skipped)] == [IDS[0], *IDS[2:]]
    assert [(item.id, item.bad) for item in skipped] == [("_bcdefghijk_000000_000001", True)]


@pytest.mark.parametrize(("old", "new", "expected"), [
    (",0,1,", ",now,1,", "train.csv, line 2: time_start and time_end must be seconds"),
    ("abcdefghijk", "abc", "line 4: needed a label and a YouTube id of 11 characters, found .*, 'abc'"),
    ("label,", "", "train.csv has no column label"),
])  # fmt: skip
def test_kinetics_refuses_a_list_that_does_not_fit(root, old, new, expected):
    path = root / "train.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    refused(expected, kinetics, root, "train")
    path.unlink()
    refused(r"laid out in another way: needed train.csv \(the official list", kinetics, root, "train")
