"""What a corpus holds: its numbers (`datasheet`), a figure of them, and Croissant metadata for data catalogues."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from scaling4d import artifacts
from scaling4d.clips.duplicates import SPLITS

STYLE = {
    "svg.hashsalt": "scaling4d",
    "svg.fonttype": "path",  # the same picture wherever it is opened
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.bottom"), False),
    "legend.frameon": False,
}
HISTOGRAMS = {  # title of each panel, in order; lower edges of its bars, None: a bar for each value
    "codec": ("sources by codec", None),
    "rotation_deg": ("sources by rotation (degrees)", None),
    "shorter_side_px": ("sources by shorter side (px)", (0, 64, 128, 240, 360, 720, 1080)),
    "rate_hz": ("sources by rate (Hz)", (0, 8, 12, 16, 24, 30, 60)),
    "duration_s": ("sources by duration (s)", (0, 1, 2, 5, 10, 30, 60, 300, 3600)),
    "clips_per_source": ("sources by number of clips", (1, 2, 3, 5, 10, 100, 1000)),
}
CROISSANT_TERMS = """citeAs column extract field fileProperty fileObject fileSet format includes isLiveDataset jsonPath key md5
parentField path recordSet references regex repeated replace separator source subField transform"""
CONTEXT = {  # https://docs.mlcommons.org/croissant/docs/croissant-spec.html, Appendix 1
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in CROISSANT_TERMS.split()},
}
DATA_TYPES = {"string": "sc:Text", "int64": "sc:Integer", "double": "sc:Float", "bool": "sc:Boolean"}
COLUMNS = {  # of clips.parquet, and their descriptions
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


def datasheet(corpus: Path) -> dict[str, Any]:
    """Counts of files, clips, hours and reasons, and HISTOGRAMS, from a folder's clips.parquet and rejected.parquet."""
    import pyarrow.parquet as pq

    header = ["rotation_deg", "height_px", "width_px", "rate_hz", "duration_s"]
    names = ["split", "source", "rate_hz", "codec", *(f"source_{name}" for name in header)]
    clips = pq.read_table(corpus / "clips.parquet", columns=[*names, "frames"])
    sources = clips.group_by(names).aggregate([([], "count_all"), ("frames", "sum")]).to_pydict()
    rejected = pq.read_table(corpus / "rejected.parquet", columns=["scope", "reason"]).to_pylist()
    reasons = {scope: Counter(row["reason"] for row in rejected if row["scope"] == scope) for scope in ("file", "span")}
    used, unused = len(sources["source"]), reasons["file"].total()
    clips_of = Counter(clips["split"].to_pylist())
    frames_of: Counter[str] = Counter()
    for split, frames in zip(sources["split"], sources["frames_sum"], strict=True):
        frames_of[split] += frames
    values = {
        "codec": sources["codec"],
        "rotation_deg": map(str, sources["source_rotation_deg"]),
        "shorter_side_px": map(min, sources["source_height_px"], sources["source_width_px"]),
        "rate_hz": sources["source_rate_hz"],
        "duration_s": sources["source_duration_s"],
        "clips_per_source": sources["count_all"],
    }
    histograms = {name: dict(Counter(values[name])) for name, (_, edges) in HISTOGRAMS.items() if not edges}
    for name, edges in ((name, edges) for name, (_, edges) in HISTOGRAMS.items() if edges):
        bins = Counter(np.searchsorted(edges, list(values[name]), side="right").tolist())
        ranges = [f"{low} to {high}" for low, high in pairwise(edges)] + [f"{edges[-1]} and more"]
        histograms[name] = {label: bins[number] for number, label in enumerate(ranges, 1)}
    return {
        "files": {"found": used + unused, "used": used, "rejected": unused},
        "rejected_files": dict(reasons["file"]),
        "rejected_spans": dict(reasons["span"]),
        "clips": dict(clips_of),
        "hours": {split: frames_of[split] / sources["rate_hz"][0] / 3600 for split in SPLITS},
        "sources": {split: sources["split"].count(split) for split in SPLITS},
        "histograms": histograms,
    }


