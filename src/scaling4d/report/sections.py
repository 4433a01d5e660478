"""Sections of report.html: tables of numbers with sources, and links to pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from scaling4d.config import PROTOCOLS
from scaling4d.provenance import flatten
from scaling4d.report.page import Number, Page, Part, joined, part_of, text_of
from scaling4d.report.pictures import count_clips, strip_name, video_name
from scaling4d.report.protocol import SHAPE_OF_J, entry_of, matched_keys, row_of, status_profile
from scaling4d.report.protocol import rows as protocol_rows
from scaling4d.report.run_results import RunResults, is_baseline
from scaling4d.report.tables import (
    ERRORS,
    fidelity_columns,
    held_out_parts,
    interval,
    label,
    overview,
    published,
    published_part,
    result_part,
    summary_part,
    with_interval,
)
from scaling4d.studies import fits
from scaling4d.studies.markup import NOTHING, html_figure
from scaling4d.studies.words import encoder_words, measure, measure_head

PICTURES = "pictures"  # folder beside report.html
DRAWN_CLIPS = "The seed draws the validation clips, whatever the readouts predict, so all of them may be wrong."
QUOTING = ("Gen4U", "InternVideo-Next, boxes", "InternVideo-Next, depth")  # of published.yaml: other encoders than 4DS
STOPPING = ("step with the lowest\nheld-out loss", "last step")


def summary(run: RunResults, page: Page) -> str:
    """Settings, commit and data of the run, with the overrides in force."""
    facts: dict[str, Part] = {
        "profile": run.profile,
        "seed": summary_part(run, run.points[0], "seed"),
        "points": ", ".join(run.trained),
        "tasks": ", ".join(run.tasks) or "none in this profile",
        "overrides": joined([f"{key} = ", _override(run, page, key)] for key in run.overrides) or "none",
        "commit": "in commit.js",  # which fills this cell: the page itself depends on nothing but the declared inputs
    }
    for name, sha in (run.provenances["clips"].get("inputs") or {}).items():
        facts[f"{name}, sha256"] = part_of(sha, _provenance(run, "clips"), "inputs", name, spec="s")
    for key, counts in run.datasheet.items():
        if isinstance(counts, Mapping) and counts and all(isinstance(count, int | float) for count in counts.values()):
            sheet = run.home / "clips/datasheet.json"
            words = ([f"{name} ", part_of(count, sheet, key, name)] for name, count in counts.items())
            facts[f"curation: {key.replace('_', ' ')}"] = joined(words)
    return page.table(("", ""), facts.items())


def results(run: RunResults, page: Page) -> str:
    """The main table: encoder x protocol x task."""
    if not run.results:
        return page.paragraph("This profile has no benchmark, so it has no readout.")
    labels = {r.task: label(r) for r in run.results}
    head = ["encoder", "parameters", "protocol", f"{measure('val_loss')}\n{run.methods[0]}"]
    head += [f"{task}\n{labels.get(task, '')}" for task in run.tasks]
    rows = ([encoder_words(encoder), *cells] for encoder, *cells in overview(run, intervals=True))
    table = page.table(head, rows)
    return table + page.paragraph("In brackets: 95 % bootstrap intervals over the validation videos of this one run.")


def paper(run: RunResults, page: Page) -> str:
    """4DS as published, in the rows and columns of our own table; `~` where the figure was hard to read."""
    if not run.results:
        return ""
    known = published()["4DS"]
    head, rows = ["published", "parameters", "protocol"], []
    for task in run.tasks:
        curve = known["tasks"].get(task)
        arrow = "↑" if curve and curve["higher_is_better"] else "↓"
        head.append(f"{task}\n{curve['metric']} {arrow}, {curve['benchmark']}" if curve else f"{task}\n{NOTHING}")
    for size in known["sizes"]:
        for protocol in ("frozen", "finetune"):
            row: list[Part] = [f"4DS-{size}", published_part("4DS", "sizes", size, spec=",.0fM"), protocol]
            for task in run.tasks:
                unsure = "~" if f"{task} {protocol} {size}" in known["approximate"] else ""
                place = ("4DS", "tasks", task, protocol, size)
                there = size in known["tasks"].get(task, {}).get(protocol, {})
                row.append([unsure, published_part(*place, spec=".3f")] if there else NOTHING)
            rows.append(row)
    text = "The same tasks and, as far as they are known, the same metrics; what differs stands in the table of protocols. "
    text += f"Source: {known['source']}; less sure, marked ~: "
    j = row_of(SHAPE_OF_J)
    shape = page.paragraph(f"{SHAPE_OF_J}: {j['stated']}. {j['reason']}")
    table = page.paragraph(f"{text}{', '.join(known['approximate'])}.") + page.table(head, rows) + shape
    for quoting in QUOTING:
        table += page.paragraph(f"Beside them, other encoders. Source: {published()[quoting]['source']}.")
        table += _accuracies(run, page, quoting, "frozen")
    return table


def mae_st(run: RunResults, page: Page) -> str:
    """MAE-ST as published, beside the classifiers of this run; `-` where the run has no such point."""
    if not run.results:
        return ""
    known, speedups = published()["MAE-ST"], []
    for number, row in enumerate(known["speedups"]):
        speedups.append([row["change"], published_part("MAE-ST", "speedups", number, "value", spec=".1f")])
    text = page.paragraph(f"Sources: {known['source']}. Ours compares with them in profile mae_st alone: other data and sizes.")
    accuracies = _accuracies(run, page, "MAE-ST", "classifier")
    faster = page.table(["published, of ViT-L's pretraining", "times as fast"], speedups)
    measures, transfer = known["transfer"]["measures"], []
    for number, row in enumerate(known["transfer"]["rows"]):
        place = ("MAE-ST", "transfer", "rows", number)
        cells = [published_part(*place, name, spec=".3f") if name in row else NOTHING for name in measures]
        transfer.append([row["pretraining"], *cells])
    return text + accuracies + faster + page.table(["published, of ViT-L\npretrained on", *measures.values()], transfer)


def _accuracies(run: RunResults, page: Page, paper: str, protocol: str) -> str:
    """A paper's published accuracies beside our results with the same encoders; `-` where the run has none."""
    known, rows = published()[paper], []
    for number, row in enumerate(known["accuracies"]):
        ours, place = run.result(row.get("encoder", ""), known["task"], protocol), (paper, "accuracies", number)
        parameters = published_part(*place, "parameters", spec=",.0fM") if "parameters" in row else NOTHING
        measured = interval(run, ours) if ours else NOTHING
        value = published_part(*place, "value", spec=".4g")
        rows.append([row["model"], parameters, value, row.get("source", paper.partition(",")[0]), measured])
    measure = f"{known['metric']} {'↑' if known.get('higher_is_better', True) else '↓'}, {known['benchmark']}"
    return page.table(["published", "parameters", measure, "source", f"ours\n{known['task']}, {protocol}"], rows)


