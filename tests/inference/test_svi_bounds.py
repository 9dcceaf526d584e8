"""Bounds of SVI against brute force, their order, minibatches, and the noise they are fed."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy import stats

from bayesgen import rng
from bayesgen.inference import SVI
from bayesgen.inference.programs.call import Call
from bayesgen.inference.variational.minibatch import Order, begin
from bayesgen.inference.variational.noise import Drawn, Fed, Hidden, Tape
from bayesgen.inference.variational.optimizers import OPTIMIZERS, Cosine, Exponential
from bayesgen.inference.variational.plateau import plateau
from bayesgen.inference.variational.setup import from_function, make_setup
from bayesgen.inference.variational.step import draw_noise, particles, trace_pair

__all__: list[str] = []

D64 = torch.float64


def points(count=12):
    generator = rng.make_generator(0)
    x = rng.standard_normal(count, generator)
    return x + 3.0 * (torch.arange(count) % 3 == 0)


def clusters(x, num_rows=None):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", num_rows or len(x), subsample=x):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(loc[z], 0.8), obs=x)


def loc_guide(x, num_rows=None):
    loc = pyro.param("where", torch.tensor([2.0, -0.2]))
    scale = pyro.param("scale", torch.tensor([0.3, 0.2]), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(loc, scale).to_event(1))


def met(model, guide, data, *, batch_size=None, objective="auto"):
    generator = rng.make_generator(1)
    source = from_function(model, data, {}, guide, batch_size)
    setup = make_setup(source, objective=objective, dtype=D64, start=None, generator=generator)
    fixed = not setup.orders
    traced = trace_pair(setup.pair, setup.example(), is_fixed=fixed, generator=generator)
    assert traced.graph is not None, traced.message
    return setup, traced


def brute(x, flat, noise):
    """The bound of one draw, the labels summed out by hand."""
    where, scale = flat[:2], flat[2:].exp()
    loc = where + scale * noise
    normal = torch.distributions.Normal
    weights = torch.tensor([0.3, 0.7], dtype=D64).log()
    rows = normal(loc, torch.tensor(0.8, dtype=D64)).log_prob(x[:, None]) + weights
    prior = normal(torch.zeros(2, dtype=D64), torch.tensor(3.0, dtype=D64)).log_prob(loc).sum()
    return rows.logsumexp(-1), prior - normal(where, scale).log_prob(loc).sum()


def test_enumerated_labels_against_brute_force():
    x = points()
    setup, traced = met(clusters, loc_guide, (x,))
    assert setup.pair.objective == "enum"
    flat = setup.pair.start().requires_grad_()
    normals, uniforms = draw_noise(traced.noise, (), setup.pair, rng.make_generator(2))
    value, gradient, _ = traced.graph(flat.detach(), normals, uniforms, x)
    rows, rest = brute(x, flat, normals)
    (wanted,) = torch.autograd.grad(rows.sum() + rest, flat)
    torch.testing.assert_close(value, (rows.sum() + rest).detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-9)


def test_minibatches_average_to_all_rows_exactly():
    x = points()
    whole, all_rows = met(clusters, loc_guide, (x,))
    setup, traced = met(clusters, loc_guide, (x,), batch_size=4)
    flat = setup.pair.start()
    normals, uniforms = draw_noise(traced.noise, (), setup.pair, rng.make_generator(2))
    order, generator = Order(12, 4, torch.device("cpu")), rng.make_generator(3)
    index, _ = order.take(begin(generator), 3, generator)
    assert sorted(index.flatten().tolist()) == list(range(12))
    parts = [traced.graph(flat, normals, uniforms, x[rows]) for rows in index]
    wanted = all_rows.graph(flat, normals, uniforms, x)
    for k in range(2):
        mean = torch.stack([part[k] for part in parts]).mean(0)
        torch.testing.assert_close(mean, wanted[k], rtol=1e-10, atol=1e-10)
    assert float((parts[0][1] - wanted[1]).abs().max()) > 0.1  # one batch alone is not


def test_a_minibatch_must_say_what_it_stands_for():
    def unscaled(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(ValueError, match="its 4 rows stand for 12"):
        SVI(batch_size=4, num_steps=10).run(unscaled, points())


def test_plates_that_take_their_own_rows():
    x = points()

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            shift = pyro.sample("shift", dist.Normal(0.0, 0.1))
            pyro.sample("x", dist.Normal(loc + shift, 1.0), obs=x[rows])

    fit = SVI(num_steps=480, num_samples=20).run(model, x)
    assert fit.attrs["is_traced"], fit.attrs["messages"]
    assert set(fit.draws) == {"loc"}  # shifts are of single rows
    assert fit.attrs["k_hat"] is None


@pytest.mark.parametrize("num_particles", [64])
def test_bounds_are_ordered(num_particles):
    """ELBO <= Renyi(0.5) <= importance weighted <= log evidence, on common draws."""
    x = points()
    setup, traced = met(clusters, loc_guide, (x,))
    flat = setup.pair.start()
    normals, uniforms = draw_noise(
        traced.noise, (num_particles,), setup.pair, rng.make_generator(2)
    )
    found = []
    for alpha in (None, 0.5, 0.0):
        bound = particles(traced.graph, num_particles, alpha)
        value, gradient, _ = bound(flat, normals, uniforms, x)
        found.append(float(value))
        step = 1e-5 * gradient / gradient.norm()
        ahead = bound(flat + step, normals, uniforms, x)[0]
        behind = bound(flat - step, normals, uniforms, x)[0]
        slope = float((ahead - behind) / 2e-5)  # the gradient is that of the bound itself
        assert slope == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert found[0] < found[1] < found[2]
    grid = torch.linspace(-8, 8, 400, dtype=D64)
    loc = torch.cartesian_prod(grid, grid)
    normal = torch.distributions.Normal
    rows = normal(loc[:, None], torch.tensor(0.8, dtype=D64)).log_prob(x[:, None])
    labels = rows + torch.tensor([0.3, 0.7], dtype=D64).log()
    prior = normal(torch.zeros(2, dtype=D64), torch.tensor(3.0, dtype=D64)).log_prob(loc).sum(-1)
    joint = labels.logsumexp(-1).sum(-1) + prior
    evidence = float(joint.logsumexp(0) + 2 * (grid[1] - grid[0]).log())
    assert found[0] < evidence
    assert found[2] < evidence + 0.1


# ---------------------------------------------------------------- noise
LAWS = {
    "Normal": (torch.distributions.Normal, (1.0, 2.0), stats.norm(1.0, 2.0)),
    "Gamma": (torch.distributions.Gamma, (2.5, 1.0), stats.gamma(2.5)),
    "Gamma, small": (torch.distributions.Gamma, (0.3, 1.0), stats.gamma(0.3)),
    "Beta": (torch.distributions.Beta, (0.7, 2.0), stats.beta(0.7, 2.0)),
    "StudentT": (torch.distributions.StudentT, (3.0,), stats.t(3.0)),
    "Exponential": (torch.distributions.Exponential, (2.0,), stats.expon(scale=0.5)),
    "Cauchy": (torch.distributions.Cauchy, (0.0, 1.0), stats.cauchy()),
    "Laplace": (torch.distributions.Laplace, (0.0, 1.0), stats.laplace()),
    "Uniform": (torch.distributions.Uniform, (1.0, 3.0), stats.uniform(1.0, 2.0)),
}


@pytest.mark.parametrize("name", LAWS)
def test_formulas_have_their_law(name):
    law, parameters, exact = LAWS[name]
    generator = rng.make_generator(5)
    with Tape(Drawn(generator)):
        values = law(*(torch.tensor(p, dtype=D64) for p in parameters)).rsample((4000,))
    assert stats.kstest(values.numpy(), exact.cdf).pvalue > 1e-3
    assert stats.kstest(1.3 * values.numpy() + 0.1, exact.cdf).pvalue < 1e-2


def test_discrete_formulas():
    generator = rng.make_generator(5)
    with Tape(Drawn(generator)):
        labels = torch.distributions.Categorical(torch.tensor([0.2, 0.3, 0.5])).sample((4000,))
        coins = torch.distributions.Bernoulli(torch.tensor(0.3)).sample((4000,))
    counts = torch.bincount(labels, minlength=3)
    assert stats.chisquare(counts, [800, 1200, 2000]).pvalue > 1e-3
    assert abs(float(coins.mean()) - 0.3) < 4 * (0.21 / 4000) ** 0.5


def test_implicit_gradients_survive():
    a = torch.tensor(2.0, dtype=D64, requires_grad=True)
    with Tape(Drawn(rng.make_generator(0))):
        value = torch.distributions.Gamma(a.expand(4000), 1.0).rsample().mean()
    (slope,) = torch.autograd.grad(value, a)
    assert abs(float(slope) - 1.0) < 0.05  # the mean of a Gamma(a) is a


def test_a_sampler_without_a_formula_is_named():
    with Tape(Fed(torch.zeros(0), torch.zeros(0))), pytest.raises(Hidden, match="poisson"):
        torch.poisson(torch.ones(3))


# ---------------------------------------------------------------- parts
def test_optimisers_climb_a_parabola():
    for name, optimizer in OPTIMIZERS.items():
        at = torch.tensor([3.0, -2.0], dtype=D64)
        slots = {k: torch.zeros(2, dtype=D64) for k in optimizer.slots}
        rate = torch.tensor(0.5 if name == "adagrad" else 0.02, dtype=D64)
        for step in range(1, 1001):
            first, second = (torch.tensor(v, dtype=D64) for v in optimizer.scalars(step))
            at, slots = optimizer.update(at, -at, slots, rate, first, second)
        assert float(at.abs().max()) < 0.05, name


def test_adam_is_that_of_torch():
    ours, theirs = torch.tensor([1.0, 2.0], dtype=D64), torch.tensor([1.0, 2.0], dtype=D64)
    leaf = theirs.clone().requires_grad_()
    reference = torch.optim.Adam([leaf], lr=0.1)
    optimizer, slots = (
        OPTIMIZERS["adam"],
        {k: torch.zeros(2, dtype=D64) for k in ("mean", "square")},
    )
    for step in range(1, 20):
        gradient = torch.sin(ours) + step
        leaf.grad = -gradient
        reference.step()
        first, second = (torch.tensor(v, dtype=D64) for v in optimizer.scalars(step))
        rate = torch.tensor(0.1, dtype=D64)
        ours, slots = optimizer.update(ours, gradient, slots, rate, first, second)
    torch.testing.assert_close(ours, leaf.detach(), rtol=1e-7, atol=1e-9)


def test_schedules():
    assert Exponential(1.0, 0.1, 100)(100) == pytest.approx(0.1)
    cosine = Cosine(1.0, 110, num_warmup=10, final=0.2)
    assert cosine(5) == pytest.approx(0.5)
    assert cosine(10) == pytest.approx(1.0)
    assert cosine(110) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="rate=-1"):
        Exponential(-1.0)


def test_a_drift_is_no_plateau():
    generator = rng.make_generator(0)
    noise = rng.standard_normal(90, generator)
    still = [float(v) for v in noise]
    assert plateau(still, 1.0).reached
    assert not plateau([v + 0.05 * k for k, v in enumerate(still)], 1.0).reached
    assert not plateau(still, 0.1).reached  # too noisy to have seen a rise of 0.1
    moving = torch.linspace(0, 1, 90, dtype=D64)[:, None]
    assert not plateau(still, 1.0, moving).reached


def test_a_call_is_put_together_again():
    x, y = torch.zeros(5, 2), torch.ones(5)
    call = Call.of((x, {"y": y, "size": 3}), {"name": "a"})
    assert call.num_rows == 5
    assert call.rowwise == (True, True)
    args, kwargs = call.arguments(call.rows(torch.tensor([1, 2])))
    assert args[0].shape == (2, 2)
    assert args[1]["y"].shape == (2,)
    assert args[1]["size"] == 3
    assert kwargs == {"name": "a"}
