"""Bayesian PCA: exact bounds, calibrated Gibbs, the right number of directions by every engine."""

from __future__ import annotations

import math

import pytest
import torch
from pyro.distributions import Gamma, LogNormal, MultivariateNormal, Normal

from bayesgen import datasets, rng
from bayesgen.arviz_groups import import_arviz
from bayesgen.calibration import geweke_joint_test, simulation_based_calibration
from bayesgen.data import as_dataset
from bayesgen.distributions import HorseshoePrecision, RootInverseGamma
from bayesgen.inference import NUTS, SVI, VB, Gibbs
from bayesgen.inference.conjugate.source import Source
from bayesgen.inference.gibbs import GibbsState, Work
from bayesgen.inference.run import Task
from bayesgen.models import PPCA, BayesianPCA, RobustPCA
from bayesgen.models.linear import expansion
from bayesgen.models.linear.block import LoadingsBlock
from bayesgen.models.linear.rows import take_rows

__all__: list[str] = []

N, D, Q = 12, 3, 2


def bishop(seed, num_rows=300):
    """Ten columns, three directions of standard deviation 1 amid noise of 1/2, rotated."""
    generator = rng.make_generator(seed)
    x = 0.5 * rng.standard_normal((num_rows, 10), generator)
    x[:, :3] *= 2.0
    return x @ torch.linalg.qr(rng.standard_normal((10, 10), generator)).Q


def holes(x, share, seed=1):
    return x.masked_fill(torch.rand(x.shape, generator=rng.make_generator(seed)) < share, math.nan)


def num_live(fit):
    return fit.model.invariants(fit.draws)["num_live"]


def covariance(draws):
    loadings, noise = draws["loadings"], draws["noise_scale"].square()
    eye = torch.eye(loadings.shape[-2], dtype=loadings.dtype)
    return loadings @ loadings.mT + noise[..., None, None] * eye


