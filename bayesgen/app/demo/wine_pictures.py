"""Pictures of the wine data that need what a user does not have: the truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesgen.fit import Fit

__all__ = ["gap_figures", "gaps_drawn", "labels_beside_truth"]

_SHADES = ("#56B4E9", "#D55E00", "#303030")
_LEVELS = torch.tensor([0.05, 0.95], dtype=torch.float64)


def labels_beside_truth(fit: Fit, rows: Tensor, truth: Tensor) -> Figure:
    """Rows on two principal components, by label found and by true class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    plots.labels(fit, rows, ax=left)
    left.legend(frameon=False, fontsize=9, loc="best")
    left.set_title("clusters found", fontsize=10)
    z = (rows - rows.mean(0)) / rows.std(0, correction=0)
    u, s, _ = torch.linalg.svd(z, full_matrices=False)  # as plots.labels projects
    pair = (u[:, :2] * s[:2]).numpy()
    for kind, (shade, marker) in enumerate(zip(_SHADES, "o^s", strict=True)):
        mine = (truth == kind).numpy()
        label = f"cultivar {kind + 1} ({int(mine.sum())})"
        right.scatter(*pair[mine].T, s=22, color=shade, marker=marker, alpha=0.7, label=label)
    right.legend(frameon=False, fontsize=9, loc="best")
    right.set_title("cultivars, which the fit was not told", fontsize=10)
    right.set_xlabel(left.get_xlabel())
    right.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        right.spines[side].set_color(left.spines[side].get_edgecolor())
    right.tick_params(color="#9a9a9a", labelsize=9)
    return figure


def gap_figures(truth: Tensor, holes: Tensor, copies: Tensor) -> tuple[float, float, float]:
    """Error of the mean, error of column means, coverage of 90 % intervals; in column sds."""
    scale = truth.std(0)
    holed = truth.masked_fill(holes, torch.nan)
    error = ((copies.mean(0) - truth) / scale)[holes].square().mean().sqrt()
    naive = ((holed.nanmean(0) - truth) / scale)[holes].square().mean().sqrt()
    low, high = torch.quantile(copies[:, holes], _LEVELS, dim=0)
    inside = (low <= truth[holes]) & (truth[holes] <= high)
    return float(error), float(naive), float(inside.double().mean())


def gaps_drawn(truth: Tensor, holes: Tensor, copies: Tensor) -> Figure:
    """What was deleted against what was filled in, standardised by column."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 5.4), layout="constrained")
    ax = figure.subplots()
    z = ((truth - truth.mean(0)) / truth.std(0))[holes].numpy()
    filled = ((copies - truth.mean(0)) / truth.std(0))[:, holes]
    low, high = torch.quantile(filled, _LEVELS, dim=0).numpy()
    middle = filled.mean(0).numpy()
    inside = (low <= z) & (z <= high)
    for mine, shade, label in (
        (inside, "#0072B2", "interval holds the truth"),
        (~inside, "#D55E00", "interval misses it"),
    ):
        ax.vlines(z[mine], low[mine], high[mine], color=shade, alpha=0.3, lw=1)
        ax.plot(z[mine], middle[mine], ".", color=shade, ms=6, label=f"{label} ({mine.sum()})")
    ax.axline((0, 0), slope=1, color="#9a9a9a", lw=1)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(xlabel="deleted entry, standardised", ylabel="filled in, with 90 % interval")
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    return figure
