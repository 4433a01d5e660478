"""scaling4d: scaling curves of masked video autoencoders, from videos to figures.

`Encoder` is an encoder of video, by folder or hub id; `read_video` reads frames for it. Both are imported at first use,
since they need torch and PyAV.

"ours" in comments, docstrings and settings marks a choice of this project that no paper states.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling4d.encoders.encoder import Encoder, EncoderOutput
    from scaling4d.video import read_video

__version__ = "0.2.0"
__all__ = ["Encoder", "EncoderOutput", "read_video"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("scaling4d.video" if name == "read_video" else "scaling4d.encoders.encoder"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
