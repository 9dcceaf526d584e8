"""The fit's verbs against textbook answers, bounded chunks, and bit-equal reloads."""

from __future__ import annotations

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import bayesgen
from bayesgen import rng, verbs
from bayesgen.capabilities import Model, Scored
from bayesgen.data import as_dataset
from bayesgen.fit import Fit, load
from bayesgen.toys import UnitMixture, pretend

__all__: list[str] = []


def rows(num_rows=120, num_columns=2, gap=5.0, seed=0):
    generator = rng.make_generator(seed)
    shift = gap * torch.randint(0, 2, (num_rows, 1), generator=generator)
    return rng.standard_normal((num_rows, num_columns), generator) + shift


def holes(x, share=0.3, seed=1):
    gaps = torch.rand(x.shape, generator=rng.make_generator(seed)) < share
    return torch.where(gaps, torch.nan, x)


@pytest.fixture(scope="module")
def fit():
    return pretend(UnitMixture(2), rows(), switch=True)


# ---------------------------------------------------------------- construction
def test_draws_are_checked(fit):
    with pytest.raises(ValueError, match="draws is empty"):
        Fit(fit.model, {})
    with pytest.raises(ValueError, match="same"):
        Fit(fit.model, {"a": torch.zeros(1, 5), "b": torch.zeros(2, 5)})
    with pytest.raises(ValueError, match="same"):
        Fit(fit.model, {"a": torch.zeros(1, 5)}, sample_stats={"lp": torch.zeros(5)})
    with pytest.raises(ValueError, match="at least one"):
        Fit(fit.model, {"a": torch.zeros(1, 0)})
    with pytest.raises(ValueError, match="schema"):
        _ = Fit(fit.model, {"a": torch.zeros(1, 1)}).schema


def test_it_says_what_it_is(fit):
    assert repr(fit) == "Fit(UnitMixture by pretend: 2 chains x 100 draws, 120 rows x 2 columns)"
    assert (fit.num_chains, fit.num_draws) == (2, 100)
    assert fit.columns == ("x0", "x1")
    assert bayesgen.Fit is Fit
    assert bayesgen.load is load


# ---------------------------------------------------------------- densities
def test_log_prob_of_one_component_is_the_textbook_s():
    x = rows(30, 1, gap=0.0)
    fit = pretend(UnitMixture(1), x, num_chains=4, num_draws=5000)
    precision = len(x) + 0.01
    mean, scale = float(x.sum()) / precision, math.sqrt(1 + 1 / precision)
    new = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    expected = stats.norm(mean, scale).logpdf(new[:, 0].numpy())
    # 20,000 draws: the density's Monte Carlo error is half a percent at the ends of the range
    np.testing.assert_allclose(fit.log_prob(new).numpy(), expected, atol=0.02)


def test_log_prob_is_the_log_of_the_mean_over_draws(fit):
    x = holes(rows(seed=3))
    by_hand = fit.log_likelihood(x).flatten(0, 1).logsumexp(0) - math.log(200)
    torch.testing.assert_close(fit.log_prob(x), by_hand)
    assert fit.log_likelihood(x).shape == (2, 100, 120)


def test_log_prob_integrates_to_one(fit):
    grid = torch.linspace(-12, 18, 151, dtype=torch.float64)
    cells = torch.cartesian_prod(grid, grid)
    assert float(fit.log_prob(cells).exp().sum()) * 0.2**2 == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("budget", [16, 1000, 2**30])
def test_chunks_do_not_change_answers(fit, monkeypatch, budget):
    x = holes(rows(40, seed=3))
    before = [fit.log_prob(x), fit.log_likelihood(x), fit.encode(x), fit.impute_mean(x)]
    monkeypatch.setattr(verbs, "_BUDGET", budget)
    after = [fit.log_prob(x), fit.log_likelihood(x), fit.encode(x), fit.impute_mean(x)]
    for left, right in zip(before, after, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_memory_is_bounded():
    """The largest intermediate of a scoring call stays at the budget, whatever n and draws."""
    sizes = []

    fit = pretend(UnitMixture(2), rows(), num_draws=500)
    original = UnitMixture.log_prob

    def watch(self, x, draws):
        sizes.append(len(x) * draws["weights"].shape[0])
        return original(self, x, draws)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnitMixture, "log_prob", watch)
        fit.log_prob(rows(5_000))
    assert max(sizes) * 16 <= verbs._BUDGET
    assert sum(sizes) == 5_000 * 1000


