"""The command line: thin commands that parse, call one function and say what was written."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from scaling4d import config
from scaling4d.pretrain.plan.gpus import UTILISATION, WRITE_GB_PER_S
from scaling4d.records import AGAIN, Preempted, UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
data = typer.Typer(no_args_is_help=True, help="Which data the pipeline reads.")
app.add_typer(data, name="data")
bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory, beside other libraries where there are any.")
app.add_typer(bench, name="bench")

Reports = Annotated[Path, typer.Option("--out", help="Folder for the json with every single time.")]
Repeats = Annotated[int, typer.Option(min=1, help="How often each contestant takes its turn.")]
REPORTS = Path("reports/bench")


def main() -> None:
    """Exit code 0 only when the thing was done; 75: it was saved and stopped, run it again; a user's error is one line and 1."""
    try:
        app()
    except UserError as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)  # gin adds lines of its own
        sys.exit(1)
    except Preempted as preempted:
        print(preempted, file=sys.stderr)
        sys.exit(AGAIN)


def _settings() -> dict:
    """params.yaml, after a check that every key and type is one that experiments/ knows; overrides are listed."""
    settings = config.read()
    for key, value in config.overrides(settings).items() if _speaks() else ():
        print(f"override: {key} = {value!r} (not the value of profile {settings['profile']})", file=sys.stderr)
    return settings


def _speaks() -> bool:
    """Of the ranks that torchrun starts, one is enough to say what is so in all."""
    return os.environ.get("RANK", "0") == "0"


@app.command()
def code() -> None:
    """Hash the meaning of every room's code to artifacts/code/ (a DVC stage)."""
    from scaling4d.code import write_hashes

    write_hashes(Path(__file__).parent, Path("artifacts/code"))


@app.command()
def clips(
    dry: Annotated[bool, typer.Option(help="Print what would be used and why not the rest; write nothing.")] = False,
) -> None:
    """Curate data/videos into shards of clips (a DVC stage)."""
    from scaling4d.clips import stage

    if dry:
        stage.dry(_settings())
    else:
        print(f"wrote {stage.clips(_settings())}")


@app.command()
def benchmarks(task: str) -> None:
    """Hash the benchmark that a task is read out on, to artifacts/benchmarks/ (a DVC stage)."""
    from scaling4d.readout.benchmark import benchmark

    print(f"wrote {benchmark(task, _settings())}")


@app.command()
def pretrain(
    point: str,
    dry: Annotated[bool, typer.Option("--dry", help="Print how it would be started, and start nothing.")] = False,
    snapshot: Annotated[Path | None, typer.Option(hidden=True, help="What a launcher says to its ranks.")] = None,
) -> None:
    """Pretrain one scaling point on the clips (a DVC stage), where its Launch settings say; exit code 75: run it again."""
    if snapshot:
        folder = _train_rank(point, snapshot)
    else:
        settings = _settings()
        config.section(settings, f"distilled.{point}" if point in settings["distilled"] else f"points.{point}")
        _launch(point, settings, dry)
        from scaling4d.pretrain.loop import pretrain as train

        folder = train(point, settings)
    if folder and _speaks():
        print(f"wrote {folder}")


def _train_rank(point: str, snapshot: Path) -> Path | None:
    from scaling4d.pretrain.launch import train_rank

    return train_rank(point, snapshot)


def _launch(point: str, settings: dict, dry: bool) -> None:
    """Leaves with an exit code unless this process is to train."""
    from scaling4d.pretrain.launch import launch

    code = launch(point, settings, dry=dry)
    if code is not None:
        raise typer.Exit(code)


@app.command()
def baseline(encoder: str) -> None:
    """Write the encoder `untrained_<point>`, `pixels`, or a published one of encoders.pretrained (a DVC stage)."""
    settings = _settings()
    if encoder in config.section(settings, "encoders.pretrained"):
        from scaling4d.encoders.pretrained import baseline as write
    else:
        from scaling4d.pretrain.point import baseline as write

    print(f"wrote {write(encoder, settings)}")


@app.command()
def readout(encoder: str, task: str, protocol: str) -> None:
    """Train and measure a readout: TASK actions|boxes|depth|points|pose, PROTOCOL frozen|finetune, and classifier for actions
    (a DVC stage), here or in each rank that torchrun started; exit code 75: run it again."""
    settings = _settings()
    if (task, protocol) == ("actions", "classifier"):
        from scaling4d.readout.classifier import classify

        result = classify(encoder, settings)
    else:
        from scaling4d.readout.train import readout as run

        result = run(encoder, task, protocol, settings)
    if _speaks():
        span = f"{result.low:.4f} to {result.high:.4f}"
        print(f"{encoder} {task} {protocol}: {result.metric} {result.value:.4f} ({span}) {result.unit}")


