"""Definitions of studies, and the tables of their runs."""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import invoke
from damage import ACCEPTED, REFUSED, SIZES
from scipy.stats import t, ttest_ind

from scaling4d import config
from scaling4d.provenance import flatten
from scaling4d.records import UserError
from scaling4d.studies import study

ROOT = Path(__file__).parents[2]
TASKS = ("actions", "boxes", "depth", "points", "pose")
ONE_ARM = "question: a\nbase: x\ntargets: [x]\narms: {x: []}\n"


def rows(values: dict[str, list[float]]) -> list[dict]:
    return [
        {"arm": arm, "seed": str(seed), "task": "pose", "metric": "epe", "value": str(value)}
        for arm, several in values.items()
        for seed, value in enumerate(several)
    ]


@pytest.mark.integration
@pytest.mark.parametrize("step", [pytest.param(15, id="some"), pytest.param(1, id="every", marks=pytest.mark.slow)])
def test_an_arm_composes_and_names_stages_that_its_profile_has(in_the_project: None, step: int) -> None:
    """Each kind of arm once: one profile and some overrides, whatever studies have it."""
    arms = [arm for name in study.study_names() for arm in study.read_study(name).arms]
    assert len(study.study_names()) >= 7
    used = {override for arm in arms for override in arm.overrides if override.startswith("ablation=")}
    assert used == {f"ablation={path.stem}" for path in Path("experiments/ablation").glob("*.yaml")}
    arms = arms[::step]
    bases = {profile: config.compose([f"profile={profile}"]) for profile in {arm.profile for arm in arms}}
    composed = {(arm.profile, arm.overrides): config.compose(arm.settings(0)) for arm in arms}
    for (profile, overrides), settings in composed.items():
        assert dict(flatten(settings)).keys() == dict(flatten(bases[profile])).keys()
        assert bool(overrides) == (settings != bases[profile]), overrides
    for arm in arms:
        settings = composed[arm.profile, arm.overrides]
        for target in arm.targets:
            kind, _, item = target.partition("@")
            of_points = kind in ("pretrain", "reconstruct")
            known = settings["points"] if of_points else settings["encoders"][kind.removeprefix("readout_")]
            assert item.split("-")[0] in known, f"{arm.name}: {target}"


def test_every_list_names_videos_that_are_there_and_is_named_after_its_content() -> None:
    """DVC takes clips for made by the same list as long as its name stays."""
    paths = [*(ROOT / "experiments/listed").glob("*.csv")]
    assert paths
    for path in paths:
        names = path.read_text().splitlines()[1:]
        assert len(names) == len(set(names)) > 40
        assert path.stem.rpartition("-")[2] == hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        assert all((ROOT / "experiments/pocket/videos" / name).is_file() for name in names), path


def test_an_arm_is_compared_with_the_base_seed_by_seed() -> None:
    """Against the textbook: an experiment in blocks, here seeds, or Welch's limit of two arms where that is larger."""
    base, one, two = [1.0, 1.3, 0.9], [1.2, 1.4, 1.2], [3.0, 3.4, 3.1]
    by_arm = {row["arm"]: row for row in study.study_table(rows({"base": base, "one": one, "two": two}), "base")}
    differences = np.array([np.subtract(one, base), np.subtract(two, base)])
    values = np.array([base, one, two])
    residuals = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    pooled = t.ppf(0.975, 4) * np.sqrt((residuals**2).sum() / 4) * np.sqrt(2 / 3)
    welch = [_welch(base, arm) for arm in (one, two)]
    assert min(welch) > pooled and by_arm["one"]["difference"] == pytest.approx(differences[0].mean())
    assert [by_arm[arm]["noise"] for arm in ("one", "two")] == pytest.approx(welch)
    assert (by_arm["one"]["beyond_noise"], by_arm["two"]["beyond_noise"]) == (differences[0].mean() > welch[0], True)
    noisy = study.noise_limit([base, one, [9.0, -9.0, 0.0]], base, one)
    assert noisy > 10 * welch[0]  # of the deviation of all arms
    assert study.noise_limit([base, one, two], one) == pytest.approx(
        max(pooled, t.ppf(0.975, 2) * np.std(one, ddof=1) / np.sqrt(3))
    )
    assert study.noise_limit([[1.0, 1.0], [2.0, 2.0]], [1.0, 1.0], [2.0, 2.0]) == 0
    assert by_arm["base"]["difference"] is None and by_arm["base"]["deviation"] == pytest.approx(np.std(base, ddof=1))
    alone = study.study_table(rows({"base": [1.0], "one": [2.0]}), "base")
    assert [row["beyond_noise"] for row in alone] == [None, None]


