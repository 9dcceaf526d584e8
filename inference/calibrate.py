r"""Does an engine draw from the posterior of this very program? Simulation-based calibration.

Parameters and data are drawn from the program itself, the engine fits each data set, and the truth
is ranked among its draws. All data sets are fitted in one run where the program can stand under
one more plate, else one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bayesgen import rng
from bayesgen.arviz_groups import import_arviz
from bayesgen.calibration import Ranks, rank_truth
from bayesgen.capabilities import Generative, Model, Pointwise, Program, Scored, Symmetric, require
from bayesgen.data import as_dataset
from bayesgen.fit import Fit
from bayesgen.gaps import entries
from bayesgen.inference.programs.program import arguments, bound_program
from bayesgen.inference.programs.sites import Layout, discover
from bayesgen.predictive import PriorPredictive, program_prior, sample_prior
from bayesgen.replay import Forwards, is_data, log_priors, quietly
from bayesgen.verdict import is_markov

__all__ = ["calibrate_engine"]

_DRAWS = 199  # at most, that a truth is ranked among
_FEWEST = 19
_CHECKED = 40  # entries whose effective sample size is looked at
_TRIAL = 3  # data sets on which the batched program is compared with single ones

Tensors = Mapping[str, Tensor]


class _Engine(Protocol):
    """Whatever fits a model to data."""

    def run(self, model: Any, data: object = None, *, seed: int = 0) -> Fit: ...


def calibrate_engine(
    program: Callable[..., Any] | Model,
    data: object,
    engine: _Engine,
    *,
    num_simulations: int = 100,
    num_draws: int | None = None,
    batched: str | bool = "auto",
    seed: int = 0,
) -> Ranks:
    r"""Simulation-based calibration of an engine on a program or model.

    .. math:: \theta \sim p(\theta), \quad y \sim p(y \mid \theta), \quad
        \theta_1, \dots, \theta_L \sim \text{engine}(y), \qquad
        \#\{l : f(\theta_l, y) < f(\theta, y)\} \sim \mathrm{Uniform}(0, \dots, L)

    Ranked are every entry of every continuous latent site (the invariants of a model with a
    symmetry), and the log likelihood, which feels errors that no parameter does. Draws of Markov
    chains are thinned to their effective number.

    With ``batched`` the engine sees one program whose outermost plate holds all simulations, and
    fits it once: fast for many simulations of a small model. It is used only if the density of
    that program is the sum of the single ones.

    References:
        Talts, Betancourt, Simpson, Vehtari, Gelman (2018), Validating Bayesian inference
        algorithms with simulation-based calibration.
        Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman, Vehtari (2023), Simulation-based
        calibration checking for Bayesian computation: the choice of test quantities shapes
        sensitivity.

    Args:
        program: Any callable that calls ``pyro.sample``, or a model whose priors are given.
        data: As for the engine's ``run``; observed values give the shapes alone.
        engine: Any engine.
        num_simulations: Data sets.
        num_draws: Draws that a truth is ranked among; by default as many as are effectively
            independent, at most 199.
        batched: ``"auto"``, True (raise where it is not possible) or False.
        seed: Of everything.

    Raises:
        ValueError: A flat prior; a default prior that is scaled to the data; chains that mix too
            slowly to leave 19 draws; or a program that cannot be batched as asked.

    Example:
        >>> import pyro.distributions as dist
        >>> from bayesgen.inference import SVI
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> ranks = calibrate_engine(model, torch.zeros(5), SVI(), num_simulations=40)
        >>> sorted(ranks.ranks)
        ['loc', 'log_likelihood']
    """
    if num_simulations < 2:
        raise ValueError(f"num_simulations={num_simulations}, but at least 2 are needed.")
    if isinstance(program, Model):
        results = _models(program, data, engine, num_simulations, seed)
    else:
        results = _programs(program, data, engine, num_simulations, batched, seed)
    count = _independent(results) if num_draws is None else num_draws
    truth, drawn = results.truth, {}
    for name, value in results.drawn.items():
        flat = value.flatten(0, 1)
        index = np.linspace(0, len(flat) - 1, count).round().astype(int)
        if len(np.unique(index)) < count:
            raise ValueError(f"num_draws={count}, but the engine gives {len(flat)} draws.")
        drawn[name] = flat[index]
    return rank_truth(truth, drawn, generator=rng.make_generator(seed), seed=seed)


class _Results(NamedTuple):
    """Scalar quantities at the truth ``(s,)``, and under every draw ``(chain, draw, s)``."""

    truth: dict[str, Tensor]
    drawn: dict[str, Tensor]
    is_markov: bool


def _independent(results: _Results) -> int:
    """As many draws as are nearly independent in nine of ten entries."""
    first = next(iter(results.drawn.values()))
    total = first.shape[0] * first.shape[1]
    if not results.is_markov:
        return min(_DRAWS, total)
    entries = [(name, k) for name in results.drawn for k in range(first.shape[2])]
    picked = np.linspace(0, len(entries) - 1, min(_CHECKED, len(entries))).round().astype(int)
    arviz = import_arviz()
    sizes = [
        float(arviz.ess(results.drawn[entries[i][0]][..., entries[i][1]].cpu().numpy()))
        for i in picked
    ]
    count = int(min(_DRAWS, total, np.nanquantile(sizes, 0.1)))
    if count < _FEWEST:
        raise ValueError(
            f"only {count} of {total} draws are effectively independent, and a rank among fewer "
            f"than {_FEWEST} says little: give the engine more draws."
        )
    return count


# ---------------------------------------------------------------- plain programs
def _programs(
    program: Callable[..., Any],
    data: object,
    engine: _Engine,
    count: int,
    batched: str | bool,
    seed: int,
) -> _Results:
    dtype = getattr(engine, "dtype", torch.float64)
    device = torch.device(getattr(engine, "device", "cpu"))
    run = bound_program(program, arguments(program, data, dtype=dtype, device=device))
    layout = discover(run, dtype=dtype, generator=rng.make_generator(0, device))
    prior = program_prior(run, num_samples=count, seed=seed, dtype=dtype, device=device)
    if batched in (True, "auto"):
        trial = _agree(layout, prior)
        if trial:
            return _at_once(layout, prior, engine, count, seed)
        if batched is True:
            raise ValueError(
                "the program cannot stand under one more plate: its log density there is not the "
                "sum of those of single data sets. Index from the right (x[..., k], sum(-1)), or "
                "say batched=False."
            )
    return _one_by_one(layout, prior, engine, count, seed)


class _Data(Messenger):
    """Other data in place of the observed ones; ``(s, *shape)`` under one more plate."""

    def __init__(self, values: Tensors, nesting: int | None = None) -> None:
        super().__init__()
        self.values, self.nesting = values, nesting

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] not in self.values or not is_data(msg):
            return
        value, seen = self.values[msg["name"]], entries(msg)
        if seen is not None:
            if self.nesting is not None:
                raise NotImplementedError("one pattern of missing data for each data set")
            value = seen.into(value, msg["value"], msg["fn"].event_dim)
        if self.nesting is not None:
            missing = self.nesting - (value.ndim - 1 - msg["fn"].event_dim)
            value = value.reshape(len(value), *[1] * missing, *value.shape[1:])
        msg["value"] = value


def _batch(layout: Layout, values: Tensors) -> Callable[[], Any]:
    """The program under a plate of data sets."""
    size, nesting = len(next(iter(values.values()))), layout.max_plate_nesting

    def simulations() -> Any:
        with _Data(values, nesting), pyro.plate("simulation", size, dim=-1 - nesting):
            return layout.run()

    return simulations


def _single(layout: Layout, values: Tensors) -> Callable[[], Any]:
    def simulation() -> Any:
        with _Data(values):
            return layout.run()

    return simulation


def _agree(layout: Layout, prior: PriorPredictive) -> bool:
    """Whether the batched density is the sum of the single ones, at draws from the prior."""
    few = {name: value[0, :_TRIAL] for name, value in prior.prior.items()}
    data = {name: value[0, :_TRIAL] for name, value in prior.predictive.items()}

    def total(run: Callable[[], Any], values: Tensors) -> float:
        with quietly(layout.dtype), torch.no_grad(), Forwards(values, keep_observed=True):
            return float(poutine.trace(run).get_trace().log_prob_sum())

    names = [site.name for site in layout.sites] + list(layout.enumerated)
    try:
        wide = {name: _widened(layout, name, few[name]) for name in names}
        found = total(_batch(layout, data), wide)
        single = [
            total(
                _single(layout, {k: v[i] for k, v in data.items()}),
                {name: few[name][i] for name in names},
            )
            for i in range(_TRIAL)
        ]
    except (RuntimeError, ValueError, IndexError, NotImplementedError):
        return False
    return math.isclose(found, sum(single), rel_tol=1e-6, abs_tol=1e-6)


def _widened(layout: Layout, name: str, value: Tensor) -> Tensor:
    """Values ``(s, *shape)`` as the batched program has them: plates that a site lacks are one."""
    plates = [dim for dim in layout.dims.get(name, ()) if not dim.startswith(f"{name}_dim_")]
    missing = layout.max_plate_nesting - len(plates)
    return value.reshape(len(value), *[1] * missing, *value.shape[1:])


def _at_once(
    layout: Layout, prior: PriorPredictive, engine: _Engine, count: int, seed: int
) -> _Results:
    data = {name: value[0] for name, value in prior.predictive.items()}
    fit = engine.run(_batch(layout, data), None, seed=seed)
    model = require(fit.model, Pointwise, "calibrate_engine")
    truth: dict[str, Tensor] = {}
    drawn: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for site in layout.sites:
        own = prior.prior[site.name][0]
        lead = fit.draws[site.name].shape[:2]
        truth |= _entries(site.name, own, 1)
        drawn |= _entries(site.name, fit.draws[site.name].reshape(*lead, count, *site.shape), 3)
        values[site.name] = own.reshape(1, 1, *fit.draws[site.name].shape[2:])
    for name, inputs in (("truth", values), ("draws", dict(fit.draws))):
        parts = model.log_likelihood(inputs)
        score = sum(v.reshape(*v.shape[:2], count, -1).sum(-1) for v in parts.values())
        assert isinstance(score, Tensor)
        if name == "truth":
            truth["log_likelihood"] = score[0, 0]
        else:
            drawn["log_likelihood"] = score
    return _Results(truth, drawn, is_markov(fit))


def _one_by_one(
    layout: Layout, prior: PriorPredictive, engine: _Engine, count: int, seed: int
) -> _Results:
    truths: list[dict[str, Tensor]] = []
    draws: list[dict[str, Tensor]] = []
    seeds = rng.spawn(seed, count)
    for k in range(count):
        data = {name: value[0, k] for name, value in prior.predictive.items()}
        fit = engine.run(_single(layout, data), None, seed=seeds[k])
        model = require(fit.model, Pointwise, "calibrate_engine")
        own = {site.name: prior.prior[site.name][:, k : k + 1] for site in layout.sites}
        for values, kept in ((own, truths), (fit.draws, draws)):
            found: dict[str, Tensor] = {}
            for name in own:
                found |= _entries(name, values[name], 2)
            parts = model.log_likelihood(values)
            score = sum(v.reshape(*v.shape[:2], -1).sum(-1) for v in parts.values())
            assert isinstance(score, Tensor)
            kept.append({**found, "log_likelihood": score})
    return _stacked(truths, draws, is_markov(fit))


def _stacked(
    truths: list[dict[str, Tensor]], draws: list[dict[str, Tensor]], is_markov: bool
) -> _Results:
    shortest = min(next(iter(d.values())).shape[1] for d in draws)
    return _Results(
        {name: torch.stack([t[name][0, 0] for t in truths]) for name in truths[0]},
        {name: torch.stack([d[name][:, :shortest] for d in draws], -1) for name in draws[0]},
        is_markov,
    )


def _entries(name: str, value: Tensor, lead: int) -> dict[str, Tensor]:
    """Scalars by name, each of the leading dimensions."""
    if value.ndim == lead:
        return {name: value}
    return {
        f"{name}[{', '.join(map(str, index))}]": value[(..., *index)]
        for index in np.ndindex(*value.shape[lead:])
    }


# ---------------------------------------------------------------- models of ours
def _models(model: Model, data: object, engine: _Engine, count: int, seed: int) -> _Results:
    require(model, Generative, "calibrate_engine")
    rows = as_dataset(data)
    bound = model.bind(rows)
    prior = sample_prior(bound, rows, num_samples=count, seed=seed)
    simulated = prior.predictive["x"][0]
    _check_priors(model, bound, prior.prior, simulated[0])
    truths, draws, seeds = [], [], rng.spawn(seed, count)
    for k in range(count):
        fit = engine.run(model, simulated[k], seed=seeds[k])
        own = {name: value[:, k : k + 1] for name, value in prior.prior.items()}
        truths.append(_quantities(bound, own, simulated[k]))
        draws.append(_quantities(bound, fit.draws, simulated[k]))
    return _stacked(truths, draws, is_markov(fit))


def _check_priors(model: Model, bound: Model, draws: Tensors, rows: Tensor) -> None:
    """Refuse a prior that another data set changes."""
    other = model.bind(as_dataset(rows))
    few = {name: value[0, :_TRIAL] for name, value in draws.items()}

    def density(which: Model) -> Tensor:
        program = require(which, Program, "calibrate_engine")
        return torch.stack(list(log_priors(lambda: program.model(rows[:1]), few).values()))

    if not torch.allclose(density(bound), density(other)):
        raise ValueError(
            "the default priors of this model are scaled to the data, so data drawn from them "
            "would be fitted under other priors: give every prior, priors={...}."
        )


def _quantities(model: Model, draws: Tensors, rows: Tensor) -> dict[str, Tensor]:
    """Scalars ``(chain, draw)``: invariants or sites, and the log likelihood of the rows."""
    values = model.invariants(draws) if isinstance(model, Symmetric) else draws
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        found |= _entries(name, value, 2)
    if isinstance(model, Scored):
        lead = next(iter(draws.values())).shape[:2]
        flat = {name: value.flatten(0, 1) for name, value in draws.items()}
        found["log_likelihood"] = model.log_prob(rows, flat).sum(-1).unflatten(0, lead)
    return found
