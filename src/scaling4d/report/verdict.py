"""The page's first section: the measures that improve with size, and the baselines that the largest point beats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from scaling4d.records import Result
from scaling4d.report.page import Number, Page, Part, joined, part_of
from scaling4d.report.run_results import UNTRAINED, RunResults
from scaling4d.report.seeds import SeedStatistics, noise_of_seeds
from scaling4d.report.tables import interval, result_part, summary_part
from scaling4d.studies.fits import spearman
from scaling4d.studies.markup import NOTHING
from scaling4d.studies.study import RECONSTRUCT_METRICS
from scaling4d.studies.words import METRIC_LABELS, encoder_words

YES, NOISE, NO = "yes", "within noise", "no"
TRIVIAL = {  # task -> further metric of its readouts: that of an answer that looks at no video
    "actions": "top1_mean",
    "boxes": "mean_iou_first_box_repeated",
    "depth": "abs_rel_mean",
    "points": "average_jaccard_standing_still",
    "pose": "epe_standing_still",
}
TRIVIAL_ANSWER = "the trivial answer"
ONE_RUN = (
    "Better: the 95 % intervals over validation videos do not overlap. The trivial answer has no interval of its own; it is "
    "given one as wide as that of the largest point. A loss has no interval; it has to fall at every step of size."
)
ONE_RUN_IN_FULL = (
    "Better with size compares the largest and the smallest point. Within noise: the intervals overlap. They are of one run "
    "and do not hold the noise between seeds."
)
SEEDS = (
    " seeds, ± their standard deviation. Better: by more than the noise of seeds. The trivial answer has no noise of its "
    "own. A loss also has to fall at every step of size."
)
SEEDS_IN_FULL = (
    "Better with size compares the largest and the smallest point. Within noise: the change does not exceed the noise, the "
    "95 % limit of the difference of two equal encoders. The noise is the larger one of two limits. One is of the deviation of "
    "all encoders of the study together, for a loss of the points that differ in size alone, because other methods predict "
    "other targets. The other is Welch's, of the two encoders alone. Change and noise of a loss are shares of the smallest "
    "point's mean. A seed changes weights, masks, flips and the order of clips; worlds "
    "and validation videos stay, so their choice is not in this noise."
)


@dataclass(frozen=True)
class Verdict:
    """A row. values: of the smallest and of the largest point. scales: YES, NOISE or NO. beats: baseline -> YES,
    NOISE or NO, and the baseline's value. task: empty for a loss.

    change: from the smallest to the largest point; empty where intervals tell more.
    """

    name: str
    values: tuple[Part, Part]
    scales: str
    change: Part
    beats: dict[str, tuple[str, Part]]
    task: str = ""


def measure_rows(run: RunResults, page: Page) -> list[Verdict]:
    """A row for each measure; none with one size alone."""
    return [*_losses(run, page), *_tasks(run, page)] if len(run.ladder) > 1 else []


def conclusion(run: RunResults, page: Page, rows: Sequence[Verdict]) -> str:
    """What improves with size, which baselines the largest point does not beat, and where other encoders are better."""
    if len(run.ladder) < 2:
        return page.paragraph("This profile has one size alone, so nothing can be said of size.")
    named = [(answer, [row.name.rsplit(" ", 1)[0] for row in rows if row.scales == answer]) for answer in (YES, NOISE, NO)]
    noise = "the noise of seeds" if run.fresh_seed_study else "the noise of this run"
    heads = {YES: "Better with size", NOISE: f"Within {noise}", NO: "Not better with size"}
    smallest, largest = (summary_part(run, point, "parameters", spec="M") for point in (run.ladder[0], run.ladder[-1]))
    span, sentences = [" (from ", smallest, " to ", largest, " parameters)"], []
    for answer, names in ((answer, names) for answer, names in named if names):
        sentences.append([heads[answer], *([] if sentences else span), f": {'; '.join(names)}."])
    return page.paragraph(*joined([*sentences, *_comparisons(run, rows)], " "))


def _comparisons(run: RunResults, rows: Sequence[Verdict]) -> Iterator[str]:
    """The largest point against the baselines, smaller points below untrained weights, methods above every size."""
    tasks, largest = [row for row in rows if row.beats], run.ladder[-1]
    baselines = list(dict.fromkeys(name for row in tasks for name in row.beats))
    if baselines:
        unbeaten = {row.task: [name for name, (answer, _) in row.beats.items() if answer != YES] for row in tasks}
        exceptions = [f"{task} ({', '.join(names)})" for task, names in unbeaten.items() if names]
        but = f"at every task but {', '.join(exceptions)}" if exceptions else "at every task"
        yield f"{largest}, the largest, is better than {', '.join(baselines)} {but}."
    untrained = f"{UNTRAINED}{largest}"
    for point in run.ladder[:-1]:
        worse = [row.task for row in tasks if encoder_better(run, row.task, untrained, point) == YES]
        if worse:
            yield f"{point} is worse than {encoder_words(untrained)} at {', '.join(worse)}."
    for point in (point for method in run.methods[1:] for point in run.of_method(method)):
        best = [row.task for row in tasks if all(encoder_better(run, row.task, point, size) == YES for size in run.ladder)]
        if best:
            yield f"{point} ({run.summaries[point]['method']}) is better than every size at {', '.join(best)}."


def encoder_better(run: RunResults, task: str, a: str, b: str) -> str | None:
    """Whether the frozen readout of `a` is better than that of `b`, by seeds or by intervals; None without both."""
    first, second = run.result(a, task, "frozen"), run.result(b, task, "frozen")
    if first is None or second is None:
        return None
    if not run.fresh_seed_study:
        return better(first, second)
    one, other = (run.fresh_seed_study.of(r.encoder, task, r.metric) for r in (first, second))
    noise = noise_of_seeds(run.fresh_seed_study.of_task(task), one, other)
    return beyond_noise(one.mean, other.mean, noise, first.higher_is_better)


def verdict(run: RunResults, page: Page, rows: Sequence[Verdict]) -> str:
    """The rule of the answers, and a row for each measure. Tasks: frozen readouts.

    With a study of seeds that belongs to the run, means over seeds are compared, else the intervals of this run.
    """
    if len(run.ladder) < 2:
        return ""
    baselines = list(dict.fromkeys(name for row in rows for name in row.beats))
    head = ["measure", "better with size", f"{run.ladder[0]}, smallest", f"{run.ladder[-1]}, largest"]
    head += [f"largest better than\n{name}" for name in baselines]
    table = []
    for row in rows:
        cells = [joined(row.beats[name], "\n") if name in row.beats else NOTHING for name in baselines]
        table.append([row.name, joined([row.scales, *filter(None, [row.change])], "\n"), *row.values, *cells])
    rule: list[Part] = [ONE_RUN]
    if run.fresh_seed_study:
        rule = ["Means of ", next(iter(run.fresh_seed_study.numbers.values())).part("seeds"), SEEDS]
    return page.paragraph(*rule) + page.table(head, table)


def rules(run: RunResults, page: Page) -> str:
    """The rest of the rule, and why a study of seeds was left out."""
    if len(run.ladder) < 2:
        return ""
    if run.fresh_seed_study:
        return page.paragraph(" ".join(filter(None, [SEEDS_IN_FULL, run.seed_study.other_code])))
    return page.paragraph(" ".join(filter(None, [ONE_RUN_IN_FULL, run.seed_study and run.seed_study.stale])))


def _losses(run: RunResults, page: Page) -> Iterator[Verdict]:
    """Measures without an interval: over seeds the means, else the values of this run."""
    sizes = [summary_part(run, point, "parameters") for point in run.ladder]
    for metric in ("val_loss", *RECONSTRUCT_METRICS):
        name, change, inputs, measured = f"change of {metric} with size", {}, [], []
        if study := run.fresh_seed_study:
            task = RECONSTRUCT_METRICS.get(metric, "pretrain")
            measured = [statistics for point in run.ladder if (statistics := study.of(point, task, metric))]
            parts = [statistics.part("mean") for statistics in measured]
        elif metric == "val_loss":
            parts = [summary_part(run, point, metric) for point in run.ladder]
        else:
            sources = [run.home / "reconstruct" / point / "result.json" for point in run.ladder]
            values = [run.fidelity.get(point, {}).get(metric) for point in run.ladder]
            parts = [part_of(value, source, metric) for value, source in zip(values, sources, strict=True)]
        if NOTHING in parts or len(parts) < len(run.ladder):
            continue
        losses = [part.value for part in parts]
        scales, ends = YES if falls(losses) else NO, (parts[0], parts[-1])
        if measured:
            noise = noise_of_seeds(measured, measured[0], measured[-1])
            scales, ends = falls_beyond_noise(losses, noise), (measured[0].with_deviation, measured[-1].with_deviation)
            change = {"noise": None if noise is None else noise / losses[0]}
            inputs = [statistics.value_part(seed) for statistics in measured for seed in statistics.values]
        change |= {"relative": losses[-1] / losses[0] - 1, "spearman": spearman([size.value for size in sizes], losses)}
        page.derive(name, change, [*sizes, *parts, *inputs])
        number = partial(page.derived_number, name)
        shown = [number("relative", spec="+.1%"), *(["\nnoise ", number("noise", spec=".1%")] if measured else [])]
        yield Verdict(METRIC_LABELS[metric], ends, scales, [*shown, "\nSpearman ", number("spearman", spec="+.2f")], {})


def _tasks(run: RunResults, page: Page) -> Iterator[Verdict]:
    smallest, largest = run.ladder[0], run.ladder[-1]
    baselines = (f"{UNTRAINED}{largest}", "pixels")
    for task in run.tasks:
        first, last = (run.result(point, task, "frozen") for point in (smallest, largest))
        if first is not None and last is not None:
            others = {encoder_words(name): r for name in baselines if (r := run.result(name, task, "frozen"))}
            row = _task_over_seeds if run.fresh_seed_study else _task_of_one_run
            yield row(run, page, first, last, others)


def _task_over_seeds(run: RunResults, page: Page, first: Result, last: Result, others: Mapping[str, Result]) -> Verdict:
    """others: the largest point is compared with them too."""
    small, large = (run.fresh_seed_study.of(r.encoder, r.task, r.metric) for r in (first, last))
    every = run.fresh_seed_study.of_task(last.task)

    def answer(value: float, other: SeedStatistics | None = None) -> str:
        return beyond_noise(large.mean, value, noise_of_seeds(every, large, other), last.higher_is_better)

    beats: dict[str, tuple[str, Part]] = {}
    for words, r in others.items():
        other = run.fresh_seed_study.of(r.encoder, r.task, r.metric)
        beats[words] = answer(other.mean, other), other.with_deviation
    if trivial := trivial_answer(run, last):
        beats[TRIVIAL_ANSWER] = answer(trivial.value), trivial
    name = f"change of {last.task} with size"
    change = {"difference": large.mean - small.mean, "noise": noise_of_seeds(every, large, small)}
    values = [statistics.value_part(seed) for statistics in every for seed in statistics.values]
    page.derive(name, change, [large.part("mean"), small.part("mean"), *values])
    shown = [page.derived_number(name, "difference", spec="+.4f"), "\nnoise ", page.derived_number(name, "noise", spec=".4f")]
    ends = small.with_deviation, large.with_deviation
    return Verdict(_measure(last), ends, answer(small.mean, small), shown, beats, last.task)


def _task_of_one_run(run: RunResults, page: Page, first: Result, last: Result, others: Mapping[str, Result]) -> Verdict:
    beats: dict[str, tuple[str, Part]] = {words: (better(last, r), result_part(run, r, "value")) for words, r in others.items()}
    if trivial := trivial_answer(run, last):
        beats[TRIVIAL_ANSWER] = beyond(last, trivial.value), trivial
    values = (interval(run, first), interval(run, last))
    return Verdict(_measure(last), values, better(last, first), "", beats, last.task)


def _measure(r: Result) -> str:
    return METRIC_LABELS.get(r.metric, f"{r.task}: {r.metric}")


def trivial_answer(run: RunResults, r: Result) -> Number | None:
    """The task's metric of TRIVIAL, if it was measured beside this result."""
    name = TRIVIAL.get(r.task)
    return result_part(run, r, "others", name) if name in r.others else None


def beyond_noise(value: float, other: float, noise: float | None, higher_is_better: bool) -> str:
    """Whether a mean over seeds is better than another number by more than the noise of seeds (None: unknown)."""
    if noise is None or abs(value - other) <= noise:
        return NOISE
    return YES if (value > other) == higher_is_better else NO


def falls(losses: Sequence[float]) -> bool:
    """Whether every loss is below the one before it."""
    return all(larger < smaller for smaller, larger in pairwise(losses))


def falls_beyond_noise(means: Sequence[float], noise: float | None) -> str:
    """Whether the means of a loss, from small to large, fall at every step, and from first to last beyond the noise."""
    answer = beyond_noise(means[-1], means[0], noise, higher_is_better=False)
    return NO if answer == YES and not falls(means) else answer


def beyond(r: Result, value: float) -> str:
    """Whether a result is better than a value without an interval, which is given one as wide as the result's."""
    return better(r, replace(r, value=value, low=value - (r.value - r.low), high=value + (r.high - r.value)))


def better(a: Result, b: Result) -> str:
    """Whether `a` is better than `b` by intervals that do not overlap."""
    if a.low > b.high or a.high < b.low:
        return YES if (a.value > b.value) == a.higher_is_better else NO
    return NOISE
