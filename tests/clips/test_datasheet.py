import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html import unescape

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scaling4d.artifacts import sha256
from scaling4d.clips.datasheet import croissant, datasheet, datasheet_svg
from scaling4d.records import write_json

SOURCE = {"codec": "h264", "source_height_px": 100, "source_width_px": 200, "source_rate_hz": 24.0, "source_duration_s": 9.0}
REJECTED = ("b black span", "d not_a_video file", "e frozen file", "e frozen span", "e frozen span")


@pytest.fixture
def corpus(tmp_path):
    """Six clips of three files, two rejected files, one of them with two rejected spans, and a span of a used file."""
    return write(tmp_path)


def write(folder, codec="vp9", rejected=REJECTED):
    other = {"codec": codec, "source_height_px": 64, "source_rate_hz": 60.0}
    rows = []
    for source, split, clips, header in (("a", "train", 3, {}), ("b", "train", 1, other), ("c", "val", 2, {})):
        row = {"source": source, "split": split, "frames": 16, "rate_hz": 8.0, "source_rotation_deg": 0, "encoded": True}
        rows += [{"id": f"{source}{number}", **row, **SOURCE, **header} for number in range(clips)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "clips.parquet")
    columns = [pa.array([row.split()[index] for row in rejected], pa.string()) for index in range(3)]
    pq.write_table(pa.table(columns, names=["path", "reason", "scope"]), folder / "rejected.parquet")
    (folder / "shards").mkdir()
    for split in ("val", "train"):
        (folder / "shards" / f"{split}-00000.tar").write_bytes(split.encode())
    return folder


def test_the_sheet_counts_files_clips_hours_and_reasons(corpus):
    sheet = datasheet(corpus)
    assert sheet["files"] == {"found": 5, "used": 3, "rejected": 2}
    assert sheet["rejected_files"] == {"not_a_video": 1, "frozen": 1}
    assert sheet["rejected_spans"] == {"black": 1, "frozen": 2}
    assert sheet["clips"] == {"train": 4, "val": 2}
    assert sheet["hours"] == {"train": 4 * 2 / 3600, "val": 2 * 2 / 3600}
    assert sheet["sources"] == {"train": 2, "val": 1}


def test_the_histograms_count_every_used_file_in_the_range_that_holds_it(corpus):
    histograms = datasheet(corpus)["histograms"]
    assert {name: sum(counts.values()) for name, counts in histograms.items()} == dict.fromkeys(histograms, 3)
    assert histograms["codec"] == {"h264": 2, "vp9": 1}
    assert Counter(histograms["shorter_side_px"]) == Counter({"64 to 128": 3})
    assert Counter(histograms["rate_hz"]) == Counter({"24 to 30": 2, "60 and more": 1})
    assert Counter(histograms["clips_per_source"]) == Counter({"1 to 2": 1, "2 to 3": 1, "3 to 5": 1})


def texts(svg):
    """Texts of a figure of matplotlib's; it draws letters as paths, and writes the text in a comment beside them."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    return [unescape(node.text.strip()) for node in ElementTree.fromstring(svg, parser).iter(ElementTree.Comment)]


@pytest.mark.integration
def test_the_figure_shows_every_histogram_and_every_reason_from_the_file_of_the_sheet_too(corpus):
    sheet = datasheet(corpus)
    write_json(corpus / "datasheet.json", sheet)
    svg = datasheet_svg(sheet)
    assert svg == datasheet_svg(sheet) == datasheet_svg(json.loads((corpus / "datasheet.json").read_text()))
    shown = texts(svg)
    bars = {"vp9", "60 and more", "3 to 5", "3600 and more"}
    assert bars | {"sources by codec", "sources by rate (Hz)", "sources by number of clips"} <= set(shown)
    assert [text for text in shown if text in ("frozen", "black", "not_a_video")] == ["frozen", "black", "not_a_video"]
    assert "5 files found, 3 used; clips: 4 for train (0.00 h) and 2 for val (0.00 h)" in shown


@pytest.mark.integration
@pytest.mark.parametrize("codec", ["a$b$", "x<&>y", "$\\frac{$", "-->"])
def test_no_codec_name_breaks_the_figure(tmp_path, codec):
    svg = datasheet_svg(datasheet(write(tmp_path, codec)))
    ElementTree.fromstring(svg)
    if "-" not in codec:
        assert codec in texts(svg)


def test_a_corpus_without_rejections_can_be_drawn(tmp_path):
    assert "rejected, by reason" in texts(datasheet_svg(datasheet(write(tmp_path, rejected=()))))


def metadata(corpus, *, encoded=True):
    return croissant(corpus, datasheet(corpus), encoded=encoded)


@pytest.mark.parametrize(("encoded", "pattern"), [(True, "*.mp4"), (False, "*")])
def test_croissant_names_the_table_and_every_shard_with_place_size_and_hash_and_the_videos_in_them(corpus, encoded, pattern):
    *files, videos = metadata(corpus, encoded=encoded)["distribution"]
    assert [(file["@type"], file["contentUrl"], file["contentSize"], file["sha256"]) for file in files] == [
        ("cr:FileObject", name, f"{(corpus / name).stat().st_size} B", sha256(corpus / name))
        for name in ("clips.parquet", "shards/train-00000.tar", "shards/val-00000.tar")
    ]
    assert videos["containedIn"] == [{"@id": "shards/train-00000.tar"}, {"@id": "shards/val-00000.tar"}]
    assert (videos["@type"], videos["includes"], videos["cr:excludes"]) == ("cr:FileSet", pattern, "*.json")


def test_croissant_has_a_field_for_every_column_and_its_type(corpus):
    (clips,) = metadata(corpus)["recordSet"]
    types = {field["source"]["extract"]["column"]: field["dataType"] for field in clips["field"]}
    assert list(types) == pq.read_schema(corpus / "clips.parquet").names
    some = {"id": "sc:Text", "rate_hz": "sc:Float", "frames": "sc:Integer", "encoded": "sc:Boolean"}
    assert some.items() <= types.items()
    assert {field["source"]["fileObject"]["@id"] for field in clips["field"]} == {"clips.parquet"}
    assert clips["key"]["@id"] in {field["@id"] for field in clips["field"]}


@pytest.mark.parametrize(("name", "value", "missing"), [("taste", "sweet", "taste"), ("phash", ["ab"], "list<")])
def test_a_column_without_a_description_or_of_a_type_that_croissant_lacks_is_our_mistake(corpus, name, value, missing):
    table = pq.read_table(corpus / "clips.parquet")
    pq.write_table(table.append_column(name, pa.array([value] * len(table))), corpus / "clips.parquet")
    with pytest.raises(KeyError, match=missing):
        metadata(corpus)


def test_every_name_in_croissant_is_used_once_and_every_reference_leads_to_one(corpus):
    def ids(node, *, defined):
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
        own = [node["@id"]] if isinstance(node, dict) and "@id" in node and (len(node) > 1) == defined else []
        return own + [name for part in inner for name in ids(part, defined=defined)]

    body = {key: value for key, value in metadata(corpus).items() if key != "@context"}
    names = ids(body, defined=True)
    assert len(names) == len(set(names)) == 2 + 2 + 1 + len(pq.read_schema(corpus / "clips.parquet").names)
    assert set(ids(body, defined=False)) <= set(names)


def test_croissant_tells_no_date_and_no_place(corpus):
    content = metadata(corpus)
    assert content["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    assert content["license"] == "that of the source videos"
    assert not {"datePublished", "dateCreated", "dateModified", "url", "creator"} & content.keys()
