"""Something-Something v2: what is written is read back, and the traps of the real download."""

import json
from pathlib import Path

import numpy as np
import pytest
from numbered import CLIP, H264, T, missing, numbers, pictures, read, refused

from scaling4d import video
from scaling4d.benchmarks import ssv2
from scaling4d.records import Sample, UserError, write_json

TEMPLATES = ("Pushing [something] so that it falls, not slides", "[Something] falling like a feather", "Holding [something]")


def write(root: Path, *, frames: int = T, templates: tuple[str, ...] = TEMPLATES) -> None:
    samples = [Sample(str(n), str(n), pictures(frames), {"action": np.int64(n)}) for n in range(3)]
    ssv2.write(root, "train", samples, templates=templates, **H264)


def test_ssv2_reads_back_and_only_the_brackets_leave_a_class_name(tmp_path):
    write(tmp_path)
    names = ["Holding something", "Pushing something so that it falls, not slides", "Something falling like a feather"]
    assert ssv2.class_names(tmp_path) == names
    assert json.loads((tmp_path / "labels/labels.json").read_text()) == {name: str(n) for n, name in enumerate(names)}
    samples = read(ssv2, tmp_path, "train")
    assert [int(sample.labels["action"]) for sample in samples] == [0, 1, 2]
    assert numbers(samples[0].pixels) == list(range(T))
    assert video.probe(tmp_path / "20bn-something-something-v2/0.webm", sha256="").codec == "vp9"


def test_ssv2_labels_an_action_by_its_name_in_a_mirror_too(tmp_path):
    mirrored = ("Pulling [something] from left to right", "Pulling [something] from right to left", "Moving [something] upright")
    write(tmp_path, templates=mirrored)
    names = ssv2.class_names(tmp_path)
    in_mirror = [names[int(sample.labels["action_mirrored"])] for sample in read(ssv2, tmp_path, "train")]
    assert in_mirror == [names[0], names[2], names[1]]  # the only one without a counterpart stays itself


def test_ssv2_older_label_names_are_read_too(tmp_path):
    write(tmp_path)
    for path in (tmp_path / "labels").glob("*.json"):
        path.rename(tmp_path / f"something-something-v2-{path.name}")
    assert ssv2.open_split(tmp_path, "train", CLIP).count == 3


def test_ssv2_a_short_video_goes_on_with_its_last_frame(tmp_path):
    write(tmp_path, frames=4)
    assert numbers(read(ssv2, tmp_path, "train")[0].pixels) == [0, 1, 2, 3, 3, 3]


def test_ssv2_refuses_what_does_not_fit(tmp_path):
    write(tmp_path)
    (tmp_path / "20bn-something-something-v2/1.webm").unlink()
    assert missing(ssv2, tmp_path, "train").endswith("lacks 1 of 3 videos of train, the first is 1.webm")
    refused(r"needed labels/validation.json \(or something-something-v2-validation.json\)", ssv2, tmp_path, "val")
    lists = {path: path.read_text() for path in (tmp_path / "labels").glob("*.json")}
    for name, content, expected in (
        ("train", [{"id": "0", "template": "Eating [it]"}], "train.json: 0 is 'Eating it', which labels.json does not list"),
        ("train", [{"id": 7, "template": ""}], "train.json, entry 0: needed id and template as strings, found {'id': 7"),
        ("train", [{"id": "../0", "template": ""}], "train.json, entry 0: id '../0' is not the name of a video"),
        ("train", [], "train.json lists nothing"),
        ("train", {}, "train.json holds a dict at its top; needed a list"),
        ("labels", {"Holding something": "1"}, "the numbers in labels.json are not 0 .. 0"),
        ("labels", {"Holding something": "x"}, "labels.json: needed class names with whole numbers"),
    ):
        for path, text in lists.items():
            path.write_text(text)
        write_json(tmp_path / f"labels/{name}.json", content)
        refused(expected, ssv2, tmp_path, "train")
    (tmp_path / "labels/labels.json").write_text("{")
    with pytest.raises(UserError, match="labels.json is not JSON"):
        ssv2.class_names(tmp_path)


def test_ssv2_rows_as_they_are_distributed(tmp_path):
    """Written by hand: indices are texts, in any order of the file; commas and capitals belong to a class."""
    write(tmp_path)
    rows = (  # video, index, template, class
        ("2", "2", "[Something] falling like a rock", "Something falling like a rock"),
        ("1", "0", "Letting [something] roll up a slanted surface, so", "Letting something roll up a slanted surface, so"),
        ("0", "1", "Poking a hole into [something soft]", "Poking a hole into something soft"),
    )
    entries = [{"id": video_id, "label": "a row", "template": text, "placeholders": ["it"]} for video_id, _, text, _ in rows]
    write_json(tmp_path / "labels/train.json", entries)
    write_json(tmp_path / "labels/labels.json", {name: index for _, index, _, name in rows})
    assert ssv2.class_names(tmp_path) == [name for _, _, _, name in sorted(rows, key=lambda row: row[1])]
    assert {s.id: int(s.labels["action"]) for s in read(ssv2, tmp_path, "train")} == {"2": 2, "1": 0, "0": 1}
    write_json(tmp_path / "labels/labels.json", {name.lower(): index for _, index, _, name in rows})
    refused("train.json: 2 is 'Something falling like a rock', which labels.json does not list", ssv2, tmp_path, "train")
