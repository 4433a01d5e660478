"""Settings of an encoder that computes in milliseconds, without its clip."""

SMALL = {"width": 24, "depth": 3, "heads": 2, "mlp": 48, "patch": (2, 16, 16), "pixel_mean": 0.4, "pixel_scale": 2.0}
