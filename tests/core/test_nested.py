"""Nested R-hat: near one for chains that mix, large for superchains that do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bayesgen import rng
from bayesgen.nested import nested_r_hat

__all__: list[str] = []


def draws(*shape, seed=0):
    return rng.standard_normal(shape, rng.make_generator(seed))


def test_independent_draws_pass_however_short():
    assert float(nested_r_hat(draws(256, 10, 50), 16).max()) < 1.01
    assert float(nested_r_hat(draws(256, 1, 50), 16).max()) < 1.1


def test_a_superchain_apart_is_seen_and_a_different_spread_too():
    values = draws(128, 10)
    values[:16] += 1.0
    assert float(nested_r_hat(values, 8)) > 1.02
    spread = draws(128, 10)
    spread[:16] *= 3.0
    assert float(nested_r_hat(spread, 8)) > 1.02


def test_by_hand():
    """The formula on values that rank normalisation leaves in place."""
    from scipy import special, stats

    values = draws(6, 5)
    flat = values.flatten().numpy()
    z = special.ndtri((stats.rankdata(flat) - 0.375) / (30 + 0.25)).reshape(3, 2, 5)
    between = np.var([z[k].mean() for k in range(3)], ddof=1)
    within = np.mean(
        [
            np.var([z[k, m].mean() for m in range(2)], ddof=1)
            + np.mean([np.var(z[k, m], ddof=1) for m in range(2)])
            for k in range(3)
        ]
    )
    assert float(nested_r_hat(values, 3)) >= np.sqrt(1 + between / within) - 1e-12


def test_shapes_and_constants():
    values = draws(8, 5, 2, 3)
    values[..., 0, 0] = 1.0
    found = nested_r_hat(values, 4)
    assert found.shape == (2, 3)
    assert bool(found[0, 0].isnan())
    with pytest.raises(ValueError, match="num_superchains=3 of 8 chains"):
        nested_r_hat(values, 3)
    assert not bool(torch.isnan(found[1]).any())
