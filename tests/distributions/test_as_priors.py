"""Covariance priors inside Pyro programs: NUTS, SVI and autoguides against conjugate answers."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from bayesgen import rng
from bayesgen.distributions import (
    InverseWishart,
    InverseWishartCholesky,
    NormalInverseGamma,
    NormalInverseWishart,
    cholesky_factor,
)
from tests.distributions.cases import factor

F64 = torch.float64
GROUPS, ROWS, WIDTH = 2, 15, 2


@pytest.fixture
def rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(GROUPS, ROWS, WIDTH, dtype=F64, generator=generator)
    return noise @ factor(WIDTH, 5).mT + torch.tensor([1.0, -2.0], dtype=F64)


def prior() -> NormalInverseWishart:
    return NormalInverseWishart(0.0, 0.5, 5.0, torch.eye(WIDTH, dtype=F64))


def program(rows: Tensor):
    """One Gaussian for each group, both in one plate."""

    def model():
        with pyro.plate("group", GROUPS, dim=-2):
            with pyro.plate("one", 1, dim=-1):
                loc, scale_tril = NormalInverseWishart.unpack(pyro.sample("component", prior()))
            with pyro.plate("row", ROWS, dim=-1):
                pyro.sample("x", dist.MultivariateNormal(loc, scale_tril=scale_tril), obs=rows)

    return model


def posterior(rows: Tensor) -> NormalInverseWishart:
    centred = rows - rows.mean(1, keepdim=True)
    count = torch.full((GROUPS,), float(ROWS), dtype=F64)
    return prior().posterior(count, rows.mean(1), centred.mT @ centred)


def features(value: Tensor) -> Tensor:
    loc, scale_tril = NormalInverseWishart.unpack(value)
    matrix = scale_tril @ scale_tril.mT
    log_det = matrix.logdet().unsqueeze(-1)
    return torch.cat([loc, matrix.diagonal(dim1=-2, dim2=-1), matrix[..., :1, 1], log_det], -1)


def sample(model, num_samples: int, num_warmup: int) -> dict[str, Tensor]:
    with rng.fork(torch.Generator().manual_seed(1)):
        engine = MCMC(
            NUTS(model), num_samples=num_samples, warmup_steps=num_warmup, disable_progbar=True
        )
        engine.run()
    return engine.get_samples()


def largest_z(draws: Tensor, reference: Tensor) -> float:
    """Difference of means in Monte Carlo errors; ``draws`` are one chain, ``reference`` is iid."""
    size = effective_sample_size(draws.unsqueeze(0)).clamp(max=len(draws))
    error = (draws.var(0) / size + reference.var(0) / len(reference)).sqrt()
    return float(((draws.mean(0) - reference.mean(0)).abs() / error).max())


def test_nuts_reaches_the_conjugate_posterior(rows):
    draws = sample(program(rows), 300, 150)["component"].squeeze(2)
    exact = posterior(rows).sample((20_000,), generator=torch.Generator().manual_seed(2))
    assert draws.shape == (300, GROUPS, WIDTH, WIDTH + 1)
    assert largest_z(features(draws), features(exact)) < 4.5
    # The negative control: as many rows again, all at the mean, make another posterior.
    moved = posterior(rows).posterior(
        float(ROWS), rows.mean(1), torch.zeros(WIDTH, WIDTH).double()
    )
    other = moved.sample((20_000,), generator=torch.Generator().manual_seed(2))
    assert largest_z(features(draws), features(other)) > 4.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: InverseWishartCholesky(8.0, factor(2, 0)),
        lambda: InverseWishart(8.0, factor(2, 0)),
        lambda: NormalInverseGamma(torch.tensor([0.0, 1.0], dtype=F64), 1.0, 4.0, 2.0).to_event(1),
    ],
    ids=["factor", "matrix", "nig"],
)
def test_nuts_returns_the_prior_where_there_are_no_data(make):
    draws = sample(lambda: pyro.sample("value", make()), 250, 100)["value"]
    with rng.fork(torch.Generator().manual_seed(2)):
        exact = make().sample((20_000,))
    lower = torch.ones(draws.shape[1:]).tril().bool() if draws.shape[1:] == (2, 2) else ...
    assert largest_z(draws[:, lower], exact[:, lower]) < 4.5


def fit(guide_class, model, num_steps: int, **options):
    with rng.fork(torch.Generator().manual_seed(3)):
        guide = guide_class(model, **options)
        optimiser = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.03 ** (1.0 / num_steps)})
        loop = SVI(model, guide, optimiser, Trace_ELBO(num_particles=2, vectorize_particles=False))
        for _ in range(num_steps):
            loop.step()
        loss = torch.tensor([Trace_ELBO().loss(model, guide) for _ in range(200)], dtype=F64)
    return guide, -loss


@pytest.mark.parametrize(
    ("guide_class", "gap"),
    [(AutoNormal, 3.0), (AutoMultivariateNormal, 1.0), (AutoLowRankMultivariateNormal, 1.5)],
)
def test_autoguides_reach_the_evidence(rows, guide_class, gap):
    """The bound lies below the exact log evidence, and near it."""
    _, bound = fit(guide_class, program(rows), 400)
    evidence = posterior(rows).log_normalizer() - prior().log_normalizer()
    evidence = float((evidence - 0.5 * ROWS * WIDTH * math.log(2.0 * math.pi)).sum())
    error = float(bound.std()) / len(bound) ** 0.5
    assert evidence - gap < float(bound.mean()) < evidence + 4.0 * error
    pyro.clear_param_store()


def test_maximum_a_posteriori_is_the_mode_of_the_factor(rows):
    guide, _ = fit(AutoDelta, program(rows), 500)
    at = guide.median()["component"].squeeze(1).detach()
    pyro.clear_param_store()
    torch.testing.assert_close(at, posterior(rows).factor_mode, rtol=1e-2, atol=1e-2)


def test_param_with_the_constraint_learns_a_scale(rows):
    """A learnable Cholesky factor: maximum likelihood is the covariance of the rows."""
    x = rows[0]

    def model():
        scale_tril = pyro.param("L", torch.eye(WIDTH, dtype=F64), constraint=cholesky_factor)
        with pyro.plate("row", ROWS):
            pyro.sample("x", dist.MultivariateNormal(x.mean(0), scale_tril=scale_tril), obs=x)

    loop = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(300):
        loop.step()
    learnt = pyro.param("L").detach()
    pyro.clear_param_store()
    expected = (x - x.mean(0)).mT @ (x - x.mean(0)) / ROWS
    torch.testing.assert_close(learnt @ learnt.mT, expected, rtol=1e-3, atol=1e-3)
