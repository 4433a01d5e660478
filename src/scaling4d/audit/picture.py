"""The way back of one number as a drawing: a box a stage; svg that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape
from textwrap import wrap
from typing import Any

LINE_PX, LETTER_PX, MARGIN_PX, GAP_PX = 17, 7.3, 12, 36  # of a monospaced line of 12 px
FILL = {"number": "#fff3cd", "weights": "#e3f2e1", "stage": "#f4f6f8", "source": "#e2ecf7"}
Lines = list[tuple[str, str]]  # (shown, in full)


@dataclass(frozen=True)
class Box:
    """Where a stage is drawn, and what is written in it."""

    x: float
    y: float
    lines: Lines
    fill: str

    @property
    def wide(self) -> float:
        return max(len(shown) for shown, _ in self.lines) * LETTER_PX + 2 * MARGIN_PX

    @property
    def high(self) -> float:
        return len(self.lines) * LINE_PX + 1.5 * MARGIN_PX


def svg(found: dict[str, Any]) -> str:
    """What `explain` found: sources at the left, the stages below each other, at the foot the number; the same for the same.

    Settings, versions and whole hashes show where the mouse rests.
    """
    sources = [stage for stage in found["stages"] if not stage["settings"]]
    chain = [stage for stage in reversed(found["stages"]) if stage["settings"]]
    boxes = _column(GAP_PX / 2, [(stage["name"], _box(stage), "source") for stage in sources])
    edge = max((box.x + box.wide for box in boxes.values()), default=0)
    boxes = {name: replace(box, x=edge - box.wide) for name, box in boxes.items()}
    left = edge + 2 * GAP_PX
    kinds = {stage["name"]: "weights" if "/pretrain/" in stage["wrote"][0]["path"] else "stage" for stage in chain}
    stages = [(stage["name"], _box(stage), kinds[stage["name"]]) for stage in chain]
    below = _column(left, [*stages, ("", _number(found), "number")])
    right, names = max(box.x + box.wide for box in below.values()), list(below)
    boxes |= below
    edges = [(maker, stage["name"]) for stage in chain for maker in _makers(found, stage)] + [(chain[-1]["name"], "")]
    drawn, arcs = [], 0
    for start, end in edges:
        if start not in below:
            drawn.append(_path(_right(boxes[start]), _left(boxes[end])))
        elif names.index(end) == names.index(start) + 1:
            drawn.append(f'<path d="M{left + 40:.1f} {boxes[start].y + boxes[start].high:.1f}V{boxes[end].y:.1f}"/>')
        else:
            arcs += 1
            (x1, y1), (x2, y2), out = _right(boxes[start]), _right(boxes[end]), right + 18 * arcs
            drawn.append(
                f'<path d="M{x1:.1f} {y1:.1f}C{out:.1f} {y1:.1f} {out:.1f} {y1:.1f} {out:.1f} {(y1 + y2) / 2:.1f}'
                f'S{out:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"/>'
            )
    wide, high = right + 18 * arcs + GAP_PX / 2, max(box.y + box.high for box in boxes.values()) + GAP_PX / 2
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {high:.0f}" width="{wide:.0f}" height="{high:.0f}"',
            '     font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="12">',
            f"<title>{escape(found['key'])}: where it came from</title>",
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            '<path d="M0 0L8 4L0 8z" fill="#667"/></marker></defs>',
            '<g fill="none" stroke="#667" marker-end="url(#arrow)">',
            *drawn,
            "</g>",
            *map(_draw, boxes.values()),
            "</svg>",
            "",
        ]
    )


def _column(x: float, entries: list[tuple[str, Lines, str]]) -> dict[str, Box]:
    boxes, y = {}, GAP_PX / 2
    for name, lines, fill in entries:
        boxes[name] = Box(x, y, lines, fill)
        y += boxes[name].high + GAP_PX
    return boxes


def _number(found: dict[str, Any]) -> Lines:
    lines = [(found["key"], found["key"])]
    for cell in found["cells"]:
        interval = f" [{', '.join(f'{float(end):.4f}' for end in cell['interval'])}]" if cell["interval"] else ""
        lines.append((f"{cell['name']} = {float(cell['value']):.6g}{interval} {cell['unit']}".rstrip(), cell["value"]))
    lines.append((f"{found['cells'][0]['file']} line {found['cells'][0]['line']}", ""))
    return [*lines, _hash("result", found["result"]["sha256"]), _hash("weights", found["checkpoint"]["sha256"])]


def _box(stage: dict[str, Any]) -> Lines:
    lines = [(stage["name"], stage["name"]), (stage["command"].removeprefix("PYTHONPATH=src "), stage["command"])]
    for file in stage["wrote"] if len(stage["wrote"]) == 1 else ():
        lines += [(f"wrote {file['path']}", file["path"]), _hash("md5", file["md5"])]
    sources = [dep for dep in stage["read"] if not dep["path"].startswith("artifacts/")]
    lines += [(f"read {dep['path']}, md5 {dep['md5'][:8]}", dep["md5"]) for dep in sources]
    if stage["shards"]:
        shards = [name for name in stage["shards"] if name.startswith("shards/")]
        lines.append((f"{len(shards)} shards", "\n".join(f"{name} {stage['shards'][name]}" for name in shards)))
    if stage["settings"]:
        whole = "\n".join(f"{key} = {value}" for key, value in stage["settings"].items())
        lines += [(shown, whole) for shown in wrap(f"settings {', '.join(stage['settings'])}", 60, subsequent_indent="  ")]
    if stage["code"]:
        lines.append(_hash(f"code {stage['code']['room']}", stage["code"]["sha256"]))
    if stage["environment"]:
        facts = stage["environment"]
        versions = "\n".join(f"{name} {version}" for name, version in facts["versions"].items())
        machine = f"{facts['machine']}, {facts['cpus']} cpus, torch {facts['versions']['torch']}"
        lines.append((f"{facts['seconds']:.0f} s on {machine}", versions))
    return lines


def _hash(name: str, sha: str | None) -> tuple[str, str]:
    return (f"{name} {sha[:16]}...", sha) if sha else (f"{name}: not here", "")


def _makers(found: dict[str, Any], stage: dict[str, Any]) -> Iterator[str]:
    """The stages that wrote what a stage read."""
    for other in found["stages"]:
        wrote = [out["path"] for out in other["wrote"]]
        if any(dep["path"] == out or dep["path"].startswith(f"{out}/") for dep in stage["read"] for out in wrote):
            yield other["name"]


def _left(box: Box) -> tuple[float, float]:
    return box.x, box.y + box.high / 2


def _right(box: Box) -> tuple[float, float]:
    return box.x + box.wide, box.y + box.high / 2


def _path(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = start, end
    middle = (x1 + x2) / 2
    return f'<path d="M{x1:.1f} {y1:.1f}C{middle:.1f} {y1:.1f} {middle:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"/>'


def _draw(box: Box) -> str:
    place = f'x="{box.x:.1f}" y="{box.y:.1f}" width="{box.wide:.1f}" height="{box.high:.1f}"'
    texts = [f'<rect {place} rx="6" fill="{FILL[box.fill]}" stroke="#889"/>']
    for index, (shown, full) in enumerate(box.lines):
        place = f'x="{box.x + MARGIN_PX:.1f}" y="{box.y + MARGIN_PX + LINE_PX * (index + 0.6):.1f}"'
        weight = ' font-weight="bold"' if index == 0 else ""
        texts.append(f"<text {place}{weight}>{escape(shown)}<title>{escape(full)}</title></text>")
    return "\n".join(texts)
