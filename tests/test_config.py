"""Settings: composition, overrides, and the configs that a stage binds."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import gin
import pytest
from commands import refused_command
from damage import ACCEPTED, REFUSED, SIZES

from scaling4d import config, provenance
from scaling4d.cli import _check_settings
from scaling4d.config import bind
from scaling4d.pretrain.settings import bind_point
from scaling4d.records import UserError

ROOT = Path(__file__).parents[1]
EVERY_PROFILE = sorted(path.stem for path in (ROOT / "experiments/profile").glob("*.yaml"))
BOXES = """
profile: any
seed: 7
point:
  Box: {width: 3, name: small, sides: [1, [2, 3]]}
  Ball: {radius: 2}
shelf: {Ball: {radius: 5}}
"""
OVERRIDES = """profile,smoke
seed,1
clips.Curation.frames,16
readout.frozen.depth.Frozen.steps,3
pretrain.Training.flip,false
"""
FORMER = {  # name of a setting -> its name today
    "points.mini.SimpleMAE.mask_ratio": "points.mini.model.SimpleMAE.mask_ratio",
    "pretrain.Running.workers": "pretrain.Runtime.workers",
    "pretrain.Running.keep": "pretrain.Runtime.keep_latest_k",
    "pretrain.Running.kept_clips": "pretrain.Runtime.cached_clips",
    "pretrain.Running.every": "pretrain.Runtime.save_every",
    "clips.Curation.workers": "clips.Workers.processes",
    "clips.Curation.cluster": "clips.Workers.cluster",
    "readout.shared.Evaluation.standardise": "readout.Evaluation.whiten",
    "readout.shared.Evaluation.place_deviation": "readout.Evaluation.position_std",
    "readout.shared.Head.sharpness": "readout.Head.distance_bias",
    "readout.tuning.Tuning.compute": "readout.Compute.compute",
    "readout.tuning.Compute.compute": "readout.Compute.compute",
    "readout.tuning.Sharding.shards": "readout.Sharding.shards",
    "readout.frozen.depth.Recipe.steps": "readout.frozen.depth.Frozen.steps",
    "readout.frozen.depth.Recipe.flattening": "readout.frozen.depth.Frozen.shrinkage",
    "readout.finetune.depth.Recipe.batch": "readout.finetune.depth.Finetune.batch",
    "readout.tasks.points.Points.queries": "readout.tasks.points.Points.queries_at",
}
USED = [("profile", "smoke"), ("point", "nano"), ("point", "simple_mae_pocket"), ("recipe", "frozen"), ("sharding", "plain")]


@dataclass(frozen=True)
class BoxConfig:
    width: int
    name: str
    sides: tuple[int | tuple[int, ...], ...] = ()
    height: float = 2.5

    def __post_init__(self) -> None:
        if self.width < 0:
            raise ValueError(f"width is {self.width}; needed 0 or more")


@dataclass(frozen=True)
class BallConfig:
    radius: int
    weight: float = 0.5
    spin: tuple[int, str] = (0, "left")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the project's experiments/ and params.yaml."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Settings of two small classes, and their experiments/."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/config.yaml").write_text(BOXES)
    monkeypatch.chdir(tmp_path)
    return config.compose([])


@pytest.mark.usefixtures("in_the_project")
def test_committed_params_are_the_composition_of_their_profile() -> None:
    assert config.overrides(config.read()) == {}


@pytest.mark.integration
@pytest.mark.usefixtures("in_the_project")
def test_dvc_trains_nothing_anew_for_where_a_run_is_launched_and_how_it_is_watched() -> None:
    import dvc.api

    points = config.read()["points"]
    declared = dvc.api.params_show(stages=[f"pretrain@{point}" for point in points])
    assert declared["pretrain"].keys() == {"Training"}
    assert {point: section.keys() for point, section in declared["points"].items()} == dict.fromkeys(
        points, {"model", "Sharding"}
    )
    untrained = dvc.api.params_show(stages="baseline_untrained@mini")
    assert untrained["points"]["mini"].keys() == {"model"}


@pytest.mark.usefixtures("in_the_project")
@pytest.mark.parametrize("frames", ["32", "64"])
def test_longer_windows_of_profile_paper_stay_within_the_videos(frames: str) -> None:
    header = Path("experiments/profile/paper.yaml").read_text()
    (lines,) = re.findall(rf"#   (-S readout.Evaluation.frames={frames} .*(?:\n#      -S .*)*)", header)
    settings = config.compose(["profile=paper", *re.findall(r"-S (\S+)", lines)])
    seconds = {"actions": 4.0, "points": 2.0, "pose": 3.0}  # of Something-Something, MOVi-E, and short RealEstate10K videos
    for task, most in seconds.items():
        (rate_hz,) = (values["rate_hz"] for values in settings["readout"]["tasks"][task].values() if "rate_hz" in values)
        assert (int(frames) - 1) / rate_hz <= most


@pytest.mark.usefixtures("in_the_project")
def test_patches_of_the_encoders_that_profile_paper_shows_384_px_divide_them() -> None:
    header = Path("experiments/profile/paper.yaml").read_text()
    ((side, without),) = re.findall(r"#   -S readout.Evaluation.side_px=(\d+) +without (.*\n#.*)\n", header)
    left_out = {"videomae_b", "videomae_l", "dinov2", "siglip", "videoprism", "videomae2_g", "mae_st_H"}
    assert all(name in without for name in left_out)
    settings = config.compose(["profile=paper", f"readout.Evaluation.side_px={side}"])
    patches = {point: bind_point(point, settings).model.patch[1] for group in config.POINTS for point in settings[group]}
    for encoder in settings["encoders"]["pretrained"]:
        kind = Path(f"experiments/encoder/{encoder}.yaml").read_text().partition("\n")[0]
        patches[encoder] = int(re.search(r"/(\d+)", kind)[1])  # of "ViT-L/16"
    refused = {encoder for encoder, patch in patches.items() if int(side) % patch}
    fixed = {"videomae_b", "videomae_l"}  # as tests/encoders/test_transformers.py holds
    assert refused | fixed == {encoder for encoder in patches if encoder.startswith(tuple(left_out))}


@pytest.mark.integration
@pytest.mark.parametrize("profile", ["paper", "mae_st"])
def test_dvc_resolves_the_stages_of_every_point_of_a_large_profile(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvc.repo import Repo

    monkeypatch.chdir(tmp_path)
    Path("experiments").symlink_to(ROOT / "experiments")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    config.write([f"profile={profile}"])
    settings = config.read()
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], check=True)
    with Repo() as repo:
        stages, graph = {stage.addressing: stage for stage in repo.index.stages}, repo.index.graph
        before = {name: {needed.addressing for needed in graph.successors(stage)} for name, stage in stages.items()}
    trained = {point: f"pretrain@{point}" for point in settings["points"]}
    trained |= {point: f"distill@{point}" for point in settings["distilled"]}
    encoders, tasks = settings["encoders"], settings["benchmarks"]["tasks"]
    readouts = {
        (point, f"readout_{kind}@{point}-{task}") for kind in ("frozen", "finetune") for point in encoders[kind] for task in tasks
    }
    readouts |= {(point, f"readout_classifier@{point}") for point in encoders["classifier"]}
    named = {*trained.values(), *(name for _, name in readouts), *(f"reconstruct@{point}" for point in settings["points"])}
    assert named <= {*stages}
    assert {point for point, _ in readouts} >= {*trained}
    assert all({trained[point], "code"} <= before[name] for point, name in readouts if point in trained)
    assert all({"clips", "benchmarks", "code"} <= before[name] for name in trained.values())
    for point, values in settings["distilled"].items():
        assert trained[values["model"]["Distilled"]["teacher"]] in before[f"distill@{point}"]


@pytest.mark.parametrize(("key", "value", "message"), [
    ("pretrain.Training.stepps", 7, "params.yaml has pretrain.Training.stepps = 7, which no group in experiments/ knows; .+"),
    ("pretrain.Training.steps", "many", r"pretrain.Training.steps = 'many' is a str; needed a whole number such as \d+"),
    ("pretrain.Runtime.keep", 2, "params.yaml has pretrain.Runtime.keep = 2, which is pretrain.Runtime.keep_latest_k now"),
    ("readout.shared", {"Head": {"width": 9}}, "params.yaml has .+ = 9, which is readout.Head.width now"),
    ("distilled", {"a": 1}, "params.yaml has distilled.a = 1, which no group .+"),
    ("pixels.PixelTokens", {}, "params.yaml .+ pixels.PixelTokens.+"),
    ("profile", ["a"], r"params.yaml has profile = \['a'\]; needed a word"),
])  # fmt: skip
def test_settings_of_other_keys_are_refused(project: Path, changed: Callable, key: str, value: object, message: str) -> None:
    changed(key, value)
    with pytest.raises(UserError, match=f"^{message}$"):
        config.overrides(config.read())


@pytest.mark.parametrize(("override", "message"), [
    ("profile=smok", "no profile 'smok'; needed one of .+; did you mean smoke[?]"),
    ("profile=galactic", "no profile 'galactic'; needed one of [^?]+"),
    ("seeed=1", "unknown setting 'seeed'; did you mean seed[?]"),
    ("pretrain.Training.stepps=1", "unknown setting 'pretrain.Training.stepps'; did you mean pretrain.Training.steps[?]"),
    ("masking=random", r"unknown setting 'masking'; did you mean points.\w+.model.SimpleMAE.masking or .+"),
    ("qqq=1", "unknown setting 'qqq'; experiments/config.yaml lists the settings"),
    ("seed=[1", "no viable alternative at input .+"),
    ("=3", "Config group override must be .+"),
])  # fmt: skip
def test_an_unknown_profile_or_key_is_one_line_with_the_nearest_known_ones(project: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^cannot compose {re.escape(override)}: {message}$") as caught:
        config.write([override])
    assert not re.search(r"\n|[+]|hydra", str(caught.value))


SIMPLE, FROZEN = "points.mini.model.SimpleMAE", "readout.frozen.depth.Frozen"


@pytest.mark.parametrize(("override", "message"), [
    ("pretrain.Training.steps=abc", r"pretrain.Training.steps = 'abc' is a str; needed a whole number such as \d+"),
    ("pretrain.Training.steps=true", r"pretrain.Training.steps = True is a bool; needed a whole number such as \d+"),
    ("pretrain.Training.batch=0", "pretrain.Training: batch is 0; needed 1 or more"),
    ("pretrain.Training.weight_decay=inf", "pretrain.Training.weight_decay = inf is a float; needed a finite number"),
    (f"{SIMPLE}.masking=randm", f"{SIMPLE}: masking = 'randm'; needed .+; did you mean random[?]"),
    (f"{SIMPLE}.mask_ratio=1.5", f"{SIMPLE}: mask_ratio = 1.5 keeps .+ set it in .+"),
    (f"{SIMPLE}.depth=1000000000", f"{SIMPLE}: depth = 1000000000; needed a number from 1 to 1,000"),
    (f"{SIMPLE}.clip=[8,64]", rf"{SIMPLE}.clip = \[8, 64\] is a list; needed \[(a whole number(, )?)+\]"),
    ("points.mini.Launch.where=slrm", "points.mini.Launch: where = 'slrm'; needed .+; did you mean slurm[?]"),
    ("points.mini.Sharding.shards=2", "points.mini, .+: 1 ranks do not divide into copies of 2 shards; .+"),
    ("benchmarks.tasks=[dept]", "benchmarks.tasks: unknown task 'dept'; needed .+; did you mean depth[?]"),
    ("encoders.frozen=[nan0]", "encoders.frozen: profile pocket has no encoder 'nan0'; needed .+; did you mean nano[?]"),
    (f"{FROZEN}.learning_rate=0", f"{FROZEN}: learning_rate is 0; needed more than 0"),
    ("readout.Compute.device=tpu", "readout.Compute: device = 'tpu'; needed .+"),
    ("clip.side_px=63", "render.Render|clips.Curation: side_px = 63 is odd; .+"),
    ("render.Render.crf=99", "render.Render: crf = 99; needed 0 to 51"),
    ("reconstruct.Filling.ranks=0", "reconstruct.Filling: ranks is 0; needed 1 or more"),
    ("reconstruct.Filling.shards=2", "reconstruct.Filling: 1 ranks do not divide into copies of 2 shards; set shards .+"),
    ("show.tasks=[dept]", "show.tasks has 'dept'; needed .+; did you mean depth[?]"),
    ("+a=1", "params.yaml has a = 1, which no group in experiments/ knows; correct or remove it"),
    ("~seed", "params.yaml lacks seed; .+"),
])  # fmt: skip
def test_compose_refuses_what_a_stage_would_refuse_and_writes_nothing(project: Path, override: str, message: str) -> None:
    before = config.PARAMS.read_bytes()
    shown = refused_command("compose", override)
    assert re.fullmatch(message, shown), shown
    assert config.PARAMS.read_bytes() == before


@pytest.mark.usefixtures("in_the_project")
@pytest.mark.parametrize("profile", EVERY_PROFILE)
def test_compose_takes_every_profile(tmp_path: Path, profile: str) -> None:
    config.write([f"profile={profile}"], tmp_path / "params.yaml", check=_check_settings)
    composed = config.read(tmp_path / "params.yaml")
    reads_out = any(composed["encoders"][protocol] for protocol in ("frozen", "finetune", "classifier"))
    assert composed["profile"] == profile and bool(composed["benchmarks"]["tasks"]) == reads_out


@pytest.mark.parametrize(("text", "message"), [
    ("a: [1,\nb: }", r"a file in experiments/ is not YAML: [^\n]+config.yaml[^\n]+; correct it"),
    *((text, r"cannot compose the defaults: [^\n]+") for text in ("7", "a: " + "[" * 3_000, "a: &a {b: *a}")),
])  # fmt: skip
def test_a_group_that_holds_no_settings_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/config.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{message}$"):
        config.compose([])


def test_two_wrong_overrides_and_a_task_that_is_a_list_are_one_line(project: Path) -> None:
    with pytest.raises(UserError, match=r"^cannot compose =smoke =b: [^\n]+$"):
        config.compose(["=smoke", "=b"])
    with pytest.raises(UserError, match=r"^benchmarks.tasks: unknown task \['depth'\]; needed one of "):
        _check_settings(config.compose(["benchmarks.tasks=[[depth]]"]))


@pytest.mark.parametrize(("per_encoder", "message"), [
    ("{mae_st_b: {steps: 9}}", "readout.classifier.Classifier.per_encoder has 'mae_st_b', which is no point; .+"),
    ("{nano: 9}", "readout.classifier.Classifier.per_encoder = {'nano': 9} is a dict; needed a mapping by name"),
    ("{nano: {batch: 7, repeats: 2}}", "readout.classifier: batch 7 does not divide among 1 ranks, each video 2 times; .+"),
])  # fmt: skip
@pytest.mark.usefixtures("in_the_project")
def test_a_recipe_of_one_encoder_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, per_encoder: str, message: str
) -> None:
    monkeypatch.setattr(config, "overrides", lambda settings, keys=(): {})  # as if a profile had it
    overrides = ["encoders.classifier=[nano]", f"+readout.classifier.Classifier.per_encoder={per_encoder}"]
    with pytest.raises(UserError, match=f"^{message}$"):
        _check_settings(config.compose(["profile=pocket", *overrides]))


@pytest.mark.parametrize(("change", "message"), [
    ({"radius": True}, "point.Ball.radius = True is a bool; needed a whole number"),
    ({"radius": "wide"}, "point.Ball.radius = 'wide' is a str; needed a whole number"),
    ({"radius": 2.0}, "point.Ball.radius = 2.0 is a float; needed a whole number"),
    ({"radius": 10**30}, "point.Ball.radius = 10+ is a int; needed a whole number"),
    ({"radius": 1, "weight": float("nan")}, "point.Ball.weight = nan is a float; needed a finite number"),
    ({"radius": 1, "weight": 10**400}, "point.Ball.weight = 10+ is a int; needed a finite number"),
    ({"radius": 1, "spin": [1, 2]}, r"point.Ball.spin = \[1, 2\] is a list; needed \[a whole number, a word\]"),
    ({"radius": 1, "spin": "ab"}, r"point.Ball.spin = 'ab' is a str; needed \[a whole number, a word\]"),
])  # fmt: skip
def test_a_value_of_another_type_than_its_field_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        config.build({"point": {"Ball": change}}, BallConfig)


def test_a_whole_number_does_for_a_float_and_a_list_for_a_tuple() -> None:
    values = {"radius": 1, "weight": 3, "spin": [1, "left"]}
    assert config.build({"point.Ball": values}, BallConfig)[BallConfig] == BallConfig(1, 3, (1, "left"))


def test_the_former_name_of_a_setting_is_answered_with_its_name_today(project: Path) -> None:
    with pytest.raises(UserError, match=r"; points.mini.SimpleMAE.mask_ratio is points.mini.model.SimpleMAE.mask_ratio now$"):
        config.compose(["points.mini.SimpleMAE.mask_ratio=0.5"])
    known = dict(provenance.flatten(config.compose([])))
    assert not [key for key in known if config.renamed(key) != key]
    assert {key: config.renamed(key) for key in FORMER} == FORMER and set(FORMER.values()) <= known.keys()
    for pattern, _ in config.RENAMED:
        assert any(re.search(pattern, key) for key in FORMER), pattern
    log = (ROOT / "experiments/LOG.md").read_text()
    words_of_log = ("pretrain.Running", "readout.shared", "Recipe", "flattening", "kept_clips", "standardise", "sharpness")
    for words in (*words_of_log, "readout.tuning.Sharding"):
        assert f"`{words}" in log or f".{words}`" in log, words


@pytest.mark.parametrize(("text", "message"), [
    ("a: [1,\nb", "is not YAML: "),
    ("[1]", "holds a list, needed settings; "),
    ("a: \xff", "is not YAML: .*utf-8"),
    ("a: " + "[" * 3_000, "is not YAML: maximum recursion depth"),
    ("a: &a {b: *a}", "is not YAML: maximum recursion depth"),
    ("a: " + "9" * 5000, "is not YAML: Exceeds the limit"),
])  # fmt: skip
def test_a_damaged_params_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "params.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=f"^.*params.yaml {message}[^\n]+$"):
        config.read(tmp_path / "params.yaml")


def test_a_stage_gets_one_config_of_each_class_and_the_text_of_all_values_in_force(boxes: dict) -> None:
    bound = bind(boxes, ["seed", "point"], BoxConfig, BallConfig)
    assert bound[BoxConfig] == BoxConfig(width=3, name="small", sides=(1, (2, 3)))
    assert bound[BallConfig] == BallConfig(2)
    assert bound.declared == {"seed": 7, "point": boxes["point"]} and bound.overrides == {}
    for line in ("Box.width = 3", "Box.height = 2.5", "Ball.radius = 2"):  # a class's own default, too
        assert line in bound.operative
    assert gin.operative_config_str() == ""  # nothing stays behind


def test_an_unrecorded_class_is_built_and_leaves_the_record_as_it_is(boxes: dict) -> None:
    boxes["shelf"]["Ball"]["radius"] = 6
    recorded, bound = (
        bind(boxes, ["point.Box"], BoxConfig),
        bind(boxes, ["point.Box"], BoxConfig, unrecorded={"shelf": BallConfig}),
    )
    assert bound[BallConfig].radius == 6 and bound[BoxConfig] == recorded[BoxConfig]
    assert replace(bound, configs=recorded.configs) == recorded


def test_a_later_section_wins_a_key_may_name_a_class_itself_and_overrides_count_where_declared(boxes: dict) -> None:
    assert bind(boxes, ["point", "shelf"], BoxConfig, BallConfig)[BallConfig].radius == 5
    boxes["shelf"]["Ball"]["radius"] = 6
    assert bind(boxes, ["shelf"], BallConfig).overrides == {"shelf.Ball.radius": 6}
    bound = bind(boxes, ["shelf", "point.Ball"], BallConfig)
    assert bound[BallConfig].radius == 2 and bound.overrides == {"shelf.Ball.radius": 6}
    assert bind(boxes, ["point.Ball"], BallConfig).overrides == {}


@pytest.mark.parametrize(("section", "classes", "message"), [
    ({"Box": {"width": 1, "name": "x"}}, (BallConfig,), "unknown setting point.Box = {.+}; needed Ball there"),
    ({"Ball": 3}, (BallConfig,), "unknown setting point.Ball = 3; needed Ball there"),
    ({"Ball": {"radiuss": 2}}, (BallConfig,), "unknown setting point.Ball.radiuss = 2; did you mean radius[?]"),
    ({"Bell": {"radius": 2}}, (BallConfig,), "unknown setting point.Bell = {.+}; needed Ball there; did you mean Ball[?]"),
    ({"Box": {"width": 1}}, (BoxConfig,), "point.Box: .*missing.*'name'.*; set it in experiments/"),
    ({"Box": {"width": -1, "name": "x"}}, (BoxConfig,), "point.Box: width is -1; needed 0 or more"),
])  # fmt: skip
def test_settings_that_do_not_fit_a_class_are_refused_by_their_dotted_key(
    boxes: dict, monkeypatch: pytest.MonkeyPatch, section: dict, classes: tuple, message: str
) -> None:
    monkeypatch.setattr(config, "overrides", lambda settings, keys: {})
    with pytest.raises(UserError, match=f"^{message}$") as caught:
        bind(boxes | {"point": section}, ["point"], *classes)
    assert "\n" not in str(caught.value)
    assert bind(boxes, ["shelf"], BallConfig)[BallConfig].radius == 5  # a refusal leaves nothing behind


@SIZES
def test_damaged_settings_are_bound_or_refused(project: Path, endures: Callable, copies: int) -> None:
    config.write(["profile=smoke"])
    counts = endures("params.yaml", [config.PARAMS], lambda _: _check_settings(config.read()), copies)
    assert counts[REFUSED] and counts[ACCEPTED]


@SIZES
def test_damaged_overrides_and_groups_are_composed_or_refused(project: Path, endures: Callable, copies: int) -> None:
    (project / "experiments").unlink()
    names = ("config", *(f"{kind}/{name}" for kind, name in USED))
    for path in [*(ROOT / "experiments").glob("*.yaml"), *(ROOT / "experiments").glob("*/*.yaml")]:
        (project / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, project / path.relative_to(ROOT))
    overrides = project / "overrides.csv"
    overrides.write_text(OVERRIDES)

    def read(path: Path) -> None:
        settings = config.compose([line.replace(",", "=", 1) for line in overrides.read_text(errors="replace").splitlines()])
        if path == overrides:
            _check_settings(settings)

    paths = [overrides, *(Path("experiments", f"{name}.yaml") for name in names)]
    counts = endures("overrides and experiments/", paths, read, copies)
    assert counts[REFUSED] and counts[ACCEPTED]
