"""Pictures of a latent space: loadings, scree, biplot and map, each with its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayesgen import verbs
from bayesgen.capabilities import Encoder, require
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
    tidy,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from bayesgen.fit import Fit

__all__ = ["biplot", "latent_map", "loadings", "scree"]

_RADIUS = 1.1774  # of the ellipse that holds half of a 2-d normal
_MAX_DRAWS = 200
_MAX_ELLIPSES = 300
_MAX_ARROWS = 30
_ROWS = 256
_REST = 6  # groups with a colour of their own; the others share grey


def loadings(
    fit: Fit,
    *,
    directions: Sequence[int] | None = None,
    columns: Sequence[str | int] | None = None,
    mass: float = 0.9,
) -> Figure:
    """Loadings of every column on each direction, with central posterior intervals.

    Draws are aligned first. The title of a direction that is ambiguous, or lives in some draws
    only, is in orange: its intervals are no statement about one direction.

    Args:
        fit: A fit with a site ``loadings`` of event shape ``(d, q)``.
        directions: Which ones; by default the first six that are not switched off.
        columns: Names or positions; all by default.
        mass: Posterior probability of the intervals.

    Returns:
        A figure with a panel a direction.
    """
    draws, shown = _aligned_loadings(fit), _directions(fit, directions, 6)
    positions, names = columns_of(fit, columns, None)
    low, middle, high = _interval(draws[:, positions], mass)
    height = float(np.clip(0.9 + 0.24 * len(positions), 2.2, 14.0))
    figure = new_figure(1.2 + 2.1 * len(shown), height)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    at = np.arange(len(positions))[::-1]
    for ax, k in zip(panels, shown, strict=True):
        tidy(ax)
        ax.axvline(0.0, color=GREY, lw=0.8, zorder=0)
        certain = (low[:, k] > 0) | (high[:, k] < 0)
        for sure, tint in ((True, color(0)), (False, GREY)):
            mine = certain == sure
            ax.hlines(at[mine], low[mine, k], high[mine, k], color=tint, lw=2.0, alpha=0.7)
            ax.plot(middle[mine, k], at[mine], "o", color=tint, markersize=4)
        _title(fit, k, ax)
        ax.set(yticks=at, yticklabels=names, xlabel="loading", ylim=(-0.7, len(positions) - 0.3))
        ax.margins(x=0.08)
    return figure


def scree(fit: Fit, *, mass: float = 0.9, ax: Axes | None = None) -> Axes:
    """Variance of the signal along each principal direction, with posterior intervals.

    The dashed line is the noise's variance in an average column, with its interval as a band:
    directions well below it are hard to tell from noise. The axis is logarithmic where variances
    spread over more than two decades.

    Args:
        fit: A fit whose model has the capability ``Explained``.
        mass: Posterior probability of the intervals.
        ax: Where to draw.
    """
    explained = fit.explained_variance()
    low, middle, high = _interval(explained.variance.flatten(0, 1), mass)
    share = explained.ratio.double().mean((0, 1)).cpu().numpy()
    per_column = (explained.noise.flatten() / len(fit.columns))[:, None]
    noise_low, noise, noise_high = (float(v[0]) for v in _interval(per_column, mass))
    ax = new_axes(ax)
    at = np.arange(len(middle))
    alive = np.array([k not in fit.aligned.empty for k in at])
    for mine, tint in ((alive, color(0)), (~alive, GREY)):
        ax.vlines(at[mine], low[mine], high[mine], color=tint, lw=3.0, alpha=0.55)
        ax.plot(at[mine], middle[mine], "o", color=tint, markersize=6)
    for k in at[alive]:
        text, place = f"{share[k]:.0%}", (k, middle[k])
        ax.annotate(text, place, (7, 3), textcoords="offset points", color=INK, fontsize=8)
    ax.axhline(noise, color=PALETTE[1], lw=1.4, ls="--", label="noise of a column")
    ax.axhspan(noise_low, noise_high, color=PALETTE[1], alpha=0.2, lw=0)
    positive = middle[middle > 0]
    if positive.size and middle.max() > 100.0 * min(positive.min(), noise):
        ax.set_yscale("log")
        ax.set_ylim(bottom=max(0.3 * positive.min(), 1e-6 * middle.max()))
    else:
        ax.set_ylim(0.0, 1.1 * max(float(high.max()), noise_high))
    ax.set(xlabel="direction", ylabel="variance of the signal")
    ax.set_xlim(-0.5, len(middle) - 0.3)
    whole_ticks(ax)
    ax.legend(frameon=False, fontsize=9)
    return ax


def latent_map(
    fit: Fit,
    x: object = None,
    *,
    labels: Sequence[object] | None = None,
    directions: tuple[int, int] = (0, 1),
    ax: Axes | None = None,
) -> Axes:
    """Rows in two directions of the latent space, each with its uncertainty.

    Points are posterior means over aligned draws. The ellipse around a point holds half of its
    posterior: the latent given the row and the parameters, and what is not known of those. With
    more than 300 rows, evenly spaced ones have an ellipse.

    Args:
        fit: A fit whose model encodes rows into a continuous latent.
        x: Rows to show; the training data by default.
        labels: A known label of each row, by which it is coloured.
        directions: Which two.
        ax: Where to draw.
    """
    ax = new_axes(ax, 6.4, 5.2)
    rows = rows_of(fit, x)
    first, second = _pair(fit, directions)
    mean, covariance = _latent_moments(fit, rows, [first, second])
    groups = _groups(labels, len(rows))
    step = -(-len(rows) // _MAX_ELLIPSES)
    for index in range(0, len(rows), step):
        tint = groups[index][1]
        outline = mean[index][:, None] + _ellipse(covariance[index])
        ax.fill(*outline, color=tint, lw=0, alpha=0.05, zorder=1)
        ax.plot(*outline, color=tint, lw=0.5, alpha=0.3, zorder=1)
    _points(mean, groups, ax)
    _name_directions(fit, (first, second), ax)
    ax.set_aspect("equal", adjustable="box")
    return ax


def biplot(
    fit: Fit,
    x: object = None,
    *,
    labels: Sequence[object] | None = None,
    directions: tuple[int, int] = (0, 1),
    columns: Sequence[str | int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Rows as points and columns as arrows in one plane, loadings with uncertainty ellipses.

    An arrow is the loadings of a column on the two directions, in units of that column's standard
    deviation under the model, so that its length is the share of it that the two explain; each
    ends in the ellipse that holds half of its posterior. Arrows are stretched by one common factor
    to fill the plane of the scores; the circle is a column that the two explain in full. With more
    than 30 columns the longest arrows are drawn.

    References:
        Gabriel (1971). The biplot graphic display of matrices with application to principal
        component analysis. Biometrika 58.

    Args:
        fit: A fit with a site ``loadings`` whose model encodes rows.
        x: Rows to show; the training data by default.
        labels: A known label of each row, by which it is coloured.
        directions: Which two.
        columns: Names or positions of the columns with an arrow.
        ax: Where to draw.
    """
    ax = new_axes(ax, 8.0, 6.2)
    rows = rows_of(fit, x)
    pair = _pair(fit, directions)
    scores, _ = _latent_moments(fit, rows, list(pair))
    positions, names = columns_of(fit, columns, None)
    tips = _correlations(fit)[:, positions][..., list(pair)].numpy()  # (s, c, 2)
    center = tips.mean(0)
    stretch = float(np.quantile(np.abs(scores), 0.99))
    _points(scores, _groups(labels, len(rows)), ax, alpha=0.45, size=14)
    angle = np.linspace(0.0, 2.0 * np.pi, 121)
    ax.plot(stretch * np.cos(angle), stretch * np.sin(angle), color=GREY, lw=0.8, ls=":")
    longest = np.argsort(-np.square(center).sum(-1))[:_MAX_ARROWS]
    for j in sorted(longest.tolist()):
        spread = np.cov(tips[:, j].T) if len(tips) > 1 else np.zeros((2, 2))
        outline = stretch * (center[j][:, None] + _ellipse(spread))
        ax.fill(*outline, color=WARNING, alpha=0.18, lw=0, zorder=3)
        ax.plot(*outline, color=WARNING, lw=0.6, alpha=0.7, zorder=3)
        arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.0, "shrinkA": 0, "shrinkB": 0}
        tip = stretch * center[j]
        ax.annotate("", tip, (0.0, 0.0), arrowprops=arrow, zorder=4)
    edges = _name_arrows(stretch * center[longest], [names[j] for j in longest.tolist()], ax)
    _name_directions(fit, pair, ax)
    for axis, k in (("x", 0), ("y", 1)):
        more = edges if axis == "x" else [0.0]
        ends = np.concatenate([scores[:, k], 1.12 * stretch * center[:, k], more])
        getattr(ax, f"set_{axis}lim")(*span(ends, 0.06))
    ax.set_aspect("equal", adjustable="box")  # angles are correlations, the circle a circle
    return ax


