"""Posterior predictive checks: do data sets replicated from a fit resemble the data?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import Generative, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesgen.fit import Fit

__all__ = [
    "PredictiveCheck",
    "Statistics",
    "default_statistics",
    "posterior_predictive_check",
]

Statistics = Mapping[str, Callable[[Tensor], Tensor]]
"""Functions of data sets ``(s, n, d)``, NaN where missing, to ``(s,)`` or ``(s, d)``."""


@dataclass(frozen=True, eq=False)
class PredictiveCheck:
    """Statistics of the data beside those of data sets replicated from the fit."""

    observed: Mapping[str, float]
    """The statistics of the data."""
    replicated: Mapping[str, Tensor]
    """``(num_samples,)`` the same of each replicated data set."""
    p_values: Mapping[str, float]
    """Two-sided posterior predictive p-values: how central the data are among the replications."""

    def plot(self) -> Figure:
        """Draw the check; see :func:`bayesgen.plots.predictive_check`."""
        from bayesgen import plots

        return plots.predictive_check(self)

    def __str__(self) -> str:
        lines = [f"{'statistic':<32}{'observed':>12}{'replicated, 90 %':>26}{'p':>9}"]
        for name, value in self.observed.items():
            low, high = _central(self.replicated[name])
            span = f"{low:.4g} to {high:.4g}"
            lines.append(f"{name:<32}{value:>12.4g}{span:>26}{self.p_values[name]:>9.3f}")
        return "\n".join(lines)


def _central(values: Tensor) -> tuple[float, float]:
    known = values[~values.isnan()]
    if len(known) == 0:
        return math.nan, math.nan
    low, high = known.quantile(torch.tensor([0.05, 0.95], dtype=known.dtype)).tolist()
    return low, high


def posterior_predictive_check(
    fit: Fit,
    statistics: Statistics | None = None,
    *,
    num_samples: int = 200,
    seed: int = 0,
) -> PredictiveCheck:
    r"""Compare the data with data sets of the same size replicated from the posterior.

    Each replication takes one posterior draw, simulates every row under it, and loses the entries
    that the data miss. A p-value near 0 says that the model cannot produce what the data show. It
    is *not* uniform under the right model but bunched at the middle, since the fit has seen the
    data: a small one is all the more telling, a large one is no proof.

    References:
        Rubin (1984), Bayesianly justifiable and relevant frequency calculations for the applied
        statistician.
        Gelman, Meng, Stern (1996), Posterior predictive assessment of model fitness via realized
        discrepancies.
        Bayarri, Berger (2000), P values for composite null models.

    Args:
        fit: A fit that knows its training data, of a ``Generative`` model.
        statistics: Functions of data sets; :func:`default_statistics` when None.
        num_samples: Replicated data sets.
        seed: Of the replications.

    Returns:
        Observed and replicated statistics with p-values, one for each column where there are
        several.

    Raises:
        TypeError: If the model cannot generate.
        ValueError: If the fit has no training data in memory.
    """
    model = require(fit.model, Generative, "posterior_predictive_check")
    if fit.data is None or not fit.data.in_memory:
        raise ValueError(
            "a posterior predictive check needs the training data in memory, but this fit has "
            f"{'none' if fit.data is None else 'streamed data'}: fit to a random part of the rows."
        )
    x = fit.data.tensor().to(fit.device)
    generator = rng.make_generator(seed, fit.device)
    flat = {name: value.flatten(0, 1) for name, value in fit.draws.items()}
    total = fit.num_chains * fit.num_draws
    chosen = torch.randint(total, (num_samples,), generator=generator, device=fit.device)
    functions = default_statistics() if statistics is None else statistics
    columns = fit.columns
    observed = {name: value[0] for name, value in _apply(functions, x[None], columns).items()}
    batches = []
    per_batch = max(1, 2**20 // max(1, x.numel()))  # replications alive at once
    for part in chosen.split(per_batch):
        repeated = {name: value[part].repeat_interleave(len(x), 0) for name, value in flat.items()}
        rows = model.sample(repeated, generator=generator).reshape(len(part), *x.shape)
        batches.append(_apply(functions, rows.masked_fill(x.isnan(), torch.nan), columns))
    replicated = {name: torch.cat([b[name] for b in batches]).cpu() for name in observed}
    values = {name: float(value) for name, value in observed.items()}
    p_values = {name: _two_sided(values[name], replicated[name]) for name in values}
    return PredictiveCheck(values, replicated, p_values)


def _apply(functions: Statistics, x: Tensor, columns: tuple[str, ...]) -> dict[str, Tensor]:
    result = {}
    for name, function in functions.items():
        value = function(x)
        if value.ndim == 1:
            result[name] = value
        elif value.ndim == 2 and value.shape[1] == len(columns):
            result |= {f"{name} {column}": value[:, j] for j, column in enumerate(columns)}
        elif value.ndim == 2:
            result |= {f"{name}[{j}]": value[:, j] for j in range(value.shape[1])}
        else:
            raise ValueError(
                f"statistic {name!r} gave shape {tuple(value.shape)} for data {tuple(x.shape)}, "
                "but must give one value, or one a column, for each data set."
            )
    return result


def _two_sided(observed: float, replicated: Tensor) -> float:
    """Twice the smaller tail, half of the ties in each, never 0: one in ``num_samples + 1``."""
    known = replicated[~replicated.isnan()]
    if math.isnan(observed) or len(known) == 0:
        return math.nan
    # A constant column is a tie up to rounding.
    near = (known - observed).abs() <= 1e-12 * max(1.0, abs(observed))
    ties = 0.5 * float(near.sum())
    below = float(((known < observed) & ~near).sum()) + ties
    above = float(((known > observed) & ~near).sum()) + ties
    return min(1.0, 2.0 * (min(below, above) + 0.5) / (len(known) + 1))


def default_statistics() -> dict[str, Callable[[Tensor], Tensor]]:
    """Statistics of data sets ``(s, n, d)`` that tell most wrong models, NaN-aware.

    Mean, standard deviation, skewness, extremes and quantiles of each column, its number of modes
    (of a kernel density), and the root mean square of the correlations.
    """
    return {
        "mean": lambda x: x.nanmean(-2),
        "sd": _sd,
        "skewness": _skewness,
        "min": lambda x: x.nan_to_num(nan=torch.inf).amin(-2),
        "5 %": lambda x: x.nanquantile(0.05, dim=-2),
        "median": lambda x: x.nanquantile(0.5, dim=-2),
        "95 %": lambda x: x.nanquantile(0.95, dim=-2),
        "max": lambda x: x.nan_to_num(nan=-torch.inf).amax(-2),
        "modes": _num_modes,
        "correlation": _correlation,
    }


def _sd(x: Tensor) -> Tensor:
    return (x - x.nanmean(-2, keepdim=True)).square().nanmean(-2).sqrt()


def _skewness(x: Tensor) -> Tensor:
    centred = x - x.nanmean(-2, keepdim=True)
    variance = centred.square().nanmean(-2)
    skewness = centred.pow(3).nanmean(-2) / variance.pow(1.5).clamp_min(1e-300)
    return torch.where(variance > 0, skewness, 0.0)


def _num_modes(x: Tensor) -> Tensor:
    """Local maxima of a kernel density at Silverman's bandwidth, that are not mere ripples."""
    sd = _sd(x)
    count = (~x.isnan()).sum(-2)
    scale = torch.minimum(
        sd, (x.nanquantile(0.75, dim=-2) - x.nanquantile(0.25, dim=-2)) / 1.349
    ).clamp_min(1e-12)
    bandwidth = 0.9 * torch.where(scale > 1e-12, scale, sd) * count.clamp_min(1) ** -0.2
    grid = torch.linspace(0.0, 1.0, 128, dtype=x.dtype, device=x.device)[:, None, None]
    low = x.nan_to_num(nan=torch.inf).amin(-2)
    high = x.nan_to_num(nan=-torch.inf).amax(-2)
    at = low + (high - low) * grid  # (128, s, d)
    density = torch.zeros_like(at)
    for rows in x.split(256, dim=-2):
        gap = (at.unsqueeze(-2) - rows) / bandwidth.clamp_min(1e-300).unsqueeze(-2)
        density += (-0.5 * gap.square()).exp().nan_to_num(0.0).sum(-2)
    edge = torch.zeros_like(density[:1])
    padded = torch.cat([edge, density, edge])
    peak = (padded[1:-1] > padded[:-2]) & (padded[1:-1] >= padded[2:])
    return (peak & (density > 0.05 * density.amax(0))).sum(0).to(x.dtype)


def _correlation(x: Tensor) -> Tensor:
    """Root mean square of pairwise correlations, each over rows that have both entries."""
    d = x.shape[-1]
    if d == 1:
        return x.new_zeros(x.shape[0])
    known = (~x.isnan()).to(x.dtype)
    z = ((x - x.nanmean(-2, keepdim=True)) / _sd(x).unsqueeze(-2).clamp_min(1e-300)).nan_to_num(
        0.0
    )
    pairs = (known.mT @ known).clamp_min(1.0)
    correlations = (z.mT @ z) / pairs
    upper = torch.triu_indices(d, d, offset=1)
    return correlations[:, upper[0], upper[1]].square().mean(-1).sqrt()
