"""The Gaussian mixture against closed forms, its predictive integrated, and its Pyro program."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats

from bayesgen import rng
from bayesgen.data import as_dataset
from bayesgen.distributions import InverseWishartCholesky, NormalInverseWishart
from bayesgen.inference import VB
from bayesgen.models import GaussianMixture
from bayesgen.priors import (
    GammaDirichlet,
    HierarchicalNormalInverseWishart,
    StickBreaking,
    SymmetricDirichlet,
)

__all__: list[str] = []


def tensor(value):
    return torch.as_tensor(value, dtype=torch.float64)


def niw(d, kappa=0.4, df=None, scale=1.3):
    return NormalInverseWishart(
        tensor(np.linspace(-0.5, 0.5, d)),
        tensor(kappa),
        tensor(d + 1.5 if df is None else df),
        scale * torch.eye(d, dtype=torch.float64),
    )


def rows(n, d, seed=0):
    r = np.random.default_rng(seed)
    return r.normal(size=(n, d)) @ (np.eye(d) + 0.3 * r.normal(size=(d, d))) + 1.0


# ------------------------------------------------------------------ one component: closed forms
@pytest.mark.parametrize("d", [1, 2, 4])
def test_one_component_is_conjugate(d):
    x, prior = rows(9, d), niw(d)
    fit = VB(num_samples=2).run(GaussianMixture(1, priors={"components": prior}), x)
    n, kappa0, df0 = len(x), 0.4, d + 1.5
    loc0, psi0 = prior.loc.numpy(), 1.3**2 * np.eye(d)
    mean, kappa, df = x.mean(0), kappa0 + n, df0 + n
    loc = (kappa0 * loc0 + n * mean) / kappa
    psi = psi0 + (x - mean).T @ (x - mean)
    psi = psi + kappa0 * n / kappa * np.outer(mean - loc0, mean - loc0)

    q = fit.posterior["components"]
    tril = q["scale_tril"][0].numpy()
    np.testing.assert_allclose(q["loc"][0].numpy() + fit.model.family.offset.numpy(), loc, 1e-10)
    np.testing.assert_allclose(tril @ tril.T, psi, rtol=1e-10, atol=1e-12)
    assert float(q["df"][0]) == pytest.approx(df, abs=1e-10)
    assert float(q["mean_precision"][0]) == pytest.approx(kappa, abs=1e-10)

    evidence = (
        special.multigammaln(df / 2, d)
        - special.multigammaln(df0 / 2, d)
        + df0 / 2 * np.linalg.slogdet(psi0)[1]
        - df / 2 * np.linalg.slogdet(psi)[1]
        + d / 2 * (math.log(kappa0 / kappa) - n * math.log(math.pi))
    )
    assert fit.attrs["elbo"] == pytest.approx(evidence, abs=1e-10)

    shape = psi * (kappa + 1) / (kappa * (df - d + 1))
    new = rows(5, d, seed=1)
    exact = stats.multivariate_t(loc, shape, df=df - d + 1).logpdf(new)
    np.testing.assert_allclose(fit.log_prob(new).numpy(), np.atleast_1d(exact), atol=1e-10)
    if d > 1:  # a missing entry: the marginal Student-t
        new[:, 0] = np.nan
        marginal = stats.multivariate_t(loc[1:], shape[1:, 1:], df=df - d + 1).logpdf(new[:, 1:])
        np.testing.assert_allclose(fit.log_prob(new).numpy(), marginal, atol=1e-10)


def test_one_component_with_learned_scale_is_below_the_evidence():
    x = rows(8, 1)
    prior = HierarchicalNormalInverseWishart(tensor([0.0]), 0.4, 3.0, 2.0, tensor([1.5]))
    fit = VB(num_samples=2).run(GaussianMixture(1, priors={"components": prior}), x)
    s = np.exp(np.linspace(-12, 6, 4000))
    log_prior = stats.gamma(2.0, scale=1 / 1.5).logpdf(s) + np.log(s) + math.log(18 / 3999)
    n, mean = len(x), x.mean()
    scatter = ((x - mean) ** 2).sum() + 0.4 * n / (0.4 + n) * mean**2
    log_evidence = (
        special.gammaln((3 + n) / 2)
        - special.gammaln(1.5)
        + 1.5 * np.log(s)
        - (3 + n) / 2 * np.log(s + scatter)
        + 0.5 * (math.log(0.4 / (0.4 + n)) - n * math.log(math.pi))
    )
    gap = special.logsumexp(log_evidence + log_prior) - fit.attrs["elbo"]
    assert 0.0 < gap < 0.3


# ------------------------------------------------------------------ the predictive is a density
def integral(log_density, centre, tril, df, num=200_000, seed=0):
    """Importance sampling from a wide Student-t, with its standard error."""
    d = len(centre)
    proposal = stats.multivariate_t(centre, tril @ tril.T, df=df)
    points = proposal.rvs(num, random_state=seed).reshape(num, d)
    ratio = np.exp(log_density(points) - proposal.logpdf(points))
    return ratio.mean(), ratio.std() / math.sqrt(num)


def test_the_predictive_integrates_to_one_where_scikit_learn_does_not():
    from sklearn.mixture import BayesianGaussianMixture

    d, n = 10, 200
    r = np.random.default_rng(3)
    x = r.normal(size=(n, d)) + 1.5 * r.integers(2, size=(n, 1))
    centre, tril = x.mean(0), 1.2 * np.linalg.cholesky(np.cov(x.T))
    fit = VB(num_samples=2).run(GaussianMixture(5), x)
    ours, error = integral(lambda p: fit.log_prob(p).numpy(), centre, tril, df=6)
    assert error < 0.0025
    assert ours == pytest.approx(1.0, abs=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = BayesianGaussianMixture(n_components=5, random_state=0, max_iter=2000).fit(x)
    theirs, _ = integral(peer.score_samples, centre, tril, df=6)
    assert 0.4 < theirs < 0.7


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
def test_the_predictive_integrates_to_one_in_one_dimension(covariance):
    x = np.concatenate([rows(20, 1), rows(20, 1, 4) + 6.0])
    fit = VB(num_samples=2).run(GaussianMixture(3, covariance), x)
    t = np.linspace(-25, 25, 200_001)
    density = fit.log_prob(np.sinh(t)[:, None]).exp().numpy()
    assert np.trapezoid(density * np.cosh(t), t) == pytest.approx(1.0, abs=1e-4)


# ------------------------------------------------------------------ the Pyro program
def trace_of(mixture, x, seed=0, num_rows=None):
    with rng.fork(rng.make_generator(seed)):
        return pyro.poutine.trace(mixture.model).get_trace(x, num_rows=num_rows)


def sites(trace):
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and name not in ("data", "components")
    }


WEIGHTS = {
    "dirichlet": SymmetricDirichlet(0.7),
    "gamma": GammaDirichlet(2.0, 3.0),
    "sticks": StickBreaking(1.3),
    "learned sticks": StickBreaking(shape=2.0, rate=1.5),
}


@pytest.mark.parametrize("covariance", ["full", "tied"])
@pytest.mark.parametrize("hierarchical", [False, True])
def test_program_density_is_prior_times_likelihood(covariance, hierarchical):
    x = tensor(rows(12, 2))
    prior = niw(2)
    if hierarchical:
        prior = HierarchicalNormalInverseWishart(prior.loc, 0.4, 3.5, 1.5, tensor([1.0, 2.0]))
    mixture = GaussianMixture(
        3, covariance, priors={"weights": SymmetricDirichlet(0.7), "components": prior}
    ).bind(as_dataset(x))
    trace = trace_of(mixture, x)
    values = sites(trace)
    total = float(trace.log_prob_sum())
    weights, loc, tril = values["weights"], values["loc"], values["scale_tril"]

    expected = float(dist.Dirichlet(tensor([0.7, 0.7, 0.7])).log_prob(weights))
    psi = torch.diag(values["column_scale"]) if hierarchical else 1.3**2 * torch.eye(2).double()
    if hierarchical:
        gamma = dist.Gamma(tensor(1.5), tensor([1.0, 2.0]))
        expected += float(gamma.log_prob(values["column_scale"]).sum())
    factors = tril.reshape(-1, 2, 2)
    for factor in factors:
        covariance_k = (factor @ factor.mT).numpy()
        expected += stats.invwishart(3.5, psi.numpy()).logpdf(covariance_k)
        # From the covariance to its Cholesky factor: 2^d prod_i L_ii^(d - i + 1).
        diagonal = factor.diagonal()
        expected += float(2 * math.log(2.0) + 2 * diagonal[0].log() + diagonal[1].log())
    each = factors.expand(3, 2, 2)
    for k in range(3):
        scaled = (each[k] @ each[k].mT).numpy() / 0.4
        expected += stats.multivariate_normal(niw(2).loc.numpy(), scaled).logpdf(loc[k].numpy())
    parts = [
        np.log(float(weights[k]))
        + stats.multivariate_normal(loc[k].numpy(), (each[k] @ each[k].mT).numpy()).logpdf(x)
        for k in range(3)
    ]
    expected += float(special.logsumexp(parts, axis=0).sum())
    assert total == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_program_agrees_with_the_blocks(name):
    """Up to the change of variables that each block's own basis makes."""
    x = tensor(rows(12, 2))
    mixture = GaussianMixture(3, priors={"weights": WEIGHTS[name], "components": niw(2)}).bind(
        as_dataset(x)
    )
    differences = []
    for seed in (0, 1):
        trace = trace_of(mixture, x, seed)
        values = sites(trace)
        weights = values.get("weights", trace.nodes.get("weights", {}).get("value"))
        likelihood = float(mixture.log_prob(x, {**values, "weights": weights}).sum())
        internal = {"log_weights": weights.log()}
        jacobian = -float(weights.log().sum())  # the block's softmax basis
        if "_sticks" in values:
            internal |= {
                "log_stick": values["_sticks"].log(),
                "log_rest": (-values["_sticks"]).log1p(),
            }
            jacobian = -float((values["_sticks"].log() + (-values["_sticks"]).log1p()).sum())
        if "concentration" in values:
            internal["concentration"] = values["concentration"]
            jacobian -= float(values["concentration"].log())
        prior = float(mixture.blocks["weights"].log_prior(internal)) + jacobian
        own = {"loc": values["loc"] - mixture.family.offset, "scale_tril": values["scale_tril"]}
        factor = values["scale_tril"]
        to_factor = float(
            (2 * math.log(2.0) + 2 * factor[:, 0, 0].log() + factor[:, 1, 1].log()).sum()
        )
        prior += float(mixture.blocks["components"].log_prior(own)) + to_factor
        differences.append(float(trace.log_prob_sum()) - likelihood - prior)
    if name == "gamma":
        # The block's concentration lives on a grid: equal up to its spacing.
        assert differences[0] == pytest.approx(differences[1], abs=0.5)
    elif "sticks" in name:
        assert differences[0] == pytest.approx(differences[1], abs=1e-8)
    else:
        assert differences == pytest.approx([0.0, 0.0], abs=1e-9)


