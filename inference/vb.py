"""Variational Bayes on conjugate blocks, with moves that look beyond the nearest optimum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bayesgen.capabilities import Conjugate, Partitioned
from bayesgen.inference.checks import check_choice, check_settings
from bayesgen.inference.conjugate.coordinate import (
    STARTS,
    Ascent,
    Nested,
    Rule,
    ascend,
    begin,
    check_schedule,
    final,
    pick,
)
from bayesgen.inference.conjugate.moves import KINDS, attempt, num_occupied
from bayesgen.inference.conjugate.source import Source
from bayesgen.inference.run import Engine, Info, Task

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["VB"]

# Rise in nats a row at which starts give way to moves.
_ROUGH = 1e-4


@dataclass(frozen=True)
class _Expectation(Rule):
    """Blocks by their variational posterior."""

    def solve(
        self, model: Conjugate, statistics: Mapping[str, Tensors], previous: Nested | None
    ) -> Nested:
        return {
            name: dict(
                block.update(statistics[name], None if previous is None else previous[name])
            )
            for name, block in model.blocks.items()
        }

    def messages(self, model: Conjugate, parameters: Nested) -> Nested:
        return {
            name: dict(block.message(parameters[name])) for name, block in model.blocks.items()
        }

    def penalty(self, model: Conjugate, parameters: Nested) -> Tensor:
        parts = [block.kl(parameters[name]) for name, block in model.blocks.items()]
        return -torch.stack(torch.broadcast_tensors(*parts)).sum(0)


class VBState(NamedTuple):
    """State of variational Bayes: an ascent, and where the search for a better optimum stands."""

    parameters: Nested
    statistics: Nested
    objective: Tensor
    num_passes: int
    memory: Nested | None
    entropies: Tensor | None
    left: Tensor | None
    phase: str
    """``"starts"`` (all starts climb), ``"moves"``, ``"polish"`` (the winner climbs to the end).
    """
    kind: int
    """Which kind of move comes next."""
    failures: int
    """Kinds in a row that found nothing."""

    @property
    def ascent(self) -> Ascent:
        """The part that coordinate ascent sees."""
        return Ascent(*self[:7])


@dataclass(frozen=True, eq=False)
class VB(Engine[VBState]):
    r"""Variational Bayes: the factorised posterior with the highest evidence lower bound.

    .. math:: \mathrm{ELBO} = E_q[\log p(x, z, \theta) - \log q(z)\,q(\theta)] \le \log p(x)

    Several starts climb in one batch (for a mixture by k-means++, from two clusters to all
    components). Where rows belong to components, the best goes on with moves that merge, delete,
    split or sort them and, on small data, relabel rows at random. Each is accepted only if the
    exact ELBO of all the data rises, so the number of clusters is not left to the start.
    ``fit.history["elbo"]`` never falls under the schedules ``"full"`` and ``"memoised"`` (a fall
    beyond rounding raises).

    References:
        Attias (2000). A variational Bayesian framework for graphical models. Hughes & Sudderth
        (2013). Memoized online variational inference for Dirichlet process mixture models.
        Hoffman, Blei, Wang & Paisley (2013). Stochastic variational inference.

    Args:
        num_starts: Starts, as the model makes them.
        start: ``"k-means++"``: the model's own starts, clusters for a mixture. ``"random"``:
            responsibilities at random, the better start of a mixture on sparse binary rows and
            counts.
        tolerance: Converged when the ELBO rises by less than this, in nats a row.
        max_steps: Steps at most; a step is a pass over the data, or one round of moves.
        moves: Whether to search by moves after the ascent of the starts; a model without
            components has none.
        num_samples: Draws from the variational posterior that the fit holds.
        schedule: ``"full"`` passes (exact, also when streamed from disk), ``"memoised"`` (exact;
            the posterior moves after every minibatch) or ``"stochastic"`` (Robbins-Monro).
        batch_size: Rows of a minibatch; None chooses chunks that fit the processor's cache.
        dtype: Precision of the products over rows; statistics are merged in float64.
            In float32 a climb along a ridge ends once its rises are below rounding.
        device: Where to compute.
    """

    num_starts: int = 5
    start: str = "k-means++"
    tolerance: float = 1e-6
    max_steps: int = 2000
    moves: bool = True
    num_samples: int = 1000
    schedule: str = "full"
    batch_size: int | None = None
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_choice("VB", "start", self.start, STARTS)
        check_settings(
            "VB",
            num_starts=self.num_starts,
            max_steps=self.max_steps,
            num_samples=self.num_samples,
            tolerance=self.tolerance,
            batch_size=self.batch_size,
        )
        check_schedule(self.schedule, self.batch_size, "VB")

    @property
    def capability(self) -> type:
        return Conjugate

    @property
    def state_type(self) -> type[VBState]:
        return VBState

    def prepare(self, task: Task) -> Source:
        return Source(
            task.model,
            task.data,
            batch_size=self.batch_size,
            num_batch=self.num_starts,
            dtype=task.dtype,
            device=task.device,
        )

    def init(self, task: Task, work: Source) -> VBState:
        start = begin(
            _Expectation(), work, self.num_starts, task.generator, kind=self.start, varied=True
        )
        return VBState(*start, phase="starts", kind=0, failures=0)

    def step(self, task: Task, work: Source, state: VBState) -> tuple[VBState, Info]:
        if state.phase == "moves":
            new = self._move(task, work, state)
        else:
            new = self._climb(work, state)
        values = {"elbo": float(new.objective.max())}
        if isinstance(task.model, Partitioned):
            occupied = num_occupied(work, new.statistics)
            values["num_occupied"] = float(occupied[new.objective.argmax()])
        return new, Info(values, new.phase == "done")

    def _climb(self, work: Source, state: VBState) -> VBState:
        new = ascend(_Expectation(), work, state.ascent, self.schedule)
        self._check_rise(state.objective, new.objective)
        change = float((new.objective - state.objective).abs().max()) / work.num_rows
        # Moves and the polish climb on: starts only need to tell which of them is best.
        moves = self.moves and isinstance(work.model, Partitioned)
        rough = moves and state.phase == "starts"
        if change > (max(self.tolerance, _ROUGH) if rough else self.tolerance):
            return VBState(*new, state.phase, state.kind, state.failures)
        if state.phase == "polish" or not moves:
            return VBState(*new, "done", state.kind, state.failures)
        return VBState(*self._best(new), "moves", 0, 0)

    def _move(self, task: Task, work: Source, state: VBState) -> VBState:
        gain = max(self.tolerance * work.num_rows, 1e-6)
        new, found = attempt(
            KINDS[state.kind], _Expectation(), work, state.ascent, gain, task.generator
        )
        if found:
            return VBState(*new, "moves", state.kind, 0)
        failures = state.failures + 1
        phase = "polish" if failures == len(KINDS) else "moves"
        return VBState(*new, phase, (state.kind + 1) % len(KINDS), failures)

    @staticmethod
    def _best(state: Ascent) -> Ascent:
        best = int(state.objective.argmax())
        return Ascent(
            pick(state.parameters, best),
            pick(state.statistics, best),
            state.objective[best : best + 1],
            state.num_passes,
            None,
            None,
            None if state.left is None else state.left[best : best + 1],
        )

    def _check_rise(self, old: Tensor, new: Tensor) -> None:
        if self.schedule == "stochastic":
            return
        slack = (1e-4 if self.dtype == torch.float32 else 1e-8) * (1.0 + old.abs())
        fall = float((old - new - slack).max())
        if fall > 0:
            raise ArithmeticError(
                f"the ELBO fell by {float((old - new).max()):.3g} nats, beyond rounding. Report "
                "this as a bug "
                "with the data's shape and the model; dtype=torch.float64 or rescaled columns may "
                "help."
            )

    def finish(self, task: Task, work: Source, state: VBState) -> dict[str, Any]:
        exact = final(_Expectation(), work, state.ascent, self.schedule)
        best = self._best(exact)
        posterior = {b: {k: v[0] for k, v in s.items()} for b, s in best.parameters.items()}
        values = {
            name: block.sample(posterior[name], self.num_samples, generator=task.generator)
            for name, block in task.model.blocks.items()
        }
        draws = task.model.export(values)
        attrs = {"elbo": float(best.objective[0]), "num_passes": exact.num_passes}
        if isinstance(task.model, Partitioned):
            attrs["num_occupied"] = int(num_occupied(work, best.statistics)[0])
        return {
            "draws": {name: value.unsqueeze(0) for name, value in draws.items()},
            "posterior": posterior,
            "attrs": attrs,
        }