def datasheet_svg(sheet: Mapping[str, Any]) -> str:
    """A panel of bars for each histogram of `datasheet`, and one for the reasons of rejection.

    Equal numbers give equal bytes, whether the sheet comes from `datasheet` or from its file.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    histograms, reasons = sheet["histograms"], Counter(sheet["rejected_files"]) + Counter(sheet["rejected_spans"])
    lines = list(HISTOGRAMS)[:3], list(HISTOGRAMS)[3:]
    rows = {name: max(len(histograms[other]) for other in line) for line in lines for name in line}
    rows["reasons"] = max(sum(rows[line[0]] for line in lines), 2 * len(reasons)) / 2
    with mpl.rc_context():
        mpl.rcdefaults()  # not the machine's own matplotlibrc
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=(12, 1.7 + 0.38 * rows["reasons"]), layout="constrained")
        panels = figure.subplot_mosaic([[*line, "reasons"] for line in lines], width_ratios=(1, 1, 1, 1.3))
        for name, (title, _) in HISTOGRAMS.items():
            names = _by_count(histograms[name])
            if name != "codec":
                names = sorted(names, key=lambda name: float(name.split()[0]))
            _draw_bars(panels[name], title, {"sources": histograms[name]}, names, rows[name])
        rejected = {"whole files": sheet["rejected_files"], "spans of files": sheet["rejected_spans"]}
        _draw_bars(panels["reasons"], "rejected, by reason", rejected, _by_count(reasons), rows["reasons"])
        panels["reasons"].legend(loc="lower right")
        figure.suptitle(_summary(sheet), fontsize=9)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _draw_bars(axes: Any, title: str, series: Mapping[str, Mapping[str, int]], names: list[str], rows: float) -> None:
    """A row for each name, from the top, on a panel as high as `rows`; in it a bar and its count for each series."""
    height = 0.8 / len(series)
    for index, (label, counts) in enumerate(series.items()):
        centres = np.arange(len(names)) - 0.4 + height * (index + 0.5)
        bars = axes.barh(centres, [counts.get(name, 0) for name in names], height, label=label)
        axes.bar_label(bars, [f"{counts[name]:,}" if counts.get(name) else "" for name in names], padding=2)
    axes.set_title(title, loc="left")
    axes.set_yticks(range(len(names)), names)
    longest = max([1, *(count for counts in series.values() for count in counts.values())])
    axes.set(xlim=(0, 1.25 * longest), ylim=(rows - 0.4, -0.6))
    axes.tick_params(left=False)
    axes.xaxis.set_visible(False)


def _by_count(counts: Mapping[str, int]) -> list[str]:
    return sorted(counts, key=lambda name: (-counts[name], name))


def _summary(sheet: Mapping[str, Any]) -> str:
    clips = " and ".join(f"{sheet['clips'].get(s, 0):,} for {s} ({sheet['hours'][s]:.2f} h)" for s in SPLITS)
    return f"{sheet['files']['found']:,} files found, {sheet['files']['used']:,} used; clips: {clips}"


def croissant(corpus: Path, sheet: Mapping[str, Any], *, encoded: bool) -> dict[str, Any]:
    """Croissant 1.0 metadata (JSON-LD) of a folder with `clips.parquet` and `shards/*.tar`, to be written into it.

    Equal corpora give equal content, without dates and addresses. A publisher replaces `license` and adds the fields
    that a program cannot know: `url`, `creator`, `datePublished`. sheet: of the corpus. encoded: the tars hold clips as
    mp4; otherwise whole sources of any format. Source: https://docs.mlcommons.org/croissant/docs/croissant-spec.html
    """
    import pyarrow.parquet as pq

    table = _file(corpus, "clips.parquet", "application/x-parquet")
    tars = [_file(corpus, f"shards/{path.name}", "application/x-tar") for path in sorted((corpus / "shards").iterdir())]
    videos = {"@type": "cr:FileSet", "@id": "videos", "name": "videos", "containedIn": [{"@id": tar["@id"]} for tar in tars]}
    videos["cr:excludes"] = "*.json"  # that name the sources; the specification's context has no short name for it
    if encoded:
        videos |= {"description": "The clips.", "encodingFormat": "video/mp4", "includes": "*.mp4"}
    else:
        videos |= {"encodingFormat": "application/octet-stream", "includes": "*"}
        videos["description"] = "The sources that the clips are stretches of."
    records = {"@type": "cr:RecordSet", "@id": "clips", "name": "clips", "key": {"@id": "clips/id"}}
    records["description"] = "One record a clip: where it lies in the shards, and what it was taken from."
    records["field"] = [_field(column.name, str(column.type)) for column in pq.read_schema(corpus / "clips.parquet")]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": "scaling4d-clips",
        "description": f"Short video clips of one length, rate and size, found in a folder of videos. {_summary(sheet)}.",
        "license": "that of the source videos",
        "distribution": [table, *tars, videos],
        "recordSet": [records],
    }


def _file(corpus: Path, name: str, encoding: str) -> dict[str, str]:
    size, sha256 = (corpus / name).stat().st_size, artifacts.sha256(corpus / name)
    names = dict.fromkeys(("@id", "name", "contentUrl"), name)
    return {"@type": "cr:FileObject", **names, "contentSize": f"{size} B", "encodingFormat": encoding, "sha256": sha256}


def _field(name: str, kind: str) -> dict[str, Any]:
    names = dict.fromkeys(("@id", "name"), f"clips/{name}")
    source = {"fileObject": {"@id": "clips.parquet"}, "extract": {"column": name}}
    return {"@type": "cr:Field", **names, "description": COLUMNS[name], "dataType": DATA_TYPES[kind], "source": source}
