"""Summaries of columns: whatever the blocks, exact at any offset."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bayesgen.data import ColumnSummary, as_dataset
from bayesgen.tables.moments import summarise
from bayesgen.tables.rows import MemoryRows

NAN = float("nan")
NUMBERS = [[1.0, 2.0], [3.0, NAN], [5.0, 6.0]]


@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 40), st.integers(1, 3)),
        elements=st.floats(-1e6, 1e6) | st.just(NAN),
    ),
    st.integers(1, 10),
)
@settings(deadline=None)
def test_summary_does_not_depend_on_the_blocks(x: np.ndarray[Any, Any], size: int) -> None:
    names = tuple(map(str, range(x.shape[1])))
    summary = summarise(torch.from_numpy(x).split(size), names)
    for j in range(x.shape[1]):
        column = x[~np.isnan(x[:, j]), j]
        assert summary.count[j] == len(column)
        if len(column):
            assert summary.mean[j].item() == pytest.approx(column.mean(), rel=1e-12, abs=1e-9)
            assert summary.variance[j].item() == pytest.approx(column.var(), rel=1e-9, abs=1e-9)
        else:
            assert summary.mean[j].isnan()
            assert summary.variance[j].isnan()


@pytest.mark.parametrize("offset", [0.0, 1e8, -1e8])
def test_summary_is_exact_at_any_offset(offset: float) -> None:
    rng = np.random.default_rng(0)
    noise = np.round(rng.normal(size=50_000) * 2**20) / 2**20  # exact also after the shift
    x = torch.from_numpy(noise + offset)[:, None]
    summary = summarise(x.split(997), ("x",))
    assert summary.variance.item() == pytest.approx(noise.var(), rel=1e-12)
    assert summary.mean.item() - offset == pytest.approx(noise.mean(), abs=2e-8)
    # The textbook formula is nowhere near: the test can fail.
    naive = (x.square().mean() - x.mean().square()).item()
    assert offset == 0 or abs(naive - noise.var()) > 1e-3


@pytest.mark.parametrize("far", [0.0, 1e6, 1e12])
def test_a_first_entry_far_from_all_others_costs_no_digits(far: float) -> None:
    noise = np.random.default_rng(1).normal(size=3000)
    x = torch.from_numpy(np.concatenate([[far], noise]))[:, None]
    exact = x[:, 0].numpy().astype(np.longdouble)
    summary = summarise([x], ("x",))
    assert summary.variance.item() == pytest.approx(float(exact.var()), rel=1e-13)
    near = 1e-13 * float(exact.std())
    assert summary.mean.item() == pytest.approx(float(exact.mean()), rel=1e-13, abs=near)


def test_extremes_are_those_of_the_observed_entries() -> None:
    data = as_dataset([[1.0, NAN, 3.0], [-2.0, NAN, NAN]], schema=as_dataset(np.eye(3)).schema)
    low, high = data.extremes()
    assert low[[0, 2]].tolist() == [-2.0, 3.0]
    assert high[[0, 2]].tolist() == [1.0, 3.0]
    assert bool(low[1].isnan())
    assert bool(high[1].isnan())


def test_constant_columns_have_exactly_no_variance() -> None:
    x = torch.full((1000, 1), 0.1 + 1e8, dtype=torch.float64)
    summary = summarise(x.split(7), ("x",))
    assert summary.variance.item() == 0
    assert summary.mean.item() == x[0].item()


def test_summary_is_computed_in_float64() -> None:
    x = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0)) + 1000
    summary = as_dataset(x).summary()
    assert summary.mean.dtype == torch.float64
    assert summary.variance.item() == pytest.approx(x.double().var(correction=0).item(), rel=1e-12)


def test_summaries_of_other_columns_do_not_merge() -> None:
    left = as_dataset(NUMBERS).summary()
    right = as_dataset(NUMBERS, columns=["a", "b"]).summary()
    assert isinstance(left, ColumnSummary)
    assert left.merge(left).count.tolist() == [6, 4]
    with pytest.raises(ValueError, match="cannot be merged"):
        left.merge(right)


def test_products_come_with_the_summary_and_fingerprint_in_one_pass(monkeypatch):
    x = 1e6 + torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)).double().cumsum(1)
    data, other = as_dataset(x), as_dataset(x)
    passes: list[int] = []
    blocks = MemoryRows.blocks
    monkeypatch.setattr(MemoryRows, "blocks", lambda self: passes.append(1) or blocks(self))
    products = data.products
    assert products is not None
    centred = x - x.mean(0)
    torch.testing.assert_close(products, centred.mT @ centred, rtol=1e-9, atol=1e-6)
    assert data.fingerprint() == other.fingerprint()
    for name in ("count", "mean", "variance"):
        ours, theirs = getattr(data.summary(), name), getattr(other.summary(), name)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0.0)
    assert len(passes) == 2  # one of each


@pytest.mark.parametrize("what", ["a gap", "sorted rows"])
def test_there_are_no_products_where_they_would_be_wrong(what: str):
    x = torch.randn(600_000, 1, generator=torch.Generator().manual_seed(0)).double()
    if what == "a gap":
        x[-1] = NAN
    else:
        x = x.sort(0).values
    data = as_dataset(x)
    assert data.products is None
    assert data.summary().variance.item() == pytest.approx(as_dataset(x).summary().variance.item())
    assert data.fingerprint() == as_dataset(x).fingerprint()