def test_every_form_of_data_gives_the_same(fit, tmp_path):
    x = rows(20, seed=4)
    expected = fit.log_prob(x)
    frame = pd.DataFrame(x.numpy(), columns=["x0", "x1"])
    frame.to_csv(tmp_path / "x.csv", index=False, float_format="%.17g")
    frame.to_parquet(tmp_path / "x.parquet")
    for form in (
        x.numpy(),
        x.tolist(),
        frame,
        frame[["x1", "x0"]],
        as_dataset(x),
        tmp_path / "x.csv",
        tmp_path / "x.parquet",
    ):
        torch.testing.assert_close(fit.log_prob(form), expected, rtol=0, atol=1e-12)
    streamed = as_dataset(tmp_path / "x.parquet", schema=fit.schema, in_memory=False)
    torch.testing.assert_close(fit.log_prob(streamed), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("verb", ["log_prob", "encode", "predict", "impute", "log_likelihood"])
def test_wrong_columns_are_refused(fit, verb):
    with pytest.raises(ValueError, match="2 are needed"):
        getattr(fit, verb)(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="inf"):
        getattr(fit, verb)([[0.0, float("inf")]])
    with pytest.raises(ValueError, match="missing column"):
        getattr(fit, verb)(pd.DataFrame({"x0": [1.0], "other": [2.0]}))


def test_a_missing_capability_is_named(fit):
    class OnlyScored(Model, Scored):
        bind = to = to_config = from_config = lambda self, *a: self
        is_bound, dims = True, {}
        coords = log_prob = lambda self, *a: {}

    bare = dataclasses.replace(fit, model=OnlyScored())
    for verb, missing in (("encode", "Encoder"), ("impute", "Conditional")):
        with pytest.raises(TypeError, match=missing):
            getattr(bare, verb)(rows(3))
    with pytest.raises(TypeError, match="Generative"):
        bare.sample(3)


# ---------------------------------------------------------------- sampling
def test_samples_follow_the_predictive():
    x = rows(30, 1, gap=0.0)
    fit = pretend(UnitMixture(1), x, num_chains=2, num_draws=1000)
    precision = len(x) + 0.01
    law = stats.norm(float(x.sum()) / precision, math.sqrt(1 + 1 / precision))
    drawn = fit.sample(3000, seed=1)[:, 0].numpy()
    assert stats.kstest(drawn, law.cdf).pvalue > 1e-3
    assert stats.kstest(drawn, stats.norm(law.mean() + 0.2, law.std()).cdf).pvalue < 1e-3


def test_same_seed_same_samples(fit):
    before = torch.get_rng_state()
    assert torch.equal(fit.sample(10, seed=3), fit.sample(10, seed=3))
    assert not torch.equal(fit.sample(10, seed=3), fit.sample(10, seed=4))
    x = holes(rows(20))
    left, right = fit.impute(x, num_samples=2, seed=1), fit.impute(x, num_samples=2, seed=1)
    assert torch.equal(left, right)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="num_samples=0"):
        fit.sample(0)
    with pytest.raises(ValueError, match="num_samples=0"):
        fit.impute(x, num_samples=0)


# ---------------------------------------------------------------- latents
def test_responsibilities_survive_label_switching(fit):
    x = rows(60, seed=5)
    responsibilities = fit.encode(x)
    assert responsibilities.shape == (60, 2)
    torch.testing.assert_close(responsibilities.sum(-1), torch.ones(60, dtype=torch.float64))
    truth = x.mean(-1) > 2.5
    agree = (fit.predict(x).bool() == truth).double().mean()
    assert max(float(agree), 1 - float(agree)) > 0.97
    # without alignment the average over switched labels says nothing: the negative control
    raw = verbs.posterior_mean(fit.model, x, verbs.flatten_draws(fit.draws))
    assert float((raw - 0.5).abs().max()) < 0.2


# ---------------------------------------------------------------- gaps
def test_imputation_keeps_what_was_observed(fit):
    x = holes(rows(50, seed=6))
    x[3] = torch.nan
    copies = fit.impute(x, num_samples=7, seed=0)
    assert copies.shape == (7, 50, 2)
    assert bool(copies.isfinite().all())
    observed = ~x.isnan()
    assert torch.equal(copies[:, observed], x[observed].expand(7, -1))
    assert float(copies[:, ~observed].std(0).min()) > 0.0
    mean = fit.impute_mean(x)
    assert torch.equal(mean[observed], x[observed])
    many = fit.impute(x, num_samples=2000, seed=1)
    error = (many.mean(0) - mean)[~observed] / many.std(0)[~observed] * math.sqrt(2000)
    assert float(error.abs().max()) < 5.0


