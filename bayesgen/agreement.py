"""Do engines agree? One table, and one picture, that say where fits differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesgen.arviz_groups import import_arviz, labels
from bayesgen.capabilities import Pointwise, Scored, Symmetric
from bayesgen.comparison import named
from bayesgen.symmetry import LabelPermutation
from bayesgen.verdict import MIN_DRAWS

if TYPE_CHECKING:
    import pandas as pd

    from bayesgen.fit import Fit

__all__ = ["agreement"]

_MAX_ENTRIES = 64  # of one quantity in the table
_OCCUPIED = 0.005
_BINS = 16
_Z, _SDS = 4.0, 0.1  # a difference that is both sure and large enough to matter
_WIDTH = 1.25
_OVERLAP = 0.9


@dataclass(frozen=True, eq=False)
class _Marginal:
    """One quantity of one fit."""

    mean: float
    sd: float = math.nan
    low: float = math.nan
    """5 % quantile."""
    high: float = math.nan
    """95 % quantile."""
    mcse: float = math.nan
    draws: Tensor | None = None
    size: float = math.nan
    """Effective number of draws."""

    @property
    def width(self) -> float:
        """Of the central 90 % interval: covariances may have tails too heavy for a variance."""
        return self.high - self.low


def agreement(*fits: Any, x: object = None, **more: Fit) -> pd.DataFrame:
    """Where fits of one model by several engines differ, in invariant quantities.

    Compares the mean log density of ``x``, the model's invariants, and the occupied weights sorted
    within each draw; of models without symmetry, plain programs too, every entry of every site.
    The first fit is the reference. :func:`bayesgen.plots.agreement` draws the table.

    Args:
        *fits: Fits, called after their engines, the reference first; or one mapping by name, which
            ``x`` may follow.
        x: Rows to score, held out where possible; by default the reference's training data.
        **more: Fits by name.

    Returns:
        A frame indexed by quantity and fit: ``mean``, ``sd``, ``low`` and ``high`` (the central
        90 % interval), ``mcse`` (Monte Carlo error of the mean), ``difference`` from the
        reference, in ``sds`` of the reference, ``z``, the difference over its Monte Carlo error,
        ``width_ratio`` of the two intervals, ``overlap`` of the two marginal
        densities (1: the same) and ``kl``, the divergence of the reference from the fit in nats;
        NaN where there is none. ``finding`` says in words what differs, and is empty where nothing
        does. The row ``k_hat`` holds the Pareto shape of approximations.

    Raises:
        ValueError: Fewer than two fits, or no rows to score.

    Example:
        >>> from bayesgen.toys import UnitMixture, pretend
        >>> x = [[0.0], [0.1], [5.0], [5.1]]
        >>> one, two = (pretend(UnitMixture(1), x, seed=seed) for seed in (0, 1))
        >>> agreement({"a": one, "b": two}).loc[("mean[0]", "b"), "finding"]
        ''
    """
    import pandas as pd

    given: list[Any] = list(fits)
    if len(given) == 2 and isinstance(given[0], Mapping):
        x = given.pop()
    chosen = named(tuple(given), more, "agreement")
    reference, first = next(iter(chosen.items()))
    rows = first.data if x is None else x
    if rows is None and isinstance(first.model, Scored):
        raise ValueError(f"the fit '{reference}' holds no training data: pass rows as x.")
    tables = {name: _quantities(fit, rows) for name, fit in chosen.items()}
    lines = []
    for quantity in dict.fromkeys(q for table in tables.values() for q in table):
        base = tables[reference].get(quantity)
        if base is None and quantity != "k_hat":
            continue
        for name, table in tables.items():
            if quantity in table:
                values = _compare(table[quantity], base, reference)
                lines.append({"quantity": quantity, "fit": name, **values})
    return pd.DataFrame(lines).set_index(["quantity", "fit"])


# ---------------------------------------------------------------- what is compared
def _quantities(fit: Fit, rows: object) -> dict[str, _Marginal]:
    """Every quantity of a fit."""
    found: dict[str, Tensor] = {}
    table: dict[str, _Marginal] = {}
    if isinstance(fit.model, Scored):
        table["log_prob"] = _Marginal(float(fit.log_prob(rows).mean()))
        found["log_likelihood"] = fit.log_likelihood(rows).mean(-1)
    elif isinstance(fit.model, Pointwise):
        pointwise = fit.model.log_likelihood(fit.draws).values()
        if pointwise:
            found["log_likelihood"] = torch.cat([v.flatten(2) for v in _at_least_3(pointwise)], -1)
            found["log_likelihood"] = found["log_likelihood"].mean(-1)
    found |= fit.invariants
    found |= _sorted_weights(fit)
    if not isinstance(fit.model, Symmetric):
        found |= {k: v for k, v in fit.draws.items() if v.is_floating_point()}
    for name, value in found.items():
        entries = value.double().flatten(2) if value.ndim > 2 else value.double()[..., None]
        event = tuple(value.shape[2:])
        names = labels(name, event, coords=fit.model.coords(), dims=fit.model.dims)
        for k, label in enumerate(names[:_MAX_ENTRIES]):
            table[label] = _marginal(entries[..., k])
    if "num_occupied" not in table and fit.history.get("num_occupied"):
        table["num_occupied"] = _Marginal(fit.history["num_occupied"][-1])
    if fit.attrs.get("k_hat") is not None:
        table["k_hat"] = _Marginal(float(fit.attrs["k_hat"]))
    return table


def _at_least_3(values: Any) -> list[Tensor]:
    return [value if value.ndim > 2 else value.unsqueeze(-1) for value in values]


def _sorted_weights(fit: Fit) -> dict[str, Tensor]:
    symmetry = fit.model.symmetry if isinstance(fit.model, Symmetric) else None
    if not isinstance(symmetry, LabelPermutation) or symmetry.weights is None:
        return {}
    if symmetry.weights not in fit.draws:
        return {}
    weights = fit.draws[symmetry.weights].sort(-1, descending=True).values
    return {"sorted_weights": weights[..., weights.mean((0, 1)) > _OCCUPIED]}


def _marginal(values: Tensor) -> _Marginal:
    mean = float(values.mean())
    if values.shape[1] < MIN_DRAWS:
        return _Marginal(mean)
    sd = float(values.std())
    if sd == 0.0:
        return _Marginal(mean, 0.0, mean, mean, 0.0)
    error = float(import_arviz().mcse(values.cpu().numpy()))
    drawn = values.flatten()
    low, high = drawn.quantile(drawn.new_tensor([0.05, 0.95])).tolist()
    return _Marginal(mean, sd, low, high, error, drawn, min((sd / error) ** 2, len(drawn)))


# ---------------------------------------------------------------- how far apart
def _compare(here: _Marginal, base: _Marginal | None, reference: str) -> dict[str, Any]:
    line: dict[str, Any] = {
        name: getattr(here, name) for name in ("mean", "sd", "low", "high", "mcse")
    }
    if base is None or here is base:
        nothing = dict.fromkeys(("z", "width_ratio", "overlap", "kl"), math.nan)
        zero = math.nan if base is None else 0.0
        sds = zero if base is not None and base.sd > 0 else math.nan
        return {**line, "difference": zero, "sds": sds, **nothing, "finding": ""}
    difference, error = here.mean - base.mean, math.hypot(here.mcse, base.mcse)
    overlap, kl = _overlap(here, base)
    line |= {
        "difference": difference,
        "sds": difference / base.sd if base.sd > 0 else math.nan,
        "z": difference / error if error > 0 else math.nan,
        "width_ratio": here.width / base.width if base.width > 0 else math.nan,
        "overlap": overlap,
        "kl": kl,
    }
    return {**line, "finding": _finding(line, here, base, reference)}


def _overlap(here: _Marginal, base: _Marginal) -> tuple[float, float]:
    """Overlap of two marginals and KL(reference, fit), on bins of equal count of the reference.

    The expected excess of equal distributions, of order bins over draws, is taken off.
    """
    if here.draws is None or base.draws is None:
        return math.nan, math.nan
    levels = torch.linspace(0, 1, _BINS + 1, dtype=torch.float64)[1:-1]
    edges = base.draws.cpu().quantile(levels).unique()
    if len(edges) < 2:
        return math.nan, math.nan
    shares = []
    for side in (base, here):
        assert side.draws is not None
        place = torch.bucketize(side.draws.cpu().contiguous(), edges)
        counts = torch.bincount(place, minlength=len(edges) + 1).double()
        shares.append((counts + 0.5) / (counts + 0.5).sum())
    p, q = shares
    noise = 1 / base.size + 1 / here.size
    distance = 0.5 * float((p - q).abs().sum())
    # E|difference of shares| of two samples from one distribution
    chance = 0.5 * float((2 / math.pi * p * (1 - p) * noise).sqrt().sum())
    kl = float((p * (p / q).log()).sum()) - len(edges) / 2 * noise
    return 1.0 - math.sqrt(max(0.0, distance**2 - chance**2)), max(0.0, kl)


def _finding(line: Mapping[str, float], here: _Marginal, base: _Marginal, reference: str) -> str:
    found = []
    if abs(line["z"]) > _Z and abs(line["sds"]) > _SDS:
        found.append(
            f"mean {'above' if line['sds'] > 0 else 'below'} by {abs(line['sds']):.2g} sd"
        )
    ratio = line["width_ratio"]
    # The width of a 90 % interval of n normal draws has a relative error of 0.88 / sqrt(n).
    doubt = 4 * 0.88 * math.sqrt(1 / here.size + 1 / base.size)
    if ratio > 0 and abs(math.log(ratio)) > max(math.log(_WIDTH), doubt):
        found.append(f"{'wider' if ratio > 1 else 'narrower'}: {ratio:.2g} of {reference}'s")
    if not found and line["overlap"] < _OVERLAP and line["kl"] > 0.02:
        found.append(f"another shape: overlap {line['overlap']:.2g}")
    return "; ".join(found)
