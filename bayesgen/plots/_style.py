"""What all pictures share: colours that the colour-blind can tell apart, clean axes, thin fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayesgen.data import Dataset, as_dataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from bayesgen.fit import Fit

__all__ = [
    "GREY",
    "INK",
    "PALETTE",
    "WARNING",
    "color",
    "columns_of",
    "new_axes",
    "new_figure",
    "rows_of",
    "thinned",
    "tidy",
    "whole_ticks",
]

# Okabe & Ito (2008), Color universal design; yellow is left out, it vanishes on white.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
INK, GREY, WARNING = "#303030", "#9a9a9a", "#D55E00"
_DRAWS = 200  # posterior draws that a picture looks at


def color(index: int) -> str:
    """The colour of a component; they repeat after seven, markers tell those apart."""
    return PALETTE[index % len(PALETTE)]


def new_figure(width: float, height: float) -> Figure:
    """A figure outside pyplot: nothing global, no window, nothing to close."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def new_axes(ax: Axes | None, width: float = 6.0, height: float = 4.2) -> Axes:
    """The axes given, or fresh ones."""
    return tidy(new_figure(width, height).subplots() if ax is None else ax)


def tidy(ax: Axes) -> Axes:
    """No box, soft ticks."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(color=GREY, labelcolor=INK, labelsize=9)
    return ax


def whole_ticks(ax: Axes) -> None:
    """Ticks at whole numbers only along x: counts."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def rows_of(fit: Fit, x: object = None, limit: int = 5000) -> Tensor:
    """Rows to draw, at most ``limit`` of them evenly spaced: those given, or the training rows."""
    if x is None and fit.data is None:
        raise ValueError("this fit holds no training data: pass the rows to draw as x=...")
    data: Dataset = as_dataset(fit.data if x is None else x, schema=fit.schema)
    keep = torch.linspace(0, data.num_rows - 1, min(limit, data.num_rows)).round().long()
    if data.in_memory:
        return data.tensor()[keep]
    return torch.cat(list(data.subset(keep).batches(65_536)))


def columns_of(
    fit: Fit, columns: Sequence[str | int] | None, wanted: int | None
) -> tuple[list[int], list[str]]:
    """Positions and names of the columns asked for; all of them, or the first ``wanted``."""
    known = fit.columns
    if columns is None:
        positions = list(range(len(known) if wanted is None else min(wanted, len(known))))
        return positions, [known[j] for j in positions]
    positions = []
    for column in columns:
        if isinstance(column, str) and column not in known:
            raise ValueError(f"there is no column {column!r}; the data have {', '.join(known)}.")
        if isinstance(column, int) and not 0 <= column < len(known):
            raise ValueError(f"column {column} is out of range for {len(known)} columns.")
        positions.append(known.index(column) if isinstance(column, str) else column)
    if wanted is not None and not 1 <= len(positions) <= wanted:
        raise ValueError(f"columns={list(columns)}, but this picture shows 1 to {wanted} of them.")
    return positions, [known[j] for j in positions]


def thinned(fit: Fit) -> Fit:
    """The fit with at most 200 evenly spaced draws: pictures need no more, and wait for them."""
    total = fit.num_chains * fit.num_draws
    if total <= _DRAWS:
        return fit
    keep = torch.linspace(0, total - 1, _DRAWS).round().long()
    draws = {
        name: value.flatten(0, 1)[keep.to(value.device)][None] for name, value in fit.draws.items()
    }
    return dataclasses.replace(fit, draws=draws, sample_stats={})


def span(values: NDArray[np.float64], margin: float = 0.12) -> tuple[float, float]:
    """Limits that hold all finite values with a margin."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    width = (high - low) or max(1.0, abs(low))
    return low - margin * width, high + margin * width