def test_imputation_follows_the_conditional():
    fit = pretend(UnitMixture(2), rows(gap=8.0), num_chains=2, num_draws=200)
    copies = fit.impute([[float("nan"), 8.0]], num_samples=800)[:, 0, 0]
    assert float(copies.mean()) == pytest.approx(8.0, abs=0.4)  # the other cluster is at 0
    assert float(copies.std()) == pytest.approx(1.0, abs=0.15)


def test_nothing_missing_nothing_changed(fit):
    x = rows(5)
    assert torch.equal(fit.impute_mean(x), x)
    assert torch.equal(fit.impute(x, num_samples=1)[0], x)


@pytest.mark.parametrize(
    "law",
    [
        torch.distributions.Normal(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5])),
        torch.distributions.MultivariateNormal(
            torch.zeros(2), scale_tril=torch.tensor([[1.0, 0.0], [0.8, 0.6]])
        ),
        torch.distributions.Bernoulli(torch.tensor([0.2, 0.9])),
        torch.distributions.Poisson(torch.tensor([3.0, 0.5])),
        torch.distributions.Categorical(torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])),
        torch.distributions.Gamma(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0])),
        torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(torch.tensor([0.3, 0.7])),
            torch.distributions.Independent(
                torch.distributions.Normal(
                    torch.tensor([[0.0, 0.0], [5.0, 4.0]]), torch.ones(2, 2)
                ),
                1,
            ),
        ),
    ],
    ids=lambda law: type(law).__name__,
)
def test_draws_from_an_explicit_generator_follow_the_law(law):
    before = torch.get_rng_state()
    num = 4000
    batch = law.expand((num, *law.batch_shape))
    drawn = verbs.draw_from(batch, rng.make_generator(0)).double()
    assert torch.equal(torch.get_rng_state(), before)
    with rng.fork(rng.make_generator(1)):
        reference = law.sample((num,)).double()
    assert drawn.shape == reference.shape
    error = (drawn.var(0) / num + reference.var(0) / num).sqrt()
    assert float(((drawn.mean(0) - reference.mean(0)) / error).abs().max()) < 4.5
    for k in range(drawn.shape[-1]):
        assert stats.ks_2samp(drawn[:, k], reference[:, k]).pvalue > 1e-4
    left = (drawn[:, 0] * drawn[:, 1]), (reference[:, 0] * reference[:, 1])
    assert stats.ks_2samp(*left).pvalue > 1e-4


