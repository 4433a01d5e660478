"""The report's tables: csv rows, text for the terminal, HTML for the notebook. Every number comes from a Result or a summary."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from scaling4d.records import Result
from scaling4d.report import fits
from scaling4d.report.story import PROTOCOLS, SUMMARY, UNTRAINED, Story, deviations, published

RESULTS = (
    *("encoder", "parameters", "task", "protocol", "metric", "value", "low", "high"),
    *("unit", "higher_is_better", "examples", "seed", "checkpoint_sha256"),
)
FIDELITY = {"fid": "FID ↓", "kid": "KID ↓", "precision": "precision ↑", "recall": "recall ↑"}
FEATURES = {"frame": "frames", "clip": "whole clips", "inception": "frames, Inception", "checkpoint": "whole clips, checkpoint"}
CURVES = ("point", "step", "clips_seen", "loss", "lr", "grad")
PRETRAIN = SUMMARY
NOTHING = "-"


class Html(str):
    """HTML that a notebook shows as it is."""

    def __repr__(self) -> str:
        return "a table"

    def _repr_html_(self) -> str:
        return str(self)


class Markdown(str):
    """Markdown that a notebook renders."""

    def __repr__(self) -> str:
        return "text"

    def _repr_markdown_(self) -> str:
        return str(self)


# ---- files ----


def results_csv(story: Story) -> str:
    """A row for each Result and one for each of its further metrics, whose interval, unit and direction stay empty."""
    rows = []
    for r in story.results:
        row = {name: getattr(r, name) for name in RESULTS}
        rows.append(row)
        empty = {"low": "", "high": "", "unit": "", "higher_is_better": ""}
        rows += [{**row, **empty, "metric": name, "value": value} for name, value in sorted(r.others.items())]
    return _csv(RESULTS, rows)


def pretrain_csv(story: Story) -> str:
    return _csv(PRETRAIN, [story.summaries[point] for point in story.trained])


def reconstruct_csv(story: Story) -> str:
    columns = ("point", "masked_mse", "psnr_db", *_fidelities(story), "clips", "frames", "seed", "checkpoint_sha256")
    return _csv(columns, [{"point": point, **story.fidelity[point]} for point in story.points])


def curves_csv(story: Story) -> str:
    """A row for every line of every point's losses.jsonl."""
    return _csv(CURVES, [{"point": point, **line} for point in story.trained for line in story.losses[point]])


def metrics(story: Story) -> dict[str, Any]:
    """For `dvc metrics` and `dvc exp`: task -> `metric↑ (unit)` -> protocol -> encoder -> value, low, high.

    What pretraining and reconstruction measured has no protocol and no interval.
    """
    nested: dict[str, Any] = {
        "val_loss": {"↓": {point: story.summaries[point]["val_loss"] for point in story.trained}},
        "masked_mse": {"↓": {point: story.fidelity[point]["masked_mse"] for point in story.points}},
    }
    for r in story.results:
        name = f"{r.metric}{'↑' if r.higher_is_better else '↓'} ({r.unit})"
        mine = nested.setdefault(r.task, {}).setdefault(name, {}).setdefault(r.protocol, {})
        mine[r.encoder] = {"value": r.value, "low": r.low, "high": r.high}
    return nested


def stages(story: Story) -> dict[str, Any]:
    """Every stage by its name: settings declared and in force, what it read, and the code that made it (its modules once a room).

    from: by name of an input the stage that made it, where one did; the rest is data.
    """
    code = {p["code"]["room"]: p["code"] for p in story.provenances.values() if p.get("code")}
    found = {}
    for name, provenance in story.provenances.items():
        inputs = dict(provenance.get("inputs") or {})
        found[name] = {
            "settings": provenance["settings"],
            "overrides": provenance["overrides"],
            "operative": story.operative[name],
            "inputs": inputs,
            "from": {kind: maker for kind in inputs if (maker := _maker(story, name, kind)) in story.provenances},
            "code": {key: provenance["code"][key] for key in ("room", "sha256")} if provenance.get("code") else None,
        }
    return {"profile": story.profile, "seed": story.seed, "stages": found, "code": code}


# ---- terminal ----