def proper(latent_dim=Q, *, horseshoe=False):
    """Priors from which parameters can be drawn, far from the defaults."""
    ones = torch.ones(latent_dim, dtype=torch.float64)
    columns = torch.ones(D, dtype=torch.float64)
    return {
        "precision": HorseshoePrecision(ones) if horseshoe else Gamma(3.0 * ones, 2.0 * ones),
        "loc": Normal(0.5 * columns, columns),
        "noise_scale": RootInverseGamma(
            torch.tensor(3.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
        ),
    }


# ------------------------------------------------------------------ the bound
def log_joint(model, x, draws, latents):
    """Log density of observed entries, latents and parameters, written out."""
    loadings, loc, noise = draws["loadings"], draws["loc"], draws["noise_scale"]
    mean = latents @ loadings.mT + loc.unsqueeze(-2)
    seen = ~x.isnan()
    law = Normal(mean, noise[..., None, None])
    rows = torch.where(seen, law.log_prob(torch.nan_to_num(x)), 0.0).sum((-2, -1))
    priors = model.all_priors
    total = rows + Normal(0.0, 1.0).log_prob(latents).sum((-2, -1))
    total = total + priors["precision"].log_prob(draws["precision"]).sum(-1)
    wide = draws["precision"].rsqrt().unsqueeze(-2)
    total = total + Normal(0.0, wide).log_prob(loadings).sum((-2, -1))
    total = total + priors["loc"].log_prob(loc).sum(-1)
    # The noise's posterior is a Gamma of its precision: the Jacobian of tau = 1 / sigma^2.
    jacobian = math.log(2.0) - 3.0 * noise.log()
    return total + priors["noise_scale"].log_prob(noise) - jacobian


@pytest.mark.parametrize("gaps", [False, True])
def test_the_elbo_is_its_definition(gaps):
    """Against a Monte Carlo mean of log p - log q over draws of every factor."""
    x = rng.standard_normal((N, D), rng.make_generator(3)) + 1.0
    x = holes(x, 0.25) if gaps else x
    size = 40_000
    fit = VB(num_starts=2, num_samples=size, max_steps=30, tolerance=1e-12).run(
        BayesianPCA(Q, priors=proper()), x
    )
    model, posterior = fit.model, fit.posterior["loadings"]
    draws = {name: value[0] for name, value in fit.draws.items()}
    local = model.blocks["loadings"].message(posterior)
    # q(z_i), from the expected natural parameters alone
    gram, linear = torch.zeros(N, Q + 1, Q + 1).double(), local["linear"]
    from bayesgen.distributions._low_rank import unpack

    seen = (~x.isnan()).double()
    gram = torch.einsum("nj,jab->nab", seen, unpack(local["gram"], Q + 1))
    centred = torch.nan_to_num(x - model.bound.scales.offset)
    pull = centred @ linear[:, :Q] - gram[:, :Q, Q]
    precision = gram[:, :Q, :Q] + torch.eye(Q, dtype=torch.float64)
    latent = MultivariateNormal(
        torch.linalg.solve(precision, pull.unsqueeze(-1)).squeeze(-1), precision_matrix=precision
    )
    generator = rng.make_generator(0)
    noise = rng.standard_normal((size, N, Q), generator)
    latents = latent.loc + (latent.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    tril = posterior["precision_tril"]
    columns = MultivariateNormal(posterior["loc"], precision_matrix=tril @ tril.mT)
    offset = model.bound.scales.offset
    augmented = torch.cat([draws["loadings"], (draws["loc"] - offset).unsqueeze(-1)], -1)
    tau = Gamma(posterior["concentration"][0], posterior["rate"][0])
    alpha = Gamma(posterior["relevance_concentration"], posterior["relevance_rate"])
    log_q = (
        latent.log_prob(latents).sum(-1)
        + columns.log_prob(augmented).sum(-1)
        + tau.log_prob(draws["noise_scale"].square().reciprocal())
        + alpha.log_prob(draws["precision"]).sum(-1)
    )
    terms = log_joint(model, x, draws, latents) - log_q
    error = float(terms.std()) / size**0.5
    assert error < 0.05
    assert abs(float(terms.mean()) - fit.attrs["elbo"]) < 4 * error


@pytest.mark.parametrize("horseshoe", [False, True])
def test_the_elbo_never_falls(horseshoe):
    x = bishop(0, 60)
    priors = {"precision": HorseshoePrecision(torch.full((6,), 0.1).double())} if horseshoe else {}
    for data in (x, holes(x, 0.2)):
        fit = VB(num_starts=2, max_steps=200).run(BayesianPCA(6, priors=priors), data)
        elbo = torch.tensor(fit.history["elbo"])
        assert bool((elbo.diff() > -1e-8 * elbo.abs().max()).all())


def test_rows_without_entries_change_nothing():
    """Rows with gaps go another way through the code than sums of complete ones."""
    x = bishop(1, 50)
    empty = torch.cat([x, torch.full((1, 10), math.nan, dtype=torch.float64)])
    engine = VB(num_starts=1, tolerance=1e-10, max_steps=5000)
    left, right = (engine.run(BayesianPCA(4), data) for data in (x, empty))
    assert left.model.pools
    assert not right.model.pools
    assert left.attrs["elbo"] == pytest.approx(right.attrs["elbo"], abs=1e-6)
    torch.testing.assert_close(
        left.posterior["loadings"]["rate"], right.posterior["loadings"]["rate"], rtol=1e-5, atol=0
    )


# ------------------------------------------------------------------ Gibbs is calibrated
def prior(size, generator, *, horseshoe=False):
    """From the distributions, not from the block under test."""
    laws = proper(horseshoe=horseshoe)
    if horseshoe:
        precision = laws["precision"].expand((size, Q)).sample(generator=generator)
    else:
        precision = rng.gamma(torch.full((size, Q), 3.0).double(), generator) / 2.0
    loadings = rng.standard_normal((size, D, Q), generator) * precision.rsqrt().unsqueeze(-2)
    tau = rng.gamma(torch.full((size, 1), 3.0).double(), generator) / 2.0
    loc = 0.5 + rng.standard_normal((size, D), generator)
    return {"precision": precision, "loadings": loadings, "loc": loc, "variance": 1.0 / tau}


def simulate(values, generator):
    size = len(values["loc"])
    latents = rng.standard_normal((size, N, Q), generator)
    noise = values["variance"].sqrt().unsqueeze(-1)
    mean = latents @ values["loadings"].mT + values["loc"].unsqueeze(-2)
    return mean + noise * rng.standard_normal((size, N, D), generator)


def with_scales(values, generator):
    """Rows of the robust model at four degrees of freedom."""
    size = len(values["loc"])
    scale = rng.chi2(torch.full((size, N, 1), 4.0).double(), generator) / 4.0
    x = simulate({**values, "loc": 0.0 * values["loc"]}, generator)
    return x / scale.sqrt() + values["loc"].unsqueeze(-2)


def quantities(values, x):
    """Rotation-invariant, bounded or with light tails."""
    loadings = values["loadings"]
    sigma = loadings @ loadings.mT + torch.diag_embed(
        values["variance"].expand(values["loc"].shape)
    )
    law = MultivariateNormal(values["loc"].unsqueeze(-2), sigma.unsqueeze(-3), validate_args=False)
    return {
        "log_likelihood": torch.tanh(law.log_prob(x).mean(-1) / 4),
        "mean": torch.tanh(values["loc"] / 2),
        "log_det": torch.tanh(torch.logdet(sigma) / 4),
        "noise": values["variance"].log().squeeze(-1).clamp(-4, 4),
        "signal": torch.tanh(loadings.square().sum((-2, -1)) / 4),
        "precision": values["precision"].log().clamp(-6, 6).mean(-1),
    }


def robust_task(generator):
    job = task(generator, gaps=False, horseshoe=False)
    width = torch.ones(D, Q, dtype=torch.float64)
    laws = {k: v for k, v in job.model.priors.items() if k != "precision"}
    laws["loadings"] = Normal(0.0 * width, 0.8 * width)
    model = RobustPCA(Q, laws, job.model.bound, df=4.0)
    return Task(model, job.data, generator, torch.device("cpu"), torch.float64)


def task(generator, *, gaps, horseshoe):
    data = as_dataset([[-1.0] * D, [1.0] * D] * (N // 2))  # centred on zero
    data = holes(data.tensor(), 0.2) if gaps else data
    model = BayesianPCA(Q, priors=proper(horseshoe=horseshoe)).bind(as_dataset(data))
    centred = model.bound._replace(is_complete=False)
    centred.scales.offset.zero_()
    model = type(model)(Q, model.priors, centred)
    return Task(model, as_dataset(data), generator, torch.device("cpu"), torch.float64)


def work_of(job, x):
    """Every chain has data of its own."""
    source = Source(job.model, job.data)
    source._kept = [take_rows(x, torch.float64, complete=False)]
    return Work(source, None, None)


def sweep(job, engine, values, x):
    zero = torch.zeros(len(x), dtype=torch.float64)
    state = GibbsState({"loadings": values}, {}, {}, 0, zero)
    return engine.step(job, work_of(job, x), state)[0].values["loadings"]


def geweke(*, gaps=False, horseshoe=False, num_chains=200, num_steps=25):
    def transition(values, x, generator):
        engine = Gibbs(num_chains=len(x), num_samples=1, num_warmup=10)
        return sweep(task(generator, gaps=gaps, horseshoe=horseshoe), engine, values, x)

    def blurred(values, generator):
        x = simulate(values, generator)
        hidden = torch.rand(x.shape, generator=rng.make_generator(5)) < 0.3
        return x.masked_fill(hidden, math.nan) if gaps else x

    def about(values, x):
        found = quantities(values, torch.nan_to_num(x))
        return {k: v for k, v in found.items() if not (gaps and k == "log_likelihood")}

    return geweke_joint_test(
        lambda size, generator: prior(size, generator, horseshoe=horseshoe),
        blurred,
        transition,
        quantities=about,
        num_chains=num_chains,
        num_steps=num_steps,
        num_marginal=8000,
    )


@pytest.mark.parametrize(
    ("gaps", "horseshoe", "block"),
    [(False, False, 4), (False, False, 1), (True, False, 4), (False, True, 4)],
)
def test_geweke(gaps, horseshoe, block, monkeypatch):
    monkeypatch.setattr(expansion, "_BLOCK", block)
    result = geweke(gaps=gaps, horseshoe=horseshoe)
    assert result.p_value > 1e-3, result


def robust_geweke():
    def parameters(size, generator):
        values = prior(size, generator)
        del values["precision"]
        return {**values, "loadings": 0.8 * rng.standard_normal((size, D, Q), generator)}

    def transition(values, x, generator):
        return sweep(robust_task(generator), Gibbs(num_chains=len(x), num_samples=1), values, x)

    def about(values, x):
        found = quantities({**values, "precision": torch.ones(Q).double()}, x)
        return {k: v for k, v in found.items() if k != "precision"}

    return geweke_joint_test(
        parameters,
        with_scales,
        transition,
        quantities=about,
        num_chains=300,
        num_steps=25,
        num_marginal=8000,
    )


def test_geweke_of_rows_with_scales_of_their_own(monkeypatch):
    """Weighted rows still count as rows, and three too many are noticed."""
    result = robust_geweke()
    assert result.p_value > 1e-3, result
    right = expansion._propose

    def wrong(moments, count, order, generator):
        return right(moments, count + 3.0, order, generator)

    monkeypatch.setattr(expansion, "_propose", wrong)
    result = robust_geweke()
    assert result.p_value < 1e-4, result


def test_geweke_catches_a_wrong_jacobian(monkeypatch):
    """The expansion without the determinant of its map on the loadings."""
    right = expansion._propose

    def wrong(*arguments):
        element = right(*arguments)
        return element._replace(log_det=0.0 * element.log_det)

    monkeypatch.setattr(expansion, "_propose", wrong)
    result = geweke()
    assert result.p_value < 1e-6, result


def posterior_draws(x, generator, num_draws=31, thinning=8, num_warmup=150):
    """Chains start from the prior, not from the truth."""
    job, size = task(generator, gaps=False, horseshoe=False), len(x)
    engine = Gibbs(num_chains=size)
    values, kept = prior(size, generator), []
    for step in range(num_warmup + num_draws * thinning):
        values = sweep(job, engine, values, x)
        if step >= num_warmup and (step - num_warmup) % thinning == 0:
            kept.append(values)
    return {name: torch.stack([v[name] for v in kept]) for name in values}


def sbc(num_simulations, **settings):
    def joint(size, generator):
        values = prior(size, generator)
        return values, simulate(values, generator)

    return simulation_based_calibration(
        joint,
        lambda x, generator: posterior_draws(x, generator, **settings),
        num_simulations=num_simulations,
        quantities=quantities,
        seed=4,
    )


def test_calibration():
    ranks = sbc(250)
    assert ranks.p_value > 0.02, ranks


def test_calibration_catches_a_posterior_too_narrow(monkeypatch):
    right = LoadingsBlock._draw_loadings
    monkeypatch.setattr(
        LoadingsBlock,
        "_draw_loadings",
        staticmethod(lambda law, generator: 0.5 * law.loc + 0.5 * right(law, generator)),
    )
    ranks = sbc(250)
    assert ranks.p_value < 0.02, ranks


@pytest.mark.slow
def test_calibration_at_length():
    ranks = sbc(2000, num_draws=63, thinning=12, num_warmup=300)
    assert ranks.p_value > 0.02, ranks


# ------------------------------------------------------------------ mixing
def test_the_expansion_leaves_the_fitted_rows_alone():
    generator = rng.make_generator(0)
    latents = rng.standard_normal((3, 40, Q), generator)
    one = torch.ones(3, 40, 1, dtype=torch.float64)
    augmented = torch.cat([2.0 * latents + 1.0, one], -1)
    x = rng.standard_normal((3, 40, D), generator)
    from bayesgen.distributions._low_rank import pack, unpack

    moments = augmented.mT @ augmented
    statistics = {
        "latent": pack(moments),
        "second": pack(moments).unsqueeze(-2),
        "cross": x.mT @ augmented,
        "square": x.square().sum(-2),
        "count": torch.full((3, D), 40.0).double(),
    }
    loadings = rng.standard_normal((3, D, Q + 1), generator)
    order = torch.arange(Q).expand(3, Q)
    moved = expansion.expand_latents(
        statistics, loadings, lambda w: 0.0 * w.sum((-2, -1)), order, generator=generator
    )
    assert float((moved["latent"] - statistics["latent"]).abs().max()) > 1.0
    for name in ("square", "count"):
        assert torch.equal(moved[name], statistics[name])
    # Least squares of the rows on the latents leaves the same residuals.
    for name in (statistics, moved):
        gram, cross = unpack(name["latent"], Q + 1), name["cross"]
        fitted = (cross @ torch.linalg.inv(gram) * cross).sum(-1)
        name["residual"] = name["square"] - fitted
    torch.testing.assert_close(moved["residual"], statistics["residual"])


@pytest.mark.parametrize("model", [PPCA(2), BayesianPCA(3)], ids=["PPCA", "BayesianPCA"])
def test_gibbs_mixes_where_the_signal_is_strong(model, monkeypatch):
    """Iris: a first direction of eighty times the noise's variance."""
    engine = Gibbs(num_chains=4, num_samples=300, num_warmup=150)
    ess = import_arviz().ess

    def effective():
        draws = engine.run(model, datasets.load("iris"), seed=0).draws
        spectrum = torch.linalg.eigvalsh(draws["loadings"].mT @ draws["loadings"])
        return float(ess(spectrum[..., -1].numpy())), float(ess(draws["loc"][..., 2].numpy()))

    assert min(effective()) > 400
    monkeypatch.setattr(
        "bayesgen.models.linear.block.expand_latents", lambda statistics, *_, **__: statistics
    )
    assert min(effective()) < 40


# ------------------------------------------------------------------ how many directions live
@pytest.mark.parametrize("seed", [0, 1])
def test_three_directions_live(seed):
    x = bishop(seed)
    for engine in (VB(num_starts=2), Gibbs(num_chains=2, num_samples=300, num_warmup=200)):
        fit = engine.run(BayesianPCA(9), x, seed=seed)
        assert float(num_live(fit).flatten().mode().values) == 3.0
        assert len(fit.aligned.empty) == 6


ENGINES = {
    "VB": VB(num_starts=2),
    "Gibbs": Gibbs(num_chains=2, num_samples=300, num_warmup=200),
    "SVI": SVI(),
    "NUTS": NUTS(num_chains=2, num_samples=200, num_warmup=200),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gaps"),
    [*((name, 0.0) for name in ENGINES), ("VB", 0.1), ("Gibbs", 0.1)],
)
def test_three_directions_live_in_twenty_seeds(name, gaps):
    right = 0
    for seed in range(20):
        x = holes(bishop(seed), gaps, seed) if gaps else bishop(seed)
        fit = ENGINES[name].run(BayesianPCA(9), x, seed=seed)
        right += int(float(num_live(fit).flatten().mode().values) == 3)
    assert right >= 19, right


def test_without_signal_no_direction_lives():
    x = rng.standard_normal((200, 6), rng.make_generator(0))
    fit = VB(num_starts=2).run(BayesianPCA(5), x)
    assert float(num_live(fit).max()) == 0.0
    assert fit.aligned.empty == (0, 1, 2, 3, 4)


# ------------------------------------------------------------------ engines agree
def test_variational_bayes_agrees_with_gibbs_but_is_too_sure():
    x = bishop(2)
    gibbs = Gibbs(num_chains=4, num_samples=500, num_warmup=300).run(BayesianPCA(5), x)
    vb = VB(num_starts=2, num_samples=2000).run(BayesianPCA(5), x)
    exact, approximate = (covariance(fit.draws).flatten(0, 1) for fit in (gibbs, vb))
    spread = exact.std(0)
    off = (approximate.mean(0) - exact.mean(0)) / spread
    assert float(off.abs().max()) < 1.0
    ratio = approximate.std(0) / spread
    assert 0.3 < float(ratio.median()) < 1.0


@pytest.mark.slow
def test_nuts_agrees_with_gibbs():
    x = bishop(2, 100)[:, :4]
    gibbs = Gibbs(num_chains=4, num_samples=2000, num_warmup=500).run(BayesianPCA(2), x)
    nuts = NUTS(num_chains=4, num_samples=500, num_warmup=500).run(BayesianPCA(2), x, seed=0)
    arviz = import_arviz()
    left, right = covariance(gibbs.draws).numpy(), covariance(nuts.draws).numpy()
    for i in range(4):
        for j in range(i + 1):
            a, b = left[..., i, j], right[..., i, j]
            assert float(arviz.rhat(b)) < 1.03
            error = math.hypot(float(arviz.mcse(a)), float(arviz.mcse(b)))
            assert abs(a.mean() - b.mean()) < 4.5 * error


# ------------------------------------------------------------------ priors and verbs
def test_the_default_prior_scales_with_the_data():
    x = bishop(0)
    engine = Gibbs(num_chains=1, num_samples=20, num_warmup=20)
    one, many = (engine.run(BayesianPCA(4), scale * x, seed=1) for scale in (1.0, 2.0**20))
    torch.testing.assert_close(2.0**20 * one.draws["loadings"], many.draws["loadings"])


def test_a_prior_that_is_not_conjugate_is_refused_by_gibbs_alone():
    ones = torch.ones(2, dtype=torch.float64)
    model = BayesianPCA(2, priors={"precision": LogNormal(ones, ones)})
    with pytest.raises(TypeError, match="Gamma or HorseshoePrecision"):
        Gibbs(num_samples=2, num_warmup=2).run(model, bishop(0))
    with pytest.raises(ValueError, match="'loadings'"):
        BayesianPCA(2, priors={"loadings": Normal(0.0, 1.0)})


def test_what_the_fit_says():
    x = holes(bishop(3, 150), 0.1)
    fit = Gibbs(num_chains=2, num_samples=100, num_warmup=150).run(BayesianPCA(5), x)
    told = fit.summary()
    assert "BayesianPCA of 5 latents, one noise scale\n  precision ~ Gamma(" in str(told)
    assert "num_live" in told.table.index
    table = fit.explained_variance().table()
    assert 0.4 < float(table["cumulative"].iloc[-1]) < 0.8
    filled = fit.reconstruct(x)
    assert bool(filled.isfinite().all())
    assert fit.sample(500, with_noise=False).var(0).sum() < fit.sample(500).var(0).sum()
    precision = fit.aligned.draws["precision"]
    assert bool((precision.diff(dim=-1) >= 0).all())
    given = fit.condition(x[:3], ["x0", "x1"])
    assert given.mean.shape == (3, 8)
