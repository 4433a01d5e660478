import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html import unescape

import pyarrow as pa
import pytest
from small_videos import SETTINGS

from scaling4d.clips.curate import Chosen
from scaling4d.clips.describe import MEANINGS, croissant, datasheet, datasheet_svg
from scaling4d.clips.examine import Clip, Curation, Finding
from scaling4d.clips.inputs import Rejection
from scaling4d.records import Video, write_json

CURATION = Curation(**SETTINGS | {"frames": 16, "rate_hz": 8.0})
SHARDS = [{"name": f"{split}-00000.tar", "bytes": size, "sha256": str(size) * 64} for split, size in (("train", 7), ("val", 8))]
COLUMNS = pa.schema([("id", pa.string()), ("start_s", pa.float64()), ("frames", pa.int64()), ("encoded", pa.bool_())])


def source(path, clips, *, codec="h264", height_px=100, rate_hz=24.0, duration_s=9.0):
    video = Video(path, f"sha of {path}", codec, duration_s, rate_hz, height_px, 200, 0)
    return Finding(path, video.sha256, video, tuple(Clip(2.0 * at, 2.0 * at + 2, (at,), bytes(32)) for at in range(clips)), ())


def made(codec="vp9"):
    """A sheet of three used files and two rejected ones, one of them by what each of its spans is."""
    used = {source("a", 3): "train", source("b", 1, codec=codec, height_px=64, rate_hz=60.0): "train", source("c", 2): "val"}
    unused = [Finding("d", "", None, (), ()), source("e", 0)]
    chosen = [
        Chosen(f"{found.path}{at}", split, found, clip) for found, split in used.items() for at, clip in enumerate(found.clips)
    ]
    rejected = [
        ("b", Rejection("black", "", 2.0, 3.0)),
        ("d", Rejection("not a readable video", "")),
        ("e", Rejection("frozen", "")),
    ]
    rejected += [("e", Rejection("frozen", "", start_s, start_s + 1)) for start_s in (0.0, 1.0)]
    return datasheet([*used, *unused], chosen, rejected, CURATION)


def metadata(**changes):
    return croissant(
        made(), **{"shards": SHARDS, "clips_sha256": "c" * 64, "columns": COLUMNS, "clips_bytes": 9, "encoded": True} | changes
    )


def test_the_sheet_counts_files_clips_hours_and_reasons():
    sheet = made()
    assert sheet["files"] == {"found": 5, "used": 3, "rejected": 2}
    assert sheet["rejected_files"] == {"not a readable video": 1, "frozen": 1}
    assert sheet["rejected_spans"] == {"black": 1, "frozen": 2}
    assert sheet["clips"] == {"train": 4, "val": 2}
    assert sheet["hours"] == {"train": 4 * 2 / 3600, "val": 2 * 2 / 3600}
    assert sheet["sources"] == {"train": 2, "val": 1}


def test_the_histograms_count_every_used_file_in_the_range_that_holds_it():
    drawn = made()["histograms"]
    assert {name: sum(counts.values()) for name, counts in drawn.items()} == dict.fromkeys(drawn, 3)
    assert drawn["codec"] == {"h264": 2, "vp9": 1}
    assert Counter(drawn["shorter_side_px"]) == Counter({"64 to 128": 3})
    assert Counter(drawn["rate_hz"]) == Counter({"24 to 30": 2, "60 and more": 1})
    assert Counter(drawn["clips_per_source"]) == Counter({"1 to 2": 1, "2 to 3": 1, "3 to 5": 1})


def test_a_file_that_is_neither_used_nor_rejected_is_our_mistake():
    with pytest.raises(AssertionError):
        datasheet([source("a", 1)], [], [], CURATION)


