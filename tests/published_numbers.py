"""The sentences of README, guide and findings that state measured numbers, which are computed from committed tables."""

import contextlib
import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from scaling4d import config
from scaling4d.pretrain.plan.closed_form import GIB
from scaling4d.pretrain.plan.plan import plan
from scaling4d.pretrain.plan.readouts import plan_readouts
from scaling4d.pretrain.plan.table import digits
from scaling4d.provenance import flatten, load_yaml
from scaling4d.report.seeds import SeedStudy, noise_of_seeds, read_seed_study
from scaling4d.report.verdict import TRIVIAL, better, beyond_noise, falls, falls_beyond_noise
from scaling4d.studies.study import RECONSTRUCT_METRICS, loss_task
from scaling4d.training.gpus import STORAGE_GB_PER_S, WORKER_CLIPS_PER_S

ROOT = Path(__file__).parents[1]
README, GUIDE = "README.md", "experiments/GUIDE.md"


def _rows(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader((ROOT / "reports" / path).open()))


def _bench(name: str) -> Any:
    return json.loads((ROOT / f"reports/bench/{name}.json").read_text())["results"]


def _named(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (row,) = (row for row in rows if row["name"] == name)
    return row


def statements() -> Iterator[tuple[str, str]]:
    """(file, sentence)."""
    yield from ((README, sentence) for sentence in _results())
    yield from ((GUIDE, sentence) for sentence in _curation())
    yield from ((f"reports/studies/{name}/findings.md", sentence) for name, sentence in _findings())
    yield from ((GUIDE, sentence) for sentence in (*_decoding(), *_loading(), *_features(), *_training(), *_masking(), *_scale()))


MEASURES = {  # task -> name of its row
    "actions": "actions, top-1 accuracy ↑",
    "boxes": "boxes, mean IoU ↑",
    "depth": "depth, AbsRel ↓",
    "points": "points, average Jaccard ↑",
    "pose": "camera motion, end-point error ↓",
}
OTHER_METHOD = "mae_st_tiny"
LOSSES = (  # task and metric as a study has them, name of the row
    ("pretrain", "val_loss", "validation loss ↓"),
    ("reconstruct_moving", "moving_mse", "squared error of hidden pixels that move ↓"),
)


ONE_RUN = (
    "Results of the pocket: one run, one seed. Yes: the 95 % intervals over validation videos do not overlap (losses: every "
    "larger encoder is better). Differences between seeds are not measured yet."
)
SEEDS = (
    "Results of the pocket: means ± standard deviations over {seeds} seeds. Yes: the difference exceeds the noise, within which "
    "two equal encoders differ in 95 % of cases. A loss must also fall from each size to the next."
)

EARLIER = " The run is of earlier settings; that of today's comes next."


def _results() -> Iterator[str]:
    """README's table and the sentences above it.

    Both are of means over seeds if the study of seeds belongs to the report's run, else of that run.
    """
    trained = {row["point"]: row for row in _rows("built/pretrain.csv")}
    ladder = [row for row in trained.values() if row["method"] == "SimpleMAE"]
    ladder.sort(key=lambda row: int(row["parameters"]))
    points = [row["point"] for row in ladder]
    sizes = (f"{int(row['parameters']) / 1e6:.2f} M" for row in (ladder[0], trained[OTHER_METHOD], ladder[-1]))
    small, large = points[0], points[-1]
    columns = (f"{point}, {size}" for point, size in zip((small, "MAE-ST", large), sizes, strict=True))
    answers = f"{large} better than {small} | better than untrained"
    head = f"| | {' | '.join(columns)} | untrained {large} | raw pixels | trivial | {answers} |"
    seed, measured = int(ladder[0]["seed"]), {}
    for row in _rows("built/pretrain.csv"):
        measured[row["point"], loss_task(row["method"]), "val_loss"] = seed, float(row["val_loss"]), ""
    for row in _rows("built/reconstruct.csv"):
        for metric in (metric for metric in RECONSTRUCT_METRICS if row.get(metric)):
            measured[row["point"], RECONSTRUCT_METRICS[metric], metric] = seed, float(row[metric]), row["checkpoint_sha256"]
    readouts = [row for row in _rows("built/results.csv") if row["protocol"] == "frozen" and row["low"]]
    for row in readouts:
        measured[row["encoder"], row["task"], row["metric"]] = seed, float(row["value"]), row["checkpoint_sha256"]
    stages = json.loads((ROOT / "reports/built/stages.json").read_text())
    with contextlib.chdir(ROOT):
        study = read_seed_study(stages["profile"], stages["code"], measured)
    fresh = study if study and not study.stale else None
    sentences = SEEDS.format(seeds=fresh.of(points[0], "pretrain", "val_loss").seeds) if fresh else ONE_RUN
    yield sentences + (EARLIER if _of_earlier_settings(stages) else "")
    yield head
    for task, metric, name in LOSSES:
        if all((point, task, metric) in measured for point in points):
            scales = "yes" if falls([measured[point, task, metric][1] for point in points]) else "no"
            if fresh:
                by_point = [fresh.of(point, task, metric) for point in points]
                scales = falls_beyond_noise(
                    [statistics.mean for statistics in by_point], noise_of_seeds(by_point, by_point[0], by_point[-1])
                )
            ends = [_shown(fresh, measured, (point, task, metric)) for point in (points[0], points[-1])]
            yield f"| {name} | {' | - | '.join(ends)} | - | - | - | {scales} | - |"
    for task, name in MEASURES.items():
        rows = {row["encoder"]: row for row in readouts if row["task"] == task}
        best = rows[large]
        key = task, best["metric"]
        trivial = _further(large, task, TRIVIAL[task])
        encoders = (small, OTHER_METHOD, large, f"untrained_{large}", "pixels")
        cells = [_shown(fresh, measured, (encoder, *key)) for encoder in encoders]
        cells.append("-" if trivial is None else _short(trivial))
        for other in (small, f"untrained_{large}"):
            answer = better(_interval(best), _interval(rows[other]))
            if fresh:
                first, last = (fresh.of(encoder, *key) for encoder in (other, large))
                noise = noise_of_seeds(fresh.of_task(task), last, first)
                answer = beyond_noise(last.mean, first.mean, noise, best["higher_is_better"] == "True")
            cells.append(answer)
        yield f"| {name} | {' | '.join(cells)} |"


def _of_earlier_settings(stages: dict[str, Any]) -> bool:
    """Whether params.yaml has other settings than the report's run. stages: of stages.json."""
    today = dict(flatten(load_yaml((ROOT / "params.yaml").read_text())))
    settings = (flatten({key: value}) for stage in stages["stages"].values() for key, value in stage["settings"].items())
    return any(today.get(key) != value for pairs in settings for key, value in pairs)


def _shown(study: SeedStudy | None, measured: dict[tuple[str, str, str], Any], key: tuple[str, str, str]) -> str:
    """Mean±standard deviation over seeds, or the value of the one run."""
    if study is None:
        return _short(measured[key][1])
    statistics = study.of(*key)
    return f"{_short(statistics.mean)}±{statistics.deviation:.{4 if statistics.mean < 0.1 else 3}f}"


def _further(encoder: str, task: str, metric: str) -> float | None:
    """A further metric of a frozen readout; None where it has none."""
    place = (encoder, task, "frozen", metric)
    columns = ("encoder", "task", "protocol", "metric")
    values = [row["value"] for row in _rows("built/results.csv") if tuple(row[column] for column in columns) == place]
    return float(values[0]) if values else None


def _short(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def _interval(row: dict[str, str]) -> SimpleNamespace:
    numbers = {name: float(row[name]) for name in ("value", "low", "high")}
    return SimpleNamespace(**numbers, higher_is_better=row["higher_is_better"] == "True")


def _findings() -> Iterator[tuple[str, str]]:
    """Study and sentence: what the first line of its findings states."""
    isoflop, rates, seeds = (
        {row["arm"]: float(row["mean"]) for row in _rows(f"studies/{name}/table.csv") if row["task"] == "pretrain"}
        for name in ("isoflop", "learning_rate", "seeds")
    )
    best = (min((arm for arm in isoflop if arm.endswith(f"_{budget}")), key=isoflop.get) for budget in (1, 2, 4, 8))
    yield "isoflop", f"{', '.join(f'{arm[:-2]} at {arm[-1]}e12' for arm in best)} training FLOPs"
    predicted = _rows("studies/isoflop_largest/predicted.csv")
    law, line = (
        sorted(abs(float(row[f"{name}_percent"])) for row in predicted if row["measured"]) for name in ("miss", "by_a_line")
    )
    yield (
        "isoflop_largest",
        f"missed all {len(law)} losses by {law[0]:.1f} to {law[-1]:.1f} %; a line through the last two budgets of each size "
        f"missed by {line[0]:.1f} to {line[-1]:.1f} %",
    )
    sizes = ("nano", "tiny", "mini")
    best = [min((arm for arm in rates if arm.startswith(size)), key=rates.get) for size in sizes]
    count, own = len(rates) // len(sizes), sum(arm.endswith("_100") for arm in best)
    yield "learning_rate", f"Of {count} rates the pocket's is the best at {own} of {len(sizes)} sizes"
    yield "seeds", f"From nano to mini the loss falls by {1 - seeds['mini'] / seeds['nano']:.1%}"
    medium, big = (abs(float(row["miss_percent"])) for row in _rows("studies/desk/predicted.csv"))
    yield "desk", f"missed the losses of medium and big by {medium:.1f} and {big:.1f} %"


def _curation() -> Iterator[str]:
    results = _bench("curate")
    small, large, again = results["rows"]
    paper, mib = results["paper"], 2**20
    yield (
        f"{large['files']:,} files took {large['seconds']:.0f} s, and {again['files'] - large['files']} more files "
        f"{again['seconds']:.0f} s ({results['second_run_of_first']:.1%} of the time). The main process held "
        f"{small['peak_main'] / mib:.0f} MiB for {small['files']} files and "
        f"{large['peak_main'] / mib:.0f} for {large['files']:,}."
    )
    yield (
        f"{round(paper['core-hours'], -3):,.0f} core-hours ({paper['1,000 cores: days']:.1f} days on 1,000 cores), "
        f"{paper['clips'] / 1e9:.1f} billion clips, {paper['storage, TB']:.0f} TB."
    )


def _decoding() -> Iterator[str]:
    results, peers = _bench("decode"), ("torchcodec", "torchcodec exact", "torchcodec, torch resizes", "OpenCV", "plain PyAV")
    kinds = [results[f"{size} GOP {gop}"] for size in ("640x360", "1280x720") for gop in (12, 250)]
    best = [1 / max(_named(kind["rows"], peer)["over_ours"] for peer in peers) for kind in kinds]
    yield (
        f"{best[0]:.2f} times theirs (640x360, a key frame every 12), {best[1]:.2f} times (every 250), {best[2]:.2f} and "
        f"{best[3]:.2f} times (1280x720; the last within the spread)."
    )
    four = [f"{_named(kind['processes'], 'processes: 4')['over_ours']:.1f}" for kind in kinds]
    yield f"Four processes decode {', '.join(four[:3])} and {four[3]} times as many clips as one."
    shares = [sum(kind["ffmpeg_share_of_ours"].values()) for kind in kinds]
    yield f"FFmpeg takes {100 * min(shares):.0f} to {max(shares):.0%} of our time."


def _loading() -> Iterator[str]:
    results = _bench("loader")
    kinds = [results[kind]["rows"] for kind in ("whole sources", "encoded clips")]
    sources, clips = (_named(rows, "workers: 2")["over_all_cores"] for rows in kinds)
    yield f"reaches {sources:.0%} of twice the rate of one core from whole sources, and {clips:.0%} from clips encoded at 224 px"
    plain, cropped = (_named(kinds[1], name)["per_s"] for name in ("workers: 0", "workers: 0, cropped and mirrored"))
    yield f"A core gives {plain:.0f} encoded clips a second, and {cropped:.0f} where it crops and mirrors them"
    yield f"a slower core gave {cropped:.0f}, and {plain:.0f} without them"
    source = _named(kinds[0], "workers: 0")["per_s"]
    yield f"a core of `reports/bench/loader.json` gives {source:.0f} clips/s, and {plain:.0f} from encoded clips"
    copies, windows, alone = (row["per_s"] for row in results["repeated sampling"]["rows"])
    yield (
        f"Four copies of a clip come at {copies:.0f} clips a second, four windows of a long clip at {windows:.0f}, decoded in "
        f"one pass, and {alone:.0f} one by one"
    )


def _features() -> Iterator[str]:
    bench = json.loads((ROOT / "reports/bench/features.json").read_text())
    ours, loop = bench["results"]["rows"]
    times = (bench["raw"]["seconds"][row["name"]] for row in (loop, ours))
    of_the_loop, of_ours = (f"{min(seconds):.1f} to {max(seconds):.1f} s" for seconds in times)
    yield f"the loop is {loop['over_ours']:.2f} times as fast in the median ({of_the_loop}; ours {of_ours})"
    yield (
        f"The peak of memory was {ours['peak_mib']:.0f} MiB (the loop: {loop['peak_mib']:.0f}), and "
        f"{bench['results']['peak_mib_of_a_tenth']:.0f} MiB with a tenth of the video."
    )


def _training() -> Iterator[str]:
    videomae, mae_st = (_bench("pretrain")[f"beside {peer}, fp32"] for peer in ("VideoMAE", "MAE-ST"))
    times = {ratio["of"]: ratio["median"] for group in (videomae, mae_st) for ratio in group["ratios"]}
    shares = [_named(videomae["rows"], f"SimpleMAE B, {hidden} %, 196 coarse tokens")["share_of_peak"] for hidden in (90, 95)]
    yield (
        f"on {times['SimpleMAE B, 90 %, 196 coarse tokens']:.1f} times as many clips a second where both hide 90 %, and on "
        f"{times['SimpleMAE B, 95 %, 196 coarse tokens']:.1f} times as many where it hides its own 95 %, at "
        f"{100 * shares[0]:.0f} and {shares[1]:.0%} of the matrix product's peak."
    )
    yield f"the factors are {times['SimpleMAE B, 90 %']:.1f} and {times['SimpleMAE B, 95 %']:.1f}."
    yield f"MAE-ST-B trains on {times['MAE-ST B, 90 %']:.2f} times as many clips a second as the official code"


def _masking() -> Iterator[str]:
    large, base = (_bench("masking-fp32")[size]["rows"] for size in "LB")
    fast = [_named(rows, "MAE-ST, 90%")["times_as_fast"]["median"] for rows in (large, base)]
    yield f"hiding 90 % makes a step of MAE-ST {fast[0]:.1f} times as fast at L and {fast[1]:.1f} times at B"
    simple = [_named(rows, "SimpleMAE, 95%")["over_ours"] for rows in (large, base)]
    loaded = [_named(large, f"{method}, 95%")["times_as_fast_with_loading"] for method in ("MAE-ST", "SimpleMAE")]
    yield (
        f"SimpleMAE at 95 % is {simple[0]:.1f} times as fast as MAE-ST without hiding at L and {simple[1]:.1f} times at B "
        f"(with the loading of its clips {loaded[0]:.1f} to {loaded[1]:.1f} times for L at 95 %, each against its own)."
    )


def _scale() -> Iterator[str]:
    """Rows of the guide's table of plans: 256 H100, the profile's meshes; the sum of the frozen readouts of j."""
    with contextlib.chdir(ROOT):
        plans = {point: plan(point) for point in "SBLHGej"}
        settings = config.compose(["profile=paper", "readout.Evaluation.data=absent"])
        readouts = plan_readouts("j", settings, gpu="h100", worker_clips_per_s=WORKER_CLIPS_PER_S)
    total, actions = readouts["total"], readouts["tasks"][0]
    low, high = total["gpu_hours"]
    yield (
        f"for the five tasks of j on {readouts['gpus']} H100: {total['windows']:,} windows, {low:.0f} to {high:.0f} GPU-hours, "
        f"{total['stored_bytes'] / 1e12:.0f} TB of features, {actions['stored_bytes'] / 1e12:.0f} TB of them of actions."
    )
    terabytes, speed = total["head_bytes"] / 1e12, STORAGE_GB_PER_S
    yield f"of heads read {terabytes:.0f} TB of features, {1000 * terabytes / speed / 3600:.0f} hours at {speed:g} GB/s"
    for point, content in plans.items():
        mesh, loading, clip = content["mesh"], content["loading"], content["flops_per_clip"]["total"] / 1e12
        ideal_s = mesh["mfu"][0] * mesh["step_s"][0]
        mfu = [ideal_s / seconds for seconds in mesh["gpu_step_s"]]
        days = [content["schedule"]["steps"] * seconds / 86400 for seconds in mesh["gpu_step_s"]]
        workers = [needed / loading["worker_clips_per_s"] for needed in mesh["clips_per_s_needed"]]
        cells = [
            point,
            f"{content['parameters']['total'] / 1e6:.0f}",
            f"{clip:.3g}",
            f"{mesh['memory_bytes']['total'] / GIB:.3g}",
        ]
        cells += [digits(mfu, 100), digits(days), digits(mesh["clips_per_s_needed"]), digits([math.ceil(n) for n in workers])]
        cells += [digits(mesh["days"]), digits([content["storage"]["training_state_bytes"] / 1e9])]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(sentence for file, sentence in statements() if file == README))
