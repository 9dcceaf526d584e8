"""Do engines agree? One table, and one picture, that say where fits differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from bayesgen.arviz_groups import import_arviz, labels
from bayesgen.capabilities import Scored, Symmetric
from bayesgen.symmetry import LabelPermutation
from bayesgen.verdict import MIN_DRAWS

if TYPE_CHECKING:
    import pandas as pd

    from bayesgen.fit import Fit

__all__ = ["agreement"]

_MAX_ENTRIES = 64  # of one quantity in the table
_OCCUPIED = 0.005


def agreement(fits: Mapping[str, Fit], x: object = None) -> pd.DataFrame:
    """Where fits of one model by several engines differ, in invariant quantities.

    Compares the mean log density of ``x``, the model's invariants, and the occupied weights sorted
    within each draw. The first fit is the reference.

    Args:
        fits: By name, the reference first.
        x: Rows to score, held out where possible; by default the reference's training data.

    Returns:
        A frame indexed by quantity and fit: ``mean``, ``sd``, ``mcse`` (Monte Carlo error of the
        mean), ``difference`` from the reference, in ``sds`` of the reference, and ``z``, the
        difference over its Monte Carlo error; NaN where there is none.

    Raises:
        ValueError: Fewer than two fits, or no rows to score.
    """
    import pandas as pd

    if len(fits) < 2:
        raise ValueError(f"agreement compares at least two fits, got {list(fits)}.")
    reference, first = next(iter(fits.items()))
    rows = first.data if x is None else x
    if rows is None:
        raise ValueError(f"the fit '{reference}' holds no training data: pass rows as x.")
    tables = {name: _quantities(fit, rows) for name, fit in fits.items()}
    lines = []
    for quantity, base in tables[reference].items():
        for name, table in tables.items():
            if quantity in table:
                lines.append(
                    {"quantity": quantity, "fit": name, **_compare(table[quantity], base)}
                )
    return pd.DataFrame(lines).set_index(["quantity", "fit"])


def _quantities(fit: Fit, rows: object) -> dict[str, tuple[float, float, float]]:
    """Mean, standard deviation and Monte Carlo error of every quantity."""
    found: dict[str, Tensor] = {}
    table: dict[str, tuple[float, float, float]] = {}
    if isinstance(fit.model, Scored):
        table["log_prob"] = (float(fit.log_prob(rows).mean()), math.nan, math.nan)
        found["log_likelihood"] = fit.log_likelihood(rows).mean(-1)
    found |= fit.invariants
    found |= _sorted_weights(fit)
    for name, value in found.items():
        entries = value.double().flatten(2) if value.ndim > 2 else value.double()[..., None]
        event = tuple(value.shape[2:])
        names = labels(name, event, coords=fit.model.coords(), dims=fit.model.dims)
        for k, label in enumerate(names[:_MAX_ENTRIES]):
            table[label] = _moments(entries[..., k])
    if "num_occupied" not in table and fit.history.get("num_occupied"):
        table["num_occupied"] = (fit.history["num_occupied"][-1], math.nan, math.nan)
    return table


def _sorted_weights(fit: Fit) -> dict[str, Tensor]:
    symmetry = fit.model.symmetry if isinstance(fit.model, Symmetric) else None
    if not isinstance(symmetry, LabelPermutation) or symmetry.weights is None:
        return {}
    if symmetry.weights not in fit.draws:
        return {}
    weights = fit.draws[symmetry.weights].sort(-1, descending=True).values
    return {"sorted_weights": weights[..., weights.mean((0, 1)) > _OCCUPIED]}


def _moments(values: Tensor) -> tuple[float, float, float]:
    mean = float(values.mean())
    if values.shape[1] < MIN_DRAWS:
        return mean, math.nan, math.nan
    sd = float(values.std())
    if sd == 0.0:
        return mean, 0.0, 0.0
    return mean, sd, float(import_arviz().mcse(values.cpu().numpy()))


def _compare(
    here: tuple[float, float, float], base: tuple[float, float, float]
) -> dict[str, float]:
    difference, error = here[0] - base[0], math.hypot(here[2], base[2])
    return {
        "mean": here[0],
        "sd": here[1],
        "mcse": here[2],
        "difference": difference,
        "sds": difference / base[1] if base[1] > 0 else math.nan,
        "z": difference / error if error > 0 and here is not base else math.nan,
    }
