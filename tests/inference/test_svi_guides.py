"""SVI by every autoguide; generated, compiled and eager steps; resume; files; what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesgen.inference import SVI
from bayesgen.inference.compiled.emit import Unsupported
from bayesgen.inference.variational import machine as svi_machine
from bayesgen.models import GaussianMixture

__all__: list[str] = []

D64 = torch.float64
X = torch.tensor([1.0, 2.0, 3.5, 2.2], dtype=D64)


def program(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


AUTOGUIDES = [
    "AutoNormal",
    "AutoDiagonalNormal",
    "AutoMultivariateNormal",
    "AutoLowRankMultivariateNormal",
    "AutoDelta",
    "AutoLaplaceApproximation",
    "AutoIAFNormal",
]


@pytest.mark.parametrize("name", AUTOGUIDES)
def test_every_autoguide_by_name(name):
    num_steps = 2400 if name == "AutoLaplaceApproximation" else 192  # it needs the mode
    settings = {"learning_rate": 0.05, "num_steps": num_steps, "num_samples": 50}
    engine = SVI(guide=name, compile=False, **settings)
    fit = engine.run(program, X, seed=0)
    assert fit.attrs["is_traced"], fit.attrs["messages"]
    num_draws = 1 if name == "AutoDelta" else 50
    assert fit.draws["loc"].shape == (1, num_draws)
    assert fit.history["elbo"][-1] > fit.history["elbo"][0] + 1.0
    assert bool((fit.draws["scale"] > 0).all())


def test_a_structured_autoguide_by_partial():
    guide = partial(
        pyro.infer.autoguide.AutoStructured,
        conditionals={"loc": "normal", "scale": "normal"},
        dependencies={"scale": {"loc": "linear"}},
    )
    engine = SVI(guide=guide, learning_rate=0.05, num_steps=480, num_samples=50, compile=False)
    fit = engine.run(program, X, seed=0)
    assert fit.history["elbo"][-1] > fit.history["elbo"][0] + 1.0


def mixture(x, num_rows=None):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    with pyro.plate("data", num_rows or len(x), subsample=x):
        parts = dist.Normal(loc, torch.ones(2))
        law = dist.MixtureSameFamily(dist.Categorical(weights), parts)
        pyro.sample("x", law, obs=x)


def simplex(x):
    """Its weights' running product has a gradient of its own in torch, by cases."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(weights @ torch.arange(4.0), 1.0), obs=x)


STEPS = [
    ({}, simplex),
    ({}, program),
    ({"num_particles": 3, "objective": "iwae"}, program),
    ({"batch_size": 2}, mixture),
    ({"guide": "AutoMultivariateNormal", "max_norm": 1.0, "optimizer": "rmsprop"}, program),
]


@pytest.mark.parametrize(("settings", "model"), STEPS)
def test_steps_in_cpp_equal_eager_steps(settings, model):
    found = []
    for chosen in (True, False):
        engine = SVI(num_steps=100, num_samples=20, compile=chosen, **settings)
        found.append(engine.run(model, X, seed=3))
    assert found[0].attrs["speed"].startswith("compiled to C++"), found[0].attrs["speed"]
    assert found[1].attrs["speed"].startswith("eager")
    for key, value in found[1].draws.items():
        torch.testing.assert_close(found[0].draws[key], value, rtol=1e-9, atol=1e-9)
    for key in ("elbo", "gradient_norm"):
        one, other = (torch.as_tensor(fit.history[key]) for fit in found)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_steps_by_inductor_equal_eager_steps(monkeypatch):
    def refused(*_):
        raise Unsupported("for this test")

    monkeypatch.setattr(svi_machine, "NativeUpdate", refused)
    found = []
    for chosen in (True, False):
        found.append(SVI(num_steps=100, num_samples=20, compile=chosen).run(program, X, seed=3))
    assert found[0].attrs["speed"].startswith("compiled: "), found[0].attrs["speed"]
    for key, value in found[1].draws.items():
        torch.testing.assert_close(found[0].draws[key], value, rtol=1e-9, atol=1e-9)