def test_a_minibatch_is_scaled_to_the_whole():
    x = tensor(rows(12, 2))
    mixture = GaussianMixture(3).bind(as_dataset(x))
    whole = trace_of(mixture, x[:4], num_rows=12)
    part = trace_of(mixture, x[:4])
    prior = sum(
        float(site["log_prob_sum"])
        for site in (whole.compute_log_prob() or whole).nodes.values()
        if site["type"] == "sample" and not site["is_observed"]
    )
    likelihood = float(part.log_prob_sum()) - prior
    assert float(whole.log_prob_sum()) == pytest.approx(prior + 3.0 * likelihood, abs=1e-9)


@pytest.mark.parametrize("vectorise", [False, True])
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_svi_climbs(name, vectorise):
    x = tensor(np.concatenate([rows(20, 2), rows(20, 2, 1) + 5.0]))
    mixture = GaussianMixture(3, priors={"weights": WEIGHTS[name]}).bind(as_dataset(x))
    with rng.fork(rng.make_generator(0)), pyro.settings.context(module_local_params=True):
        guide = pyro.infer.autoguide.AutoNormal(mixture.model)
        elbo = pyro.infer.Trace_ELBO(
            num_particles=4, vectorize_particles=vectorise, max_plate_nesting=1
        )(mixture.model, guide)
        elbo(x[:20], num_rows=40)
        optimiser = torch.optim.Adam(elbo.parameters(), lr=0.03)
        losses = []
        for step in range(60):
            optimiser.zero_grad()
            loss = elbo(x[20 * (step % 2) :][:20], num_rows=40)
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
    pyro.clear_param_store()
    assert all(math.isfinite(loss) for loss in losses)
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def test_nuts_runs_on_the_program():
    x = tensor(np.concatenate([rows(10, 1), rows(10, 1, 1) + 6.0]))
    mixture = GaussianMixture(2, priors={"weights": SymmetricDirichlet(2.0)}).bind(as_dataset(x))
    with rng.fork(rng.make_generator(0)):
        kernel = pyro.infer.NUTS(mixture.model, max_tree_depth=5)
        mcmc = pyro.infer.MCMC(kernel, num_samples=25, warmup_steps=25, disable_progbar=True)
        mcmc.run(x)
        draws = mcmc.get_samples()
    assert bool(mixture.log_prob(x, draws).isfinite().all())


