"""The formulas of a step, against shapes that can be reckoned by hand and against a real step on this machine."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scaling4d.pretrain.plan import closed_form
from scaling4d.pretrain.plan.closed_form import MIXED, REDUCED, StepLayout, flops, memory, traffic
from scaling4d.pretrain.plan.work import BlockWork, Work

ROOT = Path(__file__).parents[2]
SHAPES = ((24, 8), (24, 1), (8, 8), (8, 1), (16, 8), (16, 1), (8, 16), (8, 1))
BLOCK = BlockWork(width=8, mlp=16, heads=2, tokens=3, shapes=SHAPES)
WORK = Work(
    visible_tokens=3,
    all_tokens=60,
    coarse_tokens=0,
    blocks=(BLOCK,) * 4,
    embedding=(3, 96),  # tokens, weights
    linears=((3, 40),),
    shapes=((8, 12), (5, 8)),
    head_parameters=40,
    pixels=756,
    saved_values=0,
    head_saved_values=24,
    loss_values=60,
    loss_kernel_values=15,
    teacher=None,
)
REAL_STEPS = """
import json, sys, torch
from scaling4d.pretrain.plan.closed_form import PLAIN, StepLayout, memory
from scaling4d.pretrain.plan.plan import build, settings_of
from scaling4d.pretrain.plan.work import work_of
from scaling4d.training.optimizer import build_adamw

def resident(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

point, clips = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
warm = torch.nn.Linear(64, 64)
warm(torch.randn(64, 64)).sum().backward()
torch.optim.AdamW(warm.parameters(), fused=True).step()
model = build(point, settings_of(point))
expected = memory(work_of(model), StepLayout(1, False, sizes=PLAIN), clips=clips)["total"]
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = resident("VmRSS")
model.to_empty(device="cpu").initialise(0)
adamw = build_adamw({"all": (list(model.named_parameters()), 1e-4)}, betas=(0.9, 0.95), weight_decay=0.05)
pixels = torch.randint(256, (clips, *model.encoder.clip, 3), dtype=torch.uint8)
masked = model.draw_mask(clips, torch.Generator())
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
    counts = {"forward": forward, "backward": backward, "recompute": 0, "total": forward + backward, "model": 3 * forward}
    assert flops(WORK, recompute=False) == counts
    again = 4 * (linear - 2 * 3 * 16 * 8 + scores)  # the blocks without their last layer
    assert flops(WORK, recompute=True) == counts | {"recompute": again, "total": forward + backward + again}


@pytest.mark.parametrize("recompute", [False, True])
def test_the_largest_batch_fits_and_one_clip_more_does_not(recompute: bool) -> None:
    layout = StepLayout(2, recompute)
    most = closed_form.clips_that_fit(WORK, layout, usable_bytes=1e6)
    assert memory(WORK, layout, clips=most)["total"] <= 1e6 < memory(WORK, layout, clips=most + 1)["total"]
    assert closed_form.clips_that_fit(WORK, layout, usable_bytes=10) == 0


def test_one_gpu_sends_nothing_and_two_send_half_of_everything_three_times() -> None:
    assert traffic(WORK, StepLayout(1, False), replicas=1) == {"shards_bytes": 0, "replicas_bytes": 0}
    blocks, outside = WORK.parameters - 136, 136
    even = replace(WORK, shapes=((8, 12), (4, 10)))
    assert traffic(even, StepLayout(2, False), replicas=1)["shards_bytes"] == (
        MIXED.compute * (2 * blocks + outside) / 2 + REDUCED * (blocks + outside) / 2 + REDUCED * (4 * len(SHAPES) + 2)
    )


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
@pytest.mark.parametrize(("point", "clips"), [("S", 1), pytest.param("B", 2, marks=pytest.mark.slow)])
def test_a_real_step_takes_the_memory_that_the_formulas_say(point: str, clips: int) -> None:
    """Within 10 %: a step also touches some 20 MiB of code and buffers. Freed tensors go back to the system at once."""
    given = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", REAL_STEPS, point, str(clips)], capture_output=True, text=True, cwd=ROOT, env=given, check=True
    )
    expected, real = json.loads(run.stdout)
    assert real == pytest.approx(expected, rel=0.1)
