"""A fit for ArviZ, and whether engines agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesgen import rng, verbs
from bayesgen.arviz_groups import convert, import_arviz, labels, summarise
from bayesgen.capabilities import Generative, Pointwise, Scored, Symmetric, require
from bayesgen.symmetry import LabelPermutation

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from bayesgen.fit import Fit

__all__ = ["agreement", "invariants", "summarise", "to_arviz"]

_MAX_ELEMENTS = 20_000_000
_MIN_DRAWS = 4  # fewer, and ArviZ has no R-hat, effective size or Monte Carlo error
_MAX_ENTRIES = 64  # of one invariant in the table of agreement
_OCCUPIED = 0.005

Arrays = dict[str, "NDArray[Any]"]


def to_arviz(
    fit: Fit,
    *,
    log_likelihood: bool = True,
    posterior_predictive: int = 0,
    prior: Mapping[str, Tensor] | None = None,
    prior_predictive: Tensor | None = None,
    seed: int = 0,
    max_elements: int = _MAX_ELEMENTS,
) -> Any:
    """The fit as ``InferenceData`` (ArviZ 0.2x) or ``DataTree`` (1.x), through ``from_dict``.

    ``posterior`` holds aligned draws and the invariant quantities, with dimensions and
    coordinates named by the model and the data's columns; ``log_likelihood`` is pointwise, as
    ``az.loo`` and ``az.compare`` need it. A group that would not fit is left out, and its
    attribute ``<group>_skipped`` says why.

    Args:
        fit: The fit.
        log_likelihood: Whether the training rows are scored under every draw.
        posterior_predictive: Number of replicated data sets of each chain; 0 for none.
        prior: Draws from the prior ``(chain, draw, *event)`` by site.
        prior_predictive: ``(chain, draw, n, d)``.
        seed: Of the replicated data sets.
        max_elements: Largest number of elements of a computed group.

    Example:
        >>> from bayesgen.toys import UnitMixture, pretend
        >>> fit = pretend(UnitMixture(2), [[0.0], [0.1], [5.0], [5.1]])
        >>> to_arviz(fit).posterior["loc"].dims
        ('chain', 'draw', 'component', 'column')
    """
    coords: dict[str, list[Any]] = {key: list(value) for key, value in fit.model.coords().items()}
    dims: dict[str, list[str]] = {key: list(value) for key, value in fit.model.dims.items()}
    groups: dict[str, Arrays] = {
        "posterior": _numpy({**fit.aligned.draws, **invariants(fit)}),
        # ArviZ 0.2x takes this name for pointwise values of old and warns
        "sample_stats": _numpy(
            {
                "total_log_likelihood" if k == "log_likelihood" else k: v
                for k, v in fit.sample_stats.items()
            }
        ),
    }
    attrs: dict[str, Any] = {"inference_library": "bayesgen", **fit.attrs}
    if fit.aligned.elements is not None:
        attrs["alignment"] = fit.aligned.message
    held = fit.data is not None and fit.data.in_memory
    if held:
        _add_data(
            fit,
            groups,
            attrs,
            coords,
            dims,
            log_likelihood=log_likelihood,
            num_replicates=posterior_predictive,
            seed=seed,
            max_elements=max_elements,
        )
    elif isinstance(fit.model, Pointwise):
        _add_observed(fit.model, fit, groups, attrs, log_likelihood, max_elements)
    elif log_likelihood:
        attrs["log_likelihood_skipped"] = "the fit does not hold its training data in memory"
    if prior is not None:
        groups["prior"] = _numpy(prior)
    if prior_predictive is not None:
        groups["prior_predictive"] = _numpy({"x": prior_predictive})
    return convert(groups, coords=coords, dims=dims, attrs=attrs)


def _add_data(
    fit: Fit,
    groups: dict[str, Arrays],
    attrs: dict[str, Any],
    coords: dict[str, list[Any]],
    dims: dict[str, list[str]],
    *,
    log_likelihood: bool,
    num_replicates: int,
    seed: int,
    max_elements: int,
) -> None:
    """The groups that have a dimension of rows."""
    assert fit.data is not None
    rows = fit.data.tensor()
    groups["observed_data"] = {"x": rows.cpu().numpy()}
    coords.setdefault("column", list(fit.columns))
    coords["row"] = list(range(len(rows)))
    dims["x"] = ["row", "column"]

    def fits(group: str, size: int) -> bool:
        if size > max_elements:
            attrs[f"{group}_skipped"] = f"{size:,} elements, above max_elements={max_elements:,}"
        return size <= max_elements

    size = fit.num_chains * fit.num_draws * len(rows)
    if log_likelihood and isinstance(fit.model, Scored) and fits("log_likelihood", size):
        groups["log_likelihood"] = _numpy({"x": fit.log_likelihood(fit.data)})
    size = fit.num_chains * num_replicates * rows.numel()
    if num_replicates and fits("posterior_predictive", size):
        groups["posterior_predictive"] = _numpy(
            {"x": replicate(fit, len(rows), num_replicates, seed=seed)}
        )


def _add_observed(
    model: Pointwise,
    fit: Fit,
    groups: dict[str, Arrays],
    attrs: dict[str, Any],
    log_likelihood: bool,
    max_elements: int,
) -> None:
    """Observed values and their log densities of a program that holds its own data."""
    groups["observed_data"] = _numpy(model.observed)
    size = fit.num_chains * fit.num_draws * sum(v.numel() for v in model.observed.values())
    if log_likelihood and size > max_elements:
        attrs["log_likelihood_skipped"] = f"{size:,} elements, above max_elements={max_elements:,}"
    elif log_likelihood:
        groups["log_likelihood"] = _numpy(model.log_likelihood(fit.draws))


def replicate(fit: Fit, num_rows: int, num_replicates: int, *, seed: int = 0) -> Tensor:
    """Replicated data sets ``(chain, replicate, n, d)``, each from one posterior draw."""
    model = require(fit.model, Generative, "posterior_predictive")
    generator = rng.make_generator(seed, fit.device)
    index = torch.linspace(0, fit.num_draws - 1, num_replicates, device=fit.device).round().long()
    flat = verbs.flatten_draws({name: value[:, index] for name, value in fit.draws.items()})
    total = fit.num_chains * num_replicates
    which = torch.arange(total, device=fit.device).repeat_interleave(num_rows)
    parts = [
        model.sample(verbs.pick(flat, part), generator=generator) for part in which.split(65_536)
    ]
    return torch.cat(parts).reshape(fit.num_chains, num_replicates, num_rows, -1)


def invariants(fit: Fit) -> dict[str, Tensor]:
    """Quantities that the symmetry leaves alone, each ``(chain, draw, ...)``; empty if none."""
    found = dict(fit.model.invariants(fit.draws)) if isinstance(fit.model, Symmetric) else {}
    if "num_occupied" in fit.sample_stats:  # the labels are gone, but the engine counted them
        found.setdefault("num_occupied", fit.sample_stats["num_occupied"].to(torch.float64))
    return found


def _numpy(values: Mapping[str, Tensor]) -> Arrays:
    return {name: value.detach().cpu().numpy() for name, value in values.items()}


# ---------------------------------------------------------------- agreement of engines
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
    found |= invariants(fit)
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
    if values.shape[1] < _MIN_DRAWS:
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
