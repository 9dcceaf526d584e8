"""What a fit does with new rows, in chunks of bounded memory: plain torch, safe in threads.

The functions take a model, its draws flattened to ``(s, *event)``, and complete tensors of rows;
:class:`~bayesgen.fit.Fit` wraps them. Memory is bounded by cutting rows and draws so that no more
than about ``2**24`` numbers are alive at once, whatever the sizes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributions as td

from bayesgen import rng

if TYPE_CHECKING:
    from bayesgen.capabilities import (
        Conditional,
        Denoising,
        Encoder,
        Scored,
        Tensors,
        Weighted,
    )

__all__ = [
    "cell_weights",
    "draw_from",
    "flatten_draws",
    "impute",
    "impute_mean",
    "log_likelihood",
    "log_mean_exp",
    "pick",
    "posterior_mean",
    "probabilities",
    "reconstruct",
    "sample",
    "thin",
]

_BUDGET = 2**24  # numbers alive at once: 128 MiB in float64
_ESTIMATED_DRAWS = 100  # that a density with no closed form is averaged over
_FORK = threading.Lock()


def flatten_draws(draws: Tensors) -> dict[str, Tensor]:
    """``(chain, draw, *event)`` to ``(s, *event)``, without a copy where possible."""
    return {site: value.flatten(0, 1) for site, value in draws.items()}


def pick(flat: Tensors, index: Tensor | slice) -> dict[str, Tensor]:
    """Some of the flattened draws."""
    return {site: value[index] for site, value in flat.items()}


def thin(flat: Tensors, limit: int) -> dict[str, Tensor]:
    """At most ``limit`` evenly spaced draws."""
    total = _count(flat)
    index = torch.linspace(0, total - 1, min(total, limit), dtype=torch.float64).round().long()
    return {site: value[index.to(value.device)] for site, value in flat.items()}


def _count(flat: Tensors) -> int:
    return next(iter(flat.values())).shape[0]


def _pair_size(flat: Tensors) -> int:
    """Numbers that one row under one draw may cost: the largest table of parameters, at least 16.

    Matrices of a component count once a draw, not once a row.
    """
    return max(16, *(math.prod(value.shape[1:3]) for value in flat.values()))


def _chunks(
    num_rows: int, flat: Tensors, pair_size: int = 1
) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of rows, each with its blocks of draws; a pair costs at least ``pair_size`` numbers.

    Few rows and many draws: what a model does once for each missing pattern pays for many then.
    """
    num_draws = _count(flat)
    once = max(1, _BUDGET // (4 * sum(value[0].numel() for value in flat.values())))
    pairs = max(1, _BUDGET // max(pair_size, _pair_size(flat)))
    rows = max(1, min(num_rows, pairs, 1024))
    draws = max(1, min(once, pairs // rows))
    for row in range(0, num_rows, rows):
        yield (
            slice(row, row + rows),
            [slice(draw, draw + draws) for draw in range(0, num_draws, draws)],
        )


# ---------------------------------------------------------------- densities
@torch.no_grad()
def log_mean_exp(model: Scored, x: Tensor, flat: Tensors) -> Tensor:
    """``log mean_s p(x_i | draw_s)``, ``(n,)``; of an estimated density, of 100 draws at most."""
    flat = thin(flat, _ESTIMATED_DRAWS) if model.is_estimated else flat
    total = x.new_full((x.shape[0],), -torch.inf)
    for rows, blocks in _chunks(x.shape[0], flat):
        for block in blocks:
            scores = model.log_prob(x[rows], pick(flat, block)).logsumexp(0)
            total[rows] = torch.logaddexp(total[rows], scores)
    return total - torch.tensor(float(_count(flat)), dtype=x.dtype).log().item()


@torch.no_grad()
def log_likelihood(model: Scored, x: Tensor, flat: Tensors) -> Tensor:
    """``log p(x_i | draw_s)``, ``(s, n)``."""
    scores = x.new_empty(_count(flat), x.shape[0])
    for rows, blocks in _chunks(x.shape[0], flat):
        for block in blocks:
            scores[block, rows] = model.log_prob(x[rows], pick(flat, block))
    return scores


# ---------------------------------------------------------------- latents
def _expectation(distribution: td.Distribution) -> Tensor:
    if isinstance(distribution, td.Categorical | td.OneHotCategorical):
        return distribution.probs
    return distribution.mean


@torch.no_grad()
def posterior_mean(model: Encoder, x: Tensor, flat: Tensors) -> Tensor:
    """Mean over draws of each row's latent ``(n, k)``; of labels, their probabilities."""
    parts = []
    for rows, blocks in _chunks(x.shape[0], flat):
        total: Tensor | None = None
        for block in blocks:
            here = _expectation(model.encode(x[rows], pick(flat, block))).sum(0)
            total = here if total is None else total + here
        assert total is not None
        parts.append(total / _count(flat))
    return torch.cat(parts)


@torch.no_grad()
def probabilities(model: Encoder, x: Tensor, flat: Tensors) -> Tensor | None:
    """Responsibilities of each draw ``(s, n, K)``, or None when the latent is no label."""
    parts = []
    blocks = next(_chunks(x.shape[0], flat))[1]
    for block in blocks:
        distribution = model.encode(x, pick(flat, block))
        if not isinstance(distribution, td.Categorical | td.OneHotCategorical):
            return None
        parts.append(distribution.probs)
    return torch.cat(parts)


@torch.no_grad()
def reconstruct(model: Denoising, x: Tensor, flat: Tensors) -> Tensor:
    """Mean over draws of each row's signal ``(n, d)``."""
    return _mean_over_draws(model.reconstruct, x, flat)


@torch.no_grad()
def cell_weights(model: Weighted, x: Tensor, flat: Tensors) -> Tensor:
    """Mean over 100 draws at most of the weight of each cell ``(n, d)``."""
    return _mean_over_draws(model.cell_weights, x, thin(flat, _ESTIMATED_DRAWS))


def _mean_over_draws(
    function: Callable[[Tensor, Tensors], Tensor], x: Tensor, flat: Tensors
) -> Tensor:
    """Of what a function ``(draw, n, d)`` of rows and draws gives, ``(n, d)``."""
    out = torch.empty_like(x)
    for rows, blocks in _chunks(x.shape[0], flat, x.shape[1]):
        total = x.new_zeros(x[rows].shape)
        for block in blocks:
            total += function(x[rows], pick(flat, block)).sum(0)
        out[rows] = total / _count(flat)
    return out


# ---------------------------------------------------------------- new rows
@torch.no_grad()
def sample(
    draw: Callable[..., Tensor], flat: Tensors, num_samples: int, *, generator: torch.Generator
) -> Tensor:
    """Rows ``(num_samples, d)`` by a model's ``sample``, each from a random draw."""
    device = generator.device
    index = torch.randint(_count(flat), (num_samples,), generator=generator, device=device)
    size = max(1, _BUDGET // _pair_size(flat))
    return torch.cat([draw(pick(flat, part), generator=generator) for part in index.split(size)])


def draw_from(distribution: Any, generator: torch.Generator) -> Tensor:
    """One sample of the distribution from an explicit generator.

    The families that mixtures are made of are drawn without touching the global generators; any
    other falls back to ``distribution.sample()`` under :func:`bayesgen.rng.fork`, one thread at a
    time.
    """
    kind = _kind(distribution)
    if kind is td.MixtureSameFamily:
        mixture = distribution.mixture_distribution
        label = rng.categorical(mixture.logits, generator, dim=-1)
        drawn = draw_from(distribution.component_distribution, generator)
        dim = mixture.logits.ndim - 1
        label = label.reshape(*label.shape, *([1] * (drawn.ndim - label.ndim)))
        return torch.take_along_dim(drawn, label, dim).squeeze(dim)
    if kind is td.Independent:
        return draw_from(distribution.base_dist, generator)
    if kind is td.MultivariateNormal:
        noise = _noise(distribution, distribution.loc, generator)
        return distribution.loc + (distribution.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    if kind is td.Normal:
        noise = _noise(distribution, distribution.loc, generator)
        return distribution.loc + distribution.scale * noise
    if kind is td.Bernoulli:
        return torch.bernoulli(distribution.probs, generator=generator)
    if kind is td.Poisson:
        return torch.poisson(distribution.rate, generator=generator)
    if kind is td.Categorical:
        return rng.categorical(distribution.logits, generator, dim=-1)
    with _FORK, rng.fork(generator):
        return distribution.sample()


_KNOWN: tuple[type[td.Distribution], ...] = (
    td.MixtureSameFamily,
    td.Independent,
    td.MultivariateNormal,
    td.Normal,
    td.Bernoulli,
    td.Poisson,
    td.Categorical,
)


def _kind(distribution: Any) -> type[td.Distribution] | None:
    """The family that it samples as; None for others, and children with their own sampler."""
    for family in _KNOWN:
        if isinstance(distribution, family):
            own = type(distribution)
            same = own.sample is family.sample and own.rsample is family.rsample
            return family if same else None
    return None


def _noise(distribution: td.Distribution, like: Tensor, generator: torch.Generator) -> Tensor:
    shape = distribution.batch_shape + distribution.event_shape
    return rng.standard_normal(tuple(shape), generator, dtype=like.dtype, device=like.device)


# ---------------------------------------------------------------- gaps
def _patterns(x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers and mask of observed columns, for each pattern that has gaps."""
    observed = ~x.isnan()
    patterns, group = observed.unique(dim=0, return_inverse=True)
    for k, pattern in enumerate(patterns):
        if not bool(pattern.all()):
            yield (group == k).nonzero()[:, 0], pattern


def _gap_chunks(x: Tensor, flat: Tensors) -> Iterator[tuple[Tensor, Tensor, list[slice]]]:
    for index, pattern in _patterns(x):
        for rows, blocks in _chunks(len(index), flat):
            yield index[rows], pattern, blocks


@torch.no_grad()
def impute(model: Conditional, x: Tensor, flat: Tensors, *, generator: torch.Generator) -> Tensor:
    """One completed copy of ``x`` for each of the draws, ``(s, n, d)``."""
    filled = x.expand(_count(flat), *x.shape).clone()
    for rows, observed, blocks in _gap_chunks(x, flat):
        for block in blocks:
            drawn = draw_from(model.condition(x[rows], observed, pick(flat, block)), generator)
            copies = torch.arange(_count(flat), device=x.device)[block]
            missing = (~observed).nonzero()[:, 0]
            filled[copies[:, None, None], rows[None, :, None], missing] = drawn.to(x.dtype)
    return filled


@torch.no_grad()
def impute_mean(model: Conditional, x: Tensor, flat: Tensors) -> Tensor:
    """``x`` with its gaps filled by their expectation over all draws, ``(n, d)``."""
    filled = x.clone()
    for rows, observed, blocks in _gap_chunks(x, flat):
        missing = (~observed).nonzero()[:, 0]
        total = x.new_zeros(len(rows), len(missing))
        for block in blocks:
            total += model.condition(x[rows], observed, pick(flat, block)).mean.sum(0)
        filled[rows[:, None], missing] = total / _count(flat)
    return filled


def move(values: Any, device: torch.device) -> Any:
    """Nested mappings and lists with every tensor on ``device``."""
    if isinstance(values, Tensor):
        return values.to(device)
    if isinstance(values, Mapping):
        return {name: move(value, device) for name, value in values.items()}
    if isinstance(values, list):
        return [move(value, device) for value in values]
    return values
