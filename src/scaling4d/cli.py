"""The command line: thin commands that parse, call one function and print the result's place."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

for _library in ("OPENBLAS", "MKL"):  # numpy's BLAS reads this at import; the last digits of results depend on it
    os.environ[f"{_library}_NUM_THREADS"] = "1"

from scaling4d import config  # noqa: E402
from scaling4d.records import AGAIN, Preempted, UserError, as_user_error, file_system_errors, on_one_line  # noqa: E402
from scaling4d.training.gpus import STORAGE_GB_PER_S, WORKER_CLIPS_PER_S  # noqa: E402

HELP = "Pretrain masked video autoencoders of growing size, evaluate them with readouts, and build the scaling report."
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)
data = typer.Typer(no_args_is_help=True, help="The data that the pipeline reads.")
app.add_typer(data, name="data")
if find_spec("scaling4d_bench"):
    from scaling4d_bench.cli import bench  # imports no torch

    app.add_typer(bench, name="bench")


def main() -> None:
    """Exit code 0: done; 75: saved and stopped, run it again; 130: Ctrl-C; 1: a user's error, in one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        with file_system_errors():
            app()
    except UserError as error:
        print(f"error: {on_one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except Preempted as preempted:
        print(on_one_line(preempted), file=sys.stderr)
        sys.exit(AGAIN)


def _settings() -> dict:
    """params.yaml, checked against experiments/. The first rank prints the overrides."""
    settings = config.read()
    overrides = config.overrides(settings)
    for key, value in overrides.items() if _is_first_rank() else ():
        print(f"override: {key} = {value!r} (not the value of profile {settings['profile']})", file=sys.stderr)
    return settings


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"  # distributed.is_main imports torch


@app.command()
def code() -> None:
    """Hash the code of each package with a stage to artifacts/code/ (a DVC stage)."""
    from scaling4d import artifacts
    from scaling4d.pipeline.code_hashes import SOURCE, write_hashes

    write_hashes(SOURCE, artifacts.CODE)


@app.command()
def clips(
    dry: Annotated[bool, typer.Option("--dry", help="Count usable videos of data.dvc's folder, and others by reason.")] = False,
    list_files: Annotated[bool, typer.Option("--all", help="With --dry: each file, and why it is not used.")] = False,
) -> None:
    """Curate data/videos into shards of clips (a DVC stage)."""
    from scaling4d.clips import stage

    if list_files and not dry:
        raise UserError("--all lists the files of a dry run; needed --dry --all")
    if dry:
        stage.dry_run(_settings(), list_files=list_files)
    else:
        print(f"wrote {stage.clips(_settings())}")


@app.command()
def benchmarks() -> None:
    """Hash the benchmark of each task to artifacts/benchmarks/ (a DVC stage)."""
    from scaling4d.benchmarks.stage import hash_benchmarks

    print(f"wrote {hash_benchmarks(_settings())}")


@app.command()
def pretrain(
    point: str,
    dry: Annotated[bool, typer.Option("--dry", help="Print how the ranks would be started, and start none.")] = False,
    snapshot: Annotated[Path | None, typer.Option(hidden=True, help="From a launcher to its ranks.")] = None,
) -> None:
    """Pretrain one scaling point on the clips (a DVC stage), as its Launch settings say; exit code 75: run it again."""
    from scaling4d.pretrain import stage

    if dry:
        print(stage.describe_start(point, _settings()))
        return
    result = stage.pretrain_launched(point, snapshot) if snapshot else stage.pretrain(point, _settings())
    if isinstance(result, int):
        raise typer.Exit(result)
    if result and _is_first_rank():
        print(f"wrote {result}")


@app.command()
def baseline(encoder: str) -> None:
    """Write the encoder `untrained_<point>`, `pixels`, or a published one of encoders.pretrained (a DVC stage)."""
    from scaling4d.encoders import stage

    print(f"wrote {stage.baseline(encoder, _settings())}")


@app.command()
def readout(
    encoder: str,
    task: str,
    protocol: str,
    snapshot: Annotated[Path | None, typer.Option(hidden=True, help="From a launcher to its ranks.")] = None,
) -> None:
    """Train and measure a readout (a DVC stage): TASK actions|boxes|depth|points|pose, PROTOCOL frozen|finetune, and
    classifier for actions; as readout.Launch says, or in each rank of a torchrun; exit code 75: run it again."""
    from scaling4d.readout import stage

    result = stage.readout_launched(snapshot) if snapshot else stage.readout(encoder, task, protocol, _settings())
    if isinstance(result, int):
        raise typer.Exit(result)
    if result and _is_first_rank():
        interval = f"{result.low:.4f} to {result.high:.4f}"
        print(f"{encoder} {task} {protocol}: {result.metric} {result.value:.4f} ({interval}) {result.unit}")


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint folder; published encoder's file or folder; owner/name or owner/name@REVISION of the hub; or "
            "module:function or an entry point of group scaling4d.encoders, whose code runs.",
        ),
    ],
    tasks: Annotated[str, typer.Option(help="Such as actions,depth; default: all of the profile that the protocol has.")] = "",
    protocol: Annotated[
        str,
        typer.Option(help="linear: closed-form probes; frozen: attention readouts; propagated: boxes, without training."),
    ] = "linear",
    profile: Annotated[str, typer.Option(help="Of experiments/profile: benchmarks, clips, heads; default: pocket.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the evaluation, where the same command continues.")] = Path("evaluated"),
    changes: Annotated[list[str] | None, typer.Option("--set", "-S", help="key=value of a setting; may be repeated.")] = None,
) -> None:
    """Measure any encoders on a profile's labelled benchmarks: one table, results.csv; `audit FOLDER` verifies them."""
    from scaling4d.evaluate import table as evaluation

    words = [word.strip() for word in tasks.split(",") if word.strip()]
    where = {"profile": profile, "changes": changes or (), "out": out}
    done = evaluation.evaluate(models, words, protocol, **where, report=partial(print, file=sys.stderr, flush=True))
    print(evaluation.table_text(done))
    print(f"wrote {done.folder / evaluation.CSV}")


