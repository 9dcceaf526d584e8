"""Robust PCA: outliers cost their own rows; the Student-t core against independent formulas."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from bayesgen import rng
from bayesgen.data import as_dataset
from bayesgen.inference import EM, VB, ClosedForm, Gibbs
from bayesgen.models import PPCA, RobustPCA
from bayesgen.models.linear.latents import from_rows

__all__: list[str] = []

NUM_ROWS, NUM_COLUMNS, LATENT_DIM = 500, 10, 2
LIKELIHOOD = EM(num_starts=2, objective="likelihood")


def contaminated(share, seed, *, size=60.0):
    """Rows of two directions, some of them moved to one place far out in a random direction."""
    generator = rng.make_generator(seed)
    loadings = 2.0 * rng.standard_normal((NUM_COLUMNS, LATENT_DIM), generator)
    x = rng.standard_normal((NUM_ROWS, LATENT_DIM), generator) @ loadings.T
    x = x + 0.5 * rng.standard_normal(x.shape, generator)
    away = rng.standard_normal((NUM_COLUMNS,), generator)
    count = round(share * NUM_ROWS)
    x[:count] = size * away / away.norm()
    x[:count] += 0.5 * rng.standard_normal((count, NUM_COLUMNS), generator)
    return x, loadings


def angle(fit, loadings):
    """Largest principal angle between the directions of the mean covariance, in degrees."""
    own = fit.draws["loadings"].flatten(0, 1)
    own = torch.linalg.eigh((own @ own.mT).mean(0)).eigenvectors[:, -loadings.shape[1] :]
    cosines = torch.linalg.svdvals(own.T @ torch.linalg.qr(loadings).Q)
    return math.degrees(math.acos(min(1.0, float(cosines.min()))))


def check_share(share, seeds, engine):
    for seed in seeds:
        x, loadings = contaminated(share, seed)
        plain = angle(ClosedForm().run(PPCA(LATENT_DIM), x), loadings)
        robust = angle(engine.run(RobustPCA(LATENT_DIM), x, seed=seed), loadings)
        if share:
            assert plain > 15.0
            assert robust < 1.5
        else:
            assert robust < max(1.1 * plain, plain + 0.05)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.05, 0.1])
def test_clustered_outliers_do_not_turn_the_subspace(share):
    check_share(share, range(2), LIKELIHOOD)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.02, 0.05, 0.1])
@pytest.mark.parametrize(
    "engine", [LIKELIHOOD, EM(num_starts=2), VB(num_starts=1)], ids=["ml", "mode", "vb"]
)
def test_clustered_outliers_in_ten_seeds(share, engine):
    check_share(share, range(10), engine)


def test_an_outlier_costs_its_own_row_and_not_the_mean():
    x, _ = contaminated(0.0, 0)
    clean = LIKELIHOOD.run(RobustPCA(LATENT_DIM), x)
    x[0] = 1e4
    moved = LIKELIHOOD.run(RobustPCA(LATENT_DIM), x)
    plain = ClosedForm().run(PPCA(LATENT_DIM), x)
    centre = clean.draws["loc"]
    assert float((moved.draws["loc"] - centre).abs().max()) < 0.1
    assert float((plain.draws["loc"] - centre).abs().max()) > 10.0
    assert int(moved.log_prob(x).argmin()) == 0


# ------------------------------------------------------------------ against other formulas
def fitted(df=None):
    x, _ = contaminated(0.05, 3)
    return x, EM(num_starts=1, max_steps=30).run(RobustPCA(2, df=df), x)


def dense(fit):
    loadings, scale = fit.draws["loadings"][0, 0], fit.draws["noise_scale"][0, 0]
    return (loadings @ loadings.T + scale**2 * torch.eye(NUM_COLUMNS, dtype=torch.float64)).numpy()


def test_density_is_scipys_student_t():
    x, fit = fitted()
    loc, df = fit.draws["loc"][0, 0].numpy(), float(fit.draws["df"])
    wanted = stats.multivariate_t(loc, dense(fit), df=df).logpdf(x.numpy())
    torch.testing.assert_close(fit.log_prob(x), torch.from_numpy(wanted), rtol=1e-10, atol=1e-9)
    seen = [0, 3, 4]
    gaps = torch.full_like(x, math.nan)
    gaps[:, seen] = x[:, seen]
    marginal = stats.multivariate_t(loc[seen], dense(fit)[seen][:, seen], df=df)
    wanted = torch.from_numpy(marginal.logpdf(x[:, seen].numpy()))
    torch.testing.assert_close(fit.log_prob(gaps), wanted, rtol=1e-10, atol=1e-9)


def test_the_bound_of_em_is_the_log_likelihood():
    x, fit = fitted(df=4.0)
    gaps = x.masked_fill(torch.rand(x.shape, generator=rng.make_generator(2)) < 0.2, math.nan)
    for data in (x, gaps):
        fit = LIKELIHOOD.run(RobustPCA(2, df=4.0), data)
        assert float(fit.log_prob(data).sum()) == pytest.approx(fit.attrs["objective"], rel=1e-9)


def test_condition_times_marginal_is_the_joint():
    x, fit = fitted()
    draws = {site: value[0] for site, value in fit.draws.items()}
    observed = torch.tensor([True, False] * 5)
    blind = x.masked_fill(~observed, math.nan)
    law = fit.model.condition(x, observed, draws)
    joint = fit.log_prob(blind) + law.log_prob(x[:, ~observed])[0]
    torch.testing.assert_close(joint, fit.log_prob(x), rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_drawn_statistics_have_the_expected_mean(share):
    """Gibbs' local step against the expectations of EM's, which no sampling enters."""
    x, _ = contaminated(0.1, 1)
    x = x[:40]
    x = x.masked_fill(torch.rand(x.shape, generator=rng.make_generator(2)) < share, math.nan)
    model, generator = RobustPCA(2).bind(as_dataset(x)), rng.make_generator(0)
    start = model.start(x, num_batch=1, generator=generator)
    block = model.blocks["loadings"]
    values = block.draw(start["loadings"], None, generator=generator)
    exact = from_rows(model.observe(x), block.natural(values))
    many = {name: value.expand(3000, *value.shape[1:]) for name, value in values.items()}
    drawn = from_rows(model.observe(x), block.natural(many), generator=generator)
    for name, wanted in exact.statistics.items():
        own = drawn.statistics[name]
        error = 5.0 * own.std(0) / math.sqrt(len(own))
        assert bool(((own.mean(0) - wanted[0]).abs() <= error + 1e-8).all()), name
    torch.testing.assert_close(drawn.bound, exact.bound.expand(3000))


def test_gibbs_and_vb_find_the_same_degrees_of_freedom():
    x, _ = contaminated(0.05, 0)
    vb = VB(num_starts=1).run(RobustPCA(2), x)
    gibbs = Gibbs(num_chains=2, num_samples=300, num_warmup=150).run(RobustPCA(2), x)
    left, right = vb.draws["df"], gibbs.draws["df"]
    assert abs(float(left.mean() - right.mean())) < float(right.std())


def test_refusals():
    with pytest.raises(ValueError, match="df=0"):
        RobustPCA(2, df=0.0)
    with pytest.raises(ValueError, match="is fixed"):
        RobustPCA(2, priors={"df": torch.distributions.Gamma(2.0, 0.1)}, df=3.0)
    x, _ = contaminated(0.0, 0)
    with pytest.raises(ValueError, match="support"):
        EM().run(RobustPCA(2, priors={"df": torch.distributions.Normal(0.0, 1.0)}), x)
