"""Gaussians and Student-t whose values have missing entries."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import MultivariateNormal, MultivariateStudentT
from scipy import stats
from torch import Tensor
from torch.distributions import biject_to, kl_divergence

from bayesgen.distributions import PartialMultivariateNormal, PartialMultivariateStudentT
from tests.distributions.cases import factor

F64 = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def rows(*shape: int, missing: float = 0.4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, dtype=F64, generator=generator)
    holes = torch.rand(*shape, dtype=F64, generator=generator) < missing
    return torch.where(holes, math.nan, x)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))


def row_by_row(x: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    seen = ~torch.isnan(x)
    if not seen.any():
        return torch.zeros((), dtype=F64)
    matrix = (scale_tril @ scale_tril.mT)[seen][:, seen]
    return MultivariateNormal(loc[seen], matrix).log_prob(x[seen])


SHAPES = [
    ((7,), (), ()),
    ((7,), (7,), ()),
    ((7,), (), (7,)),
    ((), (3,), (3,)),
    ((5, 3), (3,), (3,)),
    ((5, 1), (3,), (3,)),
    ((6,), (2, 1), (2, 1)),
    ((4, 2, 6), (2, 1), (2, 1)),
    ((4, 1, 6), (2, 1), (2, 6)),
    ((2, 5, 3), (2, 1, 1), (3,)),
    ((1,), (3, 1), ()),
    ((), (), ()),
    ((0,), (), ()),
    ((0,), (), (2, 1)),
]


@pytest.mark.parametrize(("value", "loc", "scale"), SHAPES)
def test_equals_the_marginal_of_each_row(value, loc, scale):
    """Patterns may vary along, across and with the batches of parameters."""
    x, loc, scale_tril = rows(*value, 4), draw(*loc, 4), factor(4, 0, *scale)
    dist = PartialMultivariateNormal(loc, scale_tril=scale_tril)
    got = dist.log_prob(x)
    batch = torch.broadcast_shapes(x.shape[:-1], dist.batch_shape)
    assert got.shape == batch
    flat = zip(
        x.expand(*batch, 4).reshape(-1, 4),
        loc.expand(*batch, 4).reshape(-1, 4),
        scale_tril.expand(*batch, 4, 4).reshape(-1, 4, 4),
        strict=True,
    )
    expected = [row_by_row(*each) for each in flat]
    if expected:
        torch.testing.assert_close(got, torch.stack(expected).reshape(batch), **TIGHT)


def test_complete_rows_equal_pyros(device, dtype):
    x = draw(50, 6).to(device, dtype)
    arguments = (draw(6).to(device, dtype), factor(6, 0).to(device, dtype))
    partial = PartialMultivariateNormal(arguments[0], scale_tril=arguments[1])
    whole = MultivariateNormal(arguments[0], scale_tril=arguments[1])
    torch.testing.assert_close(partial.log_prob(x), whole.log_prob(x))
    torch.testing.assert_close(partial.entropy(), whole.entropy())
    assert float(kl_divergence(partial, whole)) == pytest.approx(0.0, abs=1e-5)
    student = PartialMultivariateStudentT(3.5, *arguments)
    expected = MultivariateStudentT(3.5, *arguments).log_prob(x)
    torch.testing.assert_close(student.log_prob(x), expected)


def test_many_columns_and_every_row_another_pattern(device):
    """More columns than the bits of one integer code; 300 distinct patterns."""
    x = rows(300, 70, missing=0.5).to(device)
    loc, scale_tril = draw(70).to(device), factor(70, 0).to(device)
    got = PartialMultivariateNormal(loc, scale_tril=scale_tril).log_prob(x)
    expected = torch.stack([row_by_row(row, loc, scale_tril) for row in x])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_student_t_equals_scipys_marginal():
    x, loc, scale_tril = rows(40, 4), draw(4), factor(4, 0)
    got = PartialMultivariateStudentT(3.5, loc, scale_tril).log_prob(x)
    matrix = scale_tril @ scale_tril.mT
    for row, value in zip(x, got, strict=True):
        seen = ~torch.isnan(row)
        if seen.any():
            peer = stats.multivariate_t(loc[seen].numpy(), matrix[seen][:, seen].numpy(), 3.5)
            assert float(value) == pytest.approx(peer.logpdf(row[seen].numpy()), abs=1e-10)
        else:
            assert float(value) == 0.0


@pytest.mark.parametrize("missing", [0.0, 0.4, 1.0])
def test_gradients(missing):
    x = rows(6, 3, missing=missing)
    scale = biject_to(torch.distributions.constraints.lower_cholesky)
    start = (draw(3).requires_grad_(), draw(6).requires_grad_())

    def run(loc, vector):
        normal = PartialMultivariateNormal(loc, scale_tril=scale(vector))
        student = PartialMultivariateStudentT(2.5, loc, scale(vector))
        return normal.log_prob(x), student.log_prob(x)

    assert torch.autograd.gradcheck(run, start)
    value = torch.nan_to_num(x).requires_grad_()
    holes = torch.where(torch.isnan(x), math.nan, value)
    dist = PartialMultivariateNormal(start[0].detach(), scale_tril=factor(3, 0))
    (gradient,) = torch.autograd.grad(dist.log_prob(holes).sum(), value)
    assert torch.isfinite(gradient).all()
    assert (gradient[torch.isnan(x)] == 0).all()


def test_ill_conditioned_block_keeps_its_digits():
    """The covariance of the kept columns has condition 1e14: forming it would lose everything."""
    tiny = 1e-7
    scale_tril = torch.tensor([[1.0, 0, 0], [1.0, tiny, 0], [1.0, 0, tiny]], dtype=F64)
    x = torch.tensor([math.nan, 0.5, 0.5 + 3 * tiny], dtype=F64)
    got = PartialMultivariateNormal(torch.zeros(3, dtype=F64), scale_tril=scale_tril).log_prob(x)
    # In the sum s and difference t of the kept columns: variances 4 + 2e-14 and 2e-14, Jacobian 2.
    t, s = 3 * tiny, 1.0 + 3 * tiny
    expected = stats.norm(0, math.sqrt(4 + 2 * tiny**2)).logpdf(s)
    expected += stats.norm(0, math.sqrt(2) * tiny).logpdf(t) + math.log(2.0)
    assert float(got) == pytest.approx(expected, abs=1e-6)


def test_marginal_and_condition_make_up_the_joint():
    x, loc, scale_tril = draw(20, 5), draw(5), factor(5, 0, 3, 1)
    observed = torch.tensor([True, False, True, True, False])
    for dist in (
        PartialMultivariateNormal(loc, scale_tril=scale_tril),
        PartialMultivariateStudentT(4.0, loc, scale_tril),
    ):
        marginal = dist.marginal(observed).log_prob(x[:, observed])
        spoilt = torch.where(observed, x, math.nan)
        condition = dist.condition(spoilt, observed)
        assert condition.batch_shape == (3, 20)
        total = marginal + condition.log_prob(x[:, ~observed])
        torch.testing.assert_close(total, dist.log_prob(x), **TIGHT)
        torch.testing.assert_close(marginal, dist.log_prob(spoilt), **TIGHT)
        ordered = dist.marginal([3, -5]).log_prob(x[:, [3, 0]])
        torch.testing.assert_close(ordered, dist.marginal([0, 3]).log_prob(x[:, [0, 3]]), **TIGHT)
        nothing = torch.zeros(5, dtype=torch.bool)
        torch.testing.assert_close(
            dist.condition(x, nothing).log_prob(x), dist.log_prob(x), **TIGHT
        )


def test_in_a_plate_one_factorisation_serves_all_rows():
    """Pyro expands the distribution over the plate; the factor must stay unexpanded."""
    x, scale_tril = rows(1000, 3), factor(3, 0)

    def model():
        loc = pyro.sample(
            "loc", MultivariateNormal(torch.zeros(3, dtype=F64), torch.eye(3).double())
        )
        with pyro.plate("row", 1000):
            pyro.sample("x", PartialMultivariateNormal(loc, scale_tril=scale_tril), obs=x)

    loc = draw(3)
    trace = poutine.trace(poutine.condition(model, {"loc": loc})).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["x"]
    assert site["fn"].batch_shape == (1000,)
    assert site["fn"]._unbroadcasted_scale_tril.shape == (3, 3)
    expected = PartialMultivariateNormal(loc, scale_tril=scale_tril).log_prob(x)
    torch.testing.assert_close(site["log_prob"], expected)


def test_impossible_values_are_refused():
    dist = PartialMultivariateNormal(torch.zeros(3), scale_tril=torch.eye(3))
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="support"):
        dist.log_prob(torch.tensor([0.0, math.inf, 0.0]))
    with pytest.raises(ValueError, match="boolean mask of shape"):
        dist.condition(x, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="every column is observed"):
        dist.condition(x, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="declares observed"):
        dist.condition(x * math.nan, torch.tensor([True, False, False]))
    with pytest.raises(ValueError, match="non-empty list"):
        dist.marginal([])
    with pytest.raises(ValueError, match="outside"):
        dist.marginal([3])
    with pytest.raises(ValueError, match="repeat"):
        dist.marginal([0, -3])
