"""Coordinate ascent on conjugate blocks: what EM and variational Bayes share.

A :class:`Rule` says how statistics become parameters, messages and a penalty; the rest - full
passes, memoised and stochastic minibatches, several starts in one batch - is the same for both.

References:
    Neal & Hinton (1998). A view of the EM algorithm that justifies incremental, sparse and other
    variants. Hughes & Sudderth (2013). Memoized online variational inference for Dirichlet process
    mixture models. Hoffman, Blei, Wang & Paisley (2013). Stochastic variational inference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bayesgen.capabilities import Partitioned, require
from bayesgen.conjugate import Local, add_statistics

if TYPE_CHECKING:
    from bayesgen.capabilities import Conjugate, Tensors
    from bayesgen.inference.conjugate.source import Source

__all__ = [
    "SCHEDULES",
    "STARTS",
    "Ascent",
    "Rule",
    "ascend",
    "begin",
    "check_schedule",
    "first_statistics",
    "pick",
    "stack",
]

SCHEDULES = ("full", "memoised", "stochastic")
STARTS = ("k-means++", "random")

Nested = dict[str, dict[str, Tensor]]


class Rule(ABC):
    """How an engine turns statistics into parameters."""

    @abstractmethod
    def solve(
        self, model: Conjugate, statistics: Mapping[str, Tensors], previous: Nested | None
    ) -> Nested:
        """Parameters of every block given summed statistics."""

    @abstractmethod
    def messages(self, model: Conjugate, parameters: Nested) -> Nested:
        """What the local step reads."""

    @abstractmethod
    def penalty(self, model: Conjugate, parameters: Nested) -> Tensor:
        """What is added to the local bound to give the objective, ``(...)``."""


class Ascent(NamedTuple):
    """State of coordinate ascent."""

    parameters: Nested
    """By block; leading dimension: starts."""
    statistics: Nested
    """Statistics of the pass under these parameters."""
    objective: Tensor
    """``(starts,)`` ELBO or penalised log likelihood of these parameters, in nats."""
    num_passes: int
    memory: Nested | None
    """Memoised statistics, with a leading dimension of batches."""
    entropies: Tensor | None
    """``(batches, starts)`` entropies of the memoised batches' latents."""
    left: Tensor | None = None
    """``(starts, n, k)`` where the local steps of a model that continues them stand."""


def check_schedule(schedule: str, batch_size: int | None, owner: str) -> None:
    """Refuse schedules that do not exist, and minibatches without a size."""
    if schedule not in SCHEDULES:
        raise ValueError(
            f"{owner}: schedule={schedule!r}, but it must be one of {', '.join(SCHEDULES)}."
        )
    if schedule != "full" and batch_size is None:
        raise ValueError(
            f"{owner}: schedule={schedule!r} works on minibatches; give batch_size as well."
        )


def pick(nested: Mapping[str, Tensors], index: Tensor | int) -> Nested:
    """Select along the leading dimension; an ``int`` keeps it, with size one."""
    index = torch.tensor([index]) if isinstance(index, int) else index
    return {
        b: {k: v[index.to(v.device)] for k, v in values.items()} for b, values in nested.items()
    }


def stack(items: list[Nested]) -> Nested:
    """Concatenate along the leading dimension."""
    first = items[0]
    return {
        block: {k: torch.cat([item[block][k] for item in items]) for k in values}
        for block, values in first.items()
    }


def _map(function: Callable[[Tensor], Tensor], nested: Mapping[str, Tensors]) -> Nested:
    return {b: {k: function(v) for k, v in values.items()} for b, values in nested.items()}


def begin(
    rule: Rule,
    source: Source,
    num_starts: int,
    generator: torch.Generator,
    *,
    kind: str = STARTS[0],
    varied: bool = False,
    limit: int = 20_000,
) -> Ascent:
    """Parameters of ``num_starts`` starts of one kind, found on at most ``limit`` rows."""
    rows = source.rows(limit, generator)
    start = first_statistics(source.model, rows, num_starts, generator, kind=kind, varied=varied)
    share = source.num_rows / len(rows)
    return evaluate(
        rule, source, rule.solve(source.model, _map(lambda s: s * share, start), None), 0
    )


def first_statistics(
    model: Conjugate,
    rows: Tensor,
    num_batch: int,
    generator: torch.Generator,
    *,
    kind: str = STARTS[0],
    varied: bool = False,
) -> Mapping[str, Tensors]:
    """Statistics of random starting guesses: the model's own, or whatever the rows hold."""
    if kind == "random":
        partitioned = require(model, Partitioned, "start='random'")
        return partitioned.scattered(rows, num_batch=num_batch, generator=generator, varied=varied)
    return model.start(rows, num_batch=num_batch, generator=generator, varied=varied)


