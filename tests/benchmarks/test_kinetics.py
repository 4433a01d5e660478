"""Kinetics: what is written is read back, and the traps of the real download."""

from pathlib import Path

import numpy as np
import pytest
from numbered import CLIP, H264, T, numbers, pictures

from scaling4d.benchmarks import kinetics
from scaling4d.records import Sample, UserError

LABELS_K = ("riding a bike", "abseiling", "petting animal (not cat), slowly", "dancing 'macarena'")
IDS = ("-0_aB_c-D_e", "_bcdefghijk", "abcdefghijk", "ABC_DEF_GHI")


def write_kinetics(root: Path, *, splits: tuple[str, ...] = ("train",)) -> list[Sample]:
    samples = [Sample(youtube, youtube, pictures(T) + np.uint8(40 * n), {"action": np.int64(n)}) for n, youtube in enumerate(IDS)]
    for split in splits:
        kinetics.write(root, split, samples, labels=LABELS_K, **H264)
    return samples


def test_kinetics_reads_back_by_ids_that_hold_lines_and_labels_that_hold_commas(tmp_path):
    write_kinetics(tmp_path)
    assert (tmp_path / "train/-0_aB_c-D_e_000000_000001.mp4").is_file()
    assert '\n"petting animal (not cat), slowly",' in (tmp_path / "train.csv").read_text()
    assert kinetics.classes(tmp_path) == sorted(LABELS_K)
    assert kinetics.count(tmp_path, "train") == 4
    read = list(kinetics.read(tmp_path, "train", **CLIP))
    assert [sample.video for sample in read] == list(IDS)
    assert [int(sample.labels["action"]) for sample in read] == [0, 1, 2, 3]
    assert [numbers(sample.pixels)[0] for sample in read] == [0, 5, 10, 15]
    assert all(sample.labels["action"] == sample.labels["action_mirrored"] for sample in read)


def test_kinetics_classes_are_those_of_the_training_list_alone(tmp_path):
    samples = write_kinetics(tmp_path)
    kinetics.write(tmp_path, "val", samples[:1], labels=["riding a bike"], **H264)  # class 0 of its own labels
    assert [int(sample.labels["action"]) for sample in kinetics.read(tmp_path, "val", **CLIP)] == [3]


def test_kinetics_in_a_folder_a_class_under_the_other_names_of_lists_and_splits(tmp_path):
    write_kinetics(tmp_path, splits=("train", "val"))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val.csv").rename(tmp_path / "annotations/validate.csv")
    (tmp_path / "val").rename(tmp_path / "validation")
    for n, path in enumerate(sorted((tmp_path / "validation").glob("*.mp4"))):
        (tmp_path / f"validation/class_{n}").mkdir()
        path.rename(tmp_path / f"validation/class_{n}" / path.name)
    assert kinetics.count(tmp_path, "val") == 4
    assert kinetics.layout(tmp_path, "val") == "annotations/validate.csv, videos in a folder a class"
    assert [numbers(sample.pixels)[0] for sample in kinetics.read(tmp_path, "val", **CLIP)] == [0, 5, 10, 15]


def test_kinetics_replacements_go_before_the_broken_file_of_their_id(tmp_path):
    write_kinetics(tmp_path)
    broken, mended = tmp_path / "train" / f"{IDS[0]}_000000_000001.mp4", tmp_path / "train" / f"{IDS[3]}_000000_000001.mp4"
    folder = tmp_path / "replacement/replacement_for_corrupted_k400"
    folder.mkdir(parents=True)
    (folder / broken.name).write_bytes(mended.read_bytes())
    broken.write_bytes(b"no video")
    assert numbers(next(kinetics.read(tmp_path, "train", **CLIP)).pixels)[0] == 15


def test_kinetics_labels_in_quotes_within_quotes_are_one_class(tmp_path):
    write_kinetics(tmp_path)
    path = tmp_path / "train.csv"
    path.write_text(path.read_text().replace("abseiling", '"""abseiling"""'))
    assert kinetics.classes(tmp_path) == sorted(LABELS_K)


def test_kinetics_missing_videos_are_counted_and_a_test_list_is_refused(tmp_path):
    write_kinetics(tmp_path)
    (tmp_path / "train" / f"{IDS[1]}_000000_000001.mp4").unlink()
    with pytest.raises(UserError, match="train lacks 1 of 4 videos of train, the first is _bcdefghijk_000000_000001.mp4"):
        kinetics.count(tmp_path, "train")
    with pytest.raises(UserError, match=r"train.csv, line 3: no file _bcdefghijk_000000_000001.mp4 below .*train"):
        list(kinetics.read(tmp_path, "train", **CLIP))
    text = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(text.replace(",0,1,", ",now,1,", 1))
    with pytest.raises(UserError, match="train.csv, line 2: time_start and time_end must be seconds"):
        kinetics.count(tmp_path, "train")
    (tmp_path / "train.csv").write_text(text.replace("abcdefghijk", "abc"))
    with pytest.raises(UserError, match="line 4: needed a label and a YouTube id of 11 characters, found .*, 'abc'"):
        kinetics.count(tmp_path, "train")
    (tmp_path / "train.csv").write_text("youtube_id,time_start,time_end,split\nabcdefghijk,0,10,test\n")
    with pytest.raises(UserError, match="train.csv has no column label"):
        kinetics.count(tmp_path, "train")
    with pytest.raises(UserError, match=r"laid out in another way: needed val.csv \(the official list"):
        kinetics.count(tmp_path, "val")


def test_kinetics_another_stretch_of_the_same_video_is_not_what_is_listed(tmp_path):
    write_kinetics(tmp_path)
    (tmp_path / "train" / f"{IDS[1]}_000000_000001.mp4").rename(tmp_path / "train" / f"{IDS[1]}_000010_000020.mp4")
    with pytest.raises(UserError, match="train lacks 1 of 4 videos of train, the first is _bcdefghijk_000000_000001.mp4"):
        kinetics.count(tmp_path, "train")
    skipped = []
    assert [sample.video for sample in kinetics.read(tmp_path, "train", **CLIP, skipped=skipped)] == [IDS[0], *IDS[2:]]
    assert [(item.id, item.bad) for item in skipped] == [("_bcdefghijk_000000_000001", True)]


@pytest.mark.parametrize(("name", "shown"), [(IDS[0], 15), (f"{IDS[0]}_000010_000020", 0)])
def test_kinetics_a_replacement_may_have_a_bare_id_but_no_other_stretch(tmp_path, name, shown):
    write_kinetics(tmp_path)
    (tmp_path / "replacement").mkdir()
    (tmp_path / "replacement" / f"{name}.mp4").write_bytes((tmp_path / "train" / f"{IDS[3]}_000000_000001.mp4").read_bytes())
    assert numbers(next(kinetics.read(tmp_path, "train", **CLIP)).pixels)[0] == shown
