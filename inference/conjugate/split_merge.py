"""Split-merge Metropolis-Hastings moves for Gibbs sampling of mixtures, many chains at once.

Gibbs sampling alone cannot leave a mode in which two clusters share a component. A move picks two
rows: in one component, it proposes to split that component between them; in two, to merge them.
The split is drawn from a *launch*: a short deterministic EM between the two rows, which depends on
the pooled rows only, so the reverse probability is available in closed form. Weights and
parameters are integrated out.

References:
    Jain & Neal (2004). A split-merge Markov chain Monte Carlo procedure for the Dirichlet process
    mixture model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bayesgen.capabilities import Partitioned, Tensors

__all__ = ["Moved", "split_merge"]

_LAUNCH_STEPS = 8
_SHARPNESS = (1.0, 0.5)

Nested = dict[str, dict[str, Tensor]]


class Moved(NamedTuple):
    """Result of one attempt in every chain."""

    labels: Tensor
    statistics: Nested
    accepted: Tensor
    """``(chains,)`` boolean."""


def _hot(labels: Tensor, num_components: int, dtype: torch.dtype) -> Tensor:
    shape = (*labels.shape[:-1], num_components, labels.shape[-1])
    hot = torch.zeros(shape, dtype=dtype, device=labels.device)
    return hot.scatter_(-2, labels.unsqueeze(-2), 1.0)


def split_merge(
    model: Partitioned,
    observed: Any,
    points: Tensor,
    labels: Tensor,
    statistics: Nested,
    values: Mapping[str, Tensors],
    *,
    generator: torch.Generator,
    exact: bool = True,
) -> Moved:
    """One attempt in every chain.

    Args:
        model: The bound model; labels alone must determine its statistics.
        observed: All rows, observed.
        points: ``(n, e)`` embedding, where the launch starts from the nearer of the two rows.
        labels: ``(chains, n)``.
        statistics: Statistics of these labels.
        values: Current values of the blocks; only hyperparameters are read.
        generator: Source of randomness.
        exact: With the Hastings correction, so that the posterior is left invariant. Without it,
            for warm-up, evidence alone decides: chains then find the posterior's bulk in few
            sweeps.
    """
    chains, n = labels.shape
    size = model.occupancy(statistics)
    components = size.shape[-1]
    chain = torch.arange(chains, device=labels.device)
    first = torch.randint(n, (chains,), generator=generator, device=labels.device)
    # A second row other than the first, uniformly.
    second = torch.randint(n - 1, (chains,), generator=generator, device=labels.device)
    second = second + (second >= first)
    own, other = labels[chain, first], labels[chain, second]
    splitting = own == other
    empty = size < 0.5
    num_empty = empty.sum(-1)
    slot = torch.multinomial(
        torch.where(empty, 1.0, 0.0) + 1e-9 * (~empty), 1, generator=generator
    ).squeeze(-1)
    target = torch.where(splitting, slot, other)

    pooled = (labels == own.unsqueeze(-1)) | (labels == other.unsqueeze(-1))
    log_odds = _launch(model, observed, points, pooled, first, second, values)
    if exact:
        # A sharp launch finds good splits; a blunt one can reverse merges of odd-shaped pieces.
        sharpness = torch.tensor(_SHARPNESS, dtype=log_odds.dtype, device=labels.device)
        choice = torch.randint(
            len(sharpness), (chains,), generator=generator, device=labels.device
        )
        sharpness = sharpness[choice]
        log_odds = sharpness.unsqueeze(-1) * log_odds
    uniform = torch.rand(
        log_odds.shape, generator=generator, dtype=log_odds.dtype, device=labels.device
    )
    drawn = uniform.log() < torch.nn.functional.logsigmoid(log_odds)
    side = torch.where(splitting.unsqueeze(-1), drawn, labels == other.unsqueeze(-1))
    side[chain, first], side[chain, second] = False, True
    free = pooled.clone()
    free[chain, first] = free[chain, second] = False
    signed = torch.where(side, log_odds, -log_odds)
    log_path = torch.where(free, torch.nn.functional.logsigmoid(signed), 0.0).sum(-1)

    apart = torch.where(pooled & side, target.unsqueeze(-1), own.unsqueeze(-1))
    split_labels = torch.where(pooled, apart, labels)
    merged_labels = torch.where(pooled, own.unsqueeze(-1), labels)
    proposal = torch.where(splitting.unsqueeze(-1), split_labels, merged_labels)
    new = model.assigned(observed, _hot(proposal, components, points.dtype))
    change = _log_evidence(model, new, values) - _log_evidence(model, statistics, values)
    log_choice = log_path - _log_slots(splitting, num_empty)
    forward = torch.where(splitting, 1.0, -1.0) * log_choice * float(exact)
    u = torch.rand(chains, generator=generator, dtype=change.dtype, device=labels.device)
    accepted = (u.log() < change - forward) & (~splitting | (num_empty > 0))
    return Moved(
        torch.where(accepted.unsqueeze(-1), proposal, labels),
        {
            b: {k: _choose(accepted, new[b][k], v) for k, v in s.items()}
            for b, s in statistics.items()
        },
        accepted,
    )


def _log_slots(splitting: Tensor, num_empty: Tensor) -> Tensor:
    """Log number of slots that the split chose from; a merge empties one that its reverse has."""
    return torch.where(splitting, num_empty, num_empty + 1).clamp_min(1).log()


def _choose(accepted: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(accepted.reshape(-1, *[1] * (old.ndim - 1)), new, old)


def _log_evidence(
    model: Partitioned, statistics: Mapping[str, Tensors], values: Mapping[str, Tensors]
) -> Tensor:
    total: Tensor | float = 0.0
    for name, block in model.blocks.items():
        part = block.log_evidence(statistics[name], values[name])
        total = total + (part if part.ndim == 1 else part.sum(-1))
    assert isinstance(total, Tensor)
    return total


def _launch(
    model: Partitioned,
    observed: Any,
    points: Tensor,
    pooled: Tensor,
    first: Tensor,
    second: Tensor,
    values: Mapping[str, Tensors],
) -> Tensor:
    """Log odds ``(chains, n)`` of the second row's side: a short EM on the pooled rows."""
    a, b = points[first], points[second]
    # |x - a|^2 - |x - b|^2 without a (chains, n, e) tensor.
    gap = 2.0 * (b - a) @ points.T + (a.square().sum(-1) - b.square().sum(-1)).unsqueeze(-1)
    weight = (gap > 0).to(points.dtype)
    block = model.blocks["components"]
    hyper = values["components"]
    mask = pooled.to(points.dtype)
    log_odds = gap
    for _ in range(_LAUNCH_STEPS):
        pair = torch.stack([(1.0 - weight) * mask, weight * mask], dim=-2)
        statistics = model.assigned(observed, pair)
        message = block.message(block.update(statistics["components"], hyper))
        scores = model.component_scores(observed, message)
        share = torch.log(model.occupancy(statistics) + 0.5)
        log_odds = (
            scores[..., 1, :] - scores[..., 0, :] + (share[..., 1] - share[..., 0]).unsqueeze(-1)
        ).to(points.dtype)
        weight = torch.sigmoid(log_odds)
    return log_odds
