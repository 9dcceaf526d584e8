"""Priors of mixtures in the user's terms, before any data are fitted.

:func:`explore` says how many clusters a prior on the weights lets ``num_rows`` rows occupy and
what shapes a prior on the components lets them take; :func:`solve_concentration` goes the other
way, from a wanted number of clusters to the concentration. Both are reachable from
:mod:`bayesgen.priors`.

References:
    Greve, Grün, Malsiner-Walli, Frühwirth-Schnatter (2022), Spying on the prior of the number of
    data clusters and the partition distribution in Bayesian cluster analysis.
    Gabry, Simpson, Vehtari, Betancourt, Gelman (2019), Visualization in Bayesian workflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesgen import occupancy, priors, rng

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CovarianceSummary", "PriorExploration", "explore", "solve_concentration"]

LEVELS = (0.05, 0.5, 0.95)
_EXACT_STICKS = (
    4e7  # rows * components**2 (* nodes) up to which the stick recursion runs, about 2 s
)
_STICK_NODES = 48


@dataclass(frozen=True)
class CovarianceSummary:
    """Quantiles, at 5 %, 50 % and 95 %, of the shape of one component under its prior."""

    standard_deviation: Tensor
    """``(d, 3)``: standard deviation within a component, per column, in the data's units."""
    relative_deviation: Tensor | None
    """``(d, 3)``: the same in units of the data's standard deviation, when that was given."""
    separation: Tensor
    """``(d, 3)``: distance of a component's mean from the prior mean, in standard deviations."""
    correlation: Tensor | None
    """``(3,)``: correlation of two columns within a component; None in one dimension."""
    condition_number: Tensor
    """``(3,)``: condition number of the correlation matrix, free of the columns' units."""

    def rows(self) -> list[tuple[str, list[float]]]:
        """One ``(label, quantiles)`` pair a line, columns averaged where there are many."""
        table = [("standard deviation within", self.standard_deviation)]
        if self.relative_deviation is not None:
            table.append(("  relative to the data's", self.relative_deviation))
        table.append(("|mean - prior mean| / sd", self.separation))
        lines = []
        for label, values in table:
            shown = (
                list(enumerate(values)) if len(values) <= 4 else [(None, values.median(0).values)]
            )
            for j, row in shown:
                where = "" if len(values) == 1 else " (median column)" if j is None else f" [{j}]"
                lines.append((label + where, row.tolist()))
        if self.correlation is not None:
            lines.append(("correlation of two columns", self.correlation.tolist()))
            lines.append(("condition number", self.condition_number.tolist()))
        return lines


@dataclass(frozen=True)
class PriorExploration:
    """What a prior says before data: the law of the number of clusters, and component shapes."""

    pmf: Tensor
    """``(num_components + 1,)``: prior probability of 0, 1, ..., K occupied components."""
    standard_error: Tensor | None
    """Monte Carlo standard error of each probability; None when they are exact."""
    num_rows: int
    weights: str
    """The prior of the weights, in one line."""
    covariance: CovarianceSummary | None
    """Shapes of one component; None when no prior of the components was given."""

    @property
    def num_components(self) -> int:
        """Components of the mixture."""
        return self.pmf.shape[0] - 1

    @property
    def expected_clusters(self) -> float:
        """Expected number of occupied components."""
        return float(self.pmf @ torch.arange(self.pmf.shape[0], dtype=self.pmf.dtype))

    @property
    def quantiles(self) -> dict[float, int]:
        """Smallest number of clusters whose cumulated probability reaches 5 %, 50 %, 95 %."""
        cumulated = self.pmf.cumsum(0) + 1e-12
        return {level: int((cumulated < level).sum()) for level in LEVELS}

    def plot(self) -> Figure:
        """Draw both; see :func:`bayesgen.plots.prior_exploration`."""
        from bayesgen import plots

        return plots.prior_exploration(self)

    def __str__(self) -> str:
        low, median, high = self.quantiles.values()
        how = "exact" if self.standard_error is None else "Monte Carlo"
        lines = [
            f"prior of the weights: {self.weights}",
            f"occupied clusters among {self.num_rows} rows and {self.num_components} components "
            f"({how}): expected {self.expected_clusters:.3g}, median {median}, "
            f"90 % between {low} and {high}",
        ]
        lines += _bars(self.pmf)
        if self.covariance is not None:
            lines.append(f"{'shape of one component':<38}{'5 %':>10}{'50 %':>10}{'95 %':>10}")
            for label, values in self.covariance.rows():
                lines.append(f"{label:<38}" + "".join(f"{value:>10.3g}" for value in values))
        return "\n".join(lines)


