"""The steps of `scaling4d bench gpu`, in order of value. Each also rehearses on a CPU."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from packaging.utils import canonicalize_name
from torch import Tensor, nn

from scaling4d import artifacts, config
from scaling4d.pipeline.environment import describe_attention
from scaling4d.pretrain.settings import BETAS, points_of
from scaling4d.records import Result, UserError
from scaling4d.training.gpus import WORKER_CLIPS_PER_S
from scaling4d.training.optimizer import build_adamw
from scaling4d_bench import attention, devices, loader, masking, mfu, pretrain, steps
from scaling4d_bench.gpu_hour import HourStep, Outcome

LOCK = Path("requirements-cuda.lock")
TESTS = "tests/bench/test_gpu.py"
REPEATED_STEPS, RATE = 20, 1e-3  # of the determinism step; learning rate
SAME_STEPS = 0.01, 0.05  # its tolerance, of losses and weights; ours: an H200 gave .0015 and .019
CLAIMED = "5.8 for computing, 4.1 with loading, on A100"  # arXiv:2205.09113: ViT-L, 90 % hidden
# Of a rehearsal: shapes of the points, settings and videos
SMALL = {"clip": [8, 64, 64], "width": 32, "depth": 2, "heads": 2, "mlp": 64}
SMALL_MAE_ST = SMALL | {"decoder_width": 16, "decoder_heads": 2, "decoder_depth": 1, "predicted_frames": 4}
SMALL_PROFILE = ["profile=smoke", "benchmarks.tasks=[actions]", "show.tasks=[]", "encoders.frozen=[nano]"]
SMALL_PROFILE += ["encoders.untrained=[]", "encoders.finetune=[]", "encoders.classifier=[]"]
# Profile smoke with a rank a stage; states are written behind the computing, as in profile paper
SMOKE = ["profile=smoke", "pretrain.Training.ranks=1", "readout.Evaluation.ranks=1", "show.tasks=[]"]
SMOKE += ["pretrain.Runtime.asynchronous=true", "pretrain.Runtime.save_every=2", "readout.saving.Saving.save_every=1"]
COMPUTE = ("pretrain.Training", "readout.Compute", "reconstruct.Filling")
ON_A_GPU = [f"{name}.{setting}" for name in COMPUTE for setting in ("device=cuda", "compute=bfloat16")]
PROJECT = ("src", "experiments", "dvc.yaml", "reports/bench/costs.json", "reports/studies", "reports/scaling.ipynb")


def check_lock(folder: Path, rehearse: bool) -> Outcome:
    """Installed versions beside the lock, and the attention that is chosen. Fails where torch or xformers differ."""
    differing = lock_differences(LOCK.read_text())
    for name, (pinned, installed) in differing.items():
        print(f"{name}: {installed}, and the lock has {pinned}")
    chosen = list(describe_attention())
    print(*chosen, sep="\n")
    wrong = sorted({"torch", "xformers"} & differing.keys())
    if wrong and not rehearse:
        raise UserError(f"{', '.join(wrong)} differ from {LOCK}; run `make install-cuda`")
    return Outcome(f"{len(differing)} packages differ from the lock; {'; '.join(chosen)}", "torch and xformers of the lock")


def lock_differences(lock: str) -> dict[str, tuple[str, str]]:
    """Package -> its version in the text of a lock, and the installed one or "none"; local labels are left out."""
    pinned = dict(line.strip().split("==") for line in lock.splitlines() if "==" in line and not line.startswith("#"))
    installed = {canonicalize_name(one.metadata["Name"]): one.version for one in metadata.distributions() if one.metadata["Name"]}
    pairs = {name: (version, installed.get(canonicalize_name(name), "none")) for name, version in pinned.items()}
    return {name: pair for name, pair in pairs.items() if pair[0].partition("+")[0] != pair[1].partition("+")[0]}


def check_attention(folder: Path, rehearse: bool) -> Outcome:
    """The GPU's tests, and every path of attention beside ours, both passes, in both precisions."""
    junit = (folder / "tests.xml").resolve()
    tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", TESTS, f"--junitxml={junit}"], check=False)
    if tests.returncode:
        raise UserError(f"tests of {TESTS} fail; see the log")
    (suite,) = ElementTree.parse(junit).getroot()
    skipped = int(suite.get("skipped"))
    text = f"{int(suite.get('tests')) - skipped} GPU tests pass, {skipped} skipped"
    total, given = (64, {"tokens": (16,), "heads": 2}) if rehearse else (100352, {})
    for precision in ("fp32",) if rehearse else ("fp32", "bf16"):
        path = attention.bench(folder, total=total, repeats=1 if rehearse else 5, precision=precision, **given)
        content = json.loads(path.read_text())
        rows = [row for results in content["results"].values() for row in results["rows"]]
        other = sorted({row["name"] for row in rows if not row["same"]})
        if "ours, packed" in {*other, *content["not_measured"]}:
            raise UserError(f"packed attention does not run, or differs from attention, in {precision}; see {path}")
        verdict = f"OTHER VALUES: {', '.join(other)}" if other else f"all {len({row['name'] for row in rows})} paths agree"
        text += f"; {precision}: {verdict} ({max(row['difference'] for row in rows):.0e})"
    return Outcome(text, "below " + ", ".join(f"{limit:g} in {name}" for name, limit in attention.SAME_BELOW.items()))


