"""`scaling4d evaluate`: encoders of any source on the profile's benchmarks, and the audit of such a folder."""

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from scaling4d import artifacts, config, seeds
from scaling4d.audit import check_evaluation
from scaling4d.checkpoint import Checkpoint
from scaling4d.cli import app
from scaling4d.encoders import published
from scaling4d.encoders.pretrained import load_encoder
from scaling4d.encoders.stage import baseline
from scaling4d.evaluate import function, models, stage
from scaling4d.evaluate.table import evaluate, table_text
from scaling4d.provenance import parse_csv
from scaling4d.readout import protocols
from scaling4d.readout.stage import readout
from scaling4d.records import AGAIN, Preempted, Result, UserError, read_json_object, write_json
from scaling4d.report.tables import RESULTS

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
POCKET = EXPERIMENTS / "pocket/benchmarks"
RELEASED = Path(__file__).parents[1] / "fixtures/4ds_seed0/backbone_params.npz"  # in the layout of a released 4DS
GUIDE = (EXPERIMENTS / "GUIDE.md").read_text()
COLOURS = next(code for code in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "class Colours" in code)
EVALUATION = pytest.mark.usefixtures("actions")
CLIP, WRONG = (8, 64, 64), "wrong       Colours/actions/linear"


@pytest.fixture
def colours(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The guide's callable in a module of the current folder, with weights, and no trace of it afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(function, "BUILT", {})
    (project / "colours.py").write_text(COLOURS)
    weight = 0.05 * torch.randn(48, 3, 2, 16, 16, generator=seeds.torch_rng(0, "colours"))
    torch.save({"patches.weight": weight, "patches.bias": torch.zeros(48)}, project / "colours.pt")
    yield "colours:Colours"
    (project / "colours.py").unlink()
    (project / "colours.pt").unlink()
    sys.modules.pop("colours", None)
    published.MODELS.pop(function.FunctionEncoder.__name__, None)  # the dictionary that load_encoder reads
    shutil.rmtree(project / "evaluated", ignore_errors=True)


@pytest.fixture
def evaluated(actions: None, colours: str) -> Path:
    """An evaluation of the callable alone."""
    return evaluate([colours], ["actions"], "linear", profile="smoke", out=Path("evaluated"), report=str).folder


def untrained() -> Path:
    """A Checkpoint folder of this project."""
    return baseline("untrained_nano", config.read())


@pytest.mark.integration
@EVALUATION
def test_encoders_of_four_sources_stand_in_one_table_and_a_second_call_goes_on(colours: str, tmp_path: Path) -> None:
    from encoders.small_models import save_model

    save_model(tmp_path / "dinov2", "dinov2")
    given, out = [str(untrained()), str(tmp_path / "dinov2"), str(RELEASED), colours], tmp_path / "out"
    before = {*Path("artifacts/smoke/readout").glob("*/*")}
    arguments = ["evaluate", *given, "--tasks", "actions", "--profile", "smoke", "-S", "seed=3", "--out", str(out)]
    answer = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert answer.exit_code == 0
    lines = [line.split() for line in answer.stdout.splitlines()]
    names = ["untrained_nano", "dinov2", RELEASED.stem, "Colours"]
    assert [line[0] for line in lines if "top1" in line] == names
    rows = [row for row in parse_csv((out / "results.csv").read_text()) if row["metric"] == "top1"]
    assert [row["encoder"] for row in rows] == names and [*rows[0]][: len(RESULTS)] == [*RESULTS]
    assert {row["overrides"] for row in rows} == {"seed=3"} and {row["seed"] for row in rows} == {"3"}
    assert len({row["checkpoint_sha256"] for row in rows}) == 4 and len({row["benchmark_sha256"] for row in rows}) == 1
    assert (out / "pretrain/untrained_nano").is_symlink() and {*Path("artifacts/smoke/readout").glob("*/*")} == before
    assert check_evaluation(out) == 0
    files = [out / "readout" / name / "actions/linear/result.json" for name in names]
    before = [file.stat().st_mtime_ns for file in files]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).stdout == answer.stdout
    assert [file.stat().st_mtime_ns for file in files] == before
    CliRunner().invoke(app, [*arguments, "-S", "seed=4"], catch_exceptions=False)
    assert all(file.stat().st_mtime_ns > then for file, then in zip(files, before, strict=True))