def sheets(run: RunResults, page: Page) -> str:
    """A picture for each task: two frozen readouts' predictions beside the truth, on validation clips by the seed."""
    if not run.sheets:
        return page.paragraph("This profile draws no predictions.")
    labels, figures = {r.task: label(r) for r in run.results}, []
    for task in run.sheets:
        inputs = [name.split("/") for name in run.provenances[f"show/{task}"]["inputs"] if name.startswith("readout/")]
        encoders = sorted((encoder for _, encoder, _, _ in inputs), key=is_baseline)
        words = [f"{encoder_words(encoder)}{' (the baseline)' if is_baseline(encoder) else ''}" for encoder in encoders]
        title = f"{task}: {labels.get(task, 'predictions')}"
        caption = f"{title}. Frozen readouts of {' and '.join(words)}, beside the truth. {DRAWN_CLIPS}"
        figures.append(html_figure(f"{PICTURES}/sheet_{task}.png", f"{task}: predictions beside the truth", caption))
    return "".join(figures)


def further(run: RunResults, page: Page) -> str:
    """Every further metric of the readouts, trivial predictions included, and the steps of their early stopping."""
    parts = []
    for task in run.tasks:
        results = [r for r in run.results if r.task == task and (r.others or held_out_parts(run, r) != [NOTHING, NOTHING])]
        names = sorted({name for r in results for name in r.others})
        head = ("encoder", "protocol", *map(measure_head, names), *STOPPING)
        values = ([result_part(run, r, "others", name) for name in names] + held_out_parts(run, r) for r in results)
        rows = ([encoder_words(r.encoder), r.protocol, *cells] for r, cells in zip(results, values, strict=True))
        if results:
            parts.append(f"<h4>{page.html(task)}</h4>" + page.table(head, rows))
    return "".join(parts) or page.paragraph("No further metrics.")