# ---------------------------------------------------------------- private
def _aligned_loadings(fit: Fit) -> Tensor:
    if "loadings" not in fit.draws or fit.draws["loadings"].ndim != 4:
        raise ValueError(
            f"this picture needs a site 'loadings' of event shape (d, q), but the fit has "
            f"{', '.join(fit.draws)}."
        )
    return fit.aligned.draws["loadings"].flatten(0, 1).double().cpu()


def _correlations(fit: Fit) -> Tensor:
    """Loadings over the columns' standard deviations in the same draw, ``(s, d, q)``."""
    found = _aligned_loadings(fit)
    if "noise_scale" not in fit.draws:
        return found / found.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-300)
    noise = fit.draws["noise_scale"].flatten(0, 1).double().cpu().square()
    noise = noise.unsqueeze(-1) if noise.ndim == 1 else noise
    return found / (found.square().sum(-1) + noise).sqrt().unsqueeze(-1)


def _directions(fit: Fit, directions: Sequence[int] | None, limit: int) -> list[int]:
    count = fit.draws["loadings"].shape[-1]
    if directions is None:
        alive = [k for k in range(count) if k not in fit.aligned.empty]
        return (alive or list(range(count)))[:limit]
    for k in directions:
        if not 0 <= k < count:
            raise ValueError(f"there is no direction {k}: the latent space has {count}.")
    return list(directions)


