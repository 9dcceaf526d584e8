"""The number of clusters is no lottery, and the density is at least as good as scikit-learn's."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bayesgen.inference import VB, Gibbs
from bayesgen.models import GaussianMixture

__all__: list[str] = []

COLUMNS = {
    "iris": ("iris.csv", slice(0, 4)),
    "wine": ("wine13.csv", slice(1, None)),
    "faithful": ("faithful.csv", slice(0, None)),
    "galaxies": ("galaxies.csv", slice(0, None)),
    "breast cancer": ("wdbc.csv", slice(2, None)),
}


def load(shared_data: Path, name: str) -> np.ndarray:
    file, columns = COLUMNS[name]
    frame = pd.read_csv(shared_data / "classics" / file)
    return frame.iloc[:, columns].to_numpy(float)


def blobs(seed, d=2, n=800, k=8):
    """Eight round clusters at least six standard deviations apart."""
    r = np.random.default_rng(seed)
    centres: list[np.ndarray] = []
    while len(centres) < k:
        point = r.uniform(-20, 20, d)
        if all(np.linalg.norm(point - other) > 6 for other in centres):
            centres.append(point)
    label = np.arange(n) % k
    return np.array(centres)[label] + r.normal(size=(n, d)), label


def number(seeds, engine, mixture, x):
    return [engine.run(mixture, x, seed=seed).attrs["num_occupied"] for seed in seeds]


def best_of_scikit_learn(train, test, num_fits):
    from sklearn.mixture import BayesianGaussianMixture

    scores = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(num_fits):
            peer = BayesianGaussianMixture(n_components=10, max_iter=1000, random_state=seed)
            scores.append(float(peer.fit(train).score(test)))
    return max(scores)


# ------------------------------------------------------------------ eight blobs
@pytest.mark.parametrize("d", [2, 5])
def test_eight_blobs(d):
    for seed in range(2):
        x, label = blobs(seed, d)
        fit = VB(num_samples=2).run(GaussianMixture(25), x, seed=seed)
        assert fit.attrs["num_occupied"] == 8
        found = fit.predict(x).numpy()
        pairs = set(zip(found.tolist(), label.tolist(), strict=True))
        confused = len(pairs) - 8
        assert confused <= 4  # a few rows between neighbours


@pytest.mark.slow
@pytest.mark.parametrize("d", [2, 5])
def test_eight_blobs_in_nineteen_of_twenty_seeds(d):
    engine = VB(num_samples=2)
    found = [number([s], engine, GaussianMixture(25), blobs(s, d)[0])[0] for s in range(20)]
    assert found.count(8) >= 19, found


def modes(seed, d=2):
    """Most frequent number of occupied components of each chain."""
    engine = Gibbs(num_chains=2, num_samples=100, num_warmup=150)
    fit = engine.run(GaussianMixture(25), blobs(seed, d, n=400)[0], seed=seed)
    return fit.sample_stats["num_occupied"].mode(-1).values.tolist()


def test_eight_blobs_by_gibbs():
    assert modes(0) == [8.0, 8.0]


@pytest.mark.slow
def test_eight_blobs_by_gibbs_in_nineteen_of_twenty_seeds():
    found = [modes(seed) for seed in range(20)]
    assert sum(pair == [8.0, 8.0] for pair in found) >= 19, found


# ------------------------------------------------------------------ real data
@pytest.mark.parametrize("name", ["galaxies", "faithful", "iris", "wine"])
def test_same_number_of_clusters(shared_data, name):
    x = load(shared_data, name)
    seeds = range(2) if name == "wine" else range(3)
    found = number(seeds, VB(num_samples=2), GaussianMixture(10), x)
    assert len(set(found)) == 1, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["galaxies", "faithful", "iris", "wine"])
def test_same_number_of_clusters_over_ten_seeds(shared_data, name):
    x = load(shared_data, name)
    fits = [VB(num_samples=2).run(GaussianMixture(10), x, seed=seed) for seed in range(10)]
    found = [(fit.attrs["num_occupied"], round(fit.attrs["elbo"], 2)) for fit in fits]
    assert len({k for k, _ in found}) == 1, found


@pytest.mark.slow
def test_same_number_of_clusters_with_gaps(shared_data):
    x = load(shared_data, "wine")
    x[np.random.default_rng(0).random(x.shape) < 0.05] = np.nan
    found = number(range(3), VB(num_samples=2), GaussianMixture(10), x)
    assert len(set(found)) == 1, found


# ------------------------------------------------------------------ held-out density
def split(x, seed):
    order = np.random.default_rng(seed).permutation(len(x))
    cut = len(x) // 5
    return x[order[cut:]], x[order[:cut]]


def held_out(x, seed, num_fits):
    train, test = split(x, seed)
    ours = float(VB(num_samples=2).run(GaussianMixture(10), train).log_prob(test).mean())
    return ours, best_of_scikit_learn(train, test, num_fits)


@pytest.mark.parametrize("name", ["iris", "wine"])
def test_held_out_density(shared_data, name):
    ours, theirs = held_out(load(shared_data, name), 0, 3)
    assert ours >= theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["iris", "wine", "breast cancer"])
def test_held_out_density_against_the_best_of_ten(shared_data, name):
    x = load(shared_data, name)
    pairs = [held_out(x, seed, 10) for seed in range(5)]
    assert all(ours >= theirs for ours, theirs in pairs), pairs