def trends(run: RunResults, page: Page) -> str:
    """The power law y = E + A (N / unit)^-alpha of losses and errors, ours and the published ones, by the same code.

    Errors: metrics where lower is better as they are; shares where higher is better subtracted from 1.
    """
    rows = []
    for curve, sizes, values, higher_is_better in _curves(run):
        x, y = [size.value for size in sizes], [value.value for value in values]
        y, name = ([1 - value for value in y], f"{curve}: 1 - value") if higher_is_better else (y, curve)
        fit, test = fits.trend(x, y), fits.held_out(x, y)
        law: dict[str, Any] = {"sizes": len(x)}
        if fit:
            law |= {name: (getattr(fit, name), *fit.interval(name)) for name in ("floor", "exponent")}
            law |= {"scale": fit.scale, "unit": fit.unit}
        if fit and test:
            law |= {"measured": test.measured, "predicted": (test.predicted, test.low, test.high)}
        page.derive(f"law of {name}", law, [*sizes, *values])
        number = partial(page.derived_number, f"law of {name}")
        spans = [with_interval(*(number(key, place) for place in range(3))) for key in law if isinstance(law[key], tuple)]
        cells = ["no law: no fall, or fewer than four sizes", *[""] * 6]
        if fit:
            tested = [NOTHING, "too few points, or no law without the largest", NOTHING]
            tested = [number("measured"), spans[2], "yes" if test.inside else "no"] if test else tested
            cells = [*spans[:2], number("scale"), number("unit", spec=".3g"), *tested]
        rows.append([name, number("sizes"), *cells])
    head = ("curve", "sizes", "irreducible term E", "exponent alpha", "A", "unit of N")
    return page.table((*head, "largest: measured", "largest: predicted from the others", "inside"), rows)


def _curves(run: RunResults) -> Iterator[tuple[str, Sequence[Number], Sequence[Number], bool]]:
    """Curves to fit: name, sizes, values, whether higher is better."""
    for key, name in (("parameters", "parameters"), ("flops", "training FLOPs")):
        sizes, losses = ([summary_part(run, point, column) for point in run.ladder] for column in (key, "val_loss"))
        yield f"ours: validation loss, {name}", sizes, losses, False
    for task in run.tasks:
        for protocol in PROTOCOLS:
            ladder = [r for point in run.ladder if (r := run.result(point, task, protocol))]
            if len(ladder) > 3:
                sizes, values = ([result_part(run, r, key) for r in ladder] for key in ("parameters", "value"))
                yield f"ours: {task}, {measure(ladder[0].metric)}, {protocol}", sizes, values, ladder[0].higher_is_better
    for task in run.tasks:
        curve = published()["4DS"]["tasks"].get(task, {})
        for protocol in (protocol for protocol in PROTOCOLS if protocol in curve):
            sizes = [published_part("4DS", "sizes", size, spec="g") for size in curve[protocol]]
            values = [published_part("4DS", "tasks", task, protocol, size, spec=".3f") for size in curve[protocol]]
            yield f"4DS: {task} {curve['metric']}, {protocol}", sizes, values, curve["higher_is_better"]