def _welch(one: list[float], other: list[float]) -> float:
    """Limit of a difference at 95 %, from the interval of scipy's test."""
    interval = ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    return (interval.high - interval.low) / 2


@pytest.mark.parametrize("noise_of_one", [1.0, 10.0])
def test_equal_arms_differ_beyond_noise_in_at_most_five_of_a_hundred_cases(noise_of_one: float) -> None:
    """Though all are compared with one base, whose noise they share, and though one arm is noisier than the others."""
    rng = np.random.default_rng(0)
    beyond = []
    for _ in range(1500):
        seeds = rng.normal(size=3)
        noise = {"base": 1.0, "one": noise_of_one, "two": 1.0, "three": 1.0, "four": 1.0}
        drawn = rows({arm: list(seeds + deviation * rng.normal(size=3)) for arm, deviation in noise.items()})
        beyond += [row["beyond_noise"] for row in study.study_table(drawn, "base") if row["arm"] == "one"]
    assert 0.005 < np.mean(beyond) < 0.06


def test_an_arm_without_a_task_does_not_keep_the_others_from_being_compared_at_it() -> None:
    """An untrained encoder has no loss."""
    some = [row | {"task": "pretrain"} for row in rows({"base": [1.0, 1.2], "one": [2.0, 2.1]})]
    all_ = rows({"base": [1.0, 1.2], "one": [2.0, 2.1], "untrained": [3.0, 3.3]})
    table = {(row["arm"], row["task"]): row for row in study.study_table([*some, *all_], "base")}
    assert ("untrained", "pretrain") not in table and table["one", "pretrain"]["difference"] == pytest.approx(0.95)
    without = study.study_table([*some, *all_], "untrained")
    assert {row["difference"] for row in without if row["task"] == "pretrain"} == {None}


@pytest.mark.parametrize(("options", "named"), [
    (["--seeds", "0,1"], "--seeds"), (["--dry"], "--dry"), (["--jobs", "4", "--dry"], "--jobs and --dry")
])  # fmt: skip
def test_collecting_refuses_the_options_of_a_run(options: list[str], named: str) -> None:
    done = invoke("study", "none", "--collect", *options)
    message = f"--collect runs nothing and takes the seeds of each study.json; leave out {named}"
    assert isinstance(done.exception, UserError) and str(done.exception) == message


def test_packages_of_other_code_are_those_that_make_numbers() -> None:
    code = {f"artifacts/code/{name}.json": "0" for name in ("pretrain", "readout", "clips", "show", "report", "evaluate")}
    other = {path: "1" if Path(path).stem in ("readout", "show", "report", "evaluate") else "0" for path in code}
    assert study.changed_packages(code, code) == [] and study.changed_packages(code, other) == ["readout"]
    assert study.changed_packages(code, {**code, "artifacts/code/mae.json": "0"}) == ["mae"]
    assert study.changed_packages({**code, "artifacts/code/mae.json": "0"}, code) == ["mae"]


