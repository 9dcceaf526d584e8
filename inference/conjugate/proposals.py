"""Proposals of moves between local optima of variational Bayes: other statistics to climb from.

Each function takes a single-start state and returns candidate statistics ``(1, K, ...)``, the most
promising first.

References:
    Hughes & Sudderth (2013). Memoized online variational inference for Dirichlet process mixture
    models.
    Ueda, Nakano, Ghahramani & Hinton (2000). SMEM algorithm for mixture models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen.inference.conjugate.coordinate import Ascent, Nested, pick

if TYPE_CHECKING:
    from bayesgen.inference.conjugate.source import Source

__all__ = ["MAX_ROWS", "OCCUPIED", "PROPOSALS", "is_cheap"]

OCCUPIED = 0.5
MAX_ROWS = 10_000
_MERGES = 48
# Candidates of one round of shakes, and the share of the rows that they relabel in turn.
_SHAKES = 40
_FORCE = (0.02, 0.05, 0.1, 0.2, 0.4)
# Share of the rows, the least probable ones, that form a component of their own.
_STRAYS = (0.01, 0.02, 0.04, 0.08, 0.16)
_REMIXES = 3
# Products that one pass of a whole round may cost: about ten milliseconds.
_CHEAP = 30_000_000


def is_cheap(source: Source, state: Ascent) -> bool:
    """Whether the data are so small that many random candidates cost less than a second.

    Rows with holes or scales of their own cost far more than the products that are counted here.
    """
    components = source.partitioned.occupancy(state.statistics).shape[-1]
    cost = source.num_rows * components * _SHAKES * source.model.row_size
    if source.num_rows > MAX_ROWS or cost > _CHEAP:
        return False
    return all(source.partitioned.collapsible(observed) for observed in source)


def _occupied(source: Source, state: Ascent) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes ``(K,)``, occupied components by decreasing size, empty ones."""
    size = source.partitioned.occupancy(state.statistics)[0]
    order = size.argsort(descending=True)
    return size, order[size[order] > OCCUPIED], order[size[order] <= OCCUPIED]


# ------------------------------------------------------------ by statistics alone
def _merges(source: Source, state: Ascent, generator: torch.Generator) -> list[Nested]:
    """Pooled pairs, the most promising by their exact evidence first."""
    _, occupied, _ = _occupied(source, state)
    pairs = torch.combinations(occupied, 2)
    if len(pairs) == 0:
        return []
    pooled = {b: {k: _pool(v, pairs) for k, v in s.items()} for b, s in state.statistics.items()}
    order = _evidence(source, state, pooled).argsort(descending=True)
    return [pick(pooled, order[i : i + 1]) for i in range(min(len(order), _MERGES))]


def _pool(value: Tensor, pairs: Tensor) -> Tensor:
    index = torch.arange(len(pairs), device=value.device)
    out = value.expand(len(pairs), *value.shape[1:]).clone()
    out[index, pairs[:, 0]] += out[index, pairs[:, 1]]
    out[index, pairs[:, 1]] = 0.0
    return out


def _evidence(source: Source, state: Ascent, candidates: Nested) -> Tensor:
    """Log evidence of candidates as if assignments were hard, ``(m,)``: for ranking only."""
    count = len(next(iter(next(iter(candidates.values())).values())))
    total = torch.zeros(count, dtype=torch.float64, device=state.objective.device)
    for name, block in source.partitioned.blocks.items():
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


def _copy(statistics: Nested) -> Nested:
    return {b: {n: v.clone() for n, v in s.items()} for b, s in statistics.items()}


def _sorts(source: Source, state: Ascent, generator: torch.Generator) -> list[Nested]:
    """Components by decreasing size, which priors with an order prefer."""
    order = source.partitioned.occupancy(state.statistics)[0].argsort(descending=True, stable=True)
    if bool((order.diff() == 1).all()):
        return []
    ordered: Nested = {
        b: {n: v[:, order] for n, v in s.items()} for b, s in state.statistics.items()
    }
    return [ordered]


# ------------------------------------------------------------ by labels of rows
def _splits(source: Source, state: Ascent, generator: torch.Generator) -> list[Nested]:
    """Each component cut in two by 2-means on its own rows, the largest first."""
    model = source.partitioned
    size, occupied, empty = _occupied(source, state)
    if len(empty) == 0:
        return []
    rows = source.rows(MAX_ROWS, generator)
    share = source.num_rows / len(rows)
    labels, _ = _labels(source, state, rows)
    slot = int(empty[0])
    out = []
    for k in occupied.tolist():
        own = torch.nonzero(labels == k).squeeze(-1)
        half = _two_means(model.embed(rows[own]), generator)
        if half is None:
            continue
        pair = torch.where(half, slot, k)
        parts = model.assigned(model.observe(rows[own]), _hot(pair, len(size)))
        candidate = _copy(state.statistics)
        for b, values in candidate.items():
            for n, value in values.items():
                value[:, [k, slot]] = share * parts[b][n][:, [k, slot]]
        out.append(candidate)
    return out


