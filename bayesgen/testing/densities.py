"""Checks of densities and samples, by integration and goodness of fit."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesgen import rng
from bayesgen.capabilities import Generative
from bayesgen.testing.cases import ModelCase, close, grid, log_prob, nodes, one, scored

__all__ = [
    "check_missing",
    "check_normalised",
    "check_pure",
    "check_rowwise",
    "check_sample_entropy",
    "check_samples",
    "check_shapes",
]

_NUM_SAMPLES = 4000
_P_VALUE = 1e-4  # a correct model fails a goodness-of-fit check less often than this


def check_shapes(case: ModelCase) -> None:
    """``log_prob`` is ``(*draw, n)`` for any draw dimensions, and agrees between them."""
    model, x, m = scored(case), case.x, case.num_draws
    flat = model.log_prob(x, case.draws)
    assert flat.shape == (m, len(x)), f"draws ({m},), {len(x)} rows: got {tuple(flat.shape)}"
    assert bool(flat.isfinite().all()), "log_prob of the training rows is not finite"
    nested = model.log_prob(x, {name: value[None, None] for name, value in case.draws.items()})
    assert nested.shape == (1, 1, m, len(x)), f"draws (1, 1, {m}): got {tuple(nested.shape)}"
    close(nested[0, 0], flat, "log_prob depends on how draws are batched")
    single = model.log_prob(x, {name: value[0] for name, value in case.draws.items()})
    assert single.shape == (len(x),), f"one draw: got {tuple(single.shape)}"
    close(single, flat[0], "log_prob of one draw differs from its batch")


def check_missing(case: ModelCase) -> None:
    """``NaN`` entries are integrated out: nothing observed has density one."""
    model, x = scored(case), case.x
    holes = x.clone()
    holes[0] = torch.nan
    holes[1, 0] = torch.nan
    scores = model.log_prob(holes, case.draws)
    assert bool(scores.isfinite().all()), "log_prob of rows with NaN is not finite"
    close(scores[:, 0], torch.zeros_like(scores[:, 0]), "a row of NaN must have log density 0")
    full = model.log_prob(x, case.draws)
    close(scores[:, 2:], full[:, 2:], "NaN in some rows changes the density of others")
    if case.data.num_columns == 1:
        return
    # Integrating the joint over a column must give the density with that column missing.
    points, weights = nodes(case, 0, 20_001)
    rows = x[1].expand(len(points), -1).clone()
    rows[:, 0] = points.to(x)
    draws = one(case.draws, 0)
    total = (log_prob(case, rows, draws)[0] + weights.log()).logsumexp(0)
    close(total, scores[0, 1].double(), "NaN is not the integral over the column", 1e-3)


def check_rowwise(case: ModelCase) -> None:
    """Each row's density is its own: it does not depend on the batch."""
    model, x = scored(case), case.x
    full = model.log_prob(x, case.draws)
    close(model.log_prob(x[1:2], case.draws), full[:, 1:2], "log_prob depends on the batch")
    close(model.log_prob(x.flip(0), case.draws).flip(-1), full, "log_prob depends on the order")
    alone = model.log_prob(x, one(case.draws, 1))
    close(alone, full[1:2], "log_prob depends on the other draws")
    assert model.log_prob(x[:0], case.draws).shape == (case.num_draws, 0), "no rows must be fine"


def check_pure(case: ModelCase) -> None:
    """``log_prob`` changes neither its arguments nor the global generators and Pyro's store."""
    import pyro

    x = case.x
    copy, draws = x.clone(), {name: value.clone() for name, value in case.draws.items()}
    before = torch.get_rng_state()
    scored(case).log_prob(x, case.draws)
    assert torch.equal(torch.get_rng_state(), before), "log_prob drew from the global generator"
    assert torch.equal(x, copy), "log_prob changed the rows"
    for name, value in case.draws.items():
        assert torch.equal(value, draws[name]), f"log_prob changed the draws of '{name}'"
    assert not list(pyro.get_param_store().keys()), "Pyro's global parameter store is not empty"


def check_normalised(case: ModelCase) -> None:
    """The density integrates to one (models of one or two columns)."""
    rows, weights = grid(case)
    for index in range(2):
        scores = log_prob(case, rows, one(case.draws, index))[0]
        total = float((scores + weights.log()).logsumexp(0).exp())
        assert abs(total - 1.0) < 2e-3, f"draw {index}: the density integrates to {total:.5f}"


def _samples(case: ModelCase, index: int, seed: int) -> Tensor:
    assert isinstance(case.model, Generative)
    one = {
        name: value[index].expand(_NUM_SAMPLES, *value.shape[1:])
        for name, value in case.draws.items()
    }
    device = next(iter(case.draws.values())).device
    rows = case.model.sample(one, generator=rng.make_generator(seed, device))
    assert rows.shape == (_NUM_SAMPLES, case.data.num_columns), f"sample: {tuple(rows.shape)}"
    return rows


def check_samples(case: ModelCase) -> None:
    """Samples of each column follow its marginal density; the same generator gives the same."""
    from scipy import stats

    assert torch.equal(_samples(case, 0, 0), _samples(case, 0, 0)), "same seed, other samples"
    rows, draws = _samples(case, 0, 1), one(case.draws, 0)
    for column, name in enumerate(case.data.columns):
        points, weights = nodes(case, column, 20_001)
        holes = torch.full((len(points), case.data.num_columns), torch.nan, dtype=torch.float64)
        holes = holes.to(points.device)
        holes[:, column] = points
        mass = (log_prob(case, holes, draws)[0] + weights.log()).exp().cpu().numpy()
        drawn = rows[:, column].double().cpu().numpy()
        if case.data.kinds[column] == "real":
            cumulative = np.cumsum(mass) - 0.5 * mass
            known = points.cpu().numpy()
            p_value = stats.kstest(drawn, partial(np.interp, xp=known, fp=cumulative)).pvalue
        else:
            p_value = _count_test(drawn, mass)
        assert p_value > _P_VALUE, f"samples of '{name}' do not follow log_prob: p = {p_value:.1e}"


def _count_test(drawn: np.ndarray[Any, Any], mass: np.ndarray[Any, Any]) -> float:
    """Chi-squared test of counts, cells of little expectation merged."""
    from scipy import stats

    counts = np.bincount(drawn.astype(int), minlength=len(mass))[: len(mass)].astype(float)
    expected = mass * len(drawn)
    keep = expected >= 5
    observed = np.append(counts[keep], len(drawn) - counts[keep].sum())
    wanted = np.append(expected[keep], len(drawn) - expected[keep].sum())
    if wanted[-1] < 1e-6 * len(drawn):
        if observed[-1] > 0:
            return 0.0
        observed, wanted = observed[:-1], wanted[:-1]
    if len(wanted) == 1:
        return 1.0
    return float(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


def check_sample_entropy(case: ModelCase) -> None:
    """The mean log density of samples is minus the entropy: their columns depend rightly."""
    draws = one(case.draws, 0)
    rows, weights = grid(case)
    density = log_prob(case, rows, draws)[0]
    terms = torch.where(density > -700, density * density.exp() * weights, 0.0)
    expected = float(terms.sum())
    scores = log_prob(case, _samples(case, 0, 2), draws)[0]
    error = float(scores.std()) / math.sqrt(len(scores)) + 1e-3
    z = (float(scores.mean()) - expected) / error
    found = float(scores.mean())
    assert abs(z) < 4.5, f"mean log density of samples {found:.4f}, not {expected:.4f}"
