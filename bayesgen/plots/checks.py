"""Pictures of trust: traces, clusters, outliers, calibration, priors, agreement of engines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayesgen.plots._style import (
    GREY,
    INK,
    PALETTE,
    WARNING,
    color,
    new_axes,
    new_figure,
    rows_of,
    thinned,
    tidy,
    whole_ticks,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from bayesgen.calibration import Ranks
    from bayesgen.fit import Fit
    from bayesgen.outliers import Outliers
    from bayesgen.prior_design import PriorExploration
    from bayesgen.replication import PredictiveCheck

__all__ = [
    "agreement",
    "occupied",
    "p_values",
    "predictive_check",
    "prior_exploration",
    "ranks",
    "reasons",
    "trace",
]

_SDS_IN_90 = 3.29  # of a normal's central 90 % interval


def trace(fit: Fit, *, name: str | None = None, ax: Axes | None = None) -> Axes:
    """How a run went: its objective over steps, or the log density of each chain over draws.

    Args:
        fit: A fit with ``history`` or the sample statistic ``lp``.
        name: Which entry of ``history`` or ``sample_stats``; by default ``lp``, then ``elbo``,
            then the first.
        ax: Where to draw.
    """
    ax = new_axes(ax)
    known = [*fit.sample_stats, *fit.history]
    preferred = [n for n in ("lp", "elbo") if n in known] or known
    chosen = name if name is not None else next(iter(preferred), "")
    if chosen in fit.sample_stats:
        chains = fit.sample_stats[chosen].detach().cpu().double().numpy()
        for index, chain in enumerate(chains):
            alpha = max(0.25, 0.9 / math.sqrt(len(chains)))
            ax.plot(chain, color=color(index), lw=0.7, alpha=alpha)
        ax.set(xlabel="draw", ylabel="log density (nats)" if chosen == "lp" else chosen)
        return ax
    if chosen not in fit.history:
        raise ValueError(
            f"there is no record {chosen!r}; the fit has {', '.join(known) or 'none'}."
        )
    values = np.asarray(fit.history[chosen], dtype=np.float64)
    steps = np.arange(1, len(values) + 1)
    ax.plot(steps, values, color=PALETTE[0], lw=1.6, marker="." if len(values) < 40 else "")
    late = values[len(values) // 10 :]
    if len(values) > 10 and np.ptp(values) > 5 * np.ptp(late) > 0:
        # The first leap would flatten all that follows.
        ax.set_ylim(late.min() - 0.05 * np.ptp(late), late.max() + 0.08 * np.ptp(late))
    ax.ticklabel_format(axis="y", useOffset=False)
    unit = {"elbo": "ELBO (nats)", "log_likelihood": "log likelihood (nats)"}
    ax.set(xlabel="step", ylabel=unit.get(chosen, chosen))
    return ax


def occupied(fit: Fit, *, prior: PriorExploration | None = None, ax: Axes | None = None) -> Axes:
    """Posterior distribution of the number of occupied components, beside its prior.

    Taken from the sample statistic ``num_occupied`` where the engine kept it, otherwise by drawing
    the labels of the training rows under up to 200 posterior draws.

    Args:
        fit: A fit of a mixture.
        prior: From :func:`bayesgen.priors.explore`, with the same number of rows and components.
        ax: Where to draw.
    """
    ax = new_axes(ax)
    counts = _num_occupied(fit)
    most = int(counts.max()) if prior is None else max(int(counts.max()), prior.num_components)
    posterior = np.bincount(counts, minlength=most + 1)[: most + 1] / len(counts)
    at = np.arange(most + 1)
    shift = 0.0 if prior is None else 0.2
    width = 0.7 if prior is None else 0.38
    if prior is not None:
        pmf = np.zeros(most + 1)
        pmf[: len(prior.pmf)] = prior.pmf.numpy()
        ax.bar(at - shift, pmf, width, color=PALETTE[1], label="prior")
    ax.bar(at + shift, posterior, width, color=PALETTE[0], label="posterior")
    ax.set(xlabel="occupied clusters", ylabel="probability", xlim=(0.3, most + 0.7))
    whole_ticks(ax)
    ax.legend(frameon=False, fontsize=9)
    return ax


def _num_occupied(fit: Fit) -> NDArray[np.int64]:
    from bayesgen import rng
    from bayesgen.capabilities import Encoder, require

    if "num_occupied" in fit.sample_stats:
        return fit.sample_stats["num_occupied"].flatten().long().cpu().numpy()
    model = require(fit.model, Encoder, "occupied")
    rows, generator = rows_of(fit, limit=100_000), rng.make_generator(0)
    counts = []
    small = thinned(fit)
    flat = {name: value.flatten(0, 1) for name, value in small.draws.items()}
    for s in range(small.num_chains * small.num_draws):
        law = model.encode(rows, {name: value[s] for name, value in flat.items()})
        if not isinstance(law, torch.distributions.Categorical):
            raise TypeError(
                f"occupied needs a model that labels rows, but {type(fit.model).__name__} encodes "
                f"them as {type(law).__name__}."
            )
        label = rng.categorical(law.logits.detach(), generator, dim=-1)
        counts.append(len(label.unique()))
    return np.asarray(counts, dtype=np.int64)


def p_values(verdict: Outliers, *, ax: Axes | None = None) -> Axes:
    """Sorted p-values against the line of Benjamini and Hochberg, on logarithmic scales.

    All rows up to the last point below the line are outliers. A grey line shows the smallest
    p-value that the calibration rows allow.
    """
    ax = new_axes(ax)
    p, order = verdict.p_values.cpu().sort()
    called = verdict.is_outlier.cpu()[order].numpy()
    m = len(p)
    rank = np.arange(1, m + 1)
    ax.plot(rank, verdict.fdr * rank / m, color=INK, lw=1.2, label=f"FDR {verdict.fdr:.0%} line")
    ax.plot(rank, rank / m, color=GREY, lw=1, ls=":", label="no outliers: uniform")
    floor = 1.0 / (int(verdict.num_calibration.max()) + 1)
    ax.axhline(floor, color=GREY, lw=0.8, ls="--", label=f"smallest possible, {floor:.2g}")
    ax.plot(rank[~called], p[~called], "o", ms=4, color=PALETTE[0], label="belongs")
    ax.plot(
        rank[called], p[called], "D", ms=5, color=WARNING, label=f"outlier ({int(called.sum())})"
    )
    ax.set(xscale="log", yscale="log", xlabel="rank of the row", ylabel="conformal p-value")
    ax.legend(frameon=False, fontsize=9)
    return ax


def reasons(
    surprise: torch.Tensor, columns: tuple[str, ...], *, row: int = 0, ax: Axes | None = None
) -> Axes:
    """Why one row is strange: the surprise at each of its entries given the others.

    Args:
        surprise: ``(n, d)`` from :func:`bayesgen.outliers.explain`.
        columns: Names of the columns.
        row: Which row.
        ax: Where to draw.
    """
    values = surprise[row].cpu().numpy()
    order = np.argsort(np.nan_to_num(values, nan=-np.inf))
    ax = new_axes(ax, 5.5, 0.9 + 0.28 * len(order))
    shades = [WARNING if values[j] > 3.0 else PALETTE[0] for j in order]
    ax.barh([columns[j] for j in order], np.nan_to_num(values[order]), color=shades)
    ax.axvline(0.0, color=INK, lw=0.8)
    ax.set(xlabel="surprise beyond the usual (nats)", title=f"row {row}")
    return ax


def predictive_check(check: PredictiveCheck, *, max_panels: int = 24) -> Figure:
    """Each statistic of the data (line) among those of replicated data sets (bars)."""
    p = check.p_values
    names = sorted(check.observed, key=lambda n: (math.isnan(p[n]), p[n]))
    shown = [n for n in check.observed if n in names[:max_panels]]
    across = min(4, len(shown))
    down = math.ceil(len(shown) / across)
    figure = new_figure(2.5 * across, 1.9 * down + 0.2)
    grid: NDArray[Any] = figure.subplots(down, across, squeeze=False)
    for ax in grid.flat[len(shown) :]:
        ax.set_axis_off()
    for name, ax in zip(shown, grid.flat, strict=False):
        tidy(ax).set(yticks=[])
        ax.spines["left"].set_visible(False)
        values = check.replicated[name].numpy()
        values = values[np.isfinite(values)]
        caught = p[name] < 0.05
        if len(values):
            bins, rwidth = _bins(values, check.observed[name])
            ax.hist(values, bins=bins, rwidth=rwidth, color=PALETTE[4], alpha=0.75)
        ax.axvline(check.observed[name], color=WARNING if caught else INK, lw=2)
        title = f"{name}\np = {p[name]:.2g}"  # two lines: names may be long
        ax.set_title(title, fontsize=9, color=WARNING if caught else INK)
    return figure


def _bins(values: NDArray[np.float64], observed: float) -> tuple[NDArray[np.float64], float]:
    """Edges over the bulk and the observed value, and the relative width of bars."""
    distinct = np.unique(np.append(values, observed))
    if len(distinct) <= 12 and np.all(distinct == distinct.round()):
        return np.arange(distinct[0] - 1.5, distinct[-1] + 2.0), 0.8
    low, high = np.quantile(values, [0.01, 0.99])  # a few wild replications would hide the rest
    low, high = min(low, observed), max(high, observed)
    margin = 0.05 * (high - low) or 0.5
    return np.linspace(low - margin, high + margin, 28), 1.0


def ranks(result: Ranks, *, ax: Axes | None = None, level: float = 0.95) -> Axes:
    """Difference of the ranks' distribution from uniform, with the simultaneous envelope.

    A line that leaves the grey band is a posterior that is wrong: S-shaped when too narrow or
    wide, to one side when shifted.

    References:
        Säilynoja, Bürkner, Vehtari (2022), Graphical test for discrete uniformity and its
        applications in goodness-of-fit evaluation and multiple sample comparison.
    """
    from scipy.stats import binom

    from bayesgen.calibration import envelope_level

    ax = new_axes(ax)
    size = len(next(iter(result.ranks.values())))
    points = np.unique(np.linspace(1, result.num_draws, 60).round().astype(int))
    chance = points / (result.num_draws + 1)
    tail = envelope_level(size, result.num_draws, level=level) / 2.0
    low, high = binom.ppf(tail, size, chance), binom.isf(tail, size, chance)
    ax.fill_between(
        chance,
        low / size - chance,
        high / size - chance,
        color="#e3e3e3",
        label=f"{level:.0%} band",
    )
    order = sorted(result.p_values, key=lambda name: result.p_values[name])
    for index, name in enumerate(order[:7]):
        values = result.ranks[name].numpy()
        ecdf = (values[:, None] < points).mean(0)
        label = f"{name} (p = {result.p_values[name]:.2g})"
        ax.plot(chance, ecdf - chance, color=color(index), lw=1.4, label=label)
    ax.axhline(0.0, color=GREY, lw=0.8)
    ax.set(xlabel="rank of the truth / draws", ylabel="ECDF - uniform")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def prior_exploration(exploration: PriorExploration) -> Figure:
    """What a prior says: the number of clusters, and the shapes of components as intervals."""
    shapes = exploration.covariance
    figure = new_figure(5.2 if shapes is None else 10.2, 3.6)
    panels: NDArray[Any] = figure.subplots(1, 1 if shapes is None else 2, squeeze=False)
    ax = tidy(panels[0, 0])
    pmf = exploration.pmf.numpy()
    errors = exploration.standard_error
    whiskers = None if errors is None else 2.0 * errors[1:].numpy()
    ax.bar(np.arange(1, len(pmf)), pmf[1:], 0.75, yerr=whiskers, color=PALETTE[0], ecolor=INK)
    mean = exploration.expected_clusters
    ax.axvline(mean, color=WARNING, lw=1.5, ls="--", label=f"expected: {mean:.2f}")
    where = f"occupied clusters among {exploration.num_rows} rows"
    ax.set(xlabel=where, ylabel="prior probability")
    whole_ticks(ax)
    ax.set_title(exploration.weights, fontsize=9, color=INK)
    ax.legend(frameon=False, fontsize=9)
    if shapes is None:
        return figure
    ax = tidy(panels[0, 1])
    rows = [(label, v) for label, v in shapes.rows() if not label.startswith("correlation")]
    for index, (_, (low, median, high)) in enumerate(rows):
        ax.plot([low, high], [index, index], color=PALETTE[0], lw=3, solid_capstyle="round")
        ax.plot(median, index, "o", color="white", mec=PALETTE[0], mew=2, ms=8)
    ax.set(xscale="log", xlabel="5 %, 50 %, 95 % under the prior", ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(range(len(rows)), [label.strip() for label, _ in rows])
    ax.set_title("shape of one component", fontsize=9, color=INK)
    return figure


def _unit(line: Any) -> float:
    """A standard deviation, deaf to heavy tails; of a count that hardly moves its own."""
    return float(line["high"] - line["low"]) / _SDS_IN_90 or float(line["sd"])


def agreement(table: pd.DataFrame, *, max_quantities: int = 20, ax: Axes | None = None) -> Axes:
    """Engines beside each other: mean and 90 % interval of each quantity.

    An orange ring marks what differs from the reference by more than Monte Carlo error allows.

    Args:
        table: From :func:`bayesgen.diagnostics.agreement`: indexed by quantity and fit, with
            columns ``mean``, ``sd``, ``low`` and ``high``; the first fit is the reference.
        max_quantities: Quantities shown at most.
        ax: Where to draw.
    """
    quantities = list(dict.fromkeys(table.index.get_level_values(0)))
    fits = list(dict.fromkeys(table.index.get_level_values(1)))
    first = table.xs(fits[0], level=1)
    usable = [q for q in quantities if q in first.index and _unit(first.loc[q]) > 0]
    usable = usable[:max_quantities]
    ax = new_axes(ax, 6.5, 1.3 + 0.34 * len(usable))
    for index, name in enumerate(fits):
        offset = 0.5 * (index - (len(fits) - 1) / 2) / max(1, len(fits))
        for row, quantity in enumerate(usable):
            if (quantity, name) not in table.index:
                continue
            base, here = table.loc[(quantity, fits[0])], table.loc[(quantity, name)]
            unit = _unit(base)
            at, low, high = (
                float(here[end] - base["mean"]) / unit for end in ("mean", "low", "high")
            )
            y = row + offset
            if math.isfinite(high - low):
                ax.plot([low, high], [y, y], color=color(index), lw=2)
            ax.plot(at, y, "o", color=color(index), ms=6, label=name if row == 0 else None)
            if here.get("finding"):
                ax.plot(at, y, "o", mfc="none", mec=WARNING, mew=1.8, ms=12)
    ax.axvline(0.0, color=GREY, lw=0.8, zorder=0)
    ax.set_yticks(range(len(usable)), usable)
    ax.set(ylim=(len(usable) - 0.4, -0.6))
    ax.set(
        xlabel=f"difference from {fits[0]}, in standard deviations (90 % interval / {_SDS_IN_90})"
    )
    ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax
