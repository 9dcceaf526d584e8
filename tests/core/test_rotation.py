"""Rotation and sign: planted group elements come back, exchangeable directions are flagged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesgen import rng
from bayesgen.arviz_groups import import_arviz
from bayesgen.data import as_dataset
from bayesgen.fit import Fit
from bayesgen.symmetry import (
    Rotation,
    align,
    match,
    principal_angles,
    rotate_onto,
)
from bayesgen.symmetry.subspace import orient, varimax
from tests.core.factors import Factors, loadings, turned

__all__: list[str] = []

CLEAR = (5.0, 3.0, 1.5)


def worst_rhat(values):
    rhat = import_arviz().rhat
    entries = values.flatten(2).numpy()
    return max(float(rhat(entries[..., k])) for k in range(entries.shape[-1]))


# ---------------------------------------------------------------- the group
@pytest.mark.parametrize("group", ["orthogonal", "signed"])
def test_elements_are_orthogonal_and_spread_evenly(group):
    turns = Rotation(3, group=group).random((2, 4000), generator=rng.make_generator(0))
    eye = torch.eye(3, dtype=turns.dtype)
    torch.testing.assert_close(turns @ turns.mT, eye.expand_as(turns))
    assert (turns.mean((0, 1)).abs() < 5 * (1 / 3 / 8000) ** 0.5).all()
    torch.testing.assert_close(turns.square().mean((0, 1)), eye * 0 + 1 / 3, atol=0.03, rtol=0)


def test_apply_turns_every_axis_and_moves_what_is_attached():
    axes = {"loadings": 1, "scores": -1, "cov": (0, 1)}
    symmetry = Rotation(3, axes, attached=("precision",), group="signed")
    generator = rng.make_generator(0)
    draws = {
        "loadings": torch.randn(2, 5, 4, 3, generator=generator),
        "scores": torch.randn(2, 5, 7, 3, generator=generator),
        "cov": torch.randn(2, 5, 3, 3, generator=generator),
        "precision": torch.rand(2, 5, 3, generator=generator),
        "other": torch.rand(2, 5, 7, generator=generator),
    }
    turns = symmetry.random((2, 5), generator=generator)
    moved = symmetry.apply(draws, turns)
    for c in range(2):
        for s in range(5):
            q = turns[c, s].float()
            torch.testing.assert_close(moved["loadings"][c, s], draws["loadings"][c, s] @ q)
            torch.testing.assert_close(moved["scores"][c, s], draws["scores"][c, s] @ q)
            torch.testing.assert_close(moved["cov"][c, s], q.T @ draws["cov"][c, s] @ q)
            torch.testing.assert_close(
                moved["precision"][c, s], q.abs().T @ draws["precision"][c, s]
            )
    assert moved["other"] is draws["other"]
    whole = Rotation(3, axes, attached=("precision",))
    sorted_ = whole.apply(draws, whole.random((2, 5), generator=generator))["precision"]
    assert torch.equal(sorted_, draws["precision"].sort(-1).values)


@pytest.mark.parametrize("group", ["orthogonal", "signed"])
def test_the_group_changes_neither_density_nor_invariants(group):
    model = Factors(5, 2, group)
    w = loadings((2.0, 1.0), d=5, shape=(1, 6))
    moved = turned(w, model.symmetry)
    assert float((moved["loadings"] - w).abs().max()) > 0.5
    x = rng.standard_normal((9, 5), rng.make_generator(3))
    torch.testing.assert_close(model.log_prob(x, moved), model.log_prob(x, {"loadings": w}))
    here, there = model.invariants({"loadings": w}), model.invariants(moved)
    assert set(here) == {"signal_variance", "explained", "subspace_angle", "covariance"}
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, msg=name)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"latent_dim": 0}, "latent_dim=0"),
        ({"latent_dim": 2, "axes": {"w": -1}}, "loadings"),
        ({"latent_dim": 2, "group": "affine"}, "orthogonal, signed"),
        ({"latent_dim": 2, "orientation": "quartimax"}, "principal, varimax"),
    ],
)
def test_impossible_groups_are_refused(settings_, message):
    with pytest.raises(ValueError, match=message):
        Rotation(**settings_)


def test_wrong_draws_are_refused():
    with pytest.raises(ValueError, match="latent_dim=2"):
        align({"loadings": torch.zeros(1, 2, 4, 3)}, Rotation(2))
    with pytest.raises(ValueError, match="lack"):
        align({"loadings": torch.zeros(1, 2, 4, 2)}, Rotation(2, noise="noise_scale"))
    with pytest.raises(ValueError, match="cannot be rotated"):
        rotate_onto(torch.zeros(3, 2), torch.zeros(3, 1))


# ---------------------------------------------------------------- alignment
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    q=st.integers(1, 4),
    group=st.sampled_from(["orthogonal", "signed"]),
    orientation=st.sampled_from(["principal", "varimax"]),
)
def test_planted_rotations_are_undone(seed, q, group, orientation):
    symmetry = Rotation(q, group=group, orientation=orientation)
    w = loadings((6.0, 4.0, 2.6, 1.7)[:q], shape=(2, 40), seed=seed)
    moved = turned(w, symmetry, seed)
    raw, found = moved["loadings"], align(moved, symmetry)
    here = found.draws["loadings"]
    assert float(here.std((0, 1)).max()) < 0.2  # the scatter that was planted is 0.05
    assert float(raw.std((0, 1)).max()) > 0.5
    torch.testing.assert_close(here @ here.mT, w @ w.mT)
    torch.testing.assert_close(symmetry.apply(moved, found.elements)["loadings"], here)
    again = align(found.draws, symmetry)
    torch.testing.assert_close(again.draws["loadings"], here, atol=1e-5, rtol=0)
    other = align(turned(w, symmetry, seed + 1), symmetry)
    torch.testing.assert_close(other.draws["loadings"], here, atol=1e-5, rtol=0)


def test_r_hat_is_bad_before_and_good_after():
    w = loadings(CLEAR)
    symmetry = Rotation(3)
    turns = symmetry.random((4, 1), generator=rng.make_generator(5)).expand(4, 200, 3, 3)
    moved = symmetry.apply({"loadings": w}, turns)  # each chain found an orientation of its own
    assert worst_rhat(moved["loadings"]) > 2.0
    found = align(moved, symmetry)
    assert worst_rhat(found.draws["loadings"]) < 1.03
    assert not found.is_ambiguous
    assert found.identified == (0, 1, 2)
    assert found.message == "directions are identified up to sign"
    assert torch.equal(found.occupancy.argsort(descending=True), torch.arange(3))
    length = found.draws["loadings"].square().sum(-2).mean((0, 1)).sqrt()
    np.testing.assert_allclose(length, CLEAR, atol=0.05)
    peak = found.draws["loadings"].mean((0, 1)).T  # the largest entry of each is positive
    assert all(float(column[column.abs().argmax()]) > 0 for column in peak)


def test_chains_that_disagree_stay_apart():
    """Alignment hides rotations alone: another subspace in one chain still shows."""
    w = loadings(CLEAR)
    w[0] = loadings(CLEAR, seed=9)[0]
    found = align(turned(w, Rotation(3)), Rotation(3))
    assert worst_rhat(found.draws["loadings"]) > 1.5
    invariants = Factors(8, 3).invariants({"loadings": w})
    assert worst_rhat(invariants["covariance"]) > 1.5


def test_columns_are_compared_in_units_of_the_noise():
    """A direction of large units and large noise is not the first."""
    generator = rng.make_generator(0)
    center = torch.tensor([[100.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    noise = torch.tensor([100.0, 0.5], dtype=torch.float64)
    w = center + 0.01 * noise[:, None] * rng.standard_normal((1, 50, 2, 2), generator)
    draws = turned(w, Rotation(2)) | {"noise_scale": noise.expand(1, 50, 2)}
    found = align(draws, Rotation(2, noise="noise_scale")).draws["loadings"].mean((0, 1))
    torch.testing.assert_close(found, center.flip(-1), atol=0.5, rtol=0)
    assert align(draws, Rotation(2)).draws["loadings"].mean((0, 1))[0, 0] > 99.0


# ---------------------------------------------------------------- ambiguity
@pytest.mark.parametrize("orientation", ["principal", "varimax"])
@pytest.mark.parametrize(("group", "scales"), [("orthogonal", (3.0, 3.0, 1.0))])
def test_exchangeable_directions_are_flagged(group, scales, orientation):
    symmetry = Rotation(3, group=group, orientation=orientation)
    spread = 0.2
    w = loadings(scales, spread=spread)
    if orientation == "varimax":  # a plane of one entry a row has no varimax of its own
        generator = rng.make_generator(2)
        w = spread * rng.standard_normal((4, 200, 8, 3), generator)
        angle = torch.arange(8) * torch.pi / 8
        w[..., 0] += 2.0 * angle.cos()
        w[..., 1] += 2.0 * angle.sin()
        w[..., 7, 2] += 6.0
    found = align(turned(w, symmetry), symmetry)
    assert found.is_ambiguous
    pair = (0, 1) if orientation == "principal" else (1, 2)
    assert found.confused == (pair,)
    assert found.ambiguity[pair] > 0.35
    assert set(found.identified) == {0, 1, 2} - set(pair)
    assert "ambiguous" in found.message
    assert f"directions {pair[0]}, {pair[1]}" in found.message


def test_columns_that_rotate_are_flagged_under_signs_alone():
    symmetry = Rotation(3, group="signed")
    w = loadings((3.0, 2.5, 1.0))
    angle = 2 * torch.pi * torch.rand(4, 200, generator=rng.make_generator(0))
    turn = torch.eye(3, dtype=torch.float64).repeat(4, 200, 1, 1)
    turn[..., 0, 0] = turn[..., 1, 1] = angle.cos()
    turn[..., 0, 1], turn[..., 1, 0] = angle.sin(), -angle.sin()
    assert align({"loadings": w @ turn}, symmetry).confused == ((0, 1),)
    assert not align({"loadings": w}, symmetry).is_ambiguous


def test_the_flag_follows_the_gap():
    ambiguity = [
        float(align({"loadings": loadings((3.0, b), spread=0.2)}, Rotation(2)).ambiguity[0, 1])
        for b in (3.0, 2.9, 2.4, 2.0)
    ]
    assert ambiguity == sorted(ambiguity, reverse=True)
    assert ambiguity[0] > 0.25 > ambiguity[2]
    assert ambiguity[3] < 0.05


def test_dead_directions_raise_no_alarm():
    symmetry = Rotation(5, negligible=0.05)
    w = loadings((*CLEAR, 0.0, 0.0), spread=0.02)
    found = align(turned(w, symmetry), symmetry)
    assert found.empty == (3, 4)
    assert not found.is_ambiguous
    assert found.identified == (0, 1, 2)
    assert "2 directions switched off" in found.message


def test_a_direction_that_comes_and_goes_is_not_read():
    symmetry = Rotation(2, negligible=0.1)
    w = loadings((4.0, 2.0), spread=0.01)
    w[:, ::2, :, 1] = 0.0
    found = align(turned(w, symmetry), symmetry)
    assert found.presence.tolist() == [1.0, 0.5]
    assert found.identified == (0,)
    assert "direction 1 lives in 50% of the draws only" in found.message


def test_a_single_draw_gets_its_principal_axes():
    w = loadings((3.0, 2.0), shape=(1, 1))
    here = align(turned(w, Rotation(2)), Rotation(2)).draws["loadings"][0, 0]
    gram = here.mT @ here
    assert abs(float(gram[0, 1])) < 1e-10
    assert gram[0, 0] > gram[1, 1]


# ---------------------------------------------------------------- subspaces
def test_principal_angles_are_exact_when_tiny():
    angle = torch.tensor([1e-9, 1e-3, 0.7, 1.5], dtype=torch.float64)
    left = torch.eye(8, 4, dtype=torch.float64)
    right = torch.cat([torch.diag(angle.cos()), torch.diag(angle.sin())])
    turn = Rotation(4).random((), generator=rng.make_generator(0))
    found = principal_angles(left @ turn, 3.0 * right)
    torch.testing.assert_close(found, angle, atol=1e-15, rtol=1e-10)
    torch.testing.assert_close(principal_angles(left[:, :1], right), angle[:1], atol=1e-15, rtol=0)


def test_varimax_finds_simple_structure():
    simple = torch.zeros(9, 3, dtype=torch.float64)
    for k in range(3):
        simple[3 * k : 3 * k + 3, k] = torch.tensor([1.0, 0.8, 1.2]) * (3 - k)
    turn = Rotation(3).random((), generator=rng.make_generator(4))
    found = simple @ turn @ varimax(simple @ turn)
    assert float(found.abs().sort(-1).values[:, :2].max()) < 1e-6
    mixed = simple @ turn
    torch.testing.assert_close(mixed @ orient(mixed, "varimax"), simple, atol=1e-6, rtol=0)


def test_wide_loadings_have_axes_too():
    w = loadings((3.0, 2.0), d=2, shape=(1, 30))
    w = torch.cat([w, 0.1 * w[..., :1]], -1)  # q = 3 > d = 2
    found = align(turned(w, Rotation(3)), Rotation(3))
    torch.testing.assert_close(found.draws["loadings"] @ found.draws["loadings"].mT, w @ w.mT)


# ---------------------------------------------------------------- through the fit
def planted(group="orthogonal", scales=CLEAR):
    model = Factors(8, len(scales), group)
    draws = turned(loadings(scales), model.symmetry)
    x = rng.standard_normal((50, 8), rng.make_generator(2))
    return Fit(model, draws, data=as_dataset(x), attrs={"engine": "nobody"})


def test_the_fit_encodes_by_aligned_draws():
    fit = planted()
    scores = fit.encode(fit.data)
    center = fit.aligned.draws["loadings"].mean((0, 1))
    truth = Factors(8, 3).encode(fit.data.tensor(), {"loadings": center}).mean
    assert float((scores - truth).abs().max()) < 0.05
    raw = Factors(8, 3).encode(fit.data.tensor(), fit.draws).mean.mean((0, 1))
    assert float(raw.abs().mean()) < 0.2 * float(scores.abs().mean())  # rotations cancel


def test_summary_and_arviz_read_aligned_directions():
    fit = planted()
    table = fit.summary().table
    assert table["r_hat"].max() < 1.05
    assert float(table.loc["signal_variance[0]", "mean"]) == pytest.approx(25.0, rel=0.05)
    np.testing.assert_array_equal(
        fit.arviz.posterior["loadings"].values, fit.aligned.draws["loadings"].numpy()
    )
    assert fit.arviz.posterior["loadings"].dims == ("chain", "draw", "column", "latent")
    assert "identified" in str(fit.summary())


def test_ambiguous_directions_are_said_and_not_judged():
    fit = planted(scales=(3.0, 3.0, 1.0))
    told = fit.summary()
    assert fit.aligned.confused == ((0, 1),)
    assert any("ambiguous" in problem for problem in told.problems)
    judged = [name for name in told.judged.index if name.startswith("loadings")]
    assert judged
    assert all(name.endswith(", 2]") for name in judged)


def test_two_fits_are_lined_up_by_procrustes_and_not_by_labels():
    left, right = planted(), planted("signed")
    with pytest.raises(TypeError, match="LabelPermutation"):
        match(left, right)
    a, b = (fit.aligned.draws["loadings"].mean((0, 1)) for fit in (left, right))
    torch.testing.assert_close(b @ rotate_onto(a, b), a, atol=0.05, rtol=0)
