"""Discrete latents drawn back: against their exact posterior by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesgen import rng
from bayesgen.inference import NUTS, SVI
from bayesgen.inference.programs.trace import trace
from bayesgen.inference.programs.traced import live_r_hat

__all__: list[str] = []

D64 = {"dtype": torch.float64}
X = torch.tensor([-0.5, 1.6, 2.4, 1.9], **D64)
NUM = 4000


def mixture():
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("data", len(X)):
        label = pyro.sample("label", dist.Bernoulli(weights[1]))
        mean = pyro.deterministic("mean", 3.0 * label)
        pyro.sample("x", dist.Normal(mean, 1.0), obs=X)


def chain():
    with pyro.plate("state", 2):
        rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2)))
    state = 0
    for step in pyro.markov(range(len(X))):
        state = pyro.sample(f"z{step}", dist.Categorical(rows[state]))
        pyro.sample(f"x{step}", dist.Normal(3.0 * state, 1.0), obs=X[step])


def regimes():
    """A label of a group, and labels inside it that depend on it."""
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("group", 2, dim=-2):
        kind = pyro.sample("kind", dist.Bernoulli(1 - share))
        with pyro.plate("data", 2, dim=-1):
            label = pyro.sample("label", dist.Bernoulli(0.2 + 0.6 * kind))
            pyro.sample("x", dist.Normal(2.0 * label, 1.0), obs=X.reshape(2, 2))


def exact(program, values):
    """Probability of every joint value of the discrete sites, by running the program at each."""
    names = list(trace(program, generator=rng.make_generator(0)).layout.enumerated.items())
    sizes = [int(np.prod(shape)) for _, shape in names]
    logs, keys = [], list(itertools.product((0, 1), repeat=sum(sizes)))
    dtype = torch.long if program is chain else torch.float64  # Categorical, Bernoulli
    for key in keys:
        parts = torch.tensor(key, dtype=dtype).split(sizes)
        fixed = {n: p.reshape(s) for (n, s), p in zip(names, parts, strict=True)}
        run = pyro.condition(program, data={**values, **fixed})
        logs.append(float(pyro.poutine.trace(run).get_trace().log_prob_sum()))
    return np.exp(logs) / np.exp(logs).sum()


CASES = {
    "mixture": (mixture, {"weights": torch.tensor([0.4, 0.6], **D64)}),
    "chain": (chain, {"rows": torch.tensor([[0.7, 0.3], [0.4, 0.6]], **D64)}),
    "regimes": (regimes, {"share": torch.tensor(0.3, **D64)}),
}


@pytest.mark.parametrize("name", CASES)
def test_joint_frequencies_are_exact(name):
    """Chi-square of all joint values: fails by chance with probability 1e-4."""
    from scipy.stats import chi2

    program, values = CASES[name]
    density = trace(program, generator=rng.make_generator(0))
    draws = {k: v.expand(NUM, *v.shape) for k, v in values.items()}
    found = density.recover(draws, generator=rng.make_generator(1))
    labels = [found[n].reshape(NUM, -1) for n in density.layout.enumerated]
    assert all(found[n].shape[1:] == shape for n, shape in density.layout.enumerated.items())
    code = torch.cat(labels, 1).numpy()
    index = code @ (2 ** np.arange(code.shape[1])[::-1])
    counts = np.bincount(index, minlength=2 ** code.shape[1])
    wanted = NUM * exact(program, values)
    rare = wanted < 5  # lumped together
    counts = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(wanted[~rare], max(wanted[rare].sum(), 1e-9))

    def statistic(expected):
        return float(((counts - expected) ** 2 / expected).sum())

    limit = chi2.ppf(1 - 1e-4, len(wanted) - 1)
    assert statistic(wanted) < limit
    # labels drawn one by one from the right margins would not pass
    assert statistic(np.full_like(wanted, NUM / len(wanted))) > limit


def test_a_fit_holds_them_with_dims_and_what_depends_on_them():
    fit = NUTS(num_chains=2, num_samples=40, num_warmup=40).run(mixture, seed=0)
    assert fit.draws["label"].shape == (2, 40, 4)
    assert not fit.draws["label"].is_floating_point()
    torch.testing.assert_close(fit.draws["mean"], 3.0 * fit.draws["label"].double())
    assert fit.arviz["posterior"]["label"].dims == ("chain", "draw", "data")
    assert float(fit.draws["label"][..., 0].double().mean()) < 0.2 < 0.5
    assert not any(name.startswith("label") for name in fit.summary().judged.index)
    again = NUTS(num_chains=2, num_samples=40, num_warmup=40).run(mixture, seed=0)
    assert torch.equal(fit.draws["label"], again.draws["label"])


def test_variational_inference_holds_them_too():
    """Of each draw of the guide, from the labels' exact law given it."""
    fit = SVI(num_steps=960, num_samples=NUM, learning_rate=0.03).run(mixture, seed=0)
    label, weight = fit.draws["label"], fit.draws["weights"][0, :, 1]
    assert label.shape == (1, NUM, 4)
    assert not label.is_floating_point()
    torch.testing.assert_close(fit.draws["mean"], 3.0 * label.double())
    assert fit.arviz["posterior"]["label"].dims == ("chain", "draw", "data")
    odds = weight.logit()[:, None] + 3.0 * X - 4.5
    p = odds.sigmoid()
    error = (p * (1 - p)).mean(0).div(NUM).sqrt()
    assert bool(((label[0].double() - p).mean(0).abs() < 4.5 * error).all())
    assert bool(((label[0].double() - 0.5).mean(0).abs() > 4.5 * error).any())  # not any law
    assert not any("label" in message for message in fit.attrs["messages"])


