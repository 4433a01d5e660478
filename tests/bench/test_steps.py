"""Benchmarks of training steps at the smallest size: workloads in the tables, equal work for all, never speed."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from scaling4d import seeds
from scaling4d.mae import encoder
from scaling4d.pretrain.plan.closed_form import PLAIN, StepLayout, flops, memory
from scaling4d.pretrain.plan.work import work_of
from scaling4d.training.gpus import GPUS
from scaling4d_bench import attention, costs, devices, masking, measure, mfu, pretrain, steps
from scaling4d_bench.costs import TrainingCase
from scaling4d_bench.pretrain import StepGroup

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
SIMPLE = {"clip": [8, 64, 64], "width": 48, "depth": 3, "heads": 3, "mlp": 96}
MAE_ST = SIMPLE | {"decoder_width": 24, "decoder_heads": 2, "decoder_depth": 1, "predicted_frames": 4}
VIDEOMAE = {"image_size": 64, "num_frames": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
VIDEOMAE |= {"intermediate_size": 96, "decoder_hidden_size": 24, "decoder_num_hidden_layers": 1}
VIDEOMAE |= {"decoder_num_attention_heads": 3, "decoder_intermediate_size": 48}
GIVEN = {"clips": 2, "device": CPU}


@pytest.fixture(autouse=True)
def small_and_in_the_project(in_the_project: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "cores", lambda: 1)
    monkeypatch.setattr(devices, "MATRIX_SIDE", {"cpu": 64})
    monkeypatch.setattr(devices, "COPIED_BYTES", {"cpu": 1024})


def tiny(point: str) -> torch.nn.Module:
    return steps.build(point, MAE_ST if point.startswith("mae_st") else SIMPLE, CPU)


def gone(**given) -> steps.TrainingStep:
    raise ImportError("No module named 'transformers'")


def test_steps_take_turns_with_their_peers_and_missing_ones_are_named(tmp_path: Path, monkeypatch, capsys) -> None:
    makers = {
        "ours, 90 %": partial(steps.point_step, "S", 0.9, SIMPLE),
        "MAE-ST, 90 %": partial(steps.point_step, "mae_st_B", 0.9, MAE_ST),
        "VideoMAE": partial(steps.videomae, mask_ratio=0.9, config=VIDEOMAE),
        "another": gone,
    }
    group = StepGroup(makers, [("ours, 90 %", "VideoMAE"), ("ours, 90 %", "another")])
    monkeypatch.setattr(pretrain, "standard_groups", lambda mae_st: {"all": group})
    path = pretrain.bench(tmp_path, clips=2, repeats=2, precisions=["fp32"], mae_st=None)
    content, shown = json.loads(path.read_text()), capsys.readouterr().out
    results, names = content["results"]["all, fp32"], ["ours, 90 %", "MAE-ST, 90 %", "VideoMAE"]
    assert [row["name"] for row in results["rows"]] == names
    assert {name: len(seconds) for name, seconds in content["raw"]["all, fp32"]["seconds"].items()} == dict.fromkeys(
        [*names, "matrix product, fp32", "memory copy"], 2
    )
    assert [(ratio["of"], ratio["over"]) for ratio in results["ratios"]] == [("ours, 90 %", "VideoMAE")]
    assert "another, fp32: not measured (No module named 'transformers')" in shown
    for row in results["rows"]:
        peak = results["limits"]["matrix product, fp32"]
        assert row["share_of_peak"] == pytest.approx(row["per_s"] * row["flops_per_clip"] / peak)
        assert sum(row["parts"].values()) == pytest.approx(1) and row["parts"]["matrix products"] > 0
    assert content["settings"]["device"] == "cpu" and "transformers" in content["versions"]


@pytest.mark.parametrize("point", ["S", "mae_st_B"])
def test_the_counted_flops_of_a_step_are_those_of_the_formula(point: str) -> None:
    model = tiny(point)
    step = steps.our_step(model, steps.adamw_update(model), mask_ratio=model.config.mask_ratio, **GIVEN)
    assert step.flops == 3 * flops(work_of(model), recompute=False)["forward"]


def test_a_step_computes_gradients_and_moments_and_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made, build_adamw = tiny("S"), [], steps.build_adamw
    monkeypatch.setattr(steps, "build_adamw", lambda *args, **more: made.append(build_adamw(*args, **more)) or made[0])
    before = {name: p.clone() for name, p in model.named_parameters()}
    steps.our_step(model, steps.adamw_update(model), mask_ratio=0.9, **GIVEN).run()
    moments = [state["exp_avg"] for state in made[0].state.values()]
    assert len(moments) == len(before) and all(moment.abs().sum() > 0 for moment in moments)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(("ratio", "visible"), [(0.0, 63), (0.75, 16), (0.9, 6)])
def test_hiding_nothing_hides_one_token(ratio: float, visible: int) -> None:
    for point in ("S", "mae_st_B"):
        model = tiny(point)
        masked = steps.masks_at_ratio(model, 2, ratio, seeds.torch_rng(0, "mask"))
        assert masked.ids_keep.shape == (2, visible)
        assert model(torch.zeros(2, 8, 64, 64, 3, dtype=torch.uint8), masked).isfinite()


def test_videomae_has_its_own_base_size_and_hides_as_many_tokens_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(steps, "training_step", lambda loss, update, clips: seen.append(loss()))
    steps.let_torchvision_load()
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    forward = VideoMAEForPreTraining.forward

    def spy(self, pixels, bool_masked_pos):
        seen.append((self.config, pixels, bool_masked_pos))
        return forward(self, pixels, bool_masked_pos=bool_masked_pos)

    monkeypatch.setattr(VideoMAEForPreTraining, "forward", spy)
    steps.videomae(mask_ratio=0.9, config=VIDEOMAE, precision="fp32", **GIVEN)
    (used, pixels, hidden), loss = seen
    assert pixels.shape == (2, 8, 3, 64, 64) and (~hidden).sum(1).tolist() == [6, 6] and loss.isfinite()
    default = VideoMAEConfig()
    assert (default.hidden_size, default.num_hidden_layers, default.image_size, default.num_frames) == (768, 12, 224, 16)
    assert used._attn_implementation == "sdpa"


def test_the_official_mae_st_is_measured_only_from_a_checkout(tmp_path: Path) -> None:
    for folder, message in (
        (tmp_path, "no checkout of facebookresearch/mae_st: it has no models_mae.py"),
        (None, "no checkout of facebookresearch/mae_st was given: --mae-st FOLDER"),
    ):
        with pytest.raises(ImportError, match=message):
            steps.official_step(folder, precision="fp32", **GIVEN)


def test_a_checkout_in_a_folder_of_any_name_is_built_with_the_points_settings(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "util").mkdir()
    (tmp_path / "util/names.py").write_text("NAME = 'inner'\n")
    (tmp_path / "models_mae.py").write_text("from mae_st.util.names import NAME\n\nMaskedAutoencoderViT = dict\n")
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    given = steps.official_mae_st(tmp_path, steps.settings_of("mae_st_L")[1])
    assert sys.modules["mae_st.models_mae"].NAME == "inner"
    norm_layer = given.pop("norm_layer")
    assert norm_layer(8).eps == 1e-6 and given == {
        "img_size": 224, "num_frames": 16, "patch_size": 16, "t_patch_size": 2, "pred_t_dim": 8, "embed_dim": 1024, "depth": 24,
        "num_heads": 16, "mlp_ratio": 4, "decoder_embed_dim": 512, "decoder_depth": 4, "decoder_num_heads": 16,
        "norm_pix_loss": True, "sep_pos_embed": True, "cls_embed": True,
    }  # fmt: skip


def test_masking_compares_every_share_with_none_and_adds_the_loading(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(masking.loader, "load", lambda folder, batches, workers: 0.5)
    monkeypatch.setattr(masking, "POINTS", {"B": {"MAE-ST": "mae_st_B", "SimpleMAE": "S"}})
    models = {point: tiny(point) for point in ("mae_st_B", "S")}
    monkeypatch.setattr(steps, "build", lambda point, changes, device: models[point])
    monkeypatch.setattr(masking.videos, "curated", lambda *_, **__: tmp_path)
    path = masking.bench(tmp_path, clips=2, repeats=2, precision="fp32")
    content, shown = json.loads(path.read_text()), capsys.readouterr().out
    results = content["results"]["B"]
    names = [f"{method}, {share}%" for method in ("MAE-ST", "SimpleMAE") for share in (0, 75, 90, 95)]
    assert [row["name"] for row in results["rows"]] == names
    assert results["loading"]["per_s"] == masking.BATCHES * masking.loader.BATCH / 0.5
    load_s = 1 / results["loading"]["per_s"]
    for none, *others in (results["rows"][:4], results["rows"][4:]):
        assert none["times_as_fast"] == {"median": 1.0, "low": 1.0, "high": 1.0} and none["times_as_fast_with_loading"] == 1.0
        for row in others:
            assert row["times_as_fast_by_arithmetic"] == none["flops_per_clip"] / row["flops_per_clip"] > 1
            with_loading = (1 / none["per_s"] + load_s) / (1 / row["per_s"] + load_s)
            assert row["times_as_fast_with_loading"] == pytest.approx(with_loading)
    assert "│ loading " in shown


def test_every_implementation_of_attention_that_runs_here_agrees_with_ours(tmp_path: Path, monkeypatch, capsys) -> None:
    twice = {"twice": lambda *_: lambda q, k, v: attention.attention(q, k, 2 * v)}
    monkeypatch.setattr(attention, "IMPLEMENTATIONS", attention.IMPLEMENTATIONS | twice)
    path = attention.bench(tmp_path, total=32, repeats=1, precision="fp32", tokens=(8, 16), heads=2)
    content, shown = json.loads(path.read_text()), capsys.readouterr().out
    for count, clips in (("8", 4), ("16", 2)):
        results = content["results"][count]
        assert results["clips"] == clips and results["flops_per_clip"] == 14 * int(count) ** 2 * 2 * 64
        same = {row["name"]: row["same"] for row in results["rows"]}
        assert same["twice"] is False and all(value for name, value in same.items() if name != "twice")
        assert {"ours", "SDPA, as torch chooses", "SDPA, math", "SDPA, packed"} <= same.keys()
        assert results["rows"][0]["difference"] == 0
        assert set(same) | set(content["not_measured"]) == set(attention.IMPLEMENTATIONS)
    assert shown.count("OTHER VALUES") == 2
    if not torch.cuda.is_available():
        assert "xformers: not measured (" in shown and "xformers, packed: not measured (" in shown


def test_mfu_stands_beside_the_plans_range_and_a_step_that_does_not_compile_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch, "compile", broken)
    path = mfu.bench(tmp_path, clips=2, repeats=2, precision="fp32", points=("S",), changes=SIMPLE)
    content, shown = json.loads(path.read_text()), capsys.readouterr().out
    (row,) = content["results"]["rows"]
    work, h100 = work_of(tiny("S")), GPUS["h100"]
    assert row["mfu"] == pytest.approx(row["per_s"] * flops(work, recompute=False)["model"] / h100.bf16_flop_per_s)
    assert row["planned_mfu"][0] > row["planned_mfu"][1] > 0 and len(content["raw"]["S"]) == 2
    assert row["formula_bytes"] == memory(work, StepLayout(1, False, sizes=PLAIN), clips=2)["total"]
    assert "S, compiled: not measured (no C compiler)" in shown


def test_mfu_in_bf16_steps_as_a_training_does(tmp_path: Path, monkeypatch) -> None:
    """Blocks cast all their weights; autocast, which a training does not use, leaves norms and sums in fp32."""
    seen, block = {}, encoder.Block.forward

    def watched(self: encoder.Block, x: torch.Tensor, *more: object) -> torch.Tensor:
        seen.setdefault("types", set()).update({x.dtype, self.attention_norm.weight.dtype, self.qkv.weight.dtype})
        seen["autocast"] = torch.is_autocast_enabled("cpu")
        return block(self, x, *more)

    monkeypatch.setattr(encoder.Block, "forward", watched)
    monkeypatch.setattr(mfu, "BLOCKS", {"": False})
    path = mfu.bench(tmp_path, clips=2, repeats=2, precision="bf16", points=("S",), changes=SIMPLE)
    (row,) = json.loads(path.read_text())["results"]["rows"]
    assert seen == {"types": {torch.bfloat16}, "autocast": False}
    assert row["formula_bytes"] == memory(work_of(tiny("S")), StepLayout(1, False), clips=2)["total"]


def test_costs_have_the_exponents_of_time_and_memory_and_mark_faster_growth(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(costs, "peak_bytes", lambda point, case, device: case.batch**3 * 2**20)
    axes = {
        "clips a step": ((1, 2), lambda n: TrainingCase(SIMPLE, batch=n)),
        "clips seen": ((1, 2), lambda n: TrainingCase(SIMPLE, 1, n)),
    }
    path = costs.bench(tmp_path, repeats=1, axes=axes)
    results, shown = json.loads(path.read_text())["results"], capsys.readouterr().out
    batch, seen = (results[name]["exponents"] for name in axes)
    assert batch["flops"] == pytest.approx(1) and batch["bytes"] == pytest.approx(3) and 0 < batch["bytes_by_formula"] < 1
    assert seen["flops"] == pytest.approx(1) and [seen["bytes"], seen["bytes_by_formula"]] == pytest.approx([0, 0])
    assert "clips a step: bytes grow faster than their arithmetic (3.00, " in shown
    assert "clips seen: bytes" not in shown
    assert costs.exponent([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)]) == pytest.approx(1.5)
    assert results["clips seen"]["rows"][0].keys() == {"value", "seconds", "low", "high", "flops", "bytes", "bytes_by_formula"}


def test_the_measured_memory_of_training_is_near_the_formulas() -> None:
    """22 M weights with their gradients and moments, and a batch large enough to see."""
    case = TrainingCase({"clip": [16, 112, 112]}, batch=4)
    work = work_of(steps.build("S", case.changes, CPU))
    formula = memory(work, StepLayout(1, False, sizes=PLAIN), clips=4)["total"]
    assert costs.peak_bytes("S", case, CPU) == pytest.approx(formula, rel=0.05)


def test_operations_are_counted_by_their_kind() -> None:
    operations = {
        "attention": "aten::_scaled_dot_product_flash_attention_for_cpu_backward", "AdamW": "aten::_fused_adamw_",
        "matrix products": "aten::addmm", "GELU": "aten::gelu", "norms": "aten::native_layer_norm_backward",
        "gathers, copies": "aten::copy_", "by element, sums": "aten::add", "other": "aten::empty",
    }  # fmt: skip
    assert {pretrain.kind_of(operation): operation for operation in operations.values()} == operations