@app.command()
def show(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT", help="Frozen readouts of one task, folders in artifacts/.")],
    out: Annotated[Path | None, typer.Option(help="New folder for sheet.png and clips.mp4; default: one in shown/.")] = None,
    clips: Annotated[
        int | None, typer.Option(min=1, help="Validation clips, drawn by the result's seed; default: show.clips.")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a clip on the sheet; default: show.frames.")] = None,
) -> None:
    """Draw predictions beside the ground truth: depth maps, tracks, boxes, camera paths, top classes (a DVC stage)."""
    from scaling4d.show import stage

    print(f"wrote {stage.show(results, out, clips=clips, frames=frames)}")


@app.command()
def reconstruct(
    point: str, snapshot: Annotated[Path | None, typer.Option(hidden=True, help="From a launcher to its ranks.")] = None
) -> None:
    """Fill in masked validation clips and measure them (a DVC stage), as reconstruct.Launch says."""
    from scaling4d.reconstruct import stage

    result = stage.reconstruct_launched(snapshot) if snapshot else stage.reconstruct(point, _settings())
    if isinstance(result, int):
        raise typer.Exit(result)
    if result and _is_first_rank():
        print(f"wrote {result}")


@app.command()
def report() -> None:
    """Build tables, figures and the HTML report from the results (a DVC stage)."""
    from scaling4d.report import stage

    stage.build(_settings())


@app.command()
def table() -> None:
    """Print the results as one table: point x task x protocol. Before all stages have run: the committed report's."""
    from scaling4d.report.run_results import MissingResult, read_run_results
    from scaling4d.report.tables import RESULTS_CSV, table_text, text_of_csv

    settings = _settings()
    try:
        print(table_text(read_run_results(settings)))
    except MissingResult as error:
        committed = Path(config.section(settings, "report.folder"), RESULTS_CSV)
        if not committed.is_file():
            raise
        print(f"{on_one_line(error)}; the table is of the committed report", file=sys.stderr)
        print(text_of_csv(committed))


@app.command()
def compare(
    rev_a: Annotated[str, typer.Argument(help="A git revision, a DVC experiment, or `workspace`.")],
    rev_b: Annotated[str, typer.Argument(help="The second revision or experiment.")] = "workspace",
    out: Annotated[Path | None, typer.Option(help="The page; default: compare-REV_A-REV_B.html.")] = None,
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
    """Gather the experiments and open report, experiments and lineage as one page, which also works from its file."""
    import webbrowser

    from scaling4d.report import site

    folder = Path(config.section(config.read(), "report.folder"))
    names = site.write_experiments(folder)
    with site.serve(folder, port) as server:
        url = f"http://127.0.0.1:{server.server_port}/{site.FOLDER}/"
        print(f"{len(names)} other runs; {url} until Ctrl-C, or {folder / site.FOLDER / site.PAGE} without a server", flush=True)
        if open_browser:
            webbrowser.open(url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


@app.command()
def study(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(help="Files of experiments/study; none: list, or collect, all.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Experiments side by side, each of `ranks` processes.")] = 4,
    seeds: Annotated[str, typer.Option(help="Such as 0,1,2; default: the study's own.")] = "",
    dry: Annotated[bool, typer.Option("--dry", help="Print the experiments, and which exist already; run none.")] = False,
    collect: Annotated[bool, typer.Option("--collect", help="Run none: make tables, figures and pages again.")] = False,
) -> None:
    """Run every arm of studies with every seed as DVC experiments, and write the outcome to reports/studies/NAME.

    Finished runs are not repeated; a stopped study continues with the same command.
    """
    from scaling4d.studies import run
    from scaling4d.studies.study import read_study, study_names

    if collect:
        given = [name for name in ("jobs", "seeds", "dry") if context.get_parameter_source(name).name == "COMMANDLINE"]
        if given:
            options = " and ".join(f"--{name}" for name in given)
            raise UserError(f"--collect runs nothing and takes the seeds of each study.json; leave out {options}")
        for folder in run.collect_studies(names or ()):
            print(f"wrote {folder}")
    elif names:
        run.run_studies(names, seeds=seeds, jobs=jobs, dry=dry, report=partial(print, flush=True))
    else:
        for name in study_names():
            print(f"{name}: {read_study(name).question}")


@app.command()
def law(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER", help="Of studies, fitted together; without --predict also with artifacts of one method."
        ),
    ],
    parameters: Annotated[int | None, typer.Option(min=1, help="Encoder parameters of the prediction.")] = None,
    clips: Annotated[int | None, typer.Option(min=1, help="Clips seen, with --parameters.")] = None,
    flops: Annotated[
        float | None, typer.Option(min=1, help="Training FLOPs; without --parameters: predict the best size.")
    ] = None,
    predict: Annotated[str, typer.Option(help="A study: write the losses of its arms to experiments/prediction.")] = "",
) -> None:
    """Fit loss over size and data, with 90 % intervals, and predict the loss of a new size or budget."""
    from scaling4d.studies import law as laws
    from scaling4d.studies.study import read_study

    options = {"--parameters": parameters, "--clips": clips, "--flops": flops}
    kinds = {option for option, value in options.items() if value}
    given = " ".join(f"{option} {value}" for option, value in options.items() if value)
    if predict and given:
        raise UserError(f"--predict writes the losses of all arms of {predict}; leave out {given}")
    if predict and len(folders) > 1:
        raise UserError(f"--predict with {len(folders)} folders; needed one, the study that predicts")
    if predict:
        path = laws.write_prediction(read_study(predict), folders[0])
        print(f"wrote {path}; commit it, then run `scaling4d study {predict}`")
    elif kinds not in (set(), {"--flops"}, {"--parameters", "--clips"}, {"--parameters", "--flops"}):
        raise UserError(f"{given}: needed --parameters with --clips or --flops, --flops alone, or none of them")
    else:
        print(laws.law_text(laws.law_of(*folders), parameters=parameters, clips=clips, flops=flops))


