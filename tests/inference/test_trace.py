"""The traced density is Pyro's own, for every distribution and constraint."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints

from bayesgen import rng
from bayesgen.inference.programs.complaints import bijection
from bayesgen.inference.programs.trace import Density, trace

__all__: list[str] = []

D64 = {"dtype": torch.float64}
SPD = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 1.5]], **D64)
THREE = torch.tensor([0.5, 1.0, 2.0], **D64)


def t(value):
    return torch.tensor(value, **D64)


LATENTS = {
    "normal": lambda: dist.Normal(t(1.0), 2.0),
    "normal-vector": lambda: dist.Normal(THREE, 1.0).to_event(1),
    "lognormal": lambda: dist.LogNormal(t(0.0), 1.0),
    "halfnormal": lambda: dist.HalfNormal(t(2.0)),
    "halfcauchy": lambda: dist.HalfCauchy(t(5.0)),
    "cauchy": lambda: dist.Cauchy(t(0.0), 2.0),
    "student": lambda: dist.StudentT(t(3.0), 0.0, 1.0),
    "gamma": lambda: dist.Gamma(t(2.0), 3.0),
    "inverse-gamma": lambda: dist.InverseGamma(t(2.0), t(3.0)),
    "exponential": lambda: dist.Exponential(t(2.0)),
    "chi2": lambda: dist.Chi2(t(3.0)),
    "weibull": lambda: dist.Weibull(t(1.0), t(1.5)),
    "pareto": lambda: dist.Pareto(t(1.0), t(2.0)),
    "beta": lambda: dist.Beta(t(2.0), t(3.0)),
    "kumaraswamy": lambda: dist.Kumaraswamy(t(2.0), t(3.0)),
    "uniform": lambda: dist.Uniform(t(-1.0), t(4.0)),
    "von-mises": lambda: dist.VonMises(t(0.3), t(2.0)),
    "laplace": lambda: dist.Laplace(t(0.0), 1.0),
    "gumbel": lambda: dist.Gumbel(t(0.0), 1.0),
    "logistic": lambda: dist.Logistic(t(0.0), 1.0),
    "soft-laplace": lambda: dist.SoftLaplace(t(0.0), 1.0),
    "asymmetric-laplace": lambda: dist.AsymmetricLaplace(t(0.0), t(1.0), t(0.7)),
    "dirichlet": lambda: dist.Dirichlet(THREE),
    "logistic-normal": lambda: dist.LogisticNormal(torch.zeros(2, **D64), torch.ones(2, **D64)),
    "mvn": lambda: dist.MultivariateNormal(THREE, SPD),
    "mvn-low-rank": lambda: dist.LowRankMultivariateNormal(THREE, SPD[:, :1], THREE),
    "mv-student": lambda: dist.MultivariateStudentT(t(4.0), THREE, torch.linalg.cholesky(SPD)),
    "lkj": lambda: dist.LKJCholesky(3, t(2.0)),
    "lkj-pair": lambda: dist.LKJCholesky(2, t(2.0)),
    "wishart": lambda: dist.Wishart(t(5.0), SPD),
    "flat-cholesky": lambda: dist.ImproperUniform(constraints.lower_cholesky, (), (3, 3)),
    "flat-positive-definite": lambda: dist.ImproperUniform(
        constraints.positive_definite, (), (3, 3)
    ),
    "batch": lambda: dist.Gamma(torch.ones(2, 3, **D64), 2.0).to_event(2),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(THREE / THREE.sum()), dist.Normal(THREE, 1.0)
    ),
    "transformed": lambda: dist.TransformedDistribution(
        dist.Normal(t(0.0), 1.0), [dist.transforms.ExpTransform()]
    ),
    "flat-real": lambda: dist.ImproperUniform(constraints.real_vector, (), (3,)),
    "flat-positive": lambda: dist.ImproperUniform(constraints.positive, (), ()),
    "flat-interval": lambda: dist.ImproperUniform(constraints.interval(-1.0, 3.0), (), ()),
    "flat-less": lambda: dist.ImproperUniform(constraints.less_than(2.0), (), ()),
    "flat-simplex": lambda: dist.ImproperUniform(constraints.simplex, (), (3,)),
    "flat-ordered": lambda: dist.ImproperUniform(constraints.ordered_vector, (), (3,)),
    "flat-positive-ordered": lambda: dist.ImproperUniform(
        constraints.positive_ordered_vector, (), (3,)
    ),
    "flat-correlation": lambda: dist.ImproperUniform(constraints.corr_cholesky, (), (3, 3)),
}


def generator():
    return rng.make_generator(0)


def check_against_pyro(program, density, num_points=3):
    """Density and gradient against Pyro's trace and central differences, in batches of 1 and 3."""
    assert density.is_traced, density.message
    points = 0.7 * rng.standard_normal((num_points, density.num_params), generator())
    value, gradient = density.batched(num_points)(points)
    for k, point in enumerate(points):
        wanted = by_hand(program, density, point)
        torch.testing.assert_close(value[k], wanted, rtol=1e-10, atol=1e-10)
    step = 1e-5
    for d in range(min(density.num_params, 4)):
        shift = torch.zeros_like(points)
        shift[:, d] = step
        slope = density.value_and_grad(points + shift)[0]
        slope = (slope - density.value_and_grad(points - shift)[0]) / (2 * step)
        torch.testing.assert_close(gradient[:, d], slope, rtol=2e-5, atol=2e-5)


