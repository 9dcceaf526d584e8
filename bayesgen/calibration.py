r"""Is the computation right, and does the model resemble the data? Three tests that can fail.

* :func:`simulation_based_calibration`: parameters from the prior, data from the parameters,
  posterior from the data; over many repetitions the rank of the truth among the draws is uniform,
  or the posterior is wrong (too narrow: ranks pile up at the ends).
* :func:`geweke_joint_test`: two ways of simulating parameters *and* data, one with the transition
  of a Markov chain; every expectation agrees, or the transition is wrong.
* :func:`posterior_predictive_check`: data replicated from the fit resemble the data, or the model
  is wrong.

The first two take plain callables and are batched: all repetitions in one tensor program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import Tensors
from bayesgen.replication import (
    PredictiveCheck,
    default_statistics,
    posterior_predictive_check,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "JointTest",
    "PredictiveCheck",
    "Quantities",
    "Ranks",
    "default_statistics",
    "envelope_level",
    "geweke_joint_test",
    "posterior_predictive_check",
    "rank_truth",
    "simulation_based_calibration",
    "uniformity_p_values",
]

Quantities = Callable[[Tensors, Any], Tensors]
"""Test quantities of parameters and data, batched as they are: ``{name: (..., s, *shape)}``."""


# ------------------------------------------------------------------ simulation-based calibration
@dataclass(frozen=True, eq=False)
class Ranks:
    """Ranks of the truth among posterior draws, and how surely they are not uniform."""

    ranks: Mapping[str, Tensor]
    """``(num_simulations,)`` integers in ``0 .. num_draws`` for each scalar quantity."""
    num_draws: int
    """Draws that each truth was ranked among."""
    p_values: Mapping[str, float]
    """P-value of uniformity of each quantity: small when the posterior is wrong."""

    @property
    def p_value(self) -> float:
        """Smallest p-value times the number of quantities (Bonferroni): one verdict for all."""
        return min(1.0, len(self.p_values) * min(self.p_values.values()))

    def plot(self) -> Axes:
        """Draw the rank distributions; see :func:`bayesgen.plots.ranks`."""
        from bayesgen import plots

        return plots.ranks(self)

    def __str__(self) -> str:
        size = len(next(iter(self.ranks.values())))
        lines = [
            f"simulation-based calibration, {size} simulations of {self.num_draws} draws: "
            f"p = {self.p_value:.3g} over {len(self.p_values)} quantities"
        ]
        middle = self.num_draws / 2
        for name, p in sorted(self.p_values.items(), key=lambda item: item[1]):
            shift = float(self.ranks[name].to(torch.float64).mean()) / middle - 1.0
            lines.append(f"  {name:<32} p = {p:<8.3g} mean rank {shift:+.1%} of the middle")
        return "\n".join(lines)


def simulation_based_calibration(
    simulate: Callable[[int, torch.Generator], tuple[Tensors, Any]],
    posterior_draws: Callable[[Any, torch.Generator], Tensors],
    *,
    num_simulations: int,
    quantities: Quantities | None = None,
    seed: int = 0,
) -> Ranks:
    r"""Rank the truth among posterior draws, over many simulated data sets.

    With :math:`\theta \sim p(\theta)`, :math:`y \sim p(y \mid \theta)` and draws
    :math:`\theta_1, \dots, \theta_L` from :math:`p(\theta \mid y)`, the rank of
    :math:`f(\theta, y)` among :math:`f(\theta_l, y)` is uniform on :math:`0, \dots, L` for any
    :math:`f`. Quantities that involve the data, above all the log likelihood, catch errors that
    parameters alone cannot: a posterior equal to the prior passes every test of the latter.

    Draws must be nearly independent: thin a Markov chain until its effective sample size is its
    length.

    References:
        Cook, Gelman, Rubin (2006), Validation of software for Bayesian models using posterior
        quantiles. Talts, Betancourt, Simpson, Vehtari, Gelman (2018), Validating Bayesian
        inference algorithms with simulation-based calibration.
        Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman, Vehtari (2023), Simulation-based
        calibration checking for Bayesian computation: the choice of test quantities shapes
        sensitivity.

    Args:
        simulate: Called with a number ``s`` and a generator; returns ``s`` parameters
            ``{name: (s, ...)}`` from the prior and ``s`` data sets, whatever they are.
        posterior_draws: Called with these data and a generator; returns
            ``{name: (num_draws, s, ...)}``.
        num_simulations: Number of data sets ``s``.
        quantities: Scalars or tensors to rank, of parameters and data; the parameters themselves
            when None. Must broadcast over a leading ``num_draws``.
        seed: Of everything.

    Returns:
        Ranks and p-values, one for each entry of each quantity.

    Raises:
        ValueError: If shapes do not fit, or a quantity is not finite.
    """
    generator = rng.make_generator(seed)
    parameters, data = simulate(num_simulations, generator)
    draws = posterior_draws(data, generator)
    wanted = _identity if quantities is None else quantities
    truth, drawn = _scalars(wanted(parameters, data), 1), _scalars(wanted(draws, data), 2)
    return rank_truth(truth, drawn, generator=generator, seed=seed)


def rank_truth(
    truth: Tensors, drawn: Tensors, *, generator: torch.Generator, seed: int = 0
) -> Ranks:
    """Rank true scalars among posterior draws, ties broken at random.

    Args:
        truth: ``(num_simulations,)`` by quantity.
        drawn: ``(num_draws, num_simulations)`` by quantity.
        generator: Of the coins.
        seed: Of the reference distribution of the p-values.

    Raises:
        ValueError: If shapes do not fit.
    """
    ranks = {}
    for name, value in truth.items():
        among, num_simulations = drawn[name], len(value)
        if value.shape != (num_simulations,) or among.shape[1:] != value.shape:
            raise ValueError(
                f"quantity {name!r} has shape {tuple(value.shape)} at the truth and "
                f"{tuple(among.shape)} at the draws, but needs ({num_simulations},) and "
                f"(num_draws, {num_simulations})."
            )
        below, equal = (among < value).sum(0), (among == value).sum(0)
        coin = torch.rand(value.shape, generator=generator, dtype=torch.float64)
        ranks[name] = below + (coin * (equal + 1)).floor().to(torch.int64)
    num_draws = next(iter(drawn.values())).shape[0]
    p_values = uniformity_p_values(ranks, num_draws, seed=seed)
    return Ranks(ranks, num_draws, p_values)


def _identity(parameters: Tensors, data: object) -> Tensors:
    return parameters


def _scalars(values: Tensors, num_lead: int) -> dict[str, Tensor]:
    """One entry ``(*lead,)`` for each scalar: ``loc[0, 1]`` for the entries of a tensor."""
    result = {}
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"quantity {name!r} is not finite everywhere.")
        if value.ndim == num_lead:
            result[name] = value
            continue
        for index in np.ndindex(*value.shape[num_lead:]):
            label = ", ".join(str(i) for i in index)
            result[f"{name}[{label}]"] = value[(..., *index)]
    return result


def uniformity_p_values(
    ranks: Mapping[str, Tensor], num_draws: int, *, num_null: int = 2000, seed: int = 0
) -> dict[str, float]:
    r"""P-values of uniformity on ``0 .. num_draws`` by the simultaneous envelope of the ECDF.

    The statistic is the smallest pointwise two-sided binomial tail probability of the empirical
    distribution function over all ranks; its law under uniformity is simulated, so that the
    p-value is exact at any size. Unlike a chi-square test of a histogram it needs no bins and
    feels the ends, where posteriors that are too narrow or too wide show.

    References:
        Säilynoja, Bürkner, Vehtari (2022), Graphical test for discrete uniformity and its
        applications in goodness-of-fit evaluation and multiple sample comparison.

    Args:
        ranks: ``{name: (num_simulations,)}``.
        num_draws: Largest possible rank.
        num_null: Simulated uniform samples; the smallest p-value is ``1 / (num_null + 1)``.
        seed: Of the simulation.
    """
    sizes = {len(r) for r in ranks.values()}
    generator = rng.make_generator(seed)
    null = {}
    for size in sizes:
        shape = (num_null, size)
        uniform = torch.randint(num_draws + 1, shape, generator=generator)
        null[size] = _envelope_statistic(uniform, num_draws)
    result = {}
    for name, values in ranks.items():
        statistic = _envelope_statistic(values[None], num_draws)
        at_most = int((null[len(values)] <= statistic * (1 + 1e-9)).sum())
        result[name] = (1 + at_most) / (num_null + 1)
    return result


def envelope_level(
    num_simulations: int,
    num_draws: int,
    *,
    level: float = 0.95,
    num_null: int = 2000,
    seed: int = 0,
) -> float:
    """Pointwise tail probability at which the envelope holds ``level`` of uniform samples.

    Args:
        num_simulations: Ranks in a sample.
        num_draws: Largest possible rank.
        level: Simultaneous coverage.
        num_null: Simulated uniform samples.
        seed: Of the simulation.
    """
    shape = (num_null, num_simulations)
    uniform = torch.randint(num_draws + 1, shape, generator=rng.make_generator(seed))
    ordered = _envelope_statistic(uniform, num_draws).sort().values
    return float(ordered[int((1.0 - level) * num_null)])


def _envelope_statistic(ranks: Tensor, num_draws: int) -> Tensor:
    """Smallest two-sided binomial tail of the ECDF of each row, ``(m, size)`` to ``(m,)``."""
    from scipy.stats import binom

    size = ranks.shape[1]
    # At most 50 evaluation points: neighbouring ones say the same.
    points = np.unique(np.linspace(1, num_draws, min(num_draws, 50)).round().astype(int))
    grid = np.arange(size + 1)[:, None]
    chance = points / (num_draws + 1)
    lower, upper = binom.cdf(grid, size, chance), binom.sf(grid - 1, size, chance)
    tails = torch.from_numpy(2.0 * np.minimum(lower, upper))  # (count, point)
    statistic = torch.full((ranks.shape[0],), 2.0, dtype=torch.float64)
    for column, point in enumerate(points.tolist()):
        statistic = torch.minimum(statistic, tails[(ranks < point).sum(-1), column])
    return statistic


# ------------------------------------------------------------------ Geweke's joint test
@dataclass(frozen=True, eq=False)
class JointTest:
    """Agreement of two simulators of parameters and data, one z-score a test function."""

    z_scores: Mapping[str, float]
    """Standardised differences, normal when the transition is right."""
    marginal: Mapping[str, float]
    """Expectation by independent simulation."""
    successive: Mapping[str, float]
    """Expectation along the Markov chains."""

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the largest z-score, times their number (Bonferroni)."""
        worst = max(abs(z) for z in self.z_scores.values())
        return min(1.0, len(self.z_scores) * math.erfc(worst / math.sqrt(2.0)))

    def __str__(self) -> str:
        count = len(self.z_scores)
        lines = [f"Geweke's joint test: p = {self.p_value:.3g} over {count} functions"]
        for name, z in sorted(self.z_scores.items(), key=lambda item: -abs(item[1])):
            lines.append(
                f"  {name:<32} z = {z:+6.2f}   {self.marginal[name]:.4g} against "
                f"{self.successive[name]:.4g}"
            )
        return "\n".join(lines)


