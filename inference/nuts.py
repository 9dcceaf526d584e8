"""NUTS on any Pyro program: all chains in one batch, none waiting for another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import Conjugate
from bayesgen.inference.adaptation import (
    Adaptation,
    Moments,
    StepSize,
    first_inverse_mass,
    first_step_size,
    start_adaptation,
)
from bayesgen.inference.checks import check_settings
from bayesgen.inference.run import Info, Task
from bayesgen.inference.speed import Speed, choose
from bayesgen.inference.start import starting_points
from bayesgen.inference.trace import Density
from bayesgen.inference.traced import TracedEngine
from bayesgen.inference.trajectory import (
    STATISTICS,
    Metric,
    Trajectories,
    launch,
    tables,
)

__all__ = ["NUTS"]

_DRAWS_A_STEP = 10
_SHOWN = 1000  # entries of the mass matrix kept in the attributes
_EARLY_DEPTH = 8  # of the first tenth of warm-up, when the step size may be far too small


class NutsState(NamedTuple):
    """State of all chains. The buffers of recorded draws are filled in place."""

    chains: dict[str, Tensor]
    adaptation: dict[str, Any]
    draws: Tensor
    """Unconstrained, ``(chains, num_samples, D)``."""
    sample_stats: Tensor
    """``(chains, num_samples, len(STATISTICS))``."""
    counts: Tensor
    """``(chains,)`` draws recorded so far."""
    tick: int
    warmup_divergences: int


class Work(NamedTuple):
    """What a run rebuilds on resume."""

    density: Density
    speed: Speed


@dataclass(frozen=True, eq=False)
class NUTS(TracedEngine[NutsState]):
    r"""The no-U-turn sampler on a traced program, all chains in one batch.

    Hamiltonian trajectories double until they turn back; a draw is taken from the whole trajectory
    with multinomial weights :math:`\exp(H_0 - H)`, biased towards its last doubling. One call
    moves
    every chain by one leapfrog step wherever it stands in its own tree, and chains share one
    adaptation of step size and mass matrix.

    References:
        Hoffman & Gelman (2014). The no-U-turn sampler: adaptively setting path lengths in
        Hamiltonian
        Monte Carlo.
        Betancourt (2017). A conceptual introduction to Hamiltonian Monte Carlo.
        Phan, Pradhan & Jankowiak (2019). Composable effects for flexible and accelerated
        probabilistic
        programming in NumPyro.
        Dance, Glaser, Orbanz & Adams (2025). Efficiently vectorized MCMC on modern accelerators.

    Args:
        num_chains: Chains, started from different points.
        num_samples: Draws kept of each chain.
        num_warmup: Trajectories of each chain, on average, that adapt the sampler and are not
        kept.
        target_accept: Mean acceptance rate that the step size is adapted to; nearer one, smaller
        steps.
        max_depth: Doublings after which a trajectory ends.
        compile: Whether the step is compiled: True, False, or ``"auto"`` where it would pay.
        trace: False runs by Pyro's own Python, to compare with.
        dtype: Precision of everything.
        device: Where to compute.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> x = torch.tensor([1.0, 3.0])
        >>> fit = NUTS(num_chains=2, num_samples=50, num_warmup=50).run(model, x)
        >>> fit.draws["loc"].shape
        torch.Size([2, 50])
    """

    num_chains: int = 4
    num_samples: int = 1000
    num_warmup: int = 500
    target_accept: float = 0.8
    max_depth: int = 10
    compile: str | bool = "auto"
    trace: bool = True
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_settings(
            "NUTS",
            num_chains=self.num_chains,
            num_samples=self.num_samples,
            max_depth=self.max_depth,
        )
        warmup = self.num_warmup
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise ValueError(f"NUTS: num_warmup={warmup!r}, but it must be a whole number >= 0.")
        if not 0.0 < self.target_accept < 1.0:
            raise ValueError(
                f"NUTS: target_accept={self.target_accept!r}, but it must lie between 0 and 1; "
                f"0.8 is "
                "usual, 0.95 where trajectories diverge."
            )
        if self.max_depth > 15:
            raise ValueError(f"NUTS: max_depth={self.max_depth}, but at most 15 is allowed.")
        if self.compile not in (True, False, "auto"):
            raise ValueError(
                f"NUTS: compile={self.compile!r}, but it must be True, False or 'auto'."
            )

    @property
    def state_type(self) -> type[NutsState]:
        return NutsState

    @property
    def max_steps(self) -> int:
        """One step for each warm-up trajectory of a chain, one for every ten draws."""
        return self.num_warmup + math.ceil(self.num_samples / _DRAWS_A_STEP)

    # ------------------------------------------------------------ what it works on
    def prepare(self, task: Task) -> Work:
        density = self.density_of(task)
        leapfrogs = 12 * (self.num_warmup + self.num_samples)
        speed = choose(
            density,
            tables(self.max_depth, task.device),
            num_chains=self.num_chains,
            max_depth=self.max_depth,
            compile=self.compile,
            num_steps=leapfrogs,
        )
        return Work(density, speed)

    def init(self, task: Task, work: Work) -> NutsState:
        model = task.model if isinstance(task.model, Conjugate) else None
        points, lp, gradient = starting_points(
            work.density, self.num_chains, model, task.data, generator=task.generator
        )
        normal, uniform = self._noise(task, 1, points)
        step_size = first_step_size(
            work.speed.gradient_of, points, lp, gradient, first_inverse_mass(gradient), normal[0]
        )
        adaptation = start_adaptation(points, gradient, step_size)
        metric = self._metric(adaptation, points)
        normal, uniform = self._noise(task, 1, points)
        chains = launch(points, lp, gradient, metric, normal[0], uniform[0, :, 0], self.max_depth)
        size = (self.num_chains, self.num_samples)
        return NutsState(
            chains._asdict(),
            _packed(adaptation),
            points.new_zeros((*size, points.shape[1])),
            points.new_zeros((*size, len(STATISTICS))),
            torch.zeros(self.num_chains, dtype=torch.int64, device=task.device),
            0,
            0,
        )

    def _noise(self, task: Task, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        c, d = self.num_chains, like.shape[-1]
        normal = rng.standard_normal((count, c, d), task.generator, like.dtype)
        uniform = torch.rand(
            (count, c, 3), generator=task.generator, dtype=like.dtype, device=like.device
        )
        return normal, uniform

    def _metric(self, adaptation: Adaptation, like: Tensor) -> Metric:
        early = adaptation.tick < self.num_warmup // 10
        depth = min(self.max_depth, _EARLY_DEPTH) if early else self.max_depth
        return Metric(
            torch.tensor(
                adaptation.current(self.num_warmup), dtype=like.dtype, device=like.device
            ),
            adaptation.inverse_mass,
            torch.tensor(float(depth), dtype=like.dtype, device=like.device),
        )

    # ------------------------------------------------------------ steps
    def step(self, task: Task, work: Work, state: NutsState) -> tuple[NutsState, Info]:
        with torch.no_grad():
            if state.tick < self.num_warmup:
                return self._warmup(task, work, state)
            return self._sampling(task, work, state)

    def _block(
        self, task: Task, work: Work, chains: Trajectories, metric: Metric, count: int
    ) -> tuple[Trajectories, Tensor]:
        """``count`` leapfrog steps of every chain, and their records ``(count, c, ...)``."""
        normal, uniform = self._noise(task, count, chains.inverse_mass)
        records = []
        for k in range(count):
            *new, record = work.speed.advance(*chains, *metric, normal[k], uniform[k])
            chains = Trajectories(*new)
            records.append(record)
        return chains, torch.stack(records)

    def _warmup(self, task: Task, work: Work, state: NutsState) -> tuple[NutsState, Info]:
        """Until as many trajectories have ended as there are chains; then the sampler adapts."""
        chains = Trajectories(**state.chains)
        adaptation = _unpacked(state.adaptation)
        metric = self._metric(adaptation, chains.inverse_mass)
        ended: list[Tensor] = []
        while sum(map(len, ended)) < self.num_chains:
            chains, records = self._block(task, work, chains, metric, 4)
            ended.append(records[records[..., 0] > 0])
        rows = torch.cat(ended)
        points, statistics = self._split(rows, chains.inverse_mass.shape[-1])
        adaptation = adaptation.update(
            points,
            float(statistics[:, STATISTICS.index("acceptance_rate")].mean()),
            target=self.target_accept,
            num_warmup=self.num_warmup,
        )
        divergences = int(statistics[:, STATISTICS.index("diverging")].sum())
        new = state._replace(
            chains=chains._asdict(),
            adaptation=_packed(adaptation),
            tick=state.tick + 1,
            warmup_divergences=state.warmup_divergences + divergences,
        )
        return new, self._info(new, statistics)

    def _sampling(self, task: Task, work: Work, state: NutsState) -> tuple[NutsState, Info]:
        """Until every chain has ten draws more; a chain that is ahead does not wait."""
        chains = Trajectories(**state.chains)
        metric = self._metric(_unpacked(state.adaptation), chains.inverse_mass)
        counts = state.counts.clone()
        target = min(self.num_samples, _DRAWS_A_STEP * (state.tick - self.num_warmup + 1))
        seen = []
        while int(counts.min()) < target:
            chains, records = self._block(task, work, chains, metric, 16)
            counts = self._keep(state, counts, records)
            seen.append(records[records[..., 0] > 0])
        new = state._replace(chains=chains._asdict(), counts=counts, tick=state.tick + 1)
        # The last step may have nothing left to do for chains that were all ahead.
        last = max(0, int(counts.min()) - _DRAWS_A_STEP)
        statistics = state.sample_stats[:, last : int(counts.min())].flatten(0, 1)
        return new, self._info(new, statistics)

    def _keep(self, state: NutsState, counts: Tensor, records: Tensor) -> Tensor:
        """Write the draws that ended in a block into the buffers, each chain's in its order."""
        ended = records[..., 0] > 0
        place = counts + ended.cumsum(0) - 1
        kept = ended & (place < self.num_samples)
        step, chain = kept.nonzero(as_tuple=True)
        where = place[step, chain]
        d = state.draws.shape[-1]
        rows = records[step, chain]
        state.draws[chain, where] = rows[:, 1 : 1 + d]
        state.sample_stats[chain, where] = rows[:, 1 + 2 * d :]
        return (counts + ended.sum(0)).clamp(max=self.num_samples)

    @staticmethod
    def _split(rows: Tensor, d: int) -> tuple[Tensor, Tensor]:
        """Records as pairs of position and gradient ``(m, 2, D)`` and statistics ``(m, ...)``."""
        return rows[:, 1 : 1 + 2 * d].reshape(-1, 2, d), rows[:, 1 + 2 * d :]

    def _info(self, state: NutsState, statistics: Tensor) -> Info:
        mean = dict(zip(STATISTICS, statistics.mean(0).tolist(), strict=True))
        counts = state.counts
        diverging = state.sample_stats[..., STATISTICS.index("diverging")].sum()
        return Info(
            {
                "lp": mean["lp"],
                "step_size": mean["step_size"],
                "acceptance_rate": mean["acceptance_rate"],
                "tree_depth": mean["tree_depth"],
                "divergences": float(diverging),
                "num_draws": float(counts.min()),
            },
            int(counts.min()) >= self.num_samples,
        )

    # ------------------------------------------------------------ the end
    def finish(self, task: Task, work: Work, state: NutsState) -> dict[str, Any]:
        count = int(state.counts.min())
        if count == 0:
            raise ValueError(
                f"NUTS stopped after {state.tick} steps, before the first draw: num_warmup is "
                f"{self.num_warmup}. Let it run longer, or lower num_warmup."
            )
        sites = self.sites_of(task, work.density, state.draws[:, :count])
        statistics = dict(zip(STATISTICS, state.sample_stats[:, :count].unbind(-1), strict=True))
        statistics["diverging"] = statistics["diverging"] > 0.5
        for name in ("tree_depth", "n_steps"):
            statistics[name] = statistics[name].long()
        adaptation = _unpacked(state.adaptation)
        return {
            "draws": sites,
            "sample_stats": statistics,
            "attrs": {
                "num_warmup": self.num_warmup,
                "warmup_divergences": state.warmup_divergences,
                "step_size": adaptation.current(self.num_warmup),
                "inverse_mass": adaptation.inverse_mass[:_SHOWN].tolist(),
                "num_params": work.density.num_params,
                "is_traced": work.density.is_traced,
                "is_compiled": work.speed.is_compiled,
                "speed": work.speed.reason,
                "trace_seconds": work.density.notes.get("trace_seconds"),
                "compile_seconds": work.speed.seconds,
                "messages": self._messages(work, statistics),
            },
        }

    def _messages(self, work: Work, statistics: Mapping[str, Tensor]) -> list[str]:
        messages = [*work.density.layout.notes]
        if work.density.message:
            messages.append(work.density.message)
        diverging = int(statistics["diverging"].sum())
        total = statistics["diverging"].numel()
        if diverging:
            messages.append(
                f"{diverging} of {total} trajectories diverged: the posterior has a region too "
                f"narrow for the "
                "step size, and the draws miss it. Raise target_accept (0.95, 0.99), or "
                "reparametrise."
            )
        deep = int((statistics["tree_depth"] >= self.max_depth).sum())
        if deep > total // 100:
            messages.append(
                f"{deep} of {total} trajectories were cut at max_depth={self.max_depth}: "
                f"parameters are "
                "nearly collinear or of very different scales. Centre or rescale them, or raise "
                "max_depth."
            )
        return messages


def _packed(adaptation: Adaptation) -> dict[str, Any]:
    """As nested dicts, which a checkpoint can hold."""
    packed = adaptation._asdict()
    for name in ("step_size", "window", "next_window"):
        packed[name] = packed[name]._asdict()
    return packed


def _unpacked(packed: Mapping[str, Any]) -> Adaptation:
    return Adaptation(
        packed["tick"],
        StepSize(**packed["step_size"]),
        packed["inverse_mass"],
        Moments(**packed["window"]),
        Moments(**packed["next_window"]),
        packed["since"],
    )