def test_variational_inference_says_why_it_lacks_them(monkeypatch):
    def rows(x, num_rows=None):
        share = pyro.sample("share", dist.Beta(1.0, 1.0))
        with pyro.plate("data", num_rows or len(x), subsample=x):
            label = pyro.sample("label", dist.Bernoulli(share))
            pyro.sample("x", dist.Normal(3.0 * label, 1.0), obs=x)

    monkeypatch.setattr("bayesgen.inference.variational.finish._FULL", 3)
    fit = SVI(num_steps=48, num_samples=5, batch_size=2).run(rows, X)
    assert "label" not in fit.draws
    assert any("'label'. To draw them takes all rows" in m for m in fit.attrs["messages"])
    monkeypatch.setattr("bayesgen.inference.programs.recover._MAX_LABELS", 19)
    fit = SVI(num_steps=48, num_samples=5).run(rows, X)
    assert any("'label'" in m and "20 labels" in m for m in fit.attrs["messages"])


def test_without_a_trace_they_are_drawn_one_by_one():
    def branching():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        spread = 1.0 if loc < 100 else 2.0
        with pyro.plate("data", len(X)):
            label = pyro.sample("label", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(loc + 3.0 * label, spread), obs=X)

    with pytest.warns(UserWarning, match="could not be traced"):
        fit = NUTS(num_chains=1, num_samples=5, num_warmup=5).run(branching, seed=0)
    assert not fit.attrs["is_traced"]
    assert fit.draws["label"].shape == (1, 5, 4)


def test_labels_that_are_too_many_are_left_out_and_said(monkeypatch):
    monkeypatch.setattr("bayesgen.inference.programs.recover._MAX_LABELS", 79)
    fit = NUTS(num_chains=2, num_samples=10, num_warmup=20).run(mixture)
    assert "label" not in fit.draws
    assert any("'label'" in m and "80 labels" in m for m in fit.attrs["messages"])


def test_live_numbers_hold_r_hat():
    fit = NUTS(num_chains=2, num_samples=100, num_warmup=50).run(mixture)
    assert len(fit.history["r_hat"]) == 2
    assert 0.99 < fit.history["r_hat"][-1] < 1.3
    stuck = torch.randn(2, 100, 3, generator=rng.make_generator(0))
    stuck[1] += 9.0
    assert live_r_hat(stuck)["r_hat"] > 3
    assert live_r_hat(stuck[:, :1]) == {}