def test_priors_site_by_site():
    """Independent priors of locations, scales and weights, one of them a callable."""
    x = tensor(np.concatenate([rows(15, 1), rows(15, 1, 1) + 6.0]))

    def weights():
        concentration = pyro.sample("peak", dist.Gamma(tensor(4.0), tensor(2.0)))
        return dist.Dirichlet(concentration.unsqueeze(-1).expand(*concentration.shape, 2))

    priors = {
        "weights": weights,
        "loc": dist.Normal(tensor([0.0]), tensor([5.0])),
        "scale_tril": InverseWishartCholesky(tensor(3.0), torch.eye(1, dtype=torch.float64)),
    }
    mixture = GaussianMixture(2, priors=priors).bind(as_dataset(x))
    trace = trace_of(mixture, x)
    values = sites(trace)
    assert set(values) == {"peak", "weights", "loc", "scale_tril"}
    assert values["loc"].shape == (2, 1)
    assert values["scale_tril"].shape == (2, 1, 1)
    expected = float(dist.Gamma(tensor(4.0), tensor(2.0)).log_prob(values["peak"]))
    expected += float(dist.Dirichlet(values["peak"].expand(2)).log_prob(values["weights"]))
    expected += float(dist.Normal(tensor(0.0), tensor(5.0)).log_prob(values["loc"]).sum())
    expected += float(priors["scale_tril"].log_prob(values["scale_tril"]).sum())
    expected += float(mixture.log_prob(x, values).sum())
    assert float(trace.log_prob_sum()) == pytest.approx(expected, abs=1e-9)
    with pytest.raises(TypeError, match="not conjugate"):
        VB().run(GaussianMixture(2, priors=priors), x)
    with pytest.raises(ValueError, match="together"):
        GaussianMixture(2, priors={"loc": priors["loc"]}).bind(as_dataset(x))


