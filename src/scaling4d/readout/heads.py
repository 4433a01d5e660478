"""Attention readouts of the released kind: learned or given queries read the features of all frames at once.

Source: representations4d's AttentionReadout (the V-JEPA-like variant) and the tracking readouts of its MooG demo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling4d import seeds
from scaling4d.config import require_minima, require_sizes, require_words
from scaling4d.mae.attention import attention
from scaling4d.mae.encoder import LAYER_NORM_EPS, initialise, sincos
from scaling4d.mae.resize import cubic_weights


class CrossAttention(nn.Module):
    """The attention that both readouts share: queries read features `B t n C`, C wide.

    Args:
        features_norm: of the features. bias: whether keys and values have biases.
        queries: number of learned queries; 0: forward receives queries of `query_width`.
        biased: attention falls with the distance between a token and the place (and time) of a query.
        stretched: features are stretched to `frames` time steps, as released; else they keep their own t steps, each at
            the mean temporal position of its frames (ours: with t = frames / 2 at half the cost).
    """

    def __init__(
        self,
        features_norm: nn.Module,
        *,
        bias: bool,
        features_width: int,
        frames: int,
        queries: int,
        query_width: int,
        width: int,
        heads: int,
        biased: bool = False,
        stretched: bool = True,
    ) -> None:
        super().__init__()
        self.frames, self.heads, self.stretched = frames, heads, stretched
        self.features_norm = features_norm
        self.temporal_positions = nn.Parameter(torch.empty(frames, 1, features_width))
        if queries:
            self.query = nn.Parameter(torch.empty(queries, width))
        else:
            self.query_in = nn.Linear(query_width, width)
        if biased:
            self.distance_bias = nn.Parameter(torch.empty(heads))  # logarithm of the factor of squared distances
        self.key = nn.Linear(features_width, width, bias=bias)
        self.value = nn.Linear(features_width, width, bias=bias)

    def _inputs(self, features: Tensor, queries: Tensor | None) -> tuple[Tensor, Tensor]:
        """features `B t n C`, queries `B Q Dq` or none -> x `B T n C` (t for T, if not stretched), q `B Q D`."""
        x = stretch_time(features, self.frames) if self.stretched else features
        return x, self.query.expand(x.shape[0], -1, -1) if queries is None else self.query_in(queries)

    def _attend(self, x: Tensor, q: Tensor, places: Tensor | None) -> Tensor:
        """Attention as in the papers: a key and a value for every token. x `B T n C`, q `B Q D` -> `B Q D`."""
        steps, tokens = x.shape[1:3]
        x = (self.features_norm(x) + self._positions(steps)).flatten(1, 2)  # B T*n C
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, self.key(x), self.value(x)))  # B N heads d
        if places is None:
            return attention(q, k, v).flatten(2)
        d = q.shape[-1]
        of_queries, of_tokens = self._distance_terms(places, cell_centres(steps, tokens, places.device))
        k = torch.cat([k, of_tokens[None, :, None].expand(*k.shape[:3], -1)], -1)
        q = torch.cat([q, math.sqrt(d) * of_queries], -1)
        v = F.pad(v, (0, of_queries.shape[-1]))
        return attention(q, k, v, scale=1 / math.sqrt(d))[..., :d].flatten(2)

    def _positions(self, steps: int) -> Tensor:
        """`steps 1 C`: temporal positions, each step's the mean of its frames'."""
        return self.temporal_positions.unflatten(0, (steps, -1)).mean(1)

    def _distance_terms(self, places: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """places `B Q d`, centres `N 3` -> `B Q heads d+1` and `N d+1`, whose products are added to the scores.

        A score falls by a head's factor s times the squared distance in the first d coordinates:
        -s |p - c|^2 = 2 s p . c - s |c|^2 - s |p|^2. Softmax drops the last term, which all tokens share.
        """
        p, c = places - 0.5, centres[:, : places.shape[-1]] - 0.5
        of_queries = torch.cat([2 * p, -torch.ones_like(p[..., :1])], -1)  # B Q d+1
        of_tokens = torch.cat([c, c.square().sum(-1, keepdim=True)], -1)
        return of_queries[:, :, None] * self.distance_bias.exp()[:, None], of_tokens


class AttentionReadout(CrossAttention):
    """One cross-attention block and a linear layer: `B t n C` -> `B Q out`. attention: arguments of CrossAttention."""

    def __init__(self, *, features_width: int, width: int, out: int, **attention: Any) -> None:
        norm = nn.LayerNorm(features_width, LAYER_NORM_EPS)
        super().__init__(norm, bias=True, features_width=features_width, width=width, **attention)
        self.project = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        self.out = nn.Linear(width, out)

    def forward(self, features: Tensor, queries: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """features `B t n C`, queries `B Q Dq` or none -> `B Q out`.

        places: of the queries, with a distance bias: `B Q 2` (x y in 0..1) or `B Q 3` (and time).
        """
        x, q = self._inputs(features, queries)
        few = q.shape[1] * self.heads < q.shape[2]  # fewer scores a token than keys have values
        y = q + self.project((self._attend_few if few else self._attend)(x, q, places))
        y = y + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(y)), approximate="tanh"))
        return self.out(y)

    def _attend_few(self, x: Tensor, q: Tensor, places: Tensor | None) -> Tensor:
        """The sums of `_attend` in an order that is cheap for few queries: no keys and values are made.

        q . (W x) = (W^T q) . x, and the mean of W x is W times the mean of x; so for the norm's scale and positions.
        """
        norm, d = self.features_norm, q.shape[2] // self.heads
        x = F.layer_norm(x, (x.shape[-1],), eps=norm.eps)  # B T n C
        added = norm.bias + self._positions(x.shape[1])[:, 0]  # T C
        key, value = (linear.weight.unflatten(0, (self.heads, d)) for linear in (self.key, self.value))  # heads d C
        q = q.unflatten(-1, (self.heads, d)) / math.sqrt(d)  # B Q heads d
        qk = torch.einsum("bqhd,hdc->bqhc", q, key)
        constant = (q * self.key.bias.unflatten(0, (self.heads, d))).sum(-1)[..., None]  # B Q heads 1; softmax drops it
        at_time = torch.einsum("bqhc,tc->bqht", qk, added) + constant
        scores = torch.einsum("bqhc,btnc->bqhtn", qk * norm.weight, x) + at_time[..., None]
        if places is not None:
            of_queries, of_tokens = self._distance_terms(places, cell_centres(*x.shape[1:3], places.device))
            scores = scores + (of_queries @ of_tokens.T).unflatten(-1, x.shape[1:3])
        weights = scores.flatten(-2).softmax(-1).unflatten(-1, scores.shape[-2:])  # B Q heads T n
        mean = torch.einsum("bqhtn,btnc->bqhc", weights, x) * norm.weight
        mean = mean + torch.einsum("bqht,tc->bqhc", weights.sum(-1), added)
        return torch.einsum("bqhc,hdc->bqhd", mean, value).flatten(2) + self.value.bias  # B Q D


class PlainAttentionReadout(CrossAttention):
    """The released code's simpler variant: no norm, no biases of keys and values, no residual mlp."""

    def __init__(self, *, width: int, out: int, **attention: Any) -> None:
        super().__init__(nn.Identity(), bias=False, width=width, **attention)
        self.out = nn.Linear(width, out)

    def forward(self, features: Tensor, queries: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """As AttentionReadout."""
        return self.out(self._attend(*self._inputs(features, queries), places))


def cell_centres(steps: int, tokens: int, device: torch.device) -> Tensor:
    """Centres `steps*n 3` (x y time in 0..1) of the cells of a square grid, row by row and step by step."""
    side = math.isqrt(tokens)  # clips are square
    x, time = ((torch.arange(count, device=device) + 0.5) / count for count in (side, steps))
    return torch.stack([x.repeat(steps * side), x.repeat_interleave(side).repeat(steps), time.repeat_interleave(tokens)], -1)


def stretch_time(features: Tensor, frames: int) -> Tensor:
    """`B t n D` -> `B T n D`, cubic interpolation in time."""
    if features.shape[1] == frames:
        return features
    weights = cubic_weights(frames, features.shape[1]).to(features, non_blocking=True)
    return torch.einsum("Tt,btnd->bTnd", weights, features)


def fourier_embedding(coordinates: Tensor, bases: int) -> Tensor:
    """`... n` in 0..1 -> `... 2*bases*n`: sin(2^i pi x) for every i and n, then the cosines.

    Cosines are sines of float32(x pi 2^i + pi/2), as in the reference: at high frequencies the order of rounding shows.
    """
    scale = 2.0 ** torch.arange(bases, dtype=torch.float32, device=coordinates.device)
    angle = ((coordinates.float() * math.pi)[..., None, :] * scale[:, None]).flatten(-2)  # ... bases*n
    return torch.cat([angle.sin(), (angle + math.pi / 2).sin()], dim=-1)


@dataclass(frozen=True)
class HeadConfig:
    """The readout of all tasks.

    width, heads: of the attention. fourier_bases, query_width: of the embedding of given queries (MooG: 16, 512).
    query_std: of learned queries at the start (released: 0.02, which leaves attention uniform for long). time_init:
    temporal positions, "normal" N(0, 0.02) as released, or "sincos" (ours: time is visible at once). out_scale: of the
    last layer's initial weights (released: 1; less starts closer to zero). stretched: see CrossAttention (released:
    true). distance_bias: attention falls by a factor times the squared distance to the place of a given query (the
    picture's side is 1) or to the cell of a learned one (the clip's length is 1 too). The factor is learned and starts
    between the two numbers over the heads (ours; released: none, empty).
    """

    width: int
    heads: int
    fourier_bases: int
    query_width: int
    query_std: float
    time_init: str
    out_scale: float
    stretched: bool
    distance_bias: tuple[float, ...]

    def __post_init__(self) -> None:
        require_sizes(self, "width", "heads", "query_width")
        require_sizes(self, "fourier_bases", most=64)
        require_minima(self, {"query_std": 0})
        require_words(self, {"time_init": ("normal", "sincos")})
        if len(self.distance_bias) not in (0, 2) or min(self.distance_bias, default=1) <= 0:
            raise ValueError(f"distance_bias = {list(self.distance_bias)}; needed two numbers above 0, or none")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")


@dataclass(frozen=True)
class Queries:
    """Queries of a task, and its outputs.

    out: numbers a query (and tile). learned: number of learned queries; 0: given ones. steps: learned queries divide
    the clip into so many steps of time, each a square grid, and each answers for one cell; 0: they answer for the whole
    clip. coordinates: numbers of a given query (2: a point, 4: a box). tiles: copies of a given query, each with a
    learned time embedding; each answers for frames / tiles frames.
    """

    out: int
    learned: int = 0
    steps: int = 0
    coordinates: int = 0
    tiles: int = 1

    def __post_init__(self) -> None:
        require_sizes(self, "out", "tiles")
        require_sizes(self, "learned", "steps", "coordinates", least=0)


class Head(nn.Module):
    """An attention readout for a task: learned queries, or one query a tracked object. frames: of the clip."""

    def __init__(self, config: HeadConfig, queries: Queries, *, features_width: int, frames: int) -> None:
        super().__init__()
        self.config, self.queries, self.frames = config, queries, frames
        self.biased = bool(config.distance_bias) and bool(queries.coordinates or queries.steps)
        if not queries.learned:
            self.embed_mlp_in = nn.Linear(2 * config.fourier_bases * queries.coordinates, config.query_width)
            self.embed_mlp_out = nn.Linear(config.query_width, config.query_width)
            self.tile_positions = nn.Parameter(torch.empty(queries.tiles, config.query_width))
        self.readout = AttentionReadout(
            features_width=features_width,
            frames=frames,
            queries=queries.learned,
            query_width=config.query_width,
            width=config.width,
            heads=config.heads,
            out=queries.out,
            biased=self.biased,
            stretched=config.stretched,
        )

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all weights; equal seeds give equal weights."""
        initialise(self, seed=seed)
        self.readout.out.weight.mul_(self.config.out_scale)
        if self.queries.learned:
            self.readout.query.normal_(std=self.config.query_std, generator=seeds.torch_rng(seed, "query"))
        if self.biased:
            low, high = map(math.log, self.config.distance_bias)
            self.readout.distance_bias.copy_(torch.linspace(low, high, self.config.heads))
        if self.config.time_init == "sincos":
            positions = self.readout.temporal_positions
            positions.copy_(sincos((self.frames, 1, 1), positions.shape[-1])[:, None])

    def forward(self, features: Tensor, queries: Tensor | None = None) -> Tensor:
        """features `B t n C` -> `B Q out`; with given queries `B Q coordinates` -> `B Q T values`."""
        places, tiles = None, self.queries.tiles
        if queries is None:
            if self.biased:
                steps, learned = self.queries.steps, self.queries.learned
                places = cell_centres(steps, learned // steps, features.device).expand(len(features), -1, -1)  # B Q 3
            return self.readout(features, None, places)
        embedded = fourier_embedding(queries, self.config.fourier_bases)
        x = self.embed_mlp_out(F.gelu(self.embed_mlp_in(embedded), approximate="tanh"))  # B Q D
        x = x[:, :, None] + self.tile_positions  # B Q k D
        if self.biased:
            places = queries.unflatten(-1, (-1, 2)).mean(-2).repeat_interleave(tiles, 1)  # B Q*k 2
        x = self.readout(features, x.flatten(1, 2), places)  # B Q*k out
        return x.unflatten(1, (-1, tiles)).unflatten(-1, (self.frames // tiles, -1)).flatten(2, 3)  # B Q T values
