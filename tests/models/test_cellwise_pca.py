"""Robust PCA with a scale for each cell: a bad cell costs itself; densities against quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pyro.distributions import Gamma, Normal
from pyro.ops.stats import effective_sample_size

from bayesgen import rng
from bayesgen.calibration import geweke_joint_test
from bayesgen.data import as_dataset
from bayesgen.distributions import RootInverseGamma
from bayesgen.fit import load
from bayesgen.inference import EM, NUTS, VB, Gibbs
from bayesgen.inference.conjugate.source import Source
from bayesgen.inference.gibbs import GibbsState, Work
from bayesgen.inference.run import Task
from bayesgen.models import PPCA, RobustPCA
from bayesgen.models.linear import cells, latent_integral
from bayesgen.models.linear.latent_integral import TOLERANCE
from bayesgen.models.linear.rows import take_rows

__all__: list[str] = []

LIKELIHOOD = EM(num_starts=1, objective="likelihood")


def cellwise(latent_dim, **settings):
    return RobustPCA(latent_dim, scales="cells", **settings)


def contaminated(share, seed, *, n=300, d=20, q=2, size=10.0):
    """Rows of two directions amid noise of one half; some cells are replaced, anywhere."""
    generator = rng.make_generator(seed)
    loadings = rng.standard_normal((d, q), generator)
    x = rng.standard_normal((n, q), generator) @ loadings.T
    x = x + 0.5 * rng.standard_normal((n, d), generator)
    bad = torch.rand((n, d), generator=generator, dtype=torch.float64) < share
    return torch.where(bad, size * rng.standard_normal((n, d), generator), x), loadings, bad


def angle(fit, loadings):
    """Largest principal angle between the directions of the mean covariance, in degrees."""
    own = fit.draws["loadings"].flatten(0, 1)
    own = torch.linalg.eigh((own @ own.mT).mean(0)).eigenvectors[:, -loadings.shape[1] :]
    cosines = torch.linalg.svdvals(own.T @ torch.linalg.qr(loadings).Q)
    return math.degrees(math.acos(min(1.0, float(cosines.min()))))


# ------------------------------------------------------------------ what it is for
def check_share(share, seed):
    engine = EM(num_starts=1, objective="likelihood", tolerance=1e-5)
    x, loadings, _ = contaminated(share, seed)
    clean, _, _ = contaminated(0.0, seed)
    best = angle(engine.run(RobustPCA(2), clean), loadings)
    rows, cells = (angle(engine.run(m, x), loadings) for m in (RobustPCA(2), cellwise(2)))
    if share:
        assert cells < best + 1.5
        assert rows > 1.25 * cells
        assert rows > 10.0 or share < 0.2
    else:
        assert cells < best + 0.1


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_bad_cells_do_not_cost_their_rows(share):
    check_share(share, 0)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.2])
def test_bad_cells_in_ten_seeds(share):
    for seed in range(10):
        check_share(share, seed)


def test_a_bad_column_has_heavy_tails_and_the_others_have_not():
    x, _, _ = contaminated(0.0, 1, d=6)
    x[::12, 2] += 30.0
    for engine in (LIKELIHOOD, VB(num_starts=1, num_samples=50)):
        df = engine.run(cellwise(2), x).draws["df"].flatten(0, 1).mean(0)
        others = torch.cat([df[:2], df[3:]])
        assert float(df[2]) < 4.0
        assert float(others.min()) > 8.0


def test_weights_tell_bad_cells_from_good_ones():
    x, _, bad = contaminated(0.1, 2, n=100, d=10)
    x[5, 1] = math.nan
    fit = LIKELIHOOD.run(cellwise(2), x)
    weights = fit.cell_weights(x)
    assert bool(weights[5, 1].isnan())
    far = bad & (x.abs() > 8.0)
    assert float(weights[far].max()) < 0.2
    assert float(weights[~bad].nanmedian()) > 0.7
    whole = LIKELIHOOD.run(RobustPCA(2), x)
    shared = whole.cell_weights(x)
    assert torch.equal(shared[0], shared[0, :1].expand(10))
    distance = (x[0] - whole.draws["loc"][0, 0]).numpy()
    loadings, noise = whole.draws["loadings"][0, 0], whole.draws["noise_scale"][0, 0]
    covariance = (loadings @ loadings.T + noise**2 * torch.eye(10, dtype=torch.float64)).numpy()
    square = float(distance @ np.linalg.solve(covariance, distance))
    df = float(whole.draws["df"])
    assert float(shared[0, 0]) == pytest.approx((df + 10.0) / (df + square), rel=1e-8)
    with pytest.raises(TypeError, match="Weighted"):
        EM(num_starts=1).run(PPCA(1), x).cell_weights(x)


# ------------------------------------------------------------------ densities against quadrature
def fitted(q, *, share=0.1, seed=0, n=80, d=6):
    x, _, _ = contaminated(share, seed, n=n, d=d, q=q)
    x = x.masked_fill(torch.rand(x.shape, generator=rng.make_generator(seed)) < 0.1, math.nan)
    fit = EM(num_starts=1, max_steps=40).run(cellwise(q), x)
    return x, fit, {site: value[0, 0] for site, value in fit.draws.items()}


def on_grid(x, draws, points, volume):
    """Log density of rows and latents at points ``(m, q)`` with log volumes, ``(n, m)``."""
    law = torch.distributions.StudentT(
        draws["df"], points @ draws["loadings"].T + draws["loc"], draws["noise_scale"]
    )
    each = law.log_prob(torch.nan_to_num(x).unsqueeze(1))
    prior = -0.5 * points.square().sum(-1) - 0.5 * points.shape[-1] * math.log(2.0 * math.pi)
    return each.masked_fill(x.isnan().unsqueeze(1), 0.0).sum(-1) + prior + volume


def grid(q):
    line = torch.linspace(-9.0, 9.0, 8001 if q == 1 else 361, dtype=torch.float64)
    points = torch.cartesian_prod(*[line] * q).reshape(-1, q)
    return points, q * math.log(float(line[1] - line[0]))


@pytest.mark.parametrize("q", [1, 2])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_density_is_the_integral_over_latents(q, share):
    x, fit, draws = fitted(q, share=share)
    wanted = on_grid(x[:30], draws, *grid(q)).logsumexp(-1)
    error = fit.log_prob(x[:30]) - wanted
    assert float(error.abs().max()) < 0.03
    assert float(error.square().mean().sqrt()) < 0.01
    stated = fit.model.log_prob_error(x[:30], draws)
    assert float(stated.max()) <= TOLERANCE
    assert float((error / stated.clamp_min(1e-3)).square().mean()) < 3.0
    assert torch.equal(fit.log_prob(x[4:5]), fit.log_prob(x[:30])[4:5])  # of the row alone


def two_ways():
    """Half of the cells say that the latent is 2, half that it is -2."""
    half = torch.ones(4, dtype=torch.float64)
    draws = {
        "loc": torch.zeros(8, dtype=torch.float64),
        "loadings": torch.ones(8, 1, dtype=torch.float64),
        "noise_scale": torch.tensor(0.05, dtype=torch.float64),
        "df": torch.full((8,), 3.0, dtype=torch.float64),
    }
    return torch.cat([2.0 * half, -2.0 * half])[None], draws


def test_a_row_that_fits_in_two_ways(monkeypatch):
    x, draws = two_ways()
    model = cellwise(1).bind(as_dataset(contaminated(0.0, 0, n=20, d=8)[0]))
    wanted = on_grid(x, draws, *grid(1)).logsumexp(-1)
    assert float((model.log_prob(x, draws) - wanted).abs()) < 0.03
    assert float(model.encode(x, draws).mean.abs()) < 0.05
    assert float(model.encode(x, draws).variance) == pytest.approx(4.0, abs=0.1)
    # Without the other way's start the estimate is off, and knows nothing of it.
    right = latent_integral._starts
    monkeypatch.setattr(latent_integral, "_starts", lambda pairs: right(pairs)[:, :1])
    assert float((model.log_prob(x, draws) - wanted).abs()) > 0.3


def test_density_of_one_more_column_integrates_to_the_marginal():
    x, fit, draws = fitted(2, seed=3)
    row = torch.nan_to_num(x[:1], nan=0.3)
    # Heavy tails: even in the arc tangent of the column.
    turn = torch.linspace(-0.5 * math.pi, 0.5 * math.pi, 602, dtype=torch.float64)[1:-1]
    rows = row.repeat(len(turn), 1)
    rows[:, 1] = draws["loc"][1] + turn.tan()
    step = float(turn[1] - turn[0]) / turn.cos().square()
    total = (fit.log_prob(rows) + step.log()).logsumexp(0)
    gap = row.clone()
    gap[0, 1] = math.nan
    assert float(total) == pytest.approx(float(fit.log_prob(gap)), abs=0.02)
    observed = torch.tensor([True, False, True, True, True, True])
    law = fit.model.condition(row, observed, draws)
    joint = law.log_prob(rows[:1, 1:2]) + fit.log_prob(gap)
    torch.testing.assert_close(joint, fit.log_prob(rows[:1]), rtol=0, atol=1e-9)
    assert float(fit.log_prob(torch.full_like(row, math.nan))) == 0.0


def test_latents_and_conditionals_have_the_moments_of_quadrature():
    x, fit, draws = fitted(1, seed=4)
    x = x[:20]
    points, volume = grid(1)
    weight = on_grid(x, draws, points, volume).softmax(-1)
    mean = weight @ points
    variance = weight @ points.square() - mean.square()
    law = fit.model.encode(x, draws)
    scale = variance.sqrt().squeeze(-1)
    assert float(((law.mean - mean).squeeze(-1) / scale).abs().max()) < 0.05
    assert float((law.variance / variance).log().abs().max()) < 0.1
    density = law.log_prob(mean)
    exact = torch.stack(
        [on_grid(x[i : i + 1], draws, mean[i : i + 1], 0.0)[0, 0] for i in range(20)]
    )
    exact = exact - on_grid(x, draws, points, volume).logsumexp(-1)
    assert float((density - exact).abs().max()) < 0.05
    observed = torch.tensor([False, True, True, True, True, False])
    row = torch.nan_to_num(x[:1], nan=0.2)
    given = fit.model.condition(row, observed, draws)
    shown = row.masked_fill(~observed, math.nan)
    weight = on_grid(shown, draws, points, volume).softmax(-1)
    signal = weight @ (points @ draws["loadings"].T + draws["loc"])
    wanted = signal[:, ~observed].masked_fill(draws["df"][~observed] <= 1.0, math.nan)
    torch.testing.assert_close(given.mean, wanted, atol=0.02, rtol=0.02, equal_nan=True)
    copies = fit.impute(shown, num_samples=400)
    assert torch.equal(copies[:, 0, observed], row[:, observed].expand(400, -1))
    middle = copies[:, 0, ~observed].median(0).values
    spread = float(draws["noise_scale"]) + float(scale.max())
    assert float((middle - signal[0, ~observed]).abs().max()) < 0.4 * spread


# ------------------------------------------------------------------ engines
def test_the_bound_of_em_lies_below_the_log_likelihood():
    x, _, _ = contaminated(0.1, 5, n=60, d=8)
    fit = LIKELIHOOD.run(cellwise(2), x)
    gap = float(fit.log_prob(x).sum()) - fit.attrs["objective"]
    assert 0.0 < gap < 1.5 * len(x)
    assert fit.attrs["log_prob_tolerance"] == TOLERANCE


def test_vb_and_gibbs_agree_on_the_directions():
    x, loadings, _ = contaminated(0.1, 0, n=150, d=10)
    vb = VB(num_starts=1, num_samples=100).run(cellwise(2), x)
    gibbs = Gibbs(num_chains=2, num_samples=200, num_warmup=100).run(cellwise(2), x)
    assert abs(angle(vb, loadings) - angle(gibbs, loadings)) < 0.7
    signal = [f.model.explained_variance(f.draws)["signal"].flatten(0, 1) for f in (vb, gibbs)]
    shift = (signal[0].mean(0) - signal[1].mean(0)).abs()
    assert bool((shift < 2.0 * signal[1].std(0)).all())


@pytest.mark.slow
def test_nuts_and_gibbs_agree():
    x, _, _ = contaminated(0.1, 0, n=60, d=5, q=1)
    x[3, 2] = x[7, 0] = math.nan
    nuts = NUTS(num_chains=2, num_samples=500, num_warmup=300).run(cellwise(1), x)
    gibbs = Gibbs(num_chains=4, num_samples=2000, num_warmup=500).run(cellwise(1), x)
    assert sorted(nuts.draws) == ["df", "loadings", "loc", "noise_scale"]
    for site in ("df", "noise_scale", "loc"):
        left, right = (
            f.draws[site].log() if site != "loc" else f.draws[site] for f in (nuts, gibbs)
        )
        spread = right.flatten(0, 1).std(0)
        shift = left.flatten(0, 1).mean(0) - right.flatten(0, 1).mean(0)
        assert bool((shift.abs() < 0.3 * spread).all()), site
        ratio = left.flatten(0, 1).std(0) / spread
        assert bool(((ratio > 0.75) & (ratio < 1.33)).all()), site


# ------------------------------------------------------------------ Gibbs is calibrated
N, D, Q = 10, 3, 1


def proper():
    wide = torch.ones(D, Q, dtype=torch.float64)
    three, two = torch.tensor([3.0, 2.0], dtype=torch.float64)
    return {
        "loadings": Normal(0.0 * wide, 0.8 * wide),
        "loc": Normal(0.5 * wide[:, 0], wide[:, 0]),
        "noise_scale": RootInverseGamma(three, two),
        "df": Gamma(torch.tensor(4.0, dtype=torch.float64), 1.0),
    }


def prior(size, generator):
    def gamma(shape, *event):
        return rng.gamma(torch.full((size, *event), shape, dtype=torch.float64), generator)

    df = gamma(4.0, D)
    half = (0.5 * df).unsqueeze(-2).expand(size, N, D)
    return {
        "loadings": 0.8 * rng.standard_normal((size, D, Q), generator),
        "loc": 0.5 + rng.standard_normal((size, D), generator),
        "variance": 2.0 / gamma(3.0, 1),
        "df": df,
        "stretch": torch.ones(size, 1, dtype=torch.float64),
        "left": rng.gamma(half, generator) / half,
    }


def simulate(values, generator):
    size = len(values["loc"])
    latents = rng.standard_normal((size, N, Q), generator)
    scales = values["left"] * values["stretch"].unsqueeze(-1)
    noise = (values["variance"].unsqueeze(-1) / scales).sqrt()
    mean = latents @ values["loadings"].mT + values["loc"].unsqueeze(-2)
    return mean + noise * rng.standard_normal((size, N, D), generator)


def transition(values, x, generator, *, carry, size):
    data = as_dataset([[-1.0] * D, [1.0] * D] * (N // 2))
    model = cellwise(Q, priors=proper()).bind(data)
    model.bound.scales.offset.zero_()
    job = Task(model, data, generator, torch.device("cpu"), torch.float64)
    source = Source(job.model, job.data, batch_size=size)
    parts = x.split(size, -2)
    source._kept = [take_rows(part, torch.float64, complete=True) for part in parts]
    own = {name: value for name, value in values.items() if name != "left"}
    zero = torch.zeros(len(x), dtype=torch.float64)
    state = GibbsState({"loadings": own}, {}, {}, 0, zero, values["left"] if carry else None)
    engine = Gibbs(num_chains=len(x), num_samples=1, num_warmup=10)
    state = engine.step(job, Work(source, None, None), state)[0]
    return {**state.values["loadings"], "left": state.left}


def quantities(values, x):
    scales = values["left"] * values["stretch"].unsqueeze(-1)
    outer = values["loadings"] @ values["loadings"].mT
    return {
        "loc": torch.tanh(values["loc"] / 2),
        "noise": values["variance"].log().squeeze(-1).clamp(-4, 4),
        "df": values["df"].log().clamp(-3, 4),
        "signal": torch.tanh(outer.diagonal(dim1=-2, dim2=-1).sum(-1) / 4),
        "log_scale": scales.log().clamp(-4, 3).mean((-2, -1)),
        "fit": torch.tanh((x - values["loc"].unsqueeze(-2)).square() * scales / 8).mean((-2, -1)),
    }


def geweke(carry=True, size=N):
    def move(values, x, generator):
        return transition(values, x, generator, carry=carry, size=size)

    return geweke_joint_test(
        prior,
        simulate,
        move,
        quantities=quantities,
        num_chains=300,
        num_steps=25,
        num_marginal=8000,
    )


def test_geweke():
    """A sweep that goes on from the last one's scales is right; one that starts anew is not."""
    result = geweke()
    assert result.p_value > 1e-3, result
    result = geweke(carry=False)
    assert result.p_value < 1e-4, result


