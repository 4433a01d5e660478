"""What a corpus is: its numbers (`datasheet`), a drawing of them, and Croissant metadata, by which other programs read it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling4d.clips.duplicates import SPLITS
from scaling4d.clips.examine import Curation, Finding
from scaling4d.clips.inputs import Rejection

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.axes import Axes

    from scaling4d.clips.curate import Chosen

STYLE = {
    "svg.hashsalt": "scaling4d",
    "svg.fonttype": "path",  # looks the same wherever it is opened
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.bottom": False,
    "legend.frameon": False,
}
TITLES = {  # of the histograms, in the order of the panels
    "codec": "sources by codec",
    "rotation_deg": "sources by rotation (degrees)",
    "shorter_side_px": "sources by shorter side (px)",
    "rate_hz": "sources by rate (Hz)",
    "duration_s": "sources by duration (s)",
    "clips_per_source": "sources by number of clips",
}
BAR_INCHES = 0.19
CONTEXT = {  # https://docs.mlcommons.org/croissant/docs/croissant-spec.html, Appendix 1
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
MEANINGS = {  # of the columns of clips.parquet
    "id": "Name of the clip.",
    "split": "train or val; clips of one source, or of sources that share a near duplicate, lie on one side.",
    "source": "Path of the source video in the folder of videos.",
    "source_sha256": "SHA-256 of the source video.",
    "start_s": "Seconds from the first frame of the source to the first frame of the clip.",
    "rate_hz": "Frames per second of the clip.",
    "frames": "Number of frames of the clip.",
    "side_px": "Height and width of the clip, in pixels.",
    "encoded": "Whether the file in the shard is the clip alone; if not, it is the whole source.",
    "origin_s": "When the first frame of the source is shown, on the clock of the file in the shard, in seconds.",
    "codec": "Codec of the source.",
    "source_height_px": "Height of the source as displayed, in pixels.",
    "source_width_px": "Width of the source as displayed, in pixels.",
    "source_rate_hz": "Frames per second of the source.",
    "source_duration_s": "Seconds that the source lasts.",
    "source_rotation_deg": "Degrees by which players turn the source: 0, 90, 180 or 270.",
    "phash": "Perceptual hashes of four frames of the clip, 256 bits as hexadecimal digits.",
    "shard": "Name of the tar in shards/ that holds the clip.",
    "offset": "Bytes from the start of the tar to the file that holds the clip.",
    "bytes": "Size of that file.",
}


def datasheet(
    findings: list[Finding], chosen: list[Chosen], rejected: list[tuple[str, Rejection]], curation: Curation
) -> dict[str, Any]:
    """What the corpus is, in numbers: found = used + rejected."""
    used = {item.source.path: item.source.video for item in chosen}
    clips = Counter(item.split for item in chosen)
    clip_s = curation.frames / curation.rate_hz
    whole = Counter(why.reason for _, why in rejected if why.start_s is None)
    assert len(findings) == len(used) + whole.total()
    return {
        "files": {"found": len(findings), "used": len(used), "rejected": whole.total()},
        "rejected_files": dict(whole),
        "rejected_spans": dict(Counter(why.reason for _, why in rejected if why.start_s is not None)),
        "clips": dict(clips),
        "hours": {split: clips[split] * clip_s / 3600 for split in SPLITS},
        "sources": {split: len({item.source.path for item in chosen if item.split == split}) for split in SPLITS},
        "histograms": {
            "codec": dict(Counter(video.codec for video in used.values())),
            "rotation_deg": dict(Counter(str(video.rotation_deg) for video in used.values())),
            "shorter_side_px": _histogram(
                (min(v.height_px, v.width_px) for v in used.values()), (0, 64, 128, 240, 360, 720, 1080)
            ),
            "rate_hz": _histogram((v.rate_hz for v in used.values()), (0, 8, 12, 16, 24, 30, 60)),
            "duration_s": _histogram((v.duration_s for v in used.values()), (0, 1, 2, 5, 10, 30, 60, 300, 3600)),
            "clips_per_source": _histogram(Counter(i.source.path for i in chosen).values(), (1, 2, 3, 5, 10, 100, 1000)),
        },
    }


def _histogram(values: Iterable[float], edges: tuple[float, ...]) -> dict[str, int]:
    """How many values lie in each range [edge, next edge), the last one open."""
    places = Counter(np.searchsorted(edges, list(values), side="right").tolist())
    names = [f"{low} to {high}" for low, high in zip(edges, edges[1:], strict=False)] + [f"{edges[-1]} and more"]
    return {name: places[place + 1] for place, name in enumerate(names)}


def datasheet_svg(sheet: dict[str, Any]) -> str:
    """A panel of bars for each histogram of `datasheet`, and one for the reasons of rejection.

    The same numbers are the same bytes, whether the sheet comes from `datasheet` or back from its file.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    histograms, reasons = sheet["histograms"], Counter(sheet["rejected_files"]) + Counter(sheet["rejected_spans"])
    assert histograms.keys() == TITLES.keys()
    upper, lower = list(TITLES)[:3], list(TITLES)[3:]
    rows = {name: max(len(histograms[other]) for other in line) for line in (upper, lower) for name in line}
    rows["reasons"] = max(rows[upper[0]] + rows[lower[0]], 2 * len(reasons)) / 2
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the machine's own matplotlibrc says
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=(12, 1.7 + 2 * BAR_INCHES * rows["reasons"]), layout="constrained")
        panels = figure.subplot_mosaic([[*upper, "reasons"], [*lower, "reasons"]], width_ratios=(1, 1, 1, 1.3))
        for name, title in TITLES.items():
            counts = histograms[name]
            _bars(panels[name], title, {"sources": counts}, _ordered(counts, by_count=name == "codec"), rows[name])
        rejected = {"whole files": sheet["rejected_files"], "spans of files": sheet["rejected_spans"]}
        _bars(panels["reasons"], "rejected, by reason", rejected, _ordered(reasons, by_count=True), rows["reasons"])
        panels["reasons"].legend(loc="lower right")
        figure.suptitle(_sentence(sheet), fontsize=9)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]


