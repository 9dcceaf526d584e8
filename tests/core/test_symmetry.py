"""Relabelling: planted permutations come back, ambiguity is seen, empties are no alarm."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesgen import rng
from bayesgen.arviz_groups import import_arviz
from bayesgen.symmetry import LabelPermutation, align, match
from bayesgen.symmetry.labels import assign
from bayesgen.toys import UnitMixture, pretend

__all__: list[str] = []


def shuffled(shape, num_components, seed):
    return torch.rand(*shape, num_components, generator=rng.make_generator(seed)).argsort(-1)


def blobs(centres, *, rows=60, seed=0):
    """Rows around given centres on a line."""
    noise = rng.standard_normal((len(centres), rows, 1), rng.make_generator(seed))
    return (noise + torch.tensor(centres, dtype=torch.float64)[:, None, None]).flatten(0, 1)


def mixture(loc, weights, *, shape=(2, 100), spread=0.1, seed=0, x=None):
    """A hand-made fit: means scatter about ``loc``, weights are fixed, labels switched."""
    x = blobs(loc) if x is None else x
    fit = pretend(UnitMixture(len(loc)), x, num_chains=shape[0], num_draws=shape[1])
    generator = rng.make_generator(seed)
    centre = torch.tensor(loc, dtype=torch.float64)[:, None]
    draws = {
        "loc": centre + spread * rng.standard_normal((*shape, len(loc), 1), generator),
        "weights": torch.tensor(weights, dtype=torch.float64).expand(*shape, len(loc)),
    }
    moved = fit.model.symmetry.apply(draws, shuffled(shape, len(loc), seed + 1))
    return type(fit)(fit.model, moved, data=fit.data)


# ---------------------------------------------------------------- the group acts
def test_apply_moves_every_axis():
    symmetry = LabelPermutation(3, {"weights": 0, "cov": -3, "transition": (0, 1)})
    order = shuffled((2, 5), 3, 0)
    generator = rng.make_generator(1)
    draws = {
        "weights": torch.rand(2, 5, 3, generator=generator),
        "cov": torch.rand(2, 5, 3, 4, 4, generator=generator),
        "transition": torch.rand(2, 5, 3, 3, generator=generator),
        "other": torch.rand(2, 5, 7, generator=generator),
    }
    moved = symmetry.apply(draws, order)
    for c in range(2):
        for s in range(5):
            p = order[c, s]
            assert torch.equal(moved["weights"][c, s], draws["weights"][c, s][p])
            assert torch.equal(moved["cov"][c, s], draws["cov"][c, s][p])
            assert torch.equal(moved["transition"][c, s], draws["transition"][c, s][p][:, p])
    assert moved["other"] is draws["other"]


@pytest.mark.parametrize(
    ("axes", "draws", "message"),
    [
        ({"loc": 0}, {"weights": torch.zeros(1, 2, 3)}, "lack"),
        ({"loc": 1}, {"loc": torch.zeros(1, 2, 3)}, "axis 1"),
        ({"loc": 0}, {"loc": torch.zeros(1, 2, 4)}, "num_components=3"),
    ],
)
def test_wrong_draws_are_refused(axes, draws, message):
    with pytest.raises(ValueError, match=message):
        align(draws, LabelPermutation(3, axes))


def test_impossible_groups_are_refused():
    with pytest.raises(ValueError, match="num_components=0"):
        LabelPermutation(0, {"loc": 0})
    with pytest.raises(ValueError, match="axes is empty"):
        LabelPermutation(2, {})
    with pytest.raises(ValueError, match="draws is empty"):
        align({}, LabelPermutation(2, {"loc": 0}))
    with pytest.raises(ValueError, match="shape"):
        align(
            {"loc": torch.zeros(1, 2, 2)},
            LabelPermutation(2, {"loc": 0}),
            responsibilities=torch.zeros(2, 5, 2),
        )


# ---------------------------------------------------------------- assignment
@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_assignment_is_optimal(seed, size):
    matrix = torch.rand(3, size, size, generator=rng.make_generator(seed), dtype=torch.float64)
    found = assign(matrix)
    for s in range(3):
        cost = matrix[s, found[s], torch.arange(size)].sum()
        best = min(
            float(matrix[s, list(order), range(size)].sum()) for order in permutations(range(size))
        )
        assert float(cost) == pytest.approx(best, abs=1e-12)


# ---------------------------------------------------------------- relabelling
@pytest.mark.parametrize("by", ["responsibilities", "parameters"])
def test_planted_permutations_come_back(by):
    fit = mixture([0.0, 6.0, 12.0], [0.5, 0.3, 0.2])
    if by == "responsibilities":
        found = fit.aligned
    else:
        found = align(fit.draws, fit.model.symmetry)
    loc = found.draws["loc"][..., 0]
    assert ((loc - torch.tensor([0.0, 6.0, 12.0])).abs() < 1.0).all()
    assert torch.equal(
        found.draws["weights"].mean((0, 1)).argsort(descending=True), torch.arange(3)
    )
    assert not found.is_ambiguous
    assert found.empty == ()
    assert found.identified == (0, 1, 2)
    again = fit.model.symmetry.apply(fit.draws, found.elements)
    assert all(torch.equal(again[site], found.draws[site]) for site in again)


def test_alignment_changes_neither_density_nor_invariants():
    fit = mixture([0.0, 2.0, 4.0], [0.5, 0.3, 0.2])
    rows = fit.data.tensor()[:7]
    before = fit.model.log_prob(rows, fit.draws)
    torch.testing.assert_close(fit.model.log_prob(rows, fit.aligned.draws), before)
    for name, value in fit.model.invariants(fit.draws).items():
        there = fit.model.invariants(fit.aligned.draws)[name]
        torch.testing.assert_close(there, value)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_the_engine_s_numbering_does_not_matter(seed):
    fit = mixture([0.0, 5.0, 9.0, 20.0], [0.4, 0.3, 0.2, 0.1], shape=(1, 20))
    order = shuffled((1, 20), 4, seed)
    other = type(fit)(fit.model, fit.model.symmetry.apply(fit.draws, order), data=fit.data)
    for site, value in fit.aligned.draws.items():
        torch.testing.assert_close(other.aligned.draws[site], value)


def test_r_hat_is_bad_before_and_good_after():
    fit = mixture([0.0, 6.0], [0.6, 0.4])
    stuck = {site: value.clone() for site, value in fit.aligned.draws.items()}
    order = torch.tensor([[0, 1], [1, 0]])[:, None].expand(2, 100, 2)  # chains disagree
    stuck = fit.model.symmetry.apply(stuck, order)
    fit = type(fit)(fit.model, stuck, data=fit.data)
    rhat = import_arviz().rhat
    assert float(rhat(fit.draws["loc"][..., 0, 0].numpy())) > 1.5
    assert float(rhat(fit.aligned.draws["loc"][..., 0, 0].numpy())) < 1.05


def test_parameters_align_without_weights():
    symmetry = LabelPermutation(2, {"loc": 0}, weights=None)
    loc = torch.tensor([[0.0, 5.0]]).repeat(40, 1)[None]
    loc = loc + 0.1 * torch.randn(1, 40, 2, generator=rng.make_generator(0))
    moved = symmetry.apply({"loc": loc}, shuffled((1, 40), 2, 3))
    assert (align(moved, symmetry).draws["loc"].std((0, 1)) < 0.3).all()


# ---------------------------------------------------------------- ambiguity
def test_empty_components_raise_no_alarm():
    x = blobs([0.0, 6.0])
    fit = mixture([0.0, 6.0, 3.0, 3.0], [0.6, 0.399, 0.0005, 0.0005], x=x, spread=0.1)
    found = fit.aligned
    assert found.empty == (2, 3)
    assert not found.is_ambiguous
    assert "2 components are empty" in found.message
    assert found.ambiguity[2, 3] > 0.5  # they are confused, and it does not matter


def test_confused_components_are_named():
    x = blobs([0.0, 10.0])
    fit = mixture([0.0, 10.0, 10.0], [0.5, 0.25, 0.25], x=x, spread=0.2)
    found = fit.aligned
    assert found.is_ambiguous
    assert found.confused == ((1, 2),)
    assert found.identified == (0,)
    assert "1, 2 are ambiguous" in found.message
    assert found.ambiguity[0, 1] < 1e-6


def test_a_component_that_comes_and_goes_is_not_read():
    x = blobs([0.0, 6.0, 30.0])
    fit = mixture([0.0, 6.0, 30.0], [0.5, 0.3, 0.2], x=x)
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.55, 0.45, 1e-9]], dtype=torch.float64)
    draws = dict(fit.aligned.draws)
    half = torch.arange(100).remainder(2)
    draws["weights"] = weights[half].expand(2, 100, 3)
    loc = draws["loc"].clone()
    loc[:, half == 1, 2] = -500.0  # wherever the prior puts an empty component
    found = type(fit)(fit.model, {**draws, "loc": loc}, data=fit.data).aligned
    assert found.presence.tolist() == [1.0, 1.0, 0.5]
    assert found.identified == (0, 1)
    assert found.empty == ()
    assert "component 2 lives in 50% of the draws only" in found.message


@pytest.mark.parametrize(("gap", "ambiguous"), [(0.1, True), (6.0, False)])
def test_the_flag_follows_the_separation(gap, ambiguous):
    fit = mixture([0.0, gap], [0.5, 0.5], spread=0.15)
    assert fit.aligned.is_ambiguous is ambiguous


def test_a_single_component_and_a_single_draw():
    one = mixture([0.0], [1.0], shape=(1, 1))
    assert one.aligned.identified == (0,)
    two = mixture([5.0, 0.0], [0.3, 0.7], shape=(1, 1))
    assert two.aligned.draws["loc"].flatten().round().abs().tolist() == [0.0, 5.0]


# ---------------------------------------------------------------- across fits
def test_components_of_two_fits_are_matched():
    x = blobs([0.0, 6.0, 12.0])
    left = mixture([0.0, 6.0, 12.0], [0.36, 0.33, 0.31], x=x)
    right = mixture([12.0, 0.0, 6.0], [0.36, 0.33, 0.31], x=x, seed=5)
    found = match(left, right)
    for k, other in enumerate(found.tolist()):
        mine = left.aligned.draws["loc"][..., k, 0].mean()
        theirs = right.aligned.draws["loc"][..., other, 0].mean()
        assert abs(float(mine - theirs)) < 0.5
    small = mixture([0.0, 9.0], [0.5, 0.5], x=x, seed=7)
    assert match(left, small).tolist().count(-1) == 1
