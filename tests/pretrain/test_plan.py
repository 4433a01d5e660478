"""Plans of the scaling points, without a weight in memory."""

import json
import re

import pytest
from commands import invoke, refused_command

from scaling4d import config
from scaling4d.pretrain.plan.closed_form import KINDS
from scaling4d.pretrain.plan.plan import plan
from scaling4d.records import UserError

# width, depth, mlp, heads of the released code's variants, and the backbone's parameters, counted by running its
# initialisation without values (j: inferred from the published count)
POINTS = {
    "S": (384, 12, 1536, 6, 22_485_888),
    "B": (768, 12, 3072, 12, 87_439_104),
    "L": (1024, 24, 4096, 16, 305_488_896),
    "H": (1280, 32, 5120, 16, 633_652_480),
    "G": (1664, 48, 8192, 16, 1_846_529_664),
    "e": (1792, 56, 15360, 16, 3_809_464_064),
    "j": (4096, 64, 32768, 32, 21_492_011_008),
}


@pytest.mark.usefixtures("in_the_project")
@pytest.mark.parametrize("point", list(POINTS))
def test_backbones_have_the_published_number_of_parameters(point: str) -> None:
    *shape, backbone = POINTS[point]
    settings = config.compose(["profile=paper"])["points"][point]["model"]["SimpleMAE"]
    assert [settings[key] for key in ("width", "depth", "mlp", "heads")] == shape
    assert (settings["clip"], settings["patch"]) == ([16, 224, 224], [2, 16, 16])
    parameters = plan(point)["parameters"]
    assert parameters["backbone"] == backbone
    assert parameters["total"] == sum(value for part, value in parameters.items() if part != "total")
    assert parameters["coarse_tokens"] == 784 * shape[0]  # a grid of 4 x 14 x 14
    assert parameters["decoder"] == (shape[0] + 1) * 4 * 16 * 16 * 3


@pytest.mark.integration
@pytest.mark.usefixtures("in_the_project")
@pytest.mark.parametrize("point", [*POINTS, "nano", "mae_st_tiny", "nano_distilled"])
def test_every_point_has_a_plan_whose_figures_follow_from_each_other(point: str) -> None:
    content = plan(point)
    clip, step, schedule = content["flops_per_clip"], content["flops_per_step"], content["schedule"]
    assert clip["total"] == clip["forward"] + clip["backward"] + clip["recompute"]
    assert content["method"] != "SimpleMAE" or 3 * clip["forward"] == clip["model"]
    assert step["total"] == clip["total"] * schedule["batch"]
    assert schedule["flops"] == step["total"] * schedule["steps"]
    assert content["storage"]["training_state_bytes"] == 3 * content["storage"]["checkpoint_bytes"]
    assert content["storage"]["checkpoint_bytes"] == 4 * content["parameters"]["total"]
    for row in (content["mesh"], *(row for row in content["meshes"] if "shards" in row)):
        held = row["memory_bytes"]
        assert held["total"] == sum(size for kind, size in held.items() if kind != "total")
        assert row["fits"] == (held["total"] <= row["usable_bytes"]) == (row["clips_per_gpu"] <= row["most_clips_per_gpu"])
        assert row["gpu_hours"] == pytest.approx([days * 24 * row["gpus"] for days in row["days"]])
        for case, seconds in enumerate(row["step_s"]):
            assert seconds == pytest.approx(sum(row["seconds"][case].values()))
            assert row["gpu_step_s"][case] * row["clips_per_s_needed"][case] == pytest.approx(row["clips_per_gpu"])
            assert row["clips_per_gpu"] <= seconds * row["clips_per_s_given"] * (1 + 1e-9)
        fast, slow = row["gpu_step_s"]
        assert 0 < fast < slow and 0 < row["mfu"][1] <= row["mfu"][0] < 1