@pytest.mark.integration
@EVALUATION
def test_a_linear_probe_is_that_of_the_frozen_readout(colours: str, tmp_path: Path) -> None:
    where = {"profile": "smoke", "out": tmp_path / "out", "report": str}
    linear = evaluate([colours], ["actions"], "linear", **where).results[0]
    frozen = evaluate([colours], ["actions"], "frozen", **where)
    assert Result.read(tmp_path / "out/readout/Colours/actions/linear/result.json") == linear
    assert (linear.protocol, linear.metric, linear.examples) == ("linear", "top1", 8)
    assert linear.low <= linear.value <= linear.high and "top1_mean" in linear.others
    assert linear.value == frozen.results[0].others["top1_linear"]
    assert linear.parameters == 48 * (3 * 2 * 16 * 16 + 1) and "Colours" in table_text(frozen)
    path = tmp_path / "out/readout/Colours/actions/frozen/result.json"
    before = path.stat().st_mtime_ns
    evaluate([colours], ["actions"], "frozen", **where)
    assert path.stat().st_mtime_ns == before and check_evaluation(tmp_path / "out") == 0


@pytest.mark.integration
@EVALUATION
def test_propagated_boxes_are_those_of_the_frozen_readout_and_need_no_training(tmp_path: Path) -> None:
    changes = [f"readout.Evaluation.{key}" for key in (f"data={POCKET}", "train_items=16", "val_items=8")]
    where = {"profile": "smoke", "report": str, "changes": [*changes, "readout.frozen.boxes.Frozen.steps=2"]}
    with pytest.raises(UserError, match="profile smoke has no task for protocol propagated; name some: --tasks boxes$"):
        evaluate([str(untrained())], [], "propagated", out=tmp_path / "none", **where)
    propagated = evaluate([str(untrained())], ["boxes"], "propagated", out=tmp_path / "propagated", **where).results
    frozen = evaluate([str(untrained())], ["boxes"], "frozen", out=tmp_path / "frozen", **where).results[0]
    assert [(result.task, result.protocol, result.metric) for result in propagated] == [("boxes", "propagated", "mean_iou")]
    assert propagated[0].value == frozen.others["mean_iou_propagated"]
    assert propagated[0].low < propagated[0].value < propagated[0].high and check_evaluation(tmp_path / "propagated") == 0


@pytest.mark.integration
@EVALUATION
def test_an_encoder_of_a_fixed_number_of_frames_names_the_setting_that_suits_it(tmp_path: Path) -> None:
    from encoders.small_models import save_model

    save_model(tmp_path / "videomae", "videomae")
    with pytest.raises(UserError, match=r"does not suit a videomae; needed (\d+) frames, .*; -S clip.frames=\1 is its own"):
        evaluate([str(tmp_path / "videomae")], ["actions"], "linear", profile="smoke", out=tmp_path / "out")


def edit_number(folder: Path) -> None:
    path = folder / "results.csv"
    value = next(row["value"] for row in parse_csv(path.read_text()) if row["metric"] == "top1")
    path.write_text(path.read_text().replace(f"top1,{value},", "top1,0.99,"))


def rewrite(name: str, **values: object) -> Callable[[Path], None]:
    """An edit that gives a JSON file of an evaluation other values."""
    return lambda folder: write_json(folder / name, read_json_object(folder / name) | values)


def edit_weights(folder: Path) -> None:
    saved, path = Checkpoint.read(folder / "pretrain/Colours"), folder / "pretrain/Colours"
    saved.write(path, {"features": torch.zeros(2)})


def of_another_task(folder: Path) -> None:
    path = "readout/Colours/actions/linear/result.json"
    rewrite(path, task="depth")(folder)


def edit_benchmark(folder: Path) -> None:
    next(path for path in sorted(Path("data/benchmarks").rglob("*")) if path.is_file()).write_bytes(b"other")


def remove_row(folder: Path) -> None:
    path = folder / "results.csv"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if ",top1," not in line))