def test_geweke_in_batches():
    result = geweke(size=4)
    assert result.p_value > 1e-3, result


def test_geweke_catches_residuals_a_fifth_too_large_in_the_degrees_of_freedom(monkeypatch):
    right = cells.tail_sums
    monkeypatch.setattr(
        cells, "tail_sums", lambda distance, observed: right(1.2 * distance, observed)
    )
    result = geweke()
    assert result.p_value < 1e-4, result


def test_degrees_of_freedom_of_normal_columns_move():
    """Drawn given the scales they made some 100 independent draws of 4,000."""
    x, _, _ = contaminated(0.0, 0, n=100, d=5, q=1)
    fit = Gibbs(num_chains=4, num_samples=250, num_warmup=100).run(cellwise(1), x)
    size = effective_sample_size(fit.draws["df"].log(), chain_dim=0, sample_dim=1)
    assert float(size.min()) > 200.0


def test_fixed_degrees_of_freedom_take_one_pass(monkeypatch):
    x, _, _ = contaminated(0.1, 0, n=40, d=5)
    passes, right = [], Source.sweep

    def sweep(self, *arguments, **settings):
        passes.append(0)
        return right(self, *arguments, **settings)

    monkeypatch.setattr(Source, "sweep", sweep)
    for df, each in ((4.0, 1), (None, 2)):
        passes.clear()
        fit = Gibbs(num_chains=2, num_samples=5, num_warmup=5).run(cellwise(1, df=df), x)
        assert len(passes) == 10 * each
        assert ("df" in fit.draws) == (df is None)


