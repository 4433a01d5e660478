"""SimpleMAE: patches, masks, coarse decoding."""

import pytest
import small_encoder
import torch

from scaling4d import seeds
from scaling4d.mae.masking import hidden_pixels
from scaling4d.mae.patches import gather_patches, patchify, unpatchify
from scaling4d.mae.simple_mae import SimpleMAE
from scaling4d.pretrain.plan.work import work_of
from scaling4d.records import MaskedTokens

CLIP, PATCH = (4, 16, 24), (2, 8, 8)


def pixels(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (batch, *CLIP, 3), dtype=torch.uint8, generator=seeds.torch_rng(0, "pixels"))


def small(**changes: object) -> SimpleMAE:
    shape = {"clip": CLIP, "patch": PATCH, "pixel_mean": 0.45, "pixel_scale": 4.0, "coarse_patch": (4, 16, 8)}
    return small_encoder.model("SimpleMAE", **shape | {"mask_ratio": 0.75, "position_init": "sincos"} | changes)


def test_a_patch_is_the_block_that_its_index_names() -> None:
    x = pixels()
    patch = patchify(x, PATCH)[1, 1 * 6 + 1 * 3 + 2]  # t=1 h=1 w=2
    assert torch.equal(patch.reshape(*PATCH, 3), x[1, 2:4, 8:16, 16:24])


def test_gathered_patches_equal_those_of_the_whole_clip() -> None:
    x, ids_keep = pixels(), torch.tensor([[0, 5, 7], [2, 3, 11]])
    assert torch.equal(gather_patches(x, ids_keep, PATCH), torch.stack([patchify(x, PATCH)[b, ids_keep[b]] for b in range(2)]))


def test_hidden_pixels_do_not_reach_the_encoder() -> None:
    model, x = small(), pixels()
    masked = model.draw_mask(2, seeds.torch_rng(0, "m"))
    hidden = hidden_pixels(masked, CLIP, PATCH).bool()
    other = torch.where(hidden, 255 - x.int(), x.int()).to(torch.uint8)
    with torch.no_grad():
        assert torch.equal(model.predict_patches(x, masked), model.predict_patches(other, masked))
        changed = torch.where(hidden, x.int(), 255 - x.int()).to(torch.uint8)
        assert not torch.equal(model.predict_patches(x, masked), model.predict_patches(changed, masked))


def test_loss_equals_a_slow_loop_over_pixels() -> None:
    model, x = small(pixel_mean=0.0, pixel_scale=1.0), pixels()
    masked = model.draw_mask(2, seeds.torch_rng(0, "m"))
    with torch.no_grad():
        guess = unpatchify(model.predict_patches(x, masked), CLIP, model.coarse_patch).double()
        total = count = 0.0
        for b in range(2):
            for t in range(CLIP[0]):
                for h in range(CLIP[1]):
                    for w in range(CLIP[2]):
                        total += (guess[b, t, h, w] - x[b, t, h, w] / 255).square().sum().item()
                        count += 3
        assert abs(model(x, masked).item() - total / count) < 1e-6


def test_equal_seeds_give_equal_weights_and_others_do_not() -> None:
    a, b, c = small(), small(), small()
    c.initialise(1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.encoder.blocks[0].qkv.weight, c.encoder.blocks[0].qkv.weight)


@pytest.mark.integration
def test_a_tiny_model_learns_one_batch_by_heart() -> None:
    model = small(width=96, mlp=192, depth=4, mask_ratio=0.5, coarse_patch=(2, 8, 8))
    x = pixels(1)
    masked = MaskedTokens(torch.arange(0, 12, 2)[None], model.encoder.grid)
    losses = small_encoder.learn(model, lambda: model(x, masked), steps=150)
    assert losses[-1] < 0.02 * losses[0]


def test_branches_by_depth_start_as_released_divided_by_the_root_of_their_number() -> None:
    released, scaled = small(), small(branch_init="by_depth")
    branches = 2 * len(released.encoder.blocks)
    for (name, a), b in zip(released.named_parameters(), scaled.parameters(), strict=True):
        last = name.endswith((".out.weight", "mlp_out.weight"))
        assert torch.allclose(b, a / branches**0.5 if last else a), name


def largest_logit(model: SimpleMAE) -> float:
    """Of the attention of all blocks, where queries and keys grew a hundredfold."""
    sides: dict[str, list[torch.Tensor]] = {"q": [], "k": []}
    for block in model.encoder.blocks:
        block.qkv.weight.data.mul_(100)
        for side, norm in (("q", block.q_norm), ("k", block.k_norm)):
            norm.register_forward_hook(lambda _module, _inputs, out, side=side: sides[side].append(out))
    with torch.no_grad():
        model.encoder.features(pixels())
    logits = [torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 for q, k in zip(*sides.values(), strict=True)]
    return max(block_logits.abs().max().item() for block_logits in logits)


def test_norms_of_queries_and_keys_bound_the_logits_of_attention() -> None:
    assert largest_logit(small()) > 1000
    assert largest_logit(small(qk_norm=True)) <= (24 / 2) ** 0.5 * 1.001  # of two vectors of length sqrt(d), over sqrt(d)


def test_norms_of_queries_and_keys_change_no_first_weight_and_are_counted_by_the_plan() -> None:
    plain, normed = small(), small(qk_norm=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(normed.state_dict()[name], value), name
    added = normed.state_dict().keys() - plain.state_dict().keys()
    assert {name.rpartition("blocks.")[2] for name in added} == {f"{i}.{side}_norm.weight" for i in range(3) for side in "qk"}
    parameters = sum(p.numel() for p in normed.parameters())
    assert work_of(normed).parameters == parameters == sum(p.numel() for p in plain.parameters()) + 3 * 2 * 12


@pytest.mark.parametrize(("changes", "message"), [
    ({"branch_init": "small"}, "branch_init = 'small'; needed released or by_depth"),
    ({"position_init": "zero"}, "position_init = 'zero'; needed normal or sincos"),
    ({"decode_blocks": 4}, "decode_blocks = 4; needed 1 to 3, the depth"),
    ({"heads": 5}, "width 24 does not divide into 5 heads"),
    ({"patch": (3, 8, 8)}, r"clip T H W = \(4, 16, 24\) does not divide into patches \(3, 8, 8\); set them to multiples"),
])  # fmt: skip
def test_a_model_that_cannot_be_built_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        small(**changes)
