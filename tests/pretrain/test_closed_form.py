"""The formulas of a step's memory: the largest batch that fits, and a real step on this machine."""

import pytest
import torch
from peak_memory import grown, in_a_new_process, needs_proc

from scaling4d.pretrain.plan.closed_form import PLAIN, StepLayout, clips_that_fit, memory
from scaling4d.pretrain.plan.plan import build, settings_of
from scaling4d.pretrain.plan.work import work_of
from scaling4d.training.optimizer import build_adamw


def memory_of_two_steps(point: str, clips: int) -> tuple[int, int]:
    """Bytes by the formulas, and at the peak of real steps."""
    torch.set_num_threads(1)
    warm = torch.nn.Linear(64, 64)
    warm(torch.randn(64, 64)).sum().backward()
    torch.optim.AdamW(warm.parameters(), fused=True).step()
    model = build(point, settings_of(point))

    def two_steps() -> None:
        model.to_empty(device="cpu").initialise(0)
        adamw = build_adamw({"all": (list(model.named_parameters()), 1e-4)}, betas=(0.9, 0.95), weight_decay=0.05)
        pixels = torch.randint(256, (clips, *model.encoder.clip, 3), dtype=torch.uint8)
        masked = model.draw_mask(clips, torch.Generator())
        for _ in range(2):
            model(pixels, masked).backward()
            adamw.step()
            adamw.zero_grad()

    return memory(work_of(model), StepLayout(1, False, sizes=PLAIN), clips=clips)["total"], grown(two_steps)


@pytest.mark.usefixtures("in_the_project")
@pytest.mark.parametrize("recompute", [False, True])
def test_the_largest_batch_fits_and_one_clip_more_does_not(recompute: bool) -> None:
    work, layout = work_of(build("nano", settings_of("nano"))), StepLayout(2, recompute)
    most = clips_that_fit(work, layout, usable_bytes=1e9)
    assert memory(work, layout, clips=most)["total"] <= 1e9 < memory(work, layout, clips=most + 1)["total"]
    assert clips_that_fit(work, layout, usable_bytes=10) == 0


@pytest.mark.integration
@needs_proc
@pytest.mark.usefixtures("in_the_project")
@pytest.mark.parametrize(("point", "clips"), [("S", 1), pytest.param("B", 2, marks=pytest.mark.slow)])
def test_a_real_step_takes_the_memory_that_the_formulas_say(point: str, clips: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 10 %: a step also touches some 20 MiB of code and buffers. Freed tensors go back to the system at once."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    expected, real = in_a_new_process(memory_of_two_steps, point, clips)
    assert real == pytest.approx(expected, rel=0.1)