# ------------------------------------------------------------------ the rest of the contract
def test_saved_and_loaded(tmp_path):
    x, _, _ = contaminated(0.1, 0, n=40, d=5)
    fit = LIKELIHOOD.run(cellwise(2), x)
    fit.save(tmp_path / "fit")
    again = load(tmp_path / "fit", RobustPCA)
    assert again.model.scales == "cells"
    assert torch.equal(again.log_prob(x), fit.log_prob(x))
    config = fit.model.to_config()
    del config["scales"]  # as before there were any
    assert RobustPCA.from_config({**config, "df": None}).scales == "rows"


def test_single_precision():
    x, loadings, _ = contaminated(0.1, 0, n=150, d=10)
    fits = [
        EM(num_starts=1, objective="likelihood", dtype=dtype).run(cellwise(2), x)
        for dtype in (torch.float32, torch.float64)
    ]
    assert abs(angle(fits[0], loadings) - angle(fits[1], loadings)) < 0.1
    single = {site: value[0].float() for site, value in fits[1].draws.items()}
    scores = fits[1].model.log_prob(x[:10].float(), single)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[0].double(), fits[1].log_prob(x[:10]), atol=0.05, rtol=0)


def degenerate(kind):
    x, _, _ = contaminated(0.0, 0, n=30, d=4)
    if kind == "constant column":
        x[:, 1] = 3.0
    if kind == "empty row":
        x[3] = math.nan
    if kind == "huge cell":
        x[2, 0] = 1e6
    if kind == "two rows":
        x = x[:2]
    if kind == "equal rows":
        x = x[:1].repeat(10, 1)
    return x


