"""Priors replaced by name: the posterior follows, misfits are refused, the fit remembers."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from bayesgen import rng
from bayesgen.inference import NUTS, prior_predictive
from bayesgen.inference.programs.complaints import ProgramError
from bayesgen.inference.programs.trace import trace
from bayesgen.models import GaussianMixture
from bayesgen.priors import with_priors

__all__: list[str] = []

Y = torch.tensor([28.0, 8.0, -3.0, 7.0], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0], dtype=torch.float64)


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def regression(y):
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(beta.sum() + weights[0], 1.0), obs=y)


def other_tau():
    return dist.HalfNormal(pyro.sample("tau_scale", dist.LogNormal(0.0, 1.0)))


def other_theta():
    """One hyperparameter for all schools, although the site lies inside their plate."""
    return dist.StudentT(4.0, pyro.sample("centre", dist.Normal(0.0, 3.0)), 2.0)


def schools_by_hand(y, sigma):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = pyro.sample("tau_scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("tau", dist.HalfNormal(scale))
    centre = pyro.sample("centre", dist.Normal(0.0, 3.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.StudentT(4.0, centre, 2.0))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


NEW = {"mu": dist.Normal(0.0, 1.0), "tau": other_tau, "theta": other_theta}


def test_the_density_is_that_of_the_program_written_so():
    new = with_priors(schools, NEW).check(Y, SIGMA)
    found, wanted = (
        trace(lambda m=m: m(Y, SIGMA), generator=rng.make_generator(0))
        for m in (new, schools_by_hand)
    )
    assert {s.name for s in found.layout.sites} == {s.name for s in wanted.layout.sites}
    assert found.layout.dims["centre"] == ()
    points = rng.standard_normal((5, wanted.num_params), rng.make_generator(1))
    values = wanted.constrain(points)
    mapped = torch.stack(
        [found.unconstrain({k: v[i] for k, v in values.items()}) for i in range(5)]
    )
    torch.testing.assert_close(found.value_and_grad(mapped)[0], wanted.value_and_grad(points)[0])


def test_replacing_twice_and_what_the_fit_remembers():
    twice = with_priors(with_priors(schools, {"mu": dist.Normal(0.0, 1.0)}), {"tau": other_tau})
    fit = NUTS(num_chains=2, num_samples=20, num_warmup=20).run(twice, (Y, SIGMA))
    assert fit.attrs["priors"] == {
        "mu": "Normal(loc=[0], scale=[1])",
        "tau": "callable other_tau",
    }
    assert "mu ~ Normal(loc=[0], scale=[1])" in str(fit.summary())
    assert "tau_scale" in fit.draws


def test_scalars_stand_for_every_entry_of_a_vector():
    new = with_priors(regression, {"beta": dist.Normal(0.0, 2.0)}).check(Y)
    density = trace(lambda: new(Y), generator=rng.make_generator(0))
    terms = density.terms(torch.zeros(density.num_params, dtype=torch.float64))
    assert terms["beta"] == pytest.approx(
        2 * float(dist.Normal(0.0, 2.0).log_prob(torch.zeros(())))
    )


BAD = [
    (
        schools,
        {"tau": dist.Normal(0.0, 1.0)},
        "prior of site 'tau': Normal has support Real(), but the site needs "
        "GreaterThanEq(lower_bound=0.0).",
    ),
    (
        schools,
        {"theta": dist.Normal(torch.zeros(3), 1.0)},
        "prior of site 'theta': Normal has batch shape (3,) and event shape (), but the site "
        "takes values of shape (4,): (4,) from its plates {'school': 4} and () of its own. Use "
        "scalar arguments, or one that is broadcast over the plates.",
    ),
    (
        regression,
        {"beta": dist.MultivariateNormal(torch.zeros(3), torch.eye(3))},
        "prior of site 'beta': MultivariateNormal has batch shape () and event shape (3,), but "
        "the site takes values of shape (2,): () from its plates (none) and (2,) of its own. Use "
        "scalar arguments, or .expand([2]).to_event(1).",
    ),
    (
        regression,
        {"weights": dist.Normal(torch.zeros(3), 1.0).to_event(1)},
        "prior of site 'weights': Independent has support IndependentConstraint(Real(), 1), but "
        "the site needs Simplex().",
    ),
    (
        schools,
        {"tua": dist.HalfNormal(1.0)},
        "priors name the site 'tua', which the program does not have; its latent sites are mu, "
        "tau, theta. Did you mean 'tau'?",
    ),
    (
        schools,
        {"y": dist.Normal(0.0, 1.0)},
        "site 'y' is observed or deterministic, so it has no prior to replace; its latent sites "
        "are mu, tau, theta.",
    ),
]


@pytest.mark.parametrize(("program", "priors", "message"), BAD)
def test_misfits_are_refused(program, priors, message):
    data = (Y, SIGMA) if program is schools else (Y,)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        with_priors(program, priors).check(*data)
    assert str(caught.value).startswith(message)
    with pytest.raises(ProgramError) as caught:
        NUTS(num_chains=2, num_samples=4, num_warmup=4).run(with_priors(program, priors), data)
    assert str(caught.value) == message


def test_what_is_no_prior_or_no_program():
    with pytest.raises(TypeError, match="prior of site 'mu': got float, but a prior is a Pyro"):
        with_priors(schools, {"mu": 1.0})
    with pytest.raises(TypeError, match=r"a Mixture takes its priors itself"):
        with_priors(GaussianMixture(2), {"weights": dist.Dirichlet(torch.ones(2))})
    with pytest.raises(TypeError, match="got int, but a program is a callable"):
        with_priors(3, {})
    with pytest.raises(TypeError, match="the callable returned float"):
        with_priors(schools, {"mu": lambda: 1.0}).check(Y, SIGMA)

    def without_arguments():
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))

    with pytest.raises(ValueError, match="Normal has support"):  # at once: nothing is missing
        with_priors(without_arguments, {"scale": dist.Normal(0.0, 1.0)})


def test_a_narrower_support_is_allowed():
    with_priors(schools, {"mu": dist.HalfNormal(1.0), "tau": dist.Uniform(1.0, 2.0)}).check(
        Y, SIGMA
    )


# ---------------------------------------------------------------- prior predictive
def test_prior_predictive_moments():
    draws = prior_predictive(with_priors(schools, NEW), (Y, SIGMA), num_samples=1000, seed=2)
    assert draws.predictive["y"].shape == (1, 1000, 4)
    assert set(draws.prior) == {"mu", "tau_scale", "tau", "centre", "theta"}
    assert draws.prior["mu"].dtype == torch.float64
    # Var(y) = Var(noise) + Var(Student) + Var(centre); 4 standard errors of its mean
    y = draws.predictive["y"][0]
    error = y.std(0) / 1000**0.5
    assert bool((y.mean(0).abs() < 4 * error).all())
    spread = (SIGMA**2 + 4 * 2 + 9).sqrt()
    assert bool(((y.std(0) / spread - 1).abs() < 4 / 2000**0.5).all())
    again = prior_predictive(with_priors(schools, NEW), (Y, SIGMA), num_samples=1000, seed=2)
    assert torch.equal(again.prior["mu"], draws.prior["mu"])
    assert draws.plot().axes


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(ProgramError, match=r"site 'beta' has a flat prior.*with_priors"):
        prior_predictive(regression, (Y,))

    def weighed():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("tilt", -loc)

    with pytest.raises(ProgramError, match="pyro.factor 'tilt' weighs the prior"):
        prior_predictive(weighed)