def texts(svg):
    """What matplotlib writes; letters are drawn as paths, and the text stands in a comment beside them."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    return [unescape(node.text.strip()) for node in ElementTree.fromstring(svg, parser).iter(ElementTree.Comment)]


def test_the_drawing_shows_every_histogram_and_every_reason():
    shown = texts(datasheet_svg(made()))
    for text in (
        "sources by codec",
        "vp9",
        "sources by rate (Hz)",
        "60 and more",
        "sources by number of clips",
        "3 to 5",
        "3600 and more",
    ):
        assert text in shown
    assert [text for text in shown if text in ("frozen", "black", "not a readable video")] == [
        "frozen",
        "black",
        "not a readable video",
    ]
    assert "5 files found, 3 used; clips: 4 for train (0.00 h) and 2 for val (0.00 h)" in shown


def test_the_drawing_is_the_same_bytes_twice_also_from_the_file_of_the_sheet(tmp_path):
    write_json(tmp_path / "datasheet.json", made())
    read = json.loads((tmp_path / "datasheet.json").read_text())
    assert datasheet_svg(made()) == datasheet_svg(made()) == datasheet_svg(read)


@pytest.mark.parametrize("codec", ["a$b$", "x<&>y", "$\\frac{$", "-->"])
def test_no_codec_name_breaks_the_drawing(codec):
    svg = datasheet_svg(made(codec))
    ElementTree.fromstring(svg)
    if "-" not in codec:
        assert codec in texts(svg)


def test_a_corpus_without_rejections_can_be_drawn():
    found = source("a", 1)
    sheet = datasheet([found], [Chosen("a0", "train", found, found.clips[0])], [], CURATION)
    assert "rejected, by reason" in texts(datasheet_svg(sheet))


def test_croissant_names_the_table_and_every_shard_with_place_size_and_hash():
    files = [part for part in metadata()["distribution"] if part["@type"] == "cr:FileObject"]
    assert [(file["contentUrl"], file["contentSize"], file["sha256"]) for file in files] == [
        ("clips.parquet", "9 B", "c" * 64),
        ("shards/train-00000.tar", "7 B", "7" * 64),
        ("shards/val-00000.tar", "8 B", "8" * 64),
    ]


@pytest.mark.parametrize(("encoded", "wanted"), [(True, "*.mp4"), (False, "*")])
def test_croissant_says_that_the_videos_lie_in_all_shards(encoded, wanted):
    (videos,) = (part for part in metadata(encoded=encoded)["distribution"] if part["@type"] == "cr:FileSet")
    assert videos["containedIn"] == [{"@id": "shards/train-00000.tar"}, {"@id": "shards/val-00000.tar"}]
    assert (videos["includes"], videos["cr:excludes"]) == (wanted, "*.json")


def test_croissant_has_a_field_for_every_column_and_its_type():
    (clips,) = metadata()["recordSet"]
    found = {field["source"]["extract"]["column"]: field["dataType"] for field in clips["field"]}
    assert found == {"id": "sc:Text", "start_s": "sc:Float", "frames": "sc:Integer", "encoded": "sc:Boolean"}
    assert {field["source"]["fileObject"]["@id"] for field in clips["field"]} == {"clips.parquet"}
    assert clips["key"]["@id"] in {field["@id"] for field in clips["field"]}


def test_a_column_without_a_meaning_or_of_a_type_that_croissant_lacks_is_our_mistake():
    with pytest.raises(AssertionError, match=r"^clips.parquet has a column taste; say in describe.MEANINGS what it is$"):
        metadata(columns=pa.schema([("taste", pa.string())]))
    with pytest.raises(AssertionError, match=r"^a column of list<.*>; needed text, whole numbers, numbers or truth values$"):
        metadata(columns=pa.schema([("id", pa.list_(pa.string()))]))
    assert all(MEANINGS.values())


def test_every_name_in_croissant_is_used_once_and_every_reference_leads_to_one():
    def ids(node, *, defined):
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
        mine = [node["@id"]] if isinstance(node, dict) and "@id" in node and (len(node) > 1) == defined else []
        return mine + [name for part in inner for name in ids(part, defined=defined)]

    body = {key: value for key, value in metadata().items() if key != "@context"}
    names = ids(body, defined=True)
    assert len(names) == len(set(names)) == 2 + len(SHARDS) + 1 + len(COLUMNS)
    assert set(ids(body, defined=False)) <= set(names)


def test_croissant_is_the_same_bytes_twice_and_tells_no_date_and_no_place(tmp_path):
    for name in ("one", "two"):
        write_json(tmp_path / name, metadata())
    text = (tmp_path / "one").read_text()
    assert text == (tmp_path / "two").read_text()
    told = metadata()
    assert told["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    assert told["license"] == "that of the source videos"
    assert not {"datePublished", "dateCreated", "dateModified", "url", "creator"} & told.keys()
