"""What every covariance prior owes: shapes, sampling, density, entropy, divergence, gradients."""

from __future__ import annotations

import pytest
import torch
from pyro.distributions.testing.gof import auto_goodness_of_fit
from torch.distributions import biject_to, constraints, kl_divergence, transform_to
from torch.fx.experimental.proxy_tensor import make_fx

from bayesgen.distributions import NormalInverseWishart
from tests.distributions.cases import CASES, OTHERS, flat, flat_log_prob, spread, z_score

NAMES = sorted(CASES)
SINGLE = [name for name in NAMES if "batch" not in name]
F64 = torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_shapes(name, device, dtype):
    dist = CASES[name](dtype, device)
    draws = dist.sample((4, 2), generator=torch.Generator(device=device).manual_seed(0))
    assert draws.shape == (4, 2) + dist.batch_shape + dist.event_shape
    assert draws.dtype == dtype
    assert draws.device.type == device.type
    assert dist.log_prob(draws).shape == (4, 2) + dist.batch_shape
    assert dist.entropy().shape == dist.batch_shape
    assert dist.mean.shape == dist.mode.shape == dist.batch_shape + dist.event_shape
    assert dist.support.check(draws).all()


@pytest.mark.parametrize("name", NAMES)
def test_expand_keeps_the_density(name, device, dtype):
    dist = CASES[name](dtype, device)
    shape = torch.Size((3, 2)) + dist.batch_shape
    wide = dist.expand(shape)
    assert type(wide) is type(dist)
    assert wide.batch_shape == shape
    draws = spread(wide, 1)[0]
    assert draws.shape == shape + dist.event_shape
    torch.testing.assert_close(wide.log_prob(draws), dist.log_prob(draws))
    torch.testing.assert_close(wide.entropy(), dist.entropy().expand(shape))
    assert wide.to_event(1).log_prob(draws).shape == shape[:-1]


# Nearest neighbours estimate a density without bias in few dimensions only: the larger ones are
# held by their entropy and divergence below.
@pytest.mark.parametrize("name", ["factor-1", "factor-2", "matrix-2", "niw-1", "nig"])
def test_samples_fit_the_density(name):
    dist = CASES[name](F64, torch.device("cpu"))
    vector = flat(dist, spread(dist, 20_000))

    def goodness(of):
        # Pyro's test wants numbers, not vectors of length 1.
        return auto_goodness_of_fit(vector.squeeze(-1), flat_log_prob(of, vector).exp())

    assert goodness(dist) > 1e-3
    # The negative control: another density is told apart. (Pyro's chi-square survival function
    # returns exactly 1 where the statistic is so large that its series breaks down.)
    wrong = goodness(OTHERS[name](F64, torch.device("cpu")))
    assert wrong < 1e-6 or wrong == 1.0


@pytest.mark.parametrize("name", ["factor-1", "factor-2", "niw-1", "nig"])
def test_density_integrates_to_one(name):
    """The trapezoid rule; steps grow as sinh, so that it converges fast and reaches the tails."""
    dist = CASES[name](F64, torch.device("cpu"))
    vector = flat(dist, spread(dist, 4000))
    dim = vector.shape[-1]
    steps = torch.linspace(-6.0, 6.0, {1: 2000, 2: 500, 3: 110}[dim], dtype=F64)
    grid = torch.cartesian_prod(*[steps] * dim).reshape(-1, dim)
    points = vector.mean(0) + vector.std(0) * torch.sinh(grid)
    density = flat_log_prob(dist, points).exp() * (vector.std(0) * torch.cosh(grid)).prod(-1)
    total = float(density.sum()) * float(steps[1] - steps[0]) ** dim
    assert total == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_entropy_is_the_mean_of_minus_log_prob(name):
    dist = CASES[name](F64, torch.device("cpu"))
    assert z_score(-dist.log_prob(spread(dist, 40_000)), dist.entropy()) < 4.5


