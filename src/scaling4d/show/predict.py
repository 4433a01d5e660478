"""CHECKPOINT, VIDEO -> FEATURES AND PREDICTIONS, as one `.npz`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scaling4d.checkpoint import Checkpoint
from scaling4d.encoders.arrays import write_npz
from scaling4d.encoders.encoder import Encoder
from scaling4d.encoders.features import layer_index, split_time
from scaling4d.features.inputs import first_clip, read_array, read_clips
from scaling4d.features.video_features import bind_features
from scaling4d.provenance import atomic_new
from scaling4d.readout import released_heads
from scaling4d.readout.released_heads import ReleasedReadout
from scaling4d.records import UserError
from scaling4d.show.trained import TrainedReadout, load_trained_readout


@torch.no_grad()
def write_features(
    checkpoint: str | Path,
    video: Path,
    out: Path,
    *,
    frames: int | None = None,
    side_px: int | None = None,
    rate_hz: float | None = None,
    fit: str = "crop",
    queries: Path | None = None,
) -> list[str]:
    """Write `layer_00` ... `layer_LL`, `last_hidden_state`, each `B N D`, and a readout's `output`. Returns the names.

    The layers are EncoderOutput.hidden_states: of 4DS and MAE-ST `layer_02` is the input of block 2, that is the output
    of block 1, which write_video_features calls `layer_01`.
    Positions are resized where the clips have another size than the checkpoint's. Readouts of fixed places refuse such
    clips.

    Args:
        checkpoint: as of Encoder.from_pretrained, or the folder of a frozen readout in artifacts/ (its encoder is used
            then, at the rate of its task).
        video: a video file, of which the first window is taken, or a `.npy` of clips, see features.inputs.read_clips.
        frames, side_px, rate_hz, fit: of the window, see bind_features.
        queries: `.npy`, `Q 2` or `Q 4` in 0..1, for a readout that tracks; refused for any other.
    Raises:
        UserError: `out` exists, not a checkpoint, not clips, values outside 0..1, a video that is too short, no rate,
            or queries that do not fit or that nothing takes.
    """
    with atomic_new(out) as partial:
        folder = Path(checkpoint)
        trained = load_trained_readout(folder) if (folder / "result.json").is_file() else None
        released = None if trained else released_heads.read_readout(folder)
        head = released_heads.load_readout(folder, released) if released else None
        if trained:
            encoder = Encoder(trained.encoder, Checkpoint.read(trained.checkpoint))
            encoder.rate_hz = trained.model.task.rate_hz
        else:
            encoder = Encoder.from_pretrained(checkpoint)
        places = None  # 1 Q n
        if queries is not None and not _takes_queries(trained, released):
            raise UserError(f"{checkpoint} has no readout that takes queries; leave out --queries")
        if queries is not None:
            places = torch.from_numpy(read_array(queries, axes=2).astype(np.float32))[None]
            if not ((places >= 0) & (places <= 1)).all():
                raise UserError(
                    f"{queries}: values from {places.min():g} to {places.max():g}; needed places in 0..1 of the picture"
                )
        native, single = encoder.clip, {"layers": (), "tokens": True, "dtype": "float32", "stride_s": None}
        if video.suffix == ".npy":
            if frames or side_px or rate_hz or fit != "crop":
                raise UserError(f"{video} is taken as it is; leave out --frames, --side-px, --rate-hz and --fit")
            pixels = read_clips(video)
        else:
            settings = bind_features(encoder, rate_hz=rate_hz, frames=frames, side_px=side_px, fit=fit, **single)
            pixels = first_clip(video, settings.windows)
        if (trained or released and released.kind == "depth") and tuple(pixels.shape[1:4]) != native:
            raise UserError(f"{video}: clips T H W = {tuple(pixels.shape[1:4])}; this readout predicts for {native} only")
        encoder.resize(tuple(pixels.shape[1:4]))
        features = encoder(pixels)
        layers = list(features.hidden_states)
        arrays = {f"layer_{i:02d}": layer.numpy() for i, layer in enumerate(layers)}
        arrays["last_hidden_state"] = features.last_hidden_state.numpy()
        if trained:
            arrays["output"] = _predict(trained, layers, pixels, places).numpy()
        elif released:
            arrays["output"] = released_heads.predict(released, head, encoder.model, layers, pixels, places).numpy()
        write_npz(partial, arrays.items())
    return list(arrays)


def _takes_queries(trained: TrainedReadout | None, released: ReleasedReadout | None) -> bool:
    if trained:
        return trained.model.task.queries(trained.encoder.clip).coordinates > 0
    return released is not None and (released.kind == "tracking" or released.settings.get("query_width", 0) > 0)


def _predict(trained: TrainedReadout, layers: list[Tensor], pixels: Tensor, queries: Tensor | None) -> Tensor:
    """Class scores, boxes `B Q T 4`, metres `B T H W`, points `B Q T 4`, or the pose `B 3 4`."""
    encoder, model = trained.encoder, trained.model
    target, coordinates = {"depth_m": pixels[..., 0]}, model.task.queries(encoder.clip).coordinates  # of depth only its shape
    if coordinates:
        if queries is None or queries.shape[-1] != coordinates:
            raise UserError(
                f"readouts of {trained.result.task} need objects of the first frame, Q {coordinates}; correct --queries"
            )
        first = queries.expand(len(pixels), -1, -1)[:, :, None]  # B Q 1 n
        target |= {"points": first, "boxes": first}
    features = layers[layer_index(depth=encoder.depth)]
    return model.predict(split_time(features, encoder.grid), target)
