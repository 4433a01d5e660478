"""Benches of training steps at the smallest size: who is in the tables, that everyone does the same, never how fast."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from scaling4d import seeds
from scaling4d_bench import attention, costs, device, masking, measure, parts, peers, pretrain, steps
from scaling4d_bench.costs import Axis, Case
from scaling4d_bench.pretrain import Group, Row

CPU = torch.device("cpu")
SIMPLE = {"clip": [8, 64, 64], "width": 48, "depth": 3, "heads": 3, "mlp": 96}
MAE_ST = SIMPLE | {"decoder_width": 24, "decoder_heads": 2, "decoder_depth": 1, "predicted_frames": 4}
VIDEOMAE = {"image_size": 64, "num_frames": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
VIDEOMAE |= {"intermediate_size": 96, "decoder_hidden_size": 24, "decoder_num_hidden_layers": 1}
VIDEOMAE |= {"decoder_num_attention_heads": 3, "decoder_intermediate_size": 48}
SHARE = {"clips": 2, "precision": "fp32", "device": CPU, "seed": 0}


@pytest.fixture(autouse=True)
def small_and_in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(measure, "cores", lambda: 1)
    monkeypatch.setattr(device, "PRODUCT_SIDE", {"cpu": 64})
    monkeypatch.setattr(device, "COPIED_BYTES", {"cpu": 1024})


def tiny(point: str) -> torch.nn.Module:
    return steps.model(point, MAE_ST if point.startswith("mae_st") else SIMPLE, device=CPU, seed=0)


def gone(**given) -> steps.Step:
    raise ImportError("No module named 'transformers'")


def test_steps_take_turns_with_their_peers_and_who_is_missing_is_named(tmp_path: Path, capsys) -> None:
    rows = [Row("ours, 90 %", "S", 0.9, SIMPLE), Row("MAE-ST, 90 %", "mae_st_B", 0.9, MAE_ST)]
    beside = {"VideoMAE": partial(peers.videomae, mask_ratio=0.9, **VIDEOMAE), "another": gone}
    group = Group(rows, beside, [("ours, 90 %", "VideoMAE"), ("ours, 90 %", "another")])
    path = pretrain.bench(tmp_path, clips=2, repeats=2, precisions=["fp32"], mae_st=None, groups={"all": group})
    told, shown = json.loads(path.read_text()), capsys.readouterr().out
    found, names = told["found"]["all, fp32"], ["ours, 90 %", "MAE-ST, 90 %", "VideoMAE"]
    assert [row["name"] for row in found["rows"]] == names
    assert {name: len(seconds) for name, seconds in told["raw"]["all, fp32"]["seconds"].items()} == dict.fromkeys(
        [*names, "matrix product, fp32", "memory copy"], 2
    )
    assert [(ratio["of"], ratio["over"]) for ratio in found["ratios"]] == [("ours, 90 %", "VideoMAE")]
    assert "another, fp32: not measured (No module named 'transformers')" in shown
    for row in found["rows"]:
        peak = found["limits"]["matrix product, fp32"]
        assert row["share_of_peak"] == pytest.approx(row["per_s"] * row["flops_per_clip"] / peak)
        assert sum(row["parts"].values()) == pytest.approx(1) and row["parts"]["matrix products"] > 0
    assert told["settings"]["device"] == "cpu" and "transformers" in told["versions"]


@pytest.mark.parametrize("point", ["S", "mae_st_B"])
def test_the_flops_counted_of_a_step_are_those_of_the_formula(point: str) -> None:
    model = tiny(point)
    one = steps.ours(model, steps.updated(model), mask_ratio=model.mask_ratio, **SHARE)
    assert one.flops == 3 * costs.flops(costs.work_of(model), recompute=False)["forward"]


def test_a_step_computes_gradients_and_moments_and_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny("S"), []
    adamw = steps.optimizer.adamw
    monkeypatch.setattr(steps.optimizer, "adamw", lambda *args, **more: made.append(adamw(*args, **more)) or made[0])
    before = {name: p.clone() for name, p in model.named_parameters()}
    steps.ours(model, steps.updated(model), mask_ratio=0.9, **SHARE).run()
    moments = [state["exp_avg"] for state in made[0][0].state.values()]
    assert len(moments) == len(before) and all(moment.abs().sum() > 0 for moment in moments)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 63), (0.75, 16), (0.9, 6)])
def test_hiding_nothing_hides_one_token(ratio: float, kept: int) -> None:
    for point in ("S", "mae_st_B"):
        model = tiny(point)
        chosen = steps.masked(model, 2, ratio, seeds.stream(0, "mask"))
        assert chosen.kept.shape == (2, kept)
        assert model(torch.zeros(2, 8, 64, 64, 3, dtype=torch.uint8), chosen).isfinite()


def test_videomae_has_its_own_base_size_and_hides_as_many_tokens_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(peers, "step", lambda loss, update, clips: seen.append(loss()))
    peers.let_torchvision_load()
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    forward = VideoMAEForPreTraining.forward
    monkeypatch.setattr(
        VideoMAEForPreTraining,
        "forward",
        lambda self, pixels, bool_masked_pos: (
            seen.append((self.config, pixels, bool_masked_pos)) or forward(self, pixels, bool_masked_pos=bool_masked_pos)
        ),
    )
    peers.videomae(mask_ratio=0.9, **SHARE, **VIDEOMAE)
    (used, pixels, hidden), loss = seen
    assert pixels.shape == (2, 8, 3, 64, 64) and (~hidden).sum(1).tolist() == [6, 6] and loss.isfinite()
    default = VideoMAEConfig()
    assert (default.hidden_size, default.num_hidden_layers, default.image_size, default.num_frames) == (768, 12, 224, 16)
    assert used._attn_implementation == "sdpa"


def test_the_official_mae_st_is_measured_only_from_a_checkout(tmp_path: Path) -> None:
    _, settings = steps.settings_of("mae_st_B")
    with pytest.raises(ImportError, match="no checkout of facebookresearch/mae_st: it has no models_mae.py"):
        peers.official_mae_st(tmp_path, settings)
    with pytest.raises(ImportError, match="no checkout of facebookresearch/mae_st was given: --mae-st FOLDER"):
        pretrain._official(None, **SHARE)


def test_a_checkout_in_a_folder_of_any_name_is_built_with_the_points_settings(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "util").mkdir()
    (tmp_path / "util/names.py").write_text("NAME = 'inner'\n")
    (tmp_path / "models_mae.py").write_text("from mae_st.util.names import NAME\n\nMaskedAutoencoderViT = dict\n")
    before = set(sys.modules)
    try:
        made = peers.official_mae_st(tmp_path, steps.settings_of("mae_st_L")[1])
        assert sys.modules["mae_st.models_mae"].NAME == "inner"
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] == "mae_st":
                del sys.modules[name]
    wanted = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "decoder_embed_dim": 512, "decoder_depth": 4, "pred_t_dim": 8}
    assert {key: made[key] for key in wanted} == wanted
    assert made["mlp_ratio"] == 4 and made["norm_pix_loss"] and made["cls_embed"] and made["sep_pos_embed"]


def test_masking_sets_every_share_beside_none_and_loading_beside_all(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(masking.loader, "load", lambda folder, batches, workers, seed: 0.5)
    given = {"points": {"B": {"MAE-ST": "mae_st_B", "SimpleMAE": "S"}}, "changes": {"mae_st_B": MAE_ST, "S": SIMPLE}}
    path = masking.bench(tmp_path, clips=2, repeats=2, precision="fp32", workers=0, shards=tmp_path, **given)
    told, shown = json.loads(path.read_text()), capsys.readouterr().out
    found = told["found"]["B"]
    assert [row["name"] for row in found["rows"]] == [
        f"{method}, {share}%" for method in ("MAE-ST", "SimpleMAE") for share in (0, 75, 90, 95)
    ]
    assert found["loading"]["per_s"] == masking.BATCHES * masking.loader.BATCH / 0.5
    for none, *others in (found["rows"][:4], found["rows"][4:]):
        assert none["times_as_fast"] == {"median": 1.0, "low": 1.0, "high": 1.0} and none["times_as_fast_with_loading"] == 1.0
        load_s = 1 / found["loading"]["per_s"]
        for row in others:
            assert row["times_as_fast_by_arithmetic"] == none["flops_per_clip"] / row["flops_per_clip"] > 1
            with_loading = (1 / none["per_s"] + load_s) / (1 / row["per_s"] + load_s)
            assert row["times_as_fast_with_loading"] == pytest.approx(with_loading)
    assert "│ loading " in shown


def test_every_way_of_attention_that_runs_here_agrees_with_ours(tmp_path: Path, monkeypatch, capsys) -> None:
    def other(shape, device):
        return lambda q, k, v: attention.attention(q, k, 2 * v)

    monkeypatch.setattr(attention, "WAYS", attention.WAYS | {"twice": other})
    path = attention.bench(tmp_path, total=32, repeats=1, precision="fp32", tokens=(8, 16), heads=2)
    told, shown = json.loads(path.read_text()), capsys.readouterr().out
    for count, clips in (("8", 4), ("16", 2)):
        found = told["found"][count]
        assert found["clips"] == clips and found["flops_per_clip"] == 14 * int(count) ** 2 * 2 * 64
        same = {row["name"]: row["same"] for row in found["rows"]}
        assert same.pop("twice") is False and all(same.values())
        assert {"ours", "SDPA, as torch chooses", "SDPA, math", "SDPA, packed"} <= same.keys()
        assert found["rows"][0]["difference"] == 0
        assert set(same) | set(told["not_measured"]) == set(attention.WAYS) - {"twice"}
    assert shown.count("OTHER VALUES") == 2
    if not torch.cuda.is_available():
        assert "xformers: not measured (" in shown and "xformers, packed: not measured (" in shown


def test_costs_have_the_exponents_of_time_and_memory_and_mark_what_grows_faster(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(costs, "peak_bytes", lambda point, case, device, *, seed: case.batch**3 * 2**20)
    axes = {
        "clips a step": Axis((1, 2), lambda n: Case(SIMPLE, batch=n)),
        "clips seen": Axis((1, 2), lambda n: Case(SIMPLE, 1, n)),
    }
    path = costs.bench(tmp_path, repeats=1, axes=axes)
    found, shown = json.loads(path.read_text())["found"], capsys.readouterr().out
    batch, seen = (found[name]["exponents"] for name in axes)
    assert batch["flops"] == pytest.approx(1) and batch["bytes"] == pytest.approx(3) and 0 < batch["bytes_by_formula"] < 1
    assert (
        seen["flops"] == pytest.approx(1) and seen["bytes"] == pytest.approx(0) and seen["bytes_by_formula"] == pytest.approx(0)
    )
    assert "clips a step: bytes grow faster than their arithmetic (3.00, " in shown
    assert "clips seen: bytes" not in shown
    assert found["clips seen"]["rows"][0]["seconds"] > 0


def test_an_exponent_is_that_of_a_power() -> None:
    assert costs.exponent([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)]) == pytest.approx(1.5)


def test_the_memory_measured_of_training_is_near_the_formulas() -> None:
    """22 M weights with their gradients and moments, and a batch large enough to see."""
    case = Case({"clip": [16, 112, 112]}, batch=4)
    model = steps.model("S", case.changes, device=CPU, seed=0)
    formula = costs.memory(costs.work_of(model), clips=4, shards=1, recompute=False, sizes=costs.PLAIN)["total"]
    assert costs.peak_bytes("S", case, CPU, seed=0) == pytest.approx(formula, rel=0.05)


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::mm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_fused_adamw_", "AdamW"),
        ("aten::native_layer_norm_backward", "norms"),
        ("aten::gelu", "GELU"),
        ("aten::copy_", "gathers, copies"),
        ("aten::add", "by element, sums"),
        ("aten::empty", "other"),
    ],
)
def test_operations_are_counted_by_what_they_do(operation: str, kind: str) -> None:
    assert parts.kind_of(operation) == kind


def test_a_batch_is_doubled_until_it_brings_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {2: 2.0, 4: 3.0, 8: 5.9, 16: 12.0}
    monkeypatch.setattr(pretrain, "_seconds", lambda clips, device: seconds[clips])
    assert pretrain.best_clips(lambda clips: clips, 2, CPU) == 4
    monkeypatch.setattr(pretrain, "_seconds", lambda clips, device: 1.0 if clips < 16 else out_of_memory())
    assert pretrain.best_clips(lambda clips: clips, 2, CPU) == 8


def out_of_memory() -> float:
    raise torch.cuda.OutOfMemoryError("no memory left")
