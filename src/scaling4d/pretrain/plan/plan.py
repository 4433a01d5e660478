"""The cost of a scaling point on a cluster, without weights in memory: by formulas, and by a dry run of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from scaling4d import config
from scaling4d.mae.encoder import Method
from scaling4d.pretrain.plan import closed_form
from scaling4d.pretrain.plan.closed_form import GIB, STORED, USABLE, StepLayout, flops, memory
from scaling4d.pretrain.plan.performance import CASES, step_seconds
from scaling4d.pretrain.plan.work import Work, work_of
from scaling4d.pretrain.settings import build_method, find_point, points_of
from scaling4d.records import UserError
from scaling4d.training.gpus import GPUS, STORAGE_GB_PER_S, WORKER_CLIPS_PER_S, Gpu

COUNTS = (8, 32, 64, 256, 1024)  # GPUs in the table
CLIP_VALUES = 16 * 224 * 224 * 3  # of the clips whose decoding was measured
MAX_GPUS = 16384  # where the search for more shards ends


def plan(
    point: str,
    *,
    profile: str | None = None,
    mesh: str | None = None,
    batch: int | None = None,
    recompute: str = "none",
    gpu: str = "h100",
    worker_clips_per_s: float = WORKER_CLIPS_PER_S,
    storage_gb_per_s: float = STORAGE_GB_PER_S,
    dry: bool = False,
) -> dict[str, Any]:
    """All figures of a point, units in the names; keys as `scaling4d plan --json` prints them.

    Args:
        point: of params.yaml, else of profile paper, else of another profile, which then sets steps, microbatches,
            and the defaults of batch and mesh. profile: of this one instead.
        mesh: SHARDSxREPLICAS. batch: clips a step, over all GPUs. recompute: none, or block (activations of every block
            are computed again in the backward pass). worker_clips_per_s: clips of CLIP_VALUES that one of the profile's
            decoding processes gives a second; others by their number of pixels.
        storage_gb_per_s: writing checkpoints and reading features, all GPUs together. dry: also step the real model, as
            plan.dry_run.
    Raises:
        UserError: no profile has the point, or a mesh, batch, gpu or speed is impossible.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", mesh or "")
    if mesh and not match:
        raise UserError(f"--mesh {mesh!r}; needed SHARDSxREPLICAS, two numbers above 0 such as 256x1 or 8x32")
    if recompute not in ("none", "block"):
        raise UserError(f"--recompute {recompute!r}; needed none or block")
    if gpu not in GPUS:
        raise UserError(f"unknown gpu {gpu!r}; needed one of {', '.join(GPUS)}")
    for option, speed in (("--worker-clips-per-s", worker_clips_per_s), ("--storage-gb-per-s", storage_gb_per_s)):
        if speed <= 0:
            raise UserError(f"{option} {speed}; needed more than 0")
    settings = settings_of(point, profile)
    training, runtime = (config.section(settings, f"pretrain.{kind}") for kind in ("Training", "Runtime"))
    key = find_point(point, settings)[0]
    sharding = config.section(settings, f"{key}.Sharding")
    shards, replicas = map(int, match.groups()) if match else (sharding["shards"], training["ranks"] // sharding["shards"])
    model, steps, batch, microbatches = (
        build(point, settings),
        training["steps"],
        batch or training["batch"],
        sharding["accumulate"],
    )
    work = work_of(model)
    request = PlanRequest(
        work=work,
        steps=steps,
        batch=batch,
        microbatches=microbatches,
        recompute=recompute == "block",
        keep_best=bool(training["keep_best"]),
        gpu=GPUS[gpu],
        workers=runtime["workers"],
        worker_clips_per_s=worker_clips_per_s * CLIP_VALUES / work.pixels,
    )
    if problem := request.division_problem(shards * replicas):
        raise UserError(problem)
    coarse = model.coarse_tokens.numel() if hasattr(model, "coarse_tokens") else 0
    parameters = {"backbone": sum(p.numel() for p in model.encoder.parameters()), "coarse_tokens": coarse}
    parameters |= {"decoder": work.parameters - sum(parameters.values()), "total": work.parameters}
    clip, clips = flops(work, recompute=request.recompute), steps * batch
    weights, bytes_per_s = STORED * parameters["total"], storage_gb_per_s * 1e9  # a state holds two moments as well
    storage = {"checkpoint_bytes": weights, "training_state_bytes": 3 * weights, "write_bytes_per_s": bytes_per_s}
    storage |= {f"{name}_s": storage[f"{name}_bytes"] / bytes_per_s for name in ("checkpoint", "training_state")}
    storage |= {"hang_s": runtime["hang_s"], "asynchronous": runtime["asynchronous"]}
    storage |= {"wait_s": config.section(settings, f"{key}.Launch")["wait_s"]}
    content = {
        "point": point,
        "profile": settings["profile"],
        "method": type(model).__name__,
        "parameters": parameters,
        "tokens": {"visible": work.visible_token_count, "all": work.all_token_count, "coarse": work.coarse_token_count},
        "flops_per_clip": clip,
        "flops_per_step": {part: count * batch for part, count in clip.items()},
        "schedule": {"steps": steps, "batch": batch, "clips": clips, "flops": clips * clip["total"]},
        "gpu": asdict(request.gpu),
        "loading": {"workers": request.workers, "worker_clips_per_s": request.worker_clips_per_s},
        "recompute": recompute,
        "accumulate": microbatches,
        "storage": storage,
        "mesh": request.with_changes(shards, replicas),
        "meshes": [request.fastest(gpus) for gpus in COUNTS],
    }
    on_gpus = training["device"] == "cuda"  # a point of a CPU profile is a what-if
    content["other_compute"] = training["compute"] if on_gpus and training["compute"] != "bfloat16" else ""
    content["refused"] = request.loading_problem(content["mesh"]) if on_gpus else ""
    if dry:
        from scaling4d.pretrain.plan.dry_run import dry_run

        clips, seen = content["mesh"]["clips_per_gpu"], replace(work, loss_kernel_values=0)
        held = memory(seen, request.layout(shards), clips=clips // microbatches)["total"]
        mesh = {"shards": shards, "replicas": replicas, "clips": clips // microbatches}
        run = dry_run(model, **mesh, recompute=recompute, microbatches=microbatches, keep_best=request.keep_best)
        ratios = {"memory": held / run["memory_bytes"]["total"], "flops": clips * clip["total"] / run["flops"]}
        content["dry_run"] = run | {"closed_form_to_dry_run": ratios}
    return content


def _bound(part: Mapping[str, float]) -> str:
    """Of a step's seconds by kind: loading and the CPU count where they are longer than all others together."""
    return next((kind for kind in ("loading", "cpu") if part[kind]), max(part, key=part.__getitem__))


def settings_of(point: str, profile: str | None = None) -> dict[str, Any]:
    """params.yaml, or the first profile that has the point, profile paper first; or the given profile.

    Raises UserError: none has it.
    """
    profiles = sorted(path.stem for path in (config.EXPERIMENTS / "profile").glob("*.yaml"))
    known: set[str] = set()
    for name in [profile] if profile else (None, *sorted(profiles, key=lambda name: name != "paper")):
        settings = config.read() if name is None else config.compose([f"profile={name}"])
        points = points_of(settings)
        if point in points:
            return settings
        known |= set(points)
    where = f"profile {profile} has no" if profile else "no profile has a"
    raise UserError(f"{where} point {point!r}; points: {', '.join(sorted(known))}")


def build(point: str, settings: Mapping[str, Any]) -> Method:
    """A point's model on meta, with its teacher, if it has one. Reads no checkpoint.

    Raises:
        UserError: an unknown setting, or the settings lack the teacher.
    """
    (key, method), teacher_encoder = find_point(point, settings), None
    model_config = config.bind(settings, [f"{key}.model"], method.config_class)[method.config_class]
    if hasattr(model_config, "teacher"):
        if (teacher := model_config.teacher) not in settings["points"]:
            raise UserError(f"{point} has teacher {teacher!r}, which profile {settings['profile']} lacks; add it to points")
        teacher_encoder = build(teacher, settings).encoder
    return build_method(method, model_config, teacher_encoder)


@dataclass(frozen=True)
class PlanRequest:
    """A model's training, for which meshes of GPUs are compared.

    batch: clips a step, over all GPUs. microbatches: of a GPU's clips. keep_best: whether a GPU holds the best weights
    too. workers: decoding processes of a GPU, 0: the rank itself. worker_clips_per_s: of each.
    """

    work: Work
    steps: int
    batch: int
    microbatches: int
    recompute: bool
    keep_best: bool
    gpu: Gpu
    workers: int
    worker_clips_per_s: float

    def division_problem(self, gpus: int) -> str:
        """The reason why the batch does not divide among the GPUs; empty if it does."""
        divisor, each = gpus * self.microbatches, f", {self.microbatches} microbatches each" if self.microbatches > 1 else ""
        if self.batch % divisor == 0:
            return ""
        verb = "is smaller than" if self.batch < divisor else "does not divide by"
        problem = f"a batch of {self.batch} clips {verb} the {gpus} GPUs of the mesh{each}"
        return f"{problem}; set --batch to a multiple of {divisor}, or --mesh"

    def layout(self, shards: int) -> StepLayout:
        return StepLayout(shards, self.recompute, self.microbatches, keep_best=self.keep_best)

    def max_clips(self, shards: int) -> int:
        """Clips of a batch that a GPU can hold, in `microbatches` microbatches."""
        usable = USABLE * self.gpu.memory_bytes
        return self.microbatches * closed_form.clips_that_fit(self.work, self.layout(shards), usable_bytes=usable)

    def on_mesh(self, shards: int, replicas: int) -> dict[str, Any]:
        """The plan on one mesh. Pairs are of plan.performance's fast and slow case."""
        gpus, gpu, layout = shards * replicas, self.gpu, self.layout(shards)
        clips, usable = self.batch // gpus, USABLE * gpu.memory_bytes
        at_once = clips // self.microbatches
        held = memory(self.work, layout, clips=at_once)
        row = {"shards": shards, "replicas": replicas, "gpus": gpus, "clips_per_gpu": clips}
        row |= {"memory_bytes": held, "usable_bytes": usable, "fits": held["total"] <= usable}
        row |= {"most_clips_per_gpu": self.max_clips(shards), **closed_form.traffic(self.work, layout, replicas=replicas)}
        given, ideal_s = max(self.workers, 1) * self.worker_clips_per_s, flops(self.work, recompute=False)["model"] * clips
        ideal_s /= gpu.bf16_flop_per_s
        parts = [
            step_seconds(self.work, layout, gpu, share, clips=at_once, replicas=replicas) | {"loading": 0.0}
            for share in CASES.values()
        ]
        row |= {"gpu_step_s": [sum(part.values()) for part in parts], "clips_per_s_given": given}
        row["clips_per_s_needed"] = [clips / seconds for seconds in row["gpu_step_s"]]
        row["step_s"] = [max(seconds, clips / given) for seconds in row["gpu_step_s"]]
        for part, gpu_s, seconds in zip(parts, row["gpu_step_s"], row["step_s"], strict=True):
            part["loading"] = seconds - gpu_s  # a GPU waits
        row["bound"] = [_bound(part) for part in parts]
        days = [self.steps * seconds / 86400 for seconds in row["step_s"]]
        row |= {"seconds": parts, "mfu": [ideal_s / seconds for seconds in row["step_s"]], "days": days}
        return row | {"gpu_hours": [value * 24 * gpus for value in days], "why": "", "changes": []}

    def loading_problem(self, row: dict[str, Any]) -> str:
        """The reason why loading surely bounds a mesh, with what would do; empty if it does not."""
        if not row["fits"] or row["bound"] != ["loading", "loading"]:
            return ""
        fast, slow = row["clips_per_s_needed"]
        workers, cores = math.ceil(slow / self.worker_clips_per_s), self.gpu.cpu_cores
        change = f"set pretrain.Runtime.workers={workers} at least"
        if workers > cores:
            times = slow / (cores * self.worker_clips_per_s)
            change = (
                f"{workers} would do, but a machine has {cores} CPU cores a GPU: store clips that load {times:.2g} times as fast"
            )
        given = f"{row['clips_per_s_given']:,.0f}, by {self.workers} workers"
        return f"bound by loading: a GPU takes {slow:,.0f} to {fast:,.0f} clips/s and gets {given}; {change}"

    def with_changes(self, shards: int, replicas: int) -> dict[str, Any]:
        """`on_mesh`, with the reason why it does not fit, and changes that each make it fit; both empty if it fits."""
        row = self.on_mesh(shards, replicas)
        if row["fits"]:
            return row
        held = row["memory_bytes"]
        largest = max((kind for kind in held if kind != "total"), key=held.__getitem__)
        why = (
            f"does not fit, because a GPU would hold {held['total'] / GIB:.1f} GiB of the {row['usable_bytes'] / GIB:.1f} GiB "
            f"usable on {self.gpu.name} ({USABLE:.0%} of its memory), most of it {largest} ({held[largest] / GIB:.1f} GiB)"
        )
        changes = self._single_changes(shards, replicas)
        if not self.recompute:
            recomputing = replace(self, recompute=True)
            if recomputing.max_clips(shards) >= row["clips_per_gpu"]:
                changes = ["--recompute block", *changes]
            elif not changes:  # two changes together only where no single one is enough
                changes = [f"--recompute block {change}" for change in recomputing._single_changes(shards, replicas)]
        return row | {"why": why, "changes": changes}

    def _single_changes(self, shards: int, replicas: int) -> list[str]:
        """More shards of the same GPUs, a smaller batch, more GPUs."""
        gpus, changes = shards * replicas, []
        divisors = (n for n in range(2 * shards, gpus + 1, shards) if gpus % n == 0)
        if more := next((n for n in divisors if self.max_clips(n) >= self.batch // gpus), None):
            changes.append(f"--mesh {more}x{gpus // more} (more shards of the same GPUs)")
        if clips := self.max_clips(shards):
            changes.append(f"--batch {clips * gpus} ({clips} clips a GPU, largest batch that fits)")
        more = 2 * shards
        while more <= MAX_GPUS and not self.division_problem(more * replicas):
            if self.max_clips(more) >= self.batch // (more * replicas):
                return [*changes, f"--mesh {more}x{replicas} (more GPUs)"]
            more *= 2
        return changes

    def fastest(self, gpus: int) -> dict[str, Any]:
        """The fastest mesh that fits, of 1 or COUNTS shards. None fits: all GPUs as shards, with the reason."""
        if problem := self.division_problem(gpus):
            divisor = gpus * self.microbatches
            return {"gpus": gpus, "fits": False, "why": problem, "changes": [f"--batch {-(-self.batch // divisor) * divisor}"]}
        rows = [self.on_mesh(shards, gpus // shards) for shards in (1, *COUNTS) if gpus % shards == 0]
        fastest = min((row for row in rows if row["fits"]), key=lambda row: math.prod(row["gpu_step_s"]), default=None)
        return fastest or self.with_changes(gpus, 1)
