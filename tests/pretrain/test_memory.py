"""Whether a step fits the GPUs, before a rank starts."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from scaling4d import config
from scaling4d.checkpoint import WEIGHTS, Checkpoint
from scaling4d.pretrain import settings as pretrain_settings
from scaling4d.pretrain import stage
from scaling4d.pretrain.plan.closed_form import PLAIN, USABLE, StepLayout, memory
from scaling4d.pretrain.plan.memory import check_memory
from scaling4d.pretrain.plan.work import work_of
from scaling4d.pretrain.settings import bind_point, bind_pretrain
from scaling4d.pretrain.stage import pretrain
from scaling4d.records import UserError

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(changed: Callable) -> None:
    for key, value in {"device": "cuda", "compute": "bfloat16", "batch": 4096, "ranks": 4}.items():
        changed(f"pretrain.Training.{key}", value)
    pretraining = bind_pretrain("nano", config.read())
    check_memory(pretraining, None)  # no GPU here
    check_memory(pretraining, 80 * 10**9)
    refusal = (
        r"^a step of nano with 1024 clips a GPU needs \d.\d GiB, and 90% of a GPU here is 0.\d GiB; set Sharding.accumulate=\d+, "
    )
    with pytest.raises(UserError, match=refusal + "or see scaling4d plan nano$") as refused:
        check_memory(pretraining, 5 * 10**8)
    parts = int(str(refused.value).split("accumulate=")[1].split(",")[0])
    check_memory(bind_pretrain("nano", changed("points.nano.Sharding.accumulate", parts)), 5 * 10**8)


def test_a_rank_with_all_weights_gathers_none_and_no_teacher_is_read(changed: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain("nano", changed("pretrain.Training.steps", 2))
    monkeypatch.setattr(pretrain_settings, "load_model", lambda _: pytest.fail("weights were read"))
    pretraining = bind_pretrain("nano_distilled", config.read())
    layout = StepLayout(shards=1, recompute=False, sizes=PLAIN, keep_best=bool(pretraining.training.keep_best))
    needed = memory(work_of(pretraining.build(teacher_weights=False)), layout, clips=8)["total"] / USABLE
    check_memory(pretraining, int(needed) + 1)
    with pytest.raises(UserError, match="^a step of nano_distilled with 8 clips a GPU needs "):
        check_memory(pretraining, int(needed) - 1)


@pytest.mark.parametrize(("profile", "nodes"), [("h100", 0), ("paper", 32), ("mae_st", 16)])
def test_every_point_of_the_large_profiles_fits_its_mesh_and_has_a_script(
    profile: str, nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("experiments").symlink_to(ROOT / "experiments")
    for name in ("count_clips", "holds_encoded"):  # there are no clips here
        monkeypatch.setattr(pretrain_settings.loader, name, lambda *_, name=name: name == "count_clips")
    monkeypatch.setattr(stage, "check_benchmarks", lambda _: None)  # nor labelled videos
    monkeypatch.setattr(stage, "first_gpu_bytes", lambda: 80 * 10**9)
    declared = {"profile": profile, "pretrain.Training": {}}
    monkeypatch.setattr(stage, "provenance_of", lambda _: {"settings": declared, "inputs": {}, "code": {"sha256": "0" * 64}})
    settings = config.compose([f"profile={profile}"])
    for student in settings["distilled"]:
        teacher = bind_point(bind_point(student, settings).model.teacher, settings)
        teacher.folder.mkdir(parents=True)
        Checkpoint(teacher.point, teacher.method.__name__, asdict(teacher.model), 0, 0, 0).write_config(teacher.folder)
        (teacher.folder / WEIGHTS).touch()  # nobody reads them
    for point in (point for group in config.POINTS for point in settings[group]):
        check_memory(bind_pretrain(point, settings), 80 * 10**9)
        start = stage.describe_start(point, settings)
        assert ("#SBATCH --gpus-per-node=8" in start and f"#SBATCH --nodes={nodes}" in start) == bool(nodes), point
