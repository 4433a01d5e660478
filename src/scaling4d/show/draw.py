"""SAMPLE, PREDICTIONS -> PICTURES: the panels of each task, and pages of panels with their captions.

Pictures are uint8 `H W 3`, panels `T H W 3`. Clips are enlarged by whole numbers, so that a pixel stays a pixel; what is drawn
over them is drawn at three times the size and averaged. Equal input gives equal bytes.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Mapping, Sequence
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
FINE = 3  # how much finer lines are drawn than shown
COLOURS = ((31, 119, 180), (214, 92, 0), (44, 140, 44), (148, 80, 189), (140, 86, 75))  # of encoders, in order
TRUE, INK, PALE, PAPER = (0, 0, 0), (40, 40, 40), (205, 205, 205), (255, 255, 255)
UNKNOWN = (128, 128, 128)  # where depth was not measured
WORST = 0.5  # relative error of depth at the end of the scale
STEPS = 20  # of a scale of colours, so that a picture stays small
CLASSES = 5  # shown of all
PAGE_PX, MARGIN, GAP = 1280, 14, 8

Colour = tuple[int, int, int]
Brush = Callable[[ImageDraw.ImageDraw, float], None]  # draws on a layer that is so many times finer than the picture


@dataclass(frozen=True)
class Panel:
    """What stands under one name beside a clip: uint8 `T H W 3`. still: a contact sheet shows the last picture alone."""

    name: str
    pictures: np.ndarray
    still: bool = False


@dataclass(frozen=True)
class Cell:
    """A picture on a page, and what is written above it."""

    caption: str
    picture: np.ndarray


# ---- panels: one function a task; `said` is what each encoder's readout says of the clip ----


def actions(sample: Sample, said: Mapping[str, np.ndarray], *, classes: Sequence[str]) -> list[Panel]:
    """said: logits `classes`. The likeliest classes with their probabilities; the true one is marked, and never left out."""
    frames = enlarge(sample.pixels)
    true, side = int(sample.labels["action"]), frames.shape[1]
    panels = [Panel("clip", frames)]
    for name, logits in said.items():
        share = np.exp(logits.astype(np.float64) - logits.max())
        share /= share.sum()
        order = np.argsort(-share, kind="stable")
        shown = order[:CLASSES].tolist()
        if true not in shown:
            shown[-1] = true
        panels.append(Panel(name, _bars([(classes[i], share[i], i == true) for i in shown], side)[None], still=True))
    return panels


def boxes(sample: Sample, said: Mapping[str, np.ndarray]) -> list[Panel]:
    """said: `Q T 4`. Every thing has its colour; a true box is dashed and white beside a predicted one."""
    frames, there = enlarge(sample.pixels), sample.valid["boxes"]
    side = frames.shape[1]
    true = sample.labels["boxes"] * side

    def truth(t: int) -> Brush:
        def brush(draw: ImageDraw.ImageDraw, fine: float) -> None:
            for q in np.flatnonzero(there[:, t]):
                draw.rectangle(_corners(fine * true[q, t]), outline=hue(q, len(true)), width=round(2 * fine))

        return brush

    def beside(t: int, predicted: np.ndarray) -> Brush:
        def brush(draw: ImageDraw.ImageDraw, fine: float) -> None:
            for q in np.flatnonzero(there[: len(predicted), t]):
                x1, y1, x2, y2 = fine * true[q, t]
                for a, b in (((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x2, y2), (x1, y2)), ((x1, y2), (x1, y1))):
                    _dashed(draw, a, b, PAPER, fine)
                if t:
                    draw.rectangle(_corners(fine * side * predicted[q, t]), outline=hue(q, len(true)), width=round(2 * fine))

        return brush

    T = len(frames)
    panels = [Panel("truth", np.stack([over(frames[t], truth(t)) for t in range(T)]))]
    for name, predicted in said.items():
        panels.append(Panel(name, np.stack([over(frames[t], beside(t, predicted)) for t in range(T)])))
    return panels


def depth(sample: Sample, said: Mapping[str, np.ndarray], *, near_m: float, far_m: float) -> list[Panel]:
    """said: `T H W` metres. All depths on one scale of colours; errors relative to the truth, grey where that is unknown."""
    true, known = sample.labels["depth_m"], sample.valid["depth_m"]
    panels = [Panel("clip", enlarge(sample.pixels)), Panel("true depth", enlarge(_masked(metres(true, near_m, far_m), known)))]
    for name, predicted in said.items():
        error = np.abs(predicted - true) / np.where(known, true, 1)
        panels.append(Panel(name, enlarge(metres(predicted, near_m, far_m))))
        panels.append(Panel(f"{name}: error", enlarge(_masked(errors(error), known))))
    return panels


def points(sample: Sample, said: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> list[Panel]:
    """said: places `Q T 2` and seen `Q T`. Discs with the trail behind them; a ring where the point is said to be hidden."""
    frames = enlarge(_dimmed(sample.pixels))
    side = frames.shape[1]
    true, visible = sample.labels["points"], sample.valid["points"]

    def truth(t: int) -> Brush:
        def brush(draw: ImageDraw.ImageDraw, fine: float) -> None:
            for q, track in enumerate(fine * side * true):
                _trail(draw, track[: t + 1], visible[q, : t + 1], hue(q, len(true)), fine)
                if visible[q, t]:
                    _disc(draw, track[t], hue(q, len(true)), fine, full=True)

        return brush

    def beside(t: int, places: np.ndarray, seen: np.ndarray) -> Brush:
        def brush(draw: ImageDraw.ImageDraw, fine: float) -> None:
            for q, track in enumerate(fine * side * places[: len(true)]):
                colour = hue(q, len(true))
                _trail(draw, track[: t + 1], np.ones(t + 1, bool), colour, fine)
                if visible[q, t]:
                    draw.line([tuple(track[t]), tuple(fine * side * true[q, t])], fill=PAPER, width=round(1.2 * fine))
                _disc(draw, track[t], colour, fine, full=bool(seen[q, t]))

        return brush

    T = len(frames)
    panels = [Panel("truth", np.stack([over(frames[t], truth(t)) for t in range(T)]))]
    for name, (places, seen) in said.items():
        tracks = np.concatenate([true[: len(places), :1], places[: len(true), 1:]], axis=1)  # the first place is given
        panels.append(Panel(name, np.stack([over(frames[t], beside(t, tracks, seen)) for t in range(T)])))
    return panels


def pose(sample: Sample, said: Mapping[str, np.ndarray], *, true: np.ndarray) -> list[Panel]:
    """said: `3 4`, the last camera seen from the first. The true path and the predicted end, from above and from the side.

    true: `3 4`, what was to be said; the path is drawn at its scale, which need not be the sample's.
    Both views have the first camera at the start of the path, looking along z: from above x is right and z up, from the side z is
    right and y down, as in the picture.
    """
    frames, tracked = enlarge(sample.pixels), sample.valid["camera_to_world"]
    cameras = sample.labels["camera_to_world"]
    path = np.stack([metrics.relative_pose(cameras, source=0, target=t) for t in range(len(cameras))])
    way = float(np.linalg.norm(path[-1, :, 3]))
    path[:, :, 3] *= float(np.linalg.norm(true[:, 3])) / way if way else 1.0
    ends = {name: metrics.nearest_rotation(predicted.astype(np.float64)) for name, predicted in said.items()}
    places = np.concatenate([path[tracked, :, 3], *(end[None, :, 3] for end in ends.values())])
    panels = [Panel("clip", frames)]
    for name, across, up in (("from above", (0, 1), (2, 1)), ("from the side", (2, 1), (1, -1))):
        plane = _Plane(places, across, up, frames.shape[1])
        panels.append(Panel(name, np.stack([plane.picture(path, tracked, ends, t) for t in range(len(path))]), still=True))
    return panels


# ---- colours ----


def hue(index: int, count: int) -> Colour:
    """One of `count` colours around the wheel."""
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(index / max(count, 1), 0.85, 1.0))


def metres(depth_m: np.ndarray, near_m: float, far_m: float) -> np.ndarray:
    """`...` -> uint8 `... 3`; nearer or farther than the scale takes its end's colour."""
    return _coloured("turbo", (depth_m - near_m) / (far_m - near_m))


