"""Every family keeps its contract: densities, holes, statistics, conditionals, draws, programs."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats

from bayesgen import rng
from bayesgen.distributions import InverseWishartCholesky
from bayesgen.models.families import family_class
from bayesgen.models.families.quadratic import unpack_natural
from bayesgen.storage import flatten, unflatten

__all__: list[str] = []


def close(left, right, tolerance=1e-10):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------ densities against scipy
def normal(x, values, k, seen):
    tril = values["scale_tril"] if values["scale_tril"].ndim == 2 else values["scale_tril"][k]
    covariance = (tril @ tril.mT)[seen][:, seen]
    return stats.multivariate_normal(values["loc"][k][seen], covariance).logpdf(x[seen])


def student(x, values, k, seen):
    tril = values["scale_tril"] if values["scale_tril"].ndim == 2 else values["scale_tril"][k]
    scale, df = (tril @ tril.mT)[seen][:, seen], float(values["df"][k]) if "df" in values else 4.0
    return stats.multivariate_t(values["loc"][k][seen], scale, df=df).logpdf(x[seen])


def independent(x, values, k, seen):
    variance = values["variance"][k].expand_as(x)
    scale = variance[seen].sqrt()
    return stats.norm(values["loc"][k][seen], scale).logpdf(x[seen]).sum()


def bernoulli(x, values, k, seen):
    return stats.bernoulli(values["probs"][k][seen]).logpmf(x[seen]).sum()


def poisson(x, values, k, seen):
    return stats.poisson(values["rate"][k][seen]).logpmf(x[seen]).sum()


def categorical(x, values, k, seen):
    own = values["probs"][k][seen]
    return sum(math.log(float(p[int(code)])) for p, code in zip(own, x[seen], strict=True))


def product(x, values, k, seen):
    total = 0.0
    parts = {"number": [0, 4], "flag": [1], "kind": [2], "visits": [3]}
    real = student if "number_df" in values else normal
    laws = {"number": real, "flag": bernoulli, "kind": categorical, "visits": poisson}
    for name, columns in parts.items():
        own = {key.removeprefix(name + "_"): v for key, v in values.items() if name in key}
        if bool(seen[columns].any()):
            total += float(laws[name](x[columns], own, k, seen[columns]))
    return total


LAWS = {
    "full": normal,
    "tied": normal,
    "diagonal": independent,
    "spherical": independent,
    "student": student,
    "bernoulli": bernoulli,
    "poisson": poisson,
    "categorical": categorical,
    "product": product,
}


@pytest.mark.parametrize("which", ["complete", "holes"])
def test_log_prob_is_scipys(case, generator, which):
    values = case.values(generator)
    x = case.x if which == "complete" else case.holes
    scores = case.family.log_prob(x, values)
    law = LAWS[case.name.split()[0]]
    for i, row in enumerate(x):
        seen = ~torch.isnan(row)
        for k in range(len(scores)):
            expected = float(law(row, values, k, seen)) if bool(seen.any()) else 0.0
            assert float(scores[k, i]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_message_scores_like_log_prob(case, generator):
    internal = case.internal(generator)
    family, message = case.family, case.family.block.natural(internal)
    scores = family.evaluate(family.observe(case.holes), message).scores
    close(scores, family.log_prob(case.holes, family.export(internal)), 1e-9)


def test_densities_have_finite_gradients(case, generator):
    """What NUTS and SVI need, with holes and with rows far out."""
    values = {k: v.requires_grad_() for k, v in case.values(generator).items()}
    scores = case.family.log_prob(case.holes, values)
    gradients = torch.autograd.grad(scores.sum(), list(values.values()), allow_unused=True)
    for site, gradient in zip(values, gradients, strict=True):
        unused = site.endswith("column_scale")  # of the prior alone
        assert (gradient is None) if unused else bool(torch.isfinite(gradient).all()), site


def test_single_precision_features(case, generator):
    internal = case.internal(generator)
    family, message = case.family, case.family.block.natural(internal)
    scores = family.evaluate(family.observe(case.holes, torch.float32), message).scores
    assert scores.dtype == torch.float32
    expected = family.log_prob(case.holes, family.export(internal))
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------ batch dimensions
def everything(family, observed, weights):
    """One pass of variational Bayes and of EM, by name."""
    block = family.block
    start = family.statistics(observed, weights, None, None)
    posterior = block.update(start)
    message = block.message(posterior)
    evaluation = family.evaluate(observed, message)
    statistics = family.statistics(observed, weights, evaluation, message)
    mode = block.maximise(statistics)
    return {
        "scores": evaluation.scores,
        "rows": family.rows(statistics),
        "inner": family.inner(message, statistics),
        "kl": block.kl(posterior),
        "log_prior": block.log_prior(mode),
        "collapsed": family.collapsed(mode),
        "evidence": block.log_evidence(start, mode),
        **{f"statistics {name}": value for name, value in statistics.items()},
        **{f"mode {name}": value for name, value in mode.items()},
        **{f"flat {k}": v for k, v in block.maximise(statistics, flat=True).items()},
    }


def test_leading_dimensions_are_a_loop(case, generator):
    observed = case.family.observe(case.holes)
    weights = case.responsibilities(generator, 2, 3)
    whole = everything(case.family, observed, weights)
    for i in range(2):
        for j in range(3):
            for name, value in everything(case.family, observed, weights[i, j]).items():
                # A flat top is found to the root of the precision.
                tolerance = 1e-5 if name.endswith("df") else 1e-8
                close(whole[name][i, j], value, tolerance)


def test_export_has_the_declared_dimensions(case, generator):
    coords = {"component": [0, 1], **case.family.coords()}
    values = case.values(generator, 4)
    assert set(values) == set(case.family.dims)
    for site, dims in case.family.dims.items():
        assert values[site].shape == (4, *(len(coords[name]) for name in dims)), site
    weights = torch.full((4, 2), 0.5, dtype=torch.float64)
    invariants = case.family.invariants(weights, values)
    assert set(invariants) == set(case.family.invariant_dims)
    for name, dims in case.family.invariant_dims.items():
        assert invariants[name].shape == (4, *(len(coords[dim]) for dim in dims)), name


# ------------------------------------------------------------------ statistics
def test_statistics_are_the_gradient_of_the_bound(case, generator):
    """Fisher's identity: it needs every hole and every local scale to be averaged rightly."""
    family, block = case.family, case.family.block
    observed = family.observe(case.holes)
    message = block.message(block.update(case.statistics(generator)))
    message = {name: value.detach().requires_grad_() for name, value in message.items()}
    scores = family.evaluate(observed, message).scores
    weights = torch.randn(2, 1, generator=generator, dtype=torch.float64)
    responsibilities = torch.softmax(scores + weights, -2).detach()
    bound = torch.logsumexp(scores + weights, -2).sum()
    evaluation = family.evaluate(observed, message)
    statistics = family.statistics(observed, responsibilities, evaluation, message)
    names = list(message)
    gradients = torch.autograd.grad(bound, list(message.values()))
    fixed = {name: value.detach() for name, value in statistics.items()}
    inner = family.inner(message, fixed)
    expected = torch.autograd.grad(inner, list(message.values()))
    for name, left, right in zip(names, gradients, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: n + m)
    total = family.rows(statistics).sum()
    close(total, torch.tensor(float(len(case.x)), dtype=torch.float64))


