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
from bayesgen.inference.checks import check_settings
from bayesgen.inference.compiled.speed import Speed, choose
from bayesgen.inference.compiled.threads import in_one_thread
from bayesgen.inference.hamiltonian.adaptation import (
    Adaptation,
    StepSize,
    first_inverse_mass,
    first_step_size,
    start_adaptation,
)
from bayesgen.inference.hamiltonian.machines import NativeMachine
from bayesgen.inference.hamiltonian.trajectory import (
    STATISTICS,
    Metric,
    Trajectories,
    launch,
    relaunch,
    tables,
)
from bayesgen.inference.programs.start import check_start, starting_points
from bayesgen.inference.programs.trace import Density
from bayesgen.inference.programs.traced import TracedEngine, live_r_hat
from bayesgen.inference.run import Info, Task

__all__ = ["NUTS"]

_DRAWS_A_STEP = 50
_TICKS, _EARLY_TICKS = 20, 5  # warm-up trajectories in a step, and in the first third
_SHOWN = 1000  # entries of the mass matrix kept in the attributes
_LOW_RANK_UP_TO = 1000  # parameters
_ACCEPTANCE = STATISTICS.index("acceptance_rate") - len(STATISTICS)
_EARLY_DEPTH = 8  # of the first tenth of warm-up, when the step size may be far too small


