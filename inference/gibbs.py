"""Gibbs sampling on conjugate blocks: many chains in one batched tensor program."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as replace_task
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from bayesgen.capabilities import Conjugate, Partitioned
from bayesgen.data import Dataset
from bayesgen.inference.checks import check_choice, check_settings
from bayesgen.inference.conjugate.coordinate import STARTS, Nested, first_statistics, stack
from bayesgen.inference.conjugate.source import Source
from bayesgen.inference.conjugate.split_merge import split_merge
from bayesgen.inference.run import Engine, Info, Task
from bayesgen.inference.vb import VB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bayesgen.capabilities import Tensors
    from bayesgen.conjugate import Local

__all__ = ["Gibbs"]

_START_ROWS = 20_000
_SEARCH_STEPS = 300


class GibbsState(NamedTuple):
    """State of all chains. The buffers of recorded draws are filled in place."""

    values: Nested
    """Sites of each block, ``(chains, *event)``."""
    draws: Nested
    """Recorded values, ``(chains, num_samples, *event)``."""
    sample_stats: dict[str, Tensor]
    """``(chains, num_samples)``."""
    step: int
    accepted: Tensor
    """``(chains,)`` split-merge moves accepted so far."""
    left: Tensor | None = None
    """``(chains, n, k)`` local latents of a model that continues its local steps."""


class Work(NamedTuple):
    """What a run rebuilds on resume."""

    source: Source
    observed: Any
    """All rows, when split-merge moves are possible; else None."""
    points: Tensor | None


@dataclass(frozen=True, eq=False)
class Gibbs(Engine[GibbsState]):
    r"""Gibbs sampling: latents given parameters, parameters given latents; split-merge moves.

    .. math:: z \sim p(z \mid x, \theta), \quad \theta \sim p(\theta \mid x, z)

    All chains advance together as one batch of tensors. For a mixture, when labels alone determine
    the statistics (no missing entries, no local scales) and the rows are in memory, each sweep
    also tries split-merge moves with weights and parameters integrated out; a merge is what
    deletes a component. Other data of a mixture get one search by variational Bayes a chain as
    their start. Rows that stream from disk are passed over at flat memory: only parameters and
    statistics are kept.

    References:
        Diebolt & Robert (1994). Estimation of finite mixture distributions through Bayesian
        sampling. Jain & Neal (2004). A split-merge Markov chain Monte Carlo procedure for the
        Dirichlet process mixture model.

    Args:
        num_chains: Chains, each from a start of its own.
        num_samples: Draws kept of each chain.
        num_warmup: Sweeps before the first draw is kept.
        thinning: Sweeps a draw.
        num_moves: Split-merge attempts a sweep of a mixture; 0 for none.
        start: ``"k-means++"``: the model's own starts, clusters for a mixture. ``"random"``:
            responsibilities at random, the better start of a mixture on sparse binary rows and
            counts.
        batch_size: Rows of a chunk; None chooses chunks that fit the processor's cache.
        dtype: Precision of the products over rows; parameters are drawn in float64.
        device: Where to compute.
    """

    num_chains: int = 4
    num_samples: int = 1000
    num_warmup: int = 500
    thinning: int = 1
    num_moves: int = 1
    start: str = "k-means++"
    batch_size: int | None = None
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_choice("Gibbs", "start", self.start, STARTS)
        check_settings(
            "Gibbs",
            num_chains=self.num_chains,
            num_samples=self.num_samples,
            thinning=self.thinning,
            batch_size=self.batch_size,
        )
        for name in ("num_warmup", "num_moves"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"Gibbs: {name}={value!r}, but it must be a whole number >= 0.")

    @property
    def capability(self) -> type:
        return Conjugate

    @property
    def state_type(self) -> type[GibbsState]:
        return GibbsState

    @property
    def max_steps(self) -> int:
        """Sweeps of each chain."""
        return self.num_warmup + self.num_samples * self.thinning

    def prepare(self, task: Task) -> Work:
        source = Source(
            task.model,
            task.data,
            batch_size=self.batch_size,
            num_batch=self.num_chains,
            dtype=task.dtype,
            device=task.device,
        )
        model = task.model
        movable = self._seeks(model) and task.data.in_memory and task.data.num_rows > 1
        if not movable:
            return Work(source, None, None)
        rows = task.data.tensor(torch.float64, task.device)
        observed = model.observe(rows, task.dtype)
        if not model.collapsible(observed):
            return Work(source, None, None)
        return Work(source, observed, model.embed(rows).to(task.dtype))

    def _seeks(self, model: object) -> TypeGuard[Partitioned]:
        """Whether chains should look for clusters beyond their start."""
        return self.num_moves > 0 and isinstance(model, Partitioned)

    def init(self, task: Task, work: Work) -> GibbsState:
        rows = work.source.rows(_START_ROWS, task.generator)
        start: Mapping[str, Tensors]
        if work.observed is None and self._seeks(task.model):
            start = self._settled(task, rows)
        else:
            start = first_statistics(
                task.model, rows, self.num_chains, task.generator, kind=self.start
            )
        share = work.source.num_rows / len(rows)
        values = self._draw(
            task, {b: {k: share * v for k, v in s.items()} for b, s in start.items()}, None
        )
        return GibbsState(
            values,
            {b: {k: self._buffer(v) for k, v in s.items()} for b, s in values.items()},
            {
                name: self._buffer(
                    torch.zeros(self.num_chains, dtype=torch.float64, device=task.device)
                )
                for name in self._statistics(task.model)
            },
            0,
            torch.zeros(self.num_chains, dtype=torch.float64, device=task.device),
        )

    def _settled(self, task: Task, rows: Tensor) -> Nested:
        """Statistics of one variational optimum a chain, where moves cannot be used.

        Such chains could not leave a poor start by themselves. Each search has its own
        start, so chains that end in different optima still show as an R-hat above 1.
        """
        data = Dataset.from_codes(rows, task.data.schema)
        part = replace_task(task, data=data)
        search = VB(
            num_starts=1, start=self.start, tolerance=1e-4, dtype=self.dtype, device=self.device
        )
        work = search.prepare(part)
        found = []
        for _ in range(self.num_chains):
            state = search.init(part, work)
            for _ in range(_SEARCH_STEPS):
                state, info = search.step(part, work, state)
                if info.done:
                    break
            found.append(state.statistics)
        return stack(found)

    def _buffer(self, value: Tensor) -> Tensor:
        shape = (value.shape[0], self.num_samples, *value.shape[1:])
        return torch.zeros(shape, dtype=value.dtype, device=value.device)

    def step(self, task: Task, work: Work, state: GibbsState) -> tuple[GibbsState, Info]:
        moving = work.observed is not None
        local = self._pass(task, work, state.values, state.left, keep_labels=moving)
        statistics: Nested = {b: dict(s) for b, s in local.statistics.items()}
        accepted = state.accepted
        if moving:
            statistics, gained = self._moves(
                task, work, local.latents["labels"], statistics, state
            )
            accepted = accepted + gained
        # Values and their own log likelihood are recorded together: the sweep above has just found
        # it.
        found = {"log_likelihood": local.bound}
        if isinstance(task.model, Partitioned):
            found["num_occupied"] = (task.model.occupancy(statistics) > 0.5).sum(-1).double()
        self._record(task, state, found)
        values = self._draw(task, statistics, state.values)
        info = Info(
            {name: float(value.mean()) for name, value in found.items()},
            state.step + 1 == self.max_steps,
        )
        left = local.latents.get("left")
        for _ in range(1, work.source.num_passes):
            local = self._pass(task, work, values, left)
            values = self._draw(task, local.statistics, values)
            left = local.latents["left"]
        new = state._replace(values=values, step=state.step + 1, accepted=accepted, left=left)
        return new, info

    @staticmethod
    def _pass(
        task: Task, work: Work, values: Nested, left: Tensor | None, *, keep_labels: bool = False
    ) -> Local:
        """Latents of all rows given the parameters."""
        messages = {name: block.natural(values[name]) for name, block in task.model.blocks.items()}
        return work.source.sweep(
            messages, generator=task.generator, keep_labels=keep_labels, left=left
        )

    def _draw(
        self, task: Task, statistics: Mapping[str, Tensors], previous: Nested | None
    ) -> Nested:
        return {
            name: dict(
                block.draw(
                    statistics[name],
                    None if previous is None else previous[name],
                    generator=task.generator,
                )
            )
            for name, block in task.model.blocks.items()
        }

    def _moves(
        self, task: Task, work: Work, labels: Tensor, statistics: Nested, state: GibbsState
    ) -> tuple[Nested, Tensor]:
        gained = torch.zeros_like(state.accepted)
        assert work.points is not None
        for _ in range(self.num_moves):
            moved = split_merge(
                task.model,
                work.observed,
                work.points,
                labels,
                statistics,
                state.values,
                generator=task.generator,
                exact=state.step >= self.num_warmup // 2,
            )
            labels, statistics = moved.labels, moved.statistics
            gained = gained + moved.accepted
        return statistics, gained

    @staticmethod
    def _statistics(model: object) -> tuple[str, ...]:
        """What is recorded of every draw."""
        found = ("num_occupied",) if isinstance(model, Partitioned) else ()
        return ("lp", "log_likelihood", *found)

    def _record(self, task: Task, state: GibbsState, found: Mapping[str, Tensor]) -> None:
        kept = state.step - self.num_warmup
        if kept < 0 or kept % self.thinning:
            return
        index = kept // self.thinning
        log_density = found["log_likelihood"].clone()
        for name, block in task.model.blocks.items():
            for site, value in state.values[name].items():
                state.draws[name][site][:, index] = value
            log_density = log_density + block.log_prior(state.values[name])
        state.sample_stats["lp"][:, index] = log_density
        for name, value in found.items():
            state.sample_stats[name][:, index] = value

    def finish(self, task: Task, work: Work, state: GibbsState) -> dict[str, Any]:
        kept = max(0, state.step - self.num_warmup)
        count = min(self.num_samples, -(-kept // self.thinning))
        if count == 0:
            raise ValueError(
                f"Gibbs stopped after {state.step} sweeps, before the first draw: num_warmup is "
                f"{self.num_warmup}. Let it run longer, or lower num_warmup."
            )
        draws = {b: {k: v[:, :count] for k, v in s.items()} for b, s in state.draws.items()}
        attempts = state.step * self.num_moves if work.observed is not None else 0
        messages = []
        if work.observed is None and self._seeks(task.model):
            messages.append(
                "split-merge moves were not used, since they need rows in memory, without missing "
                "entries or local scales; each chain started from a variational optimum of its "
                "own instead."
            )
        sample_stats = {k: v[:, :count] for k, v in state.sample_stats.items()}
        usual = (
            {"num_occupied": int(sample_stats["num_occupied"].long().flatten().mode().values)}
            if "num_occupied" in sample_stats
            else {}
        )
        return {
            "draws": task.model.export(draws),
            "sample_stats": sample_stats,
            "attrs": {
                # As VB says it; of the draws, the most frequent number.
                **usual,
                "num_warmup": self.num_warmup,
                "split_merge_rate": float(state.accepted.mean()) / attempts if attempts else None,
                "messages": messages,
            },
        }
