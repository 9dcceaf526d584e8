"""Starts: random responsibilities beside k-means++, features kept between passes, float32."""

from __future__ import annotations

import pytest
import torch

from bayesgen import rng
from bayesgen.data import as_dataset
from bayesgen.inference import EM, VB, Gibbs
from bayesgen.inference.conjugate.source import Source
from bayesgen.models import GaussianMixture, Mixture
from bayesgen.models.families.bernoulli import Bernoulli

__all__: list[str] = []


def baskets(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse binary rows of three kinds, each with ten items of its own among thirty."""
    kind = torch.randint(3, (n,), generator=generator)
    share = torch.full((3, 30), 0.02)
    for k in range(3):
        share[k, 10 * k : 10 * k + 10] = 0.35
    return torch.bernoulli(share[kind], generator=generator), kind


def test_random_starts_differ_and_account_for_every_row(generator) -> None:
    x, _ = baskets(200, generator)
    data = as_dataset(x)
    model = Mixture(Bernoulli(), 6).bind(data)
    rows = data.tensor(torch.float64)
    found = model.scattered(rows, num_batch=3, generator=generator, varied=True)
    count = found["weights"]["count"]
    torch.testing.assert_close(count.sum(-1), torch.full((3,), 200.0, dtype=torch.float64))
    # From all components down to two.
    assert (count > 0).sum(-1).tolist() == [6, 3, 2]
    ones = found["components"]["moments"][..., 31:].sum(-2)
    torch.testing.assert_close(ones, rows.sum(0).expand(3, -1))
    assert not torch.allclose(count[1, :2], count[2, :2])


@pytest.mark.parametrize(
    "engine",
    [
        EM(start="random"),
        VB(start="random", num_samples=10),
        Gibbs(start="random", num_chains=2, num_samples=20, num_warmup=60),
    ],
    ids=["EM", "VB", "Gibbs"],
)
def test_a_random_start_finds_the_kinds_of_sparse_rows(engine, generator) -> None:
    x, kind = baskets(400, generator)
    fit = engine.run(Mixture(Bernoulli(), 3), x, seed=1)
    label = fit.predict(x)
    table = torch.zeros(3, 3)
    table.index_put_((kind, label), torch.ones(len(x)), accumulate=True)
    assert float(table.amax(0).sum()) / len(x) > 0.9


def test_what_starts_there_are_is_said() -> None:
    for engine in (EM, VB, Gibbs):
        with pytest.raises(ValueError, match=r"start='kmeans'.*k-means\+\+, random"):
            engine(start="kmeans")


def test_gibbs_moves_in_float32(generator) -> None:
    """Messages come in float64, features in float32: a split's launch must not mix them."""
    x, _ = baskets(150, generator)
    engine = Gibbs(num_chains=2, num_samples=10, num_warmup=10, dtype=torch.float32)
    fit = engine.run(Mixture(Bernoulli(), 5), x.numpy(), seed=0)
    assert fit.attrs["split_merge_rate"] is not None
    assert bool(fit.sample_stats["lp"].isfinite().all())


@pytest.mark.parametrize("wide", [True, False])
def test_features_are_kept_where_they_are_no_larger_than_the_rows(wide: bool, monkeypatch) -> None:
    """Binary rows are their own features; a Gaussian's are all products of two columns."""
    monkeypatch.setattr("bayesgen.inference.conjugate.source._KEEP", 0)
    generator = rng.make_generator(0)
    x = baskets(600, generator)[0] if wide else torch.randn((600, 8), generator=generator)
    data = as_dataset(x)
    model = (Mixture(Bernoulli(), 2) if wide else GaussianMixture(2)).bind(data)
    source = Source(model, data, batch_size=256, dtype=torch.float32)
    first, second = list(source), list(source)
    assert len(first) == len(second) == 3
    assert all(a is b for a, b in zip(first, second, strict=True)) == wide


@pytest.mark.parametrize("holes", [True, False])
@pytest.mark.parametrize("columns", [1, 3, 4])
def test_condensed_batches_are_the_same_to_the_bit(holes: bool, columns: int, monkeypatch) -> None:
    """Between passes only the columns are kept; every statistic must not notice."""
    monkeypatch.setattr("bayesgen.inference.conjugate.source._KEEP", 0)
    generator = rng.make_generator(0)
    x = torch.randn((500, columns), generator=generator, dtype=torch.float64)
    if holes:
        x[torch.rand(x.shape, generator=generator) < 0.2] = torch.nan
    data = as_dataset(x)
    model = GaussianMixture(2).bind(data)
    start = model.start(torch.nan_to_num(x), num_batch=2, generator=generator)
    messages = {
        name: block.message(block.update(start[name])) for name, block in model.blocks.items()
    }
    source = Source(model, data, batch_size=200, dtype=torch.float32)
    first, second = source.sweep(messages), source.sweep(messages)
    assert source._condensed
    assert sum(len(g.features) for b in source._kept for g in b.groups) <= 3 * 2**columns * columns
    assert torch.equal(first.bound, second.bound)
    for block, values in first.statistics.items():
        for name, value in values.items():
            assert torch.equal(value, second.statistics[block][name])


def test_forgotten_parentheses_are_named() -> None:
    x = torch.arange(18.0, dtype=torch.float64).reshape(9, 2)
    for model in (GaussianMixture, Mixture):
        with pytest.raises(TypeError, match=rf"VB\(\)\.run\({model.__name__}\(\.\.\.\), data\)"):
            VB().run(model, x)
    with pytest.raises(TypeError, match="called on the engine's class"):
        VB.run(GaussianMixture(2), x)


def test_gibbs_says_how_many_clusters(generator) -> None:
    x = torch.randn((40, 1), generator=generator, dtype=torch.float64)
    x[:20] += 30.0
    engine = Gibbs(num_chains=2, num_samples=40, num_warmup=40)
    fit = engine.run(GaussianMixture(4), x, seed=0)
    counts = fit.sample_stats["num_occupied"].flatten().long()
    assert fit.attrs["num_occupied"] == int(counts.bincount().argmax()) == 2
