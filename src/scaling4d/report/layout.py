"""report.html: its sections in order, with headings, texts and captions. Details are folded."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass

from scaling4d.report import sections
from scaling4d.report.page import Page
from scaling4d.report.run_results import RunResults
from scaling4d.report.verdict import conclusion, measure_rows, rules, verdict
from scaling4d.studies.markup import code_html, html_figure, html_page
from scaling4d.studies.words import encoder_words

TITLE = "Scaling 4D representations, in small"
INTRODUCTION = """<p><small>Video of the profiles pocket and desk is synthetic and small. A point is a model of one size;
<code>dvc repro</code> trains and measures all points. Beside them stand the curves of <i>Scaling 4D Representations</i>
(arXiv:2412.15212) and the method of <i>Masked Autoencoders As Spatiotemporal Learners</i> (arXiv:2205.09113).</small></p>"""
ORIGIN = """<p>Every number comes from a file of a stage. <code>numbers.json</code> beside this page names file and place.
<code>scaling4d audit --explain encoder/task/protocol</code> shows the bytes, settings and code behind a number.
<a href="../studies/index.html">Studies</a> vary single settings.</p>"""
LAWS = (
    "L = E + A (N / unit)^-alpha is fitted to losses and errors, ours and the published ones, by the same code. In brackets: "
    "95 % intervals of a parametric bootstrap. They hold the scatter of the points around the curve, not that of other seeds. "
    "The prediction of the largest point is by the law of all others, with the interval of one new point. It is wide, because "
    "a law has hardly fewer numbers than there are points left to fit them. An interval of the exponent that reaches an end of "
    "the search means that the points do not fix it."
)
FILLED = (
    "Validation clips in which some of the pixels move: each as a looping video with all rows side by side, and as strips of "
    "frames. The same tokens are hidden for every point."
)
FIDELITY = (
    "Errors of hidden pixels, and distances of sets of filled-in and true frames and clips on features of untrained encoders "
    "(no download), unless the column names others. They compare these points, not points of the literature."
)


POINTS = (  # of the headline: of one run, and with a study of seeds
    "our points with 95 % intervals over validation videos",
    "frozen readouts of our points with means and standard deviations over seeds, this run's values as crosses; other "
    "readouts with 95 % intervals over validation videos",
)
BARS = "95 % intervals over validation videos"
VALIDATIONS = (  # of the training's curves, of points that were validated during training
    " Below: measures of validations during training; the last one's are in the table of points. RankMe is the effective rank of "
    "validation clips' mean features (arXiv:2210.02885). Linear probes are fitted to few labelled clips; they do not compare "
    "with those of frozen readouts."
)
FIGURES = {  # name -> what the picture shows, caption; words in braces are those of `figure`
    "headline": (
        "each task over the size of the encoder",
        "Above: {points}. Horizontal lines: the baselines, which saw no video ({baselines}), and the trivial answer, "
        "which looks at no video; an arrow names it where it lies beyond the axis. An untrained encoder has random weights "
        "and the shape of the point that it is named after; raw pixels are patches without an encoder. Below: 4DS as "
        "published. The axes differ on purpose: data and sizes differ, and only the shape can be compared.",
    ),
    "label_efficiency": (
        "linear probes over the number of labelled clips",
        "Linear probes of frozen features, fitted to the first labelled training clips and to all of them. Coloured: the "
        "points that differ in size alone. Diamonds: other methods. Grey: the baselines, which saw no video ({baselines}). "
        "One run, without intervals. A linear probe is a ridge regression in closed form: for actions on means over a coarse "
        "grid of the clip, for depth on each token alone. The attention readouts of the other sections are trained by gradient "
        "steps and attend to all tokens, with their places in time; so their numbers for one encoder differ.",
    ),
    "pretraining": (
        "validation loss over the size of the encoder and over training FLOPs",
        "Validation loss of the points that differ in size alone, over their parameters and over their training FLOPs, "
        "with a power law if one fits. The cross is the largest point as the law of the others predicts it. There is no "
        "baseline: losses of untrained encoders are not measured.",
    ),
    "training_curves": (
        "training loss over clips seen",
        "Training loss over clips seen. Each method has a panel, because losses of different methods do not compare. "
        "There is no baseline: untrained encoders and raw pixels have no training loss.{validations}",
    ),
    "methods": (
        "points of other methods and maskings",
        "Points of other methods or maskings. The baseline of each is the point of {method} nearest in size, which "
        "stands before it. Bars: {bars}.",
    ),
    "costs": (
        "time and memory of a training step",
        "Time (median and quartiles) and memory of a training step as one quantity grows and the others stay. The "
        "baseline is the formula, dashed. Measured by `scaling4d bench costs`, not in this run: see "
        "`reports/bench/costs.json`.",
    ),
}


@dataclass(frozen=True)
class Section:
    """A part of the page. content: a function that gives its HTML, or a name of FIGURES; its name is the part's id.

    The function takes run and page; `conclusion` and `verdict` also take `measure_rows`.

    heading, text: above it. folded: its title where it is folded; empty: always in sight.
    """

    content: Callable[..., str] | str
    heading: str = ""
    text: str = ""
    folded: str = ""

    @property
    def name(self) -> str:
        return self.content if isinstance(self.content, str) else self.content.__name__


def figure(run: RunResults, name: str) -> str:
    """A figure with its caption."""
    seeds = run.fresh_seed_study is not None
    bars = f"standard deviations over seeds around means (frozen readouts), else {BARS}" if seeds else BARS
    baselines = ", ".join(map(encoder_words, run.baselines)) or "none in this profile"
    below = VALIDATIONS if run.measures else ""
    picture, caption = FIGURES[name]
    caption = caption.format(points=POINTS[seeds], bars=bars, baselines=baselines, method=run.methods[0], validations=below)
    return html_figure(f"{name}.svg", picture, caption)


SECTIONS = (
    Section(conclusion),
    Section(verdict, "What improves with size"),
    Section(rules, folded="The rules in full"),
    Section("headline", "Tasks over the size of the encoder"),
    Section(sections.results, "This run alone"),
    Section(sections.further, folded="Further metrics of every readout"),
    Section(sections.paper, folded="4DS as published, in the rows and columns of our table, and encoders quoted beside it"),
    Section(sections.mae_st, folded="MAE-ST as published, beside the points of this run that are trained so"),
    Section("label_efficiency", "Tasks over the number of labelled clips"),
    Section(sections.sheets, "Predictions beside the truth"),
    Section("pretraining", "Pretraining"),
    Section(sections.points),
    Section("training_curves"),
    Section(sections.trends, text=LAWS, folded="Power laws of losses and errors, and the prediction of the largest size"),
    Section("methods", "Other methods and maskings"),
    Section(sections.reconstructions, "Filled-in pixels", FILLED),
    Section(sections.fidelity, text=FIDELITY, folded="Fidelity of filled-in frames and clips"),
    Section("costs", "Cost of a training step"),
    Section(sections.summary, "This run"),
    Section(sections.overrides, folded="Settings that differ from the profile"),
    Section(sections.deviations, folded="Differences from the papers"),
    Section(sections.unstated, folded="Choices that no paper states"),
    Section(sections.agreements, folded="Settings as the papers state them"),
    Section(sections.lineage, folded="Lineage: hashes of weights, data and code"),
)


def build_page(run: RunResults) -> Page:
    """All sections of a run, with ids of numbers in order."""
    page = Page(run.folder)
    rows = measure_rows(run, page)
    for section in SECTIONS:
        name, write = section.name, section.content
        given = (run, page, rows) if write in (conclusion, verdict) else (run, page)
        content = figure(run, name) if name in FIGURES else write(*given)
        if not content:
            continue
        content = (f"<p>{code_html(section.text)}</p>" if section.text else "") + content
        if section.folded:
            content = f"<details><summary>{html.escape(section.folded)}</summary>{content}</details>"
        heading = f"<h2>{html.escape(section.heading)}</h2>" if section.heading else ""
        page.sections[name] = f'<section id="{name}">{heading}{content}</section>'
    return page


def report_html(page: Page, script: str) -> str:
    """The page as a file: the conclusion comes first. script: path of the script that enters the commit."""
    first, *others = page.sections.values()
    body = "\n".join([f"<h1>{TITLE}</h1>", first, INTRODUCTION, *others, ORIGIN, f'<script src="{script}"></script>'])
    return html_page(TITLE, body)