def repeat_steps(folder: Path, rehearse: bool) -> Outcome:
    """The same training of S twice: the largest difference of losses and weights, over the largest value.

    Raises UserError: one is above SAME_STEPS.
    """
    device, precision = devices.prepare(), "fp32" if rehearse else "bf16"
    clips, changes = (2, SMALL) if rehearse else (32, {})
    first, second = (_train(changes, clips=clips, precision=precision, device=device) for _ in range(2))
    loss, weights = (float((a - b).abs().max() / a.abs().max()) for a, b in zip(first, second, strict=True))
    (folder / "differences.json").write_text(json.dumps({"loss": loss, "weights": weights, "steps": REPEATED_STEPS}) + "\n")
    text, (most_loss, most_weights) = f"losses differ by {loss:.1e}, weights by {weights:.1e}", SAME_STEPS
    if not (loss <= most_loss and weights <= most_weights):
        raise UserError(f"{REPEATED_STEPS} steps twice: {text}; needed at most {most_loss:g} and {most_weights:g}")
    return Outcome(f"{REPEATED_STEPS} steps twice: {text}", f"at most {most_loss:g} and {most_weights:g}")


def _train(changes: Mapping[str, Any], *, clips: int, precision: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Losses of the steps, and all weights in one row."""
    model, losses = steps.as_trained(steps.build("S", changes, device), precision, device), []
    adamw = build_adamw({"all": (list(model.named_parameters()), RATE)}, betas=BETAS, weight_decay=0.05)

    def update(loss: Tensor) -> None:
        losses.append(loss.detach())
        loss.backward()
        adamw.step()
        adamw.zero_grad()

    step = steps.our_step(model, update, clips=clips, mask_ratio=model.config.mask_ratio, device=device)
    for _ in range(REPEATED_STEPS):
        step.run()
    return torch.stack(losses).cpu(), nn.utils.parameters_to_vector(model.parameters()).detach().cpu()


def measure_mfu(folder: Path, rehearse: bool) -> Outcome:
    """Steps of S to H, eager and compiled."""
    given = {"clips": 2, "repeats": 1, "precision": "fp32", "changes": SMALL} if rehearse else {}
    given = given or {"clips": 64, "repeats": 7, "precision": "bf16"}
    rows = json.loads(mfu.bench(folder, **given).read_text())["results"]["rows"]
    if not rows:
        raise UserError(f"no step of {', '.join(mfu.POINTS)} could be measured; see the log")
    plans = {row["name"].split(",")[0]: row["planned_mfu"] for row in rows}
    best = {point: max(row["mfu"] for row in rows if row["name"].split(",")[0] == point) for point in plans}
    memory = max((row["bytes"] / row["formula_bytes"] for row in rows if row["bytes"] and "," not in row["name"]), default=0.0)
    text = "MFU " + ", ".join(f"{point} {value:.0%}" for point, value in best.items())
    expected = "MFU " + ", ".join(f"{point} {low:.0%}-{high:.0%}" for point, (high, low) in plans.items())
    return Outcome(text + (f"; memory at most {memory:.2f} of the formula" if memory else ""), expected)


def measure_widest(folder: Path, rehearse: bool) -> Outcome:
    """j: steps of 4 of its 64 blocks; then features of all its encoder, with random weights."""
    device, small = devices.prepare(), SMALL if rehearse else {}
    given = {"clips": 2, "repeats": 1, "precision": "fp32"} if rehearse else {"clips": 64, "repeats": 5, "precision": "bf16"}
    rows = json.loads(mfu.bench(folder, points=("j",), changes={"depth": 4} | small, **given).read_text())["results"]["rows"]
    if not rows:
        raise UserError("no step of j could be measured; see the log")
    features = mfu.measured_features("j", small, device=device, **(given if rehearse else given | {"clips": 16}))
    speed = features["per_s"] * features["flops_per_clip"] / mfu.gpu_of(device).bf16_flop_per_s
    features |= {"share_of_peak": speed, **devices.settings(device)}
    (folder / "features.json").write_text(json.dumps(features) + "\n")
    (fast, slow), best = rows[0]["planned_mfu"], max(row["mfu"] for row in rows)
    text = f"4 blocks of j: MFU {best:.0%}; features of {features['parameters'] / 1e9:.1f} B parameters: "
    return Outcome(f"{text}{features['per_s']:.1f} clips/s, {speed:.0%} of the peak", f"MFU {slow:.0%}-{fast:.0%}")


def run_smoke(folder: Path, rehearse: bool) -> Outcome:
    """Every kind of stage of profile smoke in bfloat16, with states and probes; numbers mean nothing."""
    overrides = SMOKE if rehearse else SMOKE + ON_A_GPU
    project, settings = run_stages(folder, overrides, render=False)
    return Outcome(f"{len(_readouts(project, settings))} readouts and the report", "every stage ends")


def run_profile(folder: Path, rehearse: bool) -> Outcome:
    """Profile h100 from rendered videos to its report."""
    overrides = SMALL_PROFILE if rehearse else ["profile=h100"]
    project, settings = run_stages(folder, overrides, render=not rehearse)
    speeds = [f"{name} {value:.0%}" for name, value in _training_mfu(project, settings).items()]
    text = f"{len(_readouts(project, settings))} frozen readouts and the report; MFU with loading {', '.join(speeds)}"
    return Outcome(text, "under 25 minutes")


def run_stages(folder: Path, overrides: list[str], *, render: bool) -> tuple[Path, dict[str, Any]]:
    """Run a profile's stages in a project of its own below the step's folder, and copy its report to the folder.

    A stage whose output is there is not run again, so that a step which was late continues.

    Args:
        render: labelled videos of the profile's size; else those of the pocket.
    Returns:
        The project and its settings.
    """
    project = (folder / "project").resolve()
    project.mkdir(exist_ok=True)
    for name in PROJECT:
        link = project / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(Path(name).resolve())
    if not render and not (project / "data").is_dir():
        shutil.copytree("experiments/pocket", project / "data")
    settings = config.compose(overrides)
    for command, output in stage_commands(settings, overrides, render=render):
        if output and (project / output).exists():
            continue
        print(f"scaling4d {' '.join(command)}")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(["src", *_absolute(os.environ.get("PYTHONPATH", ""))])}
        done = subprocess.run([sys.executable, "-m", "scaling4d", *command], cwd=project, env=environment, check=False)
        if done.returncode:
            raise UserError(f"`scaling4d {' '.join(command[:4])}` ended with exit code {done.returncode}; the log has its reason")
    shutil.copytree(project / config.section(settings, "report.folder"), folder / "report", dirs_exist_ok=True)
    return project, settings


def _readouts(project: Path, settings: Mapping[str, Any]) -> list[Result]:
    return [Result.read(path) for path in sorted((project / artifacts.home(settings) / "readout").rglob("result.json"))]


def _absolute(path: str) -> list[str]:
    return [str(Path(part).resolve()) for part in path.split(os.pathsep) if part]


def stage_commands(settings: Mapping[str, Any], overrides: list[str], *, render: bool) -> Iterator[tuple[list[str], Path | None]]:
    """Commands of the stages, each with the file or folder that it makes; None: it runs every time."""
    home, listed = artifacts.home(settings), partial(config.section, settings)
    if render:
        yield ["render", "data", *overrides], Path("data")
    yield ["compose", *overrides], None
    yield ["code"], None
    yield ["clips"], home / "clips"
    yield ["benchmarks"], None
    for point in points_of(settings):
        yield ["pretrain", point], home / "pretrain" / point
    for encoder in [f"untrained_{point}" for point in listed("encoders.untrained")]:
        yield ["baseline", encoder], home / "pretrain" / encoder
    protocols = {"frozen": listed("benchmarks.tasks"), "finetune": listed("benchmarks.tasks"), "classifier": ["actions"]}
    for protocol, tasks in protocols.items():
        for encoder, task in itertools.product(listed(f"encoders.{protocol}"), tasks):
            yield ["readout", encoder, task, protocol], home / "readout" / encoder / task / protocol
    for point in settings["points"]:
        yield ["reconstruct", point], home / "reconstruct" / point
    yield ["report"], None


def _training_mfu(project: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    """By point, over all steps of its training that were logged."""
    shares = {}
    for point in points_of(settings):
        lines = [json.loads(line) for line in (project / artifacts.RUNS / f"pretrain-{point}" / "timings.jsonl").open()]
        shares[point] = sum(line["mfu"] * line["seconds"] for line in lines) / sum(line["seconds"] for line in lines)
    return shares


def measure_masking(folder: Path, rehearse: bool) -> Outcome:
    """The step of MAE-ST-L at 90 % hidden beside none hidden."""
    changes, given = None, {"clips": 32, "repeats": 5, "precision": "bf16"}
    if rehearse:
        changes, given = {"MAE-ST": SMALL_MAE_ST, "SimpleMAE": SMALL}, {"clips": 2, "repeats": 1, "precision": "fp32"}
        _set(masking, FILES=2, SECONDS=3.0, SIZE_PX=(96, 128), BATCHES=1, WORKERS=1)
        _set(loader, BATCH=2)
    content = json.loads(masking.bench(folder, changes=changes, **given).read_text())
    (row,) = [row for row in content["results"]["L"]["rows"] if row["name"] == "MAE-ST, 90%"]
    text = f"MAE-ST L at 90 %: {row['times_as_fast']['median']:.1f} times as fast as at 0 %"
    text += f", {row['times_as_fast_with_loading']:.1f} with loading"
    return Outcome(text, f"MAE-ST: {CLAIMED}; by FLOPs {row['times_as_fast_by_arithmetic']:.1f}")


def measure_loading(folder: Path, rehearse: bool) -> Outcome:
    """Clips a second of the loader."""
    if rehearse:
        _set(loader, FILES=2, SECONDS=3.0, SIZE_PX=(96, 128), BATCH=4, STEPS=1, WORKERS=(0, 1), MAX_FRAMES=30)
    else:
        _set(loader, STEPS=8)  # a turn at the full size takes minutes
    path = loader.bench(folder, repeats=1, minutes=0.0 if rehearse else 0.1)
    rows = {row["name"]: row for row in json.loads(path.read_text())["results"]["encoded clips"]["rows"]}
    workers = max(loader.WORKERS)
    text = f"{rows[f'workers: {workers}']['per_s']:.0f} clips/s by {workers} workers without crop and flip"
    return Outcome(text, f"plan: {WORKER_CLIPS_PER_S * workers:.0f} with both")


def compare_videomae(folder: Path, rehearse: bool) -> Outcome:
    """Steps beside VideoMAE of transformers."""
    given = {"clips": 16, "repeats": 5, "precisions": ["bf16"]}
    if rehearse:
        given = {"clips": 1, "repeats": 1, "precisions": ["fp32"]}
        group = pretrain.StepGroup({"SimpleMAE S, 95 %": lambda **more: steps.point_step("S", 0.95, SMALL, **more)})
        _set(pretrain, standard_groups=lambda mae_st: {"beside VideoMAE": group})
    content = json.loads(pretrain.bench(folder, mae_st=None, **given).read_text())
    ratios = [one for results in content["results"].values() for one in results["ratios"]]
    text = ", ".join(f"{one['of']} {one['median']:.1f} times" for one in ratios if one["over"] == pretrain.VIDEOMAE)
    return Outcome(f"clips/s over those of {pretrain.VIDEOMAE}: {text or 'not measured'}")


def _set(module: ModuleType, **sizes: object) -> None:
    """Sizes of a benchmark in a rehearsal, which has this process alone."""
    for name, value in sizes.items():
        if not hasattr(module, name):
            raise AttributeError(f"{module.__name__} has no {name}")
        setattr(module, name, value)


STEPS = (
    HourStep("lock", 1, check_lock),
    HourStep("attention", 4, check_attention),
    HourStep("determinism", 1, repeat_steps),
    HourStep("smoke", 5, run_smoke),
    HourStep("mfu", 5, measure_mfu),
    HourStep("widest", 3, measure_widest),
    HourStep("profile", 25, run_profile),
    HourStep("masking", 6, measure_masking),
    HourStep("loading", 4, measure_loading),
    HourStep("videomae", 5, compare_videomae),
)