def _bars(pmf: Tensor, width: int = 40) -> list[str]:
    """The probabilities that matter as bars of text, the tail in one line."""
    shown = [k for k in range(1, len(pmf)) if float(pmf[k]) >= 0.005]
    longest = float(pmf.max())
    lines = [
        f"{k:>6}  {float(pmf[k]):6.1%}  {'#' * round(width * float(pmf[k]) / longest)}".rstrip()
        for k in shown
    ]
    return [*lines, f"  else  {1.0 - float(pmf[shown].sum()):6.1%}"]


def explore(
    weights: priors.Prior,
    *,
    num_rows: int,
    num_components: int,
    components: Distribution | priors.HierarchicalNormalInverseWishart | None = None,
    scale: Tensor | None = None,
    num_samples: int = 4000,
    seed: int = 0,
) -> PriorExploration:
    r"""Say what a mixture's prior means: how many clusters, and of what shapes.

    Exact for the descriptions in :mod:`bayesgen.priors` (see :mod:`bayesgen.occupancy`), otherwise
    by Monte Carlo with its standard error: a distribution on the simplex, a callable that returns
    one, or a stick-breaking prior on very many rows.

    Args:
        weights: Prior of the weights.
        num_rows: Rows that the data set will have.
        num_components: Components of the mixture.
        components: Prior of one component: a :class:`bayesgen.distributions.NormalInverseWishart`,
            its hierarchical version, a :class:`bayesgen.distributions.NormalInverseGamma` per
            column, or None to leave shapes out.
        scale: Standard deviation of each column of the data, ``(d,)``, to compare shapes with.
        num_samples: Draws of component shapes, and of anything that has no closed form.
        seed: Seed of these draws.

    Returns:
        The exploration; print it, or draw it with its ``plot()``.

    Raises:
        TypeError: If a prior is of a kind that this function does not know.
        ValueError: If sizes are not positive or do not match the prior.

    Example:
        >>> from bayesgen import priors
        >>> found = explore(priors.SymmetricDirichlet(0.1), num_rows=272, num_components=10)
        >>> round(found.expected_clusters, 2), found.quantiles
        (4.66, {0.05: 2, 0.5: 5, 0.95: 7})
    """
    generator = rng.make_generator(seed)
    pmf, error = _clusters(weights, num_rows, num_components, num_samples, generator)
    shapes = None if components is None else _shapes(components, scale, num_samples, generator)
    return PriorExploration(pmf, error, num_rows, priors.describe(weights), shapes)


def solve_concentration(
    wanted_clusters: float, *, num_rows: int, num_components: int, kind: str = "dirichlet"
) -> float:
    """Concentration at which the prior expects ``wanted_clusters`` occupied components.

    Args:
        wanted_clusters: Expected number of occupied components wanted, more than 1 and less than
            what is possible.
        num_rows: Rows that the data set will have.
        num_components: Components of the mixture.
        kind: ``"dirichlet"``: the parameter of every component of a symmetric Dirichlet;
            ``"stick-breaking"``: that of a truncated Dirichlet process.

    Returns:
        The concentration.

    Raises:
        ValueError: If no concentration gives that many, with the range that is possible.

    Example:
        >>> from bayesgen import priors
        >>> found = solve_concentration(3.0, num_rows=272, num_components=10)
        >>> law = explore(priors.SymmetricDirichlet(found), num_rows=272, num_components=10)
        >>> round(law.expected_clusters, 6)
        3.0
    """
    from scipy.optimize import brentq

    if num_rows == 1 or num_components == 1:
        raise ValueError(
            f"with num_rows={num_rows} and num_components={num_components} exactly one component "
            "is occupied whatever the concentration: give more rows and components."
        )

    def expected(log_concentration: float) -> float:
        value = math.exp(log_concentration)
        return occupancy.expected_clusters(
            value, num_rows=num_rows, num_components=num_components, kind=kind
        )

    low = math.log(1e-12)
    high = _most(expected, num_components) if kind == "stick-breaking" else math.log(1e8)
    least, most = expected(low), expected(high)
    if not least < wanted_clusters < most:
        raise ValueError(
            f"no concentration makes {num_rows} rows expect {wanted_clusters:g} occupied clusters "
            f"among {num_components} components with kind={kind!r}: ask for more than 1 and less "
            f"than {most:.4g}, or change num_components."
        )
    return math.exp(brentq(lambda t: expected(t) - wanted_clusters, low, high, xtol=1e-12))