def _strays(source: Source, state: Ascent, generator: torch.Generator) -> list[Nested]:
    """The least probable rows as a component of their own."""
    size, _, empty = _occupied(source, state)
    if len(empty) == 0:
        return []
    rows = source.rows(MAX_ROWS, generator)
    labels, log_density = _labels(source, state, rows)
    order = log_density.argsort()
    moved = []
    for share in _STRAYS:
        new = labels.clone()
        new[order[: max(1, round(share * len(rows)))]] = empty[0]
        moved.append(new)
    return _relabelled(source, rows, moved, len(size))


def _remixes(source: Source, state: Ascent, generator: torch.Generator) -> list[Nested]:
    """Two components pooled and cut anew by 2-means, the most overlapping pairs first."""
    size, occupied, _ = _occupied(source, state)
    pairs = torch.combinations(occupied, 2)
    if len(pairs) == 0:
        return []
    pooled = {b: {k: _pool(v, pairs) for k, v in s.items()} for b, s in state.statistics.items()}
    order = _evidence(source, state, pooled).argsort(descending=True)[: _SHAKES // _REMIXES]
    rows = source.rows(MAX_ROWS, generator)
    labels, _ = _labels(source, state, rows)
    points, moved = source.partitioned.embed(rows), []
    for first, second in pairs[order].tolist():
        own = torch.nonzero((labels == first) | (labels == second)).squeeze(-1)
        for _ in range(_REMIXES):
            half = _two_means(points[own], generator, random=True)
            if half is not None:
                new = labels.clone()
                new[own] = torch.where(half, first, second)
                moved.append(new)
    return _relabelled(source, rows, moved, len(size))


def _shakes(source: Source, state: Ascent, generator: torch.Generator) -> list[Nested]:
    """Some rows relabelled at random; every fourth time an empty component takes part."""
    size, occupied, empty = _occupied(source, state)
    rows = source.rows(MAX_ROWS, generator)
    labels, _ = _labels(source, state, rows)
    moved = []
    for j in range(_SHAKES):
        slots = torch.cat([occupied, empty[:1]]) if j % 4 == 3 else occupied
        chosen = _uniform(rows, generator) < _FORCE[j % len(_FORCE)]
        target = slots[(_uniform(rows, generator) * len(slots)).long()]
        moved.append(torch.where(chosen, target, labels))
    return _relabelled(source, rows, moved, len(size))


def _detours(source: Source, state: Ascent, generator: torch.Generator) -> list[Nested]:
    """One component more or less, in many ways: where chains set out."""
    return [
        *_splits(source, state, generator),
        *_strays(source, state, generator),
        *_merges(source, state, generator)[:_REMIXES],
    ]


def _relabelled(
    source: Source, rows: Tensor, labels: list[Tensor], components: int
) -> list[Nested]:
    observed = source.model.observe(rows)
    return [
        {
            b: dict(s)
            for b, s in source.partitioned.assigned(observed, _hot(new, components)).items()
        }
        for new in labels
    ]


def _hot(labels: Tensor, components: int) -> Tensor:
    shape = (1, components, len(labels))
    hot = torch.zeros(shape, dtype=torch.float64, device=labels.device)
    return hot.scatter_(1, labels[None, None], 1.0)


def _labels(source: Source, state: Ascent, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Most probable component of each row and its log density, ``(m,)`` each."""
    blocks = source.model.blocks
    messages = {name: block.message(state.parameters[name]) for name, block in blocks.items()}
    labels, log_density = [], []
    for chunk in rows.split(source.batch_size):
        observed = source.model.observe(chunk)
        local = source.model.local(observed, messages)
        best = local.latents["responsibilities"][0].argmax(0)
        scores = source.partitioned.component_scores(observed, messages["components"])[0]
        labels.append(best)
        log_density.append(scores.gather(0, best.unsqueeze(0)).squeeze(0))
    return torch.cat(labels), torch.cat(log_density)


def _two_means(
    points: Tensor, generator: torch.Generator, *, random: bool = False
) -> Tensor | None:
    """Which rows fall into the second half, ``(m,)`` boolean; None when they cannot be cut."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if len(points) < 2:
        return None
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        means = KMeans(
            2,
            n_init=1 if random else 2,
            init="random" if random else "k-means++",
            random_state=seed,
        )
        labels = means.fit_predict(points.double().cpu().numpy())
    half = torch.as_tensor(labels == 1, device=points.device)
    return half if bool(half.any()) and not bool(half.all()) else None


def _uniform(rows: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(
        len(rows), generator=generator, device=generator.device, dtype=torch.float64
    ).to(rows.device)


Propose = Callable[["Source", Ascent, torch.Generator], list[Nested]]

PROPOSALS: dict[str, tuple[Propose, bool]] = {
    "merge": (_merges, False),
    "delete": (_deletes, False),
    "split": (_splits, False),
    "sort": (_sorts, False),
    "strays": (_strays, True),
    "remix": (_remixes, True),
    "shake": (_shakes, True),
    "detour": (_detours, True),
}
"""By name, in the order of trying: the function, and whether it is for small data only."""