class NutsState(NamedTuple):
    """State of all chains. The buffers of recorded draws are filled in place."""

    chains: dict[str, Tensor]
    noise: dict[str, Tensor]
    """Random numbers drawn ahead."""
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

    @property
    def is_small(self) -> bool:
        """Whether torch's own operations are few and small: C++ does the rest."""
        return isinstance(self.speed.machine, NativeMachine)


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
        metric: ``"diagonal"`` mass matrix, ``"low_rank"`` for long directions across coordinates
            beside it, or ``"auto"``: low rank up to 1000 parameters.
        max_depth: Doublings after which a trajectory ends.
        start: ``"uniform"`` within 2 of the origin on the unconstrained scale, or
            ``"pathfinder"``: near the mass that quasi-Newton paths find, but for modes of none.
        compile: Whether the step is compiled: True, False, or ``"auto"`` where it would pay.
        trace: False runs by Pyro's own Python, to compare with.
        dtype: Precision of everything, data included. Generated C++ is in float64 alone, so that
            small programs are many times slower in float32.
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
    num_warmup: int = 200
    target_accept: float = 0.8
    metric: str = "auto"
    max_depth: int = 10
    start: str = "uniform"
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
        if self.metric not in ("auto", "diagonal", "low_rank"):
            raise ValueError(
                f"NUTS: metric={self.metric!r}, but it must be 'auto', 'diagonal' or 'low_rank'."
            )
        if self.max_depth > 15:
            raise ValueError(f"NUTS: max_depth={self.max_depth}, but at most 15 is allowed.")
        check_start("NUTS", self.start)
        if self.compile not in (True, False, "auto"):
            raise ValueError(
                f"NUTS: compile={self.compile!r}, but it must be True, False or 'auto'."
            )

    @property
    def state_type(self) -> type[NutsState]:
        return NutsState

    @property
    def max_steps(self) -> int:
        """One step for every few warm-up trajectories of a chain, one for every 50 draws."""
        early = math.ceil(self.num_warmup / (3 * _EARLY_TICKS))
        later = max(0, self.num_warmup - early * _EARLY_TICKS)
        return early + math.ceil(later / _TICKS) + math.ceil(self.num_samples / _DRAWS_A_STEP)

    def _ticks(self, tick: int) -> int:
        """Warm-up trajectories of a chain in the step that starts at ``tick``."""
        wanted = _EARLY_TICKS if 3 * tick < self.num_warmup else _TICKS
        return min(wanted, self.num_warmup - tick)

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

    @in_one_thread
    def init(self, task: Task, work: Work) -> NutsState:
        model = task.model if isinstance(task.model, Conjugate) else None
        points, lp, gradient = starting_points(
            work.density,
            self.num_chains,
            model,
            task.data,
            start=self.start,
            gradient_of=work.speed.gradient_of,
            generator=task.generator,
        )
        normal, uniform = self._noise(task, points)
        step_size = first_step_size(
            work.speed.gradient_of, points, lp, gradient, first_inverse_mass(gradient), normal
        )
        adaptation = start_adaptation(points, gradient, step_size)
        metric = self._metric(adaptation)
        normal, uniform = self._noise(task, points)
        chains = launch(points, lp, gradient, metric, normal, uniform, self.max_depth)
        size = (self.num_chains, self.num_samples)
        return NutsState(
            chains._asdict(),
            work.speed.machine.noise(chains),
            _packed(adaptation),
            points.new_zeros((*size, points.shape[1])),
            points.new_zeros((*size, len(STATISTICS))),
            torch.zeros(self.num_chains, dtype=torch.int64, device=task.device),
            0,
            0,
        )

    def _noise(self, task: Task, like: Tensor) -> tuple[Tensor, Tensor]:
        """For a start of all chains."""
        c, d = self.num_chains, like.shape[-1]
        normal = rng.standard_normal((c, d), task.generator, like.dtype)
        uniform = torch.rand((c,), generator=task.generator, dtype=like.dtype, device=like.device)
        return normal, uniform

    def _metric(self, adaptation: Adaptation) -> Metric:
        early = adaptation.tick < self.num_warmup // 10
        depth = min(self.max_depth, _EARLY_DEPTH) if early else self.max_depth
        like = adaptation.inverse_mass
        return Metric(
            like.new_tensor(adaptation.current(self.num_warmup)),
            like,
            adaptation.basis,
            adaptation.stretch,
            like.new_tensor(float(depth)),
        )

    # ------------------------------------------------------------ steps
    @in_one_thread
    def step(self, task: Task, work: Work, state: NutsState) -> tuple[NutsState, Info]:
        with torch.no_grad():
            if state.tick < self.num_warmup:
                return self._warmup(task, work, state)
            return self._sampling(task, work, state)

    def _warmup(self, task: Task, work: Work, state: NutsState) -> tuple[NutsState, Info]:
        """The step size learns after each trajectory of a chain, the mass matrix at the end."""
        chains, noise = _own(state)
        adaptation = _unpacked(state.adaptation)
        ticks, seen = self._ticks(state.tick), []
        for _ in range(ticks):
            metric, missing, ended = self._metric(adaptation), self.num_chains, list[Tensor]()
            while missing > 0:
                chains, rows = work.speed.machine.run(
                    chains, metric, noise, missing, task.generator
                )
                ended.append(rows)
                missing -= len(rows)
            rows = ended[0] if len(ended) == 1 else torch.cat(ended)
            adaptation = adaptation.accepted(
                float(rows[:, _ACCEPTANCE].mean()),
                target=self.target_accept,
                num_warmup=self.num_warmup,
            )
            seen.append(rows)
        rows, d = torch.cat(seen), chains.ends.shape[-1]
        before = adaptation
        adaptation = adaptation.learned(
            rows[:, 1 : 1 + 2 * d].reshape(-1, 2, d),
            ticks,
            num_warmup=self.num_warmup,
            low_rank=self._is_low_rank(d),
        )
        if adaptation.inverse_mass is not before.inverse_mass:
            normal, uniform = self._noise(task, rows[:, :d])
            chains = relaunch(chains, self._metric(adaptation), normal, uniform)
        statistics = rows[:, -len(STATISTICS) :]
        divergences = int(statistics[:, STATISTICS.index("diverging")].sum())
        new = state._replace(
            chains=chains._asdict(),
            noise=noise,
            adaptation=_packed(adaptation),
            tick=state.tick + ticks,
            warmup_divergences=state.warmup_divergences + divergences,
        )
        return new, self._info(new, statistics)

    def _is_low_rank(self, num_params: int) -> bool:
        if self.metric == "auto":
            return 1 < num_params <= _LOW_RANK_UP_TO
        return self.metric == "low_rank"

    def _sampling(self, task: Task, work: Work, state: NutsState) -> tuple[NutsState, Info]:
        """Until every chain has 50 draws more; a chain that is ahead does not wait."""
        chains, noise = _own(state)
        metric = self._metric(_unpacked(state.adaptation))
        counts, tick = state.counts, state.tick + 1
        target = min(self.num_samples, _DRAWS_A_STEP * (tick - self.num_warmup))
        while int(counts.min()) < target:
            missing = self.num_chains * int(target - counts.min())
            chains, rows = work.speed.machine.run(chains, metric, noise, missing, task.generator)
            counts = self._keep(state, counts, rows)
        new = state._replace(chains=chains._asdict(), noise=noise, counts=counts, tick=tick)
        # The last step may have nothing left to do for chains that were all ahead.
        last = max(0, target - _DRAWS_A_STEP)
        return new, self._info(new, state.sample_stats[:, last:target].flatten(0, 1))

    def _keep(self, state: NutsState, counts: Tensor, rows: Tensor) -> Tensor:
        """Write the draws that ended into the buffers, each chain's in its order."""
        chain = rows[:, 0].long()
        is_of = chain.unsqueeze(1) == torch.arange(self.num_chains, device=rows.device)
        place = (counts + is_of.cumsum(0) - 1).gather(1, chain.unsqueeze(1)).squeeze(1)
        kept = place < self.num_samples
        chain, place, rows = chain[kept], place[kept], rows[kept]
        d = state.draws.shape[-1]
        state.draws[chain, place] = rows[:, 1 : 1 + d]
        state.sample_stats[chain, place] = rows[:, 1 + 2 * d :]
        return (counts + is_of.sum(0)).clamp(max=self.num_samples)

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
                **live_r_hat(state.draws[:, : int(counts.min())]),
            },
            int(counts.min()) >= self.num_samples,
        )

    # ------------------------------------------------------------ the end
    @in_one_thread
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
                "metric_rank": adaptation.basis.shape[1],
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
        total = statistics["tree_depth"].numel()
        messages = self.notes_of(work.density, total)
        deep = int((statistics["tree_depth"] >= self.max_depth).sum())
        if deep > total // 100:
            messages.append(
                f"{deep} of {total} trajectories were cut at max_depth={self.max_depth}: "
                f"parameters are "
                "nearly collinear or of very different scales. Centre or rescale them, or raise "
                "max_depth."
            )
        return messages


def _own(state: NutsState) -> tuple[Trajectories, dict[str, Tensor]]:
    """Copies that a step may write into: the state before it must stay as it was."""
    chains = Trajectories(**{name: value.clone() for name, value in state.chains.items()})
    return chains, {name: value.clone() for name, value in state.noise.items()}


def _packed(adaptation: Adaptation) -> dict[str, Any]:
    """As nested dicts, which a checkpoint can hold."""
    packed = adaptation._asdict()
    packed["step_size"] = packed["step_size"]._asdict()
    return packed


def _unpacked(packed: Mapping[str, Any]) -> Adaptation:
    return Adaptation(**{**packed, "step_size": StepSize(**packed["step_size"])})
