"""SAMPLE, PREDICTIONS -> PICTURES: the panels of each task, and pages of panels with captions.

Pictures are uint8 `H W 3`, panels `T H W 3`. Clips are enlarged by whole numbers, so that a pixel stays a pixel. Lines
over them are drawn FINE times larger and averaged. Equal inputs give equal bytes.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scaling4d.readout import metrics
from scaling4d.records import Sample

PANEL_PX = 192  # the side that a small clip is enlarged to, about
FINE = 3  # pixels of an overlay in a pixel of the picture, along each axis
COLOURS = ((31, 119, 180), (214, 92, 0), (44, 140, 44), (148, 80, 189), (140, 86, 75))  # of encoders, in order
TRUE, INK, PALE, PAPER = (0, 0, 0), (40, 40, 40), (205, 205, 205), (255, 255, 255)
UNKNOWN = (128, 128, 128)  # where depth was not measured
WORST = 0.5  # relative error of depth at the end of the scale
STEPS = 20  # of a scale of colours, so that a picture stays small
CLASSES = 5  # shown of all
PAGE_PX, MARGIN, GAP = 1280, 14, 8

Colour = tuple[int, int, int]
Cell = tuple[str, np.ndarray]  # caption and picture


@dataclass(frozen=True)
class Panel:
    """Pictures `T H W 3` under one name. still: a contact sheet shows the last picture alone."""

    name: str
    pictures: np.ndarray
    still: bool = False


class Overlay:
    """Lines over a picture. Coordinates are FINE times the picture's; widths are in pixels of the picture."""

    def __init__(self, picture: np.ndarray) -> None:
        height, width = picture.shape[:2]
        self.picture, self.layer = picture, Image.new("RGBA", (FINE * width, FINE * height))
        self.draw = ImageDraw.Draw(self.layer)

    def line(self, places: Iterable[Sequence[float]], colour: Colour, width: float) -> None:
        self.draw.line([tuple(place) for place in places], fill=colour, width=round(width * FINE))

    def rectangle(self, box: np.ndarray, colour: Colour) -> None:
        """box: x1 y1 x2 y2; a box with its corners exchanged becomes a line."""
        x1, y1, x2, y2 = map(float, box)
        self.draw.rectangle([x1, y1, max(x1, x2), max(y1, y2)], outline=colour, width=round(2 * FINE))

    def dashes(self, a: tuple[float, float], b: tuple[float, float], colour: Colour) -> None:
        length, dash = math.dist(a, b), 4 * FINE
        for start in np.arange(0, length, 2 * dash):
            shares = (min(start / length, 1), min((start + dash) / length, 1))
            self.line([[p + (q - p) * share for p, q in zip(a, b, strict=True)] for share in shares], colour, 1.4)

    def disc(self, place: np.ndarray, colour: Colour, *, full: bool) -> None:
        """A disc, or a ring."""
        (x, y), r = place, 4 * FINE
        outline, width = TRUE if full else colour, round(1.3 * FINE)
        self.draw.ellipse([x - r, y - r, x + r, y + r], fill=colour if full else None, outline=outline, width=width)

    def trail(self, track: np.ndarray, visible: np.ndarray, colour: Colour) -> None:
        """Lines between places that follow one another and are both visible."""
        for a, b, both in zip(track, track[1:], visible[1:] & visible[:-1], strict=False):
            if both:
                self.line([a, b], colour, 1.6)

    def merged(self) -> np.ndarray:
        height, width = self.picture.shape[:2]
        merged = Image.fromarray(self.picture).convert("RGBA")
        merged.alpha_composite(self.layer.resize((width, height), Image.Resampling.BOX))
        return np.asarray(merged.convert("RGB"))


# ---- panels: one function a task; `predicted` is by encoder ----


def actions(sample: Sample, predicted: Mapping[str, np.ndarray], *, classes: Sequence[str]) -> list[Panel]:
    """predicted: logits `classes`. Probabilities of the likeliest classes; the true one is marked, never left out.

    The likeliest class is marked as right or wrong.
    """
    frames = enlarge(sample.pixels)
    true, side = int(sample.labels["action"]), frames.shape[1]
    panels = [Panel("clip", frames)]
    for name, logits in predicted.items():
        share = np.exp(logits.astype(np.float64) - logits.max())
        share /= share.sum()
        shown = np.argsort(-share, kind="stable")[:CLASSES].tolist()
        if true not in shown:
            shown[-1] = true
        marks = ["right" if shown[0] == true else "wrong", *("true" if i == true else "" for i in shown[1:])]
        rows = [(classes[i], share[i], i == true, mark) for i, mark in zip(shown, marks, strict=True)]
        panels.append(Panel(name, _bars(rows, side)[None], still=True))
    return panels


