"""Binary, count, category and mixed columns: what the data may hold, names, priors, whole fits."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch

from bayesgen.data import as_dataset
from bayesgen.models import Mixture
from bayesgen.models.families import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Gaussian,
    Poisson,
    Product,
    StudentT,
)
from bayesgen.models.families.dirichlet_columns import Levels
from bayesgen.priors import SymmetricDirichlet, prior_from_config, prior_to_config

__all__: list[str] = []


def close(left, right, tolerance=1e-10):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def table(n=60, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.integers(0, 2, n)
    frame = pd.DataFrame(
        {
            "height": rng.normal(3.0 * z, 1.0),
            "visits": rng.poisson(1.0 + 6.0 * z),
            "weight": rng.normal(-2.0 * z, 1.0),
            "colour": np.array(["red", "blue", "green"])[(z + (rng.random(n) < 0.3)) % 3],
            "smoker": rng.random(n) < 0.2 + 0.5 * z,
        }
    )
    frame.loc[rng.random(n) < 0.1, "height"] = np.nan
    frame.loc[rng.random(n) < 0.1, "colour"] = None
    return frame


# ------------------------------------------------------------------ what the data may hold
@pytest.mark.parametrize(
    ("family", "good", "bad", "message"),
    [
        (Bernoulli(), [0.0, 1.0], 2.0, "0 or 1"),
        (Bernoulli(), [0.0, 1.0], 0.5, "0 or 1"),
        (Poisson(), [0.0, 7.0], -1.0, "at least 0"),
        (Poisson(), [0.0, 7.0], 1.5, "whole number"),
        (Categorical(), [0.0, 2.0], -1.0, "from 0"),
        (Categorical(), [0.0, 2.0], 0.5, "whole code"),
        (Categorical(), [0.0, 2.0], 1e7, "pandas.factorize"),
    ],
)
def test_entries_that_a_family_cannot_hold(family, good, bad, message):
    rows = [[1.0, good[0]], [0.0, good[1]], [1.0, math.nan]]
    data = as_dataset(rows, columns=["a", "b"], kinds="real")
    bound = family.bind(data, 2, {})
    rows[1][1] = bad
    with pytest.raises(ValueError, match=r"column 'b' holds .*" + message):
        family.bind(as_dataset(rows, columns=["a", "b"], kinds="real"), 2, {})
    with pytest.raises(ValueError, match=r"column 'b' holds"):
        bound.observe(torch.tensor(rows, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"columns"):
        bound.observe(torch.zeros((3, 3), dtype=torch.float64))


def test_a_new_category_is_refused_at_test_time():
    bound = Categorical().bind(as_dataset(table()[["colour"]]), 2, {})
    assert bound.sizes == (3,)
    with pytest.raises(ValueError, match="from 0 to 2"):
        bound.observe(torch.tensor([[3.0]], dtype=torch.float64))


def test_levels_pack_and_pad(generator):
    levels = Levels((2, 4, 1))
    packed = torch.randn((5, 7), generator=generator, dtype=torch.float64)
    padded = levels.pad(packed, -1.0)
    assert padded.shape == (5, 3, 4)
    close(levels.pack(padded), packed)
    assert bool((padded[:, 0, 2:] == -1.0).all())
    close(
        levels.sum(packed), torch.stack([part.sum(-1) for part in packed.split((2, 4, 1), -1)], -1)
    )
    x = torch.tensor([[1.0, 3.0, 0.0], [math.nan, 0.0, math.nan]], dtype=torch.float64)
    expected = [[0, 1, 0, 0, 0, 1, 1], [0, 0, 1, 0, 0, 0, 0]]
    assert levels.indicators(x).T.int().tolist() == expected


def test_levels_that_no_row_has_are_kept():
    frame = pd.DataFrame({"c": pd.Categorical(["u", "v", "u"], categories=["u", "v", "w"])})
    bound = Categorical().bind(as_dataset(frame), 2, {})
    assert bound.sizes == (3,)
    observed = bound.observe(torch.zeros((1, 1), dtype=torch.float64))
    statistics = bound.statistics(observed, torch.ones((2, 1), dtype=torch.float64), None, None)
    posterior = bound.block.update(statistics)
    every = torch.arange(3.0, dtype=torch.float64).unsqueeze(-1)
    close(bound.log_predictive(every, posterior).exp().sum(-1), torch.ones(2).double())


# ------------------------------------------------------------------ priors
def test_priors_of_discrete_columns():
    binary = as_dataset([[0.0, 1.0], [1.0, 1.0]], kinds="real")
    block = Bernoulli().bind(binary, 2, {"probs": dist.Beta(2.0, 3.0)}).block
    assert block.a.tolist() == [2.0, 2.0]
    spread = dist.Beta(torch.tensor([1.0, 4.0]), 3.0).to_event(1)
    assert Bernoulli().bind(binary, 2, {"components": spread}).block.a.tolist() == [1.0, 4.0]
    block = Poisson().bind(binary, 2, {"components": dist.Gamma(2.0, 5.0)}).block
    assert (block.a.tolist(), block.b.tolist()) == ([2.0, 2.0], [5.0, 5.0])
    block = Categorical().bind(binary, 2, {"components": SymmetricDirichlet(0.5)}).block
    assert block.concentration.tolist() == [0.5, 0.5, 0.5, 0.5]
    prior = dist.Dirichlet(torch.tensor([1.0, 2.0]))
    block = Categorical().bind(binary, 2, {"probs": prior}).block
    assert block.concentration.tolist() == [1.0, 2.0, 1.0, 2.0]
    refused = [
        (Bernoulli(), {"components": dist.Gamma(2.0, 1.0)}, "support"),
        (Bernoulli(), {"components": dist.Uniform(0.0, 2.0)}, "support"),
        (Poisson(), {"components": dist.Poisson(2.0)}, "support"),
        (Bernoulli(), {"components": dist.Beta(torch.ones(3), 1.0)}, "shape"),
        (Bernoulli(), {"components": prior, "probs": prior}, "the same"),
        (Poisson(), {"rate": dist.Normal(0.0, 1.0)}, "support"),
        (Categorical(), {"probs": dist.Dirichlet(torch.ones(3))}, "shape"),
    ]
    for family, priors, message in refused:
        with pytest.raises(ValueError, match=message):
            family.bind(binary, 2, priors)
    ragged = as_dataset([[0.0, 2.0], [1.0, 1.0]], kinds="real")
    logistic = dist.LogisticNormal(torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="levels"):
        Categorical().bind(ragged, 2, {"probs": logistic.expand([2])})


@pytest.mark.parametrize(
    ("family", "prior"),
    [
        (Bernoulli(), dist.Uniform(0.0, 1.0)),
        (Poisson(), dist.LogNormal(0.0, 1.0)),
        (Categorical(), lambda: dist.Dirichlet(torch.ones(2))),
    ],
)
def test_priors_that_are_not_conjugate(family, prior):
    bound = family.bind(as_dataset([[0.0], [1.0]], kinds="real"), 2, {"components": prior})
    with pytest.raises(TypeError, match="NUTS"):
        _ = bound.block


def test_priors_survive_saving_unchanged():
    binary = as_dataset([[0.0, 1.0], [1.0, 1.0]], kinds="real")
    prior = dist.Beta(torch.tensor([1.5, 4.0]), 3.0).to_event(1)
    model = Mixture(Bernoulli(), 2, {"components": prior}).bind(binary)
    again = Mixture.from_config(model.to_config())
    assert again.blocks["components"].a.tolist() == [1.5, 4.0]
    assert repr(again) == repr(model)
    kept = prior_from_config(prior_to_config(prior))
    assert kept.event_shape == (2,)
    scalar = Mixture(Poisson(), 2, {"components": dist.Gamma(2.0, 5.0)}).bind(binary)
    again = Mixture.from_config(scalar.to_config())
    assert again.blocks["components"].a.tolist() == [2.0, 2.0]


def test_rare_ones_stay_rare_under_the_default_prior():
    x = torch.zeros((1000, 1), dtype=torch.float64)
    x[0] = 1.0
    bound = Bernoulli().bind(as_dataset(x, kinds="real"), 10, {})
    block = bound.block
    assert float(block.a / (block.a + block.b)) == pytest.approx(1.5 / 1001.0)


# ------------------------------------------------------------------ products
def test_kinds_choose_the_families():
    data = as_dataset(table())
    bound = Product().bind(data, 3, {})
    kinds = {part.name: (type(part.family).__name__, part.columns) for part in bound.bound}
    assert kinds == {
        "real": ("Gaussian", (0, 2)),
        "count": ("Poisson", (1,)),
        "binary": ("Bernoulli", (4,)),
        "category": ("Categorical", (3,)),
    }
    explicit = Product.from_schema(data.schema, real=DiagonalGaussian()).bind(data, 3, {})
    assert type(explicit.bound[0].family) is DiagonalGaussian
    assert explicit.coords()["category_level"] == [0, 1, 2]
    assert explicit.coords()["real_column"] == ["height", "weight"]
    assert "by the kinds" in Product().describe()
    assert "StudentT" in Product(real=StudentT()).bind(data, 3, {}).describe()


def test_products_refuse_impossible_parts():
    data = as_dataset(table()[["height", "visits", "weight"]])
    refused = [
        ({"a": (Gaussian(), ["height", "weight"])}, "no part has the column visits"),
        ({"a": (Gaussian(), [0, 1, 2]), "b": (Poisson(), ["visits"])}, "in the parts 'a' and 'b'"),
        ({"a": (Gaussian(), ["heigth"])}, "no column 'heigth'"),
        ({"a": (Gaussian(), [0, 1, 7])}, "no column 7"),
        ({"a": (Gaussian(), [0, 1, 2]), "b": (Poisson(), [])}, "has no columns"),
    ]
    for parts, message in refused:
        with pytest.raises(ValueError, match=message):
            Product(parts).bind(data, 2, {})
    for names in (("a", "a_b"), ("a b",), ()):
        with pytest.raises(ValueError, match="Product"):
            Product({name: (Gaussian(), [0]) for name in names})
    with pytest.raises(ValueError, match="no column of the data is of that kind"):
        Product().bind(data, 2, {"binary_components": dist.Beta(1.0, 1.0)})
    bound = Product().bind(data, 2, {"count_components": dist.Gamma(2.0, 5.0)})
    assert bound.block.blocks["count"].a.tolist() == [2.0]
    with pytest.raises(ValueError, match="2 columns, but the model has 3"):
        bound.observe(torch.zeros((1, 2), dtype=torch.float64))


def test_a_product_of_one_family_is_that_family(generator):
    x = torch.randn((20, 2), generator=generator, dtype=torch.float64)
    data, weights = as_dataset(x), torch.rand((2, 20), generator=generator).double()
    whole = DiagonalGaussian().bind(data, 2, {})
    parts = Product({"b": (DiagonalGaussian(), [1]), "a": (DiagonalGaussian(), ["x0"])})
    parts = parts.bind(data, 2, {})
    found = []
    for family in (whole, parts):
        statistics = family.statistics(family.observe(x), weights, None, None)
        posterior = family.block.update(statistics)
        found.append(
            [
                family.block.kl(posterior),
                family.block.log_evidence(statistics, {}),
                family.log_predictive(x, posterior),
                family.block.log_prior(family.block.maximise(statistics)),
            ]
        )
    for left, right in zip(*found, strict=True):
        close(left, right)


def test_streamed_columns_bind_as_in_memory(tmp_path):
    path = tmp_path / "table.parquet"
    frame = table(500)
    frame.to_parquet(path)
    held = Product().bind(as_dataset(path, in_memory=True), 2, {})
    streamed = Product().bind(as_dataset(path, in_memory=False), 2, {})
    rows = as_dataset(path, in_memory=True).tensor()
    weights = torch.full((2, 500), 0.5, dtype=torch.float64)
    found = []
    for family in (held, streamed):
        statistics = family.statistics(family.observe(rows), weights, None, None)
        found.append(family.log_predictive(rows, family.block.update(statistics)))
    close(*found)


@pytest.mark.parametrize("engine", ["EM", "VB", "Gibbs"])
def test_whole_fits_of_a_mixed_table(engine):
    from bayesgen import inference

    settings = {
        "EM": {"num_starts": 3},
        "VB": {"num_samples": 20},
        "Gibbs": {"num_chains": 2, "num_samples": 40, "num_warmup": 40},
    }
    frame = table(80)
    real = Gaussian() if engine == "Gibbs" else StudentT()
    model = Mixture(Product(real=real), 2 if engine == "EM" else 4)
    fit = getattr(inference, engine)(**settings[engine]).run(model, frame, seed=0)
    # Chains number their components differently until they are aligned.
    occupied = (fit.aligned.draws["weights"].mean((0, 1)) > 0.1).sum()
    assert int(occupied) == 2
    filled = fit.impute(frame)
    codes = filled[..., 3]
    assert bool(((codes == codes.round()) & (codes >= 0) & (codes <= 2)).all())
    assert torch.isfinite(fit.log_prob(frame)).all()


# ------------------------------------------------------------------ words are no numbers
@pytest.mark.parametrize("family", [Gaussian(), DiagonalGaussian(), StudentT(), Poisson()])
def test_families_of_numbers_refuse_categories(family):
    frame = table()
    with pytest.raises(ValueError, match=r"'colour' holds categories.*Product"):
        Mixture(family, 2).bind(as_dataset(frame[["visits", "colour"]]))
    assert Mixture(family, 2).bind(as_dataset(frame[["visits", "smoker"]])).is_bound