@app.command()
def show(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT", help="Frozen readouts of one task, folders in artifacts/.")],
    out: Annotated[Path | None, typer.Option(help="New folder for sheet.png and clips.mp4; else one in shown/.")] = None,
    clips: Annotated[int, typer.Option(min=1, help="How many validation clips, drawn by the result's seed.")] = 4,
    ids: Annotated[list[str] | None, typer.Option("--id", help="This clip instead; may be given several times.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Of each clip on the sheet.")] = 4,
) -> None:
    """Draw what readouts say beside the truth: depth maps, tracks, boxes, camera paths, top classes (a DVC stage)."""
    from scaling4d.show.show import show as draw

    print(f"wrote {draw(results, out, clips=clips, ids=ids or [], frames=frames)}")


@app.command()
def reconstruct(point: str) -> None:
    """Fill in masked validation clips and measure them (a DVC stage)."""
    settings = _settings()
    config.section(settings, f"points.{point}")
    from scaling4d.reconstruct.fill import reconstruct as fill

    print(f"wrote {fill(point, settings)}")


@app.command()
def report() -> None:
    """Build tables, figures and the HTML report from the results (a DVC stage)."""
    from scaling4d.report import build

    build(_settings())


@app.command()
def table() -> None:
    """Print the results as one table: point x task x protocol."""
    from scaling4d.report import read
    from scaling4d.report import table as draw

    print(draw(read(_settings())))


@app.command()
def compare(
    rev_a: Annotated[str, typer.Argument(help="A git revision, a DVC experiment, or `workspace`.")],
    rev_b: Annotated[str, typer.Argument(help="Likewise.")] = "workspace",
    out: Annotated[Path | None, typer.Option(help="The page; compare-REV_A-REV_B.html unless told.")] = None,
) -> None:
    """Two reports side by side in one HTML page: settings, code, numbers with significance, figures overlaid."""
    from scaling4d.report.compare import compare as write

    page = out or Path(f"compare-{rev_a}-{rev_b}.html".replace("/", "_"))
    print(write(rev_a, rev_b, page))
    print(f"wrote {page}")