def _bars(axes: Axes, title: str, series: dict[str, dict[str, int]], names: list[str], rows: float) -> None:
    """A row a name, from above, with room for `rows` of them; in it a bar a series, its count written beside it."""
    height = 0.8 / len(series)
    for index, (label, counts) in enumerate(series.items()):
        places = np.arange(len(names)) - 0.4 + height * (index + 0.5)
        drawn = axes.barh(places, [counts.get(name, 0) for name in names], height, label=label)
        axes.bar_label(drawn, [f"{counts[name]:,}" if counts.get(name) else "" for name in names], padding=2)
    axes.set_title(title, loc="left")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * max([1, *(count for counts in series.values() for count in counts.values())]))
    axes.tick_params(left=False)
    axes.xaxis.set_visible(False)


def _ordered(counts: dict[str, int], *, by_count: bool) -> list[str]:
    """Names by falling count, or by the number that each starts with."""
    if by_count:
        return sorted(counts, key=lambda name: (-counts[name], name))
    return sorted(counts, key=lambda name: float(name.split()[0]))


def _sentence(sheet: dict[str, Any]) -> str:
    clips = " and ".join(f"{sheet['clips'].get(s, 0):,} for {s} ({sheet['hours'][s]:.2f} h)" for s in SPLITS)
    return f"{sheet['files']['found']:,} files found, {sheet['files']['used']:,} used; clips: {clips}"


def croissant(
    sheet: dict[str, Any],
    shards: list[dict[str, Any]],
    clips_sha256: str,
    columns: pa.Schema,
    *,
    clips_bytes: int,
    encoded: bool,
) -> dict[str, Any]:
    """Croissant 1.0 metadata (JSON-LD) of a folder with `clips.parquet` and `shards/*.tar`, to be written into that folder.

    The same corpus gives the same content: there is no date and no address in it. Whoever publishes the corpus replaces
    `license`, which here says only that the clips stand under that of the videos they were cut from, and adds what the
    specification requires and a program cannot know: `url`, `creator`, `datePublished`.
    Args:
        shards: {"name", "bytes", "sha256"} of each.
        clips_sha256, clips_bytes, columns: of clips.parquet.
        encoded: the tars hold clips as mp4; otherwise whole sources of any format.
    Source: https://docs.mlcommons.org/croissant/docs/croissant-spec.html
    """
    tars = [_file(f"shards/{shard['name']}", "application/x-tar", shard["bytes"], shard["sha256"]) for shard in shards]
    table = _file("clips.parquet", "application/x-parquet", clips_bytes, clips_sha256)
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": "scaling4d-clips",
        "description": f"Short video clips of one length, rate and size, found in a folder of videos. {_sentence(sheet)}.",
        "license": "that of the source videos",
        "distribution": [table, *tars, _videos(tars, encoded)],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "clips",
                "name": "clips",
                "description": "One record a clip: where it lies in the shards, and what it was taken from.",
                "key": {"@id": "clips/id"},
                "field": [_column(field) for field in columns],
            }
        ],
    }


def _videos(tars: list[dict[str, str]], encoded: bool) -> dict[str, Any]:
    """What lies in the tars, each video beside a json that says where it comes from."""
    kind, wanted = ("video/mp4", "*.mp4") if encoded else ("application/octet-stream", "*")
    return {
        "@type": "cr:FileSet",
        "@id": "videos",
        "name": "videos",
        "description": "The clips." if encoded else "The sources that the clips are stretches of.",
        "containedIn": [{"@id": tar["@id"]} for tar in tars],
        "encodingFormat": kind,
        "includes": wanted,
        "cr:excludes": "*.json",  # the specification's context has no short name for it
    }


def _file(place: str, kind: str, size: int, sha256: str) -> dict[str, str]:
    return {
        "@type": "cr:FileObject",
        "@id": place,
        "name": place,
        "contentUrl": place,
        "contentSize": f"{size} B",
        "encodingFormat": kind,
        "sha256": sha256,
    }


def _column(field: pa.Field) -> dict[str, Any]:
    assert field.name in MEANINGS, f"clips.parquet has a column {field.name}; say in describe.MEANINGS what it is"
    return {
        "@type": "cr:Field",
        "@id": f"clips/{field.name}",
        "name": f"clips/{field.name}",
        "description": MEANINGS[field.name],
        "dataType": _data_type(field.type),
        "source": {"fileObject": {"@id": "clips.parquet"}, "extract": {"column": field.name}},
    }


def _data_type(of: pa.DataType) -> str:
    from pyarrow import types

    kinds = {
        "sc:Text": types.is_string(of) or types.is_large_string(of),
        "sc:Integer": types.is_integer(of),
        "sc:Float": types.is_floating(of),
        "sc:Boolean": types.is_boolean(of),
    }
    assert any(kinds.values()), f"a column of {of}; needed text, whole numbers, numbers or truth values"
    return next(name for name, fits in kinds.items() if fits)
