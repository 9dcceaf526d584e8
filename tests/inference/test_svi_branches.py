"""SVI of programs whose Python looks at what they draw: Pyro's bound, the line, exact resume."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from bayesgen.inference import SVI

__all__: list[str] = []

Y = torch.tensor([1.2, 0.8, 1.5, 1.1], dtype=torch.float64)
SLOWLY = pytest.warns(UserWarning, match="many times slower")


def hinge(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if z > 0:
        mean = z
    else:
        mean = 2 * z
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def hinge_by_where(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    mean = torch.where(z > 0, z, 2 * z)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def far_out(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    mean = z
    if z > 1.9:
        mean = 0.5 * z + 0.95
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def comes_and_goes(y):
    total = pyro.sample("z", dist.Normal(0.0, 1.0))
    if total > 0:
        total = total + pyro.sample("more", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(total, 1.0), obs=y)


def follows_it(y):
    at = pyro.param("at", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    if pyro.sample("z", dist.Normal(at, scale)) > 0:
        pyro.sample("more", dist.Normal(pyro.param("more_at", torch.tensor(0.0)), 1.0))


def line_of(program, text):
    lines, first = inspect.getsourcelines(program)
    number = next(k for k, line in enumerate(lines) if text in line)
    return f"test_svi_branches.py:{first + number}: {text}"


def test_a_branch_on_a_latent_gives_the_answer_of_its_formula():
    settings = {"learning_rate": 0.03, "num_steps": 2400, "num_samples": 1000}
    with SLOWLY as caught:
        fit = SVI(**settings).run(hinge, Y, seed=0)
    [said] = [str(w.message) for w in caught]
    assert line_of(hinge, "if z > 0:") in said
    assert said in fit.attrs["messages"]
    assert not fit.attrs["is_traced"]
    wanted = SVI(compile=False, **settings).run(hinge_by_where, Y, seed=0)
    assert wanted.attrs["is_traced"]
    gap = fit.draws["z"].mean() - wanted.draws["z"].mean()
    assert abs(float(gap)) < 4 * 0.45 * math.sqrt(2 / 1000) + 0.02
    error = math.hypot(fit.attrs["elbo_error"], wanted.attrs["elbo_error"])
    assert abs(fit.attrs["elbo"] - wanted.attrs["elbo"]) < 4 * error


def test_a_branch_taken_late_goes_on_by_pyro_and_resumes_bit_by_bit(tmp_path):
    """The graph's path holds at first: the guide starts narrow and near zero."""
    engine = SVI(learning_rate=0.02, num_steps=480, num_samples=20, tolerance=0.0)
    whole = engine.run(far_out, Y, seed=1)
    assert not whole.attrs["is_traced"]
    [said] = [m for m in whole.attrs["messages"] if "many times slower" in m]
    step = int(said.removeprefix("step ").split(":")[0])
    assert 1 < step < 480
    assert line_of(far_out, "if z > 1.9:") in said
    for stop in (1, step // 48, step // 48 + 1, 9):
        folder = tmp_path / str(stop)
        engine.run(far_out, Y, seed=1, resume=folder, callbacks=[lambda p, k=stop: p.step == k])
        again = engine.run(far_out, Y, seed=1, resume=folder)
        assert np.array_equal(again.draws["z"], whole.draws["z"])
        assert again.history == whole.history
        assert again.attrs["messages"] == whole.attrs["messages"]


def test_sites_that_come_and_go_in_model_and_guide_alike():
    with SLOWLY:
        fit = SVI(guide=follows_it, num_steps=480, num_samples=100).run(comes_and_goes, Y, seed=0)
    assert set(fit.draws) == {"z"}
    assert any("'more'" in m and "not among the draws" in m for m in fit.attrs["messages"])
    assert fit.arviz is not None


def test_a_branch_on_data_is_traced():
    def program(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean = z if y.mean() > 0 else -z
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    assert SVI(num_steps=48, num_samples=4).run(program, Y).attrs["is_traced"]