def points(run: RunResults, page: Page) -> str:
    """Sizes, cost and losses of the points."""
    heads = {"point": "point", "method": "method", "parameters": "encoder\nparameters", "parameters_total": "all\nparameters"}
    heads |= {"flops": "training\nFLOPs", "clips_seen": "clips seen"}
    heads |= {"train_loss": measure("train_loss"), "val_loss": measure("val_loss"), "seed": "seed"}
    heads |= {name: measure_head(name) for name in run.measures if name not in heads}
    heads |= {"best_step": "step of the\nbest weights"} if any("best_step" in s for s in run.summaries.values()) else {}
    rows, settings = [], _settings(run)
    for point in run.trained:
        model, hidden = run.models[point], [NOTHING]
        if "masking" in model:
            group = "distilled" if point in run.students else "continued" if point in run.continued else "points"
            words = (group, point, "model", run.summaries[point]["method"])
            hidden = [model["masking"], " ", replace(settings[".".join((*words, "mask_ratio"))], format=".0%")]
        rows.append([*(summary_part(run, point, key) for key in heads), hidden])
    table = page.table([*heads.values(), "hidden"], rows)
    if len(run.methods) > 1:
        table += page.paragraph("Losses of different methods have different targets and do not compare.")
    for method in run.methods:
        names = run.ladder_of(method)
        sizes, losses = ([run.summaries[point][key] for point in names] for key in ("parameters", "val_loss"))
        rho = fits.spearman(sizes, losses)
        if rho is not None:
            fall = 1 - losses[-1] / losses[0]
            inputs = [summary_part(run, point, key) for point in names for key in ("parameters", "val_loss")]
            page.derive(f"trend of {method}", {"spearman": rho, "change": abs(fall)}, inputs)
            number = partial(page.derived_number, f"trend of {method}")
            text = [f"{method}: Spearman correlation of size and validation loss ", number("spearman", spec="+.2f")]
            text += [f"; the loss of {names[-1]} lies ", number("change", spec=".1%")]
            table += page.paragraph(*text, f" {'below' if fall >= 0 else 'above'} that of {names[0]}.")
    return table


def reconstructions(run: RunResults, page: Page) -> str:
    """For each clip a looping video, and strips of its frames: input, masked, filled in by every point."""
    labels: dict[str, Part] = {"input": "input", "masked": "masked, hidden is grey"}
    for point in run.points:
        measured: Part = [", MSE over all validation clips ", _fidelity(run, point, "masked_mse", ".4f")]
        if run.fidelity[point]["true_patch_statistics"]:
            measured = ", each patch with its true mean and deviation, so it is not measured"
        labels[point] = [f"{point}, ", summary_part(run, point, "parameters", spec="M"), measured]
    if len(run.ladder) > 1:
        labels["difference"] = f"difference of {run.ladder[-1]} and {run.ladder[0]}, amplified"
    content = []
    for clip in range(count_clips(run.pictures, run.side_px)):
        source = f"{PICTURES}/{video_name(clip)}"
        content.append(f'<video src="{source}" autoplay loop muted playsinline></video>')
        for row, words in labels.items():
            strip = f'<img alt="{row}" src="{PICTURES}/{strip_name(clip, row)}">'
            content.append(f'<figure class="strip"><figcaption>{page.html(words)}</figcaption>{strip}</figure>')
    return "".join(content)


def fidelity(run: RunResults, page: Page) -> str:
    """Errors of filled-in pixels, with the same masks and the same hidden share for every point.

    Left out: points that take the mean and the deviation of each patch from the true pixels (MAE-ST).
    """
    columns = [*ERRORS, *fidelity_columns(run)]
    measured = [point for point in run.points if not run.fidelity[point]["true_patch_statistics"]]
    rows = [[point, *(_fidelity(run, point, key) for key in (*columns, "clips"))] for point in measured]
    return page.table(("point", *map(measure_head, columns), "clips"), rows)


def overrides(run: RunResults, page: Page) -> str:
    """Every setting that differs from the profile as written in experiments/."""
    if not run.overrides:
        return page.paragraph(f"None: every setting is that of the profile {run.profile}.")
    rows = ([key, _override(run, page, key), ", ".join(stages)] for key, (_, stages) in run.overrides.items())
    return page.table(("setting", "value in force", "stages that it changes"), rows)


def deviations(run: RunResults, page: Page) -> str:
    """Where the papers state another value than ours."""
    profile, others = status_profile(run.profile), ""
    if run.profile != profile:
        others = page.paragraph(f"The lists judge profile {profile}; profile {run.profile} may have other values.")
    return others + _protocol(run, page, "differs")


def unstated(run: RunResults, page: Page) -> str:
    """Every choice that is ours because no paper states it."""
    return _protocol(run, page, "ours")


def agreements(run: RunResults, page: Page) -> str:
    """Where ours is as the papers state it."""
    return _protocol(run, page, "same")