def _pair(fit: Fit, directions: tuple[int, int]) -> tuple[int, int]:
    if len(directions) != 2:
        raise ValueError(f"directions={directions}, but a map needs two.")
    _aligned_loadings(fit)
    count = fit.draws["loadings"].shape[-1]
    if count == 1:
        raise ValueError("the latent space has one direction: a map needs two.")
    first, second = _directions(fit, directions, 2)
    return first, second


def _interval(values: Tensor, mass: float) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Lower end, mean and upper end over the first dimension."""
    if not 0.0 < mass < 1.0:
        raise ValueError(f"mass={mass}, but it must lie between 0 and 1.")
    values = values.double().cpu()
    ends = torch.tensor([(1.0 - mass) / 2.0, (1.0 + mass) / 2.0], dtype=torch.float64)
    low, high = torch.quantile(values[:20_000], ends, dim=0).numpy()
    return low, values.mean(0).numpy(), high


def _latent_moments(
    fit: Fit, rows: Tensor, directions: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Posterior mean ``(n, k)`` and covariance ``(n, k, k)`` of the latents of rows."""
    model = require(fit.model, Encoder, "this picture")
    flat = verbs.thin(verbs.flatten_draws(fit.aligned.draws), _MAX_DRAWS)
    means, covariances = [], []
    for part in rows.split(_ROWS):
        with torch.no_grad():
            law = model.encode(part.to(fit.device, next(iter(flat.values())).dtype), flat)
        center = law.mean[..., directions].double().cpu()
        if isinstance(law, torch.distributions.MultivariateNormal):
            within = law.covariance_matrix[..., directions, :][..., directions].double().cpu()
        else:
            within = torch.diag_embed(law.variance[..., directions].double().cpu())
        mean = center.mean(0)
        away = center - mean
        between = torch.einsum("sna,snb->nab", away, away) / len(center)
        means.append(mean)
        covariances.append(within.expand(*center.shape, len(directions)).mean(0) + between)
    return torch.cat(means).numpy(), torch.cat(covariances).numpy()


