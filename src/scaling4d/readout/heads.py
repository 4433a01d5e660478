"""Attention readouts of the released kind: learned or given queries read the features of all frames at once.

Source: representations4d's AttentionReadout (the V-JEPA-like variant) and the tracking readouts of its MooG demo.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaling4d import config, seeds
from scaling4d.encoders.features import stretch
from scaling4d.mae.attention import attention
from scaling4d.mae.encoder import LAYER_NORM_EPS, initialise, sincos
from scaling4d.records import UserError


class AttentionReadout(nn.Module):
    """One cross-attention block and a linear layer: `B t n C` -> `B Q out`.

    Args:
        queries: how many learned queries; or 0, and queries of `query_width` are given to forward.
        near: attention falls with the distance between a token and the place, or place and time, that a query is about.
        stretched: features are stretched to `frames` time steps, as released; else they are read at their own t steps, each at
          the mean temporal position of its frames (ours: with t = frames / 2 at half the cost).
        plain: the released code's simpler variant, without norm, key and value biases, and the residual mlp.
    """

    def __init__(
        self,
        *,
        features_width: int,
        frames: int,
        queries: int,
        query_width: int,
        width: int,
        heads: int,
        out: int,
        near: bool = False,
        stretched: bool = True,
        plain: bool = False,
    ) -> None:
        super().__init__()
        self.frames, self.heads, self.stretched, self.plain = frames, heads, stretched, plain
        self.features_norm = nn.Identity() if plain else nn.LayerNorm(features_width, LAYER_NORM_EPS)
        self.temporal_positions = nn.Parameter(torch.empty(frames, 1, features_width))
        if queries:
            self.query = nn.Parameter(torch.empty(queries, width))
        else:
            self.query_in = nn.Linear(query_width, width)
        if near:
            self.nearness_bias = nn.Parameter(torch.empty(heads))  # logarithm of what multiplies squared distances
        self.key = nn.Linear(features_width, width, bias=not plain)
        self.value = nn.Linear(features_width, width, bias=not plain)
        if not plain:
            self.project = nn.Linear(width, width)
            self.mlp_norm = nn.LayerNorm(width, LAYER_NORM_EPS)
            self.mlp_in = nn.Linear(width, 4 * width)
            self.mlp_out = nn.Linear(4 * width, width)
        self.out = nn.Linear(width, out)

    def forward(self, features: Tensor, queries: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """features `B t n C`, queries `B Q Dq` or none -> `B Q out`. places, if near: `B Q 2` (x y in 0..1) or `B Q 3` (time)."""
        x = stretch(features, self.frames) if self.stretched else features  # B T n C, or t for T
        q = self.query.expand(x.shape[0], -1, -1) if queries is None else self.query_in(queries)  # B Q D
        if self.plain:
            return self.out(self._read(x, q, places))
        few = q.shape[1] * self.heads < q.shape[2]
        y = q + self.project((self._read_by_few if few else self._read)(x, q, places))
        y = y + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(y)), approximate="tanh"))
        return self.out(y)

    def _read(self, x: Tensor, q: Tensor, places: Tensor | None) -> Tensor:
        """Attention as it is written in the papers: a key and a value for every token.

        x `B T n C`, q `B Q D`, places `B Q 2` or `B Q 3` -> `B Q D`.
        """
        frames, tokens = x.shape[1:3]
        x = (self.features_norm(x) + self._positions(frames)).flatten(1, 2)  # B T*n C
        split = lambda y: y.unflatten(-1, (self.heads, -1))  # noqa: E731  B N D -> B N heads d
        q, k, v = split(q), split(self.key(x)), split(self.value(x))
        if places is None:
            return attention(q, k, v).flatten(2)
        d = q.shape[-1]
        at, where = self._near(places, cells(frames, tokens, places.device))
        k = torch.cat([k, where[None, :, None].expand(*k.shape[:3], -1)], -1)
        q = torch.cat([q, math.sqrt(d) * at], -1)
        return attention(q, k, F.pad(v, (0, at.shape[-1])), scale=1 / math.sqrt(d))[..., :d].flatten(2)

    def _positions(self, steps: int) -> Tensor:
        """`steps 1 C`: temporal positions, each step's the mean of its frames'."""
        if steps == self.frames:
            return self.temporal_positions
        return self.temporal_positions.unflatten(0, (steps, -1)).mean(1)

    def _near(self, places: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """places `B Q d`, centres `N 3` -> `B Q heads d+1` and `N d+1`; their products are to be added to the scores.

        As many coordinates count as the places have. A score falls by a head's sharpness s times the squared distance:
        -s |p - c|^2 = 2 s p . c - s |c|^2 - s |p|^2, of which softmax drops the last, since all tokens have it in common.
        """
        p, c = places - 0.5, centres[:, : places.shape[-1]] - 0.5
        asks = torch.cat([2 * p, -torch.ones_like(p[..., :1])], -1)  # B Q d+1
        return asks[:, :, None] * self.nearness_bias.exp()[:, None], torch.cat([c, c.square().sum(-1, keepdim=True)], -1)

    def _read_by_few(self, x: Tensor, q: Tensor, places: Tensor | None) -> Tensor:
        """The same sums in an order that is cheap for a few queries: keys and values are never made.

        q . (W x) = (W^T q) . x, and the mean of W x is W times the mean of x; likewise for the norm's scale and what time adds.
        """
        norm, d = self.features_norm, q.shape[2] // self.heads
        x = F.layer_norm(x, (x.shape[-1],), eps=norm.eps)  # B T n C
        added = norm.bias + self._positions(x.shape[1])[:, 0]  # T C
        per_head = lambda linear: linear.weight.unflatten(0, (self.heads, d))  # noqa: E731  heads d C
        q = q.unflatten(-1, (self.heads, d)) / math.sqrt(d)  # B Q heads d
        asks = torch.einsum("bqhd,hdc->bqhc", q, per_head(self.key))
        constant = (q * self.key.bias.unflatten(0, (self.heads, d))).sum(-1)[..., None]  # B Q heads 1; softmax drops it
        at_time = torch.einsum("bqhc,tc->bqht", asks, added) + constant
        scores = torch.einsum("bqhc,btnc->bqhtn", asks * norm.weight, x) + at_time[..., None]
        if places is not None:
            at, where = self._near(places, cells(*x.shape[1:3], places.device))
            scores = scores + (at @ where.T).unflatten(-1, x.shape[1:3])
        share = scores.flatten(-2).softmax(-1).unflatten(-1, scores.shape[-2:])  # B Q heads T n
        mean = torch.einsum("bqhtn,btnc->bqhc", share, x) * norm.weight + torch.einsum("bqht,tc->bqhc", share.sum(-1), added)
        values = torch.einsum("bqhc,hdc->bqhd", mean, per_head(self.value)).flatten(2)  # B Q D
        return values + self.value.bias


def cells(steps: int, tokens: int, device: torch.device) -> Tensor:
    """Centres `steps*n 3` (x y time in 0..1) of the cells of a square grid, row by row and step by step."""
    side = math.isqrt(tokens)  # clips are square
    x, time = ((torch.arange(count, device=device) + 0.5) / count for count in (side, steps))
    return torch.stack([x.repeat(steps * side), x.repeat_interleave(side).repeat(steps), time.repeat_interleave(tokens)], -1)


def fourier(coordinates: Tensor, bases: int) -> Tensor:
    """`... n` in 0..1 -> `... 2*bases*n`: sin(2^i pi x) for every i and n, then the cosines.

    Cosines are sines of float32(x pi 2^i + pi/2), as in the reference: at high frequencies the order of rounding shows.
    """
    scale = 2.0 ** torch.arange(bases, dtype=torch.float32, device=coordinates.device)
    angle = ((coordinates.float() * math.pi)[..., None, :] * scale[:, None]).flatten(-2)  # ... bases*n
    return torch.cat([angle.sin(), (angle + math.pi / 2).sin()], dim=-1)


@config.configurable
class Head(nn.Module):
    """An attention readout for a task: learned queries, or one query a tracked thing.

    Args:
        features_width, frames: of what it reads. learned: number of learned queries, or 0; steps: into so many steps of time,
          each of a square grid, they divide the clip to answer for a cell each; 0 if they are about the whole clip.
        coordinates: numbers that describe a given query (2 for a point, 4 for a box). tiles: each given query is repeated
          so often with a learned time embedding and answers for frames / tiles frames. values: numbers a frame.
        width, heads: of the readout. fourier_bases, query_width: of the embedding of given queries (released: 16 and 512).
        query_std: of learned queries at the start (released: 0.02, at which attention is the same everywhere for long).
        time_init: of the temporal positions, "normal" N(0, 0.02) as released, or "sincos" (ours: time is visible at once).
        out_scale: of the last layer's initial weights (released: 1; less starts closer to predicting nothing).
        stretched: see AttentionReadout (released: true).
        sharpness: attention falls by so much times the squared distance to what a given query asks about (the picture's side
          is 1), or to the cell that a learned one answers for (the clip's length is 1 as well); learned, and at the start from
          the first to the second number over the heads (released: not at all, empty).
    """

    def __init__(
        self,
        *,
        features_width: int,
        frames: int,
        learned: int,
        out: int,
        coordinates: int,
        tiles: int,
        width: int,
        heads: int,
        fourier_bases: int,
        query_width: int,
        query_std: float,
        time_init: str,
        out_scale: float,
        stretched: bool = True,
        sharpness: tuple[float, ...],
        steps: int = 0,
    ) -> None:
        super().__init__()
        if time_init not in ("normal", "sincos"):
            raise UserError(f"Head.time_init = {time_init!r}; needed 'normal' or 'sincos'")
        if len(sharpness) not in (0, 2) or min(sharpness, default=1) <= 0:
            raise UserError(f"Head.sharpness = {list(sharpness)}; needed two numbers above 0, or none")
        self.learned, self.steps = learned, steps
        self.sharpness = sharpness if coordinates or steps else ()
        self.bases, self.tiles, self.frames = fourier_bases, tiles, frames
        self.query_std, self.time_init, self.out_scale = query_std, time_init, out_scale
        if not learned:
            self.embed_mlp_in = nn.Linear(2 * fourier_bases * coordinates, query_width)
            self.embed_mlp_out = nn.Linear(query_width, query_width)
            self.tile_positions = nn.Parameter(torch.empty(tiles, query_width))
        self.readout = AttentionReadout(
            features_width=features_width,
            frames=frames,
            queries=learned,
            query_width=query_width,
            width=width,
            heads=heads,
            out=out,
            near=bool(self.sharpness),
            stretched=stretched,
        )

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all weights; equal seeds give equal weights."""
        initialise(self, seed=seed)
        self.readout.out.weight.mul_(self.out_scale)
        if hasattr(self.readout, "query"):
            self.readout.query.normal_(std=self.query_std, generator=seeds.stream(seed, "query"))
        if self.sharpness:
            low, high = map(math.log, self.sharpness)
            self.readout.nearness_bias.copy_(torch.linspace(low, high, self.readout.heads))
        if self.time_init == "sincos":
            positions = self.readout.temporal_positions
            positions.copy_(sincos((self.frames, 1, 1), positions.shape[-1])[:, None])

    def forward(self, features: Tensor, queries: Tensor | None = None) -> Tensor:
        """features `B t n C` -> `B Q out`; with given queries `B Q coordinates` -> `B Q T values`."""
        if queries is None:
            places = cells(self.steps, self.learned // self.steps, features.device) if self.sharpness else None  # Q 3
            return self.readout(features, None, places if places is None else places.expand(len(features), -1, -1))
        x = self.embed_mlp_out(F.gelu(self.embed_mlp_in(fourier(queries, self.bases)), approximate="tanh"))  # B Q D
        x = x[:, :, None] + self.tile_positions  # B Q k D
        places = queries.unflatten(-1, (-1, 2)).mean(-2).repeat_interleave(self.tiles, 1) if self.sharpness else None  # B Q*k 2
        x = self.readout(features, x.flatten(1, 2), places)  # B Q*k out
        return x.unflatten(1, (-1, self.tiles)).unflatten(-1, (self.frames // self.tiles, -1)).flatten(2, 3)  # B Q T values
