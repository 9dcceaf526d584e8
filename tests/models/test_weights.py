"""The conjugate blocks of mixture weights against closed forms, quadrature and Monte Carlo."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, special, stats

from bayesgen.models.families.mixing import Mixing
from bayesgen.models.families.weights import DirichletBlock
from bayesgen.priors import GammaDirichlet, StickBreaking, SymmetricDirichlet

__all__: list[str] = []

CPU, MANY = torch.device("cpu"), 20_000
COUNT = torch.tensor([12.0, 0.0, 3.0, 1.0], dtype=torch.float64)
PRIORS = {
    "symmetric": SymmetricDirichlet(0.3),
    "dirichlet": dist.Dirichlet(torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)),
    "gamma": GammaDirichlet(1.5, 4.0),
    "stick": StickBreaking(1.7),
    "stick learned": StickBreaking(shape=2.0, rate=1.5),
}
FIXED = ("symmetric", "dirichlet", "stick")


def make(name, num_components=4):
    return Mixing(num_components, PRIORS[name]).block(CPU)


def close(left, right, tolerance=1e-10):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def wide(count, num=MANY):
    return {"count": count.expand(num, *count.shape)}


def inner(message, count):
    return (message["log_weights"] * count).sum(-1)


# ------------------------------------------------------------------ closed forms
@pytest.mark.parametrize("name", FIXED)
def test_the_bound_is_the_evidence(name):
    block = make(name)
    posterior = block.update({"count": COUNT})
    bound = inner(block.message(posterior), COUNT) - block.kl(posterior)
    close(bound, block.log_evidence({"count": COUNT}, {}))


@pytest.mark.parametrize("name", ["symmetric", "dirichlet"])
def test_dirichlet_evidence_is_sequential_prediction(name):
    """The chance of one labelling is the product of its labels' chances one by one."""
    block = make(name)
    labels, seen, total = [0, 0, 3, 2, 0, 2], torch.zeros(4, dtype=torch.float64), 0.0
    for label in labels:
        total += float(block.log_mean(block.update({"count": seen}))[label])
        seen[label] += 1.0
    assert float(block.log_evidence({"count": seen}, {})) == pytest.approx(total)


def test_stick_breaking_evidence_is_sequential_prediction():
    block = make("stick")
    labels, seen, total = [0, 1, 0, 3, 2, 0, 2], torch.zeros(4, dtype=torch.float64), 0.0
    for label in labels:
        predictive = block.log_mean(block.update({"count": seen}))
        close(torch.logsumexp(predictive, -1), torch.zeros((), dtype=torch.float64))
        total += float(predictive[label])
        seen[label] += 1.0
    assert float(block.log_evidence({"count": seen}, {})) == pytest.approx(total)


@pytest.mark.parametrize("name", PRIORS)
def test_without_rows_the_posterior_is_the_prior(name):
    block = make(name)
    posterior = block.update({"count": torch.zeros(4, dtype=torch.float64)})
    if name in FIXED:
        close(block.kl(posterior), torch.zeros((), dtype=torch.float64))
    assert float(block.kl(posterior)) > -1e-10


# ------------------------------------------------------------------ draws and expectations
@pytest.mark.parametrize("name", PRIORS)
def test_samples_have_the_messages_expectation(name, generator):
    block = make(name)
    posterior = block.update({"count": COUNT})
    draws = block.sample(posterior, MANY, generator=generator)
    log_weights = draws["log_weights"]
    close(torch.logsumexp(log_weights, -1), torch.zeros(MANY, dtype=torch.float64))
    error = log_weights.std(0) / math.sqrt(MANY)
    z = (log_weights.mean(0) - block.message(posterior)["log_weights"]) / error
    assert float(z.abs().max()) < 4.5
    weights = log_weights.exp()
    z = weights.mean(0) - block.log_mean(posterior).exp()
    assert float((z / (weights.std(0) / math.sqrt(MANY))).abs().max()) < 4.5


@pytest.mark.parametrize("name", FIXED)
def test_gibbs_draws_are_of_the_posterior(name, generator):
    block = make(name)
    log_weights = block.draw(wide(COUNT), None, generator=generator)["log_weights"]
    expected = block.message(block.update({"count": COUNT}))["log_weights"]
    z = (log_weights.mean(0) - expected) / (log_weights.std(0) / math.sqrt(MANY))
    assert float(z.abs().max()) < 4.5


