"""Which of several models predicts new data best: PSIS-LOO, with the error of the difference."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesgen.arviz_groups import import_arviz
from bayesgen.capabilities import Pointwise, Scored, require
from bayesgen.fingerprint import tensor_bytes
from bayesgen.predictive import observed
from bayesgen.psis import smooth

if TYPE_CHECKING:
    import pandas as pd

    from bayesgen.fit import Fit

__all__ = ["Comparison", "LeaveOneOut", "compare", "leave_one_out", "named"]

_K_HAT = 0.7
_MIN_DRAWS = 100


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """Expected log density of each row given all others, estimated without refitting."""

    elpd: Tensor
    """``(n,)``, in nats."""
    k_hat: Tensor
    """``(n,)`` Pareto shapes: above 0.7 the estimate of a row is not to be trusted."""
    in_sample: Tensor
    """``(n,)`` log density of each row given all, itself included."""

    @property
    def total(self) -> float:
        """Sum over rows."""
        return float(self.elpd.sum())

    @property
    def standard_error(self) -> float:
        """Of the total, over rows."""
        return _error(self.elpd)

    @property
    def effective_parameters(self) -> float:
        """What the rows told about themselves."""
        return float((self.in_sample - self.elpd).sum())

    @property
    def num_bad(self) -> int:
        """Rows of ``k_hat`` above 0.7."""
        return int((~(self.k_hat <= _K_HAT)).sum())


@dataclass(frozen=True, eq=False)
class Comparison:
    """Models in order of their predictive density; ``print`` it."""

    table: pd.DataFrame
    """By name, best first: ``elpd``, ``se``, ``p_loo``, ``difference`` from the best, ``dse`` its
    standard error, ``bad_k`` the number of rows that cannot be trusted."""
    warnings: tuple[str, ...]
    loo: Mapping[str, LeaveOneOut]

    def __str__(self) -> str:
        text = self.table.to_string(float_format=lambda value: f"{value:.2f}")
        return "\n".join([text, *(f"  ! {warning}" for warning in self.warnings)])

    __repr__ = __str__


def leave_one_out(fit: Fit, *, efficiency: float | None = None) -> LeaveOneOut:
    r"""Leave-one-out cross-validation from one fit, by Pareto-smoothed importance sampling.

    .. math:: \widehat{\mathrm{elpd}} = \sum_i \log \sum_s w_{is}\, p(y_i \mid \theta_s),
        \qquad w_{is} \propto p(y_i \mid \theta_s)^{-1} \text{ smoothed}

    Rows must be exchangeable given the parameters: a plain program says so by a plate. Sites that
    share their plates are one row. Discrete latents are summed out.

    References:
        Vehtari, Gelman, Gabry (2017), Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC.

    Args:
        fit: A fit of at least 100 draws, whose data are in memory.
        efficiency: Effective sample size over the number of draws; by default that of the total
            log likelihood.

    Raises:
        TypeError: The model has no pointwise log density.
        ValueError: No exchangeable rows, or too few draws.
    """
    values = _pointwise(fit)
    num_draws = values.shape[0] * values.shape[1]
    if num_draws < _MIN_DRAWS:
        raise ValueError(
            f"leave-one-out needs at least {_MIN_DRAWS} draws, this fit has {num_draws}: sample "
            "more, or use an engine that gives draws."
        )
    if efficiency is None:
        efficiency = _efficiency(values.sum(-1))
    flat = values.flatten(0, 1)
    weights, k = smooth(-flat, efficiency=efficiency)
    elpd = (weights + flat).logsumexp(0)
    return LeaveOneOut(elpd, k, flat.logsumexp(0) - math.log(num_draws))


def _efficiency(total: Tensor) -> float:
    """Relative efficiency of draws ``(chain, draw)``, at most one."""
    if total.shape[0] == 1 or float(total.std()) == 0.0:
        return 1.0
    size = float(import_arviz().ess(total.cpu().numpy(), method="mean"))
    return min(1.0, max(size / total.numel(), 1e-3))


def _pointwise(fit: Fit) -> Tensor:
    """Log density of every row under every draw ``(chain, draw, n)``."""
    model = fit.model
    if not isinstance(model, Pointwise):
        require(model, Scored, "compare")
        if fit.data is None or not fit.data.in_memory:
            raise ValueError("leave-one-out scores the training rows, which are not in memory.")
        return fit.log_likelihood(fit.data).double()
    by_rows: dict[tuple[str, ...], Tensor] = {}
    for name, value in model.log_likelihood(fit.draws).items():
        lead = value.ndim - 2
        dims = tuple(model.dims.get(name, ("data",) * lead))[:lead]
        if lead == 0 or value[0, 0].numel() == 1:
            raise ValueError(
                f"the data of site '{name}' are one row: its values depend on each other, and "
                "none can be left out. Leave out the future instead, and score its predictions."
            )
        loose = [dim for dim in dims if dim.startswith(f"{name}_dim_")]
        if loose:
            raise ValueError(
                f"the rows of site '{name}' are in no plate, so nothing says that they are "
                f"exchangeable: write `with pyro.plate('data', {value.shape[2]}):` around it."
            )
        rows = value.double().flatten(2)
        by_rows[dims] = by_rows[dims] + rows if dims in by_rows else rows
    if not by_rows:
        raise ValueError(_no_rows(model))
    return torch.cat(list(by_rows.values()), -1)


def _no_rows(model: Pointwise) -> str:
    if model.observed:
        return (
            "leave-one-out needs the log density of each row, which hangs on local latents that "
            "are not among the draws: run SVI with local_latents=True."
        )
    return (
        "leave-one-out leaves rows of data out, but the program has none: no site is observed "
        "(pyro.sample(..., obs=values)), or it takes a random part of its rows by itself. A "
        "density added by pyro.factor has no rows: write it as the distribution of the data."
    )


def compare(*fits: Fit | Mapping[str, Fit], **more: Fit) -> Comparison:
    """Compare models of the same data by leave-one-out cross-validation, best first.

    A difference of less than about 4 nats, or of less than two standard errors, is no reason to
    choose.

    References:
        Sivula, Magnusson, Matamoros, Vehtari (2020), Uncertainty in Bayesian leave-one-out
        cross-validation based model comparison.

    Args:
        *fits: Fits, or one mapping of fits by name.
        **more: Fits by name: ``compare(pooled=a, hierarchical=b)``.

    Returns:
        The table, its warnings, and each fit's :class:`LeaveOneOut`.

    Raises:
        TypeError: A model without pointwise log density.
        ValueError: Fewer than two fits, different data, rows that are not exchangeable.

    Example:
        >>> from bayesgen.toys import UnitMixture, pretend
        >>> x = [[0.0], [0.1], [5.0], [5.1]]
        >>> found = compare(one=pretend(UnitMixture(1), x), two=pretend(UnitMixture(2), x))
        >>> list(found.table.index)
        ['two', 'one']
    """
    import pandas as pd

    chosen = named(fits, more, "compare")
    prints = {name: _fingerprint(fit) for name, fit in chosen.items()}
    first = next(iter(chosen))
    other = [name for name in chosen if prints[name] != prints[first]]
    if other:
        raise ValueError(
            f"'{other[0]}' was fitted to other data than '{first}' (other values, rows or units), "
            "so their densities cannot be compared: fit both to the same rows."
        )
    loo = {name: leave_one_out(fit) for name, fit in chosen.items()}
    order = sorted(loo, key=lambda name: -loo[name].total)
    best = loo[order[0]]
    table = pd.DataFrame(
        {
            name: {
                "elpd": loo[name].total,
                "se": loo[name].standard_error,
                "p_loo": loo[name].effective_parameters,
                "difference": loo[name].total - best.total,
                "dse": _error(loo[name].elpd - best.elpd),
                "bad_k": loo[name].num_bad,
            }
            for name in order
        }
    ).T.astype({"bad_k": int})
    return Comparison(table, tuple(_warnings(loo, chosen)), loo)


def named(
    fits: tuple[Fit | Mapping[str, Fit], ...], more: Mapping[str, Fit], who: str
) -> dict[str, Fit]:
    """Fits by name: given by name, in a mapping or a list, or called after their engines."""
    found: dict[str, Fit] = {}
    for item in fits:
        if isinstance(item, Mapping):
            found |= item
            continue
        for fit in item if isinstance(item, list | tuple) else [item]:
            base = str(fit.attrs.get("engine", "fit"))
            count = sum(name.partition(" ")[0] == base for name in found)
            found[base if not count else f"{base} {count + 1}"] = fit
    found |= more
    if len(found) < 2:
        raise ValueError(f"{who} compares at least two fits, got {list(found)}.")
    return found


def _fingerprint(fit: Fit) -> str:
    """Of the observed values, whatever their sites are called."""
    digest = hashlib.sha256()
    for _, value in sorted(observed(fit).items()):
        flat = value.detach().double().cpu()
        flat = flat.squeeze(-1) if flat.ndim == 2 and flat.shape[1] == 1 else flat
        digest.update(repr(tuple(flat.shape)).encode())
        digest.update(tensor_bytes(flat))
    return digest.hexdigest()


def _warnings(loo: Mapping[str, LeaveOneOut], fits: Mapping[str, Fit]) -> list[str]:
    found = [
        f"'{name}': k-hat is above {_K_HAT} for {value.num_bad} of {len(value.elpd)} rows, whose "
        "estimates are unreliable (too good): refit without these rows, or use a model that they "
        "do not surprise."
        for name, value in loo.items()
        if value.num_bad
    ]
    found += [
        f"'{name}': {fit.verdict().failures[0].message}"
        for name, fit in fits.items()
        if not fit.verdict()
    ]
    return found


def _error(values: Tensor) -> float:
    return float((len(values) * values.var(correction=0)).sqrt())
