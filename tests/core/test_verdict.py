"""PASS or FAIL: every reason is planted once, and named."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bayesgen import rng
from bayesgen.lone_chains import lone_chains
from bayesgen.toys import UnitMixture, pretend
from bayesgen.verdict import Finding, Verdict

__all__: list[str] = []


@pytest.fixture(scope="module")
def fit():
    x = rng.standard_normal((60, 1), rng.make_generator(0))
    made = pretend(UnitMixture(1), x, num_chains=4, num_draws=300)
    energy = rng.standard_normal((4, 300), rng.make_generator(1))
    stats = {"energy": energy, "diverging": torch.zeros(4, 300, dtype=torch.bool)}
    return dataclasses.replace(made, sample_stats=stats, attrs={**made.attrs, "converged": True})


def codes(fit):
    return [finding.code for finding in fit.verdict().failures]


def test_a_good_fit_passes_and_says_what_was_checked(fit):
    verdict = fit.verdict()
    assert verdict
    assert verdict.findings == ()
    text = str(verdict)
    assert text.startswith("PASS\n")
    for part in ("R-hat at most", "effective sample sizes of at least", "E-BFMI at least"):
        assert part in text
    assert "no divergent trajectory" in text
    assert f"verdict: {text}" in str(fit.summary())


def shifted(fit):
    apart = torch.tensor([0.0, 0.0, 0.0, 0.3])[:, None, None, None]
    return dataclasses.replace(fit, draws={**fit.draws, "loc": fit.draws["loc"] + apart})


def slow(fit):
    noise = rng.standard_normal((4, 300, 1, 1), rng.make_generator(3))
    kept = [noise[:, 0]]
    for k in range(1, 300):
        kept.append(0.9 * kept[-1] + 0.19**0.5 * noise[:, k])
    return dataclasses.replace(fit, draws={**fit.draws, "loc": torch.stack(kept, 1)})


def diverged(fit):
    one = fit.sample_stats["diverging"].clone()
    one[2, 17] = True
    return dataclasses.replace(fit, sample_stats={**fit.sample_stats, "diverging": one})


def heavy(fit):
    walk = rng.standard_normal((4, 300), rng.make_generator(2)).cumsum(1)
    return dataclasses.replace(fit, sample_stats={**fit.sample_stats, "energy": walk})


def stopped(fit):
    return dataclasses.replace(fit, attrs={**fit.attrs, "converged": False})


def far(fit):
    single = {name: value[:1] for name, value in fit.draws.items()}
    attrs = {**fit.attrs, "k_hat": 0.93}
    return dataclasses.replace(fit, draws=single, sample_stats={}, attrs=attrs)


def test_a_few_chains_among_many_in_a_mode_of_their_own_fail_the_fit():
    """R-hat alone lets them pass, though the mean is off by many Monte Carlo errors."""
    x = rng.standard_normal((60, 1), rng.make_generator(0))
    many = pretend(UnitMixture(1), x, num_chains=256, num_draws=200)
    many = dataclasses.replace(many, attrs={**many.attrs, "num_superchains": 64})
    assert many.verdict()
    loc = many.draws["loc"].clone()
    loc[[3, 77]] += 8.0 * loc.std()
    lost = dataclasses.replace(many, draws={**many.draws, "loc": loc})
    assert "r_hat" not in codes(lost)
    assert codes(lost) == ["apart"]
    assert "2 of 256 chains (3, 77) sit apart" in str(lost.verdict())


@pytest.mark.parametrize(
    ("spread", "words"), [(0.05, "worth 100% of them): means and"), (3.0, "is far from")]
)
def test_k_hat_is_read_beside_the_worth_of_the_weights(fit, spread, words):
    """A heavy tail of nearly equal weights is no reason to distrust the means."""
    weights = spread * rng.standard_normal((1, 300), rng.make_generator(4))
    bad = dataclasses.replace(far(fit), sample_stats={"log_weight": weights})
    assert codes(bad) == ["k_hat"]
    assert words in str(bad.verdict())


def test_chains_that_all_mix_slowly_or_have_heavy_tails_are_not_apart():
    steps = rng.standard_normal((64, 400, 3), rng.make_generator(1))
    assert lone_chains(steps.cumsum(1)) is None
    tails = steps[..., :1] / rng.standard_normal((64, 400, 40), rng.make_generator(2))
    assert lone_chains(tails) is None
    assert lone_chains(torch.zeros(64, 20, 2)) is None
    assert lone_chains(steps[:4] + 100 * torch.arange(4)[:, None, None]) is None  # R-hat's task


@pytest.mark.parametrize(
    ("spoil", "code", "found", "advice"),
    [
        (shifted, "r_hat", "R-hat is", "Run longer"),
        (slow, "ess", "effective sample size is only", "num_samples="),
        (diverged, "divergences", "1 of 1,200 trajectories diverged", "target_accept"),
        (heavy, "e_bfmi", "E-BFMI is 0.0", "non-centred"),
        (stopped, "converged", "stopped before it converged", "max_steps"),
        (far, "k_hat", "k-hat is 0.93, above 0.7", "NUTS"),
    ],
)
def test_each_reason_fails_the_fit_by_its_name(fit, spoil, code, found, advice):
    bad = spoil(fit)
    assert not bad.verdict()
    assert code in codes(bad)
    text = str(bad.verdict())
    assert text.startswith("FAIL\n")
    assert found in text
    assert advice in text
    assert not bad.summary().is_converged
    assert any(found in problem for problem in bad.summary().problems)


def test_an_approximation_is_judged_by_k_hat_and_not_by_r_hat(fit):
    good = dataclasses.replace(far(fit), attrs={**fit.attrs, "k_hat": 0.3})
    assert good.verdict()
    assert good.verdict().findings == ()
    assert "Pareto k-hat 0.30" in str(good.verdict())


def test_one_chain_is_a_caution(fit):
    single = {
        name: value[:1].repeat(1, 3, *[1] * (value.ndim - 2)) for name, value in fit.draws.items()
    }
    noise = rng.standard_normal((1, 900, 1, 1), rng.make_generator(0))
    lone = dataclasses.replace(fit, draws={**single, "loc": noise}, sample_stats={})
    verdict = lone.verdict()
    assert verdict
    assert [finding.code for finding in verdict.cautions] == ["chains"]


def test_sites_too_large_for_the_table_are_judged(fit, monkeypatch):
    monkeypatch.setattr("bayesgen.summary._MAX_ENTRIES", 1)
    fresh = dataclasses.replace(fit)
    assert fresh.summary().left_out
    assert fresh.verdict()
    assert "r_hat" in codes(shifted(fit))


def test_few_draws_of_many_chains_pool_their_energies():
    from bayesgen.verdict import _e_bfmi

    energy = rng.standard_normal((500, 10), rng.make_generator(0))
    assert 1.5 < _e_bfmi(energy) < 2.8  # chain by chain the smallest would be below 0.5
    longer = rng.standard_normal((500, 40), rng.make_generator(0)).cumsum(1)
    assert _e_bfmi(longer) < 0.3


def test_cautions_do_not_fail():
    verdict = Verdict((Finding("labels", "confused", "read invariants", is_fatal=False),), ())
    assert verdict
    assert str(verdict) == "PASS\n  . confused\n    read invariants"