@pytest.mark.parametrize(
    "kind",
    ["constant column", "empty row", "huge cell", "two rows", "equal rows"],
)
def test_degenerate_data(kind):
    x = degenerate(kind)
    for engine in (
        EM(num_starts=1, max_steps=50),
        VB(num_starts=1, max_steps=50, num_samples=3),
        Gibbs(num_chains=2, num_samples=3, num_warmup=10),
    ):
        fit = engine.run(cellwise(1), x)
        for site, value in fit.draws.items():
            assert bool(value.isfinite().all()), (site, engine)
        assert bool(fit.log_prob(x).isfinite().all())
    if kind == "huge cell":
        assert float(fit.draws["loc"].median(1).values.abs().max()) < 20.0


def test_verbs():
    x, _, _ = contaminated(0.1, 0, n=60, d=5)
    fit = Gibbs(num_chains=2, num_samples=10, num_warmup=50).run(cellwise(2), x)
    assert fit.encode(x[:4]).shape == (4, 2)
    assert fit.reconstruct(x[:4]).shape == (4, 5)
    assert fit.sample(7).shape == fit.sample(7, with_noise=False).shape == (7, 5)
    given = fit.condition(x[:3], ["x0", "x1", "x2"])
    assert given.sample(2).shape == (2, 3, 2)
    assert bool(given.log_prob(x[:3, 3:]).isfinite().all())
    wild = x[:2].clone()
    wild[0] = torch.tensor([40.0, -30.0, 25.0, 60.0, -50.0])
    p_values = fit.outliers(wild, calibration=x[10:]).p_values
    assert float(p_values[0]) < 0.05
    assert fit.arviz["log_likelihood"]["x"].shape == (2, 10, 60)
    assert "scales" not in str(fit.summary().invariants)


def test_refusals():
    with pytest.raises(ValueError, match="scales='columns'.*rows, cells"):
        RobustPCA(2, scales="columns")
    x, _, _ = contaminated(0.0, 0, n=20, d=3)
    each = Gamma(torch.tensor([2.0, 3.0, 4.0]), 0.1)
    with pytest.raises(TypeError, match="one for each column.*NUTS"):
        EM().run(cellwise(1, priors={"df": each}), x)