def boxes(sample: Sample, predicted: Mapping[str, np.ndarray]) -> list[Panel]:
    """predicted: `Q T 4`. Every object has its colour; a true box beside a predicted one is dashed and white."""
    frames, labelled = enlarge(sample.pixels), sample.valid["boxes"]
    side, true = frames.shape[1], FINE * (sample.labels["boxes"] * frames.shape[1])
    overlays = [Overlay(frame) for frame in frames]
    for q, t in np.argwhere(labelled):
        overlays[t].rectangle(true[q, t], hue(q, len(true)))
    panels = [Panel("truth", _merged(overlays))]
    for name, tracks in predicted.items():
        overlays = [Overlay(frame) for frame in frames]
        for q, t in np.argwhere(labelled[: len(tracks)]):
            x1, y1, x2, y2 = true[q, t]
            corners = ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
            for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
                overlays[t].dashes(a, b, PAPER)
            if t:  # the first box is given
                overlays[t].rectangle(FINE * side * tracks[q, t], hue(q, len(true)))
        panels.append(Panel(name, _merged(overlays)))
    return panels


def depth(sample: Sample, predicted: Mapping[str, np.ndarray], *, near_m: float, far_m: float) -> list[Panel]:
    """predicted: `T H W` metres. Depths on one scale of colours; errors relative to the truth, grey where unknown."""
    true, known = sample.labels["depth_m"], sample.valid["depth_m"]
    pictures = [("clip", sample.pixels), ("true depth", coloured("turbo", (true - near_m) / (far_m - near_m), known))]
    for name, depth_m in predicted.items():
        error = np.abs(depth_m - true) / np.where(known, true, 1)
        pictures.append((name, coloured("turbo", (depth_m - near_m) / (far_m - near_m))))
        pictures.append((f"{name}: error", coloured("inferno", error / WORST, known)))
    return [Panel(name, enlarge(picture)) for name, picture in pictures]


def points(sample: Sample, predicted: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> list[Panel]:
    """predicted: places `Q T 2` and visible `Q T`. Discs with the trail behind them; rings for predicted occlusion."""
    frames = enlarge((sample.pixels * 0.6).astype(np.uint8))
    true, visible, scale = sample.labels["points"], sample.valid["points"], FINE * frames.shape[1]
    overlays = [Overlay(frame) for frame in frames]
    for q, track in enumerate(scale * true):
        for t, overlay in enumerate(overlays):
            overlay.trail(track[: t + 1], visible[q], hue(q, len(true)))
            if visible[q, t]:
                overlay.disc(track[t], hue(q, len(true)), full=True)
    panels = [Panel("truth", _merged(overlays))]
    for name, (places, seen) in predicted.items():
        tracks = np.concatenate([true[: len(places), :1], places[: len(true), 1:]], axis=1)  # the first place is given
        overlays = [Overlay(frame) for frame in frames]
        for q, track in enumerate(scale * tracks):
            for t, overlay in enumerate(overlays):
                overlay.trail(track[: t + 1], np.ones(len(track), bool), hue(q, len(true)))
                if visible[q, t]:
                    overlay.line([track[t], scale * true[q, t]], PAPER, 1.2)
                overlay.disc(track[t], hue(q, len(true)), full=bool(seen[q, t]))
        panels.append(Panel(name, _merged(overlays)))
    return panels


def pose(sample: Sample, predicted: Mapping[str, np.ndarray]) -> list[Panel]:
    """predicted: `3 4`, the last camera seen from the first. The true path and the end, from above and from the side.

    Both views have the first camera at the start of the path, looking along z: from above x is right and z up, from the
    side z is right and y down, as in the picture.
    """
    frames, tracked = enlarge(sample.pixels), sample.valid["camera_to_world"]
    cameras = sample.labels["camera_to_world"]
    path = np.stack([metrics.relative_pose(cameras, source=0, target=t) for t in range(len(cameras))])
    ends = [metrics.nearest_rotation(end.astype(np.float64)) for end in predicted.values()]
    side, panels = frames.shape[1], [Panel("clip", frames)]
    for name, axes, signs in (("from above", [0, 2], [1, -1]), ("from the side", [2, 1], [1, 1])):
        pictures = _camera_views(path, tracked, ends, side, axes=axes, signs=np.array(signs))
        panels.append(Panel(name, pictures, still=True))
    return panels


def _camera_views(
    path: np.ndarray, tracked: np.ndarray, ends: list[np.ndarray], side: int, *, axes: list[int], signs: np.ndarray
) -> np.ndarray:
    """`T side side 3`: the path `T 3 4` up to each frame, and the ends. axes, signs: of right and down."""
    places = np.concatenate([path[tracked, :, 3], *(end[None, :, 3] for end in ends)])
    low, high = places.min(0), places.max(0)
    span = max(float((high - low).max()), 1e-3)  # the same for every view
    middle, px = ((low + high) / 2)[axes] * signs, 0.56 * side / span

    def project(place: np.ndarray) -> tuple[float, float]:
        return tuple(FINE * (side / 2 + px * (place[axes] * signs - middle)))

    def draw_camera(overlay: Overlay, camera: np.ndarray, colour: Colour) -> None:
        """The field of view, 60 degrees wide, of a camera `3 4` that looks along its z."""
        apex, reach = camera[:, 3], 0.16 * side / px
        spread = camera[:, axes[0] if axes[0] != 2 else axes[1]] * math.tan(math.radians(30))
        x, y = tip = project(apex)
        left, right = (project(apex + reach * (camera[:, 2] + sign * spread)) for sign in (-1, 1))
        overlay.line([left, tip, right], colour, 1.6)
        r = 2.5 * FINE
        overlay.draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)

    power = 10.0 ** math.floor(math.log10(span / 2))
    bar = max(step * power for step in (1, 2, 5) if step * power <= span / 2)  # a round length
    pictures = []
    for t in range(len(path)):
        overlay = Overlay(np.zeros((side, side, 3), np.uint8))
        overlay.draw.rectangle([0, 0, FINE * side - 1, FINE * side - 1], fill=PAPER, outline=PALE, width=FINE)
        draw_camera(overlay, path[0], PALE)
        for colour, end in zip(cycle(COLOURS), ends, strict=False):
            a, b = project(path[0, :, 3]), project(end[:, 3])
            if a != b:
                overlay.dashes(a, b, colour)
            draw_camera(overlay, end, colour)
        overlay.line([project(place) for place in path[: t + 1][tracked[: t + 1], :, 3]], TRUE, 2)
        if tracked[t]:
            draw_camera(overlay, path[t], TRUE)
        x, y = 8 * FINE, FINE * (side - 8)
        overlay.line([(x, y), (x + FINE * bar * px, y)], INK, 1.6)
        picture = Image.fromarray(overlay.merged())
        ImageDraw.Draw(picture).text((8, side - 24), f"{bar:g}", fill=INK, font=_font(11))
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


