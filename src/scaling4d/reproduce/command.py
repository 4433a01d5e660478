"""The command `reproduce`: choose a target, run it, and say what was measured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from scaling4d.records import UserError, did_you_mean
from scaling4d.reproduce import depth_demo, fly_vs_fly
from scaling4d.reproduce.targets import NOT_REPRODUCED
from scaling4d.training.launch import first_gpu_bytes

TARGETS = {target.name: target for target in (fly_vs_fly.FLY_VS_FLY, depth_demo.DEPTH_DEMO)}


def reproduce(
    target: str,
    given: Mapping[str, Path | None],
    *,
    out: Path | None,
    dry: bool,
    device: str | None,
    seed: int | None,
    steps: int | None,
    workers: int | None,
) -> bool:
    """Run a target on the given files, path by option, and print the outcome. False: it is not as published.

    dry: print the plan instead. The plan is printed first where files are missing. device, seed, steps, workers: of
    `fly_vs_fly.run`; None: the GPU, if there is one, 0, all steps, and one a core.
    Raises UserError: an unknown target, missing files, an option of another target, or as the target's `run`.
    """
    if target not in TARGETS:
        raise UserError(f"unknown target {target!r}; needed {' or '.join(TARGETS)}{did_you_mean(target, list(TARGETS))}")
    chosen = TARGETS[target]
    options = {one.option for one in chosen.downloads}
    training = {"--device": device, "--seed": seed, "--steps": steps, "--workers": workers}
    options_given = given if chosen is fly_vs_fly.FLY_VS_FLY else {**given, **training}
    if others := sorted(name for name, value in options_given.items() if value is not None and name not in options):
        raise UserError(f"{target} takes {' and '.join(sorted(options))}; leave out {' and '.join(others)}")
    if dry or any(given[option] is None or not given[option].exists() for option in options):
        print("\n".join(chosen.plan()))
    if dry:
        return True
    if chosen is depth_demo.DEPTH_DEMO:
        return _depth_demo(given, out)
    device = device or ("cuda" if first_gpu_bytes() else "cpu")
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}; needed cpu or cuda")
    files = {"weights": given["--weights"], "data": given["--data"], "out": out}
    workers = workers or os.cpu_count() or 1
    folder, content = fly_vs_fly.run(**files, device=device, seed=seed or 0, steps=steps, workers=workers)
    print(chosen.verdict_text(content))
    print(f"wrote {folder}")
    return content["verdict"] != NOT_REPRODUCED


def _depth_demo(given: Mapping[str, Path | None], out: Path | None) -> bool:
    folder, content = depth_demo.run(weights=given["--weights"], video_file=given["--video"], out=out)
    depths = content["depth"]
    print(f"depth_demo: depths {depths['smallest']:.3g} to {depths['largest']:.3g}, median {depths['median']:.3g}")
    print(f"no number is published: {depth_demo.DEPTH_DEMO.unpublished}")
    for text in content["deviations"]:
        print(f"not the released file: {text}")
    for name, holds, words in content["checks"]:
        print(f"{'ok' if holds else 'FAILED':6} {name}: {words}")
    print(f"wrote {folder}")
    return all(holds for _, holds, _ in content["checks"])
