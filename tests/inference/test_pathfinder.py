"""Pathfinder: the BFGS recursion, normal laws, and starts where there is mass."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesgen import rng
from bayesgen.inference import NUTS, ManyChains
from bayesgen.inference.hamiltonian import pathfinder
from bayesgen.inference.hamiltonian.pathfinder import ascend, laws_of

__all__: list[str] = []


def quadratic(points):
    """A normal law with correlations of 0.9 and scales from 0.1 to 10, moved to 3."""
    scale = torch.logspace(-1, 1, 5, dtype=torch.float64)
    covariance = (0.9 + 0.1 * torch.eye(5, dtype=torch.float64)) * scale * scale[:, None]
    precision = torch.linalg.inv(covariance)
    off = points - 3.0
    gradient = -off @ precision
    return 0.5 * (off * gradient).sum(-1), gradient


@pytest.fixture(scope="module")
def path():
    start = 5.0 * rng.standard_normal((3, 5), rng.make_generator(0))
    return ascend(quadratic, start)


def test_the_mode_is_found(path):
    torch.testing.assert_close(
        path.points[-1], torch.full((3, 5), 3.0).double(), atol=1e-3, rtol=0
    )
    assert bool((path.lp.diff(dim=0) >= 0).all())


def dense(path, t, chain):
    """The inverse Hessian by the textbook's recursion, one pair after the other."""
    found = path.diagonal[t, chain].diag()
    for s, y in zip(path.moves[t, chain], path.slopes[t, chain], strict=True):
        if bool((s == 0).all()):
            continue
        left = torch.eye(5).double() - s[:, None] * y / (s @ y)
        found = left @ found @ left.T + s[:, None] * s / (s @ y)
    return found


def test_laws_are_those_of_the_recursion(path):
    laws, chains = laws_of(path), path.lp.shape[1]
    for t in (0, 1, 3, len(path.lp) - 1):
        k = t * chains + 1
        covariance = dense(path, t, 1)
        mean = path.points[t, 1] + covariance @ path.gradients[t, 1]
        law = type(laws)(*(v[k : k + 1] for v in laws))
        torch.testing.assert_close(law.mean[0], mean, rtol=1e-9, atol=1e-9)
        normal = rng.standard_normal((20_000, 1, 5), rng.make_generator(t))
        points, log_q = law.draw(normal)
        exact = dist.MultivariateNormal(mean, 0.5 * (covariance + covariance.T))
        torch.testing.assert_close(log_q[:, 0], exact.log_prob(points[:, 0]), rtol=1e-7, atol=1e-7)
        scale = covariance.diagonal().sqrt()
        off = (points[:, 0].T.cov() - covariance) / scale / scale[:, None]
        assert float(off.abs().max()) < 0.06
    # the diagonal alone would not do
    wrong = (path.diagonal[t, 1].diag() - covariance) / scale / scale[:, None]
    assert float(wrong.abs().max()) > 0.06


def modes(weight):
    """Two narrow modes at -1 and 1; the second holds ``weight`` of the mass."""

    def model():
        with pyro.poutine.mask(mask=False):
            x = pyro.sample("x", dist.Normal(0.0, 5.0))
        first = math.log1p(-weight) - 32.0 * (x + 1.0) ** 2
        pyro.factor("f", torch.logaddexp(first, math.log(weight) - 32.0 * (x - 1.0) ** 2))

    return model


@pytest.mark.parametrize("engine", [NUTS, ManyChains])
def test_a_mode_of_little_mass_holds_no_chain(engine):
    settings = {"num_chains": 16, "num_samples": 40, "num_warmup": 60}
    fit = engine(start="pathfinder", **settings).run(modes(1e-3), seed=1)
    assert float(fit.draws["x"].max()) < 0.5
    # from uniform starts some chains stay there
    fit = engine(**settings).run(modes(1e-3), seed=1)
    assert float(fit.draws["x"].max()) > 0.5


def test_two_modes_of_the_same_mass_are_both_started_from():
    def density(points):
        points = points.detach().clone().requires_grad_()
        with torch.enable_grad():
            lp = torch.logaddexp(-8 * (points + 1) ** 2, -8 * (points - 1) ** 2).sum(-1)
            return lp.detach(), torch.autograd.grad(lp.sum(), points)[0]

    generator = rng.make_generator(0)
    first = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]
    starts = pathfinder.pathfinder(density, first, 64, generator)
    assert 0.25 < float((starts > 0).double().mean()) < 0.75
    spread = np.asarray(starts.abs() - 1.0)
    assert abs(spread.mean()) < 0.15
    assert 0.15 < spread.std() < 0.35
    assert len(starts.unique()) == 64


def test_a_start_that_there_is_not():
    with pytest.raises(ValueError, match="start='zero', but it must be 'uniform'"):
        NUTS(start="zero")
    with pytest.raises(ValueError, match="start='zero', but it must be 'uniform'"):
        ManyChains(start="zero")
    with pytest.raises(ValueError, match="found no point"):
        pathfinder.pathfinder(
            lambda x: (torch.where(x[:, 0] == 0, 0.0, -torch.inf).double(), torch.ones_like(x)),
            torch.zeros(2, 1).double(),
            2,
            rng.make_generator(0),
        )
