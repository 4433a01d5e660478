"""Something-Something v2: what is written is read back, and the traps of the real download."""

import json
from pathlib import Path

import numpy as np
import pytest
from numbered import CLIP, H264, T, numbers, pictures

from scaling4d import video
from scaling4d.benchmarks import ssv2
from scaling4d.records import Sample, UserError, write_json

TEMPLATES = ("Pushing [something] so that it falls, not slides", "[Something] falling like a feather", "Holding [something]")


def write_ssv2(root: Path, *, frames: int = T) -> None:
    samples = [Sample(str(n), str(n), pictures(frames), {"action": np.int64(n)}) for n in range(3)]
    ssv2.write(root, "train", samples, templates=TEMPLATES, **H264)


def test_ssv2_reads_back_and_only_the_brackets_leave_a_class_name(tmp_path):
    write_ssv2(tmp_path)
    names = ["Holding something", "Pushing something so that it falls, not slides", "Something falling like a feather"]
    assert ssv2.classes(tmp_path) == names
    assert json.loads((tmp_path / "labels/labels.json").read_text()) == {name: str(n) for n, name in enumerate(names)}
    samples = list(ssv2.read(tmp_path, "train", **CLIP))
    assert [int(sample.labels["action"]) for sample in samples] == [0, 1, 2]
    assert numbers(samples[0].pixels) == list(range(T))
    assert video.probe(tmp_path / "20bn-something-something-v2/0.webm", sha256="").codec == "vp9"


def test_ssv2_says_what_an_action_is_in_a_mirror(tmp_path):
    templates = ("Pulling [something] from left to right", "Pulling [something] from right to left", "Moving [something] upright")
    samples = [Sample(str(n), str(n), pictures(T), {"action": np.int64(n)}) for n in range(3)]
    ssv2.write(tmp_path, "train", samples, templates=templates, **H264)
    names = ssv2.classes(tmp_path)
    in_mirror = [names[int(sample.labels["action_mirrored"])] for sample in ssv2.read(tmp_path, "train", **CLIP)]
    assert in_mirror == [names[0], names[2], names[1]]  # the only one without a counterpart stays itself


def test_ssv2_older_label_names_are_read_too(tmp_path):
    write_ssv2(tmp_path)
    for path in (tmp_path / "labels").glob("*.json"):
        path.rename(tmp_path / f"something-something-v2-{path.name}")
    assert ssv2.count(tmp_path, "train") == 3


def test_ssv2_a_short_video_goes_on_with_its_last_frame(tmp_path):
    write_ssv2(tmp_path, frames=4)
    assert numbers(next(ssv2.read(tmp_path, "train", **CLIP)).pixels) == [0, 1, 2, 3, 3, 3]


def test_ssv2_refuses_what_does_not_fit(tmp_path):
    write_ssv2(tmp_path)
    (tmp_path / "20bn-something-something-v2/1.webm").unlink()
    with pytest.raises(UserError, match="lacks 1 of 3 videos of train, the first is 1.webm"):
        ssv2.count(tmp_path, "train")
    write_json(tmp_path / "labels/train.json", [{"id": "0", "template": "Eating [something]"}])
    with pytest.raises(UserError, match="0 is 'Eating something', which labels.json does not list"):
        list(ssv2.read(tmp_path, "train", **CLIP))
    write_json(tmp_path / "labels/train.json", [{"id": "../0", "template": "Holding [something]"}])
    with pytest.raises(UserError, match="is not the name of a video"):
        ssv2.count(tmp_path, "train")
    (tmp_path / "labels/labels.json").write_text("{")
    with pytest.raises(UserError, match="labels.json is not JSON"):
        ssv2.classes(tmp_path)
    with pytest.raises(UserError, match=r"needed labels/validation.json \(or something-something-v2-validation.json\)"):
        ssv2.count(tmp_path, "val")


def test_ssv2_rows_as_they_are_distributed(tmp_path):
    """Written by hand: indices are texts, in any order of the file; commas and capitals belong to a class."""
    write_ssv2(tmp_path)
    classes = {
        "Something falling like a rock": "2",
        "Letting something roll up a slanted surface, so it rolls back down": "0",
        "Poking a hole into something soft": "1",
    }
    templates = {
        "2": "[Something] falling like a rock",
        "1": "Letting [something] roll up a slanted surface, so it rolls back down",
        "0": "Poking a hole into [something soft]",
    }
    write_json(tmp_path / "labels/labels.json", classes)
    rows = [{"id": id, "label": "a row", "template": text, "placeholders": ["it"]} for id, text in templates.items()]
    write_json(tmp_path / "labels/train.json", rows)
    assert ssv2.classes(tmp_path) == sorted(classes, key=classes.__getitem__)
    found = {sample.id: int(sample.labels["action"]) for sample in ssv2.read(tmp_path, "train", **CLIP)}
    assert found == {"2": 2, "1": 0, "0": 1}
    write_json(tmp_path / "labels/labels.json", {name.lower(): number for name, number in classes.items()})
    with pytest.raises(UserError, match="train.json: 2 is 'Something falling like a rock', which labels.json does not list"):
        list(ssv2.read(tmp_path, "train", **CLIP))
