"""scaling4d: scaling curves of masked video autoencoders, from videos to figures.

`scaling4d.load` gives the encoder of a checkpoint. It is imported at first use, since it needs torch.

"ours" in comments, docstrings and settings marks a choice of this project that no paper states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling4d.encoders.pretrained import load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from scaling4d.encoders import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