def errors(relative: np.ndarray) -> np.ndarray:
    """`...` -> uint8 `... 3`; no error is black."""
    return _coloured("inferno", relative / WORST)


def depth_scales(near_m: float, far_m: float) -> list[Cell]:
    """What the colours of `depth` mean."""
    ramp = np.linspace(0, 1, 2 * PANEL_PX)
    strips = (metres(near_m + ramp * (far_m - near_m), near_m, far_m), errors(WORST * ramp))
    said = (f"depth: {near_m:.2g} m to {far_m:.2g} m", f"error / true depth: 0 to {WORST:g} and more")
    return [Cell(text, np.repeat(strip[None], 12, axis=0)) for text, strip in zip(said, strips, strict=True)]


def _coloured(scale: str, share: np.ndarray) -> np.ndarray:
    steps = np.round(np.clip(np.nan_to_num(share), 0, 1) * STEPS) / STEPS
    return mpl.colormaps[scale](steps, bytes=True)[..., :3]


def _masked(colours: np.ndarray, known: np.ndarray) -> np.ndarray:
    return np.where(known[..., None], colours, np.uint8(UNKNOWN))


def _dimmed(pixels: np.ndarray) -> np.ndarray:
    return (pixels * 0.6).astype(np.uint8)


# ---- strokes ----