@pytest.mark.integration
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_number, f"{WRONG}: top1 is 0.99 in results.csv, 0."),
        (rewrite("readout/Colours/actions/linear/result.json", value=0.99, high=1.0), f"{WRONG}: readout_sha256 of top1 is "),
        (rewrite("evaluation.json", profile="pocket"), f"{WRONG}: profile is smoke, pocket in evaluation.json; "),
        (rewrite("evaluation.json", overrides=["seed=5", "launch=here"]), f"{WRONG}: seed is 0, 5 in evaluation.json; "),
        (edit_weights, f"{WRONG}: it was measured on weights "),
        (of_another_task, f"{WRONG}: task is depth in its result.json, actions in evaluation.json or its folder; "),
        (rewrite("evaluation.json", weights={"Colours": "0"}), f"{WRONG}: checkpoint_sha256 is "),
        (edit_benchmark, f"{WRONG}: it was measured on data/benchmarks/ssv2 of sha256 "),
        (remove_row, f"{WRONG}: top1 is in one of "),
        (
            lambda _: Path("data/benchmarks/ssv2").rename("data/benchmarks/elsewhere"),
            "not checked Colours/actions/linear: its benchmark is not here: no folder data/benchmarks/",
        ),
    ],
)
def test_the_audit_names_what_changed(
    evaluated: Path, edit: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert check_evaluation(evaluated) == 0 and capsys.readouterr().out == "0 wrong; checked 1 results of evaluated\n"
    edit(evaluated)
    assert check_evaluation(evaluated) == int(message.startswith("wrong"))
    assert message in capsys.readouterr().out


def test_another_folder_is_no_evaluation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no finished evaluation: needed evaluation.json and results.csv"):
        check_evaluation(tmp_path)


def test_a_folder_never_starts_the_code_of_a_callable(colours: str, tmp_path: Path) -> None:
    folder = models.write_encoder(colours, CLIP, tmp_path)
    pixels = torch.zeros(1, *CLIP, 3, dtype=torch.uint8)
    assert load_encoder(folder).features(pixels)[0].shape == (1, 4 * 4 * 4, 48)
    function.BUILT.clear()
    with pytest.raises(UserError, match="colours:Colours is code, which no folder may start"):
        load_encoder(folder)
    del published.MODELS["FunctionEncoder"]
    with pytest.raises(UserError, match="unknown model 'FunctionEncoder'"):
        load_encoder(folder)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda B, t: torch.zeros(B, t, 6, 8), "n = 6 is no square"),
        (lambda B, t: torch.zeros(B, 6, 8), r"makes features \(2, 6, 8\); needed B t n D with B = 2"),
        (lambda B, t: torch.zeros(B, 3, 4, 8), "t = 3; needed a divisor of the 8 frames"),
        (lambda B, t: torch.full((B, t, 4, 8), torch.nan), "infinite or NaN; needed finite floats"),
        (lambda B, t: np.zeros((B, t, 4, 8), dtype="int64"), "torch.int64 with 0 infinite or NaN"),
        (lambda B, t: (torch.zeros(B, t, 4, 8), None), "the encoder returned a tuple; needed one tensor B t n D"),
        (lambda B, t: {"x": torch.zeros(B, t, 4, 8)}, "the encoder returned a dict; needed one tensor B t n D"),
    ],
)
def test_a_callable_without_such_features_is_refused(colours: str, result: Callable, message: str) -> None:
    module = ModuleType("colours")
    module.make = lambda: lambda video: result(len(video), 4)
    sys.modules["colours"] = module
    with pytest.raises(UserError, match=message):
        function.build_function("colours:make", CLIP)


