"""Generated C++ is the eager graph, and its state machine is the one of tensors."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from bayesgen import rng
from bayesgen.inference import NUTS
from bayesgen.inference.compiled import native, speed
from bayesgen.inference.compiled.emit import Unsupported
from bayesgen.inference.compiled.native import (
    LONG,
    MACHINE,
    compiler,
    load,
    translated,
    with_slope,
)
from bayesgen.inference.hamiltonian.machines import NativeMachine
from bayesgen.inference.hamiltonian.trajectory import Metric, Trajectories, launch, machine, tables
from bayesgen.inference.programs.trace import trace
from tests.inference.test_trace import (
    LATENTS,
    enumerated_mixture,
    masked_fill_in,
    program_of_several,
)

__all__: list[str] = []

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

NO_RULE = ("wishart",)  # eager or Inductor
D64 = {"dtype": torch.float64}
X = rng.standard_normal((40, 5), rng.make_generator(3))


def traced(program):
    density = trace(program, generator=rng.make_generator(0))
    assert density.is_traced, density.message
    return density


def check_equal(program, num_chains=5, scale=1.4):
    density = traced(program)
    native = load(translated(density), num_chains, density.num_params, *MACHINE)
    points = scale * density._points(num_chains)
    for found, wanted in zip(native(points), density.value_and_grad(points), strict=True):
        assert bool(wanted.isfinite().all())
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    return density, native


def test_every_distribution_and_constraint():
    """All in one program: one call of the compiler; the gradient tells them apart."""

    def program():
        for name, law in LATENTS.items():
            if name not in NO_RULE:
                pyro.sample(name, law())

    check_equal(program)


@pytest.mark.parametrize("name", NO_RULE)
def test_what_has_no_rule_says_so(name):
    def program():
        pyro.sample("latent", LATENTS[name]())

    with pytest.raises(Unsupported):
        translated(traced(program))


def regression():
    """Products of every kind, reductions, indices and joins."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    with pyro.plate("group", 4):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    group = torch.arange(40) % 4
    eta = X @ slope + shift[group]
    pair = torch.stack((shift, shift.flip(0).cumsum(0)), -1)
    inner = pair.mT @ pair + torch.eye(2)
    factor = torch.linalg.cholesky(inner)
    inverse = torch.cholesky_inverse(factor) + torch.cholesky_solve(pair.mT, factor)[:, :2]
    solved = torch.linalg.solve_triangular(factor, pair.mT, upper=False)
    wide = torch.einsum("ij,jk->ik", pair, torch.cat((factor, solved[:, :1]), 1))
    total = wide.logsumexp(-1).sum() + wide.softmax(-1).square().sum() + wide.log_softmax(0).mean()
    masked = torch.where(shift > 0.1, shift.exp(), shift.sinh()).clamp(-2.0, 2.0)
    placed = torch.zeros(6).index_put((torch.tensor([0, 2, 2, 5]),), masked, accumulate=True)
    spread = torch.zeros(5).scatter_add(0, torch.tensor([4, 4, 0, 1]), masked)
    special = (torch.lgamma(shift.exp()) + torch.digamma(1 + shift.square()) + shift.erf()).sum()
    triangle = torch.outer(slope, slope).tril(-1).sum() + torch.outer(slope, slope).triu(1).amax()
    padded = torch.nn.functional.pad(shift, (1, 2)).reshape(7, 1).expand(7, 3).sum(0)
    chunk = slope.reshape(1, 5).repeat(2, 1).unbind(0)[1][1:5:2]
    parts = (
        total,
        inverse.square().sum(),
        placed.square().sum(),
        spread.norm(),
        special,
        triangle,
        padded.sum(),
    )
    pyro.factor(
        "parts", 0.01 * torch.stack(parts).sum() + chunk.sum() + X.mT.matmul(eta).abs().sum()
    )
    spread_out = (X @ slope).unsqueeze(-1) * shift.exp()
    pyro.factor("rows", 0.1 * (spread_out - spread_out.logsumexp(-1, keepdim=True)).sin().sum())
    lead = torch.linalg.solve_triangular(factor, X[:, :2].mT * shift[0], upper=False)
    pyro.factor("solved", 0.01 * (lead.square().sum(0) + lead.cumsum(0)[1]).sum())
    with pyro.plate("data", 40):
        pyro.sample("y", dist.Bernoulli(logits=eta), obs=(X[:, 0] > 0).double())


