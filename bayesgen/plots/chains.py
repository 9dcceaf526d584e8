"""Pictures of Markov chains: density, trace and ranks side by side, energies, pairs of draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesgen.plots._style import GREY, INK, WARNING, color, new_axes, new_figure, span, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from bayesgen.fit import Fit

__all__ = ["chains", "draw_pairs", "energy"]

_CHAINS = 8  # drawn as lines; of more, evenly spaced ones
_POINTS = 2000


def chains(fit: Fit, names: Sequence[str] | None = None, *, max_rows: int = 8) -> Figure:
    """For each quantity: its density by chain, its trace, and the ranks of each chain.

    Good chains lie on top of each other, wander fast, and have ranks within the grey band, which
    holds 95 % of the lines of independent draws at any one place.

    References:
        Vehtari, Gelman, Simpson, Carpenter, Bürkner (2021), Rank-normalization, folding, and
        localization: an improved R-hat for assessing convergence of MCMC.

    Args:
        fit: A fit with several draws.
        names: Entries as the summary's table names them; by default the first ones of the table
            that are judged, and the two that mix worst.
        max_rows: Quantities at most.
    """
    shown = scalars(fit, names, max_rows)
    figure = new_figure(10.5, 1.75 * len(shown) + 0.3)
    grid: NDArray[Any] = figure.subplots(
        len(shown), 3, squeeze=False, gridspec_kw={"width_ratios": [1.0, 1.5, 1.0]}
    )
    for row, (name, values) in zip(grid, shown.items(), strict=True):
        for ax in row:
            tidy(ax)
        index = np.unique(np.linspace(0, len(values) - 1, min(_CHAINS, len(values))).astype(int))
        _densities(row[0], values[index])
        row[0].set_ylabel(name.replace("[", "\n["), fontsize=9, color=INK)
        for k, i in enumerate(index):
            row[1].plot(values[i], color=color(k), lw=0.6, alpha=0.7)
        row[1].margins(x=0.01)
        _ranks(row[2], values, index)
    for ax, title in zip(grid[0], ("density by chain", "trace", "ranks"), strict=True):
        ax.set_title(title, fontsize=10, color=INK)
    grid[-1][1].set_xlabel("draw")
    grid[-1][2].set_xlabel("rank among all draws")
    return figure


def scalars(fit: Fit, names: Sequence[str] | None, limit: int) -> dict[str, NDArray[np.float64]]:
    """Draws ``(chain, draw)`` by the names of the summary's table."""
    summary = fit.summary()
    if names is None:
        table = summary.judged[summary.judged["sd"] != 0.0]
        names = [str(name) for name in table.index[:limit]]
        worst = [table["r_hat"].astype(float), -table["ess_bulk"].astype(float)]
        extra = [str(s.idxmax()) for s in worst if s.notna().any()]
        extra = [name for name in dict.fromkeys(extra) if name not in names]
        names = [*names[: limit - len(extra)], *extra]
    found = {name: summary.draws_of(name) for name in names}
    if not found:
        raise ValueError("this fit has no quantity to draw.")
    return found


def _densities(ax: Axes, values: NDArray[np.float64]) -> None:
    """Histogram outlines on common bins: no bandwidth, no smoothing over bounds."""
    low, high = span(values, 0.02)
    bins = max(8, min(40, int(2 * values.shape[1] ** (1 / 3))))
    edges = np.linspace(low, high, bins + 1)
    for k, chain in enumerate(values):
        ax.stairs(np.histogram(chain, edges, density=True)[0], edges, color=color(k), lw=1.1)
    ax.set(yticks=[])
    ax.spines["left"].set_visible(False)


def _ranks(ax: Axes, values: NDArray[np.float64], index: NDArray[np.int64]) -> None:
    from scipy.stats import rankdata

    ranks = rankdata(values, method="average").reshape(values.shape) / values.size
    bins = 20 if values.shape[1] >= 200 else 10
    edges = np.linspace(0.0, 1.0, bins + 1)
    expected = values.shape[1] / bins
    half = 1.96 * math.sqrt(expected * (1 - 1 / bins))
    ax.axhspan(expected - half, expected + half, color="#e6e6e6", zorder=0)
    for k, i in enumerate(index):
        ax.stairs(np.histogram(ranks[i], edges)[0], edges, color=color(k), lw=1.1)
    ax.set(yticks=[], xlim=(0, 1), ylim=(0, None), xticks=[0, 0.5, 1])
    ax.spines["left"].set_visible(False)


def energy(fit: Fit, *, ax: Axes | None = None) -> Axes:
    """Energies of the draws, centred, beside their changes from draw to draw.

    Where changes are much narrower, momenta cannot carry the chain across its energies, and tails
    are explored slowly: E-BFMI, the ratio of the two variances, should exceed 0.3.

    References:
        Betancourt (2017), A conceptual introduction to Hamiltonian Monte Carlo.

    Args:
        fit: A fit with the sample statistic ``energy``.
        ax: Where to draw.
    """
    if "energy" not in fit.sample_stats:
        raise ValueError("this fit has no energies: they are NUTS' and ManyChains' own.")
    values = fit.sample_stats["energy"].double().cpu().numpy()
    centred = (values - values.mean()).ravel()
    changes = np.diff(values, axis=1).ravel()
    ax = new_axes(ax, 5.6, 3.2)
    edges = np.linspace(*span(np.concatenate([centred, changes]), 0.02), 50)
    for data, shade, label in ((centred, color(0), "energy"), (changes, color(1), "its changes")):
        ax.hist(data, edges.tolist(), density=True, color=shade, alpha=0.5, label=label)
    ax.set(xlabel="energy, centred (nats)", yticks=[])
    ax.spines["left"].set_visible(False)
    ax.legend(frameon=False, fontsize=9)
    return ax


def draw_pairs(fit: Fit, names: Sequence[str] | None = None, *, max_names: int = 5) -> Figure:
    """Draws of every pair of quantities, divergent ones in orange: where the sampler struggles.

    Args:
        fit: A fit with several draws.
        names: Entries as the summary's table names them.
        max_names: Quantities at most.
    """
    shown = scalars(fit, names, max_names)
    labels, flat = list(shown), np.stack([value.ravel() for value in shown.values()])
    bad = np.zeros(flat.shape[1], dtype=bool)
    if "diverging" in fit.sample_stats:
        bad = fit.sample_stats["diverging"].flatten().bool().cpu().numpy()
    keep = np.unique(np.linspace(0, flat.shape[1] - 1, min(_POINTS, flat.shape[1])).astype(int))
    size = len(labels)
    figure = new_figure(1.9 * size + 0.6, 1.9 * size + 0.3)
    grid: NDArray[Any] = figure.subplots(size, size, squeeze=False, sharex="col")
    for i in range(size):
        for j in range(size):
            ax = grid[i, j]
            if j > i:
                ax.set_axis_off()
                continue
            tidy(ax)
            if i == j:
                ax.hist(flat[i], bins=40, color=color(0), alpha=0.6)
                ax.set(yticks=[])
                ax.spines["left"].set_visible(False)
            else:
                few = 0.35 if len(keep) < 800 else 0.15
                ax.plot(flat[j][keep], flat[i][keep], ".", ms=2.5, color=color(0), alpha=few)
                ax.plot(flat[j][bad], flat[i][bad], "D", ms=4, color=WARNING)
            ax.tick_params(labelsize=7, color=GREY)
            if i == size - 1:
                ax.set_xlabel(labels[j], fontsize=9, color=INK)
            if j == 0 and i > 0:
                ax.set_ylabel(labels[i], fontsize=9, color=INK)
    return figure