SCRIPT = """
import json, sys, torch
sys.path.insert(0, sys.argv[2])
from test_svi_guides import X, program
from bayesgen.inference import SVI
torch.set_num_threads(1)
fit = SVI(num_steps=int(sys.argv[3]), tolerance=0.0, num_samples=20, compile=True).run(
    program, X, seed=5, resume=sys.argv[1])
print(json.dumps([fit.draws["loc"].tolist(), list(fit.history["elbo"])]))
"""


def local(x, num_rows=None):
    top = pyro.sample("top", dist.Normal(0.0, 5.0))
    with pyro.plate("data", num_rows or len(x), subsample=x):
        each = pyro.sample("each", dist.Normal(top, 1.0))
        pyro.sample("x", dist.Normal(each, 0.5), obs=x)


def test_local_latents_on_demand():
    settings = {"num_steps": 960, "learning_rate": 0.05, "num_samples": 200, "compile": False}
    fit = SVI(local_latents=True, **settings).run(local, X, seed=0)
    assert fit.draws["each"].shape == (1, 200, 4)
    # each row is drawn towards the others, and keeps their order
    order = fit.draws["each"].mean((0, 1)).argsort()
    assert torch.equal(order, X.argsort())


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_minibatches_stream_from_disk(kind, tmp_path):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 2)) + 6.0 * (np.arange(300) % 4 == 0)[:, None]
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        np.savetxt(path, x, delimiter=",", header="a,b", comments="")
    else:
        pandas = pytest.importorskip("pandas")
        pytest.importorskip("pyarrow")
        pandas.DataFrame(x, columns=["a", "b"]).to_parquet(path)
    engine = SVI(batch_size=50, learning_rate=0.03, num_steps=960, num_samples=50, compile=False)
    fit = engine.run(GaussianMixture(2), str(path), seed=0)
    assert fit.attrs["is_traced"], fit.attrs["messages"]
    weights = fit.aligned.draws["weights"].mean((0, 1))
    assert abs(float(weights.min()) - 0.25) < 0.05


def test_a_bound_that_is_not_finite_names_the_site():
    with pytest.raises(ValueError, match=r"finite at step \d+\. The first culprit is site '"):
        SVI(num_steps=48, compile=False, learning_rate=1e4).run(program, X)


def test_discrete_latents_are_recovered_or_said_to_be_missing():
    def labels(x):
        loc = pyro.sample("loc", dist.Normal(torch.tensor([0.0, 5.0]), 0.1).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    x = torch.tensor([0.1, 5.2, -0.3, 4.8], dtype=D64)
    fit = SVI(num_steps=240, num_samples=50, compile=False).run(labels, x, seed=0)
    said = any("'z'" in m or " z" in m for m in fit.attrs["messages"])
    assert ("z" in fit.draws) != said, fit.attrs["messages"]
    if "z" in fit.draws:
        assert (fit.draws["z"].double().mean((0, 1)) > 0.5).tolist() == [False, True, False, True]


@pytest.mark.slow
def test_a_run_goes_on_in_a_new_process(tmp_path):
    """Stopped after 144 of 300 steps, ended elsewhere: bit-equal to never having stopped."""
    here = str(Path(__file__).parent)

    def elsewhere(folder, steps):
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), here, str(steps)]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

    whole = elsewhere(tmp_path / "whole", 300)
    engine = SVI(num_steps=300, tolerance=0.0, num_samples=20, compile=True)
    stop = [lambda progress: progress.step == 3]
    engine.run(program, X, seed=5, resume=tmp_path / "parts", callbacks=stop)
    assert elsewhere(tmp_path / "parts", 300) == whole


def test_a_latent_that_the_guide_forgets():
    def guide(x):
        loc = pyro.param("at", torch.zeros(()))
        pyro.sample("loc", dist.Normal(loc, 1.0))

    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        SVI(guide=guide, num_steps=48).run(program, X)
    wanted = (
        "the guide has no site for the model's latent 'scale': add pyro.sample('scale', ...) to "
        "it, or observe the site in the model (obs=...)."
    )
    assert wanted in str(caught.value)
