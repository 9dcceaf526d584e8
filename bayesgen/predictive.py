"""Data that a posterior or a prior predicts: replicated data sets, prior predictive draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesgen import rng, verbs
from bayesgen.capabilities import Generative, Model, Pointwise, Program, Simulated, require
from bayesgen.replay import data_of, draw_prior, log_priors, prior_sites, simulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesgen.data import Dataset
    from bayesgen.fit import Fit

__all__ = [
    "PriorPredictive",
    "log_prior",
    "observed",
    "program_prior",
    "replicated",
    "sample_prior",
]

_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True, eq=False)
class PriorPredictive:
    """What a model believes before it sees data: parameters, and a data set for each."""

    prior: Mapping[str, Tensor]
    """Latent and computed sites, ``(1, num_samples, *event)``."""
    predictive: Mapping[str, Tensor]
    """The sites that the data observe, ``(1, num_samples, *shape)``."""
    observed: Mapping[str, Tensor]
    """The data themselves, for comparison."""

    def plot(self) -> Figure:
        """Draw the data sets beside the data; see :func:`bayesgen.plots.predictive`."""
        from bayesgen import plots

        data = {name: value.flatten(0, 1) for name, value in self.predictive.items()}
        return plots.predictive(data, self.observed, label="prior")


def observed(fit: Fit) -> dict[str, Tensor]:
    """The data of a fit by site: a program's own, or the training rows as ``x (n, d)``."""
    if isinstance(fit.model, Pointwise):
        return dict(fit.model.observed)
    if fit.data is None or not fit.data.in_memory:
        raise ValueError("this fit does not hold its training data in memory.")
    return {"x": fit.data.tensor()}


def replicated(
    fit: Fit, num_replicates: int, *, num_rows: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Replicated data sets, each from one posterior draw, evenly spaced.

    Args:
        fit: A fit of a ``Generative`` model or of a plain program.
        num_replicates: Data sets of each chain.
        num_rows: Rows of each, for a model whose rows are exchangeable; those of the training data
            by default.
        seed: Of the replications.

    Returns:
        ``(chain, num_replicates, *shape)`` by observed site.
    """
    generator = rng.make_generator(seed, fit.device)
    index = torch.linspace(0, fit.num_draws - 1, num_replicates, device=fit.device).round().long()
    flat = verbs.flatten_draws({name: value[:, index] for name, value in fit.draws.items()})
    lead = (fit.num_chains, num_replicates)
    if isinstance(fit.model, Simulated):
        found = fit.model.replicate(flat, generator=generator)
        return {name: value.unflatten(0, lead) for name, value in found.items()}
    if num_rows is None:
        num_rows = len(observed(fit)["x"])
    return {"x": _rows(fit.model, flat, num_rows, generator).unflatten(0, lead)}


def _rows(
    model: Model, flat: Mapping[str, Tensor], num_rows: int, generator: torch.Generator
) -> Tensor:
    """``num_rows`` new rows for each of ``m`` draws: ``(m, num_rows, d)``."""
    generative = require(model, Generative, "posterior_predictive")
    total = len(next(iter(flat.values())))
    which = torch.arange(total, device=generator.device).repeat_interleave(num_rows)
    parts = [
        generative.sample(verbs.pick(flat, part), generator=generator)
        for part in which.split(_ROWS_AT_ONCE)
    ]
    return torch.cat(parts).reshape(total, num_rows, -1)


def sample_prior(
    model: Any,
    data: Dataset | None,
    *,
    num_samples: int = 500,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> PriorPredictive:
    """Draw parameters from the prior, and a data set for each.

    Args:
        model: A bound model, or a plain program with its data.
        data: The data of a model; a program holds its own.
        num_samples: Number of draws.
        seed: Of the draws.
        device: Where to compute.

    Raises:
        TypeError: The model is neither ``Simulated`` nor ``Program`` and ``Generative``.
        ValueError: A flat prior, which has no draws.
    """
    generator = rng.make_generator(seed, device)
    if isinstance(model, Simulated):
        draws, found = model.prior(num_samples, generator=generator)
        held = model.observed if isinstance(model, Pointwise) else {}
        return PriorPredictive(_one_chain(draws), _one_chain(found), held)
    rows = _training_rows(model, data)
    run = _program(model, rows)
    known = prior_sites(run)[0]
    wanted = [name for name in model.dims if name in known]
    draws = simulate(
        run, {}, wanted, num_runs=num_samples, generator=generator, keep_observed=True
    )
    found = {"x": _rows(model, draws, len(rows), generator)}
    return PriorPredictive(_one_chain(draws), _one_chain(found), {"x": rows})


def program_prior(
    run: Callable[[], Any],
    *,
    num_samples: int = 500,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> PriorPredictive:
    """The same of a plain program with its data, called without arguments."""
    generator = rng.make_generator(seed, device)
    draws, found = draw_prior(run, num_samples, generator=generator, dtype=dtype)
    return PriorPredictive(_one_chain(draws), _one_chain(found), data_of(run, dtype=dtype))


def _one_chain(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.unsqueeze(0) for name, value in values.items()}


def log_prior(fit: Fit) -> dict[str, Tensor]:
    """Log density of each latent site's prior at the draws of a fit, ``(chain, draw)`` by site.

    Raises:
        TypeError: The model has no Pyro program.
        ValueError: The draws lack a site of the program.
    """
    flat = verbs.flatten_draws(fit.draws)
    if isinstance(fit.model, Simulated):
        found = fit.model.log_prior(flat)
    else:
        found = log_priors(_program(fit.model, _training_rows(fit.model, fit.data)), flat)
    lead = (fit.num_chains, fit.num_draws)
    return {name: value.unflatten(0, lead) for name, value in found.items()}


def _training_rows(model: Any, data: Dataset | None) -> Tensor:
    require(model, Program, "the prior")
    if data is None or not data.in_memory:
        raise ValueError(
            "the prior of this model is scaled to its training data, which are not in memory: "
            "fit to a part of the rows."
        )
    return data.tensor()


def _program(model: Any, rows: Tensor) -> Any:
    """The program of one row: the prior is the same for one as for all."""
    program = require(model, Program, "the prior")
    return lambda: program.model(rows[:1])