def _log_collapsed_gamma(log_e, count):
    """Gamma prior and labels' chance given the concentration, over its logarithm."""
    e, n, k = math.exp(log_e), count.sum(), len(count)
    value = stats.gamma(1.5, scale=1 / 4.0).logpdf(e) + log_e
    value += special.gammaln(k * e) - special.gammaln(k * e + n)
    return value + (special.gammaln(e + count) - special.gammaln(e)).sum()


def _log_collapsed_stick(log_alpha, count):
    alpha, after = math.exp(log_alpha), count.sum() - np.cumsum(count)
    value = stats.gamma(2.0, scale=1 / 1.5).logpdf(alpha) + log_alpha
    beta = special.betaln(1.0 + count[:-1], alpha + after[:-1]) - special.betaln(1.0, alpha)
    return value + beta.sum()


@pytest.mark.parametrize(
    ("name", "log_density"),
    [("gamma", _log_collapsed_gamma), ("stick learned", _log_collapsed_stick)],
)
def test_gibbs_draws_the_concentration(name, log_density, generator):
    """Many chains to equilibrium, against quadrature with the weights integrated out."""
    block, count = make(name), COUNT.numpy()
    moments = [
        integrate.quad(lambda t, p=p: t**p * math.exp(log_density(t, count)), -12, 5, limit=200)
        for p in (0, 1, 2)
    ]
    mean = moments[1][0] / moments[0][0]
    spread = math.sqrt(moments[2][0] / moments[0][0] - mean**2)
    values, statistics = None, wide(COUNT, 4000)
    for _ in range(30):
        values = block.draw(statistics, values, generator=generator)
    log_e = values["concentration"].log()
    assert abs(float(log_e.mean() - mean)) < 4.5 * spread / math.sqrt(4000)
    assert float(log_e.std()) == pytest.approx(spread, rel=0.1)
    evidence = block.log_evidence(statistics, values)
    own = _log_collapsed_gamma if name == "gamma" else _log_collapsed_stick
    prior = (1.5, 1 / 4.0) if name == "gamma" else (2.0, 1 / 1.5)
    e = float(values["concentration"][0])
    expected = own(math.log(e), count) - stats.gamma(prior[0], scale=prior[1]).logpdf(e)
    assert float(evidence[0]) == pytest.approx(expected - math.log(e))


# ------------------------------------------------------------------ KL and the bound
def test_gamma_dirichlet_kl_is_quadratures():
    """Two components: an integral over one weight, a sum over the grid."""
    block = make("gamma", 2)
    posterior = block.update({"count": torch.tensor([5.0, 2.0], dtype=torch.float64)})
    posterior = block.update({"count": torch.tensor([5.0, 2.0], dtype=torch.float64)}, posterior)
    q = stats.beta(*posterior["dirichlet"].tolist())
    mass, grid = posterior["log_grid"].exp().numpy(), block.grid.numpy()

    def integrand(w):
        log_p = stats.beta(grid, grid).logpdf(w)
        return q.pdf(w) * (q.logpdf(w) - (mass * log_p).sum())

    first = integrate.quad(integrand, 0, 1, limit=200)[0]
    second = (mass * (posterior["log_grid"] - block.log_grid_prior).numpy()).sum()
    assert float(block.kl(posterior)) == pytest.approx(first + second, abs=1e-7)


def test_stick_breaking_kl_is_the_expected_log_ratio(generator):
    block = make("stick learned")
    posterior = block.update({"count": COUNT})
    posterior = block.update({"count": COUNT}, posterior)
    draws = block.sample(posterior, MANY, generator=generator)
    v, alpha = draws["log_stick"].exp(), draws["concentration"]
    log_q = torch.distributions.Beta(posterior["stick_a"], posterior["stick_b"]).log_prob(v)
    hyper = torch.distributions.Gamma(posterior["hyper_shape"], posterior["hyper_rate"])
    log_p = torch.distributions.Beta(torch.ones_like(v), alpha.unsqueeze(-1)).log_prob(v)
    prior = torch.distributions.Gamma(torch.tensor(2.0), torch.tensor(1.5))
    ratio = (log_q - log_p).sum(-1) + hyper.log_prob(alpha) - prior.log_prob(alpha)
    z = (ratio.mean() - block.kl(posterior)) / (ratio.std() / math.sqrt(MANY))
    assert abs(float(z)) < 4.0


@pytest.mark.parametrize("name", ["gamma", "stick learned"])
def test_the_bound_climbs(name):
    block = make(name)
    posterior, bounds = block.update({"count": COUNT}), []
    for _ in range(60):
        bounds.append(float(inner(block.message(posterior), COUNT) - block.kl(posterior)))
        posterior = block.update({"count": COUNT}, posterior)
    steps = np.diff(bounds)
    assert steps.min() > -1e-10
    assert bounds[-1] > bounds[0] + 1e-6
    assert steps[-1] < 1e-8