@app.command()
def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="On this machine alone; 0 takes a free one.")] = 8000,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open it in a browser.")] = True,
) -> None:
    """Gather the experiments and open report, experiments and lineage as one page; the same page works from its file."""
    import webbrowser

    from scaling4d.report import site

    folder = Path(config.section(config.read(), "report.folder"))
    names = site.gather(folder)
    with site.serve(folder, port) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        print(f"{len(names)} other runs; {url} until Ctrl-C, or {folder / site.FOLDER / site.PAGE} without a server", flush=True)
        if open_browser:
            webbrowser.open(url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


@app.command()
def study(
    names: Annotated[list[str] | None, typer.Argument(help="Files of experiments/study; without any, they are listed.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Experiments side by side, each of `ranks` processes.")] = 4,
    seeds: Annotated[str, typer.Option(help="Such as 0,1,2; as the study unless told.")] = "",
    dry: Annotated[bool, typer.Option("--dry", help="Print the experiments, and which are there already; run nothing.")] = False,
    collect: Annotated[bool, typer.Option("--collect", help="Run nothing: make table, figures and page again.")] = False,
) -> None:
    """Run every arm of studies with every seed as DVC experiments, and write what came of them to reports/studies/NAME.

    What ran before is not run again; a study that was stopped or failed in part goes on with the same command.
    """
    from scaling4d.studies import study as studies

    if not names:
        for name in studies.names():
            print(f"{name}: {studies.read(name).question}")
        return
    chosen = [studies.with_seeds(read, seeds) if seeds else read for read in map(studies.read, names)]
    if collect:
        _collect(chosen, {one.name: {} for one in chosen})
        return
    from scaling4d.studies import experiments

    wanted = {one.name: experiments.wanted(one) for one in chosen}
    runs = list({run.name: run for some in wanted.values() for run in some}.values())
    if dry:
        known = experiments.there()
        for run in runs:
            print(f"{run.name}: {'there already' if run.name in known else run.command()}")
        return
    failed = experiments.run(runs, jobs=jobs, say=lambda line: print(line, flush=True))
    whole = [one for one in chosen if not any(run.name in failed for run in wanted[one.name])]
    _collect(whole, {one.name: experiments.keep(one, wanted[one.name]) for one in whole})
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed, run it again for those: {', '.join(failed)}")


def _collect(chosen: list, told: dict[str, dict]) -> None:
    from scaling4d.report import studies
    from scaling4d.studies import experiments

    cache, wrong = experiments.dvc_cache(), []
    for one in chosen:
        wrong += [f"{one.folder}/findings.md: {what}" for what in studies.collect(one, cache, told[one.name])]
        print(f"wrote {one.folder}")
    if wrong:
        raise UserError(wrong[0] + (f" (and {len(wrong) - 1} more)" if wrong[1:] else ""))


@app.command()
def compose(overrides: Annotated[list[str] | None, typer.Argument(help="profile=NAME key=value ...")] = None) -> None:
    """Write params.yaml from experiments/, as `dvc exp run -S` does."""
    config.write(overrides or [])
    print(f"wrote {config.PARAMS}")


@app.command()
def render(
    out: Path, overrides: Annotated[list[str] | None, typer.Argument(help="profile=NAME key=value ...; else pocket's.")] = None
) -> None:
    """Render labelled 4D worlds, those of the pocket data set unless told otherwise, to a new folder OUT."""
    from scaling4d.scenes.stage import render as draw

    print(f"wrote {draw(out, config.compose(overrides or []))}")


@app.command()
def plan(
    point: str,
    mesh: Annotated[str | None, typer.Option(help="SHARDSxREPLICAS, such as 256x1; as the profile unless told.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Clips a step over all GPUs; as the profile unless told.")] = None,
    recompute: Annotated[str, typer.Option(help="none, or block: make activations again in the backward pass.")] = "none",
    gpu: Annotated[str, typer.Option(help="h100, h200, a100 or a100_40.")] = "h100",
    utilisation: Annotated[float, typer.Option(help="Share of the GPU's peak that is reached; ours.")] = UTILISATION,
    write_gb_per_s: Annotated[float, typer.Option(help="How fast the file system writes checkpoints; ours.")] = WRITE_GB_PER_S,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Also step the real model, sharded, without numbers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """What POINT, of this or any profile, costs on a cluster: parameters, FLOPs, memory, days; no GPU needed.

    A mesh on which it does not fit is an answer, not an error: exit code 0, with the reason and what would fit (JSON: mesh.fits).
    """
    import json

    from scaling4d.pretrain.plan.estimate import plan as find

    found = find(
        point,
        mesh=mesh,
        batch=batch,
        recompute=recompute,
        gpu=gpu,
        utilisation=utilisation,
        write_gb_per_s=write_gb_per_s,
        dry=dry_run,
    )
    if as_json:
        print(json.dumps(found))
        return
    from scaling4d.pretrain.plan.table import show

    show(found)


@app.command()
def convert(
    kind: Annotated[str, typer.Argument(help="4ds or mae_st")],
    source: Path,
    out: Annotated[Path, typer.Argument(help="New Checkpoint folder; for 4ds also FOLDER -> FILE.npz.")],
    heads: Annotated[int | None, typer.Option(help="mae_st: attention heads, where the width is not an official one.")] = None,
    decoder_heads: Annotated[int | None, typer.Option(help="mae_st: of the decoder, likewise.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="mae_st: of a clip, if positions are one table for space and time.")] = 16,
    mask_ratio: Annotated[float, typer.Option(help="mae_st: of its pretraining, if the file does not say.")] = 0.9,
    normalise_target: Annotated[bool, typer.Option(help="mae_st: likewise, whether it predicted normalised pixels.")] = True,
) -> None:
    """Turn published weights into a Checkpoint folder, and a folder back into the released 4DS layout."""
    from scaling4d.readout import released

    if kind not in ("4ds", "mae_st"):
        raise UserError(f"unknown kind {kind!r}; needed 4ds or mae_st")
    if kind == "4ds" and out.suffix == ".npz":
        print(f"wrote {released.to_4ds(source, out)}")
        return
    if not source.is_file():
        raise UserError(f"no file {source}")
    if kind == "4ds":
        print(f"wrote {released.from_4ds(source, out)}")
    else:
        made = released.from_mae_st(
            source,
            out,
            heads=heads,
            decoder_heads=decoder_heads,
            frames=frames,
            mask_ratio=mask_ratio,
            normalise_target=normalise_target,
        )
        print(f"wrote {made}")


@app.command()
def features(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    video: Annotated[Path, typer.Argument(help="A video file, or a .npy of clips B T H W C (float in 0..1, or uint8).")],
    out: Annotated[Path, typer.Option(help="The .npz to write: layer_00, layer_01, ..., and output if there is a readout.")],
    side_px: Annotated[int | None, typer.Option(min=1, help="Of a clip from a video file, instead of the checkpoint's.")] = None,
    queries: Annotated[Path | None, typer.Option(help="A .npy, Q 2 or Q 4 in 0..1: what a tracking readout is asked.")] = None,
) -> None:
    """Write the features of every layer of an encoder."""
    from scaling4d.show.extract import features as extract

    print(f"wrote {out}: {', '.join(extract(checkpoint, video, out, side_px=side_px, queries=queries))}")


@app.command()
def audit(
    explain: Annotated[
        str,
        typer.Option(
            help="Walk a number back: ENCODER/TASK/PROTOCOL, POINT/pretrain, POINT/reconstruct; desk/... of a kept run."
        ),
    ] = "",
    form: Annotated[str, typer.Option("--as", help="Of --explain: text, json, or svg.")] = "text",
    crate: Annotated[Path | None, typer.Option(help="Write the verified run to this new folder as an RO-Crate.")] = None,
    reproduced: Annotated[bool, typer.Option("--reproduced", help="Compare a run made again with the committed one.")] = False,
) -> None:
    """Verify every hash of the committed run and what its numbers are made of; or explain, export, compare."""
    from scaling4d import audit

    if sum((bool(explain), crate is not None, reproduced)) > 1:
        raise UserError("--explain, --crate and --reproduced answer three questions; needed one at a time")
    if explain:
        raise typer.Exit(audit.walk_back(explain, form))
    if crate is not None:
        raise typer.Exit(audit.export(crate))
    raise typer.Exit(audit.again() if reproduced else audit.check())


@app.command()
def doctor() -> None:
    """Print versions, the device, and what is missing."""
    import platform

    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    missing = []
    for requirement in metadata.requires("scaling4d") or []:
        name = requirement.split(";")[0].split("[")[0].split("=")[0].split("<")[0].split(">")[0].strip()
        if "extra ==" in requirement:
            continue
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    import torch

    print(f"device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}, {torch.get_num_threads()} threads")
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}; run `make install`")
    print("nothing is missing")


@data.command()
def use(path: Path) -> None:
    """Make PATH (videos/ and, if there are labels, benchmarks/) the data of this project."""
    from scaling4d.clips.source import use as switch

    switch(path)
    print(f"data.dvc now imports {path}; run `dvc repro`")


@data.command()
def check(path: Path) -> None:
    """Look at the videos and benchmarks below PATH: what is found, and the first problems.

    Exit code 1: a benchmark cannot be used. Videos that do not open are only listed, since curation goes on without them.
    """
    from scaling4d.clips.source import check_videos

    problems, unusable = list(check_videos(path)), False
    for finding in _benchmarks(path):
        unusable |= not finding.usable
        name = f"{finding.benchmark} {finding.split}"
        official = f"; official: {finding.official}" if finding.official else ""
        print(f"{name}: {finding.samples:,} samples{official}{f' ({finding.layout})' if finding.layout else ''}")
        problems += [f"{name}: {problem}" for problem in finding.problems]
    for problem in problems:
        print(f"problem: {problem}")
    if unusable:
        raise typer.Exit(1)


def _benchmarks(path: Path) -> list:
    """What is found of the benchmarks below PATH. What may be missing of them is this project's setting; elsewhere, nothing."""
    from scaling4d import benchmarks

    if not (path / "benchmarks").is_dir():
        return []
    share = config.section(config.read(), "readout.shared.Evaluation.max_bad_share") if config.PARAMS.is_file() else 0.0
    for name in benchmarks.unknown(path / "benchmarks"):
        print(f"benchmarks/{name}: passed over, since no reader has this name")
    return benchmarks.check(path / "benchmarks", max_bad_share=share)


@bench.callback()
def _before_any_measure() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler else reports on itself


@bench.command(name="decode")
def bench_decode(
    out: Reports = REPORTS,
    clips: Annotated[int, typer.Option(min=1, help="Read by each contestant in each turn, of each kind of video.")] = 20,
    repeats: Repeats = 7,
) -> None:
    """Clips a second from random places of videos: ours, torchcodec, OpenCV, plain PyAV, FFmpeg alone."""
    from scaling4d_bench import decode

    print(f"wrote {decode.bench(out, clips=clips, repeats=repeats)}")


@bench.command(name="loader")
def bench_loader(
    out: Reports = REPORTS,
    steps: Annotated[int, typer.Option(min=1, help="Batches of 8 clips in a turn.")] = 40,
    repeats: Repeats = 5,
    minutes: Annotated[float, typer.Option(min=0, help="How long memory is watched.")] = 1.0,
) -> None:
    """Clips a second of the loader with 0, 1, 2, 4 workers, and its memory as time goes by."""
    from scaling4d_bench import loader

    print(f"wrote {loader.bench(out, steps=steps, repeats=repeats, minutes=minutes)}")


@bench.command(name="readout")
def bench_readout(
    encoder: Annotated[str, typer.Argument(help="A name in artifacts/<profile>/pretrain.")],
    out: Reports = REPORTS,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="One of the tasks; all of them unless told.")] = None,
) -> None:
    """What an encoder's frozen readouts cost beside one pass of it; what storing features saves, and half precision changes."""
    from scaling4d_bench import readout

    print(f"wrote {readout.bench(out, encoder=encoder, tasks=tasks or ())}")


@bench.command(name="curate")
def bench_curate(
    out: Reports = REPORTS,
    files: Annotated[int, typer.Option(min=2, help="Videos of the small run.")] = 200,
    more: Annotated[int, typer.Option(min=3, help="Videos of the large run.")] = 2000,
    repeats: Repeats = 1,
) -> None:
    """Files a second of curation, its memory at two sizes, and what that comes to for 170 million videos."""
    from scaling4d_bench import curate

    print(f"wrote {curate.bench(out, files=files, more=more, repeats=repeats)}")


@bench.command(name="pretrain")
def bench_pretrain(
    out: Reports = REPORTS,
    clips: Annotated[int, typer.Option(min=1, help="A batch of everyone.")] = 8,
    repeats: Repeats = 5,
    precision: Annotated[list[str], typer.Option(help="fp32 or bf16; give it twice for both.")] = ["fp32"],  # noqa: B006
    mae_st: Annotated[
        Path | None, typer.Option(help="A checkout of facebookresearch/mae_st to measure beside ours; its code is run.")
    ] = None,
) -> None:
    """Clips a second of whole training steps, and the share of the matmul peak: ours, transformers' VideoMAE, official MAE-ST."""
    _precisions(precision)
    from scaling4d_bench import pretrain

    print(f"wrote {pretrain.bench(out, clips=clips, repeats=repeats, precisions=precision, mae_st=mae_st)}")


@bench.command(name="masking")
def bench_masking(
    out: Reports = REPORTS,
    clips: Annotated[int, typer.Option(min=1, help="A batch.")] = 2,
    repeats: Repeats = 5,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    workers: Annotated[int, typer.Option(min=0, help="Processes that load clips.")] = 4,
    shards: Annotated[Path | None, typer.Option(help="A `clips` folder to load from, instead of made-up videos.")] = None,
) -> None:
    """Step time at 0, 75, 90 and 95 % hidden, MAE-ST's and SimpleMAE's decoding at B and L; loading clips beside it."""
    _precisions([precision])
    from scaling4d_bench import masking

    print(f"wrote {masking.bench(out, clips=clips, repeats=repeats, precision=precision, workers=workers, shards=shards)}")


@bench.command(name="attention")
def bench_attention(
    out: Reports = REPORTS,
    total: Annotated[int, typer.Option(min=1, help="Tokens of all clips together, about.")] = 6272,
    repeats: Repeats = 7,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
) -> None:
    """Attention at the token counts in use: ours, torch's own ways, xformers; clips in a batch and packed in one sequence."""
    _precisions([precision])
    from scaling4d_bench import attention

    print(f"wrote {attention.bench(out, total=total, repeats=repeats, precision=precision)}")


@bench.command(name="costs")
def bench_costs(out: Reports = REPORTS, repeats: Repeats = 5) -> None:
    """How time and memory of training grow with clips, frames, side, depth, width and batch, beside the formulas."""
    from scaling4d_bench import costs

    print(f"wrote {costs.bench(out, repeats=repeats)}")


def _precisions(given: list[str]) -> None:
    for precision in given:
        if precision not in ("fp32", "bf16"):
            raise UserError(f"--precision {precision!r}; needed fp32 or bf16")
