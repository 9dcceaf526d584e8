"""Merge, delete and split moves for variational Bayes on interchangeable components.

Coordinate ascent stops at the nearest local optimum, so the number of clusters would depend on the
start. A move proposes other statistics - two components pooled, one removed, one cut in two - lets all
candidates climb together in one batch, and is accepted only if the exact bound of the whole data rises.

References:
    Hughes & Sudderth (2013). Memoized online variational inference for Dirichlet process mixture models.
    Ueda, Nakano, Ghahramani & Hinton (2000). SMEM algorithm for mixture models.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen.inference.coordinate import Ascent, Nested, Rule, ascend, evaluate, pick, stack

if TYPE_CHECKING:
    from bayesgen.inference.source import Source

__all__ = ["KINDS", "attempt", "num_occupied"]

KINDS = ("merge", "delete", "split")

_OCCUPIED = 0.5
_CLIMB = 30
_SAMPLE = 10_000
# Rows times components times candidates that climb together: bounds the memory and time of a round.
_BUDGET = 4_000_000


def num_occupied(source: Source, statistics: Nested) -> Tensor:
    """``(...)`` components that hold at least half a row."""
    return (source.model.occupancy(statistics) > _OCCUPIED).sum(-1)


def attempt(
    kind: str, rule: Rule, source: Source, state: Ascent, gain: float, generator: torch.Generator
) -> tuple[Ascent, bool]:
    """Try one kind of move on a single-start state; ``gain`` is the least rise in nats to accept."""
    proposals = {"merge": _merges, "delete": _deletes, "split": _splits}[kind](
        source, state, generator
    )
    components = source.model.occupancy(state.statistics).shape[-1]
    size = max(2, min(12, _BUDGET // (source.num_rows * components)))
    rounds = 2 if kind == "merge" else len(proposals)
    for first in range(0, min(len(proposals), rounds * size), size):
        chosen = stack(proposals[first : first + size])
        winner = _climb(rule, source, state, chosen, gain)
        if winner is not None:
            return winner, True
    return state, False


def _climb(
    rule: Rule, source: Source, state: Ascent, candidates: Nested, gain: float
) -> Ascent | None:
    """Let candidates climb as one batch; the best one if it beats the current state."""
    count = len(next(iter(next(iter(candidates.values())).values())))
    previous = pick(state.parameters, torch.zeros(count, dtype=torch.int64))
    batch = evaluate(
        rule, source, rule.solve(source.model, candidates, previous), state.num_passes
    )
    target = float(state.objective[0]) + gain
    for _ in range(_CLIMB):
        new = ascend(rule, source, batch)
        rise = new.objective - batch.objective
        batch = new
        # A candidate below the target that rises too slowly to reach it is settled; so is a winner.
        hopeful = (batch.objective < target) & (batch.objective + 20.0 * rise > target)
        if not bool(hopeful.any()):
            break
    best = int(batch.objective.argmax())
    if float(batch.objective[best]) <= target:
        return None
    one = torch.tensor([best], device=batch.objective.device)
    return Ascent(
        pick(batch.parameters, one),
        pick(batch.statistics, one),
        batch.objective[one],
        batch.num_passes,
        None,
        None,
    )


def _occupied(source: Source, state: Ascent) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes ``(K,)``, occupied components by decreasing size, empty ones."""
    size = source.model.occupancy(state.statistics)[0]
    order = size.argsort(descending=True)
    return size, order[size[order] > _OCCUPIED], order[size[order] <= _OCCUPIED]


def _copy(statistics: Nested) -> Nested:
    return {b: {n: v.clone() for n, v in s.items()} for b, s in statistics.items()}


def _merges(source: Source, state: Ascent, generator: torch.Generator) -> list[Nested]:
    """Pooled pairs, the most promising by their exact evidence first."""
    size, occupied, _ = _occupied(source, state)
    pairs = torch.combinations(occupied, 2)
    if len(pairs) == 0:
        return []
    pooled = {b: {k: _pool(v, pairs) for k, v in s.items()} for b, s in state.statistics.items()}
    order = _evidence(source, state, pooled).argsort(descending=True)
    return [pick(pooled, order[i : i + 1]) for i in range(min(len(order), 48))]


def _pool(value: Tensor, pairs: Tensor) -> Tensor:
    index = torch.arange(len(pairs), device=value.device)
    out = value.expand(len(pairs), *value.shape[1:]).clone()
    out[index, pairs[:, 0]] += out[index, pairs[:, 1]]
    out[index, pairs[:, 1]] = 0.0
    return out


def _evidence(source: Source, state: Ascent, candidates: Nested) -> Tensor:
    """Log evidence of candidate statistics as if assignments were hard, ``(m,)``: for ranking only."""
    count = len(next(iter(next(iter(candidates.values())).values())))
    total = torch.zeros(count, dtype=torch.float64, device=state.objective.device)
    for name, block in source.model.blocks.items():
        part = block.log_evidence(candidates[name], state.parameters[name])
        total = total + part.reshape(count, -1).sum(-1)
    return total


def _deletes(source: Source, state: Ascent, generator: torch.Generator) -> list[Nested]:
    """One component's statistics dropped, the smallest first; the others take over its rows."""
    _, occupied, _ = _occupied(source, state)
    if len(occupied) < 2:
        return []
    out = []
    for k in occupied.flip(0).tolist():
        candidate = _copy(state.statistics)
        for values in candidate.values():
            for value in values.values():
                value[:, k] = 0.0
        out.append(candidate)
    return out


def _splits(source: Source, state: Ascent, generator: torch.Generator) -> list[Nested]:
    """Each component cut in two by 2-means on its own rows, the largest first."""
    model = source.model
    size, occupied, empty = _occupied(source, state)
    if len(empty) == 0:
        return []
    rows = source.rows(_SAMPLE, generator)
    share = source.num_rows / len(rows)
    labels = _labels(source, state, rows)
    out = []
    for k in occupied.tolist():
        own = torch.nonzero(labels == k).squeeze(-1)
        half = _two_means(model.embed(rows[own]), generator)
        if half is None:
            continue
        hot = torch.zeros((1, len(size), len(own)), dtype=torch.float64, device=rows.device)
        hot[0, k], hot[0, int(empty[0])] = (~half).double(), half.double()
        parts = model.assigned(model.observe(rows[own]), hot)
        candidate = _copy(state.statistics)
        for b, values in candidate.items():
            for n, value in values.items():
                for slot in (k, int(empty[0])):
                    value[:, slot] = share * parts[b][n][:, slot]
        out.append(candidate)
    return out


def _labels(source: Source, state: Ascent, rows: Tensor) -> Tensor:
    """Most probable component of each row, ``(m,)``; the statistics carry the posterior's message."""
    messages = {
        name: block.message(state.parameters[name]) for name, block in source.model.blocks.items()
    }
    labels = []
    for chunk in rows.split(source.batch_size):
        local = source.model.local(source.model.observe(chunk), messages)
        labels.append(local.latents["responsibilities"][0].argmax(0))
    return torch.cat(labels)


def _two_means(points: Tensor, generator: torch.Generator) -> Tensor | None:
    """Which rows fall into the second half, ``(m,)`` boolean; None when they cannot be cut."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if len(points) < 2:
        return None
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = KMeans(2, n_init=2, random_state=seed).fit_predict(points.double().cpu().numpy())
    half = torch.as_tensor(labels == 1, device=points.device)
    return half if bool(half.any()) and not bool(half.all()) else None