def mixture():
    """Log-sum-exp over components, triangular systems over rows."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("component", 3):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2)).to_event(1))
        factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
    law = dist.MultivariateNormal(loc, scale_tril=scale.unsqueeze(-1) * factor)
    with pyro.plate("data", 40):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), law), obs=X[:, :2])


@pytest.mark.parametrize("program", [regression, mixture, program_of_several, enumerated_mixture])
def test_programs(program):
    check_equal(program)


def test_a_loop_over_200_steps_compiles_in_seconds():
    y = rng.standard_normal(200, rng.make_generator(1))

    def program():
        loc, near, echo = (pyro.sample(n, dist.Normal(0.0, 1.0)) for n in ("loc", "near", "echo"))
        error, errors = y[0] - loc, []
        for t in range(1, 200):
            error = y[t] - (loc + near * y[t - 1] + 0.3 * echo * error)
            errors.append(error)
        pyro.factor("errors", dist.Normal(0.0, 1.0).log_prob(torch.stack(errors)).sum())

    density = traced(program)
    assert translated(density).statements < 2000


def dense_normal():
    scale = torch.tensor([0.1, 1.0, 5.0, 1.0, 2.0, 0.5], **D64)
    pyro.sample("x", dist.Normal(0.0, scale).to_event(1))


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("num_chains", [3, 5])
def test_the_state_machine_is_that_of_tensors(rank, num_chains):
    """The same random numbers give the same trajectories, draw by draw."""
    density, native = check_equal(dense_normal, num_chains)
    generator, d = rng.make_generator(5), density.num_params
    basis = torch.linalg.qr(rng.standard_normal((d, rank), generator))[0].contiguous()
    values = torch.tensor([4.0, 0.3], **D64)[:rank]
    metric = Metric(
        torch.tensor(0.4, **D64),
        torch.linspace(0.5, 2.0, d, **D64),
        basis,
        torch.stack((values - 1, values.rsqrt() - 1)),
        torch.tensor(6.0, **D64),
    )
    start = density._points(num_chains)
    lp, gradient = density.value_and_grad(start)
    normal = rng.standard_normal((num_chains, d), generator)
    uniform = torch.rand(num_chains, generator=generator, **D64)
    chains = launch(start, lp, gradient, metric, normal, uniform, 6)
    mine = NativeMachine(native, num_chains)
    noise = mine.noise(chains)
    # the first call fills the tape
    moved = Trajectories(*(v.clone() for v in chains))
    moved, rows = mine.run(moved, metric, noise, 15 * num_chains, generator)
    steps, used = int(noise["at"]), [0] * num_chains
    assert steps > 15

    advance = machine(density.value_and_grad, tables(6, torch.device("cpu")))
    found = []
    for k in range(steps):
        tape = torch.stack([noise["normal"][used[c], c] for c in range(num_chains)])
        *new, record = advance(*chains, *metric, tape, noise["uniform"][k])
        chains = Trajectories(*new)
        for c in range(num_chains):
            if record[c, 0] > 0:
                used[c] += 1
                found.append(torch.cat((torch.tensor([float(c)], **D64), record[c, 1:])))
    torch.testing.assert_close(rows, torch.stack(found), rtol=1e-6, atol=1e-6)
    assert used == noise["used"].tolist()
    torch.testing.assert_close(moved.ends, chains.ends, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved.numbers, chains.numbers, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- a compiler that fails
_FAILS = """#!/bin/sh
echo once >> {log}
[ $(wc -l < {log}) -le {times} ] && {{ echo "fatal error: Killed signal terminated" >&2; exit 1; }}
exec {compiler} "$@"
"""


@pytest.mark.parametrize("times", [1, 2])
def test_a_compiler_that_is_killed_once_is_tried_again(tmp_path, monkeypatch, times):
    """One run must not be computed otherwise than all others because memory was short."""
    engine = NUTS(num_chains=1, num_samples=20, num_warmup=20, compile=True)

    def program():
        pyro.sample("loc", dist.Normal(0.25, 1.0))

    usual = engine.run(program)
    script = tmp_path / "compiler"
    found = compiler()
    script.write_text(_FAILS.format(log=tmp_path / "log", times=times, compiler=found))
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    native._library.cache_clear()
    monkeypatch.setenv("BAYESGEN_CACHE", str(tmp_path))
    monkeypatch.setattr("bayesgen.inference.compiled.speed._inductor", _not_now)
    fit = engine.run(program)
    if times == 1:
        assert fit.attrs["is_compiled"]
        assert torch.equal(fit.draws["loc"], usual.draws["loc"])
        assert len((tmp_path / "log").read_text().splitlines()) == 2
    else:
        assert not fit.attrs["is_compiled"]
        assert "Killed signal" in fit.attrs["speed"]


def _not_now(density, table, num_chains, max_depth, why):
    return speed._eager(density, table, num_chains, why)


def test_rows_are_added_up_by_an_index_in_any_order():
    """Repeated, missing and unsorted indices, of numbers and rows; one of two dimensions."""
    rows, table = torch.tensor([3, 0, 3, 5, 1, 3, 0]), torch.tensor([[1, 4], [4, 4], [0, 2]])

    def program():
        loc = pyro.sample("loc", dist.Normal(torch.zeros(6, 3, **D64), 1.0).to_event(2))
        one = pyro.sample("one", dist.Normal(torch.zeros(6, **D64), 1.0).to_event(1))
        weight = torch.arange(1.0, 8.0, **D64)
        pyro.factor("rows", (loc[rows].sin().sum(-1) * weight * one[rows].exp()).sum())
        pyro.factor("table", (one[table].cos() * loc[table].sum(-1)).sum())

    check_equal(program)


@pytest.mark.slow
def test_a_loop_over_hundreds_of_steps():
    """More than two thousand lines: not unrolled, and compiled with less effort."""
    y = rng.standard_normal(200, rng.make_generator(1))

    def program():
        level, share = pyro.sample("both", dist.HalfNormal(torch.ones(2, **D64)).to_event(1))
        scales = [torch.ones((), **D64)]
        for t in range(1, len(y)):
            scales.append((level + share.neg().exp() * scales[-1] ** 2 + y[t - 1] ** 2).sqrt())
        log_odds = torch.zeros(3, **D64)
        for t in range(200):
            log_odds = torch.logsumexp(log_odds[:, None] - level * y[t] * torch.eye(3, **D64), 0)
        pyro.factor("y", dist.Normal(0.0, torch.stack(scales)).log_prob(y).sum() + log_odds[0])

    density, _ = check_equal(program)
    assert translated(density).statements > LONG
    assert with_slope(density) is translated(density)


def test_values_written_through_a_mask_of_data():
    check_equal(masked_fill_in)


def test_data_that_a_program_finds_in_single_precision():
    """torch rounds their products with a scalar in double, and the gradient of them."""
    found = X[:, 0].float()

    def program():
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        weights = pyro.sample("weights", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        narrow = X.float() @ weights.float()
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(slope * found + narrow, 1.0), obs=X[:, 1])

    def in_double():
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        weights = pyro.sample("weights", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        loc = slope * found.double() + X.float().double() @ weights
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=X[:, 1])

    density, _ = check_equal(program)
    points = density._points(3)
    wanted = traced(in_double).value_and_grad(points)
    torch.testing.assert_close(density.value_and_grad(points), wanted, rtol=1e-12, atol=1e-12)