def evaluate(
    rule: Rule,
    source: Source,
    parameters: Nested,
    num_passes: int,
    left: Tensor | None = None,
) -> Ascent:
    """One pass under given parameters: their statistics and objective."""
    local = source.sweep(rule.messages(source.model, parameters), left=left)
    objective = local.bound + rule.penalty(source.model, parameters)
    statistics, left = _nested(local.statistics), local.latents.get("left")
    return Ascent(parameters, statistics, objective, num_passes + 1, None, None, left)


def _nested(statistics: Mapping[str, Tensors]) -> Nested:
    return {block: dict(values) for block, values in statistics.items()}


def ascend(rule: Rule, source: Source, state: Ascent, schedule: str = "full") -> Ascent:
    """One step: a pass over all the data, whatever the schedule."""
    if schedule == "memoised":
        return _memoised(rule, source, state)
    if schedule == "stochastic":
        return _stochastic(rule, source, state)
    parameters = rule.solve(source.model, state.statistics, state.parameters)
    return evaluate(rule, source, parameters, state.num_passes, state.left)


def _memory(new: Nested, num_batches: int) -> Nested:
    """Room for the statistics of all batches: kept apart, they would scatter the heap."""
    return _map(lambda v: v.new_zeros((num_batches, *v.shape)), new)


def _memoised(rule: Rule, source: Source, state: Ascent) -> Ascent:
    """Every batch replaces its own old statistics, so the objective rises batch by batch."""
    model, parameters = source.model, state.parameters
    # The first pass fills the memory under fixed parameters; totals then are sums of its parts.
    total: Nested | None = None if state.memory is None else state.statistics
    memory: Nested | None = None
    entropies: Tensor | None = None
    left = None if state.left is None else state.left.clone()
    for index, observed in enumerate(source):
        messages = rule.messages(model, parameters)
        local = _one(source, observed, messages, left, index)
        new = _nested(local.statistics)
        entropy = local.bound - model.inner(messages, new)
        if memory is None or entropies is None:
            memory = _memory(new, source.num_batches)
            entropies = entropy.new_zeros((source.num_batches, *entropy.shape))
        entropies[index] = entropy
        for block, values in new.items():
            for name, value in values.items():
                memory[block][name][index] = value
        if state.memory is None or total is None:
            total = add_statistics(total, new)
            continue
        old = state.memory
        total = {
            b: {k: v + new[b][k] - old[b][k][index] for k, v in s.items()}
            for b, s in total.items()
        }
        parameters = rule.solve(model, total, parameters)
    assert memory is not None
    assert entropies is not None
    # Differences of sums drift by rounding: each pass ends with the plain sum again.
    total = _map(lambda v: v.sum(0), memory)
    parameters = rule.solve(model, total, parameters)
    messages = rule.messages(model, parameters)
    objective = model.inner(messages, total) + entropies.sum(0) + rule.penalty(model, parameters)
    return Ascent(parameters, total, objective, state.num_passes + 1, memory, entropies, left)


def _one(
    source: Source,
    observed: Any,
    messages: Mapping[str, Tensors],
    left: Tensor | None,
    index: int,
) -> Local:
    """The local step of one batch; what it leaves takes its place in ``left``."""
    local = source.local(observed, messages, left, index)
    if left is not None:
        left[..., source.rows_of(index), :] = local.latents["left"]
    return local


def _stochastic(rule: Rule, source: Source, state: Ascent) -> Ascent:
    """Robbins-Monro steps on the statistics; the objective is the pass's running estimate."""
    model, parameters, total = source.model, state.parameters, state.statistics
    objective: Tensor | float = 0.0
    left = None if state.left is None else state.left.clone()
    rows = 0
    for index, observed in enumerate(source):
        local = _one(source, observed, rule.messages(model, parameters), left, index)
        size = min(source.batch_size, source.num_rows - rows)
        rows += size
        scale = source.num_rows / size
        rate = (2.0 + state.num_passes * source.num_batches + index) ** -0.7
        total = {
            b: {k: (1.0 - rate) * v + rate * scale * local.statistics[b][k] for k, v in s.items()}
            for b, s in total.items()
        }
        objective = objective + local.bound
        parameters = rule.solve(model, total, parameters)
    assert isinstance(objective, Tensor)
    objective = objective + rule.penalty(model, parameters)
    return Ascent(parameters, total, objective, state.num_passes + 1, None, None, left)


def final(rule: Rule, source: Source, state: Ascent, schedule: str) -> Ascent:
    """The exact objective and statistics of the last parameters; full passes have them already."""
    if schedule == "full":
        return state
    return evaluate(rule, source, state.parameters, state.num_passes, state.left)
