"""Pictures of a fitted density: contours, components and their uncertainty, labels, outliers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayesgen.plots._style import (
    GREY,
    INK,
    PALETTE,
    WARNING,
    color,
    columns_of,
    new_axes,
    new_figure,
    rows_of,
    span,
    thinned,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from bayesgen.fit import Fit
    from bayesgen.outliers import Outliers

__all__ = ["components", "density", "labels", "pairs", "responsibilities"]

_GRID = 90
_MASSES = (0.95, 0.8, 0.5)
_RADIUS = 1.1774  # of the ellipse that holds half of a 2-d normal
_MARKERS = "osD^vPX"


def density(
    fit: Fit,
    *,
    columns: Sequence[str | int] | None = None,
    x: object = None,
    show_components: bool = True,
    num_curves: int = 40,
    ax: Axes | None = None,
) -> Axes:
    """The posterior predictive density with the data, in one column or two.

    In one column: histogram, predictive density, and the density under single draws as a bundle of
    thin lines. In two: the regions that hold 50, 80 and 95 % of the predictive mass, the data, and
    the components as ellipses, one for each of many draws, so that their spread is their
    uncertainty. Other columns are integrated out.

    Args:
        fit: A fit whose model has a density.
        columns: One or two names or positions; the first two by default.
        x: Rows to show; the training data by default.
        show_components: Whether to draw the component ellipses (two columns).
        num_curves: Draws shown as lines or ellipses.
        ax: Where to draw; fresh axes when None.

    Returns:
        The axes.
    """
    positions, _ = columns_of(fit, columns, 2)
    rows = rows_of(fit, x)[:, positions].numpy()
    ax = new_axes(ax)
    small = thinned(fit)
    if len(positions) == 1:
        return _density_1d(small, positions[0], rows[:, 0], num_curves, ax)
    _contours(small, positions, rows, ax)
    points = _jittered(fit, positions, rows)
    ax.plot(*points.T, ".", color=INK, markersize=4, alpha=_alpha(len(rows)))
    if show_components:
        components(fit, columns=positions, num_draws=num_curves, ax=ax)
    _name_axes(fit, positions, ax)
    return ax


def _alpha(num_points: int) -> float:
    return float(np.clip(150.0 / max(num_points, 1), 0.15, 0.65))


def _density_1d(
    fit: Fit,
    position: int,
    rows: NDArray[np.float64],
    num_curves: int,
    ax: Axes,
    *,
    legend: bool = True,
) -> Axes:
    known = rows[np.isfinite(rows)]
    discrete = fit.schema.kinds[position] != "real"
    if discrete:
        at = _grid(fit, position, rows)
        share = [(known == value).mean() for value in at]
        ax.bar(at, share, width=0.8, color=GREY, alpha=0.5, label="data")
    else:
        at = np.linspace(*span(known), 300)
        bins = min(60, max(10, round(2.0 * len(known) ** (1 / 2))))
        ax.hist(known, bins=bins, density=True, color=GREY, alpha=0.4, label="data")
    full = torch.full((len(at), len(fit.columns)), torch.nan, dtype=torch.float64)
    full[:, position] = torch.from_numpy(at)
    single = fit.log_likelihood(full).flatten(0, 1).exp().cpu().numpy()
    style = "o" if discrete else "-"
    for curve in single[:: max(1, len(single) // num_curves)]:
        ax.plot(at, curve, style, color=PALETTE[4], lw=0.7, alpha=0.25, markersize=2)
    mean = fit.log_prob(full).exp().cpu().numpy()
    ax.plot(at, mean, style, color=PALETTE[0], lw=2, markersize=5, label="posterior predictive")
    ax.plot([], [], color=PALETTE[4], lw=1, label="single draws")
    if not discrete and len(known) <= 500:
        ax.plot(known, np.full(len(known), -0.01 * mean.max()), "|", color=INK, alpha=0.5)
    _name_axes(fit, [position], ax)
    ax.set(ylabel="probability" if discrete else "density")
    if legend:
        ax.legend(frameon=False, fontsize=9)
    return ax


def _contours(fit: Fit, positions: list[int], rows: NDArray[np.float64], ax: Axes) -> None:
    """Predictive mass over the rows: regions of highest density, or cells of whole values."""
    x, y = (_grid(fit, position, rows[:, j]) for j, position in enumerate(positions))
    grid = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    full = torch.full((len(grid), len(fit.columns)), torch.nan, dtype=torch.float64)
    full[:, positions] = torch.from_numpy(grid)
    log_density = fit.log_prob(full).cpu().numpy().reshape(len(y), len(x))
    values = np.exp(log_density - log_density.max())
    if any(fit.schema.kinds[position] != "real" for position in positions):
        ax.pcolormesh(x, y, values, shading="nearest", cmap="Blues", vmin=0.0, vmax=1.6)
        return
    ordered = np.sort(values.ravel())[::-1]
    mass = ordered.cumsum() / ordered.sum()
    levels = [float(ordered[min(np.searchsorted(mass, m), mass.size - 1)]) for m in _MASSES]
    if not levels[0] < levels[1] < levels[2] < 1.0:
        return  # the grid is too coarse for a density this sharp
    shades = ["#eaf3f9", "#c3dff0", "#93c5e3"]
    ax.contourf(x, y, values, levels=[*levels, 1.0], colors=shades)
    ax.contour(x, y, values, levels=levels, colors=[PALETTE[0]], linewidths=0.6, alpha=0.6)


def _grid(fit: Fit, position: int, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where a density is evaluated along a column: whole numbers unless it is real."""
    if fit.schema.kinds[position] == "real":
        return np.linspace(*span(values, 0.18), _GRID)
    levels = fit.schema.levels[position]
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    if levels is not None:
        low, high = 0.0, len(levels) - 1.0
    return np.unique(np.linspace(low, high, min(200, int(high - low) + 1)).round())


