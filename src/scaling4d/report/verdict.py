"""The page's first section: the measures that improve with size, and the baselines that the largest point beats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scaling4d.records import Result
from scaling4d.report.page import Number, Page, Part, joined, part_of
from scaling4d.report.run_results import UNTRAINED, RunResults
from scaling4d.report.tables import MSE, result_part, summary_part
from scaling4d.studies.markup import NOTHING
from scaling4d.studies.words import MEASURES

YES, NOISE, NO = "yes", "within noise", "no"
TRIVIAL = {"boxes": "mean_iou_first_box_repeated", "pose": "epe_standing_still"}  # task -> further metric of its readouts
TRIVIAL_ANSWER, CHANCE = "the trivial answer", "chance of actions"
RULES = (
    "Better with size: of losses, every point is better than the next smaller one; of tasks, the 95 % intervals over "
    "validation videos of the largest and the smallest point do not overlap. Better than a baseline: the intervals do not "
    "overlap. This is one run; the noise between seeds is not in its intervals."
)


@dataclass(frozen=True)
class Verdict:
    """A row. values: of the smallest and of the largest point. scales: YES, NOISE or NO. beats: baseline -> cell."""

    name: str
    values: tuple[Part, Part]
    scales: str
    beats: dict[str, Part]


def verdict(run: RunResults, page: Page) -> str:
    """What improves with size in one sentence, and a row for each measure. Tasks: frozen readouts."""
    if len(run.ladder) < 2:
        return page.paragraph("This profile has one size alone, so nothing can be said of size.")
    rows = [*_losses(run), *_tasks(run, page)]
    named = [(answer, [row.name.rsplit(" ", 1)[0] for row in rows if row.scales == answer]) for answer in (YES, NOISE, NO)]
    heads = {YES: "Better with size", NOISE: "Within the noise of this run", NO: "Not better with size"}
    sentence = " ".join(f"{heads[answer]}: {'; '.join(names)}." for answer, names in named if names)
    baselines = list(dict.fromkeys(name for row in rows for name in row.beats))
    head = ["measure", f"{run.ladder[0]}, smallest", f"{run.ladder[-1]}, largest", "better with size"]
    table = ([row.name, *row.values, row.scales, *(row.beats.get(name, NOTHING) for name in baselines)] for row in rows)
    top = page.paragraph(sentence) + page.table([*head, *(f"largest better than\n{name}" for name in baselines)], table)
    return top + page.paragraph(RULES)


def _losses(run: RunResults) -> Iterator[Verdict]:
    """Measures without an interval."""
    measured = {"val_loss": {point: run.summaries[point]["val_loss"] for point in run.ladder}}
    measured |= {name: {point: run.fidelity.get(point, {}).get(name) for point in run.ladder} for name in MSE}
    for name, values in measured.items():
        if None in values.values():
            continue
        ends = run.ladder[0], run.ladder[-1]
        if name == "val_loss":
            parts = [summary_part(run, point, name) for point in ends]
        else:
            parts = [part_of(values[point], run.home / "reconstruct" / point / "result.json", name) for point in ends]
        numbers = list(values.values())
        falls = all(larger < smaller for smaller, larger in zip(numbers, numbers[1:], strict=False))
        yield Verdict(MEASURES[name], (parts[0], parts[1]), YES if falls else NO, {})


def _tasks(run: RunResults, page: Page) -> Iterator[Verdict]:
    smallest, largest = run.ladder[0], run.ladder[-1]
    baselines = {f"{UNTRAINED}{largest}": f"untrained {largest}", "pixels": "raw pixels"}
    for task in run.tasks:
        first, last = (run.result(point, task, "frozen") for point in (smallest, largest))
        if first is None or last is None:
            continue
        beats = {}
        for encoder, words in baselines.items():
            if (other := run.result(encoder, task, "frozen")) is not None:
                beats[words] = joined([better(last, other), result_part(run, other, "value")], "\n")
        if (name := TRIVIAL.get(task)) in last.others:
            beats[TRIVIAL_ANSWER] = joined([beyond(last, last.others[name]), result_part(run, last, "others", name)], "\n")
        elif task == "actions" and (classes := _classes(run, last)) is not None:
            page.derive(CHANCE, 1 / classes.value, [classes])
            beats[TRIVIAL_ANSWER] = joined([beyond(last, 1 / classes.value), page.derived_number(CHANCE)], "\n")
        values = (_with_interval(run, first), _with_interval(run, last))
        yield Verdict(MEASURES.get(last.metric, f"{task}: {last.metric}"), values, better(last, first), beats)


def _with_interval(run: RunResults, r: Result) -> Sequence[Part]:
    low, high = (result_part(run, r, key) for key in ("low", "high"))
    return [result_part(run, r, "value"), "\n[", low, ", ", high, "]"]


def _classes(run: RunResults, r: Result) -> Number | None:
    """The number of classes in the settings of a readout of actions."""
    stage, words = f"readout/{r.encoder}/{r.task}/{r.protocol}", ("readout.tasks.actions", "Actions", "classes")
    value = run.provenances[stage]["settings"]
    for word in words:
        value = value.get(word, {})
    source = (run.home / stage / "provenance.json").as_posix()
    return Number(value, ",d", source, ("settings", *words)) if value else None


def beyond(r: Result, value: float) -> str:
    """Whether a result's interval lies on the better side of a value."""
    if r.low <= value <= r.high:
        return NOISE
    return YES if (r.value > value) == r.higher_is_better else NO


def better(a: Result, b: Result) -> str:
    """Whether `a` is better than `b` by intervals that do not overlap."""
    if a.low > b.high or a.high < b.low:
        return YES if (a.value > b.value) == a.higher_is_better else NO
    return NOISE