def enlarge(pictures: np.ndarray) -> np.ndarray:
    """`T H W 3` -> `T kH kW 3`, every pixel k x k, so that the side is about PANEL_PX."""
    k = max(1, round(PANEL_PX / pictures.shape[1]))
    return pictures.repeat(k, axis=1).repeat(k, axis=2)


def over(picture: np.ndarray, brush: Brush) -> np.ndarray:
    """What the brush draws, over a picture."""
    height, width = picture.shape[:2]
    layer = Image.new("RGBA", (FINE * width, FINE * height))
    brush(ImageDraw.Draw(layer), FINE)
    whole = Image.fromarray(picture).convert("RGBA")
    whole.alpha_composite(layer.resize((width, height), Image.Resampling.BOX))
    return np.asarray(whole.convert("RGB"))


def _corners(box: np.ndarray) -> list[float]:
    """x1 y1 x2 y2 as PIL wants it: a box turned inside out is a line."""
    x1, y1, x2, y2 = map(float, box)
    return [x1, y1, max(x1, x2), max(y1, y2)]


def _dashed(draw: ImageDraw.ImageDraw, a: tuple, b: tuple, colour: Colour, fine: float) -> None:
    length = math.dist(a, b)
    dash = 4 * fine
    at = lambda far: tuple(p + (q - p) * min(far / length, 1) for p, q in zip(a, b, strict=True))  # noqa: E731
    for start in np.arange(0, length, 2 * dash):
        draw.line([at(start), at(start + dash)], fill=colour, width=round(1.4 * fine))


def _disc(draw: ImageDraw.ImageDraw, place: np.ndarray, colour: Colour, fine: float, *, full: bool) -> None:
    (x, y), r = place, 4 * fine
    draw.ellipse(
        [x - r, y - r, x + r, y + r], fill=colour if full else None, outline=TRUE if full else colour, width=round(1.3 * fine)
    )


def _trail(draw: ImageDraw.ImageDraw, track: np.ndarray, shown: np.ndarray, colour: Colour, fine: float) -> None:
    for a, b, both in zip(track, track[1:], shown[1:] & shown[:-1], strict=False):
        if both:
            draw.line([tuple(a), tuple(b)], fill=colour, width=round(1.6 * fine))


