"""`scaling4d bench`: one thin command for each benchmark. Importing this module imports no torch."""

from __future__ import annotations

import os
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory, beside other libraries where there are any.")

Repeats = Annotated[int, typer.Option(min=1, help="Number of turns of each workload.")]
Precision = StrEnum("Precision", ["fp32", "bf16"])
REPORTS = Path("reports/bench")  # the json of every benchmark, with every single time


@bench.callback()
def quiet_profiler() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler else prints reports on itself


@bench.command()
def decode(
    clips: Annotated[int, typer.Option(min=1, help="Read by each reader in each turn, of each kind of video.")] = 20,
    repeats: Repeats = 7,
) -> None:
    """Clips a second from random places of videos: ours, torchcodec, OpenCV, plain PyAV, FFmpeg alone."""
    _measure("decode", clips=clips, repeats=repeats)


@bench.command()
def loader(
    repeats: Repeats = 5,
    minutes: Annotated[float, typer.Option(min=0, help="Time of watching the memory.")] = 1.0,
) -> None:
    """Clips a second of the loader with 0, 1, 2, 4 workers and with repeated sampling, and its memory over time."""
    _measure("loader", repeats=repeats, minutes=minutes)


@bench.command()
def readout(
    encoder: Annotated[str, typer.Argument(help="A name in artifacts/<profile>/pretrain.")],
    tasks: Annotated[list[str] | None, typer.Option("--task", help="One of the tasks; default: all of them.")] = None,
) -> None:
    """The cost of an encoder's frozen readouts beside one pass of it, and the time that stored features save."""
    _measure("readout", encoder=encoder, tasks=tasks or ())


@bench.command()
def features(
    source: Annotated[Path | None, typer.Argument(help="A video, which is repeated; default: a made-up one.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Length of the video.")] = 10.0,
    rate_hz: Annotated[float, typer.Option(min=0.1, help="Frames per second of the windows.")] = 5.0,
    size: Annotated[StrEnum("Size", ["small", "base"]), typer.Option(help="Of the VideoMAE.")] = "small",
    repeats: Annotated[int, typer.Option(min=1, help="Number of turns.")] = 3,
) -> None:
    """Frames a second and memory of `scaling4d features`, beside a loop over transformers' VideoMAE."""
    _measure("features", source=source, minutes=minutes, rate_hz=rate_hz, size=str(size), repeats=repeats)


@bench.command()
def curate() -> None:
    """Files a second of curation, its memory at two sizes, and the cost for 170 million videos that follows."""
    _measure("curate")


@bench.command()
def pretrain(
    clips: Annotated[int, typer.Option(min=1, help="A batch, of every model.")] = 8,
    repeats: Repeats = 5,
    precision: Annotated[list[Precision], typer.Option(help="Give it twice for both.")] = [Precision.fp32],  # noqa: B006
    mae_st: Annotated[
        Path | None, typer.Option(help="A checkout of facebookresearch/mae_st to measure beside ours; its code is run.")
    ] = None,
    ladder: Annotated[
        bool, typer.Option("--ladder", help="The default profile's points alone, as it trains them: its batch, fp32, one thread.")
    ] = False,
) -> None:
    """Clips a second of training steps, share of the matmul peak: ours, transformers' VideoMAE, official MAE-ST."""
    if ladder:
        _measure("ladder", repeats=repeats)
        return
    _measure("pretrain", clips=clips, repeats=repeats, precisions=precision, mae_st=mae_st)


@bench.command()
def masking(
    clips: Annotated[int, typer.Option(min=1, help="A batch.")] = 2,
    repeats: Repeats = 5,
    precision: Precision = Precision.fp32,
) -> None:
    """Step time at 0, 75, 90 and 95 % hidden, MAE-ST's and SimpleMAE's decoding at B and L; loading clips beside it."""
    _measure("masking", clips=clips, repeats=repeats, precision=precision)


@bench.command()
def attention(
    total: Annotated[int, typer.Option(min=1, help="Approximate number of tokens of all clips together.")] = 6272,
    repeats: Repeats = 7,
    precision: Precision = Precision.fp32,
) -> None:
    """Attention at the token counts in use: ours, torch's, xformers; clips in a batch and packed in one sequence."""
    _measure("attention", total=total, repeats=repeats, precision=precision)


@bench.command()
def mfu(
    clips: Annotated[int, typer.Option(min=1, help="A batch, where the GPU holds so many.")] = 64,
    repeats: Repeats = 7,
    precision: Precision = Precision.bf16,
) -> None:
    """MFU and peak memory of steps of S, B, L and H, eager and compiled, beside the ranges of `scaling4d plan`."""
    _measure("mfu", clips=clips, repeats=repeats, precision=precision)


@bench.command()
def gpu(
    out: Annotated[Path, typer.Option(help="Folder of the records, logs and figures.")] = REPORTS / "gpu",
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="The same steps on the CPU at the smallest size; out is OUT/rehearsal.")
    ] = False,
    step: Annotated[
        list[str] | None, typer.Option(help="Run this step alone, also if it is done; may be repeated. Default: all others.")
    ] = None,
) -> None:
    """One hour on a GPU, from the lock and the stages of profile smoke to profile h100 and VideoMAE; then one table.

    Steps that are done are not run again. Exit code 1: some step is not done.
    """
    from scaling4d_bench.gpu_hour import run_hour
    from scaling4d_bench.gpu_steps import STEPS

    if not run_hour(STEPS, out / "rehearsal" if rehearse else out, rehearse=rehearse, only=step or ()):
        raise typer.Exit(1)


@bench.command()
def render(repeats: Repeats = 5) -> None:
    """CPU time to draw a labelled clip of each kind, and an unlabelled video, of the pocket's worlds."""
    _measure("render", repeats=repeats)


@bench.command()
def costs(repeats: Repeats = 5) -> None:
    """Growth of time and memory of training with clips, frames, side, depth, width and batch, beside the formulas."""
    _measure("costs", repeats=repeats)


def _measure(benchmark: str, **options: object) -> None:
    """Call `bench` of one of this package's modules, which imports torch."""
    path = import_module(f"scaling4d_bench.{benchmark}").bench(REPORTS, **options)
    print(f"wrote {path}")