def table(story: Story) -> str:
    """Point x protocol x task as text of at most 120 columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    head, rows = _overview(story)
    drawn = Table(box=box.SIMPLE, title=f"profile {story.profile}, seed {story.seed}", title_justify="left")
    for index, name in enumerate(head):
        drawn.add_column(name.split(",")[0], justify="left" if index in (0, 2) else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    console = Console(file=io.StringIO(), width=120)
    console.print(drawn)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip()


# ---- notebook ----


def summary(story: Story) -> Html:
    """What was run, on what; the overrides in force, if any, come first."""
    facts = {
        "profile": story.profile,
        "seed": story.seed,
        "points": ", ".join(story.trained),
        "tasks": ", ".join(story.tasks) or "none in this profile",
        "overrides": ", ".join(f"{key} = {value!r}" for key, (value, _) in story.overrides.items()) or "none",
        "data": ", ".join(f"{name} {sha}" for name, sha in (story.provenances["clips"].get("inputs") or {}).items()) or NOTHING,
    }
    plain = {key: value for key, value in story.datasheet.items() if isinstance(value, str | int | float)}
    facts |= {f"clips: {key.replace('_', ' ')}": value for key, value in plain.items()}
    return Html(STYLE + html_table(("", ""), [(key, cell(value)) for key, value in facts.items()]))


def sources(story: Story) -> Html:
    """Where the published curves come from; nothing where none is drawn."""
    paper = published()["4DS"]
    text = f"Published values: {paper['source']}; less sure: {', '.join(paper['approximate'])}."
    return Html(f"<p>{html.escape(text)}</p>" if story.results else "")


def results(story: Story) -> Html:
    """The whole table: encoder x protocol x task, 95 % intervals over videos in brackets."""
    if not story.results:
        return Html("<p>This profile has no benchmark, so there is nothing to read out.</p>")
    head, rows = _overview(story, intervals=True)
    return Html(
        html_table(head, rows) + "<p>In brackets: 95 % bootstrap interval over the validation videos of this one run.</p>"
    )


def differences(story: Story) -> Html:
    """Trained against untrained: frozen readouts of an encoder with the same shape and no pretraining."""
    rows = []
    for encoder in story.baselines:
        point = encoder.removeprefix(UNTRAINED)
        for task in story.tasks if encoder.startswith(UNTRAINED) else ():
            trained, untrained = story.result(point, task, "frozen"), story.result(encoder, task, "frozen")
            if trained is None or untrained is None:
                continue
            gain = (trained.value - untrained.value) * (1 if trained.higher_is_better else -1)
            apart = trained.low > untrained.high if trained.higher_is_better else trained.high < untrained.low
            cells = [_measured(trained), _measured(untrained), f"{gain:+.4f}", "yes" if apart else "no"]
            rows.append([point, f"{task}: {_label(trained)}", *cells])
    if not rows:
        return Html("<p>This profile compares no point with its untrained twin.</p>")
    head = ("point", "task, frozen", "trained", "untrained", "gain (+ is better)", "intervals apart")
    return Html(html_table(head, rows))


def further(story: Story) -> Html:
    """Every further metric of the readouts, trivial predictions included."""
    rows = []
    for task in story.tasks:
        mine = [r for r in story.results if r.task == task and r.others]
        names = sorted({name for r in mine for name in r.others})
        if mine:
            cells = [[r.encoder, r.protocol, *(cell(r.others.get(name)) for name in names)] for r in mine]
            rows.append(f"<h4>{html.escape(task)}</h4>" + html_table(("encoder", "protocol", *names), cells))
    return Html("".join(rows) or "<p>No further metrics.</p>")


def trends(story: Story) -> Html:
    """The power law y = E + A (N / unit)^-alpha of losses and errors, ours and the published ones, by the same code.

    Errors: metrics of which less is better as they are, shares of which more is better subtracted from 1.
    """
    rows = []
    for name, x, y in _laws(story):
        found = fits.trend(x, y)
        if found is None:
            rows.append([name, str(len(x)), "no law: it does not fall, or fewer than four sizes", *[""] * 6])
            continue
        tested = fits.held_out(x, y)
        if tested is None:
            check = [NOTHING, "too few points, or no law without the largest", NOTHING]
        else:
            check = [cell(tested.measured), f"{cell(tested.predicted)} {span(tested.low, tested.high)}"]
            check.append("yes" if tested.inside else "no")
        law = found.law
        numbers = [f"{cell(law.floor)} {span(*found.floor)}", f"{cell(law.exponent)} {span(*found.exponent)}"]
        rows.append([name, str(len(x)), *numbers, cell(law.scale), f"{law.unit:.3g}", *check])
    if not rows:
        return Html("<p>Too few points for a trend.</p>")
    head = ("what", "sizes", "irreducible term E", "exponent alpha", "A", "unit of N")
    head = (*head, "largest: measured", "largest: predicted from the others", "inside")
    text = (
        f"In brackets: 95 % bootstrap intervals ({fits.DRAWS:,} times the points were scattered anew about the curve, as far as"
        " they lie from it, and fitted again). They hold the scatter of the points, not that of other seeds. Predicted: by the"
        " law of all points but the largest, with the interval of one new point; of five points four are left to fit three"
        f" numbers, hence its width. An exponent's end at {fits.EXPONENTS[0]:g} or {fits.EXPONENTS[1]:g}, the smallest and the"
        " largest tried, means that the points set none."
    )
    return Html(html_table(head, rows) + f"<p>{html.escape(text)}</p>")


def pretrain(story: Story) -> Html:
    """Sizes, cost and losses of the points. Losses of different methods measure different things."""
    keys = ("point", "method", "parameters", "parameters_total", "flops", "clips_seen", "train_loss", "val_loss", "seed")
    rows = [
        [*(cell(story.summaries[point].get(key)) for key in keys), story.masking(point) or NOTHING] for point in story.trained
    ]
    lines = []
    for method, points in {story.methods[0]: story.ladder, **{m: story.of_method(m) for m in story.methods[1:]}}.items():
        mine = [story.summaries[point] for point in points]
        rho = fits.spearman([s["parameters"] for s in mine], [s["val_loss"] for s in mine])
        if rho is not None:
            fall = 1 - mine[-1]["val_loss"] / mine[0]["val_loss"]
            trend = f"{method}: Spearman correlation of size and validation loss {rho:+.2f}"
            lines.append(
                f"{trend}; {mine[-1]['point']} lies {abs(fall):.1%} {'below' if fall >= 0 else 'above'} {mine[0]['point']}."
            )
    head = [*(key.replace("_", " ") for key in keys), "hidden"]
    return Html(html_table(head, rows) + "".join(f"<p>{html.escape(line)}</p>" for line in lines))


def reconstruct(story: Story) -> Html:
    """How well hidden pixels are filled in, the same masks and share hidden for every point."""
    measured = _fidelities(story)
    keys = ("masked_mse", "psnr_db", *measured, "clips")
    head = ("point", "hidden-pixel MSE ↓ (0..1)²", "PSNR ↑ dB", *measured.values(), "clips")
    rows = [[point, *(cell(story.fidelity[point].get(key)) for key in keys)] for point in story.points]
    text = (
        "FID, KID, precision and recall of filled-in against true frames and clips, on features of untrained encoders"
        " (no download) unless the column names others; they compare these points, not the literature's."
    )
    return Html(html_table(head, rows) + f"<p>{text}</p>")


def overrides(story: Story) -> Html:
    """Every setting that differs from the profile as written in experiments/."""
    if not story.overrides:
        return Html(f"<p>None: every setting is that of the profile {html.escape(story.profile)}.</p>")
    rows = [[key, repr(value), ", ".join(stages)] for key, (value, stages) in story.overrides.items()]
    return Html(html_table(("setting", "value in force", "stages that it changes"), rows))


def differs(story: Story) -> Markdown:
    """What differs from the papers, and why; kept by hand in deviations.md."""
    return Markdown(deviations())


def lineage(story: Story) -> Html:
    """Which bytes and which code every encoder and number came from; `scaling4d audit` checks and explains them."""
    weights = {r.encoder: r.checkpoint_sha256 for r in story.results}
    weights = {point: f["checkpoint_sha256"] for point, f in story.fidelity.items() if "checkpoint_sha256" in f} | weights
    shared: dict[tuple[str, str], list[str]] = {}
    for name, provenance in story.provenances.items():
        for kind, sha in {"code": _hash(provenance), **(provenance.get("inputs") or {})}.items():
            shared.setdefault((kind, sha), []).append(name)
    stages = [
        (kind, sha, names[0] + (f" and {len(names) - 1} more" if names[1:] else "")) for (kind, sha), names in shared.items()
    ]
    return Html(
        html_table(("encoder", "weights, sha256"), list(weights.items())) + html_table(("went in", "sha256", "to"), stages)
    )


# ---- shapes ----


def _laws(story: Story) -> Iterator[tuple[str, list[float], np.ndarray]]:
    """What is fitted: name, sizes, losses or errors."""
    ladder = [story.summaries[point] for point in story.ladder]
    for key, name in (("parameters", "parameters"), ("flops", "training FLOPs")):
        yield f"ours: validation loss, {name}", [s[key] for s in ladder], np.array([s["val_loss"] for s in ladder])
    for task in story.tasks:
        for protocol in PROTOCOLS:
            mine = [r for point in story.ladder if (r := story.result(point, task, protocol))]
            if len(mine) > 3:
                values = np.array([r.value for r in mine])
                name, y = _error(f"ours: {task} {mine[0].metric}, {protocol}", values, mine[0].higher_is_better)
                yield name, [r.parameters for r in mine], y
    paper = published()["4DS"]
    for task in story.tasks:
        known = paper["tasks"].get(task, {})
        for protocol in (protocol for protocol in PROTOCOLS if protocol in known):
            values = np.array(list(known[protocol].values()))
            name, y = _error(f"4DS: {task} {known['metric']}, {protocol}", values, known["higher_is_better"])
            yield name, [paper["sizes"][size] for size in known[protocol]], y


def _error(name: str, values: np.ndarray, higher_is_better: bool) -> tuple[str, np.ndarray]:
    """What falls to 0 at best; metrics of which more is better are all shares."""
    return (f"{name}: 1 - value", 1 - values) if higher_is_better else (name, values)


def _fidelities(story: Story) -> dict[str, str]:
    """What was measured on sets of frames and clips: key in a `reconstruct` result -> head of a column."""
    there = {key for point in story.points for key in story.fidelity[point]}
    names = {f"{kind}_{m}": f"{FIDELITY[m]}\n{FEATURES[kind]}" for kind in FEATURES for m in FIDELITY}
    return {key: name for key, name in names.items() if key in there}


def _maker(story: Story, stage: str, kind: str) -> str:
    """The stage that made an input of another stage."""
    _, encoder, *rest = (*stage.split("/"), "")
    match kind:
        case "checkpoint":
            return f"pretrain/{encoder}"
        case "head":
            return f"readout/{encoder}/{rest[0]}/frozen"
        case "teacher":
            return f"pretrain/{story.recipes[encoder]['teacher']}"
    return kind


def span(low: float, high: float) -> str:
    return f"[{cell(low)}, {cell(high)}]"


def _overview(story: Story, *, intervals: bool = False) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table point x protocol x task; `-` where the profile has no such readout."""
    labels = {task: next((_label(r) for r in story.results if r.task == task), "") for task in story.tasks}
    head = ["encoder", "parameters", "protocol", "val loss ↓", *(f"{task}\n{labels[task]}" for task in story.tasks)]
    rows = []
    for encoder in dict.fromkeys([*story.trained, *(name for names in story.encoders.values() for name in names)]):
        mine = [protocol for protocol in PROTOCOLS if encoder in story.encoders[protocol]]
        for index, protocol in enumerate(mine or [NOTHING]):
            found = [story.result(encoder, task, protocol) for task in story.tasks]
            known = story.summaries.get(encoder) or next(({"parameters": r.parameters} for r in found if r), {})
            loss = cell(known.get("val_loss")) if index == 0 else ""
            cells = [(_measured(r).replace(" ", "\n", 1) if intervals else cell(r.value)) if r else NOTHING for r in found]
            rows.append([encoder, _size(known.get("parameters")), protocol, loss, *cells])
    return head, rows


