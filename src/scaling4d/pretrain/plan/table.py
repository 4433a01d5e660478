"""A plan as tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from scaling4d.pretrain.plan.closed_form import GIB
from scaling4d.training.resume import MOST_WRITE_S

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def show(content: dict[str, Any]) -> None:
    """Print a plan."""
    console = Console(highlight=False, width=None if Console().is_terminal else 150)
    mesh, gpu = content["mesh"], content["gpu"]
    console.print(f"{content['point']} of profile {content['profile']} ({content['method']}), recompute: {content['recompute']}")
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for part, parameters in content["parameters"].items():
        facts.add_row(part.replace("_", " "), f"{parameters:,} parameters")
    tokens, clip, schedule, storage = (content[key] for key in ("tokens", "flops_per_clip", "schedule", "storage"))
    facts.add_row("tokens", f"{tokens['visible']} visible of {tokens['all']}, {tokens['coarse']} coarse")
    parts = ", ".join(f"{part} {_short(clip[part], 'FLOP')}" for part in ("forward", "backward", "recompute"))
    facts.add_row("a clip", f"{_short(clip['total'], 'FLOP')}: {parts}")
    facts.add_row("a step", f"{_short(content['flops_per_step']['total'], 'FLOP')} for {schedule['batch']} clips")
    sums = f"{_short(schedule['clips'], 'clips')}, {_short(schedule['flops'], 'FLOP')}"
    facts.add_row("schedule", f"{schedule['steps']:,} steps, {sums}")
    for name in ("checkpoint", "training_state"):
        size, speed = _short(storage[f"{name}_bytes"], "B"), _short(storage["write_bytes_per_s"], "B/s")
        text = f"{size}, {storage[f'{name}_s']:,.3g} s to write at {speed}"
        hang_s, waited_s = storage["hang_s"], MOST_WRITE_S if storage["asynchronous"] and name == "training_state" else 0
        if waited_s + hang_s < storage[f"{name}_s"]:
            after = f"a run that waits for it is ended after {waited_s + hang_s:g} s"
            text += f"; {after}: raise pretrain.Runtime.hang_s = {hang_s:g}"
        if (wait_s := storage["wait_s"]) < storage[f"{name}_s"]:
            text += f"; a job that stops is killed before: raise Launch.wait_s = {wait_s:g} of the point"
        facts.add_row(name.replace("_", " "), text)
    console.print(facts)
    title = f"one of {mesh['gpus']} GPUs ({gpu['name']}), {_name(mesh)}, {mesh['clips_per_gpu']} clips each: GiB at the peak"
    memory = Table("", title=title, title_justify="left")
    for kind in mesh["memory_bytes"]:
        memory.add_column(kind, justify="right")
    memory.add_row("closed form", *(f"{size / GIB:.2f}" for size in mesh["memory_bytes"].values()))
    if run := content.get("dry_run"):
        name = f"dry run ({run['wall_s']:.0f} s, {run['rss_bytes'] / 2**20:.0f} MiB here)"
        memory.add_row(name, *(f"{size / GIB:.2f}" for size in run["memory_bytes"].values()))
    console.print(memory)
    if mesh["why"]:
        console.print(f"{_name(mesh)} {mesh['why']}", style="bold")
        console.print("what would fit: " + ("; or ".join(mesh["changes"]) or "nothing that this command can name"))
    table = Table(title=f"{schedule['batch']} clips a step on {gpu['name']}", title_justify="left")
    for column in (
        "GPUs",
        "mesh",
        "clips a GPU",
        "at most",
        "GiB",
        "step, ms",
        "MFU, %",
        "clips/s needed",
        "bound by",
        "days",
        "GPU-hours",
    ):
        table.add_column(column, justify="right")
    table.add_column("fits")
    for row in [mesh, *(row for row in content["meshes"] if _name(row) != _name(mesh))]:
        cells = [""] * 10
        if "shards" in row:
            cells[:3] = _name(row), str(row["clips_per_gpu"]), str(row["most_clips_per_gpu"])
            cells[3:6] = f"{row['memory_bytes']['total'] / GIB:.1f}", digits(row["step_s"], 1e3), digits(row["mfu"], 100)
            cells[6:8] = digits(row["clips_per_s_needed"]), ", ".join(dict.fromkeys(row["bound"]))
        if row["fits"]:
            cells[8:] = digits(row["days"]), digits(row["gpu_hours"])
        change = row["changes"][0].split(" (")[0] if row["changes"] else "nothing fits"
        table.add_row(str(row["gpus"]), *cells, "yes" if row["fits"] else f"no: {change}")
    console.print(table)
    loading = content["loading"]
    if content["other_compute"]:
        other = f"pretrain.Training.compute is {content['other_compute']}, which takes longer and more memory"
        console.print(f"All figures are of bfloat16; {other}.")
    console.print(
        "The first row is the mesh of this command, each other one the fastest that fits, of those tried. Batch and steps are "
        "the profile's, whose header says which are ours. Ranges follow from shares of the maker's figures that are ours "
        "(plan/performance.py). Loading gives a "
        f"GPU {mesh['clips_per_s_given']:,.0f} clips/s: {loading['workers']} workers, {loading['worker_clips_per_s']:,.0f} each."
    )


def show_readouts(content: dict[str, Any]) -> None:
    """Print the plan of a point's frozen readouts."""
    console, readouts, gpu = (
        Console(highlight=False, width=None if Console().is_terminal else 150),
        content["readouts"],
        content["gpu"],
    )
    clip = " x ".join(map(str, readouts["clip"]))
    title = f"frozen readouts of {content['point']}, encoder on {readouts['gpus']} GPUs ({gpu['name']}), clips of {clip}"
    columns = ("task", "videos", "windows", "passes", "FLOP", "bound by", "GPU-hours", "days", "features", "drawn again, %")
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "task" else "right")
    for row in readouts["tasks"]:
        videos = f"{row['train']['videos']:,} + {row['val']['videos']:,}"
        bound = ", ".join(dict.fromkeys(row["bound"]))
        table.add_row(row["task"], videos, *_readout_cells(row, bound), f"{100 * row['reused_share']:.1f}")
    table.add_row("all", "", *_readout_cells(readouts["total"], ""), "")
    console.print(table)
    sources = dict.fromkeys(row[split]["source"] for row in readouts["tasks"] for split in ("train", "val"))
    head_bytes, speed = readouts["total"]["head_bytes"], content["storage"]["write_bytes_per_s"]
    place = f"in {readouts['feature_store']}, for all readouts" if readouts["feature_store"] else "of training windows, in memory"
    console.print(
        f"Features stay {place}; the last column is the share of a training's draws that take a stored window again. Trainings "
        f"of heads read {_short(head_bytes, 'B')} of them, {head_bytes / speed / 3600:,.3g} h at {_short(speed, 'B/s')}. "
        "GPU-hours and days leave out this reading and the computing of heads. A GPU's "
        f"process reads while it computes, at the speed of a worker. Videos: {'; '.join(sources)}."
    )


def _readout_cells(row: dict[str, Any], bound: str) -> tuple[str, ...]:
    counts = f"{row['windows']:,}", f"{row['passes']:,}", _short(row["flops"], "FLOP")
    return *counts, bound, digits(row["gpu_hours"]), digits(row["days"]), _short(row["stored_bytes"], "B")


def digits(ends: list[float], unit: float = 1) -> str:
    """`0.012-0.03`: a range, by two digits of its ends."""
    return "-".join(dict.fromkeys(f"{float(f'{value * unit:.2g}'):,g}" for value in sorted(ends)))


def _name(mesh: dict[str, Any]) -> str:
    return f"{mesh['shards']}x{mesh['replicas']}" if "shards" in mesh else ""


def _short(value: float, unit: str) -> str:
    """`13.38 TFLOP`: at most four digits, with the prefix that leaves fewest."""
    power = next((n for n in range(len(PREFIXES)) if value < 1000 ** (n + 1)), len(PREFIXES) - 1)
    return f"{value / 1000**power:.4g} {PREFIXES[power]}{unit}"
