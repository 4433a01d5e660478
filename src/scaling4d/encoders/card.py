"""The model card: README.md in a Checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling4d.checkpoint import Checkpoint
from scaling4d.provenance import flatten

CARD = "README.md"
TEXT = """---
library_name: scaling4d
tags:
- video{tags}
---

# {name}

{what} It turns a clip into tokens.

| | |
|---|---|
| clip, frames x height x width | {clip} |
| frames per second | {rate} |
| pixels x in 0..1 become | (x - mean) * scale, mean {mean}, scale {scale} |
| training | {training} |

```python
import scaling4d

encoder = scaling4d.Encoder.from_pretrained("PATH or owner/name"){set_rate}
video = scaling4d.read_video("VIDEO", rate_hz=encoder.rate_hz, frames=encoder.clip[0])  # uint8 T H W C
output = encoder(encoder.preprocess(video))  # last_hidden_state B N D, hidden_states, pooled B D
```
"""
SET_RATE = "\nencoder.rate_hz = RATE_HZ  # frames per second that you choose: those of its clips are not known"
UNKNOWN = "not known"


def write_model_card(
    folder: Path,
    checkpoint: Checkpoint,
    provenance: Mapping[str, Any],
    *,
    mean: float | tuple[float, ...],
    scale: float | tuple[float, ...],
) -> None:
    """Write README.md: a checkpoint, and the facts in its provenance.json; if empty: that its origin is not known."""
    (folder / CARD).write_text(_model_card(checkpoint, provenance, mean, scale))


def _model_card(
    checkpoint: Checkpoint, provenance: Mapping[str, Any], mean: float | tuple[float, ...], scale: float | tuple[float, ...]
) -> str:
    trained = f"{checkpoint.step:,} steps, {checkpoint.clips_seen:,} clips" if checkpoint.step else "none by scaling4d"
    text = TEXT.format(
        name=checkpoint.name,
        what=_what(checkpoint, provenance),
        tags="" if provenance.get("stage") == "baseline" else "\n- masked-autoencoder",
        set_rate=SET_RATE if checkpoint.rate_hz is None else "",
        clip=" x ".join(map(str, checkpoint.settings["clip"])),
        rate=UNKNOWN if checkpoint.rate_hz is None else f"{checkpoint.rate_hz:g}",
        mean=_numbers(mean),
        scale=_numbers(scale),
        training=trained,
    )
    if not provenance:
        return f"{text}\n## Origin\n\n{UNKNOWN.capitalize()}: the checkpoint had no provenance.json.\n"
    facts = {"stage": provenance.get("stage")} | dict(flatten({"inputs": provenance.get("inputs") or {}}))
    facts["code"] = (provenance.get("code") or {}).get("sha256")
    facts |= dict(flatten({"settings": provenance.get("settings") or {}}))
    rows = [f"| {key} | `{json.dumps(value)}` |" for key, value in facts.items() if value not in (None, {})]
    return "\n".join([text, "## Origin", "", "As in provenance.json.", "", "| | |", "|---|---|", *rows, ""])


def _what(checkpoint: Checkpoint, provenance: Mapping[str, Any]) -> str:
    """Of stage `baseline`, only published encoders have inputs: their files."""
    sized, compare = f"{checkpoint.model} with {checkpoint.parameters:,}", "to compare trained ones with"
    if provenance.get("stage") != "baseline":
        return f"An encoder of video, {sized} parameters."
    if checkpoint.model == "PixelTokens":
        return f"Raw pixels as an encoder of video, {checkpoint.model} without parameters, {compare}."
    if provenance.get("inputs"):
        return f"A published encoder of video, {sized} parameters."
    return f"An untrained encoder of video, {sized} random parameters, {compare}."


def _numbers(value: float | tuple[float, ...]) -> str:
    return ", ".join(f"{number:g}" for number in (value if isinstance(value, tuple) else (value,)))
