"""Settings: composition, overrides, gin."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from scaling4d import config
from scaling4d.records import UserError

ROOT = Path(__file__).parents[1]


@config.configurable
def made(*, width: int, name: str) -> tuple[int, str]:
    return width, name


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the project's experiments/ and a freshly composed params.yaml."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    config.write([])
    return tmp_path


def test_committed_params_are_the_composition_of_their_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert config.overrides(config.read()) == {}


def test_every_profile_composes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for path in sorted((ROOT / "experiments/profile").glob("*.yaml")):
        assert config.compose([f"profile={path.stem}"])["profile"] == path.stem


def test_every_profile_shows_readouts_that_it_has_and_hashes_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for path in sorted((ROOT / "experiments/profile").glob("*.yaml")):
        composed = config.compose([f"profile={path.stem}"])
        shown = composed["show"]
        assert set(shown["tasks"]) <= set(composed["readout"]["tasks"]), path
        read = any(composed["encoders"][protocol] for protocol in ("frozen", "finetune", "classifier"))
        assert set(composed["benchmarks"]["tasks"]) == (set(composed["readout"]["tasks"]) if read else set()), path
        if shown["tasks"]:
            assert {shown["encoder"], shown["beside"]} <= set(composed["encoders"]["frozen"]), path


def test_the_paper_profile_reads_out_by_the_published_recipe_whatever_pocket_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """scivid's frozen readouts: 1.28 M samples in batches of 32, peak rate 3e-4, weight decay 1e-4."""
    monkeypatch.chdir(ROOT)
    readout = config.compose(["profile=paper"])["readout"]
    assert not readout["shared"]["Evaluation"]["standardise"] and readout["shared"]["Head"]["sharpness"] == []
    assert readout["shared"]["Head"]["stretched"]
    for task in readout["tasks"].values():
        assert task.pop("Head", {"heads": 16}) == {"heads": readout["shared"]["Head"]["heads"]}
        assert [constructor["views"] for constructor in task.values()] == [["plain"]]
    for task in readout["frozen"].values():
        recipe = task["Recipe"]
        assert recipe["steps"] * recipe["batch"] == 1_280_000 and recipe["batch"] == 32
        assert (recipe["learning_rate"], recipe["weight_decay"], recipe["warmup_steps"]) == (3e-4, 1e-4, 1000)
        assert recipe["rate_at_width"] == 0


def test_dvc_trains_nothing_anew_for_where_and_how_a_run_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    import dvc.api

    monkeypatch.chdir(ROOT)
    points = config.read()["points"]
    for point in points:
        declared = dvc.api.params_show(stages=f"pretrain@{point}")
        assert declared["pretrain"].keys() == {"Training"}
        assert declared["points"][point].keys() == {points[point]["method"], "Sharding"}
    untrained = dvc.api.params_show(stages="baseline_untrained@mini")
    assert untrained["points"]["mini"].keys() == {points["mini"]["method"], "Sharding"}


def test_a_changed_value_is_listed_as_an_override(project: Path, changed: Callable) -> None:
    changed("pretrain.Training.steps", 7)
    assert config.overrides(config.read()) == {"pretrain.Training.steps": 7}


def test_a_key_that_no_group_knows_is_refused(project: Path, changed: Callable) -> None:
    changed("pretrain.Training.stepps", 7)
    wanted = "params.yaml has pretrain.Training.stepps = 7, which no group in experiments/ knows; correct or remove it"
    with pytest.raises(UserError, match=f"^{re.escape(wanted)}$"):
        config.overrides(config.read())


def test_a_value_of_another_type_is_refused(project: Path, changed: Callable) -> None:
    changed("pretrain.Training.steps", "many")
    with pytest.raises(UserError, match=r"^pretrain.Training.steps = 'many' is a str; needed a int such as \d+$"):
        config.overrides(config.read())


def test_an_unknown_profile_or_key_is_one_line(project: Path) -> None:
    for bad in ("profile=galactic", "seeed=1"):
        with pytest.raises(UserError) as caught:
            config.write([bad])
        assert "\n" not in str(caught.value) and bad.split("=")[0] in str(caught.value)


def test_composing_writes_what_dvc_writes(project: Path) -> None:
    config.write(["seed=3", "profile=smoke"])
    settings = config.read()
    assert settings["seed"] == 3 and settings["profile"] == "smoke"


def test_gin_gives_a_section_to_its_constructor_and_reports_it() -> None:
    config.bind({"made": {"width": 3, "name": "x"}})
    assert config.build(made) == (3, "x")
    assert "made.width = 3" in config.operative()


def test_a_typo_in_a_section_is_an_error() -> None:
    with pytest.raises(UserError, match="^unknown setting made.widht = 3: "):
        config.bind({"made": {"widht": 3}})
    with pytest.raises(UserError, match="^unknown setting maed.width = 3: "):
        config.bind({"maed": {"width": 3}})


def test_a_missing_setting_names_its_constructor() -> None:
    config.bind({"made": {"width": 3}})
    with pytest.raises(UserError, match="^made: .*missing.*'name'.*; set it in experiments/$"):
        config.build(made)


def test_an_unknown_point_lists_the_known_ones(project: Path) -> None:
    with pytest.raises(UserError, match=r"^no setting 'points.nan0': points has no 'nan0', it has nano, micro, .*mini"):
        config.section(config.read(), "points.nan0")


def test_settings_that_are_not_yaml_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("a: [1,\nb")
    with pytest.raises(UserError, match="^.*params.yaml is not YAML: "):
        config.read(tmp_path / "params.yaml")