def _most(expected: Callable[[float], float], num_components: int) -> float:
    """Log concentration of truncated sticks that expects most components.

    Beyond it the first sticks starve and the last takes everything, so the expectation falls
    again.
    """
    from scipy.optimize import minimize_scalar

    bounds = (math.log(1e-3), math.log(1e3 * num_components))
    return float(minimize_scalar(lambda t: -expected(t), bounds=bounds, method="bounded").x)


# ------------------------------------------------------------------ number of clusters
def _clusters(
    weights: priors.Prior,
    num_rows: int,
    num_components: int,
    num_samples: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None]:
    """Probabilities of 0..K occupied components, and their standard errors unless exact."""
    sizes = {"num_rows": num_rows, "num_components": num_components}
    occupancy.check_sizes(**sizes)
    if isinstance(weights, priors.SymmetricDirichlet):
        return occupancy.dirichlet_clusters(weights.concentration, **sizes), None
    if isinstance(weights, priors.GammaDirichlet):
        return occupancy.gamma_dirichlet_clusters(weights.shape, weights.rate, **sizes), None
    if isinstance(weights, priors.StickBreaking):
        exact = _sticks(weights, num_rows, num_components)
        if exact is not None:
            return exact, None
        drawn = _draw_sticks(weights, num_components, num_samples, generator)
    else:
        drawn = _draw_weights(weights, num_samples, generator)
    counts = occupancy.sampled_clusters(drawn, **sizes, generator=generator)
    pmf = torch.bincount(counts, minlength=num_components + 1).to(torch.float64) / num_samples
    return pmf, (pmf * (1.0 - pmf) / num_samples).sqrt()


def _sticks(weights: priors.StickBreaking, num_rows: int, num_components: int) -> Tensor | None:
    """Exact law under stick-breaking, or None when it would take more than seconds."""
    work = float(num_rows) * num_components**2
    if weights.concentration is not None:
        if work > _EXACT_STICKS:
            return None
        return occupancy.stick_breaking_clusters(
            weights.concentration, num_rows=num_rows, num_components=num_components
        )
    assert weights.shape is not None  # checked by StickBreaking itself
    assert weights.rate is not None
    if work * _STICK_NODES > _EXACT_STICKS:
        return None
    nodes, mass, below = occupancy.gamma_nodes(weights.shape, weights.rate, _STICK_NODES)
    pmf = torch.zeros(num_components + 1, dtype=torch.float64)
    for node, probability in zip(nodes.tolist(), mass, strict=True):
        pmf += probability * occupancy.stick_breaking_clusters(
            node, num_rows=num_rows, num_components=num_components
        )
    pmf[1] += below
    return pmf / pmf.sum()


def _draw_sticks(
    weights: priors.StickBreaking,
    num_components: int,
    num_samples: int,
    generator: torch.Generator,
) -> Tensor:
    alpha = torch.full((num_samples, 1), weights.concentration or 1.0, dtype=torch.float64)
    if weights.shape is not None and weights.rate is not None:
        alpha = rng.gamma(torch.full_like(alpha, weights.shape), generator) / weights.rate
    ones = torch.ones(num_samples, num_components - 1, dtype=torch.float64)
    log_v, log_rest = rng.log_beta_sample(ones, alpha.clamp_min(1e-12) * ones, generator)
    left = torch.cat([torch.zeros_like(alpha), log_rest.cumsum(-1)], -1)
    return (torch.cat([log_v, torch.zeros_like(alpha)], -1) + left).exp()


