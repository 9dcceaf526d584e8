"""Linear and logistic regressions: one program, many designs."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from tests.posteriordb.priors import flat, flat_positive

__all__ = ["DESIGNS", "dogs", "kilpisjarvi", "regression", "regression_half_cauchy", "sblrc"]


def _linear(y, x, beta, sigma):
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def regression(y, x):
    """All flat."""
    _linear(y, x, pyro.sample("beta", flat(x.shape[1])), pyro.sample("sigma", flat_positive()))


def regression_half_cauchy(y, x):
    """Flat coefficients, half-Cauchy scale."""
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    _linear(y, x, pyro.sample("beta", flat(x.shape[1])), sigma)


def sblrc(y, X, **_):
    """Normal coefficients, half-normal scale, no intercept."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(X.shape[1]), 10.0).to_event(1))
    _linear(y, X, beta, pyro.sample("sigma", dist.HalfNormal(10.0)))


def kilpisjarvi(x, y, pmualpha, psalpha, pmubeta, psbeta, **_):
    """Summer temperatures by calendar year: intercept and slope are nearly collinear."""
    alpha = pyro.sample("alpha", dist.Normal(pmualpha, psalpha))
    beta = pyro.sample("beta", dist.Normal(pmubeta, psbeta))
    sigma = pyro.sample("sigma", flat_positive())
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


def dogs(y, **_):
    """Dogs learn from avoidances and from shocks (y = 1), so far."""
    y = y.double()
    so_far = (y.cumsum(1) - y, (1 - y).cumsum(1) - (1 - y))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 100.0).to_event(1))
    logits = beta[0] + beta[1] * so_far[1] + beta[2] * so_far[0]
    with pyro.plate("dog", y.shape[0], dim=-2), pyro.plate("trial", y.shape[1], dim=-1):
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def _kid(*columns):
    def design(data):
        score = data["kid_score"].double()
        return score, torch.stack([torch.ones_like(score), *(c(data) for c in columns)], 1)

    return design


def _column(name, shift=lambda v: 0.0, scale=lambda v: 1.0):
    def column(data):
        value = data[name].double()
        return (value - shift(value)) / scale(value)

    return column


def _product(left, right):
    return lambda data: left(data) * right(data)


def _interaction(left, right):
    return _kid(left, right, _product(left, right))


def _is(name, level):
    return lambda data: (data[name] == level).double()


def _earnings(transform, *names):
    def design(data):
        y = transform(data["earn"].double())
        return y, torch.stack([torch.ones_like(y), *(data[n].double() for n in names)], 1)

    return design


def _nes(data):
    y = data["partyid7"].double()
    ages = [(data["age_discrete"] == k).double() for k in (2, 3, 4)]
    first = [data[n].double() for n in ("real_ideo", "race_adj")]
    last = [data[n].double() for n in ("educ1", "gender", "income")]
    return y, torch.stack([torch.ones_like(y), *first, *ages, *last], 1)


HS, IQ = _column("mom_hs"), _column("mom_iq")
MEAN, TWO_SD = torch.mean, lambda v: 2 * v.std()

DESIGNS = {
    "kidiq-kidscore_momhs": (regression_half_cauchy, _kid(HS)),
    "kidiq-kidscore_momiq": (regression_half_cauchy, _kid(IQ)),
    "kidiq-kidscore_momhsiq": (regression_half_cauchy, _kid(HS, IQ)),
    "kidiq-kidscore_interaction": (regression_half_cauchy, _interaction(HS, IQ)),
    "kidiq_with_mom_work-kidscore_interaction_c": (
        regression,
        _interaction(_column("mom_hs", MEAN), _column("mom_iq", MEAN)),
    ),
    "kidiq_with_mom_work-kidscore_interaction_c2": (
        regression,
        _interaction(_column("mom_hs", lambda v: 0.5), _column("mom_iq", lambda v: 100.0)),
    ),
    "kidiq_with_mom_work-kidscore_interaction_z": (
        regression,
        _interaction(_column("mom_hs", MEAN, TWO_SD), _column("mom_iq", MEAN, TWO_SD)),
    ),
    "kidiq_with_mom_work-kidscore_mom_work": (
        regression,
        _kid(*(_is("mom_work", level) for level in (2, 3, 4))),
    ),
    "earnings-earn_height": (regression, _earnings(lambda y: y, "height")),
    "earnings-log10earn_height": (regression, _earnings(torch.log10, "height")),
    "earnings-logearn_height": (regression, _earnings(torch.log, "height")),
    "earnings-logearn_height_male": (regression, _earnings(torch.log, "height", "male")),
    **{f"nes{year}-nes": (regression, _nes) for year in (1972, 1976, 1980, 1984, 1988)},
}
"""Name: program, and its response and design matrix from the data."""
