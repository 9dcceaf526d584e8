"""Robust scales of columns: one cell far out moves neither the priors nor the answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayesgen import rng
from bayesgen.data import as_dataset
from bayesgen.inference import EM, VB, Gibbs
from bayesgen.models import PPCA, RobustPCA
from bayesgen.models.linear import medians
from bayesgen.models.linear.medians import find_spread

__all__: list[str] = []

ENGINES = {
    "ml": EM(num_starts=1, objective="likelihood"),
    "mode": EM(num_starts=1),
    "vb": VB(num_starts=1, num_samples=200),
    "gibbs": Gibbs(num_chains=2, num_samples=200, num_warmup=100),
}


def rows(n=150, d=6):
    generator = rng.make_generator(0)
    loadings = rng.standard_normal((d, 2), generator)
    x = rng.standard_normal((n, 2), generator) @ loadings.T
    return x + 0.5 * rng.standard_normal((n, d), generator)


def with_cell(x, value):
    x = x.clone()
    x[3, 1] = value
    return x


def answer(engine, scales, x):
    draws = engine.run(RobustPCA(2, scales=scales), x, seed=0).draws
    scatter = (draws["loadings"] @ draws["loadings"].mT).flatten(0, 1).mean(0)
    return draws["noise_scale"].mean(), draws["loc"].flatten(0, 1).mean(0), scatter


@pytest.mark.parametrize("scales", ["rows", "cells"])
@pytest.mark.parametrize("name", ENGINES)
def test_a_cell_of_1e12_does_not_rule(scales, name):
    """With the standard deviation it made the noise a million and the loadings nothing."""
    x = rows()
    clean = answer(ENGINES[name], scales, x)
    noise, loc, scatter = answer(ENGINES[name], scales, with_cell(x, 1e12))
    # A row so far out takes the tails of all rows along; a cell takes those of its column alone.
    share = 0.05 if scales == "cells" else 0.25
    assert float(noise / clean[0]) == pytest.approx(1.0, abs=share)
    assert float((loc - clean[1]).abs().max()) < (0.05 if scales == "cells" else 0.2)
    assert float((scatter - clean[2]).norm() / clean[2].norm()) < share


def test_default_priors_hardly_hear_of_a_cell():
    x = rows()
    clean, moved = (RobustPCA(2).bind(as_dataset(y)).bound.scales for y in (x, with_cell(x, 1e12)))
    torch.testing.assert_close(moved.scale, clean.scale, rtol=0.02, atol=0.0)
    torch.testing.assert_close(moved.offset, clean.offset, rtol=0.0, atol=0.05)
    plain = PPCA(2).bind(as_dataset(x)).bound.scales
    torch.testing.assert_close(clean.scale, plain.scale, rtol=0.15, atol=0.0)


def test_spread_is_that_of_a_normal_with_gaps():
    generator = rng.make_generator(1)
    x = 3.0 + 2.0 * rng.standard_normal((4000, 2), generator)
    x[torch.rand(x.shape, generator=generator) < 0.3] = math.nan
    found = find_spread(as_dataset(x))
    torch.testing.assert_close(found.loc, torch.full_like(found.loc, 3.0), rtol=0.05, atol=0.0)
    torch.testing.assert_close(found.spread, torch.full_like(found.loc, 2.0), rtol=0.06, atol=0.0)
    wanted = torch.from_numpy(np.nanmedian(x.numpy(), 0))
    torch.testing.assert_close(found.loc, wanted, rtol=1e-12, atol=0.0)


def test_columns_of_which_half_is_equal_go_by_the_others():
    x = rows(41, 4)
    x[:, 1] = 7.0
    x[:, 2] = 0.0
    x[:8, 2] = 5.0
    x[:40, 3] = math.nan
    data = as_dataset(x).subset(slice(0, 40))
    found = find_spread(data)
    assert found.is_sure.tolist() == [True, False, False, False]
    assert found.loc[1:].tolist() == [7.0, 0.0, 0.0]
    assert found.spread[1:].tolist() == pytest.approx([0.0, 5.0 * 1.4826, 0.0])
    scale = RobustPCA(1).bind(data).bound.scales.scale
    assert scale.tolist() == pytest.approx([float(found.spread[0])] * 4)


def test_sparse_columns_alone_still_have_a_scale():
    x = torch.zeros((40, 2), dtype=torch.float64)
    x[:8] = 5.0
    scale = RobustPCA(1).bind(as_dataset(x)).bound.scales.scale
    assert scale.tolist() == pytest.approx([5.0 * 1.4826] * 2)


def test_large_data_go_by_some_rows_in_memory_and_streamed(monkeypatch, tmp_path):
    monkeypatch.setattr(medians, "_ROWS", 500)
    # Sorted: the first rows would not do.
    x = rows(3000, 3).sort(0).values
    np.save(tmp_path / "x.npy", x.numpy())
    held, streamed = as_dataset(x), as_dataset(tmp_path / "x.npy", in_memory=False)
    ours, theirs = find_spread(held), find_spread(streamed)
    torch.testing.assert_close(ours.loc, theirs.loc, rtol=0.0, atol=0.0)
    torch.testing.assert_close(ours.spread, theirs.spread, rtol=0.0, atol=0.0)
    torch.testing.assert_close(ours.spread, x.std(0), rtol=0.2, atol=0.0)
