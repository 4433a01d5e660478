"""What a scaling point will cost on a cluster, without a weight in memory: by formulas, and by a dry run of the real model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from scaling4d import config
from scaling4d.mae.build import METHODS, encoder_of
from scaling4d.pretrain.plan.closed_form import MIXED, clips_that_fit, flops, memory, traffic
from scaling4d.pretrain.plan.gpus import GPUS, NODE, UTILISATION, WRITE_GB_PER_S, Gpu
from scaling4d.pretrain.plan.work import Work, work_of
from scaling4d.pretrain.point import key_of, method_of, sections
from scaling4d.records import UserError

USABLE = 0.9  # ours: of a GPU's memory; the rest is for CUDA, NCCL and what the allocator cannot join
COUNTS = (8, 32, 64, 256, 1024)  # GPUs that the table shows
MOST_GPUS = 16384  # where the search for more shards ends
SECONDS_A_DAY = 86400
GIB = 2**30


@dataclass(frozen=True)
class Wish:
    """What a plan is made for.

    batch: clips a step, over all GPUs. parts: in which each GPU works off its clips, one after another. utilisation: share of the
    GPU's peak that all executed FLOPs, recomputed ones too, reach.
    """

    steps: int
    batch: int
    parts: int
    recompute: bool
    gpu: Gpu
    utilisation: float


def plan(
    point: str,
    *,
    mesh: str | None = None,
    batch: int | None = None,
    recompute: str = "none",
    gpu: str = "h100",
    utilisation: float = UTILISATION,
    write_gb_per_s: float = WRITE_GB_PER_S,
    dry: bool = False,
) -> dict[str, Any]:
    """Everything about a point, units in the names; keys as `scaling4d plan --json` prints them.

    The point is sought in params.yaml, then in profile paper, then in the others in turn; steps and parts of a batch are those of
    where it is found, mesh and batch, too, unless told.

    Args:
        mesh: SHARDSxREPLICAS. recompute: none, or block (every block's activations are made again in the backward pass).
        write_gb_per_s: of the file system, all GPUs together. dry: also step the real model, see pretrain.dry_run.
    Raises:
        UserError: no profile has such a point, or a mesh, batch, gpu or utilisation that cannot be.
    """
    given = {"recompute": _recompute(recompute), "gpu": _gpu(gpu), "utilisation": _share(utilisation)}
    asked = _mesh(mesh) if mesh else None
    if write_gb_per_s <= 0:
        raise UserError(f"--write-gb-per-s {write_gb_per_s}; needed more than 0")
    settings = _settings(point)
    training = config.section(settings, "pretrain.Training")
    shards, replicas = asked or _pinned(point, settings)
    parts = _sharding(point, settings)["accumulate"]
    wish = Wish(steps=training["steps"], batch=batch or training["batch"], parts=parts, **given)
    if problem := _misfit(wish, shards * replicas):
        raise UserError(problem)
    model = _model(point, settings)
    work = work_of(model)
    parameters = _parameters(model)
    found = {
        "point": point,
        "profile": settings["profile"],
        "method": type(model).__name__,
        "parameters": parameters,
        "tokens": {"visible": work.visible_tokens, "all": work.all_tokens, "coarse": work.coarse_tokens},
        **_counts(work, wish, model.flops_per_clip()),
        "gpu": asdict(wish.gpu),
        "utilisation": utilisation,
        "recompute": recompute,
        "accumulate": parts,
        "storage": _storage(parameters["total"], write_gb_per_s * 1e9),
        "mesh": _explained(work, wish, shards, replicas),
        "meshes": [_fastest(work, wish, gpus) for gpus in COUNTS],
    }
    if dry:
        found["dry_run"] = _dry(model, found, wish)
    return found


def _pinned(point: str, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Shards and replicas as the profile has them."""
    shards = _sharding(point, settings)["shards"]
    return shards, config.section(settings, "pretrain.Training.ranks") // shards


def _sharding(point: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.section(settings, f"{key_of(point, settings)}.Sharding")


def _parameters(model: nn.Module) -> dict[str, int]:
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    coarse = model.coarse_tokens.numel() if hasattr(model, "coarse_tokens") else 0
    total, backbone = count(model), count(model.encoder)
    return {"backbone": backbone, "coarse_tokens": coarse, "decoder": total - backbone - coarse, "total": total}


def _counts(work: Work, wish: Wish, model_flops: int) -> dict[str, Any]:
    """`model`: three forward passes, as pretraining reports them; the others: what is executed."""
    clip = flops(work, recompute=wish.recompute) | {"model": model_flops}
    clips = wish.steps * wish.batch
    return {
        "flops_per_clip": clip,
        "flops_per_step": {part: count * wish.batch for part, count in clip.items()},
        "schedule": {"steps": wish.steps, "batch": wish.batch, "clips": clips, "flops": clips * clip["total"]},
    }


def _storage(parameters: int, bytes_per_s: float) -> dict[str, float]:
    """A checkpoint holds the stored weights; the training state AdamW's two moments as well."""
    weights = MIXED.stored * parameters
    return {
        "checkpoint_bytes": weights,
        "training_state_bytes": 3 * weights,
        "write_bytes_per_s": bytes_per_s,
        "checkpoint_s": weights / bytes_per_s,
        "training_state_s": 3 * weights / bytes_per_s,
    }


def _on(work: Work, wish: Wish, shards: int, replicas: int) -> dict[str, Any]:
    """The plan on one mesh. Sending runs at the link's full speed behind the computing; the slower of the two sets the pace."""
    gpus, gpu = shards * replicas, wish.gpu
    clips = wish.batch // gpus
    held = memory(work, clips=clips // wish.parts, parts=wish.parts, shards=shards, recompute=wish.recompute)
    room = USABLE * gpu.memory_bytes
    sent = traffic(work, parts=wish.parts, shards=shards, replicas=replicas)
    compute = clips * flops(work, recompute=wish.recompute)["total"] / (gpu.bf16_flop_per_s * wish.utilisation)
    speed = {
        at: gpu.node_bytes_per_s if size <= NODE else gpu.network_bytes_per_s for at, size in (("in", shards), ("all", gpus))
    }
    sending = sent["shards_bytes"] / speed["in"] + sent["replicas_bytes"] / speed["all"]
    days = wish.steps * max(compute, sending) / SECONDS_A_DAY
    return {
        "shards": shards,
        "replicas": replicas,
        "gpus": gpus,
        "clips_per_gpu": clips,
        "memory_bytes": held,
        "usable_bytes": room,
        "fits": held["total"] <= room,
        "most_clips_per_gpu": _most(work, wish, shards),
        **sent,
        "compute_s": compute,
        "sending_s": sending,
        "step_s": max(compute, sending),
        "days": days,
        "gpu_hours": days * 24 * gpus,
    }


def _explained(work: Work, wish: Wish, shards: int, replicas: int) -> dict[str, Any]:
    """With `why` it does not fit, and `changes` that each make it fit, the nearest first; both empty where it does."""
    row = _on(work, wish, shards, replicas)
    if row["fits"]:
        return row | {"why": "", "changes": []}
    held = row["memory_bytes"]
    most = max((kind for kind in held if kind != "total"), key=held.__getitem__)
    why = (
        f"does not fit, because a GPU would hold {held['total'] / GIB:.1f} GiB of the {row['usable_bytes'] / GIB:.1f} GiB "
        f"usable on {wish.gpu.name} ({USABLE:.0%} of its memory), most of it {most} ({held[most] / GIB:.1f} GiB)"
    )
    return row | {"why": why, "changes": _changes(work, wish, shards, replicas)}


def _changes(work: Work, wish: Wish, shards: int, replicas: int) -> list[str]:
    """One change each that makes it fit; two together only where no single one does."""
    gpus, together = shards * replicas, replace(wish, recompute=True)
    single = _single_changes(work, wish, shards, replicas)
    if not wish.recompute:
        if _most(work, together, shards) >= wish.batch // gpus:
            return ["--recompute block", *single]
        if not single:
            return [f"--recompute block {change}" for change in _single_changes(work, together, shards, replicas)]
    return single


def _most(work: Work, wish: Wish, shards: int) -> int:
    """Clips of a batch that a GPU can take, in the wish's parts."""
    given = {"parts": wish.parts, "shards": shards, "recompute": wish.recompute}
    return wish.parts * clips_that_fit(work, room_bytes=USABLE * wish.gpu.memory_bytes, **given)


def _single_changes(work: Work, wish: Wish, shards: int, replicas: int) -> list[str]:
    gpus, found = shards * replicas, []
    fits: Callable[[int], int] = lambda n: _most(work, wish, n)  # noqa: E731
    clips = wish.batch // gpus
    more = next((n for n in range(2 * shards, gpus + 1) if gpus % n == 0 and n % shards == 0 and fits(n) >= clips), None)
    if more:
        found.append(f"--mesh {more}x{gpus // more} (more shards of the same GPUs)")
    most = fits(shards)
    if most:
        found.append(f"--batch {most * gpus} ({most} clips a GPU, largest batch that fits)")
    more = 2 * shards
    while more <= MOST_GPUS and wish.batch % (more * replicas * wish.parts) == 0:
        if fits(more) >= wish.batch // (more * replicas):
            found.append(f"--mesh {more}x{replicas} (more GPUs)")
            break
        more *= 2
    return found


def _fastest(work: Work, wish: Wish, gpus: int) -> dict[str, Any]:
    """Of the meshes of so many GPUs, the fastest that fits; where none does, all of them as shards, and why not."""
    if problem := _misfit(wish, gpus):
        whole = gpus * wish.parts
        return {"gpus": gpus, "fits": False, "why": problem, "changes": [f"--batch {-(-wish.batch // whole) * whole}"]}
    rows = [_on(work, wish, shards, gpus // shards) for shards in COUNTS if gpus % shards == 0]
    fitting = [row for row in rows if row["fits"]]
    if not fitting:
        return _explained(work, wish, gpus, 1)
    return min(fitting, key=lambda row: row["step_s"]) | {"why": "", "changes": []}


def _dry(model: nn.Module, found: dict[str, Any], wish: Wish) -> dict[str, Any]:
    """The dry run on the asked mesh, and by how much the closed form is above it (1: equal)."""
    from scaling4d.pretrain.plan.dry_run import dry_run

    mesh = found["mesh"]
    clips = mesh["clips_per_gpu"]
    given = {"clips": clips // wish.parts, "parts": wish.parts, "recompute": wish.recompute}
    ran = dry_run(model, shards=mesh["shards"], replicas=mesh["replicas"], **given)
    return ran | {
        "closed_form_to_dry_run": {
            "memory": mesh["memory_bytes"]["total"] / ran["memory_bytes"]["total"],
            "flops": clips * found["flops_per_clip"]["total"] / ran["flops"],
        }
    }


def _model(point: str, settings: Mapping[str, Any]) -> nn.Module:
    """The point's model on meta, with its teacher if it has one."""
    key = key_of(point, settings)
    section, method = config.section(settings, key), method_of(key, settings)
    given = {}
    if method == "Distilled":
        teacher = section[method]["teacher"]
        if teacher not in settings["points"]:
            raise UserError(f"{point} has teacher {teacher!r}, which profile {settings['profile']} has not; add it to points")
        given = {"taught_by": encoder_of(_model(teacher, settings))}
    config.bind(sections(point, settings))
    with torch.device("meta"):
        return config.build(METHODS[method], **given)


def _settings(point: str) -> dict[str, Any]:
    profiles = [path.stem for path in (config.EXPERIMENTS / "profile").glob("*.yaml")]
    profiles.sort(key=lambda profile: (profile != "paper", profile))
    known: set[str] = set()
    for profile in (None, *profiles):
        settings = config.read() if profile is None else config.compose([f"profile={profile}"])
        points = settings["points"] | settings["distilled"]
        if point in points:
            return settings
        known |= set(points)
    raise UserError(f"no profile has a point {point!r}; points: {', '.join(sorted(known))}")


def _mesh(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise UserError(f"--mesh {text!r}; needed SHARDSxREPLICAS, two numbers above 0 such as 256x1 or 8x32")
    return int(match[1]), int(match[2])


def _misfit(wish: Wish, gpus: int) -> str:
    whole, mesh = gpus * wish.parts, f"the {gpus} GPUs of the mesh" + (f", {wish.parts} parts each" if wish.parts > 1 else "")
    if wish.batch % whole == 0:
        return ""
    wrong = "is smaller than" if wish.batch < whole else "does not divide by"
    return f"a batch of {wish.batch} clips {wrong} {mesh}; set --batch to a multiple of {whole}, or --mesh"


def _recompute(text: str) -> bool:
    if text not in ("none", "block"):
        raise UserError(f"--recompute {text!r}; needed none or block")
    return text == "block"


def _gpu(name: str) -> Gpu:
    if name not in GPUS:
        raise UserError(f"unknown gpu {name!r}; needed one of {', '.join(GPUS)}")
    return GPUS[name]


def _share(utilisation: float) -> float:
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation {utilisation}; needed a share above 0 and at most 1")
    return utilisation