def test_the_program_generates_rows():
    x = tensor(rows(12, 2))
    mixture = GaussianMixture(3).bind(as_dataset(x))
    with rng.fork(rng.make_generator(0)):
        blind = pyro.poutine.uncondition(mixture.model)
        trace = pyro.poutine.trace(blind).get_trace(x)
    new = trace.nodes["x"]["value"]
    assert new.shape == (12, 2)
    assert bool(new.isfinite().all())
    assert not torch.equal(new, x)


# ------------------------------------------------------------------ the default prior
def test_default_prior_follows_the_data():
    """Conditional spread within a component: half that of the data, whatever units or shifts."""
    r = np.random.default_rng(0)
    x = r.normal(size=(5000, 4))
    x[:, 1] = x[:, 0] + 0.1 * x[:, 1]  # nearly the same column
    mixture = GaussianMixture(6).bind(as_dataset(x))
    prior = mixture.all_priors["components"]
    precision = np.linalg.inv(np.cov(x.T, ddof=0))
    within = min(0.5, 6 ** (-1 / 4))
    expected = within * np.sqrt(6.0 / np.diag(precision))
    np.testing.assert_allclose(prior.scale_tril.diagonal().numpy(), expected, rtol=0.1)
    scale, shift = np.array([1e3, 1e-3, 7.0, 1.0]), np.array([1e6, 0.0, -3.0, 5.0])
    moved = GaussianMixture(6).bind(as_dataset(x * scale + shift)).all_priors["components"]
    np.testing.assert_allclose(
        moved.scale_tril.diagonal().numpy(),
        prior.scale_tril.diagonal().numpy() * scale,
        rtol=1e-6,
    )