@pytest.mark.parametrize(
    "name", ["full", "tied", "student", "student fixed", "diagonal", "poisson"]
)
def test_the_bound_is_inner_plus_entropy(cases, name):
    """One component: the latents left are the holes and the local scales."""
    case = cases(name, 1)
    family, block = case.family, case.family.block
    observed, d = family.observe(case.holes), case.x.shape[1]
    ones = torch.ones((1, len(case.x)), dtype=torch.float64)
    message = block.message(block.update(family.statistics(observed, ones, None, None)))
    evaluation = family.evaluate(observed, message)
    statistics = family.statistics(observed, ones, evaluation, message)
    entropy = torch.zeros((), dtype=torch.float64)
    if "natural" in message and "log_det" in message:
        precision = unpack_natural(message["natural"][0], d)[2]
        for i, row in enumerate(case.holes):
            missing, mean_log = torch.isnan(row), 0.0
            if "df" in message:
                half = 0.5 * (message["df"][0] + (~missing).sum())
                rate = 0.5 * (message["df"][0] + evaluation.distances[0, i])
                entropy = entropy + torch.distributions.Gamma(half, rate).entropy()
                mean_log = torch.digamma(half) - rate.log()
            own = precision[missing][:, missing]
            count = int(missing.sum())
            constant = math.log(2 * math.pi * math.e)
            entropy = entropy + 0.5 * (count * (constant - mean_log) - torch.logdet(own))
    close(family.inner(message, statistics) + entropy, evaluation.scores.sum(), 1e-9)


