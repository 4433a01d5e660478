"""Which tokens are kept, by every strategy."""

import pytest
import torch

from scaling4d import seeds
from scaling4d.mae.masking import STRATEGIES, keep, kept_tokens
from scaling4d.records import UserError

GRID = (8, 4, 6)


def drawn(strategy: str, mask_ratio: float = 0.9, batch: int = 8) -> torch.Tensor:
    """`B t h w`, true where a token is kept."""
    kept = keep(strategy, batch=batch, grid=GRID, mask_ratio=mask_ratio, rng=seeds.stream(1, "mask", 3)).kept
    assert kept.shape == (batch, kept_tokens(strategy, GRID, mask_ratio))
    assert torch.equal(kept, kept.sort(dim=1).values)
    return torch.zeros(batch, 192, dtype=torch.bool).scatter(1, kept, True).reshape(batch, *GRID)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("mask_ratio", [0.5, 0.75, 0.9])
def test_masks_have_one_size_differ_between_clips_and_repeat_with_the_seed(strategy: str, mask_ratio: float) -> None:
    masks = drawn(strategy, mask_ratio)
    assert (masks.flatten(1).sum(1) == kept_tokens(strategy, GRID, mask_ratio)).all()
    assert torch.equal(masks, drawn(strategy, mask_ratio))
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 2


@pytest.mark.parametrize(("strategy", "spread"), [("random", 0.05), ("tube", 0.05), ("frame", 0.05), ("block", 0.08)])
def test_every_token_is_kept_about_as_often_as_the_ratio_says(strategy: str, spread: float) -> None:
    share = drawn(strategy, 0.75, batch=2000).float().mean(0)
    assert (share - 0.25).abs().max() < spread


def test_tubes_are_the_same_in_every_frame_and_frames_are_whole() -> None:
    tube, frame = drawn("tube"), drawn("frame")
    assert (tube == tube[:, :1]).all()
    assert tube[:, 0].flatten(1).sum(1).tolist() == [2] * 8  # of 24 places, a tenth
    assert (frame == frame[:, :, :1, :1]).all()
    assert frame[:, :, 0, 0].sum(1).tolist() == [1] * 8  # of 8 frames


def test_blocks_hide_tokens_whose_neighbours_are_hidden_too() -> None:
    def neighbours(kept: torch.Tensor) -> float:
        hidden = ~kept
        pairs = [hidden[:, 1:] & hidden[:, :-1], hidden[:, :, 1:] & hidden[:, :, :-1], hidden[:, :, :, 1:] & hidden[:, :, :, :-1]]
        return sum(pair.sum().item() for pair in pairs) / hidden.sum().item()

    assert neighbours(drawn("block", 0.5, 64)) > 1.3 * neighbours(drawn("random", 0.5, 64))


@pytest.mark.parametrize(
    ("strategy", "mask_ratio", "said"),
    [
        ("random", 0.999, "mask_ratio = 0.999 keeps 0 of 192 tokens; set it in (0, 1) so that some are kept and some hidden"),
        ("tube", 0.99, "mask_ratio = 0.99 keeps 0 of 24 places; set it in (0, 1) so that some are kept and some hidden"),
        ("frame", 0.95, "mask_ratio = 0.95 keeps 0 of 8 frames; set it in (0, 1) so that some are kept and some hidden"),
        ("frame", 0.05, "mask_ratio = 0.05 keeps 8 of 8 frames; set it in (0, 1) so that some are kept and some hidden"),
        ("block", 1.0, "mask_ratio = 1.0 keeps 0 of 192 tokens; set it in (0, 1) so that some are kept and some hidden"),
        ("rows", 0.9, "masking = 'rows'; needed one of random, tube, frame, block"),
    ],
)
def test_what_keeps_nothing_or_is_unknown_says_which_setting_to_change(strategy: str, mask_ratio: float, said: str) -> None:
    with pytest.raises(UserError) as error:
        keep(strategy, batch=1, grid=GRID, mask_ratio=mask_ratio, rng=seeds.stream(0))
    assert str(error.value) == said


def test_counts_are_those_of_both_papers_code() -> None:
    grid = (8, 14, 14)
    assert kept_tokens("random", grid, 0.95) == 78  # 4DS
    assert kept_tokens("random", grid, 0.9, down=True) == 156  # MAE-ST
    assert kept_tokens("random", (2, 4, 5), 0.9, down=True) == 3  # 1 - 0.9 is a little less than a tenth, there as here
