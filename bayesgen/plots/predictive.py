"""Pictures of what a model predicts: many simulated data sets beside the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bayesgen.plots._style import GREY, INK, PALETTE, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["predictive"]

_SHOWN = 60  # data sets drawn as lines


def predictive(
    simulated: Mapping[str, Tensor],
    observed: Mapping[str, Tensor] | None = None,
    *,
    columns: Mapping[str, tuple[str, ...]] | None = None,
    label: str = "posterior",
    max_panels: int = 12,
) -> Figure:
    """Simulated data sets (thin lines) beside the data (thick): one panel a site or column.

    Lines are empirical distribution functions, which need no bandwidth and show the scale, the
    spread and the tails alike; whole numbers are drawn as shares of each value.

    Args:
        simulated: ``(num_samples, *shape)`` by site.
        observed: ``(*shape)`` by site; None draws no data.
        columns: Names of the last dimension by site, for sites of several columns.
        label: What the data sets come from.
        max_panels: Panels at most.
    """
    panels = [
        panel
        for site, values in simulated.items()
        for panel in _panels(site, values, (observed or {}).get(site), (columns or {}).get(site))
    ][:max_panels]
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = new_figure(3.6 * across + 0.6, 2.6 * down + 0.3)
    grid: NDArray[Any] = figure.subplots(down, across, squeeze=False)
    for ax in grid.flat[len(panels) :]:
        ax.set_axis_off()
    for index, (ax, (name, many, one)) in enumerate(zip(grid.flat, panels, strict=False)):
        _draw(tidy(ax), many, one, label)
        ax.set_title(name, fontsize=10, color=INK)
        if index == 0:
            ax.legend(frameon=False, fontsize=9)
    return figure


def _panels(
    site: str, values: Tensor, data: Tensor | None, columns: tuple[str, ...] | None
) -> list[tuple[str, NDArray[Any], NDArray[Any] | None]]:
    """Name, ``(num_samples, n)`` and ``(n,)`` of each panel."""
    many = values.detach().cpu().double()
    if many.ndim < 3:
        one = None if data is None else data.detach().cpu().double().reshape(-1).numpy()
        return [(site, many.reshape(len(many), -1).numpy(), one)]
    names = columns or tuple(str(j) for j in range(many.shape[-1]))
    found = []
    for j, name in enumerate(names):
        one = None if data is None else data[..., j].detach().cpu().double().reshape(-1).numpy()
        title = name if columns else f"{site}[{name}]"
        found.append((title, many[..., j].reshape(len(many), -1).numpy(), one))
    return found


def _draw(
    ax: Axes, many: NDArray[np.float64], one: NDArray[np.float64] | None, label: str
) -> None:
    many = np.where(np.isfinite(many), many, np.nan)
    held = None if one is None else one[np.isfinite(one)]
    grid, is_whole = _grid(many, held)
    index = np.unique(np.linspace(0, len(many) - 1, min(_SHOWN, len(many))).round().astype(int))
    for k, i in enumerate(index):
        name = f"{label} ({len(many)} data sets)" if k == 0 else None
        ax.plot(grid, _share(many[i], grid), color=PALETTE[4], lw=0.7, alpha=0.45, label=name)
    if held is not None:
        ax.plot(grid, _share(held, grid), color=INK, lw=2, label="data")
    ax.axhline(0.5, color=GREY, lw=0.6, ls=":", zorder=0)
    ax.set(ylim=(-0.02, 1.02), ylabel="share at most")
    if is_whole:
        from matplotlib.ticker import MaxNLocator

        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _grid(
    many: NDArray[np.float64], held: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], bool]:
    """Where the functions are drawn: the bulk of the simulated data and all of the data."""
    known = many[np.isfinite(many)]
    low, high = np.quantile(known, [0.02, 0.98]) if known.size else (0.0, 1.0)
    if held is not None and held.size:
        low, high = min(low, held.min()), max(high, held.max())
    is_whole = bool(np.all(known == known.round())) and high - low < 60
    margin = 0.04 * (high - low) or 0.5
    if is_whole:
        return np.repeat(np.arange(low - 1, high + 2), 2)[1:-1], True
    return np.linspace(low - margin, high + margin, 300), False


def _share(values: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    known = np.sort(values[np.isfinite(values)])
    found = np.searchsorted(known, grid, side="right") / max(1, len(known))
    if len(grid) > 1 and np.any(np.diff(grid) == 0):  # steps at whole numbers
        first = np.append(np.diff(grid) == 0, False)
        left = np.searchsorted(known, grid, side="left") / max(1, len(known))
        found = np.where(first, left, found)
    return found
