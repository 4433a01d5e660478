"""ENCODER -> PROGRAM: a graph that runs without this package, of torch.export (`.pt2`) or ONNX."""

from __future__ import annotations

import importlib
import math
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from scaling4d.encoders.encoder import Encoder
from scaling4d.encoders.transformers import PretrainedEncoder
from scaling4d.mae.encoder import Backbone
from scaling4d.mae.resize import cubic_weights
from scaling4d.provenance import atomic_new
from scaling4d.records import UserError, pip_install, shortened

INPUT, OUTPUTS = "clips", ["last_hidden_state", "pooled"]
MOST_PATCHES = 4096  # of a clip in time
MOST_ONNX_BYTES = 1536 * 2**20  # above, torch writes weights to a second file in any case


class ClipProgram(nn.Module):
    """Clips uint8 `B T H W 3` -> last_hidden_state `B N D` and pooled `B D`, as in EncoderOutput."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.model, Backbone):
            last = self.model.last_tokens(clips)[:, self.model.prefix_tokens :]
        elif isinstance(self.model, PretrainedEncoder):
            last = _last_of_pretrained(self.model, clips)
        else:
            last = self.model.features(clips)[-1]
        return last, last.mean(1)


def _last_of_pretrained(model: PretrainedEncoder, clips: Tensor) -> Tensor:
    """The last of `features`, whose `len(pixels)` would fix the batch of a program."""
    pixels, video = model.preprocess(clips), model.family.video
    *_, last = model.family.states(model.network, pixels if video else pixels.flatten(0, 1))
    tokens = math.prod(model.grid if video else model.grid[1:])
    return last[:, -tokens:].reshape(clips.shape[0], -1, model.width)


class AnyLengthProgram(nn.Module):
    """ClipProgram of 4DS or MAE-ST for clips of any T, with positions in time interpolated as `Encoder.resize` does."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.program = ClipProgram(model)
        names = ("model.positions", "model.positions.pos_embed", "model.positions.temporal")  # t*h*w D, or t D
        self.tables = [name for name, _ in self.program.named_parameters() if name in names]

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        model = self.program.model
        given, wanted, tables = model.grid[0], clips.shape[1] // model.patch[0], {}
        for name in self.tables:
            x = self.program.get_parameter(name).reshape(given, -1)
            weights = cubic_weights.__wrapped__(wanted, given)  # its cache cannot hold a symbol
            tables[name] = (weights.to(x) @ x).reshape(-1, model.width)
        return functional_call(self.program, tables, (clips,))


def export_program(encoder: Encoder, *, any_length: bool) -> torch.export.ExportedProgram:
    """A program for batches of any size, on the CPU, in float32.

    any_length: also for clips of any T, a multiple of the patch and at least two patches; else of the encoder's T.
    Raises UserError: any_length, and the encoder takes one T only; or torch cannot trace the model.
    """
    model, shapes = encoder.model, {0: torch.export.Dim.DYNAMIC}
    if any((weight.device.type, weight.dtype) != ("cpu", torch.float32) for weight in model.parameters()):
        model = deepcopy(model).to("cpu", torch.float32)
    if any_length and not isinstance(model, Backbone):
        raise UserError(
            f"a {type(model).__name__} is exported for clips of {encoder.clip[0]} frames only; leave out --any-length"
        )
    if any_length:
        shapes[1] = model.patch[0] * torch.export.Dim("t", min=2, max=MOST_PATCHES)
    training = model.training
    program = (AnyLengthProgram if any_length else ClipProgram)(model).eval()
    frames = max(encoder.clip[0], 2 * model.patch[0]) if any_length else encoder.clip[0]
    clips = torch.zeros(2, frames, *encoder.clip[1:], 3, dtype=torch.uint8)
    try:
        with torch.no_grad():
            return torch.export.export(program, (clips,), dynamic_shapes=(shapes,))
    except RuntimeError as error:
        kind = getattr(model, "kind", type(model).__name__)
        raise UserError(f"torch.export cannot trace a {kind}: {shortened(error)}") from error
    finally:
        model.train(training)


def run(checkpoint: str, *, torch_file: Path | None, onnx_file: Path | None, any_length: bool) -> None:
    """Command `export`.

    Raises UserError: no new .pt2 or .onnx, no folder for it, no package onnxscript, an encoder too large for it, and as
    export_program.
    """
    for option, path, suffix in (("--torch", torch_file, ".pt2"), ("--onnx", onnx_file, ".onnx")):
        if path and (path.suffix != suffix or path.exists()):
            raise UserError(f"{option} {path}{' exists' * path.exists()}; needed a new file that ends with {suffix}")
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"{option} {path}: no folder {path.parent}; make it first")
    if onnx_file:
        try:
            importlib.import_module("onnxscript")
        except ImportError as error:
            raise UserError(f"--onnx {onnx_file}: needed onnxscript; {pip_install('export')}") from error
    encoder = Encoder.from_pretrained(checkpoint)
    size = sum(4 * tensor.numel() for tensor in encoder.state_dict().values())  # bytes of float32
    if onnx_file and size > MOST_ONNX_BYTES:
        most = f"one .onnx file holds {MOST_ONNX_BYTES / 1e9:.1f} GB"
        raise UserError(f"--onnx {onnx_file}: the weights have {size / 1e9:.1f} GB, {most}; --torch writes the same program")
    program = export_program(encoder, any_length=any_length)
    for write, path in ((write_torch, torch_file), (write_onnx, onnx_file)):
        if path:
            write(program, path)
            print(f"wrote {path}")


def write_torch(program: torch.export.ExportedProgram, out: Path) -> None:
    """`torch.export.load(out).module()(clips)` runs it."""
    with atomic_new(out) as partial:
        torch.export.save(program, partial)


def write_onnx(program: torch.export.ExportedProgram, out: Path) -> None:
    """Input `clips`, outputs as OUTPUTS. Raises UserError: the model has an operator that ONNX lacks."""
    with atomic_new(out) as partial:
        try:
            torch.onnx.export(
                program, f=partial, input_names=[INPUT], output_names=OUTPUTS, dynamo=True, external_data=False, verbose=False
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(f"--onnx {out}: {shortened(error)}; --torch writes the same program") from error
