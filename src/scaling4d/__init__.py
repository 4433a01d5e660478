"""scaling4d: scaling curves of masked video autoencoders, from videos to figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"


def load(checkpoint: str | Path) -> nn.Module:
    """The encoder of a Checkpoint folder, or of a model in artifacts/<profile>/pretrain by its name, ready to use.

    It has `features(pixels)`, pixels `B T H W 3` uint8 or float in 0..1 -> one `B N D` a layer; `resize((T, H, W))` for
    clips of another size; and `width`, `depth`, `grid`, `clip`.
    Raises:
        UserError: no such checkpoint, or weights that do not fit what its config.json says.
    """
    from scaling4d.encoders.pretrained import load_encoder
    from scaling4d.records import UserError

    folder = Path(checkpoint)
    if not folder.is_dir():
        there = sorted(Path("artifacts").glob("*/pretrain/*"))
        found = [path for path in there if path.name == str(checkpoint)]
        if len(found) != 1:
            names = ", ".join(map(str, found or there)) or "none here"
            raise UserError(f"{len(found)} checkpoints are called {str(checkpoint)!r}; needed a folder, such as {names}")
        (folder,) = found
    return load_encoder(folder).eval()