@pytest.mark.parametrize(("content", "message"), [
    ("question: a\nbase: x\n", "experiments/study/bad.yaml is no study: it lacks arms; compare it with another file there"),
    ("question: a\nbase: y\ntargets: [x]\narms: {x: []}\n", "experiments/study/bad.yaml is no study: no arm 'y'; "),
    ("question: a\nbase: x\narms: {x: []}\n", "experiments/study/bad.yaml is no study: arm x has no targets; "),
    ("question: [a\n", "experiments/study/bad.yaml is not YAML: "),
    (f"{ONE_ARM}seeds: [0, 0]\n", "experiments/study/bad.yaml is no study: seeds are [0, 0]; needed different whole numbers"),
    (f"{ONE_ARM}seeds: '01'\n", "experiments/study/bad.yaml is no study: seeds are '01'; needed different whole numbers"),
    (f"{ONE_ARM}ladders: {{size: {{x: parameters, arms: [x]}}}}\n",
     "experiments/study/bad.yaml is no study: ladder size has 1 arms; a trend needs three or more"),
    ("question: a\nbase: x\ntargets: [readout_frozen@nano-depth, readout_finetune@nano-depth]\narms: {x: []}\n",
     "experiments/study/bad.yaml is no study: arm x measures depth by two protocols; needed one, or two studies"),
])  # fmt: skip
def test_a_bad_definition_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    study.DEFINITIONS.mkdir(parents=True)
    (study.DEFINITIONS / "bad.yaml").write_text(content)
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as caught:
        study.read_study("bad")
    assert "\n" not in str(caught.value)


def test_the_study_of_seeds_measures_every_frozen_readout_of_the_pocket(in_the_project: None) -> None:
    """Else the report leaves it out."""
    seeds, settings = study.read_study("seeds"), config.compose(["profile=pocket"])
    readouts = {f"readout_frozen@{encoder}-{task}" for encoder in settings["encoders"]["frozen"] for task in TASKS}
    targets = {target for arm in seeds.arms for target in arm.targets}
    assert {target for target in targets if target.startswith("readout")} == readouts
    sizes = [name for name, point in settings["points"].items() if "SimpleMAE" in point["model"]]
    assert targets - readouts == {f"reconstruct@{point}" for point in sizes}
    assert all((arm.name, arm.overrides, arm.profile) == (arm.encoder, (), "pocket") for arm in seeds.arms)


def test_the_signal_is_the_distance_of_arms_in_deviations_of_a_seed() -> None:
    values = np.array([[1.0, 1.2], [2.0, 2.2], [3.0, 3.3]])
    (row,) = study.signal_rows(rows(dict(zip("abc", values.tolist(), strict=True))))
    residuals = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    of_noise = (residuals**2).sum() / 2 / 2  # of a mean over two seeds
    assert (row["arms"], row["seeds"]) == (3, 2)
    assert row["signal"] == pytest.approx(np.sqrt(values.mean(1).var(ddof=1) - of_noise))
    assert row["noise"] == pytest.approx(np.sqrt((residuals**2).sum() / 2))
    assert row["ratio"] == pytest.approx(row["signal"] / row["noise"])
    assert not [*study.signal_rows(rows({"a": [1.0], "b": [2.0]}))]


@SIZES
def test_a_damaged_study_is_read_or_refused(
    tmp_path: Path, endures: Callable, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / study.DEFINITIONS, study.DEFINITIONS)
    (study.REPORTS / "seeds").mkdir(parents=True)
    for file in (study.FACTS, study.RUNS):
        shutil.copy(ROOT / study.REPORTS / "seeds" / file, study.REPORTS / "seeds")

    def read(path: Path) -> None:
        study.read_study(path.stem) if path.suffix == ".yaml" else study.read_finished_study(path.parent)

    paths = [*study.DEFINITIONS.glob("s*.yaml"), *study.REPORTS.glob("*/*")]
    counts = endures("studies", paths, read, copies)
    assert counts[REFUSED] and counts[ACCEPTED]