def by_hand(program, density, point):
    """Pyro's log density at the constrained values, plus the Jacobian of each site's transform."""
    values = density.constrain(point)
    run = poutine.condition(program, data=values)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pyro.validation_enabled(False):
            nodes = poutine.trace(run).get_trace()
            total = nodes.log_prob_sum()
            for site in density.layout.sites:
                transform = bijection(nodes.nodes[site.name]["fn"])
                raw = point[site.start : site.start + site.size].reshape(site.unconstrained)
                torch.testing.assert_close(values[site.name], transform(raw))
                total = total + transform.log_abs_det_jacobian(raw, values[site.name]).sum()
    finally:
        torch.set_default_dtype(before)
    return total


@pytest.mark.parametrize("name", LATENTS)
def test_latent_densities_are_pyros(name):
    def program():
        pyro.sample("latent", LATENTS[name]())

    check_against_pyro(program, trace(program, generator=generator()))


@pytest.mark.parametrize("num_levels", [2, 3, 5])
def test_ordered_responses_are_pyros(num_levels):
    """Torch's rules for batches do not know an end of -1, which this distribution writes to."""
    levels = torch.arange(2 * num_levels) % num_levels

    def program():
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        first = dist.Normal(torch.zeros(num_levels - 1), 3.0).to_event(1)
        law = dist.TransformedDistribution(first, [dist.transforms.OrderedTransform()])
        cutpoints = pyro.sample("cutpoints", law)
        with pyro.plate("data", len(levels)):
            law = dist.OrderedLogistic(slope * torch.linspace(-1, 1, len(levels)), cutpoints)
            pyro.sample("level", law, obs=levels)

    check_against_pyro(program, trace(program, generator=generator()))


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_correlated_rows_are_pyros_and_have_a_fingerprint(dim):
    """Of two columns one correlation is left, a constant of which has a stride of zero."""
    x = rng.standard_normal((20, dim), generator())

    def program():
        factor = pyro.sample("factor", dist.LKJCholesky(dim, 2.0))
        with pyro.plate("data", len(x)):
            law = dist.MultivariateNormal(torch.zeros(dim), scale_tril=factor)
            pyro.sample("x", law, obs=x)

    density = trace(program, generator=generator())
    check_against_pyro(program, density)
    assert len(density.fingerprint()) == 64


@pytest.mark.parametrize("event", [(), (2,)])
def test_an_angle_goes_once_around(event):
    """Pyro's support of all real numbers has a copy of the posterior every 2 pi."""

    def program():
        law = dist.VonMises(torch.zeros(event), 0.1).to_event(len(event))
        angle = pyro.sample("angle", law)
        pyro.sample("seen", dist.VonMises(angle, 2.0).to_event(len(event)), obs=torch.ones(event))

    density = trace(program, generator=generator())
    ends = torch.tensor([[-50.0], [50.0]], **D64).expand(2, density.num_params)
    bounds = density.constrain(ends)["angle"]
    assert bounds.abs().max() <= torch.pi
    torch.testing.assert_close(bounds[1] - bounds[0], torch.full(event, 2 * torch.pi, **D64))
    grid = torch.linspace(-30.0, 30.0, 4001, **D64)[:, None]
    if not event:  # a density over the whole circle, that of both terms' product
        total = density.value_and_grad(grid)[0].exp().sum() * (grid[1] - grid[0]).item()
        angles = torch.linspace(-torch.pi, torch.pi, 4001, **D64)[:-1]
        both = dist.VonMises(t(0.0), t(0.1)).log_prob(angles)
        both = both + dist.VonMises(angles, t(2.0)).log_prob(t(1.0))
        torch.testing.assert_close(total, both.exp().sum() * 2 * torch.pi / 4000)