def _jittered(fit: Fit, positions: list[int], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows with whole values spread a little, so that equal ones do not hide each other."""
    noise = np.random.default_rng(0).uniform(-0.22, 0.22, rows.shape)
    discrete = np.array([fit.schema.kinds[position] != "real" for position in positions])
    return np.where(discrete, rows + noise, rows)


def _name_axes(fit: Fit, positions: list[int], ax: Axes) -> None:
    """Names of the columns, and of the levels of categories."""
    for axis, position in zip((ax.xaxis, ax.yaxis), positions, strict=False):
        axis.set_label_text(fit.columns[position])
        levels = fit.schema.levels[position]
        if fit.schema.kinds[position] == "binary":
            levels = ("no", "yes")
        if levels is not None and len(levels) <= 20:
            axis.set_ticks(range(len(levels)), [str(level) for level in levels])


def components(
    fit: Fit,
    *,
    columns: Sequence[str | int] | None = None,
    num_draws: int = 40,
    smallest: float = 0.01,
    ax: Axes | None = None,
) -> Axes:
    """Each Gaussian component as one ellipse a posterior draw, holding half of its mass.

    A tight bundle is a component that the data know well. Components are those of ``fit.aligned``;
    those with a mean weight below ``smallest`` are left out.

    Args:
        fit: A fit with sites ``weights``, ``loc`` and ``scale_tril`` or ``variance``; others draw
            nothing.
        columns: Two names or positions.
        num_draws: Ellipses of each component.
        smallest: Mean weight from which a component is drawn.
        ax: Where to draw.
    """
    positions, names = columns_of(fit, columns, 2)
    ax = new_axes(ax)
    moments = _moments(fit.aligned.draws, num_draws)
    if moments is None or len(positions) != 2:
        return ax
    weights, loc, covariance = moments
    loc = loc[..., positions]
    covariance = covariance[..., positions, :][..., positions]
    angle = torch.linspace(0.0, 2.0 * torch.pi, 61, dtype=loc.dtype)
    circle = _RADIUS * torch.stack([angle.cos(), angle.sin()])
    factor = torch.linalg.cholesky(covariance)
    outlines = (loc.unsqueeze(-1) + factor @ circle).numpy()  # (s, K, 2, 61)
    for k in (weights.mean(0) >= smallest).nonzero()[:, 0].tolist():
        for outline, weight in zip(outlines[:, k], weights[:, k].tolist(), strict=True):
            if weight < smallest:
                continue  # empty in this draw: its place is the prior's, not the data's
            ax.plot(
                *outline, color=color(k), lw=0.8, alpha=min(1.0, max(0.06, 4.0 / len(outlines)))
            )
        center = ((weights[:, k, None] * loc[:, k]).sum(0) / weights[:, k].sum()).tolist()
        ax.plot(*center, _MARKERS[k // len(PALETTE) % len(_MARKERS)], color="white", ms=9)
        ax.plot(*center, _MARKERS[k // len(PALETTE) % len(_MARKERS)], color=color(k), ms=6)
    ax.set(xlabel=names[0], ylabel=names[1])
    return ax


def _moments(draws: dict[str, Tensor], limit: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Weights ``(s, K)``, means ``(s, K, d)`` and covariances ``(s, K, d, d)`` of a few draws."""
    if not {"weights", "loc"} <= set(draws):
        return None
    total = draws["weights"].shape[0] * draws["weights"].shape[1]
    keep = torch.linspace(0, total - 1, min(limit, total)).round().long()
    few = {name: value.cpu().double().flatten(0, 1)[keep] for name, value in draws.items()}
    weights, loc = few["weights"], few["loc"]
    if loc.ndim != 3:
        return None
    if "scale_tril" in few:
        factor = few["scale_tril"]
        factor = factor.unsqueeze(1) if factor.ndim == 3 else factor
        covariance = factor @ factor.mT
    elif "variance" in few:
        variance = few["variance"]
        variance = variance.unsqueeze(-1) if variance.ndim == 2 else variance
        covariance = torch.diag_embed(variance.expand_as(loc))
    else:
        covariance = torch.eye(loc.shape[-1], dtype=loc.dtype)
    return weights, loc, covariance.expand(*loc.shape, loc.shape[-1])


def pairs(
    fit: Fit,
    *,
    columns: Sequence[str | int] | None = None,
    x: object = None,
    outliers: Outliers | None = None,
    max_columns: int = 5,
) -> Figure:
    """Every pair of columns: data by label below the diagonal, marginal densities on it.

    Args:
        fit: A fit whose model has a density and labels.
        columns: Names or positions; the first ``max_columns`` by default.
        x: Rows to show; the training data by default.
        outliers: A verdict on these rows: outliers are ringed.
        max_columns: Columns shown at most.
    """
    positions, names = columns_of(fit, columns, None)
    positions, names = positions[:max_columns], names[:max_columns]
    rows = rows_of(fit, x)
    d = len(positions)
    figure = new_figure(2.3 * d + 0.4, 2.3 * d + 0.4)
    grid: NDArray[Any] = figure.subplots(d, d, squeeze=False, sharex="col")
    label = thinned(fit).predict(rows).cpu().numpy()
    small = thinned(fit)
    for i in range(d):
        for j in range(d):
            ax = tidy(grid[i, j])
            pair = rows[:, [positions[j], positions[i]]].numpy()
            if j > i:
                ax.set_axis_off()
            elif i == j:
                _density_1d(small, positions[i], pair[:, 0], 15, ax, legend=False)
                ax.set(xlabel="", ylabel="", yticks=[])
                ax.spines["left"].set_visible(False)
            else:
                both = [positions[j], positions[i]]
                _contours(small, both, pair, ax)
                pair = _jittered(fit, both, pair)
                _name_axes(fit, both, ax)
                ax.set(xlabel="", ylabel="")
                _scatter(pair, label, np.full(len(label), 0.7), ax, size=9)
                _ring(pair, outliers, ax)
            if i == d - 1:
                ax.set_xlabel(names[j])
            if j == 0 and i > 0:
                ax.set_ylabel(names[i])
    if d > 1:
        handles, texts = grid[1, 0].get_legend_handles_labels()
        figure.legend(handles, texts, frameon=False, fontsize=9, loc="upper right")
    figure.align_labels()
    return figure


def labels(
    fit: Fit,
    x: object = None,
    *,
    columns: Sequence[str | int] | None = None,
    outliers: Outliers | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Rows coloured by their most probable component, faint where that is uncertain.

    With more than two columns and no ``columns`` named, rows are projected on their two principal
    components (of standardised columns, gaps filled by their mean).

    Args:
        fit: A fit whose model labels rows.
        x: Rows to show; the training data by default.
        columns: Two names or positions.
        outliers: A verdict on these rows: outliers are ringed.
        ax: Where to draw.
    """
    rows = rows_of(fit, x)
    ax = new_axes(ax, 7.2)
    belief = thinned(fit).encode(rows).cpu()
    sure, label = (value.numpy() for value in belief.max(-1))
    if columns is None and rows.shape[1] > 2:
        pair, names = _principal(rows)
    else:
        positions, names = columns_of(fit, columns, 2)
        pair = _jittered(fit, positions, rows[:, positions].numpy())
        _name_axes(fit, positions, ax)
        if len(positions) == 1:
            pair = np.stack([pair[:, 0], sure], -1)
            names = [names[0], "probability of the label"]
    _scatter(pair, label, sure**2, ax, size=22)
    _ring(pair, outliers, ax)
    ax.set(xlabel=names[0], ylabel=names[1])
    if len(ax.get_legend_handles_labels()[0]) > 1:
        # Outside: scattered rows leave no corner free.
        corner = (1.0, 1.0)
        ax.legend(loc="upper left", bbox_to_anchor=corner, frameon=False, fontsize=9)
    return ax


def _principal(rows: Tensor) -> tuple[NDArray[np.float64], list[str]]:
    centred = (rows - rows.nanmean(0)).nan_to_num(0.0)
    scaled = centred / centred.square().mean(0).sqrt().clamp_min(1e-12)
    u, s, _ = torch.linalg.svd(scaled, full_matrices=False)
    share = (s.square() / s.square().sum())[:2].tolist()
    names = [f"principal component {k + 1} ({share[k]:.0%} of variance)" for k in range(2)]
    return (u[:, :2] * s[:2]).numpy(), names


def _scatter(
    pair: NDArray[np.float64],
    label: NDArray[np.int64],
    alpha: NDArray[np.float64],
    ax: Axes,
    *,
    size: float,
) -> None:
    for k in np.unique(label).tolist():
        mine = label == k
        ax.scatter(
            pair[mine, 0],
            pair[mine, 1],
            s=size,
            c=color(k),
            alpha=np.clip(alpha[mine], 0.12, 0.85),
            marker=_MARKERS[k // len(PALETTE) % len(_MARKERS)],
            linewidths=0,
            label=f"component {k} ({int(mine.sum())})",
        )


def _ring(pair: NDArray[np.float64], outliers: Outliers | None, ax: Axes) -> None:
    if outliers is None:
        return
    called = outliers.is_outlier.cpu().numpy()
    if len(called) != len(pair):
        raise ValueError(
            f"the verdict is on {len(called)} rows, but {len(pair)} are drawn: pass the rows that "
            "were judged as x."
        )
    ax.scatter(
        pair[called, 0],
        pair[called, 1],
        s=90,
        facecolors="none",
        edgecolors=WARNING,
        linewidths=1.6,
        label=f"outliers ({int(called.sum())}, FDR {outliers.fdr:.0%})",
    )


def responsibilities(fit: Fit, x: object = None, *, ax: Axes | None = None) -> Axes:
    """Probabilities of labels as a map, rows sorted by label and certainty.

    Clean blocks are clusters; smears between two columns are rows that could belong to either.
    """
    belief = thinned(fit).encode(rows_of(fit, x)).cpu()
    sure, label = belief.max(-1)
    order = torch.argsort(label.double() - 0.5 * sure)
    used = (belief.max(0).values > 0.01).nonzero()[:, 0]
    ax = new_axes(ax, 5.0, 4.6)
    image = ax.imshow(
        belief[order][:, used].numpy(),
        aspect="auto",
        cmap="Blues",
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    ax.set(xlabel="component", ylabel="row, sorted by label", xticks=range(len(used)))
    ax.set_xticklabels([str(k) for k in used.tolist()])
    ax.figure.colorbar(image, ax=ax, label="probability", shrink=0.8)
    return ax