@pytest.mark.usefixtures("in_the_project")
def test_a_plan_without_options_is_that_of_the_pinned_profile() -> None:
    content = plan("S")
    training = config.compose(["profile=paper"])["pretrain"]["Training"]
    assert (content["schedule"]["steps"], content["schedule"]["batch"]) == (training["steps"], training["batch"])
    meshes = {point: (mesh["shards"], mesh["replicas"]) for point in ("S", "e") for mesh in [plan(point)["mesh"]]}
    assert meshes == {"S": (1, training["ranks"]), "e": (8, training["ranks"] // 8)}
    assert content["tokens"] == {"visible": 78, "all": 1568, "coarse": 784}


@pytest.mark.usefixtures("in_the_project")
def test_a_plan_that_loading_bounds_is_refused_with_the_workers_that_would_do() -> None:
    plan_of_L = invoke("plan", "L", "--worker-clips-per-s", 24)
    assert isinstance(plan_of_L.exception, UserError) and "clips/s needed" in plan_of_L.output
    refusal = r"the plan of L is bound by loading: a GPU takes .+ clips/s and gets 288, by 12 workers; "
    workers = int(re.fullmatch(refusal + r"set pretrain.Runtime.workers=(\d+) at least", str(plan_of_L.exception))[1])
    assert 12 < workers <= 14
    assert invoke("plan", "L", "--worker-clips-per-s", 24 * workers / 12).exit_code == 0
    plan_of_S = invoke("plan", "S", "--json")
    assert json.loads(plan_of_S.output)["refused"] in str(plan_of_S.exception)
    needed = r"\d+ would do, but a machine has 14 CPU cores a GPU: store clips that load .+ times as fast$"
    assert re.search(needed, str(plan_of_S.exception))
    assert invoke("plan", "j", "--json").exit_code == 0


@pytest.mark.usefixtures("in_the_project")
def test_a_point_of_two_profiles_is_planned_as_the_profile_that_is_named_has_it() -> None:
    paper, itself = plan("mae_st_H"), plan("mae_st_H", profile="mae_st")
    assert (paper["profile"], paper["schedule"]["batch"]) == ("paper", 4096)
    assert (itself["profile"], itself["schedule"]["batch"]) == ("mae_st", 2048)
    assert paper["tokens"]["all"] > itself["tokens"]["all"]  # patches of 14 px, and of 16
    with pytest.raises(UserError, match="^profile mae_st has no point 'j'; points: mae_st_B, "):
        plan("j", profile="mae_st")


@pytest.mark.integration
@pytest.mark.usefixtures("in_the_project")
@pytest.mark.parametrize(("point", "mesh"), [("j", "8x1"), ("j", "1x8"), ("G", "8x1")])
def test_every_change_that_is_named_makes_it_fit(point: str, mesh: str) -> None:
    content = plan(point, mesh=mesh, gpu="a100_40")["mesh"]
    assert not content["fits"]
    assert content["why"].startswith("does not fit, because a GPU would hold ")
    assert content["changes"]
    for change in content["changes"]:
        words = change.split(" (")[0].replace("--", "").split()
        given = {"mesh": mesh} | dict(zip(words[::2], words[1::2], strict=True))
        if "batch" in given:
            given["batch"] = int(given["batch"])
        assert plan(point, gpu="a100_40", **given)["mesh"]["fits"], change


@pytest.mark.integration
@pytest.mark.usefixtures("in_the_project")
@pytest.mark.parametrize(("words", "message"), [
    (("S", "--mesh", "8"), "--mesh '8'; needed SHARDSxREPLICAS, two numbers above 0 such as 256x1 or 8x32"),
    (("S", "--mesh", "0x4"), "--mesh '0x4'; needed SHARDSxREPLICAS, two numbers above 0 such as 256x1 or 8x32"),
    (("S", "--mesh", "3x1"), "a batch of 4096 clips does not divide by the 3 GPUs of the mesh; set --batch to a "),
    (("S", "--mesh", "8x2", "--batch", "4"), "a batch of 4 clips is smaller than the 16 GPUs of the mesh; set --batch to a "),
    (("S", "--gpu", "tpu"), "unknown gpu 'tpu'; needed one of h100, h200, a100, a100_40"),
    (("S", "--recompute", "all"), "--recompute 'all'; needed none or block"),
    (("S", "--worker-clips-per-s", "0"), "--worker-clips-per-s 0.0; needed more than 0"),
    (("S", "--storage-gb-per-s", "0"), "--storage-gb-per-s 0.0; needed more than 0"),
    (("huge",), "no profile has a point 'huge'; points: B, B_dist_e, G, H, L, S, big, e, j, "),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line(words: tuple[str, ...], message: str) -> None:
    refusal = refused_command("plan", *words)
    assert refusal.startswith(message) and "\n" not in refusal


@pytest.mark.usefixtures("in_the_project")
def test_the_tables_show_every_kind_of_memory_and_the_meshes() -> None:
    tables = invoke("plan", "j", "--gpu", "h200", "--recompute", "block")
    assert tables.exit_code == 0
    for word in (*KINDS, "8x32", "visible", "GPU-hours", "H200 SXM 141 GB", "training state"):
        assert word in tables.output


@pytest.mark.integration
@pytest.mark.usefixtures("in_the_project")
def test_what_does_not_fit_is_an_answer_and_no_error() -> None:
    tables, content = (invoke("plan", "j", "--mesh", "8x1", *words) for words in ((), ("--json",)))
    assert tables.exit_code == content.exit_code == 0
    assert "8x1 does not fit, because a GPU would hold" in tables.output
    assert "what would fit: --batch 224" in tables.output
    assert not json.loads(content.output)["mesh"]["fits"]


@pytest.mark.usefixtures("in_the_project")
def test_a_state_that_takes_longer_than_a_run_may_hang_names_the_setting() -> None:
    limit = "is ended after 2400 s: raise pretrain.Runtime.hang_s = 600"  # half an hour of them is waited for a state
    words = ("plan", "j", "--worker-clips-per-s", "100")
    wait = "a job that stops is killed before: raise Launch.wait_s = 1800 of the point"
    slow = " ".join(invoke(*words, "--storage-gb-per-s", "0.1").stdout.split())
    assert limit in slow and wait in slow and "ended after 600 s" in slow
    assert limit not in " ".join(invoke(*words, "--storage-gb-per-s", "0.12").stdout.split())
    assert "raise " not in invoke(*words).stdout
