"""A plan as tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30
PIPED_WIDTH = 120
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def show(found: dict[str, Any]) -> None:
    """Print what `pretrain.plan.plan` found."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPED_WIDTH)
    mesh = found["mesh"]
    console.print(f"{found['point']} of profile {found['profile']} ({found['method']}), recompute: {found['recompute']}")
    console.print(_facts(found))
    console.print(_memory(found))
    if mesh["why"]:
        console.print(f"{_name(mesh)} {mesh['why']}", style="bold")
        console.print("what would fit: " + ("; or ".join(mesh["changes"]) or "nothing that this command can name"))
    console.print(_meshes(found))
    console.print(
        "The first row is the mesh asked for, each other one the fastest of its GPUs that fits. Utilisation "
        f"{found['utilisation']:.0%} of {found['gpu']['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s is an assumption of ours; sending "
        "runs at the link's full speed behind the computing, and the slower of the two sets the pace."
    )


def _facts(found: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for part, parameters in found["parameters"].items():
        table.add_row(part.replace("_", " "), f"{parameters:,} parameters")
    tokens, clip, step = found["tokens"], found["flops_per_clip"], found["flops_per_step"]
    table.add_row("tokens", f"{tokens['visible']} visible of {tokens['all']}, {tokens['coarse']} coarse")
    parts = ", ".join(f"{part} {_short(clip[part], 'FLOP')}" for part in ("forward", "backward", "recompute"))
    table.add_row("a clip", f"{_short(clip['total'], 'FLOP')}: {parts}")
    schedule, storage = found["schedule"], found["storage"]
    table.add_row("a step", f"{_short(step['total'], 'FLOP')} for {schedule['batch']} clips")
    whole = f"{schedule['steps']:,} steps, {_short(schedule['clips'], 'clips')}, {_short(schedule['flops'], 'FLOP')}"
    table.add_row("schedule", whole)
    for what in ("checkpoint", "training_state"):
        size, seconds = _short(storage[f"{what}_bytes"], "B"), storage[f"{what}_s"]
        table.add_row(
            what.replace("_", " "), f"{size}, {seconds:,.3g} s to write at {_short(storage['write_bytes_per_s'], 'B/s')}"
        )
    return table


def _memory(found: dict[str, Any]) -> Table:
    mesh = found["mesh"]
    title = (
        f"one of {mesh['gpus']} GPUs ({found['gpu']['name']}), {_name(mesh)}, {mesh['clips_per_gpu']} clips each: GiB at the peak"
    )
    table = Table(title=title, title_justify="left")
    rows = [("closed form", mesh["memory_bytes"])]
    if "dry_run" in found:
        ran = found["dry_run"]
        rows.append((f"dry run ({ran['wall_s']:.0f} s, {ran['rss_bytes'] / 2**20:.0f} MiB here)", ran["memory_bytes"]))
    table.add_column("")
    for kind in mesh["memory_bytes"]:
        table.add_column(kind, justify="right")
    for name, kinds in rows:
        table.add_row(name, *(f"{size / GIB:.2f}" for size in kinds.values()))
    return table


def _meshes(found: dict[str, Any]) -> Table:
    table = Table(title=f"{found['schedule']['batch']} clips a step on {found['gpu']['name']}", title_justify="left")
    for column in ("GPUs", "mesh", "clips a GPU", "at most", "GiB", "compute s", "sending s", "days", "GPU-hours"):
        table.add_column(column, justify="right")
    table.add_column("fits")
    for row in [found["mesh"], *(row for row in found["meshes"] if _name(row) != _name(found["mesh"]))]:
        if "shards" not in row:
            table.add_row(str(row["gpus"]), *[""] * 8, f"no: {_first(row)}")
            continue
        numbers = (f"{row['memory_bytes']['total'] / GIB:.1f}", f"{row['compute_s']:.3g}", f"{row['sending_s']:.3g}")
        time = (f"{row['days']:.3g}", f"{row['gpu_hours']:,.0f}") if row["fits"] else ("", "")
        clips = (str(row["clips_per_gpu"]), str(row["most_clips_per_gpu"]))
        table.add_row(str(row["gpus"]), _name(row), *clips, *numbers, *time, "yes" if row["fits"] else f"no: {_first(row)}")
    return table


def _first(row: dict[str, Any]) -> str:
    return row["changes"][0].split(" (")[0] if row["changes"] else "nothing fits"


def _name(mesh: dict[str, Any]) -> str:
    return f"{mesh['shards']}x{mesh['replicas']}" if "shards" in mesh else ""


def _short(value: float, unit: str) -> str:
    """`13.38 TFLOP`: at most four digits, with the prefix that leaves fewest."""
    power = next((n for n, prefix in enumerate(PREFIXES) if value < 1000 ** (n + 1)), len(PREFIXES) - 1)
    return f"{value / 1000**power:.4g} {PREFIXES[power]}{unit}"
