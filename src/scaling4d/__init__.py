"""scaling4d: scaling curves of masked video autoencoders, from videos to figures."""

__version__ = "0.1.0"
