"""Generators and samplers: right in distribution, reproducible, and the global state untouched."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scipy import stats

from bayesgen import rng
from bayesgen.rng import make_generator

N = 20_000
ALPHA = 1e-4  # a right sampler fails about once in 10,000 checks; seeds are fixed


def fits(x: torch.Tensor, cdf: stats.rv_continuous) -> bool:
    """Kolmogorov-Smirnov test of a sample against a frozen scipy distribution."""
    return bool(stats.kstest(x.double().cpu().numpy().ravel(), cdf.cdf).pvalue > ALPHA)


# ------------------------------------------------------------------ seeds
def test_make_generator(device: torch.device) -> None:
    a, b = make_generator(7, device), make_generator(np.int64(7), device)
    assert torch.equal(rng.standard_normal(5, a), rng.standard_normal(5, b))
    assert a.device.type == device.type
    assert make_generator(a, device) is a


def test_a_drawn_seed_can_be_used_again() -> None:
    a, b = make_generator(None), make_generator(None)
    assert a.initial_seed() != b.initial_seed()
    again = make_generator(a.initial_seed())
    assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=again))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 2\*\*32\), but got"):
        make_generator(seed)


@pytest.mark.parametrize("seed", [0.5, "0", True, torch.tensor([1, 2])])
def test_seeds_of_other_types(seed: object) -> None:
    with pytest.raises((TypeError, ValueError), match="seed|integer"):
        make_generator(seed)  # type: ignore[arg-type]


def test_why_seeds_have_32_bits() -> None:
    """The reason for the limit: should torch change, it can go."""
    a = torch.rand(3, generator=torch.Generator().manual_seed(1))
    b = torch.rand(3, generator=torch.Generator().manual_seed(1 + 2**32))
    assert torch.equal(a, b)


def test_a_generator_of_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="the generator lives on cpu but the computation on meta"):
        make_generator(make_generator(0), "meta")


def test_spawned_seeds_are_distinct_stable_and_independent() -> None:
    seeds = rng.spawn(3, 200_000)  # about 5 collisions in 32 bits, were they not drawn again
    assert len(set(seeds)) == 200_000
    assert seeds[:5] == rng.spawn(3, 5)
    assert rng.spawn(4, 5) != seeds[:5]
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert rng.spawn(0, 0) == []
    first = torch.stack([torch.randn(200, generator=make_generator(s)) for s in seeds[:50]])
    correlation = torch.corrcoef(first)[~torch.eye(50, dtype=torch.bool)]
    assert correlation.abs().max() < 5 / 200**0.5


def test_state_round_trip(device: torch.device) -> None:
    generator = make_generator(0, device)
    rng.standard_normal(3, generator)
    state = rng.get_state(generator)
    expected = rng.standard_normal(3, generator)
    rng.set_state(generator, state)
    assert torch.equal(rng.standard_normal(3, generator), expected)
    other = make_generator(99, device)
    rng.set_state(other, state)
    assert torch.equal(rng.standard_normal(3, other), expected)


# ------------------------------------------------------------------ fork
def draw_globally() -> list[float]:
    import pyro
    import pyro.distributions as dist

    return [
        torch.rand(()).item(),
        float(np.random.rand()),  # noqa: NPY002
        random.random(),
        float(pyro.sample("x", dist.Normal(0.0, 1.0))),
    ]


def global_state() -> list[object]:
    state = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state().tolist(), state[1].tolist(), state[2:], random.getstate()]


def test_fork_is_reproducible_and_restores() -> None:
    before = global_state()
    generator = make_generator(0)
    with rng.fork(generator):
        first = draw_globally()
    with rng.fork(generator):
        second = draw_globally()
    assert global_state() == before
    again = make_generator(0)
    with rng.fork(again):
        assert draw_globally() == first
    assert first != second


def test_fork_restores_after_an_error_and_nests() -> None:
    before = global_state()

    def fail() -> None:
        draw_globally()
        raise KeyError

    with pytest.raises(KeyError), rng.fork(make_generator(0)):
        fail()
    assert global_state() == before
    with rng.fork(make_generator(0)):
        outer = draw_globally()
    with rng.fork(make_generator(0)):
        with rng.fork(make_generator(5)):
            draw_globally()
        assert draw_globally() == outer


@pytest.mark.gpu
def test_fork_covers_cuda() -> None:
    torch.rand(1, device="cuda")
    before = torch.cuda.get_rng_state()
    values = []
    for _ in range(2):
        with rng.fork(make_generator(0, "cuda")):
            values.append(torch.rand(3, device="cuda"))
    assert torch.equal(*values)
    assert torch.equal(torch.cuda.get_rng_state(), before)


# ------------------------------------------------------------------ samplers
def test_standard_normal(generator: torch.Generator, dtype: torch.dtype) -> None:
    x = rng.standard_normal((4, N // 4), generator, dtype)
    assert x.shape == (4, N // 4)
    assert x.dtype == dtype
    assert x.device.type == generator.device.type
    assert fits(x, stats.norm())
    assert not fits(x + 0.1, stats.norm())  # the check has power


@pytest.mark.parametrize("shape", [0.05, 0.5, 1.0, 3.0, 300.0])
def test_gamma_and_its_logarithm(
    shape: float, generator: torch.Generator, dtype: torch.dtype
) -> None:
    concentration = torch.full((N,), shape, dtype=dtype, device=generator.device)
    log_gamma = rng.log_gamma_sample(concentration, generator)
    assert log_gamma.dtype == dtype
    assert fits(log_gamma, stats.loggamma(shape))
    assert not fits(log_gamma, stats.loggamma(shape * 1.1))
    if shape >= 0.5:  # below, float32 underflows
        assert fits(rng.gamma(concentration, generator), stats.gamma(shape))


@pytest.mark.parametrize("shape", [1e-2, 1e-4, 1e-8])
def test_log_gamma_does_not_underflow(shape: float, generator: torch.Generator) -> None:
    """As the shape vanishes, ``-shape * log G`` tends to a standard exponential."""
    concentration = torch.full((N,), shape, dtype=torch.float64, device=generator.device)
    log_gamma = rng.log_gamma_sample(concentration, generator)
    assert log_gamma.isfinite().all()
    if shape < 1e-3:
        assert fits(-shape * log_gamma, stats.expon())
        # What one would do without this function loses nearly everything.
        assert (rng.gamma(concentration, generator).log() < -700).double().mean() > 0.9
    else:
        assert fits(log_gamma, stats.loggamma(shape))


def test_log_dirichlet(generator: torch.Generator) -> None:
    concentration = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64, device=generator.device)
    weights = rng.log_dirichlet(concentration.expand(N, 3), generator).exp()
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[:, 0]), atol=1e-14)
    for k, a in enumerate(concentration.tolist()):
        assert fits(weights[:, k], stats.beta(a, 6.5 - a))
    covariance = torch.cov(weights.T).cpu().numpy()
    assert np.abs(covariance - stats.dirichlet.cov([0.5, 2.0, 4.0])).max() < 2e-3


def test_log_dirichlet_with_tiny_concentrations(generator: torch.Generator) -> None:
    """All mass on one component, chosen uniformly; no NaN."""
    concentration = torch.full((N, 4), 1e-6, dtype=torch.float64, device=generator.device)
    log_weights = rng.log_dirichlet(concentration, generator)
    assert log_weights.isfinite().all()
    assert torch.allclose(log_weights.logsumexp(-1), log_weights.new_zeros(N), atol=1e-12)
    counts = np.bincount(log_weights.argmax(-1).cpu().numpy(), minlength=4)
    assert stats.chisquare(counts).pvalue > ALPHA


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (2.0, 5.0), (0.3, 30.0)])
def test_beta(a: float, b: float, generator: torch.Generator) -> None:
    one = torch.ones(N, dtype=torch.float64, device=generator.device)
    assert fits(rng.beta(a * one, b * one[:1], generator), stats.beta(a, b))
    log_v, log_rest = rng.log_beta_sample(a * one, b * one, generator)
    assert torch.allclose(log_v.exp() + log_rest.exp(), one, atol=1e-14)
    assert fits(log_rest.exp(), stats.beta(b, a))


def test_log_beta_keeps_both_tails(generator: torch.Generator) -> None:
    one = torch.full((N,), 1e-3, dtype=torch.float64, device=generator.device)
    log_v, log_rest = rng.log_beta_sample(one, one, generator)
    assert log_v.isfinite().all()
    assert log_rest.isfinite().all()
    assert (log_rest < -1000).any()
    assert (log_v < -1000).any()


@pytest.mark.parametrize("df", [0.7, 4.0])
def test_chi2(df: float, generator: torch.Generator) -> None:
    x = rng.chi2(torch.full((N,), df, dtype=torch.float64, device=generator.device), generator)
    assert fits(x, stats.chi2(df))


@pytest.mark.parametrize("dim", [-2, 0, 1, -1])
def test_categorical(dim: int, generator: torch.Generator, dtype: torch.dtype) -> None:
    probs = torch.tensor([0.02, 0.0, 0.5, 0.28, 0.2, 0.0], dtype=dtype, device=generator.device)
    shape = [2, 3, N // 6]
    positive = dim % 4 if dim >= 0 else dim + 4
    shape.insert(positive, 1)
    logits = probs.log() + 900.0  # not normalised: exp would overflow
    logits = logits.movedim(0, -1).reshape([6 if i == positive else 1 for i in range(4)])
    index = rng.categorical(logits.expand([6 if s == 1 else s for s in shape]), generator, dim)
    assert index.shape == (2, 3, N // 6)
    assert index.dtype == torch.int64
    counts = np.bincount(index.cpu().numpy().ravel(), minlength=6)
    assert counts[[1, 5]].tolist() == [0, 0]
    kept = [0, 2, 3, 4]
    expected = probs.double().cpu().numpy()[kept]
    assert stats.chisquare(counts[kept], expected / expected.sum() * counts.sum()).pvalue > ALPHA
    wrong = np.array([0.03, 0.5, 0.27, 0.2])
    assert stats.chisquare(counts[kept], wrong * counts.sum()).pvalue < ALPHA


def test_categorical_leaves_its_input_and_takes_single_categories(
    generator: torch.Generator,
) -> None:
    logits = torch.zeros(1, 5, dtype=torch.float64, device=generator.device)
    assert rng.categorical(logits, generator).tolist() == [0] * 5
    assert torch.equal(logits, torch.zeros_like(logits))
    rare = torch.tensor([[0.0], [-30.0]], dtype=torch.float64, device=generator.device)
    assert rng.categorical(rare.expand(2, N), generator).sum() <= 1


def test_samplers_are_reproducible_and_leave_the_global_generator() -> None:
    before = torch.get_rng_state()

    def everything(seed: int) -> list[torch.Tensor]:
        g = make_generator(seed)
        a = torch.tensor([0.3, 2.0], dtype=torch.float64)
        return [
            rng.standard_normal((2,), g),
            rng.gamma(a, g),
            rng.log_gamma_sample(a, g),
            rng.log_dirichlet(a, g),
            rng.beta(a, a, g),
            rng.chi2(a, g),
            rng.categorical(torch.zeros(7, 50), g),
        ]

    for x, y in zip(everything(0), everything(0), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(everything(0)[0], everything(1)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_gamma_is_differentiable() -> None:
    """The pathwise derivative of the mean of Gamma(a) is one."""
    a = torch.full((N,), 2.5, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(rng.gamma(a, make_generator(0)).mean() * N, a)
    assert grad.mean().item() == pytest.approx(1.0, abs=0.02)