def _label(r: Result) -> str:
    return f"{r.metric} {'↑' if r.higher_is_better else '↓'}, {r.unit}"


def _measured(r: Result) -> str:
    return f"{cell(r.value)} {span(r.low, r.high)}"


def cell(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, float | int):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if value < 1e9 else f"{value:.3g}"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _size(parameters: float | None) -> str:
    return NOTHING if parameters is None else "0" if parameters == 0 else f"{parameters / 1e6:.2f} M"


def _hash(provenance: Mapping[str, Any]) -> str:
    """Of the code that made it."""
    code = provenance.get("code")
    return str(code.get("sha256", NOTHING)) if isinstance(code, Mapping) else str(code or NOTHING)


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        inner = "".join(f"<{tag}>{html.escape(text).replace(chr(10), '<br>')}</{tag}>" for text in cells)
        return f"<tr>{inner}</tr>"

    top = f"<thead>{line(head, 'th')}</thead>" if any(head) else ""
    return f'<table class="scaling4d">{top}<tbody>{"".join(line(row, "td") for row in rows)}</tbody></table>'


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Numbers in full, so that a reader gets the float that was written."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


STYLE = """<style>
.jp-RenderedHTMLCommon table.scaling4d { margin-left: 0; }
.jp-RenderedHTMLCommon table.scaling4d td { font-variant-numeric: tabular-nums; }
.jp-RenderedHTMLCommon table.scaling4d :is(td, th):first-child { text-align: left; white-space: nowrap; }
.scaling4d svg { max-width: 100%; height: auto; }
.jp-Cell { max-width: 1180px; margin: 0 auto; }
</style>"""
