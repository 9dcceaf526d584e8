"""Expectation-maximisation on conjugate blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesgen.capabilities import Conjugate
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
from bayesgen.inference.conjugate.source import Source
from bayesgen.inference.run import Engine, Info, Task

if TYPE_CHECKING:
    from bayesgen.capabilities import Tensors

__all__ = ["EM"]


@dataclass(frozen=True)
class _Mode(Rule):
    """Blocks at their mode; ``flat`` ignores the prior."""

    flat: bool

    def solve(
        self, model: Conjugate, statistics: Mapping[str, Tensors], previous: Nested | None
    ) -> Nested:
        return {
            name: dict(
                block.maximise(
                    statistics[name], None if previous is None else previous[name], flat=self.flat
                )
            )
            for name, block in model.blocks.items()
        }

    def messages(self, model: Conjugate, parameters: Nested) -> Nested:
        return {
            name: dict(block.natural(parameters[name])) for name, block in model.blocks.items()
        }

    def penalty(self, model: Conjugate, parameters: Nested) -> Tensor:
        if self.flat:
            return torch.zeros((), dtype=torch.float64)
        parts = [block.log_prior(parameters[name]) for name, block in model.blocks.items()]
        return torch.stack(torch.broadcast_tensors(*parts)).sum(0)


@dataclass(frozen=True, eq=False)
class EM(Engine[Ascent]):
    r"""Expectation-maximisation: the mode of the posterior, or the maximum of the likelihood.

    .. math::
        \theta^{(t+1)} = \arg\max_\theta
        E_{z \mid x, \theta^{(t)}}[\log p(x, z \mid \theta)] + \log p(\theta)

    Each step is one pass over the data: two matrix products for a mixture. The objective, recorded
    in ``fit.history["objective"]``, never falls under the schedules ``"full"`` and ``"memoised"``.

    References:
        Dempster, Laird & Rubin (1977). Maximum likelihood from incomplete data via the EM
        algorithm. Neal & Hinton (1998). A view of the EM algorithm that justifies incremental,
        sparse and other variants.

    Args:
        objective: ``"posterior"`` climbs to the mode under the model's priors (in the softmax
            basis for weights), ``"likelihood"`` ignores them.
        num_starts: Starts run as one batch; the best one that has not collapsed is kept.
        start: ``"k-means++"``: the model's own starts, clusters for a mixture. ``"random"``:
            responsibilities at random, the better start of a mixture on sparse binary rows and
            counts.
        tolerance: Converged when the objective of every start rises by less than this, in nats a
            row.
        max_steps: Passes at most.
        schedule: ``"full"`` passes (exact, also when streamed from disk), ``"memoised"``
            (incremental EM: exact, parameters move after every minibatch) or ``"stochastic"``
            (Robbins-Monro).
        batch_size: Rows of a minibatch; None chooses chunks that fit the processor's cache.
        dtype: Precision of the products over rows; statistics are merged in float64.
            In float32 a climb along a ridge ends once its rises are below rounding.
        device: Where to compute.
    """

    objective: str = "posterior"
    num_starts: int = 5
    start: str = "k-means++"
    tolerance: float = 1e-6
    max_steps: int = 1000
    schedule: str = "full"
    batch_size: int | None = None
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_choice("EM", "objective", self.objective, ("posterior", "likelihood"))
        check_choice("EM", "start", self.start, STARTS)
        check_settings(
            "EM",
            num_starts=self.num_starts,
            max_steps=self.max_steps,
            tolerance=self.tolerance,
            batch_size=self.batch_size,
        )
        check_schedule(self.schedule, self.batch_size, "EM")

    @property
    def capability(self) -> type:
        return Conjugate

    @property
    def state_type(self) -> type[Ascent]:
        return Ascent

    @property
    def _rule(self) -> _Mode:
        return _Mode(self.objective == "likelihood")

    def prepare(self, task: Task) -> Source:
        return Source(
            task.model,
            task.data,
            batch_size=self.batch_size,
            num_batch=self.num_starts,
            dtype=task.dtype,
            device=task.device,
        )

    def init(self, task: Task, work: Source) -> Ascent:
        return begin(self._rule, work, self.num_starts, task.generator, kind=self.start)

    def step(self, task: Task, work: Source, state: Ascent) -> tuple[Ascent, Info]:
        new = ascend(self._rule, work, state, self.schedule)
        change = (new.objective - state.objective).abs().max() / work.num_rows
        best = float(new.objective.max())
        return new, Info({"objective": best}, bool(change <= self.tolerance))

    def finish(self, task: Task, work: Source, state: Ascent) -> dict[str, Any]:
        state = final(self._rule, work, state, self.schedule)
        collapsed = task.model.degenerate(state.parameters).expand(state.objective.shape)
        score = torch.where(collapsed, -torch.inf, state.objective)
        best = (
            int(score.argmax())
            if bool((score > -torch.inf).any())
            else int(state.objective.argmax())
        )
        messages = []
        if bool(collapsed[best]):
            messages.append(
                "the likelihood has no maximum where this run ended, as when a component has "
                "collapsed onto a point; use objective='posterior', a smaller model or more "
                "starts."
            )
        draws = task.model.export(pick(state.parameters, best))
        return {
            "draws": {name: value.unsqueeze(0) for name, value in draws.items()},
            "attrs": {
                "objective": float(state.objective[best]),
                "objectives": state.objective.tolist(),
                "messages": messages,
            },
        }
