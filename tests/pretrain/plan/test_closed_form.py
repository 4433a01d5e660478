"""The formulas of a step, against shapes that can be reckoned by hand and against a real step on this machine."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scaling4d.pretrain.plan.closed_form import MIXED, clips_that_fit, flops, memory, moments, traffic
from scaling4d.pretrain.plan.work import BlockWork, LinearWork, Work

ROOT = Path(__file__).parents[3]
BLOCK = BlockWork(width=8, mlp=16, heads=2, tokens=3, rows=((24, 8), (24, 1), (8, 8), (8, 1), (16, 8), (16, 1), (8, 16), (8, 1)))
WORK = Work(
    visible_tokens=3,
    all_tokens=60,
    coarse_tokens=0,
    blocks=(BLOCK,) * 4,
    linears=(LinearWork(tokens=3, weights=96, learns_input=False), LinearWork(tokens=3, weights=40, learns_input=True)),
    rows=((8, 12), (5, 8)),
    head_parameters=40,
    pixel_values=720,
    saved_values=36,
    head_saved_values=24,
    loss_saved_values=15,
    loss_temporary_values=60,
    teacher=None,
)
REAL_STEPS = """
import json, sys, torch
from scaling4d import config
from scaling4d.training import optimizer
from scaling4d.mae.build import METHODS
from scaling4d.pretrain.plan.closed_form import PLAIN, memory
from scaling4d.pretrain.plan.estimate import _model, _settings
from scaling4d.pretrain.plan.work import work_of

def resident(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

point, clips = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
warm = torch.nn.Linear(64, 64)
warm(torch.randn(64, 64)).sum().backward()
torch.optim.AdamW(warm.parameters(), fused=True).step()
model = _model(point, _settings(point))
expected = memory(work_of(model), clips=clips, shards=1, recompute=False, sizes=PLAIN)["total"]
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = resident("VmRSS")
model.to_empty(device="cpu").initialise(0)
adamw, _ = optimizer.adamw({"all": (list(model.named_parameters()), 1e-4)}, betas=(0.9, 0.95), weight_decay=0.05)
pixels, masked = torch.rand(clips, *model.encoder.clip, 3), model.choose(clips, torch.Generator())
for _ in range(2):
    model(pixels, masked).backward()
    adamw.step()
    adamw.zero_grad()
print(json.dumps([expected, resident("VmHWM") - before]))
"""


def test_flops_are_those_of_every_product_written_out() -> None:
    products = [(8, 24), (8, 8), (8, 16), (16, 8)]
    linear = sum(2 * 3 * a * b for a, b in products)
    scores = 2 * (2 * 3 * 3 * 8)  # queries by keys, and weights by values
    forward = 4 * (linear + scores) + 2 * 3 * 96 + 2 * 3 * 40
    backward = 4 * (2 * linear + 5 * scores // 2) + 2 * 3 * 96 + 2 * (2 * 3 * 40)
    found = flops(WORK, recompute=False)
    assert found == {"forward": forward, "backward": backward, "recompute": 0, "total": forward + backward}


def test_recompute_repeats_the_blocks_without_their_last_layer() -> None:
    again = flops(WORK, recompute=True)["recompute"]
    assert again == 4 * (2 * 3 * (8 * 24 + 8 * 8 + 8 * 16) + 4 * 3 * 3 * 8)


def test_a_parameter_whose_first_axis_does_not_divide_is_padded_on_every_gpu() -> None:
    alone = replace(WORK, blocks=(replace(BLOCK, rows=((8, 1),)),), rows=((5, 7),))
    held = memory(alone, clips=1, shards=4, recompute=False)
    assert held["parameters"] == 4 * (2 * 7 + 2)  # 5 rows over 4 GPUs: 2 each
    assert held["optimizer"] == 2 * held["parameters"]


def test_more_shards_fewer_clips_and_recompute_each_lower_memory() -> None:
    whole = memory(WORK, clips=64, shards=1, recompute=False)["total"]
    assert memory(WORK, clips=64, shards=8, recompute=False)["total"] < whole
    assert memory(WORK, clips=63, shards=1, recompute=False)["total"] < whole
    assert memory(WORK, clips=64, shards=1, recompute=True)["total"] < whole


def test_gradients_of_earlier_parts_are_held_in_shards_all_along() -> None:
    one, two = (moments(WORK, clips=4, shards=2, recompute=False, parts=parts) for parts in (1, 2))
    held = MIXED.reduced * (WORK.parameters + 8) // 2  # a first axis of 5 over 2 GPUs is 6
    assert one[0]["gradients"] == 0 and two[0]["gradients"] == held
    assert all(later["gradients"] >= held for later in two)
    assert memory(WORK, clips=4, shards=2, recompute=False, parts=2) == memory(WORK, clips=4, shards=2, recompute=False, parts=9)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_largest_batch_fits_and_one_clip_more_does_not(recompute: bool) -> None:
    most = clips_that_fit(WORK, room_bytes=1e6, shards=2, recompute=recompute)
    assert memory(WORK, clips=most, shards=2, recompute=recompute)["total"] <= 1e6
    assert memory(WORK, clips=most + 1, shards=2, recompute=recompute)["total"] > 1e6
    assert clips_that_fit(WORK, room_bytes=10, shards=2, recompute=recompute) == 0


def test_one_gpu_sends_nothing_and_two_send_half_of_everything_three_times() -> None:
    assert traffic(WORK, shards=1, replicas=1) == {"shards_bytes": 0, "replicas_bytes": 0}
    blocks, outside = WORK.parameters - 136, 136
    assert traffic(replace(WORK, rows=((8, 12), (4, 10))), shards=2, replicas=1)["shards_bytes"] == (
        MIXED.compute * (2 * blocks + outside) / 2 + MIXED.reduced * (blocks + outside) / 2
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
@pytest.mark.parametrize(("point", "clips"), [("S", 4), pytest.param("B", 2, marks=pytest.mark.slow)])
def test_a_real_step_takes_the_memory_that_the_formulas_say(point: str, clips: int) -> None:
    """Within 10 %: a step also touches some 20 MiB of code and buffers. Freed tensors go back to the system at once."""
    given = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", REAL_STEPS, point, str(clips)], capture_output=True, text=True, cwd=ROOT, env=given, check=True
    )
    expected, real = json.loads(run.stdout)
    assert real == pytest.approx(expected, rel=0.1)
