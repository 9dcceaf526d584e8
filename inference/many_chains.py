"""Hamiltonian Monte Carlo on a traced program with hundreds of chains, tuned by each other."""

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
from bayesgen.inference.compiled.threads import in_one_thread
from bayesgen.inference.hamiltonian.cross_chain import (
    JITTER,
    Differences,
    Pace,
    Schedule,
    correlations,
    group_acceptance,
    jitter,
    typical,
)
from bayesgen.inference.hamiltonian.leapfrog import leapfrog
from bayesgen.inference.hamiltonian.many_warmup import (
    SETTLING,
    Adaptation,
    ManyState,
    Work,
    adaptation_of,
    end_window,
    first_pace,
    new_length,
    packed_of,
    take_moves,
)
from bayesgen.inference.programs.start import check_start, starting_points
from bayesgen.inference.programs.traced import TracedEngine, live_r_hat
from bayesgen.inference.run import Info, Task

__all__ = ["ManyChains"]

_ITERATIONS_A_STEP = 10
_SHOWN = 1000  # entries of the metric kept in the attributes
_DIVERGENCE = 1000.0
_FAR, _CLIP = 8.0, 3.0  # deviations at which a chain, a value no longer counts in a scan
_FIRST_LENGTH = 1.5  # in standard deviations, were the first metric right
_EARLY_STEPS = (8, 16, 64)  # paths of the settling windows; longest of the next
_SLOWEST = 8  # times as many leapfrogs, at most, for chains with a smaller step size
_STATISTICS = ("lp", "energy", "acceptance_rate", "n_steps", "diverging", "step_size")