@app.command()
def compose(overrides: Annotated[list[str] | None, typer.Argument(help="profile=NAME key=value ...")] = None) -> None:
    """Write params.yaml from experiments/, as `dvc exp run -S` does."""
    config.write(overrides or [], check=_check_settings)
    print(f"wrote {config.PARAMS}")


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Bind the settings of every stage. Raises UserError: what a stage would say about them, or an unknown setting."""
    from scaling4d.benchmarks import stage as benchmarks_stage
    from scaling4d.clips import stage as clips_stage
    from scaling4d.encoders import stage as encoders_stage
    from scaling4d.pretrain import settings as pretrain_settings
    from scaling4d.readout import stage as readout_stage
    from scaling4d.reconstruct.stage import bind_reconstruct
    from scaling4d.scenes.dataset import bind_render
    from scaling4d.show import settings as show_settings

    config.overrides(settings)
    bind_render(settings)
    for part in (clips_stage, benchmarks_stage, pretrain_settings, encoders_stage, readout_stage, show_settings):
        part.check_settings(settings)
    bind_reconstruct(settings)


@app.command()
def render(
    out: Path, overrides: Annotated[list[str] | None, typer.Argument(help="profile=NAME key=value ...; default: pocket.")] = None
) -> None:
    """Render labelled 4D worlds, by default those of the pocket data set, to a new folder OUT."""
    from scaling4d.scenes.dataset import RenderConfig, bind_render, write_dataset

    bound = bind_render(config.compose(overrides or []))
    print(f"wrote {write_dataset(out, seed=bound.declared['seed'], settings=bound[RenderConfig])}")


@app.command()
def plan(
    point: str,
    profile: Annotated[
        str | None, typer.Option(help="Whose POINT; default: that of params.yaml, else of paper, else of the first that has it.")
    ] = None,
    mesh: Annotated[str | None, typer.Option(help="SHARDSxREPLICAS, such as 256x1; default: the profile's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Clips a step over all GPUs; default: the profile's.")] = None,
    recompute: Annotated[str, typer.Option(help="none, or block: recompute activations in the backward pass.")] = "none",
    gpu: Annotated[str, typer.Option(help="h100, h200, a100 or a100_40.")] = "h100",
    worker_clips_per_s: Annotated[float, typer.Option(help="Of 16 x 224 x 224, by one process.")] = WORKER_CLIPS_PER_S,
    storage_gb_per_s: Annotated[
        float, typer.Option(help="Of the file system, all GPUs together: writes checkpoints, reads features; an assumption.")
    ] = STORAGE_GB_PER_S,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Also step the real model, sharded, on fake tensors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """The cost of POINT, of this or any profile, on a cluster: parameters, FLOPs, memory, days; no GPU needed.

    And the cost of its frozen readouts: windows that are read, passes of the encoder, days, bytes of stored features.

    A mesh on which it does not fit is an answer, not an error: exit code 0, with the reason and fitting changes. A plan
    that loading bounds is refused: exit code 1, after the figures.
    """
    from scaling4d.pretrain.plan import table
    from scaling4d.pretrain.plan.plan import plan as make_plan
    from scaling4d.pretrain.plan.plan import settings_of
    from scaling4d.pretrain.plan.readouts import plan_readouts
    from scaling4d.report.protocol import SHAPE_OF_J, row_of
    from scaling4d.studies.law import FITTED, law_of, prediction_text

    costs = {"gpu": gpu, "worker_clips_per_s": worker_clips_per_s, "storage_gb_per_s": storage_gb_per_s}
    content = make_plan(point, profile=profile, mesh=mesh, batch=batch, recompute=recompute, dry=dry_run, **costs)
    content["readouts"] = plan_readouts(point, settings_of(point, profile), gpu=gpu, worker_clips_per_s=worker_clips_per_s)
    if point == "j":
        content["shape"] = row_of(SHAPE_OF_J)["reason"]
    if content["method"] == "SimpleMAE" and FITTED.is_dir():
        try:
            with as_user_error(f"{FITTED} cannot be read"):
                size, clips = content["parameters"]["backbone"], content["schedule"]["clips"]
                text = prediction_text(law_of(FITTED, draws=0), size, clips)
            interval = f"scaling4d law {FITTED} --parameters {size} --clips {clips}"
            content["law"] = f"by the law of {FITTED}, on its data: {text}; its interval: {interval}"
        except UserError as error:
            content["law"] = f"no prediction of the loss: {on_one_line(error)}"
    if as_json:
        print(json.dumps(content))
    else:
        table.show(content)
        if content["readouts"]:
            table.show_readouts(content)
        if point == "j":
            print(f"{SHAPE_OF_J}: {content['shape']}")
        if "law" in content:
            print(content["law"])
    if content["refused"]:
        raise UserError(f"the plan of {point} is {content['refused']}")


@app.command()
def convert(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="4ds or mae_st")],
    source: Path,
    out: Annotated[Path, typer.Argument(help="New Checkpoint folder; for 4ds also FOLDER -> FILE.npz.")],
    heads: Annotated[int | None, typer.Option(help="mae_st: attention heads, where the width is not an official one.")] = None,
    decoder_heads: Annotated[int | None, typer.Option(help="mae_st: of the decoder, where the width is not official.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="mae_st: of a clip, if positions are one table for space and time.")] = 16,
    mask_ratio: Annotated[float, typer.Option(help="mae_st: of its pretraining, if the file does not say.")] = 0.9,
    normalise_target: Annotated[bool, typer.Option(help="mae_st: predicts normalised pixels, if the file does not say.")] = True,
) -> None:
    """Turn published weights into a Checkpoint folder, and a folder back into the released 4DS layout."""
    from scaling4d.encoders.released import MAESTOptions
    from scaling4d.readout import released_heads

    if kind not in ("4ds", "mae_st"):
        raise UserError(f"unknown kind {kind!r}; needed 4ds or mae_st")
    of_mae_st = ("heads", "decoder_heads", "frames", "mask_ratio", "normalise_target")
    given = [name for name in of_mae_st if context.get_parameter_source(name).name == "COMMANDLINE"]
    if kind == "4ds" and given:
        names = " and ".join(f"--{name}" for name in given).replace("_", "-")
        raise UserError(f"a 4ds file states its own shape; leave out {names}, of mae_st alone")
    if kind == "4ds" and out.suffix == ".npz":
        written = released_heads.to_4ds(source, out)
    elif kind == "4ds" and source.is_dir():
        raise UserError(f"{source} is a folder; to write it as released, OUT must end with .npz")
    elif not source.is_file():
        raise UserError(f"no file {source}")
    elif kind == "4ds":
        written = released_heads.from_4ds(source, out)
    else:
        options = MAESTOptions(heads, decoder_heads, frames, mask_ratio, normalise_target)
        written = released_heads.from_mae_st(source, out, options)
    print(f"wrote {written}")


@app.command()
def features(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="Folder, released file, or owner/name or owner/name@REVISION on the hub.")],
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Video files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder of the features, where a stopped command continues; or a .npz, see below.")],
    layer: Annotated[
        list[int] | None,
        typer.Option(min=0, help="After this block, 0: the embedded tokens; may be repeated; default: the last."),
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Write every token; default: their mean.")] = False,
    frames: Annotated[int | None, typer.Option(min=1, help="Of a window or clip; default: the checkpoint's.")] = None,
    side_px: Annotated[int | None, typer.Option(min=1, help="Of a square picture; default: the checkpoint's.")] = None,
    rate_hz: Annotated[float | None, typer.Option(help="Frames per second of a window; default: the checkpoint's.")] = None,
    stride: Annotated[float | None, typer.Option(help="Seconds from window to window; default: a window's length.")] = None,
    fit: Annotated[
        str, typer.Option(help="crop: the centre; inner: 7/8 of it; pad: all, between black bars; squash: all, squeezed.")
    ] = "crop",
    batch: Annotated[int, typer.Option(min=1, help="Windows that are encoded together.")] = 8,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda:1; default: the GPU, if there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16: of matrix products and of the files.")] = "float32",
    pca: Annotated[Path | None, typer.Option(help="With --tokens and one video: an .mp4 of its last layer in colours.")] = None,
    queries: Annotated[Path | None, typer.Option(help="Of a .npz: a .npy, Q 2 or Q 4 in 0..1, for a tracking readout.")] = None,
) -> None:
    """Write features of whole videos, in windows of equal stride: a .safetensors file a video, and index.json.

    A last window that the video does not fill is left out, and a video shorter than a window is a problem. Videos that
    are done are not repeated. Exit code 1: some video has no features.
    With --frames or --side-px the encoder sees clips of another size than it was trained on: learned positions are
    interpolated.

    With --out FILE.npz: of one clip, a video's first window or a .npy B T H W C (float in 0..1, or uint8), every layer
    as hidden_states lists them, and last_hidden_state, the output of the last block. Of 4DS and MAE-ST layer_02 is then
    the INPUT of block 2, which is the output of block 1, called layer_01 in a folder; of other models both are alike.
    CHECKPOINT may then also be the folder of a frozen readout, whose output is written too.
    """
    from scaling4d.features import video_features

    given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}
    of_clip, single = {"queries"}, out.suffix == ".npz"
    both = {"checkpoint", "paths", "out", "frames", "side_px", "rate_hz", "fit"}
    wrong = sorted(given - of_clip - both if single else given & of_clip)
    if wrong or (single and len(paths) != 1):
        fix = f"leave out --{' and --'.join(wrong)}".replace("_", "-") if wrong else "give one video"
        raise UserError(f"--out {out} {'is for one clip' if single else 'is a folder of whole videos'}; {fix}")
    options = {"frames": frames, "side_px": side_px, "rate_hz": rate_hz, "fit": fit}
    if single:
        from scaling4d.show.predict import write_features

        names = write_features(checkpoint, paths[0], out, queries=queries, **options)
        print(f"wrote {out}: {', '.join(names)}")
        return

    options |= {"layers": layer or (), "tokens": tokens, "dtype": dtype, "stride_s": stride}
    result = video_features.run(checkpoint, paths, out, batch=batch, device=device, pca=pca, **options)
    print(f"wrote {out}: {result.written} videos; {result.present} were there, {len(result.problems)} have problems")
    if result.problems:
        raise typer.Exit(1)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Folder, released file, or owner/name or owner/name@REVISION on the hub.")],
    torch_file: Annotated[Path | None, typer.Option("--torch", help="A new .pt2 of torch.export.")] = None,
    onnx_file: Annotated[Path | None, typer.Option("--onnx", help="A new .onnx; needs the extra `export`.")] = None,
    any_length: Annotated[
        bool, typer.Option("--any-length", help="For clips of any number of frames; default: the checkpoint's.")
    ] = False,
) -> None:
    """Write an encoder as a program that runs without scaling4d: clips uint8 B T H W 3 -> tokens B N D, mean B D."""
    if not (torch_file or onnx_file):
        raise UserError("nothing to write; give --torch FILE.pt2, --onnx FILE.onnx or both")
    from scaling4d.encoders import export as exporting

    exporting.run(checkpoint, torch_file=torch_file, onnx_file=onnx_file, any_length=any_length)


@app.command()
def reproduce(
    target: Annotated[str, typer.Argument(help="fly_vs_fly or depth_demo")],
    weights: Annotated[Path | None, typer.Option(help="The released .npz.")] = None,
    data: Annotated[Path | None, typer.Option(help="fly_vs_fly: the folder with its shards.")] = None,
    video: Annotated[Path | None, typer.Option(help="depth_demo: a video file.")] = None,
    out: Annotated[Path | None, typer.Option(help="New folder; default: artifacts/reproduced/TARGET.")] = None,
    device: Annotated[str | None, typer.Option(help="fly_vs_fly: cpu or cuda; default: the GPU, if there is one.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="fly_vs_fly: of weights, order, crops, dropout; default: 0.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="fly_vs_fly: fewer steps, for a trial without verdict.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="fly_vs_fly: threads that read; default: one a core.")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Print downloads, settings and their sources; compute nothing.")] = False,
) -> None:
    """Reproduce a published number, or a published demo, with the files that its authors released.

    fly_vs_fly: val mAP of the frozen 4DS-B-dist-e on Fly vs. Fly, by SciVid's protocol; 84.3 is published. Exit code 1:
    the difference is above the tolerance. depth_demo: 4DS's demo of depth, of which no number is published.
    """
    from scaling4d.reproduce import command

    given = {"--weights": weights, "--data": data, "--video": video}
    training = {"device": device, "seed": seed, "steps": steps, "workers": workers}
    if not command.reproduce(target, given, out=out, dry=dry, **training):
        raise typer.Exit(1)


@app.command()
def audit(
    folder: Annotated[Path | None, typer.Argument(help="Of `evaluate`: verify that; default: the committed run.")] = None,
    explain: Annotated[
        str,
        typer.Option(help="Walk a number back: ENCODER/TASK/PROTOCOL, POINT/pretrain, POINT/reconstruct; STUDY/ARM/TASK."),
    ] = "",
    form: Annotated[str, typer.Option("--as", help="Format of --explain: text or json.")] = "text",
    crate: Annotated[Path | None, typer.Option(help="Write the verified run to this new folder as an RO-Crate.")] = None,
    reproduced: Annotated[bool, typer.Option("--reproduced", help="Compare a run made again with the committed one.")] = False,
) -> None:
    """Verify every hash of the committed run, or of an evaluation, and the origin of its numbers; or explain, export,
    compare."""
    from scaling4d import audit

    if sum((folder is not None, bool(explain), crate is not None, reproduced)) > 1:
        raise UserError("FOLDER, --explain, --crate and --reproduced are four commands; needed one at a time")
    if form != "text" and not explain:
        raise UserError(f"--as {form} is the format of --explain; give a number to explain, or leave it out")
    if folder is not None:
        raise typer.Exit(audit.check_evaluation(folder))
    if explain:
        raise typer.Exit(audit.explain_number(explain, form))
    if crate is not None:
        raise typer.Exit(audit.export(crate))
    raise typer.Exit(audit.check_reproduced() if reproduced else audit.check())


@app.command()
def doctor() -> None:
    """Print versions, the device, its attention, and absent packages of the core and of extras."""
    from scaling4d.pipeline.environment import describe_environment

    for line in describe_environment():
        print(line)


@data.command()
def use(path: Path) -> None:
    """Make PATH the data of this project: any folder of videos, or one with videos/, benchmarks/ or both.

    data/ links to the files, which are only read.

    `dvc repro` copies a plain folder of the project instead: one with videos/, benchmarks/ or both, and without links.
    """
    from scaling4d.clips.data_import import use_data

    use_data(path)


@data.command()
def check(
    path: Path,
    decode: Annotated[
        bool, typer.Option("--decode", help="Also decode every frame of benchmarks' videos, on all cores.")
    ] = False,
) -> None:
    """Look at the videos and benchmarks below PATH: what `data use` leaves out, and the first problems of the rest.

    Exit code 1: a benchmark cannot be used. Videos that do not open are only listed: curation continues without them.
    """
    from scaling4d import benchmarks
    from scaling4d.clips.data_import import check_videos
    from scaling4d.clips.decoding import undecodable, videos_below

    root = path / "benchmarks"
    problems, unusable, checks = list(check_videos(path)), False, []
    if root.is_dir():
        share = config.section(config.read(), "benchmarks.max_bad_share") if config.PARAMS.is_file() else 0.0  # no project
        for name in benchmarks.unknown_folders(root):
            print(f"benchmarks/{on_one_line(name)}: passed over, since no reader has this name")
        checks = benchmarks.check_benchmarks(root, max_bad_share=share)
    for split in checks:
        unusable |= not split.usable
        name = f"{split.benchmark} {split.split}"
        official = f"; official: {split.official}" if split.official else ""
        print(f"{name}: {split.samples:,} samples{official}{f' ({split.layout})' if split.layout else ''}")
        problems += [f"{name}: {problem}" for problem in split.problems]
    for task in benchmarks.TASKS:
        with suppress(UserError):  # none, or one of the problems
            print(benchmarks.describe_use(task, root))
    if decode and root.is_dir():
        videos = videos_below(root)
        damaged = [f"{file.relative_to(path)}: {problem}" for file, problem in undecodable(videos)]
        print(f"benchmarks: {len(videos):,} videos decoded, {len(damaged):,} of them damaged")
        problems += damaged
    for problem in problems:
        print(f"problem: {on_one_line(problem)}")
    if unusable:
        raise typer.Exit(1)