def test_a_callable_may_be_a_partial_and_stays_on_the_cpu(colours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("colours.py").write_text(f"import functools\n{COLOURS}\n\nmake = functools.partial(Colours)\n")
    *_, sources = function.build_function("colours:make", CLIP)
    assert [*sources] == ["colours.py"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="colours:make uses the GPU, .*; leave the encoder on the CPU"):
        function.build_function("colours:make", CLIP)


def test_an_encoder_of_the_evaluation_itself_is_refused_and_stays(colours: str, tmp_path: Path) -> None:
    folder = models.write_encoder(str(untrained()), (8, 32, 32), tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / folder.name).symlink_to(folder)
    for model in (folder, tmp_path / "elsewhere" / folder.name):
        with pytest.raises(UserError, match="which this evaluation writes; name its source, or another --out"):
            models.write_encoder(str(model), CLIP, tmp_path)
    assert load_encoder(folder).clip == (8, 32, 32)


@pytest.mark.integration
@EVALUATION
def test_both_protocols_show_the_frames_and_the_side_of_the_evaluation(
    colours: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(folder: Path, **clip: int) -> torch.nn.Module:
        with (tmp_path / "loaded").open("a") as file:  # of any rank
            file.write(f"{clip}\n")
        return load_encoder(folder, **clip)

    monkeypatch.setattr(protocols, "load_encoder", load)
    where = {"profile": "smoke", "report": str, "changes": ["readout.Evaluation.frames=4", "readout.Evaluation.side_px=32"]}
    linear = evaluate([str(untrained())], ["actions"], "linear", out=tmp_path / "linear", **where).results[0]
    assert {*(tmp_path / "loaded").read_text().splitlines()} == {"{'frames': 4, 'side_px': 32}"}
    frozen = evaluate([str(untrained())], ["actions"], "frozen", out=tmp_path / "frozen", **where).results[0]
    assert linear.value == frozen.others["top1_linear"]
    with pytest.raises(UserError, match=r"colours:Colours is shown clips of T H W = \(8, 64, 64\), and readout.Evaluation asks"):
        evaluate([colours], ["actions"], "linear", out=tmp_path / "callable", **where)


@pytest.mark.integration
@EVALUATION
@pytest.mark.parametrize(("exit_code", "error"), [(0, None), (1, UserError), (AGAIN, Preempted)])
def test_a_readout_whose_ranks_run_elsewhere_is_read_when_it_succeeded(
    exit_code: int, error: type[Exception] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(*names: object, **options: object) -> int:
        assert stage.config.section(names[3], "readout.Launch.where") == "slurm"
        if exit_code == 0:
            readout(*names[:3], {**names[3], "readout": {**names[3]["readout"], "Launch": here}}, **options)
        return exit_code

    here = config.read()["readout"]["Launch"]
    monkeypatch.setattr(stage, "readout", elsewhere)
    where = {"profile": "smoke", "report": str, "changes": ["readout.Launch.where=slurm"], "out": tmp_path / "out"}
    with pytest.raises(error, match="the readout of untrained_nano for actions") if error else nullcontext():
        (result,) = evaluate([str(untrained())], ["actions"], "frozen", **where).results
        assert result.metric == "top1" and result.protocol == "frozen"


def test_a_callable_that_is_not_there_is_refused(colours: str) -> None:
    for model, message in {
        "nowhere:Colours": "no module nowhere; needed one that is installed, or nowhere.py in ",
        "colours:Colors": "colours has no Colors; needed a function or class",
        "colours:torch": "is a module; needed a function or class",
    }.items():
        with pytest.raises(UserError, match=message):
            function.build_function(model, CLIP)


@pytest.mark.parametrize("code", ["import timm_of_mine\n", "", "def make():\n    import timm_of_mine\n"])
def test_a_package_that_a_callable_needs_is_named(colours: str, code: str) -> None:
    Path("colours.py").write_text(code or "def make():\n    return lambda video: __import__('timm_of_mine.layers')\n")
    with pytest.raises(UserError, match=r"^colours needs the package timm_of_mine, which is not installed$"):
        function.build_function("colours:make", CLIP)


def test_a_callable_says_its_clip_or_is_told(colours: str) -> None:
    told = re.sub("    clip = .*\n\n", "", COLOURS).replace("Colours", "Told")
    Path("colours.py").write_text(f"{COLOURS}\n\n{told}")
    assert "clip" not in told and function.build_function(colours, (4, 32, 32))[0].clip == CLIP
    config, features, *_ = function.build_function("colours:Told", (4, 32, 32))
    assert config.clip == (4, 32, 32) and config.grid == (2, 2, 2) and features.shape == (2, 2, 4, 48)


def test_a_checkpoint_of_another_clip_is_resized_and_its_folder_stays_as_it_is(colours: str, tmp_path: Path) -> None:
    source = untrained()
    before = artifacts.sha256(source)
    assert models.write_encoder(str(source), CLIP, tmp_path).is_symlink()
    folder = models.write_encoder(str(source), (8, 32, 32), tmp_path)
    assert not folder.is_symlink() and load_encoder(folder).clip == (8, 32, 32)
    assert Checkpoint.read(folder).name == "untrained_nano" and artifacts.sha256(source) == before


def test_what_cannot_be_evaluated_is_refused_before_anything_is_computed(colours: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for given, tasks, protocol, out, message in (
        (["nothing"], ["actions"], "linear", "new", "no model 'nothing'; needed a Checkpoint folder"),
        ([colours, "other:Colours"], ["actions"], "linear", "new", "are both called Colours"),
        ([colours], ["pose"], "linear", "new", "pose has no protocol linear; tasks that have it: actions, depth; needed"),
        ([colours], ["depth"], "propagated", "new", "depth has no protocol propagated; tasks that have it: boxes; needed"),
        (
            [colours],
            ["boxes"],
            "linear",
            "new",
            "boxes has no protocol linear; tasks that have it: .* or --protocol frozen or propag",
        ),
        ([colours], ["action"], "linear", "new", "unknown task 'action'.*did you mean actions"),
        ([colours], ["actions"], "finetune", "new", "protocol = 'finetune'; needed linear or frozen or propagated"),
        ([colours], ["actions"], "linear", "", "is there, and no evaluation"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(given, tasks, protocol, profile="smoke", out=tmp_path / out)
    assert not (tmp_path / "new").exists()


@pytest.mark.integration
def test_tokens_that_do_not_divide_the_picture_are_refused_for_depth_with_a_side_that_suits(colours: str, tmp_path: Path) -> None:
    Path("colours.py").write_text("import torch\n\n\ndef make():\n    return lambda video: torch.zeros(len(video), 4, 49, 8)\n")
    with pytest.raises(UserError, match="make has 7 x 7 tokens, which do not divide the 64 px.*-S clip.side_px=56 suits it"):
        evaluate(["colours:make"], ["depth"], "linear", profile="smoke", out=tmp_path / "out")


def test_an_entry_point_names_a_callable(colours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = function.metadata.EntryPoint("rainbow", colours, function.GROUP)
    monkeypatch.setattr(
        function.metadata, "entry_points", lambda *, group, name: [point] if (group, name) == (function.GROUP, "rainbow") else []
    )
    assert models.name_of("rainbow") == "rainbow" and function.build_function("rainbow", CLIP)[0].width == 48