class _Moved(NamedTuple):
    """Where a transition led, and what to say about it."""

    points: Tensor
    lp: Tensor
    statistics: Tensor
    """``(c, len(_STATISTICS))``."""
    curves: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ManyChains(TracedEngine[ManyState]):
    r"""Hundreds of chains in one batch, tuned by each other: HMC with scanned path lengths.

    Each transition draws momenta, follows Hamilton's equations for a number of leapfrog steps that
    all chains share and that is jittered by a quasi-random sequence, and accepts by Metropolis'
    rule. Metric, step size and path length are learned across chains in a short warm-up and fixed
    afterwards, so that every draw kept leaves the posterior invariant. Chains start in
    ``num_superchains`` groups of a common start, which makes nested R-hat a test of convergence
    even when each chain is short.

    References:
        Hoffman, Radul & Sountsov (2021). An adaptive-MCMC scheme for setting trajectory lengths in
        Hamiltonian Monte Carlo.
        Sountsov & Hoffman (2021). Focusing on difficult directions for learning HMC trajectory
        lengths.
        Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari & Gelman (2024). Nested R-hat:
        assessing the convergence of Markov chain Monte Carlo when running many short chains.

    Args:
        num_chains: Chains.
        num_samples: Draws kept of each chain.
        num_warmup: Transitions that adapt the sampler and are not kept.
        num_superchains: Groups of chains, each from one starting point.
        target_accept: Mean acceptance rate that the step size is adapted to.
        max_leapfrogs: Longest trajectory.
        start: ``"uniform"`` within 2 of the origin on the unconstrained scale, or
            ``"pathfinder"``: near the mass that quasi-Newton paths find, but for modes of none.
        compile: Whether gradients are compiled: True, False, or ``"auto"`` where it would pay.
        trace: False runs by Pyro's own Python, to compare with.
        dtype: Precision of everything, data included. Generated C++ is in float64 alone, so that
            small programs are several times slower in float32.
        device: Where to compute.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> x = torch.tensor([1.0, 3.0])
        >>> fit = ManyChains(num_chains=32, num_samples=20).run(model, x)
        >>> fit.draws["loc"].shape
        torch.Size([32, 20])
    """

    num_chains: int = 256
    num_samples: int = 100
    num_warmup: int = 100
    num_superchains: int = 16
    target_accept: float = 0.9
    max_leapfrogs: int = 1024
    start: str = "uniform"
    compile: str | bool = "auto"
    trace: bool = True
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_settings(
            "ManyChains",
            num_chains=self.num_chains,
            num_samples=self.num_samples,
            num_superchains=self.num_superchains,
            max_leapfrogs=self.max_leapfrogs,
        )
        warmup = self.num_warmup
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise ValueError(
                f"ManyChains: num_warmup={warmup!r}, but it must be a whole number >= 0."
            )
        if self.num_chains % self.num_superchains:
            raise ValueError(
                f"ManyChains: num_chains={self.num_chains} is no multiple of num_superchains="
                f"{self.num_superchains}: every superchain holds the same number of chains."
            )
        if not 0.0 < self.target_accept < 1.0:
            raise ValueError(
                f"ManyChains: target_accept={self.target_accept!r}, but it must lie between 0 and "
                "1; 0.9 is usual, 0.99 where trajectories diverge."
            )
        check_start("ManyChains", self.start)
        if self.compile not in (True, False, "auto"):
            raise ValueError(
                f"ManyChains: compile={self.compile!r}, but it must be True, False or 'auto'."
            )

    @property
    def state_type(self) -> type[ManyState]:
        return ManyState

    @property
    def max_steps(self) -> int:
        """One step for every ten transitions."""
        return math.ceil(self.num_warmup / _ITERATIONS_A_STEP) + math.ceil(
            self.num_samples / _ITERATIONS_A_STEP
        )

    # ------------------------------------------------------------ what it works on
    def prepare(self, task: Task) -> Work:
        density = self.density_of(task)
        expected = 8 * (self.num_warmup + self.num_samples)
        return Work(
            density,
            leapfrog(density, self.num_chains, compile=self.compile, num_steps=expected),
        )

    @in_one_thread
    def init(self, task: Task, work: Work) -> ManyState:
        model = task.model if isinstance(task.model, Conjugate) else None
        starts = starting_points(
            work.density,
            self.num_superchains,
            model,
            task.data,
            start=self.start,
            gradient_of=work.leapfrog.gradient_of,
            generator=task.generator,
        )
        each = self.num_chains // self.num_superchains
        q, lp, g = (v.repeat_interleave(each, 0) for v in starts)
        points = torch.stack((q, g))
        size = g.square().mean(0).sqrt()
        factor = torch.where(size > 0, size.rsqrt(), 1.0).clamp(1e-5, 1e5)
        adaptation = Adaptation(
            factor,
            Pace(math.log(0.1)),
            torch.full_like(lp, math.log(0.1)),
            _FIRST_LENGTH,
            Differences.empty(factor),
            points,
            factor.new_zeros(0, 0),
        )
        shape = (self.num_chains, self.num_samples)
        return ManyState(
            points,
            lp,
            packed_of(adaptation),
            points.new_zeros((*shape, points.shape[-1])),
            points.new_zeros((*shape, len(_STATISTICS))),
            0,
            0,
            0,
        )

    # ------------------------------------------------------------ steps
    @in_one_thread
    def step(self, task: Task, work: Work, state: ManyState) -> tuple[ManyState, Info]:
        with torch.no_grad():
            if state.tick < self.num_warmup:
                return self._warmup(task, work, state)
            return self._sampling(task, work, state)

    def _sampling(self, task: Task, work: Work, state: ManyState) -> tuple[ManyState, Info]:
        adaptation = adaptation_of(state.adaptation)
        points, lp, tick = state.points, state.lp, state.tick
        first = tick - self.num_warmup
        last = min(first + _ITERATIONS_A_STEP, self.num_samples)
        if work.leapfrog.move is not None:
            points, lp = work.leapfrog.move(
                *(points, lp, adaptation.factor, adaptation.pace.step_size),
                [self._steps(adaptation, jitter(k)) for k in range(first, last)],
                int(torch.randint(2**62, (), generator=task.generator)),
                *(state.draws, state.sample_stats, first),
            )
            first = last
        for k in range(first, last):
            moved = self._transition(task, work, points, lp, adaptation, k)
            points, lp = moved.points, moved.lp
            state.draws[:, k] = points[0]
            state.sample_stats[:, k] = moved.statistics
        new = state._replace(points=points, lp=lp, tick=self.num_warmup + last)
        seen = state.sample_stats[:, tick - self.num_warmup : last]
        return new, self._info(new, adaptation, seen)

    def _transition(
        self,
        task: Task,
        work: Work,
        points: Tensor,
        lp: Tensor,
        adaptation: Adaptation,
        number: int,
        *,
        most: int | None = None,
        own: bool = False,
        lagging: bool = False,
        scan: bool = False,
    ) -> _Moved:
        """Momenta, a path, Metropolis' rule; ``number`` tells how long the path is."""
        normal = rng.standard_normal(points.shape[1:], task.generator, points.dtype)
        log_uniform = torch.rand(
            lp.shape, generator=task.generator, dtype=lp.dtype, device=lp.device
        ).log()
        step_size: float | Tensor = adaptation.pace.step_size
        curves = None
        if own:
            steps, step_size = most or 1, adaptation.own.exp()
            q, r, new_lp, g = work.leapfrog.integrate(
                points[0], normal, points[1], adaptation.factor, step_size.unsqueeze(-1), steps
            )
        elif scan:
            q, r, new_lp, g, curves = self._scan(work, points, lp, normal, adaptation)
            steps = len(curves) - 1
        else:
            steps = self._steps(adaptation, jitter(number), most)
            q, r, new_lp, g = work.leapfrog.integrate(
                points[0], normal, points[1], adaptation.factor, step_size, steps
            )
            if lagging:
                slow = adaptation.own < 0
                share = math.exp(float(adaptation.own.min()))
                shorter, more = step_size * share, min(_SLOWEST, math.ceil(1 / share)) * steps
                ends = work.leapfrog.integrate(
                    points[0], normal, points[1], adaptation.factor, shorter, more
                )
                fast, step_size = (q, r, new_lp, g), torch.where(slow, shorter, step_size)
                q, r, new_lp, g = (
                    torch.where(slow if f.ndim == 1 else slow[:, None], e, f)
                    for e, f in zip(ends, fast, strict=True)
                )
        start, end = 0.5 * normal.square().sum(-1) - lp, 0.5 * r.square().sum(-1) - new_lp
        delta = torch.nan_to_num(start - end, nan=-torch.inf)
        accepted = _metropolis(delta, log_uniform)
        statistics = torch.stack(
            (
                torch.where(accepted, new_lp, lp),
                torch.where(accepted, end, start),
                delta.clamp(max=0.0).exp(),
                torch.full_like(lp, steps),
                (delta < -_DIVERGENCE).to(lp.dtype),
                torch.zeros_like(lp) + step_size,
            ),
            -1,
        )
        points = torch.where(accepted[:, None], torch.stack((q, g)), points)
        return _Moved(points, statistics[:, 0], statistics, curves)

    def _steps(self, adaptation: Adaptation, share: float, most: int | None = None) -> int:
        steps = round(min(1e9, adaptation.length * share / adaptation.pace.step_size))
        return max(1, min(steps, self.max_leapfrogs, most or self.max_leapfrogs))

    def _scan(
        self, work: Work, points: Tensor, lp: Tensor, normal: Tensor, adaptation: Adaptation
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A path of which every point is looked at, and the sums of its correlations."""
        count = len(adaptation.curves) - 1
        q, g = points
        r, new_lp, energy = normal, lp, 0.5 * normal.square().sum(-1) - lp
        middle = q.quantile(0.5, 0)
        spread = 1.4826 * (q - middle).abs().quantile(0.5, 0).clamp(min=1e-30)
        start = (q - middle) / spread
        counted = typical(lp) & (start.abs().amax(-1) < _FAR)
        start = start.clamp(-_CLIP, _CLIP)
        rows = []
        for _ in range(count):
            q, r, new_lp, g = work.leapfrog.integrate(
                q, r, g, adaptation.factor, adaptation.pace.step_size, 1
            )
            delta = energy - 0.5 * r.square().sum(-1) + new_lp
            rate = torch.nan_to_num(delta, nan=-torch.inf).clamp(max=0.0).exp()
            now = ((q - middle) / spread).nan_to_num().clamp(-_CLIP, _CLIP)
            rows.append(correlations(start, now, rate * counted))
        both = torch.cat((start, start.square()), 1)[counted]
        squares = (both - both.mean(0)).square().sum(0)
        return q, r, new_lp, g, torch.stack((*rows, squares))

    # ------------------------------------------------------------ warm-up
    def _warmup(self, task: Task, work: Work, state: ManyState) -> tuple[ManyState, Info]:
        schedule = Schedule.of(self.num_warmup)
        last = min(state.tick + _ITERATIONS_A_STEP, self.num_warmup)
        adaptation, seen = adaptation_of(state.adaptation), []
        for tick in range(state.tick, last):
            state, adaptation, statistics = self._adapt(
                task, work, state, adaptation, schedule, tick
            )
            seen.append(statistics)
        divergences = int(torch.stack(seen)[..., _STATISTICS.index("diverging")].sum())
        state = state._replace(
            tick=last,
            adaptation=packed_of(adaptation),
            warmup_divergences=state.warmup_divergences + divergences,
        )
        return state, self._info(state, adaptation, torch.stack(seen, 1))

    def _adapt(
        self,
        task: Task,
        work: Work,
        state: ManyState,
        adaptation: Adaptation,
        schedule: Schedule,
        tick: int,
    ) -> tuple[ManyState, Adaptation, Tensor]:
        """One transition of warm-up, and what is learned from it."""
        window = schedule.window(tick)
        settling = window in SETTLING
        if tick == schedule.start(window) and settling:
            adaptation = first_pace(task, work, state, adaptation)
        if tick == schedule.start(len(SETTLING)):
            adaptation = adaptation._replace(own=torch.zeros_like(adaptation.own))
        scan = schedule.is_scan(tick)
        if scan and not len(adaptation.curves):
            count = max(8, self._steps(adaptation, 2.5))
            adaptation = adaptation._replace(
                curves=state.points.new_zeros(count + 1, 2 * state.points.shape[-1])
            )
        early = _EARLY_STEPS[window] if window < len(_EARLY_STEPS) else None
        moved = self._transition(
            *(task, work, state.points, state.lp, adaptation, tick),
            most=early,
            own=settling,
            lagging=not settling and bool((adaptation.own < 0).any()),
            scan=scan,
        )
        rates = moved.statistics[:, _STATISTICS.index("acceptance_rate")]
        if settling:
            gain = 2.0 / (tick - schedule.start(window) + 2.0) ** 0.5
            own = adaptation.own + gain * (rates - self.target_accept)
            middle = float(own.median())
            adaptation = adaptation._replace(own=own, pace=Pace(middle))
        elif moved.curves is not None:
            adaptation = adaptation._replace(curves=adaptation.curves + moved.curves)
        else:
            rate, own = group_acceptance(rates, adaptation.own, self.num_superchains)
            pace = adaptation.pace.update(rate, self.target_accept)
            adaptation = adaptation._replace(pace=pace, own=own)
        state = state._replace(points=moved.points, lp=moved.lp)
        if schedule.is_middle(tick + 1) or tick + 1 in schedule.ends:
            adaptation = take_moves(state, adaptation)
        if tick + 1 == schedule.scan_end(window):
            adaptation = new_length(work, adaptation)
        if tick + 1 == schedule.ends[window]:
            state, adaptation = end_window(
                task, state, adaptation, window, schedule, self.num_superchains
            )
        return state, adaptation, moved.statistics

    # ------------------------------------------------------------ the end
    def _info(self, state: ManyState, adaptation: Adaptation, statistics: Tensor) -> Info:
        mean = dict(zip(_STATISTICS, statistics.mean((0, 1)).tolist(), strict=True))
        count = max(0, state.tick - self.num_warmup)
        diverging = state.sample_stats[..., _STATISTICS.index("diverging")].sum()
        return Info(
            {
                "lp": float(state.lp.median()),
                "step_size": adaptation.pace.step_size,
                "acceptance_rate": mean["acceptance_rate"],
                "num_steps": mean["n_steps"],
                "divergences": float(diverging),
                "num_draws": float(count),
                **live_r_hat(state.draws[:, :count], self.num_superchains),
            },
            state.tick >= self.num_warmup + self.num_samples,
        )

    @in_one_thread
    def finish(self, task: Task, work: Work, state: ManyState) -> dict[str, Any]:
        count = state.tick - self.num_warmup
        if count <= 0:
            raise ValueError(
                f"ManyChains stopped after {state.tick} transitions, before the first draw: "
                f"num_warmup is {self.num_warmup}. Let it run longer, or lower num_warmup."
            )
        statistics = dict(zip(_STATISTICS, state.sample_stats[:, :count].unbind(-1), strict=True))
        statistics["diverging"] = statistics["diverging"] > 0.5
        statistics["n_steps"] = statistics["n_steps"].long()
        adaptation = adaptation_of(state.adaptation)
        return {
            "draws": self.sites_of(task, work.density, state.draws[:, :count]),
            "sample_stats": statistics,
            "attrs": {
                "num_warmup": self.num_warmup,
                "num_superchains": self.num_superchains,
                "warmup_divergences": state.warmup_divergences,
                "step_size": adaptation.pace.step_size,
                "length": adaptation.length,
                "metric": adaptation.factor.flatten()[:_SHOWN].tolist(),
                "is_metric_dense": adaptation.factor.ndim == 2,
                "num_params": work.density.num_params,
                "is_traced": work.density.is_traced,
                "is_compiled": work.leapfrog.is_compiled,
                "speed": work.leapfrog.reason,
                "trace_seconds": work.density.notes.get("trace_seconds"),
                "compile_seconds": work.leapfrog.seconds,
                "messages": self._messages(work, state, adaptation, statistics),
            },
        }

    def _messages(
        self,
        work: Work,
        state: ManyState,
        adaptation: Adaptation,
        statistics: Mapping[str, Tensor],
    ) -> list[str]:
        messages = self.notes_of(work.density, statistics["lp"].numel())
        if state.num_restarted:
            messages.append(
                f"{_times(state.num_restarted)} in warm-up a chain stood far below all others, or "
                "where the density is much narrower, and was sent to where another one was: the "
                "starting points were poor, or there is a mode that these chains cannot sample."
            )
        if adaptation.length * (1 + JITTER) > self.max_leapfrogs * adaptation.pace.step_size:
            messages.append(
                f"trajectories were cut at max_leapfrogs={self.max_leapfrogs}: parameters are "
                "nearly collinear or of very different scales. Centre or rescale them, or raise "
                "max_leapfrogs."
            )
        return messages


def _metropolis(delta: Tensor, log_uniform: Tensor) -> Tensor:
    """Whether to accept, for energies that fell by ``delta``."""
    return log_uniform < delta


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