def test_without_a_rule_for_batches_the_program_runs_by_pyro(monkeypatch):
    def refused(self, vectors):
        raise RuntimeError("no batching rule")

    monkeypatch.setattr(Density, "value_and_grad", refused)
    density = trace(program_of_several, generator=generator())
    assert not density.is_traced
    assert "no batching rule" in density.message


def program_of_several():
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    bound = pyro.sample("bound", dist.Uniform(0.0, scale))  # a support that another site sets
    with pyro.plate("group", 3, dim=-2):
        loc = pyro.sample("loc", dist.Normal(bound, scale))
        with pyro.plate("data", 4, dim=-1), poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(loc, scale), obs=torch.arange(12.0).reshape(3, 4))
    with poutine.mask(mask=torch.tensor([True, False])), pyro.plate("pair", 2):
        pyro.sample("masked", dist.Gamma(2.0, 1.0))
    pyro.factor("extra", -loc.square().sum())
    pyro.deterministic("twice", 2 * loc)


def test_plates_scales_masks_factors_and_dependent_supports():
    density = trace(program_of_several, generator=generator())
    check_against_pyro(program_of_several, density)
    assert density.layout.dims["loc"] == ("group", "loc_dim_1")
    assert density.layout.observed_dims["x"] == ("group", "data")
    draws = density.constrain(torch.zeros((2, 5, density.num_params), **D64))
    assert draws["twice"].shape == (2, 5, 3, 1)
    assert density.log_likelihood(draws)["x"].shape == (2, 5, 3, 4)


def test_constrain_and_unconstrain_are_inverse():
    density = trace(program_of_several, generator=generator())
    point = rng.standard_normal(density.num_params, generator())
    values = {s.name: density.constrain(point)[s.name] for s in density.layout.sites}
    torch.testing.assert_close(density.unconstrain(values), point)


# ---------------------------------------------------------------- discrete latents
X = torch.tensor([-0.2, 0.1, 3.9, 4.2, 4.4, 0.3], **D64)


def prior_of_two():
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("component", 2):
        return weights, pyro.sample("loc", dist.Normal(0.0, 5.0))


def enumerated_mixture():
    weights, loc = prior_of_two()
    with pyro.plate("data", len(X)):
        label = pyro.sample("label", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[label], 1.0), obs=X)


def marginal_mixture():
    weights, loc = prior_of_two()
    with pyro.plate("data", len(X)):
        law = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 1.0))
        pyro.sample("x", law, obs=X)


def test_an_enumerated_mixture_is_the_marginal_one():
    summed, marginal = (
        trace(p, generator=generator()) for p in (enumerated_mixture, marginal_mixture)
    )
    assert summed.is_traced
    assert summed.layout.enumerated == {"label": (6,)}
    points = rng.standard_normal((4, 3), generator())
    for left, right in zip(summed.batched(4)(points), marginal.batched(4)(points), strict=True):
        torch.testing.assert_close(left, right)
    draws = summed.constrain(points)
    torch.testing.assert_close(
        summed.log_likelihood(draws)["x"], marginal.log_likelihood(draws)["x"]
    )


def test_an_enumerated_chain_is_the_forward_recursion():
    def program():
        with pyro.plate("state", 2):
            rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2)))
        state = 0
        for step in pyro.markov(range(5)):
            state = pyro.sample(f"z{step}", dist.Categorical(rows[state]))
            pyro.sample(f"x{step}", dist.Normal(4.0 * state, 1.0), obs=X[step])

    density = trace(program, generator=generator())
    assert density.is_traced, density.message
    points = rng.standard_normal((3, 2), generator())
    draws = density.constrain(points)
    wanted = []
    for rows in draws["rows"]:
        alpha = rows[0].log()
        emission = dist.Normal(torch.tensor([0.0, 4.0], **D64), 1.0)
        for step in range(5):
            if step:
                alpha = (alpha.unsqueeze(-1) + rows.log()).logsumexp(0)
            alpha = alpha + emission.log_prob(X[step])
        wanted.append(alpha.logsumexp(0))
    total = next(iter(density.log_likelihood(draws).values()))
    torch.testing.assert_close(total, torch.stack(wanted))