def test_statistics_add_up_over_batches(case, generator):
    family = case.family
    message = family.block.message(family.block.update(case.statistics(generator)))
    weights = case.responsibilities(generator)
    whole, parts = None, {}
    for rows in (slice(None), slice(0, 7), slice(7, None)):
        observed = family.observe(case.holes[rows])
        evaluation = family.evaluate(observed, message)
        own = family.statistics(observed, weights[:, rows], evaluation, message)
        if whole is None:
            whole = own
        else:
            parts = {name: parts.get(name, 0.0) + value for name, value in own.items()}
    for name, value in whole.items():
        close(value, parts[name], 1e-9)


def test_drawn_statistics_average_to_expected_ones(case, generator):
    """Latents of rows whose labels are certain, drawn many times at once."""
    family, block = case.family, case.family.block
    observed = family.observe(case.holes)
    message = block.natural(case.internal(generator))
    labels = torch.arange(len(case.x)) % 2
    hot = torch.nn.functional.one_hot(labels, 2).T.double()
    evaluation = family.evaluate(observed, message)
    expected = family.statistics(observed, hot, evaluation, message)
    many = 4000
    wide = {name: value.expand(many, *value.shape) for name, value in message.items()}
    drawn = family.statistics(
        observed,
        hot.expand(many, *hot.shape),
        family.evaluate(observed, wide),
        wide,
        generator=generator,
    )
    for name, value in expected.items():
        error = drawn[name].std(0) / math.sqrt(many)
        z = (drawn[name].mean(0) - value) / (error + 1e-9 * (1 + value.abs()))
        assert float(z.abs().max()) < 5.0, name
    if case.family.collapsible(observed):
        assert all(float(drawn[name].std(0).max()) < 1e-9 for name in drawn)


# ------------------------------------------------------------------ conditionals and draws
def test_conditional_is_joint_over_marginal(case, generator):
    family, values = case.family, case.values(generator, 3)
    d = case.x.shape[1]
    for pattern in ([0], list(range(1, d)), [d - 1], list(range(d - 1)), []):
        observed = torch.zeros(d, dtype=torch.bool)
        observed[pattern] = True
        blind = case.x.masked_fill(~observed, torch.nan)
        law = family.conditional(blind, observed, values)
        assert law.batch_shape == (3, len(case.x), 2)
        assert law.event_shape == (d - len(pattern),)
        got = law.log_prob(case.x[:, ~observed].unsqueeze(-2))
        expected = family.log_prob(case.x, values) - family.log_prob(blind, values)
        close(got.double(), expected.transpose(-1, -2), 1e-8)
        assert law.mean.shape == (3, len(case.x), 2, d - len(pattern))


def test_draws_follow_the_density(case, generator):
    """Sample means and covariances are those that the family states; scores are calibrated."""
    family, many = case.family, 20_000
    values = {name: v.expand(many, *v.shape) for name, v in case.values(generator).items()}
    single = {name: v[0] for name, v in values.items()}
    labels = torch.zeros(many, dtype=torch.int64)
    rows = family.draw(values, labels, generator=generator)
    assert rows.shape == (many, case.x.shape[1])
    means = family.conditional(
        rows[:1], torch.zeros(case.x.shape[1], dtype=torch.bool), single
    ).mean[0, 0]
    finite = torch.isfinite(means)
    if "student" in case.name:
        return  # heavy tails: test_student_t.py compares quantiles
    z = (rows.mean(0) - means) / (rows.std(0) / math.sqrt(many))
    assert float(z[finite].abs().max()) < 5.0
    invariants = family.invariants(torch.tensor([1.0, 0.0], dtype=torch.float64), single)
    if "covariance" in invariants:
        close(invariants["mean"], means.to(torch.float64), 1e-9)
        spread = torch.cov(rows.T).diagonal()
        torch.testing.assert_close(
            spread, invariants["covariance"].diagonal(), rtol=0.15, atol=1e-3
        )


