"""A GPU that computes nothing: its tensors have a shape, a dtype and a device. An error in a backward pass aborts."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed import fake_pg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from scaling4d.training.fit import Batch, Callback, FitConfig, StepResult, fit
from scaling4d.training.observe import TrainingLog
from scaling4d.training.optimizer import ParamGroups

if torch.__version__ < "2.13":  # "2.10.0+cu128": that of requirements-cuda.lock
    pytest.skip("fake tensors of this torch know no all-reduce; requirements.lock has 2.13", allow_module_level=True)

DEVICE = "fakegpu"
PROCESSES = multiprocessing.get_context("forkserver")  # where no backward pass ran: autograd keeps the devices of its first
PRODUCTS = ("mm", "addmm")  # of linear layers; attention has no kernel on this device, and falls back to float32
LOSSES = ("mse_loss", "smooth_l1_loss", "huber_loss", "l1_loss")
STEPS = 2  # of `train`


def exit_code(work: Callable[[], object]) -> int:
    """Exit code of a function that can be pickled, in a process of its own."""
    PROCESSES.set_forkserver_preload(["fake_gpu"])
    child = PROCESSES.Process(target=work)
    child.start()
    child.join()
    return child.exitcode


class Stream:
    """A stream, or an event in one. Has no `synchronize`: a step that calls it fails.

    waited: for these streams. recorded: the stream of an event. copied: shapes of tensors of the CPU that were copied
    in it. used: shapes of tensors whose memory waits for it.
    """

    def __init__(self, **_: object) -> None:
        self.waited: list[Stream] = []
        self.recorded: list[Stream] = []
        self.copied: list[tuple[int, ...]] = []
        self.used: list[tuple[int, ...]] = []

    def wait_stream(self, stream: "Stream") -> None:
        self.waited.append(stream)

    def wait_event(self, event: "Stream") -> None:
        self.waited += event.recorded

    def record_event(self) -> "Stream":
        event = Stream()
        event.record(self)
        return event

    def record(self, stream: "Stream | None" = None) -> None:
        self.recorded = [stream or torch.get_device_module(DEVICE).current_stream()]


class Module(_DummyBackendModule):
    """The parts of torch.cuda that FSDP and checkpointing use."""

    Stream = Event = Stream

    def __init__(self) -> None:
        self.streams = [Stream()]

    def current_stream(self) -> Stream:
        return self.streams[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.streams.append(stream)
        yield
        self.streams.pop()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Operations(TorchDispatchMode):
    """Notes operations for which the CPU waits for the device, and the dtypes of linear layers on it.

    It waits for copies to the CPU, and for copies to the device that are not `non_blocking`. Values that Python reads
    (`.item()`, `if tensor`) are an error of FakeTensorMode. all_reduces: of each, its stream, and how often the
    computing had waited for that stream before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.linear_dtypes: set[torch.dtype] = set()
        self.all_reduces: list[tuple[Stream, int]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes again as the operations on its shard
        name, given = operation._schema.name.removeprefix("aten::"), kwargs or {}
        out = operation(*args, **given)
        if name in ("_to_copy", "copy_"):
            source, blocking = args[name == "copy_"], not (given.get("non_blocking") or args[2:3] == (True,))
            if source.device.type != out.device.type and (blocking or out.device.type == "cpu"):
                self.waits.append(f"copy of {tuple(source.shape)} from {source.device} to {out.device}")
            if source.device.type == "cpu" and out.device.type == DEVICE:
                torch.get_device_module(DEVICE).current_stream().copied.append(tuple(source.shape))
        if name in ("index", "index_put", "index_put_") and args[0].device.type == DEVICE:
            self.waits += [f"{name} by a tensor of the CPU" for index in args[1] if index is not None and index.is_cpu]
        if name.startswith(LOSSES):  # their backward passes of mixed types fail in torch 2.10, that of requirements-cuda.lock
            (_,) = {value.dtype for value in args if isinstance(value, torch.Tensor)}
        if name == "c10d::allreduce_":
            stream = torch.get_device_module(DEVICE).current_stream()
            self.all_reduces.append((stream, torch.get_device_module(DEVICE).streams[0].waited.count(stream)))
        if name in PRODUCTS and out.device.type == DEVICE:
            self.linear_dtypes |= {value.dtype for value in args if isinstance(value, torch.Tensor)}
        return out


@contextmanager
def on_fake_gpu(ranks: int = 1) -> Iterator[Operations]:
    """New tensors are fake, and DEVICE is one of `ranks` GPUs, of ranks that do not exist. For a process of its own."""
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

    make_mesh = device_mesh.init_device_mesh

    def real_mesh(*arguments: Any, **named: Any) -> device_mesh.DeviceMesh:
        with unset_fake_temporarily():
            return make_mesh(*arguments, **named)

    _setup_privateuseone_for_python_backend(DEVICE, backend_module=Module())
    dist.Backend.register_backend("fake", fake_pg._create_fake_pg, extended_api=True, devices=["cpu", DEVICE])
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=ranks)
    device_mesh.init_device_mesh = real_mesh
    torch.Tensor.record_stream = lambda self, stream: stream.used.append(tuple(self.shape))
    with FakeTensorMode(allow_non_fake_inputs=True), Operations() as operations:
        yield operations


class Stop(Callback):
    """Ends a training after STEPS steps, before anything is logged; a loss and a norm lie on the device."""

    def after_step(self, result: StepResult) -> bool:
        for value in (result.loss, result.grad_norm):
            assert (value.device.type, value.dtype) == (DEVICE, torch.float32)
        return result.step == STEPS


def train(
    model: torch.nn.Module, batch: Batch, groups: ParamGroups, *, accumulate: int = 1, clip_norm: float = 1.0, log_every: int = 9
) -> None:
    """Steps of `fit`, with its log. Gradients, weights and moments are float32 on the device."""
    schedule = {"steps": 9, "warmup_steps": 1, "log_every": log_every, "save_every": 9, "batch": 8}
    numbers = {"betas": (0.9, 0.95), "weight_decay": 0.05, "clip_norm": clip_norm, "seed": 0, "accumulate": accumulate}
    config = FitConfig(name="fake", rate_setting="", device=DEVICE, **schedule, **numbers)

    def batches(start: int) -> Iterator[Batch]:
        while True:
            yield batch

    fit(model, batches, config, param_groups=groups, callbacks=[TrainingLog(config), Stop()])
    for parameter in model.parameters():
        assert (parameter.device.type, parameter.dtype) == (DEVICE, torch.float32)