def geweke_joint_test(
    prior: Callable[[int, torch.Generator], Tensors],
    simulate: Callable[[Tensors, torch.Generator], Any],
    transition: Callable[[Tensors, Any, torch.Generator], Tensors],
    *,
    quantities: Quantities | None = None,
    num_chains: int = 200,
    num_steps: int = 50,
    num_marginal: int = 20_000,
    moments: int = 2,
    seed: int = 0,
) -> JointTest:
    r"""Getting it right: does a transition leave the posterior alone, for every data set?

    The *marginal-conditional* simulator draws :math:`\theta \sim p(\theta)`,
    :math:`y \sim p(y \mid \theta)` independently. The *successive-conditional* one alternates
    :math:`\theta \sim T(\cdot \mid \theta, y)` and :math:`y \sim p(y \mid \theta)`. Both have the
    joint distribution if and only if the transition :math:`T` preserves the posterior.

    Here many chains run side by side, each started in an exact joint draw. Under a right
    transition every chain is stationary from its first step and chains are independent, so the
    Monte Carlo error comes from the spread of chain means: no autocorrelation has to be estimated.

    References:
        Geweke (2004), Getting it right: joint distribution tests of posterior simulators.
        Grosse, Duvenaud (2014), Testing MCMC code.

    Args:
        prior: Called with a number and a generator; parameters ``{name: (s, ...)}``.
        simulate: Called with parameters and a generator; their data sets, whatever they are.
        transition: Called with parameters, data and a generator; the parameters after one step (or
            more) of the sampler under test. All chains at once.
        quantities: Test functions of parameters and data, ``{name: (s, ...)}``; the parameters
            when None. Choose bounded or light-tailed ones: a z-score needs a variance.
        num_chains: Chains of the successive-conditional simulator, at least 20.
        num_steps: Steps of each chain.
        num_marginal: Independent joint draws.
        moments: Powers of each quantity compared: 2 compares means and second moments.
        seed: Of everything.

    Returns:
        z-scores, one for each power of each entry of each quantity.

    Raises:
        ValueError: If ``num_chains < 20``, or a quantity is not finite.
    """
    if num_chains < 20:
        raise ValueError(
            f"num_chains={num_chains}, but the spread of chain means needs at least 20 chains."
        )
    generator = rng.make_generator(seed)
    wanted = _identity if quantities is None else quantities

    def functions(parameters: Tensors, data: object) -> dict[str, Tensor]:
        scalars = _scalars(wanted(parameters, data), 1)
        return {
            name if power == 1 else f"{name}^{power}": value.to(torch.float64) ** power
            for name, value in scalars.items()
            for power in range(1, moments + 1)
        }

    parameters = prior(num_marginal, generator)
    marginal = functions(parameters, simulate(parameters, generator))
    parameters = prior(num_chains, generator)
    data = simulate(parameters, generator)
    sums: dict[str, Tensor] = {}
    for _ in range(num_steps):
        parameters = transition(parameters, data, generator)
        data = simulate(parameters, generator)
        for name, value in functions(parameters, data).items():
            sums[name] = sums[name] + value if name in sums else value
    means = {name: value / num_steps for name, value in sums.items()}
    return JointTest(
        {name: _z_score(marginal[name], means[name]) for name in means},
        {name: float(value.mean()) for name, value in marginal.items()},
        {name: float(value.mean()) for name, value in means.items()},
    )


def _z_score(independent: Tensor, chain_means: Tensor) -> float:
    """Welch's t, mapped to the normal with its tail probability so that few chains are honest."""
    from scipy.stats import norm, t

    first = float(independent.var()) / len(independent)
    second = float(chain_means.var()) / len(chain_means)
    difference = float(chain_means.mean() - independent.mean())
    if first + second == 0.0:
        return 0.0 if difference == 0.0 else math.copysign(math.inf, difference)
    df = (first + second) ** 2 / (
        first**2 / (len(independent) - 1) + second**2 / (len(chain_means) - 1)
    )
    statistic = difference / math.sqrt(first + second)
    return math.copysign(float(norm.isf(t.sf(abs(statistic), df))), statistic)