def _ellipse(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Outline ``(2, 61)`` about zero of the ellipse that holds half of a normal."""
    values, vectors = np.linalg.eigh(covariance)
    angle = np.linspace(0.0, 2.0 * np.pi, 61)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    outline: NDArray[np.float64] = _RADIUS * (vectors * np.sqrt(values.clip(0.0))) @ circle
    return outline


def _groups(labels: Sequence[object] | None, count: int) -> list[tuple[str, str]]:
    """Name and colour of each row's group, most frequent first."""
    if labels is None:
        return [("", color(0))] * count
    names = [str(label) for label in labels]
    if len(names) != count:
        raise ValueError(
            f"labels has {len(names)} entries, but {count} rows are drawn: pass the rows as x, "
            "at most 5,000."
        )
    known, sizes = np.unique(names, return_counts=True)
    order = [str(known[i]) for i in np.argsort(-sizes, kind="stable")]
    own = {name: color(k) for k, name in enumerate(order[:_REST])}
    return [(name, own[name]) if name in own else ("others", GREY) for name in names]


def _points(
    at: NDArray[np.float64],
    groups: list[tuple[str, str]],
    ax: Axes,
    *,
    alpha: float = 0.8,
    size: float = 20,
) -> None:
    kinds = sorted(set(groups), key=lambda kind: (kind[0] == "others", kind[0]))
    for name, tint in kinds:
        mine = np.array([group == (name, tint) for group in groups])
        label = f"{name} ({int(mine.sum())})" if name else None
        ax.scatter(
            at[mine, 0],
            at[mine, 1],
            s=size,
            color=tint,
            alpha=alpha,
            linewidths=0,
            label=label,
            zorder=2,
        )
    if kinds and kinds[0][0]:
        key = ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
        for handle in key.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)


def _share(fit: Fit, direction: int) -> str:
    occupancy = fit.aligned.occupancy
    return "" if occupancy is None else f" ({float(occupancy[direction]):.0%} of the signal)"


def _title(fit: Fit, direction: int, ax: Axes) -> None:
    sure = fit.aligned.elements is None or direction in fit.aligned.identified
    ax.set_title(
        f"direction {direction}{'' if sure else ', ambiguous'}",
        fontsize=10,
        color=INK if sure else WARNING,
    )


def _name_directions(fit: Fit, pair: tuple[int, int], ax: Axes) -> None:
    for axis, k in zip((ax.xaxis, ax.yaxis), pair, strict=True):
        sure = fit.aligned.elements is None or k in fit.aligned.identified
        note = "" if sure else ", ambiguous"
        axis.set_label_text(f"direction {k}{_share(fit, k)}{note}", color=INK if sure else WARNING)


def _name_arrows(tips: NDArray[np.float64], names: list[str], ax: Axes) -> list[float]:
    """Names beyond the tips, pushed apart from the longest arrow on; where they end sideways."""
    reach = float(np.abs(tips).max()) if tips.size else 1.0
    high, wide = 0.095 * reach, 0.04 * reach  # of a line of text, and of one of its letters
    taken: list[tuple[float, float, float]] = []  # left, right, middle
    for tip, name in zip(tips, names, strict=True):
        length = float(np.hypot(*tip)) or 1.0
        x, y = tip * (1.0 + 0.08 * reach / length)
        left = x if tip[0] >= 0 else x - wide * len(name)
        right = left + wide * len(name)
        for _ in range(30):
            if not any(a < right and left < b and abs(c - y) < high for a, b, c in taken):
                break
            y += 0.3 * high if tip[1] >= 0 else -0.3 * high
        taken.append((left, right, y))
        side = "left" if tip[0] >= 0 else "right"
        ax.text(x, y, name, fontsize=8, color=INK, ha=side, va="center", zorder=5)
    return [end for left, right, _ in taken for end in (left, right)]