def _draw_weights(weights: object, num_samples: int, generator: torch.Generator) -> Tensor:
    with rng.fork(generator):
        if isinstance(weights, Distribution):
            return weights.sample((num_samples,))
        if callable(weights):
            return torch.stack([weights().sample() for _ in range(num_samples)])
    raise TypeError(
        f"weights is a {type(weights).__name__}, but a prior of weights is one of "
        "priors.SymmetricDirichlet, GammaDirichlet, StickBreaking, a distribution on the "
        "simplex, or a callable that returns one."
    )


# ------------------------------------------------------------------ shape of a component
def _shapes(
    components: object, scale: Tensor | None, num_samples: int, generator: torch.Generator
) -> CovarianceSummary:
    center, loc, covariance = _draw_components(components, num_samples, generator)
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    d = sd.shape[-1]
    if scale is not None and scale.shape != (d,):
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}, but the components have {d} columns: give the "
            "standard deviation of each column of the data."
        )
    correlations = covariance / (sd[..., :, None] * sd[..., None, :])
    lower, upper = torch.triu_indices(d, d, offset=1)
    eigenvalues = torch.linalg.eigvalsh(correlations)
    return CovarianceSummary(
        standard_deviation=_quantiles(sd),
        relative_deviation=None if scale is None else _quantiles(sd / scale.to(sd)),
        separation=_quantiles((loc - center).abs() / sd),
        correlation=None if d == 1 else _quantiles(correlations[:, lower, upper].reshape(-1)),
        condition_number=_quantiles(eigenvalues[:, -1] / eigenvalues[:, 0].clamp_min(1e-300)),
    )


def _draw_components(
    components: object, num_samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Prior mean ``(d,)``, draws of a component's mean ``(s, d)`` and covariance ``(s, d, d)``."""
    from bayesgen.distributions import NormalInverseGamma, NormalInverseWishart

    shape: tuple[int, ...] = (num_samples,)
    if isinstance(components, priors.HierarchicalNormalInverseWishart):
        hyper = components.numbers
        rate = hyper.rate.to(torch.float64)
        power = torch.full((num_samples, len(rate)), hyper.shape, dtype=torch.float64)
        scales = (rng.gamma(power, generator) / rate).clamp_min(1e-300)
        components = NormalInverseWishart(
            hyper.loc.to(rate),
            torch.as_tensor(hyper.mean_precision).to(rate),
            torch.as_tensor(hyper.df).to(rate),
            torch.diag_embed(scales.sqrt()),
        )
        shape = ()
    if isinstance(components, NormalInverseWishart):
        draws = components.sample(shape, generator=generator).to(torch.float64)
        loc, factor = NormalInverseWishart.unpack(
            draws.reshape(num_samples, -1, *draws.shape[-2:])[:, 0]
        )
        center = components.loc.reshape(-1, loc.shape[-1])[0]
        return center, loc, factor @ factor.mT
    if isinstance(components, NormalInverseGamma):
        with rng.fork(generator):
            loc, variance = NormalInverseGamma.unpack(components.sample(shape).to(torch.float64))
        loc, variance = loc.reshape(num_samples, -1), variance.reshape(num_samples, -1)
        return components.loc.reshape(-1), loc, torch.diag_embed(variance)
    raise TypeError(
        f"components is a {type(components).__name__}, but shapes are explored for "
        "NormalInverseWishart, HierarchicalNormalInverseWishart and NormalInverseGamma."
    )


def _quantiles(values: Tensor) -> Tensor:
    """``(s, ...)`` to ``(..., 3)``; sorted by hand since torch.quantile refuses large tensors."""
    ordered = values.sort(0).values
    picks = torch.tensor([round(level * (len(ordered) - 1)) for level in LEVELS])
    return ordered[picks].movedim(0, -1)