def test_embedding_is_complete_and_of_one_scale(case):
    points = case.family.embed(case.x)
    assert points.shape[0] == len(case.x)
    holes = case.family.embed(case.holes)
    assert torch.isfinite(holes).all()
    assert (holes[0] == 0).all()
    close(holes[1], points[1])
    per_column = points.square().sum(1).mean() / case.x.shape[1]
    assert 0.3 < float(per_column) < 2.0
    close(case.family.embed(case.x[:5]), points[:5])  # no dependence on the batch


# ------------------------------------------------------------------ description
def test_config_round_trip(case, generator):
    family, values = case.family, case.values(generator)
    config = unflatten(*flatten(family.to_config()))
    given = {} if not hasattr_given(family) else dict(family.given)
    again = family_class(type(family).__name__).from_config(config, given)
    assert torch.equal(again.log_prob(case.holes, values), family.log_prob(case.holes, values))
    assert again.dims == family.dims
    assert again.coords() == family.coords()
    assert again.describe() == family.describe()
    left, right = (f.block.update(case.statistics(generator_of(0))) for f in (again, family))
    assert all(torch.equal(left[name], right[name]) for name in right)


def hasattr_given(family):
    return getattr(family, "given", None) is not None


def generator_of(seed):
    return rng.make_generator(seed)


def test_unbound_families_say_so(case):
    for attribute in ("device", "block", "dims" if case.name[:7] == "product" else "priors"):
        with pytest.raises(ValueError, match="not bound"):
            getattr(type(case.family)(), attribute)


def test_to_device(case, generator):
    moved = case.family.to(torch.device("cpu"))
    assert moved.device == torch.device("cpu")
    values = case.values(generator)
    close(moved.log_prob(case.x, values), case.family.log_prob(case.x, values))


# ------------------------------------------------------------------ the Pyro program
def _jacobian(case, values):
    """Log density of the block's basis over that of the program's sites."""
    total = torch.zeros((), dtype=torch.float64)
    for site, value in values.items():
        kind = site.rpartition("_")[2] if not site.endswith("scale_tril") else "tril"
        if kind == "probs" and site.startswith("kind") or case.name == "categorical":
            total = total + value[value > 0].log().sum()
        elif kind == "probs":
            total = total + (value * (1 - value)).log().sum()
        elif kind in ("rate", "df"):
            total = total + value.log().sum()
        elif kind == "tril":
            d = value.shape[-1]
            powers = torch.arange(d, 0, -1, dtype=torch.float64)
            diagonal = torch.diagonal(value, dim1=-2, dim2=-1).log()
            count = value.shape[0] if value.ndim == 3 else 1
            total = total - (powers * diagonal).sum() - count * d * math.log(2.0)
    return total


def test_program_has_the_blocks_prior(case, generator):
    """Up to the Jacobian between their bases, and the truncated mass of the degrees of freedom."""
    internal = case.internal(generator)
    family, values = case.family, case.family.export(internal)
    sites = dict(values)
    for name in ("probs", "kind_probs"):
        if case.name == "categorical" or name == "kind_probs":
            columns = values.get(name)
            if columns is not None and case.name == "categorical":
                for j, size in enumerate(family.sizes):
                    sites[f"{name}_{j}"] = columns[:, j, :size]

    def program():
        return family.program(pyro.plate("components", 2, dim=-1))

    trace = poutine.trace(poutine.condition(program, data=sites)).get_trace()
    returned = trace.nodes["_RETURN"]["value"]
    assert set(returned) == set(values)
    expected = family.block.log_prior(internal) - _jacobian(case, values)
    got = trace.log_prob_sum()
    tolerance = 2e-3 if "student" in case.name else 1e-8
    assert float(got) == pytest.approx(float(expected), rel=1e-8, abs=tolerance)


def test_inverse_wishart_convention():
    """The Jacobian used above, checked by itself: density over the factor and over the matrix."""
    law = InverseWishartCholesky(
        torch.tensor(5.0).double(), torch.eye(2).double(), validate_args=False
    )
    tril = torch.tensor([[1.2, 0.0], [0.3, 0.8]], dtype=torch.float64)
    matrix = stats.invwishart(5, torch.eye(2).numpy()).logpdf((tril @ tril.mT).numpy())
    powers = torch.tensor([2.0, 1.0]).double()
    jacobian = 2 * math.log(2.0) + (powers * tril.diagonal().log()).sum()
    close(law.log_prob(tril), torch.tensor(matrix) + jacobian)
