"""Visible tokens by every masking strategy."""

import re

import pytest
import small_encoder
import torch

from scaling4d import seeds
from scaling4d.mae.masking import STRATEGIES, random_masking, visible_token_count
from scaling4d.records import UserError

GRID = (8, 4, 6)


def draw(strategy: str, mask_ratio: float = 0.9, batch: int = 8) -> torch.Tensor:
    """`B t h w`, true where a token is visible."""
    masked = random_masking(strategy, batch=batch, grid=GRID, mask_ratio=mask_ratio, rng=seeds.torch_rng(1, "mask", 3))
    ids_keep = masked.ids_keep
    assert ids_keep.shape == (batch, visible_token_count(strategy, GRID, mask_ratio))
    assert torch.equal(ids_keep, ids_keep.sort(dim=1).values)
    return torch.zeros(batch, masked.token_count, dtype=torch.bool).scatter(1, ids_keep, True).reshape(batch, *GRID)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("mask_ratio", [0.5, 0.75, 0.9])
def test_masks_have_one_size_differ_between_clips_and_repeat_with_the_seed(strategy: str, mask_ratio: float) -> None:
    masks = draw(strategy, mask_ratio)
    assert (masks.flatten(1).sum(1) == visible_token_count(strategy, GRID, mask_ratio)).all()
    assert torch.equal(masks, draw(strategy, mask_ratio))
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 2


@pytest.mark.integration
@pytest.mark.parametrize(("strategy", "tolerance"), [("random", 0.06), ("tube", 0.06), ("frame", 0.06), ("block", 0.09)])
def test_every_token_is_visible_about_as_often_as_the_ratio_says(strategy: str, tolerance: float) -> None:
    share = draw(strategy, 0.75, batch=1000).float().mean(0)
    assert (share - 0.25).abs().max() < tolerance


def test_tubes_are_the_same_in_every_frame_and_frames_are_whole() -> None:
    tube, frame = draw("tube"), draw("frame")
    assert (tube == tube[:, :1]).all()
    assert tube[:, 0].flatten(1).sum(1).tolist() == [2] * 8  # of 24 places, a tenth
    assert (frame == frame[:, :, :1, :1]).all()
    assert frame[:, :, 0, 0].sum(1).tolist() == [1] * 8  # of 8 frames


def test_blocks_hide_tokens_whose_neighbours_are_hidden_too() -> None:
    def neighbours(visible: torch.Tensor) -> float:
        hidden = ~visible
        pairs = [hidden[:, 1:] & hidden[:, :-1], hidden[:, :, 1:] & hidden[:, :, :-1], hidden[:, :, :, 1:] & hidden[:, :, :, :-1]]
        return sum(pair.sum().item() for pair in pairs) / hidden.sum().item()

    assert neighbours(draw("block", 0.5, 64)) > 1.3 * neighbours(draw("random", 0.5, 64))


@pytest.mark.parametrize(("strategy", "mask_ratio", "message"), [
    ("random", 0.999, "mask_ratio = 0.999 keeps 0 of 192 tokens; set it in (0, 1) so that some are kept and some hidden"),
    ("tube", 0.99, "mask_ratio = 0.99 keeps 0 of 24 places; set it in (0, 1) so that some are kept and some hidden"),
    ("frame", 0.95, "mask_ratio = 0.95 keeps 0 of 8 frames; set it in (0, 1) so that some are kept and some hidden"),
    ("frame", 0.05, "mask_ratio = 0.05 keeps 8 of 8 frames; set it in (0, 1) so that some are kept and some hidden"),
    ("block", 1.0, "mask_ratio = 1.0 keeps 0 of 192 tokens; set it in (0, 1) so that some are kept and some hidden"),
    ("rows", 0.9, "masking = 'rows'; needed one of random, tube, frame, block"),
])  # fmt: skip
def test_masking_all_or_none_or_by_an_unknown_strategy_names_the_setting(strategy: str, mask_ratio: float, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        random_masking(strategy, batch=1, grid=GRID, mask_ratio=mask_ratio, rng=seeds.torch_rng(0))


@pytest.mark.parametrize(("name", "mask_ratio", "kept"), [("MAEST", 0.95, 0), ("SimpleMAE", 0.001, 18)])  # 0.9 and 17.98 tokens
def test_the_settings_of_a_method_are_refused_by_the_rounding_of_its_mask(name: str, mask_ratio: float, kept: int) -> None:
    other = {"MAEST": "SimpleMAE", "SimpleMAE": "MAEST"}[name]
    assert small_encoder.model(other, clip=small_encoder.CLIP, mask_ratio=mask_ratio).visible_token_count > 0
    with pytest.raises(UserError, match=f"^mask_ratio = {mask_ratio} keeps {kept} of 18 tokens; "):
        small_encoder.model(name, clip=small_encoder.CLIP, mask_ratio=mask_ratio)


def test_numbers_of_visible_tokens_are_those_of_both_papers_code() -> None:
    grid = (8, 14, 14)
    assert visible_token_count("random", grid, 0.95) == 78  # 4DS
    assert visible_token_count("random", grid, 0.9, round_down=True) == 156  # MAE-ST
    assert visible_token_count("random", (2, 4, 5), 0.9, round_down=True) == 3  # 1 - 0.9 is less than a tenth, there as here
