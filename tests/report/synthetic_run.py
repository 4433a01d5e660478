"""A finished run of the pipeline, made up: the files that the other stages leave, without the stages."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import yaml
from PIL import Image

from scaling4d import config, seeds
from scaling4d.provenance import parse_csv, to_csv
from scaling4d.records import Result, write_json
from scaling4d.report import tables
from scaling4d.report.page import Page
from scaling4d.report.run_results import RunResults, read_run_results
from scaling4d.report.seeds import FOLDER
from scaling4d.report.verdict import conclusion, measure_rows, verdict
from scaling4d.studies.study import RECONSTRUCT_METRICS, RUN_COLUMNS, TABLE_COLUMNS, loss_task, study_table

NOTEBOOK = Path(__file__).parents[2] / "reports/scaling.ipynb"
BUILT = Path("reports/built")
TASKS = {
    "actions": ("top1", "share", True, 0.5),
    "boxes": ("mean_iou", "share", True, 0.5),
    "depth": ("abs_rel", "ratio", False, 0.15),
    "points": ("average_jaccard", "share", True, 0.4),
    "pose": ("epe", "scene units", False, 1.1),
}
OTHERS = {  # further metrics
    "actions": {"top1_mean": 0.2},
    "boxes": {"mean_iou_per_object": 0.5, "mean_iou_first_box_repeated": 0.3, "mean_iou_propagated": 0.4},
    "depth": {"delta1": 0.6, "abs_rel_mean": 0.3},
    "points": {
        **{"delta_avg": 0.5, "occlusion_accuracy": 0.9, "distance_px256": 9.0, "distance_px256_standing_still": 12.0},
        **{"average_jaccard_standing_still": 0.2, "delta_avg_standing_still": 0.3, "occlusion_accuracy_standing_still": 0.8},
    },
    "pose": {"epe_so3": 1.0, "epe_standing_still": 1.3, "rotation_error_deg": 4.0, "translation_error": 0.6},
}
SIZES = {"nano": 180_000, "micro": 460_000, "tiny": 1_060_000, "small": 3_120_000, "mini": 8_350_000, "mae_st_tiny": 1_060_000}
STUDENT = {"Distilled": {"teacher": "mini", "width": 32}}  # settings of its model
POCKET = {  # six points and a student, two of them fine-tuned, two with a classifier, three baselines
    "points": SIZES,
    "students": ("nano_distilled",),
    "frozen": [*SIZES, "nano_distilled", "untrained_nano", "untrained_mini", "pixels"],
    "finetune": ["nano", "mini"],
    "classifier": ("mini", "mae_st_tiny"),
}


def rows_of(section: str) -> list[list[str]]:
    """Texts of the cells of a section's tables."""
    rows = (re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", section))
    return [[" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in row] for row in rows]


def conclusion_text(run: RunResults) -> str:
    page = Page(Path("out"))
    return conclusion(run, page, measure_rows(run, page))


def verdict_text(run: RunResults) -> str:
    page = Page(Path("out"))
    return verdict(run, page, measure_rows(run, page))


def verdict_rows(run: RunResults) -> dict[str, list[str]]:
    """Cells of the verdict's table by the first one, as text."""
    table = verdict_text(run).partition("<tbody>")[2]
    return {name: rest for name, *rest in rows_of(table)}


def sha(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def write_run(
    *,
    points: dict[str, int],
    frozen: list[str],
    finetune: list[str],
    students: tuple[str, ...] = (),
    classifier: tuple[str, ...] = (),
    published: Mapping[str, int] = MappingProxyType({}),
) -> dict:
    """Write experiments/, params.yaml and every artifact into the current folder; returns the settings."""
    settings = {
        "seed": 0,
        "pretrain": {"Training": {"steps": 1000}},
        "points": {name: {"model": _model(name)} for name in points},
        "distilled": {name: {"model": STUDENT} for name in students},
        "continued": {},
        "encoders": {
            "pretrained": {name: {} for name in published},
            "untrained": [],
            "frozen": frozen,
            "finetune": finetune,
            "classifier": list(classifier),
        },
        "benchmarks": {"tasks": list(TASKS)},
        "show": {"tasks": list(TASKS) if frozen else []},
        "report": {"folder": "reports/built"},
        "profile": "test",
    }
    Path("experiments/profile").mkdir(parents=True)
    Path("experiments/config.yaml").write_text("defaults:\n  - _self_\n  - profile: test\n")
    Path("experiments/profile/test.yaml").write_text("# @package _global_\n" + yaml.safe_dump(settings, sort_keys=False))
    Path("reports").mkdir()
    shutil.copy(NOTEBOOK, "reports/scaling.ipynb")
    Path("reports/bench").mkdir()
    shutil.copy(NOTEBOOK.parent / "bench/costs.json", "reports/bench/costs.json")
    config.PARAMS.write_text(yaml.safe_dump(settings, sort_keys=False))
    home = Path("artifacts/test")
    _provenance(home / "clips", "clips", {})
    write_json(home / "clips/datasheet.json", {"clips": {"train": 1300, "val": 60}, "histograms": {"codec": {"h264": 9}}})
    for name, size in points.items():
        _point(home, name, "MAEST" if "mae_st" in name else "SimpleMAE", size)
        _filled(home, name, size)
    sizes = points | {name: points[name.removesuffix("_distilled")] for name in students}
    for name in students:
        _point(home, name, "Distilled", sizes[name])
    for protocol, encoders in (("frozen", frozen), ("finetune", finetune), ("classifier", classifier)):
        for encoder in encoders:
            if encoder not in sizes:
                _provenance(home / "pretrain" / encoder, "baseline", {})
            for task in TASKS if protocol != "classifier" else ("actions",):
                _readout(home, encoder, sizes | published, task, protocol)
    for task in settings["show"]["tasks"]:
        _provenance(home / "show" / task, "show", {f"readout/{frozen[0]}/{task}/frozen": sha(task)})
        Image.new("RGB", (24, 16), (len(task), 0, 0)).save(home / "show" / task / "sheet.png")
    return settings


def _model(name: str) -> dict:
    """A point with mae_st in its name is of MAE-ST; one with tube hides tubes."""
    masking = {"masking": "tube" if "tube" in name else "random", "mask_ratio": 0.95}
    return {"MAEST" if "mae_st" in name else "SimpleMAE": {"width": 32, "clip": [8, 16, 16], **masking}}


def _provenance(folder: Path, stage: str, inputs: dict[str, str], settings: dict | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"stage": stage, "settings": settings or {}, "overrides": {}, "inputs": inputs}
    content["code"] = {"package": stage, "sha256": sha(f"code {stage}"), "modules": {}}
    write_json(folder / "provenance.json", content)
    (folder / "operative_config.gin").write_text(f"# Parameters for Kind:\n# ====\nKind.of = {stage!r}\nKind.steps = 3\n")


def _loss(size: int) -> float:
    return 0.0139 + 0.0024 * (size / 180_000) ** -0.4


def _point(home: Path, name: str, method: str, size: int) -> None:
    folder, loss = home / "pretrain" / name, _loss(size)
    settings = {f"distilled.{name}.model": STUDENT} if method == "Distilled" else {f"points.{name}.model": _model(name)}
    _provenance(folder, "pretrain", {"clips": sha("clips")}, settings)
    summary = {"point": name, "method": method, "parameters": size, "parameters_total": round(size * 1.1), "seed": 0}
    summary |= {"flops_per_clip": 300.0 * size, "flops": 300.0 * size * 8000, "clips_seen": 8000}
    summary |= {"train_loss": loss * 0.99, "val_loss": loss}
    write_json(folder / "summary.json", summary)
    steps = range(10, 1001, 10)
    noise = 1 + 0.03 * seeds.numpy_rng(0, name).standard_normal(len(steps))
    lines = [
        {"step": s, "clips_seen": 8 * s, "loss": float(n * (loss + 0.05 / s**0.7)), "lr": 1e-3, "grad": 0.5}
        for s, n in zip(steps, noise, strict=True)
    ]
    (folder / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def validate_under_way(name: str) -> None:
    """Add validations to a point of a written run, and their measures to its summary."""
    folder = Path("artifacts/test/pretrain") / name
    measures = {"rankme": 7.5, "top1_linear": 0.31, "abs_rel_linear": 0.22}
    summary = json.loads((folder / "summary.json").read_text())
    write_json(folder / "summary.json", summary | measures | {"best_step": 500})
    lines = [{"step": step, "val_loss": summary["val_loss"] * 600 / step, **measures} for step in (300, 500)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _filled(home: Path, name: str, size: int) -> None:
    filled = home / "reconstruct" / name
    _provenance(filled, "reconstruct", {"checkpoint": sha(name), "clips": sha("clips")})
    sets = {f"{kind}_{metric}": 0.5 for kind in ("frame", "clip") for metric in ("fid", "kid", "precision", "recall")}
    measured = {
        "masked_mse": _loss(size),
        "psnr_db": 18.3,
        "moving_mse": 2 * _loss(size),
        "true_patch_statistics": False,
        **sets,
        "clips": 60,
        "frames": 480,
        "seed": 0,
    }
    write_json(filled / "result.json", {"point": name, **measured, "checkpoint_sha256": sha(name)})
    x = np.linspace(0, 255, 4 * 16, dtype=np.uint8)
    Image.fromarray(np.stack([np.tile(x, (96, 1))] * 3, axis=-1)).save(filled / "filled.png")


def _readout(home: Path, encoder: str, points: dict[str, int], task: str, protocol: str) -> None:
    folder = home / "readout" / encoder / task / protocol
    _provenance(folder, "readout", {"checkpoint": sha(encoder)})
    metric, unit, higher, middle = TASKS[task]
    size = points.get(encoder.removeprefix("untrained_"), 0)
    gain = 0.0 if encoder not in points else 0.08 * np.log10(size / 1e5) + (0.03 if protocol == "finetune" else 0)
    value = float(middle * (1 + gain if higher else 1 - gain))
    content = {"encoder": encoder, "parameters": size, "task": task, "protocol": protocol, "metric": metric, "unit": unit}
    content |= {"value": value, "low": value * 0.97, "high": value * 1.03, "higher_is_better": higher, "examples": 160, "seed": 0}
    if protocol == "frozen" and encoder != "pixels":
        losses = (0.9, 0.5, 0.7, 0.5, 0.8)
        lines = [{"step": 60 * index, "held_out_loss": loss} for index, loss in enumerate(losses, 1)]
        (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Result(**content, checkpoint_sha256=sha(encoder), others=OTHERS[task]).write(folder / "result.json")


def write_tables(settings: dict) -> dict:
    """Write the report's tables and stages.json without notebook and figures. Returns the content of stages.json."""
    run = read_run_results(settings)
    BUILT.mkdir(parents=True, exist_ok=True)
    for name in ("results", "pretrain", "curves"):
        (BUILT / f"{name}.csv").write_text(getattr(tables, f"{name}_csv")(run))
    write_json(BUILT / "stages.json", tables.stages(run))
    return tables.stages(run)


def write_seed_study(run: RunResults, *, seeds_: tuple[int, ...] = (0, 1, 2), deviation: float = 0.005) -> None:
    """Write a study of seeds that belongs to the run: its numbers as those of its seed, other seeds near them.

    deviation: of other seeds, relative to the value.
    """
    measured = [(r.encoder, r.task, r.metric, r.value, r.higher_is_better, r.checkpoint_sha256) for r in run.results]
    for point in run.trained:
        summary = run.summaries[point]
        measured.append((point, loss_task(summary["method"]), "val_loss", summary["val_loss"], False, ""))
        for metric, task in RECONSTRUCT_METRICS.items() if point in run.fidelity else ():
            measured.append((point, task, metric, run.fidelity[point][metric], False, run.fidelity[point]["checkpoint_sha256"]))
    rows = []
    protocols = [*(r.protocol for r in run.results), *[""] * len(measured)]
    for (encoder, task, metric, value, higher, weights), protocol in zip(measured, protocols, strict=False):
        for seed in seeds_ if protocol in ("frozen", "") else ():
            noise = deviation * seeds.numpy_rng(seed, encoder, task, metric).standard_normal() if seed != run.seed else 0
            row = {"arm": encoder, "seed": seed, "encoder": encoder, "task": task, "protocol": protocol, "metric": metric}
            row |= {"value": value * (1 + noise), "higher_is_better": higher, "experiment": f"{encoder}-{seed}"}
            rows.append(row | {"checkpoint_sha256": weights if seed == run.seed else weights and sha(f"{weights} {seed}")})
    code = {}
    for package in {p["code"]["package"]: p["code"] for p in run.provenances.values()}.values():
        write_json(Path("code.json"), package)
        code[f"artifacts/code/{package['package']}.json"] = hashlib.md5(Path("code.json").read_bytes()).hexdigest()
    Path("code.json").unlink()
    arms = {row["arm"]: {"encoder": row["encoder"], "profile": run.profile} for row in rows}
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_json(FOLDER / "study.json", {"study": "seeds", "seeds": seeds_, "arms": arms, "code": code})
    (FOLDER / "runs.csv").write_text(to_csv(RUN_COLUMNS, rows))
    (FOLDER / "table.csv").write_text(to_csv(TABLE_COLUMNS, study_table(parse_csv(to_csv(RUN_COLUMNS, rows)), "untrained_mini")))
