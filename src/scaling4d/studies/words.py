"""Words for metrics and encoders on every page. A metric has a direction and a unit."""

from __future__ import annotations

WORDS = {  # metric -> words, direction, unit
    "val_loss": ("validation loss of pretraining", "↓", ""),
    "train_loss": ("training loss", "↓", ""),
    "rankme": ("effective rank of features, RankMe", "↑", ""),
    "masked_mse": ("squared error of hidden pixels", "↓", "(0..1)²"),
    "moving_mse": ("squared error of hidden pixels that move", "↓", "(0..1)²"),
    "psnr_db": ("signal-to-noise ratio of hidden pixels, PSNR", "↑", "dB"),
    "top1": ("top-1 accuracy of actions", "↑", "share"),
    "top1_mean": ("top-1 accuracy of naming always the most frequent action", "↑", "share"),
    "mean_iou": ("overlap of tracked boxes, mean IoU", "↑", "share"),
    "mean_iou_per_object": ("overlap of tracked boxes, mean IoU over objects", "↑", "share"),
    "mean_iou_propagated": ("overlap of propagated boxes, mean IoU", "↑", "share"),
    "mean_iou_first_box_repeated": ("mean IoU if the first box is repeated", "↑", "share"),
    "abs_rel": ("relative error of depth, AbsRel", "↓", "ratio"),
    "abs_rel_mean": ("AbsRel of the mean depth of training clips", "↓", "ratio"),
    "delta1": ("pixels with a depth within a factor of 1.25, δ1", "↑", "share"),
    "average_jaccard": ("tracked points, average Jaccard", "↑", "share"),
    "average_jaccard_standing_still": ("average Jaccard of points if none moves", "↑", "share"),
    "delta_avg": ("visible points within 1 to 16 px, δ average", "↑", "share"),
    "delta_avg_standing_still": ("δ average of points if none moves", "↑", "share"),
    "occlusion_accuracy": ("occlusion accuracy of points", "↑", "share"),
    "occlusion_accuracy_standing_still": ("occlusion accuracy of points if all are visible", "↑", "share"),
    "distance_px256": ("distance of points", "↓", "px of a side of 256"),
    "distance_px256_standing_still": ("distance of points if none moves", "↓", "px of a side of 256"),
    "epe": ("end-point error of the camera's motion, EPE", "↓", "scene units"),
    "epe_so3": ("EPE with the nearest rotation", "↓", "scene units"),
    "epe_standing_still": ("EPE of a camera that stands still", "↓", "scene units"),
    "rotation_error_deg": ("error of the camera's rotation", "↓", "degrees"),
    "translation_error": ("error of the camera's translation", "↓", "scene units"),
}
SETS = {"fid": ("FID", "↓"), "kid": ("KID", "↓"), "precision": ("precision", "↑"), "recall": ("recall", "↑")}
FEATURES = {"frame": "frames", "clip": "whole clips", "inception": "frames, Inception", "checkpoint": "whole clips, checkpoint"}
FIDELITY = {  # metrics of sets of frames and clips
    f"{kind}_{metric}": (f"{words} of {features}", direction, "")
    for kind, features in FEATURES.items()
    for metric, (words, direction) in SETS.items()
}
WORDS |= FIDELITY
METRIC_LABELS = {metric: f"{words} {direction}" for metric, (words, direction, _) in WORDS.items()}


def metric_words(metric: str) -> str:
    """Words of a metric without its direction; of one that WORDS does not have, its name.

    The metrics of a linear probe end with `_linear`, or with `_linear_300` where it has 300 training clips.
    """
    base, probe, clips = metric.partition("_linear")
    if base not in WORDS:
        return metric.replace("_", " ")
    return WORDS[base][0] + (f", linear probe{f' of {clips[1:]} clips' if clips else ''}" if probe else "")


def measure(metric: str, direction: str = "") -> str:
    """Words and direction of a metric. direction: of a metric that WORDS does not have."""
    _, known, _ = WORDS.get(metric.partition("_linear")[0], ("", direction, ""))
    return f"{metric_words(metric)} {known}".rstrip()


def measure_head(metric: str) -> str:
    """Head of a column: `measure` and, on a second line, the unit if WORDS has one."""
    _, _, unit = WORDS.get(metric.partition("_linear")[0], ("", "", ""))
    return measure(metric) + (f"\n{unit}" if unit else "")


def encoder_words(encoder: str) -> str:
    """`untrained_mini` as `untrained mini`, `pixels` as `raw pixels`; other encoders have names of their own."""
    if encoder.startswith("untrained_"):
        return encoder.replace("_", " ", 1)
    return "raw pixels" if encoder == "pixels" else encoder