@pytest.mark.parametrize("name", PRIORS)
def test_the_update_is_stationary(name):
    """At convergence the bound has no slope in any parameter of the posterior."""
    block = make(name)
    posterior = block.update({"count": COUNT})
    for _ in range(300):
        posterior = block.update({"count": COUNT}, posterior)
    free = {key: value.clone().requires_grad_() for key, value in posterior.items()}
    own = dict(free)
    if "log_grid" in own:
        own["log_grid"] = torch.log_softmax(own["log_grid"], -1)
    bound = inner(block.message(own), COUNT) - block.kl(own)
    for key, gradient in zip(free, torch.autograd.grad(bound, list(free.values())), strict=True):
        assert float(gradient.abs().max()) < 1e-7, key


# ------------------------------------------------------------------ the mode
def _height(block, name, logits, count, values):
    """Log prior and likelihood as a function of unconstrained weights."""
    if name.startswith("stick"):
        log_stick = torch.nn.functional.logsigmoid(logits)
        log_rest = torch.nn.functional.logsigmoid(-logits)
        own = {**values, **block._values(log_stick, log_rest)}
    else:
        own = {**values, "log_weights": torch.log_softmax(logits, -1)}
    return block.log_prior(own) + inner(own, count)


@pytest.mark.parametrize("name", PRIORS)
def test_maximise_is_the_optimum_of_its_basis(name):
    block = make(name)
    values = block.maximise({"count": COUNT})
    for _ in range(500):
        values = block.maximise({"count": COUNT}, values)
    if name.startswith("stick"):
        logits = values["log_stick"] - values["log_rest"]
    else:
        logits = values["log_weights"].clone()
    logits.requires_grad_()
    height = _height(block, name, logits, COUNT, values)
    (gradient,) = torch.autograd.grad(height, logits)
    assert float(gradient.abs().max()) < 1e-8
    if "concentration" not in values:
        return
    for factor in (0.8, 1.25):
        other = {**values, "concentration": factor * values["concentration"]}
        assert float((_height(block, name, logits, COUNT, other) - height).detach()) < 0.0


@pytest.mark.parametrize("name", PRIORS)
def test_maximum_likelihood_is_the_share_of_rows(name):
    values = make(name).maximise({"count": COUNT}, flat=True)
    close(values["log_weights"].exp(), COUNT / COUNT.sum())
    assert bool(torch.isfinite(values["log_weights"]).all())


@pytest.mark.parametrize("name", ["symmetric", "dirichlet"])
def test_log_prior_is_the_density_in_the_softmax_basis(name):
    block = make(name)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    density = torch.distributions.Dirichlet(block.concentration).log_prob(weights)
    close(block.log_prior({"log_weights": weights.log()}), density + weights.log().sum())


@pytest.mark.parametrize("name", PRIORS)
def test_leading_dimensions_are_a_loop(name, generator):
    block = make(name)
    counts = torch.rand((2, 3, 4), generator=generator, dtype=torch.float64) * 10
    whole = block.update({"count": counts}, block.update({"count": counts}))
    mode = block.maximise({"count": counts}, block.maximise({"count": counts}))
    for i in range(2):
        for j in range(3):
            own = {"count": counts[i, j]}
            single = block.update(own, block.update(own))
            for key, value in single.items():
                close(whole[key][i, j], value)
            close(block.kl(whole)[i, j], block.kl(single))
            best = block.maximise(own, block.maximise(own))
            for key, value in best.items():
                close(mode[key][i, j], value)
            close(block.log_prior(mode)[i, j], block.log_prior(best))
            evidence = block.log_evidence({"count": counts}, mode)
            close(evidence[i, j], block.log_evidence(own, best))


# ------------------------------------------------------------------ mixing
def test_blocks_know_whether_labels_are_alike():
    assert make("symmetric").exchangeable
    assert make("gamma").exchangeable
    assert not make("dirichlet").exchangeable
    assert not make("stick").exchangeable
    assert DirichletBlock(torch.ones(3)).exchangeable


def test_weights_priors_that_do_not_fit():
    with pytest.raises(ValueError, match=r"shape"):
        Mixing(4, dist.Dirichlet(torch.ones(3)))
    with pytest.raises(ValueError, match=r"support"):
        Mixing(4, dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pytest.raises(TypeError, match=r"NUTS or SVI"):
        Mixing(4, lambda: dist.Dirichlet(torch.ones(4))).block(CPU)
