"""Posterior predictive checks: do data sets replicated from a fit resemble the data?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import Generative, Simulated, require
from bayesgen.predictive import observed
from bayesgen.schema import Kind, Schema

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesgen.fit import Fit
__all__ = [
    "PredictiveCheck",
    "Statistics",
    "default_statistics",
    "posterior_predictive_check",
]

_ALIVE = 2**20  # numbers of the replications alive at once
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
        fit: A fit that knows its training data, of a ``Generative`` model or a plain program,
            whose observed sites take the place of columns.
        statistics: Functions of data sets. When None, :func:`default_statistics` of the real and
            count columns and the share of each level of the others.
        num_samples: Replicated data sets.
        seed: Of the replications.

    Returns:
        Observed and replicated statistics with p-values, one for each column where there are
        several.

    Raises:
        TypeError: If the model cannot generate.
        ValueError: If the fit has no training data in memory.
    """
    generator = rng.make_generator(seed, fit.device)
    total = fit.num_chains * fit.num_draws
    chosen = torch.randint(total, (num_samples,), generator=generator, device=fit.device)
    values: dict[str, float] = {}
    replicated: dict[str, Tensor] = {}
    for data, schema, copies in _sources(fit, chosen, generator):
        measure = _measure(statistics, schema)
        values |= {name: float(value[0]) for name, value in measure(data[None]).items()}
        batches = [measure(rows) for rows in copies]
        replicated |= {k: torch.cat([b[k] for b in batches]).cpu() for k in batches[0]}
    p_values = {name: _two_sided(values[name], replicated[name]) for name in values}
    return PredictiveCheck(values, replicated, p_values)


def _measure(
    statistics: Statistics | None, schema: Schema
) -> Callable[[Tensor], dict[str, Tensor]]:
    if statistics is None:
        return lambda rows: _by_kind(rows, schema)
    return lambda rows: _apply(statistics, rows, schema.columns)


Source = tuple[Tensor, Schema, Iterator[Tensor]]


def _sources(fit: Fit, chosen: Tensor, generator: torch.Generator) -> Iterator[Source]:
    """Tables ``(n, d)`` of data with their columns, and batches of replications ``(s, n, d)``."""
    if isinstance(fit.model, Simulated):
        yield from _program_sources(fit, fit.model, chosen, generator)
        return
    model = require(fit.model, Generative, "posterior_predictive_check")
    if fit.data is None or not fit.data.in_memory:
        raise ValueError(
            "a posterior predictive check needs the training data in memory, but this fit has "
            f"{'none' if fit.data is None else 'streamed data'}: fit to a random part of the rows."
        )
    x = fit.data.tensor().to(fit.device)
    flat = {name: value.flatten(0, 1) for name, value in fit.draws.items()}

    def copies() -> Iterator[Tensor]:
        for part in chosen.split(max(1, _ALIVE // max(1, x.numel()))):
            each = {k: value[part].repeat_interleave(len(x), 0) for k, value in flat.items()}
            rows = model.sample(each, generator=generator).reshape(len(part), *x.shape)
            yield rows.masked_fill(x.isnan(), torch.nan)

    yield x, fit.schema, copies()


def _program_sources(
    fit: Fit, model: Simulated, chosen: Tensor, generator: torch.Generator
) -> Iterator[Source]:
    """Each observed site of a program; its last dimension is columns where it has several."""
    flat = {name: value.flatten(0, 1)[chosen] for name, value in fit.draws.items()}
    found = model.replicate(flat, generator=generator)
    for site, data in observed(fit).items():
        width = data.shape[-1] if data.ndim > 1 else 1
        names = (site,) if width == 1 else tuple(f"{site}[{j}]" for j in range(width))
        table = data.double().reshape(-1, width)
        kinds: tuple[Kind, ...] = tuple(
            "binary" if _is_binary(column) else "real" for column in table.unbind(-1)
        )
        schema = Schema(names, kinds, (None,) * width)
        yield table, schema, iter([found[site].double().reshape(len(chosen), -1, width)])


def _is_binary(column: Tensor) -> bool:
    return bool(((column == 0) | (column == 1)).all())


def _by_kind(x: Tensor, schema: Schema) -> dict[str, Tensor]:
    """Default statistics of numbers; shares of levels of categories, whose codes mean nothing."""
    numbers = [j for j, kind in enumerate(schema.kinds) if kind in ("real", "count")]
    result = {}
    if numbers:
        names = tuple(schema.columns[j] for j in numbers)
        result = _apply(default_statistics(), x[..., numbers], names)
    for j, (column, kind) in enumerate(zip(schema.columns, schema.kinds, strict=True)):
        if j in numbers:
            continue
        levels = schema.levels[j] or ("no", "yes")
        known = (~x[..., j].isnan()).sum(-1).clamp_min(1)
        for code, level in enumerate(levels[:20]):
            result[f"share {column} = {level}"] = (x[..., j] == code).sum(-1) / known
        if kind == "binary":
            del result[f"share {column} = no"]
    return result


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
        "5 %": lambda x: _quantile(x, 0.05),
        "median": lambda x: _quantile(x, 0.5),
        "95 %": lambda x: _quantile(x, 0.95),
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


def _quantile(x: Tensor, level: float) -> Tensor:
    """Quantile over rows, gaps left out; torch's own refuses more than 16 million entries."""
    ordered = x.sort(-2).values  # NaN last
    count = (~x.isnan()).sum(-2, keepdim=True)
    position = level * (count - 1).clamp_min(0).to(x.dtype)
    low = position.floor().long()
    high = torch.minimum(low + 1, (count - 1).clamp_min(0))
    below, above = ordered.gather(-2, low), ordered.gather(-2, high)
    return (below + (above - below) * (position - low)).squeeze(-2)


def _num_modes(x: Tensor) -> Tensor:
    """Prominent maxima of a kernel density on a grid, at Silverman's bandwidth."""
    from scipy.signal import find_peaks

    modes = x.new_zeros(x.shape[0], x.shape[-1])
    for j in range(x.shape[-1]):
        density = torch.nn.functional.pad(_kernel_density(x[..., j]), (1, 1)).cpu().numpy()
        for i, curve in enumerate(density):
            peaks, _ = find_peaks(curve, prominence=0.1 * curve.max())
            modes[i, j] = len(peaks)
    return modes


def _kernel_density(x: Tensor, size: int = 128) -> Tensor:
    """Binned kernel density of each data set ``(s, n)`` over its range: ``(s, size)``."""
    low = x.nan_to_num(nan=torch.inf).amin(-1, keepdim=True)
    width = (x.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True) - low).clamp_min(1e-300)
    cell = ((x - low) / width * (size - 1)).nan_to_num(0.0).round().long().clamp(0, size - 1)
    known = (~x.isnan()).to(x.dtype)
    counts = x.new_zeros(x.shape[0], size).scatter_add_(1, cell, known)
    column = x.unsqueeze(-1)
    spread = (_quantile(column, 0.75) - _quantile(column, 0.25)) / 1.349
    scale = torch.where(spread > 0, torch.minimum(spread, _sd(column)), _sd(column))
    bandwidth = 0.9 * scale * known.sum(-1, keepdim=True).clamp_min(1.0) ** -0.2
    steps = (bandwidth / width * (size - 1)).clamp_min(0.5).unsqueeze(-1)
    grid = torch.arange(size, dtype=x.dtype, device=x.device)
    kernel = (-0.5 * ((grid[:, None] - grid) / steps).square()).exp()
    return (counts.unsqueeze(1) @ kernel).squeeze(1)


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
