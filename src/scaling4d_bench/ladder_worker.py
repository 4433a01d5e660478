"""Measures training steps of the default profile's SimpleMAE points, in the code that PYTHONPATH names.

`scaling4d bench pretrain --ladder` starts this file as a script: one process for each checkout, in its root. It prints
a line of JSON on every point, and then, for every name that it reads, a line with seconds and CPU seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scaling4d import config
from scaling4d.mae.models import METHODS, config_of
from scaling4d.pretrain.plan.closed_form import flops_per_clip
from scaling4d.pretrain.settings import BETAS
from scaling4d.training import distributed
from scaling4d.training.observe import matrix_product
from scaling4d.training.optimizer import build_adamw
from scaling4d_bench import steps

STEPS = 10  # of a turn
PRODUCT = "matrix product"
SIDE = 1024  # of the product, as in training.observe.peak_flops
FACTS = ("clip", "patch", "coarse_patch", "masking", "mask_ratio", "width", "depth")


def point_step(given: dict[str, Any], training: dict[str, Any]) -> tuple[Callable[[], None], dict[str, Any]]:
    """A step of one point: masks, loss, gradients and their clipping, AdamW. And what the point is."""
    model = METHODS["SimpleMAE"](config_of(METHODS["SimpleMAE"], given))
    model.initialise(steps.SEED)
    adamw = build_adamw({"all": (list(model.named_parameters()), 0.0)}, betas=BETAS, weight_decay=training["weight_decay"])

    def update(loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training["clip_norm"])
        adamw.step()
        adamw.zero_grad()

    cpu, shares = torch.device("cpu"), {"clips": training["batch"], "mask_ratio": given["mask_ratio"]}
    step = steps.our_step(model, update, **shares, precision="fp32", device=cpu)
    counts = {"parameters": sum(p.numel() for p in model.encoder.parameters()), "flops_per_clip": flops_per_clip(model)}
    return step.run, {name: given[name] for name in FACTS} | {"batch": training["batch"]} | counts


def turn(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds and CPU seconds of a turn."""
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        run()
    return time.perf_counter() - start, time.process_time() - cpu_start


def main() -> None:
    torch.set_num_threads(1)
    getattr(distributed, "keep_freed_memory", lambda: None)()  # as a rank of the trainer does; older revisions have none
    settings = config.compose([])
    models = {name: point["model"].get("SimpleMAE") for name, point in settings["points"].items()}
    made = {name: point_step(given, settings["pretrain"]["Training"]) for name, given in models.items() if given}
    product, flops = matrix_product(torch.device("cpu"), torch.float32, side=SIDE)
    facts = {"points": {name: facts for name, (_, facts) in made.items()}, "steps": STEPS, "product_flops": flops}
    print(json.dumps(facts), flush=True)
    runs = {name: run for name, (run, _) in made.items()} | {PRODUCT: product}
    for line in sys.stdin:
        print(json.dumps(turn(runs[line.strip()])), flush=True)


if __name__ == "__main__":
    main()