@pytest.mark.parametrize("name", NAMES)
def test_divergence_is_the_mean_of_the_log_ratio(name):
    p, q = CASES[name](F64, torch.device("cpu")), OTHERS[name](F64, torch.device("cpu"))
    draws = spread(p, 40_000)
    assert z_score(p.log_prob(draws) - q.log_prob(draws), kl_divergence(p, q)) < 4.5
    assert (kl_divergence(p, q) > 0).all()
    torch.testing.assert_close(kl_divergence(p, p), torch.zeros(p.batch_shape, dtype=F64))


@pytest.mark.parametrize("name", NAMES)
def test_mean_and_variance(name):
    dist = CASES[name](F64, torch.device("cpu"))
    draws = spread(dist, 40_000)
    exists = torch.isfinite(dist.mean)
    assert z_score(torch.where(exists, draws, 0.0), torch.where(exists, dist.mean, 0.0)) < 4.5
    if name == "matrix-batch" or name.startswith("factor-batch"):
        ratio = draws.var(0) / dist.variance
        assert (ratio[dist.variance > 0] - 1).abs().max() < 0.15


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_float64(name, device):
    narrow, wide = CASES[name](torch.float32, device), CASES[name](F64, device)
    draws = spread(wide, 50)
    # float32 rounds the value too: compare at the same value.
    exact = wide.log_prob(draws.float().double()) if "matrix" not in name else wide.log_prob(draws)
    torch.testing.assert_close(
        narrow.log_prob(draws.float()).double(), exact, rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(narrow.entropy().double(), wide.entropy(), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(narrow.log_prob(spread(narrow, 1000))).all()


@pytest.mark.parametrize("name", NAMES)
def test_log_prob_gradient_in_the_value(name):
    dist = CASES[name](F64, torch.device("cpu"))
    vector = flat(dist, spread(dist, 3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: flat_log_prob(dist, v), (vector,))


@pytest.mark.parametrize("name", SINGLE)
def test_gradients_in_the_arguments(name):
    """log_prob, entropy and rsample at fixed noise; the degrees of freedom have their own test."""
    dist = CASES[name](F64, torch.device("cpu"))
    draws = spread(dist, 3)
    names = [key for key in dist.arg_constraints if key not in ("df", "concentration")]
    fixed = {k: getattr(dist, k) for k in dist.arg_constraints if k not in names}
    start = [
        transform_to(dist.arg_constraints[k]).inv(getattr(dist, k)).detach().requires_grad_()
        for k in names
    ]

    def run(*arguments):
        moved = {
            k: transform_to(dist.arg_constraints[k])(a)
            for k, a in zip(names, arguments, strict=True)
        }
        other = type(dist)(**fixed, **moved)
        noise = torch.Generator().manual_seed(0)
        return other.log_prob(draws), other.entropy(), other.rsample((2,), generator=noise)

    assert torch.autograd.gradcheck(run, start)


@pytest.mark.parametrize("name", SINGLE)
def test_pathwise_gradient_in_the_degrees_of_freedom(name):
    """d/d(df) of E[log q] along the draws, against the same derivative of a closed form."""
    dist = CASES[name](F64, torch.device("cpu"))
    other = OTHERS[name](F64, torch.device("cpu"))
    key = "concentration" if name == "nig" else "df"
    degrees = getattr(dist, key).clone().requires_grad_()
    arguments = {k: getattr(dist, k) for k in dist.arg_constraints} | {key: degrees}
    moving = type(dist)(**arguments)
    # E_p[log q] = -KL(p, q) - H(p).
    closed = torch.autograd.grad(-kl_divergence(moving, other) - moving.entropy(), degrees)[0]
    many = type(dist)(**(arguments | {key: degrees.expand(20_000)}))
    values = other.log_prob(many.rsample(generator=torch.Generator().manual_seed(1)))
    estimates = torch.autograd.grad(values.sum(), many.__dict__[key])[0]
    assert z_score(estimates, closed) < 4.5


@pytest.mark.parametrize("name", NAMES)
def test_generator_decides_the_draws_alone(name, device, dtype):
    dist = CASES[name](dtype, device)
    state = torch.random.get_rng_state()
    assert torch.equal(spread(dist, 5, seed=3), spread(dist, 5, seed=3))
    assert not torch.equal(spread(dist, 5, seed=3), spread(dist, 5, seed=4))
    dist.rsample((2,), generator=torch.Generator(device=device).manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_bijection(name, device):
    dist = CASES[name](F64, device)
    transform = biject_to(dist.support)
    assert transform.bijective
    value = spread(dist, 4)
    vector = transform.inv(value)
    torch.testing.assert_close(transform(vector), value)
    torch.testing.assert_close(transform.inv(transform(vector)), vector)
    assert transform.inverse_shape(value.shape) == vector.shape
    assert transform.forward_shape(vector.shape) == value.shape
    assert dist.support.check(transform(3.0 * vector)).all()


@pytest.mark.parametrize("name", ["factor-3-weak", "matrix-2", "niw-2", "nig"])
def test_jacobian_is_that_of_automatic_differentiation(name):
    dist = CASES[name](F64, torch.device("cpu"))
    transform = biject_to(dist.support)
    value = spread(dist, 1)[0]
    vector = transform.inv(value)
    free = torch.ones_like(value)
    if name != "nig":
        free = free.tril(1) if name.startswith("niw") else free.tril()

    jacobian = torch.autograd.functional.jacobian(lambda v: transform(v)[free > 0], vector)
    assert jacobian.shape == (len(vector), len(vector))
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(transform.log_abs_det_jacobian(vector, value), expected)


@pytest.mark.parametrize("name", ["factor-2", "matrix-2", "niw-2", "nig"])
def test_density_runs_under_vmap(name):
    dist = type(CASES[name](F64, torch.device("cpu")))
    case = CASES[name](F64, torch.device("cpu"))
    quiet = dist(**{k: getattr(case, k) for k in case.arg_constraints}, validate_args=False)
    vector = flat(case, spread(case, 5))
    mapped = torch.func.vmap(lambda v: flat_log_prob(quiet, v))(vector)
    torch.testing.assert_close(mapped, flat_log_prob(case, vector))
    gradient = torch.func.vmap(torch.func.grad(lambda v: flat_log_prob(quiet, v)))(vector)
    assert torch.isfinite(gradient).all()


def test_torch_constraints_gain_a_bijection():
    """PyTorch's own distributions over matrices become usable priors as well."""
    for constraint in (constraints.lower_cholesky, constraints.positive_definite):
        vector = torch.linspace(-1.0, 1.0, 6, dtype=F64)
        value = biject_to(constraint)(vector)
        assert constraint.check(value)
        torch.testing.assert_close(biject_to(constraint).inv(value), vector)
    with pytest.raises(ValueError, match="d \\(d \\+ 1\\) / 2"):
        biject_to(constraints.lower_cholesky)(torch.zeros(4))
    # What torch registers for optimisation stays as it was.
    assert transform_to(constraints.lower_cholesky)(torch.zeros(3, 3)).shape == (3, 3)


def test_the_gradient_of_a_density_traces_into_a_graph():
    """DESIGN.md, idea 1: a pure graph of value and gradient, mapped over chains."""
    dist = NormalInverseWishart(0.0, 1.0, 5.0, torch.eye(3, dtype=F64), validate_args=False)

    def step(vector):
        vector = vector.detach().requires_grad_()
        value = flat_log_prob(dist, vector)
        return value, torch.autograd.grad(value, vector)[0]

    start = torch.linspace(-1.0, 1.0, 9, dtype=F64)
    graph = make_fx(torch.func.vmap(make_fx(step)(start)))(start.expand(4, 9).clone())
    moved = torch.stack([start, 0.5 * start, -start, 2.0 * start])
    value, gradient = graph(moved)
    for i, each in enumerate(moved):
        expected_value, expected_gradient = step(each)
        torch.testing.assert_close(value[i], expected_value)
        torch.testing.assert_close(gradient[i], expected_gradient)