def test_a_child_with_its_own_sampler_is_respected():
    class Shifted(torch.distributions.Normal):
        def sample(self, sample_shape=()):
            return super().sample(sample_shape) + 100.0

    before = torch.get_rng_state()
    law = Shifted(torch.zeros(50), torch.ones(50))
    one, two = (verbs.draw_from(law, rng.make_generator(0)) for _ in range(2))
    assert float(one.min()) > 90.0
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_give_what_one_thread_gives(fit):
    x = holes(rows(60, seed=8))

    def work(seed):
        return fit.log_prob(x), fit.impute(x, num_samples=2, seed=seed), fit.sample(9, seed=seed)

    expected = [work(seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as pool:
        for left, right in zip(expected, pool.map(work, range(6)), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---------------------------------------------------------------- saved
def full(fit):
    return dataclasses.replace(
        fit,
        sample_stats={"lp": fit.draws["weights"][..., 0].log(), "n": torch.ones(2, 100).long()},
        history={"elbo": [-3.0, -2.5, float("nan")]},
        posterior={"components": {"loc": torch.full((2, 3), 1 / 3, dtype=torch.float64).mT}},
        attrs={**fit.attrs, "settings": {"num_starts": 3, "tolerance": 1e-6}, "messages": ["ü"]},
    )


def test_saved_and_loaded_bit_by_bit(fit, tmp_path):
    saved = full(fit)
    saved.save(tmp_path / "run")
    again = load(tmp_path / "run", UnitMixture)
    x = holes(rows(40, seed=9))
    for verb in ("log_prob", "encode", "log_likelihood", "impute", "impute_mean", "predict"):
        assert torch.equal(getattr(saved, verb)(x), getattr(again, verb)(x)), verb
    assert torch.equal(saved.sample(5), again.sample(5))
    assert repr(saved) == repr(again)
    assert str(saved.summary()) == str(again.summary())
    assert saved.attrs == again.attrs
    assert json.dumps(dict(saved.history)) == json.dumps(dict(again.history))
    assert torch.equal(saved.data.tensor(), again.data.tensor())
    assert saved.data.schema == again.data.schema
    left, right = saved.posterior["components"]["loc"], again.posterior["components"]["loc"]
    assert torch.equal(left, right)
    assert right.is_contiguous()
    assert left.is_contiguous()
    for name, value in saved.sample_stats.items():
        assert torch.equal(value, again.sample_stats[name])
        assert value.dtype == again.sample_stats[name].dtype


def test_nothing_in_the_folder_is_a_pickle(fit, tmp_path):
    fit.save(tmp_path / "run")
    suffixes = {path.suffix for path in (tmp_path / "run").iterdir()}
    assert suffixes <= {".json", ".safetensors"}
    for path in (tmp_path / "run").iterdir():
        assert path.read_bytes()[:1] != b"\x80"


def test_without_data_alignment_still_works(fit, tmp_path):
    fit.save(tmp_path / "run", include_data=False)
    again = Fit.load(tmp_path / "run", UnitMixture)
    assert again.data is None
    x = rows(20, seed=10)
    assert torch.equal(fit.encode(x), again.encode(x))
    assert "log_likelihood" not in again.arviz
    assert again.columns == fit.columns


def test_large_data_stay_out(fit, tmp_path, monkeypatch):
    monkeypatch.setattr("bayesgen.saving.MAX_DATA_BYTES", 100)
    fit.save(tmp_path / "run")
    assert load(tmp_path / "run", UnitMixture).data is None
    fit.save(tmp_path / "run", include_data=True)
    assert load(tmp_path / "run", UnitMixture).data is not None


def test_a_fit_without_data_at_hand_aligns_by_its_own_samples(fit):
    bare = Fit(fit.model, fit.draws, attrs={"schema": fit.schema.to_config()})
    assert bare.anchors.shape == (200, 2)
    torch.testing.assert_close(bare.aligned.draws["loc"], fit.aligned.draws["loc"])
    with pytest.raises(ValueError, match="in memory"):
        bare.save("/nowhere", include_data=True)


def test_loading_refuses_what_it_does_not_know(fit, tmp_path):
    fit.save(tmp_path / "run")
    with pytest.raises(ValueError, match="model=UnitMixture"):
        load(tmp_path / "run")

    class Other(UnitMixture.__mro__[1]):
        pass

    with pytest.raises(ValueError, match="class UnitMixture, got Other"):
        load(tmp_path / "run", Other)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")
    from bayesgen.storage import write_folder

    write_folder(tmp_path / "foreign", tensors={}, config={"a": 1})
    with pytest.raises(ValueError, match="holds no fit"):
        load(tmp_path / "foreign")


def test_to_device(fit, device):
    moved = fit.to(device)
    x = rows(10, seed=11)
    assert moved.device.type == device.type
    torch.testing.assert_close(moved.log_prob(x).cpu(), fit.log_prob(x))
    torch.testing.assert_close(moved.encode(x).cpu(), fit.encode(x))
    assert moved.sample(3).device.type == device.type
    assert moved.impute(holes(x)).device.type == device.type


# ---------------------------------------------------------------- with a real model and engine
def test_categories_with_numeric_levels_go_through_every_verb(tmp_path):
    from bayesgen.inference import VB
    from bayesgen.models import Mixture
    from bayesgen.models.families.categorical import Categorical

    grade = pd.Categorical([1, 5, 7, 5] * 10)  # levels look like numbers: codes must not mix in
    table = pd.DataFrame({"grade": grade, "side": ["u", "v"] * 20})
    fit = VB(num_starts=1).run(Mixture(Categorical(), 2), table, seed=0)
    hole = table.copy()
    hole.loc[0, "grade"] = None
    mode = fit.impute_mean(hole)[0].tolist()
    assert mode in ([0.0, 0.0], [2.0, 0.0])  # rows of side u have grade 1 or 7
    assert set(fit.impute(hole, num_samples=50)[:, 0, 0].tolist()) <= {0.0, 1.0, 2.0}
    assert fit.anchors.shape == (40, 2)
    assert hasattr(fit.arviz, "log_likelihood")  # what ArviZ 0.2x and 1.x have in common
    assert len(fit.outliers(table, calibration="model").p_values) == 40
    fit.save(tmp_path / "run")
    assert torch.equal(load(tmp_path / "run").log_prob(table), fit.log_prob(table))


def test_a_loaded_fit_still_refits(tmp_path):
    from bayesgen.inference import VB
    from bayesgen.models import GaussianMixture

    x = rows(200)
    fit = VB(num_starts=1, dtype=torch.float32).run(GaussianMixture(3), x, seed=0)
    fit.save(tmp_path / "run")
    again = load(tmp_path / "run")
    part = fit.data.subset(slice(0, 100))
    left, right = fit.refit(part, 1), again.refit(part, 1)
    assert torch.equal(left.log_prob(x), right.log_prob(x))
    found = again.outliers([[0.2, 0.1], [60.0, -40.0]], fdr=0.1)
    assert found.is_outlier.tolist() == [False, True]
    assert "exact" in str(found)