def _bars(rows: list[tuple[str, float, bool, str]], side: int) -> np.ndarray:
    """Bars of names, probabilities, truth and marks; `side` high and one and a half times as wide."""
    font, width, step = _font(11), 3 * side // 2, side / CLASSES
    image, right = Image.new("RGB", (width, side), PAPER), width - 96
    draw = ImageDraw.Draw(image)
    for row, (name, share, true, mark) in enumerate(rows):
        y = round(row * step)
        draw.rectangle([0, y + 3, max(1, round(share * right)), y + 11], fill=COLOURS[2] if true else (150, 150, 150))
        draw.text((right + 6, y), f"{share:.3f} {mark}", fill=INK, font=font)
        for line, text in enumerate(_wrapped(name, width, font, lines=max(1, int(step - 14) // 12))):
            draw.text((0, y + 13 + 12 * line), text, fill=TRUE if true else INK, font=font)
    return np.asarray(image)


def enlarge(pictures: np.ndarray) -> np.ndarray:
    """`T H W 3` -> `T kH kW 3`, every pixel k x k, so that the side is about PANEL_PX."""
    k = max(1, round(PANEL_PX / pictures.shape[1]))
    return pictures.repeat(k, axis=1).repeat(k, axis=2)


def _merged(overlays: list[Overlay]) -> np.ndarray:
    return np.stack([overlay.merged() for overlay in overlays])


# ---- colours ----


def hue(index: int, count: int) -> Colour:
    """One of `count` colours around the wheel."""
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(index / max(count, 1), 0.85, 1.0))


def coloured(scale: str, share: np.ndarray, known: np.ndarray | bool = True) -> np.ndarray:
    """`...` -> uint8 `... 3`, a colour scale from 0 to 1. Values outside take its ends; unknown ones are grey."""
    steps = np.round(np.clip(np.nan_to_num(share), 0, 1) * STEPS) / STEPS
    return np.where(np.asarray(known)[..., None], mpl.colormaps[scale](steps, bytes=True)[..., :3], np.uint8(UNKNOWN))


def depth_scales(near_m: float, far_m: float) -> list[Cell]:
    """Keys to the colours of `depth`."""
    captions = (f"depth: {near_m:.2g} m to {far_m:.2g} m", f"error / true depth: 0 to {WORST:g} and more")
    strips = (coloured(scale, np.linspace(0, 1, 2 * PANEL_PX)) for scale in ("turbo", "inferno"))
    return [(caption, np.repeat(strip[None], 12, axis=0)) for caption, strip in zip(captions, strips, strict=True)]


# ---- pages ----


def sheet_rows(panels: Sequence[Panel], chosen: Sequence[int], rate_hz: float) -> list[list[Cell]]:
    """A row of panels for each chosen frame. Frames of a single moving panel share a row with the still panels."""
    moving, rows = [panel for panel in panels if not panel.still], []
    for t in chosen:
        captions = [f"{moving[0].name}, {t / rate_hz:.2f} s", *(panel.name for panel in moving[1:])]
        rows.append([(caption, panel.pictures[t]) for caption, panel in zip(captions, moving, strict=True)])
    if len(moving) > 1:
        return rows
    return [[cell for row in rows for cell in row] + [(panel.name, panel.pictures[-1]) for panel in panels if panel.still]]


def movie_row(panels: Sequence[Panel], t: int) -> list[Cell]:
    """Every panel at frame t."""
    return [(panel.name, panel.pictures[min(t, len(panel.pictures) - 1)]) for panel in panels]


def block(heading: str, rows: Sequence[Sequence[Cell]]) -> np.ndarray:
    """A clip on the page: uint8 `H W 3`."""
    return _joined([_text(heading, 12, bold=True), *(_captioned(row) for row in rows)], axis=0, gap=2)


def page(title: str, lines: list[str], blocks: list[np.ndarray], notes: Sequence[str], keys: list[Cell]) -> np.ndarray:
    """uint8 `H W 3` of even sides.

    Args:
        lines: below the title, each in its encoder's colour. blocks: as many side by side as fit in PAGE_PX.
        notes, keys: the meaning of the drawings, below all blocks.
    """
    columns = max(1, PAGE_PX // max(picture.shape[1] for picture in blocks))
    head = [_text(title, 15, bold=True), *(_text(line, 12, colour) for line, colour in zip(lines, cycle(COLOURS), strict=False))]
    body = [_joined(blocks[at : at + columns], axis=1, gap=3 * GAP) for at in range(0, len(blocks), columns)]
    foot = [*(_text(note, 11) for note in notes), *([_captioned(keys)] if keys else [])]
    parts = _joined([_joined(head, axis=0, gap=2), *body, _joined(foot, axis=0, gap=2)], axis=0, gap=2 * GAP)
    margins = [(MARGIN, MARGIN + length % 2) for length in parts.shape[:2]]
    return np.pad(parts, (*margins, (0, 0)), constant_values=PAPER[0])


def _captioned(cells: Sequence[Cell]) -> np.ndarray:
    """Cells side by side."""
    return _joined([_joined([_text(caption, 11), picture], axis=0, gap=1) for caption, picture in cells], axis=1, gap=GAP)


def _text(text: str, size: int, colour: Colour = INK, *, bold: bool = False) -> np.ndarray:
    """A line, as wide as its letters."""
    font = _font(size, bold=bold)
    image = Image.new("RGB", (math.ceil(font.getlength(text)) + 1, size + 5), PAPER)
    ImageDraw.Draw(image).text((0, 1), text, fill=colour, font=font)
    return np.asarray(image)


def _joined(pictures: Sequence[np.ndarray], *, axis: int, gap: int) -> np.ndarray:
    """Pictures one below the other (axis 0) or side by side (axis 1), aligned at the left or the top."""
    starts = np.cumsum([0, *(picture.shape[axis] + gap for picture in pictures)]).tolist()
    shape = [max(picture.shape[side] for picture in pictures) for side in (0, 1)]
    shape[axis] = starts[-1] - gap
    paper = np.full((*shape, 3), PAPER, np.uint8)
    for start, picture in zip(starts, pictures, strict=False):
        top, left = (start, 0) if axis == 0 else (0, start)
        paper[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return paper


@cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """A font that comes with matplotlib, so that letters look the same everywhere."""
    path = Path(mpl.get_data_path(), "fonts/ttf", "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont, *, lines: int) -> list[str]:
    """At most so many lines; a text that does not fit ends in an ellipsis."""
    wrapped = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width or not wrapped[-1]:
            wrapped[-1] = longer
        elif len(wrapped) < lines:
            wrapped.append(word)
        else:
            while font.getlength(f"{wrapped[-1]}…") > width:
                wrapped[-1] = wrapped[-1][:-1]
            wrapped[-1] += "…"
            break
    return wrapped
