"""Equal numbers give equal results, wherever they lie in memory."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load, save

from bayesgen.alignment import aligned, settled
from bayesgen.data import as_dataset
from bayesgen.inference import SVI

__all__: list[str] = []


def at(array, offset):
    """The same numbers, ``offset`` doubles after a multiple of 64 bytes."""
    raw = np.empty(array.size + 16)
    start = (-(raw.ctypes.data // 8)) % 8 + offset
    view = raw[start : start + array.size].reshape(array.shape)
    view[...] = array
    return view


def test_what_was_read_lies_as_what_was_computed():
    names = [str(k) for k in range(7)]
    read = load(save({name: torch.arange(3.0).double() for name in names}))
    assert any(value.data_ptr() % 64 for value in read.values())
    transposed = torch.arange(12.0).reshape(4, 3).T
    state = settled({"loc": transposed, "inner": {"read": list(read.values())}, "names": ["a"]})
    for value in (state["loc"], *state["inner"]["read"]):
        assert value.is_contiguous()
        assert value.data_ptr() % 64 == 0
    assert torch.equal(state["loc"], transposed)
    assert all(
        torch.equal(a, b) for a, b in zip(state["inner"]["read"], read.values(), strict=True)
    )
    assert state["names"] == ["a"]
    again = settled(state)
    assert again["loc"] is state["loc"]
    assert again["inner"]["read"][0] is state["inner"]["read"][0]


def test_data_are_moved_only_where_they_must():
    x = np.arange(12.0).reshape(6, 2)
    for offset in range(0, 8, 2):
        given = at(x, offset)
        values = as_dataset(given).tensor()
        assert values.data_ptr() % 64 == 0
        assert (values.data_ptr() == given.ctypes.data) is (offset == 0)
        assert np.array_equal(values.numpy(), x)
    column_major = torch.from_numpy(at(x, 1)).T
    assert aligned(column_major).stride() == column_major.stride()


@pytest.mark.parametrize("offset", [1, 3])
def test_the_same_seed_and_numbers_give_the_same_draws(offset):
    """Products of matrix and vector round by the address of their first number."""
    r = np.random.default_rng(0)
    x, y = r.normal(size=(40, 6)), r.normal(size=40)

    def program(x, y):
        slope = pyro.sample("slope", dist.Normal(x.new_zeros(6), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ slope, 1.0), obs=y)

    engine = SVI(num_steps=96, num_samples=5, compile=False)
    one = engine.run(program, (at(x, 0), at(y, 0)))
    other = engine.run(program, (at(x, offset), at(y, offset)))
    assert torch.equal(one.draws["slope"], other.draws["slope"])
    assert one.history == other.history
