"""Tiny random models of every kind that transformers has, and their preprocessors."""

from pathlib import Path

import torch
from torch import nn

from scaling4d.encoders import torchvision_shim

torchvision_shim.declare_operators()
import transformers as tf  # noqa: E402  after the declaration, without which it cannot be imported

FRAMES = 4
SHAPE = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
MLP = {"intermediate_size": 48}
TEXT = {**SHAPE, **MLP, "vocab_size": 40, "max_position_embeddings": 8, "projection_size": 24}
CROPPED = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
SQUARE = {"size": {"height": 32, "width": 32}}
DECODER = {"decoder_hidden_size": 12, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
PREDICTOR = {"pred_hidden_size": 12, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1, "pred_num_mask_tokens": 2}
PRISM = {"hidden_size": 24, "num_attention_heads": 2, "num_spatial_layers": 2, "num_temporal_layers": 1}
MODELS: dict[str, tuple] = {  # model, its config, preprocessor, patch
    "dinov2": (  # positions 3 x 3, pictures 2 x 2, as released
        *(tf.Dinov2Model, tf.Dinov2Config(**SHAPE, image_size=42, patch_size=14)),
        *(tf.BitImageProcessor(crop_size={"height": 28, "width": 28}), (1, 14, 14)),
    ),
    "dinov2_with_registers": (
        *(tf.Dinov2WithRegistersModel, tf.Dinov2WithRegistersConfig(**SHAPE, image_size=32, patch_size=8, num_register_tokens=3)),
        *(tf.BitImageProcessor(**CROPPED), (1, 8, 8)),
    ),
    "dinov3_vit": (
        *(tf.DINOv3ViTModel, tf.DINOv3ViTConfig(**SHAPE, **MLP, image_size=16, patch_size=8, num_register_tokens=2)),
        *(tf.DINOv3ViTImageProcessor(**SQUARE), (1, 8, 8)),
    ),
    "siglip": (
        *(tf.SiglipModel, tf.SiglipConfig(vision_config={**SHAPE, **MLP, "image_size": 32, "patch_size": 8}, text_config=TEXT)),
        *(tf.SiglipImageProcessor(**SQUARE), (1, 8, 8)),
    ),
    "siglip2": (
        *(tf.Siglip2Model, tf.Siglip2Config(vision_config={**SHAPE, **MLP, "num_patches": 9, "patch_size": 8}, text_config=TEXT)),
        *(tf.Siglip2ImageProcessor(patch_size=8, max_num_patches=16), (1, 8, 8)),
    ),
    "videomae": (
        tf.VideoMAEForPreTraining,
        tf.VideoMAEConfig(
            **SHAPE, **MLP, **DECODER, decoder_intermediate_size=24, image_size=32, patch_size=8, num_frames=FRAMES
        ),
        *(tf.VideoMAEImageProcessor(**CROPPED), (2, 8, 8)),
    ),
    "vjepa2": (
        *(tf.VJEPA2Model, tf.VJEPA2Config(**SHAPE, **PREDICTOR, crop_size=32, patch_size=8, frames_per_clip=8)),
        *(tf.VJEPA2VideoProcessor(crop_size=32), (2, 8, 8)),
    ),
    "videoprism_vision_model": (
        *(tf.VideoPrismVisionModel, tf.VideoPrismVisionConfig(**PRISM, **MLP, image_size=36, num_frames=FRAMES)),
        *(tf.LlavaOnevisionVideoProcessor(size={"height": 36, "width": 36}, do_normalize=False), (1, 18, 18)),
    ),
}


def save_model(folder: Path, kind: str) -> tuple[nn.Module, object, tuple[int, int, int]]:
    """Model, preprocessor and patch of a kind. No weight is left at a value that hides a mistake."""
    torch.manual_seed(0)
    model_class, shape, processor, patch = MODELS[kind]
    model = model_class(shape)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    for part in (model, processor):
        part.save_pretrained(folder)
    return model.eval(), processor, patch