def _protocol(run: RunResults, page: Page, status: str) -> str:
    """The rows of protocol.yaml with a status. Left out: choices without a setting in this run, unless they differ."""
    table, given, profile = [], _settings(run), status_profile(run.profile)
    patterns = [pattern for row in protocol_rows() for pattern in row.get("settings", ())]
    keys_of = matched_keys(patterns, given)
    for row in protocol_rows():
        values = {pattern: _in_force(keys_of[pattern], given) for pattern in row.get("settings", ())}
        lines: list[Part] = [[f"{pattern}: ", value] for pattern, value in values.items() if value]
        if "fixed" in row and run.results:
            lines.append(f"in the code: {row['fixed']}")
        if entry_of(row, profile) == status and (lines or (status == "differs" and profile in row)):
            lines += [row["reason"]] if "reason" in row else []
            table.append([row["what"], f"{row['stated']}\n({row['source']})", joined(lines, "\n")])
    return f'<div class="words">{page.table(("", "the papers (source)", "ours, in force"), table)}</div>'


def _settings(run: RunResults) -> dict[str, Part]:
    """Every setting of the stages as YAML has it, by dotted key, from the provenance of the first stage that has it."""
    parts: dict[str, Part] = {}
    for name, provenance in run.provenances.items():
        for declared, content in provenance["settings"].items():
            for key, value in flatten({declared: content}):
                words = key.removeprefix(declared).split(".")[1:]
                parts.setdefault(key, part_of(value, _provenance(run, name), "settings", declared, *words, spec=""))
    return parts


def _in_force(keys: Sequence[tuple[str, tuple[str, ...]]], given: Mapping[str, Part]) -> Part:
    """The value of a pattern's keys; where they have several, each with its first words. Empty: no stage has one."""
    values: dict[str, tuple[Part, list[str]]] = {}
    for key, words in keys:
        values.setdefault(text_of(given[key]), (given[key], []))[1].extend(words[:1])
    if len(values) < 2:
        return next((value for value, _ in values.values()), "")
    return joined(([value, f" ({', '.join(words)})"] for value, words in values.values()), "; ")


def lineage(run: RunResults, page: Page) -> str:
    """The bytes and the code behind every encoder and number; `scaling4d audit` checks and explains them."""
    weights: dict[str, Part] = {}
    for r in run.results:
        weights[r.encoder] = result_part(run, r, "checkpoint_sha256", spec="s")
    for point in run.points:
        if "checkpoint_sha256" in run.fidelity[point]:
            weights.setdefault(point, _fidelity(run, point, "checkpoint_sha256", "s"))
    shared: dict[tuple[str, str], tuple[Part, list[str]]] = {}
    for name, provenance in run.provenances.items():
        hashes = {("inputs", kind): sha for kind, sha in (provenance.get("inputs") or {}).items()}
        if provenance.get("code"):
            hashes = {("code", "sha256"): provenance["code"]["sha256"]} | hashes
        for (group, kind), sha in hashes.items():
            part = part_of(sha, _provenance(run, name), group, kind, spec="s")
            shared.setdefault(("code" if group == "code" else kind, sha), (part, []))[1].append(name)
    inputs = ([kind, sha, names[0] + (" and others" if names[1:] else "")] for (kind, _), (sha, names) in shared.items())
    encoders = ([encoder_words(name), sha] for name, sha in weights.items())
    return page.table(("encoder", "weights, sha256"), encoders) + page.table(("input", "sha256", "of stage"), inputs)


def _fidelity(run: RunResults, point: str, key: str, spec: str | None = None) -> Part:
    return part_of(run.fidelity[point].get(key), run.home / "reconstruct" / point / "result.json", key, spec=spec)


def _provenance(run: RunResults, stage: str) -> str:
    return (run.home / stage / "provenance.json").as_posix()


def _override(run: RunResults, page: Page, key: str) -> Part:
    """The value in force, from the first stage that it changes. One of stage `report` itself enters derived.json."""
    value, (stage, *_) = run.overrides[key]
    if stage != "report":
        return part_of(value, _provenance(run, stage), "overrides", key, spec="")
    page.derive(f"override {key}", value, ())
    return page.derived_number(f"override {key}", spec="")