def _bars(rows: list[tuple[str, float, bool]], side: int) -> np.ndarray:
    """Names, probabilities, and which one is true, one below the other; `side` high and twice as wide."""
    font, width, step = _font(11), 3 * side // 2, side / CLASSES
    image = Image.new("RGB", (width, side), PAPER)
    draw = ImageDraw.Draw(image)
    for row, (name, share, true) in enumerate(rows):
        y, colour = round(row * step), COLOURS[2] if true else (150, 150, 150)
        right = width - 96
        draw.rectangle([0, y + 3, max(1, round(share * right)), y + 11], fill=colour)
        draw.text((right + 6, y), f"{share:.3f}" + (" true" if true else ""), fill=INK, font=font)
        for line, text in enumerate(_wrapped(name, width, font, lines=max(1, int(step - 14) // 12))):
            draw.text((0, y + 13 + 12 * line), text, fill=TRUE if true else INK, font=font)
    return np.asarray(image)


class _Plane:
    """A view of places and cameras along one axis: `across` and `up` are (axis, sign) of the picture's two directions."""

    def __init__(self, places: np.ndarray, across: tuple[int, int], up: tuple[int, int], side: int) -> None:
        self.axes, self.signs, self.side = [across[0], up[0]], np.array([across[1], -up[1]]), side
        low, high = places.min(0), places.max(0)
        self.middle = self._flat((low + high) / 2)
        self.span = max(float((high - low).max()), 1e-3)  # the same for every view
        self.px = 0.56 * side / self.span

    def _flat(self, place: np.ndarray) -> np.ndarray:
        return place[..., self.axes] * self.signs

    def _at(self, place: np.ndarray, fine: float) -> np.ndarray:
        return fine * (self.side / 2 + self.px * (self._flat(place) - self.middle))

    def picture(self, path: np.ndarray, tracked: np.ndarray, ends: Mapping[str, np.ndarray], t: int) -> np.ndarray:
        """The path `T 3 4` up to frame t, and where each encoder has it end."""
        bar = _round_length(self.span / 2)

        def brush(draw: ImageDraw.ImageDraw, fine: float) -> None:
            draw.rectangle([0, 0, fine * self.side - 1, fine * self.side - 1], fill=PAPER, outline=PALE, width=round(fine))
            self._camera(draw, path[0], PALE, fine)
            for colour, end in zip(cycle(COLOURS), ends.values(), strict=False):
                a, b = (tuple(self._at(place, fine)) for place in (path[0, :, 3], end[:, 3]))
                if a != b:
                    _dashed(draw, a, b, colour, fine)
                self._camera(draw, end, colour, fine)
            walked = [tuple(self._at(place, fine)) for place in path[: t + 1][tracked[: t + 1], :, 3]]
            draw.line(walked, fill=TRUE, width=round(2 * fine))
            if tracked[t]:
                self._camera(draw, path[t], TRUE, fine)
            x, y = 8 * fine, fine * (self.side - 8)
            draw.line([x, y, x + fine * bar * self.px, y], fill=INK, width=round(1.6 * fine))

        drawn = Image.fromarray(over(np.zeros((self.side, self.side, 3), np.uint8), brush))
        ImageDraw.Draw(drawn).text((8, self.side - 24), f"{bar:g}", fill=INK, font=_font(11))
        return np.asarray(drawn)

    def _camera(self, draw: ImageDraw.ImageDraw, camera: np.ndarray, colour: Colour, fine: float) -> None:
        """The field of view, 60 degrees wide, of a camera `3 4` that looks along its z."""
        reach = 0.16 * self.side / self.px
        apex = camera[:, 3]
        spread = camera[:, self.axes[0] if self.axes[0] != 2 else self.axes[1]] * math.tan(math.radians(30))
        corners = [apex + reach * (camera[:, 2] + sign * spread) for sign in (-1, 1)]
        tips = [tuple(self._at(place, fine)) for place in (apex, *corners)]
        draw.line([tips[1], tips[0], tips[2]], fill=colour, width=round(1.6 * fine))
        x, y = tips[0]
        r = 2.5 * fine
        draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)


def _round_length(most: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not more."""
    power = 10.0 ** math.floor(math.log10(most))
    return max(step * power for step in (1, 2, 5) if step * power <= most)


# ---- pages ----


def sheet_rows(panels: Sequence[Panel], chosen: Sequence[int], rate_hz: float) -> list[list[Cell]]:
    """A row a frame, panels side by side; of a single panel that moves the frames stand in one row, and what is still behind."""
    moving, times = [panel for panel in panels if not panel.still], [f"{t / rate_hz:.2f} s" for t in chosen]
    rows = [
        [Cell(f"{panel.name}, {time}" if at == 0 else panel.name, panel.pictures[t]) for at, panel in enumerate(moving)]
        for t, time in zip(chosen, times, strict=True)
    ]
    if len(moving) > 1:
        return rows
    return [[cell for row in rows for cell in row] + [Cell(panel.name, panel.pictures[-1]) for panel in panels if panel.still]]


def movie_row(panels: Sequence[Panel], t: int) -> list[Cell]:
    """Every panel at frame t."""
    return [Cell(panel.name, panel.pictures[min(t, len(panel.pictures) - 1)]) for panel in panels]


def block(heading: str, rows: Sequence[Sequence[Cell]]) -> np.ndarray:
    """A clip on the page: uint8 `H W 3`."""
    return _pile([_text(heading, 12, bold=True), *(_beside([_captioned(cell) for cell in row]) for row in rows)])


def page(
    title: str, lines: Sequence[str], blocks: Sequence[np.ndarray], notes: Sequence[str], keys: Sequence[Cell]
) -> np.ndarray:
    """uint8 `H W 3` of even sides.

    Args:
        lines: below the title, each in its encoder's colour. blocks: as many side by side as PAGE_PX holds.
        notes, keys: what the drawings mean, below all blocks.
    """
    columns = max(1, PAGE_PX // max(picture.shape[1] for picture in blocks))
    head = [_text(title, 15, bold=True), *(_text(line, 12, colour) for line, colour in zip(lines, cycle(COLOURS), strict=False))]
    body = [_beside(blocks[at : at + columns], gap=3 * GAP) for at in range(0, len(blocks), columns)]
    foot = [*(_text(note, 11) for note in notes), *([_beside([_captioned(key) for key in keys])] if keys else [])]
    parts = _pile([_pile(head), *body, _pile(foot)], gap=2 * GAP)
    height, width = (length + 2 * MARGIN + length % 2 for length in parts.shape[:2])
    return _on_paper([(MARGIN, MARGIN, parts)], height, width)


def _captioned(cell: Cell) -> np.ndarray:
    return _pile([_text(cell.caption, 11), cell.picture], gap=1)


def _text(text: str, size: int, colour: Colour = INK, *, bold: bool = False) -> np.ndarray:
    """A line, as wide as its letters."""
    font = _font(size, bold=bold)
    image = Image.new("RGB", (math.ceil(font.getlength(text)) + 1, size + 5), PAPER)
    ImageDraw.Draw(image).text((0, 1), text, fill=colour, font=font)
    return np.asarray(image)


def _pile(pictures: Sequence[np.ndarray], *, gap: int = 2) -> np.ndarray:
    """One below the other, from the left edge."""
    tops = np.cumsum([0, *(picture.shape[0] + gap for picture in pictures)]).tolist()
    placed = [(top, 0, picture) for top, picture in zip(tops, pictures, strict=False)]
    return _on_paper(placed, tops[-1] - gap, max(picture.shape[1] for picture in pictures))


def _beside(pictures: Sequence[np.ndarray], *, gap: int = GAP) -> np.ndarray:
    """One right of the other, from the upper edge."""
    lefts = np.cumsum([0, *(picture.shape[1] + gap for picture in pictures)]).tolist()
    placed = [(0, left, picture) for left, picture in zip(lefts, pictures, strict=False)]
    return _on_paper(placed, max(picture.shape[0] for picture in pictures), lefts[-1] - gap)


def _on_paper(placed: Sequence[tuple[int, int, np.ndarray]], height: int, width: int) -> np.ndarray:
    """Pictures by their top and left."""
    paper = np.full((height, width, 3), PAPER, np.uint8)
    for top, left, picture in placed:
        paper[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return paper


@cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The one that matplotlib brings along, so that letters look the same everywhere."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = Path(mpl.get_data_path()) / "fonts/ttf" / name
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont, *, lines: int) -> list[str]:
    """At most so many lines; what does not fit ends in an ellipsis."""
    found, left = [""], text.split()
    while left:
        longer = f"{found[-1]} {left[0]}".strip()
        if font.getlength(longer) > width and found[-1]:
            if len(found) == lines:
                while font.getlength(f"{found[-1]}…") > width:
                    found[-1] = found[-1][:-1]
                return [*found[:-1], f"{found[-1]}…"]
            found.append("")
            continue
        found[-1] = longer
        left.pop(0)
    return found
