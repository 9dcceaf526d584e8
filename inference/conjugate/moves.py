"""Moves for variational Bayes on interchangeable components.

Coordinate ascent stops at the nearest local optimum, so the number of clusters would depend on
the start. A move proposes other statistics - two components pooled, one removed, one cut in two,
all in order of size; on small data also rows relabelled at random - lets all candidates climb
together in one batch, and is accepted only if the exact bound of the whole data rises.

References:
    Hughes & Sudderth (2013). Memoized online variational inference for Dirichlet process mixture
    models.
    Ueda, Nakano, Ghahramani & Hinton (2000). SMEM algorithm for mixture models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesgen import verbs
from bayesgen.capabilities import Conditional
from bayesgen.data import Dataset
from bayesgen.inference.conjugate.coordinate import (
    Ascent,
    Nested,
    Rule,
    ascend,
    evaluate,
    pick,
    stack,
)
from bayesgen.inference.conjugate.proposals import MAX_ROWS, OCCUPIED, PROPOSALS, is_cheap
from bayesgen.inference.conjugate.source import Source

__all__ = ["KINDS", "attempt", "num_occupied"]

KINDS = (*PROPOSALS, "fill")

# Passes that candidates climb before those without hope are dropped, on small data, and at most.
_PATIENCE = 8
# A detour: Gibbs chains, sweeps between two climbs, and climbs at most.
_CHAINS = 40
_SWEEPS = 20
_DETOURS = 5
_CLIMB = 40
_SETTLE = 200
# Rounds of shakes, each drawn anew, before they are given up.
_ROUNDS = 3
# Rows times components times candidates that climb together: bounds a round's memory and time.
_BUDGET = 4_000_000


def num_occupied(source: Source, statistics: Nested) -> Tensor:
    """``(...)`` components that hold at least half a row."""
    return (source.partitioned.occupancy(statistics) > OCCUPIED).sum(-1)


def attempt(
    kind: str, rule: Rule, source: Source, state: Ascent, gain: float, generator: torch.Generator
) -> tuple[Ascent, bool]:
    """Try one kind of move on a single start; ``gain`` is the least rise in nats to accept."""
    if kind == "fill":
        return _filled(rule, source, state, gain, generator)
    propose, only_small = PROPOSALS[kind]
    cheap = is_cheap(source, state)
    if only_small and not cheap:
        return state, False
    if kind == "detour":
        return _detour(rule, source, state, gain, generator)
    components = source.partitioned.occupancy(state.statistics).shape[-1]
    size = max(2, min(40 if cheap else 12, _BUDGET // (source.num_rows * components)))
    for _ in range(_ROUNDS if kind == "shake" else 1):
        proposals = propose(source, state, generator)
        rounds = 2 if kind == "merge" else len(proposals)
        for first in range(0, min(len(proposals), rounds * size), size):
            chosen = stack(proposals[first : first + size])
            patience = _PATIENCE if cheap else 1
            winner = _climb(rule, source, state, chosen, gain, patience)
            if winner is not None:
                return winner, True
    return state, False


def _climb(
    rule: Rule, source: Source, state: Ascent, candidates: Nested, gain: float, patience: int
) -> Ascent | None:
    """Let candidates climb as one batch; the best one, settled, if it beats the current state."""
    count = len(next(iter(next(iter(candidates.values())).values())))
    previous = pick(state.parameters, torch.zeros(count, dtype=torch.int64))
    start = rule.solve(source.model, candidates, previous)
    batch = evaluate(rule, source, start, state.num_passes)
    target = float(state.objective[0]) + gain
    for step in range(1, _CLIMB + 1):
        new = ascend(rule, source, batch)
        rise = new.objective - batch.objective
        batch = new
        won = batch.objective > target
        if bool(won.all()):
            break
        # A candidate below the target that rises too slowly to reach it is dropped.
        alive = won | (batch.objective + 20.0 * rise > target)
        if step < patience or bool(alive.all()):
            continue
        if not bool(alive.any()):
            return None
        batch = _take(batch, torch.nonzero(alive).squeeze(-1))
    best = batch.objective.argmax()
    if float(batch.objective[best]) <= target:
        return None
    return _settle(rule, source, _take(batch, best.unsqueeze(0)), gain)


def _detour(
    rule: Rule, source: Source, state: Ascent, gain: float, generator: torch.Generator
) -> tuple[Ascent, bool]:
    """Gibbs chains from states with a component more or less; now and then all of them climb."""
    proposals = PROPOSALS["detour"][0](source, state, generator)
    if not proposals:
        return state, False
    chain = torch.arange(_CHAINS, device=state.objective.device) % len(proposals)
    statistics, values = pick(stack(proposals), chain), None
    blocks = source.model.blocks
    for _ in range(_DETOURS):
        for _ in range(_SWEEPS):
            values = {
                name: dict(
                    block.draw(
                        statistics[name],
                        None if values is None else values[name],
                        generator=generator,
                    )
                )
                for name, block in blocks.items()
            }
            messages = {name: block.natural(values[name]) for name, block in blocks.items()}
            local = source.sweep(messages, generator=generator)
            statistics = {b: dict(s) for b, s in local.statistics.items()}
        winner = _climb(rule, source, state, statistics, gain, _PATIENCE)
        if winner is not None:
            return winner, True
    return state, False


def _filled(
    rule: Rule, source: Source, state: Ascent, gain: float, generator: torch.Generator
) -> tuple[Ascent, bool]:
    """Fill the gaps of the rows at random, search there with all moves, climb from what is found.

    Passes over rows with gaps cost far more: one for each pattern of gaps.
    """
    model = source.model
    if source.num_rows > MAX_ROWS or not isinstance(model, Conditional):
        return state, False
    rows = source.rows(MAX_ROWS, generator)
    if not bool(rows.isnan().any()):
        return state, False
    values = {
        name: {
            site: value[:, 0]
            for site, value in block.sample(state.parameters[name], 1, generator=generator).items()
        }
        for name, block in model.blocks.items()
    }
    complete = verbs.impute(model, rows, model.export(values), generator=generator)[0]
    data = Dataset.from_codes(complete, source.data.schema)
    inner = Source(model, data, dtype=source.dtype, device=source.device)
    found = evaluate(rule, inner, state.parameters, state.num_passes)
    if not is_cheap(inner, found):
        return state, False
    found = _settle(rule, inner, found, gain)
    failures = 0
    while failures < len(PROPOSALS):
        for kind in PROPOSALS:
            found, moved = attempt(kind, rule, inner, found, gain, generator)
            failures = 0 if moved else failures + 1
    winner = _climb(rule, source, state, found.statistics, gain, _PATIENCE)
    return (state, False) if winner is None else (winner, True)


def _settle(rule: Rule, source: Source, state: Ascent, gain: float) -> Ascent:
    """Climb until the next move has something to beat."""
    for _ in range(_SETTLE):
        new = ascend(rule, source, state)
        settled = float(new.objective - state.objective) < 0.1 * gain
        state = new
        if settled:
            break
    return state


def _take(state: Ascent, index: Tensor) -> Ascent:
    """Some members of a batch."""
    return Ascent(
        pick(state.parameters, index),
        pick(state.statistics, index),
        state.objective[index],
        state.num_passes,
        None,
        None,
    )