# ---------------------------------------------------------------- what cannot be traced
def test_a_branch_on_a_value_falls_back_and_names_the_line():
    def program():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        if loc > 0:
            loc = 2 * loc
        pyro.sample("x", dist.Normal(loc, 1.0), obs=t(0.5))

    density = trace(program, generator=generator())
    assert not density.is_traced
    assert "test_trace.py" in density.message
    assert "if loc > 0:" in density.message
    value, gradient = density.batched(2)(torch.tensor([[1.0], [-1.0]], **D64))
    assert value[0] == by_hand(program, density, torch.tensor([1.0], **D64))
    torch.testing.assert_close(gradient[1, 0], t(1.0 + 1.5))


def test_hidden_randomness_is_found():
    def program():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        noise = torch.rand((), generator=HIDDEN, dtype=torch.float64)
        pyro.sample("x", dist.Normal(loc + noise, 1.0), obs=t(0.5))

    assert "disagrees with Pyro" in trace(program, generator=generator()).message


HIDDEN = torch.Generator().manual_seed(1)


def test_the_eager_graph_is_small():
    def program():
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(0.0, scale), obs=THREE)

    density = trace(program, generator=generator())
    assert len(density.batched(4).graph.nodes) < 55


@pytest.mark.parametrize("form", ["scale_tril", "covariance"])
def test_one_chain_where_a_matrix_is_singular_stops_no_other(form):
    """Torch raises for a whole batch; here that one point has a density that is not finite."""

    def program():
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        matrix = scale * torch.eye(2)
        if form == "scale_tril":
            precision = torch.cholesky_inverse(matrix)
            pyro.factor("x", -0.5 * precision.sum() + matrix.diagonal().log().sum())
        else:
            law = dist.MultivariateNormal(torch.zeros(2), covariance_matrix=matrix)
            pyro.sample("x", law, obs=torch.ones(2))

    density = trace(program, dtype=torch.float64, generator=rng.make_generator(0))
    points = torch.tensor([[0.3], [-2000.0]], dtype=torch.float64)
    value, gradient = density.batched(2)(points)
    wanted = density.pyro_log_prob(points[0])
    torch.testing.assert_close(value[0], wanted)
    assert bool(gradient[0].isfinite().all())
    assert not bool(value[1].isfinite() & gradient[1].isfinite().all())


def test_counts_with_latent_weights_run_in_batches():
    """Pyro writes through a mask there, for which vmap has no rule."""

    def program():
        weights = pyro.sample("weights", dist.Dirichlet(THREE))
        pyro.sample("counts", dist.Multinomial(9, weights), obs=t([3.0, 4.0, 2.0]))

    density = trace(program, generator=rng.make_generator(0))
    points = t([[0.1, -0.4], [1.0, 0.3], [-0.5, 2.0]])
    values, _ = density.batched(3)(points)
    wanted = torch.stack([density.pyro_log_prob(point) for point in points])
    assert torch.allclose(values, wanted, rtol=1e-12)


def masked_fill_in():
    """Latents written through a mask of data, in a vector and along the rows of a table."""
    gaps = torch.tensor([True, False, True, True, False])
    few = pyro.sample("few", dist.Normal(torch.zeros(4), 1.0).to_event(1))  # one more than gaps
    many = pyro.sample("many", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    row = (2.0 * few.cumsum(0) - 1.0).sin()
    table = torch.ones(2, 5).masked_scatter(gaps, many.exp())
    loc = row.sum() * torch.zeros(5).masked_scatter(gaps, few) + table.prod(0)
    pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=t([0.5, 1.0, -1.0, 2.0, 0.0]))


def test_values_written_through_a_mask_of_data_run_in_batches():
    density = trace(masked_fill_in, generator=generator())
    check_against_pyro(masked_fill_in, density)
    assert (
        "aten.masked_scatter" not in density.single.code
    )  # vmap would go through chains one by one
