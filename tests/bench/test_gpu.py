"""What only a GPU can show; `make gpu` runs these. Without one they are skipped, and nothing is claimed."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from scaling4d import seeds
from scaling4d.mae.attention import xformers_problem
from scaling4d.pretrain.plan.closed_form import PLAIN, StepLayout, memory
from scaling4d.pretrain.plan.work import work_of
from scaling4d.records import MaskedTokens
from scaling4d_bench import attention, costs, devices, pretrain, steps

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing is claimed")
pytestmark = [pytest.mark.gpu, NO_GPU, pytest.mark.usefixtures("in_the_project")]

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = {"clip": [8, 64, 64], "depth": 4}


# Widths of a head beside 64: MAE-ST's decoder, H, G, e, j
@pytest.mark.parametrize(
    ("count", "width"), [*((count, 64) for count in attention.TOKENS), *((157, n) for n in (32, 80, 104, 112, 128))]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
def test_attention_on_a_gpu_is_that_of_the_cpu(count: int, width: int, dtype: torch.dtype, tolerance: float) -> None:
    shape, rng = (2, count, 4, width), seeds.torch_rng(0, "attention")
    inputs = [torch.randn(shape, generator=rng) for _ in range(4)]
    wanted = attention.both_passes(attention.attention, inputs)
    results = attention.both_passes(attention.attention, [x.to(GPU, dtype) for x in inputs])
    for a, b in zip(results, wanted, strict=True):
        assert float((a.float().cpu() - b).abs().max()) < tolerance


@pytest.mark.parametrize("point", ["S", "mae_st_B"])
def test_a_loss_and_its_gradients_on_a_gpu_are_those_of_the_cpu(point: str) -> None:
    changes = SMALL | ({"predicted_frames": 4} if point == "mae_st_B" else {})
    results = {}
    for place in (CPU, GPU):
        model = steps.build(point, changes, place)
        pixels = torch.randint(0, 256, (2, 8, 64, 64, 3), dtype=torch.uint8, generator=seeds.torch_rng(0, "pixels")).to(place)
        masked = model.draw_mask(2, seeds.torch_rng(0, "mask"))
        loss = model(pixels, MaskedTokens(masked.ids_keep.to(place), masked.grid))
        loss.backward()
        results[place] = loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters()}
    assert results[GPU][0] == pytest.approx(results[CPU][0], rel=1e-5)
    for name, gradient in results[CPU][1].items():
        assert torch.allclose(results[GPU][1][name], gradient, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize(("point", "clips"), [("S", 32), ("B", 16), ("L", 8)])
def test_peak_memory_is_that_of_the_plan(point: str, clips: int) -> None:
    work = work_of(steps.build(point, {}, CPU))
    formula = memory(work, StepLayout(1, False, sizes=PLAIN), clips=clips)["total"]
    assert costs.peak_bytes(point, costs.TrainingCase({}, batch=clips), GPU) == pytest.approx(formula, rel=0.1)


def test_a_bf16_step_has_nearly_the_loss_of_an_fp32_one() -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        model = steps.as_trained(steps.build("S", SMALL, GPU), precision, GPU)
        steps.our_step(model, losses.append, clips=4, mask_ratio=0.9, device=GPU).run()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=2e-2)


@pytest.mark.skipif(bool(xformers_problem()), reason="xformers does not load here; torch's attention runs instead")
def test_xformers_packs_clips_in_one_sequence(tmp_path: Path) -> None:
    path = attention.bench(tmp_path, total=1024, repeats=1, precision="bf16", tokens=(78,))
    content = json.loads(path.read_text())
    same = {row["name"]: row["same"] for row in content["results"]["78"]["rows"]}
    assert same["xformers"] and same["xformers, packed"]
    assert path.name.startswith("attention-") and content["settings"]["device"] == torch.cuda.get_device_name()


def test_steps_are_measured_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = pretrain.StepGroup({"ours": partial(steps.point_step, "S", 0.9, SMALL)})
    monkeypatch.setattr(pretrain, "standard_groups", lambda mae_st: {"all": group})
    path = pretrain.bench(tmp_path, clips=2, repeats=2, precisions=["bf16"], mae_st=None)
    (row,) = json.loads(path.read_text())["results"]["all, bf16"]["rows"]
    assert row["clips"] == 2 and 0 < row["share_of_peak"] < 1


def test_a_gpus_seconds_are_those_of_its_work_not_of_its_launch() -> None:
    a = torch.randn(8192, 8192, device=GPU)
    work = partial(torch.mm, a, a)
    assert devices.timed(lambda: [work() for _ in range(20)], GPU)() > 5 * devices.timed(work, GPU)()
