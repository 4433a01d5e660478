"""Renders labelled 4D worlds in the benchmarks' own formats: this made `experiments/pocket`."""

from scaling4d.scenes.dataset import Render, render

__all__ = ["Render", "render"]
